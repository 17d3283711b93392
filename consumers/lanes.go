package consumers

import (
	"slices"
	"time"

	"github.com/google/uuid"

	"ordersaga/events"
)

// Lane is a partition of a topic.
type Lane struct {
	Topic     events.Topic
	Partition int32
}

// Lanes hold what was fetched, a queue for each partition, from the fetch until its offset may advance. They decide which records
// come next and how far each partition is settled; they read no clock, start nothing, and are not safe for concurrent use.
//
// What is settled advances a partition only as far as nothing before it is unsettled. What a handler leaves unsettled goes back to
// the place where it was. A lane that was dropped forgets everything: verdicts of its records that come later change nothing.
type Lanes struct {
	due     func(*events.Record) time.Time
	overlap bool
	lanes   map[Lane]*lane
	order   []*lane // round robin, from next on
	next    int
	waiting int // records that are in no batch, early ones included
	size    int

	offered         []*early // that wait, in order
	ahead, aheadOld map[uuid.UUID]*early
}

type lane struct {
	id      Lane
	dropped bool
	records []held
	removed int // records that were held before the first of them
	running int // records of it that are in batches
	begin   int // records before it are in batches or settled
}

type held struct {
	record *events.Record
	state  laneState
}

type laneState int8

const (
	laneWaiting laneState = iota
	laneRunning
	laneSettled
)

// Batch is records taken from lanes, on their way through a handler.
type Batch struct {
	Records []events.Record
	from    []seat   // of the first of them
	early   []*early // of the others
}

// seat is where a record is in its lane: the number of records that the lane has ever held before it.
type seat struct {
	*lane
	n int
}

// NewLanes makes empty lanes. due says from when on a record may be taken, nil means at once; the head of a lane decides for those
// behind it. With overlap, records of one lane may be in several batches at once, as for a handler whose messages commute; without,
// a lane's next records wait until its last batch has come back.
func NewLanes(due func(*events.Record) time.Time, overlap bool) *Lanes {
	return &Lanes{due: due, overlap: overlap, lanes: map[Lane]*lane{}}
}

// Add appends records to their lanes, in their order. It keeps the slice: nobody may write to it any more. Lanes may advance by it, where a record
// was settled ahead of its coming.
func (l *Lanes) Add(records []events.Record) []Place {
	var ln *lane
	var touched []*lane
	for i := range records {
		r := &records[i]
		if ln == nil || ln.id.Partition != r.Partition || ln.id.Topic != r.Topic {
			ln = l.lane(Lane{r.Topic, r.Partition})
		}
		state, e := l.meetEarly(r)
		switch state {
		case laneWaiting:
			l.waiting++
		case laneRunning:
			ln.running++
			e.copy = seat{ln, ln.removed + len(ln.records)}
		case laneSettled:
			touched = touch(touched, ln)
		}
		ln.records = append(ln.records, held{r, state})
	}
	l.size += len(records)
	return l.advance(touched)
}

func touch(touched []*lane, ln *lane) []*lane {
	if n := len(touched); n > 0 && touched[n-1] == ln || slices.Contains(touched, ln) {
		return touched
	}
	return append(touched, ln)
}

func (l *Lanes) lane(id Lane) *lane {
	ln := l.lanes[id]
	if ln == nil {
		ln = &lane{id: id}
		l.lanes[id] = ln
		l.order = append(l.order, ln)
	}
	return ln
}

// Take answers up to limit records that are due, of the lanes that want (nil: of all), evenly over them, then early ones; nil if there are none.
func (l *Lanes) Take(now time.Time, limit int, want func(Lane) bool) *Batch {
	if l.waiting == 0 {
		return nil
	}
	ready := l.ready(now, want)
	if len(ready) == 0 && len(l.offered) == 0 {
		return nil
	}
	room := min(limit, l.waiting)
	b := &Batch{Records: make([]events.Record, 0, room), from: make([]seat, 0, room)}
	// An even share for each lane first, so that a long one does not starve the others; what is left over goes round again.
	for share := max(1, limit/max(1, len(ready))); len(b.Records) < limit && len(ready) > 0; {
		left := ready[:0]
		for _, ln := range ready {
			n := min(share, limit-len(b.Records))
			if n > 0 && l.takeFrom(ln, b, n, now) {
				left = append(left, ln)
			}
		}
		ready = left
	}
	l.next = (l.next + 1) % max(1, len(l.order))
	if l.takeEarly(b, limit, want); len(b.Records) == 0 {
		return nil
	}
	return b
}

// ready answers the lanes whose head may be taken, in turn.
func (l *Lanes) ready(now time.Time, want func(Lane) bool) []*lane {
	out := make([]*lane, 0, len(l.order))
	for i := range l.order {
		ln := l.inTurn(i)
		if l.headDue(ln, now) && (want == nil || want(ln.id)) {
			out = append(out, ln)
		}
	}
	return out
}

// inTurn is the lane that comes i-th this time.
func (l *Lanes) inTurn(i int) *lane {
	if i += l.next; i >= len(l.order) {
		i -= len(l.order)
	}
	return l.order[i]
}

