package telemetry

import (
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	"go.opentelemetry.io/otel/trace"
	"go.uber.org/zap"

	"ordersaga/consumers"
	"ordersaga/events"
	"ordersaga/outbox"
)

// recording is a Tracing whose spans are kept in memory.
func recording(t *testing.T, sample float64) (*Tracing, *tracetest.InMemoryExporter) {
	t.Helper()
	exp := tracetest.NewInMemoryExporter()
	tr := newTracing(TracingConfig{Sample: sample}, sdktrace.NewSimpleSpanProcessor(exp))
	t.Cleanup(func() { require.NoError(t, tr.Close(context.Background())) })
	return tr, exp
}

func attrs(s tracetest.SpanStub) map[string]string {
	out := map[string]string{}
	for _, a := range s.Attributes {
		out[string(a.Key)] = a.Value.String()
	}
	return out
}

// fakeHandler answers what it is told, and keeps the traces that it saw.
type fakeHandler struct {
	prepare func(ctx context.Context, batch []*consumers.Delivery) error
	result  func(d *consumers.Delivery) consumers.Result
	apply   error
	seen    []events.Trace
}

func (h *fakeHandler) Prepare(ctx context.Context, batch []*consumers.Delivery) (consumers.Apply[*consumers.MemoryTx], error) {
	if h.prepare != nil {
		if err := h.prepare(ctx, batch); err != nil {
			return nil, err
		}
	}
	return func(_ context.Context, _ *consumers.MemoryTx, batch []*consumers.Delivery) ([]consumers.Result, error) {
		out := make([]consumers.Result, len(batch))
		for i, d := range batch {
			h.seen = append(h.seen, d.Trace)
			if h.result != nil {
				out[i] = h.result(d)
			}
		}
		return out, h.apply
	}, nil
}

func reply(d *consumers.Delivery) consumers.Result {
	return consumers.Result{Out: []events.Envelope{{ID: events.NewID(), Type: events.TStockReserved, OrderID: d.OrderID, Trace: d.Trace, Data: &events.StockReserved{}}}}
}

// A trace crosses HTTP, the outbox row, the record's headers, a handler, its reply and the reply's handler, under one id.
func TestATraceCrossesEverything(t *testing.T) {
	tr, exp := recording(t, 0)
	m := NewMetrics("v1")
	var row outbox.Message
	mux := http.NewServeMux()
	mux.HandleFunc("POST /v1/orders/{id}", func(w http.ResponseWriter, r *http.Request) {
		var err error
		row, err = outbox.FromEnvelope(events.Envelope{
			ID: events.NewID(), Type: events.TReserveStock, OrderID: uuid.Must(uuid.NewV7()), Trace: TraceOf(r.Context()), Data: &events.ReserveStock{},
		})
		if err == nil {
			w.WriteHeader(http.StatusAccepted)
		}
	})
	h := HTTPMiddleware(mux, func(r *http.Request) string { _, p := mux.Handler(r); return p }, tr, m, zap.NewNop())
	req := httptest.NewRequest(http.MethodPost, "/v1/orders/4711", http.NoBody)
	const id = "0af7651916cd43dd8448eb211c80319c"
	req.Header.Set("traceparent", "00-"+id+"-b7ad6b7169203331-01")
	rec := httptest.NewRecorder()
	h.ServeHTTP(rec, req)
	require.Equal(t, http.StatusAccepted, rec.Code)

	stock := &fakeHandler{result: reply}
	emitted := handle(t, tr, events.GroupStock, events.TopicStock, stock, overKafka(t, &row, 7))
	require.Len(t, emitted, 1)
	next, err := outbox.FromEnvelope(emitted[0])
	require.NoError(t, err)
	coordinator := &fakeHandler{}
	handle(t, tr, events.GroupCoordinator, events.TopicReplies, coordinator, overKafka(t, &next, 8))

	spans := exp.GetSpans()
	require.Len(t, spans, 3)
	parent := "b7ad6b7169203331"
	for i, name := range []string{"POST /v1/orders/{id}", "process ReserveStock", "process StockReserved"} {
		require.Equal(t, name, spans[i].Name)
		require.Equal(t, id, spans[i].SpanContext.TraceID().String())
		require.Equal(t, parent, spans[i].Parent.SpanID().String(), name)
		parent = spans[i].SpanContext.SpanID().String()
	}
	require.Equal(t, parent, trace.SpanID(coordinator.seen[0].SpanID).String(), "what the last handler emits continues from it")
	require.Equal(t, trace.SpanKindServer, spans[0].SpanKind)
	require.Equal(t, "/v1/orders/{id}", attrs(spans[0])["http.route"])
	require.Equal(t, trace.SpanKindConsumer, spans[1].SpanKind)
	got := attrs(spans[1])
	for k, want := range map[string]string{
		"messaging.system": "kafka", "messaging.operation.type": "process", "messaging.operation.name": "process", "messaging.destination.name": "saga.stock.v1",
		"messaging.destination.partition.id": "3", "messaging.kafka.offset": "7", "messaging.consumer.group.name": "stock", "messaging.message.id": row.ID.String(),
		"ordersaga.order.id": row.OrderID.String(), "ordersaga.attempt": "1",
	} {
		require.Equal(t, want, got[k], k)
	}
	require.Equal(t, codes.Unset, spans[1].Status.Code)
}

