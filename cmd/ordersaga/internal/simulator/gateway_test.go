package simulator_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"ordersaga/adapters/payment"
	"ordersaga/cmd/ordersaga/internal/simulator"
	"ordersaga/domain"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const apiKey = "sk_test_simulator"

// world is a simulator that listens and the real gateway adapter pointed at it.
type world struct {
	sim *simulator.Server
	gw  *payment.Gateway
	url string
	seen
}

// seen observes the adapter.
type seen struct {
	mu     sync.Mutex
	calls  map[string]int // call/result
	states []string
}

func (s *seen) PaymentCall(call, result string, _ time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.calls[call+"/"+result]++
}

func (s *seen) PaymentBreaker(state string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.states = append(s.states, state)
}

func (s *seen) count(of string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.calls[of]
}

func open(t *testing.T, dir string, change ...func(*payment.Config)) *world {
	t.Helper()
	sim, err := simulator.Open(dir, simulator.WithAPIKey(apiKey))
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, sim.Close()) })
	url, err := sim.Listen(t.Context(), "127.0.0.1:0")
	require.NoError(t, err)
	w := &world{sim: sim, url: url, seen: seen{calls: map[string]int{}}}
	w.gw = w.gateway(t, change...)
	return w
}

func (w *world) gateway(t *testing.T, change ...func(*payment.Config)) *payment.Gateway {
	t.Helper()
	cfg := payment.Config{
		BaseURL: w.url, APIKey: apiKey, Timeout: 2 * time.Second,
		Retry:   payment.Retry{Retries: -1, Base: 2 * time.Millisecond, Max: 5 * time.Millisecond, Elapsed: 3 * time.Second},
		Breaker: payment.Breaker{Consecutive: 1000, MinCalls: 10000, OpenFor: 50 * time.Millisecond},
		Limits:  payment.Limits{PerSecond: 1e6, Burst: 1000},
	}
	for _, f := range change {
		f(&cfg)
	}
	gw, err := payment.New(cfg, payment.WithObserver(&w.seen))
	require.NoError(t, err)
	t.Cleanup(gw.Close)
	return gw
}

func (w *world) faults(t *testing.T, f simulator.Faults) {
	t.Helper()
	require.NoError(t, w.sim.SetFaults(f))
}

func one(f simulator.Fault) simulator.Faults {
	f.Times = 1
	return simulator.Faults{Fault: f}
}

func order(t *testing.T) domain.OrderID {
	t.Helper()
	return domain.NewOrderID()
}

func request(op domain.PaymentOp, id domain.OrderID, ref string) domain.PaymentRequest {
	return domain.PaymentRequest{Op: op, Order: id, Attempt: 1, Amount: domain.Money{Minor: 4200, Currency: "EUR"}, Method: "pm_card_visa", Ref: ref}
}

func (w *world) must(t *testing.T, r domain.PaymentRequest) domain.PaymentOutcome {
	t.Helper()
	out, err := w.gw.Do(t.Context(), r)
	require.NoError(t, err)
	return out
}

func unknown(err error) bool {
	var u interface{ OutcomeUnknown() bool }
	return errors.As(err, &u) && u.OutcomeUnknown()
}

func replayed(err error) bool {
	var r interface{ Replayed() bool }
	return errors.As(err, &r) && r.Replayed()
}

func isPoison(err error) bool {
	var p interface{ Poison() bool }
	return errors.As(err, &p) && p.Poison()
}

func outageOf(err error) string {
	var o interface{ Outage() string }
	if errors.As(err, &o) {
		return o.Outage()
	}
	return ""
}

func class(t *testing.T, err error) payment.Class {
	t.Helper()
	var f *payment.Failure
	require.ErrorAs(t, err, &f)
	return f.Class
}

