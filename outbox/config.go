package outbox

import (
	"time"

	"ordersaga/events"
)

// Config tunes a relay. Zero fields take the defaults of DefaultConfig.
type Config struct {
	// Name is how this process appears among the owners of leases; New makes it unique.
	Name string
	// Wake receives after commits of this process that left something in the outbox. May be nil: then the relay polls only.
	Wake <-chan struct{}

	// Offer hands an urgent message that was committed in this process to its reader here, ahead of its way through Kafka, and answers whether
	// that has taken it. Then nobody waits for Kafka, and the message goes there in company. It must not block. May be nil.
	Offer func(r events.Record) (taken bool)

	// MaxUnacked and MaxUnackedBytes bound what was handed to the producer and not acknowledged yet, in records and in bytes of their
	// values. Reading stops there.
	MaxUnacked      int
	MaxUnackedBytes int
	// StallAfter bounds how long a window is held open while reading stands still for the broker: an open window keeps Postgres from
	// cleaning up. After it the window is closed, and opened again at the same row later.
	StallAfter time.Duration

	// LeaseTerm is how long a lease lasts without being renewed, in database time; RenewEvery is how often it is renewed.
	LeaseTerm  time.Duration
	RenewEvery time.Duration
	// StoreEvery is the least time between two stores of a cursor; IdleStoreEvery that between two which only moved past nothing.
	StoreEvery     time.Duration
	IdleStoreEvery time.Duration
	// BacklogEvery is how often the backlog is measured.
	BacklogEvery time.Duration

	// PollMin is how long after a window with rows the next is read without a wake; each empty window doubles it up to PollMax.
	PollMin time.Duration
	PollMax time.Duration
	// GatherMax bounds how long a wake waits for more rows in a hot stream.
	GatherMax time.Duration
	// OpenWithin is how long, at most, a command waits with which an order begins to be worked on (events.Type.Opens), for those of others, as many as come
	// in half that time: then they go on together, and each transaction that follows is one for all of them. Where so few come that company is unlikely
	// nobody waits. 0: they never do.
	OpenWithin time.Duration
	// RowsEvery is the least time between two windows for announced messages that are not urgent: they wait for company, as each window, and each
	// fetch and transaction that follow from it, costs the same for many messages as for one. CursorsEvery is that between two
	// windows which only let the cursors pass what was handed over.
	RowsEvery    time.Duration
	CursorsEvery time.Duration
	// Awaited reports that somebody in this process waits for what goes by such a window (a public event): then they are a fifth of RowsEvery apart, as
	// they are when many messages wait. May be nil.
	Awaited func() bool

	// BackoffMin and BackoffMax bound the wait after a failure; it doubles, with full jitter.
	BackoffMin time.Duration
	BackoffMax time.Duration
	// CallTimeout bounds one call for leases or cursors; it must be well below LeaseTerm.
	CallTimeout time.Duration
	// FlushWithin bounds how long a relay that stops waits for the broker's acknowledgements.
	FlushWithin time.Duration
}

// DefaultConfig holds the defaults.
var DefaultConfig = Config{
	Name:            "relay",
	MaxUnacked:      8192,
	MaxUnackedBytes: 32 << 20,
	StallAfter:      20 * time.Second,
	LeaseTerm:       6 * time.Second,
	RenewEvery:      time.Second,
	StoreEvery:      250 * time.Millisecond,
	IdleStoreEvery:  15 * time.Second,
	BacklogEvery:    2 * time.Second,
	PollMin:         5 * time.Millisecond,
	PollMax:         250 * time.Millisecond,
	GatherMax:       4 * time.Millisecond,
	RowsEvery:       50 * time.Millisecond,
	CursorsEvery:    100 * time.Millisecond,
	BackoffMin:      50 * time.Millisecond,
	BackoffMax:      5 * time.Second,
	CallTimeout:     2 * time.Second,
	FlushWithin:     5 * time.Second,
}

func or[T int | time.Duration](v *T, fallback T) {
	if *v <= 0 {
		*v = fallback
	}
}

func (c Config) withDefaults() Config {
	d := DefaultConfig
	if c.Name == "" {
		c.Name = d.Name
	}
	or(&c.MaxUnacked, d.MaxUnacked)
	or(&c.MaxUnackedBytes, d.MaxUnackedBytes)
	or(&c.StallAfter, d.StallAfter)
	or(&c.LeaseTerm, d.LeaseTerm)
	or(&c.RenewEvery, min(d.RenewEvery, c.LeaseTerm/4))
	or(&c.StoreEvery, d.StoreEvery)
	or(&c.IdleStoreEvery, d.IdleStoreEvery)
	or(&c.BacklogEvery, d.BacklogEvery)
	or(&c.PollMin, d.PollMin)
	or(&c.PollMax, d.PollMax)
	or(&c.GatherMax, d.GatherMax)
	or(&c.RowsEvery, d.RowsEvery)
	or(&c.CursorsEvery, d.CursorsEvery)
	or(&c.BackoffMin, d.BackoffMin)
	or(&c.BackoffMax, d.BackoffMax)
	or(&c.CallTimeout, min(d.CallTimeout, c.LeaseTerm/2))
	or(&c.FlushWithin, d.FlushWithin)
	return c
}
