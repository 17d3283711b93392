package main

import (
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"unicode/utf8"
)

// Figure is one number of a run.
type Figure struct {
	Name   string  `json:"name"`
	Value  float64 `json:"value"`
	digits int     // behind the point
	plain  bool    // a ratio of it says nothing: none is printed
}

// Outcome is one run of one case of an experiment.
type Outcome struct {
	Case    string               `json:"case"`
	Base    string               `json:"compared_with,omitempty"`
	Round   int                  `json:"round"`
	Figures []Figure             `json:"figures"`
	Series  map[string][]float64 `json:"series,omitempty"` // one number a slice of the run
	Samples []Sample             `json:"samples,omitempty"`
	Notes   []string             `json:"notes,omitempty"`
	Wrong   []string             `json:"wrong"` // what the books say
}

// add appends a figure of which ratios are told.
func (o *Outcome) add(name string, digits int, v float64) {
	o.Figures = append(o.Figures, Figure{Name: name, Value: v, digits: digits})
}

// tell appends a figure that stands for itself.
func (o *Outcome) tell(name string, digits int, v float64) {
	o.Figures = append(o.Figures, Figure{Name: name, Value: v, digits: digits, plain: true})
}

func (o *Outcome) note(format string, args ...any) {
	o.Notes = append(o.Notes, fmt.Sprintf(format, args...))
}

func (o *Outcome) series(name string, vs []float64) {
	if o.Series == nil {
		o.Series = map[string][]float64{}
	}
	o.Series[name] = vs
}

// throughput adds what a saturated phase cost.
func (o *Outcome) throughput(p *Phase) {
	o.add("ended sagas/s", 0, p.SagasPS)
	o.add("accepted/s", 0, p.AcceptedPS)
	o.cost("", p)
	o.tell("generator, CPU-s per 1,000", 3, p.Apart["generator"])
	o.tell("others, cores", 2, p.Others)
}

// cost adds what each saga of a phase cost; of begins the names.
func (o *Outcome) cost(of string, p *Phase) {
	o.add(of+"CPU-s per 1,000 sagas", 3, p.Total)
	for _, n := range []string{"service", "postgres", "kafka"} {
		o.add(of+"… "+n, 3, p.CPU[n])
	}
	o.add(of+"WAL bytes a saga", 0, p.WALBytes)
	o.add(of+"WAL page images a saga", 2, p.WALImages)
	o.add(of+"WAL flushes a saga", 3, p.Flushes)
	o.add(of+"commits a saga", 2, p.Commits)
	o.add(of+"RSS of the service, MB", 0, p.RSS)
}

// latency adds how long the orders of a phase took at a fixed rate.
func (o *Outcome) latency(of string, p *Phase) {
	o.add(of+"confirmed p50, ms", 1, p.P50)
	o.add(of+"confirmed p99, ms", 1, p.P99)
	o.add(of+"confirmed p99.9, ms", 1, p.P999)
	o.add(of+"CPU-s per 1,000 sagas", 3, p.Total)
}

func number(v float64, digits int) string { return strconv.FormatFloat(v, 'f', digits, 64) }

// column is one case of the table.
type column struct {
	name, base string
	runs       []*Outcome
}

func columns(runs []Outcome) (out []column) {
	for i := range runs {
		r := &runs[i]
		k := slices.IndexFunc(out, func(c column) bool { return c.name == r.Case })
		if k < 0 {
			k = len(out)
			out = append(out, column{name: r.Case, base: r.Base})
		}
		out[k].runs = append(out[k].runs, r)
	}
	return out
}

// values are a case's figures of a name, a run each.
func (c *column) values(name string) (out []float64) {
	for _, r := range c.runs {
		for _, f := range r.Figures {
			if f.Name == name {
				out = append(out, f.Value)
			}
		}
	}
	return out
}

