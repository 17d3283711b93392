package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/jackc/pgx/v5"

	"ordersaga/cmd/ordersaga/internal/bench"
)

type options struct {
	plain, root, libs, out, only, pprof       string
	variants                                  variants
	rounds, orders, warm, connections, burnIn int
	partitions                                int
	rate                                      float64
	length, limit, delay                      time.Duration
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if len(os.Args) > 1 && os.Args[1] == "stub" {
		fs := flag.NewFlagSet("stub", flag.ExitOnError)
		addr, delay := fs.String("addr", "", "where to listen"), fs.Duration("delay", 0, "of each call")
		_ = fs.Parse(os.Args[2:]) // it exits
		if err := serveStub(*addr, *delay); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	var o options
	flag.StringVar(&o.plain, "plain", "../shared/bench/plain", "folder of plain's module")
	flag.StringVar(&o.root, "root", ".", "folder of this module")
	flag.StringVar(&o.libs, "kafka-libs", "", "folder of Kafka's jars (default: where the tests keep them)")
	flag.StringVar(&o.out, "out", "", "write all runs to this file as JSON")
	flag.StringVar(&o.only, "only", "", "run one side only: plain or ordersaga")
	flag.StringVar(&o.pprof, "profile", "", "put profiles of this system, its metrics and the statements' statistics into this folder; the run is slower for it")
	flag.Var(&o.variants, "variant", "a variant of this system to run beside it, as label[@binary][:NAME=value,NAME=value] (may be repeated)")
	flag.IntVar(&o.rounds, "rounds", 3, "runs of each side")
	flag.IntVar(&o.orders, "orders", 30_000, "orders of the saturation phase; 0: none")
	flag.IntVar(&o.warm, "warm-up", 3000, "orders before the first phase")
	flag.IntVar(&o.burnIn, "burn-in", 10_000, "orders that each side gets before the first round, not reported")
	flag.IntVar(&o.connections, "connections", 128, "requests at a time")
	flag.IntVar(&o.partitions, "partitions", 16, "of each topic that a saga runs on")
	flag.Float64Var(&o.rate, "rate", 200, "orders a second in the latency phase; 0: none")
	flag.DurationVar(&o.length, "length", 20*time.Second, "of the latency phase")
	flag.DurationVar(&o.limit, "limit", 5*time.Minute, "for the sagas of a phase to end")
	flag.DurationVar(&o.delay, "gateway", 5*time.Millisecond, "how long the gateway takes for a call")
	flag.Parse()
	if err := o.run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "yardstick:", err)
		os.Exit(1)
	}
}

func (o *options) sides() (out []*side, err error) {
	switch o.only {
	case "":
		out = []*side{plainSide(), ourSide()}
	case plainName:
		out = []*side{plainSide()}
	case ourName:
		out = []*side{ourSide()}
	default:
		return nil, fmt.Errorf("--only is %s or %s, not %q", plainName, ourName, o.only)
	}
	for _, v := range o.variants {
		s := ourSide()
		s.name, s.bin, s.env = v.label, v.bin, v.env
		out = append(out, s)
	}
	return out, nil
}

// variant is this system with another binary, other settings, or both: two of them are compared as fairly as with plain.
type variant struct {
	label, bin string
	env        []string
}

type variants []variant

func (v *variants) String() string { return fmt.Sprint(*v) }

// Set implements flag.Value.
func (v *variants) Set(s string) error {
	name, env, has := strings.Cut(s, ":")
	x := variant{}
	x.label, x.bin, _ = strings.Cut(name, "@")
	if x.label == "" || strings.Trim(x.label, "abcdefghijklmnopqrstuvwxyz0123456789") != "" || x.label == plainName || x.label == ourName {
		return fmt.Errorf("a label of small letters and digits, not %q", x.label)
	}
	if has {
		x.env = strings.Split(env, ",")
	}
	*v = append(*v, x)
	return nil
}

