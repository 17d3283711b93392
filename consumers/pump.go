package consumers

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"github.com/google/uuid"

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
	crews   []*crew
	freed   chan struct{} // closed when a batch has come back or lanes were dropped; nil: nobody waits for that

	lastTake time.Time
	lastSize int
}

// crew is the workers of one Work. Of those that are idle one is woken, not all: it wakes the next if it leaves anything.
type crew struct {
	Work
	want     func(Lane) bool
	idle     []*worker // whoever became idle last is woken first
	gatherer *worker   // waits for more before it takes what is there; while it does nobody else need wake up
}

type worker struct {
	*crew
	wake  chan struct{} // holds one
	timer *time.Timer
}

// unsettledPause keeps a handler that leaves records unsettled for no reason that we know from being called in a tight loop.
const unsettledPause = 100 * time.Millisecond

// NewPump makes a Pump.
func NewPump(cfg PumpConfig) *Pump {
	if cfg.Clock == nil {
		cfg.Clock = time.Now
	}
	cfg.MaxBatch = max(1, cfg.MaxBatch)
	return &Pump{cfg: cfg, lanes: NewLanes(cfg.Due, cfg.Overlap), running: map[*Batch]context.CancelCauseFunc{}}
}

// Run works until ctx ends, and returns when every batch has come back.
func (p *Pump) Run(ctx context.Context, works ...Work) {
	var wg sync.WaitGroup
	for _, w := range works {
		c := p.hire(w)
		for range max(1, w.Workers) {
			wg.Go(func() { p.work(ctx, &worker{crew: c, wake: make(chan struct{}, 1)}) })
		}
	}
	wg.Wait()
}

func (p *Pump) hire(w Work) *crew {
	p.mu.Lock()
	defer p.mu.Unlock()
	c := &crew{Work: w, want: func(l Lane) bool { return (w.Want == nil || w.Want(l)) && !slices.Contains(p.leaving, l) }}
	p.crews = append(p.crews, c)
	return c
}

// Add appends records to their lanes. It keeps the slice: nobody may write to it any more.
func (p *Pump) Add(records []events.Record) {
	if len(records) == 0 {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if marks := p.lanes.Add(records); len(marks) > 0 {
		p.mark(marks)
		p.free()
	}
	p.rouse()
}

// Offer hands over a record that its writer has committed in this process, ahead of its copy from Kafka: with the partition that it will lie in. If it is
// taken, and handled well, its copy is settled without being handled. Taking it is a favour: what is refused, or fails, comes from Kafka like any
// other. The record must have an id; nobody may write to it any more.
func (p *Pump) Offer(r *events.Record) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.crews) == 0 || slices.Contains(p.leaving, Lane{r.Topic, r.Partition}) || !p.lanes.Offer(r, p.cfg.MaxBatch) {
		return false
	}
	p.rouse()
	return true
}

// Settled notes a message that was handled ahead of its record from Kafka, which is settled unread when it comes.
func (p *Pump) Settled(id uuid.UUID, l Lane, hash int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.crews) > 0 && !slices.Contains(p.leaving, l) {
		p.lanes.Settled(id, l, hash)
	}
}

// mark tells how far lanes may advance. The lock is held: marks of a lane must not overtake each other, nor come after its Drain.
func (p *Pump) mark(marks []Place) {
	if len(marks) > 0 && p.cfg.Mark != nil {
		p.cfg.Mark(marks)
	}
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
		p.await(ctx)
	}
	p.lanes.Drop(lanes)
	p.leaving = slices.DeleteFunc(p.leaving, func(l Lane) bool { return slices.Contains(lanes, l) })
	p.free()
	p.rouse()
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
		p.await(ctx)
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

// rouse wakes a worker of each crew, if there is anything to do; the lock is held.
func (p *Pump) rouse() {
	for _, c := range p.crews {
		p.rouseOne(c)
	}
}

func (p *Pump) rouseOne(c *crew) {
	n := len(c.idle)
	switch {
	case p.lanes.Waiting() == 0:
	case c.gatherer != nil:
		if p.lanes.Waiting() >= p.cfg.GatherTo {
			c.gatherer.rouse()
		}
	case n > 0:
		w := c.idle[n-1]
		c.idle = c.idle[:n-1]
		w.rouse()
	}
}

