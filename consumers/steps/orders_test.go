package steps_test

import (
	"context"
	"errors"
	"testing"

	"github.com/stretchr/testify/require"

	"ordersaga/consumers"
	"ordersaga/domain"
	"ordersaga/events"
	"ordersaga/saga"
)

// shop is a catalogue whose prices a test changes.
type shop struct {
	prices map[domain.SKU]int64
	err    error
	asked  [][]domain.SKU
}

func (s *shop) Products(_ context.Context, skus []domain.SKU) (map[domain.SKU]domain.Product, error) {
	s.asked = append(s.asked, skus)
	if s.err != nil {
		return nil, s.err
	}
	out := map[domain.SKU]domain.Product{}
	for _, sku := range skus {
		if p, ok := s.prices[sku]; ok {
			out[sku] = domain.Product{SKU: sku, UnitPrice: domain.Money{Minor: p, Currency: "EUR"}}
		}
	}
	return out, nil
}

func place(id domain.OrderID, change func(*events.PlaceOrder)) *consumers.Delivery {
	m := &events.PlaceOrder{
		OrderID: id.String(), CustomerID: "c-1", Currency: "EUR", PaymentMethod: "pm_card_visa",
		Items: []events.OrderItem{{SKU: "tea", Quantity: 2}},
	}
	if change != nil {
		change(m)
	}
	return delivery(id, events.TPlaceOrder, m)
}

func cancel(id domain.OrderID) *consumers.Delivery {
	return delivery(id, events.TCancelOrder, &events.CancelOrder{OrderID: id.String(), Reason: "changed my mind"})
}

func types(out []events.Envelope) (ns []events.Name) {
	for _, e := range out {
		ns = append(ns, e.Type)
	}
	return ns
}

func TestPlaceOrderFromTheTopic(t *testing.T) {
	w, s := newWorld(), &shop{prices: map[domain.SKU]int64{"tea": 450}}
	a := domain.NewOrderID()
	d := place(a, nil)
	r := w.deliver(t, w.orders(s), d)
	require.NoError(t, r[0].Err)
	require.Equal(t, []events.Name{events.TOrderPlaced, events.TReserveStock, events.TAuthorizePayment}, types(r[0].Out))
	require.EqualValues(t, 900, body[*events.AuthorizePayment](t, r[0].Out[2]).GetAmountMinor())
	require.Equal(t, d.Trace, r[0].Out[0].Trace)
	require.Equal(t, domain.Pending, w.db.Order(a).Status)
	require.Equal(t, d.ID, w.db.History(a)[0].Cause)

	r = w.deliver(t, w.orders(s), place(a, nil), place(a, nil))
	require.Equal(t, []consumers.Result{{}, {}}, r, "placed before: done, nothing is told again")
	s.prices["tea"] = 500
	r = w.deliver(t, w.orders(s), place(a, nil))
	require.Equal(t, consumers.Result{}, r[0], "also when the price has changed since")
	r = w.deliver(t, w.orders(s), place(a, func(m *events.PlaceOrder) { m.CustomerID = "c-2" }))
	require.True(t, isPoison(r[0].Err))
	require.ErrorContains(t, r[0].Err, "reused by another order")
	require.EqualValues(t, 900, w.db.Order(a).Total.Minor)
}

func TestRefusedOrdersAreStoredAndTold(t *testing.T) {
	price := int64(449)
	for name, c := range map[string]struct {
		change func(*events.PlaceOrder)
		reason domain.Reason
	}{
		"price":    {func(m *events.PlaceOrder) { m.Items[0].UnitPriceMinor = &price }, domain.PriceChanged},
		"product":  {func(m *events.PlaceOrder) { m.Items[0].SKU = "wine" }, domain.UnknownProduct},
		"quantity": {func(m *events.PlaceOrder) { m.Items[0].Quantity = -3 }, domain.Invalid},
		"currency": {func(m *events.PlaceOrder) { m.Currency = "coins" }, domain.Invalid},
		"text":     {func(m *events.PlaceOrder) { m.CustomerID = "a\x00b"; m.PaymentMethod = string(make([]byte, 500)) }, domain.Invalid},
		"twice": {func(m *events.PlaceOrder) {
			m.Items = append(m.Items, m.Items[0], events.OrderItem{SKU: "\x00", Quantity: 1})
		}, domain.Invalid},
		"nothing": {func(m *events.PlaceOrder) { *m = events.PlaceOrder{OrderID: m.OrderID} }, domain.Invalid},
	} {
		t.Run(name, func(t *testing.T) {
			w, s := newWorld(), &shop{prices: map[domain.SKU]int64{"tea": 450}}
			a := domain.NewOrderID()
			r := w.deliver(t, w.orders(s), place(a, c.change))
			require.NoError(t, r[0].Err)
			require.Equal(t, []events.Name{events.TOrderRejected}, types(r[0].Out))
			e := body[*events.OrderEvent](t, r[0].Out[0])
			require.EqualValues(t, c.reason, e.Reason)
			require.NotEmpty(t, e.Detail)
			require.EqualValues(t, 1, e.Sequence)
			require.Equal(t, domain.Rejected, w.db.Order(a).Status)
			in, deadline := w.db.Saga(a)
			require.Equal(t, saga.Compensated, in.State.Phase)
			require.True(t, deadline.IsZero())
			r = w.deliver(t, w.orders(s), place(a, c.change))
			require.Equal(t, consumers.Result{}, r[0])
			r = w.deliver(t, w.orders(s), cancel(a))
			require.NoError(t, r[0].Err)
			require.Empty(t, r[0].Out)
		})
	}
}

