package httpapi

import (
	"context"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"

	"ordersaga/domain"
	"ordersaga/saga"
	"ordersaga/saga/sagatest"
)

// shop is the real intake over the store in memory, and the reading side of that store.
type shop struct {
	saga.Reader // the rest of it is not asked for here
	store       *sagatest.Store

	mu     sync.Mutex
	prices map[domain.SKU]int64
}

func newShop() *shop {
	return &shop{store: sagatest.NewStore(time.Now), prices: map[domain.SKU]int64{"TEA-1": 450}}
}

func (s *shop) Products(_ context.Context, skus []domain.SKU) (map[domain.SKU]domain.Product, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := map[domain.SKU]domain.Product{}
	for _, sku := range skus {
		if p, is := s.prices[sku]; is {
			out[sku] = domain.Product{SKU: sku, Name: string(sku), UnitPrice: domain.Money{Minor: p, Currency: "EUR"}}
		}
	}
	return out, nil
}

func (s *shop) costs(sku domain.SKU, price int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.prices[sku] = price
}

func (s *shop) Order(_ context.Context, id domain.OrderID) (*saga.OrderView, error) {
	o := s.store.Order(id)
	in, deadline := s.store.Saga(id)
	if o == nil || in == nil {
		return nil, nil
	}
	return &saga.OrderView{Order: *o, Saga: in.State, Deadline: deadline}, nil
}

// open starts one process of the shop.
func (s *shop) open(t *testing.T, cfg saga.IntakeConfig, run bool, admit func() error) *world {
	t.Helper()
	intake := saga.NewIntake(s.store, &saga.Coordinator{Defs: definitions, Now: time.Now}, s, cfg, admit)
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan error, 1)
	if run {
		go func() { done <- intake.Run(ctx) }()
		t.Cleanup(func() { stop(); require.NoError(t, <-done) })
	} else {
		t.Cleanup(stop)
	}
	return newWorld(t, func(x *setup) { x.deps.Intake, x.deps.Reader = intake, s })
}

func TestRealIntakeSixteenConcurrentPostsWithOneKey(t *testing.T) {
	for name, processes := range map[string]int{"one process": 1, "two processes": 2} {
		t.Run(name, func(t *testing.T) {
			s := newShop()
			worlds := make([]*world, processes)
			for i := range worlds {
				worlds[i] = s.open(t, saga.DefaultIntake, true, nil)
			}
			body := strings.Replace(tea, "{", `{"order_id":"`+uuid.NewString()+`",`, 1)
			for round, b := range []string{tea, body} {
				bodies := together(t, worlds[0], 16, func(i int) *http.Request {
					return worlds[i%processes].request(http.MethodPost, "/v1/orders", b, "Idempotency-Key", "one-"+string(rune('a'+round)))
				})
				require.Len(t, bodies, 1, "all who are answered 202 are answered the same")
				require.Equal(t, round+1, s.store.Orders())
				require.Len(t, s.store.TakeOutbox(), 3, "one event, two commands")
			}
		})
	}
}

