package saga

import (
	"context"
	"time"

	"github.com/google/uuid"

	"ordersaga/domain"
	"ordersaga/events"
)

// Instance is a saga as the coordinator works on it: what the machine knows, and what commands are made of.
type Instance struct {
	Order domain.OrderID
	Total domain.Money
	State State
}

// Clone answers a copy that shares nothing with it.
func (in *Instance) Clone() *Instance {
	c := *in
	c.State = in.State.clone()
	return &c
}

// Change is a saga after a decision, to be saved. The order's row changes only where the status or the sequence did.
type Change struct {
	*Instance
	OrderChanged bool
	Timer        Timer
	Ended        bool
}

// HistoryEntry is one line of a saga's append-only history.
type HistoryEntry struct {
	Order   domain.OrderID
	Version int32
	Cause   uuid.UUID // id of the message that caused it; zero for a person or the clock
	Input   Input
	Phase   Phase
	Status  domain.Status
	Actor   string    // who, if it was a person
	At      time.Time // database time; set by the store
}

// Placement is an order to be inserted with its saga, after the machine's first decision.
type Placement struct {
	Order *domain.Order
	Hash  int64 // of what was asked for: the same order id asked for again with another hash is not the same order
	State State
	Timer Timer
}

// IdempotencyKey is one use of a key: scoped by caller, bound to the request's body, with the answer to repeat.
type IdempotencyKey struct {
	Caller string
	Key    string
	Body   [32]byte // SHA-256 of the raw request body
	Order  domain.OrderID
	Answer []byte // the 202 as stored, byte for byte
}

// Tx is what one transaction offers the coordinator and the use cases; a batch at a time. Writes may be deferred to the commit.
type Tx interface {
	// ForeseeSagas says which LockSagas will be asked for next: it may be read ahead, and locked, with another round trip.
	ForeseeSagas(ids []domain.OrderID)
	// LockSagas reads sagas and locks them in sorted order. Ids that have none are left out. A store may answer what it has written last instead: where
	// that is not so any more, the transaction does not commit but starts over.
	LockSagas(ctx context.Context, ids []domain.OrderID) (map[domain.OrderID]*Instance, error)
	SaveSagas(ctx context.Context, changes []Change) error
	AppendHistory(ctx context.Context, entries []HistoryEntry) error
	// ForeseePlacing says for which ids LockOrderIDs (placing), FindOrders and Tombstones will be asked next, as ForeseeSagas.
	ForeseePlacing(ids []domain.OrderID)
	// PresumeNew presumes that none of the ids was placed or cancelled, and none of the keys used: LockOrderIDs (placing), FindOrders, Tombstones
	// and FindKeys, which will be asked next for just these, answer so without looking. Where that is wrong the transaction does not commit but
	// starts over.
	PresumeNew(ids []domain.OrderID)
	// LockOrderIDs keeps those who place and those who cancel order ids that clients chose apart, whether or not the orders exist. Who
	// places shares the lock with others who place: that two place one id is found by the order's own row. Who cancels has it alone.
	LockOrderIDs(ctx context.Context, ids []domain.OrderID, placing bool) error
	// FindOrders answers the hash of what was asked for, for those of the ids that are taken.
	FindOrders(ctx context.Context, ids []domain.OrderID) (map[domain.OrderID]int64, error)
	// InsertOrders inserts orders with their sagas. An id that was taken meanwhile makes the transaction start over.
	InsertOrders(ctx context.Context, batch []Placement) error
	// LoadOrders reads whole orders, for a command that is made anew.
	LoadOrders(ctx context.Context, ids []domain.OrderID) (map[domain.OrderID]*domain.Order, error)
	// Tombstones finds which of the ids were cancelled before they were placed.
	Tombstones(ctx context.Context, ids []domain.OrderID) (map[domain.OrderID]bool, error)
	InsertTombstones(ctx context.Context, ids []domain.OrderID) error
	// FindKeys answers, for each key in order, nil or what is stored under it. Only Caller and Key of the argument count.
	FindKeys(ctx context.Context, keys []IdempotencyKey) ([]*IdempotencyKey, error)
	// InsertKeys stores keys. One that was stored meanwhile makes the transaction start over.
	InsertKeys(ctx context.Context, keys []IdempotencyKey) error
	// DueSagas locks up to limit sagas whose deadline has passed, no longer ago than within (0: whenever), skipping those locked by others.
	DueSagas(ctx context.Context, within time.Duration, limit int) ([]domain.OrderID, error)
	// Away lists the dependencies that some process reported as away in the last minute.
	Away(ctx context.Context) (map[string]bool, error)
	// Audit appends to the operators' log.
	Audit(ctx context.Context, entries []AuditEntry) error
	Emit(ctx context.Context, out []events.Envelope) error
}

// AuditEntry is one operator action, in the append-only audit log.
type AuditEntry struct {
	Actor  string
	Action string // saga.resolve, dlq.replay, order.cancel, product.put, …
	Target string // the order, dead letter or product
	Note   string
	Detail string // JSON, or empty
	At     time.Time
}

// Store runs transactions; fn may run more than once.
type Store[T any] interface {
	InTx(ctx context.Context, fn func(ctx context.Context, tx T) error) error
}

// Catalogue answers products by SKU; SKUs it does not know are left out.
type Catalogue interface {
	Products(ctx context.Context, skus []domain.SKU) (map[domain.SKU]domain.Product, error)
}

// Clock answers database time without asking the database: the local clock, corrected by an offset measured now and then.
type Clock func() time.Time

// OrderView is an order with its saga, for reading.
type OrderView struct {
	domain.Order
	Saga      State
	Deadline  time.Time // zero: none
	CreatedAt time.Time
	UpdatedAt time.Time
}

// OrderFilter selects orders; zero fields select all. Cursor is the last order of the page before, in descending order of creation.
type OrderFilter struct {
	Status     domain.Status
	CustomerID string
	Cursor     string
	Limit      int // 1 to 500
}

// SagaFilter selects sagas; zero fields select all. Stuck selects flagged ones and those that have not moved for a minute.
type SagaFilter struct {
	Phase     Phase
	Stuck     bool
	OlderThan time.Duration // not changed for so long
	Cursor    string
	Limit     int // 1 to 500
}

// Reader is the read side, outside any transaction of a use case.
type Reader interface {
	// Order answers nil if there is none.
	Order(ctx context.Context, id domain.OrderID) (*OrderView, error)
	Orders(ctx context.Context, f OrderFilter) (page []OrderView, next string, err error)
	Sagas(ctx context.Context, f SagaFilter) (page []OrderView, next string, err error)
	Timeline(ctx context.Context, id domain.OrderID) ([]HistoryEntry, error)
	AuditLog(ctx context.Context, cursor string, limit int) (page []AuditEntry, next string, err error)
}
