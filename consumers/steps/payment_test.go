package steps_test

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
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

// faults plays one fault after the other for an operation, then none.
func faults(op domain.PaymentOp, fs ...sagatest.Fault) func(domain.PaymentRequest) sagatest.Fault {
	return func(r domain.PaymentRequest) sagatest.Fault {
		if r.Op != op || len(fs) == 0 {
			return sagatest.NoFault
		}
		f := fs[0]
		fs = fs[1:]
		return f
	}
}

// keysOf lists the operations and key numbers that reached the gateway, in order.
func keysOf(gw *sagatest.Gateway) (out []string) {
	for _, c := range gw.Calls() {
		if c.Op == domain.LookUp {
			out = append(out, "lookup")
			continue
		}
		out = append(out, fmt.Sprintf("%s/%d", c.Op, c.Attempt))
	}
	return out
}

func declined(order domain.OrderID) *consumers.Delivery {
	return delivery(order, events.TAuthorizePayment, &events.AuthorizePayment{AmountMinor: 900, Currency: "EUR", PaymentMethod: sagatest.MethodDeclined})
}

func TestAuthorizeCaptureReverse(t *testing.T) {
	w := newWorld()
	a, b, c := domain.NewOrderID(), domain.NewOrderID(), domain.NewOrderID()
	r := w.deliver(t, w.payment, authorize(a), declined(b), authorize(c))
	ref := answered[*events.PaymentAuthorized](t, r[0], events.TPaymentAuthorized).GetRef()
	require.NotEmpty(t, ref)
	require.Equal(t, "card_declined", answered[*events.PaymentDeclined](t, r[1], events.TPaymentDeclined).GetCode())
	require.Equal(t, sagatest.Ledger{Intents: 1, Held: 900}, w.gw.Ledger(a))

	r = w.deliver(t, w.payment, capture(a), capture(b))
	require.Equal(t, ref, answered[*events.PaymentCaptured](t, r[0], events.TPaymentCaptured).GetRef())
	require.Equal(t, "card_declined", answered[*events.PaymentCaptureFailed](t, r[1], events.TPaymentCaptureFailed).GetCode())
	require.Equal(t, sagatest.Ledger{Intents: 1, Captured: 900}, w.gw.Ledger(a))

	r = w.deliver(t, w.reversals, reverse(a), reverse(b), reverse(c))
	for i := range r {
		answered[*events.PaymentReversed](t, r[i], events.TPaymentReversed)
	}
	require.Equal(t, sagatest.Ledger{Intents: 1, Refunded: 900}, w.gw.Ledger(a), "captured: refunded")
	require.Equal(t, sagatest.Ledger{Intents: 1}, w.gw.Ledger(c), "held: cancelled")
	require.Equal(t, domain.BarrierUndone, w.db.Payment(a).State(domain.Capture))
}

func TestPaymentRepeatsAnswerAsTheFirstDid(t *testing.T) {
	w := newWorld()
	a, b := domain.NewOrderID(), domain.NewOrderID()
	w.deliver(t, w.payment, authorize(a), declined(b))
	w.deliver(t, w.payment, capture(a))
	calls := len(w.gw.Calls())
	r := w.deliver(t, w.payment, authorize(a), declined(b), capture(a), authorize(b))
	answered[*events.PaymentAuthorized](t, r[0], events.TPaymentAuthorized)
	answered[*events.PaymentDeclined](t, r[1], events.TPaymentDeclined)
	answered[*events.PaymentCaptured](t, r[2], events.TPaymentCaptured)
	answered[*events.PaymentDeclined](t, r[3], events.TPaymentDeclined)
	require.Len(t, w.gw.Calls(), calls, "nothing is asked twice")
	w.deliver(t, w.reversals, reverse(a))
	calls = len(w.gw.Calls())
	r = w.deliver(t, w.reversals, reverse(a), reverse(a))
	answered[*events.PaymentReversed](t, r[0], events.TPaymentReversed)
	answered[*events.PaymentReversed](t, r[1], events.TPaymentReversed)
	require.Len(t, w.gw.Calls(), calls)
}

func TestF31_PaymentTwiceInOneBatchIsOneCall(t *testing.T) {
	w := newWorld()
	a := domain.NewOrderID()
	d := authorize(a)
	r := w.deliver(t, w.payment, d, d, authorize(a))
	for i := range r {
		answered[*events.PaymentAuthorized](t, r[i], events.TPaymentAuthorized)
	}
	require.Equal(t, []string{"authorize/1"}, keysOf(w.gw))
	r = w.deliver(t, w.reversals, reverse(a), reverse(a))
	answered[*events.PaymentReversed](t, r[1], events.TPaymentReversed)
	require.Equal(t, []string{"authorize/1", "reverse/1"}, keysOf(w.gw))
}

