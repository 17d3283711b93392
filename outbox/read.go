package outbox

import (
	"context"
	"errors"
	"time"
)

// errLapsed and errStalled end a window that is to be gone on with later, by us or the next owner. Neither is a failure.
var (
	errLapsed  = errors.New("the leases may have run out, or are about to be given back")
	errStalled = errors.New("the broker takes nothing more for now")
)

func (r *Relay) read(ctx context.Context) {
	p := pace{pollMin: r.cfg.PollMin, pollMax: r.cfg.PollMax, gatherMax: r.cfg.GatherMax, cursorsEvery: r.cfg.CursorsEvery}
	failures := 0
	for r.waitToRead(ctx, &p) {
		began := time.Now()
		w, ok := r.window(ctx, false)
		if w == nil {
			p.read(began, 0, 0, 0)
			continue
		}
		ended := time.Now()
		if ok {
			failures = 0
		} else {
			failures++
			pause(ctx, r.backoff(failures))
		}
		p.read(ended, ended.Sub(began)-w.waited, w.rows, w.foreign)
		r.obs.WindowRead(w.rows, ended.Sub(began))
	}
}

// window opens, reads and closes a window; it answers none if there is nothing to read for, and false if reading failed. The last one reads only as
// far as this process has announced what it finds.
func (r *Relay) window(ctx context.Context, last bool) (w *window, ok bool) {
	if w = r.open(time.Now()); w == nil {
		return nil, true
	}
	w.last = last
	err := r.log.Window(ctx, w.spans, w.begin, func(m *Message) error { return w.take(ctx, m) })
	return w, r.close(ctx, w, err)
}

// waitToRead waits for a wake, the next poll or what writers want; false when ctx ended.
func (r *Relay) waitToRead(ctx context.Context, p *pace) bool {
	t := time.NewTimer(r.until(p))
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return false
		case <-t.C:
			return ctx.Err() == nil
		case <-r.kick:
			return ctx.Err() == nil
		case <-r.nudge:
			t.Reset(r.until(p))
			continue
		case <-r.cfg.Wake:
		}
		break
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

// Where so many announced messages are in each other's company, or somebody waits, windows are so many times closer together: more of them would only be kept
// longer in memory.
const (
	company = 512
	soon    = 5
)

func (r *Relay) until(p *pace) time.Duration {
	r.mu.Lock()
	defer r.mu.Unlock()
	if p.rowsEvery = r.cfg.RowsEvery; len(r.handovers) >= company || r.cfg.Awaited != nil && r.cfg.Awaited() {
		p.rowsEvery /= soon
	}
	return p.until(time.Now(), r.want, r.wantSince)
}

// window is a window that is open.
type window struct {
	r       *Relay
	spans   []Span
	members map[int16]member
	next    Snapshot
	rows    int // messages, as far as the relay is concerned
	foreign int // of them nobody in this process has announced
	waited  time.Duration
	last    bool
}

// open plans a window; nil if there is nothing to read for.
func (r *Relay) open(now time.Time) *window {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.want = wantNothing
	if !now.Before(r.valid) || !r.roomy() {
		return nil
	}
	spans, members := plan(r.shards, now)
	if len(spans) == 0 {
		return nil
	}
	return &window{r: r, spans: spans, members: members}
}

func (w *window) begin(next Snapshot) { w.next = next }

// end is the snapshot that a span ends with.
func (w *window) end(from Cursor) Snapshot {
	if from.Next != "" {
		return from.Next
	}
	return w.next
}

// take hands one message to the producer, unless its writer has.
func (w *window) take(ctx context.Context, m *Message) error {
	r := w.r
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
	h, known := r.meet(m.ID)
	if !known {
		if w.last {
			r.mu.Unlock()
			return errLapsed
		}
		w.foreign++
	}
	n := s.track.push(w.advance(s.shard, m))
	w.rows++
	if h != nil {
		r.attach(h, s.shard, n)
		r.mu.Unlock()
		return nil
	}
	r.inFlight++
	r.bytes += len(m.Payload)
	r.mu.Unlock()
	record, err := m.Record()
	if err != nil {
		r.settle(s.shard, n, m, err)
		return nil
	}
	r.producer.Produce(r.produce, record, func(err error) { r.settle(s.shard, n, m, err) }) //nolint:contextcheck // a record outlives the window
	return nil
}

// advance moves a shard's place behind a message's row, if it is the last one of it, and answers the place that holds once the broker has it.
func (w *window) advance(s *shard, m *Message) Cursor {
	if s.behind.IsZero() {
		s.behind = time.Now()
	}
	if m.More {
		return s.read
	}
	if s.read.Next == "" {
		s.read.Next = w.next
	}
	s.read.After = m.RowID
	return s.read
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
func (r *Relay) settle(s *shard, n int, m *Message, err error) {
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
