package postgres

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"

	"ordersaga/consumers"
	"ordersaga/domain"
	"ordersaga/events"
)

// reserve runs the stock steps' reservation for orders, as the handler does: reservations, stock, decide, store.
func reserve(ctx context.Context, tx *Tx, lines []domain.Line, ids ...domain.OrderID) error {
	prior, err := tx.LockReservations(ctx, ids)
	if err != nil {
		return err
	}
	var skus []domain.SKU
	for _, l := range lines {
		skus = append(skus, l.SKU)
	}
	stock, err := tx.LockStock(ctx, skus)
	if err != nil {
		return err
	}
	var fresh []domain.Reservation
	for _, id := range ids {
		if r, changed := domain.Reserve(prior[id], id, lines, stock); changed {
			fresh = append(fresh, r)
		}
	}
	var save []domain.Stock
	for _, s := range stock {
		save = append(save, *s)
	}
	return errors.Join(tx.InsertReservations(ctx, fresh), tx.SaveStock(ctx, save))
}

func release(ctx context.Context, tx *Tx, id domain.OrderID) error {
	prior, err := tx.LockReservations(ctx, []domain.OrderID{id})
	if err != nil {
		return err
	}
	var skus []domain.SKU
	if p := prior[id]; p != nil {
		for _, l := range p.Lines {
			skus = append(skus, l.SKU)
		}
	}
	stock, err := tx.LockStock(ctx, skus)
	if err != nil {
		return err
	}
	r, changed, err := domain.Release(prior[id], id, stock)
	if err != nil || !changed {
		return err
	}
	if prior[id] == nil {
		return tx.InsertReservations(ctx, []domain.Reservation{r})
	}
	var save []domain.Stock
	for _, s := range stock {
		save = append(save, *s)
	}
	return errors.Join(tx.UpdateReservations(ctx, []domain.Reservation{r}), tx.SaveStock(ctx, save))
}

func stockOf(tb testing.TB, db *DB, sku domain.SKU) domain.Stock {
	tb.Helper()
	p, err := db.GetProduct(tb.Context(), sku)
	require.NoError(tb, err)
	require.NotNil(tb, p)
	return p.Stock
}

func requireStockAdds(tb testing.TB, db *DB) {
	tb.Helper()
	require.NoError(tb, db.EachStock(tb.Context(), func(f StockFact) error {
		require.True(tb, f.Adds(), "%+v", f)
		return nil
	}))
}

func TestReservationsAndStock(t *testing.T) {
	db := newDB(t)
	put(t, db, "cup", 10)
	put(t, db, `pot "é"`, 3)
	two := []domain.Line{{SKU: "cup", Quantity: 2}, {SKU: `pot "é"`, Quantity: 1}}
	ids := orderIDs(5)
	inTx(t, db, func(ctx context.Context, tx *Tx) error { return reserve(ctx, tx, two, ids...) })
	require.Equal(t, domain.Stock{SKU: "cup", Available: 4, Reserved: 6}, stockOf(t, db, "cup"))
	require.Equal(t, domain.Stock{SKU: `pot "é"`, Reserved: 3}, stockOf(t, db, `pot "é"`))
	inTx(t, db, func(ctx context.Context, tx *Tx) error {
		rs, err := tx.LockReservations(ctx, append(ids, domain.NewOrderID()))
		require.Len(t, rs, 5)
		require.Equal(t, &domain.Reservation{Order: ids[0], State: domain.Reserved, Lines: two}, rs[ids[0]])
		require.Equal(t, &domain.Reservation{Order: ids[4], State: domain.RejectedStock, Lines: two, Short: `pot "é"`}, rs[ids[4]])
		stock, serr := tx.LockStock(ctx, []domain.SKU{"cup", "none"})
		require.Len(t, stock, 1)
		return errors.Join(err, serr)
	})
	inTx(t, db, func(ctx context.Context, tx *Tx) error { return reserve(ctx, tx, two, ids...) }) // the same again
	requireStockAdds(t, db)
	inTx(t, db, func(ctx context.Context, tx *Tx) error { return release(ctx, tx, ids[0]) })
	inTx(t, db, func(ctx context.Context, tx *Tx) error {
		rs, err := tx.LockReservations(ctx, ids[1:2])
		if err != nil {
			return err
		}
		stock, err := tx.LockStock(ctx, []domain.SKU{"cup", `pot "é"`})
		if err != nil {
			return err
		}
		changed, err := rs[ids[1]].Commit(stock)
		require.True(t, changed)
		return errors.Join(err, tx.UpdateReservations(ctx, []domain.Reservation{*rs[ids[1]]}), tx.SaveStock(ctx, []domain.Stock{*stock["cup"], *stock[`pot "é"`]}))
	})
	require.Equal(t, domain.Stock{SKU: "cup", Available: 6, Reserved: 2, Sold: 2}, stockOf(t, db, "cup"))
	requireStockAdds(t, db)
	states := map[domain.ReservationState]int{}
	require.NoError(t, db.EachReservation(t.Context(), func(_ domain.OrderID, s domain.ReservationState) error { states[s]++; return nil }))
	require.Equal(t, map[domain.ReservationState]int{domain.Reserved: 1, domain.RejectedStock: 2, domain.CommittedStock: 1, domain.Released: 1}, states)

	rawExec(t, db, `UPDATE stock SET reserved = reserved + 1 WHERE sku = 'cup'`)
	rawExec(t, db, `UPDATE reservations SET lines = '[["ghost", 1]]' WHERE state = 'committed'`)
	wrong := map[domain.SKU]bool{}
	require.NoError(t, db.EachStock(t.Context(), func(f StockFact) error {
		if !f.Adds() {
			wrong[f.SKU] = true
		}
		return nil
	}))
	require.Equal(t, map[domain.SKU]bool{"cup": true, `pot "é"`: true, "ghost": true}, wrong, "F29: the audit sees a drift, and a reservation of what there is no stock of")
}

