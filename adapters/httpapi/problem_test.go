package httpapi

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"testing/fstest"
	"time"
	"unicode"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"

	"ordersaga/domain"
	"ordersaga/saga"
)

// laterError is transient and knows when to try again.
type laterError struct{}

func (laterError) Error() string             { return "busy" }
func (laterError) RetryAfter() time.Duration { return 90 * time.Second }

// logged is a line of the log.
type logged struct {
	Level, Msg, Instance, Method, Route, Error, Stack string
	Status                                            int
}

func (w *world) logLines() []logged {
	w.t.Helper()
	var out []logged
	for _, l := range w.logs.lines() {
		var x logged
		require.NoError(w.t, json.Unmarshal([]byte(l), &x), l)
		out = append(out, x)
	}
	return out
}

// TestFaults: what is not the client's doing is answered without its insides and logged once, under the instance that the answer names.
func TestFaults(t *testing.T) {
	id := uuid.NewString()
	for name, c := range map[string]struct {
		err        error
		status     int
		code       string
		level      string
		retryAfter string
	}{
		"unknown error":        {errBroken, 500, "internal", "ERROR", ""},
		"dependency away":      {fmt.Errorf("place: %w", awayError{}), 503, "unavailable", "WARN", "1"},
		"says when":            {laterError{}, 503, "unavailable", "WARN", "90"},
		"deadline of ours":     {fmt.Errorf("commit: %w", context.DeadlineExceeded), 503, "unavailable", "WARN", "1"},
		"cancelled, but by us": {context.Canceled, 500, "internal", "ERROR", ""},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			w.intake.fails(c.err)
			w.reader.fails(c.err)
			w.orders.err, w.products.err, w.dead.err = c.err, c.err, c.err
			for i, r := range []struct{ method, path, body, route string }{
				{"POST", "/v1/orders", tea, "POST /v1/orders"},
				{"GET", "/v1/orders", "", "GET /v1/orders"},
				{"GET", "/v1/orders/" + id, "", "GET /v1/orders/{order_id}"},
				{"GET", "/v1/orders/" + id + "/events", "", "GET /v1/orders/{order_id}/events"},
				{"GET", "/v1/orders/" + id + "/timeline", "", "GET /v1/orders/{order_id}/timeline"},
				{"POST", "/v1/orders/" + id + "/cancel", "", "POST /v1/orders/{order_id}/cancel"},
				{"GET", "/v1/products", "", "GET /v1/products"},
				{"GET", "/v1/products/TEA-1", "", "GET /v1/products/{sku}"},
				{"PUT", "/v1/products/TEA-1", `{"name":"Tea","unit_price_minor":450,"currency":"EUR"}`, "PUT /v1/products/{sku}"},
				{"GET", "/v1/sagas", "", "GET /v1/sagas"},
				{"GET", "/v1/sagas/" + id, "", "GET /v1/sagas/{order_id}"},
				{"POST", "/v1/sagas/" + id + "/resolve", `{"decision":"retry"}`, "POST /v1/sagas/{order_id}/resolve"},
				{"GET", "/v1/dlq", "", "GET /v1/dlq"},
				{"GET", "/v1/dlq/" + id, "", "GET /v1/dlq/{id}"},
				{"POST", "/v1/dlq/replay", `{"ids":["` + id + `"]}`, "POST /v1/dlq/replay"},
				{"POST", "/v1/dlq/discard", `{"ids":["` + id + `"],"note":"x"}`, "POST /v1/dlq/discard"},
				{"GET", "/v1/audit-log", "", "GET /v1/audit-log"},
			} {
				a := w.do(r.method, r.path, r.body, "Idempotency-Key", "k")
				p := w.refused(a, c.status, c.code)
				require.Equal(t, c.retryAfter, a.header.Get("Retry-After"))
				require.Regexp(t, "^urn:uuid:", p.Instance)
				require.NotContains(t, string(a.body), "broken")
				require.NotContains(t, string(a.body), "refused")
				lines := w.logLines()
				require.Len(t, lines, i+1, "logged once")
				l := lines[i]
				require.Equal(t, p.Instance, l.Instance)
				require.Equal(t, c.level, l.Level)
				require.Equal(t, c.status, l.Status)
				require.Equal(t, r.method, l.Method)
				require.Equal(t, r.route, l.Route)
				require.Contains(t, l.Error, strings.Split(c.err.Error(), "\r")[0])
			}
		})
	}
}

