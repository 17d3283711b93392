package telemetry

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net/url"
	"strings"
	"sync"
	"time"

	"github.com/exaring/otelpgx"
	"github.com/jackc/pgx/v5"
	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracehttp"
	"go.opentelemetry.io/otel/metric/noop"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/sdk/resource"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	semconv "go.opentelemetry.io/otel/semconv/v1.43.0"
	"go.opentelemetry.io/otel/trace"
	"go.uber.org/zap"

	"ordersaga/events"
)

// TracingConfig says where traces go.
type TracingConfig struct {
	Endpoint string  // http(s)://host:4318 of an OTLP collector; empty: traces are passed on and named in logs, but not exported
	Sample   float64 // share of new traces that are recorded, from 0 to 1; a trace that came sampled stays so
	Service  string  // empty: ordersaga
	Version  string
	Instance string      // tells copies of the service apart
	Log      *zap.Logger // hears of failed exports; nil: nobody does
}

// Bounds of what waits to be exported; beyond them spans are dropped.
const (
	maxQueuedSpans   = 4096
	maxExportSpans   = 512
	exportEvery      = 2 * time.Second
	exportTimeout    = 10 * time.Second
	exportRetryFor   = 30 * time.Second
	maxSpanAttribute = 1000 // bytes of one value
	maxSpanEvents    = 16
)

const instrumentation = "ordersaga"

// Tracing makes spans. It touches no global of OpenTelemetry but the handler of its own errors. Close it last.
type Tracing struct {
	provider   *sdktrace.TracerProvider
	tracer     trace.Tracer
	propagator propagation.TextMapPropagator
	root       sdktrace.Sampler // decides about traces that begin here
	exports    bool             // without, handlers are not traced: ids are passed on as they came
	giveUp     func()           // ends exports under way
	now        func() time.Time
}

// StartTracing sets tracing up. It makes no connection: a collector that is away costs spans, never the start.
func StartTracing(ctx context.Context, cfg TracingConfig) (*Tracing, error) {
	if cfg.Sample < 0 || cfg.Sample > 1 || math.IsNaN(cfg.Sample) {
		return nil, fmt.Errorf("telemetry: trace sample %v: give a share from 0 to 1", cfg.Sample)
	}
	if cfg.Log != nil {
		otel.SetErrorHandler(otel.ErrorHandlerFunc(func(err error) { cfg.Log.Warn("traces were not exported", zap.Error(err)) }))
	}
	if cfg.Endpoint == "" {
		return newTracing(cfg, nil), nil
	}
	target, err := endpoint(cfg.Endpoint)
	if err != nil {
		return nil, err
	}
	exporter, err := otlptracehttp.New(ctx, otlptracehttp.WithEndpointURL(target), otlptracehttp.WithTimeout(exportTimeout),
		otlptracehttp.WithCompression(otlptracehttp.GzipCompression),
		otlptracehttp.WithRetry(otlptracehttp.RetryConfig{Enabled: true, InitialInterval: time.Second, MaxInterval: exportTimeout, MaxElapsedTime: exportRetryFor}))
	if err != nil {
		return nil, fmt.Errorf("telemetry: trace exporter: %w", err)
	}
	clean := &cleanExporter{SpanExporter: exporter}
	t := newTracing(cfg, sdktrace.NewBatchSpanProcessor(clean, sdktrace.WithMaxQueueSize(maxQueuedSpans),
		sdktrace.WithMaxExportBatchSize(maxExportSpans), sdktrace.WithBatchTimeout(exportEvery), sdktrace.WithExportTimeout(exportTimeout+exportRetryFor)))
	t.giveUp = clean.giveUp
	return t, nil
}

