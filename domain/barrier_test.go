package domain_test

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"ordersaga/domain"
)

var (
	eur9 = domain.Money{Minor: 900, Currency: "EUR"}
	noon = time.Date(2026, 11, 24, 12, 0, 0, 0, time.UTC)
)

// payment is one with rows in the given states; empty: no row.
func payment(authorize, capture, reverse domain.BarrierState) *domain.Payment {
	p := domain.NewPayment(domain.NewOrderID())
	for op, st := range map[domain.PaymentOp]domain.BarrierState{domain.Authorize: authorize, domain.Capture: capture, domain.Reverse: reverse} {
		if st == "" {
			continue
		}
		s := domain.PaymentStep{Op: op, State: st, Attempt: 1, Amount: eur9, Method: "pm", Begun: noon}
		if st == domain.BarrierDone || st == domain.BarrierUndone || op != domain.Authorize {
			s.Ref = "pi_1"
		}
		if st == domain.BarrierRefused {
			s.Code = "declined"
		}
		p.Put(s)
	}
	clear(p.Changed)
	return p
}

const (
	none, started, done     = domain.BarrierState(""), domain.BarrierStarted, domain.BarrierDone
	refused, undone, buried = domain.BarrierRefused, domain.BarrierUndone, domain.BarrierTombstone
)

// TestPaymentBarrier is the table of what each command meets in each state of the rows.
func TestPaymentBarrier(t *testing.T) {
	call, settled, early, late := domain.BeginCall, domain.BeginSettled, domain.BeginEarly, domain.BeginLapsed
	for _, c := range []struct {
		name                        string
		a, c, r                     domain.BarrierState
		authorize, authorizeLapsed  domain.Begin
		capture, captureLapsed      domain.Begin
		reverse                     domain.Begin
		ended                       bool
		authorized, captured        bool
		authorizeCode, captureCode  string
		aAfterReverse, cAfterRevers domain.BarrierState
	}{
		{"nothing", none, none, none, call, late, early, early, settled, false, false, false, "reversed", "reversed", buried, none},
		{"authorising", started, none, none, call, late, early, early, call, false, false, false, "reversed", "reversed", undone, none},
		{"authorised", done, none, none, settled, settled, call, late, call, false, true, false, "", "reversed", undone, none},
		{"declined", refused, none, none, settled, settled, settled, settled, settled, true, false, false, "declined", "declined", refused, none},
		{"capturing", done, started, none, settled, settled, call, late, call, false, true, false, "", "reversed", undone, undone},
		{"captured", done, done, none, settled, settled, settled, settled, call, false, true, true, "", "", undone, undone},
		{"not captured", done, refused, none, settled, settled, settled, settled, call, false, true, false, "", "declined", undone, refused},
		{"reversing while authorising", started, none, started, settled, settled, settled, settled, call, false, false, false, "reversed", "reversed", undone, none},
		{"reversing while capturing", done, started, started, settled, settled, settled, settled, call, false, true, false, "", "reversed", undone, undone},
		{"reversed", undone, undone, done, settled, settled, settled, settled, settled, true, false, false, "reversed", "reversed", undone, undone},
		{"tombstone", buried, none, none, settled, settled, settled, settled, settled, true, false, false, "reversed", "reversed", buried, none},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := payment(c.a, c.c, c.r)
			require.Equal(t, c.authorize, p.BeginAuthorize(eur9, "pm", false, noon))
			require.Equal(t, c.a == none, p.Changed[domain.Authorize])
			p = payment(c.a, c.c, c.r)
			require.Equal(t, c.authorizeLapsed, p.BeginAuthorize(eur9, "pm", true, noon))
			require.Empty(t, p.Changed)
			require.Equal(t, c.capture, p.BeginCapture(eur9, false, noon))
			if p.Changed[domain.Capture] {
				require.Equal(t, "pi_1", p.Steps[domain.Capture].Ref)
			}
			p = payment(c.a, c.c, c.r)
			require.Equal(t, c.captureLapsed, p.BeginCapture(eur9, true, noon))
			require.Empty(t, p.Changed)
			require.Equal(t, c.ended, p.Ended())

			ok, code := p.Answer(domain.Authorize)
			require.Equal(t, c.authorized, ok)
			require.Equal(t, c.authorizeCode, code)
			ok, code = p.Answer(domain.Capture)
			require.Equal(t, c.captured, ok)
			require.Equal(t, c.captureCode, code)

			require.Equal(t, c.reverse, p.BeginReverse(noon))
			if c.reverse == call {
				require.True(t, p.Closed())
				require.False(t, p.Open(domain.Authorize) || p.Open(domain.Capture), "the undo has taken over")
				require.False(t, p.Renew(domain.Authorize, 1, noon) || p.Renew(domain.Capture, 1, noon), "nobody calls any more")
				p.FinishReverse(domain.PaymentOutcome{Result: domain.PaymentReversed, Ref: "pi_1"})
				require.Equal(t, done, p.State(domain.Reverse))
			}
			require.Equal(t, c.aAfterReverse, p.State(domain.Authorize))
			require.Equal(t, c.cAfterRevers, p.State(domain.Capture))
			require.True(t, p.Ended(), "nothing is held and nothing ever will be")
			clear(p.Changed)
			require.Equal(t, settled, p.BeginReverse(noon), "a repeat answers as the first did")
			require.Equal(t, settled, p.BeginAuthorize(eur9, "pm", false, noon))
			require.Equal(t, settled, p.BeginCapture(eur9, false, noon))
			require.Empty(t, p.Changed)
		})
	}
}

