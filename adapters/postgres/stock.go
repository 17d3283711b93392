package postgres

import (
	"context"
	"slices"

	"github.com/jackc/pgx/v5"

	"ordersaga/domain"
)

// LockReservations locks in the order of order ids.
func (t *Tx) LockReservations(ctx context.Context, orders []domain.OrderID) (map[domain.OrderID]*domain.Reservation, error) {
	if len(orders) == 0 {
		return map[domain.OrderID]*domain.Reservation{}, nil
	}
	if out, err := foreseen(ctx, t, &t.reservationsAhead, orders); out != nil || err != nil {
		return out, err
	}
	out := make(map[domain.OrderID]*domain.Reservation, len(orders))
	t.queueLockReservations(orders, out)
	return out, t.send(ctx, false)
}

func (t *Tx) queueLockReservations(orders []domain.OrderID, out map[domain.OrderID]*domain.Reservation) {
	const q = `SELECT order_id, state, lines, coalesce(short, ''), coalesce(have, 0) FROM reservations WHERE order_id = ANY($1) ORDER BY order_id FOR NO KEY UPDATE`
	t.queueRead("lock reservations", q, []any{orders}, func(r pgx.Rows) error {
		v := &domain.Reservation{}
		var lines []byte
		err := r.Scan((*[16]byte)(&v.Order), (*string)(&v.State), &lines, (*string)(&v.Short), &v.Have)
		if err == nil {
			v.Lines, err = decodeLines(lines)
		}
		out[v.Order] = v
		return err
	})
}

// LockStock locks in the order of SKUs (F27). It comes after the reservations and last before the commit: a hot product's row is held
// for one decision and one round trip (F28).
func (t *Tx) LockStock(ctx context.Context, skus []domain.SKU) (map[domain.SKU]*domain.Stock, error) {
	out := make(map[domain.SKU]*domain.Stock, len(skus))
	if len(skus) == 0 {
		return out, nil
	}
	const q = `SELECT sku, available, reserved, sold FROM stock WHERE sku = ANY($1) ORDER BY sku FOR NO KEY UPDATE`
	err := t.query(ctx, "lock stock", q, []any{texts(skus)}, func(r pgx.Rows) error {
		s, err := scanStock(r)
		out[s.SKU] = &s
		return err
	})
	return out, err
}

func scanStock(r pgx.Rows) (s domain.Stock, err error) {
	err = r.Scan((*string)(&s.SKU), &s.Available, &s.Reserved, &s.Sold)
	return s, err
}

func texts[T ~string](in []T) []string {
	out := make([]string, len(in))
	for i := range in {
		out[i] = string(in[i])
	}
	return out
}

var insertReservations = over("id uuid, lines text, short text, have bigint, state text", func(u string) string {
	return `
INSERT INTO reservations (order_id, lines, short, have, state)
SELECT id, lines::json, NULLIF(short, ''), CASE WHEN short <> '' THEN have END, state
FROM ` + u
})

// InsertReservations inserts in the order of order ids. One that is there already (a tombstone of an undo that overtook, F10) violates
// the primary key: InTx starts over and finds it.
func (t *Tx) InsertReservations(_ context.Context, rs []domain.Reservation) error {
	n := len(rs)
	if n == 0 {
		return nil
	}
	rs = slices.Clone(rs)
	slices.SortFunc(rs, byOrder)
	for i := range rs {
		delete(t.unreserved, rs[i].Order) // the primary key verifies it
	}
	ids, lines, shorts, haves, states := make([]domain.OrderID, n), make([]string, n), make([]string, n), make([]int64, n), make([]string, n)
	for i := range rs {
		text, err := encodeLines(rs[i].Lines, false)
		if err != nil {
			return err
		}
		ids[i], lines[i], shorts[i], haves[i], states[i] = rs[i].Order, text, string(rs[i].Short), rs[i].Have, string(rs[i].State)
	}
	t.queueRows("insert reservations", insertReservations, n, []any{ids, lines, shorts, haves, states})
	return nil
}

func byOrder(a, b domain.Reservation) int { return a.Order.Compare(b.Order) }

// UpdateReservations stores the states of locked reservations; nothing else of one ever changes.
func (t *Tx) UpdateReservations(_ context.Context, rs []domain.Reservation) error {
	n := len(rs)
	if n == 0 {
		return nil
	}
	rs = slices.Clone(rs)
	slices.SortFunc(rs, byOrder)
	ids, states := make([]domain.OrderID, n), make([]string, n)
	for i := range rs {
		ids[i], states[i] = rs[i].Order, string(rs[i].State)
	}
	t.queueRows("update reservations", updateReservations, n, []any{ids, states})
	return nil
}

var updateReservations = over("id uuid, state text", func(u string) string {
	return `UPDATE reservations r SET state = u.state FROM ` + u + ` WHERE r.order_id = u.id`
})

// SaveStock stores the counts of rows that LockStock locked.
func (t *Tx) SaveStock(_ context.Context, stock []domain.Stock) error {
	n := len(stock)
	if n == 0 {
		return nil
	}
	stock = slices.Clone(stock)
	slices.SortFunc(stock, func(a, b domain.Stock) int { return compare(a.SKU, b.SKU) })
	skus, available, reserved, sold := make([]string, n), make([]int64, n), make([]int64, n), make([]int64, n)
	for i := range stock {
		skus[i], available[i], reserved[i], sold[i] = string(stock[i].SKU), stock[i].Available, stock[i].Reserved, stock[i].Sold
	}
	t.queueRows("save stock", saveStock, n, []any{skus, available, reserved, sold})
	return nil
}

var saveStock = over("sku text, available bigint, reserved bigint, sold bigint", func(u string) string {
	return `
UPDATE stock s SET available = u.available, reserved = u.reserved, sold = u.sold
FROM ` + u + ` WHERE s.sku = u.sku`
})
