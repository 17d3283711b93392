package telemetry

import (
	"compress/gzip"
	"context"
	"io"
	"math"
	"net/http"
	"net/http/httptest"
	"sync"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"
	"go.opentelemetry.io/otel"
	collector "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	"go.uber.org/goleak"
	"google.golang.org/protobuf/proto"

	"ordersaga/events"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// statement makes a tracer see a statement with a parameter that is nobody's business.
func statement(ctx context.Context, q pgx.QueryTracer) {
	ctx = q.TraceQueryStart(ctx, nil, pgx.TraceQueryStartData{SQL: "SELECT id FROM orders WHERE email = $1", Args: []any{"person@example.com"}})
	q.TraceQueryEnd(ctx, nil, pgx.TraceQueryEndData{})
}

func TestSpansReachACollector(t *testing.T) {
	var mu sync.Mutex
	var got []*collector.ExportTraceServiceRequest
	var path string
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		z, err := gzip.NewReader(r.Body)
		if err != nil {
			w.WriteHeader(http.StatusBadRequest)
			return
		}
		b, err := io.ReadAll(z)
		req := new(collector.ExportTraceServiceRequest)
		if err == nil {
			err = proto.Unmarshal(b, req)
		}
		if err != nil {
			w.WriteHeader(http.StatusBadRequest)
			return
		}
		mu.Lock()
		defer mu.Unlock()
		path = r.URL.Path
		got = append(got, req)
		w.Header().Set("Content-Type", "application/x-protobuf")
	}))
	defer srv.Close()
	ctx := context.Background()
	tr, err := StartTracing(ctx, TracingConfig{Endpoint: srv.URL, Sample: 1, Version: "v1", Instance: "a/1"})
	require.NoError(t, err)
	one(t, tr, &fakeHandler{}, delivery(events.TReserveStock))
	require.NoError(t, tr.Close(ctx))
	mu.Lock()
	defer mu.Unlock()
	require.Equal(t, "/v1/traces", path)
	require.Len(t, got, 1)
	rs := got[0].GetResourceSpans()[0]
	names := map[string]string{}
	for _, a := range rs.GetResource().GetAttributes() {
		names[a.GetKey()] = a.GetValue().GetStringValue()
	}
	require.Equal(t, map[string]string{"service.name": "ordersaga", "service.version": "v1", "service.instance.id": "a/1"}, names)
	require.Equal(t, "process ReserveStock", rs.GetScopeSpans()[0].GetSpans()[0].GetName())
}

func TestACollectorThatIsAwayCostsSpansOnly(t *testing.T) {
	log, out := logTo(t, "debug", "json")
	defer otel.SetErrorHandler(otel.ErrorHandlerFunc(func(error) {}))
	asked := make(chan struct{}, 100)
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		asked <- struct{}{}
		w.WriteHeader(http.StatusServiceUnavailable) // tried again for half a minute
	}))
	defer srv.Close()
	tr, err := StartTracing(context.Background(), TracingConfig{Endpoint: srv.URL, Sample: 1, Log: log})
	require.NoError(t, err)
	for range maxExportSpans { // a full batch goes out at once
		one(t, tr, &fakeHandler{}, delivery(events.TReserveStock))
	}
	<-asked
	one(t, tr, &fakeHandler{}, delivery(events.TReserveStock))
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	_ = tr.Close(ctx) // returns at once, and leaves no goroutine behind
	require.Contains(t, out.String(), "traces were not exported")
}

func TestTracingConfigIsChecked(t *testing.T) {
	for _, s := range []float64{-0.1, 1.1, math.NaN()} {
		_, err := StartTracing(context.Background(), TracingConfig{Sample: s})
		require.ErrorContains(t, err, "from 0 to 1")
	}
	for _, e := range []string{"collector:4318", "ftp://collector", "http://", "http://a b", "\x1b"} {
		_, err := StartTracing(context.Background(), TracingConfig{Endpoint: e})
		require.ErrorContains(t, err, "such as http://collector:4318", e)
	}
	u, err := endpoint("https://c:4318/")
	require.NoError(t, err)
	require.Equal(t, "https://c:4318/v1/traces", u)
	u, err = endpoint("https://c/otlp/v1/traces")
	require.NoError(t, err)
	require.Equal(t, "https://c/otlp/v1/traces", u)
}
