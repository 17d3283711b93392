package telemetry

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"

	"ordersaga/outbox"
)

var _ outbox.Observer = (*Metrics)(nil)

const maxOperations = 16

type outboxMetrics struct {
	windowSeconds prometheus.Observer
	windowRows    prometheus.Observer
	published     prometheus.Counter
	handedOver    prometheus.Counter
	takenEarly    prometheus.Counter
	rows          prometheus.Gauge
	oldest        prometheus.Gauge
	measured      prometheus.Gauge
	cursorLag     prometheus.Gauge
	leased        prometheus.Gauge
	fenced        prometheus.Counter
	setAside      *prometheus.CounterVec
	relayFailures *prometheus.CounterVec
	operations    *labels
}

func newOutboxMetrics(f promauto.Factory) outboxMetrics {
	const s = "outbox"
	m := outboxMetrics{
		windowSeconds: histogram(f, s, "window_duration_seconds", "One read of the outbox, waiting for the broker included.", quick).WithLabelValues(),
		windowRows:    histogram(f, s, "window_rows", "Rows found by one read of the outbox.", sizes).WithLabelValues(),
		published:     counter(f, s, "published_total", "Records that Kafka acknowledged.").WithLabelValues(),
		handedOver:    counter(f, s, "handed_over_total", "Of them those that went with the commit of their transaction.").WithLabelValues(),
		takenEarly:    counter(f, s, "taken_early_total", "Messages that their readers in this process took ahead of their way through Kafka.").WithLabelValues(),
		rows:          gauge(f, s, "backlog_rows", "Rows that wait in the outbox.").WithLabelValues(),
		oldest:        gauge(f, s, "oldest_age_seconds", "Age of the oldest row that is not known to be in Kafka.").WithLabelValues(),
		measured:      gauge(f, s, "backlog_measured_timestamp_seconds", "When the backlog was last measured; 0 if never.").WithLabelValues(),
		cursorLag:     gauge(f, s, "cursor_lag_seconds", "How long ago the stored cursors were level with what was read.").WithLabelValues(),
		leased:        gauge(f, s, "shards_leased", "Shards that this relay holds.").WithLabelValues(),
		fenced:        counter(f, s, "fenced_total", "Shards that another relay took from this one.").WithLabelValues(),
		setAside:      counter(f, s, "set_aside_total", "Records that Kafka refuses for good.", "kind"),
		relayFailures: counter(f, s, "failures_total", "Failed attempts of the relay.", "operation"),
		operations:    newLabels(maxOperations),
	}
	for _, kind := range []string{setAsideMessage, setAsideLetter} {
		m.setAside.WithLabelValues(kind) // an alarm on the increase needs the zero before it
	}
	return m
}

const (
	setAsideMessage = "message"
	setAsideLetter  = "dead_letter"
)

// WindowRead is outbox.Observer's.
func (m *outboxMetrics) WindowRead(rows int, took time.Duration) {
	m.windowRows.Observe(float64(rows))
	m.windowSeconds.Observe(took.Seconds())
}

// Produced is outbox.Observer's.
func (m *outboxMetrics) Produced(n int) { m.published.Add(float64(n)) }

// HandedOver is outbox.Observer's.
func (m *outboxMetrics) HandedOver(n int) { m.handedOver.Add(float64(n)) }

// TakenEarly is outbox.Observer's.
func (m *outboxMetrics) TakenEarly(n int) { m.takenEarly.Add(float64(n)) }

// BacklogSeen is outbox.Observer's.
func (m *outboxMetrics) BacklogSeen(b outbox.Backlog) {
	m.rows.Set(float64(b.Rows))
	m.oldest.Set(b.OldestSeconds)
	m.measured.SetToCurrentTime()
}

// CursorLag is outbox.Observer's.
func (m *outboxMetrics) CursorLag(d time.Duration) { m.cursorLag.Set(d.Seconds()) }

// LeasesHeld is outbox.Observer's.
func (m *outboxMetrics) LeasesHeld(n int) { m.leased.Set(float64(n)) }

// ShardFenced is outbox.Observer's.
func (m *outboxMetrics) ShardFenced(int16) { m.fenced.Inc() }

// RecordSetAside is outbox.Observer's.
func (m *outboxMetrics) RecordSetAside(_ *outbox.Message, _ error, bare bool) {
	m.setAside.WithLabelValues(setAsideKind(bare)).Inc()
}

func setAsideKind(bare bool) string {
	if bare {
		return setAsideLetter
	}
	return setAsideMessage
}

// RelayFailed is outbox.Observer's.
func (m *outboxMetrics) RelayFailed(op string, _ error) {
	m.relayFailures.WithLabelValues(m.operations.of(op)).Inc()
}
