package httpapi

import (
	"crypto/sha256"
	"encoding/json"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"

	"ordersaga/domain"
	"ordersaga/saga"
)

type inFlightError struct{}

func (inFlightError) Error() string  { return "the key is taken" }
func (inFlightError) InFlight() bool { return true }

func TestPlaceOrder(t *testing.T) {
	w := newWorld(t)
	a := w.place("k-1", tea)
	o := w.accepted(a)
	require.Equal(t, OrderStatusPending, o.Status)
	require.EqualValues(t, 900, o.TotalMinor)
	require.Equal(t, "EUR", o.Currency)
	require.Equal(t, "application/json", a.header.Get("Content-Type"))
	require.Equal(t, "no-store", a.header.Get("Cache-Control"))
	require.Empty(t, a.header.Get("Preference-Applied"))

	s := w.intake.submitted()[0]
	require.Equal(t, "dev", s.Caller)
	require.Equal(t, "k-1", s.Key)
	require.Equal(t, sha256.Sum256([]byte(tea)), s.Body)

	got := w.do(http.MethodGet, a.header.Get("Location"), "")
	require.Equal(t, http.StatusOK, got.status)
	var full Order
	require.NoError(t, json.Unmarshal(got.body, &full))
	require.Equal(t, o.OrderID, full.OrderID)
	require.Len(t, full.Saga.Steps, 4)
	require.Equal(t, "reserve_stock", full.Saga.Steps[0].Name)
}

func TestIdempotencyKey(t *testing.T) {
	w := newWorld(t)
	first := w.place("k", tea)
	id := w.accepted(first).OrderID

	t.Run("repeat: byte for byte", func(t *testing.T) {
		w.reader.ends(domain.OrderID(id), domain.Confirmed, "")
		again := w.place("k", tea)
		require.Equal(t, first.body, again.body)
		require.Equal(t, first.header.Get("Location"), again.header.Get("Location"))
	})
	t.Run("repeat with another body", func(t *testing.T) {
		require.Equal(t, "Idempotency-Key", w.refused(w.place("k", tea+" "), http.StatusUnprocessableEntity, "key_reused").Field)
	})
	t.Run("a wait afterwards shows the state and stores nothing", func(t *testing.T) {
		waited := w.place("k", tea, "Prefer", "wait=5")
		require.Equal(t, OrderStatusConfirmed, w.accepted(waited).Status)
		require.Equal(t, "wait=5", waited.header.Get("Preference-Applied"))
		require.Equal(t, first.body, w.place("k", tea).body)
	})
	t.Run("missing", func(t *testing.T) {
		w.refused(w.do(http.MethodPost, "/v1/orders", tea), http.StatusBadRequest, "idempotency_key_missing")
	})
	for name, key := range map[string]string{"long": strings.Repeat("k", 256), "not ASCII": "schlüssel"} {
		t.Run(name, func(t *testing.T) {
			w.refused(w.place(key, tea), http.StatusBadRequest, "bad_idempotency_key")
		})
	}
	t.Run("empty", func(t *testing.T) {
		r := w.request(http.MethodPost, "/v1/orders", tea)
		r.Header["Idempotency-Key"] = []string{""}
		a, err := w.send(r)
		require.NoError(t, err)
		w.refused(a, http.StatusBadRequest, "bad_idempotency_key")
	})
	t.Run("twice", func(t *testing.T) {
		w.refused(w.place("k1", tea, "Idempotency-Key", "k2"), http.StatusBadRequest, "bad_idempotency_key")
	})
	t.Run("taken as it is", func(t *testing.T) {
		key := strings.Repeat(`a,b%20;"c" `, 24)[:maxKey]
		w.accepted(w.place(key, tea))
		calls := w.intake.submitted()
		require.Equal(t, key, calls[len(calls)-1].Key)
	})
	t.Run("a refusal does not use the key up", func(t *testing.T) {
		w.refused(w.place("k4xx", `{`), http.StatusBadRequest, "malformed")
		w.refused(w.place("k4xx", strings.Replace(tea, "TEA-1", "TEA-9", 1)), http.StatusUnprocessableEntity, "unknown_product")
		w.accepted(w.place("k4xx", tea))
	})
	t.Run("the order exists", func(t *testing.T) {
		mine := strings.Replace(tea, "{", `{"order_id":"`+uuid.NewString()+`",`, 1)
		w.accepted(w.place("mine-1", mine))
		require.Equal(t, "/order_id", w.refused(w.place("mine-2", mine), http.StatusConflict, "order_exists").Field)
	})
	t.Run("in flight", func(t *testing.T) {
		w.intake.fails(inFlightError{})
		defer w.intake.fails(nil)
		a := w.place("busy", tea)
		w.refused(a, http.StatusConflict, "in_flight")
		require.Equal(t, "1", a.header.Get("Retry-After"))
	})
}

