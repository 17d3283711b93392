package saga_test

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"

	"ordersaga/domain"
	"ordersaga/events"
	"ordersaga/saga"
	"ordersaga/saga/sagatest"
)

// bench is a coordinator with its use cases over a store whose clock a test moves.
type bench struct {
	mu    sync.Mutex
	at    time.Time
	db    *sagatest.Store
	coord *saga.Coordinator
	svc   *saga.Service[tx]
}

func newBench() *bench {
	b := &bench{at: noon}
	b.db = sagatest.NewStore(b.now)
	b.coord = &saga.Coordinator{Defs: saga.NewDefinitions(saga.OrderV1(saga.DefaultLimits)), Now: b.now}
	b.svc = &saga.Service[tx]{DB: b.db, Coord: b.coord}
	return b
}

func (b *bench) now() time.Time {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.at
}

func (b *bench) wait(d time.Duration) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.at = b.at.Add(d)
}

func tea() *domain.Order {
	return &domain.Order{
		ID: domain.NewOrderID(), CustomerID: "c", PaymentMethod: "pm", Total: domain.Money{Minor: 450, Currency: "EUR"},
		Lines: []domain.Line{{SKU: "tea", Quantity: 1, UnitPrice: 450}},
	}
}

func (b *bench) place(t *testing.T, reqs ...saga.PlaceRequest) []saga.Placed {
	t.Helper()
	var out []saga.Placed
	require.NoError(t, b.db.InTx(t.Context(), func(ctx context.Context, tx *sagatest.Tx) (err error) {
		out, err = b.coord.Place(ctx, tx, reqs)
		return err
	}))
	return out
}

func (b *bench) placed(t *testing.T) domain.OrderID {
	t.Helper()
	o := tea()
	b.place(t, saga.PlaceRequest{Order: o})
	return o.ID
}

func reply(id domain.OrderID, n events.Name, data any) saga.Fact {
	return saga.Fact{Order: id, Reply: &saga.Reply{Type: n, Data: data}, Cause: events.NewID()}
}

func (b *bench) feed(t *testing.T, facts ...saga.Fact) []saga.Advanced {
	t.Helper()
	var out []saga.Advanced
	require.NoError(t, b.db.InTx(t.Context(), func(ctx context.Context, tx *sagatest.Tx) (err error) {
		out, err = b.coord.Advance(ctx, tx, facts)
		return err
	}))
	return out
}

func (b *bench) state(id domain.OrderID) saga.State {
	in, _ := b.db.Saga(id)
	return in.State
}

var (
	reserved   = func(id domain.OrderID) saga.Fact { return reply(id, events.TStockReserved, &events.StockReserved{}) }
	authorised = func(id domain.OrderID) saga.Fact {
		return reply(id, events.TPaymentAuthorized, &events.PaymentAuthorized{})
	}
	captured = func(id domain.OrderID) saga.Fact {
		return reply(id, events.TPaymentCaptured, &events.PaymentCaptured{})
	}
	committed = func(id domain.OrderID) saga.Fact { return reply(id, events.TStockCommitted, &events.StockCommitted{}) }
)

// TestAdvanceABatch: several facts of several sagas, several of one, in order, with one save.
func TestAdvanceABatch(t *testing.T) {
	b := newBench()
	x, y := b.placed(t), b.placed(t)
	adv := b.feed(t, reserved(x), reserved(y), authorised(x), reserved(x), captured(x), reply(y, events.TPaymentDeclined, &events.PaymentDeclined{}), committed(x))
	require.Empty(t, adv[0].Out)
	require.Equal(t, []events.Name{events.TCapturePayment}, names(adv[2].Out))
	require.False(t, adv[3].Changed)
	require.Equal(t, []events.Name{events.TOrderConfirmed, events.TCommitStock}, names(adv[4].Out))
	require.EqualValues(t, 2, adv[4].Out[0].Sequence)
	require.Equal(t, []events.Name{events.TOrderRejected, events.TReleaseStock, events.TReversePayment}, names(adv[5].Out))
	require.Equal(t, saga.Completed, b.state(x).Phase)
	require.Equal(t, domain.Confirmed, b.db.Order(x).Status)
	require.EqualValues(t, 2, b.db.Order(x).Sequence)
	_, deadline := b.db.Saga(x)
	require.True(t, deadline.IsZero())
	_, deadline = b.db.Saga(y)
	require.Equal(t, noon.Add(45*time.Second), deadline)
	require.Equal(t, domain.PaymentDeclined, b.db.Order(y).Reason)
	h := b.db.History(x)
	require.Len(t, h, 5, "duplicates leave no line")
	for i, e := range h {
		require.EqualValues(t, i+1, e.Version)
	}
	require.Equal(t, saga.Input{Kind: saga.StepDone, Name: "reserve_stock"}, h[1].Input)
	require.NotZero(t, h[1].Cause)
}

