package saga

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/google/uuid"

	"ordersaga/domain"
	"ordersaga/events"
)

// Fact is an input for one order's saga, with what caused it.
type Fact struct {
	Order domain.OrderID
	Input Input        // where Reply is nil
	Reply *Reply       // translated with the definition that the saga runs under
	Cause uuid.UUID    // id of the message; zero for a person or the clock
	Trace events.Trace // of the message: what is emitted for it continues it
	Actor string
}

// Reply is a participant's answer as it came.
type Reply struct {
	Type events.Name
	Data any
}

// Coordinator feeds batches of facts to the machine. It starts no goroutine and keeps no state.
type Coordinator struct {
	Defs *Definitions
	Now  Clock // for the expiry of commands and the ids of messages
}

// Advanced is what became of one Fact.
type Advanced struct {
	Out     []events.Envelope // to be emitted in the same transaction, in order
	State   State             // after it
	Changed bool
	Err     error // no such saga, or a fact that can't be meant for it: poison
}

// impossibleError is an input that no repetition will make possible.
type impossibleError struct {
	msg   string
	cause error
}

func (e *impossibleError) Error() string { return e.msg }
func (e *impossibleError) Unwrap() error { return e.cause }
func (e *impossibleError) Poison() bool  { return true }

// ErrNoSaga says that an order has no saga.
var ErrNoSaga = errors.New("no such saga")

// Advance applies facts in order, several for one order too, and saves what changed: one read, a few multi-row writes.
func (c *Coordinator) Advance(ctx context.Context, tx Tx, facts []Fact) ([]Advanced, error) {
	ids := make([]domain.OrderID, len(facts))
	for i := range facts {
		ids[i] = facts[i].Order
	}
	slices.SortFunc(ids, domain.OrderID.Compare)
	ids = slices.Compact(ids)
	sagas, err := tx.LockSagas(ctx, ids)
	if err != nil {
		return nil, err
	}
	reissued, err := c.ordersFor(ctx, tx, facts)
	if err != nil {
		return nil, err
	}
	out := make([]Advanced, len(facts))
	changes := make([]Change, len(ids)) // of ids, in their order; without an Instance: none
	changed := 0
	history := make([]HistoryEntry, 0, len(facts))
	for i := range facts {
		f := &facts[i]
		in := sagas[f.Order]
		def, input, o, err := c.decide(in, f)
		if err != nil {
			out[i].Err = err
			continue
		}
		out[i].State = o.State
		if !o.Changed {
			continue
		}
		order := reissued[f.Order]
		if order == nil && slices.ContainsFunc(o.Commands, madeOfOrder) {
			out[i].State = in.State
			out[i].Err = fmt.Errorf("order %s is not there to command it again", f.Order)
			continue
		}
		out[i].Changed = true
		at, _ := slices.BinarySearchFunc(ids, f.Order, domain.OrderID.Compare)
		if changes[at].Instance == nil {
			changed++
		}
		changes[at].note(in, &o)
		in.State = o.State
		out[i].Out = c.messages(def, in, order, o, f.Trace, "")
		history = append(history, entry(in, f, input))
	}
	if changed == 0 {
		return out, nil
	}
	if changed < len(changes) {
		changes = slices.DeleteFunc(changes, func(ch Change) bool { return ch.Instance == nil })
	}
	if err := tx.SaveSagas(ctx, changes); err != nil {
		return nil, err
	}
	return out, tx.AppendHistory(ctx, history)
}

// decide feeds one fact to the machine, by the definition that the saga runs under.
func (c *Coordinator) decide(in *Instance, f *Fact) (*Definition, Input, Output, error) {
	if in == nil {
		return nil, Input{}, Output{}, &impossibleError{
			fmt.Sprintf("there is no saga of order %s: was its database restored to an earlier time?", f.Order), ErrNoSaga,
		}
	}
	def, err := c.Defs.Of(in.State.Definition, in.State.DefVersion)
	if err != nil {
		return nil, Input{}, Output{}, err
	}
	input := f.Input
	if f.Reply != nil {
		var ok bool
		if input, ok = def.InputOf(f.Reply.Type, f.Reply.Data); !ok {
			return nil, Input{}, Output{}, &impossibleError{msg: fmt.Sprintf("%s is no reply that a saga of definition %s v%d waits for", f.Reply.Type, def.Name, def.Version)}
		}
	}
	o, err := def.Step(in.State, input)
	if err != nil {
		return nil, Input{}, Output{}, &impossibleError{err.Error(), err}
	}
	return def, input, o, nil
}

// madeOfOrder reports a command whose body holds more than the saga itself remembers.
func madeOfOrder(n events.Name) bool {
	return n == events.TReserveStock || n == events.TAuthorizePayment
}

