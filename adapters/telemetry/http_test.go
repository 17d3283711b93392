package telemetry

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/stretchr/testify/require"
	"go.opentelemetry.io/otel/codes"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	"go.opentelemetry.io/otel/trace"
	"go.uber.org/zap"
)

type site struct {
	http.Handler
	m   *Metrics
	mux *http.ServeMux
}

func newSite(t *testing.T, tr *Tracing, log *zap.Logger) site {
	t.Helper()
	s := site{m: NewMetrics("v1"), mux: http.NewServeMux()}
	s.Handler = HTTPMiddleware(s.mux, func(r *http.Request) string { _, p := s.mux.Handler(r); return p }, tr, s.m, log)
	return s
}

func (s site) get(t *testing.T, method, path string) *httptest.ResponseRecorder {
	t.Helper()
	rec := httptest.NewRecorder()
	s.ServeHTTP(rec, httptest.NewRequest(method, path, http.NoBody))
	return rec
}

func TestF26_PathsNeverBecomeLabels(t *testing.T) {
	tr, exp := recording(t, 1)
	s := newSite(t, tr, zap.NewNop())
	s.mux.HandleFunc("GET /v1/orders/{id}", func(http.ResponseWriter, *http.Request) {})
	s.mux.HandleFunc("GET /healthz", func(http.ResponseWriter, *http.Request) {})
	for i := range 300 {
		s.get(t, http.MethodGet, fmt.Sprintf("/v1/orders/%d", i))
		s.get(t, http.MethodGet, fmt.Sprintf("/wp-admin/%d", i))
		s.get(t, fmt.Sprintf("EVIL%d", i), "/v1/orders/1")
		s.get(t, http.MethodGet, "/healthz")
	}
	for _, want := range [][3]string{{"/v1/orders/{id}", "GET", "2xx"}, {"unmatched", "GET", "4xx"}, {"unmatched", "_OTHER", "4xx"}, {"/healthz", "GET", "2xx"}} {
		require.InDelta(t, 300, testutil.ToFloat64(s.m.requests.WithLabelValues(want[:]...)), 0, want)
	}
	require.Equal(t, 4, testutil.CollectAndCount(s.m.requests))
	require.Zero(t, testutil.ToFloat64(s.m.inFlight))
	names := map[string]int{}
	for _, sp := range exp.GetSpans() {
		names[sp.Name]++
	}
	require.Equal(t, map[string]int{"GET /v1/orders/{id}": 300, "GET unmatched": 300, "_OTHER unmatched": 300}, names, "probes have none")
}

func TestRoutesAreBounded(t *testing.T) {
	tr, _ := recording(t, 0)
	m := NewMetrics("v1")
	h := HTTPMiddleware(http.NotFoundHandler(), func(r *http.Request) string { return r.URL.Path }, tr, m, zap.NewNop()) // a pattern function that is wrong
	for i := range 500 {
		h.ServeHTTP(httptest.NewRecorder(), httptest.NewRequest(http.MethodGet, fmt.Sprintf("/%d", i), http.NoBody))
	}
	require.Equal(t, maxRoutes+1, testutil.CollectAndCount(m.requests))
}

func TestAPanicIsAnAnswerAndALogLine(t *testing.T) {
	tr, exp := recording(t, 1)
	log, out := logTo(t, "info", "json")
	s := newSite(t, tr, log)
	s.mux.HandleFunc("GET /boom", func(http.ResponseWriter, *http.Request) { panic("bo\nom") })
	rec := s.get(t, http.MethodGet, "/boom")
	require.Equal(t, http.StatusInternalServerError, rec.Code)
	require.Equal(t, "application/problem+json", rec.Header().Get("Content-Type"))
	require.NotContains(t, rec.Body.String(), "om", "the panic is not the client's to read")
	got := lines(t, out)
	require.Len(t, got, 2, "the panic, and the request")
	require.Equal(t, "bo om", got[0]["error"])
	require.Contains(t, got[0]["stack"], "http_test.go")
	require.Equal(t, exp.GetSpans()[0].SpanContext.TraceID().String(), got[0]["trace_id"])
	require.Equal(t, codes.Error, exp.GetSpans()[0].Status.Code)
	require.InDelta(t, 1, testutil.ToFloat64(s.m.httpPanics.WithLabelValues("/boom")), 0)
	require.Zero(t, testutil.ToFloat64(s.m.inFlight))
}

