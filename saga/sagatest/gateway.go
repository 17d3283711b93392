package sagatest

import (
	"context"
	"fmt"
	"strconv"
	"sync"
	"time"

	"ordersaga/domain"
	"ordersaga/saga"
)

// Fault is what goes wrong with one call of the gateway.
type Fault int8

// The faults.
const (
	NoFault        Fault = iota
	Unreached            // the call never arrived: an error, no effect, nothing stored under the key
	AnswerLost           // the call took effect and was stored under the key, the answer was lost on the way
	StoredFailure        // the call had no effect and its 500 is stored under the key: it will be repeated for as long as the key is remembered
	StoredFailHeld       // the same, but the call did take effect
	GatewayAway          // the breaker is open: nothing is sent
)

// MethodDeclined is a payment method that the gateway declines.
const MethodDeclined = "pm_card_chargeDeclined"

// GatewayError is a technical failure of the gateway, classified by behaviour.
type GatewayError struct {
	Msg  string
	Rep  bool   // Replayed
	Away string // Outage
	Bad  bool   // Poison
}

func (e *GatewayError) Error() string { return e.Msg }

// Replayed reports an answer that was stored under the key.
func (e *GatewayError) Replayed() bool { return e.Rep }
func (e *GatewayError) Outage() string { return e.Away }
func (e *GatewayError) Poison() bool   { return e.Bad }

type intent struct {
	ref      string
	order    domain.OrderID
	amount   int64
	state    domain.PaymentResult // authorized, captured, reversed or refused
	refunded bool
}

type storedAnswer struct {
	out    domain.PaymentOutcome
	failed bool
	at     time.Time
}

// Gateway is a payment gateway in memory that behaves as Stripe does: it stores the answer to a key, failures too, and repeats it for
// a day.
type Gateway struct {
	Now saga.Clock
	// Fault, when set, decides what goes wrong with a call.
	Fault func(domain.PaymentRequest) Fault
	// Before, when set, is called outside any lock before a call takes effect.
	Before func(domain.PaymentRequest)

	mu      sync.Mutex
	intents []*intent
	keys    map[string]storedAnswer
	calls   []domain.PaymentRequest
	running int
	most    int
}

// keyMemory is how long the gateway remembers a key.
const keyMemory = 24 * time.Hour

// NewGateway makes one.
func NewGateway(now saga.Clock) *Gateway { return &Gateway{Now: now, keys: map[string]storedAnswer{}} }

