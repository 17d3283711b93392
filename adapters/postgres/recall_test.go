package postgres

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"

	"ordersaga/consumers"
	"ordersaga/domain"
	"ordersaga/events"
	"ordersaga/saga"
)

// second is the same database as another process sees it.
func second(tb testing.TB, db *DB, change ...func(*Config)) *DB {
	tb.Helper()
	return open(tb, db.cfg.URL, change...)
}

// readTx is inTx, but presumes nothing.
func readTx(tb testing.TB, db *DB, fn func(ctx context.Context, tx *Tx) error) {
	tb.Helper()
	inTx(tb, db, func(ctx context.Context, tx *Tx) error {
		tx.careful = true
		return fn(ctx, tx)
	})
}

var twoEuros = domain.Money{Minor: 200, Currency: "EUR"}

// start starts a payment step as the payment group does, presuming that it is the first of its order if it is.
func start(tb testing.TB, db *DB, op domain.PaymentOp, id domain.OrderID) (begin domain.Begin) {
	tb.Helper()
	inTx(tb, db, func(ctx context.Context, tx *Tx) error {
		if op == domain.Authorize {
			tx.PresumeUnpaid([]domain.OrderID{id})
		}
		pays, err := tx.LockPayments(ctx, []domain.OrderID{id})
		if err != nil {
			return err
		}
		p := pays[id]
		switch op {
		case domain.Authorize:
			begin = p.BeginAuthorize(twoEuros, "pm_card_visa", false, db.Now())
		case domain.Capture:
			begin = p.BeginCapture(twoEuros, false, db.Now())
		default:
			begin = p.BeginReverse(db.Now())
		}
		if len(p.Changed) == 0 {
			return nil
		}
		return tx.SavePayments(ctx, []*domain.Payment{p})
	})
	return begin
}

// settle stores what a step's call came to, and answers the payment as the transaction saw it.
func settle(tb testing.TB, db *DB, op domain.PaymentOp, id domain.OrderID, result domain.PaymentResult) (p *domain.Payment) {
	tb.Helper()
	inTx(tb, db, func(ctx context.Context, tx *Tx) error {
		message := []uuid.UUID{events.NewID()}
		tx.ForeseePayments([]domain.OrderID{id})
		tx.PresumeFirst(events.GroupPayment, message)
		if _, err := tx.Inbox(ctx, events.GroupPayment, message); err != nil {
			return err
		}
		pays, err := tx.LockPayments(ctx, []domain.OrderID{id})
		if err != nil {
			return err
		}
		if p = pays[id]; !p.Settle(op, 1, domain.PaymentOutcome{Result: result, Ref: "pi_1"}) {
			return nil
		}
		return tx.SavePayments(ctx, []*domain.Payment{p})
	})
	return p
}

func TestWhatThisProcessWroteLastIsNotRead(t *testing.T) {
	tr := &trips{}
	db := newDB(t, func(c *Config) { c.Tracer = tr })
	o, other := newOrder("c", 1), newOrder("c", 1)
	placeOrders(t, db, o, other)
	oneTrip := func(what string, do func()) {
		t.Helper()
		tr.take()
		do()
		batches := tr.take()
		require.Len(t, batches, 1, what)
		require.NotContains(t, batches[0], "begin", what)
		require.NotContains(t, batches[0], "commit", what)
	}
	oneTrip("start", func() { require.Equal(t, domain.BeginCall, start(t, db, domain.Authorize, o.ID)) })
	oneTrip("settle", func() { settle(t, db, domain.Authorize, o.ID, domain.PaymentAuthorized) })
	oneTrip("advance", func() { advance(t, db, done("authorize_payment"), o.ID, other.ID) })
	oneTrip("advance one", func() { advance(t, db, done("reserve_stock"), o.ID) })
	oneTrip("capture", func() { require.Equal(t, domain.BeginCall, start(t, db, domain.Capture, o.ID)) })
	oneTrip("captured", func() { settle(t, db, domain.Capture, o.ID, domain.PaymentCaptured) })
	oneTrip("confirmed", func() { advance(t, db, done("capture_payment"), o.ID) })
	require.Equal(t, domain.Confirmed, view(t, db, o.ID).Status)
	require.Equal(t, domain.Pending, view(t, db, other.ID).Status)
	advance(t, db, done("commit_stock"), o.ID)
	_, ok := db.recall.sagas.GetIfPresent(o.ID)
	require.False(t, ok, "what has ended is not remembered")
	_, ok = db.recall.payments.GetIfPresent(o.ID)
	require.False(t, ok)
}