func TestHappyPathAndLookUps(t *testing.T) {
	w := open(t, "")
	id := order(t)
	require.NoError(t, w.gw.Ready(t.Context()))
	require.Equal(t, domain.PaymentUnknown, w.must(t, request(domain.LookUp, id, "")).Result)
	require.Equal(t, domain.PaymentUnknown, w.must(t, request(domain.LookUp, id, "pi_nobody")).Result)

	held := w.must(t, request(domain.Authorize, id, ""))
	require.Equal(t, domain.PaymentAuthorized, held.Result)
	require.Equal(t, held, w.must(t, request(domain.LookUp, id, "")))
	require.Equal(t, held, w.must(t, request(domain.LookUp, id, held.Ref)))
	require.Equal(t, held, w.must(t, request(domain.Authorize, id, "")), "the same key answers the same")

	taken := domain.PaymentOutcome{Result: domain.PaymentCaptured, Ref: held.Ref}
	require.Equal(t, taken, w.must(t, request(domain.Capture, id, held.Ref)))
	require.Equal(t, taken, w.must(t, request(domain.Capture, id, held.Ref)))
	second := request(domain.Capture, id, held.Ref)
	second.Attempt = 2
	require.Equal(t, taken, w.must(t, second), "captured under another key is captured, once")
	require.Equal(t, taken, w.must(t, request(domain.LookUp, id, held.Ref)))

	back := domain.PaymentOutcome{Result: domain.PaymentReversed, Ref: held.Ref}
	require.Equal(t, back, w.must(t, request(domain.Reverse, id, held.Ref)), "captured: refunded")
	require.Equal(t, back, w.must(t, request(domain.Reverse, id, held.Ref)))
	again := request(domain.Reverse, id, held.Ref)
	again.Attempt = 2
	require.Equal(t, back, w.must(t, again), "already refunded is reversed")
	require.Equal(t, back, w.must(t, request(domain.LookUp, id, "")))

	require.Equal(t, []simulator.Intent{{
		ID: held.Ref, OrderID: id.String(), Status: "succeeded", Currency: "eur", Amount: 4200, Received: 4200, Refunded: 4200, Captures: 1,
	}}, w.sim.Intents())
}

func TestReverseBeforeCaptureCancels(t *testing.T) {
	w := open(t, "")
	id := order(t)
	ref := w.must(t, request(domain.Authorize, id, "")).Ref
	back := domain.PaymentOutcome{Result: domain.PaymentReversed, Ref: ref}
	require.Equal(t, back, w.must(t, request(domain.Reverse, id, ref)))
	again := request(domain.Reverse, id, ref)
	again.Attempt = 2
	require.Equal(t, back, w.must(t, again), "already cancelled is reversed")
	require.Equal(t, back, w.must(t, request(domain.LookUp, id, ref)))
	late := w.must(t, request(domain.Capture, id, ref))
	require.Equal(t, domain.PaymentRefused, late.Result, "a late capture finds nothing to take")
	require.Equal(t, "payment_intent_unexpected_state", late.Code)
	require.Zero(t, w.sim.Status().Refunds)
}

func TestDeclines(t *testing.T) {
	w := open(t, "")
	for method, code := range map[string]string{
		"pm_card_chargeDeclined":                  "card_declined",
		"pm_card_visa_chargeDeclined":             "card_declined",
		"pm_card_chargeDeclinedInsufficientFunds": "insufficient_funds",
		"pm_card_chargeDeclinedExpiredCard":       "expired_card",
		"pm_card_authenticationRequired":          "authentication_required",
	} {
		t.Run(method, func(t *testing.T) {
			r := request(domain.Authorize, order(t), "")
			r.Method = method
			out := w.must(t, r)
			require.Equal(t, domain.PaymentRefused, out.Result)
			require.Equal(t, code, out.Code)
			require.NotEmpty(t, out.Ref)
			require.Equal(t, out, w.must(t, r), "a refusal is repeated")
			require.Equal(t, out, w.must(t, request(domain.LookUp, r.Order, "")))
			require.Equal(t, domain.PaymentReversed, w.must(t, request(domain.Reverse, r.Order, out.Ref)).Result, "undo of a refused intent cancels it")
		})
	}
}

