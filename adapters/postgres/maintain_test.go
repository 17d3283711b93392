package postgres

import (
	"context"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"

	"ordersaga/consumers"
	"ordersaga/domain"
	"ordersaga/events"
	"ordersaga/saga"
)

func maintain(tb testing.TB, db *DB, r Retention) Maintained {
	tb.Helper()
	m, err := db.Maintain(tb.Context(), r)
	require.NoError(tb, err)
	require.True(tb, m.Ran)
	return m
}

// ahead moves the database's clock as this process sees it, and stops the measuring that would move it back.
func ahead(db *DB, d time.Duration) {
	db.stop()
	db.wg.Wait()
	r := *db.clock.at.Load()
	r.db = r.db.Add(d)
	db.clock.at.Store(&r)
}

func saveInbox(tb testing.TB, db *DB, ids ...uuid.UUID) {
	tb.Helper()
	inTx(tb, db, func(ctx context.Context, tx *Tx) error {
		var rows []consumers.InboxRow
		for _, id := range ids {
			rows = append(rows, consumers.InboxRow{MessageID: id, State: consumers.InboxHandled, New: true})
		}
		return tx.SaveInbox(ctx, "g", rows)
	})
}

func TestInboxPartitionsAreMadeAheadAndDropped(t *testing.T) {
	db := newDB(t)
	days, err := db.partitionDays(t.Context())
	require.NoError(t, err)
	require.Len(t, days, 5, "Migrate made yesterday to three days ahead")
	require.Zero(t, maintain(t, db, Retention{}).PartitionsMade)

	now := time.Now().UTC()
	inFuture := at(now.Add(5 * day)) // of a clock that is days ahead: the default partition takes it
	saveInbox(t, db, events.NewID(), inFuture)
	require.Equal(t, 1, one[int](t, db, `SELECT count(*) FROM inbox_default`))
	require.Equal(t, int64(1), maintain(t, db, Retention{}).RowsInTheDefaultOfTheDay)

	ahead(db, 3*day)
	require.Equal(t, 3, maintain(t, db, Retention{}).PartitionsMade)
	require.Equal(t, 0, one[int](t, db, `SELECT count(*) FROM inbox_default`), "its day has a partition now, and the row is in it")
	require.Equal(t, 1, one[int](t, db, `SELECT count(*) FROM `+partitionName(now.Add(5*day))))

	ahead(db, 6*day) // nine days on: a process that was away for days closes the gap
	m := maintain(t, db, Retention{})
	require.Equal(t, 6, m.PartitionsMade)
	require.Equal(t, 3, m.PartitionsDropped, "yesterday, today and tomorrow")
	require.Zero(t, one[int](t, db, `SELECT count(*) FROM inbox WHERE message_id < $1`, firstID(now.Add(2*day))))
	require.Equal(t, 1, one[int](t, db, `SELECT count(*) FROM inbox`))
	require.Zero(t, maintain(t, db, Retention{}).PartitionsDropped)
}

// F38: while somebody's transaction holds a partition, the drop gives up quickly each time, inserts go on, and a later run drops it.
func TestF38_DropBehindAnOpenTransactionStallsNobody(t *testing.T) {
	db := newDB(t)
	ahead(db, 9*day)
	maintainPartitionsOnly := func() (m Maintained) {
		require.NoError(t, db.makePartitions(t.Context(), DefaultRetention, &m))
		require.NoError(t, db.dropPartitions(t.Context(), DefaultRetention, &m))
		return m
	}
	tx, err := db.Pool(Operators).Begin(t.Context())
	require.NoError(t, err)
	_, err = tx.Exec(t.Context(), `SELECT count(*) FROM inbox`)
	require.NoError(t, err)

	finished := make(chan Maintained, 1)
	go func() {
		var m Maintained
		err := db.dropPartitions(context.Background(), DefaultRetention, &m)
		if err != nil {
			t.Error(err)
		}
		finished <- m
	}()
	var m Maintained
	slowest := time.Duration(0)
	for waiting := true; waiting; {
		select {
		case m = <-finished:
			waiting = false
		default:
			begin := time.Now()
			saveInbox(t, db, events.NewID())
			slowest = max(slowest, time.Since(begin))
		}
	}
	require.Positive(t, m.PartitionsPostponed)
	require.Zero(t, m.PartitionsDropped)
	t.Logf("slowest insert beside the waiting drop: %s", slowest)
	require.Less(t, slowest, time.Second)
	require.NoError(t, tx.Rollback(t.Context()))
	m = maintainPartitionsOnly()
	require.Positive(t, m.PartitionsDropped, "%+v", m)
}

func TestOneProcessMaintainsAtATime(t *testing.T) {
	db := newDB(t)
	held, release := make(chan struct{}), make(chan struct{})
	errs := make(chan error, 1)
	go func() {
		errs <- db.locked(t.Context(), lockMaintain, func(context.Context) error { close(held); <-release; return nil })
	}()
	<-held
	m, err := db.Maintain(t.Context(), Retention{})
	require.NoError(t, err)
	require.False(t, m.Ran)
	close(release)
	require.NoError(t, <-errs)
	maintain(t, db, Retention{})
	require.Zero(t, one[int](t, db, `SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND database = (SELECT oid FROM pg_database WHERE datname = current_database())`))
	_, err = db.Maintain(t.Context(), Retention{Ended: time.Hour})
	require.ErrorContains(t, err, "must be longer than that of the inbox")
}

