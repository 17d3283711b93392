package outbox

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/google/uuid"

	"ordersaga/events"
)

// Relay carries the rows of the shards that it has leased to Kafka. Two goroutines do it: one reads windows and hands the rows to the
// producer, never waiting for the broker but for want of room; the other keeps leases and stores cursors. A shard whose record comes
// back is mended by a third while the others go on. Relays of any number may run at once, in one process or in many.
type Relay struct {
	log      Log
	producer Producer
	cfg      Config
	obs      Observer
	id       string

	kick  chan struct{} // for the reader: a shard may read again
	tend  chan struct{} // for the keeper: a shard that stopped has nothing in flight any more
	room  chan struct{} // for the reader: acknowledgements made room
	fixes sync.WaitGroup

	mu       sync.Mutex
	shards   map[int16]*shard
	valid    time.Time // until then the leases hold, by the local monotonic clock
	inFlight int
	bytes    int
	acked    int // since it was last reported
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
		tend:   make(chan struct{}, 1),
		room:   make(chan struct{}, 1),
		shards: make(map[int16]*shard, TotalShards),
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
	var wg sync.WaitGroup
	wg.Go(func() { r.read(ctx, produce) })
	wg.Go(func() { r.keep(ctx) })
	wg.Go(func() { r.measure(ctx) })
	wg.Wait()
	r.fixes.Wait()
	r.farewell(produce)
	return nil
}

// farewell runs alone: nothing reads or keeps any more.
func (r *Relay) farewell(ctx context.Context) {
	fctx, cancel := context.WithTimeout(ctx, r.cfg.FlushWithin)
	defer cancel()
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

// --- reading

// errLapsed and errStalled end a window that is to be gone on with later. Neither is a failure.
var (
	errLapsed  = errors.New("the leases may have run out")
	errStalled = errors.New("the broker takes nothing more for now")
)

func (r *Relay) read(ctx, produce context.Context) {
	p := pace{pollMin: r.cfg.PollMin, pollMax: r.cfg.PollMax, gatherMax: r.cfg.GatherMax}
	failures := 0
	for r.waitToRead(ctx, &p) {
		began := time.Now()
		w := r.open(produce, began)
		if w == nil {
			p.read(began, 0, 0)
			continue
		}
		err := r.log.Window(ctx, w.spans, w.begin, func(m *Message) error { return w.take(ctx, m) })
		ended := time.Now()
		if r.close(ctx, w, err) {
			failures = 0
		} else {
			failures++
			pause(ctx, r.backoff(failures))
		}
		p.read(ended, ended.Sub(began)-w.waited, w.rows)
		r.obs.WindowRead(w.rows, ended.Sub(began))
	}
}

// waitToRead waits for a wake or the next poll; false when ctx ended.
func (r *Relay) waitToRead(ctx context.Context, p *pace) bool {
	t := time.NewTimer(p.untilPoll(time.Now()))
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return ctx.Err() == nil
	case <-r.kick:
		return ctx.Err() == nil
	case <-r.cfg.Wake:
	}
	if d := p.gather(time.Now()); d > 0 {
		t.Reset(d)
		select {
		case <-ctx.Done():
			return false
		case <-t.C:
		}
		select { // what woke us meanwhile is in the window that is read now
		case <-r.cfg.Wake:
		default:
		}
	}
	return ctx.Err() == nil
}

// window is a window that is open.
type window struct {
	r       *Relay
	produce context.Context //nolint:containedctx // of the records, not of a call
	spans   []Span
	members map[int16]member
	next    Snapshot
	rows    int
	waited  time.Duration
}

// open plans a window; nil if there is nothing to read for.
func (r *Relay) open(produce context.Context, now time.Time) *window {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !now.Before(r.valid) || !r.roomy() {
		return nil
	}
	spans, members := plan(r.shards, now)
	if len(spans) == 0 {
		return nil
	}
	return &window{r: r, produce: produce, spans: spans, members: members}
}

func (w *window) begin(next Snapshot) { w.next = next }

// end is the snapshot that a span ends with.
func (w *window) end(from Cursor) Snapshot {
	if from.Next != "" {
		return from.Next
	}
	return w.next
}

// take hands one row to the producer.
func (w *window) take(ctx context.Context, m *Message) error {
	r := w.r
	record, err := m.Record()
	r.mu.Lock()
	if err := w.room(ctx); err != nil {
		r.mu.Unlock()
		return err
	}
	s, ok := w.members[m.Shard]
	if !ok || s.shard.gen != s.gen || s.read.Next != "" && m.RowID <= s.read.After {
		r.mu.Unlock() // the shard stopped, or had this row before it stopped
		return nil
	}
	c := s.read
	if c.Next == "" {
		c.Next = w.next
	}
	c.After = m.RowID
	s.read = c
	if s.behind.IsZero() {
		s.behind = time.Now()
	}
	n := s.track.push(c)
	w.rows++
	r.inFlight++
	r.bytes += len(m.Payload)
	r.mu.Unlock()
	if err != nil {
		r.settle(s.shard, n, m, err)
		return nil
	}
	r.producer.Produce(w.produce, record, func(err error) { r.settle(s.shard, n, m, err) })
	return nil
}

