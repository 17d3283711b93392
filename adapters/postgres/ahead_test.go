package postgres

import (
	"context"
	"testing"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"

	"ordersaga/domain"
	"ordersaga/events"
	"ordersaga/saga"
)

// What was foreseen is there when it is asked for, locked, and after one round trip; what was written since is seen by whoever asks again.
func TestWhatIsForeseenComesWithTheNextRoundTrip(t *testing.T) {
	db := newDB(t)
	a, b := newOrder("customer", 1), newOrder("customer", 1)
	placeOrders(t, db, a, b)
	ids := sortedIDs([]domain.OrderID{a.ID, b.ID})
	readTx(t, db, func(ctx context.Context, tx *Tx) error {
		tx.ForeseeSagas(ids)
		require.Empty(t, tx.queued)
		rows, err := tx.Inbox(ctx, events.GroupCoordinator, []uuid.UUID{uuid.UUID(ids[0])})
		require.NoError(t, err)
		require.Empty(t, rows)
		require.Empty(t, tx.ahead, "it went along")
		found, err := tx.LockSagas(ctx, ids[:1])
		require.NoError(t, err)
		require.Len(t, found, 1, "only what is asked for")
		found, err = tx.LockSagas(ctx, ids)
		require.NoError(t, err)
		require.Len(t, found, 2, "read anew")
		return nil
	})
}

func TestWhatIsForeseenIsFetchedWhenNothingTookItAlong(t *testing.T) {
	db := newDB(t)
	o := newOrder("customer", 1)
	placeOrders(t, db, o)
	stranger := domain.NewOrderID()
	readTx(t, db, func(ctx context.Context, tx *Tx) error {
		tx.ForeseeSagas([]domain.OrderID{o.ID})
		found, err := tx.LockSagas(ctx, []domain.OrderID{o.ID})
		require.NoError(t, err)
		require.Contains(t, found, o.ID)
		tx.ForeseeSagas([]domain.OrderID{stranger})
		found, err = tx.LockSagas(ctx, sortedIDs([]domain.OrderID{o.ID, stranger}))
		require.NoError(t, err)
		require.Len(t, found, 1, "one that was not foreseen is read all the same")
		tx.ForeseeReservations([]domain.OrderID{o.ID})
		tx.ForeseePayments([]domain.OrderID{o.ID})
		rs, err := tx.LockReservations(ctx, []domain.OrderID{o.ID})
		require.NoError(t, err)
		require.Empty(t, rs)
		ps, err := tx.LockPayments(ctx, []domain.OrderID{o.ID})
		require.NoError(t, err)
		require.Contains(t, ps, o.ID, "every order is, with no steps")
		tx.ForeseeSagas([]domain.OrderID{o.ID})
		return nil // and the commit does not wait for what nobody asked for
	})
}

// Placing finds what was placed and what was cancelled before, in the round trip that looks for the keys.
func TestPlacingIsForeseen(t *testing.T) {
	db := newDB(t)
	placed, buried, fresh := newOrder("customer", 1), domain.NewOrderID(), domain.NewOrderID()
	placeOrders(t, db, placed)
	inTx(t, db, func(ctx context.Context, tx *Tx) error { return tx.InsertTombstones(ctx, []domain.OrderID{buried}) })
	ids := sortedIDs([]domain.OrderID{placed.ID, buried, fresh})
	inTx(t, db, func(ctx context.Context, tx *Tx) error {
		tx.ForeseePlacing(ids)
		_, err := tx.FindKeys(ctx, []saga.IdempotencyKey{{Caller: "c", Key: "k"}})
		require.NoError(t, err)
		require.Empty(t, tx.ahead)
		require.NoError(t, tx.LockOrderIDs(ctx, ids, true))
		require.Empty(t, tx.queued, "the locks are held already")
		orders, err := tx.FindOrders(ctx, ids)
		require.NoError(t, err)
		require.Len(t, orders, 1)
		require.Contains(t, orders, placed.ID)
		tombstones, err := tx.Tombstones(ctx, ids)
		require.NoError(t, err)
		require.Equal(t, map[domain.OrderID]bool{buried: true}, tombstones)
		require.Positive(t, one[int64](t, db, `SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND mode = 'ShareLock' AND granted`), "held until the end")
		return nil
	})
}
