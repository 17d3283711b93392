package main

import (
	"context"
	"fmt"
	"net/http"
	"slices"
	"time"
)

func backlogExperiment() *experiment {
	const base = "none"
	// Nothing of the intake's admission may be in the way of piling up (its limit of delay is not, in any case but the last); nor may orders be rejected
	// because they wait.
	wide := []string{"ORDERSAGA_INTAKE__MAX_OUTBOX_AGE=24h", "ORDERSAGA_INTAKE__MAX_RUNNING=100000000", "ORDERSAGA_SAGA__FORWARD_DEADLINE=6h"}
	return &experiment{
		name: "backlog", asks: "how are orders drained that were accepted while no consumer ran, and in what memory?", takes: "about 30 min",
		defaults: func(o *scaleOptions) { o.backlog, o.rounds, o.orders = 500_000, 2, 60_000 },
		small:    func(o *scaleOptions) { o.backlog, o.orders = 5_000, 3_000 },
		cases: func(o *scaleOptions) []*scaleCase {
			return []*scaleCase{
				{name: base, load: standard, env: wide, measure: noBacklog},
				{name: "kafka", base: base, load: standard, env: wide, procs: []spec{{roles: "http,relay"}}, measure: backlogMeasure(o.backlog, false)},
				{name: "outbox", base: base, load: standard, env: wide, procs: []spec{{roles: "http"}}, measure: backlogMeasure(o.backlog, false)},
				// What the admission does with its own limits, when nobody carries the outbox away.
				{name: "limits", base: base, load: standard, sheds: true, env: wide[2:], procs: []spec{{roles: "http"}}, measure: backlogMeasure(o.backlog, true)},
			}
		},
	}
}

// slicesShown is how many slices of a run are told apart.
const slicesShown = 12

// noBacklog is a saturated phase whose sagas are carried on while others come in.
func noBacklog(ctx context.Context, t *trial) error {
	if err := t.warmUp(ctx); err != nil {
		return err
	}
	watch := t.watch(ctx, nil)
	p, ps, err := t.phase(ctx, plan{n: t.orders()})
	samples := watch.stop()
	if err != nil {
		return fmt.Errorf("saturation: %w", err)
	}
	return t.drain(ctx, p, ps, samples)
}

// drain adds how fast sagas ended, evenly or not, and in what memory.
func (t *trial) drain(ctx context.Context, p *Phase, ps *passage, samples []Sample) error {
	reckon(samples, ps)
	ended := sortedTimes(ps.ended, ps.isAccepted)
	t.out.add("ended sagas/s", 0, p.SagasPS)
	t.out.add("between the first and the last tenth", 0, steadyRate(ended))
	t.out.add("accepted/s", 0, p.AcceptedPS)
	t.out.cost("", p)
	t.out.memory(samples)
	t.out.tell("others, cores", 2, p.Others)
	commits, err := t.commits(ctx, ps)
	if err != nil {
		return err
	}
	t.stalls("", commits)
	t.out.series("ended/s", sliceRates(ended, slicesShown))
	t.out.Samples = samples
	return nil
}

// memory adds whether memory and goroutines grew during a phase.
func (o *Outcome) memory(samples []Sample) {
	var rss, goroutines []float64
	for i := range samples {
		rss = append(rss, samples[i].RSS)
		if g := samples[i].Goroutines; g > 0 {
			goroutines = append(goroutines, g)
		}
	}
	o.add("RSS at most, MB", 0, quantile(sorted(rss), 1))
	o.tell("RSS, last third over middle third", 2, growth(rss))
	o.add("goroutines at most", 0, quantile(sorted(goroutines), 1))
	o.tell("goroutines, last third over middle third", 2, growth(goroutines))
	o.series("RSS, MB", thin(rss))
}

func sorted(vs []float64) []float64 { return slices.Sorted(slices.Values(vs)) }

// thin is the means of as many runs of the values as are shown; nil if there are fewer values than that.
func thin(vs []float64) []float64 {
	const n = slicesShown
	if len(vs) < n {
		return nil
	}
	out := make([]float64, n)
	for k := range n {
		out[k] = mean(vs[k*len(vs)/n : (k+1)*len(vs)/n])
	}
	return out
}

// backlogMeasure has n orders accepted by the case's processes, then stops those and starts one with all roles. once: an order that is refused is not sent again.
func backlogMeasure(n int, once bool) func(context.Context, *trial) error {
	return func(ctx context.Context, t *trial) error {
		pl := t.next(plan{n: n, once: once})
		bodies, heads := t.requests(&pl)
		before, err := t.read(ctx)
		if err != nil {
			return err
		}
		ps, err := t.drive(ctx, &pl, bodies, heads)
		if err != nil {
			return fmt.Errorf("the backlog: %w", err)
		}
		accepted := float64(max(ps.accepted(), 1))
		cpu, err := t.cpu()
		if err != nil {
			return err
		}
		t.say("%.0f orders wait, accepted in %s", accepted, ps.took.Round(time.Second))
		t.refusals(ps)
		held := t.sys.memory()
		t.halt()
		mid, err := t.read(ctx)
		if err != nil {
			return err
		}
		ps.began = time.Now() // of the draining
		if err := t.resume(ctx, nil); err != nil {
			return err
		}
		watch := t.watch(ctx, nil)
		p, err := t.account(ctx, ps, &mid)
		samples := watch.stop()
		if err != nil {
			return fmt.Errorf("draining: %w", err)
		}
		t.say("%s", p)
		if err := t.drain(ctx, p, ps, samples); err != nil {
			return err
		}
		t.out.tell("orders that waited", 0, accepted)
		t.out.tell("accepting: CPU-s of the service per 1,000", 3, (cpu["service"]-before.cpu["service"])/accepted*1000)
		t.out.tell("accepting: RSS at its end, MB", 0, held)
		return nil
	}
}

// refusals notes what was refused, since when, and what was said.
func (t *trial) refusals(ps *passage) {
	n, first := 0, time.Duration(0)
	for i, s := range ps.status {
		if !refused(int(s)) {
			continue
		}
		if d := ps.answered[i].Sub(ps.began); n == 0 || d < first {
			first = d
		}
		n++
	}
	if n > 0 {
		t.out.note("%d of %d orders were refused, the first after %s: %s", n, len(ps.status), first.Round(100*time.Millisecond), ps.refusal)
	}
	failed := 0
	for _, s := range ps.status {
		if s != http.StatusAccepted && !refused(int(s)) {
			failed++
		}
	}
	if failed > 0 {
		t.out.note("%d orders were neither accepted nor refused", failed)
	}
}
