package postgres

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"

	"ordersaga/domain"
	"ordersaga/saga"
)

func TestSagaFromPlacingToItsEnd(t *testing.T) {
	db := newDB(t)
	o := newOrder("carla", 2)
	placeOrders(t, db, o)

	v := view(t, db, o.ID)
	require.Equal(t, domain.Pending, v.Status)
	require.Equal(t, o.Lines, v.Lines)
	require.Equal(t, o.Total, v.Total)
	require.Equal(t, "carla", v.CustomerID)
	require.Equal(t, "pm_card_visa", v.PaymentMethod)
	require.Equal(t, int32(1), v.Sequence)
	require.Equal(t, saga.Running, v.Saga.Phase)
	require.Equal(t, "cc--", letters(v.Saga.Steps))
	require.WithinDuration(t, db.Now().Add(saga.DefaultLimits.Forward), v.Deadline, 5*time.Second)
	require.WithinDuration(t, db.Now(), v.CreatedAt, 5*time.Second)

	complete(t, db, o.ID)
	v = view(t, db, o.ID)
	require.Equal(t, domain.Confirmed, v.Status)
	require.Equal(t, saga.Completed, v.Saga.Phase)
	require.Equal(t, "dddd", letters(v.Saga.Steps))
	require.Equal(t, int32(2), v.Sequence)
	require.Equal(t, int32(5), v.Saga.Version)
	require.True(t, v.Deadline.IsZero())
	require.True(t, one[bool](t, db, `SELECT ended_at IS NOT NULL FROM sagas`))

	history, err := db.Timeline(t.Context(), o.ID)
	require.NoError(t, err)
	require.Len(t, history, 5)
	for i, h := range history {
		require.Equal(t, int32(i+1), h.Version)
		require.NotEqual(t, uuid.Nil, h.Cause)
		require.WithinDuration(t, db.Now(), h.At, 5*time.Second)
	}
	require.Equal(t, saga.Started, history[0].Input.Kind)
	require.Equal(t, saga.Input{Kind: saga.StepDone, Name: "capture_payment"}, history[3].Input)
	require.Equal(t, domain.Confirmed, history[3].Status)

	require.Empty(t, advance(t, db, done("commit_stock"), o.ID)[0].Out, "a duplicate changes nothing")
	require.Equal(t, int32(5), view(t, db, o.ID).Saga.Version)
	none, err := db.Order(t.Context(), domain.NewOrderID())
	require.NoError(t, err)
	require.Nil(t, none)
}

// Few rows, so that the page has room: then only a changed index key could keep an update from being HOT.
func TestSagaRowsStayHOT(t *testing.T) {
	db := newDB(t)
	orders := make([]*domain.Order, 5)
	ids := make([]domain.OrderID, len(orders))
	for i := range orders {
		orders[i] = newOrder("c", 1)
		ids[i] = orders[i].ID
	}
	updates := func(table string, want int64) (hot int64) {
		var n int64
		require.Eventually(t, func() bool {
			db.Pool(Consumers).Reset() // a session reports its statistics when it ends
			require.NoError(t, db.Pool(Operators).QueryRow(t.Context(), `SELECT n_tup_upd, n_tup_hot_upd FROM pg_stat_user_tables WHERE relname = $1`, table).Scan(&n, &hot))
			return n == want
		}, soon, 20*time.Millisecond)
		return hot
	}
	placeOrders(t, db, orders...)
	advance(t, db, done("reserve_stock"), ids...)
	advance(t, db, done("authorize_payment"), ids...)
	advance(t, db, saga.Input{Kind: saga.CancelRequested}, ids...) // after the capture was commanded: only the flag changes
	require.Equal(t, int64(15), updates("sagas", 15), "the deadline stood still")
	advance(t, db, done("capture_payment"), ids...) // cancelled: status and deadline change
	require.Equal(t, int64(15), updates("sagas", 20), "the deadline changed")
}

