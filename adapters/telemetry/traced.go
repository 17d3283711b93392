package telemetry

import (
	"context"
	"errors"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.opentelemetry.io/contrib/instrumentation/net/http/otelhttp"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/metric/noop"
	"go.opentelemetry.io/otel/propagation"
	semconv "go.opentelemetry.io/otel/semconv/v1.43.0"
	"go.opentelemetry.io/otel/trace"

	"ordersaga/consumers"
	"ordersaga/events"
)

// linkAfter is the age of a failure from which a retry copy begins a trace of its own, linked to the first: by then collectors have
// closed that one. So does whatever an operator sends again.
const linkAfter = time.Minute

// Traced is h, with a span for every delivery whose trace is recorded. The delivery's Trace becomes that span, so that what the handler
// emits for it continues it. A delivery without any trace, from a producer that sends none, begins one. For those that are not recorded
// it costs a comparison each.
//
// A span covers one try: from Prepare to the result of Apply. A try whose transaction ran again has one for each run. A delivery that
// turns out to be a duplicate, between the two, has none.
func Traced[T any](h consumers.Handler[T], t *Tracing) consumers.Handler[T] { return &traced[T]{h, t} }

type traced[T any] struct {
	next consumers.Handler[T]
	t    *Tracing
}

func (h *traced[T]) Prepare(ctx context.Context, batch []*consumers.Delivery) (consumers.Apply[T], error) {
	if !slices.ContainsFunc(batch, h.wanted) {
		return h.next.Prepare(ctx, batch)
	}
	return h.prepare(ctx, batch)
}

// Foresee passes on what the handler knows; one that knows nothing names nothing.
func (h *traced[T]) Foresee(tx T, batch []*consumers.Delivery) {
	if f, ok := h.next.(consumers.Foresight[T]); ok {
		f.Foresee(tx, batch)
	}
}

// Start passes on to a handler that can; a delivery that was started has its span when it comes.
func (h *traced[T]) Start(ctx context.Context, tx T, batch []*consumers.Delivery) error {
	if s, ok := h.next.(consumers.Starter[T]); ok {
		return s.Start(ctx, tx, batch)
	}
	return nil
}

func (h *traced[T]) wanted(d *consumers.Delivery) bool {
	return d.Trace.IsZero() || d.Trace.Sampled() && h.t.exports
}

func (h *traced[T]) prepare(ctx context.Context, batch []*consumers.Delivery) (consumers.Apply[T], error) {
	open := &tries{t: h.t, by: map[*consumers.Delivery]*try{}}
	for _, d := range batch {
		if h.wanted(d) {
			open.start(ctx, d)
		}
	}
	ended := errPanicked
	defer func() {
		if ended != nil {
			open.abandon(ended)
		}
	}()
	apply, err := h.next.Prepare(open.context(ctx), batch)
	switch ended = err; {
	case err != nil:
		return nil, err
	case apply == nil:
		ended = errNoApply
		return nil, nil // the runtime says what is wrong with the handler
	}
	return func(ctx context.Context, tx T, batch []*consumers.Delivery) ([]consumers.Result, error) {
		return applyTraced(ctx, tx, batch, apply, open)
	}, nil
}

var (
	errPanicked = errors.New("the handler panicked")
	errNoApply  = errors.New("the handler answered no Apply")
)

func applyTraced[T any](ctx context.Context, tx T, batch []*consumers.Delivery, apply consumers.Apply[T], open *tries) (results []consumers.Result, err error) {
	open.again(ctx, batch)
	ended := errPanicked
	defer func() { open.end(batch, results, ended) }()
	results, err = apply(ctx, tx, batch)
	ended = err
	return results, err
}

// try is one delivery under way.
type try struct {
	span   trace.Span
	origin events.Trace // what the delivery came with
	ended  bool
}

// tries are the recorded ones of a batch. The runtime calls Prepare and its Apply one after the other, so there is no lock.
type tries struct {
	t  *Tracing
	by map[*consumers.Delivery]*try
}

func (o *tries) start(ctx context.Context, d *consumers.Delivery) {
	origin := d.Trace
	span := o.t.startSpan(ctx, d, origin)
	d.Trace = traceOf(span.SpanContext())
	if !span.IsRecording() { // a new trace that is not sampled: it has a name, and that is all
		span.End()
		return
	}
	if origin.IsZero() {
		origin = d.Trace
	}
	o.by[d] = &try{span: span, origin: origin}
}

func (t *Tracing) startSpan(ctx context.Context, d *consumers.Delivery, parent events.Trace) trace.Span {
	options := []trace.SpanStartOption{trace.WithSpanKind(trace.SpanKindConsumer), trace.WithAttributes(deliveryAttributes(d)...)}
	switch {
	case parent.IsZero():
		options = append(options, trace.WithNewRoot())
	case d.Replay || !d.First.IsZero() && t.now().Sub(d.First) > linkAfter:
		options = append(options, trace.WithNewRoot(), trace.WithLinks(trace.Link{SpanContext: spanContext(parent)}))
	default:
		ctx = ContextOf(ctx, parent)
	}
	_, span := t.tracer.Start(ctx, spanNameOf("process", typeName(d)), options...) //nolint:spancheck // try.end ends it
	return span                                                                    //nolint:spancheck // as above
}