// TestF26_NothingForgesALine: what a client or an error brings in the way of line breaks, escapes and turns reaches neither a log nor
// an answer as it is.
func TestF26_NothingForgesALine(t *testing.T) {
	w := newWorld(t)
	w.intake.fails(errBroken)
	w.place("k", tea)
	w.intake.fails(nil)
	nasty := `\r\nHTTP/1.1 200 OK\u001b[31m\u009b32m\u202e\u2028` + "\u009b31m\u202e"
	answers := []answered{
		w.place("k1", strings.Replace(tea, "TEA-1", nasty, 1)),
		w.place("k2", strings.Replace(tea, "c-17", nasty, 1)),
		w.place("k3", strings.Replace(tea, "EUR", nasty, 1)),
		w.place("k4", strings.Replace(tea, "{", `{"order_id":"`+nasty+`",`, 1)),
		w.place("k5", strings.Replace(tea, "customer_id", nasty, 1)),
		w.place("k6", strings.Replace(tea, `"c-17"`, "\u009b31m", 1)),
		w.do(http.MethodPost, "/v1/dlq/replay", `{"ids":["`+nasty+`"]}`),
		w.do(http.MethodPost, "/v1/dlq/replay", `{"filter":{"group":"`+nasty+`"}}`),
		w.do(http.MethodPost, "/v1/sagas/"+uuid.NewString()+"/resolve", `{"decision":"`+nasty+`"}`),
		w.do(http.MethodPut, "/v1/products/x", `{"name":"`+nasty+`","unit_price_minor":1,"currency":"EUR"}`),
		w.do(http.MethodGet, "/v1/orders/%0d%0aSet-Cookie:%20a=b%1b[31m", ""),
		w.do(http.MethodGet, "/v1/orders?limit=%0d%0a%1b[31m", ""),
		w.do(http.MethodGet, "/v1/orders?%0d%0a=%0d%0a", ""),
		w.do(http.MethodGet, "/v1/orders?a=%0d%zz%0a", ""),
		w.do(http.MethodGet, "/%0d%0a%1b[31m", ""),
		w.do(http.MethodGet, "/v1/sagas?older_than=%1b[31m", ""),
		w.do(http.MethodGet, "/json/%0d%0a..%2f..%2fgo.mod", ""),
	}
	for _, a := range answers {
		require.GreaterOrEqual(t, a.status, 400, "%s", a.body)
		require.Less(t, a.status, 500, "%s", a.body)
		for _, s := range []string{a.problem.Detail, a.problem.Title, a.problem.Field, a.problem.Code, a.problem.Instance} {
			require.Equal(t, clean(s, 1000), s)
		}
		require.NotContains(t, a.header, "Set-Cookie")
	}
	require.Len(t, w.logLines(), 1, "what the client did wrong is not logged at all")
	for _, l := range w.logLines() {
		require.Equal(t, clean(l.Error, 1000), l.Error)
		require.Contains(t, l.Error, "broken")
	}
}

func TestPanics(t *testing.T) {
	t.Run("before the answer", func(t *testing.T) {
		w := newWorld(t)
		w.intake.panics = "boom\r\n"
		p := w.refused(w.place("k", tea), http.StatusInternalServerError, "internal")
		l := w.logLines()[0]
		require.Len(t, w.logLines(), 1)
		require.Equal(t, p.Instance, l.Instance)
		require.Equal(t, "panic: boom  ", l.Error)
		require.Contains(t, l.Stack, "fakeIntake")
		require.Equal(t, "POST /v1/orders", l.Route)
	})
	t.Run("within it", func(t *testing.T) {
		w := newWorld(t, func(s *setup) {
			s.deps.Metrics = http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				w.Header().Set("Content-Type", "text/plain")
				_, _ = io.WriteString(w, strings.Repeat("half ", 2000))
				panic("boom")
			})
		})
		resp, err := w.wire.RoundTrip(w.request(http.MethodGet, "/metrics", ""))
		require.NoError(t, err)
		defer resp.Body.Close()
		_, err = io.ReadAll(resp.Body)
		require.ErrorIs(t, err, io.ErrUnexpectedEOF, "the client notices that the answer is not whole")
		require.Len(t, w.logLines(), 1)
		require.Equal(t, "panic: boom", w.logLines()[0].Error)
	})
	t.Run("on purpose", func(t *testing.T) {
		w := newWorld(t)
		w.intake.panics = http.ErrAbortHandler
		_, err := w.send(w.request(http.MethodPost, "/v1/orders", tea, "Idempotency-Key", "k"))
		require.Error(t, err)
		require.Empty(t, w.logs.lines())
	})
}

// TestClientGone: nobody is there to be answered; it is no fault.
func TestClientGone(t *testing.T) {
	seen := make(chan int, 1)
	w := newWorld(t, func(s *setup) {
		s.wrap = func(next http.Handler) http.Handler {
			return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				rec := &statusOnly{header: http.Header{}}
				next.ServeHTTP(rec, r)
				seen <- rec.status
			})
		}
	})
	w.intake.hold, w.intake.held = make(chan struct{}), make(chan struct{}, 1)
	ctx, leave := context.WithCancel(t.Context())
	gone := make(chan error, 1)
	r := w.request(http.MethodPost, "/v1/orders", tea, "Idempotency-Key", "k").WithContext(ctx)
	go func() { _, err := w.send(r); gone <- err }()
	<-w.intake.held
	leave()
	require.ErrorIs(t, <-gone, context.Canceled)
	require.Equal(t, statusClientGone, <-seen)
	require.Empty(t, w.logs.lines())
	close(w.intake.hold)
}

