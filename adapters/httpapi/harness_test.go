package httpapi

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/fstest"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"ordersaga/consumers"
	"ordersaga/domain"
	"ordersaga/saga"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// setup is what a test changes of the interface before it starts.
type setup struct {
	cfg    Config
	tokens *Tokens
	limits Limits
	deps   Deps
	tls    *tls.Config
	wrap   func(http.Handler) http.Handler
	pipes  *pipes             // instead of a listener on the loopback
	server func(*http.Server) // changes it before it serves
}

// world is the interface on a listener of its own, over fakes of what it calls. Whatever its client is answered is held to the contract.
type world struct {
	t        *testing.T
	intake   *fakeIntake
	orders   *fakeOrders
	reader   *fakeReader
	products *fakeProducts
	dead     *fakeDead
	hub      *Hub
	logs     *logBook
	api      *API
	server   *Server
	base     string
	client   *http.Client
	wire     *http.Transport // below what holds answers to the contract
	pipes    *pipes
}

func newWorld(t *testing.T, change ...func(*setup)) *world {
	t.Helper()
	w := &world{t: t, reader: newFakeReader(), products: &fakeProducts{}, dead: &fakeDead{}, hub: NewHub(), logs: &logBook{}}
	w.intake, w.orders = &fakeIntake{reader: w.reader, stored: map[string]storedAnswer{}}, &fakeOrders{reader: w.reader}
	s := setup{
		cfg:    Config{Open: true, MaxBody: 64 << 10, MaxWait: 30 * time.Second, MaxStreams: 64},
		limits: Limits{Rate: 1e6, Burst: 1e6},
		deps: Deps{
			Intake: w.intake, Orders: w.orders, Reader: w.reader, Definitions: definitions, Products: w.products, DeadLetters: w.dead, Hub: w.hub,
			Ready: func(context.Context) map[string]error { return map[string]error{"postgres": nil} },
			Log:   slog.New(slog.NewJSONHandler(w.logs, &slog.HandlerOptions{Level: slog.LevelDebug})),
			Metrics: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				w.Header().Set("Content-Type", "text/plain; version=0.0.4")
				_, _ = io.WriteString(w, "up 1\n")
			}),
			OpenAPI: readFile(t, "../../schemas/openapi.yaml"), AsyncAPI: readFile(t, "../../schemas/asyncapi.yaml"),
			Schemas: fstest.MapFS{"json/place-order.schema.json": {Data: readFile(t, "../../schemas/json/place-order.schema.json")}},
		},
	}
	for _, f := range change {
		f(&s)
	}
	w.api = New(s.cfg, s.tokens, s.limits, s.deps)
	var handler http.Handler = w.api
	if s.wrap != nil {
		handler = s.wrap(handler)
	}
	transport := &http.Transport{MaxIdleConnsPerHost: 64}
	w.wire, w.pipes = transport, s.pipes
	if s.pipes != nil {
		w.server = newServer(s.pipes, w.api, handler, s.tls, s.deps.Log)
		transport.DialContext = func(context.Context, string, string) (net.Conn, error) { return s.pipes.dial() }
	} else {
		var err error
		w.server, err = Listen(t.Context(), "127.0.0.1:0", w.api, handler, s.tls, s.deps.Log)
		require.NoError(t, err)
	}
	if s.server != nil {
		s.server(w.server.srv)
	}
	served := make(chan error, 1)
	go func() { served <- w.server.Serve() }()
	w.base = "http://" + w.server.Addr()
	if s.tls != nil {
		w.base = "https://" + w.server.Addr()
		transport.ForceAttemptHTTP2 = true
		transport.TLSClientConfig = &tls.Config{InsecureSkipVerify: true}
	}
	w.client = &http.Client{
		Transport:     &checked{t: t, api: w.api, next: transport},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		transport.CloseIdleConnections() // also those dialled and never used, which a shutdown would wait for
		require.NoError(t, w.server.Shutdown(ctx))
		require.NoError(t, <-served)
	})
	return w
}

// pipes is a network in memory, for tests whose clock is synctest's: what is waited for on it lets time pass.
type pipes struct {
	conns  chan net.Conn
	closed chan struct{}
	once   sync.Once
}

func newPipes() *pipes { return &pipes{conns: make(chan net.Conn), closed: make(chan struct{})} }

func (p *pipes) dial() (net.Conn, error) {
	here, there := net.Pipe()
	select {
	case p.conns <- there:
		return here, nil
	case <-p.closed:
		return nil, net.ErrClosed
	}
}

