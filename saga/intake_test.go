package saga_test

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"ordersaga/domain"
	"ordersaga/events"
	"ordersaga/saga"
	"ordersaga/saga/sagatest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

type tx = *sagatest.Tx

var noon = time.Date(2026, 11, 24, 12, 0, 0, 0, time.UTC)

func still() time.Time { return noon }

// prices is a catalogue that a test may change.
type prices struct {
	mu sync.Mutex
	of map[domain.SKU]int64
}

func (p *prices) Products(_ context.Context, skus []domain.SKU) (map[domain.SKU]domain.Product, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	out := map[domain.SKU]domain.Product{}
	for _, sku := range skus {
		if n, ok := p.of[sku]; ok {
			out[sku] = domain.Product{SKU: sku, UnitPrice: domain.Money{Minor: n, Currency: "EUR"}}
		}
	}
	return out, nil
}

func newCoordinator() *saga.Coordinator {
	return &saga.Coordinator{Defs: saga.NewDefinitions(saga.OrderV1(saga.DefaultLimits)), Now: still}
}

type desk struct {
	*saga.Intake[tx]
	db    *sagatest.Store
	shop  *prices
	stop  func()
	admit func() error
}

// open starts an intake; stop ends it and waits.
func open(cfg saga.IntakeConfig) *desk {
	d := &desk{db: sagatest.NewStore(still), shop: &prices{of: map[domain.SKU]int64{"tea": 450}}}
	d.Intake = saga.NewIntake(saga.Store[tx](d.db), newCoordinator(), d.shop, cfg, func() error {
		if d.admit != nil {
			return d.admit()
		}
		return nil
	})
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { _ = d.Run(ctx) })
	d.stop = func() { cancel(); wg.Wait() }
	return d
}

// submission is one order for a tea; body tells its request body from others.
func submission(key, body string) *saga.Submission {
	return &saga.Submission{
		Caller: "shop", Key: key, Body: sha256.Sum256([]byte(body)),
		Draft:  domain.Draft{CustomerID: body, Currency: "EUR", PaymentMethod: "pm_card_visa", Items: []domain.DraftItem{{SKU: "tea", Quantity: 1}}},
		Answer: func(o *domain.Order) []byte { return []byte(o.ID.String() + " " + string(o.Status)) },
	}
}

