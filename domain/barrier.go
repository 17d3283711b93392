package domain

import (
	"fmt"
	"time"
)

// BarrierState is where one step of one order stands at its participant.
type BarrierState string

// The states of a barrier. A row has no time limit: a message that comes a month late meets it.
const (
	BarrierStarted   BarrierState = "started"   // about to act, or acted and not yet known what came of it
	BarrierDone      BarrierState = "done"      // acted
	BarrierRefused   BarrierState = "refused"   // a definite no
	BarrierUndone    BarrierState = "undone"    // acted, then undone
	BarrierTombstone BarrierState = "tombstone" // undone before it was seen: a late action is refused
)

// PaymentStep is the barrier of one payment operation of one order: the row that is written before the gateway is called, with
// the parameters and the number of the key, so that whoever comes after can send the very same request again.
type PaymentStep struct {
	Order   OrderID
	Op      PaymentOp // Authorize, Capture or Reverse
	State   BarrierState
	Attempt int // n of the key
	Amount  Money
	Method  string    // Authorize
	Ref     string    // the intent, once known
	Code    string    // of a refusal
	Begun   time.Time // database time when the row was started; past the gateway's memory of keys a look-up comes first
}

// Payment is all steps of one order's payment.
type Payment struct {
	Order   OrderID
	Steps   map[PaymentOp]*PaymentStep
	Changed map[PaymentOp]bool // which to store
}

// NewPayment is a payment of which nothing is stored.
func NewPayment(order OrderID) *Payment {
	return &Payment{Order: order, Steps: map[PaymentOp]*PaymentStep{}, Changed: map[PaymentOp]bool{}}
}

// Put replaces a step and marks it to be stored.
func (p *Payment) Put(s PaymentStep) {
	s.Order = p.Order
	p.Steps[s.Op] = &s
	p.Changed[s.Op] = true
}

// State is a step's state; empty if it was never seen.
func (p *Payment) State(op PaymentOp) BarrierState {
	if s := p.Steps[op]; s != nil {
		return s.State
	}
	return ""
}

// Closed reports that the payment was reversed, or is being: nothing may act on it any more.
func (p *Payment) Closed() bool {
	a := p.State(Authorize)
	return a == BarrierUndone || a == BarrierTombstone || p.State(Reverse) != ""
}

// Ref is the gateway's name of the payment; empty as long as it is not known.
func (p *Payment) Ref() string {
	if s := p.Steps[Authorize]; s != nil {
		return s.Ref
	}
	return ""
}

func (s PaymentStep) String() string {
	return fmt.Sprintf("%s/%s/%d %s", s.Order, s.Op, s.Attempt, s.State)
}
