package consumers

import (
	"context"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"

	"ordersaga/events"
)

// emptyTx is a transaction that finds nothing and keeps nothing: what is measured is the runtime.
type emptyTx struct{}

func (emptyTx) PresumeFirst(events.Group, []uuid.UUID) {}

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
	for name, bench := range map[string]struct {
		mode InboxMode
		size int
	}{"rows for failures": {InboxFailures, 200}, "rows for all": {InboxAll, 200}, "one": {InboxFailures, 1}} {
		b.Run(name, func(b *testing.B) {
			g, err := NewGroup[emptyTx](GroupConfig{Name: events.GroupStock, Topic: events.TopicStock, Inbox: bench.mode}, emptyStore{}, emptyHandler{})
			if err != nil {
				b.Fatal(err)
			}
			batch := records(events.TReserveStock, bench.size)
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

// BenchmarkLanes is the way of a record from the fetch to the batch, and back to the mark: sixteen partitions, as many records as one fetch brings.
func BenchmarkLanes(b *testing.B) {
	const partitions = 16
	for name, perPartition := range map[string]int{"one each": 1, "twelve each": 12} {
		b.Run(name, func(b *testing.B) {
			l := NewLanes(nil, false)
			offset := int64(0)
			settled := make([]bool, partitions*perPartition)
			for i := range settled {
				settled[i] = true
			}
			b.ReportAllocs()
			for b.Loop() {
				fetched := make([]events.Record, 0, len(settled)) // what the adapter allocates
				for p := range int32(partitions) {
					for i := range int64(perPartition) {
						fetched = append(fetched, events.Record{Topic: events.TopicStock, Partition: p, Offset: offset + i})
					}
				}
				offset += int64(perPartition)
				l.Add(fetched)
				batch := l.Take(time.Time{}, 500, nil)
				if marks := l.Settle(batch, settled); len(marks) != partitions {
					b.Fatal(len(marks))
				}
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*len(settled)), "ns/record")
		})
	}
}

// BenchmarkPump is what a record costs that comes alone: from Add by way of a waiting worker to the mark. The workers are those of the payment group.
func BenchmarkPump(b *testing.B) {
	for name, workers := range map[string]int{"one worker": 1, "eight workers": 8} {
		b.Run(name, func(b *testing.B) {
			marked := make(chan struct{}, 1)
			p := NewPump(PumpConfig{MaxBatch: 500, Overlap: workers > 1, Mark: func([]Place) { marked <- struct{}{} }})
			ctx, cancel := context.WithCancel(b.Context())
			var wg sync.WaitGroup
			wg.Go(func() {
				p.Run(ctx, Work{Workers: workers, Handle: func(_ context.Context, batch []events.Record) ([]bool, error) {
					settled := make([]bool, len(batch))
					for i := range settled {
						settled[i] = true
					}
					return settled, nil
				}})
			})
			offset := int64(0)
			b.ReportAllocs()
			for b.Loop() {
				p.Add([]events.Record{{Topic: events.TopicPayment, Offset: offset}})
				offset++
				<-marked
			}
			cancel()
			wg.Wait()
		})
	}
}
