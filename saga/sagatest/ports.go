package sagatest

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"time"

	"ordersaga/domain"
	"ordersaga/saga"
)

const (
	tableSagas        = "sagas"
	tableOrders       = "orders"
	tableOrderIDs     = "order ids"
	tableTombstones   = "tombstones"
	tableKeys         = "idempotency keys"
	tableReservations = "reservations"
	tableStock        = "stock"
	tablePayments     = "payments"
	tableAway         = "away"
)

type sagaRow struct {
	in       saga.Instance
	deadline time.Time
}

type orderRow struct {
	order domain.Order
	hash  int64
}

type keyID struct{ caller, key string }

func cloneInstance(in *saga.Instance) saga.Instance {
	c := *in
	c.State.Steps, c.State.Undos = slices.Clone(in.State.Steps), slices.Clone(in.State.Undos)
	if in.State.Stuck != nil {
		stuck := *in.State.Stuck
		c.State.Stuck = &stuck
	}
	return c
}

func cloneOrder(o *domain.Order) domain.Order {
	c := *o
	c.Lines = slices.Clone(o.Lines)
	return c
}

// LockSagas implements saga.Tx.
func (tx *Tx) LockSagas(_ context.Context, ids []domain.OrderID) (map[domain.OrderID]*saga.Instance, error) {
	out := map[domain.OrderID]*saga.Instance{}
	for _, id := range ids {
		if r, ok := lock[sagaRow](tx, tableSagas, id); ok {
			in := cloneInstance(&r.in)
			out[id] = &in
		}
	}
	return out, nil
}

func (tx *Tx) deadline(t saga.Timer) time.Time {
	if t.After == 0 {
		return time.Time{}
	}
	return tx.s.Now().Add(t.After)
}

// SaveSagas implements saga.Tx.
func (tx *Tx) SaveSagas(_ context.Context, changes []saga.Change) error {
	for i := range changes {
		ch := &changes[i]
		prior, _ := read[sagaRow](tx, tableSagas, ch.Order)
		if ch.State.Version <= prior.in.State.Version {
			return &DataError{fmt.Sprintf("version %d of saga %s does not follow %d", ch.State.Version, ch.Order, prior.in.State.Version)}
		}
		r := sagaRow{in: cloneInstance(ch.Instance), deadline: prior.deadline}
		if ch.Timer.Change {
			r.deadline = tx.deadline(ch.Timer)
		}
		if st := r.in.State.Stuck; st != nil && st.Since.IsZero() {
			st.Since = tx.s.Now()
		}
		if ch.Ended != r.in.State.Phase.Ended() || ch.Ended && !r.deadline.IsZero() {
			return &DataError{fmt.Sprintf("saga %s ended with a deadline", ch.Order)}
		}
		if err := tx.update(tableSagas, ch.Order, r); err != nil {
			return err
		}
		if ch.OrderChanged {
			o, ok := read[orderRow](tx, tableOrders, ch.Order)
			if !ok {
				return &DataError{"a saga without an order"}
			}
			if o.order.Status.Terminal() && o.order.Status != ch.State.Status {
				return &DataError{fmt.Sprintf("order %s goes from %s to %s", ch.Order, o.order.Status, ch.State.Status)}
			}
			o.order.Status, o.order.Reason, o.order.Sequence = ch.State.Status, ch.State.Reason, ch.State.Sequence
			tx.write(tableOrders, ch.Order, o)
		}
	}
	return nil
}

// AppendHistory implements saga.Tx.
func (tx *Tx) AppendHistory(_ context.Context, entries []saga.HistoryEntry) error {
	tx.history = append(tx.history, entries...)
	return nil
}

// LockOrderIDs implements saga.Tx.
func (tx *Tx) LockOrderIDs(_ context.Context, ids []domain.OrderID, placing bool) error {
	for _, id := range ids {
		n, _ := lock[int64](tx, tableOrderIDs, id)
		if !placing {
			tx.write(tableOrderIDs, id, n+1) // whoever else holds it at once conflicts
		}
	}
	return sorted(ids, domain.OrderID.Compare)
}

// FindOrders implements saga.Tx.
func (tx *Tx) FindOrders(_ context.Context, ids []domain.OrderID) (map[domain.OrderID]int64, error) {
	out := map[domain.OrderID]int64{}
	if tx.presumed {
		return out, nil
	}
	for _, id := range ids {
		if r, ok := read[orderRow](tx, tableOrders, id); ok {
			out[id] = r.hash
		}
	}
	return out, nil
}

