package saga_test

import (
	"context"
	"testing"

	"github.com/stretchr/testify/require"

	"ordersaga/domain"
	"ordersaga/events"
	"ordersaga/saga"
	"ordersaga/saga/sagatest"
)

// happy is what a saga hears that goes well, in the order in which it mostly comes.
var happy = []saga.Reply{
	{Type: events.TStockReserved, Data: &events.StockReserved{}},
	{Type: events.TPaymentAuthorized, Data: &events.PaymentAuthorized{Ref: "pi_1"}},
	{Type: events.TPaymentCaptured, Data: &events.PaymentCaptured{Ref: "pi_1"}},
	{Type: events.TStockCommitted, Data: &events.StockCommitted{}},
}

// BenchmarkStep is one whole saga through the machine: five decisions.
func BenchmarkStep(b *testing.B) {
	def := saga.OrderV1(saga.DefaultLimits)
	inputs := []saga.Input{{Kind: saga.Started}}
	for _, r := range happy {
		in, ok := def.InputOf(r.Type, r.Data)
		require.True(b, ok, r.Type)
		inputs = append(inputs, in)
	}
	b.ReportAllocs()
	for b.Loop() {
		s := def.New()
		for _, in := range inputs {
			o, err := def.Step(s, in)
			if err != nil {
				b.Fatal(err)
			}
			s = o.State
		}
		if s.Phase != saga.Completed {
			b.Fatal(s.Phase)
		}
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*len(inputs)), "ns/decision")
}

// BenchmarkStepRepeat is a duplicate: most of what a redelivered batch is.
func BenchmarkStepRepeat(b *testing.B) {
	def := saga.OrderV1(saga.DefaultLimits)
	o, err := def.Step(def.New(), saga.Input{Kind: saga.Started})
	require.NoError(b, err)
	in, _ := def.InputOf(happy[0].Type, happy[0].Data)
	o, err = def.Step(o.State, in)
	require.NoError(b, err)
	b.ReportAllocs()
	for b.Loop() {
		if again, err := def.Step(o.State, in); err != nil || again.Changed {
			b.Fatal(err)
		}
	}
}

// BenchmarkCoordinator is the coordinator's share of a hundred sagas, placed and answered in batches, on transactions in memory: what is left when
// nothing is stored. The store's own work is in it.
func BenchmarkCoordinator(b *testing.B) {
	const batch = 100
	h := newBench()
	b.ReportAllocs()
	for b.Loop() {
		h.db = sagatest.NewStore(h.now) // one that grew would be what is measured
		ids := make([]domain.OrderID, batch)
		reqs := make([]saga.PlaceRequest, batch)
		for i := range reqs {
			o := tea()
			ids[i], reqs[i] = o.ID, saga.PlaceRequest{Order: o}
		}
		require.NoError(b, h.db.InTx(b.Context(), func(ctx context.Context, tx *sagatest.Tx) error {
			placed, err := h.coord.Place(ctx, tx, reqs)
			for i := range placed {
				if err == nil {
					err = tx.Emit(ctx, placed[i].Out)
				}
			}
			return err
		}))
		for i := range happy {
			advance(b, h, ids, &happy[i])
		}
	}
	b.ReportMetric(float64(b.Elapsed().Microseconds())/float64(b.N*batch), "µs/saga")
}

func advance(b *testing.B, h *bench, ids []domain.OrderID, r *saga.Reply) {
	b.Helper()
	facts := make([]saga.Fact, len(ids))
	for i, id := range ids {
		facts[i] = saga.Fact{Order: id, Reply: r, Cause: events.NewID()}
	}
	require.NoError(b, h.db.InTx(b.Context(), func(ctx context.Context, tx *sagatest.Tx) error {
		adv, err := h.coord.Advance(ctx, tx, facts)
		for i := range adv {
			if err == nil {
				err = adv[i].Err
			}
			if err == nil {
				err = tx.Emit(ctx, adv[i].Out)
			}
		}
		return err
	}))
}
