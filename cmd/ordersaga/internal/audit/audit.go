// Package audit checks the books: every order ended, the money captured is what the gateway's own ledger says, the stock adds up from
// three sides, nothing waits in the outbox.
//
// It owns the comparison and nothing else: the facts come from the database and from the gateway's list calls, which know nothing of
// each other. It promises to name each finding by its order or product. It is meant for a system at rest; while orders are under
// way they are findings themselves.
package audit

import (
	"context"
	"fmt"
	"iter"
	"time"

	"ordersaga/adapters/payment"
	"ordersaga/adapters/postgres"
	"ordersaga/consumers"
	"ordersaga/domain"
	"ordersaga/outbox"
	"ordersaga/saga"
)

// Books are the facts on our side; *postgres.DB is one.
type Books interface {
	EachOrder(ctx context.Context, fn func(postgres.OrderFact) error) error
	EachPayment(ctx context.Context, fn func(domain.PaymentStep) error) error
	EachReservation(ctx context.Context, fn func(domain.OrderID, domain.ReservationState) error) error
	EachStock(ctx context.Context, fn func(postgres.StockFact) error) error
	CountDead(ctx context.Context) (map[string]int64, error)
	OutboxBacklog(ctx context.Context) (outbox.Backlog, error)
}

// Ledger is the gateway's side; *payment.Gateway is one. Nil skips the comparison, loudly.
type Ledger interface {
	Ledger(ctx context.Context, since time.Time) iter.Seq2[payment.Entry, error]
}

// Report is what an audit found.
type Report struct {
	Clean       bool             `json:"clean"`
	Orders      map[string]int64 `json:"orders"`         // by status
	Captured    map[string]int64 `json:"captured_minor"` // by currency, by the gateway's ledger
	Intents     int64            `json:"intents"`        // of the gateway's ledger
	Products    int64            `json:"products"`
	DeadLetters map[string]int64 `json:"dead_letters"` // by status; open ones are for an operator, and no finding
	Unpublished int64            `json:"unpublished"`
	Findings    []string         `json:"findings"`
	MoreThan    int              `json:"findings_not_shown,omitempty"`
	NoLedger    bool             `json:"ledger_not_compared,omitempty"`
}

// maxFindings bounds the list; the rest is counted.
const maxFindings = 100

func (r *Report) find(format string, args ...any) {
	if len(r.Findings) >= maxFindings {
		r.MoreThan++
		return
	}
	r.Findings = append(r.Findings, fmt.Sprintf(format, args...))
}

// account is the gateway's side of one order.
type account struct {
	intents  int
	held     int64 // authorised and neither captured nor cancelled
	received int64
	refunded int64
	currency string
	met      bool
}

// Run checks the books.
func Run(ctx context.Context, b Books, gateway Ledger) (*Report, error) {
	r := &Report{Orders: map[string]int64{}, Captured: map[string]int64{}, Findings: []string{}}
	accounts := map[domain.OrderID]*account{}
	if gateway == nil {
		r.NoLedger = true
	} else if err := r.readLedger(ctx, gateway, accounts); err != nil {
		return nil, err
	}
	reservations := map[domain.OrderID]domain.ReservationState{}
	err := b.EachReservation(ctx, func(id domain.OrderID, st domain.ReservationState) error {
		reservations[id] = st
		return nil
	})
	if err != nil {
		return nil, err
	}
	if err := r.orders(ctx, b, accounts, reservations); err != nil {
		return nil, err
	}
	for id, a := range accounts {
		if !a.met && (a.held != 0 || a.received != a.refunded) {
			r.find("order %s: the gateway holds or took money for it, and there is no such order here", id)
		}
	}
	if err := r.rest(ctx, b); err != nil {
		return nil, err
	}
	r.Clean = len(r.Findings) == 0
	return r, nil
}

