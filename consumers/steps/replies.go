package steps

import (
	"context"

	"ordersaga/consumers"
	"ordersaga/saga"
)

// Replies feeds the participants' answers to the coordinator.
type Replies[T SagaTx] struct{ coord *saga.Coordinator }

// NewReplies makes the handler of the coordinator group.
func NewReplies[T SagaTx](coord *saga.Coordinator) *Replies[T] { return &Replies[T]{coord} }

// Prepare has nothing to do outside the transaction.
func (r *Replies[T]) Prepare(context.Context, []*consumers.Delivery) (consumers.Apply[T], error) {
	return r.apply, nil
}

// Foresee implements consumers.Foresight.
func (r *Replies[T]) Foresee(tx T, batch []*consumers.Delivery) { tx.ForeseeSagas(ordersOf(batch)) }

func (r *Replies[T]) apply(ctx context.Context, tx T, batch []*consumers.Delivery) ([]consumers.Result, error) {
	facts := make([]saga.Fact, len(batch))
	for i, d := range batch {
		facts[i] = saga.Fact{Order: orderOf(d), Reply: &saga.Reply{Type: d.Type, Data: d.Data}, Cause: d.ID, Trace: d.Trace}
	}
	adv, err := r.coord.Advance(ctx, tx, facts)
	if err != nil {
		return nil, err
	}
	out := make([]consumers.Result, len(batch))
	for i := range adv {
		out[i] = consumers.Result{Out: adv[i].Out, Err: adv[i].Err}
	}
	return out, nil
}
