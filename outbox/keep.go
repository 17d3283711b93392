package outbox

import (
	"context"
	"errors"
	"math/rand/v2"
	"time"
)

// keep renews leases and stores cursors until ctx ends.
func (r *Relay) keep(ctx context.Context) {
	t := time.NewTicker(r.cfg.StoreEvery)
	defer t.Stop()
	var nextAcquire, nextStore, nextIdle time.Time
	failures, unstored := 0, 0 // in a row
	for {
		if now := time.Now(); !now.Before(nextAcquire) {
			if r.acquire(ctx) {
				failures = 0
				nextAcquire = now.Add(r.cfg.RenewEvery)
			} else {
				failures++
				nextAcquire = time.Now().Add(r.backoff(failures))
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		case <-r.tend:
		}
		now := time.Now()
		stopped := r.stopped()
		if len(stopped) > 0 || !now.Before(nextStore) {
			idle := !now.Before(nextIdle)
			r.call(ctx, func(ctx context.Context) { unstored = r.store(ctx, idle, unstored) })
			nextStore = now.Add(r.cfg.StoreEvery)
			if idle {
				nextIdle = now.Add(r.cfg.IdleStoreEvery)
			}
			r.report()
		}
		if r.attend(ctx, stopped) && failures == 0 {
			nextAcquire = now // what was forgotten is asked for at once
			if unstored > 0 {
				nextAcquire = now.Add(r.backoff(unstored)) // each round sends again what could not be stored
			}
		}
	}
}

func (r *Relay) call(ctx context.Context, f func(ctx context.Context)) {
	ctx, cancel := context.WithTimeout(ctx, r.cfg.CallTimeout)
	defer cancel()
	f(ctx)
}

// backoff is full jitter under a bound that doubles.
func (r *Relay) backoff(failures int) time.Duration {
	limit := r.cfg.BackoffMin << min(max(failures-1, 0), 20)
	if limit <= 0 || limit > r.cfg.BackoffMax {
		limit = r.cfg.BackoffMax
	}
	return r.cfg.BackoffMin/2 + rand.N(limit)
}

func (r *Relay) acquire(ctx context.Context) bool {
	asked := time.Now() // the term begins no earlier than this
	var g Grant
	var err error
	r.call(ctx, func(ctx context.Context) { g, err = r.log.Acquire(ctx, r.id, r.cfg.LeaseTerm) })
	if err != nil {
		r.failed(ctx, "acquire", err)
		return false
	}
	r.mu.Lock()
	added, lost := assign(r.shards, g)
	for _, s := range lost {
		r.drop(s)
	}
	for _, l := range added {
		r.shards[l.Shard] = &shard{id: l.Shard, fence: l.Fence, read: l.Cursor, stored: l.Cursor, track: track{acked: l.Cursor}}
	}
	share(r.shards, g.Share)
	r.valid = asked.Add(r.cfg.LeaseTerm)
	held := len(r.shards)
	r.mu.Unlock()
	for _, s := range lost {
		r.obs.ShardFenced(s.id)
	}
	r.obs.LeasesHeld(held)
	if len(added) > 0 {
		signal(r.kick)
	}
	signal(r.tend) // a surplus may be drained already
	return true
}

// failed tells of a call that failed. Whatever it was, the log's session may be another one now.
func (r *Relay) failed(ctx context.Context, op string, err error) {
	if ctx.Err() != nil && errors.Is(err, ctx.Err()) {
		return // we are stopping
	}
	r.obs.RelayFailed(op, err)
	r.mu.Lock()
	r.forget()
	r.mu.Unlock()
	signal(r.tend)
}

// drop lets go of a shard that is another relay's now. The lock is held. What is in flight of it settles into nothing.
func (r *Relay) drop(s *shard) {
	s.stop(gone)
	delete(r.shards, s.id)
	r.forgetHandovers(s.id)
}

// store stores the cursors that moved. It takes and answers how many stores in a row have failed.
func (r *Relay) store(ctx context.Context, idle bool, failures int) int {
	r.mu.Lock()
	var leases []Lease
	var rows []int
	now := time.Now()
	for _, s := range r.shards {
		if s.due(idle) {
			leases = append(leases, Lease{Shard: s.id, Fence: s.fence, Cursor: s.track.acked})
			rows = append(rows, s.track.rows)
		}
	}
	r.mu.Unlock()
	if len(leases) == 0 {
		return failures
	}
	fenced, err := r.log.Store(ctx, r.id, leases)
	if err != nil {
		r.failed(ctx, "store", err)
		return failures + 1
	}
	r.mu.Lock()
	for i, l := range leases {
		if s, ok := r.shards[l.Shard]; ok && s.fence == l.Fence {
			s.stored = l.Cursor
			s.track.rows -= rows[i]
			s.behind = now
			if s.track.rows == 0 && s.track.inFlight == 0 {
				s.behind = time.Time{}
			}
		}
	}
	for _, id := range fenced {
		if s, ok := r.shards[id]; ok {
			r.drop(s)
		}
	}
	r.mu.Unlock()
	for _, id := range fenced {
		r.obs.ShardFenced(id)
	}
	return 0
}

// errand is a shard with what is to be done with it.
type errand struct {
	*shard
	task task
}

func (r *Relay) stopped() []errand {
	r.mu.Lock()
	defer r.mu.Unlock()
	var out []errand
	for _, s := range r.shards {
		if t := s.task(); t != noTask {
			out = append(out, errand{s, t})
		}
	}
	return out
}

// attend sees to shards that stopped, after their cursors were stored. It answers whether leases are to be asked for again.
func (r *Relay) attend(ctx context.Context, errands []errand) (ask bool) {
	var back []Lease
	r.mu.Lock()
	for _, e := range errands {
		if r.shards[e.id] != e.shard || e.shard.task() != e.task {
			continue // it was lost or has changed meanwhile
		}
		switch e.task {
		case repairTask:
			e.state = repairing
			r.fixes.Go(func() { r.repair(ctx, e.shard) })
		case forgetTask:
			delete(r.shards, e.id)
			ask = true
		case releaseTask:
			back = append(back, Lease{Shard: e.id, Fence: e.fence})
			delete(r.shards, e.id)
			r.forgetHandovers(e.id)
		case noTask:
		}
	}
	r.mu.Unlock()
	if len(back) == 0 {
		return ask
	}
	r.call(ctx, func(ctx context.Context) {
		if err := r.log.Release(ctx, r.id, back); err != nil {
			r.failed(ctx, "release", err) // the next grant has them still
		}
	})
	return ask
}

// report tells the observer what changes with every record.
func (r *Relay) report() {
	r.mu.Lock()
	n, direct, early := r.acked, r.direct, r.early
	r.acked, r.direct, r.early = 0, 0, 0
	var lag time.Duration
	for _, s := range r.shards {
		if !s.behind.IsZero() {
			lag = max(lag, time.Since(s.behind))
		}
	}
	r.mu.Unlock()
	if n > 0 {
		r.obs.Produced(n)
	}
	if direct > 0 {
		r.obs.HandedOver(direct)
	}
	if early > 0 {
		r.obs.TakenEarly(early)
	}
	r.obs.CursorLag(lag)
}

// measure measures the backlog until ctx ends.
func (r *Relay) measure(ctx context.Context) {
	t := time.NewTicker(r.cfg.BacklogEvery)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
		r.call(ctx, func(cctx context.Context) {
			b, err := r.log.Backlog(cctx)
			switch {
			case err == nil:
				r.obs.BacklogSeen(b)
			case ctx.Err() == nil:
				r.obs.RelayFailed("measure the backlog", err)
			}
		})
	}
}
