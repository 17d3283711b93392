// Package outbox is what a transaction leaves for Kafka, and the relay that carries it there.
//
// It owns the Message, the packs in which messages lie in the insert-only outbox, the shards, their leases and cursors, and the Relay. It
// promises that every message of a committed transaction reaches Kafka at least once, that the messages of one shard reach it in the order of
// their rows for whoever emits under one locked row (but for urgent ones, which overtake others: see events.Type), and that a transaction
// left open anywhere delays nobody else's rows. When the broker is away the relay waits; when it is paused and wakes without its lease
// the fence stops its cursor, and readers see duplicates only.
package outbox

import (
	"context"
	"time"

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

// Message is what becomes one record in Kafka. A typed message leaves Topic and Key empty: they follow from Type and OrderID. A raw one has
// Type empty, and Topic, Key and Headers as they are to be in Kafka. Typed messages of one transaction and shard share rows; see Packs.
type Message struct {
	RowID    int64 // drawn by the database
	More     bool  // further messages of the same row follow
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
	Settled  bool  // by its reader already, so it is not urgent; known only until it lies in the log
	Damage   error // why the row cannot be read; its shard waits for somebody who can
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

// Grant is what a relay holds now, and how much of it is its fair share among the live relays. It keeps a surplus until it has
// drained it: giving a shard back with records in flight would make the next owner send them twice.
type Grant struct {
	Leases []Lease
	Share  int
}

// Span is a part of a window: shards that are at the same place.
type Span struct {
	Shards []int16
	From   Cursor
}

// Log is the outbox as the relay sees it. Cursors that a relay keeps in memory are good only while the log's session lasts: a
// database that crashed may give transaction ids out again that such a cursor takes for seen. So after any error of Acquire, Window,
// Store or Release the relay forgets its cursors and goes on from those that the next Acquire answers.
type Log interface {
	// Acquire renews the leases that relay holds, for term from now, and takes free or expired ones up to its fair share. It answers
	// the leases held now, with the cursors as stored.
	Acquire(ctx context.Context, relay string, term time.Duration) (Grant, error)
	// Release gives leases back, so that another relay need not wait for them to expire.
	Release(ctx context.Context, relay string, leases []Lease) error
	// Leave gives back all leases of relay and no longer counts it among the live ones.
	Leave(ctx context.Context, relay string) error
	// Window reads what is beyond the cursors of the spans, all in one view of the log: begin is called once with the snapshot of that
	// view before any row, then each for the messages of the first span's rows in id order, then of the second, and so on. A span with a Next in
	// its cursor is that window, from After on, and ends with its own Next; any other ends with the snapshot that begin was told. The
	// Message and its slices are each's to keep. An error of each ends the window and is returned.
	Window(ctx context.Context, spans []Span, begin func(next Snapshot), each func(m *Message) error) error
	// Store stores cursors under their fences, without waiting for the disk: a lost cursor costs duplicates only. It answers the
	// shards whose fence was no longer ours.
	Store(ctx context.Context, relay string, leases []Lease) (fenced []int16, err error)
	// Backlog says how many rows are beyond the stored cursors (estimated beyond a bound) and how old the oldest is, for metrics and
	// admission. Cursors are stored a moment after the broker has the rows, so a busy outbox is never quite empty.
	Backlog(ctx context.Context) (Backlog, error)
	// SetAside stores a message that Kafka refuses for good as a dead letter, with the reason.
	SetAside(ctx context.Context, m *Message, reason string) error
}

// Backlog is what waits in the outbox.
type Backlog struct {
	Rows          int64
	OldestSeconds float64
}

// Producer writes to Kafka with acks=all, idempotently, in order a partition. done is called once for each record, in order a
// partition; an error with `Refused() bool` true means that Kafka will never take this record. When a record fails for another
// reason, those of its partition that were handed over after it fail too, so that none overtakes it. Produce may block while its
// buffer is full. ctx ends the waiting for a record, not only the call.
type Producer interface {
	Produce(ctx context.Context, r events.Record, done func(error))
	Flush(ctx context.Context) error
}