func TestRequestsThatAreWrongArePoison(t *testing.T) {
	w := open(t, "")
	id := order(t)
	ref := w.must(t, request(domain.Authorize, id, "")).Ref
	with := func(op domain.PaymentOp, ref string, change func(*domain.PaymentRequest)) domain.PaymentRequest {
		r := request(op, id, ref)
		change(&r)
		return r
	}
	mistyped := with(domain.Authorize, "", func(r *domain.PaymentRequest) { r.Method = "pm_nothing"; r.Attempt = 2 })
	out, err := w.gw.Do(t.Context(), mistyped)
	require.NoError(t, err, "a payment method that there is not is a refusal")
	require.Equal(t, domain.PaymentRefused, out.Result)
	for name, r := range map[string]domain.PaymentRequest{
		"other parameters, same key":     with(domain.Authorize, "", func(r *domain.PaymentRequest) { r.Amount.Minor++ }),
		"capture of more than is held":   with(domain.Capture, ref, func(r *domain.PaymentRequest) { r.Amount.Minor++; r.Attempt = 7 }),
		"capture of no intent":           request(domain.Capture, id, "pi_nobody"),
		"reversal of no intent":          request(domain.Reverse, id, "pi_nobody"),
		"capture without an intent":      request(domain.Capture, id, ""),
		"an id that is a path":           request(domain.Capture, id, "../v1/refunds"),
		"no amount":                      with(domain.Authorize, "", func(r *domain.PaymentRequest) { r.Amount.Minor = 0 }),
		"a currency that is none":        with(domain.Authorize, "", func(r *domain.PaymentRequest) { r.Amount.Currency = "eur" }),
		"attempt 0":                      with(domain.Authorize, "", func(r *domain.PaymentRequest) { r.Attempt = 0 }),
		"an operation that is none":      with("steal", "", func(*domain.PaymentRequest) {}),
		"another order's intent":         request(domain.LookUp, order(t), ref),
		"no order":                       with(domain.LookUp, ref, func(r *domain.PaymentRequest) { r.Order = domain.OrderID{} }),
		"a method that is much too long": with(domain.Authorize, "", func(r *domain.PaymentRequest) { r.Method = strings.Repeat("x", 200) }),
	} {
		t.Run(name, func(t *testing.T) {
			_, err := w.gw.Do(t.Context(), r)
			require.Error(t, err)
			require.True(t, isPoison(err), "%v", err)
			require.False(t, unknown(err), "%v", err)
			require.Empty(t, outageOf(err))
			require.NotContains(t, err.Error(), apiKey)
		})
	}
	require.Equal(t, "requires_capture", w.sim.Intents()[0].Status, "nothing of this touched the payment")
}

// Every technical failure, on every write: what the error says, and that a repeat under the same key ends well and once.
func TestF13_FailuresAreReportedAndRepeatsAreHarmless(t *testing.T) {
	slow := func(c *payment.Config) { c.Timeout = 150 * time.Millisecond }
	for name, c := range map[string]struct {
		fault    simulator.Fault
		class    payment.Class
		unknown  bool
		replayed bool // the repeat, too, is an error: the stored one
		wait     time.Duration
	}{
		"500 without effect":        {fault: simulator.Fault{ErrorBefore: 1}, class: payment.Server, unknown: true, replayed: true},
		"500 after the effect":      {fault: simulator.Fault{ErrorAfter: 1}, class: payment.Server, unknown: true, replayed: true},
		"500 that is not stored":    {fault: simulator.Fault{ErrorBefore: 1, Forget: true}, class: payment.Server, unknown: true},
		"hangs after the effect":    {fault: simulator.Fault{Timeout: 1}, class: payment.Timeout, unknown: true},
		"closes after the effect":   {fault: simulator.Fault{Timeout: 1, Hang: simulator.Duration(time.Millisecond)}, class: payment.Connection, unknown: true},
		"429":                       {fault: simulator.Fault{Throttle: 1, RetryAfter: simulator.Duration(7 * time.Second)}, class: payment.Throttled, wait: 7 * time.Second},
		"503":                       {fault: simulator.Fault{Outage: simulator.OutageRefuse, RetryAfter: simulator.Duration(2 * time.Second)}, class: payment.Server, unknown: true, wait: 2 * time.Second},
		"connection closed at once": {fault: simulator.Fault{Outage: simulator.OutageClose}, class: payment.Connection, unknown: true},
	} {
		for _, op := range []domain.PaymentOp{domain.Authorize, domain.Capture, domain.Reverse} {
			t.Run(name+"/"+string(op), func(t *testing.T) {
				w := open(t, "", slow)
				id, ref := order(t), ""
				if op != domain.Authorize {
					ref = w.must(t, request(domain.Authorize, id, "")).Ref
				}
				r := request(op, id, ref)
				w.faults(t, one(c.fault))
				_, err := w.gw.Do(t.Context(), r)
				require.Error(t, err)
				require.Equal(t, c.class, class(t, err))
				require.Equal(t, c.unknown, unknown(err), "%v", err)
				require.False(t, replayed(err))
				require.False(t, isPoison(err))
				require.Empty(t, outageOf(err))
				var after interface{ RetryAfter() time.Duration }
				require.ErrorAs(t, err, &after)
				require.Equal(t, c.wait, after.RetryAfter())

				out, err := w.gw.Do(t.Context(), r)
				if c.replayed {
					require.Error(t, err)
					require.True(t, replayed(err))
					require.True(t, unknown(err))
					return
				}
				require.NoError(t, err)
				require.Contains(t, []domain.PaymentResult{domain.PaymentAuthorized, domain.PaymentCaptured, domain.PaymentReversed}, out.Result)
				require.Len(t, w.sim.Intents(), 1, "no second intent")
			})
		}
	}
}

