package main

import (
	"context"
	"maps"
	"time"

	"ordersaga/cmd/ordersaga/internal/bench"
)

// Sample is what was seen at one moment of a phase.
type Sample struct {
	T          float64            `json:"t_s"` // since the sampling began
	RSS        float64            `json:"service_rss_mb"`
	Goroutines float64            `json:"goroutines"`          // of the process that takes orders; 0: it did not answer in time
	CPU        map[string]float64 `json:"cpu_cores"`           // since the sample before
	More       map[string]float64 `json:"more,omitempty"`      // what an experiment adds
	UnderWay   int                `json:"under_way,omitempty"` // orders accepted and not ended, reckoned afterwards
	Ended      int                `json:"ended,omitempty"`     // since the sample before, reckoned afterwards
	at         time.Time
}

// sampleEvery is how often the meters are read meanwhile.
const sampleEvery = time.Second

// sampler reads meters beside a phase.
type sampler struct {
	cancel context.CancelFunc
	done   chan []Sample
}

// watch samples until stop is called. more may be nil.
func (m *meter) watch(ctx context.Context, more func(context.Context) map[string]float64) *sampler {
	ctx, cancel := context.WithCancel(ctx)
	s := &sampler{cancel, make(chan []Sample, 1)}
	go func() { s.done <- m.sample(ctx, more) }()
	return s
}

func (s *sampler) stop() []Sample {
	s.cancel()
	return <-s.done
}

// scrapeTimeout bounds a look at the service's metrics: a service under load may be slow to answer.
const scrapeTimeout = 900 * time.Millisecond

func (m *meter) sample(ctx context.Context, more func(context.Context) map[string]float64) (out []Sample) {
	metrics, err := bench.NewEndpoint(m.sys.urls[0], scrapeTimeout)
	if err != nil {
		return nil // the load could not be sent there either
	}
	t := time.NewTicker(sampleEvery)
	defer t.Stop()
	began := time.Now()
	last, lastAt, err := m.cpuAt()
	for err == nil {
		select {
		case <-t.C:
		case <-ctx.Done():
			return out
		}
		s := Sample{RSS: m.sys.memory(), CPU: map[string]float64{}}
		if got, err := bench.Scrape(ctx, metrics, "", "/metrics"); err == nil {
			s.Goroutines = got["go_goroutines"]
		}
		if more != nil {
			s.More = more(ctx)
		}
		var now map[string]float64
		if now, s.at, err = m.cpuAt(); err != nil {
			break // whoever ended will be missed at the end of the phase
		}
		for name, v := range now {
			s.CPU[name] = (v - last[name]) / s.at.Sub(lastAt).Seconds()
		}
		s.T = s.at.Sub(began).Seconds()
		last, lastAt = maps.Clone(now), s.at
		out = append(out, s)
	}
	return out
}

func (m *meter) cpuAt() (map[string]float64, time.Time, error) {
	cpu, err := m.cpu()
	return cpu, time.Now(), err
}

// reckon fills in what the passage tells of each sample's moment.
func reckon(samples []Sample, ps *passage) {
	if len(samples) == 0 {
		return
	}
	count := func(times []time.Time, only func(i int) bool) func(until time.Time) int {
		sorted := sortedTimes(times, only)
		k := 0
		return func(until time.Time) int {
			for k < len(sorted) && !sorted[k].After(until) {
				k++
			}
			return k
		}
	}
	placed := count(ps.answered, ps.isAccepted)
	ended := count(ps.ended, ps.isAccepted)
	before := 0
	for i := range samples {
		s := &samples[i]
		e := ended(s.at)
		s.UnderWay, s.Ended, before = max(placed(s.at)-e, 0), e-before, e
	}
}