// What another process did meanwhile is met by whoever presumes that nothing has happened.
func TestAStaleSagaIsReadAnew(t *testing.T) {
	db := newDB(t)
	there := second(t, db)
	for name, ids := range map[string]func() []domain.OrderID{
		"one": func() []domain.OrderID { o := newOrder("c", 1); placeOrders(t, db, o); return []domain.OrderID{o.ID} },
		"several": func() []domain.OrderID {
			a, b := newOrder("c", 1), newOrder("c", 1)
			placeOrders(t, db, a, b)
			return sortedIDs([]domain.OrderID{a.ID, b.ID})
		},
	} {
		t.Run(name, func(t *testing.T) {
			all := ids()
			advance(t, there, done("reserve_stock"), all[0])
			out := advance(t, db, done("authorize_payment"), all...)
			require.Equal(t, int32(3), out[0].State.Version)
			advance(t, there, done("authorize_payment"), all[0]) // a repeat there, which changes nothing
			advance(t, db, done("capture_payment"), all[0])
			v := view(t, db, all[0])
			require.Equal(t, domain.Confirmed, v.Status)
			require.Equal(t, int32(4), v.Saga.Version)
		})
	}
}

// A decision that changes nothing rests on what was presumed as much as one that does.
func TestADecisionThatChangesNothingIsVerified(t *testing.T) {
	db := newDB(t)
	there := second(t, db)
	o := newOrder("c", 1)
	placeOrders(t, db, o)
	advance(t, there, done("reserve_stock"), o.ID)
	advance(t, there, done("authorize_payment"), o.ID)
	// By what this process remembers nothing was captured that could be committed: the fact would come to nothing.
	advance(t, there, done("capture_payment"), o.ID)
	out := advance(t, db, done("commit_stock"), o.ID)
	require.True(t, out[0].Changed)
	require.Equal(t, saga.Completed, view(t, db, o.ID).Saga.Phase)
}

func TestTwoWhoPresumeTheSameDoNotBothWrite(t *testing.T) {
	db := newDB(t)
	o := newOrder("c", 1)
	placeOrders(t, db, o)
	const n = 8
	errs := make(chan error, n)
	for range n {
		go func() {
			errs <- db.For(Consumers).InTx(t.Context(), func(ctx context.Context, tx *Tx) error {
				_, err := coordinator(db).Advance(ctx, tx, []saga.Fact{{Order: o.ID, Input: done("reserve_stock"), Cause: events.NewID()}})
				return err
			})
		}()
	}
	for range n {
		require.NoError(t, <-errs)
	}
	require.Equal(t, int32(2), view(t, db, o.ID).Saga.Version)
	require.Equal(t, 2, one[int](t, db, `SELECT count(*) FROM saga_history`), "placed, and reserved once")
}

