package saga

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"slices"

	"github.com/google/uuid"

	"ordersaga/domain"
	"ordersaga/events"
)

// PlaceRequest is one order to be placed, priced, or refused before it could be.
type PlaceRequest struct {
	Order   *domain.Order
	Refusal *domain.Refusal // the order is stored as rejected; only commands from the topic are placed so
	Hash    int64           // HashDraft of what was asked for
	Given   bool            // the id was chosen outside, so it may be taken or tombstoned
	Cause   uuid.UUID
	Trace   events.Trace
}

// PlaceOutcome is what became of a PlaceRequest.
type PlaceOutcome int8

// The outcomes of placing.
const (
	PlacedNew      PlaceOutcome = iota
	PlacedBefore                // the same order was placed before: nothing was written
	PlacedConflict              // the order id belongs to another order
)

// Placed is what became of a PlaceRequest, with the messages to emit in the same transaction.
type Placed struct {
	Outcome PlaceOutcome
	Out     []events.Envelope
}

// HashDraft tells whether an order id is asked for again with the same content.
func HashDraft(d *domain.Draft) int64 {
	x := *d
	x.ID = domain.OrderID{}
	b, err := json.Marshal(x) // fields of a struct keep their order
	if err != nil {
		panic("saga: a draft always marshals: " + err.Error())
	}
	h := sha256.Sum256(b)
	return int64(binary.BigEndian.Uint64(h[:8])) //nolint:gosec // bits, not a number
}

// RefusedOrder is what is stored of an order that could not be priced: enough to show why it ended. It keeps what every stored order
// keeps: lines sorted by SKU, each once, with a quantity that an order may have.
func RefusedOrder(d *domain.Draft, r *domain.Refusal) *domain.Order {
	o := &domain.Order{
		ID: d.ID, CustomerID: clip(d.CustomerID), PaymentMethod: clip(d.PaymentMethod), Status: domain.Rejected, Reason: r.Reason,
		Total: domain.Money{Currency: "XXX"}, // ISO 4217 for no currency
	}
	if domain.ValidCurrency(d.Currency) {
		o.Total.Currency = d.Currency
	}
	for _, it := range d.Items {
		l := domain.Line{SKU: domain.SKU(clip(string(it.SKU))), Quantity: it.Quantity}
		if l.SKU != it.SKU || it.Quantity < 1 || it.Quantity > domain.MaxQuantity || len(o.Lines) == domain.MaxLines {
			continue // no order can have it; the refusal says so
		}
		at, twice := slices.BinarySearchFunc(o.Lines, l, func(a, b domain.Line) int { return cmp.Compare(a.SKU, b.SKU) })
		if l.SKU != "" && !twice {
			o.Lines = slices.Insert(o.Lines, at, l)
		}
	}
	return o
}

func clip(s string) string { return clipTo(s, domain.MaxIDLength) }

// maxNote bounds what a person says of a decision, in bytes.
const maxNote = 1000

func clipTo(s string, n int) string {
	b := []byte(s)
	if len(b) > n {
		b = b[:n]
	}
	b = slices.DeleteFunc(b, func(c byte) bool { return c < 0x20 || c == 0x7f })
	return string([]rune(string(b))) // mends a rune that was cut
}

// Place inserts orders with their sagas and answers the messages they start with. Reads come first, then the writes.
func (c *Coordinator) Place(ctx context.Context, tx Tx, reqs []PlaceRequest) ([]Placed, error) {
	var given []domain.OrderID
	for i := range reqs {
		if reqs[i].Given {
			given = append(given, reqs[i].Order.ID)
		}
	}
	var taken map[domain.OrderID]int64
	var buried map[domain.OrderID]bool
	if len(given) > 0 {
		slices.SortFunc(given, domain.OrderID.Compare)
		given = slices.Compact(given)
		err := tx.LockOrderIDs(ctx, given, true)
		if err == nil {
			taken, err = tx.FindOrders(ctx, given)
		}
		if err == nil {
			buried, err = tx.Tombstones(ctx, given)
		}
		if err != nil {
			return nil, err
		}
		if taken == nil {
			taken = map[domain.OrderID]int64{}
		}
	}
	out := make([]Placed, len(reqs))
	batch := make([]Placement, 0, len(reqs))
	history := make([]HistoryEntry, 0, len(reqs))
	for i := range reqs {
		r := &reqs[i]
		if hash, is := taken[r.Order.ID]; is {
			out[i].Outcome = PlacedBefore
			if hash != r.Hash {
				out[i].Outcome = PlacedConflict
			}
			continue
		}
		if r.Given {
			taken[r.Order.ID] = r.Hash // the same id may come twice in one batch
		}
		p, h, msgs, err := c.placement(r, buried[r.Order.ID])
		if err != nil {
			return nil, err
		}
		batch, history, out[i].Out = append(batch, p), append(history, h), msgs
	}
	if len(batch) == 0 {
		return out, nil
	}
	if err := tx.InsertOrders(ctx, batch); err != nil {
		return nil, err
	}
	return out, tx.AppendHistory(ctx, history)
}

