package steps

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"ordersaga/consumers"
	"ordersaga/domain"
	"ordersaga/saga"
)

// PaymentConfig bounds the payment steps.
type PaymentConfig struct {
	Calls     int           // gateway calls at a time
	KeyMemory time.Duration // how long the gateway surely repeats what it answered to a key; older outcomes are looked up first
	AwayEvery time.Duration // how often a gateway that is away is reported, at most; under the minute that a report holds for
}

// DefaultPayment keeps an hour's distance from the 24 h that Stripe remembers keys for.
var DefaultPayment = PaymentConfig{Calls: 64, KeyMemory: 23 * time.Hour, AwayEvery: 15 * time.Second}

// GatewayCalls makes the calls of a batch, bounded, and finds out what an operation came to when the gateway does not say. It tells
// the sweeper of deadlines when the gateway is away. One may serve several handlers, which then share its bound.
type GatewayCalls[T PaymentTx] struct {
	db     consumers.Store[T]
	gw     Gateway
	now    saga.Clock
	cfg    PaymentConfig
	report func(error) // hears of an away report that could not be stored
	slots  chan struct{}

	mu     sync.Mutex
	away   bool // as last reported
	awayAt time.Time
}

// NewGatewayCalls makes one. now is database time.
func NewGatewayCalls[T PaymentTx](db consumers.Store[T], gw Gateway, now saga.Clock, cfg PaymentConfig, report func(error)) *GatewayCalls[T] {
	return &GatewayCalls[T]{db: db, gw: gw, now: now, cfg: cfg, report: report, slots: make(chan struct{}, cfg.Calls)}
}

// stepKey names a call of a batch: repeats in one batch share it.
type stepKey struct {
	order domain.OrderID
	op    domain.PaymentOp
}

// answer is what a step's calls came to.
type answer struct {
	out     domain.PaymentOutcome
	attempt int // the key that out belongs to
	err     error
}

// round is the calls of one batch.
type round[T PaymentTx] struct {
	*GatewayCalls[T]
	outage   atomic.Bool
	answered atomic.Bool
}

// each runs fn for every step, bounded, waits for all and reports whether the gateway was there.
func (g *GatewayCalls[T]) each(ctx context.Context, steps []domain.PaymentStep, fn func(context.Context, *round[T], domain.PaymentStep) answer) map[stepKey]answer {
	if len(steps) == 0 {
		return nil
	}
	r := &round[T]{GatewayCalls: g}
	got := make([]answer, len(steps))
	var wg sync.WaitGroup
	for i := range steps {
		select {
		case g.slots <- struct{}{}:
		case <-ctx.Done():
			got[i].err = ctx.Err()
			continue
		}
		wg.Go(func() {
			defer func() { <-g.slots }()
			got[i] = fn(ctx, r, steps[i])
		})
	}
	wg.Wait()
	g.tell(ctx, r.outage.Load(), r.answered.Load())
	out := make(map[stepKey]answer, len(steps))
	for i := range steps {
		out[stepKey{steps[i].Order, steps[i].Op}] = got[i]
	}
	return out
}

func (r *round[T]) do(ctx context.Context, q domain.PaymentRequest) (domain.PaymentOutcome, error) {
	out, err := r.gw.Do(ctx, q)
	var o interface{ Outage() string }
	switch {
	case err == nil:
		r.answered.Store(true)
	case errors.As(err, &o) && o.Outage() != "":
		r.outage.Store(true)
	}
	return out, err
}

// replayed reports an answer that the gateway stored for the key: asking again with it will never say anything else.
func replayed(err error) bool {
	var r interface{ Replayed() bool }
	return errors.As(err, &r) && r.Replayed()
}

func isPoison(err error) bool {
	var p interface{ Poison() bool }
	return errors.As(err, &p) && p.Poison()
}

// errOvertaken says that the row moved on while the gateway was asked: whoever moved it is in charge.
var errOvertaken = errors.New("the payment moved on meanwhile")

