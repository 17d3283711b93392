package httpapi

import (
	"context"
	"encoding/json"
	"io/fs"
	"log/slog"
	"net/http"
	"runtime/debug"
	"strings"
	"sync/atomic"
	"time"

	"github.com/google/uuid"

	"ordersaga/consumers"
	"ordersaga/domain"
	"ordersaga/saga"
)

// Intake places orders; *saga.Intake is one. An error that answers `InFlight() bool` with true says that another request with the key
// is being answered; *saga.Intake has none such: it answers both when the first is stored.
type Intake interface {
	Submit(ctx context.Context, s *saga.Submission) (saga.Accepted, error)
}

// Orders is the use cases on orders and sagas beside placing; *saga.Service is one.
type Orders interface {
	Cancel(ctx context.Context, r saga.CancelRequest) (saga.CancelResult, error)
	Resolve(ctx context.Context, d saga.Decision) (state saga.State, changed bool, err error)
}

// ProductChange is what a PUT of a product asks for.
type ProductChange struct {
	Product domain.Product
	OnHand  *int64 // nil: as it is
	Actor   string
	Note    string
}

// ProductView is a product with its stock.
type ProductView struct {
	domain.Product
	Stock domain.Stock
}

// Products is the catalogue with its stock. Put answers a *domain.Refusal for a change that is not possible; one whose Field is /on_hand
// says that fewer would be on hand than are reserved.
type Products interface {
	Put(ctx context.Context, c ProductChange) (v ProductView, created bool, err error)
	Get(ctx context.Context, sku domain.SKU) (*ProductView, error)
	List(ctx context.Context, cursor string, limit int) (page []ProductView, next string, err error)
}

// DeadLetters is the operators' use cases on dead letters; *consumers.Operators is one.
type DeadLetters interface {
	List(ctx context.Context, f consumers.DeadFilter, cursor string, limit int) (page []consumers.DeadView, next string, err error)
	Get(ctx context.Context, id uuid.UUID, full bool, actor string) (*consumers.DeadView, error)
	Do(ctx context.Context, q consumers.Request) (*consumers.Operation, []consumers.ItemResult, error)
}

// Config bounds the interface.
type Config struct {
	Open       bool          // every caller is admin, for dev
	MaxBody    int64         // bytes
	MaxWait    time.Duration // of Prefer: wait
	MaxStreams int           // SSE streams and waiting requests at a time
}

// Limits are what may change while the process runs.
type Limits struct {
	Rate  float64 // requests a second and caller
	Burst int     // requests at once; 0 lets nobody through
}

// Deps are what the interface calls.
type Deps struct {
	Intake      Intake
	Orders      Orders
	Reader      saga.Reader
	Definitions *saga.Definitions
	Products    Products
	DeadLetters DeadLetters
	Hub         *Hub
	// Ready answers an error for each dependency, nil for those that are well. An error that answers `Degraded() bool` with true
	// shows, and leaves the process ready: it can do its work without that dependency for a while.
	Ready    func(ctx context.Context) map[string]error
	Log      *slog.Logger
	Metrics  http.Handler
	OpenAPI  []byte
	AsyncAPI []byte
	Schemas  fs.FS        // with json/*.schema.json, as AsyncAPI refers to them; nil: none
	Debug    http.Handler // under /debug/, for admins; nil: none
}

// API is the handler of the whole interface. Its methods are the operations of schemas/openapi.yaml.
type API struct {
	Deps
	cfg      Config
	tokens   atomic.Pointer[Tokens]
	limiter  *limiter
	streams  chan struct{}
	draining atomic.Bool
	mux      *http.ServeMux

	readiness   readiness
	crossOrigin *http.CrossOriginProtection
}

var _ ServerInterface = (*API)(nil)

// New makes the API; tokens may be nil if cfg.Open.
func New(cfg Config, tokens *Tokens, limits Limits, d Deps) *API {
	a := &API{Deps: d, cfg: cfg, limiter: newLimiter(limits), streams: make(chan struct{}, cfg.MaxStreams), mux: http.NewServeMux(), crossOrigin: http.NewCrossOriginProtection()}
	if tokens == nil {
		tokens = &Tokens{}
	}
	a.tokens.Store(tokens)
	HandlerWithOptions(a, StdHTTPServerOptions{BaseRouter: a.mux, ErrorHandlerFunc: a.unreadable})
	a.probes()
	a.mux.HandleFunc("GET /openapi.yaml", document(d.OpenAPI))
	a.mux.HandleFunc("GET /asyncapi.yaml", document(d.AsyncAPI))
	if d.Schemas != nil {
		a.mux.HandleFunc("GET /json/{file}", a.schema)
	}
	if d.Debug != nil {
		a.mux.Handle("/debug/", d.Debug)
	}
	return a
}

// NewProbes makes the part of the API that a process without orders has: /healthz, /readyz and /metrics, which take no token. Of d it
// uses Ready, Log and Metrics.
func NewProbes(d Deps) *API {
	d.Hub = NewHub()
	a := &API{Deps: d, limiter: newLimiter(Limits{}), mux: http.NewServeMux(), crossOrigin: http.NewCrossOriginProtection()}
	a.tokens.Store(&Tokens{})
	a.probes()
	return a
}

