package main

import (
	"net/http"
	"slices"
	"time"
)

// isAccepted reports whether an order was accepted.
func (ps *passage) isAccepted(i int) bool { return ps.status[i] == http.StatusAccepted }

// sortedTimes sorts those of the times that are not zero and belong to orders that only names; only may be nil.
func sortedTimes(times []time.Time, only func(i int) bool) []time.Time {
	out := make([]time.Time, 0, len(times))
	for i, t := range times {
		if !t.IsZero() && (only == nil || only(i)) {
			out = append(out, t)
		}
	}
	slices.SortFunc(out, time.Time.Compare)
	return out
}

// steadyFrom and steadyTo cut off how a phase begins and how it runs out.
const (
	steadyFrom = 0.1
	steadyTo   = 0.9
)

// steadyRate is how many a second there were between the first and the last tenth of sorted times.
func steadyRate(sorted []time.Time) float64 {
	a, b := int(steadyFrom*float64(len(sorted))), int(steadyTo*float64(len(sorted)))
	if b <= a || !sorted[b].After(sorted[a]) {
		return 0
	}
	return float64(b-a) / sorted[b].Sub(sorted[a]).Seconds()
}

// rateWithin is how many of the sorted times lie in [from, to), a second.
func rateWithin(sorted []time.Time, from, to time.Time) float64 {
	if !to.After(from) {
		return 0
	}
	a, _ := slices.BinarySearchFunc(sorted, from, time.Time.Compare)
	b, _ := slices.BinarySearchFunc(sorted, to, time.Time.Compare)
	return float64(b-a) / to.Sub(from).Seconds()
}

// sliceRates cuts sorted times into n runs of equally many, and answers how many a second there were in each.
func sliceRates(sorted []time.Time, n int) []float64 {
	out := make([]float64, 0, n)
	for k := range n {
		a, b := k*(len(sorted)-1)/n, (k+1)*(len(sorted)-1)/n
		if b <= a || !sorted[b].After(sorted[a]) {
			return nil // too few to say
		}
		out = append(out, float64(b-a)/sorted[b].Sub(sorted[a]).Seconds())
	}
	return out
}

// gaps are the times between one and the next, in milliseconds, sorted.
func gaps(sorted []time.Time) []float64 {
	out := make([]float64, 0, len(sorted))
	for i := 1; i < len(sorted); i++ {
		out = append(out, ms(sorted[i].Sub(sorted[i-1])))
	}
	slices.Sort(out)
	return out
}

// between keeps the sorted times in [from, to).
func between(sorted []time.Time, from, to time.Time) []time.Time {
	a, _ := slices.BinarySearchFunc(sorted, from, time.Time.Compare)
	b, _ := slices.BinarySearchFunc(sorted, to, time.Time.Compare)
	return sorted[a:max(a, b)]
}

// growth is the mean of the last third over the mean of the middle third: 1 is flat. What comes first warms up. 0: too few to say.
func growth(vs []float64) float64 {
	n := len(vs) / 3
	if n == 0 {
		return 0
	}
	middle, last := mean(vs[n:2*n]), mean(vs[len(vs)-n:])
	if middle == 0 {
		return 0
	}
	return last / middle
}

func mean(vs []float64) float64 {
	if len(vs) == 0 {
		return 0
	}
	sum := 0.0
	for _, v := range vs {
		sum += v
	}
	return sum / float64(len(vs))
}

// sortedLatencies are the milliseconds between two moments of the orders that only names, sorted; an order that lacks one is left out.
func sortedLatencies(from, to []time.Time, only func(i int) bool) []float64 {
	out := []float64{}
	for i := range from {
		if only(i) && !from[i].IsZero() && !to[i].IsZero() {
			out = append(out, ms(to[i].Sub(from[i])))
		}
	}
	slices.Sort(out)
	return out
}