// The gateway repeats a stored 500 for the same key. A query tells what took effect; only if nothing did, the next key is used.
func TestF37_StoredServerErrorIsRepeated(t *testing.T) {
	for name, tookEffect := range map[string]bool{"nothing took effect": false, "it took effect": true} {
		t.Run(name, func(t *testing.T) {
			w := open(t, "", func(c *payment.Config) { c.Retry.Retries = 2 })
			id := order(t)
			r := request(domain.Authorize, id, "")
			f := simulator.Fault{ErrorBefore: 1}
			if tookEffect {
				f = simulator.Fault{ErrorAfter: 1}
			}
			w.faults(t, one(f))
			_, err := w.gw.Do(t.Context(), r)
			require.True(t, replayed(err), "the try in place already learns that the answer is stored: %v", err)
			require.True(t, unknown(err))
			require.Equal(t, uint64(2), w.sim.Status().Calls[simulator.Create], "and stops there")

			found := w.must(t, request(domain.LookUp, id, ""))
			if tookEffect {
				require.Equal(t, domain.PaymentAuthorized, found.Result)
			} else {
				require.Equal(t, domain.PaymentUnknown, found.Result)
				r.Attempt = 2
				require.Equal(t, domain.PaymentAuthorized, w.must(t, r).Result)
			}
			require.Len(t, w.sim.Intents(), 1)
		})
	}
}

// A barrier that is read late lets an undo overtake the call. At the gateway this must still end with nothing held: the undo sends
// the same key and parameters again, learns the intent, and cancels it.
func TestF36_UndoLearnsTheIntentByTheSameKey(t *testing.T) {
	w := open(t, "", func(c *payment.Config) { c.Timeout = 100 * time.Millisecond })
	id := order(t)
	w.faults(t, one(simulator.Fault{Timeout: 1}))
	_, err := w.gw.Do(t.Context(), request(domain.Authorize, id, ""))
	require.True(t, unknown(err))
	ref := w.must(t, request(domain.Authorize, id, "")).Ref
	require.Equal(t, domain.PaymentReversed, w.must(t, request(domain.Reverse, id, ref)).Result)
	got := w.sim.Intents()
	require.Len(t, got, 1)
	require.Equal(t, "canceled", got[0].Status)
	require.Zero(t, got[0].Held)
}

func TestRetriesInPlaceUseTheSameKeyAndEndWell(t *testing.T) {
	w := open(t, "", func(c *payment.Config) { c.Retry.Retries, c.Timeout = 2, 150*time.Millisecond })
	for name, f := range map[string]simulator.Fault{
		"timeout":    {Timeout: 1},
		"connection": {Outage: simulator.OutageClose},
		"forgotten":  {ErrorBefore: 1, Forget: true},
		"throttled":  {Throttle: 1},
	} {
		t.Run(name, func(t *testing.T) {
			before := len(w.sim.Intents())
			w.faults(t, one(f))
			require.Equal(t, domain.PaymentAuthorized, w.must(t, request(domain.Authorize, order(t), "")).Result)
			require.Len(t, w.sim.Intents(), before+1)
		})
	}
}

