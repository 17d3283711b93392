package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"

	"ordersaga/cmd/ordersaga/internal/bench"
	"ordersaga/events"
)

// trial is one case in one round, running.
type trial struct {
	*meter
	x     *scaling
	c     *scaleCase
	out   *Outcome
	seeds int // of the phases so far
}

// one runs a case once: servers that stay, a database and topics of its own, a gateway, the processes.
func (x *scaling) one(ctx context.Context, c *scaleCase, round int) (_ *Outcome, err error) {
	name := fmt.Sprintf("r%d_%s", round, strings.ReplaceAll(c.name, "-", "_"))
	t := &trial{x: x, c: c, out: &Outcome{Case: c.name, Base: c.base, Round: round, Wrong: []string{}}}
	url, drop, err := x.databaseOf(ctx, c, name)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, x.srv.forget(context.WithoutCancel(ctx), drop)) }()
	stop, err := t.start(ctx, name, url)
	if err != nil {
		return nil, err
	}
	defer stop()
	if err := c.measure(ctx, t); err != nil {
		return nil, err
	}
	if t.out.Wrong, err = t.books(ctx); err != nil {
		return nil, err
	}
	if t.out.Wrong == nil {
		t.out.Wrong = []string{}
	}
	t.say("books: %d wrong %s", len(t.out.Wrong), strings.Join(t.out.Wrong, "; "))
	return t.out, nil
}

// databaseOf answers the URL of a trial's database, and the name of what is to be dropped after it.
func (x *scaling) databaseOf(ctx context.Context, c *scaleCase, name string) (url, drop string, err error) {
	if c.database != nil {
		return c.database.open(ctx, x, name)
	}
	url, err = x.srv.database(ctx, name)
	return url, name, err
}

// start starts everything that a trial needs. What it answers stops it again.
func (t *trial) start(ctx context.Context, name, url string) (stop func(), err error) {
	var stops []func()
	stop = func() {
		for _, f := range slices.Backward(stops) {
			f()
		}
	}
	defer func() {
		if err != nil {
			stop()
		}
	}()
	ports, err := freePorts(ctx, 2)
	if err != nil {
		return nil, err
	}
	log, err := os.Create(filepath.Join(t.x.dir, name+".log"))
	if err != nil {
		return nil, fmt.Errorf("log: %w", err)
	}
	stops = append(stops, func() { log.Close() })
	e := &environment{
		s: t.x.srv, database: url, gateway: "http://127.0.0.1:" + ports[0], http: "127.0.0.1:" + ports[1], run: strings.ReplaceAll(name, "_", "-"),
		partitions: t.c.partitions, bin: t.x.bin, log: log, env: t.c.env, procs: t.c.procs,
	}
	if !t.c.sheds {
		e.env = append([]string{"ORDERSAGA_INTAKE__MAX_DELAY=0"}, e.env...)
	}
	if e.partitions == 0 {
		e.partitions = t.x.o.partitions
	}
	gateway, err := startStub("127.0.0.1:"+ports[0], t.x.o.delay)
	if err != nil {
		return nil, err
	}
	stops = append(stops, gateway.stop)
	t.meter = &meter{side: ourSide(), env: e, gateway: gateway, load: t.c.load, connections: t.x.o.connections, limit: t.x.o.limit}
	if err := e.prepare(ctx); err != nil {
		return nil, err
	}
	if t.c.before != nil {
		if err := t.c.before(ctx, e); err != nil {
			return nil, err
		}
	}
	if t.sys, err = e.launch(ctx); err != nil {
		return nil, err
	}
	stops = append(stops, func() { t.sys.stop() }) // whichever runs by then
	if err := bench.Prepare(ctx, t.sys.urls[0], "", &bench.Mix{Products: skus, MaxLines: 1}, price); err != nil {
		return nil, err
	}
	stops = append(stops, func() {
		if t.tail != nil {
			t.tail.close()
		}
	})
	if err := t.open(ctx); err != nil {
		return nil, err
	}
	stops = append(stops, func() { t.close(ctx) })
	return stop, copyProducts(ctx, t.db, t.load.products)
}

// halt stops the processes.
func (t *trial) halt() {
	t.sys.stop()
	t.sys = &system{log: t.env.log.Name()}
}

// resume starts others in their place; no procs: one with all roles.
func (t *trial) resume(ctx context.Context, procs []spec) error {
	t.env.procs = procs
	sys, err := t.env.launch(ctx)
	if err == nil {
		t.sys = sys
	}
	return err
}