func TestUnknownPathsAndMethods(t *testing.T) {
	w := newWorld(t)
	for _, path := range []string{"/", "/v1", "/v1/", "/v1/nothing", "/v1/orders/", "/favicon.ico", "/debug/pprof/", "/v1/dlq/replay/x", "//nowhere", "/a/../nowhere"} {
		require.Empty(t, w.do(http.MethodGet, path, "").header.Get("Location"), path)
		w.refused(w.do(http.MethodGet, path, ""), http.StatusNotFound, "not_found")
	}
	id := uuid.NewString()
	for _, c := range []struct{ method, path, allow string }{
		{"DELETE", "/v1/orders", "GET, HEAD, POST"},
		{"PUT", "/v1/orders/" + id, "GET, HEAD"},
		{"GET", "/v1/orders/" + id + "/cancel", "POST"},
		{"HEAD", "/v1/orders/" + id + "/cancel", "POST"},
		{"OPTIONS", "/v1/orders", "GET, HEAD, POST"},
		{"PATCH", "/v1/products/x", "GET, HEAD, PUT"},
		{"POST", "/metrics", "GET, HEAD"},
		{"POST", "/readyz", "GET, HEAD"},
		{"BREW", "/v1/orders", "GET, HEAD, POST"},
	} {
		a := w.do(c.method, c.path, "")
		require.Equal(t, http.StatusMethodNotAllowed, a.status, "%s %s", c.method, c.path)
		require.Equal(t, c.allow, a.header.Get("Allow"))
		if c.method != http.MethodHead {
			w.refused(a, http.StatusMethodNotAllowed, "method_not_allowed")
		}
	}
	// A path that is not clean is sent to the clean one, with its method and body.
	a := w.do(http.MethodPost, "//v1/orders", tea, "Idempotency-Key", "k")
	require.Equal(t, http.StatusTemporaryRedirect, a.status)
	require.Equal(t, "/v1/orders", a.header.Get("Location"))
}

func TestReadiness(t *testing.T) {
	type degraded struct {
		error
		degradedMark
	}
	var calls int
	answers := map[string]error{"postgres": nil, "kafka": nil}
	w := newWorld(t, func(s *setup) {
		s.deps.Ready = func(ctx context.Context) map[string]error {
			calls++
			_, bounded := ctx.Deadline()
			require.True(t, bounded)
			return answers
		}
	})
	ask := func() (int, Health) {
		w.api.readiness.mu.Lock()
		w.api.readiness.at = time.Time{}
		w.api.readiness.mu.Unlock()
		a := w.do(http.MethodGet, "/readyz", "")
		var h Health
		require.NoError(t, json.Unmarshal(a.body, &h))
		require.Equal(t, a.status == http.StatusServiceUnavailable, a.header.Get("Retry-After") != "")
		return a.status, h
	}
	status, h := ask()
	require.Equal(t, http.StatusOK, status)
	require.Equal(t, Health{Status: HealthStatusOk, Checks: map[string]string{"postgres": "ok", "kafka": "ok"}}, h)

	answers["payment gateway"] = fmt.Errorf("gateway: %w", degraded{errors.New("breaker\r\nopen"), degradedMark{true}})
	status, h = ask()
	require.Equal(t, http.StatusOK, status, "the intake stays in the balancer")
	require.Equal(t, HealthStatusOk, h.Status)
	require.Equal(t, "degraded: gateway: breaker  open", h.Checks["payment gateway"])

	answers["payment gateway"] = degraded{errors.New("away"), degradedMark{false}}
	status, h = ask()
	require.Equal(t, http.StatusServiceUnavailable, status)
	require.Equal(t, "away", h.Checks["payment gateway"])
	answers["payment gateway"] = nil

	answers["postgres"] = awayError{}
	status, h = ask()
	require.Equal(t, http.StatusServiceUnavailable, status)
	require.Equal(t, HealthStatusUnavailable, h.Status)
	require.Equal(t, "dial tcp: connection refused", h.Checks["postgres"])
	require.Equal(t, "ok", h.Checks["kafka"])
	require.Equal(t, http.StatusOK, w.do(http.MethodGet, "/healthz", "").status)

	before := calls
	for range 10 {
		w.do(http.MethodGet, "/readyz", "")
	}
	require.LessOrEqual(t, calls, before+1, "a crowd pays for one round of checks")
}

type degradedMark struct{ is bool }