func TestRefusedCancelledAndStuckSagas(t *testing.T) {
	db := newDB(t)
	coord := coordinator(db)

	refused := saga.RefusedOrder(&domain.Draft{ID: domain.NewOrderID(), CustomerID: "x", Currency: "EUR"}, &domain.Refusal{Reason: domain.UnknownProduct})
	inTx(t, db, func(ctx context.Context, tx *Tx) error {
		_, err := coord.Place(ctx, tx, []saga.PlaceRequest{{Order: refused, Refusal: &domain.Refusal{Reason: domain.UnknownProduct, Detail: "no \x00 such"}, Given: true}})
		return err
	})
	v := view(t, db, refused.ID)
	require.Equal(t, domain.Rejected, v.Status)
	require.Equal(t, domain.UnknownProduct, v.Reason)
	require.Equal(t, saga.Compensated, v.Saga.Phase)
	require.Empty(t, v.Lines)

	o := newOrder("c", 1)
	placeOrders(t, db, o)
	advance(t, db, saga.Input{Kind: saga.StepRefused, Name: "reserve_stock"}, o.ID)
	v = view(t, db, o.ID)
	require.Equal(t, saga.Compensating, v.Saga.Phase)
	require.Equal(t, domain.OutOfStock, v.Reason)
	require.WithinDuration(t, db.Now().Add(saga.DefaultLimits.Compensating), v.Deadline, 5*time.Second)

	advance(t, db, saga.Input{Kind: saga.StepStalled, Name: "payment", Reason: "the gateway\x00 \xff says 500"}, o.ID)
	v = view(t, db, o.ID)
	require.NotNil(t, v.Saga.Stuck)
	require.Equal(t, "the gateway \uFFFD says 500", v.Saga.Stuck.Reason, "free text is made storable")
	since := v.Saga.Stuck.Since
	require.WithinDuration(t, db.Now(), since, 5*time.Second)
	advance(t, db, saga.Input{Kind: saga.OperatorTook, Owner: "olga"}, o.ID)
	advance(t, db, saga.Input{Kind: saga.StepStalled, Name: "payment", Reason: "still"}, o.ID)
	v = view(t, db, o.ID)
	require.Equal(t, &saga.Stuck{Reason: "still", Owner: "olga", Since: since}, v.Saga.Stuck, "since stays while the flag stands")

	page, next, err := db.Sagas(t.Context(), saga.SagaFilter{Stuck: true, Limit: 10})
	require.NoError(t, err)
	require.Empty(t, next)
	require.Len(t, page, 1)
	running, stuck, err := db.CountSagasUnderWay(t.Context())
	require.NoError(t, err)
	require.Equal(t, []int64{1, 1}, []int64{running, stuck})

	advance(t, db, saga.Input{Kind: saga.UndoDone, Name: "stock"}, o.ID)
	v = view(t, db, o.ID)
	require.Nil(t, v.Saga.Stuck, "a fact that moves it clears the flag")
	advance(t, db, saga.Input{Kind: saga.UndoDone, Name: "payment"}, o.ID)
	require.Equal(t, saga.Compensated, view(t, db, o.ID).Saga.Phase)
}

func TestBatchOfAThousandOrders(t *testing.T) {
	db := newDB(t)
	orders := make([]*domain.Order, 1000)
	ids := make([]domain.OrderID, len(orders))
	for i := range orders {
		orders[i] = newOrder(fmt.Sprintf("c%d", i%7), int64(i%9+1))
		ids[i] = orders[i].ID
	}
	placeOrders(t, db, orders...)
	complete(t, db, ids...)
	counts, err := db.CountOrders(t.Context())
	require.NoError(t, err)
	require.Equal(t, []OrderCount{{Status: domain.Confirmed, Phase: saga.Completed, Orders: 1000, Minor: one[int64](t, db, `SELECT sum(total_minor)::bigint FROM orders`)}}, counts)
	require.Equal(t, 5000, one[int](t, db, `SELECT count(*) FROM saga_history`))
	inTx(t, db, func(ctx context.Context, tx *Tx) error {
		found, err := tx.LoadOrders(ctx, ids)
		require.Len(t, found, 1000)
		require.Equal(t, orders[17].Lines, found[ids[17]].Lines)
		return err
	})
	n := 0
	require.NoError(t, db.EachOrder(t.Context(), func(OrderFact) error { n++; return nil }))
	require.Equal(t, 1000, n)
	stop := errors.New("enough")
	require.ErrorIs(t, db.EachOrder(t.Context(), func(OrderFact) error { return stop }), stop)
}

