package steps_test

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"ordersaga/consumers"
	"ordersaga/consumers/steps"
	"ordersaga/domain"
	"ordersaga/events"
	"ordersaga/saga"
	"ordersaga/saga/sagatest"
)

// run delivers all that is in the outbox, until nothing is left, and answers the errors by message type.
func (w *world) run(t *testing.T) map[events.Name]error {
	t.Helper()
	handlers := map[events.Group]handler{
		events.GroupStock: w.stock, events.GroupPayment: w.payment, events.GroupCoordinator: w.replies,
		events.GroupCompensationStock: w.releases, events.GroupCompensationPayment: w.reversals,
	}
	errs := map[events.Name]error{}
	for {
		out := w.db.TakeOutbox()
		if len(out) == 0 {
			return errs
		}
		for _, e := range out {
			if ty, _ := events.TypeOf(e.Type); ty.Group != "" {
				d := &consumers.Delivery{Envelope: e, Group: ty.Group, Attempt: 1}
				if err := w.deliver(t, handlers[ty.Group], d)[0].Err; err != nil {
					errs[e.Type] = err
				}
			}
		}
	}
}

func TestOneOrderEndToEnd(t *testing.T) {
	w, s := newWorld(), &shop{prices: map[domain.SKU]int64{"tea": 450}}
	w.db.PutStock(domain.Stock{SKU: "tea", Available: 5})
	a := domain.NewOrderID()
	w.deliver(t, w.orders(s), place(a, nil))
	require.Empty(t, w.run(t))
	require.Equal(t, domain.Confirmed, w.db.Order(a).Status)
	in, _ := w.db.Saga(a)
	require.Equal(t, saga.Completed, in.State.Phase)
	require.Equal(t, sagatest.Ledger{Intents: 1, Captured: 900}, w.gw.Ledger(a))
	require.Equal(t, domain.Stock{SKU: "tea", Available: 3, Sold: 2}, w.db.Stock("tea"))
}

// TestF11_TimedOutStepIsUndone: the authorisation took effect but never answered. Its undo was commanded because it was commanded, so
// the hold does not stay.
func TestF11_TimedOutStepIsUndone(t *testing.T) {
	w, s := newWorld(), &shop{prices: map[domain.SKU]int64{"tea": 450}}
	w.db.PutStock(domain.Stock{SKU: "tea", Available: 5})
	a := domain.NewOrderID()
	w.gw.Fault = faults(domain.Authorize, sagatest.AnswerLost)
	w.deliver(t, w.orders(s), place(a, nil))
	require.Contains(t, w.run(t), events.TAuthorizePayment)
	require.EqualValues(t, 900, w.gw.Ledger(a).Held)
	w.clock.advance(15*time.Minute + time.Second)
	n, err := w.service.ExpireDue(t.Context(), 10)
	require.NoError(t, err)
	require.Equal(t, 1, n)
	require.Empty(t, w.run(t))
	require.Equal(t, domain.TimedOut, w.db.Order(a).Reason)
	in, _ := w.db.Saga(a)
	require.Equal(t, saga.Compensated, in.State.Phase)
	require.Equal(t, sagatest.Ledger{Intents: 1}, w.gw.Ledger(a))
	require.Equal(t, domain.Stock{SKU: "tea", Available: 5}, w.db.Stock("tea"))
}

// TestF12_FailingUndoIsSeenAndResolved: it fails over and over; the saga shows within a minute; a person's word ends it.
func TestF12_FailingUndoIsSeenAndResolved(t *testing.T) {
	w, s := newWorld(), &shop{prices: map[domain.SKU]int64{"tea": 450}}
	a := domain.NewOrderID() // no stock: refused while the payment is held
	w.gw.Fault = func(r domain.PaymentRequest) sagatest.Fault {
		if r.Op == domain.Reverse {
			return sagatest.Unreached
		}
		return sagatest.NoFault
	}
	w.deliver(t, w.orders(s), place(a, nil))
	require.Contains(t, w.run(t), events.TReversePayment)
	w.clock.advance(46 * time.Second)
	_, err := w.service.ExpireDue(t.Context(), 10)
	require.NoError(t, err)
	in, deadline := w.db.Saga(a)
	require.Equal(t, "no answer in time: ReversePayment", in.State.Stuck.Reason)
	require.Equal(t, w.clock.now(), in.State.Stuck.Since)
	require.False(t, deadline.IsZero(), "it is tried again")
	require.Contains(t, w.run(t), events.TReversePayment)

	_, changed, err := w.service.Resolve(t.Context(), saga.Decision{Order: a, Kind: saga.MarkDone, Name: "payment", Note: "cancelled in the dashboard", Actor: "ann"})
	require.NoError(t, err)
	require.True(t, changed)
	in, deadline = w.db.Saga(a)
	require.Equal(t, saga.Compensated, in.State.Phase)
	require.Nil(t, in.State.Stuck)
	require.True(t, deadline.IsZero())
	require.Len(t, w.db.AuditLog(), 1)
}

func TestStalledTellsOfCommandsOnly(t *testing.T) {
	a := domain.NewOrderID()
	d := reverse(a)
	d.Attempt = 7
	out := steps.Stalled(d, consumers.Verdict{Kind: consumers.Dead, Reason: "500"})
	require.Len(t, out, 1)
	st, ok := out[0].Data.(*events.StepStalled)
	require.True(t, ok)
	require.Equal(t, "ReversePayment", st.GetCommand())
	require.EqualValues(t, 7, st.GetAttempts())
	require.True(t, st.GetDead())
	require.Empty(t, steps.Stalled(place(a, nil), consumers.Verdict{}))
	require.Empty(t, steps.Stalled(delivery(a, events.TStockReserved, &events.StockReserved{}), consumers.Verdict{}))
}
