package boot

import (
	"context"
	"fmt"
	"sync/atomic"
	"syscall"
	"time"

	"ordersaga/adapters/postgres"
	"ordersaga/saga"
)

// admission decides whether the intake may take more in: not while too much is under way already, while orders wait for too long, while the outbox
// is not carried away, or while the disk is nearly full. It looks once a second, and five times where it keeps a limit, so that asking it costs nothing.
type admission struct {
	db    *postgres.DB
	cfg   atomic.Pointer[Intake]
	dir   string
	state atomic.Pointer[saga.OverloadedError]

	throttle throttle
	forward  time.Duration // sagas' deadline, from which their age is told

	counted int64     // sagas under way, when they were last counted
	recount time.Time // not before
}

const (
	admissionEvery = time.Second
	shedFor        = 2 * time.Second // Retry-After
	// Counting half a million sagas takes a tenth of a second of the database's CPU. So they are counted again only when there could be too many
	// of them, if so many a second came in and none ended, but within recountWithin.
	placedAtMost  = 20_000
	recountWithin = 15 * time.Second
)

func newAdmission(db *postgres.DB, cfg Intake, forward time.Duration, dir string) *admission {
	a := &admission{db: db, forward: forward, dir: dir}
	a.set(cfg)
	return a
}

// set replaces the bounds.
func (a *admission) set(cfg Intake) { a.cfg.Store(&cfg) }

// check answers nil, or why nothing more is taken in.
func (a *admission) check() error {
	if e := a.state.Load(); e != nil {
		return e
	}
	if !a.throttle.take() {
		return errLate
	}
	return nil
}

var errLate = &saga.OverloadedError{Why: "more orders come in than are worked off", After: shedFor}

func (a *admission) run(ctx context.Context) error {
	t := time.NewTicker(throttleEvery)
	defer t.Stop()
	for i := 1; ; i++ {
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
		}
		whole := i%int(admissionEvery/throttleEvery) == 0
		if whole {
			a.state.Store(a.look(ctx))
		}
		a.regulate(ctx, whole)
	}
}

func (a *admission) look(ctx context.Context) *saga.OverloadedError {
	cfg := a.cfg.Load()
	no := func(format string, args ...any) *saga.OverloadedError {
		return &saga.OverloadedError{Why: fmt.Sprintf(format, args...), After: shedFor}
	}
	if a.dir != "" && cfg.MinDisk > 0 {
		var fs syscall.Statfs_t
		if err := syscall.Statfs(a.dir, &fs); err == nil {
			if free := int64(fs.Bavail) * fs.Bsize; free < cfg.MinDisk { //nolint:gosec // no disk is that large
				return no("the disk of the data directory has %d MiB left, fewer than %d", free>>20, cfg.MinDisk>>20)
			}
		}
	}
	// Errors are left to the intake itself: its own transaction says better what is wrong.
	if b, err := a.db.OutboxBacklog(ctx); err == nil && cfg.MaxLag > 0 && b.OldestSeconds > cfg.MaxLag.Seconds() {
		return no("the oldest message waits for %.0f s to be published", b.OldestSeconds)
	}
	if a.tooMany(ctx, cfg.MaxRunning, time.Now()) {
		return no("more than %d orders are under way", cfg.MaxRunning)
	}
	return nil
}

func (a *admission) tooMany(ctx context.Context, limit int64, now time.Time) bool {
	if limit <= 0 {
		return false
	}
	if room := limit - a.counted; now.Before(a.recount) && room > 0 {
		return false
	}
	n, err := a.db.RunningSagas(ctx, limit+1)
	if err != nil {
		return false
	}
	a.counted, a.recount = n, now.Add(recountAfter(limit-n))
	return n > limit
}

// recountAfter is how long it takes at least until there are room more sagas.
func recountAfter(room int64) time.Duration {
	const most = int64(recountWithin/time.Second) * placedAtMost
	return time.Duration(min(max(room, 0), most)) * time.Second / placedAtMost
}
