package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"ordersaga/cmd/ordersaga/internal/bench"
)

// scaleOptions are the flags of `yardstick scale`. Each experiment has defaults of its own.
type scaleOptions struct {
	root, bin, libs, out, only              string
	rounds, orders, warm, burnIn            int
	connections, partitions, slots, backlog int
	products                                int
	rate, pastRate, times                   float64
	length, limit, delay, forward           time.Duration
	sizes                                   sizes
	diskGB                                  float64
	span                                    int64
	small, statements                       bool
}

// experiment is a question with the cases that answer it.
type experiment struct {
	name, asks string
	takes      string // how long it takes with its defaults, on two cores
	// defaults changes the options before the flags are read.
	defaults func(o *scaleOptions)
	// small changes them to numbers with which it takes a minute or two and shows only that it works.
	small func(o *scaleOptions)
	cases func(o *scaleOptions) []*scaleCase
	// fill makes what all rounds need, such as databases that hold orders already; nil: nothing.
	fill func(ctx context.Context, x *scaling) error
}

// scaleCase is one column of an experiment's table.
type scaleCase struct {
	name       string
	base       string // the case that it is compared with; empty: it is one itself
	env        []string
	procs      []spec
	partitions int // 0: as the options say
	load       workload
	database   *kept // with what it holds already; nil: a fresh one
	part       int   // a saturated phase has one in so many of the orders; 0: all
	sheds      bool  // the intake's limit of delay holds, which orders that are taken in as fast as they come would meet
	// before runs once schema and topics are there; nil: nothing.
	before func(ctx context.Context, e *environment) error
	// measure does the work. Books are checked after it.
	measure func(ctx context.Context, t *trial) error
}

// experiments are the questions of this page, in the order of docs/scaling.md.
func experiments() []*experiment {
	return []*experiment{partitionsExperiment(), processesExperiment(), batchExperiment(), rowsExperiment(), hotExperiment(),
		backlogExperiment(), openTxExperiment(), dropsExperiment(), overloadExperiment()}
}

func scaleUsage() string {
	var b strings.Builder
	b.WriteString("scale EXPERIMENT [flags]; --small tries it with small numbers, -h lists its flags\n\n")
	for _, e := range experiments() {
		fmt.Fprintf(&b, "  %-11s %s (%s)\n", e.name, e.asks, e.takes)
	}
	return b.String()
}

func scaleCommand(ctx context.Context, args []string) error {
	if len(args) == 0 || strings.HasPrefix(args[0], "-") {
		fmt.Fprint(os.Stderr, scaleUsage())
		return nil
	}
	all := experiments()
	k := slices.IndexFunc(all, func(e *experiment) bool { return e.name == args[0] })
	if k < 0 {
		return fmt.Errorf("there is no experiment %q:\n%s", args[0], scaleUsage())
	}
	o := scaleOptions{
		rounds: 3, orders: 30_000, warm: 3000, burnIn: 10_000, connections: 128, partitions: 16, slots: 4000,
		rate: 200, length: 20 * time.Second, limit: 20 * time.Minute, delay: 5 * time.Millisecond,
		small: slices.Contains(args, "--small") || slices.Contains(args, "-small"),
	}
	x := &scaling{o: &o, e: all[k]}
	if x.e.defaults != nil {
		x.e.defaults(&o)
	}
	if o.small {
		o.rounds, o.orders, o.warm, o.burnIn, o.length = 1, 2000, 300, 500, 3*time.Second
		if x.e.small != nil {
			x.e.small(&o)
		}
	}
	_ = o.flags(x.e.name).Parse(args[1:]) // it exits
	return x.run(ctx)
}

func (o *scaleOptions) flags(name string) *flag.FlagSet {
	fs := flag.NewFlagSet("scale "+name, flag.ExitOnError)
	fs.BoolVar(&o.small, "small", o.small, "small numbers, which show only that the experiment works; before other flags")
	fs.StringVar(&o.root, "root", ".", "folder of this module")
	fs.StringVar(&o.bin, "bin", "", "the ordersaga that is measured (default: built from --root)")
	fs.StringVar(&o.libs, "kafka-libs", "", "folder of Kafka's jars (default: where the tests keep them)")
	fs.StringVar(&o.out, "out", "", "write all runs to this file as JSON")
	fs.StringVar(&o.only, "only", "", "run these cases only, with commas between them; the one they are compared with runs too")
	fs.IntVar(&o.rounds, "rounds", o.rounds, "runs of each case")
	fs.IntVar(&o.orders, "orders", o.orders, "orders of a saturated phase")
	fs.IntVar(&o.warm, "warm-up", o.warm, "orders before the first phase")
	fs.IntVar(&o.burnIn, "burn-in", o.burnIn, "orders before the first round, not reported: Kafka compiles itself as it runs")
	fs.IntVar(&o.connections, "connections", o.connections, "requests at a time")
	fs.IntVar(&o.partitions, "partitions", o.partitions, "of each topic that a saga runs on")
	fs.Float64Var(&o.rate, "rate", o.rate, "orders a second in the phase of a fixed rate; 0: none")
	fs.DurationVar(&o.length, "length", o.length, "of the phase of a fixed rate")
	fs.DurationVar(&o.limit, "limit", o.limit, "for a phase and its sagas to end")
	fs.DurationVar(&o.delay, "gateway", o.delay, "how long the gateway takes for a call")
	fs.IntVar(&o.slots, "slots", o.slots, "sagas under way at a time, where a loop is closed by their ends (opentx, drops, overload)")
	fs.IntVar(&o.backlog, "backlog", o.backlog, "orders that wait (backlog)")
	fs.Var(&o.sizes, "sizes", "orders in the database beforehand, such as 10k,1M,10M; the first is the base (rows)")
	fs.Float64Var(&o.diskGB, "disk-gb", o.diskGB, "gigabytes that the largest database may take: it holds fewer orders if need be (rows)")
	fs.Float64Var(&o.pastRate, "past-rate", o.pastRate, "orders a second at which those came in: idempotency keys are kept for 48 h (rows)")
	fs.IntVar(&o.products, "products", o.products, "products of the cases without hot rows (opentx)")
	fs.DurationVar(&o.forward, "forward-deadline", o.forward, "saga.forward_deadline: the clock of an hour in the time of a run (opentx)")
	fs.Int64Var(&o.span, "span", o.span, "transactions a partition of the outbox (drops)")
	fs.Float64Var(&o.times, "times", o.times, "of the best rate that are offered (overload)")
	return fs
}

