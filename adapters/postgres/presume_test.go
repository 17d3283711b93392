package postgres

import (
	"context"
	"crypto/sha256"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"ordersaga/domain"
	"ordersaga/saga"
)

// teas is a catalogue of one product.
type teas struct{}

func (teas) Products(_ context.Context, skus []domain.SKU) (map[domain.SKU]domain.Product, error) {
	out := map[domain.SKU]domain.Product{}
	for _, s := range skus {
		out[s] = domain.Product{SKU: s, UnitPrice: domain.Money{Minor: 450, Currency: "EUR"}}
	}
	return out, nil
}

// openIntake runs an intake of its own, as a process does.
func openIntake(t *testing.T, db *DB, workers int) *saga.Intake[*Tx] {
	t.Helper()
	in := saga.NewIntake(saga.Store[*Tx](db.For(Intake)), coordinator(db), teas{}, saga.IntakeConfig{Workers: workers, MaxBatch: 16, Queue: 256}, nil)
	ctx, stop := context.WithCancel(context.WithoutCancel(t.Context()))
	done := make(chan error, 1)
	go func() { done <- in.Run(ctx) }()
	t.Cleanup(func() { stop(); require.NoError(t, <-done) })
	return in
}

// post is a submission; an order id that is zero is the intake's to choose.
func post(key, body string, id domain.OrderID) *saga.Submission {
	return &saga.Submission{
		Caller: "shop", Key: key, Body: sha256.Sum256([]byte(body)),
		Draft:  domain.Draft{ID: id, CustomerID: body, Currency: "EUR", PaymentMethod: "pm_card_visa", Items: []domain.DraftItem{{SKU: "tea", Quantity: 1}}},
		Answer: func(o *domain.Order) []byte { return []byte(o.ID.String() + " " + string(o.Status)) },
	}
}

func TestPlacingWhatIsNewIsOneRoundTrip(t *testing.T) {
	tr := &trips{}
	db := newDB(t, func(c *Config) { c.Tracer = tr })
	in := openIntake(t, db, 1)
	for i, id := range []domain.OrderID{{}, domain.NewOrderID()} {
		tr.take()
		_, err := in.Submit(t.Context(), post(fmt.Sprint(i), "a", id))
		require.NoError(t, err)
		batches := tr.take()
		require.Len(t, batches, 1)
		require.NotContains(t, batches[0], "begin")
		require.NotContains(t, batches[0], "commit")
		tr.take()
		again, err := in.Submit(t.Context(), post(fmt.Sprint(i), "a", id))
		require.NoError(t, err)
		require.True(t, again.Repeat)
		in = openIntake(t, db, 1) // one that presumes again
	}
}

func TestIntakeMeetsWhatIsThere(t *testing.T) {
	db := newDB(t)
	id, buried := domain.NewOrderID(), domain.NewOrderID()
	inTx(t, db, func(ctx context.Context, tx *Tx) error { return tx.InsertTombstones(ctx, []domain.OrderID{buried}) })
	first, err := openIntake(t, db, 1).Submit(t.Context(), post("k", "a", domain.OrderID{}))
	require.NoError(t, err)
	_, err = openIntake(t, db, 1).Submit(t.Context(), post("given", "a", id))
	require.NoError(t, err)

	for range 2 { // an intake that presumes, and then one that does not
		in := openIntake(t, db, 1)
		again, err := in.Submit(t.Context(), post("k", "a", domain.OrderID{}))
		require.NoError(t, err)
		require.Equal(t, saga.Accepted{Order: first.Order, Answer: first.Answer, Repeat: true}, again)
		_, err = in.Submit(t.Context(), post("k", "b", domain.OrderID{}))
		require.ErrorIs(t, err, saga.ErrKeyReused)
	}
	_, err = openIntake(t, db, 1).Submit(t.Context(), post("k", "b", domain.OrderID{}))
	require.ErrorIs(t, err, saga.ErrKeyReused)
	_, err = openIntake(t, db, 1).Submit(t.Context(), post("other", "a", id))
	require.ErrorIs(t, err, saga.ErrOrderExists)
	require.Zero(t, one[int](t, db, `SELECT count(*) FROM idempotency_keys WHERE order_id = $1 AND id <> $2`, id, keyID(&saga.IdempotencyKey{Caller: "shop", Key: "given"})))
	_, err = openIntake(t, db, 1).Submit(t.Context(), post("late", "a", buried))
	require.NoError(t, err)
	require.Equal(t, domain.Cancelled, view(t, db, buried).Status)
	require.Equal(t, 3, one[int](t, db, `SELECT count(*) FROM orders`))
	require.Equal(t, 3, one[int](t, db, `SELECT count(*) FROM idempotency_keys`))
	require.Equal(t, 1, one[int](t, db, `SELECT count(*) FROM barriers`))
}