func (p *pipes) Accept() (net.Conn, error) {
	select {
	case c := <-p.conns:
		return c, nil
	case <-p.closed:
		return nil, net.ErrClosed
	}
}

func (p *pipes) Close() error {
	p.once.Do(func() { close(p.closed) })
	return nil
}

func (p *pipes) Addr() net.Addr { return &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 80} }

func readFile(t *testing.T, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	require.NoError(t, err)
	return b
}

// answered is a response that was read to its end.
type answered struct {
	status  int
	header  http.Header
	body    []byte
	problem Problem
}

func (w *world) request(method, path, body string, header ...string) *http.Request {
	w.t.Helper()
	var rd io.Reader
	if body != "" {
		rd = strings.NewReader(body)
	}
	r, err := http.NewRequestWithContext(w.t.Context(), method, w.base+path, rd)
	require.NoError(w.t, err)
	if body != "" {
		r.Header.Set("Content-Type", "application/json")
	}
	for pair := range slices.Chunk(header, 2) {
		r.Header.Add(pair[0], pair[1])
	}
	return r
}

func (w *world) do(method, path, body string, header ...string) answered {
	w.t.Helper()
	a, err := w.send(w.request(method, path, body, header...))
	require.NoError(w.t, err)
	return a
}

// send may be called by several goroutines.
func (w *world) send(r *http.Request) (answered, error) {
	resp, err := w.client.Do(r)
	if err != nil {
		return answered{}, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		return answered{}, err
	}
	a := answered{status: resp.StatusCode, header: resp.Header, body: b}
	if resp.Header.Get("Content-Type") == "application/problem+json" {
		if err := json.Unmarshal(b, &a.problem); err != nil && r.Method != http.MethodHead {
			return a, err
		}
	}
	return a, nil
}

// tick is how often a test looks for what it waits for.
const tick = 5 * time.Millisecond

const tea = `{"customer_id":"c-17","currency":"EUR","items":[{"sku":"TEA-1","quantity":2}],"payment_method":"pm_card_visa"}`

func (w *world) place(key, body string, header ...string) answered {
	w.t.Helper()
	return w.do(http.MethodPost, "/v1/orders", body, append([]string{"Idempotency-Key", key}, header...)...)
}

func (w *world) accepted(a answered) OrderAccepted {
	w.t.Helper()
	require.Equal(w.t, http.StatusAccepted, a.status, "%s", a.body)
	var o OrderAccepted
	require.NoError(w.t, json.Unmarshal(a.body, &o))
	require.Equal(w.t, "/v1/orders/"+o.OrderID.String(), a.header.Get("Location"))
	return o
}

// refused holds what every problem promises.
func (w *world) refused(a answered, status int, code string) Problem {
	w.t.Helper()
	require.Equal(w.t, status, a.status, "%s", a.body)
	require.Equal(w.t, "application/problem+json", a.header.Get("Content-Type"))
	require.Equal(w.t, "no-store", a.header.Get("Cache-Control"))
	p := a.problem
	require.Equal(w.t, code, p.Code, "%s", a.body)
	require.Equal(w.t, status, p.Status)
	require.Equal(w.t, "urn:ordersaga:problem:"+code, p.Type)
	require.NotEmpty(w.t, p.Title)
	require.NotEmpty(w.t, p.Detail)
	if status == http.StatusTooManyRequests || status == http.StatusServiceUnavailable || code == "in_flight" {
		require.NotEmpty(w.t, a.header.Get("Retry-After"), code)
	}
	return p
}

// logBook keeps what was logged.
type logBook struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logBook) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBook) lines() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.b.Len() == 0 {
		return nil
	}
	return strings.Split(strings.TrimSpace(l.b.String()), "\n")
}

var definitions = saga.NewDefinitions(saga.OrderV1(saga.DefaultLimits))

type storedAnswer struct {
	body   [32]byte
	order  domain.OrderID
	answer []byte
}

// fakeIntake remembers keys; while hold is set it waits for it to close.
type fakeIntake struct {
	reader *fakeReader
	mu     sync.Mutex
	stored map[string]storedAnswer
	calls  []*saga.Submission
	err    error
	hold   chan struct{}
	held   chan struct{} // told of each request that is held
	panics any
}