// F10, F36: an undo elsewhere, before the start, between start and settling, and between authorisation and capture.
func TestAnUndoElsewhereIsMet(t *testing.T) {
	db := newDB(t)
	there := second(t, db)
	before, between, after := newOrder("c", 1), newOrder("c", 1), newOrder("c", 1)

	start(t, there, domain.Reverse, before.ID)
	require.Equal(t, domain.BeginSettled, start(t, db, domain.Authorize, before.ID), "the tombstone is in its way")

	start(t, db, domain.Authorize, between.ID)
	require.Equal(t, domain.BeginCall, start(t, there, domain.Reverse, between.ID))
	p := settle(t, db, domain.Authorize, between.ID, domain.PaymentAuthorized)
	require.True(t, p.Closed(), "the row that was inserted meanwhile is seen")

	start(t, db, domain.Authorize, after.ID)
	settle(t, db, domain.Authorize, after.ID, domain.PaymentAuthorized)
	start(t, there, domain.Reverse, after.ID)
	require.Equal(t, domain.BeginSettled, start(t, db, domain.Capture, after.ID), "nothing is captured behind the undo's back")
	require.Zero(t, one[int](t, db, `SELECT count(*) FROM payments WHERE op = 'capture'`))
}

func TestPresumptionsThatLeaveNothingAreVerified(t *testing.T) {
	db := newDB(t)
	paid, reserved := newOrder("c", 1), newOrder("c", 1)
	start(t, db, domain.Authorize, paid.ID)
	put(t, db, "cup", 10)
	inTx(t, db, func(ctx context.Context, tx *Tx) error {
		return tx.InsertReservations(ctx, []domain.Reservation{{Order: reserved.ID, State: domain.Reserved, Lines: []domain.Line{{SKU: "cup", Quantity: 1}}}})
	})
	var looks int
	inTx(t, db, func(ctx context.Context, tx *Tx) error { // a lapsed command, repeated: it writes nothing
		looks++
		tx.PresumeUnpaid([]domain.OrderID{paid.ID})
		pays, err := tx.LockPayments(ctx, []domain.OrderID{paid.ID})
		require.NoError(t, err)
		require.Equal(t, looks > 1, pays[paid.ID].State(domain.Authorize) != "")
		return nil
	})
	require.Equal(t, 2, looks)
	looks = 0
	inTx(t, db, func(ctx context.Context, tx *Tx) error {
		looks++
		tx.PresumeUnreserved([]domain.OrderID{reserved.ID})
		rs, err := tx.LockReservations(ctx, []domain.OrderID{reserved.ID})
		require.NoError(t, err)
		require.Equal(t, looks > 1, rs[reserved.ID] != nil)
		return nil
	})
	require.Equal(t, 2, looks)
}

func TestAMessageThatIsKnownIsNoFirst(t *testing.T) {
	db := newDB(t)
	timed, hashed := events.NewID(), uuid.UUID{1: 9}
	for _, id := range []uuid.UUID{timed, hashed} {
		inTx(t, db, func(ctx context.Context, tx *Tx) error {
			_, err := tx.Inbox(ctx, events.GroupStock, []uuid.UUID{id})
			require.NoError(t, err)
			return tx.SaveInbox(ctx, events.GroupStock, []consumers.InboxRow{{MessageID: id, State: consumers.InboxWaiting, Ticket: 7, New: true}})
		})
		for group, known := range map[events.Group]bool{events.GroupStock: true, events.GroupPayment: false} {
			looks := 0
			inTx(t, db, func(ctx context.Context, tx *Tx) error {
				looks++
				ids := []uuid.UUID{events.NewID(), id}
				tx.PresumeFirst(group, ids)
				rows, err := tx.Inbox(ctx, group, ids)
				require.NoError(t, err)
				require.Equal(t, known && looks > 1, len(rows) == 1)
				return nil
			})
			require.Equal(t, known, looks == 2)
		}
	}
}

