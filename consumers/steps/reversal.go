package steps

import (
	"context"
	"errors"
	"fmt"

	"ordersaga/consumers"
	"ordersaga/domain"
	"ordersaga/events"
)

// errEarly says that a capture came before its authorisation was settled.
var errEarly = errors.New("the authorisation is not settled yet")

// PaymentCompensation reverses: ReversePayment. Whatever the forward steps did, or are doing this moment, nothing is held or taken
// when it answers PaymentReversed, and nothing ever will be.
type PaymentCompensation[T PaymentTx] struct{ calls *GatewayCalls[T] }

// NewPaymentCompensation makes the handler of the compensation-payment group.
func NewPaymentCompensation[T PaymentTx](calls *GatewayCalls[T]) *PaymentCompensation[T] {
	return &PaymentCompensation[T]{calls}
}

// Foresee implements consumers.Foresight.
func (p *PaymentCompensation[T]) Foresee(tx T, batch []*consumers.Delivery) {
	tx.ForeseePayments(ordersOf(batch))
}

// Prepare closes the payments, so that nothing new acts on them, then finds out what there is to reverse and reverses it.
func (p *PaymentCompensation[T]) Prepare(ctx context.Context, batch []*consumers.Delivery) (consumers.Apply[T], error) {
	var due []domain.PaymentStep
	authorize := make(map[domain.OrderID]domain.PaymentStep, len(batch))
	err := p.calls.db.InTx(ctx, func(ctx context.Context, tx T) error {
		pays, err := tx.LockPayments(ctx, ordersOf(batch))
		if err != nil {
			return err
		}
		due = due[:0]
		clear(authorize)
		for _, d := range batch {
			id := orderOf(d)
			if _, ok := d.Data.(*events.ReversePayment); !ok || pays[id].BeginReverse(p.calls.now()) != domain.BeginCall {
				continue
			}
			if _, listed := authorize[id]; !listed {
				authorize[id] = *pays[id].Steps[domain.Authorize]
				due = append(due, *pays[id].Steps[domain.Reverse])
			}
		}
		return saveChanged(ctx, tx, pays, batch)
	})
	if err != nil {
		return nil, err
	}
	answers := p.calls.each(ctx, due, func(ctx context.Context, r *round[T], s domain.PaymentStep) answer {
		return r.reverse(ctx, s, authorize[s.Order])
	})
	if err := ctx.Err(); err != nil {
		return nil, err // stopping: the rows are started, the next delivery goes on from there
	}
	return func(ctx context.Context, tx T, part []*consumers.Delivery) ([]consumers.Result, error) {
		return p.apply(ctx, tx, part, answers)
	}, nil
}

func (p *PaymentCompensation[T]) apply(ctx context.Context, tx T, part []*consumers.Delivery, answers map[stepKey]answer) ([]consumers.Result, error) {
	pays, err := tx.LockPayments(ctx, ordersOf(part))
	if err != nil {
		return nil, err
	}
	out := make([]consumers.Result, len(part))
	for i, d := range part {
		if _, ok := d.Data.(*events.ReversePayment); !ok {
			out[i] = misrouted(d)
			continue
		}
		pay := pays[orderOf(d)]
		a, called := answers[stepKey{orderOf(d), domain.Reverse}]
		if called && a.err == nil {
			pay.FinishReverse(a.out)
		}
		switch {
		case pay.Ended():
			out[i] = reply(d, events.TPaymentReversed, &events.PaymentReversed{})
		case a.err != nil:
			out[i].Err = a.err
		default:
			out[i].Err = errOvertaken
		}
	}
	return out, saveChanged(ctx, tx, pays, part)
}

// reverse answers what the authorisation proved to be, once nothing of it is left.
func (r *round[T]) reverse(ctx context.Context, s, authorize domain.PaymentStep) answer {
	ref := authorize.Ref
	if authorize.State == domain.BarrierStarted {
		found, err := r.learn(ctx, authorize)
		if err != nil {
			return answer{err: err}
		}
		if found.Result == domain.PaymentRefused || found.Result == domain.PaymentUnknown || found.Result == domain.PaymentReversed {
			return answer{out: found}
		}
		ref = found.Ref
	}
	s.Ref = ref
	a := r.conclude(ctx, s)
	switch {
	case a.err != nil:
		return a
	case a.out.Result != domain.PaymentReversed && a.out.Result != domain.PaymentUnknown:
		return answer{err: fmt.Errorf("the gateway did not reverse payment %s: %s %s", ref, a.out.Result, a.out.Code)}
	}
	return answer{out: domain.PaymentOutcome{Result: domain.PaymentReversed, Ref: ref}}
}

// learn finds out what a started authorisation came to: the same request under the same key creates the intent or answers as it did
// the first time, so afterwards nothing of it can still be under way. It never draws a new key.
func (r *round[T]) learn(ctx context.Context, authorize domain.PaymentStep) (domain.PaymentOutcome, error) {
	if r.now().Sub(authorize.Begun) < r.cfg.KeyMemory {
		out, err := r.do(ctx, authorize.Request())
		if !replayed(err) && !isPoison(err) {
			return out, err
		}
		// A failure stored for good, or a request that the gateway will never take: nothing can come of this key any more.
	}
	out, _, err := r.lookUp(ctx, authorize)
	return out, err
}
