package bench

import (
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
)

// Report is what a run measured. Its JSON is what compare and chart read.
type Report struct {
	Tool     string            `json:"tool"` // always ReportTool
	Version  string            `json:"version"`
	Label    string            `json:"label,omitempty"`
	At       time.Time         `json:"at"`
	Target   string            `json:"target"`
	Terminal string            `json:"terminal"` // how ends were learnt: TerminalKafka or TerminalWait
	Host     Host              `json:"host"`
	Mix      Mix               `json:"mix"`
	Database map[string]string `json:"database_settings,omitempty"`
	Measured []string          `json:"processes,omitempty"` // what is in CPU, by name and process id
	Notes    []string          `json:"notes,omitempty"`
	Phases   []Phase           `json:"phases"`
}

// ReportTool marks a report.
const ReportTool = "ordersaga bench"

// How ends are learnt.
const (
	TerminalKafka = "orders.events.v1"
	TerminalWait  = "Prefer: wait"
)

// Host is the machine of the generator.
type Host struct {
	OS    string `json:"os"`
	Arch  string `json:"arch"`
	CPU   string `json:"cpu,omitempty"`
	Cores int    `json:"cores"`
	Go    string `json:"go"`
}

// Phase is one phase of a run.
type Phase struct {
	Name    string  `json:"name"`
	Offered float64 `json:"offered_per_s,omitempty"` // open loop: the rate
	Slots   int     `json:"in_flight,omitempty"`     // closed loop: orders under way
	Seconds float64 `json:"seconds"`                 // of sending; the rates are over these
	Drained float64 `json:"drain_seconds"`           // from there to the last end

	Due      int   `json:"orders"`
	Unsent   int64 `json:"unsent"` // due, and not sent: the generator or its connections were the limit
	Accepted int64 `json:"accepted"`
	Refused  int64 `json:"refused"` // 429 and 503
	Ended    int64 `json:"ended"`
	NotEnded int64 `json:"not_ended"`

	AcceptedPerSec float64          `json:"accepted_per_s"`
	EndedPerSec    float64          `json:"ended_per_s"`
	Errors         map[string]int64 `json:"errors"`
	Outcomes       map[string]int64 `json:"outcomes"`
	Latency        Latency          `json:"latency_ms"`  // due to terminal
	Response       Latency          `json:"response_ms"` // due to answer

	CPU       map[string]float64 `json:"cpu_s_per_1000,omitempty"` // by process, per 1,000 orders that ended
	CPUTotal  float64            `json:"cpu_s_per_1000_total,omitempty"`
	Generator float64            `json:"generator_cpu_s_per_1000"` // not in the total
	RSS       map[string]float64 `json:"rss_mb_max,omitempty"`

	Service *ServiceUse  `json:"service,omitempty"`
	WAL     *DatabaseUse `json:"database,omitempty"`

	Series []Second `json:"series"`
}

// ServiceUse is what the service's own metrics say of a phase.
type ServiceUse struct {
	RSSMax      float64 `json:"rss_mb_max"`
	HeapMax     float64 `json:"heap_in_use_mb_max"`
	Goroutines  float64 `json:"goroutines_max"`
	GCs         float64 `json:"gc_cycles"`
	GCPauseMean float64 `json:"gc_pause_ms_mean"`
	GCPauseMax  float64 `json:"gc_pause_ms_max"`
	AllocPer    float64 `json:"alloc_kb_per_order"`
	RecordsPer  float64 `json:"kafka_records_per_order"`
}

// DatabaseUse is what Postgres counted in a phase, per order that ended; other users of the server are in it.
type DatabaseUse struct {
	WALBytesPer   float64 `json:"wal_bytes_per_order"`
	WALRecordsPer float64 `json:"wal_records_per_order"`
	FlushesPer    float64 `json:"wal_flushes_per_order"`
	CommitsPer    float64 `json:"commits_per_order"`
}

