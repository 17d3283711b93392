package postgres

import (
	"context"
	"errors"
	"testing"

	"github.com/google/uuid"

	"ordersaga/consumers"
	"ordersaga/domain"
	"ordersaga/events"
	"ordersaga/saga"
)

// benchBatch is the rows a transaction: what gathers while the batch before commits, at a few thousand orders a second.
const benchBatch = 100

// perRow reports time and WAL for one row of the batches.
func perRow(b *testing.B, db *DB, rows int, fn func()) {
	b.Helper()
	start := one[int64](b, db, `SELECT pg_wal_lsn_diff(pg_current_wal_lsn(), '0/0')::bigint`)
	n := 0
	for b.Loop() {
		fn()
		n += rows
	}
	wal := one[int64](b, db, `SELECT pg_wal_lsn_diff(pg_current_wal_lsn(), '0/0')::bigint`) - start
	b.ReportMetric(float64(b.Elapsed().Microseconds())/float64(n), "µs/row")
	b.ReportMetric(float64(wal)/float64(n), "WAL-B/row")
}

func benchOrders() []*domain.Order {
	orders := make([]*domain.Order, benchBatch)
	for i := range orders {
		orders[i] = newOrder("customer-12345678", 1)
	}
	return orders
}

func idsOf(orders []*domain.Order) []domain.OrderID {
	ids := make([]domain.OrderID, len(orders))
	for i := range orders {
		ids[i] = orders[i].ID
	}
	return ids
}

func BenchmarkPlace(b *testing.B) {
	db := newDB(b)
	perRow(b, db, benchBatch, func() { placeOrders(b, db, benchOrders()...) })
}

// BenchmarkSaga is a whole saga on the coordinator's side: one placement and four replies, with history and outbox rows.
func BenchmarkSaga(b *testing.B) {
	db := newDB(b)
	perRow(b, db, benchBatch, func() {
		orders := benchOrders()
		placeOrders(b, db, orders...)
		for _, s := range []string{"reserve_stock", "authorize_payment", "capture_payment", "commit_stock"} {
			benchAdvance(b, db, done(s), idsOf(orders))
		}
	})
}

func benchAdvance(b *testing.B, db *DB, in saga.Input, ids []domain.OrderID) {
	b.Helper()
	inTx(b, db, func(ctx context.Context, tx *Tx) error {
		facts := make([]saga.Fact, len(ids))
		for i, id := range ids {
			facts[i] = saga.Fact{Order: id, Input: in, Cause: events.NewID()}
		}
		adv, err := coordinator(db).Advance(ctx, tx, facts)
		if err != nil {
			return err
		}
		var out []events.Envelope
		for _, a := range adv {
			out = append(out, a.Out...)
		}
		return tx.Emit(ctx, out)
	})
}

// BenchmarkStock reserves and commits two products an order, out of a thousand.
func BenchmarkStock(b *testing.B) {
	db := newDB(b)
	rawExec(b, db, `INSERT INTO stock SELECT 'sku-' || lpad(g::text, 4, '0'), 1000000000, 0, 0 FROM generate_series(0, 999) g`)
	n := 0
	perRow(b, db, benchBatch, func() {
		ids := sortedIDs(orderIDs(benchBatch))
		lines := make(map[domain.OrderID][]domain.Line, benchBatch)
		skus := map[domain.SKU]bool{}
		for _, id := range ids {
			n += 7
			a, c := skuOf(n%999), skuOf(n%999+1)
			lines[id] = []domain.Line{{SKU: a, Quantity: 1}, {SKU: c, Quantity: 1}}
			skus[a], skus[c] = true, true
		}
		var list []domain.SKU
		for s := range skus {
			list = append(list, s)
		}
		for _, commit := range []bool{false, true} {
			inTx(b, db, func(ctx context.Context, tx *Tx) error {
				prior, err := tx.LockReservations(ctx, ids)
				if err != nil {
					return err
				}
				stock, err := tx.LockStock(ctx, list)
				if err != nil {
					return err
				}
				var rs []domain.Reservation
				for _, id := range ids {
					if commit {
						if _, err := prior[id].Commit(stock); err != nil {
							return err
						}
						rs = append(rs, *prior[id])
						continue
					}
					r, _ := domain.Reserve(nil, id, lines[id], stock)
					rs = append(rs, r)
				}
				var save []domain.Stock
				for _, s := range stock {
					save = append(save, *s)
				}
				if commit {
					err = tx.UpdateReservations(ctx, rs)
				} else {
					err = tx.InsertReservations(ctx, rs)
				}
				return errors.Join(err, tx.SaveStock(ctx, save))
			})
		}
	})
}

