package simulator_test

import (
	"errors"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"ordersaga/adapters/payment"
	"ordersaga/cmd/ordersaga/internal/simulator"
	"ordersaga/domain"
)

// step is what a payment step does with one operation until it has an outcome, by the rules of DESIGN.md: the same key again; after a
// stored failure a look-up; another key only when the look-up proved that nothing took effect.
func step(t *rapid.T, gw *payment.Gateway, r domain.PaymentRequest) domain.PaymentOutcome {
	ctx := t.Context()
	for range 60 {
		out, err := gw.Do(ctx, r)
		if err == nil {
			return out
		}
		var re interface{ Replayed() bool }
		if !errors.As(err, &re) || !re.Replayed() {
			continue
		}
		now, err := gw.Do(ctx, domain.PaymentRequest{Op: domain.LookUp, Order: r.Order, Ref: r.Ref})
		if err != nil {
			continue
		}
		switch {
		case r.Op == domain.Authorize && now.Result != domain.PaymentUnknown:
			return now
		case r.Op == domain.Capture && now.Result == domain.PaymentCaptured, r.Op == domain.Reverse && now.Result == domain.PaymentReversed:
			return now
		}
		r.Attempt++
	}
	t.Fatalf("%s of %s did not end in 60 rounds", r.Op, r.Order)
	return domain.PaymentOutcome{}
}

func drawFault(t *rapid.T, name string) simulator.Fault {
	share := rapid.Float64Range(0, 0.18)
	return simulator.Fault{
		Decline: share.Draw(t, name+" declines"), ErrorBefore: share.Draw(t, name+" errors before"), ErrorAfter: share.Draw(t, name+" errors after"),
		Timeout: share.Draw(t, name+" timeouts"), Throttle: share.Draw(t, name+" throttling"), Hang: simulator.Duration(time.Millisecond),
		Forget: rapid.Bool().Draw(t, name+" forgets"),
	}
}

// Whatever the faults: no order is captured twice, none holds money after its undo, what the adapter says is what the ledger says,
// and the ledger read back through the API adds up to the simulator's own.
func TestPropertyMoneyIsMovedOnceWhateverFails(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		sim, err := simulator.Open("", simulator.WithAPIKey(apiKey))
		require.NoError(t, err)
		srv := httptest.NewServer(sim)
		defer srv.Close()
		gw, err := payment.New(payment.Config{
			BaseURL: srv.URL, APIKey: apiKey, Timeout: 2 * time.Second,
			Retry:   payment.Retry{Retries: 2, Base: 100 * time.Microsecond, Max: 100 * time.Microsecond, Elapsed: time.Second},
			Breaker: payment.Breaker{Consecutive: 100000, MinCalls: 100000}, Limits: payment.Limits{PerSecond: 1e6, Burst: 1000},
		})
		require.NoError(t, err)
		defer gw.Close()
		f := simulator.Faults{Seed: rapid.Uint64().Draw(t, "seed"), Fault: drawFault(t, "every call"), Ops: map[simulator.Op]simulator.Fault{}}
		for _, op := range []simulator.Op{simulator.Create, simulator.Capture, simulator.Cancel, simulator.Refund} {
			if rapid.Bool().Draw(t, string(op)+" has its own") {
				f.Ops[op] = drawFault(t, string(op))
			}
		}
		require.NoError(t, sim.SetFaults(f))

		final := map[string]domain.PaymentResult{}
		amounts := map[string]int64{}
		for range rapid.IntRange(1, 5).Draw(t, "orders") {
			id := domain.NewOrderID()
			amount := domain.Money{Minor: rapid.Int64Range(1, domain.MaxMinor).Draw(t, "amount"), Currency: "EUR"}
			r := domain.PaymentRequest{Op: domain.Authorize, Order: id, Attempt: 1, Amount: amount, Method: "pm_card_visa"}
			out := step(t, gw, r)
			amounts[id.String()] = amount.Minor
			if out.Result == domain.PaymentAuthorized && rapid.Bool().Draw(t, "capture") {
				r.Op, r.Ref = domain.Capture, out.Ref
				out = step(t, gw, r)
				require.Equal(t, domain.PaymentCaptured, out.Result)
			}
			if out.Ref != "" && rapid.Bool().Draw(t, "undo") {
				r.Op, r.Ref = domain.Reverse, out.Ref
				out = step(t, gw, r)
				require.Equal(t, domain.PaymentReversed, out.Result)
			}
			final[id.String()] = out.Result
		}

		require.NoError(t, sim.SetFaults(simulator.Faults{}))
		captures, held, net := map[string]int{}, map[string]int64{}, map[string]int64{}
		var inside [3]int64
		for _, in := range sim.Intents() {
			require.LessOrEqual(t, in.Captures, 1)
			require.LessOrEqual(t, in.Refunded, in.Received)
			captures[in.OrderID] += in.Captures
			held[in.OrderID] += in.Held
			net[in.OrderID] += in.Received - in.Refunded
			inside[0] += in.Amount
			inside[1] += in.Received
			inside[2] += in.Refunded
		}
		for id, result := range final {
			require.LessOrEqual(t, captures[id], 1, "captured twice")
			switch result {
			case domain.PaymentCaptured:
				require.Equal(t, amounts[id], net[id])
				require.Zero(t, held[id])
			case domain.PaymentAuthorized:
				require.Zero(t, net[id])
				require.Equal(t, amounts[id], held[id], "held once")
			default:
				require.Zero(t, net[id])
				require.Zero(t, held[id])
			}
		}
		var outside [3]int64
		for e, err := range gw.Ledger(t.Context(), time.Time{}) {
			require.NoError(t, err)
			outside[0] += e.Amount
			outside[1] += e.AmountReceived
			outside[2] += e.AmountRefunded
		}
		require.Equal(t, inside, outside)
	})
}
