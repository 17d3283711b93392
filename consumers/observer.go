package consumers

import (
	"time"

	"ordersaga/events"
)

// BatchStats is what became of one batch.
type BatchStats struct {
	Group        events.Group
	Records      int
	Foreign      int // of another group on the same topic
	Followed     int // of those with the verdict Done: handled in the transaction that emitted them, so Transactions counts none for them
	Stale        int // of those with the verdict Repeat: retry or replay copies whose ticket was not the row's any more
	Counts       [numKinds]int
	Transactions int
	Duration     time.Duration
	Interrupted  bool // partitions were revoked, or the process stops: the rest will be delivered again
}

// Count is the number of records of the batch that ended with a verdict.
func (s *BatchStats) Count(k Kind) int { return s.Counts[k] }

// Observer hears of what the runtime does, for metrics and logs; the runtime itself logs nothing. Its methods are called from many
// goroutines and must not block. Failed is called once for each failure, after the transaction that decided it: it is where an error
// stops and is logged.
type Observer interface {
	// Batch is called at the end of each batch.
	Batch(s BatchStats)
	// Failed is called for every verdict of a failure: Again, Retry or Dead. err is the error as it was; its text may hold anything.
	Failed(d *Delivery, v Verdict, err error)
	// Held is called whenever records wait because something is away, with how long this delivery of them has waited so far.
	Held(group events.Group, dependency string, records int, waited time.Duration, err error)
	// Split is called when a batch is taken apart to find the record that fails it.
	Split(group events.Group, records int, err error)
	// Late is called for copies taken from a retry topic, with how long after its due time the oldest was taken.
	Late(group events.Group, records int, lateness time.Duration)
}

// Quiet is the Observer that does nothing; embed it to implement a part.
type Quiet struct{}

// Batch does nothing.
func (Quiet) Batch(BatchStats) {}

// Failed does nothing.
func (Quiet) Failed(*Delivery, Verdict, error) {}

// Held does nothing.
func (Quiet) Held(events.Group, string, int, time.Duration, error) {}

// Split does nothing.
func (Quiet) Split(events.Group, int, error) {}

// Late does nothing.
func (Quiet) Late(events.Group, int, time.Duration) {}
