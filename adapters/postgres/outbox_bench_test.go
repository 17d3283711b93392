package postgres

import (
	"context"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"

	"ordersaga/events"
)

// BenchmarkOutboxEmit is a transaction that leaves 100 messages.
func BenchmarkOutboxEmit(b *testing.B) {
	db := outboxDB(b, 0)
	out := make([]events.Envelope, 100)
	for i := range out {
		order := uuid.New()
		out[i] = events.Envelope{ID: events.NewID(), Type: events.TOrderConfirmed, OrderID: order, Sequence: 1, Data: &events.OrderEvent{OrderID: order.String(), Sequence: 1}}
	}
	b.ReportAllocs()
	for b.Loop() {
		require.NoError(b, db.For(Consumers).InTx(b.Context(), func(ctx context.Context, tx *Tx) error { return tx.Emit(ctx, out) }))
	}
	b.ReportMetric(float64(b.N*len(out))/b.Elapsed().Seconds(), "rows/s")
}

// BenchmarkOutboxBacklog relays half a million rows that wait, to a broker that takes all at once.
func BenchmarkOutboxBacklog(b *testing.B) {
	const rows = 500_000
	for b.Loop() {
		b.StopTimer()
		db := outboxDB(b, 0)
		fillOutbox(b, db, rows)
		kafka := &sink{null: true}
		b.StartTimer()
		began := time.Now()
		peak := drainOutbox(b, db, kafka, rows)
		b.ReportMetric(rows/time.Since(began).Seconds(), "rows/s")
		b.ReportMetric(float64(peak)/(1<<20), "peakMB")
	}
}
