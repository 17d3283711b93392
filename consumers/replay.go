package consumers

import (
	"context"
	"time"

	"github.com/google/uuid"

	"ordersaga/events"
)

// DeadFilter selects dead letters; zero fields select all.
type DeadFilter struct {
	Status      DeadStatus
	Group       events.Group
	Type        string
	Class       string
	Fingerprint string
	OrderID     uuid.UUID
	FailedSince time.Time // last failure at or after
	FailedUntil time.Time // last failure before
}

// DeadReader is the read side of dead letters, outside any transaction of a use case.
type DeadReader interface {
	// DeadLetters answers a page, newest first (descending id), and the cursor of the next page; an empty one means that this was the
	// last. Key, Value and Headers are filled.
	DeadLetters(ctx context.Context, f DeadFilter, cursor string, limit int) (page []DeadLetter, next string, err error)
	// DeadLetter answers nil if there is none.
	DeadLetter(ctx context.Context, id uuid.UUID) (*DeadLetter, error)
	// Operation answers an operation with the results so far, in the order of its selection; nil if there is none.
	Operation(ctx context.Context, id uuid.UUID) (*Operation, []ItemResult, error)
	// OpenOperations lists operations that have items without a result and were not touched for the given time, oldest first, at
	// most limit: they are what a dead process left.
	OpenOperations(ctx context.Context, untouched time.Duration, limit int) ([]uuid.UUID, error)
}

// DeadTx is what a transaction offers the operators' use cases; *postgres.Tx is one, as it is a Tx.
type DeadTx interface {
	// Inbox, SaveInbox, Forward: as in Tx.
	Inbox(ctx context.Context, group events.Group, ids []uuid.UUID) (map[uuid.UUID]InboxRow, error)
	SaveInbox(ctx context.Context, group events.Group, rows []InboxRow) error
	Forward(ctx context.Context, out []events.Raw) error

	// LockDead reads dead letters and locks them in sorted order; ids that have none are left out.
	LockDead(ctx context.Context, ids []uuid.UUID) (map[uuid.UUID]*DeadLetter, error)
	// UpdateDead stores Status, Owner, Note and Ticket of locked dead letters.
	UpdateDead(ctx context.Context, dead []DeadLetter) error
	// SelectDead answers the ids that a filter selects, oldest first, at most limit.
	SelectDead(ctx context.Context, f DeadFilter, limit int) ([]uuid.UUID, error)

	// InsertOperation stores an operation with its frozen selection; ids may be unknown ones.
	InsertOperation(ctx context.Context, op Operation, ids []uuid.UUID) error
	// LockOperation reads an operation and locks it; nil if there is none.
	LockOperation(ctx context.Context, id uuid.UUID) (*Operation, error)
	// PendingItems answers, in the order of the selection, up to limit ids of an operation's items that have no result.
	PendingItems(ctx context.Context, op uuid.UUID, limit int) ([]uuid.UUID, error)
	// SaveItems stores results of items and touches the operation.
	SaveItems(ctx context.Context, op uuid.UUID, results []ItemResult) error

	// RecordActions appends to the operators' append-only audit log, with the database's time.
	RecordActions(ctx context.Context, actions []OperatorAction) error
}

// Action is what an operator does to dead letters.
type Action string

// The actions on dead letters.
const (
	ActionReplay  Action = "replay"
	ActionDiscard Action = "discard"
)

// Operation is a stored replay or discard of a frozen selection.
type Operation struct {
	ID     uuid.UUID // UUIDv7
	Action Action
	Actor  string
	Note   string
	Items  int // size of the selection
}

// ItemResult is what became of one item of an operation.
type ItemResult struct {
	ID      uuid.UUID // of the dead letter
	Outcome string    // replaying, discarded, resolved; would_replay, would_discard of a dry run; empty with an Error
	Error   string    // one sentence; empty if the item went well
}

// OperatorAction is one line of the operators' audit log: dlq.replay or dlq.discard of one dead letter.
type OperatorAction struct {
	Actor  string
	Action string // dlq.replay, dlq.discard
	Target string // id of the dead letter
	Note   string
	Detail string // JSON
}