func (r *Report) readLedger(ctx context.Context, gateway Ledger, accounts map[domain.OrderID]*account) error {
	for e, err := range gateway.Ledger(ctx, time.Time{}) {
		if err != nil {
			return fmt.Errorf("the gateway's ledger: %w", err)
		}
		r.Intents++
		id, err := domain.ParseOrderID(e.OrderID)
		if err != nil {
			continue // not an intent of ours: the account may serve others
		}
		a := accounts[id]
		if a == nil {
			a = &account{currency: e.Currency}
			accounts[id] = a
		}
		a.intents++
		a.received += e.AmountReceived
		a.refunded += e.AmountRefunded
		if e.Status == "requires_capture" {
			a.held += e.Amount
		}
		r.Captured[e.Currency] += e.AmountReceived - e.AmountRefunded
	}
	return nil
}

func (r *Report) orders(ctx context.Context, b Books, accounts map[domain.OrderID]*account, reservations map[domain.OrderID]domain.ReservationState) error {
	return b.EachOrder(ctx, func(f postgres.OrderFact) error {
		r.Orders[string(f.Status)]++
		if f.Phase == "" {
			r.find("order %s: has no saga", f.Order)
		}
		if !f.Status.Terminal() || !f.Phase.Ended() {
			r.find("order %s: has not ended: %s, saga %s", f.Order, f.Status, f.Phase)
			return nil
		}
		if want := phaseOf(f.Status); f.Phase != want {
			r.find("order %s: is %s with its saga %s, not %s", f.Order, f.Status, f.Phase, want)
		}
		r.money(f, accounts[f.Order])
		held := reservations[f.Order] == domain.Reserved || reservations[f.Order] == domain.CommittedStock
		switch {
		case f.Status == domain.Confirmed && reservations[f.Order] != domain.CommittedStock:
			r.find("order %s: is confirmed and its stock is not committed but %q", f.Order, reservations[f.Order])
		case f.Status != domain.Confirmed && held:
			r.find("order %s: is %s and its stock is %s", f.Order, f.Status, reservations[f.Order])
		}
		return nil
	})
}

func phaseOf(s domain.Status) saga.Phase {
	if s == domain.Confirmed {
		return saga.Completed
	}
	return saga.Compensated
}

// money compares an ended order with its account at the gateway.
func (r *Report) money(f postgres.OrderFact, a *account) {
	if r.NoLedger {
		return
	}
	if a == nil {
		a = &account{currency: f.Total.Currency}
	}
	a.met = true
	net := a.received - a.refunded
	switch {
	case a.held != 0:
		r.find("order %s: is %s and the gateway still holds %d %s of it", f.Order, f.Status, a.held, a.currency)
	case f.Status == domain.Confirmed && (a.received != f.Total.Minor || a.refunded != 0 || a.currency != f.Total.Currency):
		r.find("order %s: costs %s, the gateway took %d and gave back %d %s in %d intents", f.Order, f.Total, a.received, a.refunded, a.currency, a.intents)
	case f.Status != domain.Confirmed && net != 0:
		r.find("order %s: is %s and the gateway keeps %d %s of it", f.Order, f.Status, net, a.currency)
	}
}

func (r *Report) rest(ctx context.Context, b Books) error {
	err := b.EachPayment(ctx, func(s domain.PaymentStep) error {
		if s.State == domain.BarrierStarted {
			r.find("order %s: what became of its %s (key %d) is not known", s.Order, s.Op, s.Attempt)
		}
		return nil
	})
	if err != nil {
		return err
	}
	err = b.EachStock(ctx, func(f postgres.StockFact) error {
		r.Products++
		if !f.Adds() {
			r.find("product %s: does not add up: available %d, reserved %d (orders hold %d), sold %d (orders bought %d), came in %d",
				f.SKU, f.Available, f.Reserved, f.HeldByOrders, f.Sold, f.SoldByOrders, f.Adjusted)
		}
		return nil
	})
	if err != nil {
		return err
	}
	if r.DeadLetters, err = b.CountDead(ctx); err != nil {
		return err
	}
	if n := r.DeadLetters[string(consumers.DeadReplaying)]; n > 0 {
		r.find("%d dead letters are being replayed", n)
	}
	backlog, err := b.OutboxBacklog(ctx)
	if err != nil {
		return err
	}
	if r.Unpublished = backlog.Rows; backlog.Rows > 0 {
		r.find("%d messages are not published, the oldest for %.1f s", backlog.Rows, backlog.OldestSeconds)
	}
	return nil
}
