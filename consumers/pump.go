package consumers

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"ordersaga/events"
)

// HandleFunc takes a batch through a handler and answers which of its records are settled; see Group.Handle.
type HandleFunc func(ctx context.Context, batch []events.Record) (settled []bool, err error)

// ErrRevoked is the cause with which a batch's context ends when one of its partitions goes to another member of the group.
var ErrRevoked = errors.New("a partition of the batch was revoked")

// Work is what the workers of a Pump do.
type Work struct {
	Handle  HandleFunc
	Workers int                           // batches at once, at least 1
	Want    func(Lane) bool               // lanes that it takes from; nil: all
	Taken   func(b *Batch, now time.Time) // hears of every batch taken, under the Pump's lock; nil: nobody
}

// PumpConfig says how a Pump takes batches.
type PumpConfig struct {
	MaxBatch int                            // records of a batch at most
	Due      func(*events.Record) time.Time // nil: at once
	Overlap  bool                           // see NewLanes
	// Gather is how long a worker waits, under load, for a batch to grow to GatherTo records; 0: not at all. While little comes in it
	// never waits.
	Gather   time.Duration
	GatherTo int
	Clock    func() time.Time // nil: time.Now; what Due is compared with
	// Mark hears how far lanes may advance, lane by lane in order. It must not block, nor call the Pump.
	Mark func([]Place)
}

// Pump carries records from where they are fetched to handlers, and back how far each partition is settled. The fetching side calls
// Add, Drain and Room, and is never blocked by a handler; Run's workers do the handling.
type Pump struct {
	cfg PumpConfig

	mu      sync.Mutex
	lanes   *Lanes
	leaving []Lane
	running map[*Batch]context.CancelCauseFunc
	changed chan struct{} // closed and replaced whenever a waiter may have something to do

	lastTake time.Time
	lastSize int
}

// unsettledPause keeps a handler that leaves records unsettled for no reason that we know from being called in a tight loop.
const unsettledPause = 100 * time.Millisecond

// NewPump makes a Pump.
func NewPump(cfg PumpConfig) *Pump {
	if cfg.Clock == nil {
		cfg.Clock = time.Now
	}
	cfg.MaxBatch = max(1, cfg.MaxBatch)
	return &Pump{cfg: cfg, lanes: NewLanes(cfg.Due, cfg.Overlap), running: map[*Batch]context.CancelCauseFunc{}, changed: make(chan struct{})}
}

// Run works until ctx ends, and returns when every batch has come back.
func (p *Pump) Run(ctx context.Context, works ...Work) {
	var wg sync.WaitGroup
	for _, w := range works {
		for range max(1, w.Workers) {
			wg.Go(func() { p.work(ctx, w) })
		}
	}
	wg.Wait()
}

// Add appends records to their lanes.
func (p *Pump) Add(records []events.Record) {
	if len(records) == 0 {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.lanes.Add(records)
	p.signal()
}

// Drain ends the batches that have records of the given lanes, waits for them until ctx ends, and forgets the lanes. What the
// batches settled meanwhile was marked before Drain returns; what comes later is not.
func (p *Pump) Drain(ctx context.Context, lanes []Lane) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.leaving = append(p.leaving, lanes...)
	for b, cancel := range p.running {
		if b.Holds(lanes) {
			cancel(ErrRevoked)
		}
	}
	for p.busy(lanes) && ctx.Err() == nil {
		p.await(ctx, nil)
	}
	p.lanes.Drop(lanes)
	p.leaving = slices.DeleteFunc(p.leaving, func(l Lane) bool { return slices.Contains(lanes, l) })
	p.signal()
}

func (p *Pump) busy(lanes []Lane) bool {
	for b := range p.running {
		if b.Holds(lanes) {
			return true
		}
	}
	return false
}

// Room waits until fewer than limit records are held, or ctx ends.
func (p *Pump) Room(ctx context.Context, limit int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for p.lanes.Size() >= limit && ctx.Err() == nil {
		p.await(ctx, nil)
	}
}

// Size is the number of records held.
func (p *Pump) Size() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.lanes.Size()
}

// Length is the number of records held for one lane.
func (p *Pump) Length(l Lane) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.lanes.Length(l)
}

// signal wakes all who wait; the lock is held.
func (p *Pump) signal() {
	close(p.changed)
	p.changed = make(chan struct{})
}

// await gives the lock up until something changes, a timer fires or ctx ends.
func (p *Pump) await(ctx context.Context, timer <-chan time.Time) {
	changed := p.changed
	p.mu.Unlock()
	select {
	case <-changed:
	case <-timer:
	case <-ctx.Done():
	}
	p.mu.Lock()
}

func (p *Pump) work(ctx context.Context, w Work) {
	want := func(l Lane) bool { return (w.Want == nil || w.Want(l)) && !slices.Contains(p.leaving, l) }
	for {
		b, batchCtx, cancel := p.take(ctx, w, want)
		if b == nil {
			return
		}
		settled, _ := w.Handle(batchCtx, b.Records) // why it ended early: we ended it, and the handler's observer knows
		interrupted := batchCtx.Err() != nil
		cancel(nil)
		if !p.settle(b, settled) && !interrupted {
			pause(ctx, unsettledPause)
		}
	}
}

// take waits for a batch; nil when ctx has ended.
func (p *Pump) take(ctx context.Context, w Work, want func(Lane) bool) (*Batch, context.Context, context.CancelCauseFunc) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for ctx.Err() == nil {
		p.gather(ctx)
		now := p.cfg.Clock()
		if b := p.lanes.Take(now, p.cfg.MaxBatch, want); b != nil {
			p.lastTake, p.lastSize = time.Now(), len(b.Records)
			batchCtx, cancel := context.WithCancelCause(ctx)
			p.running[b] = cancel
			if w.Taken != nil {
				w.Taken(b, now)
			}
			return b, batchCtx, cancel
		}
		at, ok := p.lanes.Next(want)
		if !ok {
			p.await(ctx, nil)
			continue
		}
		timer := time.NewTimer(at.Sub(now))
		p.await(ctx, timer.C)
		timer.Stop()
	}
	return nil, nil, nil
}

// gather waits for a larger batch where one is to be expected: a transaction costs about the same for ten records as for one. What
// is to be expected is told from the last batch; with little coming in, a record is taken as soon as it is there.
func (p *Pump) gather(ctx context.Context) {
	begun := time.Now()
	since := begun.Sub(p.lastTake)
	if p.cfg.Gather <= 0 || p.lanes.Waiting() == 0 || since > 0 && float64(p.lastSize)/float64(since)*float64(p.cfg.Gather) < 2 {
		return
	}
	for p.lanes.Waiting() < p.cfg.GatherTo && ctx.Err() == nil {
		left := p.cfg.Gather - time.Since(begun)
		if left <= 0 {
			return
		}
		timer := time.NewTimer(left)
		p.await(ctx, timer.C)
		timer.Stop()
	}
}

// settle takes a batch back, marks what may be, and reports whether all of it was settled.
func (p *Pump) settle(b *Batch, settled []bool) bool {
	if len(settled) != len(b.Records) {
		settled = make([]bool, len(b.Records)) // a handler that answers for other records than it got has settled none
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.running, b)
	if marks := p.lanes.Settle(b, settled); len(marks) > 0 && p.cfg.Mark != nil {
		p.cfg.Mark(marks) // under the lock: marks of a lane must not overtake each other, nor come after its Drain
	}
	p.signal()
	return !slices.Contains(settled, false)
}
