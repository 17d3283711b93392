package boot

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/google/uuid"
	"go.uber.org/zap"

	"ordersaga/adapters/httpapi"
	"ordersaga/adapters/kafka"
	"ordersaga/adapters/telemetry"
	"ordersaga/domain"
	"ordersaga/events"
)

// Topics are all topics as the configuration wants them. On a single replica, which is for trial, nothing is lost by age.
func Topics(c *Config) []kafka.TopicSpec {
	t := kafka.TopicsConfig{Partitions: c.Kafka.Partitions, Replication: c.Kafka.Replication, Delays: c.Retry.Delays}
	if c.Kafka.Embedded {
		// What the in-process broker needs: no retention by time, which it forgets, but by size, which we apply.
		t.Retention, t.DLQRetention, t.RetentionBytes = -1, -1, embeddedRetention
	}
	return t.Topics()
}

// embeddedRetention bounds a partition of the in-process broker.
const embeddedRetention = 256 << 20

// OpenKafka makes the client; it connects when it is first used. log may be nil.
func OpenKafka(c *Config, log *zap.Logger, observer *telemetry.Observer) (*kafka.Client, func(), error) {
	if len(c.Kafka.Brokers) == 0 {
		return nil, nil, errors.New("kafka: no brokers: set kafka.brokers (ORDERSAGA_KAFKA_BROKERS), such as kafka-1:9092,kafka-2:9092")
	}
	if log == nil {
		log = zap.NewNop()
	}
	kc := kafka.Config{
		Brokers: c.Kafka.Brokers, Names: events.Names{Prefix: c.Kafka.TopicPrefix}, ClientID: c.Kafka.ClientID, InstanceID: c.Kafka.InstanceID,
		Session: c.Kafka.Session,
		SASL:    kafka.SASL{Mechanism: c.Kafka.SASL.Mechanism, Username: c.Kafka.SASL.Username, Password: c.Kafka.SASL.Password},
	}
	if observer != nil {
		kc.Observer = observer
	}
	stop := func() {}
	if t := c.Kafka.TLS; t.Enabled {
		report := func(err error) { log.Error("kafka: certificate not read again, the old one stays", zap.Error(err)) }
		cfg, end, err := ClientTLS(t.CAFile, t.CertFile, t.KeyFile, t.ServerName, report)
		if err != nil {
			return nil, nil, fmt.Errorf("kafka.tls: %w", err)
		}
		stop = end
		kc.TLS = func() (*tls.Config, error) { return cfg.Clone(), nil }
	}
	cl, err := kafka.New(kc)
	if err != nil {
		stop()
		return nil, nil, err
	}
	return cl, func() { cl.Close(); stop() }, nil
}

func (a *App) openKafka(ctx context.Context) error {
	cl, stop, err := OpenKafka(&a.cfg, a.log, a.observer)
	if err != nil {
		return err
	}
	a.kafka = cl
	a.closers = append(a.closers, stop)
	if err := a.await(ctx, "the brokers", cl.Ping); err != nil {
		return err
	}
	specs := Topics(&a.cfg)
	if a.opts.Prepare {
		plan, err := cl.TopicPlan(ctx, specs)
		if err != nil {
			return err
		}
		for _, r := range cl.ApplyTopics(ctx, plan) {
			if r.Err != nil {
				return fmt.Errorf("topic %s: %w", r.Topic, r.Err)
			}
		}
	}
	names := make([]events.Topic, len(specs))
	for i := range specs {
		names[i] = specs[i].Name
	}
	return a.await(ctx, "the topics", func(ctx context.Context) error { return cl.CheckTopics(ctx, names...) })
}

// PublishCommand sends a record to the command topic as a producer outside would, and waits for its acknowledgement.
func (a *App) PublishCommand(ctx context.Context, key, ceType, ceID string, value []byte) error {
	p, err := a.publisher()
	if err != nil {
		return err
	}
	acked := make(chan error, 1)
	p.Produce(ctx, events.Record{
		Topic: events.TopicCommands, Key: []byte(key), Value: value,
		Headers: []events.Header{
			{Key: events.HeaderType, Value: []byte(ceType)}, {Key: events.HeaderID, Value: []byte(ceID)}, {Key: events.HeaderSource, Value: []byte("/demo")},
			{Key: events.HeaderContentType, Value: []byte(events.ContentJSON)},
		},
	}, func(err error) { acked <- err })
	select {
	case err := <-acked:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (a *App) publisher() (*kafka.Producer, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.outside == nil {
		p, err := a.kafka.NewProducer(kafka.ProducerConfig{})
		if err != nil {
			return nil, err
		}
		a.outside = p
		a.closers = append(a.closers, p.Close)
	}
	return a.outside, nil
}

// waitedFor reports that a request waits for events of the order that a record's key names. A key that names none is left to the decoder.
func (a *App) waitedFor(key []byte) bool {
	id, err := uuid.ParseBytes(key)
	return err != nil || a.hub.Wanted(domain.OrderID(id))
}

// publish hands public events to the requests that wait for them. What nobody waits for is not looked at.
func (a *App) publish(_ context.Context, batch []events.Envelope) {
	for i := range batch {
		e := &batch[i]
		id := domain.OrderID(e.OrderID)
		if !a.hub.Wanted(id) {
			continue
		}
		body, err := json.Marshal(e.Data)
		if err != nil {
			a.log.Error("public event not shown", zap.Error(err))
			continue
		}
		a.hub.Publish(httpapi.Update{Order: id, Sequence: e.Sequence, Name: string(e.Type), Terminal: e.Type != events.TOrderPlaced, Data: body})
	}
}

// lagEvery is how often the lag of the groups is exported.
const lagEvery = 10 * time.Second