// F10: the undo of a reservation races the reservation itself. Whatever comes first, in the end nothing is held.
func TestF10_TombstoneRacesReservation(t *testing.T) {
	db := newDB(t)
	put(t, db, "cup", 1000)
	line := []domain.Line{{SKU: "cup", Quantity: 1}}
	tombstones := 0
	for range 40 {
		id := domain.NewOrderID()
		race(t, 2, func(i int) error {
			return db.For(Consumers).InTx(t.Context(), func(ctx context.Context, tx *Tx) error {
				if i == 0 {
					return reserve(ctx, tx, line, id)
				}
				return release(ctx, tx, id)
			})
		})
		state := one[string](t, db, `SELECT state FROM reservations WHERE order_id = $1`, uuid.UUID(id))
		require.Contains(t, []string{"tombstone", "released"}, state)
		if state == "tombstone" {
			tombstones++
		}
	}
	t.Logf("the undo was first %d times of 40", tombstones)
	require.Equal(t, domain.Stock{SKU: "cup", Available: 1000}, stockOf(t, db, "cup"))
	requireStockAdds(t, db)
}

// F28: sixteen workers want one product; all of it is sold exactly once.
func TestF28_HotProductIsNeverOversold(t *testing.T) {
	db := newDB(t)
	put(t, db, "hot", 300)
	race(t, 16, func(int) error {
		for range 5 {
			err := db.For(Consumers).InTx(t.Context(), func(ctx context.Context, tx *Tx) error {
				return reserve(ctx, tx, []domain.Line{{SKU: "hot", Quantity: 1}}, orderIDs(5)...)
			})
			if err != nil {
				return err
			}
		}
		return nil
	})
	require.Equal(t, domain.Stock{SKU: "hot", Reserved: 300}, stockOf(t, db, "hot"))
	require.Equal(t, 300, one[int](t, db, `SELECT count(*) FROM reservations WHERE state = 'reserved'`))
	require.Equal(t, 100, one[int](t, db, `SELECT count(*) FROM reservations WHERE state = 'rejected'`))
}