func TestSixteenSubmissionsOfOneKey(t *testing.T) {
	for _, workers := range []int{1, 4} { // one batch, or several transactions that meet on the key
		d := open(saga.IntakeConfig{Workers: workers, MaxBatch: 4, Queue: 64})
		got := make([]saga.Accepted, 16)
		var wg sync.WaitGroup
		for i := range got {
			wg.Go(func() {
				var err error
				got[i], err = d.Submit(context.Background(), submission("k", "a"))
				if err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		d.stop()
		fresh := 0
		for _, g := range got {
			require.Equal(t, got[0].Order, g.Order)
			require.Equal(t, got[0].Answer, g.Answer)
			if !g.Repeat {
				fresh++
			}
		}
		require.Equal(t, 1, fresh)
		require.Equal(t, 1, d.db.Orders())
		require.Len(t, d.db.TakeOutbox(), 3, "placed, reserve, authorise")
	}
}

func TestKeyReusedWithAnotherBody(t *testing.T) {
	d := open(saga.DefaultIntake)
	defer d.stop()
	first, err := d.Submit(t.Context(), submission("k", "a"))
	require.NoError(t, err)
	require.False(t, first.Repeat)
	_, err = d.Submit(t.Context(), submission("k", "b"))
	require.ErrorIs(t, err, saga.ErrKeyReused)
	other := submission("k", "b")
	other.Caller = "another shop"
	second, err := d.Submit(t.Context(), other)
	require.NoError(t, err, "a key is its caller's own")
	require.NotEqual(t, first.Order, second.Order)

	d.shop.of["tea"] = 999 // and prices change: the stored answer stands
	again := submission("k", "a")
	price := int64(450)
	again.Draft.Items[0].UnitPrice = &price
	rep, err := d.Submit(t.Context(), again)
	require.NoError(t, err)
	require.True(t, rep.Repeat)
	require.Equal(t, first.Answer, rep.Answer)
	again.Key = "new"
	_, err = d.Submit(t.Context(), again)
	var refusal *domain.Refusal
	require.ErrorAs(t, err, &refusal)
	require.Equal(t, domain.PriceChanged, refusal.Reason)
	again.Key, again.Body = "k", sha256.Sum256([]byte("z"))
	_, err = d.Submit(t.Context(), again)
	require.ErrorIs(t, err, saga.ErrKeyReused)
}

func TestRefusalDoesNotUseTheKeyUp(t *testing.T) {
	d := open(saga.DefaultIntake)
	defer d.stop()
	s := submission("k", "a")
	s.Draft.Items[0].SKU = "wine"
	_, err := d.Submit(t.Context(), s)
	require.Error(t, err)
	_, err = d.Submit(t.Context(), submission("k", "a"))
	require.NoError(t, err)
}

// TestOrderIDGiven: the id is the client's to choose, once.
func TestOrderIDGiven(t *testing.T) {
	d := open(saga.DefaultIntake)
	defer d.stop()
	id := domain.NewOrderID()
	given := func(key, body string) *saga.Submission {
		s := submission(key, body)
		s.Draft.ID = id
		return s
	}
	a, err := d.Submit(t.Context(), given("k", "a"))
	require.NoError(t, err)
	require.Equal(t, id, a.Order)
	_, err = d.Submit(t.Context(), given("l", "a"))
	require.ErrorIs(t, err, saga.ErrOrderExists)
	again, err := d.Submit(t.Context(), given("k", "a"))
	require.NoError(t, err)
	require.True(t, again.Repeat)
	require.Equal(t, 1, d.db.Orders())
}

// gate holds every commit until it is opened.
type gate struct {
	reached chan struct{}
	open    chan struct{}
}

func hold(db *sagatest.Store) *gate {
	g := &gate{reached: make(chan struct{}, 100), open: make(chan struct{})}
	db.BeforeCommit = func(*sagatest.Tx) error {
		g.reached <- struct{}{}
		<-g.open
		return nil
	}
	return g
}

// TestShedsWhenFull: what waits is bounded; more is told to come again.
func TestShedsWhenFull(t *testing.T) {
	d := open(saga.IntakeConfig{Workers: 1, MaxBatch: 8, Queue: 2})
	g := hold(d.db)
	var wg sync.WaitGroup
	submit := func(key string) {
		wg.Go(func() {
			if _, err := d.Submit(context.Background(), submission(key, key)); err != nil {
				t.Error(err)
			}
		})
	}
	submit("0")
	<-g.reached // the worker is busy with it
	submit("1")
	submit("2")
	require.Eventually(t, func() bool { return d.Queued() == 2 }, 5*time.Second, time.Millisecond)
	_, err := d.Submit(t.Context(), submission("3", "3"))
	var o *saga.OverloadedError
	require.ErrorAs(t, err, &o)
	require.True(t, o.Full)
	require.Positive(t, o.RetryAfter())
	require.ErrorContains(t, err, "queue is full")
	close(g.open)
	wg.Wait()
	d.stop()
	require.Equal(t, 3, d.db.Orders())
}

func TestAdmissionIsAskedFirst(t *testing.T) {
	d := open(saga.DefaultIntake)
	defer d.stop()
	d.admit = func() error { return &saga.OverloadedError{Why: "disk", After: time.Minute} }
	_, err := d.Submit(t.Context(), submission("k", "a"))
	require.ErrorContains(t, err, "disk")
	require.Zero(t, d.db.Commits())
}

// crowd submits orders so that all but the first wait together, and answers their errors by key.
func crowd(t *testing.T, d *desk, before func(*sagatest.Tx) error, subs ...*saga.Submission) map[string]error {
	t.Helper()
	reached, free := make(chan struct{}, 1), make(chan struct{})
	var once sync.Once
	d.db.BeforeCommit = func(tx *sagatest.Tx) error {
		once.Do(func() { reached <- struct{}{}; <-free })
		return before(tx)
	}
	var mu sync.Mutex
	errs := map[string]error{}
	var wg sync.WaitGroup
	submit := func(s *saga.Submission) {
		wg.Go(func() {
			_, err := d.Submit(context.Background(), s)
			mu.Lock()
			defer mu.Unlock()
			errs[s.Key+"/"+s.Draft.CustomerID] = err
		})
	}
	submit(submission("head", "head"))
	<-reached
	for i, s := range subs {
		submit(s)
		require.Eventually(t, func() bool { return d.Queued() == i+1 }, 5*time.Second, time.Millisecond)
	}
	close(free)
	wg.Wait()
	return errs
}

// TestF6_OneBadOrderDoesNotFailItsBatch: the batch falls back to one transaction each, and each has its own answer.
func TestF6_OneBadOrderDoesNotFailItsBatch(t *testing.T) {
	d := open(saga.IntakeConfig{Workers: 1, MaxBatch: 16, Queue: 16})
	id := domain.NewOrderID()
	exists1, exists2 := submission("e1", "e"), submission("e2", "e")
	exists1.Draft.ID, exists2.Draft.ID = id, id
	bad := func(tx *sagatest.Tx) error {
		for _, e := range tx.Emitted() {
			if ev, ok := e.Data.(*events.OrderEvent); ok && ev.CustomerID == "bad" {
				return &sagatest.DataError{Msg: "22P05: untranslatable character"}
			}
		}
		return nil
	}
	errs := crowd(t, d, bad, submission("a", "a"), submission("b", "bad"), submission("c", "c"), submission("c", "other"), exists1, exists2)
	d.stop()
	require.NoError(t, errs["a/a"])
	require.NoError(t, errs["c/c"])
	require.NoError(t, errs["head/head"])
	require.ErrorContains(t, errs["b/bad"], "22P05")
	require.ErrorIs(t, errs["c/other"], saga.ErrKeyReused, "its own answer survives the fallback")
	require.NoError(t, errs["e1/e"])
	require.ErrorIs(t, errs["e2/e"], saga.ErrOrderExists)
	require.Equal(t, 4, d.db.Orders())
}

// TestFollowersShareTheirLeadersAnswer: repeats of a key that wait together.
func TestFollowersShareTheirLeadersAnswer(t *testing.T) {
	d := open(saga.IntakeConfig{Workers: 1, MaxBatch: 16, Queue: 16})
	taken := submission("x", "x")
	taken.Draft.ID = domain.NewOrderID()
	other := submission("y", "y1")
	other.Draft.ID = taken.Draft.ID
	follower := submission("y", "y2")
	follower.Draft.ID, follower.Body = taken.Draft.ID, other.Body
	errs := crowd(t, d, func(*sagatest.Tx) error { return nil }, taken, other, follower, submission("k", "k1"), submission("k", "k2"))
	d.stop()
	require.NoError(t, errs["x/x"])
	require.ErrorIs(t, errs["y/y1"], saga.ErrOrderExists)
	require.ErrorIs(t, errs["y/y2"], saga.ErrOrderExists)
	require.NoError(t, errs["k/k1"])
	require.ErrorIs(t, errs["k/k2"], saga.ErrKeyReused)
}

func TestDatabaseAwayIsToldToAll(t *testing.T) {
	d := open(saga.IntakeConfig{Workers: 1, MaxBatch: 16, Queue: 16})
	away := errors.New("connection refused")
	errs := crowd(t, d, func(*sagatest.Tx) error { return away }, submission("a", "a"), submission("b", "b"))
	d.stop()
	for _, err := range errs {
		require.ErrorIs(t, err, away)
	}
	require.Zero(t, d.db.Orders())
}

// TestShutdownAnswersEverybody: what waits when the intake is told to stop is placed, what comes after is sent away, nobody hangs.
func TestShutdownAnswersEverybody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := open(saga.IntakeConfig{Workers: 1, MaxBatch: 2, Queue: 64})
		g := hold(d.db)
		var mu sync.Mutex
		placed, away := 0, 0
		submit := func(key string) {
			_, err := d.Submit(context.Background(), submission(key, key))
			mu.Lock()
			defer mu.Unlock()
			var o *saga.OverloadedError
			switch {
			case err == nil:
				placed++
			case errors.As(err, &o):
				away++
			default:
				t.Error(err)
			}
		}
		var wg sync.WaitGroup
		for i := range 10 {
			wg.Go(func() { submit(fmt.Sprint(i)) })
		}
		synctest.Wait()
		stopped := make(chan struct{})
		go func() { d.stop(); close(stopped) }()
		synctest.Wait()
		wg.Go(func() { submit("late") })
		synctest.Wait()
		close(g.open)
		wg.Wait()
		<-stopped
		require.Equal(t, 10, placed)
		require.Equal(t, 1, away)
		require.Equal(t, 10, d.db.Orders())
	})
}