func TestDeadlineIsDatabaseTime(t *testing.T) {
	b := newBench()
	id := b.placed(t)
	_, deadline := b.db.Saga(id)
	require.Equal(t, noon.Add(15*time.Minute), deadline)
	n, err := b.svc.ExpireDue(t.Context(), 10)
	require.NoError(t, err)
	require.Zero(t, n)
	b.wait(15*time.Minute + time.Second)
	n, err = b.svc.ExpireDue(t.Context(), 10)
	require.NoError(t, err)
	require.Equal(t, 1, n)
	require.Equal(t, domain.TimedOut, b.db.Order(id).Reason)
	require.Equal(t, []events.Name{events.TOrderRejected, events.TReleaseStock, events.TReversePayment}, names(b.db.TakeOutbox()))
}

// TestF7_DeadlineIsHeldWhileTheGatewayIsAway: the customer did nothing wrong.
func TestF7_DeadlineIsHeldWhileTheGatewayIsAway(t *testing.T) {
	b := newBench()
	waits, leaves, undoes := b.placed(t), b.placed(t), b.placed(t)
	b.feed(t, reserved(waits), reserved(leaves), authorised(leaves))
	res, err := b.svc.Cancel(t.Context(), saga.CancelRequest{Order: leaves})
	require.NoError(t, err)
	require.Equal(t, saga.CancelAccepted, res.Outcome)
	_, err = b.svc.Cancel(t.Context(), saga.CancelRequest{Order: undoes})
	require.NoError(t, err)
	b.wait(16 * time.Minute)
	b.db.SetAway(saga.PaymentGateway, true)
	n, err := b.svc.ExpireDue(t.Context(), 10)
	require.NoError(t, err)
	require.Equal(t, 3, n)
	require.Equal(t, domain.Pending, b.db.Order(waits).Status)
	require.NotNil(t, b.state(waits).Stuck, "it shows")
	require.Equal(t, domain.Cancelled, b.db.Order(leaves).Status, "a cancel does not wait for the gateway")
	require.Contains(t, b.state(undoes).Stuck.Reason, "no answer in time")
	b.wait(16 * time.Minute) // nobody reports it any more
	_, err = b.svc.ExpireDue(t.Context(), 10)
	require.NoError(t, err)
	require.Equal(t, domain.Rejected, b.db.Order(waits).Status)
}

// TestF7_AHeldSagaHasACommandThatMayAct: the gateway is away for hours. The command that was sent first is too old to act by the time it
// is back, so each time the saga is held it sends one that is not; else it would wait for nothing and be rejected as timed out.
func TestF7_AHeldSagaHasACommandThatMayAct(t *testing.T) {
	b := newBench()
	id := b.placed(t)
	b.feed(t, reserved(id))
	b.db.TakeOutbox()
	for range 12 {
		b.wait(15*time.Minute + time.Second)
		b.db.SetAway(saga.PaymentGateway, true)
		_, err := b.svc.ExpireDue(t.Context(), 10)
		require.NoError(t, err)
		out := b.db.TakeOutbox()
		require.Equal(t, []events.Name{events.TAuthorizePayment}, names(out))
		c := body[*events.AuthorizePayment](t, out[0])
		require.Equal(t, "pm", c.GetPaymentMethod())
		_, deadline := b.db.Saga(id)
		require.Equal(t, b.now().Add(15*time.Minute), deadline)
		require.Greater(t, c.GetExpiresAtMs(), deadline.UnixMilli(), "it may act for as long as its saga waits")
	}
	require.Equal(t, domain.Pending, b.db.Order(id).Status)
}

