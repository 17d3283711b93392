package telemetry

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"runtime/debug"
	"strings"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"
	"go.opentelemetry.io/contrib/instrumentation/net/http/otelhttp"
	"go.opentelemetry.io/otel/metric/noop"
	semconv "go.opentelemetry.io/otel/semconv/v1.43.0"
	"go.opentelemetry.io/otel/trace"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

const (
	maxRoutes = 100
	// slowRequest is from when an answered request is worth a line at info. Streams and waits are slow on purpose.
	slowRequest = 2 * time.Second
	maxStack    = 8 << 10 // bytes of a panic's stack in the log
	unmatched   = "unmatched"
)

type httpMetrics struct {
	requests   *prometheus.CounterVec
	answering  *prometheus.HistogramVec
	inFlight   prometheus.Gauge
	httpPanics *prometheus.CounterVec
	routes     *labels
	byRoute    *memo[route, routeMetrics] // bounded as routes are
}

// routeMetrics are those of one route, found once: looking them up by their labels costs more than counting.
type routeMetrics struct {
	route
	answering prometheus.Observer
	requests  *prometheus.CounterVec
	classes   [len(classes)]atomic.Pointer[prometheus.Counter] // nil until there is one
}

// classes are the values of the label status, by the first digit of the status.
var classes = [...]string{"aborted", "1xx", "2xx", "3xx", "4xx", "5xx", "6xx", "7xx", "8xx", "9xx"}

const classAborted = 0

func (m *httpMetrics) ofRoute(rt route) *routeMetrics {
	return m.byRoute.of(rt, func() *routeMetrics {
		return &routeMetrics{route: rt, answering: m.answering.WithLabelValues(rt.path, rt.method), requests: m.requests}
	})
}

func (m *routeMetrics) answered(class int) prometheus.Counter {
	if c := m.classes[class].Load(); c != nil {
		return *c
	}
	c := m.requests.WithLabelValues(m.path, m.method, classes[class])
	m.classes[class].Store(&c)
	return c
}

func newHTTPMetrics(f promauto.Factory) httpMetrics {
	const s = "http"
	return httpMetrics{
		requests:   counter(f, s, "requests_total", "Requests answered.", "route", "method", "status"),
		answering:  histogram(f, s, "request_duration_seconds", "A request until its answer was written; streams and waits included.", quick, "route", "method"),
		inFlight:   gauge(f, s, "requests_in_flight", "Requests and streams being answered.").WithLabelValues(),
		httpPanics: counter(f, s, "panics_total", "Panics that reached the middleware.", "route"),
		routes:     newLabels(maxRoutes),
		byRoute:    newMemo[route, routeMetrics](),
	}
}

// HTTPMiddleware is next with a span, metrics and a log line for each request, and an end to panics. pattern answers the mux's pattern
// for a request ("POST /v1/orders"; empty if none matches), such as the second result of http.ServeMux.Handler; labels and span names
// are made of it, never of the path. Requests for health and metrics have no span.
func HTTPMiddleware(next http.Handler, pattern func(*http.Request) string, t *Tracing, m *Metrics, log *zap.Logger) http.Handler {
	h := &middleware{next: next, m: m, log: log.WithOptions(zap.AddStacktrace(zapcore.FatalLevel), zap.WithCaller(false))}
	recorded := otelhttp.NewHandler(http.HandlerFunc(h.recorded), "", otelhttp.WithTracerProvider(t.provider), otelhttp.WithMeterProvider(noop.NewMeterProvider()),
		otelhttp.WithPropagators(t.propagator), otelhttp.WithSpanNameFormatter(func(_ string, r *http.Request) string { return routeFrom(r.Context()).span() }))
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		rt := route{method: methodLabel(r.Method), path: m.routes.of(pathOf(pattern(r)))}
		if probes[rt.path] {
			h.answer(w, r, rt)
			return
		}
		ctx, unrecorded := t.unrecorded(r.Context(), r.Header)
		if unrecorded {
			h.answer(w, r.WithContext(ctx), rt)
			return
		}
		recorded.ServeHTTP(w, r.WithContext(context.WithValue(ctx, routeKey{}, rt)))
	})
}

// probes are asked every few seconds by machines.
var probes = map[string]bool{"/healthz": true, "/readyz": true, "/metrics": true}

type routeKey struct{}

// route is where a request goes, in words of a bounded set.
type route struct{ method, path string }

func (r route) span() string { return r.method + " " + r.path }

func routeFrom(ctx context.Context) route {
	r, _ := ctx.Value(routeKey{}).(route)
	return r
}

// pathOf takes the method off a pattern.
func pathOf(pattern string) string {
	if pattern == "" {
		return unmatched
	}
	if _, path, found := strings.Cut(pattern, " "); found {
		return path
	}
	return pattern
}