func TestF10_ReverseBeforeAuthorize(t *testing.T) {
	w := newWorld()
	a := domain.NewOrderID()
	r := w.deliver(t, w.reversals, reverse(a))
	answered[*events.PaymentReversed](t, r[0], events.TPaymentReversed)
	r = w.deliver(t, w.payment, authorize(a), capture(a))
	require.Equal(t, "reversed", answered[*events.PaymentDeclined](t, r[0], events.TPaymentDeclined).GetCode())
	answered[*events.PaymentCaptureFailed](t, r[1], events.TPaymentCaptureFailed)
	require.Empty(t, w.gw.Calls(), "nothing is ever asked of the gateway")
	require.Equal(t, domain.BarrierTombstone, w.db.Payment(a).State(domain.Authorize))
}

// TestF14_ReplayAfterMonthsMeetsTheBarrier: long after every inbox row is gone.
func TestF14_ReplayAfterMonthsMeetsTheBarrier(t *testing.T) {
	w := newWorld()
	w.db.PutStock(domain.Stock{SKU: "tea", Available: 5})
	a, b := domain.NewOrderID(), domain.NewOrderID()
	auth, take, undo := authorize(a), capture(a), reverse(a)
	hold, back := reserve(b, line("tea", 2)), release(b)
	w.deliver(t, w.payment, auth)
	w.deliver(t, w.payment, take)
	w.deliver(t, w.reversals, undo)
	w.deliver(t, w.stock, hold)
	w.deliver(t, w.releases, back)
	calls := len(w.gw.Calls())
	w.clock.advance(200 * 24 * time.Hour)
	w.deliver(t, w.payment, auth)
	w.deliver(t, w.payment, take)
	w.deliver(t, w.reversals, undo)
	w.deliver(t, w.stock, hold)
	w.deliver(t, w.releases, back)
	require.Len(t, w.gw.Calls(), calls)
	require.Equal(t, sagatest.Ledger{Intents: 1, Refunded: 900}, w.gw.Ledger(a))
	require.Equal(t, domain.Stock{SKU: "tea", Available: 5}, w.db.Stock("tea"))
}

// TestF36_UndoBetweenBarrierAndCharge: the undo comes after the row was read and before the charge lands.
func TestF36_UndoBetweenBarrierAndCharge(t *testing.T) {
	for name, op := range map[string]domain.PaymentOp{"authorize": domain.Authorize, "capture": domain.Capture} {
		t.Run(name, func(t *testing.T) {
			w := newWorld()
			a := domain.NewOrderID()
			d := authorize(a)
			if op == domain.Capture {
				w.deliver(t, w.payment, d)
				d = capture(a)
			}
			var once atomic.Bool
			w.gw.Before = func(r domain.PaymentRequest) {
				if r.Op == op && once.CompareAndSwap(false, true) { // the forward step's call hangs while the undo runs from start to end
					res := w.deliver(t, w.reversals, reverse(a))
					answered[*events.PaymentReversed](t, res[0], events.TPaymentReversed)
				}
			}
			r := w.deliver(t, w.payment, d)
			require.NoError(t, r[0].Err)
			require.NotContains(t, []events.Name{events.TPaymentAuthorized, events.TPaymentCaptured}, r[0].Out[0].Type)
			l := w.gw.Ledger(a)
			require.Zero(t, l.Held+l.Captured, "no money stays: %+v", l)
			require.True(t, w.db.Payment(a).Ended())
		})
	}
}

// TestF36_StartedIsWrittenBeforeTheCall: a process that dies during the call leaves the row.
func TestF36_StartedIsWrittenBeforeTheCall(t *testing.T) {
	w := newWorld()
	a := domain.NewOrderID()
	w.gw.Before = func(domain.PaymentRequest) {
		s := w.db.Payment(a).Steps[domain.Authorize]
		require.NotNil(t, s)
		require.Equal(t, domain.BarrierStarted, s.State)
		require.Equal(t, domain.Money{Minor: 900, Currency: "EUR"}, s.Amount)
		require.Equal(t, "pm_card_visa", s.Method)
		require.Equal(t, w.clock.now(), s.Begun)
	}
	_, err := w.payment.Prepare(t.Context(), []*consumers.Delivery{authorize(a)}) // and then nothing: it died
	require.NoError(t, err)
	w.gw.Before = nil
	r := w.deliver(t, w.payment, authorize(a))
	answered[*events.PaymentAuthorized](t, r[0], events.TPaymentAuthorized)
	require.Equal(t, []string{"authorize/1", "authorize/1"}, keysOf(w.gw), "the same key, so the same hold")
	require.Equal(t, 1, w.gw.Ledger(a).Intents)
}

