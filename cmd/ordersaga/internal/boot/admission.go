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

// admission decides whether the intake may take more in: not while too much is under way already, while the outbox is not carried
// away, or while the disk is nearly full. It looks once a second, so that asking it costs nothing.
type admission struct {
	db    *postgres.DB
	cfg   atomic.Pointer[Intake]
	dir   string
	state atomic.Pointer[saga.OverloadedError]
}

const (
	admissionEvery = time.Second
	shedFor        = 2 * time.Second // Retry-After
)

func newAdmission(db *postgres.DB, cfg Intake, dir string) *admission {
	a := &admission{db: db, dir: dir}
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
	return nil
}

func (a *admission) run(ctx context.Context) error {
	t := time.NewTicker(admissionEvery)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
		}
		a.state.Store(a.look(ctx))
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
	if n, err := a.db.SagasUnderWay(ctx, cfg.MaxRunning+1); err == nil && cfg.MaxRunning > 0 && n > cfg.MaxRunning {
		return no("more than %d orders are under way", cfg.MaxRunning)
	}
	return nil
}
