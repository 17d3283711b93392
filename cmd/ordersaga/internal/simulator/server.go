package simulator

import (
	"context"
	"crypto/subtle"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// Option changes how a Server is opened.
type Option func(*Server)

// WithAPIKey accepts this key only. Without it, anything that looks like a Stripe secret or restricted key (sk_…, rk_…) will do.
func WithAPIKey(key string) Option { return func(s *Server) { s.apiKey = key } }

// WithClock replaces time.Now for created, and for the life of idempotency keys.
func WithClock(now func() time.Time) Option { return func(s *Server) { s.ledger.now = now } }

// Server is the simulated gateway. It is an http.Handler; Listen serves it on an address of its own.
type Server struct {
	apiKey  string
	mux     *http.ServeMux
	dealer  *dealer
	closing chan struct{}
	once    sync.Once
	request atomic.Uint64
	replays atomic.Uint64
	calls   map[Op]*atomic.Uint64

	mu      sync.Mutex // of the two below
	ledger  *ledger
	journal *journal

	http   *http.Server
	served chan error
}

// Open gives a gateway whose ledger is in memory, or, with a directory, one that goes on with the ledger it finds there. Only one
// process may have a directory open.
func Open(dir string, options ...Option) (*Server, error) {
	s := &Server{
		mux: http.NewServeMux(), dealer: newDealer(), closing: make(chan struct{}), calls: map[Op]*atomic.Uint64{},
		ledger: newLedger(time.Now), journal: &journal{},
	}
	for _, o := range options {
		o(s)
	}
	for _, op := range ops {
		s.calls[op] = &atomic.Uint64{}
	}
	s.routes()
	if dir == "" {
		return s, nil
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("gateway directory: %w", err)
	}
	if err := readJournal(filepath.Join(dir, journalName), s.ledger.apply); err != nil {
		return nil, err
	}
	j, err := openJournal(dir, s.ledger.changes())
	if err != nil {
		return nil, err
	}
	s.journal = j
	return s, nil
}

// SetFaults replaces the faults and starts their generator anew.
func (s *Server) SetFaults(f Faults) error {
	if err := f.check(); err != nil {
		return err
	}
	s.dealer.set(f)
	return nil
}

// Faults answers the faults in force.
func (s *Server) Faults() Faults { return s.dealer.get() }

// Intents answers every intent, oldest first.
func (s *Server) Intents() []Intent {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.ledger.view()
}

// Listen serves on addr (host:port; port 0: a free one) and answers the base URL. Close ends it.
func (s *Server) Listen(ctx context.Context, addr string) (string, error) {
	if s.http != nil {
		return "", errors.New("the gateway simulator listens already")
	}
	var lc net.ListenConfig
	ln, err := lc.Listen(ctx, "tcp", addr)
	if err != nil {
		return "", fmt.Errorf("gateway simulator: %w", err)
	}
	s.http = &http.Server{Handler: s, ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 30 * time.Second, IdleTimeout: 2 * time.Minute, MaxHeaderBytes: 32 << 10}
	s.served = make(chan error, 1)
	go func() { s.served <- s.http.Serve(ln) }()
	return "http://" + ln.Addr().String(), nil
}

// Close ends waiting requests without an answer, the listener and the journal. It is safe to call twice.
func (s *Server) Close() error {
	var errs []error
	s.once.Do(func() {
		close(s.closing)
		if s.http != nil {
			errs = append(errs, s.http.Close())
			if err := <-s.served; !errors.Is(err, http.ErrServerClosed) {
				errs = append(errs, err)
			}
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		errs = append(errs, s.journal.close())
	})
	return errors.Join(errs...)
}

// ServeHTTP answers the API and the control endpoint.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) { s.mux.ServeHTTP(w, r) }

const (
	intentsURL = "/v1/payment_intents"
	refundsURL = "/v1/refunds"
)

func (s *Server) routes() {
	s.mux.HandleFunc("POST "+intentsURL, s.write(Create, createParams, parseCreate))
	s.mux.HandleFunc("POST "+intentsURL+"/{id}/confirm", s.write(Confirm, confirmParams, parseConfirm))
	s.mux.HandleFunc("POST "+intentsURL+"/{id}/capture", s.write(Capture, captureParams, parseCapture))
	s.mux.HandleFunc("POST "+intentsURL+"/{id}/cancel", s.write(Cancel, cancelParams, parseCancel))
	s.mux.HandleFunc("POST "+refundsURL, s.write(Refund, refundParams, parseRefund))
	s.mux.HandleFunc("GET "+intentsURL+"/{id}", s.read(Retrieve, getParams, s.retrieve))
	s.mux.HandleFunc("GET "+intentsURL, s.read(List, listParams, s.list))
	s.mux.HandleFunc("GET "+refundsURL+"/{id}", s.read(GetRefund, getParams, s.getRefund))
	s.mux.HandleFunc("GET "+refundsURL, s.read(ListRefunds, refundsParams, s.listRefunds))
	s.mux.HandleFunc("GET /v1/balance", s.read(Balance, getParams, s.getBalance))
	s.mux.HandleFunc("GET /_control", s.control)
	s.mux.HandleFunc("PUT /_control", s.setControl)
	s.mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusOK) })
	s.mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		s.send(w, r, (&apiError{
			status: http.StatusNotFound, Type: invalidRequest, Message: fmt.Sprintf("Unrecognized request URL (%s: %.80s).", r.Method, r.URL.Path),
		}).reply())
	})
}