// BenchmarkPayment starts and settles an authorisation and a capture.
func BenchmarkPayment(b *testing.B) {
	db := newDB(b)
	amount := domain.Money{Minor: 500, Currency: "EUR"}
	step := func(ids []domain.OrderID, fn func(p *domain.Payment)) {
		inTx(b, db, func(ctx context.Context, tx *Tx) error {
			pays, err := tx.LockPayments(ctx, ids)
			if err != nil {
				return err
			}
			list := make([]*domain.Payment, 0, len(pays))
			for _, p := range pays {
				fn(p)
				list = append(list, p)
			}
			return tx.SavePayments(ctx, list)
		})
	}
	perRow(b, db, benchBatch, func() {
		ids := sortedIDs(orderIDs(benchBatch))
		step(ids, func(p *domain.Payment) { p.BeginAuthorize(amount, "pm_card_visa", false, db.Now()) })
		step(ids, func(p *domain.Payment) {
			p.Settle(domain.Authorize, 1, domain.PaymentOutcome{Result: domain.PaymentAuthorized, Ref: "pi_3NqFh2LkdIwHu7ix"})
		})
		step(ids, func(p *domain.Payment) { p.BeginCapture(amount, false, db.Now()) })
		step(ids, func(p *domain.Payment) {
			p.Settle(domain.Capture, 1, domain.PaymentOutcome{Result: domain.PaymentCaptured})
		})
	})
}

func BenchmarkInbox(b *testing.B) {
	db := newDB(b)
	perRow(b, db, benchBatch, func() {
		ids := make([]uuid.UUID, benchBatch)
		rows := make([]consumers.InboxRow, benchBatch)
		for i := range ids {
			ids[i] = events.NewID()
			rows[i] = consumers.InboxRow{MessageID: ids[i], State: consumers.InboxHandled, Hash: 7, New: true}
		}
		inTx(b, db, func(ctx context.Context, tx *Tx) error {
			if _, err := tx.Inbox(ctx, events.GroupCoordinator, ids); err != nil {
				return err
			}
			return tx.SaveInbox(ctx, events.GroupCoordinator, rows)
		})
	})
}

func BenchmarkInsertKeys(b *testing.B) {
	db := newDB(b)
	perRow(b, db, benchBatch, func() {
		keys := make([]saga.IdempotencyKey, benchBatch)
		for i := range keys {
			keys[i] = saga.IdempotencyKey{Caller: "shop", Key: uuid.NewString(), Order: domain.NewOrderID(), Answer: []byte(`{"order_id":"0197aaaa-0000-7000-8000-000000000001","status":"pending"}`)}
		}
		inTx(b, db, func(ctx context.Context, tx *Tx) error {
			if _, err := tx.FindKeys(ctx, keys); err != nil {
				return err
			}
			return tx.InsertKeys(ctx, keys)
		})
	})
}

// BenchmarkHistory shows what the append-only trigger costs an insert: it fires for other statements, once a statement.
func BenchmarkHistory(b *testing.B) {
	for name, trigger := range map[string]string{"with": "ENABLE", "without": "DISABLE"} {
		b.Run(name+" trigger", func(b *testing.B) {
			db := newDB(b)
			rawExec(b, db, `ALTER TABLE saga_history `+trigger+` TRIGGER append_only`)
			perRow(b, db, benchBatch, func() {
				entries := make([]saga.HistoryEntry, benchBatch)
				for i := range entries {
					entries[i] = saga.HistoryEntry{
						Order: domain.NewOrderID(), Version: 1, Cause: events.NewID(), Input: done("reserve_stock"), Phase: saga.Running, Status: domain.Pending,
					}
				}
				inTx(b, db, func(ctx context.Context, tx *Tx) error { return tx.AppendHistory(ctx, entries) })
			})
		})
	}
}

// BenchmarkOneOrder is the transaction of a lone request: what latency at low load is made of.
func BenchmarkOneOrder(b *testing.B) {
	db := newDB(b)
	perRow(b, db, 1, func() { placeOrders(b, db, newOrder("c", 1)) })
}