func TestAnOutageForgetsWhatIsKnown(t *testing.T) {
	db := newDB(t)
	o := newOrder("c", 1)
	placeOrders(t, db, o)
	start(t, db, domain.Authorize, o.ID)
	_, ok := db.recall.sagas.GetIfPresent(o.ID)
	require.True(t, ok)
	err := db.For(Consumers).InTx(t.Context(), func(context.Context, *Tx) error { return errors.New("the caller's own") })
	require.Error(t, err)
	_, ok = db.recall.sagas.GetIfPresent(o.ID)
	require.True(t, ok, "nothing is known to be wrong")
	rawExec(t, db, `SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE '%consumers%' AND pid <> pg_backend_pid()`)
	require.Eventually(t, func() bool { // the server that answers next may be a standby that has not heard of it
		_ = db.For(Consumers).InTx(t.Context(), func(ctx context.Context, tx *Tx) error {
			_, err := tx.LockStock(ctx, []domain.SKU{"cup"})
			return err
		})
		_, saga := db.recall.sagas.GetIfPresent(o.ID)
		_, payment := db.recall.payments.GetIfPresent(o.ID)
		return !saga && !payment
	}, 10*time.Second, 10*time.Millisecond)
}

// What follows from a payment's outcome goes with it: the saga is still presumed after the payment was written, the payment is what was written, and where
// the saga was moved by somebody else all of it starts over.
func TestAPaymentsOutcomeItsSagaAndTheNextStepAreOneTransaction(t *testing.T) {
	for _, moved := range []bool{false, true} {
		db := newDB(t)
		o := newOrder("c", 1)
		placeOrders(t, db, o)
		start(t, db, domain.Authorize, o.ID)
		if moved {
			advance(t, second(t, db), done("reserve_stock"), o.ID)
		}
		ids, runs := []domain.OrderID{o.ID}, 0
		inTx(t, db, func(ctx context.Context, tx *Tx) error {
			runs++
			pays, err := tx.LockPayments(ctx, ids)
			require.NoError(t, err)
			p := pays[o.ID]
			p.Settle(domain.Authorize, 1, domain.PaymentOutcome{Result: domain.PaymentAuthorized, Ref: "pi_1"})
			require.NoError(t, tx.SavePayments(ctx, []*domain.Payment{p}))

			sagas, err := tx.LockSagas(ctx, ids)
			require.NoError(t, err)
			in := sagas[o.ID]
			in.State.Version++
			require.NoError(t, tx.SaveSagas(ctx, []saga.Change{{Instance: in}}))

			pays, err = tx.LockPayments(ctx, ids)
			require.NoError(t, err)
			p = pays[o.ID]
			require.Equal(t, "pi_1", p.Ref())
			require.Empty(t, p.Changed)
			require.Equal(t, domain.BeginCall, p.BeginCapture(twoEuros, false, db.Now()))
			require.NoError(t, tx.SavePayments(ctx, []*domain.Payment{p}))
			require.Equal(t, runs > 1, tx.open, "nothing was read but what had to be")
			return nil
		})
		want := 1
		if moved {
			want = 2
		}
		require.Equal(t, want, runs)
		require.Equal(t, want+1, one[int](t, db, `SELECT version FROM sagas WHERE order_id = $1`, o.ID))
		require.Equal(t, "done started", one[string](t, db, `SELECT string_agg(state, ' ' ORDER BY op) FROM payments WHERE order_id = $1`, o.ID))
		p, known := db.recall.payments.GetIfPresent(o.ID)
		require.True(t, known)
		require.Equal(t, domain.BarrierStarted, p.State(domain.Capture))
	}
}

// An error that rests on what was presumed is not believed before that was read.
func TestAnErrorThatRestsOnWhatWasPresumedIsLookedAtAgain(t *testing.T) {
	db := newDB(t)
	there := second(t, db)
	o := newOrder("c", 1)
	placeOrders(t, db, o)
	advance(t, there, done("reserve_stock"), o.ID)
	versions := []int32{}
	refuse := errors.New("refused")
	err := db.For(Consumers).InTx(t.Context(), func(ctx context.Context, tx *Tx) error {
		sagas, err := tx.LockSagas(ctx, []domain.OrderID{o.ID})
		require.NoError(t, err)
		versions = append(versions, sagas[o.ID].State.Version)
		return refuse
	})
	require.ErrorIs(t, err, refuse)
	require.Equal(t, []int32{1, 2}, versions)
}
