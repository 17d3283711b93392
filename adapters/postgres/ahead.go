package postgres

import (
	"context"
	"slices"

	"ordersaga/domain"
	"ordersaga/saga"
)

// readAhead is a read that was foreseen: its statements go with the next round trip, whatever that is for, and its answer waits for the call
// that asks for it. At low rates a transaction's price is its round trips, each two processes to wake up.
//
// Only what is asked for first is read ahead. A second call in the same transaction reads again, and sees what was written meanwhile.
type readAhead[V any] struct {
	ids  map[domain.OrderID]bool
	rows map[domain.OrderID]V
}

// foreseen answers the rows of ids if they were read ahead, and forgets them; nil if they were not, or not all of them.
func foreseen[V any](ctx context.Context, t *Tx, at **readAhead[V], ids []domain.OrderID) (map[domain.OrderID]V, error) {
	a := *at
	if a == nil {
		return nil, nil //nolint:nilnil // nothing was foreseen
	}
	*at = nil
	if len(t.ahead) > 0 { // no round trip has taken it along
		if err := t.send(ctx, false); err != nil {
			return nil, err
		}
	}
	out := make(map[domain.OrderID]V, len(ids))
	for _, id := range ids {
		if !a.ids[id] {
			return nil, nil //nolint:nilnil // as above
		}
		if v, ok := a.rows[id]; ok {
			out[id] = v
		}
	}
	return out, nil
}

func sorted(ids []domain.OrderID) []domain.OrderID {
	ids = slices.Clone(ids)
	slices.SortFunc(ids, domain.OrderID.Compare)
	return slices.Compact(ids)
}

func set(ids []domain.OrderID) map[domain.OrderID]bool {
	out := make(map[domain.OrderID]bool, len(ids))
	for _, id := range ids {
		out[id] = true
	}
	return out
}

// foresee makes what queue queues go with the next round trip instead.
func (t *Tx) foresee(queue func()) {
	n := len(t.queued)
	queue()
	t.ahead = append(t.ahead, t.queued[n:]...)
	t.queued = t.queued[:n:n]
}

// ForeseeSagas reads ahead what LockSagas will be asked for.
func (t *Tx) ForeseeSagas(ids []domain.OrderID) {
	ids = sorted(ids)
	if rows := t.presumeSagas(ids); rows != nil {
		t.sagasAhead = &readAhead[*saga.Instance]{set(ids), rows}
		return
	}
	rows := make(map[domain.OrderID]*saga.Instance, len(ids))
	t.foresee(func() { t.queueLockSagas(ids, rows) })
	t.sagasAhead = &readAhead[*saga.Instance]{set(ids), rows}
}

// ForeseeReservations reads ahead what LockReservations will be asked for.
func (t *Tx) ForeseeReservations(ids []domain.OrderID) {
	ids = sorted(ids)
	rows := make(map[domain.OrderID]*domain.Reservation, len(ids))
	t.foresee(func() { t.queueLockReservations(ids, rows) })
	t.reservationsAhead = &readAhead[*domain.Reservation]{set(ids), rows}
}

// ForeseePayments reads ahead what LockPayments will be asked for.
func (t *Tx) ForeseePayments(ids []domain.OrderID) {
	ids = sorted(ids)
	if rows := t.presumePayments(ids); rows != nil {
		t.paymentsAhead = &readAhead[*domain.Payment]{set(ids), rows}
		return
	}
	rows := make(map[domain.OrderID]*domain.Payment, len(ids))
	t.foresee(func() { t.queueLockPayments(ids, rows) })
	t.paymentsAhead = &readAhead[*domain.Payment]{set(ids), rows}
}

// A tombstone that is there cannot be inserted once more: the primary key refuses it, and InTx starts over.
const refuseBuried = `INSERT INTO barriers (order_id, step, state) SELECT order_id, step, state FROM barriers WHERE order_id = ANY($1) AND step = $2 AND state = 'tombstone'`

// PresumeNew locks the ids and has the database refuse those that were cancelled before they were placed; those that are taken, and keys that
// are used, are refused by the primary keys of what is inserted. All of it goes with the writes.
func (t *Tx) PresumeNew(ids []domain.OrderID) {
	t.newKeys = true
	if len(ids) == 0 {
		return
	}
	ids = sorted(ids)
	t.queueLockOrderIDs(ids, true) // first: what is refused after it stands
	t.queue("refuse tombstones", refuseBuried, ids, stepPlace)
	t.placingAhead, t.ordersAhead, t.buriedAhead = &readAhead[bool]{ids: set(ids)}, &readAhead[int64]{ids: set(ids)}, &readAhead[bool]{ids: set(ids)}
}

// ForeseePlacing locks and reads ahead what LockOrderIDs, FindOrders and Tombstones will be asked for.
func (t *Tx) ForeseePlacing(ids []domain.OrderID) {
	ids = sorted(ids)
	orders, buried := make(map[domain.OrderID]int64), make(map[domain.OrderID]bool)
	t.foresee(func() {
		t.queueLockOrderIDs(ids, true) // first: what is read after it stands
		t.queueFindOrders(ids, orders)
		t.queueTombstones(ids, buried)
	})
	t.placingAhead, t.ordersAhead, t.buriedAhead = &readAhead[bool]{ids: set(ids)}, &readAhead[int64]{set(ids), orders}, &readAhead[bool]{set(ids), buried}
}
