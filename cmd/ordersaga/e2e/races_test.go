//go:build linux

package e2e

import (
	"context"
	"errors"
	"math/rand/v2"
	"net/http"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"

	"ordersaga/adapters/httpapi"
	"ordersaga/cmd/ordersaga/internal/apiclient"
	"ordersaga/cmd/ordersaga/internal/simulator"
)

// TestRaces: customers who want the same thing, or change their mind, at the same moment.
func TestRaces(t *testing.T) {
	t.Parallel()
	s := newSystem(t, options{env: []string{"ORDERSAGA_PAYMENT__TIMEOUT=1s"}})
	p := s.serve("serve")
	t.Run("F29_FiftyOrdersForTenPieces", func(t *testing.T) { fiftyForTen(t, s.with(t)) })
	t.Run("F27_SameProductsInEveryOrder", func(t *testing.T) { crossed(t, s.with(t)) })
	t.Run("F28_HotProduct", func(t *testing.T) { hot(t, s.with(t)) })
	t.Run("F29_RestockWhileSelling", func(t *testing.T) { restock(t, s.with(t)) })
	t.Run("F10_CancelAtManyMoments", func(t *testing.T) { changedMinds(t, s.with(t)) })
	books := s.clean()
	require.Empty(t, books.DeadLetters)
	s.sums(s.ids())
	p.stop(t)
}

// atOnce runs n times do side by side.
func atOnce(n int, do func(i int)) {
	begin := make(chan struct{})
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			<-begin
			do(i)
		})
	}
	close(begin)
	wg.Wait()
}

// outcomes counts the ends of orders.
func (s *system) outcomes(ids []uuid.UUID) map[string]int {
	s.tb.Helper()
	n := map[string]int{}
	for _, id := range ids {
		n[outcome(s.await(id, settleWithin))]++
	}
	return n
}

// placeAll places one order for each body at once; all must be accepted.
func (s *system) placeAll(n int, body func(i int, id uuid.UUID) httpapi.PlaceOrder) []uuid.UUID {
	s.tb.Helper()
	ids, errs := make([]uuid.UUID, n), make([]error, n)
	atOnce(n, func(i int) {
		ids[i] = uuid.Must(uuid.NewV7())
		errs[i] = s.insist(s.tb.Context(), body(i, ids[i]))
	})
	require.NoError(s.tb, errors.Join(errs...))
	return ids
}

func fiftyForTen(t *testing.T, s *system) {
	t.Helper()
	s.product("FEW", 990, 10)
	ids := s.placeAll(50, func(_ int, id uuid.UUID) httpapi.PlaceOrder { return placing(id, goodCard, item("FEW", 1)) })
	require.Equal(t, map[string]int{"confirmed": 10, "rejected (out_of_stock)": 40}, s.outcomes(ids))
	v := s.stock("FEW")
	require.Equal(t, [4]int64{0, 0, 0, 10}, [4]int64{v.OnHand, v.Available, v.Reserved, v.Sold})
}

// crossed: orders that list the same products in every order; whoever locks them as listed meets a deadlock.
func crossed(t *testing.T, s *system) {
	t.Helper()
	skus := []string{"CROSS-1", "CROSS-2", "CROSS-3", "CROSS-4"}
	for _, sku := range skus {
		s.product(sku, 100, 1000)
	}
	ids := s.placeAll(40, func(_ int, id uuid.UUID) httpapi.PlaceOrder {
		b := placing(id, goodCard)
		for _, i := range rand.Perm(len(skus)) {
			b.Items = append(b.Items, item(skus[i], 1))
		}
		return b
	})
	require.Equal(t, map[string]int{"confirmed": 40}, s.outcomes(ids))
	for _, sku := range skus {
		require.EqualValues(t, 40, s.stock(sku).Sold)
	}
}

func hot(t *testing.T, s *system) {
	t.Helper()
	const orders = 150
	s.product("HOT", 100, 10*orders)
	begin := time.Now()
	ids := s.placeAll(orders, func(i int, id uuid.UUID) httpapi.PlaceOrder { return placing(id, goodCard, item("HOT", int64(1+i%3))) })
	accepted := time.Since(begin)
	require.Equal(t, map[string]int{"confirmed": orders}, s.outcomes(ids))
	t.Logf("%d orders of one product at once: accepted after %s, all ended after %s", orders, accepted.Round(time.Millisecond), time.Since(begin).Round(time.Millisecond))
	require.EqualValues(t, 2*orders, s.stock("HOT").Sold)
}