func (s *Server) send(w http.ResponseWriter, r *http.Request, rep reply) {
	if rep.replayed {
		s.replays.Add(1)
	}
	rep.send(w, r, "req_"+strconv.FormatUint(s.request.Add(1), 36))
}

// allowed checks the API key, as bearer token or as the user of basic authentication.
func (s *Server) allowed(r *http.Request) *apiError {
	key, ok := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	if !ok {
		key, _, ok = r.BasicAuth()
	}
	e := &apiError{status: http.StatusUnauthorized, Type: invalidRequest, Message: "Invalid API Key provided."}
	switch {
	case !ok || key == "":
		e.Message = "You did not provide an API key."
		return e
	case s.apiKey != "" && subtle.ConstantTimeCompare([]byte(key), []byte(s.apiKey)) != 1:
		return e
	case s.apiKey == "" && !strings.HasPrefix(key, "sk_") && !strings.HasPrefix(key, "rk_"):
		return e
	}
	return nil
}

// wait lets a fault's latency pass. A client that goes meanwhile does not end it: a real gateway does not notice either. When the
// server closes, the connection ends without an effect.
func (s *Server) wait(d time.Duration) {
	if d <= 0 {
		return
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-s.closing:
		panic(http.ErrAbortHandler)
	}
}

// hang keeps a connection open without an answer, then closes it.
func (s *Server) hang(r *http.Request, d time.Duration) {
	var end <-chan time.Time
	if d > 0 {
		t := time.NewTimer(d)
		defer t.Stop()
		end = t.C
	}
	select {
	case <-end:
	case <-r.Context().Done():
	case <-s.closing:
	}
	panic(http.ErrAbortHandler)
}

// turnAway deals with the faults that keep a request from being looked at.
func (s *Server) turnAway(d dealt) (reply, bool) {
	switch d.kind {
	case drop:
		panic(http.ErrAbortHandler)
	case refuse:
		e := &apiError{status: http.StatusServiceUnavailable, Type: "api_error", Message: "The gateway is out of service."}
		rep := e.reply()
		rep.retryAfter = d.retryAfter
		return rep, true
	case throttle:
		e := &apiError{status: http.StatusTooManyRequests, Type: invalidRequest, Code: "rate_limit", Message: "Request rate limit exceeded."}
		rep := e.reply()
		rep.retryAfter = d.retryAfter
		return rep, true
	default:
		return reply{}, false
	}
}

func (s *Server) write(op Op, known []string, parse writeParser) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		s.calls[op].Add(1)
		d := s.dealer.draw(op)
		if rep, away := s.turnAway(d); away {
			s.send(w, r, rep)
			return
		}
		do, p, err := prepare(s, r, known, parse)
		if err != nil {
			s.send(w, r, err.reply())
			return
		}
		rep, answer := s.onceByKey(r, p, d, do)
		if !answer {
			s.hang(r, d.hang)
		}
		s.send(w, r, rep)
	}
}