func TestAPanicAfterTheAnswerBeganCutsTheConnection(t *testing.T) {
	tr, _ := recording(t, 0)
	log, out := logTo(t, "info", "json")
	s := newSite(t, tr, log)
	s.mux.HandleFunc("GET /half", func(w http.ResponseWriter, _ *http.Request) {
		_, _ = io.WriteString(w, "half")
		panic("boom")
	})
	s.mux.HandleFunc("GET /abort", func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) })
	for _, p := range []string{"/half", "/abort"} {
		require.PanicsWithValue(t, http.ErrAbortHandler, func() { s.get(t, http.MethodGet, p) })
		require.InDelta(t, 1, testutil.ToFloat64(s.m.requests.WithLabelValues(p, "GET", "aborted")), 0)
	}
	require.Len(t, lines(t, out), 1, "an abort is meant")
}

func TestStreamsCanFlush(t *testing.T) {
	tr, _ := recording(t, 1)
	s := newSite(t, tr, zap.NewNop())
	more := make(chan struct{})
	s.mux.HandleFunc("GET /stream", func(w http.ResponseWriter, _ *http.Request) {
		_, _ = io.WriteString(w, "first\n")
		if http.NewResponseController(w).Flush() != nil {
			return
		}
		<-more
		_, _ = io.WriteString(w, "second\n")
		if f, ok := w.(http.Flusher); ok {
			f.Flush()
		}
	})
	srv := httptest.NewServer(s)
	defer srv.Close()
	req, err := http.NewRequestWithContext(context.Background(), http.MethodGet, srv.URL+"/stream", http.NoBody)
	require.NoError(t, err)
	resp, err := srv.Client().Do(req)
	require.NoError(t, err)
	defer resp.Body.Close()
	r := bufio.NewReader(resp.Body)
	line, err := r.ReadString('\n')
	require.NoError(t, err)
	require.Equal(t, "first\n", line)
	close(more)
	line, err = r.ReadString('\n')
	require.NoError(t, err)
	require.Equal(t, "second\n", line)
}

func TestRequestsAreLoggedByWorth(t *testing.T) {
	tr, _ := recording(t, 0)
	log, out := logTo(t, "debug", "json")
	s := newSite(t, tr, log)
	s.mux.HandleFunc("GET /ok", func(http.ResponseWriter, *http.Request) {})
	s.mux.HandleFunc("GET /bad", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusBadGateway) })
	s.mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusServiceUnavailable) })
	for _, p := range []string{"/ok", "/bad", "/readyz"} {
		s.get(t, http.MethodGet, p)
	}
	got := lines(t, out)
	require.Len(t, got, 3)
	require.Equal(t, "debug", got[0]["level"])
	require.Equal(t, "info", got[1]["level"])
	require.Equal(t, "debug", got[2]["level"], "what machines ask every few seconds")
	require.Len(t, got[0]["trace_id"], 32, "also where nothing is recorded")
	require.InDelta(t, 502, got[1]["status"], 0)
}

func TestSlowBucketsPointToTraces(t *testing.T) {
	tr, exp := recording(t, 1)
	s := newSite(t, tr, zap.NewNop())
	s.mux.HandleFunc("GET /ok", func(http.ResponseWriter, *http.Request) {})
	s.get(t, http.MethodGet, "/ok")
	req := httptest.NewRequest(http.MethodGet, "/metrics", http.NoBody)
	req.Header.Set("Accept", "application/openmetrics-text; version=1.0.0")
	rec := httptest.NewRecorder()
	s.m.Handler().ServeHTTP(rec, req)
	require.Contains(t, rec.Body.String(), `# {trace_id="`+exp.GetSpans()[0].SpanContext.TraceID().String()+`"}`)
	require.True(t, strings.HasSuffix(rec.Body.String(), "# EOF\n"))
}

