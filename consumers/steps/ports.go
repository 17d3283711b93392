package steps

import (
	"context"

	"ordersaga/domain"
	"ordersaga/saga"
)

// StockTx is what a transaction offers the stock steps. Writes may be deferred to the commit.
type StockTx interface {
	// ForeseeReservations says which LockReservations will be asked for next: it may be read ahead, and locked, with another round trip.
	ForeseeReservations(orders []domain.OrderID)
	// PresumeUnreserved presumes that nothing was reserved for the orders, nor refused: LockReservations, which will be asked next for just these,
	// answers so without looking. Where that is wrong the transaction does not commit but starts over.
	PresumeUnreserved(orders []domain.OrderID)
	// LockReservations reads the reservations of orders and locks them in sorted order; orders that have none are left out.
	LockReservations(ctx context.Context, orders []domain.OrderID) (map[domain.OrderID]*domain.Reservation, error)
	// LockStock reads stock rows and locks them in sorted order; SKUs that have none are left out.
	LockStock(ctx context.Context, skus []domain.SKU) (map[domain.SKU]*domain.Stock, error)
	// InsertReservations inserts; a row that appeared meanwhile makes the transaction start over.
	InsertReservations(ctx context.Context, rs []domain.Reservation) error
	UpdateReservations(ctx context.Context, rs []domain.Reservation) error
	// SaveStock stores the counts of locked rows, one statement for all.
	SaveStock(ctx context.Context, stock []domain.Stock) error
}

// PaymentTx is what a transaction offers the payment steps.
type PaymentTx interface {
	// ForeseePayments says which LockPayments will be asked for next, as ForeseeReservations.
	ForeseePayments(orders []domain.OrderID)
	// PresumeUnpaid presumes that there are no rows of the orders, as PresumeUnreserved does.
	PresumeUnpaid(orders []domain.OrderID)
	// LockPayments reads the barrier rows of orders and locks them in sorted order; an order's authorize row is the lock of them all, and
	// what its holder inserted while this call waited for it is in the answer. Every order is, with no steps if it has none. A store may answer what it
	// has written last instead: where that is not so any more, the transaction does not commit but starts over.
	LockPayments(ctx context.Context, orders []domain.OrderID) (map[domain.OrderID]*domain.Payment, error)
	// SavePayments stores the steps marked as changed. A step that should be new and appeared meanwhile makes the transaction start over.
	SavePayments(ctx context.Context, ps []*domain.Payment) error
	// SetAway reports that a dependency is away, or is back.
	SetAway(ctx context.Context, dependency string, away bool) error
}

// Gateway is the payment gateway.
type Gateway interface {
	Do(ctx context.Context, r domain.PaymentRequest) (domain.PaymentOutcome, error)
}

// SagaTx is what a transaction offers the coordinator.
type SagaTx = saga.Tx

// Catalogue prices what producers ask for.
type Catalogue = saga.Catalogue