// row is a line of the text report and of a comparison.
type row struct {
	name   string
	format string
	of     func(*Phase) (float64, bool)
	better int // 1: more is better, -1: less is, 0: neither
}

func always(f func(*Phase) float64) func(*Phase) (float64, bool) {
	return func(p *Phase) (float64, bool) { return f(p), true }
}

func ofService(f func(*ServiceUse) float64) func(*Phase) (float64, bool) {
	return func(p *Phase) (float64, bool) {
		if p.Service == nil {
			return 0, false
		}
		return f(p.Service), true
	}
}

func ofDatabase(f func(*DatabaseUse) float64) func(*Phase) (float64, bool) {
	return func(p *Phase) (float64, bool) {
		if p.WAL == nil {
			return 0, false
		}
		return f(p.WAL), true
	}
}

func count(f func(*Phase) int64) func(*Phase) (float64, bool) {
	return func(p *Phase) (float64, bool) { v := f(p); return float64(v), v != 0 }
}

var rows = []row{
	{"accepted/s", "%.1f", always(func(p *Phase) float64 { return p.AcceptedPerSec }), 1},
	{"ended/s", "%.1f", always(func(p *Phase) float64 { return p.EndedPerSec }), 1},
	{"orders", "%.0f", always(func(p *Phase) float64 { return float64(p.Due) }), 0},
	{"refused (429, 503)", "%.0f", count(func(p *Phase) int64 { return p.Refused }), -1},
	{"not sent by the generator", "%.0f", count(func(p *Phase) int64 { return p.Unsent }), -1},
	{"accepted and not ended", "%.0f", count(func(p *Phase) int64 { return p.NotEnded }), -1},
	{"drain, s", "%.2f", always(func(p *Phase) float64 { return p.Drained }), -1},
	{"latency p50, ms", "%.1f", always(func(p *Phase) float64 { return p.Latency.P50 }), -1},
	{"latency p90, ms", "%.1f", always(func(p *Phase) float64 { return p.Latency.P90 }), -1},
	{"latency p99, ms", "%.1f", always(func(p *Phase) float64 { return p.Latency.P99 }), -1},
	{"latency p99.9, ms", "%.1f", always(func(p *Phase) float64 { return p.Latency.P999 }), -1},
	{"latency max, ms", "%.1f", always(func(p *Phase) float64 { return p.Latency.Max }), -1},
	{"answer p50, ms", "%.1f", always(func(p *Phase) float64 { return p.Response.P50 }), -1},
	{"answer p99, ms", "%.1f", always(func(p *Phase) float64 { return p.Response.P99 }), -1},
	{"CPU-s per 1,000, all but the generator", "%.3f", func(p *Phase) (float64, bool) { return p.CPUTotal, len(p.CPU) > 0 }, -1},
	{"generator's CPU-s per 1,000", "%.3f", always(func(p *Phase) float64 { return p.Generator }), 0},
	{"service RSS max, MB", "%.0f", ofService(func(s *ServiceUse) float64 { return s.RSSMax }), -1},
	{"service heap max, MB", "%.0f", ofService(func(s *ServiceUse) float64 { return s.HeapMax }), -1},
	{"goroutines max", "%.0f", ofService(func(s *ServiceUse) float64 { return s.Goroutines }), -1},
	{"GC cycles", "%.0f", ofService(func(s *ServiceUse) float64 { return s.GCs }), -1},
	{"GC pause mean, ms", "%.3f", ofService(func(s *ServiceUse) float64 { return s.GCPauseMean }), -1},
	{"GC pause max, ms", "%.3f", ofService(func(s *ServiceUse) float64 { return s.GCPauseMax }), -1},
	{"allocated per order, KB", "%.1f", ofService(func(s *ServiceUse) float64 { return s.AllocPer }), -1},
	{"Kafka records per order", "%.2f", ofService(func(s *ServiceUse) float64 { return s.RecordsPer }), -1},
	{"WAL bytes per order", "%.0f", ofDatabase(func(d *DatabaseUse) float64 { return d.WALBytesPer }), -1},
	{"WAL records per order", "%.1f", ofDatabase(func(d *DatabaseUse) float64 { return d.WALRecordsPer }), -1},
	{"WAL flushes per order", "%.3f", ofDatabase(func(d *DatabaseUse) float64 { return d.FlushesPer }), -1},
	{"commits per order", "%.3f", ofDatabase(func(d *DatabaseUse) float64 { return d.CommitsPer }), -1},
}

