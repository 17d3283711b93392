package bench

import (
	"fmt"
	"html"
	"io"
	"math"
	"slices"
	"strings"
)

// Sizes of the chart, in pixels.
const (
	chartWidth  = 960
	panelHeight = 260
	marginLeft  = 70
	marginRight = 170
	marginTop   = 40
	marginFoot  = 45
	plotWidth   = chartWidth - marginLeft - marginRight
	plotHeight  = panelHeight - marginTop - marginFoot
)

// colours are told apart by people with colour blindness too (Okabe and Ito).
var colours = []string{"#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"}

// line is one curve of a panel.
type line struct {
	name   string
	points [][2]float64
	colour string
	dashed bool
}

// axis maps values to pixels.
type axis struct {
	min, max float64
	log      bool
	ticks    []float64
	label    func(float64) string
}

func (a *axis) at(v float64) float64 {
	if a.log {
		lo, hi := math.Log10(a.min), math.Log10(a.max)
		return (math.Log10(max(v, a.min)) - lo) / (hi - lo)
	}
	return (v - a.min) / (a.max - a.min)
}

// nice makes a linear axis from 0 with round ticks.
func nice(top float64) axis {
	const wanted = 5
	if top <= 0 {
		top = 1
	}
	step := math.Pow(10, math.Floor(math.Log10(top/wanted)))
	for _, m := range []float64{1, 2, 5, 10} {
		if step*m*wanted >= top {
			step *= m
			break
		}
	}
	a := axis{label: short}
	for v := 0.0; ; v += step {
		a.ticks = append(a.ticks, v)
		if v >= top {
			a.max = v
			return a
		}
	}
}

// decades makes a logarithmic axis.
func decades(lo, hi float64) axis {
	from, to := math.Floor(math.Log10(max(lo, 1e-3))), math.Ceil(math.Log10(max(hi, 1e-2)))
	if to <= from {
		to = from + 1
	}
	a := axis{log: true, min: math.Pow(10, from), max: math.Pow(10, to), label: short}
	for e := from; e <= to; e++ {
		a.ticks = append(a.ticks, math.Pow(10, e))
	}
	return a
}

func short(v float64) string {
	switch {
	case v >= 1e6:
		return fmt.Sprintf("%gM", v/1e6)
	case v >= 1e4:
		return fmt.Sprintf("%gk", v/1e3)
	}
	return fmt.Sprintf("%g", math.Round(v*1e4)/1e4)
}

// percentAxis spreads the high shares: each nine gets as much room.
func percentAxis() axis {
	a := axis{min: 0, max: 5, label: func(v float64) string { return short(100-math.Pow(10, 2-v)) + " %" }}
	for i := range 6 {
		a.ticks = append(a.ticks, float64(i))
	}
	return a
}

func nines(percent float64) float64 { return 2 - math.Log10(max(100-percent, 1e-3)) }

// WriteSVG draws the report: throughput and latency over time, and latency by share of orders. It needs nothing from elsewhere.
func (r *Report) WriteSVG(w io.Writer) error {
	panels := []func(*strings.Builder, float64){r.throughput, r.over, r.shares}
	var b strings.Builder
	height := float64(len(panels)*panelHeight + 40)
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %.0f" width="%d" height="%.0f" font-family="system-ui, sans-serif" font-size="12" fill="#222">`, chartWidth, height, chartWidth, height)
	fmt.Fprintf(&b, `<rect width="%d" height="%.0f" fill="#fff"/><text x="%d" y="24" font-size="16">%s</text>`, chartWidth, height, marginLeft, html.EscapeString(r.title()))
	for i, p := range panels {
		p(&b, float64(40+i*panelHeight))
	}
	b.WriteString("</svg>\n")
	_, err := io.WriteString(w, b.String())
	return err
}

func (r *Report) title() string {
	name := r.Label
	if name == "" {
		name = "ordersaga " + r.Version
	}
	return fmt.Sprintf("%s, %s, %d cores", name, r.At.Format("2006-01-02 15:04 MST"), r.Host.Cores)
}

// WriteHTML writes the chart with the figures below it as one page.
func (r *Report) WriteHTML(w io.Writer) error {
	var svg, text strings.Builder
	if err := r.WriteSVG(&svg); err != nil {
		return err
	}
	if err := r.WriteText(&text); err != nil {
		return err
	}
	_, err := fmt.Fprintf(w, "<!doctype html>\n<html lang=\"en\"><meta charset=\"utf-8\"><title>%s</title>\n<body style=\"margin:2rem auto;max-width:%dpx\">\n%s<pre>%s</pre>\n</body></html>\n",
		html.EscapeString(r.title()), chartWidth, svg.String(), html.EscapeString(text.String()))
	return err
}

// timeline joins the phases' seconds; begins says where each phase begins.
func (r *Report) timeline() (begins []float64, end float64) {
	for i := range r.Phases {
		begins = append(begins, end)
		end += float64(len(r.Phases[i].Series)) + 1
	}
	return begins, max(end, 1)
}

