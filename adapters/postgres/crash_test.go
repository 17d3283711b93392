package postgres

import (
	"context"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"

	"ordersaga/adapters/embedded/testenv"
	"ordersaga/domain"
)

// F21: the server is killed under load, twice, and comes back. What was acknowledged is there; what was refused was refused as an
// outage; and without anybody doing anything the same pools work again.
func TestF21_ServerKilledUnderLoad(t *testing.T) {
	pg := testenv.PostgresServer(t)
	db := open(t, pg.URL())
	_, err := Migrate(t.Context(), db, Up)
	require.NoError(t, err)

	const workers = 4
	var wg sync.WaitGroup
	var stop atomic.Bool
	var outages atomic.Int64
	acknowledged := make([][]domain.OrderID, workers)
	other := make(chan error, workers)
	placed := make(chan struct{}, 1)
	for w := range workers {
		wg.Go(func() {
			for !stop.Load() {
				o := newOrder("c", 1)
				err := db.For(Intake).InTx(context.Background(), func(ctx context.Context, tx *Tx) error {
					_, err := coordinator(db).Place(ctx, tx, requests(o))
					return err
				})
				switch {
				case err == nil:
					acknowledged[w] = append(acknowledged[w], o.ID)
					select {
					case placed <- struct{}{}:
					default:
					}
				case outageOf(err) == "postgres":
					outages.Add(1)
					time.Sleep(time.Millisecond) //nolint:forbidigo // what a caller's backoff does
				default:
					other <- err
					return
				}
			}
		})
	}
	await := func() {
		for range 20 {
			select {
			case <-placed:
			case err := <-other:
				t.Errorf("neither done nor an outage: %v", err)
				return
			case <-time.After(time.Minute):
				t.Error("no order was placed for a minute")
				return
			}
		}
	}
	await()
	for range 2 {
		require.NoError(t, pg.Kill())
		require.NoError(t, pg.Restart(t.Context()))
		<-placed // may be from before
		await()
	}
	stop.Store(true)
	wg.Wait()
	require.Positive(t, outages.Load())
	require.Eventually(t, func() bool {
		_, err := db.Order(t.Context(), domain.NewOrderID())
		return err == nil
	}, soon, 10*time.Millisecond, "a pool that has not been used meanwhile notices with its next statement")
	n := 0
	for _, ids := range acknowledged {
		n += len(ids)
		for _, id := range ids {
			require.Equal(t, 1, one[int](t, db, `SELECT count(*) FROM orders o JOIN sagas s ON s.order_id = o.id JOIN saga_history h ON h.order_id = o.id WHERE o.id = $1`, uuid.UUID(id)))
		}
	}
	t.Logf("%d orders acknowledged, %d refused", n, outages.Load())
	require.GreaterOrEqual(t, one[int](t, db, `SELECT count(*) FROM orders`), n, "one whose commit's outcome was unknown may be there too")
}
