package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
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
	gateway, err := startStub("127.0.0.1:"+ports[0], o.delay)
	if err != nil {
		return nil, err
	}
	defer gateway.stop()
	if s.name == ourName && o.pprof != "" {
		if err := preload(ctx, url); err != nil {
			return nil, err
		}
	}
	sys, err := s.start(ctx, e)
	if err != nil {
		return nil, err
	}
	defer sys.stop()
	if err := ready(ctx, sys.procs[0], e, e.http, "/healthz"); err != nil {
		return nil, err
	}
	m := &meter{side: s, env: e, sys: sys, gateway: gateway, load: standard, connections: o.connections, limit: o.limit, pprof: o.pprof}
	if err := m.open(ctx); err != nil {
		return nil, err
	}
	defer m.close(ctx)
	return o.measure(ctx, m, round)
}

// startStub starts the gateway as a process of its own.
func startStub(addr string, delay time.Duration) (*process, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, fmt.Errorf("stub: %w", err)
	}
	return start([]string{self, "stub", "-addr", addr, "-delay", delay.String()}, nil, os.Stderr)
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

// The phases' numbers: what their orders are like, and what the ids begin with.
const (
	phaseWarm = iota + 1
	phaseSaturate
	phaseRate
)

// Run is one run of one side.
type Run struct {
	Side     string   `json:"side"`
	Round    int      `json:"round"`
	Saturate *Phase   `json:"saturate,omitempty"`
	Rate     *Phase   `json:"rate,omitempty"`
	Wrong    []string `json:"wrong"` // what the books say
}

// measure runs the phases.
func (o *options) measure(ctx context.Context, m *meter, round int) (_ *Run, err error) {
	r := &Run{Side: m.side.name, Round: round, Wrong: []string{}}
	say := func(name string, p *Phase) {
		fmt.Fprintf(os.Stderr, "round %d %-9s %-8s %s\n", round, m.side.name, name, p)
	}
	phase := func(number, n int, rate float64) (*Phase, error) {
		p, _, err := m.phase(ctx, plan{series: series{seed: number, number: number}, n: n, rate: rate})
		return p, err
	}
	if o.warm > 0 {
		if _, err := phase(phaseWarm, o.warm, 0); err != nil {
			return nil, fmt.Errorf("warm-up: %w", err)
		}
	}
	if o.orders > 0 {
		fetched := m.profiles(ctx, "saturate", 12)
		if r.Saturate, err = phase(phaseSaturate, o.orders, 0); err != nil {
			return nil, fmt.Errorf("saturation: %w", err)
		}
		say("saturate", r.Saturate)
		if err := fetched(); err != nil {
			return nil, err
		}
	}
	if o.rate > 0 {
		fetched := m.profiles(ctx, "rate", 10)
		if r.Rate, err = phase(phaseRate, int(o.rate*o.length.Seconds()), o.rate); err != nil {
			return nil, fmt.Errorf("rate: %w", err)
		}
		say(fmt.Sprintf("%.0f/s", o.rate), r.Rate)
		if err := fetched(); err != nil {
			return nil, err
		}
	}
	if r.Wrong, err = m.books(ctx); err != nil {
		return nil, err
	}
	if len(r.Wrong) > 0 {
		fmt.Fprintf(os.Stderr, "round %d %s: WRONG: %s\n", round, m.side.name, strings.Join(r.Wrong, "; "))
	}
	return r, nil
}

// String is a phase in one line.
func (p *Phase) String() string {
	return fmt.Sprintf("%7.0f sagas/s  p50 %6.1f p99 %6.1f ms  CPU %.3f s/1,000 (%s; apart %s)  WAL %.0f B, %.3f flushes, RSS %.0f MB; others %.2f cores",
		p.SagasPS, p.P50, p.P99, p.Total, parts(p.CPU), parts(p.Apart), p.WALBytes, p.Flushes, p.RSS, p.Others)
}

func parts(m map[string]float64) string {
	var out []string
	for _, k := range slices.Sorted(maps.Keys(m)) {
		out = append(out, fmt.Sprintf("%s %.3f", k, m[k]))
	}
	return strings.Join(out, ", ")
}