// newTracing makes a Tracing that exports through p; nil: none.
func newTracing(cfg TracingConfig, p sdktrace.SpanProcessor) *Tracing {
	if cfg.Service == "" {
		cfg.Service = "ordersaga"
	}
	attrs := []attribute.KeyValue{semconv.ServiceName(cfg.Service)}
	if cfg.Version != "" {
		attrs = append(attrs, semconv.ServiceVersion(cfg.Version))
	}
	if cfg.Instance != "" {
		attrs = append(attrs, semconv.ServiceInstanceID(cfg.Instance))
	}
	sample := cfg.Sample
	if p == nil {
		sample = 0
	}
	limits := sdktrace.NewSpanLimits()
	limits.AttributeValueLengthLimit, limits.EventCountLimit, limits.LinkCountLimit = maxSpanAttribute, maxSpanEvents, maxSpanEvents
	root := linkedSampler{sdktrace.TraceIDRatioBased(sample)}
	options := []sdktrace.TracerProviderOption{
		sdktrace.WithResource(resource.NewWithAttributes(semconv.SchemaURL, attrs...)),
		sdktrace.WithSampler(sdktrace.ParentBased(root)),
		sdktrace.WithIDGenerator(idGenerator{}),
		sdktrace.WithRawSpanLimits(limits),
	}
	if p != nil {
		options = append(options, sdktrace.WithSpanProcessor(p))
	}
	t := &Tracing{provider: sdktrace.NewTracerProvider(options...), propagator: propagation.TraceContext{}, root: root, exports: p != nil, giveUp: func() {}, now: time.Now}
	t.tracer = t.provider.Tracer(instrumentation)
	return t
}

func endpoint(s string) (string, error) {
	u, err := url.Parse(s)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" {
		return "", fmt.Errorf("telemetry: trace endpoint %q: give a URL such as http://collector:4318", cleanText(s))
	}
	if u.Path == "" || u.Path == "/" {
		u.Path = "/v1/traces"
	}
	return u.String(), nil
}

// Close exports what waits, as long as ctx lasts, and stops. Spans that could not be exported by then are dropped.
func (t *Tracing) Close(ctx context.Context) error {
	stop := context.AfterFunc(ctx, t.giveUp)
	defer stop()
	// Not with ctx itself: the SDK would leave its goroutine behind.
	if err := t.provider.Shutdown(context.WithoutCancel(ctx)); err != nil {
		return fmt.Errorf("telemetry: %w", err)
	}
	return nil
}

// Provider makes tracers for libraries.
func (t *Tracing) Provider() trace.TracerProvider { return t.provider }

// Propagator reads and writes W3C Trace Context.
func (t *Tracing) Propagator() propagation.TextMapPropagator { return t.propagator }

// PgxTracer records statements of whoever is in a recorded trace already, that is of requests and operators; consumers and the relay,
// whose contexts have none, pay for one look. Statements come with their text, never with their parameters.
func (t *Tracing) PgxTracer() pgx.QueryTracer {
	return otelpgx.NewTracer(otelpgx.WithTracerProvider(t.provider), otelpgx.WithMeterProvider(noop.NewMeterProvider()),
		otelpgx.WithDisableConnectionDetailsInAttributes())
}

// linkedSampler decides about new traces: one that goes on from a recorded one, by a link, is recorded too.
type linkedSampler struct{ sdktrace.Sampler }

func (s linkedSampler) ShouldSample(p sdktrace.SamplingParameters) sdktrace.SamplingResult {
	for i := range p.Links {
		if p.Links[i].SpanContext.IsSampled() {
			return sdktrace.SamplingResult{Decision: sdktrace.RecordAndSample, Tracestate: trace.SpanContextFromContext(p.ParentContext).TraceState()}
		}
	}
	return s.Sampler.ShouldSample(p)
}

// TraceOf is the trace of a context, as messages carry it; zero if there is none.
func TraceOf(ctx context.Context) events.Trace { return traceOf(trace.SpanContextFromContext(ctx)) }

func traceOf(sc trace.SpanContext) events.Trace {
	if !sc.IsValid() {
		return events.Trace{}
	}
	return events.Trace{TraceID: sc.TraceID(), SpanID: sc.SpanID(), Flags: byte(sc.TraceFlags())}
}

