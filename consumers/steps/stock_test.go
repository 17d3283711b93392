package steps_test

import (
	"context"
	"fmt"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"ordersaga/consumers"
	"ordersaga/consumers/steps"
	"ordersaga/domain"
	"ordersaga/events"
	"ordersaga/saga/sagatest"
)

func TestReserveCommitRelease(t *testing.T) {
	w := newWorld()
	w.db.PutStock(domain.Stock{SKU: "cup", Available: 5}, domain.Stock{SKU: "tea", Available: 5})
	a, b, c := domain.NewOrderID(), domain.NewOrderID(), domain.NewOrderID()

	r := w.deliver(t, w.stock, reserve(a, line("tea", 3), line("cup", 1)), reserve(b, line("tea", 3)), reserve(c, line("wine", 1)))
	answered[*events.StockReserved](t, r[0], events.TStockReserved)
	short := answered[*events.StockRejected](t, r[1], events.TStockRejected)
	require.Equal(t, "tea", short.GetSku())
	require.EqualValues(t, 2, short.GetAvailable())
	answered[*events.StockRejected](t, r[2], events.TStockRejected)
	require.Equal(t, domain.Stock{SKU: "tea", Available: 2, Reserved: 3}, w.db.Stock("tea"))

	r = w.deliver(t, w.releases, release(b), release(c))
	answered[*events.StockReleased](t, r[0], events.TStockReleased)
	answered[*events.StockReleased](t, r[1], events.TStockReleased)
	require.Equal(t, domain.RejectedStock, w.db.Reservation(b).State, "there was nothing to release")

	r = w.deliver(t, w.stock, commit(a))
	answered[*events.StockCommitted](t, r[0], events.TStockCommitted)
	require.Equal(t, domain.Stock{SKU: "tea", Available: 2, Sold: 3}, w.db.Stock("tea"))
	require.Equal(t, domain.Stock{SKU: "cup", Available: 4, Sold: 1}, w.db.Stock("cup"))
}

func TestStockRepeatsAnswerAsTheFirstDid(t *testing.T) {
	w := newWorld()
	w.db.PutStock(domain.Stock{SKU: "tea", Available: 3})
	a, b := domain.NewOrderID(), domain.NewOrderID()
	w.deliver(t, w.stock, reserve(a, line("tea", 3)), reserve(b, line("tea", 2)))
	w.db.PutStock(domain.Stock{SKU: "tea", Available: 100, Reserved: 3}) // more came in meanwhile
	r := w.deliver(t, w.stock, reserve(a, line("tea", 3)), reserve(b, line("tea", 2)))
	answered[*events.StockReserved](t, r[0], events.TStockReserved)
	short := answered[*events.StockRejected](t, r[1], events.TStockRejected)
	require.EqualValues(t, 0, short.GetAvailable(), "what there was when it was refused")
	require.EqualValues(t, 100, w.db.Stock("tea").Available)
	for range 2 {
		r = w.deliver(t, w.stock, commit(a), commit(a))
		answered[*events.StockCommitted](t, r[0], events.TStockCommitted)
		answered[*events.StockCommitted](t, r[1], events.TStockCommitted)
	}
	require.Equal(t, domain.Stock{SKU: "tea", Available: 100, Sold: 3}, w.db.Stock("tea"))
	r = w.deliver(t, w.stock, reserve(a, line("tea", 3)))
	answered[*events.StockReserved](t, r[0], events.TStockReserved)
}

func TestF10_ReleaseBeforeReserve(t *testing.T) {
	w := newWorld()
	w.db.PutStock(domain.Stock{SKU: "tea", Available: 3})
	a := domain.NewOrderID()
	r := w.deliver(t, w.releases, release(a), release(a))
	answered[*events.StockReleased](t, r[0], events.TStockReleased)
	answered[*events.StockReleased](t, r[1], events.TStockReleased)
	require.Equal(t, domain.TombstonedStock, w.db.Reservation(a).State)
	r = w.deliver(t, w.stock, reserve(a, line("tea", 1)))
	answered[*events.StockRejected](t, r[0], events.TStockRejected)
	require.Equal(t, domain.Stock{SKU: "tea", Available: 3}, w.db.Stock("tea"), "the late action is refused")
	r = w.deliver(t, w.stock, commit(a))
	require.True(t, isPoison(r[0].Err))
}