// TestF13_OutcomeUnknown: the call took effect, the answer was lost. The same key again tells.
func TestF13_OutcomeUnknown(t *testing.T) {
	w := newWorld()
	a := domain.NewOrderID()
	w.gw.Fault = faults(domain.Authorize, sagatest.AnswerLost)
	good := domain.NewOrderID()
	r := w.deliver(t, w.payment, authorize(a), authorize(good))
	failed := 0
	for i := range r { // which of the two the fault hit is the scheduler's choice
		if r[i].Err != nil {
			failed++
			require.False(t, isPoison(r[i].Err))
		}
	}
	require.Equal(t, 1, failed, "one fails, the other goes on")
	r = w.deliver(t, w.payment, authorize(a), authorize(good))
	answered[*events.PaymentAuthorized](t, r[0], events.TPaymentAuthorized)
	answered[*events.PaymentAuthorized](t, r[1], events.TPaymentAuthorized)
	require.Equal(t, 1, w.gw.Ledger(a).Intents)
	require.Equal(t, 1, w.gw.Ledger(good).Intents)
}

// TestF13_UndoOfAnUnknownOutcome: the undo learns the intent with the same key, and cancels it.
func TestF13_UndoOfAnUnknownOutcome(t *testing.T) {
	for name, f := range map[string]sagatest.Fault{"took effect": sagatest.AnswerLost, "never arrived": sagatest.Unreached} {
		t.Run(name, func(t *testing.T) {
			w := newWorld()
			a := domain.NewOrderID()
			w.gw.Fault = faults(domain.Authorize, f)
			require.Error(t, w.deliver(t, w.payment, authorize(a))[0].Err)
			r := w.deliver(t, w.reversals, reverse(a))
			answered[*events.PaymentReversed](t, r[0], events.TPaymentReversed)
			require.Equal(t, []string{"authorize/1", "authorize/1", "reverse/1"}, keysOf(w.gw))
			require.Equal(t, sagatest.Ledger{Intents: 1}, w.gw.Ledger(a))
			r = w.deliver(t, w.payment, authorize(a)) // the retry of the forward step comes late
			answered[*events.PaymentDeclined](t, r[0], events.TPaymentDeclined)
			require.Equal(t, 1, w.gw.Ledger(a).Intents)
		})
	}
}

// TestF13_KeysAreForgottenAfterADay: past the gateway's memory the same key would act again, so a look-up comes first.
func TestF13_KeysAreForgottenAfterADay(t *testing.T) {
	day := 25 * time.Hour
	t.Run("authorize took effect", func(t *testing.T) {
		w := newWorld()
		a := domain.NewOrderID()
		w.gw.Fault = faults(domain.Authorize, sagatest.AnswerLost)
		require.Error(t, w.deliver(t, w.payment, authorize(a))[0].Err)
		w.clock.advance(day)
		r := w.deliver(t, w.payment, authorize(a))
		answered[*events.PaymentAuthorized](t, r[0], events.TPaymentAuthorized)
		require.Equal(t, []string{"authorize/1", "lookup"}, keysOf(w.gw))
		require.Equal(t, sagatest.Ledger{Intents: 1, Held: 900}, w.gw.Ledger(a))
	})
	t.Run("authorize had no effect", func(t *testing.T) {
		w := newWorld()
		a := domain.NewOrderID()
		w.gw.Fault = faults(domain.Authorize, sagatest.Unreached)
		require.Error(t, w.deliver(t, w.payment, authorize(a))[0].Err)
		w.clock.advance(day)
		r := w.deliver(t, w.payment, authorize(a))
		answered[*events.PaymentAuthorized](t, r[0], events.TPaymentAuthorized)
		require.Equal(t, []string{"authorize/1", "lookup", "authorize/2"}, keysOf(w.gw))
		require.Equal(t, 2, w.db.Payment(a).Steps[domain.Authorize].Attempt)
	})
	t.Run("capture took effect", func(t *testing.T) {
		w := newWorld()
		a := domain.NewOrderID()
		w.deliver(t, w.payment, authorize(a))
		w.gw.Fault = faults(domain.Capture, sagatest.AnswerLost)
		require.Error(t, w.deliver(t, w.payment, capture(a))[0].Err)
		w.clock.advance(day)
		r := w.deliver(t, w.payment, capture(a))
		answered[*events.PaymentCaptured](t, r[0], events.TPaymentCaptured)
		require.Equal(t, []string{"authorize/1", "capture/1", "lookup"}, keysOf(w.gw))
	})
	t.Run("capture had no effect and the hold is gone", func(t *testing.T) {
		w := newWorld()
		a := domain.NewOrderID()
		w.deliver(t, w.payment, authorize(a))
		w.gw.Fault = faults(domain.Capture, sagatest.Unreached)
		require.Error(t, w.deliver(t, w.payment, capture(a))[0].Err)
		w.clock.advance(8 * day)
		w.gw.CancelAtGateway(a)
		r := w.deliver(t, w.payment, capture(a))
		require.Equal(t, "reversed", answered[*events.PaymentCaptureFailed](t, r[0], events.TPaymentCaptureFailed).GetCode())
	})
	t.Run("reverse took effect", func(t *testing.T) {
		w := newWorld()
		a := domain.NewOrderID()
		w.deliver(t, w.payment, authorize(a))
		w.gw.Fault = faults(domain.Reverse, sagatest.AnswerLost)
		require.Error(t, w.deliver(t, w.reversals, reverse(a))[0].Err)
		w.clock.advance(day)
		r := w.deliver(t, w.reversals, reverse(a))
		answered[*events.PaymentReversed](t, r[0], events.TPaymentReversed)
		require.Equal(t, []string{"authorize/1", "reverse/1", "lookup"}, keysOf(w.gw))
	})
	t.Run("undo of an authorisation that never arrived", func(t *testing.T) {
		w := newWorld()
		a := domain.NewOrderID()
		w.gw.Fault = faults(domain.Authorize, sagatest.Unreached)
		require.Error(t, w.deliver(t, w.payment, authorize(a))[0].Err)
		w.clock.advance(day)
		r := w.deliver(t, w.reversals, reverse(a))
		answered[*events.PaymentReversed](t, r[0], events.TPaymentReversed)
		require.Equal(t, []string{"authorize/1", "lookup"}, keysOf(w.gw), "proven: there is nothing, so nothing is called")
		require.Equal(t, domain.BarrierTombstone, w.db.Payment(a).State(domain.Authorize))
	})
}