// ordersFor loads what first-wave commands are made of, for the inputs that make them anew.
func (c *Coordinator) ordersFor(ctx context.Context, tx Tx, facts []Fact) (map[domain.OrderID]*domain.Order, error) {
	var ids []domain.OrderID
	for i := range facts {
		if k := facts[i].Input.Kind; k == OperatorRetry || k == DeadlineHeld {
			ids = append(ids, facts[i].Order)
		}
	}
	if len(ids) == 0 {
		return nil, nil //nolint:nilnil // an empty map
	}
	return tx.LoadOrders(ctx, ids)
}

func entry(in *Instance, f *Fact, input Input) HistoryEntry {
	return HistoryEntry{
		Order: in.Order, Version: in.State.Version, Cause: f.Cause, Input: input,
		Phase: in.State.Phase, Status: in.State.Status, Actor: f.Actor,
	}
}

// note merges the changes that one batch makes to one saga: the last state, the last word on the deadline.
func (ch *Change) note(in *Instance, o *Output) {
	ch.Instance = in
	if o.State.Status != in.State.Status || o.State.Sequence != in.State.Sequence {
		ch.OrderChanged = true
	}
	if o.Timer.Change {
		ch.Timer = o.Timer
	}
	ch.Ended = o.State.Phase.Ended()
}

// messages makes the commands and public events of a decision. order is given when it was just placed, else nil.
func (c *Coordinator) messages(def *Definition, in *Instance, order *domain.Order, o Output, tr events.Trace, detail string) []events.Envelope {
	out := make([]events.Envelope, 0, len(o.Commands)+len(o.Facts))
	seq := o.State.Sequence - int32(len(o.Facts)) //nolint:gosec // a handful at most
	for _, n := range o.Facts {
		seq++
		out = append(out, events.Envelope{
			ID: events.NewID(), Type: n, OrderID: uuid.UUID(in.Order), Sequence: seq, Trace: tr,
			Data: publicEvent(n, in, order, seq, detail),
		})
	}
	for _, n := range o.Commands {
		out = append(out, events.Envelope{
			ID: events.NewID(), Type: n, OrderID: uuid.UUID(in.Order), Trace: tr,
			Data: c.command(def, n, in, order),
		})
	}
	return out
}

func publicEvent(n events.Name, in *Instance, order *domain.Order, seq int32, detail string) *events.OrderEvent {
	e := &events.OrderEvent{
		OrderID: in.Order.String(), Sequence: seq, Status: string(in.State.Status), Reason: string(in.State.Reason),
		TotalMinor: in.Total.Minor, Currency: in.Total.Currency,
	}
	if n != events.TOrderPlaced {
		e.Detail = detail
		return e
	}
	e.Status, e.Reason = string(domain.Pending), "" // also when the same decision went further
	if order != nil {
		e.CustomerID, e.PaymentMethod = order.CustomerID, order.PaymentMethod
		e.Items = make([]events.OrderItem, len(order.Lines))
		for i := range order.Lines {
			l := &order.Lines[i]
			e.Items[i] = events.OrderItem{SKU: string(l.SKU), Quantity: l.Quantity, UnitPriceMinor: &l.UnitPrice}
		}
	}
	return e
}

func (c *Coordinator) command(def *Definition, n events.Name, in *Instance, order *domain.Order) any {
	switch n {
	case events.TReserveStock:
		return &events.ReserveStock{Lines: stockLines(order), ExpiresAtMs: c.expiry(def)}
	case events.TAuthorizePayment:
		return &events.AuthorizePayment{
			AmountMinor: in.Total.Minor, Currency: in.Total.Currency,
			PaymentMethod: order.PaymentMethod, ExpiresAtMs: c.expiry(def),
		}
	case events.TCapturePayment:
		return &events.CapturePayment{AmountMinor: in.Total.Minor, Currency: in.Total.Currency, ExpiresAtMs: c.expiry(def)}
	default: // the rest have empty bodies
		t, ok := events.TypeOf(n)
		if !ok {
			panic("saga: definition names a command that the table of events does not have: " + string(n))
		}
		return t.New()
	}
}

// expiry bounds how late a forward command may still act. It is generous: the saga's own deadline, which starts no later, is what
// decides; this only keeps a command that lay about for hours from calling a gateway for an order that was undone long ago.
func (c *Coordinator) expiry(def *Definition) int64 {
	return c.Now().Add(def.Limits.Forward + time.Minute).UnixMilli()
}

func stockLines(o *domain.Order) []*events.StockLine {
	out := make([]*events.StockLine, len(o.Lines))
	for i := range o.Lines {
		out[i] = &events.StockLine{Sku: string(o.Lines[i].SKU), Quantity: o.Lines[i].Quantity}
	}
	return out
}
