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
	BarrierTombstone BarrierState = "tombstone" // undone before it was seen, or proven to have had no effect: a late action is refused
)

// PaymentStep is the barrier of one payment operation of one order: the row that is written before the gateway is called, with
// the parameters and the number of the key, so that whoever comes after can send the very same request again.
type PaymentStep struct {
	Order   OrderID
	Op      PaymentOp // Authorize, Capture or Reverse
	State   BarrierState
	Attempt int       // n of the key, from 1; 0 in a tombstone that no action came before
	Amount  Money     // zero in such a tombstone
	Method  string    // Authorize
	Ref     string    // the intent, once known
	Code    string    // of a refusal
	Begun   time.Time // database time when this attempt was started; past the gateway's memory of keys a look-up comes first
}

// Request is the call that a started step stands for: the same one each time.
func (s PaymentStep) Request() PaymentRequest {
	return PaymentRequest{Op: s.Op, Order: s.Order, Attempt: s.Attempt, Amount: s.Amount, Method: s.Method, Ref: s.Ref}
}

func (s PaymentStep) String() string {
	return fmt.Sprintf("%s/%s/%d %s", s.Order, s.Op, s.Attempt, s.State)
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

// Begin is what a command meets at the barrier.
type Begin int8

// What a command may meet.
const (
	BeginCall    Begin = iota // its row is started: the gateway is to be called with what the row says
	BeginSettled              // it was settled before, or may not act any more: the answer follows from the rows
	BeginEarly                // what it builds on has not happened yet
	BeginLapsed               // it came too late to act, and nothing was done
)

// BeginAuthorize writes the started row of an authorisation, unless the barrier says otherwise. A row that is there keeps its
// parameters, whatever this command brings.
func (p *Payment) BeginAuthorize(amount Money, method string, lapsed bool, now time.Time) Begin {
	a := p.Steps[Authorize]
	switch {
	case a != nil && (a.State != BarrierStarted || p.Closed()):
		return BeginSettled
	case lapsed:
		return BeginLapsed
	case a == nil:
		p.Put(PaymentStep{Op: Authorize, State: BarrierStarted, Attempt: 1, Amount: amount, Method: method, Begun: now})
	}
	return BeginCall
}

// BeginCapture writes the started row of a capture, unless the barrier says otherwise.
func (p *Payment) BeginCapture(amount Money, lapsed bool, now time.Time) Begin {
	a, c := p.Steps[Authorize], p.Steps[Capture]
	switch {
	case c != nil && c.State != BarrierStarted:
		return BeginSettled
	case a == nil:
		return BeginEarly
	case p.Closed() || a.State == BarrierRefused:
		return BeginSettled
	case a.State != BarrierDone || a.Ref == "":
		return BeginEarly
	case lapsed:
		return BeginLapsed
	case c == nil:
		p.Put(PaymentStep{Op: Capture, State: BarrierStarted, Attempt: 1, Amount: amount, Ref: a.Ref, Begun: now})
	}
	return BeginCall
}

// BeginReverse closes the payment: from here on nothing new acts on it. Without an authorisation it leaves a tombstone.
func (p *Payment) BeginReverse(now time.Time) Begin {
	a := p.Steps[Authorize]
	switch {
	case a == nil:
		p.Put(PaymentStep{Op: Authorize, State: BarrierTombstone, Begun: now})
		return BeginSettled
	case p.Ended():
		return BeginSettled
	case p.Steps[Reverse] == nil:
		p.Put(PaymentStep{Op: Reverse, State: BarrierStarted, Attempt: 1, Amount: a.Amount, Ref: a.Ref, Begun: now})
	}
	return BeginCall
}

// Ended reports that nothing is held or taken and nothing ever will be.
func (p *Payment) Ended() bool {
	a := p.State(Authorize)
	return a == BarrierUndone || a == BarrierTombstone || a == BarrierRefused || p.State(Reverse) == BarrierDone
}

// Open reports that the step's outcome is not known yet and is this step's own to find out: an undo has not taken over.
func (p *Payment) Open(op PaymentOp) bool { return p.State(op) == BarrierStarted && !p.Closed() }

// Renew gives a started step its next key, once it is proven that the last one had no effect. It refuses when the row has moved on
// or an undo has taken over: then nobody may call any more.
func (p *Payment) Renew(op PaymentOp, attempt int, now time.Time) bool {
	s := p.Steps[op]
	if s == nil || s.State != BarrierStarted || s.Attempt != attempt || op != Reverse && p.Closed() {
		return false
	}
	next := *s
	next.Attempt, next.Begun = attempt+1, now
	p.Put(next)
	return true
}

// codeReversed is the code of a refusal by the barrier, or of an intent that somebody cancelled at the gateway.
const codeReversed = "reversed"

// Settle stores what an Authorize or Capture came to, only over the started row of that attempt: what is known already stays.
func (p *Payment) Settle(op PaymentOp, attempt int, out PaymentOutcome) bool {
	s := p.Steps[op]
	if s == nil || s.State != BarrierStarted || s.Attempt != attempt {
		return false
	}
	next := *s
	switch {
	case out.Result == PaymentCaptured, op == Authorize && out.Result == PaymentAuthorized:
		next.State = BarrierDone
	case out.Result == PaymentRefused:
		next.State, next.Code = BarrierRefused, out.Code
	case out.Result == PaymentReversed, out.Result == PaymentUnknown: // cancelled at the gateway by hand or by time
		next.State, next.Code = BarrierRefused, out.Code
		if next.Code == "" {
			next.Code = codeReversed
		}
	default: // a capture that has not happened
		return false
	}
	if out.Ref != "" {
		next.Ref = out.Ref
	}
	p.Put(next)
	return true
}

// FinishReverse stores that nothing is held or taken any more. found is what the authorisation proved to be: PaymentRefused or
// PaymentUnknown when there was nothing to reverse.
func (p *Payment) FinishReverse(found PaymentOutcome) {
	if p.Steps[Authorize] == nil || p.State(Reverse) == BarrierDone {
		return
	}
	a := *p.Steps[Authorize]
	switch {
	case a.State == BarrierStarted && found.Result == PaymentRefused:
		a.State, a.Code = BarrierRefused, found.Code
	case a.State == BarrierStarted && found.Result == PaymentUnknown:
		a.State = BarrierTombstone
	case a.State == BarrierStarted, a.State == BarrierDone:
		a.State = BarrierUndone
	}
	if found.Ref != "" {
		a.Ref = found.Ref
	}
	p.Put(a)
	for op, to := range map[PaymentOp]BarrierState{Capture: BarrierUndone, Reverse: BarrierDone} {
		if s := p.Steps[op]; s != nil && (s.State == BarrierStarted || s.State == BarrierDone) && s.State != to {
			next := *s
			next.State, next.Ref = to, a.Ref
			p.Put(next)
		}
	}
}

// Answer is what the rows say of an Authorize or Capture that is not open: done, or refused with a code.
func (p *Payment) Answer(op PaymentOp) (done bool, code string) {
	for _, o := range []PaymentOp{op, Authorize} { // a capture that never started fails for what became of the authorisation
		s := p.Steps[o]
		switch {
		case s == nil:
		case o == op && s.State == BarrierDone:
			return true, ""
		case s.State == BarrierRefused:
			return false, s.Code
		case o == op:
			return false, codeReversed
		}
	}
	return false, codeReversed
}