// TestF37_StoredServerErrorIsRepeated: the gateway repeats its 500 for the key. Only a look-up that proves that nothing took effect
// allows a new one.
func TestF37_StoredServerErrorIsRepeated(t *testing.T) {
	t.Run("no effect", func(t *testing.T) {
		w := newWorld()
		a := domain.NewOrderID()
		w.gw.Fault = faults(domain.Authorize, sagatest.StoredFailure)
		require.Error(t, w.deliver(t, w.payment, authorize(a))[0].Err)
		w.gw.Before = func(r domain.PaymentRequest) {
			if r.Attempt == 2 {
				require.Equal(t, 2, w.db.Payment(a).Steps[domain.Authorize].Attempt, "the number is stored before the key is used")
			}
		}
		r := w.deliver(t, w.payment, authorize(a))
		answered[*events.PaymentAuthorized](t, r[0], events.TPaymentAuthorized)
		require.Equal(t, []string{"authorize/1", "authorize/1", "lookup", "authorize/2"}, keysOf(w.gw))
		require.Equal(t, 1, w.gw.Ledger(a).Intents)
	})
	t.Run("it did take effect", func(t *testing.T) {
		w := newWorld()
		a := domain.NewOrderID()
		w.gw.Fault = faults(domain.Authorize, sagatest.StoredFailHeld)
		require.Error(t, w.deliver(t, w.payment, authorize(a))[0].Err)
		r := w.deliver(t, w.payment, authorize(a))
		answered[*events.PaymentAuthorized](t, r[0], events.TPaymentAuthorized)
		require.Equal(t, []string{"authorize/1", "authorize/1", "lookup"}, keysOf(w.gw))
		require.Equal(t, sagatest.Ledger{Intents: 1, Held: 900}, w.gw.Ledger(a))
	})
	t.Run("capture", func(t *testing.T) {
		w := newWorld()
		a, b := domain.NewOrderID(), domain.NewOrderID()
		w.deliver(t, w.payment, authorize(a), authorize(b))
		w.gw.Fault = faults(domain.Capture, sagatest.StoredFailure)
		require.Error(t, w.deliver(t, w.payment, capture(a))[0].Err)
		w.gw.Fault = faults(domain.Capture, sagatest.StoredFailHeld)
		require.Error(t, w.deliver(t, w.payment, capture(b))[0].Err)
		w.gw.Fault = nil
		r := w.deliver(t, w.payment, capture(a), capture(b))
		answered[*events.PaymentCaptured](t, r[0], events.TPaymentCaptured)
		answered[*events.PaymentCaptured](t, r[1], events.TPaymentCaptured)
		require.Equal(t, 2, w.db.Payment(a).Steps[domain.Capture].Attempt)
		require.Equal(t, 1, w.db.Payment(b).Steps[domain.Capture].Attempt)
		require.EqualValues(t, 900, w.gw.Ledger(a).Captured)
		require.EqualValues(t, 900, w.gw.Ledger(b).Captured)
	})
	t.Run("reverse", func(t *testing.T) {
		for _, f := range []sagatest.Fault{sagatest.StoredFailure, sagatest.StoredFailHeld} {
			w := newWorld()
			a := domain.NewOrderID()
			w.deliver(t, w.payment, authorize(a))
			w.gw.Fault = faults(domain.Reverse, f)
			require.Error(t, w.deliver(t, w.reversals, reverse(a))[0].Err)
			r := w.deliver(t, w.reversals, reverse(a))
			answered[*events.PaymentReversed](t, r[0], events.TPaymentReversed)
			require.Zero(t, w.gw.Ledger(a).Held)
		}
	})
	t.Run("undo of a stored failure", func(t *testing.T) {
		for f, want := range map[sagatest.Fault]domain.BarrierState{sagatest.StoredFailure: domain.BarrierTombstone, sagatest.StoredFailHeld: domain.BarrierUndone} {
			w := newWorld()
			a := domain.NewOrderID()
			w.gw.Fault = faults(domain.Authorize, f)
			require.Error(t, w.deliver(t, w.payment, authorize(a))[0].Err)
			r := w.deliver(t, w.reversals, reverse(a))
			answered[*events.PaymentReversed](t, r[0], events.TPaymentReversed)
			require.Equal(t, want, w.db.Payment(a).State(domain.Authorize))
			require.Zero(t, w.gw.Ledger(a).Held)
			for _, c := range w.gw.Calls() {
				require.False(t, c.Op == domain.Authorize && c.Attempt > 1, "an undo draws no new key to charge with")
			}
		}
	})
}