func TestSixteenConcurrentPostsWithOneKey(t *testing.T) {
	w := newWorld(t)
	bodies := together(t, w, 16, func(int) *http.Request {
		return w.request(http.MethodPost, "/v1/orders", tea, "Idempotency-Key", "one")
	})
	require.Len(t, bodies, 1)
	for _, n := range bodies {
		require.Equal(t, 16, n)
	}
}

// together sends n requests at once and counts the answers 202 by their body; others fail the test.
func together(t *testing.T, w *world, n int, request func(i int) *http.Request) map[string]int {
	t.Helper()
	var mu sync.Mutex
	bodies := map[string]int{}
	var wg sync.WaitGroup
	start := make(chan struct{})
	for i := range n {
		r := request(i)
		wg.Go(func() {
			<-start
			a, err := w.send(r)
			mu.Lock()
			defer mu.Unlock()
			if err != nil || a.status != http.StatusAccepted {
				t.Errorf("answer %d %s, error %v", a.status, a.body, err)
				return
			}
			bodies[string(a.body)]++
		})
	}
	close(start)
	wg.Wait()
	return bodies
}

func TestRefusedOrders(t *testing.T) {
	w := newWorld(t)
	item := func(s string) string {
		return `{"customer_id":"c","currency":"EUR","payment_method":"pm","items":[` + s + `]}`
	}
	for name, c := range map[string]struct {
		body   string
		status int
		code   string
		field  string
	}{
		"price changed":   {item(`{"sku":"TEA-1","quantity":1,"unit_price_minor":449}`), 422, "price_changed", "/items/0/unit_price_minor"},
		"unknown product": {item(`{"sku":"TEA-1","quantity":1},{"sku":"TEA-9","quantity":1}`), 422, "unknown_product", "/items/1/sku"},
		"no items":        {item(``), 422, "invalid", "/items"},
		"sku twice":       {item(`{"sku":"TEA-1","quantity":1},{"sku":"TEA-1","quantity":1}`), 422, "invalid", "/items/1/sku"},
		"no quantity":     {item(`{"sku":"TEA-1"}`), 422, "invalid", "/items/0/quantity"},
		"much":            {item(`{"sku":"TEA-1","quantity":10001}`), 422, "invalid", "/items/0/quantity"},
		"negative price":  {item(`{"sku":"TEA-1","quantity":1,"unit_price_minor":-1}`), 422, "invalid", "/items/0/unit_price_minor"},
		"no customer":     {`{"currency":"EUR","payment_method":"pm","items":[{"sku":"TEA-1","quantity":1}]}`, 422, "invalid", "/customer_id"},
		"bad currency":    {strings.Replace(tea, "EUR", "eur", 1), 422, "invalid", "/currency"},
		"bad order id":    {strings.Replace(tea, "{", `{"order_id":"7",`, 1), 422, "invalid", "/order_id"},
		"nil order id":    {strings.Replace(tea, "{", `{"order_id":"`+uuid.Nil.String()+`",`, 1), 422, "invalid", "/order_id"},
	} {
		t.Run(name, func(t *testing.T) {
			require.Equal(t, c.field, w.refused(w.place("k", c.body), c.status, c.code).Field)
		})
	}
}