func (c *Coordinator) placement(r *PlaceRequest, buried bool) (Placement, HistoryEntry, []events.Envelope, error) {
	def := c.Defs.Current()
	in, detail := Input{Kind: Started}, ""
	switch {
	case r.Refusal != nil:
		in, detail = Input{Kind: PlacementRefused, Name: string(r.Refusal.Reason), Reason: r.Refusal.Detail}, r.Refusal.Detail
	case buried:
		in = Input{Kind: CancelRequested, Reason: "cancelled before it was placed"}
	}
	o, err := def.Step(def.New(), in)
	if err != nil {
		return Placement{}, HistoryEntry{}, nil, err
	}
	r.Order.Status, r.Order.Reason, r.Order.Sequence = o.State.Status, o.State.Reason, o.State.Sequence
	inst := &Instance{Order: r.Order.ID, Total: r.Order.Total, State: o.State}
	return Placement{Order: r.Order, Hash: r.Hash, State: o.State, Timer: o.Timer},
		entry(inst, &Fact{Cause: r.Cause}, in),
		c.messages(def, inst, r.Order, o, r.Trace, detail), nil
}

// CancelRequest asks that an order does not end confirmed.
type CancelRequest struct {
	Order  domain.OrderID
	Reason string // in the customer's words, for the history
	Cause  uuid.UUID
	Trace  events.Trace
	Actor  string
	Await  bool // an order not seen yet is cancelled when it comes
}

// CancelOutcome is what a cancel came to.
type CancelOutcome int8

// The outcomes of cancelling.
const (
	CancelAccepted CancelOutcome = iota // the order will not end confirmed
	CancelTooLate                       // it is confirmed
	CancelUnknown                       // there is no such order (and Await was not set)
	CancelAwaits                        // there is no such order yet: a tombstone waits for it
)

// CancelResult is what became of a CancelRequest, with the messages to emit in the same transaction.
type CancelResult struct {
	Outcome CancelOutcome
	State   State
	Out     []events.Envelope
	Err     error // a definition that this build does not have
}

// Cancel applies cancels in order.
func (c *Coordinator) Cancel(ctx context.Context, tx Tx, reqs []CancelRequest) ([]CancelResult, error) {
	facts := make([]Fact, len(reqs))
	ids := make([]domain.OrderID, len(reqs))
	for i := range reqs {
		r := &reqs[i]
		ids[i] = r.Order
		facts[i] = Fact{Order: r.Order, Cause: r.Cause, Trace: r.Trace, Actor: r.Actor, Input: Input{Kind: CancelRequested, Reason: clipTo(r.Reason, maxNote)}}
	}
	slices.SortFunc(ids, domain.OrderID.Compare)
	// Placing takes the same lock: either it sees the tombstone or we see the order.
	if err := tx.LockOrderIDs(ctx, slices.Compact(ids), false); err != nil {
		return nil, err
	}
	adv, err := c.Advance(ctx, tx, facts)
	if err != nil {
		return nil, err
	}
	out := make([]CancelResult, len(reqs))
	var bury []domain.OrderID
	for i := range reqs {
		out[i].State, out[i].Out = adv[i].State, adv[i].Out
		switch {
		case errors.Is(adv[i].Err, ErrNoSaga) && reqs[i].Await:
			out[i].Outcome = CancelAwaits
			bury = append(bury, reqs[i].Order)
		case errors.Is(adv[i].Err, ErrNoSaga):
			out[i].Outcome = CancelUnknown
		case adv[i].Err != nil:
			out[i].Err = adv[i].Err
		case adv[i].State.Status == domain.Confirmed:
			out[i].Outcome = CancelTooLate
		}
	}
	if len(bury) > 0 {
		return out, tx.InsertTombstones(ctx, bury)
	}
	return out, nil
}