// A slow first request still holds the key when the retry comes: 409, then the first one's answer.
func TestConflictWhileTheFirstRequestIsAtWork(t *testing.T) {
	w := open(t, "", func(c *payment.Config) {
		c.Timeout, c.Retry = 80*time.Millisecond, payment.Retry{Retries: 5, Base: 200 * time.Millisecond, Max: 200 * time.Millisecond, Elapsed: 5 * time.Second}
	})
	w.faults(t, simulator.Faults{Ops: map[simulator.Op]simulator.Fault{simulator.Create: {Latency: simulator.Duration(100 * time.Millisecond)}}})
	id := order(t)
	r := request(domain.Authorize, id, "")
	_, err := w.gw.Do(t.Context(), r)
	if err != nil {
		require.True(t, unknown(err))
	}
	w.faults(t, simulator.Faults{})
	require.Eventually(t, func() bool {
		out, err := w.gw.Do(t.Context(), r)
		return err == nil && out.Result == domain.PaymentAuthorized
	}, 5*time.Second, 10*time.Millisecond)
	require.Len(t, w.sim.Intents(), 1)
	require.Positive(t, w.count("authorize/timeout"))
}

// An outage opens the breaker: calls are turned away unsent and say when to look again; one probe closes it.
func TestF7_BreakerOpensAndAProbeCloses(t *testing.T) {
	w := open(t, "", func(c *payment.Config) {
		c.Breaker = payment.Breaker{Consecutive: 3, MinCalls: 1000, OpenFor: 50 * time.Millisecond}
	})
	w.faults(t, simulator.Faults{Fault: simulator.Fault{Outage: simulator.OutageRefuse}})
	r := request(domain.Authorize, order(t), "")
	for range 3 {
		_, err := w.gw.Do(t.Context(), r)
		require.Empty(t, outageOf(err), "the calls that find the outage are transient failures")
	}
	_, err := w.gw.Do(t.Context(), r)
	require.Equal(t, "payment gateway", outageOf(err))
	require.False(t, unknown(err), "not sent")
	var after interface{ RetryAfter() time.Duration }
	require.ErrorAs(t, err, &after)
	require.Positive(t, after.RetryAfter())
	require.Equal(t, uint64(3), w.sim.Status().Calls[simulator.Create])
	require.Error(t, w.gw.Ready(t.Context()), "readiness asks past the breaker")

	w.faults(t, simulator.Faults{})
	require.NoError(t, w.gw.Ready(t.Context()))
	require.Eventually(t, func() bool {
		out, err := w.gw.Do(t.Context(), r)
		return err == nil && out.Result == domain.PaymentAuthorized
	}, 5*time.Second, 5*time.Millisecond)
	w.mu.Lock()
	defer w.mu.Unlock()
	require.Equal(t, []string{"open", "half-open", "closed"}, w.states)
}

// What the gateway refuses is no reason to stop talking to it.
func TestRefusalsAndPoisonDoNotOpenTheBreaker(t *testing.T) {
	w := open(t, "", func(c *payment.Config) { c.Breaker = payment.Breaker{Consecutive: 2, MinCalls: 2, Ratio: 0.1} })
	for range 5 {
		r := request(domain.Authorize, order(t), "")
		r.Method = "pm_card_chargeDeclined"
		require.Equal(t, domain.PaymentRefused, w.must(t, r).Result)
		_, err := w.gw.Do(t.Context(), request(domain.Capture, order(t), "pi_nobody"))
		require.True(t, isPoison(err))
	}
	require.Equal(t, "closed", w.gw.BreakerState())
}

func TestWrongKeyIsAnOutageThatSaysWhatToDo(t *testing.T) {
	w := open(t, "")
	gw := w.gateway(t, func(c *payment.Config) { c.APIKey = "sk_test_wrong" })
	for _, err := range []error{
		gw.Ready(t.Context()),
		func() error { _, err := gw.Do(t.Context(), request(domain.Authorize, order(t), "")); return err }(),
	} {
		require.Equal(t, "payment gateway", outageOf(err))
		require.Equal(t, payment.Auth, class(t, err))
		require.ErrorContains(t, err, "check it")
		require.NotContains(t, err.Error(), "sk_test")
		require.False(t, unknown(err))
	}
}