// InsertOrders implements saga.Tx.
func (tx *Tx) InsertOrders(_ context.Context, batch []saga.Placement) error {
	for i := range batch {
		p := &batch[i]
		if err := checkOrder(p.Order); err != nil {
			return err
		}
		if err := tx.insert(tableOrders, p.Order.ID, orderRow{cloneOrder(p.Order), p.Hash}); err != nil {
			return err
		}
		in := saga.Instance{Order: p.Order.ID, Total: p.Order.Total, State: p.State}
		r := sagaRow{in: cloneInstance(&in), deadline: tx.deadline(p.Timer)}
		if err := tx.insert(tableSagas, p.Order.ID, r); err != nil {
			return err
		}
	}
	return nil
}

// checkOrder is what the CHECK constraints of the tables hold.
func checkOrder(o *domain.Order) error {
	if o.Total.Minor < 0 || o.Total.Minor > domain.MaxMinor || !domain.ValidCurrency(o.Total.Currency) {
		return &DataError{fmt.Sprintf("total %s", o.Total)}
	}
	for i, l := range o.Lines {
		if l.Quantity < 1 || l.Quantity > domain.MaxQuantity || l.SKU == "" || i > 0 && o.Lines[i-1].SKU >= l.SKU {
			return &DataError{fmt.Sprintf("line %d: %+v", i, l)}
		}
	}
	for _, s := range []string{o.CustomerID, o.PaymentMethod} {
		if bytes.IndexByte([]byte(s), 0) >= 0 || len(s) > domain.MaxIDLength {
			return &DataError{"invalid text"}
		}
	}
	return nil
}

// LoadOrders implements saga.Tx.
func (tx *Tx) LoadOrders(_ context.Context, ids []domain.OrderID) (map[domain.OrderID]*domain.Order, error) {
	out := map[domain.OrderID]*domain.Order{}
	for _, id := range ids {
		if r, ok := read[orderRow](tx, tableOrders, id); ok {
			o := cloneOrder(&r.order)
			out[id] = &o
		}
	}
	return out, nil
}

// Tombstones implements saga.Tx.
func (tx *Tx) Tombstones(_ context.Context, ids []domain.OrderID) (map[domain.OrderID]bool, error) {
	out := map[domain.OrderID]bool{}
	for _, id := range ids {
		if is, _ := read[bool](tx, tableTombstones, id); is {
			out[id] = true
		}
	}
	return out, nil
}

// InsertTombstones implements saga.Tx; one that is there stays.
func (tx *Tx) InsertTombstones(_ context.Context, ids []domain.OrderID) error {
	for _, id := range ids {
		tx.write(tableTombstones, id, true)
	}
	return nil
}

// FindKeys implements saga.Tx.
func (tx *Tx) FindKeys(_ context.Context, keys []saga.IdempotencyKey) ([]*saga.IdempotencyKey, error) {
	out := make([]*saga.IdempotencyKey, len(keys))
	if tx.presumed {
		return out, nil
	}
	for i, k := range keys {
		if r, ok := read[saga.IdempotencyKey](tx, tableKeys, keyID{k.Caller, k.Key}); ok {
			r.Answer = slices.Clone(r.Answer)
			out[i] = &r
		}
	}
	return out, nil
}

// InsertKeys implements saga.Tx.
func (tx *Tx) InsertKeys(_ context.Context, keys []saga.IdempotencyKey) error {
	for _, k := range keys {
		k.Answer = slices.Clone(k.Answer)
		if err := tx.insert(tableKeys, keyID{k.Caller, k.Key}, k); err != nil {
			return err
		}
	}
	return nil
}

// DueSagas implements saga.Tx.
func (tx *Tx) DueSagas(_ context.Context, within time.Duration, limit int) ([]domain.OrderID, error) {
	now := tx.s.Now()
	from := time.Time{}
	if within > 0 {
		from = now.Add(-within)
	}
	var ids []domain.OrderID
	for id, r := range each[sagaRow](tx.s, tableSagas) {
		if order, ok := id.(domain.OrderID); ok && !r.deadline.IsZero() && r.deadline.Before(now) && !r.deadline.Before(from) {
			ids = append(ids, order)
		}
	}
	slices.SortFunc(ids, domain.OrderID.Compare)
	ids = ids[:min(limit, len(ids))]
	for _, id := range ids {
		if r, _ := lock[sagaRow](tx, tableSagas, id); r.deadline.IsZero() || !r.deadline.Before(now) {
			return nil, errConflict // it moved between the scan and the lock
		}
	}
	return ids, nil
}

// awayFor is how long a report of a dependency that is away holds.
const awayFor = time.Minute