func TestBatchOfAThousandReservationsAndPayments(t *testing.T) {
	db := newDB(t)
	var lines []domain.Line
	for i := range 30 {
		put(t, db, skuOf(i), 100_000)
		lines = append(lines, domain.Line{SKU: skuOf(i), Quantity: 2})
	}
	ids := orderIDs(1000)
	inTx(t, db, func(ctx context.Context, tx *Tx) error { return reserve(ctx, tx, lines, ids...) })
	requireStockAdds(t, db)
	inTx(t, db, func(ctx context.Context, tx *Tx) error {
		pays, err := tx.LockPayments(ctx, ids)
		if err != nil {
			return err
		}
		var list []*domain.Payment
		for _, p := range pays {
			p.BeginAuthorize(domain.Money{Minor: 5, Currency: "EUR"}, "pm", false, db.Now())
			list = append(list, p)
		}
		return tx.SavePayments(ctx, list)
	})
	require.Equal(t, 1000, one[int](t, db, `SELECT count(*) FROM payments WHERE state = 'started'`))
}

func TestPaymentSteps(t *testing.T) {
	db := newDB(t)
	id, empty := domain.NewOrderID(), domain.NewOrderID()
	begun := time.Now().Add(-time.Hour).UTC().Truncate(time.Microsecond)
	change := func(fn func(p *domain.Payment)) {
		inTx(t, db, func(ctx context.Context, tx *Tx) error {
			pays, err := tx.LockPayments(ctx, []domain.OrderID{id, empty})
			if err != nil {
				return err
			}
			require.Len(t, pays, 2)
			require.Empty(t, pays[empty].Steps, "every order is in the answer")
			fn(pays[id])
			return tx.SavePayments(ctx, []*domain.Payment{pays[id]})
		})
	}
	change(func(p *domain.Payment) {
		require.Equal(t, domain.BeginCall, p.BeginAuthorize(domain.Money{Minor: 500, Currency: "EUR"}, "pm_card_visa", false, begun))
	})
	change(func(p *domain.Payment) {
		require.Equal(t, &domain.PaymentStep{
			Order: id, Op: domain.Authorize, State: domain.BarrierStarted, Attempt: 1, Amount: domain.Money{Minor: 500, Currency: "EUR"},
			Method: "pm_card_visa", Begun: begun,
		}, utc(p.Steps[domain.Authorize]))
		require.True(t, p.Settle(domain.Authorize, 1, domain.PaymentOutcome{Result: domain.PaymentAuthorized, Ref: "pi_1"}))
		require.Equal(t, domain.BeginCall, p.BeginCapture(domain.Money{Minor: 500, Currency: "EUR"}, false, db.Now()))
	})
	change(func(p *domain.Payment) {
		require.Equal(t, "pi_1", p.Ref())
		require.True(t, p.Settle(domain.Capture, 1, domain.PaymentOutcome{Result: domain.PaymentRefused, Code: "gone\x00"}))
	})
	var steps []domain.PaymentStep
	require.NoError(t, db.EachPayment(t.Context(), func(s domain.PaymentStep) error { steps = append(steps, s); return nil }))
	require.Len(t, steps, 2)
	require.Equal(t, domain.BarrierDone, steps[0].State)
	require.Equal(t, "gone", steps[1].Code)

	inTx(t, db, func(ctx context.Context, tx *Tx) error { // a step without a time begins at the database's now
		p := domain.NewPayment(empty)
		p.Put(domain.PaymentStep{Op: domain.Authorize, State: domain.BarrierTombstone})
		return tx.SavePayments(ctx, []*domain.Payment{p})
	})
	require.True(t, one[bool](t, db, `SELECT begun > now() - interval '10 seconds' FROM payments WHERE state = 'tombstone'`))
}

func utc(s *domain.PaymentStep) *domain.PaymentStep {
	s.Begun = s.Begun.UTC()
	return s
}

// F36: authorising and reversing race before either has a row. One of them starts over and meets what the other wrote: never is a call
// started after its undo found nothing.
func TestF36_ReversalRacesTheFirstAuthorisation(t *testing.T) {
	db := newDB(t)
	met := map[domain.BarrierState]int{}
	for range 40 {
		id := domain.NewOrderID()
		var authorise, undo domain.Begin
		race(t, 2, func(i int) error {
			return db.For(Consumers).InTx(t.Context(), func(ctx context.Context, tx *Tx) error {
				pays, err := tx.LockPayments(ctx, []domain.OrderID{id})
				if err != nil {
					return err
				}
				if i == 0 {
					authorise = pays[id].BeginAuthorize(domain.Money{Minor: 1, Currency: "EUR"}, "pm", false, db.Now())
				} else {
					undo = pays[id].BeginReverse(db.Now())
				}
				return tx.SavePayments(ctx, []*domain.Payment{pays[id]})
			})
		})
		state := domain.BarrierState(one[string](t, db, `SELECT state FROM payments WHERE order_id = $1 AND op = 'authorize'`, uuid.UUID(id)))
		met[state]++
		if authorise == domain.BeginCall {
			require.Equal(t, domain.BarrierStarted, state)
			require.Equal(t, domain.BeginCall, undo, "the undo saw what was started")
		} else {
			require.Equal(t, domain.BarrierTombstone, state)
		}
	}
	t.Logf("%v", met)
}