func TestF31_SameMessageTwiceInOneBatch(t *testing.T) {
	w := newWorld()
	w.db.PutStock(domain.Stock{SKU: "tea", Available: 10})
	a, b := domain.NewOrderID(), domain.NewOrderID()
	d := reserve(a, line("tea", 4))
	r := w.deliver(t, w.stock, d, d, commit(a), d, commit(a))
	for _, i := range []int{0, 1, 3} {
		answered[*events.StockReserved](t, r[i], events.TStockReserved)
	}
	require.Equal(t, domain.Stock{SKU: "tea", Available: 6, Sold: 4}, w.db.Stock("tea"))
	w.deliver(t, w.stock, reserve(b, line("tea", 1)))
	w.deliver(t, w.releases, release(b), release(b))
	require.Equal(t, domain.Stock{SKU: "tea", Available: 6, Sold: 4}, w.db.Stock("tea"))
}

func TestStockPoison(t *testing.T) {
	w := newWorld()
	w.db.PutStock(domain.Stock{SKU: "tea", Available: 10})
	good, committed := domain.NewOrderID(), domain.NewOrderID()
	w.deliver(t, w.stock, reserve(committed, line("tea", 1)), commit(committed))
	bad := []*consumers.Delivery{
		commit(domain.NewOrderID()),
		reserve(domain.NewOrderID()),
		reserve(domain.NewOrderID(), line("tea", -5)),
		reserve(domain.NewOrderID(), line("tea", 0)),
		reserve(domain.NewOrderID(), line("tea", 1), line("tea", 1)),
		release(domain.NewOrderID()), // of another group
	}
	r := w.deliver(t, w.stock, append(bad, reserve(good, line("tea", 1)))...)
	for i := range bad {
		require.True(t, isPoison(r[i].Err), "%d: %v", i, r[i].Err)
	}
	answered[*events.StockReserved](t, r[len(bad)], events.TStockReserved)
	r = w.deliver(t, w.releases, release(committed), reserve(good), release(good))
	require.True(t, isPoison(r[0].Err))
	require.ErrorIs(t, r[0].Err, domain.ErrCommitted)
	require.True(t, isPoison(r[1].Err))
	answered[*events.StockReleased](t, r[2], events.TStockReleased)
	require.Equal(t, domain.Stock{SKU: "tea", Available: 9, Sold: 1}, w.db.Stock("tea"))
}

func TestExpiredReserveSettlesWithoutEffect(t *testing.T) {
	w := newWorld()
	w.db.PutStock(domain.Stock{SKU: "tea", Available: 10})
	a, b := domain.NewOrderID(), domain.NewOrderID()
	until := w.clock.now().UnixMilli()
	expiring := func(id domain.OrderID) *consumers.Delivery {
		return delivery(id, events.TReserveStock, &events.ReserveStock{Lines: []*events.StockLine{line("tea", 1)}, ExpiresAtMs: until})
	}
	r := w.deliver(t, w.stock, expiring(a))
	answered[*events.StockReserved](t, r[0], events.TStockReserved)
	w.clock.advance(2 * 1e6) // two milliseconds
	r = w.deliver(t, w.stock, expiring(a), expiring(b))
	answered[*events.StockReserved](t, r[0], events.TStockReserved)
	require.Equal(t, consumers.Result{}, r[1])
	require.Nil(t, w.db.Reservation(b))
	require.EqualValues(t, 9, w.db.Stock("tea").Available)
}

// watched counts what a batch asks of its transaction, in order.
type watched struct {
	*sagatest.Tx
	did *[]string
}

func (w watched) LockReservations(ctx context.Context, ids []domain.OrderID) (map[domain.OrderID]*domain.Reservation, error) {
	*w.did = append(*w.did, fmt.Sprintf("lock %d reservations", len(ids)))
	return w.Tx.LockReservations(ctx, ids)
}

func (w watched) LockStock(ctx context.Context, skus []domain.SKU) (map[domain.SKU]*domain.Stock, error) {
	*w.did = append(*w.did, fmt.Sprintf("lock %v", skus))
	return w.Tx.LockStock(ctx, skus)
}

func (w watched) InsertReservations(ctx context.Context, rs []domain.Reservation) error {
	*w.did = append(*w.did, fmt.Sprintf("insert %d reservations", len(rs)))
	return w.Tx.InsertReservations(ctx, rs)
}