func TestRealIntakeIdempotency(t *testing.T) {
	s := newShop()
	w := s.open(t, saga.DefaultIntake, true, nil)

	first := w.place("k", tea, "Prefer", "wait=0")
	o := w.accepted(first)
	require.Equal(t, first.body, w.place("k", tea).body)
	w.refused(w.place("k", tea+"\n"), http.StatusUnprocessableEntity, "key_reused")
	require.Equal(t, 1, s.store.Orders())

	t.Run("a price that changed since does not change the answer", func(t *testing.T) {
		fixed := strings.Replace(tea, `"quantity":2`, `"quantity":2,"unit_price_minor":450`, 1)
		a := w.place("fixed", fixed)
		w.accepted(a)
		s.costs("TEA-1", 500)
		defer s.costs("TEA-1", 450)
		require.Equal(t, a.body, w.place("fixed", fixed).body)
		w.refused(w.place("other", fixed), http.StatusUnprocessableEntity, "price_changed")
	})
	t.Run("a refusal does not use the key up", func(t *testing.T) {
		unknown := strings.Replace(tea, "TEA-1", "TEA-7", 1)
		w.refused(w.place("later", unknown), http.StatusUnprocessableEntity, "unknown_product")
		w.refused(w.place("later", `{"customer_id":1}`), http.StatusBadRequest, "malformed")
		s.costs("TEA-7", 100)
		w.accepted(w.place("later", unknown))
	})
	t.Run("the order exists", func(t *testing.T) {
		mine := strings.Replace(tea, "{", `{"order_id":"`+uuid.NewString()+`",`, 1)
		w.accepted(w.place("mine", mine))
		w.refused(w.place("theirs", mine), http.StatusConflict, "order_exists")
		w.accepted(w.place("mine", mine))
		w.refused(w.place("theirs", mine), http.StatusConflict, "order_exists")
	})
	t.Run("a wait shows the state and stores nothing", func(t *testing.T) {
		svc := &saga.Service[*sagatest.Tx]{DB: s.store, Coord: &saga.Coordinator{Defs: definitions, Now: time.Now}}
		_, err := svc.Cancel(t.Context(), saga.CancelRequest{Order: domain.OrderID(o.OrderID)})
		require.NoError(t, err)
		a := w.place("k", tea, "Prefer", "wait=9")
		require.Equal(t, OrderStatusCancelled, w.accepted(a).Status)
		require.Equal(t, "wait=9", a.header.Get("Preference-Applied"))
		require.Equal(t, first.body, w.place("k", tea).body)
	})
	t.Run("two bodies race for a key: one is stored", func(t *testing.T) {
		type got struct {
			status int
			body   string
		}
		var mu sync.Mutex
		seen := map[got]int{}
		var wg sync.WaitGroup
		for i := range 16 {
			r := w.request(http.MethodPost, "/v1/orders", strings.Repeat(" ", i%2)+tea, "Idempotency-Key", "race")
			wg.Go(func() {
				a, err := w.send(r)
				mu.Lock()
				defer mu.Unlock()
				if err == nil {
					seen[got{a.status, string(a.body)}]++
				}
			})
		}
		wg.Wait()
		require.Len(t, seen, 2)
		for g, n := range seen {
			require.Contains(t, []int{http.StatusAccepted, http.StatusUnprocessableEntity}, g.status)
			require.Equal(t, 8, n)
		}
	})
}

// TestF22_IntakeShedsBeforeItStores: what cannot be kept is refused before anything is written, and says when to come again.
func TestF22_IntakeShedsBeforeItStores(t *testing.T) {
	s := newShop()
	w := s.open(t, saga.DefaultIntake, true, func() error { return &saga.OverloadedError{Why: "the disk is nearly full", After: 30 * time.Second} })
	a := w.place("k", tea)
	require.Contains(t, w.refused(a, http.StatusServiceUnavailable, "overloaded").Detail, "disk is nearly full")
	require.Equal(t, "30", a.header.Get("Retry-After"))
	require.Zero(t, s.store.Orders())
	require.Empty(t, w.logs.lines(), "shedding is no fault")
}

func TestIntakeQueueFull(t *testing.T) {
	s := newShop()
	full := s.open(t, saga.IntakeConfig{Workers: 1, MaxBatch: 1, Queue: 0}, false, nil) // nobody takes from it
	a := full.place("k", tea)
	full.refused(a, http.StatusTooManyRequests, "overloaded")
	require.Equal(t, "1", a.header.Get("Retry-After"))
}

func TestIntakeStopped(t *testing.T) {
	s := newShop()
	intake := saga.NewIntake(s.store, &saga.Coordinator{Defs: definitions, Now: time.Now}, s, saga.DefaultIntake, nil)
	ctx, stop := context.WithCancel(t.Context())
	stop()
	require.NoError(t, intake.Run(ctx))
	w := newWorld(t, func(x *setup) { x.deps.Intake = intake })
	w.refused(w.place("k", tea), http.StatusServiceUnavailable, "overloaded")
}
