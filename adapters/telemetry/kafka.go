package telemetry

import (
	"strconv"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"

	"ordersaga/events"
)

// Bounds of what is kept of Kafka.
const (
	maxParts = 64               // parts whose problems are told apart
	maxLags  = 10_000           // partitions whose lag is kept
	lagKeep  = 90 * time.Second // a lag that was not heard of for so long is not known any more
)

type kafkaMetrics struct {
	problems *prometheus.CounterVec
	parts    *labels
	lags     lagTable
}

func newKafkaMetrics(f promauto.Factory) kafkaMetrics {
	return kafkaMetrics{problems: counter(f, "kafka", "problems_total", "Errors of the Kafka client that it deals with itself.", "part"), parts: newLabels(maxParts)}
}

// KafkaProblem is the Kafka adapter's Observer's: an error that is being dealt with.
func (m *Metrics) KafkaProblem(part string, _ error) {
	m.problems.WithLabelValues(m.parts.of(part)).Inc()
}

// KafkaAssigned is the Kafka adapter's Observer's. Groups are named as in Kafka, here and below: with the installation's prefix.
func (m *Metrics) KafkaAssigned(group string, partitions int) {
	m.assigned.WithLabelValues(group).Set(float64(partitions))
}

// KafkaBuffered is the Kafka adapter's Observer's.
func (m *Metrics) KafkaBuffered(group string, records, paused int) {
	m.buffered.WithLabelValues(group).Set(float64(records))
	m.paused.WithLabelValues(group).Set(float64(paused))
}

// KafkaLag is the Kafka adapter's Observer's: how many records of a partition a group has not settled.
func (m *Metrics) KafkaLag(group, topic string, partition int32, records int64) {
	m.lags.set(lagKey{group, topic, partition}, records, time.Now())
}

// SetLag says the same for some partitions of a group's own topic.
func (m *Metrics) SetLag(group events.Group, behind map[int32]int64) {
	for p, n := range behind {
		m.KafkaLag(string(group), "", p, n)
	}
}

type lagKey struct {
	group, topic string
	partition    int32
}

type lag struct {
	records int64
	at      time.Time
}

// lagTable is a collector of lags. What is not renewed disappears: a gauge that stands still would look like a group that does.
type lagTable struct {
	mu sync.Mutex
	by map[lagKey]lag
}

var descLag = desc("consumer_lag_records", "Records of a partition that the group has not settled.", "group", "topic", "partition")

func (t *lagTable) set(k lagKey, records int64, now time.Time) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.by == nil {
		t.by = map[lagKey]lag{}
	}
	if _, ok := t.by[k]; ok || len(t.by) < maxLags {
		t.by[k] = lag{records, now}
	}
}

func (t *lagTable) forget(before time.Time) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for k, l := range t.by {
		if l.at.Before(before) {
			delete(t.by, k)
		}
	}
}

// Describe is prometheus.Collector's.
func (t *lagTable) Describe(ch chan<- *prometheus.Desc) { ch <- descLag }

// Collect is prometheus.Collector's.
func (t *lagTable) Collect(ch chan<- prometheus.Metric) {
	t.forget(time.Now().Add(-lagKeep))
	t.mu.Lock()
	defer t.mu.Unlock()
	for k, l := range t.by {
		ch <- prometheus.MustNewConstMetric(descLag, prometheus.GaugeValue, float64(l.records), label(k.group), label(k.topic), strconv.Itoa(int(k.partition)))
	}
}