// named are the rows that depend on what was measured: CPU by process, errors and outcomes by kind.
func named(phases []*Phase) []row {
	cpu, errs, outcomes := map[string]bool{}, map[string]bool{}, map[string]bool{}
	for _, p := range phases {
		for k := range p.CPU {
			cpu[k] = true
		}
		for k := range p.Errors {
			errs[k] = true
		}
		for k := range p.Outcomes {
			outcomes[k] = true
		}
	}
	var out []row
	for _, k := range slices.Sorted(maps.Keys(cpu)) {
		out = append(out, row{"CPU-s per 1,000: " + k, "%.3f", func(p *Phase) (float64, bool) { v, ok := p.CPU[k]; return v, ok }, -1})
	}
	for _, k := range slices.Sorted(maps.Keys(outcomes)) {
		out = append(out, row{"ended " + k, "%.0f", func(p *Phase) (float64, bool) { v, ok := p.Outcomes[k]; return float64(v), ok }, 0})
	}
	for _, k := range slices.Sorted(maps.Keys(errs)) {
		out = append(out, row{"answers: " + k, "%.0f", func(p *Phase) (float64, bool) { v, ok := p.Errors[k]; return float64(v), ok }, -1})
	}
	return out
}

// WriteText writes the report as a table, a column a phase.
func (r *Report) WriteText(w io.Writer) error {
	var b strings.Builder
	fmt.Fprintf(&b, "ordersaga %s at %s, %s\n%d cores (%s), %s/%s, %s\n", r.Version, r.Target, r.At.Format(time.RFC3339), r.Host.Cores, r.Host.CPU, r.Host.OS, r.Host.Arch, r.Host.Go)
	fmt.Fprintf(&b, "latency from when an order was due to its end as seen by %s\n", r.Terminal)
	if len(r.Measured) > 0 {
		fmt.Fprintf(&b, "measured: %s\n", strings.Join(r.Measured, ", "))
	}
	for _, n := range r.Notes {
		fmt.Fprintf(&b, "note: %s\n", n)
	}
	b.WriteByte('\n')
	var table strings.Builder
	phases := make([]*Phase, len(r.Phases))
	names := make([]string, len(r.Phases))
	for i := range r.Phases {
		phases[i], names[i] = &r.Phases[i], r.Phases[i].Name
	}
	fmt.Fprintf(&table, "\t%s\t\n", strings.Join(names, "\t"))
	for _, x := range append(slices.Clone(rows), named(phases)...) {
		cells := make([]string, len(phases))
		known := false
		for i, p := range phases {
			if v, ok := x.of(p); ok {
				cells[i], known = fmt.Sprintf(x.format, v), true
			} else {
				cells[i] = "-"
			}
		}
		if known {
			fmt.Fprintf(&table, "%s\t%s\t\n", x.name, strings.Join(cells, "\t"))
		}
	}
	return writeTable(w, b.String(), table.String(), tabwriter.AlignRight)
}

// writeTable writes text as it is, then lines of cells with tabs behind them.
func writeTable(w io.Writer, text, cells string, flags uint) error {
	if _, err := io.WriteString(w, text); err != nil {
		return fmt.Errorf("report: %w", err)
	}
	tw := tabwriter.NewWriter(w, 0, 8, 2, ' ', flags)
	if _, err := io.WriteString(tw, cells); err != nil {
		return fmt.Errorf("report: %w", err)
	}
	if err := tw.Flush(); err != nil {
		return fmt.Errorf("report: %w", err)
	}
	return nil
}