func (o *options) run(ctx context.Context) (err error) {
	sides, err := o.sides()
	if err != nil {
		return err
	}
	if o.libs == "" {
		if o.libs, err = kafkaLibs(); err != nil {
			return err
		}
	}
	dir, err := os.MkdirTemp("", "yardstick-")
	if err != nil {
		return fmt.Errorf("scratch folder: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	if err := os.Chmod(dir, 0o755); err != nil { //nolint:gosec // Postgres may run as another user below it
		return fmt.Errorf("scratch folder: %w", err)
	}
	for _, s := range sides {
		if s.bin != "" {
			continue
		}
		from, pkg := o.root, "./cmd/ordersaga"
		if s.name == plainName {
			from, pkg = o.plain, "."
		}
		s.bin = filepath.Join(dir, "bin-"+s.name)
		if err := build(ctx, from, pkg, s.bin); err != nil {
			return err
		}
	}
	srv, err := startServers(ctx, dir, o.libs, o.pprof != "")
	if err != nil {
		return err
	}
	defer srv.stop() //nolint:contextcheck // it has to happen, whatever ended the run
	runs, err := o.roundAndRound(ctx, srv, dir, sides)
	if err != nil {
		return err
	}
	if err := table(os.Stdout, runs); err != nil {
		return err
	}
	for _, r := range runs {
		if len(r.Wrong) > 0 {
			return errors.New("the books of some runs are wrong; see above")
		}
	}
	return nil
}

// roundAndRound burns in and runs the rounds.
func (o *options) roundAndRound(ctx context.Context, srv *servers, dir string, sides []*side) (runs []Run, err error) {
	if o.burnIn > 0 {
		// Kafka compiles itself as it runs: the first to use it would pay.
		quick := *o
		quick.orders, quick.warm, quick.rate, quick.pprof = o.burnIn, 0, 0, ""
		for _, s := range sides {
			if _, err := quick.one(ctx, srv, dir, s, 0); err != nil {
				return nil, fmt.Errorf("%s, burn-in: %w", s.name, err)
			}
		}
	}
	for round := range o.rounds {
		if round > 0 {
			slices.Reverse(sides) // neither is always first
		}
		for _, s := range sides {
			r, err := o.one(ctx, srv, dir, s, round+1)
			if err != nil {
				return nil, fmt.Errorf("%s, round %d: %w", s.name, round+1, err)
			}
			runs = append(runs, *r)
			if err := o.write(runs); err != nil {
				return nil, err
			}
		}
	}
	return runs, nil
}

func (o *options) write(runs []Run) error {
	if o.out == "" {
		return nil
	}
	b, err := json.MarshalIndent(map[string]any{
		"at": time.Now().UTC().Format(time.RFC3339), "host": bench.ThisHost(), "orders": o.orders, "connections": o.connections, "partitions": o.partitions,
		"rate": o.rate, "gateway_ms": o.delay.Milliseconds(), "runs": runs,
	}, "", "  ")
	if err != nil {
		return fmt.Errorf("result: %w", err)
	}
	if err := os.WriteFile(o.out, append(b, '\n'), 0o644); err != nil { //nolint:gosec // a result
		return fmt.Errorf("result: %w", err)
	}
	return nil
}

// one is one run of one side, on a fresh database and fresh topics.
func (o *options) one(ctx context.Context, srv *servers, dir string, s *side, round int) (_ *Run, err error) {
	name := fmt.Sprintf("r%d_%s", round, s.name)
	url, err := srv.database(ctx, name)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, srv.forget(context.WithoutCancel(ctx), name)) }()
	ports, err := freePorts(ctx, 2)
	if err != nil {
		return nil, err
	}
	log, err := os.Create(filepath.Join(dir, name+".log"))
	if err != nil {
		return nil, fmt.Errorf("log: %w", err)
	}
	defer log.Close()
	e := &environment{
		s: srv, database: url, gateway: "http://127.0.0.1:" + ports[0], http: "127.0.0.1:" + ports[1], run: strings.ReplaceAll(name, "_", "-"),
		partitions: o.partitions, bin: s.bin, log: log, pprof: o.pprof != "", env: s.env,
	}
	self, err := os.Executable()
	if err != nil {
		return nil, fmt.Errorf("stub: %w", err)
	}
	gateway, err := start([]string{self, "stub", "-addr", "127.0.0.1:" + ports[0], "-delay", o.delay.String()}, nil, os.Stderr)
	if err != nil {
		return nil, err
	}
	defer gateway.stop()
	if s.name == ourName && o.pprof != "" {
		if err := preload(ctx, url); err != nil {
			return nil, err
		}
	}
	p, err := s.start(ctx, e)
	if err != nil {
		return nil, err
	}
	defer p.stop()
	if err := ready(ctx, p, e, "/healthz"); err != nil {
		return nil, err
	}
	m := &meter{o: o, side: s, env: e, p: p, gateway: gateway}
	return m.run(ctx, url, round)
}

