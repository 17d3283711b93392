package bench

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
)

// ReadReport reads a report that `ordersaga bench -o json` wrote.
func ReadReport(path string) (*Report, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("report: %w", err)
	}
	r := &Report{}
	if err := json.Unmarshal(b, r); err != nil {
		return nil, fmt.Errorf("report %s: %w", path, err)
	}
	if r.Tool != ReportTool || len(r.Phases) == 0 {
		return nil, fmt.Errorf("report %s: not written by `ordersaga bench -o json`", path)
	}
	return r, nil
}

// Difference is one figure of a phase in two reports.
type Difference struct {
	Phase  string  `json:"phase"`
	Figure string  `json:"figure"`
	A      float64 `json:"a"`
	B      float64 `json:"b"`
	Ratio  float64 `json:"ratio,omitempty"` // B / A; 0 where A is 0
	// Verdict is better or worse when the figure has a good direction and moved by more than noticeable; else empty.
	Verdict string `json:"verdict,omitempty"`
	format  string
}

// noticeable is the share by which a figure has to move before it is called better or worse; one run's noise is below.
const noticeable = 0.05

// Compare lists the figures of the phases that both reports have.
func Compare(a, b *Report) ([]Difference, error) {
	var out []Difference
	for i := range a.Phases {
		p := &a.Phases[i]
		j := slices.IndexFunc(b.Phases, func(q Phase) bool { return q.Name == p.Name })
		if j < 0 {
			continue
		}
		q := &b.Phases[j]
		for _, x := range append(slices.Clone(rows), named([]*Phase{p, q})...) {
			va, okA := x.of(p)
			vb, okB := x.of(q)
			if okA && okB {
				out = append(out, difference(p.Name, &x, va, vb))
			}
		}
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("the reports have no phase in common: run both with the same --phase flags")
	}
	return out, nil
}

func difference(phase string, x *row, a, b float64) Difference {
	d := Difference{Phase: phase, Figure: x.name, A: a, B: b, format: x.format}
	if a != 0 {
		d.Ratio = b / a
		switch move := d.Ratio - 1; {
		case x.better == 0 || move > -noticeable && move < noticeable:
		case (move > 0) == (x.better > 0):
			d.Verdict = "better"
		default:
			d.Verdict = "worse"
		}
	}
	return d
}

// WriteDifferences writes a table.
func WriteDifferences(w io.Writer, a, b *Report, ds []Difference) error {
	var sb strings.Builder
	name := func(r *Report) string {
		if r.Label != "" {
			return r.Label
		}
		return r.Version
	}
	fmt.Fprintf(&sb, "A: %s, %s\nB: %s, %s\n", name(a), a.At.Format("2006-01-02 15:04"), name(b), b.At.Format("2006-01-02 15:04"))
	if a.Mix != b.Mix {
		sb.WriteString("note: the orders were not alike: the mixes differ\n")
	}
	if a.Terminal != b.Terminal {
		sb.WriteString("note: the ends were learnt in different ways: latencies do not compare\n")
	}
	if a.Host != b.Host {
		sb.WriteString("note: the machines or Go versions differ\n")
	}
	phase := ""
	var table strings.Builder
	for _, d := range ds {
		if d.Phase != phase {
			phase = d.Phase
			fmt.Fprintf(&table, "\n%s\tA\tB\tB/A\t\n", phase)
		}
		ratio := "-"
		if d.A != 0 {
			ratio = fmt.Sprintf("%.2f", d.Ratio)
		}
		fmt.Fprintf(&table, "  %s\t"+d.format+"\t"+d.format+"\t%s\t%s\n", d.Figure, d.A, d.B, ratio, d.Verdict)
	}
	return writeTable(w, sb.String(), table.String(), 0)
}