// overKafka is what a relay produces from a row and a consumer polls.
func overKafka(t *testing.T, row *outbox.Message, offset int64) events.Record {
	t.Helper()
	r, err := row.Record()
	require.NoError(t, err)
	require.NotEmpty(t, r.Header(events.HeaderTraceparent))
	r.Partition, r.Offset = 3, offset
	return r
}

func handle(t *testing.T, tr *Tracing, g events.Group, topic events.Topic, h consumers.Handler[*consumers.MemoryTx], batch ...events.Record) []events.Envelope {
	t.Helper()
	store := consumers.NewMemory()
	group, err := consumers.NewGroup(consumers.GroupConfig{Name: g, Topic: topic}, store, Traced(h, tr))
	require.NoError(t, err)
	settled, err := group.Handle(context.Background(), batch)
	require.NoError(t, err)
	require.NotContains(t, settled, false)
	out, _ := store.Drain()
	return out
}

var sampled = events.Trace{TraceID: [16]byte{1}, SpanID: [8]byte{1}, Flags: 1}

// one takes a delivery through Prepare and Apply.
func one(t *testing.T, tr *Tracing, h *fakeHandler, d *consumers.Delivery) {
	t.Helper()
	apply, err := Traced(h, tr).Prepare(context.Background(), []*consumers.Delivery{d})
	require.NoError(t, err)
	_, _ = apply(context.Background(), nil, []*consumers.Delivery{d})
}

func TestAFailedTryEndsItsSpanAndTheNextIsItsSibling(t *testing.T) {
	tr, exp := recording(t, 0)
	d := delivery(events.TReserveStock)
	d.Trace = sampled
	h := &fakeHandler{result: func(*consumers.Delivery) consumers.Result { return consumers.Result{Err: errors.New("time\nout")} }}
	one(t, tr, h, d)
	require.Equal(t, sampled, d.Trace, "what is emitted about the failure belongs to the message's own trace")
	h.result = nil
	one(t, tr, h, d)
	spans := exp.GetSpans()
	require.Len(t, spans, 2)
	require.Equal(t, codes.Error, spans[0].Status.Code)
	require.Equal(t, "time out", spans[0].Status.Description)
	require.Equal(t, "transient", attrs(spans[0])["error.type"])
	require.Equal(t, codes.Unset, spans[1].Status.Code)
	for _, s := range spans {
		require.Equal(t, trace.SpanID(sampled.SpanID), s.Parent.SpanID())
	}
	require.Equal(t, spans[1].SpanContext.SpanID(), trace.SpanID(d.Trace.SpanID))
}

func TestErrorsOfPrepareAndOfTheTransactionEndSpans(t *testing.T) {
	for name, tc := range map[string]struct {
		h    *fakeHandler
		want string
	}{
		"outage in Prepare": {&fakeHandler{prepare: func(context.Context, []*consumers.Delivery) error { return awayError{} }}, "outage"},
		"Apply":             {&fakeHandler{apply: errors.New("deadlock")}, "transient"},
		"poison":            {&fakeHandler{apply: &consumers.PanicError{Value: "x"}}, "poison"},
		"cancelled":         {&fakeHandler{apply: context.Canceled}, "cancelled"},
	} {
		t.Run(name, func(t *testing.T) {
			tr, exp := recording(t, 0)
			a, b := delivery(events.TReserveStock), delivery(events.TReserveStock)
			a.Trace, b.Trace = sampled, sampled
			batch := []*consumers.Delivery{a, b}
			apply, err := Traced(tc.h, tr).Prepare(context.Background(), batch)
			if err == nil {
				_, err = apply(context.Background(), nil, batch)
			}
			require.Error(t, err)
			spans := exp.GetSpans()
			require.Len(t, spans, 2)
			require.Equal(t, codes.Error, spans[0].Status.Code)
			require.Equal(t, tc.want, attrs(spans[0])["error.type"])
			require.Equal(t, sampled, a.Trace)
		})
	}
}

