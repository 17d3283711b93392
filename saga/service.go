package saga

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"ordersaga/domain"
	"ordersaga/events"
)

// Service holds the use cases that own their transaction: cancel, expire, resolve.
type Service[T Tx] struct {
	DB    Store[T]
	Coord *Coordinator
}

// Cancel asks that an order does not end confirmed. A *CancelResult with CancelAccepted is a promise.
func (s *Service[T]) Cancel(ctx context.Context, r CancelRequest) (CancelResult, error) {
	var res CancelResult
	err := s.DB.InTx(ctx, func(ctx context.Context, tx T) error {
		out, err := s.Coord.Cancel(ctx, tx, []CancelRequest{r})
		if err != nil {
			return err
		}
		if res = out[0]; res.Err != nil {
			return res.Err
		}
		if r.Actor != "" {
			err = tx.Audit(ctx, []AuditEntry{{Actor: r.Actor, Action: "order.cancel", Target: r.Order.String(), Note: clipTo(r.Reason, maxNote)}})
			if err != nil {
				return err
			}
		}
		return tx.Emit(ctx, res.Out)
	})
	return res, err
}

// PaymentGateway is the name under which the payment gateway is reported as away.
const PaymentGateway = "payment gateway"

// ExpireDue feeds DeadlineExpired to up to limit sagas whose deadline has passed, and answers how many there were. While the payment
// gateway is known to be away, a saga that waits for it is held instead: its customer did nothing wrong.
//
// A saga that can't be advanced by this build does not keep the others waiting: it is left as it was and the error tells of it.
func (s *Service[T]) ExpireDue(ctx context.Context, limit int) (n int, err error) {
	return s.expire(ctx, 0, limit)
}

// expire is ExpireDue for deadlines that have passed no longer ago than within; 0: whenever.
func (s *Service[T]) expire(ctx context.Context, within time.Duration, limit int) (n int, err error) {
	var failed error
	err = s.DB.InTx(ctx, func(ctx context.Context, tx T) error {
		ids, err := tx.DueSagas(ctx, within, limit)
		if n = len(ids); err != nil || n == 0 {
			return err
		}
		away, err := tx.Away(ctx)
		if err != nil {
			return err
		}
		sagas, err := tx.LockSagas(ctx, ids)
		if err != nil {
			return err
		}
		facts := make([]Fact, 0, len(ids))
		for _, id := range ids {
			if in := sagas[id]; in != nil {
				facts = append(facts, Fact{Order: id, Input: s.deadline(in, away)})
			}
		}
		failed, err = s.advance(ctx, tx, facts)
		return err
	})
	return n, errors.Join(err, failed)
}

func (s *Service[T]) deadline(in *Instance, away map[string]bool) Input {
	if away[PaymentGateway] && in.State.Phase == Running && in.State.Status == domain.Pending && !in.State.Cancel {
		def, err := s.Coord.Defs.Of(in.State.Definition, in.State.DefVersion)
		if err == nil && slices.ContainsFunc(def.Waits(in.State), func(w string) bool {
			i := def.step(w)
			return i >= 0 && def.Steps[i].Participant == PaymentParticipant
		}) {
			return Input{Kind: DeadlineHeld, Reason: PaymentGateway + " is away"}
		}
	}
	return Input{Kind: DeadlineExpired}
}

// advance feeds facts and emits what follows. failed joins the errors of single sagas; err fails the transaction.
func (s *Service[T]) advance(ctx context.Context, tx T, facts []Fact) (failed, err error) {
	adv, err := s.Coord.Advance(ctx, tx, facts)
	if err != nil {
		return nil, err
	}
	var out []events.Envelope
	for i := range adv {
		if adv[i].Err != nil {
			failed = errors.Join(failed, fmt.Errorf("order %s: %w", facts[i].Order, adv[i].Err))
		}
		out = append(out, adv[i].Out...)
	}
	if len(out) == 0 {
		return failed, nil
	}
	return failed, tx.Emit(ctx, out)
}

// Decision is what an operator decides about a saga.
type Decision struct {
	Order domain.OrderID
	Kind  DecisionKind
	Name  string // MarkDone: the step or participant that the operator vouches for
	Note  string
	Actor string
}

// DecisionKind is a kind of operator's decision.
type DecisionKind string