func TestSettle(t *testing.T) {
	out := func(r domain.PaymentResult, code string) domain.PaymentOutcome {
		return domain.PaymentOutcome{Result: r, Ref: "pi_1", Code: code}
	}
	for _, c := range []struct {
		op    domain.PaymentOp
		out   domain.PaymentOutcome
		state domain.BarrierState
		code  string
	}{
		{domain.Authorize, out(domain.PaymentAuthorized, ""), done, ""},
		{domain.Authorize, out(domain.PaymentCaptured, ""), done, ""},
		{domain.Authorize, out(domain.PaymentRefused, "card_declined"), refused, "card_declined"},
		{domain.Authorize, out(domain.PaymentReversed, ""), refused, "reversed"},
		{domain.Capture, out(domain.PaymentCaptured, ""), done, ""},
		{domain.Capture, out(domain.PaymentRefused, "expired"), refused, "expired"},
		{domain.Capture, out(domain.PaymentReversed, "canceled"), refused, "canceled"},
		{domain.Capture, out(domain.PaymentUnknown, ""), refused, "reversed"},
		{domain.Capture, out(domain.PaymentAuthorized, ""), started, ""},
	} {
		p := payment(done, started, none)
		if c.op == domain.Authorize {
			p = payment(started, none, none)
		}
		require.False(t, p.Settle(c.op, 2, c.out), "the outcome of another key")
		require.Equal(t, c.state != started, p.Settle(c.op, 1, c.out))
		require.Equal(t, c.state, p.State(c.op), "%s %v", c.op, c.out)
		require.Equal(t, c.code, p.Steps[c.op].Code)
		require.False(t, p.Settle(c.op, 1, out(domain.PaymentRefused, "late")) && c.state != started, "what is known stays")
	}
	require.False(t, payment(none, none, none).Settle(domain.Authorize, 1, out(domain.PaymentAuthorized, "")))
}

func TestRenewDrawsTheNextKey(t *testing.T) {
	p := payment(started, none, none)
	require.Equal(t, p.Order.String()+"/authorize/1", p.Steps[domain.Authorize].Request().Key())
	require.False(t, p.Renew(domain.Authorize, 2, noon))
	require.True(t, p.Renew(domain.Authorize, 1, noon.Add(time.Hour)))
	require.Equal(t, p.Order.String()+"/authorize/2", p.Steps[domain.Authorize].Request().Key())
	require.Equal(t, noon.Add(time.Hour), p.Steps[domain.Authorize].Begun, "the new key is remembered from now on")
	require.Equal(t, eur9, p.Steps[domain.Authorize].Amount)
	require.False(t, p.Renew(domain.Authorize, 1, noon), "only one of two wins")
	r := payment(done, none, started)
	require.True(t, r.Renew(domain.Reverse, 1, noon), "the undo itself goes on")
	require.Contains(t, r.Steps[domain.Reverse].String(), "/reverse/2 started")
}

func TestFinishReverseTellsWhatItFound(t *testing.T) {
	for result, want := range map[domain.PaymentResult]domain.BarrierState{
		domain.PaymentRefused: refused, domain.PaymentUnknown: buried, domain.PaymentReversed: undone,
	} {
		p := payment(started, none, started)
		p.FinishReverse(domain.PaymentOutcome{Result: result, Ref: "pi_9", Code: "x"})
		require.Equal(t, want, p.State(domain.Authorize))
		require.Equal(t, done, p.State(domain.Reverse))
		require.Equal(t, "pi_9", p.Ref())
		clear(p.Changed)
		p.FinishReverse(domain.PaymentOutcome{Result: domain.PaymentUnknown})
		require.Empty(t, p.Changed, "a repeat changes nothing")
	}
	p := payment(refused, none, started) // the forward step learnt of the refusal meanwhile
	p.FinishReverse(domain.PaymentOutcome{Result: domain.PaymentRefused})
	require.Equal(t, refused, p.State(domain.Authorize))
	require.Equal(t, done, p.State(domain.Reverse))
	none := domain.NewPayment(domain.NewOrderID())
	none.FinishReverse(domain.PaymentOutcome{})
	require.Empty(t, none.Changed)
}

// TestF14_TheBarrierKeepsNoClock: whatever the time, a message that comes late meets the row and changes nothing.
func TestF14_TheBarrierKeepsNoClock(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		at := noon.Add(time.Duration(rapid.Int64Range(0, int64(10*365*24*time.Hour)).Draw(t, "later")))
		p := payment(undone, rapid.SampledFrom([]domain.BarrierState{none, undone, refused}).Draw(t, "capture"), done)
		lapsed := rapid.Bool().Draw(t, "lapsed")
		require.Equal(t, domain.BeginSettled, p.BeginAuthorize(eur9, "pm", lapsed, at))
		require.Equal(t, domain.BeginSettled, p.BeginCapture(eur9, lapsed, at))
		require.Equal(t, domain.BeginSettled, p.BeginReverse(at))
		require.Empty(t, p.Changed)
	})
}
