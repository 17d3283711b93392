package telemetry

import (
	"errors"
	"time"

	"github.com/google/uuid"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"ordersaga/consumers"
	"ordersaga/events"
	"ordersaga/outbox"
)

var (
	_ consumers.Observer = (*Observer)(nil)
	_ outbox.Observer    = (*Observer)(nil)
	_ paymentObserver    = (*Observer)(nil)
	_ kafkaObserver      = (*Observer)(nil)
)

// paymentObserver is payment's Observer, whose room this one may not import.
type paymentObserver interface {
	PaymentCall(call, result string, took time.Duration)
	PaymentBreaker(state string)
}

// kafkaObserver is the Kafka adapter's Observer, likewise.
type kafkaObserver interface {
	KafkaProblem(part string, err error)
	KafkaAssigned(group string, partitions int)
	KafkaBuffered(group string, records, paused int)
	KafkaLag(group, topic string, partition int32, records int64)
}

// Bounds of the log of failures: of each kind (where, what, cause) so many lines in a window; the next one in a later window says how
// many were left out. Metrics count them all.
const (
	failureWindow   = 10 * time.Second
	failureBurst    = 5
	maxFailureKinds = 1024
)

// Observer counts in Metrics, and logs what fails: once, as the rooms report it where it stops.
type Observer struct {
	*Metrics
	log   *zap.Logger
	limit *limiter
	now   func() time.Time
}

// NewObserver makes the observer of all rooms: consumers.Observer, outbox.Observer, and the Observer of payment and of kafka.
func NewObserver(m *Metrics, log *zap.Logger) *Observer {
	return &Observer{Metrics: m, log: unsampled(log), limit: newLimiter(failureWindow, failureBurst, 0, maxFailureKinds), now: time.Now}
}

// say logs one of a kind, if that kind has not been heard of too often. fields is called only then.
func (o *Observer) say(level zapcore.Level, msg, kind string, fields func() []zap.Field) {
	if !o.log.Core().Enabled(level) {
		return
	}
	ok, suppressed := o.limit.allow(msg+"\x00"+kind, o.now())
	if !ok {
		return
	}
	f := fields()
	if suppressed > 0 {
		f = append(f, zap.Int("suppressed", suppressed))
	}
	o.log.Log(level, msg, f...)
}

// Failed counts and logs a failed delivery: as an error if a person must look (a dead letter, or a message that can't get any
// further), as a warning if it will be tried again, for debugging only if that happens at once.
func (o *Observer) Failed(d *consumers.Delivery, v consumers.Verdict, err error) {
	o.Metrics.Failed(d, v, err)
	msg, level := failedAs(v)
	if !o.log.Core().Enabled(level) {
		return
	}
	class := classOf(v)
	// The same fingerprint as in dead_letters.
	fingerprint := consumers.Fingerprint(class, string(d.Type), v.Reason)
	kind := string(d.Group) + "\x00" + o.typeLabel(d) + "\x00" + v.Kind.String() + "\x00" + fingerprint
	o.say(level, msg, kind, func() []zap.Field {
		f := []zap.Field{
			zap.String("group", string(d.Group)), zap.String("type", string(d.Type)), zap.String("verdict", v.Kind.String()),
			orderField(d.OrderID), zap.Stringer("message_id", d.ID), zap.Int("attempt", d.Attempt),
			zap.String("class", class), zap.String("fingerprint", fingerprint), zap.String("error", v.Reason),
			zap.String("topic", string(d.Origin.Topic)), zap.Int32("partition", d.Origin.Partition), zap.Int64("offset", d.Origin.Offset),
			traceField(d.Trace),
		}
		if v.Kind == consumers.Retry {
			f = append(f, zap.Int("tier", v.Tier), zap.Time("due", v.Due))
		}
		if d.Replay {
			f = append(f, zap.Bool("replay", true))
		}
		var p *consumers.PanicError
		if errors.As(err, &p) {
			f = append(f, zap.String("stack", string(p.Stack)))
		}
		return f
	})
}

func failedAs(v consumers.Verdict) (msg string, level zapcore.Level) {
	switch {
	case v.Kind == consumers.Dead:
		return "dead letter", zapcore.ErrorLevel
	case v.Stalled:
		return "stalled: failed in the slowest tier, goes on trying", zapcore.ErrorLevel
	case v.Kind == consumers.Retry:
		return "failed, will be retried", zapcore.WarnLevel
	default:
		return "failed, tried again at once", zapcore.DebugLevel
	}
}