// TestF12_AStuckUndoIsNotMultiplied: a refund fails for a day. Its command waits at the slowest tier for as long as it takes and says so
// every ten minutes; if each deadline sent another, there would be two thousand of them by then.
func TestF12_AStuckUndoIsNotMultiplied(t *testing.T) {
	b := newBench()
	id := b.placed(t)
	_, err := b.svc.Cancel(t.Context(), saga.CancelRequest{Order: id})
	require.NoError(t, err)
	b.feed(t, reply(id, events.TStockReleased, &events.StockReleased{}))
	b.db.TakeOutbox()
	stall := func(attempt int32, dead bool) {
		b.feed(t, reply(id, events.TStepStalled, &events.StepStalled{Command: string(events.TReversePayment), Error: "balance", Attempts: attempt, Dead: dead}))
	}
	sent := 0
	day := func(notice func(minute int)) {
		for s := range 24 * 60 * 4 {
			if s%4 == 0 {
				notice(s / 4)
			}
			b.wait(15 * time.Second)
			_, err := b.svc.ExpireDue(t.Context(), 10)
			require.NoError(t, err)
			sent += len(b.db.TakeOutbox())
		}
	}
	day(func(minute int) {
		if minute >= 13 && minute%10 == 3 { // the tiers before the slowest take 12 minutes
			stall(int32(minute), false)
		}
	})
	require.LessOrEqual(t, sent, 2)
	require.Contains(t, b.state(id).Stuck.Reason, "ReversePayment")

	sent = 0
	day(func(int) {}) // the topic that it waited in is gone: nobody says anything any more
	require.Greater(t, sent, 50, "a command that was lost is sent again")

	sent = 0
	stall(1, true)
	day(func(int) {})
	require.Zero(t, sent, "each would become a dead letter beside the first")
	require.Contains(t, b.state(id).Stuck.Reason, "is a dead letter", "what is wrong stays to be read")
}

// TestF17_OneSagaThatCannotBeAdvancedHoldsUpNoOther.
func TestF17_OneSagaThatCannotBeAdvancedHoldsUpNoOther(t *testing.T) {
	b := newBench()
	alien, ours := b.placed(t), b.placed(t)
	in, deadline := b.db.Saga(alien)
	in.State.Definition = "subscription"
	b.db.PutSaga(in, deadline)
	b.wait(time.Hour)
	n, err := b.svc.ExpireDue(t.Context(), 10)
	require.Equal(t, 2, n)
	require.ErrorContains(t, err, "subscription v1")
	require.ErrorContains(t, err, alien.String())
	require.Equal(t, domain.TimedOut, b.db.Order(ours).Reason)
	require.Equal(t, domain.Pending, b.db.Order(alien).Status)
}

func TestF17_SweepKeepsGoing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench()
		for range 3 {
			b.placed(t)
		}
		b.wait(time.Hour)
		broken := errors.New("connection reset")
		var mended atomic.Bool
		b.db.BeforeCommit = func(*sagatest.Tx) error {
			if mended.Load() {
				return nil
			}
			return broken
		}
		ctx, cancel := context.WithCancel(t.Context())
		heard := make(chan error, 10)
		ended := make(chan error)
		go func() { ended <- b.svc.Sweep(ctx, time.Second, func(err error) { heard <- err }) }()
		require.ErrorIs(t, <-heard, broken)
		mended.Store(true)
		<-time.After(time.Second)
		synctest.Wait()
		for _, in := range b.db.Sagas() {
			require.Equal(t, saga.Compensating, in.State.Phase)
		}
		cancel()
		require.NoError(t, <-ended)
	})
}

func TestPlaceAgain(t *testing.T) {
	b := newBench()
	o := tea()
	twice := *o
	out := b.place(t, saga.PlaceRequest{Order: o, Given: true, Hash: 1}, saga.PlaceRequest{Order: &twice, Given: true, Hash: 1})
	require.Equal(t, saga.PlacedNew, out[0].Outcome)
	require.Equal(t, saga.PlacedBefore, out[1].Outcome)
	require.Empty(t, out[1].Out)
	other := *o
	out = b.place(t, saga.PlaceRequest{Order: &other, Given: true, Hash: 2})
	require.Equal(t, saga.PlacedConflict, out[0].Outcome)
	require.Equal(t, 1, b.db.Orders())
}