// request sends a request with headers and answers the trace that the handler saw.
func (s site) request(t *testing.T, header ...string) trace.SpanContext {
	t.Helper()
	var seen trace.SpanContext
	s.mux.HandleFunc("POST /"+t.Name(), func(_ http.ResponseWriter, r *http.Request) { seen = trace.SpanContextFromContext(r.Context()) })
	r := httptest.NewRequest(http.MethodPost, "/"+t.Name(), http.NoBody)
	for i := 0; i < len(header); i += 2 {
		r.Header.Set(header[i], header[i+1])
	}
	s.ServeHTTP(httptest.NewRecorder(), r)
	return seen
}

func TestRequestsThatAreNotRecordedHaveATraceAllTheSame(t *testing.T) {
	const id = "4bf92f3577b34da6a3ce929d0e0e4736"
	for name, c := range map[string]struct {
		sample   float64
		parent   string
		recorded bool
	}{
		"none of ours":         {0, "", false},
		"all of ours":          {1, "", true},
		"a sampled parent":     {0, "00-" + id + "-00f067aa0ba902b7-01", true},
		"a parent that is not": {1, "00-" + id + "-00f067aa0ba902b7-00", false},
		"no parent at all":     {1, "garbage", true},
	} {
		t.Run(strings.ReplaceAll(name, " ", "-"), func(t *testing.T) {
			tr, exp := recording(t, c.sample)
			headers := []string{"Tracestate", "vendor=1"}
			if c.parent != "" {
				headers = append(headers, "Traceparent", c.parent)
			}
			sc := newSite(t, tr, zap.NewNop()).request(t, headers...)
			require.True(t, sc.IsValid())
			require.False(t, sc.IsRemote(), "a span of its own")
			require.Equal(t, c.recorded, sc.IsSampled())
			if strings.Contains(c.parent, id) {
				require.Equal(t, id, sc.TraceID().String())
				require.NotEqual(t, "00f067aa0ba902b7", sc.SpanID().String())
				require.Equal(t, "vendor=1", sc.TraceState().String())
			}
			require.Equal(t, c.recorded, len(exp.GetSpans()) == 1)
			if c.recorded {
				require.Equal(t, sc.SpanID(), exp.GetSpans()[0].SpanContext.SpanID())
			}
		})
	}
}

func TestAShareOfTheRequestsIsRecorded(t *testing.T) {
	tr, exp := recording(t, 0.25)
	s := newSite(t, tr, zap.NewNop())
	s.mux.HandleFunc("GET /ok", func(http.ResponseWriter, *http.Request) {})
	const n = 4000
	for range n {
		s.get(t, http.MethodGet, "/ok")
	}
	spans := exp.GetSpans()
	require.InDelta(t, n/4, len(spans), n/20)
	ids := map[trace.TraceID]bool{}
	for i := range spans {
		ids[spans[i].SpanContext.TraceID()] = true
	}
	require.Len(t, ids, len(spans), "each has a trace of its own")
}

// BenchmarkHTTPMiddleware is what a request pays for telemetry that nobody records: no exporter, and one that samples one in ten thousand.
func BenchmarkHTTPMiddleware(b *testing.B) {
	for name, sample := range map[string]float64{"no exporter": -1, "not sampled": 1e-9} {
		b.Run(name, func(b *testing.B) {
			tr := newTracing(TracingConfig{}, nil)
			if sample > 0 {
				tr = newTracing(TracingConfig{Sample: sample}, sdktrace.NewSimpleSpanProcessor(tracetest.NewInMemoryExporter()))
			}
			h := HTTPMiddleware(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusAccepted) }),
				func(*http.Request) string { return "POST /v1/orders" }, tr, NewMetrics("v1"), zap.NewNop())
			r := httptest.NewRequest(http.MethodPost, "/v1/orders", strings.NewReader("{}"))
			r.Header.Set("Content-Type", "application/json")
			w := httptest.NewRecorder()
			b.ReportAllocs()
			for b.Loop() {
				h.ServeHTTP(w, r)
			}
		})
	}
}