// TestF37_UndoBetweenProofAndNewKey: the undo takes over while the forward step looks up; then nobody may draw a new key.
func TestF37_UndoBetweenProofAndNewKey(t *testing.T) {
	w := newWorld()
	a := domain.NewOrderID()
	w.gw.Fault = faults(domain.Authorize, sagatest.StoredFailure)
	require.Error(t, w.deliver(t, w.payment, authorize(a))[0].Err)
	var once atomic.Bool
	w.gw.Before = func(r domain.PaymentRequest) {
		if r.Op == domain.LookUp && once.CompareAndSwap(false, true) {
			answered[*events.PaymentReversed](t, w.deliver(t, w.reversals, reverse(a))[0], events.TPaymentReversed)
		}
	}
	r := w.deliver(t, w.payment, authorize(a))
	answered[*events.PaymentDeclined](t, r[0], events.TPaymentDeclined)
	require.Zero(t, w.gw.Ledger(a).Intents)
	require.NotContains(t, keysOf(w.gw), "authorize/2")
}

func TestCaptureOutOfPlace(t *testing.T) {
	w := newWorld()
	a := domain.NewOrderID()
	r := w.deliver(t, w.payment, capture(a))
	require.Error(t, r[0].Err, "there is no authorisation yet: later")
	require.False(t, isPoison(r[0].Err))
	require.Empty(t, w.gw.Calls())
	w.gw.Fault = faults(domain.Authorize, sagatest.AnswerLost)
	r = w.deliver(t, w.payment, authorize(a), capture(a))
	require.Error(t, r[1].Err, "it is not settled")
	require.NotContains(t, keysOf(w.gw), "capture/1")
	w.deliver(t, w.payment, authorize(a))
	r = w.deliver(t, w.payment, capture(a))
	answered[*events.PaymentCaptured](t, r[0], events.TPaymentCaptured)
}

func TestExpiredCommandsSettleWithoutCalling(t *testing.T) {
	w := newWorld()
	a, b, c := domain.NewOrderID(), domain.NewOrderID(), domain.NewOrderID()
	until := w.clock.now().Add(time.Minute).UnixMilli()
	late := func(id domain.OrderID) *consumers.Delivery {
		return delivery(id, events.TAuthorizePayment, &events.AuthorizePayment{AmountMinor: 900, Currency: "EUR", PaymentMethod: "pm", ExpiresAtMs: until})
	}
	lateCapture := func(id domain.OrderID) *consumers.Delivery {
		return delivery(id, events.TCapturePayment, &events.CapturePayment{AmountMinor: 900, Currency: "EUR", ExpiresAtMs: until})
	}
	w.deliver(t, w.payment, late(a), late(b))
	w.deliver(t, w.payment, lateCapture(a))
	calls := len(w.gw.Calls())
	w.clock.advance(time.Minute + time.Millisecond)
	r := w.deliver(t, w.payment, late(c), late(a), lateCapture(a), lateCapture(b))
	require.Equal(t, consumers.Result{}, r[0])
	answered[*events.PaymentAuthorized](t, r[1], events.TPaymentAuthorized)
	answered[*events.PaymentCaptured](t, r[2], events.TPaymentCaptured)
	require.Equal(t, consumers.Result{}, r[3])
	require.Len(t, w.gw.Calls(), calls)
	require.Empty(t, w.db.Payment(c).Steps)
}