// TestSubmitRacesWithTheEnd: whoever slips into the queue as the last worker leaves is told, not left waiting.
func TestSubmitRacesWithTheEnd(t *testing.T) {
	for range 50 {
		d := open(saga.IntakeConfig{Workers: 2, MaxBatch: 2, Queue: 64})
		var wg sync.WaitGroup
		for i := range 8 {
			wg.Go(func() { _, _ = d.Submit(context.Background(), submission(fmt.Sprint(i), "x")) })
		}
		d.stop()
		wg.Wait()
	}
}

// TestCallerThatGaveUpFindsItsOrder: the promise of the key.
func TestCallerThatGaveUpFindsItsOrder(t *testing.T) {
	d := open(saga.IntakeConfig{Workers: 1, MaxBatch: 2, Queue: 8})
	g := hold(d.db)
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() {
		if _, err := d.Submit(ctx, submission("k", "a")); !errors.Is(err, context.Canceled) {
			t.Errorf("got %v", err)
		}
	})
	<-g.reached
	cancel()
	wg.Wait()
	close(g.open)
	again, err := d.Submit(t.Context(), submission("k", "a"))
	require.NoError(t, err)
	require.True(t, again.Repeat)
	require.Equal(t, 1, d.db.Orders())
	d.stop()
}