// The decisions.
const (
	Retry    DecisionKind = "retry"     // command again what is outstanding, under new message ids
	MarkDone DecisionKind = "mark_done" // what is outstanding was done by hand
	Take     DecisionKind = "take"      // the operator looks after it
)

// Resolve applies an operator's decision and records it. It answers the state after it; unchanged says that the decision did not
// fit the saga's state. The error wraps ErrNoSaga if there is no such saga.
func (s *Service[T]) Resolve(ctx context.Context, d Decision) (state State, changed bool, err error) {
	err = s.DB.InTx(ctx, func(ctx context.Context, tx T) error {
		sagas, err := tx.LockSagas(ctx, []domain.OrderID{d.Order})
		if err != nil {
			return err
		}
		in := sagas[d.Order]
		if in == nil {
			return fmt.Errorf("order %s: %w", d.Order, ErrNoSaga)
		}
		input, err := s.decision(in, d)
		if err != nil {
			return err
		}
		adv, err := s.Coord.Advance(ctx, tx, []Fact{{Order: d.Order, Actor: d.Actor, Input: input}})
		if err != nil {
			return err
		}
		if adv[0].Err != nil {
			return adv[0].Err
		}
		state, changed = adv[0].State, adv[0].Changed
		if !changed {
			return nil
		}
		err = tx.Audit(ctx, []AuditEntry{{Actor: d.Actor, Action: "saga.resolve." + string(d.Kind), Target: d.Order.String(), Note: clipTo(d.Note, maxNote), Detail: fmt.Sprintf(`{"name":%q}`, d.Name)}})
		if err != nil || len(adv[0].Out) == 0 {
			return err
		}
		return tx.Emit(ctx, adv[0].Out)
	})
	return state, changed, err
}

func (s *Service[T]) decision(in *Instance, d Decision) (Input, error) {
	switch d.Kind {
	case Retry:
		return Input{Kind: OperatorRetry, Reason: clipTo(d.Note, maxNote)}, nil
	case Take:
		return Input{Kind: OperatorTook, Owner: d.Actor, Reason: clipTo(d.Note, maxNote)}, nil
	case MarkDone:
		def, err := s.Coord.Defs.Of(in.State.Definition, in.State.DefVersion)
		if err != nil {
			return Input{}, err
		}
		if def.step(d.Name) >= 0 {
			return Input{Kind: StepDone, Name: d.Name, Reason: clipTo(d.Note, maxNote)}, nil
		}
		if def.undo(Participant(d.Name)) >= 0 {
			return Input{Kind: UndoDone, Name: d.Name, Reason: clipTo(d.Note, maxNote)}, nil
		}
		return Input{}, &domain.Refusal{Reason: domain.Invalid, Field: "/name", Detail: fmt.Sprintf("the saga has no step or participant %q", d.Name)}
	}
	return Input{}, &domain.Refusal{Reason: domain.Invalid, Field: "/decision", Detail: fmt.Sprintf("unknown decision %q: retry, mark_done or take", d.Kind)}
}

// What a sweep looks at. While somebody's transaction stays open, the database can forget none of the deadlines that were: an hour's worth of
// them cost half a core when each sweep went over all. A deadline is in the future when it is set, so what was swept once has nothing new but from
// transactions that took long to commit; what even they could not explain is found once a minute.
const (
	sweepOverlap = 15 * time.Second
	sweepWhole   = time.Minute
)

// Sweep runs ExpireDue every interval until ctx ends; a full batch is followed by the next at once. report hears of errors.
func (s *Service[T]) Sweep(ctx context.Context, every time.Duration, report func(error)) error {
	const batch = 500
	t := time.NewTicker(every)
	defer t.Stop()
	var swept, whole time.Time // when the last sweep that came to its end began, and the last of them over all deadlines
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
		}
		began := time.Now()
		var within time.Duration
		if !swept.IsZero() && began.Sub(whole) < sweepWhole {
			within = began.Sub(swept) + sweepOverlap
		}
		for ctx.Err() == nil {
			n, err := s.expire(ctx, within, batch)
			if err != nil && ctx.Err() == nil {
				report(fmt.Errorf("sweep of deadlines: %w", err))
			}
			if err == nil && n < batch {
				swept = began
				if within == 0 {
					whole = began
				}
			}
			if err != nil || n < batch {
				break
			}
		}
	}
}