func methodLabel(m string) string {
	switch m {
	case http.MethodGet, http.MethodHead, http.MethodPost, http.MethodPut, http.MethodPatch, http.MethodDelete, http.MethodOptions:
		return m
	default:
		return "_OTHER" // as OpenTelemetry calls it
	}
}

type middleware struct {
	next http.Handler
	m    *Metrics
	log  *zap.Logger
}

// recorded answers a request whose span is kept.
func (h *middleware) recorded(w http.ResponseWriter, r *http.Request) {
	rt := routeFrom(r.Context())
	trace.SpanFromContext(r.Context()).SetAttributes(semconv.HTTPRoute(rt.path))
	h.answer(w, r, rt)
}

func (h *middleware) answer(w http.ResponseWriter, r *http.Request, rt route) {
	begun := time.Now()
	h.m.inFlight.Inc()
	sw := &statusWriter{ResponseWriter: w}
	var aborted bool
	func() {
		defer func() {
			if v := recover(); v != nil {
				aborted = h.panicked(sw, r, rt, v)
			}
		}()
		h.next.ServeHTTP(sw, r)
	}()
	h.m.inFlight.Dec()
	h.count(r.Context(), rt, sw.code(), time.Since(begun), aborted)
	if aborted {
		panic(http.ErrAbortHandler) // the connection is to be cut: the client must not take a part for the whole
	}
}

// panicked logs a panic and answers 500 if nothing was written yet; it reports that the connection must be cut.
func (h *middleware) panicked(w *statusWriter, r *http.Request, rt route, v any) (abort bool) {
	if err, ok := v.(error); ok && errors.Is(err, http.ErrAbortHandler) {
		return true
	}
	h.m.httpPanics.WithLabelValues(rt.path).Inc()
	stack := debug.Stack()
	h.log.Error("panic while answering a request", append(TraceFields(r.Context()), zap.String("route", rt.path), zap.String("method", rt.method),
		zap.String("error", fmt.Sprint(v)), zap.String("stack", string(stack[:min(len(stack), maxStack)])))...)
	if w.status != 0 {
		return true
	}
	w.Header().Set("Content-Type", "application/problem+json")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(http.StatusInternalServerError)
	_, _ = w.Write([]byte(`{"type":"urn:ordersaga:problem:internal","title":"Internal error","status":500,"code":"internal"}` + "\n")) // the client is gone if it fails
	return false
}

func (h *middleware) count(ctx context.Context, rt route, status int, took time.Duration, aborted bool) {
	class := min(max(status/100, 1), len(classes)-1)
	if aborted {
		class = classAborted
	}
	m := h.m.ofRoute(rt)
	m.answered(class).Inc()
	observe(ctx, m.answering, took)
	level := zapcore.DebugLevel
	if !probes[rt.path] && (status >= http.StatusInternalServerError || took > slowRequest) {
		level = zapcore.InfoLevel
	}
	if ce := h.log.Check(level, "request"); ce != nil {
		ce.Write(append(TraceFields(ctx), zap.String("route", rt.path), zap.String("method", rt.method), zap.Int("status", status), zap.Duration("took", took))...)
	}
}

// observe adds an exemplar where the trace is recorded: from a slow bucket to the trace that fell into it.
func observe(ctx context.Context, o prometheus.Observer, took time.Duration) {
	if sc := trace.SpanContextFromContext(ctx); sc.IsSampled() {
		if e, ok := o.(prometheus.ExemplarObserver); ok {
			e.ObserveWithExemplar(took.Seconds(), prometheus.Labels{traceKey: sc.TraceID().String()})
			return
		}
	}
	o.Observe(took.Seconds())
}

// statusWriter remembers the status. http.ResponseController reaches what it wraps.
type statusWriter struct {
	http.ResponseWriter
	status int
}

func (w *statusWriter) WriteHeader(status int) {
	if w.status == 0 && status >= http.StatusOK || status == http.StatusSwitchingProtocols {
		w.status = status
	}
	w.ResponseWriter.WriteHeader(status)
}

func (w *statusWriter) Write(b []byte) (int, error) {
	if w.status == 0 {
		w.status = http.StatusOK
	}
	return w.ResponseWriter.Write(b)
}

// Flush makes it an http.Flusher, for handlers that ask for one.
func (w *statusWriter) Flush() {
	if w.status == 0 {
		w.status = http.StatusOK
	}
	_ = http.NewResponseController(w.ResponseWriter).Flush() // as an http.Flusher: there is nobody to tell
}

// Unwrap is http.ResponseController's. A flush through it that comes before any write leaves the status at 200.
func (w *statusWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

func (w *statusWriter) code() int {
	if w.status == 0 {
		return http.StatusOK
	}
	return w.status
}