func (w *worker) rouse() {
	select {
	case w.wake <- struct{}{}:
	default: // it is about to look anyway
	}
}

// free tells those who wait for it that there is more room; the lock is held.
func (p *Pump) free() {
	if p.freed != nil {
		close(p.freed)
		p.freed = nil
	}
}

// await gives the lock up until a batch has come back or ctx ends.
func (p *Pump) await(ctx context.Context) {
	if p.freed == nil {
		p.freed = make(chan struct{})
	}
	freed := p.freed
	p.mu.Unlock()
	select {
	case <-freed:
	case <-ctx.Done():
	}
	p.mu.Lock()
}

// rest gives the lock up until the worker is woken, d has passed (if it is not negative) or ctx ends.
func (p *Pump) rest(ctx context.Context, w *worker, d time.Duration) {
	p.mu.Unlock()
	w.sleep(ctx, d)
	p.mu.Lock()
}

func (w *worker) sleep(ctx context.Context, d time.Duration) {
	var after <-chan time.Time
	if d >= 0 {
		if w.timer == nil {
			w.timer = time.NewTimer(d)
		} else {
			w.timer.Reset(d)
		}
		defer w.timer.Stop()
		after = w.timer.C
	}
	select {
	case <-w.wake:
	case <-after:
	case <-ctx.Done():
	}
}

func (p *Pump) work(ctx context.Context, w *worker) {
	for {
		b, batchCtx, cancel := p.take(ctx, w)
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
func (p *Pump) take(ctx context.Context, w *worker) (*Batch, context.Context, context.CancelCauseFunc) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for ctx.Err() == nil {
		if w.gatherer != nil { // it takes what there is, and wakes us for what it leaves
			p.idle(ctx, w, -1)
			continue
		}
		p.gather(ctx, w)
		now := p.cfg.Clock()
		if b := p.lanes.Take(now, p.cfg.MaxBatch, w.want); b != nil {
			p.lastTake, p.lastSize = time.Now(), len(b.Records)
			batchCtx, cancel := context.WithCancelCause(ctx)
			p.running[b] = cancel
			if w.Taken != nil {
				w.Taken(b, now)
			}
			p.rouseOne(w.crew)
			return b, batchCtx, cancel
		}
		if at, ok := p.lanes.Next(w.want); ok {
			p.idle(ctx, w, max(0, at.Sub(now)))
		} else {
			p.idle(ctx, w, -1)
		}
	}
	return nil, nil, nil
}

// idle waits until there may be something to do, at the latest after d, if that is not negative.
func (p *Pump) idle(ctx context.Context, w *worker, d time.Duration) {
	w.idle = append(w.idle, w)
	p.rest(ctx, w, d)
	w.idle = slices.DeleteFunc(w.idle, func(o *worker) bool { return o == w })
}

// gather waits for a larger batch where one is to be expected: a transaction costs about the same for ten records as for one. What
// is to be expected is told from the last batch; with little coming in, a record is taken as soon as it is there.
func (p *Pump) gather(ctx context.Context, w *worker) {
	if p.cfg.Gather <= 0 || p.lanes.Waiting() == 0 {
		return
	}
	begun := time.Now()
	since := begun.Sub(p.lastTake)
	if since > 0 && float64(p.lastSize)/float64(since)*float64(p.cfg.Gather) < 2 {
		return
	}
	w.gatherer = w
	for left := p.cfg.Gather; left > 0 && p.lanes.Waiting() < p.cfg.GatherTo && ctx.Err() == nil; left = p.cfg.Gather - time.Since(begun) {
		p.rest(ctx, w, left)
	}
	w.gatherer = nil
}

// settle takes a batch back, marks what may be, and reports whether all of it that came from Kafka was settled.
func (p *Pump) settle(b *Batch, settled []bool) bool {
	if len(settled) != len(b.Records) {
		settled = make([]bool, len(b.Records)) // a handler that answers for other records than it got has settled none
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.running, b)
	p.mark(p.lanes.Settle(b, settled))
	p.free()
	p.rouse()
	return !slices.Contains(settled[:len(b.from)], false)
}
