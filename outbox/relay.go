package outbox

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/google/uuid"
)

// Relay carries the rows of the shards that it has leased to Kafka. Two goroutines do it: one reads windows and hands the rows to the
// producer, never waiting for the broker but for want of room; the other keeps leases and stores cursors. A shard whose record comes
// back is mended by a third while the others go on. Relays of any number may run at once, in one process or in many. Writers of the same
// process may Announce what they commit, so that what is urgent need not wait for a window.
type Relay struct {
	log      Log
	producer Producer
	cfg      Config
	obs      Observer
	id       string

	kick  chan struct{} // for the reader: a shard may read again
	nudge chan struct{} // for the reader: want has grown
	tend  chan struct{} // for the keeper: a shard that stopped has nothing in flight any more
	room  chan struct{} // for the reader: acknowledgements made room
	fixes sync.WaitGroup

	produce context.Context //nolint:containedctx // of records that writers hand over; set by Run before any shard is held

	mu        sync.Mutex
	shards    map[int16]*shard
	valid     time.Time // until then the leases hold, by the local monotonic clock
	inFlight  int
	bytes     int
	acked     int // since it was last reported
	direct    int // of them by handover
	early     int // taken by readers in this process, since it was last reported
	want      want
	wantSince time.Time
	// What writers have announced, by the message's id, until the log meets it.
	handovers map[uuid.UUID]*handover
	leaving   [numLines]leaving
	opening   arrivals
}

// New makes a relay; Run runs it. observer may be nil.
func New(log Log, producer Producer, cfg Config, observer Observer) *Relay {
	cfg = cfg.withDefaults()
	if observer == nil {
		observer = NoObserver{}
	}
	return &Relay{
		log: log, producer: producer, cfg: cfg, obs: observer,
		id:     cfg.Name + "/" + uuid.NewString()[:8], // a process that restarts is not its predecessor: that one may be paused
		kick:   make(chan struct{}, 1),
		nudge:  make(chan struct{}, 1),
		tend:   make(chan struct{}, 1),
		room:   make(chan struct{}, 1),
		shards: make(map[int16]*shard, TotalShards), handovers: map[uuid.UUID]*handover{},
	}
}

// ID is the relay's name among the owners of leases.
func (r *Relay) ID() string { return r.id }

// Run relays until ctx ends; then it waits, for Config.FlushWithin at most, for what is in flight, stores its cursors and gives its
// leases back. Failures are told to the observer and tried again for ever. Run may be called once.
func (r *Relay) Run(ctx context.Context) error {
	// What was handed to the producer outlives ctx: a record given up half-way would be sent again by the next owner.
	produce, give := context.WithCancel(context.WithoutCancel(ctx))
	defer give()
	r.produce = produce
	var wg sync.WaitGroup
	wg.Go(func() { r.read(ctx) })
	wg.Go(func() { r.keep(ctx) })
	wg.Go(func() { r.measure(ctx) })
	wg.Wait()
	r.fixes.Wait()
	r.farewell(produce)
	return nil
}

// farewell runs alone: nothing reads or keeps any more. It reads once more, so that the cursors pass what was handed over since the last window:
// the next owner would send it again.
func (r *Relay) farewell(ctx context.Context) {
	fctx, cancel := context.WithTimeout(ctx, r.cfg.FlushWithin)
	defer cancel()
	r.window(fctx, true)
	if err := r.flush(fctx); err != nil {
		r.obs.RelayFailed("flush", err)
	}
	cctx, done := context.WithTimeout(ctx, r.cfg.CallTimeout)
	defer done()
	r.store(cctx, true, 0)
	if err := r.log.Leave(cctx, r.id); err != nil {
		r.obs.RelayFailed("leave", err) // its leases run out by themselves
	}
	r.report()
	r.mu.Lock()
	defer r.mu.Unlock()
	clear(r.shards)
	clear(r.handovers)
}

// flush waits until nothing is in flight.
func (r *Relay) flush(ctx context.Context) error {
	if err := r.producer.Flush(ctx); err != nil {
		return err
	}
	for {
		r.mu.Lock()
		n := r.inFlight
		r.mu.Unlock()
		if n == 0 {
			return nil
		}
		select {
		case <-r.room:
		case <-ctx.Done():
			return fmt.Errorf("%d records unacknowledged, the next owner sends them again: %w", n, ctx.Err())
		}
	}
}

func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