func prepare(s *Server, r *http.Request, known []string, parse writeParser) (write, params, *apiError) {
	if err := s.allowed(r); err != nil {
		return nil, params{}, err
	}
	p, err := readParams(r, known)
	if err != nil {
		return nil, params{}, err
	}
	if len(r.Header.Get("Idempotency-Key")) > maxKey {
		return nil, params{}, badParam("", "", "Idempotency keys are restricted to a maximum length of 255 characters.")
	}
	do, err := parse(r, p)
	return do, p, err
}

// onceByKey carries a write out, once per key. False: the client is to get no answer.
func (s *Server) onceByKey(r *http.Request, p params, d dealt, do write) (reply, bool) {
	key := r.Header.Get("Idempotency-Key")
	claim, old := s.claim(key, digest(r, p))
	if claim == nil {
		s.wait(d.latency)
		return old, true
	}
	finished := false
	defer func() {
		if !finished { // the server is closing, or a defect: the key must not stay in use
			s.release(key, claim)
		}
	}()
	s.wait(d.latency)
	rep := s.carryOut(claim, p, d, do)
	finished = true
	return rep, d.kind != timeout
}

// claim marks a key as in use, or gives the answer that it already has. Without a key, every request is its own.
func (s *Server) claim(key, params string) (*stored, reply) {
	if key == "" {
		return &stored{}, reply{}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ledger.dropExpired()
	k := s.ledger.keys[key]
	switch {
	case k == nil:
		k = &stored{Key: key, Params: params}
		s.ledger.keys[key] = k
		return k, reply{}
	case k.Params != params:
		return nil, (&apiError{
			status: http.StatusBadRequest, Type: idempotencyError,
			Message: fmt.Sprintf("Keys for idempotent requests can only be used with the same parameters they were first used with. "+
				"Try using a key other than '%.80s' if you meant to execute a different request.", key),
		}).reply()
	case k.Status == 0:
		return nil, (&apiError{
			status: http.StatusConflict, Type: idempotencyError, Code: "idempotency_key_in_use",
			Message: fmt.Sprintf("There is currently another in-progress request using this Idempotent Key: %.80s.", key),
		}).reply()
	default:
		return nil, reply{status: k.Status, body: k.Body, replayed: true}
	}
}

func (s *Server) release(key string, k *stored) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ledger.keys[key] == k {
		delete(s.ledger.keys, key)
	}
}

// carryOut decides, writes the decision and its answer down, and only then lets both count.
func (s *Server) carryOut(claim *stored, p params, d dealt, do write) reply {
	s.mu.Lock()
	defer s.mu.Unlock()
	var res result
	if d.kind == errorBefore {
		res.err = internalError()
	} else {
		res = do(s.ledger, d.kind == decline)
	}
	rep := res.reply(expands(p, "latest_charge"))
	kept := rep // what the key will answer
	if d.kind == errorAfter {
		rep = internalError().reply()
		if !d.forget {
			kept = rep
		}
	}
	c := res.change
	switch {
	case claim.Key == "":
	case d.kind != errorBefore || !d.forget:
		c.Key = &stored{Key: claim.Key, Params: claim.Params, Status: kept.status, Body: kept.body, At: s.ledger.now().Unix()}
		rep.stored = kept.status == rep.status
	default: // nothing happened and nothing is known of it
		delete(s.ledger.keys, claim.Key)
	}
	if err := s.journal.append(c); err != nil {
		delete(s.ledger.keys, claim.Key)
		return internalError().reply()
	}
	s.ledger.apply(c)
	return rep
}

func expands(p params, what string) bool {
	for _, e := range p.list("expand") {
		if e == what {
			return true
		}
	}
	return false
}

func (s *Server) read(op Op, known []string, answer func(*http.Request, params) reply) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		s.calls[op].Add(1)
		d := s.dealer.draw(op)
		if rep, away := s.turnAway(d); away {
			s.send(w, r, rep)
			return
		}
		if err := s.allowed(r); err != nil {
			s.send(w, r, err.reply())
			return
		}
		p, err := readParams(r, known)
		if err != nil {
			s.send(w, r, err.reply())
			return
		}
		s.wait(d.latency)
		switch d.kind {
		case timeout:
			s.hang(r, d.hang)
		case errorBefore, errorAfter:
			s.send(w, r, internalError().reply())
		default:
			s.send(w, r, answer(r, p))
		}
	}
}

