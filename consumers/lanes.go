package consumers

import (
	"cmp"
	"slices"
	"time"

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
	order   []Lane // round robin; the next one first
	waiting int    // records that are in no batch
	size    int
}

type lane struct {
	dropped bool
	records []held
	running int // records of it that are in batches
	begin   int // records before it are in batches or settled
}

type held struct {
	events.Record
	state laneState
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
	lanes   []*lane // of each record
}

// NewLanes makes empty lanes. due says from when on a record may be taken, nil means at once; the head of a lane decides for those
// behind it. With overlap, records of one lane may be in several batches at once, as for a handler whose messages commute; without,
// a lane's next records wait until its last batch has come back.
func NewLanes(due func(*events.Record) time.Time, overlap bool) *Lanes {
	return &Lanes{due: due, overlap: overlap, lanes: map[Lane]*lane{}}
}

// Add appends records to their lanes, in their order.
func (l *Lanes) Add(records []events.Record) {
	for i := range records {
		id := Lane{records[i].Topic, records[i].Partition}
		ln := l.lanes[id]
		if ln == nil {
			ln = &lane{}
			l.lanes[id] = ln
			l.order = append(l.order, id)
		}
		ln.records = append(ln.records, held{Record: records[i]})
	}
	l.waiting += len(records)
	l.size += len(records)
}

// Take answers up to limit records that are due, of the lanes that want (nil: of all), evenly over them; nil if there are none.
func (l *Lanes) Take(now time.Time, limit int, want func(Lane) bool) *Batch {
	ready := l.ready(now, want)
	if len(ready) == 0 {
		return nil
	}
	b := &Batch{}
	// An even share for each lane first, so that a long one does not starve the others; what is left over goes round again.
	for share := max(1, limit/len(ready)); len(b.Records) < limit && len(ready) > 0; {
		left := ready[:0]
		for _, ln := range ready {
			n := min(share, limit-len(b.Records))
			if n > 0 && l.takeFrom(ln, b, n, now) {
				left = append(left, ln)
			}
		}
		ready = left
	}
	if n := len(l.order); n > 1 {
		l.order = append(l.order[1:n:n], l.order[0])
	}
	return b
}

// ready answers the lanes whose head may be taken, in turn.
func (l *Lanes) ready(now time.Time, want func(Lane) bool) []*lane {
	var out []*lane
	for _, id := range l.order {
		ln := l.lanes[id]
		if (want == nil || want(id)) && l.headDue(ln, now) {
			out = append(out, ln)
		}
	}
	return out
}

func (l *Lanes) headDue(ln *lane, now time.Time) bool {
	if !l.overlap && ln.running > 0 {
		return false
	}
	i := ln.head()
	return i >= 0 && (l.due == nil || !l.due(&ln.records[i].Record).After(now))
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
		if i < 0 || l.due != nil && l.due(&ln.records[i].Record).After(now) {
			return false
		}
		ln.records[i].state = laneRunning
		ln.running++
		l.waiting--
		b.Records = append(b.Records, ln.records[i].Record)
		b.lanes = append(b.lanes, ln)
	}
	return true
}

// Settle takes a batch back, and answers how far lanes may advance: for each that can, the place of its last record before the first
// unsettled one. Records that were not settled wait again.
func (l *Lanes) Settle(b *Batch, settled []bool) []Place {
	var touched []*lane
	for i := range b.Records {
		ln := b.lanes[i]
		if ln.dropped {
			continue
		}
		j, ok := slices.BinarySearchFunc(ln.records, b.Records[i].Offset, func(h held, offset int64) int { return cmp.Compare(h.Offset, offset) })
		if !ok {
			continue
		}
		ln.running--
		if settled[i] {
			ln.records[j].state = laneSettled
		} else {
			ln.records[j].state = laneWaiting
			ln.begin = min(ln.begin, j)
			l.waiting++
		}
		if !slices.Contains(touched, ln) {
			touched = append(touched, ln)
		}
	}
	var marks []Place
	for _, ln := range touched {
		n := 0
		for n < len(ln.records) && ln.records[n].state == laneSettled {
			n++
		}
		if n == 0 {
			continue
		}
		last := &ln.records[n-1]
		marks = append(marks, Place{last.Topic, last.Partition, last.Offset})
		l.size -= n
		ln.begin = max(0, ln.begin-n)
		// The settled records' memory goes with the slice that they are in: a lane is emptied often enough.
		ln.records = ln.records[n:]
		if len(ln.records) == 0 {
			ln.records, ln.begin = nil, 0
		}
	}
	return marks
}

// Drop forgets lanes: they belong to somebody else now.
func (l *Lanes) Drop(lanes []Lane) {
	for _, id := range lanes {
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
		ln.dropped = true
		delete(l.lanes, id)
		l.order = slices.DeleteFunc(l.order, func(o Lane) bool { return o == id })
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
	for _, id := range l.order {
		ln := l.lanes[id]
		if want != nil && !want(id) || !l.overlap && ln.running > 0 {
			continue
		}
		i := ln.head()
		if i < 0 {
			continue
		}
		var due time.Time
		if l.due != nil {
			due = l.due(&ln.records[i].Record)
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
