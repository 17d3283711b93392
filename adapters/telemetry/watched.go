package telemetry

import (
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"ordersaga/events"
)

// SagaStats is how sagas stand.
type SagaStats struct {
	Running       int64 // without an end
	Stuck         int64
	OldestRunning time.Duration // age
}

// PoolStats is how a pool of database connections stands; the counts grow from the start of the process.
type PoolStats struct {
	Name              string // the pool's purpose
	Limit, Used, Idle int32
	Acquired          int64
	Waited            int64         // of those acquired
	WaitedFor         time.Duration // together
	Canceled          int64         // given up while waiting
}

// watched asks for its values when it is scraped. The callbacks answer from memory, at once: a scrape must not wait for a database.
// What is not set, or answers that it does not know, has no sample: absent is honest, 0 would not be.
type watched struct {
	sagas atomic.Pointer[func() (SagaStats, bool)]
	dead  atomic.Pointer[func() (map[events.Group]int64, bool)]
	pools atomic.Pointer[func() []PoolStats]
	queue atomic.Pointer[func() (length, limit int)]
}

// WatchSagas sets where the number of sagas and the age of the oldest come from; false: not known.
func (w *watched) WatchSagas(f func() (SagaStats, bool)) { w.sagas.Store(&f) }

// WatchDeadLetters sets where the open dead letters of each group come from; false: not known. Groups without any should be there
// with 0.
func (w *watched) WatchDeadLetters(f func() (map[events.Group]int64, bool)) { w.dead.Store(&f) }

// WatchPools sets where the pools' statistics come from.
func (w *watched) WatchPools(f func() []PoolStats) { w.pools.Store(&f) }

// WatchIntakeQueue sets where the length of the intake's queue and its limit come from.
func (w *watched) WatchIntakeQueue(f func() (length, limit int)) { w.queue.Store(&f) }

func desc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc(namespace+"_"+name, help, labels, nil)
}

var (
	descRunning   = desc("sagas_running", "Sagas without an end.")
	descStuck     = desc("sagas_stuck", "Sagas that wait for a late fact or a person.")
	descOldest    = desc("saga_oldest_running_age_seconds", "Age of the oldest saga without an end.")
	descDead      = desc("dead_letters_open", "Dead letters that wait for a person.", "group")
	descConns     = desc("db_pool_connections", "Connections to the database.", "pool", "state")
	descConnLimit = desc("db_pool_connections_limit", "The most connections that the pool opens.", "pool")
	descAcquires  = desc("db_pool_acquires_total", "Connections taken from the pool.", "pool")
	descWaits     = desc("db_pool_acquire_waits_total", "Connections that had to be waited for.", "pool")
	descWaitTime  = desc("db_pool_acquire_wait_seconds_total", "Time spent waiting for connections.", "pool")
	descCanceled  = desc("db_pool_acquires_canceled_total", "Waits for a connection that were given up.", "pool")
	descQueue     = desc("intake_queue_length", "Submissions that wait.")
	descQueueMax  = desc("intake_queue_limit", "The most submissions that may wait.")
)

// Describe is prometheus.Collector's.
func (w *watched) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{
		descRunning, descStuck, descOldest, descDead, descConns, descConnLimit, descAcquires, descWaits, descWaitTime, descCanceled, descQueue, descQueueMax,
	} {
		ch <- d
	}
}

// Collect is prometheus.Collector's.
func (w *watched) Collect(ch chan<- prometheus.Metric) {
	sample := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	if f := w.sagas.Load(); f != nil {
		if s, ok := (*f)(); ok {
			sample(descRunning, float64(s.Running))
			sample(descStuck, float64(s.Stuck))
			sample(descOldest, s.OldestRunning.Seconds())
		}
	}
	if f := w.dead.Load(); f != nil {
		if open, ok := (*f)(); ok {
			for g, n := range open {
				sample(descDead, float64(n), label(string(g)))
			}
		}
	}
	if f := w.queue.Load(); f != nil {
		length, limit := (*f)()
		sample(descQueue, float64(length))
		sample(descQueueMax, float64(limit))
	}
	if f := w.pools.Load(); f != nil {
		for _, p := range (*f)() {
			collectPool(ch, &p)
		}
	}
}

func collectPool(ch chan<- prometheus.Metric, p *PoolStats) {
	send := func(d *prometheus.Desc, t prometheus.ValueType, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, t, v, append([]string{p.Name}, labels...)...)
	}
	send(descConns, prometheus.GaugeValue, float64(p.Used), "used")
	send(descConns, prometheus.GaugeValue, float64(p.Idle), "idle")
	send(descConnLimit, prometheus.GaugeValue, float64(p.Limit))
	send(descAcquires, prometheus.CounterValue, float64(p.Acquired))
	send(descWaits, prometheus.CounterValue, float64(p.Waited))
	send(descWaitTime, prometheus.CounterValue, p.WaitedFor.Seconds())
	send(descCanceled, prometheus.CounterValue, float64(p.Canceled))
}