func TestRetention(t *testing.T) {
	db := newDB(t)
	foreign := events.Identity(&events.Record{Topic: "x", Offset: 7})
	saveInbox(t, db, foreign, at(time.Now().Add(-100*day)), events.Identity(&events.Record{Topic: "x", Offset: 8}))
	rawExec(t, db, `UPDATE inbox SET at = now() - interval '8 days' WHERE message_id <> $1`, foreign)
	inTx(t, db, func(ctx context.Context, tx *Tx) error {
		return tx.InsertKeys(ctx, []saga.IdempotencyKey{{Key: "old", Order: domain.NewOrderID()}, {Key: "new", Order: domain.NewOrderID()}})
	})
	rawExec(t, db, `UPDATE idempotency_keys SET created_at = now() - interval '49 hours' WHERE id = $1`, keyID(&saga.IdempotencyKey{Key: "old"}))
	var ds []consumers.DeadLetter
	for i := range 4 {
		ds = append(ds, deadLetter(i))
	}
	o := newOrder("c", 1)
	placeOrders(t, db, o)
	complete(t, db, o.ID)
	running := newOrder("c", 1)
	placeOrders(t, db, running)
	ds[2].OrderID, ds[3].OrderID = uuid.UUID(o.ID), uuid.UUID(running.ID)
	saveDeadLetters(t, db, ds...)
	rawExec(t, db, `UPDATE dead_letters SET updated_at = now() - interval '91 days'`)
	rawExec(t, db, `UPDATE dead_letters SET status = 'resolved' WHERE id = $1`, ds[0].ID)
	rawExec(t, db, `INSERT INTO operations (id, action, actor, items, finished_at) VALUES ($1, 'replay', 'olga', 1, now() - interval '91 days')`, events.NewID())
	rawExec(t, db, `INSERT INTO operation_items (operation_id, position, dead_letter_id) SELECT id, 1, id FROM operations`)

	m := maintain(t, db, Retention{})
	require.Equal(t, Maintained{Ran: true, InboxRows: 2, Keys: 1, DeadLetters: 1, Operations: 1, Superseded: 1}, m)
	require.Equal(t, consumers.DeadSuperseded, getDead(t, db, ds[2].ID).Status)
	require.Equal(t, consumers.DeadOpen, getDead(t, db, ds[1].ID).Status, "an open one stays, however old")
	require.Equal(t, consumers.DeadOpen, getDead(t, db, ds[3].ID).Status)
	require.Nil(t, getDead(t, db, ds[0].ID))
	require.Equal(t, 1, one[int](t, db, `SELECT count(*) FROM idempotency_keys`))
	require.Equal(t, Maintained{Ran: true}, maintain(t, db, Retention{}), "the second run finds nothing to do")

	// ended orders, where it is asked for
	rawExec(t, db, `UPDATE orders SET created_at = now() - interval '60 days'`)
	require.Zero(t, maintain(t, db, Retention{Ended: 30 * day}).Orders, "ended just now")
	rawExec(t, db, `UPDATE sagas SET ended_at = now() - interval '50 days' WHERE ended_at IS NOT NULL`)
	require.Equal(t, int64(1), maintain(t, db, Retention{Ended: 30 * day}).Orders)
	require.Equal(t, 1, one[int](t, db, `SELECT count(*) FROM orders`), "what has not ended stays")
	history, err := db.Timeline(t.Context(), o.ID)
	require.NoError(t, err)
	require.Empty(t, history)
}

// TestOnlyTheSagasOwnDeadLettersEndWithIt: a command whose order id another order has is an order that somebody lost, and a public event
// that Kafka refused is one that nobody heard. Neither may leave the operators' list because the saga went well.
func TestOnlyTheSagasOwnDeadLettersEndWithIt(t *testing.T) {
	db := newDB(t)
	o := newOrder("c", 1)
	placeOrders(t, db, o)
	complete(t, db, o.ID)
	var ds []consumers.DeadLetter
	for i, g := range []events.Group{events.GroupPayment, events.GroupCoordinator, events.GroupOrderCommands, ""} {
		d := deadLetter(i)
		d.Group, d.OrderID = g, uuid.UUID(o.ID)
		ds = append(ds, d)
	}
	saveDeadLetters(t, db, ds...)
	require.Equal(t, int64(2), maintain(t, db, Retention{}).Superseded)
	for i, want := range []consumers.DeadStatus{consumers.DeadSuperseded, consumers.DeadSuperseded, consumers.DeadOpen, consumers.DeadOpen} {
		require.Equal(t, want, getDead(t, db, ds[i].ID).Status, ds[i].Group)
	}
}

func TestMaintenanceGoesOnAfterAFailedStep(t *testing.T) {
	db := newDB(t)
	inTx(t, db, func(ctx context.Context, tx *Tx) error {
		return tx.InsertKeys(ctx, []saga.IdempotencyKey{{Key: "old"}})
	})
	rawExec(t, db, `UPDATE idempotency_keys SET created_at = now() - interval '49 hours'`)
	rawExec(t, db, `DROP TABLE inbox_foreign`)
	m, err := db.Maintain(t.Context(), Retention{})
	require.ErrorContains(t, err, "sweep inbox_foreign")
	require.Equal(t, int64(1), m.Keys)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err = db.Maintain(ctx, Retention{})
	require.ErrorIs(t, err, context.Canceled)
}