// Do implements steps.Gateway.
func (g *Gateway) Do(ctx context.Context, r domain.PaymentRequest) (domain.PaymentOutcome, error) {
	g.mu.Lock()
	g.running++
	g.most = max(g.most, g.running)
	g.calls = append(g.calls, r)
	fault := NoFault
	if g.Fault != nil {
		fault = g.Fault(r)
	}
	g.mu.Unlock()
	defer func() {
		g.mu.Lock()
		g.running--
		g.mu.Unlock()
	}()
	switch fault {
	case Unreached:
		return domain.PaymentOutcome{}, &GatewayError{Msg: "connection refused"}
	case GatewayAway:
		return domain.PaymentOutcome{}, &GatewayError{Msg: "breaker is open", Away: saga.PaymentGateway}
	default: // it arrives
	}
	if g.Before != nil {
		g.Before(r)
	}
	if err := ctx.Err(); err != nil {
		return domain.PaymentOutcome{}, err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if r.Op == domain.LookUp {
		if fault != NoFault {
			return domain.PaymentOutcome{}, &GatewayError{Msg: "timeout"}
		}
		return g.lookUp(r), nil
	}
	return g.act(r, fault)
}

func (g *Gateway) act(r domain.PaymentRequest, fault Fault) (domain.PaymentOutcome, error) {
	now := g.Now()
	stored, known := g.keys[r.Key()]
	if known && now.Sub(stored.at) < keyMemory {
		switch {
		case fault == AnswerLost:
			return domain.PaymentOutcome{}, &GatewayError{Msg: "timeout"}
		case stored.failed:
			return domain.PaymentOutcome{}, &GatewayError{Msg: "500 (repeated)", Rep: true}
		}
		return stored.out, nil
	}
	if fault == StoredFailure {
		g.keys[r.Key()] = storedAnswer{failed: true, at: now}
		return domain.PaymentOutcome{}, &GatewayError{Msg: "500"}
	}
	out, err := g.effect(r)
	if err != nil {
		return out, err
	}
	g.keys[r.Key()] = storedAnswer{out: out, failed: fault == StoredFailHeld, at: now}
	switch fault {
	case AnswerLost:
		return domain.PaymentOutcome{}, &GatewayError{Msg: "timeout"}
	case StoredFailHeld:
		return domain.PaymentOutcome{}, &GatewayError{Msg: "500"}
	default:
		return out, nil
	}
}

func (g *Gateway) effect(r domain.PaymentRequest) (domain.PaymentOutcome, error) {
	if r.Op == domain.Authorize {
		it := &intent{ref: "pi_" + strconv.Itoa(len(g.intents)+1), order: r.Order, amount: r.Amount.Minor, state: domain.PaymentAuthorized}
		g.intents = append(g.intents, it)
		if r.Method == MethodDeclined {
			it.state = domain.PaymentRefused
			return domain.PaymentOutcome{Result: domain.PaymentRefused, Ref: it.ref, Code: "card_declined"}, nil
		}
		return domain.PaymentOutcome{Result: domain.PaymentAuthorized, Ref: it.ref}, nil
	}
	it := g.find(r.Ref)
	if it == nil {
		return domain.PaymentOutcome{}, &GatewayError{Msg: fmt.Sprintf("404: no intent %q", r.Ref), Bad: true}
	}
	switch {
	case r.Op == domain.Capture && it.state == domain.PaymentAuthorized:
		it.state = domain.PaymentCaptured
	case r.Op == domain.Capture && it.state == domain.PaymentReversed:
		return domain.PaymentOutcome{Result: domain.PaymentRefused, Ref: it.ref, Code: "payment_intent_unexpected_state"}, nil
	case r.Op == domain.Reverse && it.state == domain.PaymentCaptured:
		it.state, it.refunded = domain.PaymentReversed, true
	case r.Op == domain.Reverse && it.state == domain.PaymentAuthorized:
		it.state = domain.PaymentReversed
	}
	return domain.PaymentOutcome{Result: it.state, Ref: it.ref}, nil
}

func (g *Gateway) find(ref string) *intent {
	for _, it := range g.intents {
		if it.ref == ref {
			return it
		}
	}
	return nil
}

func (g *Gateway) lookUp(r domain.PaymentRequest) domain.PaymentOutcome {
	rank := map[domain.PaymentResult]int{domain.PaymentRefused: 1, domain.PaymentReversed: 2, domain.PaymentAuthorized: 3, domain.PaymentCaptured: 4}
	var best *intent
	for _, it := range g.intents {
		if r.Ref != "" && it.ref == r.Ref || r.Ref == "" && it.order == r.Order && (best == nil || rank[it.state] > rank[best.state]) {
			best = it
		}
	}
	if best == nil {
		return domain.PaymentOutcome{Result: domain.PaymentUnknown}
	}
	return domain.PaymentOutcome{Result: best.state, Ref: best.ref}
}

// Ledger is the money of one order at the gateway, in minor units.
type Ledger struct {
	Intents  int   // holds ever made, declined ones not counted
	Held     int64 // held and neither taken nor given back
	Captured int64 // taken and not given back
	Refunded int64
}

// Ledger reads an order's money.
func (g *Gateway) Ledger(order domain.OrderID) Ledger {
	g.mu.Lock()
	defer g.mu.Unlock()
	var l Ledger
	for _, it := range g.intents {
		if it.order != order || it.state == domain.PaymentRefused {
			continue
		}
		l.Intents++
		switch {
		case it.state == domain.PaymentAuthorized:
			l.Held += it.amount
		case it.state == domain.PaymentCaptured:
			l.Captured += it.amount
		case it.refunded:
			l.Refunded += it.amount
		}
	}
	return l
}

// CancelAtGateway ends an order's holds behind our back, as the gateway does after a week.
func (g *Gateway) CancelAtGateway(order domain.OrderID) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, it := range g.intents {
		if it.order == order && it.state == domain.PaymentAuthorized {
			it.state = domain.PaymentReversed
		}
	}
}

// Calls answers every call that arrived so far, those that failed included.
func (g *Gateway) Calls() []domain.PaymentRequest {
	g.mu.Lock()
	defer g.mu.Unlock()
	return append([]domain.PaymentRequest(nil), g.calls...)
}

// MostAtOnce is the largest number of calls that ran side by side.
func (g *Gateway) MostAtOnce() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.most
}