// next gives a plan a series of its own. The orders of the n-th phase are the same in every case and round; their ids are not.
func (t *trial) next(pl plan) plan {
	t.seeds++
	t.x.series++
	pl.series = series{seed: t.seeds, number: t.x.series, timed: true}
	return pl
}

func (t *trial) eventsTopic() string { return t.env.prefix() + string(events.TopicEvents) }

// phase runs a plan and measures it.
func (t *trial) phase(ctx context.Context, pl plan) (*Phase, *passage, error) {
	if pl.slots > 0 && t.tail == nil { // not before: reading has a price
		var err error
		if t.tail, err = startTail(ctx, t.env.s.brokers, t.eventsTopic()); err != nil {
			return nil, nil, err
		}
	}
	within := t.limit
	if pl.rate > 0 {
		within += time.Duration(float64(pl.n) / pl.rate * float64(time.Second))
	}
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	p, ps, err := t.meter.phase(ctx, t.next(pl))
	if err == nil {
		t.say("%s", p)
	}
	return p, ps, err
}

// orders is how many a saturated phase has.
func (t *trial) orders() int { return max(t.x.o.orders/max(t.c.part, 1), 1) }

// warmUp runs the orders that do not count.
func (t *trial) warmUp(ctx context.Context) error {
	if t.x.o.warm == 0 {
		return nil
	}
	if _, _, err := t.phase(ctx, plan{n: max(t.x.o.warm/max(t.c.part, 1), 1)}); err != nil {
		return fmt.Errorf("warm-up: %w", err)
	}
	return nil
}

func (t *trial) say(format string, args ...any) {
	fmt.Fprintf(os.Stderr, "round %d %-9s %s\n", t.out.Round, t.c.name, fmt.Sprintf(format, args...))
}

// saturateAndRate is what most cases measure: orders as fast as they are taken, then, if a rate is asked for, some at that rate.
func saturateAndRate(ctx context.Context, t *trial) error {
	if err := t.warmUp(ctx); err != nil {
		return err
	}
	p, ps, err := t.phase(ctx, plan{n: t.orders()})
	if err != nil {
		return fmt.Errorf("saturation: %w", err)
	}
	t.out.throughput(p)
	commits, err := t.commits(ctx, ps)
	if err != nil {
		return err
	}
	t.stalls("saturated: ", commits)
	return t.atRate(ctx)
}

// atRate is the phase of a fixed rate.
func (t *trial) atRate(ctx context.Context) error {
	o := t.x.o
	if o.rate == 0 {
		return nil
	}
	p, _, err := t.phase(ctx, plan{n: int(o.rate * o.length.Seconds()), rate: o.rate})
	if err != nil {
		return fmt.Errorf("%.0f/s: %w", o.rate, err)
	}
	t.out.latency(fmt.Sprintf("%.0f/s: ", o.rate), p)
	return nil
}

// commits are the moments at which something of the latest phase's orders was committed, while it lasted.
func (t *trial) commits(ctx context.Context, ps *passage) ([]time.Time, error) {
	pl := t.placed[len(t.placed)-1]
	rows, err := t.db.Query(ctx, `
SELECT DISTINCT pg_xact_commit_timestamp(xmin) FROM orders WHERE id >= $1 AND id < $2 UNION
SELECT DISTINCT pg_xact_commit_timestamp(xmin) FROM saga_history WHERE order_id >= $1 AND order_id < $2 UNION
SELECT DISTINCT pg_xact_commit_timestamp(xmin) FROM sagas WHERE order_id >= $1 AND order_id < $2`, pl.from, pl.to)
	if err != nil {
		return nil, fmt.Errorf("database: %w", err)
	}
	at, err := pgx.CollectRows(rows, pgx.RowTo[time.Time])
	if err != nil {
		return nil, fmt.Errorf("database: %w", err)
	}
	return between(sortedTimes(at, nil), ps.began, ps.last.Add(time.Microsecond)), nil
}

// stalls adds how long nothing was committed, at most and of a hundred gaps the longest.
func (t *trial) stalls(of string, commits []time.Time) {
	g := gaps(commits)
	t.out.add(of+"gap between commits p99, ms", 1, quantile(g, 0.99))
	t.out.add(of+"longest, ms", 0, quantile(g, 1))
}