func TestInboxRows(t *testing.T) {
	db := newDB(t)
	ours, foreign := events.NewID(), events.Identity(&events.Record{Topic: "x", Offset: 7})
	late, early := at(time.Now().Add(-90*day)), at(time.Now().Add(90*day))
	all := []uuid.UUID{early, ours, foreign, late}
	read := func(ctx context.Context, tx *Tx, g events.Group) map[uuid.UUID]consumers.InboxRow {
		rows, err := tx.Inbox(ctx, g, all)
		require.NoError(t, err)
		return rows
	}
	inTx(t, db, func(ctx context.Context, tx *Tx) error {
		require.Empty(t, read(ctx, tx, "g"))
		var rows []consumers.InboxRow
		for i, id := range all {
			rows = append(rows, consumers.InboxRow{MessageID: id, State: consumers.InboxWaiting, Ticket: int64(i), Hash: -int64(i), New: true})
		}
		return tx.SaveInbox(ctx, "g", rows)
	})
	inTx(t, db, func(ctx context.Context, tx *Tx) error {
		require.Empty(t, read(ctx, tx, "h"), "another group has rows of its own")
		rows := read(ctx, tx, "g")
		require.Len(t, rows, 4)
		require.Equal(t, consumers.InboxRow{MessageID: foreign, State: consumers.InboxWaiting, Ticket: 2, Hash: -2}, rows[foreign])
		r := rows[ours]
		r.State, r.Ticket = consumers.InboxHandled, 99
		fresh := consumers.InboxRow{MessageID: events.NewID(), State: consumers.InboxDead, New: true}
		return tx.SaveInbox(ctx, "g", []consumers.InboxRow{fresh, r})
	})
	require.Equal(t, int64(99), one[int64](t, db, `SELECT ticket FROM inbox WHERE message_id = $1 AND state = 'handled'`, ours))
	require.Equal(t, 1, one[int](t, db, `SELECT count(*) FROM inbox_foreign`))
	require.Equal(t, 2, one[int](t, db, `SELECT count(*) FROM inbox_default`))
	require.Equal(t, 2, one[int](t, db, fmt.Sprintf(`SELECT count(*) FROM %s`, partitionName(time.Now().UTC()))))
}

// F5: a zombie and its successor claim the same message at once. The second insert violates the key, its transaction starts over and finds
// the row: the effect takes place once.
func TestF5_ZombieAndSuccessorActOnce(t *testing.T) {
	db := newDB(t)
	put(t, db, "cup", 1000)
	for range 20 {
		id := events.NewID()
		var effects atomic.Int32
		acted := make([]bool, 2)
		race(t, 2, func(i int) error {
			return db.For(Consumers).InTx(t.Context(), func(ctx context.Context, tx *Tx) error {
				acted[i] = false
				rows, err := tx.Inbox(ctx, "stock", []uuid.UUID{id})
				if err != nil || len(rows) > 0 {
					return err
				}
				acted[i] = true
				return tx.SaveInbox(ctx, "stock", []consumers.InboxRow{{MessageID: id, State: consumers.InboxHandled, New: true}})
			})
		})
		for _, a := range acted {
			if a {
				effects.Add(1)
			}
		}
		require.Equal(t, int32(1), effects.Load())
	}
}