func TestPlacedMessages(t *testing.T) {
	d := open(saga.DefaultIntake)
	s := submission("k", "a")
	s.Trace = events.Trace{TraceID: [16]byte{7}}
	a, err := d.Submit(t.Context(), s)
	require.NoError(t, err)
	d.stop()
	out := d.db.TakeOutbox()
	require.Equal(t, []events.Name{events.TOrderPlaced, events.TReserveStock, events.TAuthorizePayment}, names(out))
	ids := map[uuid.UUID]bool{}
	for _, e := range out {
		require.Equal(t, uuid.UUID(a.Order), e.OrderID)
		require.Equal(t, s.Trace, e.Trace)
		ids[e.ID] = true
	}
	require.Len(t, ids, 3)
	require.EqualValues(t, 1, out[0].Sequence)
	placed := body[*events.OrderEvent](t, out[0])
	require.Equal(t, "pending", placed.Status)
	require.EqualValues(t, 450, placed.TotalMinor)
	require.EqualValues(t, 450, *placed.Items[0].UnitPriceMinor)
	hold := body[*events.ReserveStock](t, out[1])
	require.Equal(t, "tea", hold.GetLines()[0].GetSku())
	require.Equal(t, noon.Add(16*time.Minute).UnixMilli(), hold.GetExpiresAtMs())
	auth := body[*events.AuthorizePayment](t, out[2])
	require.Equal(t, "pm_card_visa", auth.GetPaymentMethod())
}

func body[M any](t *testing.T, e events.Envelope) M {
	t.Helper()
	m, ok := e.Data.(M)
	require.True(t, ok, "%T", e.Data)
	return m
}

func names(out []events.Envelope) (ns []events.Name) {
	for _, e := range out {
		ns = append(ns, e.Type)
	}
	return ns
}

// rerun counts how often transactions run, those that start over included.
type rerun struct {
	*sagatest.Store
	runs int
}

func (c *rerun) InTx(ctx context.Context, fn func(context.Context, tx) error) error {
	return c.Store.InTx(ctx, func(ctx context.Context, tx tx) error {
		c.runs++
		return fn(ctx, tx)
	})
}

// What the intake presumes to be new and is not is found, and for a while nothing is presumed: a batch with a repeated key is one transaction
// then, not one that is refused and another.
func TestIntakePresumesUntilSomethingIsThere(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		db := &rerun{Store: sagatest.NewStore(still)}
		in := saga.NewIntake(saga.Store[tx](db), newCoordinator(), &prices{of: map[domain.SKU]int64{"tea": 450}}, saga.IntakeConfig{Workers: 1, MaxBatch: 8, Queue: 8}, nil)
		ctx, stop := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		wg.Go(func() { _ = in.Run(ctx) })
		defer wg.Wait()
		defer stop()
		runs := func(s *saga.Submission, want error) int {
			before := db.runs
			_, err := in.Submit(ctx, s)
			require.ErrorIs(t, err, want)
			return db.runs - before
		}
		given := func(key string, id domain.OrderID) *saga.Submission {
			s := submission(key, "a")
			s.Draft.ID = id
			return s
		}
		id, buried := domain.NewOrderID(), domain.NewOrderID()
		require.NoError(t, db.Store.InTx(ctx, func(ctx context.Context, tx tx) error { return tx.InsertTombstones(ctx, []domain.OrderID{buried}) }))

		require.Equal(t, 1, runs(submission("k", "a"), nil))
		require.Equal(t, 1, runs(given("id", id), nil))
		for i, s := range []struct {
			*saga.Submission
			err error
		}{{submission("k", "a"), nil}, {submission("k", "b"), saga.ErrKeyReused}, {given("x", id), saga.ErrOrderExists}, {given("y", buried), nil}} {
			require.Equal(t, 2, runs(s.Submission, s.err), i)
			require.Equal(t, 1, runs(submission("k", "a"), nil), "it is looked up at once")
			require.Equal(t, 1, runs(submission(fmt.Sprint(i), "a"), nil))
			<-time.After(6 * time.Second)
			require.Equal(t, 1, runs(submission(fmt.Sprint(i, "later"), "a"), nil))
		}
		require.Equal(t, domain.Cancelled, db.Order(buried).Status)
		require.Equal(t, 11, db.Orders())
	})
}
