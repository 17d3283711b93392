package bench

import (
	"strconv"
	"sync"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"
	"github.com/google/uuid"
)

// Bounds of the histograms, in microseconds, and their digits.
const (
	minLatency    = 1
	maxLatency    = 10 * 60 * 1e6
	latencyDigits = 3
)

func newHistogram() *hdrhistogram.Histogram {
	return hdrhistogram.New(minLatency, maxLatency, latencyDigits)
}

func record(h *hdrhistogram.Histogram, d time.Duration) {
	_ = h.RecordValue(min(max(d.Microseconds(), minLatency), maxLatency)) // within the bounds by construction
}

// Outcomes of an order.
const (
	OutcomeConfirmed = "confirmed"
	OutcomeRejected  = "rejected"
	OutcomeCancelled = "cancelled"
)

// Recorder keeps what became of the orders of one phase. Safe for concurrent use.
type Recorder struct {
	start time.Time

	mu       sync.Mutex
	waiting  map[uuid.UUID]time.Time // due times of orders under way
	ended    int64
	inWindow int64     // ended before the window closed
	windowTo time.Time // zero: still open
	accepted int64
	refused  int64 // 429 and 503
	errors   map[string]int64
	outcomes map[string]int64
	latency  *hdrhistogram.Histogram // due to terminal
	response *hdrhistogram.Histogram // due to answer
	second   *hdrhistogram.Histogram // latency of the second under way
	series   []Second
	idle     chan struct{} // closed when nothing is under way any more, made by Idle
}

// Second is one second of a phase.
type Second struct {
	At       int     `json:"t"` // since the phase began
	Accepted int64   `json:"accepted"`
	Refused  int64   `json:"refused"`
	Ended    int64   `json:"ended"`
	UnderWay int     `json:"under_way"`
	P50      float64 `json:"p50_ms"`
	P99      float64 `json:"p99_ms"`
	CPU      float64 `json:"cpu_cores"` // of the service, where its process is known
	RSS      float64 `json:"rss_mb"`
}

// NewRecorder begins a phase.
func NewRecorder(now time.Time) *Recorder {
	return &Recorder{
		start: now, waiting: map[uuid.UUID]time.Time{}, errors: map[string]int64{}, outcomes: map[string]int64{},
		latency: newHistogram(), response: newHistogram(), second: newHistogram(),
	}
}

// Expect says that an order is about to be sent: its end may be heard of before its answer.
func (r *Recorder) Expect(id uuid.UUID, due time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.waiting[id] = due
}

// Answered records the answer to an order, and answers whether it was accepted.
func (r *Recorder) Answered(id uuid.UUID, due, now time.Time, a Answer, err error) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	record(r.response, now.Sub(due))
	if err == nil && a.Status == 202 {
		r.accepted++
		s := r.at(now)
		s.Accepted++
		return true
	}
	switch {
	case err != nil:
		r.errors[class(err)]++
	case a.Status == 429 || a.Status == 503:
		r.refused++
		s := r.at(now)
		s.Refused++
		r.errors[strconv.Itoa(a.Status)]++
	default:
		r.errors[strconv.Itoa(a.Status)]++
	}
	delete(r.waiting, id)
	r.rest()
	return false
}

// Failed records something beside an order that went wrong.
func (r *Recorder) Failed(what string, a Answer, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if err != nil {
		r.errors[what+" "+class(err)]++
		return
	}
	r.errors[what+" "+strconv.Itoa(a.Status)]++
}

// class is a short name for what went wrong on the way.
func class(err error) string {
	type timeout interface{ Timeout() bool }
	for e := err; e != nil; {
		if t, ok := e.(timeout); ok && t.Timeout() {
			return "timeout"
		}
		u, ok := e.(interface{ Unwrap() error })
		if !ok {
			break
		}
		e = u.Unwrap()
	}
	return "connection"
}