func TestPutProductRecordsAdjustments(t *testing.T) {
	db := newDB(t)
	cup := domain.Product{SKU: "cup", Name: "Cup\x00", UnitPrice: domain.Money{Minor: 250, Currency: "EUR"}}
	n := func(v int64) *int64 { return &v }
	v, created, err := db.PutProduct(t.Context(), ProductChange{Product: cup, OnHand: n(10), Actor: "olga", Note: "delivery"})
	require.NoError(t, err)
	require.True(t, created)
	cup.Name = "Cup"
	require.Equal(t, ProductView{Product: cup, Stock: domain.Stock{SKU: "cup", Available: 10}}, v)

	inTx(t, db, func(ctx context.Context, tx *Tx) error {
		return reserve(ctx, tx, []domain.Line{{SKU: "cup", Quantity: 4}}, domain.NewOrderID())
	})
	var refusal *domain.Refusal
	_, _, err = db.PutProduct(t.Context(), ProductChange{Product: cup, OnHand: n(3), Actor: "olga"})
	require.ErrorAs(t, err, &refusal)
	require.Equal(t, "/on_hand", refusal.Field)
	require.Contains(t, refusal.Detail, "less than the 4 that are reserved")

	v, created, err = db.PutProduct(t.Context(), ProductChange{Product: cup, OnHand: n(4), Actor: "olga"})
	require.NoError(t, err)
	require.False(t, created)
	require.Equal(t, domain.Stock{SKU: "cup", Reserved: 4}, v.Stock)
	cup.UnitPrice.Minor = 300
	v, _, err = db.PutProduct(t.Context(), ProductChange{Product: cup, Actor: "olga"}) // the price only
	require.NoError(t, err)
	require.Equal(t, int64(4), v.Stock.OnHand())
	_, _, err = db.PutProduct(t.Context(), ProductChange{Product: cup, OnHand: n(4), Actor: "olga"}) // nothing changes
	require.NoError(t, err)
	v, created, err = db.PutProduct(t.Context(), ProductChange{Product: domain.Product{SKU: "pot", UnitPrice: cup.UnitPrice}, Actor: "olga"})
	require.NoError(t, err)
	require.True(t, created)
	require.Zero(t, v.Stock.OnHand())

	require.Equal(t, "+10=10 delivery,-6=4 ", one[string](t, db, `SELECT string_agg(to_char(delta, 'FMSG999') || '=' || on_hand_after || ' ' || note, ',' ORDER BY id) FROM stock_adjustments`))
	require.Equal(t, 4, one[int](t, db, `SELECT count(*) FROM audit_log WHERE actor = 'olga' AND action = 'product.put'`))
	requireStockAdds(t, db)

	found, err := db.Products(t.Context(), []domain.SKU{"cup", "none", "bad\x00"})
	require.NoError(t, err)
	require.Equal(t, map[domain.SKU]domain.Product{"cup": cup}, found)
	page, next, err := db.ListProducts(t.Context(), "", 1)
	require.NoError(t, err)
	require.Equal(t, "cup", next)
	require.Equal(t, domain.SKU("cup"), page[0].SKU)
	page, next, err = db.ListProducts(t.Context(), next, 1)
	require.NoError(t, err)
	require.Empty(t, next)
	require.Equal(t, domain.SKU("pot"), page[0].SKU)
	none, err := db.GetProduct(t.Context(), "no\x00ne")
	require.NoError(t, err)
	require.Nil(t, none)

	for field, c := range map[string]ProductChange{
		"/sku":              {Product: domain.Product{UnitPrice: cup.UnitPrice}},
		"/unit_price_minor": {Product: domain.Product{SKU: "x", UnitPrice: domain.Money{Minor: -1, Currency: "EUR"}}},
		"/currency":         {Product: domain.Product{SKU: "x", UnitPrice: domain.Money{Minor: 1, Currency: "euro"}}},
		"/on_hand":          {Product: cup, OnHand: n(-1)},
	} {
		c.Actor = "olga"
		_, _, err := db.PutProduct(t.Context(), c)
		require.ErrorAs(t, err, &refusal)
		require.Equal(t, field, refusal.Field)
	}
	race(t, 8, func(i int) error { // the first put of a product, eight times at once
		_, _, err := db.PutProduct(t.Context(), ProductChange{Product: domain.Product{SKU: "new", UnitPrice: cup.UnitPrice}, OnHand: n(int64(i + 1)), Actor: "olga"})
		return err
	})
	requireStockAdds(t, db)
}