// room waits until a record more may be in flight. The relay's lock is held, but not while waiting.
func (w *window) room(ctx context.Context) error {
	r := w.r
	if r.inFlight == 0 || r.inFlight < r.cfg.MaxUnacked && r.bytes < r.cfg.MaxUnackedBytes {
		if w.rows%64 == 0 && !time.Now().Before(r.valid) { // a process that was stopped wakes up here
			return errLapsed
		}
		return ctx.Err()
	}
	began := time.Now()
	stall := time.NewTimer(r.cfg.StallAfter)
	defer stall.Stop()
	for !r.roomy() {
		r.mu.Unlock()
		var err error
		select {
		case <-r.room:
		case <-stall.C:
			err = errStalled
		case <-ctx.Done():
			err = ctx.Err()
		}
		r.mu.Lock()
		if err != nil {
			return err
		}
	}
	w.waited += time.Since(began)
	if !time.Now().Before(r.valid) {
		return errLapsed
	}
	return nil
}

// roomy reports that there is room for more than one record, so that the reader does not wake for each acknowledgement. The lock is held.
func (r *Relay) roomy() bool {
	return r.inFlight <= r.cfg.MaxUnacked*3/4 && r.bytes <= r.cfg.MaxUnackedBytes*3/4
}

// close moves the shards on to the next window, if this one was read to its end; false if reading failed.
func (r *Relay) close(ctx context.Context, w *window, err error) bool {
	switch {
	case err == nil:
	case errors.Is(err, errLapsed), errors.Is(err, errStalled), ctx.Err() != nil:
		return true // each shard is at its last row
	default:
		r.obs.RelayFailed("read", err)
		r.mu.Lock()
		r.forget()
		r.mu.Unlock()
		signal(r.tend)
		return false
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, span := range w.spans {
		c := Cursor{Prev: w.end(span.From)}
		for _, id := range span.Shards {
			if s := w.members[id]; s.shard.gen == s.gen {
				s.read = c
				s.track.mark(c)
			}
		}
	}
	return true
}

// pause waits for d or the end of ctx.
func pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
}

// settle takes the producer's answer for one record.
func (r *Relay) settle(s *shard, n uint64, m *Message, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.inFlight--
	r.bytes -= len(m.Payload)
	if err == nil {
		s.track.settle(n)
		s.failures = 0
		r.acked++
	} else {
		s.track.fail(n, &failure{m, err})
		if s.state == reading {
			s.stop(failing)
		}
	}
	if s.track.inFlight == 0 && (s.state != reading || s.giveBack) {
		signal(r.tend)
	}
	if r.roomy() {
		signal(r.room)
	}
}

// forget stops all shards until their stored cursors were asked for. The lock is held.
func (r *Relay) forget() {
	for _, s := range r.shards {
		s.stop(forgotten) // a repair under way sees it
	}
}

// --- keeping leases and cursors

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
	return r.cfg.BackoffMin/2 + rand.N(limit) //nolint:gosec // jitter
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
	n := r.acked
	r.acked = 0
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

// --- records that came back

// repair overcomes the records of a shard that came back, in order; nothing of the shard is in flight. A refused record is sent again
// alone: a broker refuses a whole batch for one of its records. If it is refused alone it is set aside and the shard goes on (F39).
// Any other failure makes the shard read again from the first record that the broker does not have, after a while.
func (r *Relay) repair(ctx context.Context, s *shard) {
	for {
		r.mu.Lock()
		f := s.track.failure()
		if f == nil || s.state != repairing {
			r.resume(s)
			r.mu.Unlock()
			break
		}
		r.mu.Unlock()
		err := f.err
		if refused(err) {
			err = r.sendAlone(ctx, f.message)
		}
		r.mu.Lock()
		if err == nil {
			s.track.overcome()
			r.acked++
			r.mu.Unlock()
			continue
		}
		s.failures++
		s.resumeAt = time.Now().Add(r.backoff(s.failures))
		s.track.reset()
		s.read = s.track.acked
		r.resume(s)
		r.mu.Unlock()
		if ctx.Err() == nil {
			r.obs.RelayFailed("produce", fmt.Errorf("shard %d, row %d: %w", s.id, f.message.RowID, err))
		}
		break
	}
	signal(r.kick)
	signal(r.tend)
}

// resume ends a repair. The lock is held.
func (r *Relay) resume(s *shard) {
	if s.state == repairing {
		s.state = reading
	}
}

// refused reports that Kafka will never take the record.
func refused(err error) bool {
	var r interface{ Refused() bool }
	return errors.As(err, &r) && r.Refused()
}

// sendAlone sends a record that was refused once more, alone, and sets it aside if it is refused again. nil: the shard may go on.
func (r *Relay) sendAlone(ctx context.Context, m *Message) error {
	record, err := m.Record()
	if err == nil {
		err = r.produceAndWait(ctx, record)
	}
	if err == nil || !refused(err) {
		return err
	}
	if short, ok := bare(record); ok { // its dead letter keeps the value
		berr := r.produceAndWait(ctx, short)
		if berr == nil {
			r.obs.RecordSetAside(m, err, true)
			return nil
		}
		if !refused(berr) {
			return berr
		}
	}
	if aerr := r.log.SetAside(ctx, m, err.Error()); aerr != nil {
		return fmt.Errorf("set aside, refused with %q: %w", err, aerr)
	}
	r.obs.RecordSetAside(m, err, false)
	return nil
}

// produceAndWait sends one record and waits for the answer.
func (r *Relay) produceAndWait(ctx context.Context, record events.Record) error {
	answer := make(chan error, 1)
	r.producer.Produce(ctx, record, func(err error) { answer <- err })
	select {
	case err := <-answer:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}