// scaleTable writes the medians of each case's runs and, after a case's own, the ratio to those of its base; of the first figure all runs.
// order lists the cases as they are to be shown.
func scaleTable(w io.Writer, runs []Outcome, order []string) error {
	cols := columns(runs)
	slices.SortStableFunc(cols, func(a, b column) int { return slices.Index(order, a.name) - slices.Index(order, b.name) })
	var b strings.Builder
	names := figureNames(cols)
	width := 0
	for _, f := range names {
		width = max(width, utf8.RuneCountInString(f.Name))
	}
	for _, c := range cols {
		b.WriteString("\t" + c.name)
		if c.base != "" {
			b.WriteString("\t/ " + c.base)
		}
	}
	b.WriteString("\t\n")
	for i, f := range names {
		cells, all := []string{left(f.Name, width)}, []string{left("… all runs", width)}
		for _, c := range cols {
			vs := c.values(f.Name)
			cells, all = append(cells, cell(vs, f.digits)), append(all, each(vs, f.digits))
			if c.base != "" {
				cells, all = append(cells, ratio(&f, vs, cols, c.base)), append(all, "")
			}
		}
		b.WriteString(strings.Join(cells, "\t") + "\t\n")
		if i == 0 {
			b.WriteString(strings.Join(all, "\t") + "\t\n")
		}
	}
	tw := tabwriter.NewWriter(w, 0, 8, 2, ' ', tabwriter.AlignRight)
	_, err := io.WriteString(tw, b.String())
	return errors.Join(err, tw.Flush(), seriesTable(w, cols))
}

// left fills a name up to a width, for a column that is aligned to the right.
func left(name string, width int) string {
	return name + strings.Repeat(" ", max(0, width-utf8.RuneCountInString(name)))
}

// figureNames lists what there is a line of, in the order in which the runs tell it.
func figureNames(cols []column) (out []Figure) {
	for _, c := range cols {
		for _, r := range c.runs {
			at := 0
			for _, f := range r.Figures {
				if k := slices.IndexFunc(out, func(x Figure) bool { return x.Name == f.Name }); k >= 0 {
					at = k + 1
					continue
				}
				out = slices.Insert(out, at, f)
				at++
			}
		}
	}
	return out
}

func cell(vs []float64, digits int) string {
	if len(vs) == 0 {
		return "-"
	}
	return number(median(vs), digits)
}

func each(vs []float64, digits int) string {
	out := make([]string, len(vs))
	for i, v := range vs {
		out[i] = number(v, digits)
	}
	return strings.Join(out, " ")
}

func ratio(f *Figure, vs []float64, cols []column, base string) string {
	k := slices.IndexFunc(cols, func(c column) bool { return c.name == base })
	if f.plain || k < 0 || len(vs) == 0 {
		return ""
	}
	of := median(cols[k].values(f.Name))
	if of == 0 || math.IsNaN(of) {
		return "-"
	}
	return number(median(vs)/of, 2)
}

// seriesTable writes what the runs tell slice by slice: the medians of each case.
func seriesTable(w io.Writer, cols []column) error {
	var names []string
	for _, c := range cols {
		for _, r := range c.runs {
			for n := range r.Series {
				if !slices.Contains(names, n) {
					names = append(names, n)
				}
			}
		}
	}
	slices.Sort(names)
	tw := tabwriter.NewWriter(w, 0, 8, 2, ' ', tabwriter.AlignRight)
	for _, n := range names {
		var lines strings.Builder
		for _, c := range cols {
			if line := c.medians(n); len(line) > 0 {
				fmt.Fprintf(&lines, "%s\t%s\t\n", c.name, strings.Join(short(line), "\t"))
			}
		}
		if lines.Len() > 0 {
			_, head := fmt.Fprintf(w, "\n%s, slice by slice\n", n)
			_, err := io.WriteString(tw, lines.String())
			if err := errors.Join(head, err, tw.Flush()); err != nil {
				return err
			}
		}
	}
	return nil
}

// medians are the medians of a series over the runs of a case, as far as the shortest of them goes.
func (c *column) medians(name string) (out []float64) {
	length := math.MaxInt
	for _, r := range c.runs {
		length = min(length, len(r.Series[name]))
	}
	for k := 0; k < length && len(c.runs) > 0; k++ {
		var vs []float64
		for _, r := range c.runs {
			vs = append(vs, r.Series[name][k])
		}
		out = append(out, median(vs))
	}
	return out
}

// short formats numbers of any size in a few characters.
func short(vs []float64) []string {
	out := make([]string, len(vs))
	for i, v := range vs {
		digits := 0
		switch a := math.Abs(v); {
		case a < 1:
			digits = 3
		case a < 100:
			digits = 1
		}
		out[i] = number(v, digits)
	}
	return out
}
