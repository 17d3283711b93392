package telemetry

import (
	"errors"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"

	"ordersaga/consumers"
	"ordersaga/events"
)

var _ consumers.Observer = (*Metrics)(nil)

// Bounds on labels whose values are not ours alone.
const (
	maxTypes        = 64
	maxDependencies = 16
)

type consumerMetrics struct {
	batchSeconds  *prometheus.HistogramVec
	batchRecords  *prometheus.HistogramVec
	interrupted   *prometheus.CounterVec
	transactions  *prometheus.CounterVec
	followed      *prometheus.CounterVec
	verdicts      *prometheus.CounterVec
	failures      *prometheus.CounterVec
	stalled       *prometheus.CounterVec
	panics        *prometheus.CounterVec
	holds         *prometheus.CounterVec
	held          *prometheus.GaugeVec
	splits        *prometheus.CounterVec
	lateness      *prometheus.HistogramVec
	assigned      *prometheus.GaugeVec
	buffered      *prometheus.GaugeVec
	paused        *prometheus.GaugeVec
	otherTypes    *labels
	dependencies  *labels
	verdictLabels []string
	byGroup       *memo[events.Group, groupMetrics]
}

// groupMetrics are those of one group that every batch counts in, found once: looking them up by their labels costs more than counting.
type groupMetrics struct {
	seconds, records prometheus.Observer
	transactions     prometheus.Counter
	held             prometheus.Gauge
}

func (m *consumerMetrics) ofGroup(g events.Group) *groupMetrics {
	return m.byGroup.of(g, func() *groupMetrics {
		l := string(g)
		return &groupMetrics{
			seconds: m.batchSeconds.WithLabelValues(l), records: m.batchRecords.WithLabelValues(l),
			transactions: m.transactions.WithLabelValues(l), held: m.held.WithLabelValues(l),
		}
	})
}

func newConsumerMetrics(f promauto.Factory) consumerMetrics {
	const s = "consumer"
	m := consumerMetrics{
		batchSeconds: histogram(f, s, "batch_duration_seconds", "A batch from poll to settled.", quick, "group"),
		batchRecords: histogram(f, s, "batch_records", "Records in a batch.", sizes, "group"),
		interrupted:  counter(f, s, "batches_interrupted_total", "Batches cut short by a rebalance or the end of the process.", "group"),
		transactions: counter(f, s, "transactions_total", "Transactions begun.", "group"),
		followed:     counter(f, s, "followed_total", "Messages handled in the transaction that emitted them.", "group"),
		verdicts:     counter(f, s, "verdicts_total", "Verdicts on deliveries.", "group", "verdict"),
		failures:     counter(f, s, "failures_total", "Failed deliveries.", "group", "type", "verdict", "class"),
		stalled:      counter(f, s, "stalled_total", "Failures in the slowest retry tier of messages that have no last attempt.", "group", "type"),
		panics:       counter(f, s, "panics_total", "Panics of handlers and decoders.", "group"),
		holds:        counter(f, s, "holds_total", "Times that records were held back because something is away.", "group", "dependency"),
		held:         gauge(f, s, "held_seconds", "How long records have been waiting for a dependency; 0 when a batch ended.", "group"),
		splits:       counter(f, s, "splits_total", "Batches taken apart to find the record that fails them.", "group"),
		lateness:     histogram(f, s, "retry_lateness_seconds", "How long after they were due retry copies were taken.", slow, "group"),
		assigned:     gauge(f, s, "partitions_assigned", "Partitions that this process holds of a group.", "group"),
		buffered:     gauge(f, s, "buffered_records", "Records fetched and not settled.", "group"),
		paused:       gauge(f, s, "partitions_paused", "Partitions whose fetching is paused because enough of them waits.", "group"),
		otherTypes:   newLabels(maxTypes), dependencies: newLabels(maxDependencies), byGroup: newMemo[events.Group, groupMetrics](),
	}
	for k := consumers.Done; k <= consumers.Repeat; k++ {
		m.verdictLabels = append(m.verdictLabels, k.String())
	}
	return m
}

// Batch is consumers.Observer's.
func (m *consumerMetrics) Batch(s consumers.BatchStats) {
	g, of := string(s.Group), m.ofGroup(s.Group)
	of.seconds.Observe(s.Duration.Seconds())
	of.records.Observe(float64(s.Records))
	of.transactions.Add(float64(s.Transactions))
	for k, verdict := range m.verdictLabels {
		if n := s.Count(consumers.Kind(k)); n > 0 {
			m.verdicts.WithLabelValues(g, verdict).Add(float64(n))
		}
	}
	if s.Followed > 0 {
		m.followed.WithLabelValues(g).Add(float64(s.Followed))
	}
	if s.Foreign > 0 {
		m.verdicts.WithLabelValues(g, "foreign").Add(float64(s.Foreign))
	}
	if s.Interrupted {
		m.interrupted.WithLabelValues(g).Inc()
		return
	}
	of.held.Set(0)
}

// Failed is consumers.Observer's.
func (m *consumerMetrics) Failed(d *consumers.Delivery, v consumers.Verdict, err error) {
	g, typ := string(d.Group), m.typeLabel(d)
	m.failures.WithLabelValues(g, typ, v.Kind.String(), classOf(v)).Inc()
	if v.Stalled {
		m.stalled.WithLabelValues(g, typ).Inc()
	}
	var p *consumers.PanicError
	if errors.As(err, &p) {
		m.panics.WithLabelValues(g).Inc()
	}
}

// Held is consumers.Observer's.
func (m *consumerMetrics) Held(group events.Group, dependency string, _ int, waited time.Duration, _ error) {
	m.holds.WithLabelValues(string(group), m.dependencies.of(dependency)).Inc()
	m.held.WithLabelValues(string(group)).Set(waited.Seconds())
}

// Split is consumers.Observer's.
func (m *consumerMetrics) Split(group events.Group, _ int, _ error) {
	m.splits.WithLabelValues(string(group)).Inc()
}

// Late is consumers.Observer's.
func (m *consumerMetrics) Late(group events.Group, _ int, lateness time.Duration) {
	m.lateness.WithLabelValues(string(group)).Observe(lateness.Seconds())
}

// typeLabel: a type that did not decode is whatever its producer wrote.
func (m *consumerMetrics) typeLabel(d *consumers.Delivery) string {
	if t, ok := events.TypeOf(d.Type); ok {
		return string(t.Name)
	}
	if d.Data == nil {
		return "unknown"
	}
	return m.otherTypes.of(string(d.Type)) // of a library user's own table
}

const classTransient = "transient"

func classOf(v consumers.Verdict) string {
	if v.Class != "" {
		return v.Class
	}
	return classTransient
}