// conclude carries a started step to its outcome: the same request as ever, and a look-up where that can't tell. A new key is
// drawn, and stored before it is used, only when the look-up proved that the old one had no effect.
func (r *round[T]) conclude(ctx context.Context, s domain.PaymentStep) answer {
	if r.now().Sub(s.Begun) < r.cfg.KeyMemory {
		out, err := r.do(ctx, s.Request())
		if !replayed(err) && (err != nil || s.Op != domain.Reverse || out.Result == domain.PaymentReversed) {
			return answer{out, s.Attempt, err}
		}
		if err == nil { // a reversal that was refused: it may be for being reversed already
			return r.refusedReverse(ctx, s, out)
		}
	}
	out, settled, err := r.lookUp(ctx, s)
	if err != nil || settled {
		return answer{out, s.Attempt, err}
	}
	if s.Attempt, err = r.renew(ctx, s); err != nil {
		return answer{err: err}
	}
	out, err = r.do(ctx, s.Request())
	return answer{out, s.Attempt, err}
}

// refusedReverse looks whether there is anything left to reverse. If there is, the next attempt has a new key, as the gateway would
// repeat its refusal for this one.
func (r *round[T]) refusedReverse(ctx context.Context, s domain.PaymentStep, refused domain.PaymentOutcome) answer {
	out, settled, err := r.lookUp(ctx, s)
	if err != nil || settled {
		return answer{out, s.Attempt, err}
	}
	if _, err := r.renew(ctx, s); err != nil {
		return answer{err: err}
	}
	return answer{err: fmt.Errorf("the gateway refused to reverse payment %s: %s", s.Ref, refused.Code)}
}

// lookUp asks what became of a step. settled is false when it is proven that the step had no effect.
func (r *round[T]) lookUp(ctx context.Context, s domain.PaymentStep) (out domain.PaymentOutcome, settled bool, err error) {
	out, err = r.do(ctx, domain.PaymentRequest{Op: domain.LookUp, Order: s.Order, Amount: s.Amount, Ref: s.Ref})
	if err != nil {
		return out, false, err
	}
	switch s.Op {
	case domain.Authorize:
		return out, out.Result != domain.PaymentUnknown, nil
	case domain.Capture:
		return out, out.Result != domain.PaymentAuthorized, nil
	default:
		return out, out.Result == domain.PaymentReversed || out.Result == domain.PaymentUnknown, nil
	}
}

// renew stores the next key's number before it is used, and answers it.
func (r *round[T]) renew(ctx context.Context, s domain.PaymentStep) (int, error) {
	var ok bool
	order := []domain.OrderID{s.Order}
	err := r.db.InTx(ctx, func(ctx context.Context, tx T) error {
		if _, err := tx.LockPayments(ctx, order); err != nil {
			return err
		}
		// Looked at again under the lock: a statement of Postgres that had to wait for it does not see the row that whoever held it
		// has inserted, and that row may say that an undo has taken over. A new key then would charge behind the undo's back (F36).
		pays, err := tx.LockPayments(ctx, order)
		if err != nil {
			return err
		}
		if ok = pays[s.Order].Renew(s.Op, s.Attempt, r.now()); !ok {
			return nil
		}
		return tx.SavePayments(ctx, []*domain.Payment{pays[s.Order]})
	})
	if err == nil && !ok {
		err = errOvertaken
	}
	return s.Attempt + 1, err
}

// tell reports the gateway as away, again every AwayEvery while it is, and as back once.
func (g *GatewayCalls[T]) tell(ctx context.Context, outage, answered bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	now := g.now()
	switch {
	case outage && (!g.away || now.Sub(g.awayAt) >= g.cfg.AwayEvery):
	case !outage && answered && g.away:
	default:
		return
	}
	err := g.db.InTx(ctx, func(ctx context.Context, tx T) error { return tx.SetAway(ctx, saga.PaymentGateway, outage) })
	if err != nil { // told again with the next batch; the outcomes of this one must not be lost for it
		if g.report != nil {
			g.report(fmt.Errorf("report of the %s: %w", saga.PaymentGateway, err))
		}
		return
	}
	g.away, g.awayAt = outage, now
}
