package consumers

import (
	"bytes"

	"github.com/google/uuid"

	"ordersaga/events"
)

// EarlyOffset is the offset of a record that its writer handed over in this process, ahead of its copy from Kafka: it has none yet.
const EarlyOffset int64 = -1

// maxEarly bounds how many early records are remembered until their copies come: half of them, and then the newer half.
const maxEarly = 1 << 14

// early is a record that came ahead of its copy. Until that has come from Kafka too, and both are settled, the two are known for one: the copy is
// settled with the early record, and waits for it while it is being handled. A copy whose early record failed, or was forgotten, is
// handled as if there had been none.
type early struct {
	id     uuid.UUID
	lane   Lane
	record *events.Record // until it is settled
	hash   int64          // of its payload, from then on
	copy   seat           // of its copy; no lane: that has not come
}

// Offer adds a record ahead of its copy from Kafka, with the partition that it will lie in. It is refused where it would overtake what
// waits already, and where it cannot be recognised again.
func (l *Lanes) Offer(r *events.Record, limit int) bool {
	attrs := events.AttributesOf(r)
	id := attrs.Identity(r)
	if l.waiting > len(l.offered) || len(l.offered) >= limit || len(attrs.ID) == 0 || l.ahead[id] != nil || l.aheadOld[id] != nil {
		return false
	}
	r.Offset = EarlyOffset
	e := &early{id: id, lane: Lane{r.Topic, r.Partition}, record: r}
	l.remember(e)
	l.offered = append(l.offered, e)
	l.waiting++
	l.size++
	return true
}

// Settled notes a message that was handled ahead of its record: with which id, for which lane, with which payload.
func (l *Lanes) Settled(id uuid.UUID, lane Lane, hash int64) {
	if l.ahead[id] == nil && l.aheadOld[id] == nil {
		l.remember(&early{id: id, lane: lane, hash: hash})
	}
}

func (l *Lanes) remember(e *early) {
	if len(l.ahead) >= maxEarly/2 { // those that Kafka has not brought by now are met by the barriers of their handlers
		l.ahead, l.aheadOld = nil, l.ahead
	}
	if l.ahead == nil {
		l.ahead = map[uuid.UUID]*early{}
	}
	l.ahead[e.id] = e
}

// takeEarly fills a batch up with early records.
func (l *Lanes) takeEarly(b *Batch, limit int, want func(Lane) bool) {
	kept := l.offered[:0]
	for _, e := range l.offered {
		if len(b.Records) >= limit || want != nil && !want(e.lane) {
			kept = append(kept, e)
			continue
		}
		l.waiting--
		b.Records = append(b.Records, *e.record)
		b.early = append(b.early, e)
	}
	clear(l.offered[len(kept):])
	l.offered = kept
}

// meetEarly is a record from Kafka meeting its early one: it answers what the record is then, and what it waits for, if anything.
func (l *Lanes) meetEarly(r *events.Record) (laneState, *early) {
	if len(l.ahead)+len(l.aheadOld) == 0 {
		return laneWaiting, nil
	}
	attrs := events.AttributesOf(r)
	id := attrs.Identity(r)
	e := l.ahead[id]
	if e == nil {
		e = l.aheadOld[id]
	}
	if e == nil || e.copy.lane != nil || e.lane.Partition != r.Partition || e.lane.Topic != r.Topic || !e.same(r) {
		return laneWaiting, nil // the same id with another body is another message, to be told so
	}
	if e.record == nil {
		l.forgetEarly(e)
		return laneSettled, nil
	}
	return laneRunning, e
}

// same reports that a record has the early one's body.
func (e *early) same(r *events.Record) bool {
	if e.record != nil {
		return bytes.Equal(e.record.Value, r.Value)
	}
	return e.hash == events.PayloadHash(r.Value)
}

// settleEarly takes an early record back from its batch. It answers the lane of its copy, if that has come.
func (l *Lanes) settleEarly(e *early, settled bool) *lane {
	l.size--
	ln := e.copy.lane
	if ln == nil {
		if !settled {
			l.forgetEarly(e)
			return nil
		}
		e.hash, e.record = events.PayloadHash(e.record.Value), nil // many wait for their copies
		return nil
	}
	l.forgetEarly(e)
	if ln.dropped {
		return nil
	}
	l.release(e.copy, settled)
	return ln
}

func (l *Lanes) forgetEarly(e *early) {
	if l.ahead[e.id] == e {
		delete(l.ahead, e.id)
	} else if l.aheadOld[e.id] == e {
		delete(l.aheadOld, e.id)
	}
}

// dropEarly forgets what is early of a lane. What runs comes back from its batch all the same.
func (l *Lanes) dropEarly(id Lane) {
	kept := l.offered[:0]
	for _, e := range l.offered {
		if e.lane != id {
			kept = append(kept, e)
			continue
		}
		l.waiting--
		l.size--
	}
	clear(l.offered[len(kept):])
	l.offered = kept
	for _, of := range []map[uuid.UUID]*early{l.ahead, l.aheadOld} {
		for key, e := range of {
			if e.lane == id {
				delete(of, key)
			}
		}
	}
}