// ContextOf is ctx in the trace of a message.
func ContextOf(ctx context.Context, t events.Trace) context.Context {
	if t.IsZero() {
		return ctx
	}
	return trace.ContextWithRemoteSpanContext(ctx, spanContext(t))
}

func spanContext(t events.Trace) trace.SpanContext {
	return trace.NewSpanContext(trace.SpanContextConfig{TraceID: t.TraceID, SpanID: t.SpanID, TraceFlags: trace.TraceFlags(t.Flags), Remote: true})
}

// cleanExporter holds F26 for spans: no control characters, no credentials, and nothing that says who the client is.
type cleanExporter struct {
	sdktrace.SpanExporter

	mu     sync.Mutex
	ended  bool
	cancel context.CancelFunc // of the export under way; the SDK makes one at a time
}

var errGivenUp = errors.New("telemetry: stopped before these spans were exported")

func (e *cleanExporter) ExportSpans(ctx context.Context, spans []sdktrace.ReadOnlySpan) error {
	out := make([]sdktrace.ReadOnlySpan, len(spans))
	for i, s := range spans {
		out[i] = cleanSpan{s}
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	e.mu.Lock()
	if e.ended {
		e.mu.Unlock()
		return errGivenUp
	}
	e.cancel = cancel
	e.mu.Unlock()
	return e.SpanExporter.ExportSpans(ctx, out)
}

func (e *cleanExporter) giveUp() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.ended = true
	if e.cancel != nil {
		e.cancel()
	}
}

type cleanSpan struct{ sdktrace.ReadOnlySpan }

func (s cleanSpan) Name() string { return cleanText(s.ReadOnlySpan.Name()) }
func (s cleanSpan) Attributes() []attribute.KeyValue {
	return cleanAttributes(s.ReadOnlySpan.Attributes())
}

func (s cleanSpan) Status() sdktrace.Status {
	st := s.ReadOnlySpan.Status()
	st.Description = cleanText(st.Description)
	return st
}

func (s cleanSpan) Events() []sdktrace.Event {
	evs := append([]sdktrace.Event(nil), s.ReadOnlySpan.Events()...)
	for i := range evs {
		evs[i].Name, evs[i].Attributes = cleanText(evs[i].Name), cleanAttributes(evs[i].Attributes)
	}
	return evs
}

// personal are attributes that say who a client is.
var personal = map[attribute.Key]bool{
	semconv.ClientAddressKey: true, semconv.ClientPortKey: true, semconv.NetworkPeerAddressKey: true, semconv.NetworkPeerPortKey: true,
	semconv.UserAgentOriginalKey: true, semconv.URLQueryKey: true,
}

func cleanAttributes(attrs []attribute.KeyValue) []attribute.KeyValue {
	out := make([]attribute.KeyValue, 0, len(attrs))
	for _, a := range attrs {
		switch {
		case personal[a.Key]:
		case secretKey(string(a.Key)):
			out = append(out, a.Key.String(masked))
		case a.Value.Type() == attribute.STRING:
			out = append(out, a.Key.String(cleanText(a.Value.AsString())))
		case a.Value.Type() == attribute.STRINGSLICE:
			list := a.Value.AsStringSlice()
			for i := range list {
				list[i] = cleanText(list[i])
			}
			out = append(out, a.Key.StringSlice(list))
		default:
			out = append(out, a)
		}
	}
	return out
}

// errorType is a span's error.type: how the error classifies by behaviour.
func errorType(err error) string {
	var away interface{ Outage() string }
	var poison interface{ Poison() bool }
	switch {
	case errors.As(err, &away) && away.Outage() != "":
		return "outage"
	case errors.As(err, &poison) && poison.Poison():
		return "poison"
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return "cancelled"
	default:
		return classTransient
	}
}

func spanNameOf(verb, what string) string { return strings.TrimSpace(verb + " " + what) }