// Two transactions place one id with different content, again and again: one order each time, and the other hears of the conflict.
func TestTwoPlaceOneID(t *testing.T) {
	db := newDB(t)
	for range 20 {
		id := domain.NewOrderID()
		outcomes := make([]saga.PlaceOutcome, 2)
		race(t, 2, func(i int) error {
			return db.For(Consumers).InTx(t.Context(), func(ctx context.Context, tx *Tx) error {
				o := newOrder(fmt.Sprintf("c%d", i), 1)
				o.ID = id
				placed, err := coordinator(db).Place(ctx, tx, []saga.PlaceRequest{{Order: o, Hash: int64(i), Given: true}})
				if err == nil {
					outcomes[i] = placed[0].Outcome
				}
				return err
			})
		})
		require.ElementsMatch(t, []saga.PlaceOutcome{saga.PlacedNew, saga.PlacedConflict}, outcomes)
	}
	require.Equal(t, 20, one[int](t, db, `SELECT count(*) FROM orders`))
}

// An id that was drawn by us is not locked: the primary key makes the second transaction start over, and it finds the first's order.
func TestInsertThatMeetsAnotherStartsOver(t *testing.T) {
	db := newDB(t)
	o := newOrder("c", 1)
	var attempts atomic.Int32
	err := db.For(Consumers).InTx(t.Context(), func(ctx context.Context, tx *Tx) error {
		found, err := tx.FindOrders(ctx, []domain.OrderID{o.ID})
		if err != nil {
			return err
		}
		if attempts.Add(1) == 1 {
			placeOrders(t, db, o) // somebody else, meanwhile
		}
		if len(found) > 0 {
			return nil
		}
		_, err = coordinator(db).Place(ctx, tx, requests(o))
		return err
	})
	require.NoError(t, err)
	require.Equal(t, int32(2), attempts.Load())

	// One that never goes away is the data's fault in the end, not an endless loop.
	attempts.Store(0)
	err = db.For(Consumers).InTx(t.Context(), func(ctx context.Context, tx *Tx) error {
		attempts.Add(1)
		_, err := coordinator(db).Place(ctx, tx, requests(o))
		return err
	})
	require.True(t, isDataError(err), "%v", err)
	require.ErrorContains(t, err, "insert orders")
	require.Equal(t, int32(maxAttempts), attempts.Load())
}

// F10: a cancel and the order that it is about race; whichever commits first, the order never ends confirmed.
func TestF10_CancelOvertakesPlacing(t *testing.T) {
	db := newDB(t)
	coord := coordinator(db)
	var before, after int
	for range 40 {
		o := newOrder("c", 1)
		var outcome saga.CancelOutcome
		race(t, 2, func(i int) error {
			return db.For(Consumers).InTx(t.Context(), func(ctx context.Context, tx *Tx) error {
				if i == 0 {
					c := *o
					_, err := coord.Place(ctx, tx, []saga.PlaceRequest{{Order: &c, Hash: 1, Given: true}})
					return err
				}
				res, err := coord.Cancel(ctx, tx, []saga.CancelRequest{{Order: o.ID, Await: true}})
				if err == nil {
					outcome = res[0].Outcome
				}
				return err
			})
		})
		require.Equal(t, domain.Cancelled, view(t, db, o.ID).Status)
		if outcome == saga.CancelAwaits {
			before++
		} else {
			require.Equal(t, saga.CancelAccepted, outcome)
			after++
		}
	}
	t.Logf("cancel first %d times, order first %d times", before, after)

	id := domain.NewOrderID()
	for range 2 { // the second cancel of an unknown order changes nothing
		inTx(t, db, func(ctx context.Context, tx *Tx) error {
			res, err := coord.Cancel(ctx, tx, []saga.CancelRequest{{Order: id, Await: true}})
			require.Equal(t, saga.CancelAwaits, res[0].Outcome)
			return err
		})
	}
}

func race(t *testing.T, n int, fn func(i int) error) {
	t.Helper()
	var wg sync.WaitGroup
	errs := make([]error, n)
	for i := range n {
		wg.Go(func() { errs[i] = fn(i) })
	}
	wg.Wait()
	for _, err := range errs {
		require.NoError(t, err)
	}
}