func TestAPanicEndsSpansAndGoesOn(t *testing.T) {
	tr, exp := recording(t, 0)
	d := delivery(events.TReserveStock)
	d.Trace = sampled
	batch := []*consumers.Delivery{d}
	require.PanicsWithValue(t, "p", func() {
		_, _ = Traced(&fakeHandler{prepare: func(context.Context, []*consumers.Delivery) error { panic("p") }}, tr).Prepare(context.Background(), batch)
	})
	apply, err := Traced(&fakeHandler{result: func(*consumers.Delivery) consumers.Result { panic("a") }}, tr).Prepare(context.Background(), batch)
	require.NoError(t, err)
	require.PanicsWithValue(t, "a", func() { _, _ = apply(context.Background(), nil, batch) })
	spans := exp.GetSpans()
	require.Len(t, spans, 2)
	for _, s := range spans {
		require.Equal(t, "the handler panicked", s.Status.Description)
	}
}

func TestATransactionThatRunsAgainHasASpanForEachRun(t *testing.T) {
	tr, exp := recording(t, 0)
	a, b := delivery(events.TReserveStock), delivery(events.TCommitStock)
	a.Trace, b.Trace = sampled, sampled
	h := &fakeHandler{result: reply}
	apply, err := Traced(h, tr).Prepare(context.Background(), []*consumers.Delivery{a, b})
	require.NoError(t, err)
	for range 2 {
		_, err = apply(context.Background(), nil, []*consumers.Delivery{a})
		require.NoError(t, err)
	}
	spans := exp.GetSpans()
	require.Len(t, spans, 2)
	require.NotEqual(t, spans[0].SpanContext.SpanID(), spans[1].SpanContext.SpanID())
	require.Equal(t, trace.SpanID(sampled.SpanID), spans[1].Parent.SpanID())
	require.Equal(t, spans[1].SpanContext.SpanID(), trace.SpanID(h.seen[1].SpanID))
}

func TestLateRetriesAndReplaysLinkToTheFirstTrace(t *testing.T) {
	tr, exp := recording(t, 0)
	now := time.Now()
	tr.now = func() time.Time { return now }
	for _, tc := range []struct {
		name   string
		first  time.Time
		replay bool
		linked bool
	}{
		{"soon", now.Add(-linkAfter), false, false},
		{"late", now.Add(-linkAfter - 1), false, true},
		{"replay", now, true, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			exp.Reset()
			d := delivery(events.TReserveStock)
			d.Trace, d.First, d.Replay = sampled, tc.first, tc.replay
			one(t, tr, &fakeHandler{}, d)
			s := exp.GetSpans()[0]
			if !tc.linked {
				require.Equal(t, trace.TraceID(sampled.TraceID), s.SpanContext.TraceID())
				require.Empty(t, s.Links)
				return
			}
			require.NotEqual(t, trace.TraceID(sampled.TraceID), s.SpanContext.TraceID())
			require.False(t, s.Parent.IsValid())
			require.True(t, s.SpanContext.IsSampled(), "it goes on from a recorded one")
			require.Len(t, s.Links, 1)
			require.Equal(t, trace.TraceID(sampled.TraceID), s.Links[0].SpanContext.TraceID())
			require.Equal(t, d.Trace.TraceID, [16]byte(s.SpanContext.TraceID()))
		})
	}
}

func TestWhatHasNoTraceGetsOne(t *testing.T) {
	for _, sample := range []float64{0, 1} {
		tr, exp := recording(t, sample)
		d := delivery(events.TPlaceOrder)
		one(t, tr, &fakeHandler{}, d)
		require.False(t, d.Trace.IsZero())
		require.Equal(t, sample == 1, d.Trace.Sampled())
		require.Len(t, exp.GetSpans(), int(sample))
	}
}

func TestWithoutAnEndpointIdsAreMadeAndPassedOn(t *testing.T) {
	tr, err := StartTracing(context.Background(), TracingConfig{Sample: 1})
	require.NoError(t, err)
	d := delivery(events.TPlaceOrder)
	one(t, tr, &fakeHandler{}, d)
	require.False(t, d.Trace.IsZero())
	require.False(t, d.Trace.Sampled())
	d.Trace = sampled
	one(t, tr, &fakeHandler{}, d)
	require.Equal(t, sampled, d.Trace, "others may record it")
	require.NoError(t, tr.Close(context.Background()))
}

type nothing struct{}

func (nothing) Prepare(context.Context, []*consumers.Delivery) (consumers.Apply[int], error) {
	return noApply, nil
}

func noApply(context.Context, int, []*consumers.Delivery) ([]consumers.Result, error) {
	return nil, nil
}

func TestWhatIsNotSampledCostsNothing(t *testing.T) {
	tr, _ := recording(t, 1)
	h := Traced[int](nothing{}, tr)
	batch := make([]*consumers.Delivery, 500)
	for i := range batch {
		batch[i] = delivery(events.TReserveStock)
		batch[i].Trace = events.Trace{TraceID: [16]byte{1}, SpanID: [8]byte{1}}
	}
	ctx := context.Background()
	require.Zero(t, testing.AllocsPerRun(10, func() {
		apply, err := h.Prepare(ctx, batch)
		if err != nil || apply == nil {
			t.Fail()
		}
	}))
}

