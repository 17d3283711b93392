package main

import (
	"context"
	"fmt"
	"os"
	"sync"
	"time"

	"ordersaga/adapters/postgres"
)

func dropsExperiment() *experiment {
	return &experiment{
		name: "drops", asks: "does dropping partitions of the outbox stall anybody?", takes: "about 10 min",
		defaults: func(o *scaleOptions) { o.span, o.orders, o.length = 2_000, 60_000, 30*time.Second },
		small:    func(o *scaleOptions) { o.span, o.orders = 100, 4_000 },
		cases: func(o *scaleOptions) []*scaleCase {
			return []*scaleCase{
				{name: "none", load: standard, measure: dropsMeasure(0)},
				{name: "drops", base: "none", load: standard, measure: dropsMeasure(o.span), before: func(ctx context.Context, e *environment) error {
					return narrow(ctx, e.database, o.span)
				}},
			}
		},
	}
}

// maintainEvery is how often partitions are looked after: the service does so every 15 s.
const maintainEvery = time.Second

// upkeep calls the service's own maintenance often, from outside, until it is stopped.
type upkeep struct {
	db   *postgres.DB
	stop context.CancelFunc
	wg   sync.WaitGroup

	mu               sync.Mutex
	dropped, blocked int
	err              error
}

// startUpkeep begins; span is the width of new partitions in transactions, 0: as wide as they are.
func startUpkeep(ctx context.Context, url string, span int64) (*upkeep, error) {
	db, err := postgres.Open(ctx, postgres.Config{URL: url})
	if err != nil {
		return nil, err
	}
	ctx, stop := context.WithCancel(ctx)
	u := &upkeep{db: db, stop: stop}
	u.wg.Go(func() { u.run(ctx, span) })
	return u, nil
}

func (u *upkeep) run(ctx context.Context, span int64) {
	for pause(ctx, maintainEvery) == nil {
		done, err := u.db.MaintainOutbox(ctx, span)
		u.mu.Lock()
		if err != nil && ctx.Err() == nil {
			u.err = err
		}
		u.dropped, u.blocked = u.dropped+len(done.Dropped), u.blocked+len(done.Blocked)
		u.mu.Unlock()
	}
}

func (u *upkeep) close() {
	u.stop()
	u.wg.Wait()
	u.db.Close()
}

// counts answers how many partitions were dropped, and how often one was left because somebody held it, so far; and the last error.
func (u *upkeep) counts() (dropped, blocked int, err error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.dropped, u.blocked, u.err
}

// narrow puts a partition of some transactions in the place of the first one of a fresh outbox, which spans a million.
func narrow(ctx context.Context, url string, span int64) error {
	db, err := postgres.Open(ctx, postgres.Config{URL: url})
	if err != nil {
		return err
	}
	defer db.Close()
	pool := db.Pool(postgres.Operators)
	var drop string
	var lower int64
	const q = `SELECT string_agg('DROP TABLE ' || inhrelid::regclass, '; '), pg_snapshot_xmin(pg_current_snapshot())::text::bigint FROM pg_inherits WHERE inhparent = 'outbox'::regclass`
	if err := pool.QueryRow(ctx, q).Scan(&drop, &lower); err != nil {
		return fmt.Errorf("narrow partitions: %w", err)
	}
	_, err = pool.Exec(ctx, fmt.Sprintf("%s; CREATE TABLE outbox_p%d PARTITION OF outbox FOR VALUES FROM ('%d') TO ('%d') WITH (autovacuum_enabled = false)", drop, lower, lower, lower+span))
	if err != nil {
		return fmt.Errorf("narrow partitions: %w", err)
	}
	_, err = db.MaintainOutbox(ctx, span)
	return err
}

// dropsMeasure measures a saturated phase and one of a fixed rate while partitions are looked after every second.
func dropsMeasure(span int64) func(context.Context, *trial) error {
	return func(ctx context.Context, t *trial) error {
		o := t.x.o
		u, err := startUpkeep(ctx, t.env.database, span)
		if err != nil {
			return err
		}
		defer u.close()
		if err := t.warmUp(ctx); err != nil {
			return err
		}
		if err := t.underUpkeep(ctx, u, "saturated: ", plan{n: t.orders(), slots: o.slots}); err != nil {
			return err
		}
		if o.rate > 0 {
			return t.underUpkeep(ctx, u, fmt.Sprintf("%.0f/s: ", o.rate), plan{n: int(o.rate * o.length.Seconds()), rate: o.rate})
		}
		return nil
	}
}

func (t *trial) underUpkeep(ctx context.Context, u *upkeep, of string, pl plan) error {
	before, _, _ := u.counts()
	p, ps, err := t.phase(ctx, pl)
	if err != nil {
		return fmt.Errorf("%s%w", of, err)
	}
	dropped, blocked, err := u.counts()
	if err != nil {
		fmt.Fprintln(os.Stderr, "upkeep:", err)
		t.out.note("upkeep failed: %v", err)
	}
	if pl.rate == 0 {
		t.out.add(of+"ended sagas/s, between the first and the last tenth", 0, steadyRate(sortedTimes(ps.ended, ps.isAccepted)))
	}
	t.out.latency(of, p)
	t.out.add(of+"answer p99, ms", 1, p.AcceptP99)
	t.out.add(of+"answer, longest, ms", 0, quantile(sortedLatencies(ps.due, ps.answered, ps.isAccepted), 1))
	commits, err := t.commits(ctx, ps)
	if err != nil {
		return err
	}
	t.stalls(of, commits)
	t.out.tell(of+"partitions dropped", 0, float64(dropped-before))
	t.out.tell(of+"drops put off so far", 0, float64(blocked))
	return nil
}