func (w watched) UpdateReservations(ctx context.Context, rs []domain.Reservation) error {
	*w.did = append(*w.did, fmt.Sprintf("update %d reservations", len(rs)))
	return w.Tx.UpdateReservations(ctx, rs)
}

func (w watched) SaveStock(ctx context.Context, stock []domain.Stock) error {
	*w.did = append(*w.did, fmt.Sprintf("save %d of stock", len(stock)))
	return w.Tx.SaveStock(ctx, stock)
}

func (w *world) watch(t *testing.T, h consumers.Handler[watched], batch ...*consumers.Delivery) (did []string) {
	t.Helper()
	apply, err := h.Prepare(t.Context(), batch)
	require.NoError(t, err)
	require.NoError(t, w.db.InTx(t.Context(), func(ctx context.Context, tx *sagatest.Tx) error {
		did = nil
		_, err := apply(ctx, watched{tx, &did}, batch)
		return err
	}))
	return did
}

// TestF27_LocksAreSorted: whatever the order of lines and of records, SKUs are locked in one order (the store refuses another one).
func TestF27_LocksAreSorted(t *testing.T) {
	w := newWorld()
	w.db.PutStock(domain.Stock{SKU: "a", Available: 9}, domain.Stock{SKU: "b", Available: 9}, domain.Stock{SKU: "c", Available: 9})
	first, second := domain.NewOrderID(), domain.NewOrderID()
	did := w.watch(t, steps.NewStock[watched](w.clock.now), reserve(second, line("c", 1), line("a", 1)), reserve(first, line("b", 1), line("a", 1)))
	require.Equal(t, []string{"lock 2 reservations", "lock [a b c]", "insert 2 reservations", "save 3 of stock"}, did)
	require.Equal(t, []domain.Line{{SKU: "a", Quantity: 1}, {SKU: "c", Quantity: 1}}, w.db.Reservation(second).Lines)
	did = w.watch(t, steps.NewStockCompensation[watched](), release(second), release(first))
	require.Equal(t, []string{"lock 2 reservations", "lock [a b c]", "update 2 reservations", "save 3 of stock"}, did)
}

// TestF28_HotProductIsOneUpdateABatch: a hundred orders of one product lock its row once and write it once, right before the commit;
// repeats and tombstones do not lock it at all.
func TestF28_HotProductIsOneUpdateABatch(t *testing.T) {
	w := newWorld()
	w.db.PutStock(domain.Stock{SKU: "hot", Available: 70})
	var batch []*consumers.Delivery
	for range 100 {
		batch = append(batch, reserve(domain.NewOrderID(), line("hot", 1)))
	}
	h := steps.NewStock[watched](w.clock.now)
	require.Equal(t, []string{"lock 100 reservations", "lock [hot]", "insert 100 reservations", "save 1 of stock"}, w.watch(t, h, batch...))
	require.Equal(t, domain.Stock{SKU: "hot", Reserved: 70}, w.db.Stock("hot"))
	require.Equal(t, []string{"lock 100 reservations"}, w.watch(t, h, batch...))
}

// TestF28_ManyPartitionsOfOneProduct: batches that run side by side never oversell.
func TestF28_ManyPartitionsOfOneProduct(t *testing.T) {
	w := newWorld()
	w.db.PutStock(domain.Stock{SKU: "hot", Available: 50})
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 5 {
				batch := []*consumers.Delivery{reserve(domain.NewOrderID(), line("hot", 1)), reserve(domain.NewOrderID(), line("hot", 1))}
				if _, err := w.try(w.stock, batch...); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	require.Equal(t, domain.Stock{SKU: "hot", Reserved: 50}, w.db.Stock("hot"))
	held := 0
	for _, r := range w.db.Reservations() {
		if r.Holds() {
			held++
		}
	}
	require.Equal(t, 50, held)
}

func TestF29_NegativeStockIsRefused(t *testing.T) {
	w := newWorld()
	w.db.PutStock(domain.Stock{SKU: "tea", Available: 5, Reserved: 0})
	a := domain.NewOrderID()
	w.deliver(t, w.stock, reserve(a, line("tea", 5)))
	w.db.PutStock(domain.Stock{SKU: "tea", Available: 5, Reserved: 0}) // as if somebody had corrected the row by hand
	_, err := w.try(w.stock, commit(a))
	var data *sagatest.DataError
	require.ErrorAs(t, err, &data, "the CHECK refuses what would make the count negative")
}
