package steps

import (
	"context"

	"ordersaga/consumers"
	"ordersaga/domain"
	"ordersaga/events"
)

// Payment authorises and captures: AuthorizePayment, CapturePayment. In one transaction a batch the rows of the operations are
// started; the calls run; the runtime's transaction stores what they came to. An undo that arrives between the two meets the started
// row and finds out what the call did; one that arrived before leaves nothing to call.
type Payment[T PaymentTx] struct {
	calls   *GatewayCalls[T]
	started startedSteps
}

// NewPayment makes the handler of the payment group.
func NewPayment[T PaymentTx](calls *GatewayCalls[T]) *Payment[T] { return &Payment[T]{calls: calls} }

// Start implements consumers.Starter.
func (p *Payment[T]) Start(ctx context.Context, tx T, batch []*consumers.Delivery) error {
	pays, err := tx.LockPayments(ctx, ordersOf(batch))
	if err != nil {
		return err
	}
	now := p.calls.now()
	for _, d := range batch {
		op, _ := opOf(d)
		if begin, ok := p.begin(pays[orderOf(d)], d); ok && begin == domain.BeginCall {
			p.started.note(d.ID, *pays[orderOf(d)].Steps[op], now)
		}
	}
	return saveChanged(ctx, tx, pays, batch)
}

// opOf tells which operation a command of the payment group is.
func opOf(d *consumers.Delivery) (domain.PaymentOp, bool) {
	switch d.Data.(type) {
	case *events.AuthorizePayment:
		return domain.Authorize, true
	case *events.CapturePayment:
		return domain.Capture, true
	}
	return "", false
}

// opening lists the orders whose payment begins with this batch.
func opening(batch []*consumers.Delivery) []domain.OrderID {
	var out []domain.OrderID
	for _, d := range batch {
		if first[*events.AuthorizePayment](d) {
			out = append(out, orderOf(d))
		}
	}
	return out
}

// Prepare starts the rows and makes the calls.
func (p *Payment[T]) Prepare(ctx context.Context, batch []*consumers.Delivery) (consumers.Apply[T], error) {
	met := make(map[*consumers.Delivery]domain.Begin, len(batch))
	due, rest := p.started.take(batch, p.calls.now())
	begun := len(due)
	for _, d := range batch {
		met[d] = domain.BeginCall // the rest tells otherwise
	}
	var err error
	if len(rest) > 0 {
		err = p.calls.db.InTx(ctx, func(ctx context.Context, tx T) (err error) {
			due, err = p.beginAll(ctx, tx, rest, met, due[:begun])
			return err
		})
	}
	if err != nil {
		return nil, err
	}
	answers := p.calls.each(ctx, due, func(ctx context.Context, r *round[T], s domain.PaymentStep) answer { return r.conclude(ctx, s) })
	if err := ctx.Err(); err != nil {
		return nil, err // stopping: the rows are started, the next delivery sends the same requests again
	}
	return func(ctx context.Context, tx T, part []*consumers.Delivery) ([]consumers.Result, error) {
		return p.apply(ctx, tx, part, met, answers)
	}, nil
}

// beginAll begins the operations of a batch, notes what each delivery met, and adds to due what is to be called.
func (p *Payment[T]) beginAll(
	ctx context.Context, tx T, batch []*consumers.Delivery, met map[*consumers.Delivery]domain.Begin, due []domain.PaymentStep,
) ([]domain.PaymentStep, error) {
	tx.PresumeUnpaid(opening(batch))
	pays, err := tx.LockPayments(ctx, ordersOf(batch))
	if err != nil {
		return nil, err
	}
	listed := make(map[stepKey]bool, len(batch))
	for _, s := range due {
		listed[stepKey{s.Order, s.Op}] = true
	}
	for _, d := range batch {
		begin, ok := p.begin(pays[orderOf(d)], d)
		met[d] = begin
		if op, _ := opOf(d); ok && begin == domain.BeginCall && !listed[stepKey{orderOf(d), op}] {
			listed[stepKey{orderOf(d), op}] = true
			due = append(due, *pays[orderOf(d)].Steps[op])
		}
	}
	return due, saveChanged(ctx, tx, pays, batch)
}