func TestNobodyListens(t *testing.T) {
	w := open(t, "")
	require.NoError(t, w.sim.Close())
	_, err := w.gw.Do(t.Context(), request(domain.Authorize, order(t), ""))
	require.Equal(t, payment.Connection, class(t, err))
	require.False(t, unknown(err), "never sent: %v", err)
	require.Error(t, w.gw.Ready(t.Context()))
}

func TestCallerGivesUp(t *testing.T) {
	w := open(t, "", func(c *payment.Config) { c.Breaker.Consecutive = 1 })
	w.faults(t, simulator.Faults{Fault: simulator.Fault{Timeout: 1}})
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	_, err := w.gw.Do(ctx, request(domain.Authorize, order(t), ""))
	require.ErrorIs(t, err, context.DeadlineExceeded)
	require.Equal(t, payment.Cancelled, class(t, err))
	require.True(t, unknown(err))
	require.Equal(t, "closed", w.gw.BreakerState(), "a caller's haste says nothing about the gateway")
}

// The bulkhead bounds the calls in flight, waiting is bounded too, and both change at run time.
func TestF24_LimitsHoldAndChange(t *testing.T) {
	w := open(t, "", func(c *payment.Config) {
		c.Limits, c.QueueTimeout = payment.Limits{PerSecond: 1e6, Concurrent: 1}, 60*time.Millisecond
	})
	w.faults(t, simulator.Faults{Fault: simulator.Fault{Latency: simulator.Duration(400 * time.Millisecond)}})
	var wg sync.WaitGroup
	errs := make([]error, 3)
	for i := range errs {
		wg.Go(func() { _, errs[i] = w.gw.Do(t.Context(), request(domain.Authorize, domain.NewOrderID(), "")) })
	}
	wg.Wait()
	turned := 0
	for _, err := range errs {
		if err == nil {
			continue
		}
		turned++
		require.Equal(t, payment.Saturated, class(t, err))
		require.Equal(t, "payment gateway", outageOf(err))
		require.False(t, unknown(err))
	}
	require.Equal(t, 2, turned)
	require.Equal(t, uint64(1), w.sim.Status().Calls[simulator.Create])

	require.NoError(t, w.gw.SetLimits(payment.Limits{PerSecond: 1e6, Concurrent: 8}))
	require.Equal(t, 8, w.gw.Limits().Concurrent)
	for i := range errs {
		wg.Go(func() { _, errs[i] = w.gw.Do(t.Context(), request(domain.Authorize, domain.NewOrderID(), "")) })
	}
	wg.Wait()
	require.NoError(t, errors.Join(errs...))

	w.faults(t, simulator.Faults{})
	require.NoError(t, w.gw.SetLimits(payment.Limits{PerSecond: 0.001, Burst: 1}))
	w.must(t, request(domain.Authorize, order(t), ""))
	_, err := w.gw.Do(t.Context(), request(domain.Authorize, order(t), ""))
	require.Equal(t, payment.Saturated, class(t, err), "the bucket is empty")

	for _, bad := range []payment.Limits{{PerSecond: -1}, {Burst: -1}, {Concurrent: 100000}} {
		require.Error(t, w.gw.SetLimits(bad))
	}
}

// More intents than fit on one page, and a search that must not stop at the first intent that holds nothing.
func TestLookUpByOrderAndLedgerPageThrough(t *testing.T) {
	w := open(t, "")
	id := order(t)
	first := request(domain.Authorize, id, "")
	held := w.must(t, first)
	declined := first
	declined.Attempt, declined.Method = 2, "pm_card_chargeDeclined"
	require.Equal(t, domain.PaymentRefused, w.must(t, declined).Result)
	for range 230 {
		w.must(t, request(domain.Authorize, order(t), ""))
	}
	require.Equal(t, held, w.must(t, request(domain.LookUp, id, "")), "the older intent is the one that holds money")
	require.Equal(t, uint64(3), w.sim.Status().Calls[simulator.List])

	captured := w.must(t, request(domain.Capture, id, held.Ref))
	require.Equal(t, domain.PaymentCaptured, captured.Result)
	n, received := 0, int64(0)
	seen := map[string]bool{}
	for e, err := range w.gw.Ledger(t.Context(), time.Now().Add(-time.Hour)) {
		require.NoError(t, err)
		require.False(t, seen[e.ID])
		seen[e.ID] = true
		n++
		received += e.AmountReceived
		if e.ID == held.Ref {
			require.Equal(t, payment.Entry{
				ID: held.Ref, OrderID: id.String(), Status: "succeeded", Amount: 4200, AmountReceived: 4200, Currency: "EUR", Created: e.Created,
			}, e)
		}
	}
	require.Equal(t, 232, n)
	require.Equal(t, int64(4200), received)
	for e, err := range w.gw.Ledger(t.Context(), time.Now().Add(time.Hour)) {
		t.Fatal("nothing was created in the future", e, err)
	}

	w.faults(t, simulator.Faults{Fault: simulator.Fault{ErrorBefore: 1}})
	var last error
	for _, err := range w.gw.Ledger(t.Context(), time.Time{}) {
		last = err
	}
	require.Error(t, last)
	_, err := w.gw.Do(t.Context(), request(domain.LookUp, order(t), ""))
	require.Error(t, err, "a search that broke off is never PaymentUnknown")
	require.False(t, unknown(err), "a look-up takes no effect")
}

