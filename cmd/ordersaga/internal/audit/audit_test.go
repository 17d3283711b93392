package audit

import (
	"context"
	"iter"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"ordersaga/adapters/payment"
	"ordersaga/adapters/postgres"
	"ordersaga/consumers"
	"ordersaga/domain"
	"ordersaga/outbox"
	"ordersaga/saga"
)

// world is both sides of the books, in memory.
type world struct {
	orders       []postgres.OrderFact
	payments     []domain.PaymentStep
	reservations map[domain.OrderID]domain.ReservationState
	stock        []postgres.StockFact
	dead         map[string]int64
	backlog      outbox.Backlog
	ledger       []payment.Entry
}

func (w *world) EachOrder(_ context.Context, fn func(postgres.OrderFact) error) error {
	return all(w.orders, fn)
}

func (w *world) EachPayment(_ context.Context, fn func(domain.PaymentStep) error) error {
	return all(w.payments, fn)
}

func (w *world) EachReservation(_ context.Context, fn func(domain.OrderID, domain.ReservationState) error) error {
	for id, st := range w.reservations {
		if err := fn(id, st); err != nil {
			return err
		}
	}
	return nil
}

func (w *world) EachStock(_ context.Context, fn func(postgres.StockFact) error) error {
	return all(w.stock, fn)
}
func (w *world) CountDead(context.Context) (map[string]int64, error)   { return w.dead, nil }
func (w *world) OutboxBacklog(context.Context) (outbox.Backlog, error) { return w.backlog, nil }
func (w *world) Ledger(context.Context, time.Time) iter.Seq2[payment.Entry, error] {
	return func(yield func(payment.Entry, error) bool) {
		for _, e := range w.ledger {
			if !yield(e, nil) {
				return
			}
		}
	}
}

func all[T any](xs []T, fn func(T) error) error {
	for _, x := range xs {
		if err := fn(x); err != nil {
			return err
		}
	}
	return nil
}

var sold, refused = domain.NewOrderID(), domain.NewOrderID()

// sound is one order that was sold and one that was declined, with books that agree.
func sound() *world {
	total := domain.Money{Minor: 500, Currency: "EUR"}
	return &world{
		orders: []postgres.OrderFact{
			{Order: sold, Status: domain.Confirmed, Phase: saga.Completed, Total: total},
			{Order: refused, Status: domain.Rejected, Phase: saga.Compensated, Total: total},
		},
		payments:     []domain.PaymentStep{{Order: sold, Op: domain.Capture, State: domain.BarrierDone, Attempt: 1}},
		reservations: map[domain.OrderID]domain.ReservationState{sold: domain.CommittedStock, refused: domain.Released},
		stock:        []postgres.StockFact{{SKU: "A", Available: 9, Sold: 1, SoldByOrders: 1, Adjusted: 10}},
		dead:         map[string]int64{string(consumers.DeadOpen): 2},
		ledger: []payment.Entry{
			{OrderID: sold.String(), Status: "succeeded", Amount: 500, AmountReceived: 500, Currency: "EUR"},
			{OrderID: refused.String(), Status: "canceled", Amount: 500, Currency: "EUR"},
			{OrderID: "somebody else's", Status: "succeeded", Amount: 7, AmountReceived: 7, Currency: "EUR"},
		},
	}
}

// Every check is shown to find what it is for: one thing is put wrong in sound books, and the audit names it.
func TestEveryCheckFinds(t *testing.T) {
	rep, err := Run(t.Context(), sound(), sound())
	require.NoError(t, err)
	require.True(t, rep.Clean, "%v", rep.Findings)
	require.Equal(t, map[string]int64{"EUR": 500}, rep.Captured)

	for name, c := range map[string]struct {
		wrong func(*world)
		says  string
	}{
		"an order that has not ended":    {func(w *world) { w.orders[0].Status, w.orders[0].Phase = domain.Pending, saga.Running }, "has not ended"},
		"an undo that has not ended":     {func(w *world) { w.orders[1].Phase = saga.Compensating }, "has not ended"},
		"an order without a saga":        {func(w *world) { w.orders[0].Phase = "" }, "has no saga"},
		"a status that is not the phase": {func(w *world) { w.orders[1].Phase = saga.Completed }, "not compensated"},
		"charged twice":                  {func(w *world) { w.ledger = append(w.ledger, w.ledger[0]) }, "the gateway took 1000"},
		"charged too little":             {func(w *world) { w.ledger[0].AmountReceived = 499 }, "the gateway took 499"},
		"never charged":                  {func(w *world) { w.ledger = w.ledger[1:] }, "the gateway took 0"},
		"refunded although confirmed":    {func(w *world) { w.ledger[0].AmountRefunded = 500 }, "gave back 500"},
		"another currency":               {func(w *world) { w.ledger[0].Currency = "USD" }, "USD"},
		"kept although rejected":         {func(w *world) { w.ledger[1].AmountReceived = 500 }, "keeps 500"},
		"still held":                     {func(w *world) { w.ledger[1].Status = "requires_capture" }, "still holds 500"},
		"money of an order that is not there": {func(w *world) {
			w.ledger = append(w.ledger, payment.Entry{OrderID: domain.NewOrderID().String(), Status: "succeeded", Amount: 3, AmountReceived: 3, Currency: "EUR"})
		}, "there is no such order"},
		"sold without stock":         {func(w *world) { w.reservations[sold] = domain.Reserved }, "its stock is not committed"},
		"rejected and still held":    {func(w *world) { w.reservations[refused] = domain.Reserved }, "its stock is reserved"},
		"a payment of unknown fate":  {func(w *world) { w.payments[0].State = domain.BarrierStarted }, "is not known"},
		"stock that does not add up": {func(w *world) { w.stock[0].Available = 8 }, "does not add up"},
		"stock held for nobody":      {func(w *world) { w.stock[0].Reserved, w.stock[0].Available = 1, 8 }, "does not add up"},
		"a replay under way":         {func(w *world) { w.dead[string(consumers.DeadReplaying)] = 1 }, "being replayed"},
		"messages not published":     {func(w *world) { w.backlog = outbox.Backlog{Rows: 3, OldestSeconds: 1} }, "3 messages are not published"},
	} {
		t.Run(name, func(t *testing.T) {
			w := sound()
			c.wrong(w)
			rep, err := Run(t.Context(), w, w)
			require.NoError(t, err)
			require.False(t, rep.Clean)
			require.Contains(t, strings.Join(rep.Findings, "\n"), c.says)
		})
	}
}

func TestFindingsAreBounded(t *testing.T) {
	w := sound()
	for range maxFindings + 5 {
		w.orders = append(w.orders, postgres.OrderFact{Order: domain.NewOrderID(), Status: domain.Pending, Phase: saga.Running})
	}
	rep, err := Run(t.Context(), w, nil)
	require.NoError(t, err)
	require.Len(t, rep.Findings, maxFindings)
	require.Equal(t, 5, rep.MoreThan)
	require.True(t, rep.NoLedger)
}