// Ended records the end of an order of this phase, and answers false for any other.
func (r *Recorder) Ended(id uuid.UUID, now time.Time, outcome string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	due, ok := r.waiting[id]
	if !ok {
		return false
	}
	delete(r.waiting, id)
	r.ended++
	r.outcomes[outcome]++
	if r.windowTo.IsZero() || now.Before(r.windowTo) {
		r.inWindow++
	}
	record(r.latency, now.Sub(due))
	s := r.at(now)
	s.Ended++
	record(r.second, now.Sub(due))
	r.rest()
	return true
}

func (r *Recorder) rest() {
	if len(r.waiting) == 0 && r.idle != nil {
		close(r.idle)
		r.idle = nil
	}
}

// at answers the second that now lies in, finishing those before. Under mu.
func (r *Recorder) at(now time.Time) *Second {
	n := max(int(now.Sub(r.start)/time.Second), 0)
	for len(r.series) <= n {
		if len(r.series) > 0 {
			r.finish()
		}
		r.series = append(r.series, Second{At: len(r.series)})
	}
	return &r.series[len(r.series)-1]
}

func (r *Recorder) finish() {
	s := &r.series[len(r.series)-1]
	s.UnderWay = len(r.waiting)
	s.P50, s.P99 = ms(r.second.ValueAtQuantile(50)), ms(r.second.ValueAtQuantile(99))
	r.second.Reset()
}

// Gauge notes CPU and memory of the service for the second that now lies in.
func (r *Recorder) Gauge(now time.Time, cpu, rss float64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := r.at(now)
	s.CPU, s.RSS = cpu, rss
}

// Close ends the window in which ends count towards the rate: orders still under way are waited for, but no longer load.
func (r *Recorder) Close(now time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.windowTo = now
}

// Idle is closed once nothing is under way.
func (r *Recorder) Idle() <-chan struct{} {
	r.mu.Lock()
	defer r.mu.Unlock()
	c := make(chan struct{})
	if len(r.waiting) == 0 {
		close(c)
		return c
	}
	r.idle = c
	return c
}

func ms(us int64) float64 { return float64(us) / 1e3 }

// Latency is a histogram's summary, in milliseconds.
type Latency struct {
	Count int64   `json:"count"`
	Mean  float64 `json:"mean"`
	P50   float64 `json:"p50"`
	P90   float64 `json:"p90"`
	P99   float64 `json:"p99"`
	P999  float64 `json:"p99_9"`
	Max   float64 `json:"max"`
	// Curve is pairs of a share of all orders, in per cent, and the latency that so many stayed within.
	Curve [][2]float64 `json:"curve,omitempty"`
}

// curvePoints are the shares of Latency.Curve.
var curvePoints = []float64{1, 5, 10, 25, 50, 75, 90, 95, 98, 99, 99.5, 99.8, 99.9, 99.95, 99.98, 99.99, 99.999, 100}

func summarize(h *hdrhistogram.Histogram) Latency {
	l := Latency{Count: h.TotalCount()}
	if l.Count == 0 {
		return l
	}
	l.Mean, l.Max = h.Mean()/1e3, ms(h.Max())
	l.P50, l.P90, l.P99, l.P999 = ms(h.ValueAtQuantile(50)), ms(h.ValueAtQuantile(90)), ms(h.ValueAtQuantile(99)), ms(h.ValueAtQuantile(99.9))
	for _, q := range curvePoints {
		l.Curve = append(l.Curve, [2]float64{q, ms(h.ValueAtQuantile(q))})
	}
	return l
}

// into writes what was recorded into a report's phase.
func (r *Recorder) into(p *Phase, window time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.series) > 0 {
		r.finish()
	}
	p.Accepted, p.Refused, p.Ended, p.NotEnded = r.accepted, r.refused, r.ended, int64(len(r.waiting))
	p.Errors, p.Outcomes, p.Series = r.errors, r.outcomes, r.series
	p.AcceptedPerSec, p.EndedPerSec = float64(r.accepted)/window.Seconds(), float64(r.inWindow)/window.Seconds()
	p.Latency, p.Response = summarize(r.latency), summarize(r.response)
}
