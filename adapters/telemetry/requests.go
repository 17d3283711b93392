package telemetry

import (
	"context"
	"encoding/binary"
	"math/rand/v2"
	"net/http"
	"sync/atomic"

	"go.opentelemetry.io/otel/propagation"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"
)

// traceparent as net/http spells the header.
const traceparentHeader = "Traceparent"

// unrecorded answers the context of a request whose trace nobody records, with the span that it gets all the same: ids for logs and
// messages, under which nothing is kept. Nearly all requests are such, and all that otelhttp collects about a request is for the others: for
// those it answers false, and a context in which the trace that was decided about is begun.
func (t *Tracing) unrecorded(ctx context.Context, header http.Header) (context.Context, bool) {
	var parent trace.SpanContext
	if len(header[traceparentHeader]) > 0 {
		parent = trace.SpanContextFromContext(t.propagator.Extract(ctx, propagation.HeaderCarrier(header)))
	}
	if parent.IsSampled() {
		return ctx, false
	}
	span := trace.SpanContextConfig{TraceID: parent.TraceID(), SpanID: newSpanID(), TraceFlags: parent.TraceFlags(), TraceState: parent.TraceState()}
	if !parent.IsValid() {
		span.TraceID = newTraceID()
		if t.exports && t.root.ShouldSample(sdktrace.SamplingParameters{ParentContext: ctx, TraceID: span.TraceID}).Decision != sdktrace.Drop {
			return context.WithValue(ctx, drawnKey{}, &drawn{id: span.TraceID}), false
		}
	}
	return trace.ContextWithSpanContext(ctx, trace.NewSpanContext(span)), true
}

// drawn is the id of a trace that was decided about before its first span begins. It is good for one.
type drawn struct {
	id   trace.TraceID
	used atomic.Bool
}

type drawnKey struct{}

// idGenerator draws ids, as OpenTelemetry's own, and takes an id that was drawn already.
type idGenerator struct{}

// NewIDs implements sdktrace.IDGenerator.
func (idGenerator) NewIDs(ctx context.Context) (trace.TraceID, trace.SpanID) {
	if d, ok := ctx.Value(drawnKey{}).(*drawn); ok && d.used.CompareAndSwap(false, true) {
		return d.id, newSpanID()
	}
	return newTraceID(), newSpanID()
}

// NewSpanID implements sdktrace.IDGenerator.
func (idGenerator) NewSpanID(context.Context, trace.TraceID) trace.SpanID { return newSpanID() }

func newTraceID() (id trace.TraceID) {
	for !id.IsValid() {
		binary.NativeEndian.PutUint64(id[:8], rand.Uint64())
		binary.NativeEndian.PutUint64(id[8:], rand.Uint64())
	}
	return id
}

func newSpanID() (id trace.SpanID) {
	for !id.IsValid() {
		binary.NativeEndian.PutUint64(id[:], rand.Uint64())
	}
	return id
}