func (f *fakeIntake) Submit(ctx context.Context, s *saga.Submission) (saga.Accepted, error) {
	f.mu.Lock()
	hold := f.hold
	f.mu.Unlock()
	if hold != nil {
		f.held <- struct{}{}
		select {
		case <-hold:
		case <-ctx.Done():
			return saga.Accepted{}, ctx.Err()
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls = append(f.calls, s)
	if f.panics != nil {
		panic(f.panics)
	}
	if f.err != nil {
		return saga.Accepted{}, f.err
	}
	if a, is := f.stored[s.Caller+"/"+s.Key]; is {
		if a.body != s.Body {
			return saga.Accepted{}, saga.ErrKeyReused
		}
		return saga.Accepted{Order: a.order, Answer: a.answer, Repeat: true}, nil
	}
	price := domain.Money{Minor: 450, Currency: s.Draft.Currency}
	products := map[domain.SKU]domain.Product{"TEA-1": {SKU: "TEA-1", Name: "Tea", UnitPrice: price}, "TEA-2": {SKU: "TEA-2", Name: "Tea", UnitPrice: price}}
	o, refusal := s.Draft.Price(products)
	if refusal != nil {
		return saga.Accepted{}, refusal
	}
	if o.ID.IsZero() {
		o.ID = domain.NewOrderID()
	} else if f.reader.get(o.ID) != nil {
		return saga.Accepted{}, saga.ErrOrderExists
	}
	f.reader.put(o)
	a := storedAnswer{s.Body, o.ID, s.Answer(o)}
	f.stored[s.Caller+"/"+s.Key] = a
	return saga.Accepted{Order: a.order, Answer: a.answer}, nil
}

func (f *fakeIntake) fails(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.err = err
}

func (f *fakeIntake) submitted() []*saga.Submission {
	f.mu.Lock()
	defer f.mu.Unlock()
	return append([]*saga.Submission(nil), f.calls...)
}

// fakeReader holds orders; read is told of each look at one.
type fakeReader struct {
	mu     sync.Mutex
	orders map[domain.OrderID]*saga.OrderView
	list   []domain.OrderID
	err    error
	query  any
	looks  int
	looked chan struct{}           // if set: told of each look
	after  func(id domain.OrderID) // if set: happens once, between a look and its answer
	log    []saga.AuditEntry
}

func newFakeReader() *fakeReader { return &fakeReader{orders: map[domain.OrderID]*saga.OrderView{}} }

func (f *fakeReader) put(o *domain.Order) {
	v := &saga.OrderView{Order: *o, CreatedAt: time.Unix(1e9, 0), UpdatedAt: time.Unix(1e9+1, 0), Deadline: time.Unix(1e9+900, 0)}
	v.Sequence = 1
	v.Saga = definitions.Current().New()
	v.Saga.Version, v.Saga.Phase = 1, saga.Running
	f.mu.Lock()
	defer f.mu.Unlock()
	f.orders[o.ID] = v
	f.list = append(f.list, o.ID)
}

// pending puts an order that is under way.
func (f *fakeReader) pending() domain.OrderID {
	o := &domain.Order{
		ID: domain.NewOrderID(), CustomerID: "c-17", PaymentMethod: "pm_card_visa", Status: domain.Pending, Total: domain.Money{Minor: 900, Currency: "EUR"},
		Lines: []domain.Line{{SKU: "TEA-1", Quantity: 2, UnitPrice: 450}},
	}
	f.put(o)
	return o.ID
}

// ends puts an order to its end.
func (f *fakeReader) ends(id domain.OrderID, st domain.Status, why domain.Reason) {
	f.mu.Lock()
	defer f.mu.Unlock()
	v := *f.orders[id]
	v.Status, v.Reason, v.Sequence, v.Deadline = st, why, 2, time.Time{}
	v.Saga.Phase, v.Saga.Version = saga.Completed, 7
	if st != domain.Confirmed {
		v.Saga.Phase = saga.Compensated
	}
	f.orders[id] = &v
}

func (f *fakeReader) change(id domain.OrderID, fn func(*saga.OrderView)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	v := *f.orders[id]
	fn(&v)
	f.orders[id] = &v
}

func (f *fakeReader) fails(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.err = err
}

func (f *fakeReader) get(id domain.OrderID) *saga.OrderView {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.orders[id]
}

func (f *fakeReader) Order(_ context.Context, id domain.OrderID) (*saga.OrderView, error) {
	f.mu.Lock()
	f.looks++
	if f.looked != nil {
		select {
		case f.looked <- struct{}{}:
		default:
		}
	}
	v, err, after := f.orders[id], f.err, f.after
	f.after = nil
	f.mu.Unlock()
	if after != nil {
		after(id)
	}
	return v, err
}

func (f *fakeReader) page(q any) ([]saga.OrderView, string, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.query = q
	out := []saga.OrderView{}
	for _, id := range f.list {
		out = append(out, *f.orders[id])
	}
	return out, "next-1", f.err
}

func (f *fakeReader) Orders(_ context.Context, q saga.OrderFilter) ([]saga.OrderView, string, error) {
	return f.page(q)
}

func (f *fakeReader) Sagas(_ context.Context, q saga.SagaFilter) ([]saga.OrderView, string, error) {
	return f.page(q)
}

func (f *fakeReader) Timeline(_ context.Context, id domain.OrderID) ([]saga.HistoryEntry, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.orders[id] == nil {
		return nil, f.err
	}
	return []saga.HistoryEntry{
		{Order: id, Version: 1, Input: saga.Input{Kind: saga.Started}, Phase: saga.Running, Status: domain.Pending, At: time.Unix(1e9, 0)},
		{Order: id, Version: 2, Cause: uuid.New(), Input: saga.Input{Kind: saga.StepDone, Name: "reserve_stock"}, Phase: saga.Running, Status: domain.Pending, At: time.Unix(1e9, 5)},
	}, f.err
}

func (f *fakeReader) AuditLog(context.Context, string, int) ([]saga.AuditEntry, string, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.log, "", f.err
}

type fakeOrders struct {
	reader  *fakeReader
	mu      sync.Mutex
	cancels []saga.CancelRequest
	outcome saga.CancelOutcome
	decided []saga.Decision
	no      bool // decisions change nothing
	err     error
}

func (f *fakeOrders) Cancel(_ context.Context, r saga.CancelRequest) (saga.CancelResult, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.cancels = append(f.cancels, r)
	if f.reader.get(r.Order) == nil {
		return saga.CancelResult{Outcome: saga.CancelUnknown}, f.err
	}
	return saga.CancelResult{Outcome: f.outcome}, f.err
}

func (f *fakeOrders) Resolve(_ context.Context, d saga.Decision) (saga.State, bool, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.decided = append(f.decided, d)
	if f.err == nil && f.reader.get(d.Order) == nil {
		return saga.State{}, false, saga.ErrNoSaga
	}
	return saga.State{}, !f.no, f.err
}

type fakeProducts struct {
	mu   sync.Mutex
	puts []ProductChange
	all  []ProductView
	err  error
}

func (f *fakeProducts) Put(_ context.Context, c ProductChange) (ProductView, bool, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.puts = append(f.puts, c)
	if f.err != nil {
		return ProductView{}, false, f.err
	}
	v := ProductView{Product: c.Product, Stock: domain.Stock{SKU: c.Product.SKU}}
	if c.OnHand != nil {
		v.Stock.Available = *c.OnHand
	}
	for i := range f.all {
		if f.all[i].SKU == c.Product.SKU {
			f.all[i] = v
			return v, false, nil
		}
	}
	f.all = append(f.all, v)
	return v, true, nil
}

func (f *fakeProducts) Get(_ context.Context, sku domain.SKU) (*ProductView, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for i := range f.all {
		if f.all[i].SKU == sku {
			return &f.all[i], f.err
		}
	}
	return nil, f.err
}

func (f *fakeProducts) List(context.Context, string, int) ([]ProductView, string, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.all, "", f.err
}

type fakeDead struct {
	mu      sync.Mutex
	views   []consumers.DeadView
	filter  consumers.DeadFilter
	wishes  []consumers.Request
	fulls   int
	op      *consumers.Operation
	results []consumers.ItemResult
	err     error
}

func (f *fakeDead) List(_ context.Context, q consumers.DeadFilter, _ string, _ int) ([]consumers.DeadView, string, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.filter = q
	return f.views, "", f.err
}

func (f *fakeDead) Get(_ context.Context, id uuid.UUID, full bool, _ string) (*consumers.DeadView, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, v := range f.views {
		if v.ID != id {
			continue
		}
		if full {
			f.fulls++
			v.Full = &consumers.FullRecord{Key: []byte("k"), Value: []byte{0xff, 0}}
			v.Full.Headers = append(v.Full.Headers, struct {
				Key   string
				Value []byte
			}{"x\r\ny", []byte("\x1b[31mred\xff")})
		}
		return &v, f.err
	}
	return nil, f.err
}

func (f *fakeDead) Do(_ context.Context, q consumers.Request) (*consumers.Operation, []consumers.ItemResult, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.wishes = append(f.wishes, q)
	return f.op, f.results, f.err
}

// awayError is a dependency that is away.
type awayError struct{}

func (awayError) Error() string  { return "dial tcp: connection refused" }
func (awayError) Outage() string { return "postgres" }

var errBroken = errors.New("broken\r\nlevel=INFO msg=forged \x1b[31mred\u009b32m\u202e")
