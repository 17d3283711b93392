package telemetry

import (
	"net/http"
	"runtime"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promauto"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"ordersaga/consumers"
)

const namespace = "ordersaga"

// Metrics counts, in a registry of its own; see the table in the package comment. It is a consumers.Observer, an outbox.Observer and the
// Observer of payment and of kafka that counts and says nothing; Observer is one that logs as well. Safe for concurrent use.
type Metrics struct {
	reg *prometheus.Registry
	consumerMetrics
	outboxMetrics
	paymentMetrics
	kafkaMetrics
	intakeMetrics
	httpMetrics
	watched
}

// NewMetrics makes the metrics of a process of the given version.
func NewMetrics(version string) *Metrics {
	reg := prometheus.NewRegistry()
	f := promauto.With(reg)
	m := &Metrics{
		reg:             reg,
		consumerMetrics: newConsumerMetrics(f),
		outboxMetrics:   newOutboxMetrics(f),
		paymentMetrics:  newPaymentMetrics(f),
		kafkaMetrics:    newKafkaMetrics(f),
		intakeMetrics:   newIntakeMetrics(f),
		httpMetrics:     newHTTPMetrics(f),
	}
	f.NewGaugeVec(prometheus.GaugeOpts{Namespace: namespace, Name: "build_info", Help: "Always 1; what runs."}, []string{"version", "go_version"}).
		WithLabelValues(label(version), runtime.Version()).Set(1)
	reg.MustRegister(
		&m.watched,
		&m.lags,
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
		collectors.NewGoCollector(collectors.WithGoCollectorRuntimeMetrics(collectors.MetricsGC, collectors.MetricsScheduler)),
	)
	return m
}

// Registry is where others may register metrics of theirs.
func (m *Metrics) Registry() *prometheus.Registry { return m.reg }

// Bounds of one scrape, and of scrapes at a time.
const (
	maxScrapes    = 4
	scrapeTimeout = 10 * time.Second
)

// Handler answers scrapes.
func (m *Metrics) Handler() http.Handler {
	return promhttp.HandlerFor(m.reg, promhttp.HandlerOpts{
		EnableOpenMetrics: true, MaxRequestsInFlight: maxScrapes, Timeout: scrapeTimeout, ErrorHandling: promhttp.ContinueOnError,
	})
}

func counter(f promauto.Factory, subsystem, name, help string, labels ...string) *prometheus.CounterVec {
	return f.NewCounterVec(prometheus.CounterOpts{Namespace: namespace, Subsystem: subsystem, Name: name, Help: help}, labels)
}

func gauge(f promauto.Factory, subsystem, name, help string, labels ...string) *prometheus.GaugeVec {
	return f.NewGaugeVec(prometheus.GaugeOpts{Namespace: namespace, Subsystem: subsystem, Name: name, Help: help}, labels)
}

func histogram(f promauto.Factory, subsystem, name, help string, buckets []float64, labels ...string) *prometheus.HistogramVec {
	return f.NewHistogramVec(prometheus.HistogramOpts{Namespace: namespace, Subsystem: subsystem, Name: name, Help: help, Buckets: buckets}, labels)
}

// Buckets, in seconds and in numbers of things.
var (
	quick = []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60}
	slow  = []float64{.1, .5, 1, 2.5, 5, 10, 30, 60, 300, 900}
	sizes = []float64{1, 2, 5, 10, 25, 50, 100, 250, 500, 1000, 2500, 10000}
)

// maxLabel bounds a label's value, in bytes.
const maxLabel = 100

func label(s string) string { return consumers.CleanText(cleanText(s), maxLabel) }

// labels is a bounded set of values for a label: the first so many that are met; all later ones are "other".
type labels struct {
	max  int
	mu   sync.RWMutex
	seen map[string]string
}

const otherLabel = "other"

func newLabels(n int) *labels { return &labels{max: n, seen: map[string]string{}} }

func (l *labels) of(s string) string {
	l.mu.RLock()
	v, ok := l.seen[s]
	full := len(l.seen) >= l.max
	l.mu.RUnlock()
	switch {
	case ok:
		return v
	case full:
		return otherLabel
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if v, ok = l.seen[s]; ok {
		return v
	}
	if len(l.seen) >= l.max {
		return otherLabel
	}
	v = label(s)
	l.seen[s] = v
	return v
}

// memo keeps what was found by a key. Whoever uses it bounds the keys.
type memo[K comparable, V any] struct {
	mu sync.RWMutex
	by map[K]*V
}

func newMemo[K comparable, V any]() *memo[K, V] { return &memo[K, V]{by: map[K]*V{}} }

func (m *memo[K, V]) of(k K, find func() *V) *V {
	m.mu.RLock()
	v := m.by[k]
	m.mu.RUnlock()
	if v != nil {
		return v
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if v = m.by[k]; v == nil {
		v = find()
		m.by[k] = v
	}
	return v
}
