package consumers

import (
	"context"
	"testing"

	"github.com/google/uuid"

	"ordersaga/events"
)

// emptyTx is a transaction that finds nothing and keeps nothing: what is measured is the runtime.
type emptyTx struct{}

func (emptyTx) Inbox(context.Context, events.Group, []uuid.UUID) (map[uuid.UUID]InboxRow, error) {
	return nil, nil
}
func (emptyTx) SaveInbox(context.Context, events.Group, []InboxRow) error           { return nil }
func (emptyTx) SaveDeadLetters(context.Context, []DeadLetter) error                 { return nil }
func (emptyTx) ResolveDeadLetters(context.Context, events.Group, []uuid.UUID) error { return nil }
func (emptyTx) Emit(context.Context, []events.Envelope) error                       { return nil }
func (emptyTx) Forward(context.Context, []events.Raw) error                         { return nil }

type emptyStore struct{}

func (emptyStore) InTx(ctx context.Context, fn func(ctx context.Context, tx emptyTx) error) error {
	return fn(ctx, emptyTx{})
}

type emptyHandler struct{}

func (emptyHandler) Prepare(context.Context, []*Delivery) (Apply[emptyTx], error) {
	return func(_ context.Context, _ emptyTx, batch []*Delivery) ([]Result, error) {
		return make([]Result, len(batch)), nil
	}, nil
}

// BenchmarkHandle is the runtime's own share of a record, decoding included. The budget of a whole saga (about ten records) is 450 µs.
func BenchmarkHandle(b *testing.B) {
	for _, mode := range []InboxMode{InboxFailures, InboxAll} {
		name := map[InboxMode]string{InboxAll: "rows for all", InboxFailures: "rows for failures"}[mode]
		b.Run(name, func(b *testing.B) {
			g, err := NewGroup[emptyTx](GroupConfig{Name: events.GroupStock, Topic: events.TopicStock, Inbox: mode}, emptyStore{}, emptyHandler{})
			if err != nil {
				b.Fatal(err)
			}
			batch := records(events.TReserveStock, 200)
			b.ReportAllocs()
			for b.Loop() {
				if _, err := g.Handle(b.Context(), batch); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*len(batch)), "ns/record")
		})
	}
}