// Away implements saga.Tx.
func (tx *Tx) Away(context.Context) (map[string]bool, error) {
	out := map[string]bool{}
	for name, since := range each[time.Time](tx.s, tableAway) {
		if n, ok := name.(string); ok && tx.s.Now().Sub(since) <= awayFor {
			out[n] = true
		}
	}
	return out, nil
}

// SetAway implements steps.PaymentTx.
func (tx *Tx) SetAway(_ context.Context, dependency string, away bool) error {
	var since time.Time
	if away {
		since = tx.s.Now()
	}
	tx.write(tableAway, dependency, since)
	return nil
}

// Audit implements saga.Tx.
func (tx *Tx) Audit(_ context.Context, entries []saga.AuditEntry) error {
	tx.audit = append(tx.audit, entries...)
	return nil
}

// LockReservations implements steps.StockTx.
func (tx *Tx) LockReservations(_ context.Context, orders []domain.OrderID) (map[domain.OrderID]*domain.Reservation, error) {
	out := map[domain.OrderID]*domain.Reservation{}
	for _, id := range orders {
		if r, ok := lock[domain.Reservation](tx, tableReservations, id); ok {
			r.Lines = slices.Clone(r.Lines)
			out[id] = &r
		}
	}
	return out, sorted(orders, domain.OrderID.Compare)
}

// LockStock implements steps.StockTx.
func (tx *Tx) LockStock(_ context.Context, skus []domain.SKU) (map[domain.SKU]*domain.Stock, error) {
	out := map[domain.SKU]*domain.Stock{}
	for _, sku := range skus {
		if s, ok := lock[domain.Stock](tx, tableStock, sku); ok {
			out[sku] = &s
		}
	}
	return out, sorted(skus, cmp.Compare[domain.SKU])
}

// InsertReservations implements steps.StockTx.
func (tx *Tx) InsertReservations(_ context.Context, rs []domain.Reservation) error {
	for _, r := range rs {
		r.Lines = slices.Clone(r.Lines)
		if err := tx.insert(tableReservations, r.Order, r); err != nil {
			return err
		}
	}
	return sorted(rs, func(a, b domain.Reservation) int { return a.Order.Compare(b.Order) })
}

// UpdateReservations implements steps.StockTx.
func (tx *Tx) UpdateReservations(_ context.Context, rs []domain.Reservation) error {
	for _, r := range rs {
		r.Lines = slices.Clone(r.Lines)
		if err := tx.update(tableReservations, r.Order, r); err != nil {
			return err
		}
	}
	return sorted(rs, func(a, b domain.Reservation) int { return a.Order.Compare(b.Order) })
}

// SaveStock implements steps.StockTx; it refuses negative counts, as the table's CHECK does.
func (tx *Tx) SaveStock(_ context.Context, stock []domain.Stock) error {
	for _, s := range stock {
		if s.Available < 0 || s.Reserved < 0 || s.Sold < 0 {
			return &DataError{fmt.Sprintf("stock of %q would be negative: %+v", s.SKU, s)}
		}
		if err := tx.update(tableStock, s.SKU, s); err != nil {
			return err
		}
	}
	return sorted(stock, func(a, b domain.Stock) int { return cmp.Compare(a.SKU, b.SKU) })
}

type stepID struct {
	order domain.OrderID
	op    domain.PaymentOp
}

var paymentOps = []domain.PaymentOp{domain.Authorize, domain.Capture, domain.Reverse}

// LockPayments implements steps.PaymentTx.
func (tx *Tx) LockPayments(_ context.Context, orders []domain.OrderID) (map[domain.OrderID]*domain.Payment, error) {
	out := map[domain.OrderID]*domain.Payment{}
	for _, id := range orders {
		p := domain.NewPayment(id)
		for _, op := range paymentOps {
			if s, ok := lock[domain.PaymentStep](tx, tablePayments, stepID{id, op}); ok {
				p.Steps[op] = &s
			}
		}
		out[id] = p
	}
	return out, sorted(orders, domain.OrderID.Compare)
}

// SavePayments implements steps.PaymentTx.
func (tx *Tx) SavePayments(_ context.Context, ps []*domain.Payment) error {
	for _, p := range ps {
		for _, op := range slices.Sorted(maps.Keys(p.Changed)) {
			if err := tx.update(tablePayments, stepID{p.Order, op}, *p.Steps[op]); err != nil {
				return err
			}
		}
	}
	return sorted(ps, func(a, b *domain.Payment) int { return a.Order.Compare(b.Order) })
}