// typeName is bounded like a label: a span's name is one, to whoever stores them.
func typeName(d *consumers.Delivery) string {
	if d.Data == nil {
		if _, ok := events.TypeOf(d.Type); !ok {
			return "unknown"
		}
	}
	return label(string(d.Type))
}

func deliveryAttributes(d *consumers.Delivery) []attribute.KeyValue {
	attrs := []attribute.KeyValue{
		semconv.MessagingSystemKafka,
		semconv.MessagingOperationTypeProcess,
		semconv.MessagingOperationName("process"),
		semconv.MessagingDestinationName(string(d.Record.Topic)),
		semconv.MessagingDestinationPartitionID(strconv.Itoa(int(d.Record.Partition))),
		semconv.MessagingConsumerGroupName(string(d.Group)),
		semconv.MessagingMessageID(d.ID.String()),
		attribute.String("ordersaga.message.type", string(d.Type)),
		attribute.String("ordersaga.order.id", d.OrderID.String()),
		attribute.Int("ordersaga.attempt", d.Attempt),
	}
	if d.Record.Offset == consumers.EarlyOffset {
		attrs = append(attrs, attribute.Bool("ordersaga.early", true))
	} else {
		attrs = append(attrs, semconv.MessagingKafkaOffset(int(d.Record.Offset)))
	}
	if d.Replay {
		attrs = append(attrs, attribute.Bool("ordersaga.replay", true))
	}
	return attrs
}

// again begins new spans for those of batch whose last one has ended: their transaction runs once more.
func (o *tries) again(ctx context.Context, batch []*consumers.Delivery) {
	for _, d := range batch {
		if y := o.by[d]; y != nil && y.ended {
			y.span, y.ended = o.t.startSpan(ctx, d, y.origin), false
			d.Trace = traceOf(y.span.SpanContext())
		}
	}
}

func (o *tries) end(batch []*consumers.Delivery, results []consumers.Result, err error) {
	for i, d := range batch {
		y := o.by[d]
		if y == nil {
			continue
		}
		failed := err
		if failed == nil && i < len(results) {
			failed = results[i].Err
		}
		y.end(d, failed)
	}
}

// abandon ends all: there will be no Apply.
func (o *tries) abandon(err error) {
	for d, y := range o.by {
		y.end(d, err)
	}
}

func (y *try) end(d *consumers.Delivery, err error) {
	if err != nil {
		d.Trace = y.origin // the next try is this one's sibling, not its child
		y.span.SetAttributes(semconv.ErrorTypeKey.String(errorType(err)))
		y.span.SetStatus(codes.Error, consumers.CleanText(err.Error(), consumers.MaxErrorBytes))
	}
	y.ended = true
	y.span.End()
}

// ordersKey is under which a context holds the spans of a batch by order, for the calls that are made for its deliveries.
type ordersKey struct{}

type spansByOrder map[string]trace.SpanContext

func (o *tries) context(ctx context.Context) context.Context {
	if len(o.by) == 0 {
		return ctx
	}
	by := make(spansByOrder, len(o.by))
	for d, y := range o.by {
		by[d.OrderID.String()] = y.span.SpanContext()
	}
	return context.WithValue(ctx, ordersKey{}, by)
}

// Transport records the calls to the payment gateway that are made for recorded deliveries: found by the order in the call's
// Idempotency-Key (<order>/<step>/<n>), or, where a batch has one recorded delivery only, by that. Trace ids are not sent to the gateway.
func (t *Tracing) Transport(next http.RoundTripper) http.RoundTripper {
	recorded := otelhttp.NewTransport(next, otelhttp.WithTracerProvider(t.provider), otelhttp.WithMeterProvider(noop.NewMeterProvider()),
		otelhttp.WithPropagators(propagation.NewCompositeTextMapPropagator()),
		otelhttp.WithSpanNameFormatter(func(_ string, r *http.Request) string { return spanNameOf(r.Method, "payment gateway") }))
	return &callTransport{next, recorded}
}

type callTransport struct{ next, recorded http.RoundTripper }

func (c *callTransport) RoundTrip(r *http.Request) (*http.Response, error) {
	ctx := r.Context()
	by, _ := ctx.Value(ordersKey{}).(spansByOrder)
	if len(by) == 0 {
		if trace.SpanFromContext(ctx).IsRecording() {
			return c.recorded.RoundTrip(r) //nolint:wrapcheck // a transport hands errors on
		}
		return c.next.RoundTrip(r) //nolint:wrapcheck // a transport hands errors on
	}
	order, _, _ := strings.Cut(r.Header.Get("Idempotency-Key"), "/")
	sc, ok := by[order]
	if !ok && len(by) == 1 && order == "" {
		for _, sc = range by {
			ok = true
		}
	}
	if !ok {
		return c.next.RoundTrip(r) //nolint:wrapcheck // a transport hands errors on
	}
	return c.recorded.RoundTrip(r.WithContext(trace.ContextWithSpanContext(ctx, sc))) //nolint:wrapcheck // a transport hands errors on
}