func TestPaymentPoison(t *testing.T) {
	w := newWorld()
	a := domain.NewOrderID()
	r := w.deliver(t, w.payment,
		delivery(domain.NewOrderID(), events.TAuthorizePayment, &events.AuthorizePayment{AmountMinor: -1, Currency: "EUR", PaymentMethod: "pm"}),
		delivery(domain.NewOrderID(), events.TCapturePayment, &events.CapturePayment{AmountMinor: 5, Currency: "euro"}),
		reverse(domain.NewOrderID()),
		authorize(a))
	for i := range 3 {
		require.True(t, isPoison(r[i].Err), "%v", r[i].Err)
	}
	answered[*events.PaymentAuthorized](t, r[3], events.TPaymentAuthorized)
	require.True(t, isPoison(w.deliver(t, w.reversals, capture(a))[0].Err))
	require.Equal(t, []string{"authorize/1"}, keysOf(w.gw))
}

// TestF12_RefusedReversalIsNoEnd: it is an error, tried again under a new key, and answered only once the money is back.
func TestF12_RefusedReversalIsNoEnd(t *testing.T) {
	w := newWorld()
	a := domain.NewOrderID()
	w.deliver(t, w.payment, authorize(a))
	refusing := &refusingGateway{Gateway: w.gw}
	calls := steps.NewGatewayCalls(consumers.Store[tx](w.db), refusing, w.clock.now, steps.DefaultPayment, nil)
	h := steps.NewPaymentCompensation(calls)
	for n := 1; n <= 3; n++ {
		r := w.deliver(t, h, reverse(a))
		require.ErrorContains(t, r[0].Err, "disputed")
		require.False(t, isPoison(r[0].Err))
		require.Equal(t, n+1, w.db.Payment(a).Steps[domain.Reverse].Attempt)
	}
	refusing.stop = true
	r := w.deliver(t, h, reverse(a))
	answered[*events.PaymentReversed](t, r[0], events.TPaymentReversed)
	require.Equal(t, "reverse/4", keysOf(w.gw)[len(keysOf(w.gw))-1])
}

// refusingGateway refuses every reversal until it stops doing so.
type refusingGateway struct {
	*sagatest.Gateway
	stop bool
}

func (g *refusingGateway) Do(ctx context.Context, r domain.PaymentRequest) (domain.PaymentOutcome, error) {
	if r.Op == domain.Reverse && !g.stop {
		return domain.PaymentOutcome{Result: domain.PaymentRefused, Ref: r.Ref, Code: "disputed"}, nil
	}
	return g.Gateway.Do(ctx, r)
}

// poisonGateway will not take a request, whoever asks.
type poisonGateway struct{ *sagatest.Gateway }

func (g *poisonGateway) Do(ctx context.Context, r domain.PaymentRequest) (domain.PaymentOutcome, error) {
	if r.Op == domain.Authorize {
		return domain.PaymentOutcome{}, &sagatest.GatewayError{Msg: "400 no such payment method", Bad: true}
	}
	return g.Gateway.Do(ctx, r)
}

// TestReverseOfARequestThatTheGatewayNeverTakes: the forward step is a dead letter; its undo must not become one too.
func TestReverseOfARequestThatTheGatewayNeverTakes(t *testing.T) {
	w := newWorld()
	a := domain.NewOrderID()
	calls := steps.NewGatewayCalls(consumers.Store[tx](w.db), &poisonGateway{w.gw}, w.clock.now, steps.DefaultPayment, nil)
	r := w.deliver(t, steps.NewPayment(calls), authorize(a))
	require.True(t, isPoison(r[0].Err))
	r = w.deliver(t, steps.NewPaymentCompensation(calls), reverse(a))
	answered[*events.PaymentReversed](t, r[0], events.TPaymentReversed)
	require.Equal(t, domain.BarrierTombstone, w.db.Payment(a).State(domain.Authorize))
}