func TestReadOrders(t *testing.T) {
	w := newWorld(t)
	id := w.reader.pending()
	w.reader.change(id, func(v *saga.OrderView) { v.Saga.Stuck = &saga.Stuck{Reason: "no answer", Since: time.Unix(1e9, 0)} })
	gone := w.reader.pending()
	w.reader.ends(gone, domain.Rejected, domain.OutOfStock)

	for _, path := range []string{"/v1/orders", "/v1/orders/" + id.String(), "/v1/orders/" + gone.String(), "/v1/orders/" + id.String() + "/timeline", "/v1/sagas/" + id.String(), "/v1/sagas"} {
		a := w.do(http.MethodGet, path, "")
		require.Equal(t, http.StatusOK, a.status, path)
		head := w.do(http.MethodHead, path, "")
		require.Equal(t, http.StatusOK, head.status, path)
		require.Empty(t, head.body)
	}
	nobody := uuid.NewString()
	for _, path := range []string{"/v1/orders/" + nobody, "/v1/orders/" + nobody + "/timeline", "/v1/orders/" + nobody + "/events", "/v1/sagas/" + nobody} {
		w.refused(w.do(http.MethodGet, path, ""), http.StatusNotFound, "not_found")
	}

	var page OrderPage
	require.NoError(t, json.Unmarshal(w.do(http.MethodGet, "/v1/orders?status=pending&customer_id=c%2017&cursor=abc&limit=7", "").body, &page))
	require.Equal(t, "next-1", page.NextCursor)
	require.Equal(t, saga.OrderFilter{Status: domain.Pending, CustomerID: "c 17", Cursor: "abc", Limit: 7}, w.reader.query)
	w.do(http.MethodGet, "/v1/sagas?phase=running&stuck=true&older_than=10m", "")
	require.Equal(t, saga.SagaFilter{Phase: saga.Running, Stuck: true, OlderThan: 10 * time.Minute, Limit: 50}, w.reader.query)

	for query, field := range map[string]string{
		"/v1/orders?status=lost":                                 "status",
		"/v1/orders?limit=0":                                     "limit",
		"/v1/orders?limit=501":                                   "limit",
		"/v1/orders?limit=":                                      "limit",
		"/v1/orders?limit=many":                                  "limit",
		"/v1/orders?customer_id=%00":                             "customer_id",
		"/v1/orders?customer_id=%ff":                             "customer_id",
		"/v1/orders?customer_id=" + strings.Repeat("c", 257):     "customer_id",
		"/v1/orders?status=%zz":                                  "",
		"/v1/orders?status=pending;limit=1":                      "",
		"/v1/sagas?phase=lost":                                   "phase",
		"/v1/sagas?stuck=maybe":                                  "stuck",
		"/v1/sagas?older_than=10":                                "older_than",
		"/v1/sagas?older_than=-1s":                               "older_than",
		"/v1/orders/not-a-uuid":                                  "order_id",
		"/v1/dlq?order_id=7":                                     "order_id",
		"/v1/dlq?status=lost":                                    "status",
		"/v1/audit-log?limit=x":                                  "limit",
		"/v1/products?limit=-1":                                  "limit",
		"/v1/products/%0a":                                       "sku",
		"/v1/products/" + strings.Repeat("x", 129):               "sku",
		"/v1/orders/" + uuid.NewString() + "/events?x=%e2%80%ae": "x",
	} {
		require.Equal(t, field, w.refused(w.do(http.MethodGet, query, ""), http.StatusBadRequest, "bad_parameter").Field, query)
	}

	w.reader.fails(&domain.Refusal{Reason: domain.Invalid, Field: "/cursor", Detail: "cursor \"x\" was not answered by this list"})
	for _, list := range []string{"/v1/orders", "/v1/sagas", "/v1/audit-log"} {
		require.Equal(t, "cursor", w.refused(w.do(http.MethodGet, list+"?cursor=x", ""), http.StatusBadRequest, "bad_parameter").Field)
	}
}

func TestCancelOrder(t *testing.T) {
	w := newWorld(t)
	id := w.reader.pending()
	path := "/v1/orders/" + id.String() + "/cancel"
	for range 2 {
		a := w.do(http.MethodPost, path, `{"reason":"changed my mind"}`)
		require.Equal(t, http.StatusAccepted, a.status, "%s", a.body)
	}
	require.Equal(t, http.StatusAccepted, w.do(http.MethodPost, path, "", "Idempotency-Key", "k").status)
	require.Equal(t, http.StatusAccepted, w.do(http.MethodPost, path, "{\"reason\":\"a\\r\\nb\\u0000\"}").status)
	require.Equal(t, "changed my mind", w.orders.cancels[0].Reason)
	require.Equal(t, "dev", w.orders.cancels[0].Actor)
	require.Equal(t, id, w.orders.cancels[0].Order)
	require.Equal(t, "a  b ", w.orders.cancels[3].Reason)

	w.refused(w.do(http.MethodPost, "/v1/orders/"+uuid.NewString()+"/cancel", ""), http.StatusNotFound, "not_found")
	require.Equal(t, "/reason", w.refused(w.do(http.MethodPost, path, `{"reason":"`+strings.Repeat("ü", 129)+`"}`), http.StatusUnprocessableEntity, "invalid").Field)
	w.refused(w.do(http.MethodPost, path, `{"why":"x"}`), http.StatusBadRequest, "malformed")
	w.orders.outcome = saga.CancelTooLate
	w.refused(w.do(http.MethodPost, path, ""), http.StatusConflict, "already_confirmed")
}