func orderField(id uuid.UUID) zap.Field {
	if id == uuid.Nil {
		return zap.Skip()
	}
	return zap.Stringer("order_id", id)
}

// Held counts and logs that records wait.
func (o *Observer) Held(group events.Group, dependency string, records int, waited time.Duration, err error) {
	o.Metrics.Held(group, dependency, records, waited, err)
	o.say(zapcore.WarnLevel, "waiting for a dependency", string(group)+"\x00"+o.dependencies.of(dependency), func() []zap.Field {
		return []zap.Field{
			zap.String("group", string(group)), zap.String("dependency", dependency), zap.Int("records", records), zap.Duration("waited", waited), zap.Error(err),
		}
	})
}

// Split counts and logs that a batch is taken apart. The failure itself is logged when its record is found.
func (o *Observer) Split(group events.Group, records int, err error) {
	o.Metrics.Split(group, records, err)
	o.say(zapcore.InfoLevel, "batch taken apart", string(group), func() []zap.Field {
		return []zap.Field{zap.String("group", string(group)), zap.Int("records", records), zap.Error(err)}
	})
}

// ShardFenced counts and logs that another relay took over. It is no failure: this process was slow, or is being replaced.
func (o *Observer) ShardFenced(shard int16) {
	o.Metrics.ShardFenced(shard)
	o.say(zapcore.InfoLevel, "another relay took a shard", "", func() []zap.Field { return []zap.Field{zap.Int16("shard", shard)} })
}

// RecordSetAside counts and logs a record that Kafka refuses for good.
func (o *Observer) RecordSetAside(m *outbox.Message, reason error, bare bool) {
	o.Metrics.RecordSetAside(m, reason, bare)
	o.say(zapcore.ErrorLevel, "record set aside: Kafka refuses it", setAsideKind(bare)+"\x00"+string(m.Type)+"\x00"+string(m.Topic), func() []zap.Field {
		return []zap.Field{
			zap.Stringer("message_id", m.ID), zap.String("type", string(m.Type)), zap.String("topic", string(m.Topic)), orderField(m.OrderID),
			zap.Int64("row", m.RowID), zap.Int16("shard", m.Shard), zap.Int("bytes", len(m.Payload)), zap.String("kind", setAsideKind(bare)),
			traceField(m.Trace), zap.Error(reason),
		}
	})
}

// RelayFailed counts and logs a failed attempt of the relay.
func (o *Observer) RelayFailed(op string, err error) {
	o.Metrics.RelayFailed(op, err)
	op = o.operations.of(op)
	o.say(zapcore.WarnLevel, "relay failed, tries again", op+"\x00"+causeOf(op, err), func() []zap.Field {
		return []zap.Field{zap.String("operation", op), zap.Error(err)}
	})
}

// KafkaProblem counts and logs an error that the Kafka client deals with.
func (o *Observer) KafkaProblem(part string, err error) {
	o.Metrics.KafkaProblem(part, err)
	part = o.parts.of(part)
	o.say(zapcore.WarnLevel, "kafka problem", part+"\x00"+causeOf(part, err), func() []zap.Field {
		return []zap.Field{zap.String("part", part), zap.Error(err)}
	})
}

// KafkaAssigned counts partitions, and says so for debugging.
func (o *Observer) KafkaAssigned(group string, partitions int) {
	o.Metrics.KafkaAssigned(group, partitions)
	o.log.Debug("partitions assigned", zap.String("group", group), zap.Int("partitions", partitions))
}

// causeOf tells causes apart, whatever numbers and ids their text has.
func causeOf(where string, err error) string {
	if err == nil {
		return ""
	}
	return consumers.Fingerprint(where, "", consumers.CleanText(err.Error(), consumers.MaxErrorBytes))
}

// PaymentBreaker counts and logs the breaker's moves.
func (o *Observer) PaymentBreaker(state string) {
	o.Metrics.PaymentBreaker(state)
	level := zapcore.InfoLevel
	if state == breakerOpen {
		level = zapcore.WarnLevel
	}
	o.say(level, "payment gateway's breaker is "+label(state), "", func() []zap.Field { return nil })
}
