package outbox

import (
	"context"
	"errors"
	"time"
)

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
	r.producer.Produce(w.produce, record, func(err error) { r.settle(s.shard, n, m, err) }) //nolint:contextcheck // a record outlives the window
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