func (l *Lanes) headDue(ln *lane, now time.Time) bool {
	if !l.overlap && ln.running > 0 {
		return false
	}
	i := ln.head()
	return i >= 0 && (l.due == nil || !l.due(ln.records[i].record).After(now))
}

// head is the index of the first waiting record, or -1. begin is only a place to look from.
func (ln *lane) head() int {
	for i := ln.begin; i < len(ln.records); i++ {
		if ln.records[i].state == laneWaiting {
			ln.begin = i
			return i
		}
	}
	ln.begin = len(ln.records)
	return -1
}

// takeFrom moves up to n due records into b and reports whether the lane has more.
func (l *Lanes) takeFrom(ln *lane, b *Batch, n int, now time.Time) bool {
	for ; n > 0; n-- {
		i := ln.head()
		if i < 0 || l.due != nil && l.due(ln.records[i].record).After(now) {
			return false
		}
		ln.records[i].state = laneRunning
		ln.running++
		l.waiting--
		b.Records = append(b.Records, *ln.records[i].record)
		b.from = append(b.from, seat{ln, ln.removed + i})
	}
	return true
}

// Settle takes a batch back, and answers how far lanes may advance: for each that can, the place of its last record before the first
// unsettled one. Records that were not settled wait again.
func (l *Lanes) Settle(b *Batch, settled []bool) []Place {
	touched := make([]*lane, 0, len(l.order))
	for i, at := range b.from {
		if !at.dropped {
			l.release(at, settled[i]) //nolint:gosec // a flag a record: the Pump sees to it
			touched = touch(touched, at.lane)
		}
	}
	for i, e := range b.early {
		if ln := l.settleEarly(e, settled[len(b.from)+i]); ln != nil {
			touched = touch(touched, ln)
		}
	}
	return l.advance(touched)
}

// release takes a record back that ran.
func (l *Lanes) release(at seat, settled bool) {
	ln, i := at.lane, at.n-at.removed
	ln.running--
	if settled {
		ln.records[i].state = laneSettled
		return
	}
	ln.records[i].state = laneWaiting
	ln.begin = min(ln.begin, i)
	l.waiting++
}

// advance answers how far lanes may go, and forgets what is settled up to there.
func (l *Lanes) advance(touched []*lane) []Place {
	var marks []Place
	for _, ln := range touched {
		n := 0
		for n < len(ln.records) && ln.records[n].state == laneSettled {
			n++
		}
		if n == 0 {
			continue
		}
		if marks == nil {
			marks = make([]Place, 0, len(touched))
		}
		last := ln.records[n-1].record
		marks = append(marks, Place{last.Topic, last.Partition, last.Offset})
		l.size -= n
		ln.remove(n)
	}
	return marks
}

// maxIdleLane bounds the room that an empty lane keeps, in records.
const maxIdleLane = 64

// remove forgets the first n records.
func (ln *lane) remove(n int) {
	ln.removed += n
	ln.begin = max(0, ln.begin-n)
	clear(ln.records[:n]) // their memory goes with them
	if n < len(ln.records) {
		ln.records = ln.records[n:]
		return
	}
	if ln.records = ln.records[:0]; cap(ln.records) > maxIdleLane {
		ln.records = nil
	}
}

// Drop forgets lanes: they belong to somebody else now.
func (l *Lanes) Drop(lanes []Lane) {
	for _, id := range lanes {
		l.dropEarly(id)
		ln := l.lanes[id]
		if ln == nil {
			continue
		}
		for i := range ln.records {
			if ln.records[i].state == laneWaiting {
				l.waiting--
			}
		}
		l.size -= len(ln.records)
		ln.dropped, ln.records = true, nil
		delete(l.lanes, id)
		l.order = slices.DeleteFunc(l.order, func(o *lane) bool { return o == ln })
		l.next = 0
	}
}

// Waiting is the number of records that are in no batch and not settled, whether or not they are due.
func (l *Lanes) Waiting() int { return l.waiting }

// Size is the number of records held; settled ones behind an unsettled one count.
func (l *Lanes) Size() int { return l.size }

// Length is the number of records held for one lane.
func (l *Lanes) Length(id Lane) int {
	if ln := l.lanes[id]; ln != nil {
		return len(ln.records)
	}
	return 0
}

// Next answers when the next head of a lane that want takes is due; ok is false if none waits, or what waits has to wait for its
// lane's running batch.
func (l *Lanes) Next(want func(Lane) bool) (at time.Time, ok bool) {
	if l.waiting == 0 {
		return at, false
	}
	for _, ln := range l.order {
		if !l.overlap && ln.running > 0 || want != nil && !want(ln.id) {
			continue
		}
		i := ln.head()
		if i < 0 {
			continue
		}
		var due time.Time
		if l.due != nil {
			due = l.due(ln.records[i].record)
		}
		if !ok || due.Before(at) {
			at, ok = due, true
		}
	}
	return at, ok
}

// Holds reports whether a batch has records of one of the lanes.
func (b *Batch) Holds(lanes []Lane) bool {
	return slices.ContainsFunc(b.Records, func(r events.Record) bool { return slices.Contains(lanes, Lane{r.Topic, r.Partition}) })
}