// TestF7_AwayIsToldOnceInAWhile: an outage goes through as such, and the sweeper of deadlines hears of it.
func TestF7_AwayIsToldOnceInAWhile(t *testing.T) {
	w := newWorld()
	w.gw.Fault = func(domain.PaymentRequest) sagatest.Fault { return sagatest.GatewayAway }
	a, b := domain.NewOrderID(), domain.NewOrderID()
	commits := func(fn func()) int {
		before := w.db.Commits()
		fn()
		return w.db.Commits() - before
	}
	outage := func() {
		for _, r := range w.deliver(t, w.payment, authorize(a), authorize(b)) {
			var o interface{ Outage() string }
			require.ErrorAs(t, r.Err, &o)
			require.Equal(t, saga.PaymentGateway, o.Outage())
		}
	}
	require.Equal(t, 3, commits(outage), "started, away, outcomes")
	require.True(t, w.db.IsAway(saga.PaymentGateway))
	require.Equal(t, 2, commits(outage), "not told again so soon")
	w.clock.advance(20 * time.Second)
	require.Equal(t, 3, commits(outage))
	w.clock.advance(50 * time.Second)
	require.True(t, w.db.IsAway(saga.PaymentGateway), "the second report holds still")

	w.gw.Fault = nil
	w.deliver(t, w.payment, authorize(a))
	require.False(t, w.db.IsAway(saga.PaymentGateway))
	require.Equal(t, 2, commits(func() { w.deliver(t, w.payment, authorize(b)) }), "being there is not told")
}

func TestAwayReportThatCannotBeStored(t *testing.T) {
	w := newWorld()
	var heard []error
	calls := steps.NewGatewayCalls(consumers.Store[tx](w.db), w.gw, w.clock.now, steps.DefaultPayment, func(err error) { heard = append(heard, err) })
	a := domain.NewOrderID()
	w.gw.Fault = func(domain.PaymentRequest) sagatest.Fault {
		w.db.BeforeCommit = func(*sagatest.Tx) error { w.db.BeforeCommit = nil; return errors.New("disk full") }
		return sagatest.GatewayAway
	}
	r := w.deliver(t, steps.NewPayment(calls), authorize(a))
	require.Error(t, r[0].Err)
	require.Len(t, heard, 1)
	require.ErrorContains(t, heard[0], "disk full")
	require.False(t, w.db.IsAway(saga.PaymentGateway))
}

func TestCallsAreBoundedAndConcurrent(t *testing.T) {
	w := newWorld()
	cfg := steps.DefaultPayment
	cfg.Calls = 3
	calls := steps.NewGatewayCalls(consumers.Store[tx](w.db), w.gw, w.clock.now, cfg, nil)
	meet := make(chan struct{})
	var here atomic.Int32
	w.gw.Before = func(domain.PaymentRequest) {
		if here.Add(1) == 3 {
			close(meet)
		}
		<-meet // three at a time, or this hangs
	}
	var batch []*consumers.Delivery
	for range 12 {
		batch = append(batch, authorize(domain.NewOrderID()))
	}
	for _, r := range w.deliver(t, steps.NewPayment(calls), batch...) {
		require.NoError(t, r.Err)
	}
	require.Equal(t, 3, w.gw.MostAtOnce())
}

func TestPrepareStopsWithItsContext(t *testing.T) {
	w := newWorld()
	ctx, cancel := context.WithCancel(t.Context())
	w.gw.Before = func(domain.PaymentRequest) { cancel() }
	a := domain.NewOrderID()
	_, err := w.payment.Prepare(ctx, []*consumers.Delivery{authorize(a)})
	require.ErrorIs(t, err, context.Canceled)
	require.Equal(t, domain.BarrierStarted, w.db.Payment(a).State(domain.Authorize), "the next delivery goes on from there")
	w.gw.Before = nil
	answered[*events.PaymentAuthorized](t, w.deliver(t, w.payment, authorize(a))[0], events.TPaymentAuthorized)
	require.Equal(t, 1, w.gw.Ledger(a).Intents)
}

// TestOutcomesSurviveASplitOfTheBatch: the calls are made once, however the runtime then applies what came of them.
func TestOutcomesSurviveASplitOfTheBatch(t *testing.T) {
	w := newWorld()
	batch := []*consumers.Delivery{authorize(domain.NewOrderID()), declined(domain.NewOrderID()), authorize(domain.NewOrderID())}
	apply, err := w.payment.Prepare(t.Context(), batch)
	require.NoError(t, err)
	w.db.BeforeCommit = func(*sagatest.Tx) error { w.db.BeforeCommit = nil; return &sagatest.DataError{Msg: "22021"} }
	_, err = w.apply(t.Context(), apply, batch)
	require.Error(t, err)
	for i, want := range []events.Name{events.TPaymentAuthorized, events.TPaymentDeclined, events.TPaymentAuthorized} {
		res, err := w.apply(t.Context(), apply, batch[i:i+1])
		require.NoError(t, err)
		require.Equal(t, want, res[0].Out[0].Type)
	}
	require.Len(t, w.gw.Calls(), 3)
}

// committed shows rows as Postgres does at READ COMMITTED: a statement that waited for a lock does not see the row that its holder
// inserted; the next statement does.
type committed struct {
	*sagatest.Tx
	waited *bool
}

