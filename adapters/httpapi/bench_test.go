package httpapi

import (
	"context"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"ordersaga/domain"
	"ordersaga/saga"
)

// instant accepts whatever comes, at no cost of its own.
type instant struct{ res saga.Accepted }

func (i instant) Submit(context.Context, *saga.Submission) (saga.Accepted, error) { return i.res, nil }

// sink is a ResponseWriter that keeps nothing.
type sink struct {
	header http.Header
	status int
}

func (s *sink) Header() http.Header         { return s.header }
func (s *sink) WriteHeader(status int)      { s.status = status }
func (s *sink) Write(b []byte) (int, error) { return len(b), nil }

// maxPlaceAllocs bounds what the interface itself allocates for one order: a change that makes a request dearer shows.
const maxPlaceAllocs = 35

func placeHandler(tb testing.TB) (a *API, token string) {
	tb.Helper()
	b := issue(tb, "shop", RoleClient)
	o := &domain.Order{ID: domain.NewOrderID(), Status: domain.Pending, Total: domain.Money{Minor: 900, Currency: "EUR"}}
	return New(Config{MaxBody: 64 << 10, MaxWait: time.Second, MaxStreams: 8}, book(tb, b), Limits{Rate: 1e9, Burst: 1e9}, Deps{
		Intake: instant{saga.Accepted{Order: o.ID, Answer: accepted(o)}}, Hub: NewHub(), Log: slog.New(slog.DiscardHandler), Metrics: http.NotFoundHandler(),
	}), b.token
}

func placeRequest(token string) (*http.Request, *strings.Reader) {
	body := strings.NewReader(tea)
	r := httptest.NewRequestWithContext(context.Background(), http.MethodPost, "/v1/orders", body)
	r.Header.Set("Authorization", "Bearer "+token)
	r.Header.Set("Idempotency-Key", "7f3c2a")
	r.Header.Set("Content-Type", "application/json")
	return r, body
}

// BenchmarkPlaceOrder is what the interface adds to an order: routing, token, rate, decoding, answer; not net/http's connection.
func BenchmarkPlaceOrder(b *testing.B) {
	a, token := placeHandler(b)
	r, body := placeRequest(token)
	w := &sink{header: http.Header{}}
	b.ReportAllocs()
	for b.Loop() {
		body.Reset(tea)
		r.Body = io.NopCloser(body)
		clear(w.header)
		a.ServeHTTP(w, r)
	}
	require.Equal(b, http.StatusAccepted, w.status)
}

// BenchmarkDecodeDraft is the part of it that reads the body.
func BenchmarkDecodeDraft(b *testing.B) {
	raw := []byte(tea)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := decodeDraft(raw); err != nil {
			b.Fatal(err)
		}
	}
}

func TestPlaceOrderAllocations(t *testing.T) {
	a, token := placeHandler(t)
	r, body := placeRequest(token)
	w := &sink{header: http.Header{}}
	n := testing.AllocsPerRun(200, func() {
		body.Reset(tea)
		r.Body = io.NopCloser(body)
		clear(w.header)
		a.ServeHTTP(w, r)
	})
	require.Equal(t, http.StatusAccepted, w.status)
	require.LessOrEqual(t, n, float64(maxPlaceAllocs))
}
