package postgres

import (
	"context"
	"fmt"
	"iter"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"

	"ordersaga/domain"
	"ordersaga/events"
	"ordersaga/saga"
)

func lines(s string) iter.Seq[string] { return strings.SplitSeq(s, "\n") }

func contains(s, sub string) bool { return strings.Contains(s, sub) }

func coordinator(db *DB) *saga.Coordinator {
	return &saga.Coordinator{Defs: saga.NewDefinitions(saga.OrderV1(saga.DefaultLimits)), Now: db.Now}
}

// newOrder is an order of n pieces of two products.
func newOrder(customer string, n int64) *domain.Order {
	return &domain.Order{
		ID: domain.NewOrderID(), CustomerID: customer, PaymentMethod: "pm_card_visa", Status: domain.Pending,
		Total: domain.Money{Minor: 300 * n, Currency: "EUR"},
		Lines: []domain.Line{{SKU: "cup", Quantity: n, UnitPrice: 100}, {SKU: `pot "é"`, Quantity: n, UnitPrice: 200}},
	}
}

func requests(orders ...*domain.Order) []saga.PlaceRequest {
	out := make([]saga.PlaceRequest, len(orders))
	for i, o := range orders {
		c := *o
		out[i] = saga.PlaceRequest{Order: &c, Hash: int64(i), Cause: events.NewID()}
	}
	return out
}

// placeOrders places orders in one transaction.
func placeOrders(tb testing.TB, db *DB, orders ...*domain.Order) {
	tb.Helper()
	require.NoError(tb, db.For(Intake).InTx(tb.Context(), func(ctx context.Context, tx *Tx) error {
		placed, err := coordinator(db).Place(ctx, tx, requests(orders...))
		if err != nil {
			return err
		}
		var out []events.Envelope
		for _, p := range placed {
			out = append(out, p.Out...)
		}
		return tx.Emit(ctx, out)
	}))
}

// advance feeds inputs to orders, one transaction for all.
func advance(tb testing.TB, db *DB, in saga.Input, ids ...domain.OrderID) []saga.Advanced {
	tb.Helper()
	var out []saga.Advanced
	require.NoError(tb, db.For(Consumers).InTx(tb.Context(), func(ctx context.Context, tx *Tx) (err error) {
		facts := make([]saga.Fact, len(ids))
		for i, id := range ids {
			facts[i] = saga.Fact{Order: id, Input: in, Cause: events.NewID()}
		}
		out, err = coordinator(db).Advance(ctx, tx, facts)
		return err
	}))
	for _, a := range out {
		require.NoError(tb, a.Err)
	}
	return out
}

func done(step string) saga.Input { return saga.Input{Kind: saga.StepDone, Name: step} }

// complete runs orders to their good end.
func complete(tb testing.TB, db *DB, ids ...domain.OrderID) {
	tb.Helper()
	for _, s := range []string{"reserve_stock", "authorize_payment", "capture_payment", "commit_stock"} {
		advance(tb, db, done(s), ids...)
	}
}

func view(tb testing.TB, db *DB, id domain.OrderID) *saga.OrderView {
	tb.Helper()
	v, err := db.Order(tb.Context(), id)
	require.NoError(tb, err)
	require.NotNil(tb, v)
	return v
}

func put(tb testing.TB, db *DB, sku domain.SKU, onHand int64) {
	tb.Helper()
	_, _, err := db.PutProduct(tb.Context(), ProductChange{
		Product: domain.Product{SKU: sku, Name: string(sku), UnitPrice: domain.Money{Minor: 100, Currency: "EUR"}}, OnHand: &onHand, Actor: "test",
	})
	require.NoError(tb, err)
}

// inTx is a transaction on the consumers' pool that must go well.
func inTx(tb testing.TB, db *DB, fn func(ctx context.Context, tx *Tx) error) {
	tb.Helper()
	require.NoError(tb, db.For(Consumers).InTx(tb.Context(), fn))
}

func orderIDs(n int) []domain.OrderID {
	ids := make([]domain.OrderID, n)
	for i := range ids {
		ids[i] = domain.NewOrderID()
	}
	return ids
}

// at is a UUIDv7 of a time.
func at(t time.Time) uuid.UUID {
	id := events.NewID()
	first := firstID(t)
	copy(id[:6], first[:6])
	return id
}

func sortedIDs(ids []domain.OrderID) []domain.OrderID {
	return slices.SortedFunc(slices.Values(ids), domain.OrderID.Compare)
}

func skuOf(i int) domain.SKU { return domain.SKU(fmt.Sprintf("sku-%04d", i)) }
