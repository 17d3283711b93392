package postgres

import (
	"context"
	"testing"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"

	"ordersaga/domain"
	"ordersaga/events"
)

// What was foreseen is there when it is asked for, locked, and after one round trip; what was written since is seen by whoever asks again.
func TestWhatIsForeseenComesWithTheNextRoundTrip(t *testing.T) {
	db := newDB(t)
	a, b := newOrder("customer", 1), newOrder("customer", 1)
	placeOrders(t, db, a, b)
	ids := sortedIDs([]domain.OrderID{a.ID, b.ID})
	inTx(t, db, func(ctx context.Context, tx *Tx) error {
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
	inTx(t, db, func(ctx context.Context, tx *Tx) error {
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