func TestSixteenPostsWithOneIdempotencyKey(t *testing.T) {
	db := newDB(t)
	answers := make([]string, 16)
	race(t, len(answers), func(i int) error {
		return db.For(Intake).InTx(t.Context(), func(ctx context.Context, tx *Tx) error {
			key := saga.IdempotencyKey{Caller: "shop", Key: "k", Body: [32]byte{7}}
			found, err := tx.FindKeys(ctx, []saga.IdempotencyKey{{Caller: "shop", Key: "other"}, key})
			if err != nil {
				return err
			}
			require.Nil(t, found[0])
			if found[1] != nil {
				require.Equal(t, [32]byte{7}, found[1].Body)
				require.Equal(t, "shop", found[1].Caller)
				answers[i] = string(found[1].Answer)
				return nil
			}
			o := newOrder("c", 1)
			if _, err := coordinator(db).Place(ctx, tx, requests(o)); err != nil {
				return err
			}
			key.Order, key.Answer = o.ID, fmt.Appendf(nil, `{"order_id":%q}`, o.ID)
			answers[i] = string(key.Answer)
			return tx.InsertKeys(ctx, []saga.IdempotencyKey{key})
		})
	})
	for _, a := range answers {
		require.Equal(t, answers[0], a)
	}
	require.Equal(t, 1, one[int](t, db, `SELECT count(*) FROM orders`))
}

// A key is scoped by its caller, whatever either of them looks like.
func TestIdempotencyKeysOfTwoCallersDoNotMeet(t *testing.T) {
	require.NotEqual(t, keyID(&saga.IdempotencyKey{Caller: "a", Key: "bc"}), keyID(&saga.IdempotencyKey{Caller: "ab", Key: "c"}))
}

func TestDueSagas(t *testing.T) {
	db := newDB(t)
	ids := make([]domain.OrderID, 6)
	for i := range ids {
		o := newOrder("c", 1)
		placeOrders(t, db, o)
		ids[i] = o.ID
	}
	for i, id := range ids[:5] {
		rawExec(t, db, `UPDATE sagas SET deadline = now() - make_interval(secs => $2) WHERE order_id = $1`, uuid.UUID(id), 100-i)
	}
	locked, release := make(chan struct{}), make(chan struct{})
	held := make(chan error, 1)
	go func() {
		held <- db.For(Consumers).InTx(t.Context(), func(ctx context.Context, tx *Tx) error {
			tx.careful = true // what is presumed is not locked
			_, err := tx.LockSagas(ctx, ids[1:2])
			close(locked)
			<-release
			return err
		})
	}()
	<-locked
	inTx(t, db, func(ctx context.Context, tx *Tx) error {
		due, err := tx.DueSagas(ctx, 0, 3)
		require.NoError(t, err)
		require.Equal(t, []domain.OrderID{ids[0], ids[2], ids[3]}, due, "longest due first, without what somebody else holds")
		due, err = tx.DueSagas(ctx, 98*time.Second, 3)
		require.Equal(t, []domain.OrderID{ids[3], ids[4]}, due[max(0, len(due)-2):], "not those of long ago")
		require.NotContains(t, due, ids[0])
		return err
	})
	close(release)
	require.NoError(t, <-held)

	svc := &saga.Service[*Tx]{DB: db.For(Consumers), Coord: coordinator(db)}
	n, err := svc.ExpireDue(t.Context(), 10)
	require.NoError(t, err)
	require.Equal(t, 5, n)
	require.Equal(t, domain.TimedOut, view(t, db, ids[0]).Reason)
	require.Equal(t, domain.Pending, view(t, db, ids[5]).Status)
	n, err = svc.ExpireDue(t.Context(), 10)
	require.NoError(t, err)
	require.Zero(t, n)
}

