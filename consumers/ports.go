package consumers

import (
	"context"
	"time"

	"github.com/google/uuid"

	"ordersaga/events"
)

// Delivery is a record as a handler sees it.
type Delivery struct {
	events.Envelope
	Record  events.Record // as it lies in Kafka; for a retry copy, in its retry topic. With EarlyOffset, as it will lie there
	Group   events.Group
	Attempt int       // 1 for the first delivery; grows with every failed attempt
	Ticket  int64     // of a retry or replay copy; 0 for an original
	Replay  bool      // sent by an operator
	Origin  Place     // where the original lies
	First   time.Time // when it first failed; zero if it has not
}

// The classes of dead letters.
const (
	ClassPoison    = "poison"    // undecodable, impossible, or refused by the database
	ClassExhausted = "exhausted" // failed in every tier
	ClassTooLarge  = "too_large" // its retry copy, or the message itself, is above the broker's limit
	ClassReused    = "id_reused" // its id was used before, for another payload
)

// Place is where a record lies in Kafka.
type Place struct {
	Topic     events.Topic
	Partition int32
	Offset    int64
}

// Result is what a handler made of one delivery: messages to emit, or why it failed. With an Err, Out is not emitted.
type Result struct {
	Out []events.Envelope
	Err error
}

// Apply is the second half of a handler: it touches only tx, and may be called for any part of the batch that was prepared, more
// than once if transactions fail. It answers one Result a delivery, in order. An error fails the whole transaction.
type Apply[T any] func(ctx context.Context, tx T, batch []*Delivery) ([]Result, error)

// Handler acts on deliveries. Prepare makes its network calls, outside any transaction of the runtime, and answers the function
// that applies their outcomes; outcomes survive a split of the batch. An error of Prepare with Outage() pauses the group.
type Handler[T any] interface {
	Prepare(ctx context.Context, batch []*Delivery) (Apply[T], error)
}

// Foresight is what a Handler may have too: it knows, before the inbox has answered, which rows its Apply will lock, so that they are read in the
// inbox's own round trip. It decides nothing. Apply locks what it needs all the same, and some of what was foreseen may not be needed:
// the batch is that of Prepare, with the deliveries that the inbox will turn away.
type Foresight[T any] interface {
	Foresee(tx T, batch []*Delivery)
}

// Starter is what a Handler may have too: for messages that its own group emits for itself, by what follows from them, it can do in the transaction that emits
// them what Prepare would do in a transaction of its own before its calls. Prepare of such a delivery then goes to its calls at once. That a delivery comes
// says that the transaction has committed: ids are drawn anew when it starts over.
type Starter[T any] interface {
	Start(ctx context.Context, tx T, batch []*Delivery) error
}

// InboxState is what is known of a message in a group.
type InboxState string

// The states of an inbox row. Parked is for Ordered subscriptions.
const (
	InboxHandled   InboxState = "handled"
	InboxWaiting   InboxState = "waiting" // a retry copy is under way
	InboxParked    InboxState = "parked"
	InboxDead      InboxState = "dead"
	InboxReplaying InboxState = "replaying" // an operator's copy is under way
	InboxDiscarded InboxState = "discarded"
)

// InboxRow is the state of one message in one group. A delivery acts only if there is no row, or the row waits for a copy and its
// ticket is the delivery's.
type InboxRow struct {
	MessageID uuid.UUID
	State     InboxState
	Ticket    int64
	Hash      int64 // of the payload: the same identity with another payload is never dropped in silence
	// New says that Inbox found no such row in this transaction. Two owners of a partition (a zombie and its successor) both see no
	// row of a message: the second insert must not pass for the first one's.
	New bool
}

// DeadLetter is a record that an operator has to decide about.
type DeadLetter struct {
	ID          uuid.UUID // UUIDv7
	Group       events.Group
	MessageID   uuid.UUID
	Origin      Place
	Type        string    // short name, or the ce_type as it came (cleaned, at most 200 bytes) if that is unknown
	OrderID     uuid.UUID // zero if it cannot be told
	Status      DeadStatus
	Class       string // see the Class constants
	Error       string // one line, cleaned of control characters, at most 1,000 bytes
	Fingerprint string // the same for the same cause: class + type + error without its numbers and ids
	Attempts    int
	FirstFailed time.Time
	LastFailed  time.Time
	Key         []byte
	Value       []byte
	Headers     []events.Header
	Owner, Note string
	Ticket      int64 // of the last copy sent
}

// DeadStatus is where a dead letter stands.
type DeadStatus string

// The statuses of dead letters.
const (
	DeadOpen       DeadStatus = "open"
	DeadReplaying  DeadStatus = "replaying"
	DeadResolved   DeadStatus = "resolved"
	DeadDiscarded  DeadStatus = "discarded"
	DeadSuperseded DeadStatus = "superseded" // its saga ended without it
)

// Tx is what the runtime itself reads and writes in the transaction of the effect. Writes may be deferred to the commit.
type Tx interface {
	// PresumeFirst presumes that there are no rows of the messages that Inbox will be asked for next: it answers so without looking. Where that is
	// wrong the transaction does not commit but starts over.
	PresumeFirst(group events.Group, ids []uuid.UUID)
	// Inbox reads the rows that exist of the given messages, locked in sorted order.
	Inbox(ctx context.Context, group events.Group, ids []uuid.UUID) (map[uuid.UUID]InboxRow, error)
	// SaveInbox inserts the rows that are New, and replaces the others, which Inbox has locked. A New one that appeared meanwhile
	// makes the transaction start over.
	SaveInbox(ctx context.Context, group events.Group, rows []InboxRow) error
	// SaveDeadLetters inserts dead letters; one of the same group and message that is there already is opened again instead, with its
	// id kept, its attempts and last failure brought up to date.
	SaveDeadLetters(ctx context.Context, dead []DeadLetter) error
	// ResolveDeadLetters marks the replaying dead letters of these messages resolved.
	ResolveDeadLetters(ctx context.Context, group events.Group, ids []uuid.UUID) error
	// Emit writes messages to the outbox, in order.
	Emit(ctx context.Context, out []events.Envelope) error
	// Forward writes raw records (retry copies, dead letters) to the outbox, in order.
	Forward(ctx context.Context, out []events.Raw) error
}

// Store runs transactions. fn may run more than once: a serialisation failure or deadlock is tried again. An error answers
// `Outage() string` when the database is away and `DataError() bool` when the data was at fault.
type Store[T any] interface {
	InTx(ctx context.Context, fn func(ctx context.Context, tx T) error) error
}

// Source feeds batches: one poll over all partitions of a group. handle answers, for each record, whether it is settled; the source
// advances each partition's offset up to its first unsettled record and delivers from there again. The context is cancelled when
// partitions are revoked or the process stops; handle then returns soon.
type Source interface {
	Run(ctx context.Context, handle func(ctx context.Context, batch []events.Record) (settled []bool, err error)) error
}