func TestSixteenPostsOfOneKeyToTwoProcesses(t *testing.T) {
	db := newDB(t)
	for round, id := range []domain.OrderID{{}, domain.NewOrderID()} {
		ins := []*saga.Intake[*Tx]{openIntake(t, db, 2), openIntake(t, db, 2)}
		got := make([]saga.Accepted, 16)
		var wg sync.WaitGroup
		for i := range got {
			wg.Go(func() {
				var err error
				if got[i], err = ins[i%2].Submit(context.Background(), post(fmt.Sprint("k", round), "a", id)); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		fresh := slices.DeleteFunc(slices.Clone(got), func(a saga.Accepted) bool { return a.Repeat })
		require.Len(t, fresh, 1)
		for _, a := range got {
			require.Equal(t, fresh[0].Answer, a.Answer)
		}
		require.Equal(t, round+1, one[int](t, db, `SELECT count(*) FROM orders`))
	}
}

func cancel(ctx context.Context, db *DB, id domain.OrderID) (out saga.CancelOutcome, err error) {
	err = db.For(Consumers).InTx(ctx, func(ctx context.Context, tx *Tx) error {
		res, err := coordinator(db).Cancel(ctx, tx, []saga.CancelRequest{{Order: id, Await: true}})
		if err == nil {
			out = res[0].Outcome
		}
		return err
	})
	return out, err
}

// waiting waits until somebody waits for a lock of a kind.
func waiting(t *testing.T, db *DB, kind string) {
	t.Helper()
	require.Eventually(t, func() bool {
		return one[bool](t, db, `SELECT EXISTS (SELECT FROM pg_locks l JOIN pg_stat_activity a USING (pid) WHERE a.datname = current_database() AND NOT granted AND locktype = $1)`, kind)
	}, soon, time.Millisecond)
}

// A cancel that came first is seen although what is placed was presumed to be new: its lock is waited for.
func TestPlacingWaitsForACancelAndSeesItsTombstone(t *testing.T) {
	db := newDB(t)
	in := openIntake(t, db, 1)
	id := domain.NewOrderID()
	var wg sync.WaitGroup
	inTx(t, db, func(ctx context.Context, tx *Tx) error {
		res, err := coordinator(db).Cancel(ctx, tx, []saga.CancelRequest{{Order: id, Await: true}})
		require.NoError(t, err)
		require.Equal(t, saga.CancelAwaits, res[0].Outcome)
		wg.Go(func() {
			if _, err := in.Submit(context.Background(), post("k", "a", id)); err != nil {
				t.Error(err)
			}
		})
		waiting(t, db, "advisory")
		return nil
	})
	wg.Wait()
	require.Equal(t, domain.Cancelled, view(t, db, id).Status)
}

// A cancel that comes while an order is being placed waits for it, and cancels it.
func TestCancelWaitsForAPlacementInFlight(t *testing.T) {
	db := newDB(t)
	in := openIntake(t, db, 1)
	id := domain.NewOrderID()
	holder, err := db.Pool(Operators).Begin(t.Context())
	require.NoError(t, err)
	_, err = holder.Exec(t.Context(), `INSERT INTO idempotency_keys (id, body, order_id, answer) VALUES ($1, sha256(''), $1, '')`, keyID(&saga.IdempotencyKey{Caller: "shop", Key: "k"}))
	require.NoError(t, err)
	var wg sync.WaitGroup
	wg.Go(func() {
		if _, err := in.Submit(context.Background(), post("k", "a", id)); err != nil {
			t.Error(err)
		}
	})
	waiting(t, db, "transactionid") // it has written all but its key
	wg.Go(func() {
		out, err := cancel(context.Background(), db, id)
		if err != nil || out != saga.CancelAccepted {
			t.Error(out, err)
		}
	})
	waiting(t, db, "advisory")
	require.NoError(t, holder.Rollback(t.Context()))
	wg.Wait()
	require.Equal(t, domain.Cancelled, view(t, db, id).Status)
	require.Zero(t, one[int](t, db, `SELECT count(*) FROM barriers`))
}

// However a cancel and a placement of one id meet, the order ends cancelled, and only once.
func TestCancelAndPlacementNeverPassEachOther(t *testing.T) {
	db := newDB(t)
	awaited := 0
	for round := range 60 {
		in := openIntake(t, db, 1)
		id := domain.NewOrderID()
		var wg sync.WaitGroup
		var out saga.CancelOutcome
		wg.Go(func() {
			if _, err := in.Submit(context.Background(), post(fmt.Sprint(round), "a", id)); err != nil {
				t.Error(err)
			}
		})
		wg.Go(func() {
			var err error
			if out, err = cancel(context.Background(), db, id); err != nil {
				t.Error(err)
			}
		})
		wg.Wait()
		v := view(t, db, id)
		require.Equal(t, domain.Cancelled, v.Status, "round %d: %v", round, out)
		tombs := one[int](t, db, `SELECT count(*) FROM barriers WHERE order_id = $1`, id)
		if out == saga.CancelAwaits {
			awaited++
			require.Equal(t, 1, tombs)
		} else {
			require.Zero(t, tombs)
		}
	}
	t.Logf("the cancel was first in %d of 60 rounds", awaited)
}