func TestNamesOfSpansAreBounded(t *testing.T) {
	d := delivery(events.Name(evil))
	require.LessOrEqual(t, len(typeName(d)), maxLabel)
	require.NotRegexp(t, unfit, typeName(d))
	d.Data = nil
	require.Equal(t, "unknown", typeName(d))
	d.Type = events.TCommitStock
	require.Equal(t, "CommitStock", typeName(d))
}

func TestGatewayCallsBelongToTheirDelivery(t *testing.T) {
	tr, exp := recording(t, 0)
	var sent []http.Header
	rt := tr.Transport(roundTripper(func(r *http.Request) (*http.Response, error) {
		sent = append(sent, r.Header.Clone())
		return &http.Response{StatusCode: http.StatusOK, Body: http.NoBody, Request: r, Header: http.Header{}}, nil
	}))
	call := func(ctx context.Context, key string) error {
		r, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://gateway.test/v1/payment_intents", http.NoBody)
		if err != nil {
			return err
		}
		if key != "" {
			r.Header.Set("Idempotency-Key", key)
		}
		resp, err := rt.RoundTrip(r)
		if err != nil {
			return err
		}
		return resp.Body.Close()
	}
	a, b := delivery(events.TAuthorizePayment), delivery(events.TAuthorizePayment)
	a.Trace, b.Trace = sampled, sampled
	unsampled := delivery(events.TAuthorizePayment)
	unsampled.Trace = events.Trace{TraceID: [16]byte{9}, SpanID: [8]byte{9}}
	h := &fakeHandler{prepare: func(ctx context.Context, batch []*consumers.Delivery) error {
		for _, d := range batch {
			if err := call(ctx, d.OrderID.String()+"/authorize/1"); err != nil {
				return err
			}
		}
		return call(ctx, "")
	}}
	batch := []*consumers.Delivery{a, b, unsampled}
	apply, err := Traced(h, tr).Prepare(context.Background(), batch)
	require.NoError(t, err)
	_, err = apply(context.Background(), nil, batch)
	require.NoError(t, err)
	require.NoError(t, call(context.Background(), "x"))
	require.Len(t, sent, 5)
	for _, hd := range sent {
		require.Empty(t, hd.Get("traceparent"), "the gateway is told nothing")
	}
	spans := exp.GetSpans()
	require.Len(t, spans, 4, "two calls, two deliveries")
	require.Equal(t, "POST payment gateway", spans[0].Name)
	require.Equal(t, trace.SpanID(a.Trace.SpanID), spans[0].Parent.SpanID())
	require.Equal(t, trace.SpanID(b.Trace.SpanID), spans[1].Parent.SpanID())
}

type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

func TestPgxTracerRecordsWithinRecordedTracesOnly(t *testing.T) {
	tr, exp := recording(t, 1)
	q := tr.PgxTracer()
	statement(context.Background(), q)
	require.Empty(t, exp.GetSpans())
	ctx, span := tr.Provider().Tracer("test").Start(context.Background(), "request")
	statement(ctx, q)
	span.End()
	spans := exp.GetSpans()
	require.Len(t, spans, 2)
	require.Equal(t, span.SpanContext().SpanID(), spans[0].Parent.SpanID())
	for k, v := range attrs(spans[0]) {
		require.NotContains(t, v, "person@example.com", k)
	}
}

func TestF26_SpansAreExportedClean(t *testing.T) {
	exp := tracetest.NewInMemoryExporter()
	tr := newTracing(TracingConfig{Sample: 1}, sdktrace.NewSimpleSpanProcessor(&cleanExporter{SpanExporter: exp}))
	_, span := tr.tracer.Start(context.Background(), evil, trace.WithAttributes(
		attribute.String("client.address", "203.0.113.7"), attribute.String("user_agent.original", "Somebody"), attribute.String("k", evil),
		attribute.StringSlice("l", []string{evil}), attribute.String("api_key", "x"), attribute.String("url.query", "email=a@b"), attribute.Int("n", 1)))
	span.RecordError(errors.New(evil))
	span.SetStatus(codes.Error, evil)
	span.End()
	s := exp.GetSpans()[0]
	got := attrs(s)
	require.Equal(t, "1", got["n"])
	require.Equal(t, masked, got["api_key"])
	require.NotContains(t, got, "client.address")
	require.NotContains(t, got, "user_agent.original")
	require.NotContains(t, got, "url.query")
	for _, text := range []string{s.Name, got["k"], got["l"], s.Status.Description, s.Events[0].Attributes[1].Value.AsString()} {
		require.NotRegexp(t, unfit, text)
		require.Contains(t, text, "forged line")
	}
}
