package postgres

import (
	"context"
	"sync/atomic"
	"time"
)

const (
	clockEvery   = 10 * time.Second
	clockTrips   = 3 // of which the fastest counts: the error is at most half of its round trip
	clockTimeout = 2 * time.Second
)

// clock is the database's time without a round trip (F18): a reading of it, and the local monotonic clock since.
type clock struct {
	at atomic.Pointer[reading]
}

type reading struct {
	db    time.Time // the database's clock
	local time.Time // ours at the same moment, with its monotonic part
	trip  time.Duration
}

// Now is the database's time, to within half a round trip.
func (db *DB) Now() time.Time {
	r := db.clock.at.Load()
	return r.db.Add(time.Since(r.local)) // monotonic: a step of the local wall clock does not show
}

// ClockOffset is how far the database's clock is ahead of this machine's wall clock, and the round trip of the measurement.
func (db *DB) ClockOffset() (offset, trip time.Duration) {
	r := db.clock.at.Load()
	return db.Now().Sub(time.Now().Round(0)), r.trip // Round strips the monotonic part
}

func (db *DB) measureClock(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, db.cfg.ConnectTimeout+clockTimeout, errTimeout)
	defer cancel()
	c, err := db.acquire(ctx, db.pools[Operators])
	if err != nil {
		return err
	}
	defer c.Release()
	var best *reading
	for range clockTrips {
		var t time.Time
		begin := time.Now()
		if err := c.QueryRow(ctx, `SELECT clock_timestamp()`).Scan(&t); err != nil {
			return classify(ctx, "read the clock", err)
		}
		trip := time.Since(begin)
		if best == nil || trip < best.trip {
			best = &reading{db: t, local: begin.Add(trip / 2), trip: trip}
		}
	}
	db.clock.at.Store(best)
	return nil
}

// keepClock measures until ctx ends. While the database is away the last reading goes on: a quartz drifts milliseconds an hour.
func (db *DB) keepClock(ctx context.Context) {
	t := time.NewTicker(clockEvery)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
			_ = db.measureClock(ctx) // whoever needs the database reports its absence
		}
	}
}