func (d degradedMark) Degraded() bool { return d.is }

func TestContractsAreServed(t *testing.T) {
	w := newWorld(t, func(s *setup) {
		s.deps.Schemas = fstest.MapFS{"json/place-order.schema.json": {Data: []byte(`{"type":"object"}`)}, "secret": {Data: []byte("x")}}
	})
	for path, want := range map[string]struct{ typ, body string }{
		"/openapi.yaml":                   {"application/yaml", string(readFile(t, "../../schemas/openapi.yaml"))},
		"/asyncapi.yaml":                  {"application/yaml", string(readFile(t, "../../schemas/asyncapi.yaml"))},
		"/json/place-order.schema.json":   {"application/json", `{"type":"object"}`},
		"/json/place%2Dorder.schema.json": {"application/json", `{"type":"object"}`},
	} {
		a := w.do(http.MethodGet, path, "")
		require.Equal(t, http.StatusOK, a.status, path)
		require.Equal(t, want.typ, a.header.Get("Content-Type"))
		require.Equal(t, want.body, string(a.body))
	}
	for _, path := range []string{"/json/x", "/json/..%2fsecret", "/json/%2e%2e%2fsecret", "/json/.", "/json/place-order.schema.json%00"} {
		a := w.do(http.MethodGet, path, "")
		require.NotContains(t, string(a.body), "x\n")
		require.Contains(t, []int{http.StatusNotFound, http.StatusTemporaryRedirect}, a.status, path)
	}
}

func TestClean(t *testing.T) {
	for in, want := range map[string]string{
		"plain ünïcode 注文 🫖":                      "plain ünïcode 注文 🫖",
		"a\r\nb\tc\x00\x1b[0m":                    "a  b c  [0m",
		"\u009b31m\u202e\u2066\u2028\ufeff\u00ad": strings.Repeat(" ", 1) + "31m" + strings.Repeat(" ", 5),
		"bad \xff utf8":                           "bad \ufffd utf8",
	} {
		require.Equal(t, want, clean(in, 100))
	}
	require.Equal(t, "abc…", clean("abcdefgh", 6))
	require.LessOrEqual(t, len(clean(strings.Repeat("ü", 100), 50)), 50)
	require.Equal(t, "…", clean("abcdefgh", 3))
	for _, s := range []string{"a\u200db", "نامه\u200cای", "TEA-1 ü"} {
		require.True(t, plain(s), "%q", s)
	}
	for _, s := range []string{"a\nb", "\x7f", "\u0085", "a\u202eb", "\xff", "\ufffd", "\u2029"} {
		require.False(t, plain(s), "%q", s)
	}
}

func FuzzClean(f *testing.F) {
	f.Add("a\r\n\x1b[31m\u202e", 7)
	f.Fuzz(func(t *testing.T, s string, n int) {
		n = min(max(n, 3), 1000)
		c := clean(s, n)
		require.LessOrEqual(t, len(c), n)
		require.Equal(t, c, clean(c, n), "once is enough")
		for _, r := range c {
			require.True(t, r == ' ' || unicode.IsPrint(r))
		}
	})
}

// TestKnownErrorsKeepTheirPlace: a refusal, wrapped as it may be, is no fault.
func TestKnownErrorsKeepTheirPlace(t *testing.T) {
	w := newWorld(t)
	for _, c := range []struct {
		err    error
		status int
		code   string
	}{
		{&domain.Refusal{Reason: domain.PriceChanged, Field: "/items/0", Detail: "it costs 5 now"}, 422, "price_changed"},
		{&domain.Refusal{Reason: domain.OutOfStock, Detail: "there is none"}, 422, "out_of_stock"},
		{saga.ErrKeyReused, 422, "key_reused"},
		{saga.ErrOrderExists, 409, "order_exists"},
		{saga.ErrNoSaga, 404, "not_found"},
		{&saga.OverloadedError{Why: "queue", After: 1500 * time.Millisecond, Full: true}, 429, "overloaded"},
		{&saga.OverloadedError{Why: "lag", After: 0}, 503, "overloaded"},
		{inFlightError{}, 409, "in_flight"},
	} {
		for _, err := range []error{c.err, fmt.Errorf("submit: %w", c.err)} {
			if errors.Is(err, saga.ErrNoSaga) {
				w.orders.err = err
				w.refused(w.do(http.MethodPost, "/v1/orders/"+uuid.NewString()+"/cancel", ""), c.status, c.code)
				continue
			}
			w.intake.fails(err)
			a := w.place("k", tea)
			w.refused(a, c.status, c.code)
			var full *saga.OverloadedError
			if errors.As(err, &full) {
				require.Equal(t, map[bool]string{true: "2", false: "1"}[full.Full], a.header.Get("Retry-After"))
			}
		}
	}
	require.Empty(t, w.logs.lines())
}
