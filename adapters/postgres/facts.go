package postgres

import (
	"context"

	"github.com/jackc/pgx/v5"

	"ordersaga/domain"
	"ordersaga/saga"
)

// The audit's facts: small aggregates, and streams that hold one row at a time. Each statement is one view of the database; an audit of a
// system at rest compares them with each other.

// OrderCount is how many orders are in a status and their sagas in a phase.
type OrderCount struct {
	Status domain.Status
	Phase  saga.Phase // empty: there is an order without a saga, which must not be
	Orders int64
	Minor  int64 // sum of totals, whatever the currency
}

// CountOrders counts orders by status and phase.
func (db *DB) CountOrders(ctx context.Context) (out []OrderCount, err error) {
	const q = `SELECT coalesce(s.status, ''), coalesce(s.phase, ''), count(*), sum(o.total_minor)::bigint FROM orders o LEFT JOIN sagas s ON s.order_id = o.id GROUP BY 1, 2 ORDER BY 1, 2`
	err = db.query(ctx, Operators, "count orders", q, nil, func(r pgx.Rows) error {
		var c OrderCount
		err := r.Scan((*string)(&c.Status), (*string)(&c.Phase), &c.Orders, &c.Minor)
		out = append(out, c)
		return err
	})
	return out, err
}

// CountSagasUnderWay counts the sagas that have not ended, and how many of them are stuck, along the index on deadlines.
func (db *DB) CountSagasUnderWay(ctx context.Context) (running, stuck int64, err error) {
	const q = `SELECT count(*), count(s.stuck_since) FROM sagas s WHERE ` + underWay
	err = db.query(ctx, Operators, "count sagas under way", q, nil, func(r pgx.Rows) error { return r.Scan(&running, &stuck) })
	return running, stuck, err
}

// RunningSagas counts the sagas that have not ended, up to a limit: for admission, which asks often. It takes no connection from the intake
// that it protects.
func (db *DB) RunningSagas(ctx context.Context, limit int64) (n int64, err error) {
	const q = `SELECT count(*) FROM (SELECT FROM sagas s WHERE ` + underWay + ` LIMIT $1) x`
	err = db.query(ctx, Operators, "count running sagas", q, []any{limit}, func(r pgx.Rows) error { return r.Scan(&n) })
	return n, err
}

// OldestUnderWay is how long ago the saga that has not changed for longest among those under way did change; 0: there is none.
func (db *DB) OldestUnderWay(ctx context.Context) (seconds float64, err error) {
	const q = `SELECT coalesce(extract(epoch FROM now() - min(s.updated_at)), 0)::float8 FROM sagas s WHERE ` + underWay
	err = db.query(ctx, Operators, "oldest saga under way", q, nil, func(r pgx.Rows) error { return r.Scan(&seconds) })
	return seconds, err
}

// OrderFact is an order as the audit compares it with its payment and its reservation.
type OrderFact struct {
	Order  domain.OrderID
	Status domain.Status
	Phase  saga.Phase
	Total  domain.Money
}

// EachOrder streams all orders in the order of their ids.
func (db *DB) EachOrder(ctx context.Context, fn func(OrderFact) error) error {
	const q = `SELECT o.id, coalesce(s.status, ''), coalesce(s.phase, ''), o.total_minor, o.currency FROM orders o LEFT JOIN sagas s ON s.order_id = o.id ORDER BY o.id`
	return db.query(ctx, Operators, "audit orders", q, nil, func(r pgx.Rows) error {
		var f OrderFact
		if err := r.Scan((*[16]byte)(&f.Order), (*string)(&f.Status), (*string)(&f.Phase), &f.Total.Minor, &f.Total.Currency); err != nil {
			return err
		}
		return fn(f)
	})
}

// EachPayment streams all payment steps in the order of (order, operation).
func (db *DB) EachPayment(ctx context.Context, fn func(domain.PaymentStep) error) error {
	const q = `SELECT order_id, op, state, attempt, amount_minor, currency, method, ref, code, begun FROM payments ORDER BY order_id, op`
	return db.query(ctx, Operators, "audit payments", q, nil, func(r pgx.Rows) error {
		s, err := scanPayment(r)
		if err != nil {
			return err
		}
		return fn(s)
	})
}

// EachReservation streams all reservations in the order of order ids.
func (db *DB) EachReservation(ctx context.Context, fn func(order domain.OrderID, state domain.ReservationState) error) error {
	return db.query(ctx, Operators, "audit reservations", `SELECT order_id, state FROM reservations ORDER BY order_id`, nil, func(r pgx.Rows) error {
		var order domain.OrderID
		var state domain.ReservationState
		if err := r.Scan((*[16]byte)(&order), (*string)(&state)); err != nil {
			return err
		}
		return fn(order, state)
	})
}

// StockFact is what is known of a SKU from three sides (F29): its row, the reservations, the adjustments.
type StockFact struct {
	SKU                        domain.SKU
	Available, Reserved, Sold  int64
	HeldByOrders, SoldByOrders int64 // sums over reservations
	Adjusted                   int64 // sum over adjustments: everything that ever came in from outside
}

// Adds reports that the three sides agree.
func (f *StockFact) Adds() bool {
	return f.Reserved == f.HeldByOrders && f.Sold == f.SoldByOrders && f.Available+f.Reserved+f.Sold == f.Adjusted
}

// EachStock streams the facts of all SKUs, from one view of the database: it may run while orders do.
func (db *DB) EachStock(ctx context.Context, fn func(StockFact) error) error {
	const q = `
WITH held AS (
  SELECT l->>0 AS sku, coalesce(sum((l->>1)::bigint) FILTER (WHERE r.state = 'reserved'), 0)::bigint AS reserved,
         coalesce(sum((l->>1)::bigint) FILTER (WHERE r.state = 'committed'), 0)::bigint AS sold
  FROM reservations r, json_array_elements(r.lines) l WHERE r.state IN ('reserved', 'committed') GROUP BY 1),
adjusted AS (SELECT sku, sum(delta)::bigint AS delta FROM stock_adjustments GROUP BY 1)
SELECT coalesce(s.sku, h.sku), coalesce(s.available, 0), coalesce(s.reserved, 0), coalesce(s.sold, 0), coalesce(h.reserved, 0), coalesce(h.sold, 0), coalesce(a.delta, 0)
FROM stock s FULL JOIN held h ON h.sku = s.sku LEFT JOIN adjusted a ON a.sku = coalesce(s.sku, h.sku) ORDER BY 1`
	return db.query(ctx, Operators, "audit stock", q, nil, func(r pgx.Rows) error {
		var f StockFact
		if err := r.Scan((*string)(&f.SKU), &f.Available, &f.Reserved, &f.Sold, &f.HeldByOrders, &f.SoldByOrders, &f.Adjusted); err != nil {
			return err
		}
		return fn(f)
	})
}

// CountDead counts dead letters by status.
func (db *DB) CountDead(ctx context.Context) (map[string]int64, error) {
	out := map[string]int64{}
	err := db.query(ctx, Operators, "count dead letters", `SELECT status, count(*) FROM dead_letters GROUP BY 1`, nil, func(r pgx.Rows) error {
		var status string
		var n int64
		err := r.Scan(&status, &n)
		out[status] = n
		return err
	})
	return out, err
}
