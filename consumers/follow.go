package consumers

import (
	"context"
	"time"

	"github.com/google/uuid"

	"ordersaga/events"
)

// followAtMost is how many messages of a transaction are followed: in large batches the group's own transactions are as cheap, and hold nobody's rows.
const followAtMost = 32

// Reach says what of a group's topic is this process's to act on. It is how its Source is seen by groups that are followed by it.
type Reach interface {
	// Holds answers the partition that a key belongs to, and whether it is held by this process.
	Holds(key []byte) (l Lane, held bool)
	// Settled hears of a message that was handled in the transaction that emitted it, which has committed: when it comes from Kafka, with the payload of
	// that hash, it need not be handled.
	Settled(id uuid.UUID, l Lane, hash int64)
}

// FollowedBy has next handle what this group emits for it in the transaction that emits it, where it is next's process to do so: one commit instead of
// two, and nobody waits between them. The message goes to Kafka all the same, and is settled unread when it comes. It is a favour, not a promise: what next
// does not manage at once, or belongs to another process, takes the way over Kafka as if there had been none; and a transaction that fails with it is
// tried again without.
//
// next's handler must make no calls in Prepare, keep inbox rows for failures only, and lock nothing that is locked before what this group locks. It is called
// before either group handles anything.
func (g *Group[T]) FollowedBy(next *Group[T], reach Reach) {
	if next.cfg.Inbox == InboxFailures {
		g.next, g.reach = next, reach
	}
}

// followed is what next has handled in a transaction, should that commit.
type followed struct {
	out   []events.Envelope
	lanes []Lane // of out
	begun time.Time
	took  time.Duration
}

// follow lets the next group handle what is about to be emitted, and adds what that emits. Transactions that leave anything else are not followed:
// failures are rare, and have enough to decide.
func (r *run[T]) follow(ctx context.Context, tx T, w *writes) error {
	if r.next == nil || r.alone || len(w.out) == 0 || len(w.out) > followAtMost || len(w.inbox)+len(w.dead)+len(w.raw) > 0 {
		return nil
	}
	begun, n := time.Now(), len(w.out)
	batch, at := r.next.own(w.out, r.reach.Holds)
	if len(batch) == 0 {
		return nil
	}
	r.followed.begun = begun // from here on whatever fails may be its fault
	apply, err := r.next.handler.Prepare(ctx, batch)
	if err != nil {
		return err
	}
	results, err := apply(ctx, tx, batch)
	if err != nil {
		return err
	}
	for i := range results {
		if results[i].Err != nil { // it comes again from Kafka, and is seen to there
			continue
		}
		e := &w.out[at[i]]
		e.Settled = true
		r.followed.out, r.followed.lanes = append(r.followed.out, *e), append(r.followed.lanes, Lane{batch[i].Record.Topic, batch[i].Record.Partition})
		w.out = append(w.out, results[i].Out...)
	}
	r.followed.took = time.Since(begun)
	return r.start(ctx, tx, w.out[n:])
}

// start begins on what has come back to this group.
func (r *run[T]) start(ctx context.Context, tx T, out []events.Envelope) error {
	s, ok := r.handler.(Starter[T])
	if !ok {
		return nil
	}
	batch, _ := r.own(out, func([]byte) (Lane, bool) { return Lane{Topic: r.cfg.Topic}, true }) // whoever gets it finds it begun
	if len(batch) == 0 {
		return nil
	}
	return s.Start(ctx, tx, batch)
}

// own makes deliveries of those messages that are this group's and that this process holds, and answers where they are in out.
func (g *Group[T]) own(out []events.Envelope, holds func(key []byte) (Lane, bool)) (batch []*Delivery, at []int) {
	for i := range out {
		t, ok := events.TypeOf(out[i].Type)
		if !ok || t.Topic != g.cfg.Topic || !g.owns(t.Name, t) {
			continue
		}
		key := events.KeyOf(out[i].OrderID)
		l, held := holds(key)
		if !held {
			continue
		}
		batch = append(batch, &Delivery{
			Envelope: out[i], Group: g.cfg.Name, Attempt: 1,
			Record: events.Record{Topic: l.Topic, Partition: l.Partition, Offset: EarlyOffset, Key: key}, Origin: Place{l.Topic, l.Partition, EarlyOffset},
		})
		at = append(at, i)
	}
	return batch, at
}

// tellFollowed takes note of what the next group has done in a transaction that has committed.
func (r *run[T]) tellFollowed() {
	n := len(r.followed.out)
	if n == 0 {
		return
	}
	for i := range r.followed.out {
		e := &r.followed.out[i]
		value, err := events.Encode(*e)
		if err != nil {
			continue // it was encoded for the outbox already
		}
		r.reach.Settled(e.ID, r.followed.lanes[i], events.PayloadHash(value))
	}
	stats := BatchStats{Group: r.next.cfg.Name, Records: n, Followed: n, Duration: r.followed.took}
	stats.Counts[Done] = n
	r.next.cfg.Observer.Batch(stats)
}
