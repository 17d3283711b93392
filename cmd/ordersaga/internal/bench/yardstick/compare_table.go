package main

import (
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
)

// figure is a line of the table.
type figure struct {
	name   string
	format string
	phase  func(*Run) *Phase
	of     func(*Phase) float64
}

func figures(runs []Run) []figure {
	saturate, rate := func(r *Run) *Phase { return r.Saturate }, func(r *Run) *Phase { return r.Rate }
	var out []figure
	for _, x := range []struct {
		name  string
		phase func(*Run) *Phase
	}{{"saturation", saturate}, {"fixed rate", rate}} {
		add := func(name, format string, of func(*Phase) float64) {
			out = append(out, figure{x.name + ": " + name, format, x.phase, of})
		}
		add("ended sagas/s", "%.0f", func(p *Phase) float64 { return p.SagasPS })
		add("accepted/s", "%.0f", func(p *Phase) float64 { return p.AcceptedPS })
		add("due to confirmed p50, ms", "%.1f", func(p *Phase) float64 { return p.P50 })
		add("due to confirmed p99, ms", "%.1f", func(p *Phase) float64 { return p.P99 })
		add("due to confirmed p99.9, ms", "%.1f", func(p *Phase) float64 { return p.P999 })
		add("due to answer p50, ms", "%.1f", func(p *Phase) float64 { return p.AcceptP50 })
		add("due to answer p99, ms", "%.1f", func(p *Phase) float64 { return p.AcceptP99 })
		add("CPU-s per 1,000 sagas", "%.3f", func(p *Phase) float64 { return p.Total })
		for _, n := range []string{"service", "postgres", "kafka"} {
			add("of it "+n, "%.3f", func(p *Phase) float64 { return p.CPU[n] })
		}
		add("apart: gateway stub", "%.3f", func(p *Phase) float64 { return p.Apart["gateway"] })
		add("apart: load generator", "%.3f", func(p *Phase) float64 { return p.Apart["generator"] })
		add("WAL bytes a saga", "%.0f", func(p *Phase) float64 { return p.WALBytes })
		add("WAL flushes a saga", "%.3f", func(p *Phase) float64 { return p.Flushes })
		add("commits a saga", "%.2f", func(p *Phase) float64 { return p.Commits })
		add("service RSS, MB", "%.0f", func(p *Phase) float64 { return p.RSS })
		add("noise: cores used by others", "%.2f", func(p *Phase) float64 { return p.Others })
	}
	return slices.DeleteFunc(out, func(f figure) bool {
		return !slices.ContainsFunc(runs, func(r Run) bool { return f.phase(&r) != nil })
	})
}

// table writes every run, the medians and their ratio.
func table(w io.Writer, runs []Run) error {
	names := []string{}
	for _, r := range runs {
		if !slices.Contains(names, r.Side) {
			names = append(names, r.Side)
		}
	}
	rank := map[string]int{plainName: -2, ourName: -1}
	slices.SortStableFunc(names, func(a, b string) int { return rank[a] - rank[b] })
	var b strings.Builder
	header := []string{""}
	for _, n := range names {
		header = append(header, n+", all runs", "median")
	}
	for _, n := range names[1:] {
		header = append(header, n+" / "+names[0])
	}
	b.WriteString(strings.Join(header, "\t") + "\t\n")
	for _, f := range figures(runs) {
		cells, medians := []string{f.name}, []float64{}
		for _, n := range names {
			var vs []float64
			var text []string
			for i := range runs {
				if p := f.phase(&runs[i]); runs[i].Side == n && p != nil {
					vs = append(vs, f.of(p))
					text = append(text, fmt.Sprintf(f.format, f.of(p)))
				}
			}
			medians = append(medians, median(vs))
			cells = append(cells, strings.Join(text, " "), fmt.Sprintf(f.format, median(vs)))
		}
		for _, m := range medians[1:] {
			ratio := "-"
			if medians[0] != 0 {
				ratio = fmt.Sprintf("%.2f", m/medians[0])
			}
			cells = append(cells, ratio)
		}
		b.WriteString(strings.Join(cells, "\t") + "\t\n")
	}
	tw := tabwriter.NewWriter(w, 0, 8, 2, ' ', tabwriter.AlignRight)
	_, err := io.WriteString(tw, b.String())
	return errors.Join(err, tw.Flush())
}

func median(vs []float64) float64 {
	if len(vs) == 0 {
		return 0
	}
	vs = slices.Sorted(slices.Values(vs))
	if n := len(vs); n%2 == 0 {
		return (vs[n/2-1] + vs[n/2]) / 2
	}
	return vs[len(vs)/2]
}