func (r *Report) throughput(b *strings.Builder, y float64) {
	begins, end := r.timeline()
	lines := []line{{name: "accepted/s", colour: colours[0]}, {name: "ended/s", colour: colours[2]}, {name: "refused/s", colour: colours[1], dashed: true}}
	top := 0.0
	for i := range r.Phases {
		for _, s := range r.Phases[i].Series {
			t := begins[i] + float64(s.At)
			for j, v := range []int64{s.Accepted, s.Ended, s.Refused} {
				lines[j].points = append(lines[j].points, [2]float64{t, float64(v)})
				top = max(top, float64(v))
			}
		}
	}
	lines = slices.DeleteFunc(lines, func(l line) bool {
		return !slices.ContainsFunc(l.points, func(p [2]float64) bool { return p[1] > 0 })
	})
	x := nice(end)
	panel(b, y, "Orders a second", "seconds", x, nice(top), lines)
	r.marks(b, y, &x, begins)
}

func (r *Report) over(b *strings.Builder, y float64) {
	begins, end := r.timeline()
	lines := []line{{name: "p50", colour: colours[0]}, {name: "p99", colour: colours[1]}}
	lo, hi := math.Inf(1), 0.0
	for i := range r.Phases {
		for _, s := range r.Phases[i].Series {
			if s.Ended == 0 {
				continue
			}
			t := begins[i] + float64(s.At)
			lines[0].points, lines[1].points = append(lines[0].points, [2]float64{t, s.P50}), append(lines[1].points, [2]float64{t, s.P99})
			lo, hi = min(lo, s.P50), max(hi, s.P99)
		}
	}
	if hi == 0 {
		lo, hi = 1, 10
	}
	x := nice(end)
	panel(b, y, "Latency by second, ms", "seconds", x, decades(lo, hi), lines)
	r.marks(b, y, &x, begins)
}

// marks names the phases where they begin.
func (r *Report) marks(b *strings.Builder, y float64, x *axis, begins []float64) {
	for i := range r.Phases {
		px := marginLeft + x.at(begins[i])*plotWidth
		fmt.Fprintf(b, `<line x1="%.1f" x2="%.1f" y1="%.1f" y2="%.1f" stroke="#999" stroke-dasharray="2 3"/><text x="%.1f" y="%.1f" font-size="10" fill="#666">%s</text>`,
			px, px, y+marginTop, y+marginTop+plotHeight, px+3, y+marginTop+10, html.EscapeString(r.Phases[i].Name))
	}
}

func (r *Report) shares(b *strings.Builder, y float64) {
	var lines []line
	lo, hi := math.Inf(1), 0.0
	for i := range r.Phases {
		p := &r.Phases[i]
		l := line{name: p.Name, colour: colours[i%len(colours)]}
		for _, c := range p.Latency.Curve {
			l.points = append(l.points, [2]float64{nines(c[0]), c[1]})
			lo, hi = min(lo, c[1]), max(hi, c[1])
		}
		lines = append(lines, l)
	}
	if hi == 0 {
		lo, hi = 1, 10
	}
	panel(b, y, "Latency from due to ended, ms, by share of orders", "share of orders that were at least as fast", percentAxis(), decades(lo, hi), lines)
}

func panel(b *strings.Builder, y float64, title, below string, x, v axis, lines []line) {
	top, foot := y+marginTop, y+marginTop+plotHeight
	fmt.Fprintf(b, `<text x="%d" y="%.1f" font-weight="600">%s</text>`, marginLeft, y+26, html.EscapeString(title))
	for _, t := range v.ticks {
		py := foot - v.at(t)*plotHeight
		fmt.Fprintf(b, `<line x1="%d" x2="%d" y1="%.1f" y2="%.1f" stroke="#ddd"/><text x="%d" y="%.1f" text-anchor="end">%s</text>`,
			marginLeft, marginLeft+plotWidth, py, py, marginLeft-6, py+4, html.EscapeString(v.label(t)))
	}
	for _, t := range x.ticks {
		px := marginLeft + x.at(t)*plotWidth
		fmt.Fprintf(b, `<line x1="%.1f" x2="%.1f" y1="%.1f" y2="%.1f" stroke="#bbb"/><text x="%.1f" y="%.1f" text-anchor="middle">%s</text>`,
			px, px, foot, foot+4, px, foot+17, html.EscapeString(x.label(t)))
	}
	fmt.Fprintf(b, `<text x="%d" y="%.1f" text-anchor="middle" fill="#666">%s</text>`, marginLeft+plotWidth/2, foot+34, html.EscapeString(below))
	for i, l := range lines {
		dash := ""
		if l.dashed {
			dash = ` stroke-dasharray="5 4"`
		}
		fmt.Fprintf(b, `<polyline fill="none" stroke="%s" stroke-width="1.8"%s points="`, l.colour, dash)
		for _, p := range l.points {
			fmt.Fprintf(b, "%.1f,%.1f ", marginLeft+min(max(x.at(p[0]), 0), 1)*plotWidth, foot-min(max(v.at(p[1]), 0), 1)*plotHeight)
		}
		ly := top + 10 + float64(i)*18
		fmt.Fprintf(b, `"/><line x1="%d" x2="%d" y1="%.1f" y2="%.1f" stroke="%s" stroke-width="2.5"%s/><text x="%d" y="%.1f">%s</text>`,
			marginLeft+plotWidth+14, marginLeft+plotWidth+36, ly, ly, l.colour, dash, marginLeft+plotWidth+42, ly+4, html.EscapeString(l.name))
	}
}
