package sagatest

import (
	"github.com/google/uuid"

	"ordersaga/domain"
	"ordersaga/events"
)

// ForeseeSagas implements saga.Tx. In memory there is no round trip to spare.
func (tx *Tx) ForeseeSagas([]domain.OrderID) {}

// ForeseeReservations implements steps.StockTx.
func (tx *Tx) ForeseeReservations([]domain.OrderID) {}

// ForeseePayments implements steps.PaymentTx.
func (tx *Tx) ForeseePayments([]domain.OrderID) {}

// PresumeUnpaid implements steps.PaymentTx.
func (tx *Tx) PresumeUnpaid([]domain.OrderID) {}

// PresumeUnreserved implements steps.StockTx.
func (tx *Tx) PresumeUnreserved([]domain.OrderID) {}

// PresumeFirst implements consumers.Tx.
func (tx *Tx) PresumeFirst(events.Group, []uuid.UUID) {}

// ForeseePlacing implements saga.Tx.
func (tx *Tx) ForeseePlacing([]domain.OrderID) {}

// PresumeNew implements saga.Tx. What is there nevertheless conflicts.
func (tx *Tx) PresumeNew(ids []domain.OrderID) {
	tx.presumed = true
	for _, id := range ids {
		if is, _ := read[bool](tx, tableTombstones, id); is {
			tx.broken = true
		}
	}
}