func preload(ctx context.Context, url string) error {
	conn, err := pgx.Connect(ctx, url)
	if err != nil {
		return fmt.Errorf("statements: %w", err)
	}
	defer conn.Close(ctx) //nolint:errcheck // nothing is lost
	if _, err := conn.Exec(ctx, "CREATE EXTENSION pg_stat_statements"); err != nil {
		return fmt.Errorf("statements: %w", err)
	}
	return nil
}

func (m *meter) run(ctx context.Context, url string, round int) (_ *Run, err error) {
	if m.db, err = pgx.Connect(ctx, url); err != nil {
		return nil, fmt.Errorf("database: %w", err)
	}
	defer m.db.Close(context.WithoutCancel(ctx)) //nolint:errcheck // nothing is lost
	if m.counts, err = bench.OpenDatabase(ctx, url); err != nil {
		return nil, err
	}
	defer m.counts.Close(context.WithoutCancel(ctx))
	if m.to, err = bench.NewEndpoint("http://"+m.env.http, time.Minute); err != nil {
		return nil, err
	}
	r, phases := &Run{Side: m.side.name, Round: round, Wrong: []string{}}, map[int]int{}
	say := func(name string, p *Phase) {
		fmt.Fprintf(os.Stderr, "round %d %-9s %-8s %7.0f sagas/s  p50 %6.1f p99 %6.1f ms  CPU %.3f s/1,000 (%s; apart %s)  WAL %.0f B, %.3f flushes, RSS %.0f MB; others %.2f cores\n", round, m.side.name, name,
			p.SagasPS, p.P50, p.P99, p.Total, parts(p.CPU), parts(p.Apart), p.WALBytes, p.Flushes, p.RSS, p.Others)
	}
	if m.o.warm > 0 {
		phases[phaseWarm] = m.o.warm
		if _, err := m.phase(ctx, phaseWarm, m.o.warm, 0); err != nil {
			return nil, fmt.Errorf("warm-up: %w", err)
		}
	}
	if m.o.orders > 0 {
		phases[phaseSaturate] = m.o.orders
		fetched := m.profiles(ctx, "saturate", 12)
		if r.Saturate, err = m.phase(ctx, phaseSaturate, m.o.orders, 0); err != nil {
			return nil, fmt.Errorf("saturation: %w", err)
		}
		say("saturate", r.Saturate)
		if err := fetched(); err != nil {
			return nil, err
		}
	}
	if m.o.rate > 0 {
		n := int(m.o.rate * m.o.length.Seconds())
		phases[phaseRate] = n
		fetched := m.profiles(ctx, "rate", 10)
		if r.Rate, err = m.phase(ctx, phaseRate, n, m.o.rate); err != nil {
			return nil, fmt.Errorf("rate: %w", err)
		}
		say(fmt.Sprintf("%.0f/s", m.o.rate), r.Rate)
		if err := fetched(); err != nil {
			return nil, err
		}
	}
	if r.Wrong, err = m.books(ctx, phases); err != nil {
		return nil, err
	}
	if len(r.Wrong) > 0 {
		fmt.Fprintf(os.Stderr, "round %d %s: WRONG: %s\n", round, m.side.name, strings.Join(r.Wrong, "; "))
	}
	return r, nil
}

func parts(m map[string]float64) string {
	var out []string
	for _, k := range slices.Sorted(maps.Keys(m)) {
		out = append(out, fmt.Sprintf("%s %.3f", k, m[k]))
	}
	return strings.Join(out, ", ")
}

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