func TestOutages(t *testing.T) {
	db := newDB(t)
	away := func() (m map[string]bool) {
		inTx(t, db, func(ctx context.Context, tx *Tx) (err error) { m, err = tx.Away(ctx); return err })
		return m
	}
	set := func(on bool) {
		inTx(t, db, func(ctx context.Context, tx *Tx) error { return tx.SetAway(ctx, saga.PaymentGateway, on) })
	}
	set(true)
	require.True(t, away()[saga.PaymentGateway])
	rawExec(t, db, `UPDATE outages SET since = now() - interval '1 hour', seen_at = now() - interval '30 seconds'`)
	set(true)
	require.True(t, one[bool](t, db, `SELECT since < now() - interval '59 minutes' AND seen_at > now() - interval '5 seconds' FROM outages`), "since stays while the reports follow each other")
	rawExec(t, db, `UPDATE outages SET seen_at = now() - interval '2 minutes'`)
	require.Empty(t, away(), "nobody has reported it for a minute")
	set(true)
	require.True(t, one[bool](t, db, `SELECT since > now() - interval '5 seconds' FROM outages`), "a new outage")
	set(false)
	require.Empty(t, away())
}

func TestResolveAndItsAudit(t *testing.T) {
	db := newDB(t)
	o := newOrder("c", 1)
	placeOrders(t, db, o)
	svc := &saga.Service[*Tx]{DB: db.For(Operators), Coord: coordinator(db)}
	_, changed, err := svc.Resolve(t.Context(), saga.Decision{Order: o.ID, Kind: saga.Retry, Actor: "olga", Note: "the gateway is back"})
	require.NoError(t, err)
	require.True(t, changed)
	require.Len(t, inOutbox(t, db), 3+2, "the event and first commands, and those again")
	res, err := svc.Cancel(t.Context(), saga.CancelRequest{Order: o.ID, Actor: "olga", Reason: "asked for by phone"})
	require.NoError(t, err)
	require.Equal(t, saga.CancelAccepted, res.Outcome)

	page, next, err := db.AuditLog(t.Context(), "", 1)
	require.NoError(t, err)
	require.Equal(t, "order.cancel", page[0].Action)
	require.Equal(t, o.ID.String(), page[0].Target)
	page, next, err = db.AuditLog(t.Context(), next, 1)
	require.NoError(t, err)
	require.Empty(t, next)
	require.Equal(t, "saga.resolve.retry", page[0].Action)
	require.Equal(t, "the gateway is back", page[0].Note)
	require.JSONEq(t, `{"name":""}`, page[0].Detail)
	require.WithinDuration(t, db.Now(), page[0].At, 5*time.Second)
	_, _, err = db.AuditLog(t.Context(), "page two", 1)
	var refusal *domain.Refusal
	require.ErrorAs(t, err, &refusal)
}