func (s *Server) retrieve(r *http.Request, p params) reply {
	s.mu.Lock()
	in, err := s.ledger.find(r.PathValue("id"))
	s.mu.Unlock()
	if err != nil {
		return err.reply()
	}
	return result{intent: in}.reply(expands(p, "latest_charge"))
}

func (s *Server) list(_ *http.Request, p params) reply {
	w, err := parseWindow(p)
	if err != nil {
		return err.reply()
	}
	s.mu.Lock()
	page, more, err := s.ledger.listIntents(w)
	s.mu.Unlock()
	if err != nil {
		return err.reply()
	}
	data, expand := make([]*intentJSON, len(page)), expands(p, "data.latest_charge")
	for i, in := range page {
		data[i] = in.json(expand)
	}
	return reply{status: http.StatusOK, body: encode(listJSON{Object: "list", Data: data, HasMore: more, URL: intentsURL})}
}

func (s *Server) getRefund(r *http.Request, _ params) reply {
	s.mu.Lock()
	re := s.ledger.refunds[r.PathValue("id")]
	s.mu.Unlock()
	if re == nil {
		return missingObject("refund", "id", r.PathValue("id")).reply()
	}
	return result{refund: re}.reply(false)
}

func (s *Server) listRefunds(_ *http.Request, p params) reply {
	w, err := parseWindow(p)
	if err != nil {
		return err.reply()
	}
	s.mu.Lock()
	page, more, err := s.ledger.listRefunds(w)
	s.mu.Unlock()
	if err != nil {
		return err.reply()
	}
	data := make([]*refundJSON, len(page))
	for i, re := range page {
		data[i] = re.json()
	}
	return reply{status: http.StatusOK, body: encode(listJSON{Object: "list", Data: data, HasMore: more, URL: refundsURL})}
}

func (s *Server) getBalance(*http.Request, params) reply {
	s.mu.Lock()
	sums := s.ledger.balance()
	s.mu.Unlock()
	type money struct {
		Amount   int64  `json:"amount"`
		Currency string `json:"currency"`
	}
	available := make([]money, 0, len(sums))
	for _, c := range currencies(sums) {
		available = append(available, money{sums[c], c})
	}
	return reply{status: http.StatusOK, body: encode(map[string]any{
		"object": "balance", "available": available, "pending": []money{}, "livemode": false,
	})}
}

// Status is what GET /_control answers.
type Status struct {
	Faults  Faults        `json:"faults"`
	Calls   map[Op]uint64 `json:"calls"`
	Dealt   map[Op]int    `json:"dealt"` // faults
	Replays uint64        `json:"replays"`
	Intents int           `json:"intents"`
	Refunds int           `json:"refunds"`
	Keys    int           `json:"keys"`
}

// Status tells what the gateway has done since it was opened, and what it holds.
func (s *Server) Status() Status {
	out := Status{Faults: s.Faults(), Calls: map[Op]uint64{}, Dealt: s.dealer.counts(), Replays: s.replays.Load()}
	for op, n := range s.calls {
		if v := n.Load(); v > 0 {
			out.Calls[op] = v
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	out.Intents, out.Refunds, out.Keys = len(s.ledger.order), len(s.ledger.refundOrder), len(s.ledger.keys)
	return out
}

func (s *Server) control(w http.ResponseWriter, r *http.Request) {
	if err := s.allowed(r); err != nil {
		s.send(w, r, err.reply())
		return
	}
	s.send(w, r, reply{status: http.StatusOK, body: encode(s.Status())})
}

func (s *Server) setControl(w http.ResponseWriter, r *http.Request) {
	if err := s.allowed(r); err != nil {
		s.send(w, r, err.reply())
		return
	}
	b, err := io.ReadAll(io.LimitReader(r.Body, maxBody))
	var f Faults
	if err == nil {
		f, err = ParseFaults(b)
	}
	if err == nil {
		err = s.SetFaults(f)
	}
	if err != nil {
		s.send(w, r, badParam("", "", err.Error()).reply())
		return
	}
	s.send(w, r, reply{status: http.StatusOK, body: encode(s.Status())})
}
