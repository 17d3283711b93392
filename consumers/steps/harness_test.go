package steps_test

import (
	"context"
	"errors"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"

	"ordersaga/consumers"
	"ordersaga/consumers/steps"
	"ordersaga/domain"
	"ordersaga/events"
	"ordersaga/saga"
	"ordersaga/saga/sagatest"
)

// clock is a database clock that only a test moves.
type clock struct {
	mu sync.Mutex
	t  time.Time
}

func newClock() *clock { return &clock{t: time.Date(2026, 11, 24, 12, 0, 0, 0, time.UTC)} }

func (c *clock) now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.t
}

func (c *clock) advance(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.t = c.t.Add(d)
}

type (
	tx      = *sagatest.Tx
	handler = consumers.Handler[tx]
)

// world is all participants over one store.
type world struct {
	clock   *clock
	db      *sagatest.Store
	gw      *sagatest.Gateway
	coord   *saga.Coordinator
	service *saga.Service[tx]
	calls   *steps.GatewayCalls[tx]

	stock, releases, payment, reversals, replies handler

	follow bool // replies are handled in the transactions that emit them, and captures started, as the runtime does where it can
}

func newWorld() *world {
	w := &world{clock: newClock()}
	w.db = sagatest.NewStore(w.clock.now)
	w.gw = sagatest.NewGateway(w.clock.now)
	w.coord = &saga.Coordinator{Defs: saga.NewDefinitions(saga.OrderV1(saga.DefaultLimits)), Now: w.clock.now}
	w.service = &saga.Service[tx]{DB: w.db, Coord: w.coord}
	w.calls = steps.NewGatewayCalls(consumers.Store[tx](w.db), w.gw, w.clock.now, steps.DefaultPayment, nil)
	w.stock, w.releases = steps.NewStock[tx](w.clock.now), steps.NewStockCompensation[tx]()
	w.payment, w.reversals = steps.NewPayment(w.calls), steps.NewPaymentCompensation(w.calls)
	w.replies = steps.NewReplies[tx](w.coord)
	return w
}

func (w *world) orders(catalogue saga.Catalogue) handler {
	return steps.NewOrderCommands[tx](w.coord, catalogue)
}

// delivery is a message as the runtime hands it over.
func delivery(order domain.OrderID, n events.Name, data any) *consumers.Delivery {
	t, ok := events.TypeOf(n)
	if !ok {
		panic(n)
	}
	return &consumers.Delivery{
		Envelope: events.Envelope{ID: events.NewID(), Type: n, OrderID: uuid.UUID(order), Trace: events.Trace{TraceID: [16]byte{1}}, Data: data},
		Group:    t.Group, Attempt: 1,
	}
}

// deliver runs a batch through a handler as the runtime does, and answers the results.
func (w *world) deliver(t require.TestingT, h handler, batch ...*consumers.Delivery) []consumers.Result {
	res, err := w.try(h, batch...)
	require.NoError(t, err)
	return res
}

func (w *world) try(h handler, batch ...*consumers.Delivery) ([]consumers.Result, error) {
	ctx := context.Background()
	apply, err := h.Prepare(ctx, batch)
	if err != nil {
		return nil, err
	}
	return w.apply(ctx, apply, batch)
}

func (w *world) apply(ctx context.Context, apply consumers.Apply[tx], batch []*consumers.Delivery) (res []consumers.Result, err error) {
	err = w.db.InTx(ctx, func(ctx context.Context, tx *sagatest.Tx) error {
		if res, err = apply(ctx, tx, batch); err != nil {
			return err
		}
		var out []events.Envelope
		for i := range res {
			if res[i].Err == nil {
				out = append(out, res[i].Out...)
			}
		}
		if w.follow && len(out) > 0 {
			if out, err = w.followed(ctx, tx, batch[0].Group, out); err != nil {
				return err
			}
		}
		if len(out) == 0 {
			return nil
		}
		return tx.Emit(ctx, out)
	})
	return res, err
}

// followed handles the replies among what a group emits, starts the captures that come of them, and answers all that is to be emitted.
func (w *world) followed(ctx context.Context, tx *sagatest.Tx, group events.Group, out []events.Envelope) ([]events.Envelope, error) {
	var replies, captures []*consumers.Delivery
	for _, e := range out {
		if t, _ := events.TypeOf(e.Type); t.Group == events.GroupCoordinator {
			replies = append(replies, &consumers.Delivery{Envelope: e, Group: t.Group, Attempt: 1})
		}
	}
	if len(replies) == 0 {
		return out, nil
	}
	apply, err := w.replies.Prepare(ctx, replies)
	if err != nil {
		return nil, err
	}
	res, err := apply(ctx, tx, replies)
	if err != nil {
		return nil, err
	}
	for i := range res {
		if res[i].Err != nil {
			continue
		}
		for _, e := range res[i].Out {
			if t, _ := events.TypeOf(e.Type); t.Group == group {
				captures = append(captures, &consumers.Delivery{Envelope: e, Group: group, Attempt: 1})
			}
		}
		out = append(out, res[i].Out...)
	}
	if s, ok := w.payment.(consumers.Starter[*sagatest.Tx]); ok && group == events.GroupPayment && len(captures) > 0 {
		return out, s.Start(ctx, tx, captures)
	}
	return out, nil
}

// answered asserts that a delivery was answered with one message of a type, and answers its body.
func answered[M any](t *testing.T, r consumers.Result, n events.Name) M {
	t.Helper()
	require.NoError(t, r.Err)
	require.Len(t, r.Out, 1)
	require.Equal(t, n, r.Out[0].Type)
	require.Equal(t, events.Trace{TraceID: [16]byte{1}}, r.Out[0].Trace, "the answer continues the trace")
	return body[M](t, r.Out[0])
}

func body[M any](t *testing.T, e events.Envelope) M {
	t.Helper()
	m, ok := e.Data.(M)
	require.True(t, ok, "%T", e.Data)
	return m
}

func isPoison(err error) bool {
	var p interface{ Poison() bool }
	return errors.As(err, &p) && p.Poison()
}

func reserve(order domain.OrderID, ls ...*events.StockLine) *consumers.Delivery {
	return delivery(order, events.TReserveStock, &events.ReserveStock{Lines: ls})
}

func line(sku string, n int64) *events.StockLine { return &events.StockLine{Sku: sku, Quantity: n} }

func commit(order domain.OrderID) *consumers.Delivery {
	return delivery(order, events.TCommitStock, &events.CommitStock{})
}

func release(order domain.OrderID) *consumers.Delivery {
	return delivery(order, events.TReleaseStock, &events.ReleaseStock{})
}

func authorize(order domain.OrderID) *consumers.Delivery {
	return delivery(order, events.TAuthorizePayment, &events.AuthorizePayment{AmountMinor: 900, Currency: "EUR", PaymentMethod: "pm_card_visa"})
}

func capture(order domain.OrderID) *consumers.Delivery {
	return delivery(order, events.TCapturePayment, &events.CapturePayment{AmountMinor: 900, Currency: "EUR"})
}

func reverse(order domain.OrderID) *consumers.Delivery {
	return delivery(order, events.TReversePayment, &events.ReversePayment{})
}