func TestHashDraftIsOfTheContent(t *testing.T) {
	n := int64(450)
	d := domain.Draft{ID: domain.NewOrderID(), CustomerID: "c", Currency: "EUR", Items: []domain.DraftItem{{SKU: "tea", Quantity: 1, UnitPrice: &n}}}
	same := d
	same.ID = domain.OrderID{}
	require.Equal(t, saga.HashDraft(&d), saga.HashDraft(&same))
	same.Items = []domain.DraftItem{{SKU: "tea", Quantity: 1}}
	require.NotEqual(t, saga.HashDraft(&d), saga.HashDraft(&same))
}

func TestCancelOutcomes(t *testing.T) {
	b := newBench()
	nobody := domain.NewOrderID()
	res, err := b.svc.Cancel(t.Context(), saga.CancelRequest{Order: nobody})
	require.NoError(t, err)
	require.Equal(t, saga.CancelUnknown, res.Outcome)
	id := b.placed(t)
	b.feed(t, reserved(id), authorised(id), captured(id))
	res, err = b.svc.Cancel(t.Context(), saga.CancelRequest{Order: id, Actor: "ann"})
	require.NoError(t, err)
	require.Equal(t, saga.CancelTooLate, res.Outcome)
	require.Equal(t, "order.cancel", b.db.AuditLog()[0].Action)
	res, err = b.svc.Cancel(t.Context(), saga.CancelRequest{Order: nobody, Await: true})
	require.NoError(t, err)
	require.Equal(t, saga.CancelAwaits, res.Outcome)
	late := tea()
	late.ID = nobody
	out := b.place(t, saga.PlaceRequest{Order: late, Given: true, Hash: 1})
	require.Equal(t, []events.Name{events.TOrderPlaced, events.TOrderCancelled}, names(out[0].Out))
	require.EqualValues(t, 1, out[0].Out[0].Sequence)
	require.EqualValues(t, 2, out[0].Out[1].Sequence)
	in, deadline := b.db.Saga(id)
	in.State.DefVersion = 9
	b.db.PutSaga(in, deadline)
	_, err = b.svc.Cancel(t.Context(), saga.CancelRequest{Order: id})
	require.ErrorContains(t, err, "v9")
}

// TestF10_CancelAndPlaceAtOnce: whichever is first, the order does not stand.
func TestF10_CancelAndPlaceAtOnce(t *testing.T) {
	for range 40 {
		b := newBench()
		o := tea()
		var wg sync.WaitGroup
		wg.Go(func() {
			if _, err := b.svc.Cancel(t.Context(), saga.CancelRequest{Order: o.ID, Await: true}); err != nil {
				t.Error(err)
			}
		})
		wg.Go(func() {
			err := b.db.InTx(t.Context(), func(ctx context.Context, tx *sagatest.Tx) error {
				c := *o
				_, err := b.coord.Place(ctx, tx, []saga.PlaceRequest{{Order: &c, Given: true}})
				return err
			})
			if err != nil {
				t.Error(err)
			}
		})
		wg.Wait()
		require.Equal(t, domain.Cancelled, b.db.Order(o.ID).Status)
	}
}