// The window of a look-up follows the time in the order id, but never beyond what a client's wrong clock could have made of it.
func TestLookUpWindowDoesNotTrustTheOrderIDsClock(t *testing.T) {
	w := open(t, "")
	for name, drawn := range map[string]time.Time{
		"an hour ahead": time.Now().Add(time.Hour), "a year ahead": time.Now().AddDate(1, 0, 0), "a year behind": time.Now().AddDate(-1, 0, 0), "now": time.Now(),
	} {
		t.Run(name, func(t *testing.T) {
			id := domain.NewOrderID()
			ms := uint64(drawn.UnixMilli())
			for i := range 6 {
				id[i] = byte(ms >> (8 * (5 - i)))
			}
			held := w.must(t, request(domain.Authorize, id, ""))
			require.Equal(t, held, w.must(t, request(domain.LookUp, id, "")))
		})
	}
}

func TestConcurrentRequestsUnderOneKeyHoldOnce(t *testing.T) {
	w := open(t, "", func(c *payment.Config) { c.Retry.Retries = 5 })
	w.faults(t, simulator.Faults{Fault: simulator.Fault{Jitter: simulator.Duration(3 * time.Millisecond)}})
	r := request(domain.Authorize, order(t), "")
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			if _, err := w.gw.Do(t.Context(), r); err != nil {
				var f *payment.Failure
				if !errors.As(err, &f) || f.Class != payment.Conflict {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	require.Len(t, w.sim.Intents(), 1)
}

// The control endpoint speaks the same faults, behind the same key.
func TestControlEndpoint(t *testing.T) {
	w := open(t, "")
	put := func(body, key string) int {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPut, w.url+"/_control", strings.NewReader(body))
		require.NoError(t, err)
		req.SetBasicAuth(key, "")
		res, err := (&http.Client{Transport: &http.Transport{DisableKeepAlives: true}}).Do(req)
		require.NoError(t, err)
		require.NoError(t, res.Body.Close())
		return res.StatusCode
	}
	require.Equal(t, 200, put(`{"latency":"1ms","decline":1,"seed":7,"ops":{"capture":{"error_after":0.5}}}`, apiKey))
	require.Equal(t, domain.PaymentRefused, w.must(t, request(domain.Authorize, order(t), "")).Result)
	f := w.sim.Faults()
	require.Equal(t, uint64(7), f.Seed)
	require.InDelta(t, 0.5, f.Ops[simulator.Capture].ErrorAfter, 0)
	for i, bad := range []string{`{"declin":1}`, `{"decline":2}`, `{"latency":"-1s"}`, `{"outage":"maybe"}`, `{"ops":{"fly":{}}}`, `{"decline":0.6,"timeout":0.6}`, `{`, `{}{}`} {
		require.Equal(t, 400, put(bad, apiKey), fmt.Sprint(i))
	}
	require.Equal(t, 401, put(`{}`, "sk_test_other"))
	require.Equal(t, f, w.sim.Faults(), "what was refused changed nothing")
	require.Equal(t, 200, put(`{}`, apiKey))
	require.Equal(t, domain.PaymentAuthorized, w.must(t, request(domain.Authorize, order(t), "")).Result)
}