// restock: somebody counts the shelf and writes down what there is, again and again, while it is being sold. Whatever comes of it is
// recorded and adds up, which the audit looks at.
func restock(t *testing.T, s *system) {
	t.Helper()
	const orders = 60
	s.product("SHELF", 100, 5)
	stop := make(chan struct{})
	counted := make(chan int)
	go func() {
		n := 0
		for ; pause(t.Context(), 10*time.Millisecond) == nil; n++ {
			select {
			case <-stop:
				counted <- n
				return
			default:
			}
			onHand := rand.Int64N(20)
			// A count below what is reserved is refused; that is an answer too.
			_ = s.api.Do(t.Context(), http.MethodPut, "/v1/products/SHELF", nil, nil, httpapi.PutProduct{Name: "shelf", UnitPriceMinor: 100, Currency: "EUR", OnHand: &onHand}, nil)
		}
		counted <- n
	}()
	ids := s.placeAll(orders, func(_ int, id uuid.UUID) httpapi.PlaceOrder { return placing(id, goodCard, item("SHELF", 1)) })
	n := s.outcomes(ids)
	close(stop)
	t.Logf("%v while the shelf was counted %d times", n, <-counted)
	require.Equal(t, orders, n["confirmed"]+n["rejected (out_of_stock)"])
	v := s.stock("SHELF")
	require.EqualValues(t, n["confirmed"], v.Sold)
	require.Zero(t, v.Reserved)
	require.GreaterOrEqual(t, v.Available, int64(0))
}

// changedMinds: a cancel that is answered 202 promises that the order does not end confirmed, whatever it meets; one that is answered 409
// came too late.
func changedMinds(t *testing.T, s *system) {
	t.Helper()
	s.faults(simulator.Faults{Fault: simulator.Fault{
		Latency: simulator.Duration(20 * time.Millisecond), Jitter: simulator.Duration(150 * time.Millisecond), ErrorAfter: 0.05, Timeout: 0.03,
	}})
	defer s.faults(simulator.Faults{})
	const orders = 60
	s.product("MIND", 2500, 10*orders)
	promised := make([]bool, orders)
	errs := make([]error, orders)
	ids := s.placeAll(orders, func(_ int, id uuid.UUID) httpapi.PlaceOrder { return placing(id, goodCard, item("MIND", 1)) })
	atOnce(orders, func(i int) {
		if errs[i] = pause(t.Context(), rand.N(1500*time.Millisecond)); errs[i] == nil {
			promised[i], errs[i] = s.cancel(t.Context(), ids[i])
		}
	})
	require.NoError(t, errors.Join(errs...))
	n := map[bool]int{}
	for i, id := range ids {
		want := "confirmed"
		if promised[i] {
			want = "cancelled (cancelled_by_customer)"
		}
		n[promised[i]]++
		require.Equal(t, want, outcome(s.await(id, settleWithin)), "order %s", id)
	}
	at := slices.Collect(func(yield func(string) bool) {
		for _, id := range ids {
			if _, err := s.cancel(t.Context(), id); err != nil && !yield(err.Error()) {
				return
			}
		}
	})
	require.Empty(t, at, "a repeated cancel answers as the first did")
	v := s.stock("MIND")
	require.EqualValues(t, n[false], v.Sold)
	require.Zero(t, v.Reserved)
	t.Logf("of %d cancels %d were in time", orders, n[true])
	require.Positive(t, n[true])
}

// cancel asks for an order's end and answers whether that was promised.
func (s *system) cancel(ctx context.Context, id uuid.UUID) (promised bool, err error) {
	err = s.api.Do(ctx, http.MethodPost, "/v1/orders/"+id.String()+"/cancel", nil, nil, httpapi.CancelOrder{Reason: "changed my mind"}, nil)
	var p *apiclient.ProblemError
	if errors.As(err, &p) && p.Code == "already_confirmed" {
		return false, nil
	}
	return err == nil, err
}