func TestListsOfOrdersAndSagas(t *testing.T) {
	db := newDB(t)
	var ids []domain.OrderID
	for i := range 12 {
		o := newOrder([]string{"anna", "bert"}[i%2], 1)
		o.ID = domain.OrderID(uuid.New()) // ids that clients choose follow no order
		placeOrders(t, db, o)
		ids = append(ids, o.ID)
	}
	complete(t, db, ids[:4]...)
	advance(t, db, saga.Input{Kind: saga.CancelRequested}, ids[4])
	advance(t, db, saga.Input{Kind: saga.UndoDone, Name: "stock"}, ids[4])
	advance(t, db, saga.Input{Kind: saga.UndoDone, Name: "payment"}, ids[4])
	advance(t, db, saga.Input{Kind: saga.CancelRequested}, ids[5])

	all := func(f saga.OrderFilter) (out []domain.OrderID) {
		for {
			page, next, err := db.Orders(t.Context(), f)
			require.NoError(t, err)
			for _, v := range page {
				out = append(out, v.ID)
			}
			if f.Cursor = next; next == "" {
				return out
			}
		}
	}
	newest := func(idx ...int) (out []domain.OrderID) {
		for _, i := range idx {
			out = append(out, ids[i])
		}
		return out
	}
	require.Equal(t, newest(11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), all(saga.OrderFilter{Limit: 5}))
	require.Equal(t, newest(11, 9, 7, 5, 3, 1), all(saga.OrderFilter{CustomerID: "bert", Limit: 2}))
	require.Equal(t, newest(11, 10, 9, 8, 7, 6), all(saga.OrderFilter{Status: domain.Pending, Limit: 4}))
	require.Equal(t, newest(3, 2, 1, 0), all(saga.OrderFilter{Status: domain.Confirmed, Limit: 3}))
	require.Equal(t, newest(5, 4), all(saga.OrderFilter{Status: domain.Cancelled, Limit: 1}))
	require.Equal(t, newest(2, 0), all(saga.OrderFilter{Status: domain.Confirmed, CustomerID: "anna", Limit: 10}))
	require.Empty(t, all(saga.OrderFilter{Status: domain.Rejected, Limit: 10}))
	require.Empty(t, all(saga.OrderFilter{CustomerID: "\x00", Limit: 10}))

	sagas := func(f saga.SagaFilter) (out []domain.OrderID) {
		for {
			page, next, err := db.Sagas(t.Context(), f)
			require.NoError(t, err)
			for _, v := range page {
				out = append(out, v.ID)
			}
			if f.Cursor = next; next == "" {
				return out
			}
		}
	}
	require.Equal(t, newest(3, 2, 1, 0), sagas(saga.SagaFilter{Phase: saga.Completed, Limit: 3}))
	require.Equal(t, newest(4), sagas(saga.SagaFilter{Phase: saga.Compensated, Limit: 3}))
	require.Equal(t, newest(5), sagas(saga.SagaFilter{Phase: saga.Compensating, Limit: 3}))
	require.Len(t, sagas(saga.SagaFilter{Limit: 5}), 12)
	require.Empty(t, sagas(saga.SagaFilter{Stuck: true, Limit: 5}))
	rawExec(t, db, `UPDATE sagas SET updated_at = now() - interval '90 seconds' WHERE order_id = ANY($1)`, []uuid.UUID{uuid.UUID(ids[0]), uuid.UUID(ids[7])})
	require.Equal(t, newest(7), sagas(saga.SagaFilter{Stuck: true, Limit: 5}), "stands still, and has not ended")
	require.Equal(t, newest(7), sagas(saga.SagaFilter{OlderThan: time.Minute, Limit: 5}))
	require.Equal(t, newest(0), sagas(saga.SagaFilter{OlderThan: time.Minute, Phase: saga.Completed, Limit: 5}))

	for _, f := range []saga.OrderFilter{{Cursor: "x"}, {Cursor: "eA"}, {Status: "shipped"}} {
		_, _, err := db.Orders(t.Context(), f)
		var refusal *domain.Refusal
		require.ErrorAs(t, err, &refusal)
	}
	_, _, err := db.Sagas(t.Context(), saga.SagaFilter{Phase: "asleep"})
	require.ErrorContains(t, err, "there is no phase")
	oldest, err := db.OldestUnderWay(t.Context())
	require.NoError(t, err)
	require.InDelta(t, 90, oldest, 5)
	n, err := db.RunningSagas(t.Context(), 5)
	require.NoError(t, err)
	require.Equal(t, int64(5), n)
}

// A status that few orders have is searched for in bounded runs: pages may be empty, and the search still ends.
func TestRareStatusIsFoundAcrossRuns(t *testing.T) {
	db := newDB(t)
	rawExec(t, db, `INSERT INTO orders (id, customer_id, payment_method, currency, total_minor, lines, request_hash, created_at)
SELECT gen_random_uuid(), 'c', 'pm', 'EUR', 100, '[]', 1, now() - g * interval '1 second' FROM generate_series(1, 45000) g`)
	rawExec(t, db, `INSERT INTO sagas (order_id, definition, def_version, total_minor, currency, version, sequence, phase, status, steps, undos, ended_at)
SELECT id, 'order', 1, 100, 'EUR', 5, 2, 'completed', 'confirmed', 'dddd', '--', now() FROM orders`)
	rawExec(t, db, `UPDATE sagas SET phase = 'compensated', status = 'cancelled', reason = 'cancelled_by_customer' WHERE order_id = (SELECT id FROM orders ORDER BY created_at LIMIT 1)`)
	f := saga.OrderFilter{Status: domain.Cancelled, Limit: 10}
	pages, found := 0, 0
	for {
		page, next, err := db.Orders(t.Context(), f)
		require.NoError(t, err)
		pages++
		found += len(page)
		if f.Cursor = next; next == "" {
			break
		}
	}
	require.Equal(t, 1, found)
	require.Equal(t, 3, pages)
}