// Foresee implements consumers.Foresight.
func (p *Payment[T]) Foresee(tx T, batch []*consumers.Delivery) { tx.ForeseePayments(ordersOf(batch)) }

func (p *Payment[T]) begin(pay *domain.Payment, d *consumers.Delivery) (domain.Begin, bool) {
	switch m := d.Data.(type) {
	case *events.AuthorizePayment:
		amount := domain.Money{Minor: m.GetAmountMinor(), Currency: m.GetCurrency()}
		if amount.Minor < 1 || !domain.ValidCurrency(amount.Currency) {
			return domain.BeginSettled, false // apply tells
		}
		return pay.BeginAuthorize(amount, m.GetPaymentMethod(), lapsed(m.GetExpiresAtMs(), p.calls.now), p.calls.now()), true
	case *events.CapturePayment:
		amount := domain.Money{Minor: m.GetAmountMinor(), Currency: m.GetCurrency()}
		if amount.Minor < 1 || !domain.ValidCurrency(amount.Currency) {
			return domain.BeginSettled, false
		}
		return pay.BeginCapture(amount, lapsed(m.GetExpiresAtMs(), p.calls.now), p.calls.now()), true
	}
	return domain.BeginSettled, false
}

// saveChanged stores the payments of a batch that have changed, in the order of their ids.
func saveChanged[T PaymentTx](ctx context.Context, tx T, pays map[domain.OrderID]*domain.Payment, batch []*consumers.Delivery) error {
	var changed []*domain.Payment
	for _, id := range ordersOf(batch) {
		if pay := pays[id]; pay != nil && len(pay.Changed) > 0 {
			changed = append(changed, pay)
		}
	}
	if len(changed) == 0 {
		return nil
	}
	return tx.SavePayments(ctx, changed)
}

func (p *Payment[T]) apply(
	ctx context.Context, tx T, part []*consumers.Delivery, met map[*consumers.Delivery]domain.Begin, answers map[stepKey]answer,
) ([]consumers.Result, error) {
	pays, err := tx.LockPayments(ctx, ordersOf(part))
	if err != nil {
		return nil, err
	}
	out := make([]consumers.Result, len(part))
	for i, d := range part {
		out[i] = settle(pays[orderOf(d)], d, met[d], answers)
	}
	return out, saveChanged(ctx, tx, pays, part)
}

// settle stores what a delivery's calls came to and answers by what the rows then say.
func settle(pay *domain.Payment, d *consumers.Delivery, met domain.Begin, answers map[stepKey]answer) consumers.Result {
	op, ok := opOf(d)
	if !ok {
		return misrouted(d)
	}
	if m, is := d.Data.(interface {
		GetAmountMinor() int64
		GetCurrency() string
	}); is && (m.GetAmountMinor() < 1 || !domain.ValidCurrency(m.GetCurrency())) {
		return consumers.Result{Err: poison("%s of %d %.8q is no amount to charge", d.Type, m.GetAmountMinor(), m.GetCurrency())}
	}
	a, called := answers[stepKey{orderOf(d), op}]
	if called && a.err == nil {
		pay.Settle(op, a.attempt, a.out)
	}
	switch {
	case met == domain.BeginEarly:
		return consumers.Result{Err: errEarly}
	case met == domain.BeginLapsed:
		return consumers.Result{} // the saga's own deadline has undone the order, or will
	case pay.Open(op) && a.err != nil:
		return consumers.Result{Err: a.err}
	case pay.Open(op):
		return consumers.Result{Err: errOvertaken}
	}
	return paymentReply(pay, d, op)
}

func paymentReply(pay *domain.Payment, d *consumers.Delivery, op domain.PaymentOp) consumers.Result {
	done, code := pay.Answer(op)
	switch {
	case op == domain.Authorize && done:
		return reply(d, events.TPaymentAuthorized, &events.PaymentAuthorized{Ref: pay.Ref()})
	case op == domain.Authorize:
		return reply(d, events.TPaymentDeclined, &events.PaymentDeclined{Code: code})
	case done:
		return reply(d, events.TPaymentCaptured, &events.PaymentCaptured{Ref: pay.Ref()})
	default:
		return reply(d, events.TPaymentCaptureFailed, &events.PaymentCaptureFailed{Code: code})
	}
}
