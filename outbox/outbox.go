// Package outbox is what a transaction leaves for Kafka, and the relay that carries it there.
//
// It owns the Message (a row of the insert-only outbox), the shards, their leases and cursors, and the Relay. It promises that
// every row of a committed transaction reaches Kafka at least once, that the rows of one shard reach it in the order of their ids
// for whoever emits under one locked row, and that a transaction left open anywhere delays nobody else's rows. When the broker is
// away the relay waits; when it is paused and wakes without its lease the fence stops its cursor, and readers see duplicates only.
package outbox

import (
	"context"

	"github.com/google/uuid"

	"ordersaga/events"
)

// Shards is the number of key-hash shards of typed messages; RawShards more carry retry copies and dead letters, so that those
// never wait for, or hold up, the flow of orders. The numbers are stored in rows: changing them is a migration.
const (
	Shards      = 16
	RawShards   = 2
	TotalShards = Shards + RawShards
)

// Message is one row of the outbox. A typed message leaves Topic and Key empty: they follow from Type and OrderID. A raw one has
// Type empty, and Topic, Key and Headers as they are to be in Kafka.
type Message struct {
	RowID    int64 // drawn by the database
	Shard    int16
	ID       uuid.UUID
	Type     events.Name
	OrderID  uuid.UUID
	Sequence int32
	Trace    events.Trace
	Topic    events.Topic
	Key      []byte
	Headers  []events.Header
	Payload  []byte
}

// Snapshot is a pg_snapshot in its text form, such as 100:104:100,102.
type Snapshot string

// Cursor is how far a shard was relayed: everything that Prev shows, and, if Next is not empty, of what Next shows beyond Prev all
// rows with an id up to After.
type Cursor struct {
	Prev  Snapshot
	Next  Snapshot
	After int64
}

// Lease is the right to relay one shard until it expires. Fence grows with every change of owner; a cursor stored under an old one
// is refused.
type Lease struct {
	Shard  int16
	Fence  int64
	Cursor Cursor
}

// Log is the outbox as the relay sees it.
type Log interface {
	// Acquire renews the leases that relay holds and takes free or expired ones, up to its fair share among the live relays (it gives
	// back what is above that). It answers the leases held now, with the cursors as stored.
	Acquire(ctx context.Context, relay string) ([]Lease, error)
	// Release gives leases back, so that another relay need not wait for them to expire.
	Release(ctx context.Context, relay string, leases []Lease) error
	// Window streams, in id order, the rows of the given shards that are beyond the cursor (all have the same), and answers the
	// snapshot that the window ends with. fn must not keep the Message's byte slices unless it returns an error. With a Next in the
	// cursor the window is that one, from After on.
	Window(ctx context.Context, shards []int16, from Cursor, fn func(Message) error) (Snapshot, error)
	// Store stores cursors under their fences, without waiting for the disk: a lost cursor costs duplicates only. It answers the
	// shards whose fence was no longer ours.
	Store(ctx context.Context, relay string, leases []Lease) (fenced []int16, err error)
	// Backlog says how many rows are not relayed yet (estimated beyond a bound) and how old the oldest is, for metrics and admission.
	Backlog(ctx context.Context) (Backlog, error)
	// SetAside stores a message that Kafka refuses for good as a dead letter, with the reason.
	SetAside(ctx context.Context, m Message, reason string) error
}

// Backlog is what waits in the outbox.
type Backlog struct {
	Rows          int64
	OldestSeconds float64
}

// Producer writes to Kafka with acks=all, idempotently, in order a partition. done is called once for each record, in order a
// partition; an error with `Refused() bool` true means that Kafka will never take this record.
type Producer interface {
	Produce(ctx context.Context, r events.Record, done func(error))
	Flush(ctx context.Context) error
}