func TestPlaceThenCancelInOneBatch(t *testing.T) {
	w, s := newWorld(), &shop{prices: map[domain.SKU]int64{"tea": 450}}
	a, b := domain.NewOrderID(), domain.NewOrderID()
	r := w.deliver(t, w.orders(s), place(a, nil), place(b, nil), cancel(a), place(a, nil), cancel(a))
	require.Equal(t, []events.Name{events.TOrderPlaced, events.TReserveStock, events.TAuthorizePayment}, types(r[0].Out))
	require.Equal(t, []events.Name{events.TOrderCancelled, events.TReleaseStock, events.TReversePayment}, types(r[2].Out))
	require.Equal(t, []consumers.Result{{}, {}}, r[3:])
	require.Equal(t, domain.Cancelled, w.db.Order(a).Status)
	require.Equal(t, domain.Pending, w.db.Order(b).Status)
}

func TestF10_CancelBeforePlace(t *testing.T) {
	w, s := newWorld(), &shop{prices: map[domain.SKU]int64{"tea": 450}}
	for _, apart := range []bool{true, false} {
		a := domain.NewOrderID()
		var last consumers.Result
		if apart {
			r := w.deliver(t, w.orders(s), cancel(a), cancel(a))
			require.Equal(t, []consumers.Result{{}, {}}, r)
			require.Nil(t, w.db.Order(a))
			last = w.deliver(t, w.orders(s), place(a, nil))[0]
		} else {
			r := w.deliver(t, w.orders(s), cancel(a), place(a, nil))
			require.Equal(t, consumers.Result{}, r[0])
			last = r[1]
		}
		require.Equal(t, []events.Name{events.TOrderPlaced, events.TOrderCancelled}, types(last.Out))
		require.Equal(t, domain.Cancelled, w.db.Order(a).Status)
		in, _ := w.db.Saga(a)
		require.Equal(t, saga.Compensated, in.State.Phase)
	}
}

func TestOrderCommandsPoison(t *testing.T) {
	w, s := newWorld(), &shop{prices: map[domain.SKU]int64{"tea": 450}}
	a := domain.NewOrderID()
	r := w.deliver(t, w.orders(s),
		place(a, func(m *events.PlaceOrder) { m.OrderID = "12" }),
		place(a, func(m *events.PlaceOrder) { m.OrderID = domain.NewOrderID().String() }),
		delivery(a, events.TCancelOrder, &events.CancelOrder{OrderID: "?"}),
		reverse(a),
		place(a, nil))
	for i := range 4 {
		require.True(t, isPoison(r[i].Err), "%v", r[i].Err)
	}
	require.NoError(t, r[4].Err)
	require.Equal(t, [][]domain.SKU{{"tea"}}, s.asked, "one look for the batch")
}

func TestPricesAreAway(t *testing.T) {
	w, s := newWorld(), &shop{err: errors.New("no database")}
	_, err := w.try(w.orders(s), place(domain.NewOrderID(), nil))
	require.ErrorIs(t, err, s.err)
	a := domain.NewOrderID()
	r := w.deliver(t, w.orders(s), place(a, func(m *events.PlaceOrder) { m.Items = nil }), cancel(domain.NewOrderID()))
	require.NoError(t, r[0].Err, "what needs no price goes on")
}

func TestRepliesUseTheSagasOwnDefinition(t *testing.T) {
	w, s := newWorld(), &shop{prices: map[domain.SKU]int64{"tea": 450}}
	a, b, c := domain.NewOrderID(), domain.NewOrderID(), domain.NewOrderID()
	w.deliver(t, w.orders(s), place(a, nil), place(b, nil), place(c, nil))
	in, deadline := w.db.Saga(b)
	in.State.DefVersion = 9 // placed by a newer build during a rolling upgrade
	w.db.PutSaga(in, deadline)

	r := w.deliver(t, w.replies,
		delivery(a, events.TStockReserved, &events.StockReserved{}),
		delivery(b, events.TStockReserved, &events.StockReserved{}),
		delivery(domain.NewOrderID(), events.TStockReserved, &events.StockReserved{}),
		delivery(c, events.TReserveStock, &events.ReserveStock{}),
		delivery(a, events.TPaymentAuthorized, &events.PaymentAuthorized{Ref: "pi_1"}),
		delivery(a, events.TPaymentAuthorized, &events.PaymentAuthorized{Ref: "pi_1"}),
		delivery(c, events.TStepStalled, &events.StepStalled{Command: string(events.TAuthorizePayment), Error: "500", Attempts: 5}))
	require.NoError(t, r[0].Err)
	require.ErrorContains(t, r[1].Err, "order v9")
	require.False(t, isPoison(r[1].Err), "another process knows it (F40)")
	require.True(t, isPoison(r[2].Err))
	require.ErrorIs(t, r[2].Err, saga.ErrNoSaga)
	require.True(t, isPoison(r[3].Err))
	require.Equal(t, []events.Name{events.TCapturePayment}, types(r[4].Out))
	require.Equal(t, consumers.Result{}, r[5])
	require.NoError(t, r[6].Err)
	in, _ = w.db.Saga(c)
	require.Equal(t, "AuthorizePayment waits at the slowest retry tier after 5 attempts: 500", in.State.Stuck.Reason)
	in, _ = w.db.Saga(a)
	require.EqualValues(t, 3, in.State.Version)
}
