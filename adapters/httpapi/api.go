package httpapi

import (
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"log/slog"
	"net/http"
	"sync/atomic"
	"time"

	"github.com/google/uuid"

	"ordersaga/consumers"
	"ordersaga/domain"
	"ordersaga/saga"
)

// Intake places orders; *saga.Intake is one.
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

// Products is the catalogue with its stock. Put answers a *domain.Refusal for a change that is not possible.
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
	Burst int
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
}

var _ ServerInterface = (*API)(nil)

// New makes the API; tokens may be nil if cfg.Open.
func New(cfg Config, tokens *Tokens, limits Limits, d Deps) *API {
	a := &API{Deps: d, cfg: cfg, limiter: newLimiter(limits), streams: make(chan struct{}, cfg.MaxStreams), mux: http.NewServeMux()}
	if tokens == nil {
		tokens = &Tokens{}
	}
	a.tokens.Store(tokens)
	HandlerWithOptions(a, StdHTTPServerOptions{BaseRouter: a.mux, ErrorHandlerFunc: a.badParameter})
	a.mux.HandleFunc("GET /healthz", a.health)
	a.mux.HandleFunc("GET /readyz", a.ready)
	a.mux.Handle("GET /metrics", d.Metrics)
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

// Route is the pattern that a request meets, "" if none does: a label of bounded variety, for metrics.
func (a *API) Route(r *http.Request) string {
	_, pattern := a.mux.Handler(r)
	return pattern
}

// SetTokens replaces the tokens, for requests from now on.
func (a *API) SetTokens(t *Tokens) { a.tokens.Store(t) }

// SetLimits replaces the limits.
func (a *API) SetLimits(l Limits) { a.limiter.set(l) }

// Drain makes readiness red and ends streams and waits, so that a balancer and clients go elsewhere before the listener closes.
func (a *API) Drain() {
	if !a.draining.Swap(true) {
		a.Hub.Close()
	}
}

// ServeHTTP implements http.Handler.
func (a *API) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	defer func() {
		if v := recover(); v != nil {
			if v == http.ErrAbortHandler { //nolint:errorlint // a sentinel that is panicked with, not wrapped
				panic(v)
			}
			a.fault(w, r, panicError{v})
		}
	}()
	h, pattern := a.mux.Handler(r)
	if pattern == "" {
		a.noRoute(w, r, h)
		return
	}
	r.Body = http.MaxBytesReader(w, r.Body, a.cfg.MaxBody)
	r, ok := a.authorize(w, r, pattern)
	if !ok {
		return
	}
	a.mux.ServeHTTP(w, r)
}

// noRoute turns the mux's own 404 and 405 into problems; the 405 keeps its Allow header.
func (a *API) noRoute(w http.ResponseWriter, r *http.Request, h http.Handler) {
	rec := &statusOnly{header: w.Header(), status: http.StatusNotFound}
	h.ServeHTTP(rec, r)
	w.Header().Del("Content-Type")
	w.Header().Del("X-Content-Type-Options")
	if rec.status == http.StatusMethodNotAllowed {
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

func document(b []byte) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/yaml")
		_, _ = w.Write(b) // the client is gone if it fails
	}
}

// schema answers a JSON Schema. The route's wildcard is one segment, and fs.FS takes no name that leads out of it.
func (a *API) schema(w http.ResponseWriter, r *http.Request) {
	b, err := fs.ReadFile(a.Schemas, "json/"+r.PathValue("file"))
	if err != nil {
		a.fail(w, r, problem(http.StatusNotFound, "not_found", "Not found", "there is no such schema; /asyncapi.yaml names them"))
		return
	}
	answerBytes(w, http.StatusOK, b)
}

func (a *API) health(w http.ResponseWriter, _ *http.Request) {
	answer(w, http.StatusOK, Health{Status: HealthStatusOk})
}

// readyTimeout bounds all checks of readiness together.
const readyTimeout = 2 * time.Second

func (a *API) ready(w http.ResponseWriter, r *http.Request) {
	h := Health{Status: HealthStatusOk, Checks: map[string]string{}}
	if a.draining.Load() {
		h.Status = HealthStatusUnavailable
		h.Checks["process"] = "shutting down"
	}
	ctx, cancel := context.WithTimeout(r.Context(), readyTimeout)
	defer cancel()
	for name, err := range a.Ready(ctx) {
		var d interface{ Degraded() bool }
		switch {
		case err == nil:
			h.Checks[name] = "ok"
		case errors.As(err, &d) && d.Degraded():
			h.Checks[name] = clean("degraded: "+err.Error(), maxDetail)
		default:
			h.Status = HealthStatusUnavailable
			h.Checks[name] = clean(err.Error(), maxDetail)
		}
	}
	status := http.StatusOK
	if h.Status != HealthStatusOk {
		status = http.StatusServiceUnavailable
	}
	answer(w, status, h)
}

func answer(w http.ResponseWriter, status int, v any) {
	b, err := json.Marshal(v)
	if err != nil {
		panic("httpapi: a model does not marshal: " + err.Error())
	}
	answerBytes(w, status, append(b, '\n'))
}

func answerBytes(w http.ResponseWriter, status int, b []byte) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_, _ = w.Write(b) // the client is gone if it fails
}