func (c committed) LockPayments(ctx context.Context, ids []domain.OrderID) (map[domain.OrderID]*domain.Payment, error) {
	pays, err := c.Tx.LockPayments(ctx, ids)
	if !*c.waited {
		*c.waited = true
		for _, p := range pays {
			delete(p.Steps, domain.Reverse)
		}
	}
	return pays, err
}

type committedStore struct{ *sagatest.Store }

func (s committedStore) InTx(ctx context.Context, fn func(context.Context, committed) error) error {
	return s.Store.InTx(ctx, func(ctx context.Context, tx *sagatest.Tx) error {
		var waited bool
		return fn(ctx, committed{tx, &waited})
	})
}

// TestF36_NewKeyLooksAgainUnderItsLock: the undo inserted its row while the new key waited for the lock.
func TestF36_NewKeyLooksAgainUnderItsLock(t *testing.T) {
	w := newWorld()
	a := domain.NewOrderID()
	w.gw.Fault = faults(domain.Authorize, sagatest.StoredFailure)
	require.Error(t, w.deliver(t, w.payment, authorize(a))[0].Err)
	var once atomic.Bool
	w.gw.Before = func(r domain.PaymentRequest) {
		if r.Op == domain.LookUp && once.CompareAndSwap(false, true) {
			_, err := w.reversals.Prepare(t.Context(), []*consumers.Delivery{reverse(a)}) // has proven by now that there is nothing
			require.NoError(t, err)
		}
	}
	calls := steps.NewGatewayCalls(consumers.Store[committed](committedStore{w.db}), w.gw, w.clock.now, steps.DefaultPayment, nil)
	_, err := steps.NewPayment(calls).Prepare(t.Context(), []*consumers.Delivery{authorize(a)})
	require.NoError(t, err)
	require.Zero(t, w.gw.Ledger(a).Intents)
	require.NotContains(t, keysOf(w.gw), "authorize/2")
}

// A capture that was started in the transaction that commands it goes to its call without another transaction, if it comes soon. Only once: a copy of
// its command looks again.
func TestACaptureThatWasStartedIsCalledAtOnce(t *testing.T) {
	for _, late := range []bool{false, true} {
		w := newWorld()
		order := domain.OrderID{1}
		w.deliver(t, w.payment, authorize(order))
		s, ok := w.payment.(consumers.Starter[tx])
		require.True(t, ok)
		d, poisoned := capture(order), capture(domain.OrderID{2})
		poisoned.Data = &events.CapturePayment{}
		require.NoError(t, w.db.InTx(t.Context(), func(ctx context.Context, tx tx) error { return s.Start(ctx, tx, []*consumers.Delivery{d, poisoned}) }))
		require.Equal(t, domain.BarrierStarted, w.db.Payment(order).State(domain.Capture))
		require.Empty(t, w.db.Payment(domain.OrderID{2}).Steps)

		begun := 0
		w.db.BeforeCommit = func(*sagatest.Tx) error { begun++; return nil }
		want := 0
		if late {
			w.clock.advance(2 * time.Second)
			want = 1
		}
		apply, err := w.payment.Prepare(t.Context(), []*consumers.Delivery{d})
		require.NoError(t, err)
		require.Equal(t, want, begun)
		res, err := w.apply(t.Context(), apply, []*consumers.Delivery{d})
		require.NoError(t, err)
		answered[*events.PaymentCaptured](t, res[0], events.TPaymentCaptured)

		begun = 0
		answered[*events.PaymentCaptured](t, w.deliver(t, w.payment, d)[0], events.TPaymentCaptured)
		require.Equal(t, 2, begun, "nothing is remembered of what was called")
		require.Len(t, w.gw.Calls(), 2)
	}
}

// An undo that comes between the started row and its call meets the row, and finds out what the call did or will do.
func TestF36_UndoBetweenAStartedCaptureAndItsCall(t *testing.T) {
	w := newWorld()
	order := domain.OrderID{1}
	w.deliver(t, w.payment, authorize(order))
	s, ok := w.payment.(consumers.Starter[tx])
	require.True(t, ok)
	d := capture(order)
	require.NoError(t, w.db.InTx(t.Context(), func(ctx context.Context, tx tx) error { return s.Start(ctx, tx, []*consumers.Delivery{d}) }))
	answered[*events.PaymentReversed](t, w.deliver(t, w.reversals, reverse(order))[0], events.TPaymentReversed)
	w.deliver(t, w.payment, d)
	l := w.gw.Ledger(order)
	require.Zero(t, l.Held)
	require.Zero(t, l.Captured-l.Refunded, "nothing stays taken: %+v", l)
}
