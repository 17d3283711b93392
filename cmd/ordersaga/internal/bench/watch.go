package bench

import (
	"context"
	"time"
)

// How often the meters are read during a phase. Reading costs CPU of what is measured (the scrape) and of ours (/proc).
const (
	sampleEvery = time.Second
	scrapeEvery = 5 * sampleEvery
	treeEvery   = 3 * sampleEvery
)

// ServiceProcess is the name of the service among Config.Processes; its CPU and memory go into the series.
const ServiceProcess = "service"

// peaks are the highest values that were seen.
type peaks struct {
	memory  map[string]float64
	metrics Metrics
}

type watcher struct {
	cancel context.CancelFunc
	done   chan peaks
}

func (r *Runner) watch(ctx context.Context, rec *Recorder) *watcher {
	ctx, cancel := context.WithCancel(ctx)
	w := &watcher{cancel, make(chan peaks, 1)}
	go func() { w.done <- r.sample(ctx, rec) }()
	return w
}

func (w *watcher) stop() peaks {
	w.cancel()
	return <-w.done
}

func (r *Runner) sample(ctx context.Context, rec *Recorder) peaks {
	p := peaks{map[string]float64{}, Metrics{}}
	t := time.NewTicker(sampleEvery)
	defer t.Stop()
	last, lastAt := r.serviceCPU(), time.Now()
	for n := time.Duration(0); ; n += sampleEvery {
		for name, pids := range r.cfg.Processes {
			if name != ServiceProcess && n%treeEvery != 0 {
				continue
			}
			sum := 0.0
			for _, pid := range pids {
				sum += Memory(pid)
			}
			p.memory[name] = max(p.memory[name], sum)
			if name == ServiceProcess && n > 0 {
				cpu, now := r.serviceCPU(), time.Now()
				rec.Gauge(now, (cpu-last)/now.Sub(lastAt).Seconds(), sum)
				last, lastAt = cpu, now
			}
		}
		if n%scrapeEvery == 0 {
			if m, err := r.scrapeAll(ctx); err == nil { // a service under load may be slow to answer: the peak is of what was seen
				for k, v := range m {
					p.metrics[k] = max(p.metrics[k], v)
				}
			}
		}
		select {
		case <-t.C:
		case <-ctx.Done():
			return p
		}
	}
}

func (r *Runner) serviceCPU() (sum float64) {
	for _, pid := range r.cfg.Processes[ServiceProcess] {
		v, _ := CPU(pid) // a process that ended shows when the phase is concluded
		sum += v
	}
	return sum
}