func (a *API) probes() {
	a.mux.HandleFunc("GET /healthz", a.health)
	a.mux.HandleFunc("GET /readyz", a.ready)
	a.mux.Handle("GET /metrics", a.Metrics)
}

// Route is the pattern that a request meets, "" if none does: a label of bounded variety, for metrics.
func (a *API) Route(r *http.Request) string {
	_, pattern := a.mux.Handler(r)
	return pattern
}

// SetTokens replaces the tokens, for requests from now on. Streams that are open stay so, for streamAge at most.
func (a *API) SetTokens(t *Tokens) {
	a.tokens.Store(t)
	a.limiter.keep(t.has)
}

// SetLimits replaces the limits, for requests from now on.
func (a *API) SetLimits(l Limits) { a.limiter.set(l) }

// Drain makes readiness red and ends streams and waits, so that a balancer and clients go elsewhere before the listener closes.
func (a *API) Drain() {
	if !a.draining.Swap(true) {
		a.Hub.Close()
	}
}

// ServeHTTP implements http.Handler.
func (a *API) ServeHTTP(rw http.ResponseWriter, r *http.Request) {
	w := &tracked{ResponseWriter: rw}
	defer func() {
		if v := recover(); v != nil {
			a.panicked(w, r, v)
		}
	}()
	w.Header()["X-Content-Type-Options"] = nosniff
	h, pattern := a.mux.Handler(r)
	if pattern == "" {
		a.noRoute(w, r, h)
		return
	}
	r.Body = http.MaxBytesReader(rw, r.Body, a.cfg.MaxBody)
	r, ok := a.authorize(w, r, pattern)
	if !ok {
		return
	}
	if p := checkQuery(r.URL); p != nil {
		writeProblem(w, p)
		return
	}
	// A list may come in several lines (RFC 9110, 5.3); the generated routes take one.
	if prefer := r.Header["Prefer"]; len(prefer) > 1 {
		r.Header.Set("Prefer", strings.Join(prefer, ", "))
	}
	if strings.Contains(pattern, "{") {
		a.mux.ServeHTTP(w, r) // it fills in what the path names
		return
	}
	r.Pattern = pattern
	h.ServeHTTP(w, r)
}

// Values of headers that most answers have. They are shared: a header is replaced or added to, never written into.
var (
	nosniff  = []string{"nosniff"}
	noStore  = []string{"no-store"}
	jsonType = []string{"application/json"}
)

// panicked ends a request whose handler panicked. An answer that has begun cannot be taken back: its connection is cut, so that the
// client does not take it for whole.
func (a *API) panicked(w *tracked, r *http.Request, v any) {
	if v == http.ErrAbortHandler { //nolint:errorlint // a sentinel that is panicked with, not wrapped
		panic(v)
	}
	err := &panicError{v, debug.Stack()}
	if w.wrote {
		a.logFault(r, newInstance(), http.StatusInternalServerError, err)
		panic(http.ErrAbortHandler)
	}
	a.fault(w, r, err)
}

// tracked knows whether an answer has begun.
type tracked struct {
	http.ResponseWriter
	wrote bool
}

// WriteHeader implements http.ResponseWriter.
func (t *tracked) WriteHeader(status int) {
	t.wrote = t.wrote || status >= http.StatusOK
	t.ResponseWriter.WriteHeader(status)
}

// Write implements http.ResponseWriter.
func (t *tracked) Write(b []byte) (int, error) {
	t.wrote = true
	return t.ResponseWriter.Write(b) //nolint:wrapcheck // passes through
}

// Unwrap lets http.ResponseController reach what is below.
func (t *tracked) Unwrap() http.ResponseWriter { return t.ResponseWriter }

// noRoute turns the mux's own 404 and 405 into problems; the 405 keeps its Allow header. The mux would redirect from a path that is
// not clean; if the clean one leads nowhere either, that is a 404 at once.
func (a *API) noRoute(w http.ResponseWriter, r *http.Request, h http.Handler) {
	rec := &statusOnly{header: http.Header{}, status: http.StatusNotFound}
	h.ServeHTTP(rec, r)
	if rec.status == http.StatusMethodNotAllowed {
		w.Header()["Allow"] = rec.header["Allow"]
		writeProblem(w, problem(rec.status, "method_not_allowed", "Method not allowed", r.Method+" is not for this path; see Allow"))
		return
	}
	writeProblem(w, problem(http.StatusNotFound, "not_found", "Not found", "there is no such path; the interface is described in /openapi.yaml"))
}

type statusOnly struct {
	header http.Header
	status int
}

func (s *statusOnly) Header() http.Header         { return s.header }
func (s *statusOnly) WriteHeader(status int)      { s.status = status }
func (s *statusOnly) Write(b []byte) (int, error) { return len(b), nil }

func answer(w http.ResponseWriter, status int, v any) {
	b, err := json.Marshal(v)
	if err != nil {
		panic("httpapi: a model does not marshal: " + err.Error())
	}
	answerBytes(w, status, append(b, '\n'))
}

func answerBytes(w http.ResponseWriter, status int, b []byte) {
	w.Header()["Content-Type"] = jsonType
	w.WriteHeader(status)
	_, _ = w.Write(b) //nolint:gosec // JSON with its own Content-Type and nosniff; the client is gone if it fails
}
