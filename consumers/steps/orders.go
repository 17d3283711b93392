package steps

import (
	"context"
	"fmt"
	"slices"

	"ordersaga/consumers"
	"ordersaga/domain"
	"ordersaga/events"
	"ordersaga/saga"
)

// OrderCommands places and cancels what producers ask for on the topic: PlaceOrder, CancelOrder. An order that can't be placed is
// stored as rejected and told so in public; only a command that is no order at all is an error.
type OrderCommands[T SagaTx] struct {
	coord     *saga.Coordinator
	catalogue Catalogue
}

// NewOrderCommands makes the handler of the order-commands group.
func NewOrderCommands[T SagaTx](coord *saga.Coordinator, catalogue Catalogue) *OrderCommands[T] {
	return &OrderCommands[T]{coord, catalogue}
}

// command is one delivery, read.
type command struct {
	place  *saga.PlaceRequest
	cancel *saga.CancelRequest
	err    error
}

// Prepare reads the commands and prices the orders.
func (o *OrderCommands[T]) Prepare(ctx context.Context, batch []*consumers.Delivery) (consumers.Apply[T], error) {
	drafts := make(map[*consumers.Delivery]*domain.Draft, len(batch))
	commands := make(map[*consumers.Delivery]*command, len(batch))
	var skus []domain.SKU
	for _, d := range batch {
		c, draft := read(d)
		commands[d] = c
		if draft == nil {
			continue
		}
		drafts[d] = draft
		if draft.Check() == nil { // what is wrong in itself costs no look at the catalogue
			skus = append(skus, draft.SKUs()...)
		}
	}
	slices.Sort(skus)
	products := map[domain.SKU]domain.Product{}
	if skus = slices.Compact(skus); len(skus) > 0 {
		var err error
		if products, err = o.catalogue.Products(ctx, skus); err != nil {
			return nil, fmt.Errorf("prices: %w", err)
		}
	}
	for d, draft := range drafts {
		p := commands[d].place
		p.Hash = saga.HashDraft(draft)
		if p.Order, p.Refusal = draft.Price(products); p.Refusal != nil {
			p.Order = saga.RefusedOrder(draft, p.Refusal)
		}
	}
	return func(ctx context.Context, tx T, part []*consumers.Delivery) ([]consumers.Result, error) {
		return o.apply(ctx, tx, part, commands)
	}, nil
}

// read translates a delivery. draft is nil unless an order is to be placed.
func read(d *consumers.Delivery) (c *command, draft *domain.Draft) {
	switch m := d.Data.(type) {
	case *events.PlaceOrder:
		id, err := idOf(d, m.OrderID)
		if err != nil {
			return &command{err: err}, nil
		}
		return &command{place: &saga.PlaceRequest{Given: true, Cause: d.ID, Trace: d.Trace}}, draftOf(id, m)
	case *events.CancelOrder:
		id, err := idOf(d, m.OrderID)
		if err != nil {
			return &command{err: err}, nil
		}
		return &command{cancel: &saga.CancelRequest{Order: id, Reason: m.Reason, Cause: d.ID, Trace: d.Trace, Await: true}}, nil
	}
	return &command{err: misrouted(d).Err}, nil
}

// idOf reads the order id of a command's body. The codec has compared it with the record's key already.
func idOf(d *consumers.Delivery, s string) (domain.OrderID, error) {
	id, err := domain.ParseOrderID(s)
	if err != nil {
		return id, asPoison(string(d.Type), err)
	}
	if id != orderOf(d) {
		return id, poison("%s: order_id %s is not the record's key %s", d.Type, id, orderOf(d))
	}
	return id, nil
}

func draftOf(id domain.OrderID, m *events.PlaceOrder) *domain.Draft {
	d := &domain.Draft{ID: id, CustomerID: m.CustomerID, Currency: m.Currency, PaymentMethod: m.PaymentMethod, Items: make([]domain.DraftItem, len(m.Items))}
	for i, it := range m.Items {
		d.Items[i] = domain.DraftItem{SKU: domain.SKU(it.SKU), Quantity: it.Quantity, UnitPrice: it.UnitPriceMinor}
	}
	return d
}

// wave is commands that one call of the coordinator takes together: all place, or all cancel.
type wave []int // places in the batch

// waves keeps the order of records within an order, and puts together all that may run together otherwise: even waves place, odd
// ones cancel.
func waves(batch []*consumers.Delivery, commands map[*consumers.Delivery]*command) []wave {
	var out []wave
	at := make(map[domain.OrderID]int, len(batch))
	for i, d := range batch {
		c := commands[d]
		if c.err != nil {
			continue
		}
		n := at[orderOf(d)]
		if cancels := c.cancel != nil; cancels != (n%2 == 1) {
			n++
		}
		at[orderOf(d)] = n
		for len(out) <= n {
			out = append(out, nil)
		}
		out[n] = append(out[n], i)
	}
	return out
}

func (o *OrderCommands[T]) apply(
	ctx context.Context, tx T, part []*consumers.Delivery, commands map[*consumers.Delivery]*command,
) ([]consumers.Result, error) {
	out := make([]consumers.Result, len(part))
	for i, d := range part {
		out[i].Err = commands[d].err
	}
	ws := waves(part, commands)
	if len(ws) > 1 { // all locks at once, sorted: a second call would take its own out of order
		if err := tx.LockOrderIDs(ctx, ordersOf(part), false); err != nil {
			return nil, err
		}
	}
	for n, w := range ws {
		var err error
		if n%2 == 0 {
			err = o.place(ctx, tx, w, part, commands, out)
		} else {
			err = o.cancel(ctx, tx, w, part, commands, out)
		}
		if err != nil {
			return nil, err
		}
	}
	return out, nil
}

func (o *OrderCommands[T]) place(
	ctx context.Context, tx T, w wave, part []*consumers.Delivery, commands map[*consumers.Delivery]*command, out []consumers.Result,
) error {
	if len(w) == 0 {
		return nil
	}
	reqs := make([]saga.PlaceRequest, len(w))
	for j, i := range w {
		reqs[j] = *commands[part[i]].place
		order := *reqs[j].Order // the coordinator writes to it, and the transaction may run again
		reqs[j].Order = &order
	}
	placed, err := o.coord.Place(ctx, tx, reqs)
	if err != nil {
		return err
	}
	for j, i := range w {
		switch placed[j].Outcome {
		case saga.PlacedNew:
			out[i].Out = placed[j].Out
		case saga.PlacedBefore: // the first one was answered
		case saga.PlacedConflict:
			out[i].Err = poison("order id reused by another order: %s was placed before with other content; draw a new order_id for each order", reqs[j].Order.ID)
		}
	}
	return nil
}

func (o *OrderCommands[T]) cancel(
	ctx context.Context, tx T, w wave, part []*consumers.Delivery, commands map[*consumers.Delivery]*command, out []consumers.Result,
) error {
	if len(w) == 0 {
		return nil
	}
	reqs := make([]saga.CancelRequest, len(w))
	for j, i := range w {
		reqs[j] = *commands[part[i]].cancel
	}
	res, err := o.coord.Cancel(ctx, tx, reqs)
	if err != nil {
		return err
	}
	for j, i := range w { // a cancel that came too late changes nothing: OrderConfirmed has told already
		out[i] = consumers.Result{Out: res[j].Out, Err: res[j].Err}
	}
	return nil
}