func TestResolve(t *testing.T) {
	b := newBench()
	id := b.placed(t)
	resolve := func(d saga.Decision) (saga.State, bool, error) {
		d.Order, d.Actor = id, "ann"
		return b.svc.Resolve(t.Context(), d)
	}
	_, _, err := b.svc.Resolve(t.Context(), saga.Decision{Order: domain.NewOrderID(), Kind: saga.Retry})
	require.ErrorIs(t, err, saga.ErrNoSaga)
	var refusal *domain.Refusal
	_, _, err = resolve(saga.Decision{Kind: "explode"})
	require.ErrorAs(t, err, &refusal)
	require.Equal(t, "/decision", refusal.Field)
	_, _, err = resolve(saga.Decision{Kind: saga.MarkDone, Name: "moon"})
	require.ErrorAs(t, err, &refusal)
	require.Equal(t, "/name", refusal.Field)
	_, changed, err := resolve(saga.Decision{Kind: saga.Take})
	require.NoError(t, err)
	require.False(t, changed, "it is not stuck")
	require.Empty(t, b.db.AuditLog())

	b.db.TakeOutbox()
	_, changed, err = resolve(saga.Decision{Kind: saga.Retry, Note: "lost?"})
	require.NoError(t, err)
	require.True(t, changed)
	again := b.db.TakeOutbox()
	require.Equal(t, []events.Name{events.TReserveStock, events.TAuthorizePayment}, names(again))
	require.Len(t, body[*events.ReserveStock](t, again[0]).GetLines(), 1, "made of the order as it was placed")
	require.Equal(t, "pm", body[*events.AuthorizePayment](t, again[1]).GetPaymentMethod())

	_, err = b.svc.Cancel(t.Context(), saga.CancelRequest{Order: id})
	require.NoError(t, err)
	b.feed(t, reply(id, events.TStepStalled, &events.StepStalled{Command: "ReversePayment", Error: "500", Attempts: 5}))
	_, changed, err = resolve(saga.Decision{Kind: saga.Take})
	require.NoError(t, err)
	require.True(t, changed)
	require.Equal(t, "ann", b.state(id).Stuck.Owner)
	require.Equal(t, b.now(), b.state(id).Stuck.Since)
	_, _, err = resolve(saga.Decision{Kind: saga.MarkDone, Name: "payment", Note: "refunded by hand, ticket 7"})
	require.NoError(t, err)
	st, _, err := resolve(saga.Decision{Kind: saga.MarkDone, Name: "stock"})
	require.NoError(t, err)
	require.Equal(t, saga.Compensated, st.Phase)
	log := b.db.AuditLog()
	require.Len(t, log, 4)
	require.Equal(t, "saga.resolve.mark_done", log[2].Action)
	require.Equal(t, "refunded by hand, ticket 7", log[2].Note)
	h := b.db.History(id)
	require.Equal(t, "ann", h[len(h)-1].Actor)
}

// TestOldDefinitionsStayRunnable: a saga goes on under the version it began with.
func TestOldDefinitionsStayRunnable(t *testing.T) {
	b := newBench()
	id := b.placed(t)
	v2 := saga.OrderV1(saga.DefaultLimits)
	v2.Version = 2
	v2.Steps[0].Done = "SomethingElse"
	b.coord.Defs = saga.NewDefinitions(v2, saga.OrderV1(saga.DefaultLimits))
	require.EqualValues(t, 2, b.coord.Defs.Current().Version)
	adv := b.feed(t, reserved(id), authorised(id))
	require.NoError(t, adv[0].Err)
	require.Equal(t, []events.Name{events.TCapturePayment}, names(adv[1].Out), "translated with v1")
	young := b.placed(t)
	adv = b.feed(t, reserved(young))
	require.ErrorContains(t, adv[0].Err, "no reply that a saga of definition order v2")
}

func TestRefusedOrderFitsTheTables(t *testing.T) {
	long := string(make([]byte, 300)) + "ü"
	d := domain.Draft{
		ID: domain.NewOrderID(), CustomerID: long, Currency: "no", PaymentMethod: "a\nb\x00c",
		Items: []domain.DraftItem{{SKU: "z", Quantity: 1}, {SKU: "a", Quantity: 2}, {SKU: "z", Quantity: 1}, {SKU: "", Quantity: 1}, {SKU: "b", Quantity: -1}, {SKU: domain.SKU(long), Quantity: 1}},
	}
	for range 200 {
		d.Items = append(d.Items, domain.DraftItem{SKU: domain.SKU(uuid.NewString()), Quantity: 1})
	}
	o := saga.RefusedOrder(&d, d.Check())
	require.Equal(t, "abc", o.PaymentMethod)
	require.Equal(t, "XXX", o.Total.Currency)
	require.LessOrEqual(t, len(o.Lines), domain.MaxLines)
	lines, err := domain.CheckLines(o.Lines)
	require.NoError(t, err)
	require.Equal(t, o.Lines, lines)
}
