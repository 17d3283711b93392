package main

import (
	"context"
	"fmt"
	"net/http"
	"slices"
	"time"
)

func overloadExperiment() *experiment {
	return &experiment{
		name: "overload", asks: "what becomes of twice the saturation rate, with the intake's own limits?", takes: "about 10 min",
		defaults: func(o *scaleOptions) {
			o.times, o.orders, o.connections, o.length, o.rate = 2, 60_000, 2000, time.Minute, 0
		},
		small: func(o *scaleOptions) { o.orders, o.length = 3_000, 5*time.Second },
		cases: func(*scaleOptions) []*scaleCase {
			return []*scaleCase{
				{name: "serve", load: standard, sheds: true, measure: overloadMeasure},
			}
		},
	}
}

// loopsOf are the numbers of sagas under way among which the best rate is looked for: few enough for the loop to be closed most of the time.
func loopsOf(slots, orders int) []int {
	const turns, fewer = 5, 4
	slots = max(min(slots, orders/turns), fewer)
	return []int{slots / fewer, slots}
}

// overloadMeasure finds the best rate of a closed loop, then offers a multiple of it whatever becomes of it.
func overloadMeasure(ctx context.Context, t *trial) error {
	o := t.x.o
	if err := t.warmUp(ctx); err != nil {
		return err
	}
	best := 0.0
	for _, slots := range loopsOf(o.slots, t.orders()) {
		watch := t.watch(ctx, nil)
		_, ps, err := t.phase(ctx, plan{n: t.orders(), slots: slots})
		samples := watch.stop()
		if err != nil {
			return fmt.Errorf("closed loop of %d: %w", slots, err)
		}
		r := steadyRate(sortedTimes(ps.ended, ps.isAccepted))
		t.say("closed loop of %d: %.0f ended/s", slots, r)
		t.out.tell(fmt.Sprintf("closed loop of %d sagas: ended/s", slots), 0, r)
		t.out.tell(fmt.Sprintf("closed loop of %d sagas: RSS at most, MB", slots), 0, quantile(sorted(rssOf(samples)), 1))
		best = max(best, r)
	}
	watch := t.watch(ctx, nil)
	rate := o.times * best
	p, ps, err := t.phase(ctx, plan{n: int(rate * o.length.Seconds()), rate: rate, once: true})
	samples := watch.stop()
	if err != nil {
		return fmt.Errorf("%.0f/s offered: %w", rate, err)
	}
	reckon(samples, ps)
	t.out.Samples = samples
	t.offered(p, ps, samples, best, rate)
	return nil
}

func rssOf(samples []Sample) (out []float64) {
	for i := range samples {
		out = append(out, samples[i].RSS)
	}
	return out
}

// lead is how long after the first order of an overload its rates are read: it has set in by then.
const lead = 5 * time.Second

// offered adds what became of an overload.
func (t *trial) offered(p *Phase, ps *passage, samples []Sample, best, rate float64) {
	out := t.out
	from, to := ps.began.Add(min(lead, ps.took/4)), ps.began.Add(ps.took)
	ended := sortedTimes(ps.ended, ps.isAccepted)
	within := rateWithin(ended, from, to)
	out.tell("offered/s", 0, rate)
	out.tell("ended/s meanwhile", 0, within)
	out.tell("… over the best of the closed loops", 2, within/best)
	seconds := ps.took.Seconds()
	counts := map[int]int{}
	bare := 0
	for i, s := range ps.status {
		counts[int(s)]++
		if refused(int(s)) && !ps.hinted[i] {
			bare++
		}
	}
	out.tell("accepted/s", 0, float64(counts[http.StatusAccepted])/seconds)
	out.tell("429/s", 0, float64(counts[http.StatusTooManyRequests])/seconds)
	out.tell("503/s", 0, float64(counts[http.StatusServiceUnavailable])/seconds)
	out.tell("refused without Retry-After", 0, float64(bare))
	out.tell("failed", 0, float64(len(ps.status)-int(ps.unsent)-counts[http.StatusAccepted]-counts[http.StatusTooManyRequests]-counts[http.StatusServiceUnavailable]))
	out.tell("due and not sent", 0, float64(ps.unsent))
	sent := sortedLatencies(ps.due, ps.sent, func(int) bool { return true })
	out.tell("due to sent p50, ms", 1, quantile(sent, 0.5)) // a generator that does not keep up, or a service that does not answer
	out.tell("due to sent p99, ms", 1, quantile(sent, 0.99))
	answers := sortedLatencies(ps.due, ps.answered, func(int) bool { return true })
	out.tell("due to any answer p50, ms", 1, quantile(answers, 0.5))
	out.tell("due to any answer p99, ms", 1, quantile(answers, 0.99))
	out.tell("accepted: due to answer p99, ms", 1, p.AcceptP99)
	out.tell("accepted: due to confirmed p50, ms", 0, p.P50)
	out.tell("accepted: due to confirmed p99, ms", 0, p.P99)
	out.tell("until all had ended, s after the last was offered", 1, ps.last.Sub(to).Seconds())
	during := slices.DeleteFunc(slices.Clone(samples), func(s Sample) bool { return s.at.Before(from) || s.at.After(to) })
	most, generator := 0, []float64{}
	for i := range during {
		most = max(most, during[i].UnderWay)
		generator = append(generator, during[i].CPU["generator"])
	}
	out.tell("accepted and not ended, at most", 0, float64(most))
	out.tell("generator, cores", 2, mean(generator))
	out.memory(during)
	out.series("ended/s", perSlice(ended, ps.began, ps.took))
	out.series("accepted/s", perSlice(sortedTimes(ps.answered, ps.isAccepted), ps.began, ps.took))
	out.series("accepted: due to confirmed p99, ms, by when due", t.lateness(ps))
	t.refusals(ps)
	out.tell("others, cores", 2, p.Others)
}

// perSlice is how many of the times lie in each slice of a phase, a second.
func perSlice(sorted []time.Time, began time.Time, took time.Duration) (out []float64) {
	for k := range slicesShown {
		out = append(out, rateWithin(sorted, began.Add(took*time.Duration(k)/slicesShown), began.Add(took*time.Duration(k+1)/slicesShown)))
	}
	return out
}

// lateness is the 99th percentile from due to confirmed in each slice of a phase, by when the orders were due; 0 where none was accepted.
func (t *trial) lateness(ps *passage) (out []float64) {
	for k := range slicesShown {
		from, to := ps.began.Add(ps.took*time.Duration(k)/slicesShown), ps.began.Add(ps.took*time.Duration(k+1)/slicesShown)
		out = append(out, quantile(sortedLatencies(ps.due, ps.decided, func(i int) bool {
			return ps.isAccepted(i) && !ps.due[i].Before(from) && ps.due[i].Before(to)
		}), 0.99))
	}
	return out
}