// scaling is an experiment under way.
type scaling struct {
	o     *scaleOptions
	e     *experiment
	cases []*scaleCase
	srv   *servers
	dir   string
	bin   string
	runs  []Outcome

	series int // how many there were
}

func (x *scaling) run(ctx context.Context) (err error) {
	if x.cases, err = choose(x.e.cases(x.o), x.o.only); err != nil {
		return err
	}
	if x.o.libs == "" {
		if x.o.libs, err = kafkaLibs(); err != nil {
			return err
		}
	}
	if x.dir, err = os.MkdirTemp("", "yardstick-"); err != nil {
		return fmt.Errorf("scratch folder: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(x.dir)) }()
	if err := os.Chmod(x.dir, 0o755); err != nil { //nolint:gosec // Postgres may run as another user below it
		return fmt.Errorf("scratch folder: %w", err)
	}
	if x.bin = x.o.bin; x.bin == "" {
		x.bin = filepath.Join(x.dir, "ordersaga")
		if err := build(ctx, x.o.root, "./cmd/ordersaga", x.bin); err != nil {
			return err
		}
	}
	if x.srv, err = startServers(ctx, x.dir, x.o.libs, x.o.statements); err != nil {
		return err
	}
	defer x.srv.stop() //nolint:contextcheck // it has to happen, whatever ended the run
	if err := x.rounds(ctx); err != nil {
		return err
	}
	return x.conclude()
}

// choose keeps the cases that are asked for, and those that they are compared with.
func choose(all []*scaleCase, only string) ([]*scaleCase, error) {
	if only == "" {
		return all, nil
	}
	want := map[string]bool{}
	for name := range strings.SplitSeq(only, ",") {
		k := slices.IndexFunc(all, func(c *scaleCase) bool { return c.name == name })
		if k < 0 {
			return nil, fmt.Errorf("there is no case %q among %s", name, strings.Join(caseNames(all), ", "))
		}
		want[name] = true
		if b := all[k].base; b != "" {
			want[b] = true
		}
	}
	return slices.DeleteFunc(slices.Clone(all), func(c *scaleCase) bool { return !want[c.name] }), nil
}

func caseNames(all []*scaleCase) (out []string) {
	for _, c := range all {
		out = append(out, c.name)
	}
	return out
}

func (x *scaling) rounds(ctx context.Context) error {
	if x.o.burnIn > 0 {
		c := &scaleCase{name: "burnin", load: standard, measure: func(ctx context.Context, t *trial) error {
			_, _, err := t.phase(ctx, plan{n: x.o.burnIn})
			return err
		}}
		if _, err := x.one(ctx, c, 0); err != nil {
			return fmt.Errorf("burn-in: %w", err)
		}
	}
	if x.e.fill != nil {
		if err := x.e.fill(ctx, x); err != nil {
			return err
		}
	}
	turn := slices.Clone(x.cases)
	for round := range x.o.rounds {
		if round > 0 {
			slices.Reverse(turn) // none is always first
		}
		for _, c := range turn {
			r, err := x.one(ctx, c, round+1)
			if err != nil {
				return fmt.Errorf("%s, round %d: %w", c.name, round+1, err)
			}
			x.runs = append(x.runs, *r)
			if err := x.write(); err != nil {
				return err
			}
		}
	}
	return nil
}

func (x *scaling) write() error {
	if x.o.out == "" {
		return nil
	}
	b, err := json.MarshalIndent(map[string]any{
		"at": time.Now().UTC().Format(time.RFC3339), "host": bench.ThisHost(), "experiment": x.e.name, "arguments": os.Args[1:], "runs": x.runs,
	}, "", "  ")
	if err != nil {
		return fmt.Errorf("result: %w", err)
	}
	if err := os.WriteFile(x.o.out, append(b, '\n'), 0o644); err != nil { //nolint:gosec // a result
		return fmt.Errorf("result: %w", err)
	}
	return nil
}

// conclude prints the table and the notes. An error says that some books are wrong.
func (x *scaling) conclude() error {
	var b strings.Builder
	if err := scaleTable(&b, x.runs, caseNames(x.cases)); err != nil {
		return err
	}
	wrong := false
	for _, r := range x.runs {
		for _, n := range r.Notes {
			fmt.Fprintf(&b, "%s, round %d: %s\n", r.Case, r.Round, n)
		}
		for _, w := range r.Wrong {
			fmt.Fprintf(&b, "%s, round %d: WRONG: %s\n", r.Case, r.Round, w)
			wrong = true
		}
	}
	if _, err := io.WriteString(os.Stdout, b.String()); err != nil {
		return fmt.Errorf("result: %w", err)
	}
	if wrong {
		return errors.New("the books of some runs are wrong; see above")
	}
	return nil
}
