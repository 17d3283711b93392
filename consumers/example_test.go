package consumers_test

import (
	"context"
	"fmt"
	"time"

	"github.com/google/uuid"

	"ordersaga/consumers"
	"ordersaga/events"
)

// greeter is a handler: it calls nobody, and emits nothing.
type greeter struct{ fail bool }

func (g *greeter) Prepare(context.Context, []*consumers.Delivery) (consumers.Apply[*consumers.MemoryTx], error) {
	return func(_ context.Context, _ *consumers.MemoryTx, batch []*consumers.Delivery) ([]consumers.Result, error) {
		results := make([]consumers.Result, len(batch))
		for i, d := range batch {
			if g.fail {
				results[i].Err = fmt.Errorf("nobody at home")
				continue
			}
			fmt.Printf("%s, attempt %d\n", d.Type, d.Attempt)
		}
		return results, nil
	}, nil
}

// A record fails, waits in a retry topic, and is handled from there; the original, delivered again, does nothing more.
func ExampleNewGroup() {
	store, handler := consumers.NewMemory(), &greeter{fail: true}
	group, err := consumers.NewGroup[*consumers.MemoryTx](consumers.GroupConfig{
		Name: "greeters", Topic: "greetings.v1", Policy: consumers.Policy{Delays: []time.Duration{5 * time.Second}},
		Decode: func(r *events.Record) (events.Envelope, error) {
			return events.Envelope{Type: events.Name(r.Header("ce_type"))}, nil
		},
	}, store, handler)
	if err != nil {
		fmt.Println(err)
		return
	}
	record := events.Record{Topic: "greetings.v1", Key: []byte("k"), Headers: []events.Header{
		{Key: "ce_type", Value: []byte("Hello")}, {Key: "ce_id", Value: []byte(uuid.NewString())}, {Key: "ce_source", Value: []byte("/example")},
	}}
	settled, err := group.Handle(context.Background(), []events.Record{record})
	fmt.Println(settled, err)

	_, copies := store.Drain()
	fmt.Println(copies[0].Topic)
	handler.fail = false
	retry := events.Record{Topic: copies[0].Topic, Key: copies[0].Key, Headers: copies[0].Headers}
	settled, err = group.Handle(context.Background(), []events.Record{retry, record})
	fmt.Println(settled, err)
	// Output:
	// [true] <nil>
	// retry.greeters.5s
	// Hello, attempt 2
	// [true true] <nil>
}
