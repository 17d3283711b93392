package boot

import (
	"context"
	"sync/atomic"
	"time"

	"ordersaga/adapters/postgres"
	"ordersaga/adapters/telemetry"
	"ordersaga/events"
)

// watchEvery is how often the gauges that cost a query are brought up to date.
const watchEvery = 5 * time.Second

// watchMetrics keeps what a scrape is answered with: a scrape must not wait for a database.
func (a *App) watchMetrics(ctx context.Context) error {
	var sagas atomic.Pointer[telemetry.SagaStats]
	var dead atomic.Pointer[map[events.Group]int64]
	a.metrics.WatchSagas(func() (telemetry.SagaStats, bool) {
		if s := sagas.Load(); s != nil {
			return *s, true
		}
		return telemetry.SagaStats{}, false
	})
	a.metrics.WatchDeadLetters(func() (map[events.Group]int64, bool) {
		if d := dead.Load(); d != nil {
			return *d, true
		}
		return nil, false
	})
	a.metrics.WatchPools(a.pools)
	if a.intake != nil {
		a.metrics.WatchIntakeQueue(func() (length, limit int) { return a.intake.Queued(), a.cfg.Intake.Queue })
	}
	t := time.NewTicker(watchEvery)
	defer t.Stop()
	for {
		// What can't be read is absent: the errors show elsewhere.
		sagas.Store(a.sagaStats(ctx))
		if d, err := a.db.CountOpenDead(ctx); err == nil {
			dead.Store(&d)
		} else {
			dead.Store(nil)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
		}
	}
}

func (a *App) sagaStats(ctx context.Context) *telemetry.SagaStats {
	running, stuck, err := a.db.CountSagasUnderWay(ctx)
	if err != nil {
		return nil
	}
	age, err := a.db.OldestUnderWay(ctx)
	if err != nil {
		return nil
	}
	return &telemetry.SagaStats{Running: running, Stuck: stuck, OldestRunning: time.Duration(age * float64(time.Second))}
}

func (a *App) pools() []telemetry.PoolStats {
	out := make([]telemetry.PoolStats, 0, len(postgres.Purposes))
	for _, p := range postgres.Purposes {
		s := a.db.Pool(p).Stat()
		out = append(out, telemetry.PoolStats{
			Name: string(p), Limit: s.MaxConns(), Used: s.AcquiredConns(), Idle: s.IdleConns(), Acquired: s.AcquireCount(),
			Waited: s.EmptyAcquireCount(), WaitedFor: s.EmptyAcquireWaitTime(), Canceled: s.CanceledAcquireCount(),
		})
	}
	return out
}
