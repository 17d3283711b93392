package postgres

import (
	"context"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"ordersaga/saga"
)

func TestFateOfLooksAtOrdersOfAPeriod(t *testing.T) {
	db := newDB(t)
	begun := db.Now()
	look := func(limit int) Fate {
		f, err := db.FateOf(t.Context(), begun.Add(-time.Second), db.Now().Add(time.Second), limit)
		require.NoError(t, err)
		return f
	}
	require.Equal(t, Fate{}, look(10))
	orders := benchOrders()[:6]
	placeOrders(t, db, orders...)
	require.Equal(t, Fate{Placed: 6, Pending: 6}, look(10))
	require.Equal(t, Fate{Placed: 4, Pending: 4}, look(4))
	rawExec(t, db, `UPDATE sagas SET status = 'rejected', reason = 'out_of_stock', phase = 'compensating' WHERE order_id = $1`, orders[0].ID)
	require.Equal(t, Fate{Placed: 6, Pending: 5}, look(10))
	require.NoError(t, db.InTx(t.Context(), func(ctx context.Context, tx *Tx) error { return tx.SetAway(ctx, saga.PaymentGateway, true) }))
	require.Equal(t, Fate{Placed: 6, Pending: 5, Away: true}, look(10))
	f, err := db.FateOf(t.Context(), begun.Add(-time.Hour), begun.Add(-time.Minute), 10)
	require.NoError(t, err)
	require.Zero(t, f.Placed, "those of another time")
	require.NotContains(t, plan(t, db, fateOf), "Seq Scan on sagas")

	n, err := db.StartedWithin(t.Context(), 15*time.Minute-time.Minute, 100)
	require.NoError(t, err)
	require.EqualValues(t, 6, n)
	rawExec(t, db, `UPDATE sagas SET deadline = deadline - interval '10 minutes' WHERE order_id = $1`, orders[1].ID)
	n, err = db.StartedWithin(t.Context(), 15*time.Minute-time.Minute, 100)
	require.NoError(t, err)
	require.EqualValues(t, 5, n, "it stands still since long")
	n, err = db.StartedWithin(t.Context(), 15*time.Minute-time.Minute, 3)
	require.NoError(t, err)
	require.EqualValues(t, 3, n)
}
