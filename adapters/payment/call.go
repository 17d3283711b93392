package payment

import (
	"context"
	"errors"
	"net/http"
	"net/url"
	"time"

	"github.com/cenkalti/backoff/v4"
	"github.com/sony/gobreaker/v2"
	"github.com/stripe/stripe-go/v85"
	"golang.org/x/sync/semaphore"
	"golang.org/x/time/rate"
)

// The calls, as metric labels.
const (
	callAuthorize = "authorize"
	callCapture   = "capture"
	callCancel    = "cancel"
	callRefund    = "refund"
	callRetrieve  = "retrieve"
	callList      = "list"
	callReady     = "ready"
)

// call is one API call. A write has a key, and whatever its tries come to, they all send the same one.
type call struct {
	name   string
	method string
	path   string // with the query of a GET
	body   string
	key    string
}

func post(name, path, key string, params any) call { return write(name, path, key, encode(params)) }

func write(name, path, key, body string) call {
	return call{name: name, method: http.MethodPost, path: path, key: key, body: body}
}

func get(name, path string, params any) call {
	if q := encode(params); q != "" {
		path += "?" + q
	}
	return call{name: name, method: http.MethodGet, path: path}
}

// writes says whether the call can take effect.
func (c call) writes() bool { return c.method == http.MethodPost }

// answer is a definite answer: 2xx, 402, or a status that says that the request is wrong.
type answer struct {
	status    int
	body      []byte // of a 2xx
	replayed  bool
	requestID string

	// of the others
	code     string // the gateway's code
	reason   string // the one word for an operator: the decline code where it says more
	param    string
	detail   string
	intentID string // the intent that a refusal speaks of
}

func (a answer) ok() bool { return a.status >= 200 && a.status < 300 }

// about reports that the request was found wrong for one parameter.
func (a answer) about(param string) bool {
	return (a.status == http.StatusBadRequest || a.status == http.StatusNotFound) && a.param == param
}

func (a answer) class() Class {
	switch {
	case a.ok():
		return OK
	case a.status == http.StatusPaymentRequired:
		return Refused
	default:
		return Rejected
	}
}

// failure makes an error of a definite answer that the operation has no better reading for.
func (a answer) failure(c call) *Failure {
	detail := a.detail
	if a.param != "" {
		detail = "parameter " + a.param + ": " + detail
	}
	return &Failure{
		Op: c.name, Class: Rejected, Status: a.status, Code: a.code, RequestID: a.requestID, Detail: detail, replayed: a.replayed,
	}
}

// malformed is a 2xx whose body does not say what a 2xx should: the call may well have taken effect.
func (a answer) malformed(c call, err error) *Failure {
	return &Failure{
		Op: c.name, Class: Malformed, Status: a.status, RequestID: a.requestID, Detail: err.Error(), unknown: c.writes(), replayed: a.replayed, cause: err,
	}
}

// gate is the pair of limits in force. A call takes both from one gate and gives the slot back to the same.
type gate struct {
	limits Limits
	slots  *semaphore.Weighted
	tokens *rate.Limiter
}

// retrying waits between tries: full jitter from backoff/v4, or longer where the gateway says so. A wait that does not fit into what is
// left of the time ends the tries: then the retry topics wait instead of us.
type retrying struct {
	backoff.BackOff
	floor time.Duration
	until time.Time
}

func (r *retrying) NextBackOff() time.Duration {
	d := r.BackOff.NextBackOff()
	if d == backoff.Stop {
		return d
	}
	d = max(d, r.floor)
	if time.Now().Add(d).After(r.until) {
		return backoff.Stop
	}
	return d
}

func (g *Gateway) newRetrying() *retrying {
	p := g.cfg.Retry
	// RandomizationFactor 1 draws from [0, 2·interval]: half the base makes it full jitter over [0, base].
	b := backoff.NewExponentialBackOff(
		backoff.WithInitialInterval(p.Base/2), backoff.WithMaxInterval(p.Max/2), backoff.WithMultiplier(2),
		backoff.WithRandomizationFactor(1), backoff.WithMaxElapsedTime(p.Elapsed),
	)
	return &retrying{BackOff: backoff.WithMaxRetries(b, uint64(p.Retries)), until: time.Now().Add(p.Elapsed)} //nolint:gosec // 0 ≤ Retries ≤ MaxRetries
}

// do makes a call until it has a definite answer, the tries are used up or the caller gives up. The failure it answers says
// "unknown" if any try may have taken effect: a later try that was not even sent does not undo an earlier one.
func (g *Gateway) do(ctx context.Context, c call) (answer, error) {
	until := time.Now().Add(g.cfg.Retry.Elapsed)
	got, last := g.try(ctx, c)
	if last == nil {
		return got, nil // most calls: nothing is made ready for a retry
	}
	if last.retryable() {
		if got, last = g.again(ctx, c, last, until); last == nil {
			return got, nil
		}
	}
	if err := ctx.Err(); err != nil {
		last.cause = err
	}
	return answer{}, last.asError()
}

// again makes the tries after the first one, which failed with last. None starts after until.
func (g *Gateway) again(ctx context.Context, c call, last *Failure, until time.Time) (got answer, _ *Failure) {
	wait := g.newRetrying()
	wait.until = until
	first, unknown := true, false
	_ = backoff.Retry(func() error { // it answers what last says, or that the context ended between two tries
		if !first {
			got, last = g.try(ctx, c)
		}
		first = false
		if last == nil {
			return nil
		}
		unknown = unknown || last.unknown
		wait.floor = last.retryAfter
		if !last.retryable() {
			return backoff.Permanent(last)
		}
		return last
	}, backoff.WithContext(wait, ctx))
	if last != nil {
		last.unknown = unknown
	}
	return got, last
}

// try passes one call through bulkhead, rate limit and breaker.
func (g *Gateway) try(ctx context.Context, c call) (answer, *Failure) {
	if f := g.turnedAway(c, g.breaker.State() == gobreaker.StateOpen); f != nil {
		return answer{}, f // before queueing: an outage must be told at once
	}
	limits := g.gate.Load()
	if f := g.enter(ctx, c, limits); f != nil {
		return answer{}, f
	}
	defer limits.slots.Release(1)
	a, err := g.breaker.Execute(func() (answer, error) {
		start := time.Now()
		a, f := g.send(ctx, c)
		class := a.class()
		if f != nil {
			class = f.Class
		}
		g.observer.PaymentCall(c.name, string(class), time.Since(start))
		if f != nil {
			return answer{}, f // a nil *Failure must not become a non-nil error
		}
		return a, nil
	})
	if err == nil {
		return a, nil
	}
	var f *Failure
	if errors.As(err, &f) {
		return answer{}, f
	}
	return answer{}, g.turnedAway(c, true) // ErrOpenState, ErrTooManyRequests
}

// turnedAway is the failure of a call that an open breaker did not let through.
func (g *Gateway) turnedAway(c call, open bool) *Failure {
	if !open {
		return nil
	}
	g.observer.PaymentCall(c.name, string(Open), 0)
	left := time.Until(time.Unix(0, g.openUntil.Load()))
	return &Failure{
		Op: c.name, Class: Open, retryAfter: max(left, minProbeWait),
		Detail: "not sent: the last calls failed, the circuit breaker is open",
	}
}

// minProbeWait is how long to wait while somebody else's probe of a half-open breaker is under way.
const minProbeWait = 100 * time.Millisecond

// enter waits for a slot and a token. The wait is bounded; what waited in vain was not sent and spent nothing at the gateway.
func (g *Gateway) enter(ctx context.Context, c call, limits *gate) *Failure {
	if ctx.Err() == nil && limits.slots.TryAcquire(1) {
		if limits.tokens.Allow() {
			return nil // most calls: no wait, and no timer for it
		}
		limits.slots.Release(1)
	}
	wait, cancel := context.WithTimeout(ctx, g.cfg.QueueTimeout)
	defer cancel()
	err := limits.slots.Acquire(wait, 1)
	if err == nil {
		if err = limits.tokens.Wait(wait); err == nil {
			return nil
		}
		limits.slots.Release(1)
	}
	if ctx.Err() != nil {
		return &Failure{Op: c.name, Class: Cancelled, Detail: "not sent: the caller gave up while waiting for its turn", cause: ctx.Err()}
	}
	g.observer.PaymentCall(c.name, string(Saturated), 0)
	return &Failure{
		Op: c.name, Class: Saturated, retryAfter: time.Second,
		Detail: "not sent: no turn within our own limits; raise the payment limits or send less",
	}
}

// send makes the one HTTP call and reads what came of it.
func (g *Gateway) send(ctx context.Context, c call) (answer, *Failure) {
	t := &trip{body: c.body}
	limited, cancel := context.WithTimeout(ctx, g.cfg.Timeout)
	defer cancel()
	params := &stripe.RawParams{Params: stripe.Params{Context: context.WithValue(limited, tripKey{}, t)}}
	if c.key != "" {
		params.IdempotencyKey = &c.key
	}
	res, err := g.backend.RawRequest(c.method, c.path, g.cfg.APIKey, c.body, params)
	if err == nil && res.StatusCode < 300 {
		return answer{status: res.StatusCode, body: t.answer, replayed: t.replayed, requestID: t.requestID}, nil
	}
	if err == nil {
		return answer{}, &Failure{
			Op: c.name, Class: Malformed, Status: t.status, unknown: c.writes(), replayed: t.replayed,
			Detail: "the payment URL answers with a redirect: give the API's own address",
		}
	}
	return g.classify(ctx, limited, c, t, err)
}

// classify reads an error of the SDK. Only what the gateway itself stated is definite.
func (g *Gateway) classify(ctx, limited context.Context, c call, t *trip, err error) (answer, *Failure) {
	f := &Failure{Op: c.name, Status: t.status, RequestID: t.requestID, replayed: t.replayed, retryAfter: t.retryAfter}
	var said *stripe.Error
	switch {
	case errors.As(err, &said):
		f.Code = token(string(said.Code))
	case t.status < http.StatusBadRequest || limited.Err() != nil:
		f.broken(ctx, limited, c, t, err)
		return answer{}, f
	default:
		said = nil // a proxy's page, not the API's JSON: the status is all there is
	}
	switch s := t.status; {
	case s == http.StatusUnauthorized || s == http.StatusForbidden || s == http.StatusProxyAuthRequired:
		f.Class, f.retryAfter = Auth, max(f.retryAfter, g.cfg.Breaker.OpenFor)
		f.Detail = "the gateway refuses our API key: check it, its permissions and its mode (test or live)"
	case s == http.StatusConflict:
		// The request that holds the key may be an earlier try of ours that timed out.
		f.Class, f.unknown, f.Detail = Conflict, c.writes(), "another request with this key is being worked on"
	case s == http.StatusTooManyRequests:
		f.Class, f.Detail = Throttled, "the gateway asks us to send less"
	case s >= 500 || s == http.StatusRequestTimeout || s == http.StatusFailedDependency || s == http.StatusTooEarly:
		f.Class, f.unknown, f.Detail = Server, c.writes(), "the gateway failed"
	case said == nil:
		f.Class, f.unknown, f.Detail = Malformed, c.writes(), "the answer is not the API's: does something else answer at the payment URL?"
	default:
		return g.definite(t, said), nil
	}
	return answer{}, f
}

func (g *Gateway) definite(t *trip, said *stripe.Error) answer {
	e := paymentError{Code: string(said.Code), DeclineCode: string(said.DeclineCode)}
	a := answer{
		status: t.status, replayed: t.replayed, requestID: t.requestID,
		code: token(e.Code), reason: e.code(), param: clean(said.Param, g.cfg.APIKey), detail: clean(said.Msg, g.cfg.APIKey),
	}
	if said.PaymentIntent != nil && validRef(said.PaymentIntent.ID) {
		a.intentID = said.PaymentIntent.ID
	}
	return a
}

// broken fills in a call that ended without a whole answer.
func (f *Failure) broken(ctx, limited context.Context, c call, t *trip, err error) {
	f.unknown = c.writes() && t.sent.Load()
	switch {
	case ctx.Err() != nil:
		f.Class, f.cause, f.Detail = Cancelled, ctx.Err(), "the caller gave up"
	case limited.Err() != nil:
		f.Class, f.cause, f.Detail = Timeout, limited.Err(), "no answer in time"
	default:
		f.Class, f.cause, f.Detail = Connection, plain(err), "could not connect"
		if t.sent.Load() {
			f.Detail = "the connection broke before the answer was complete"
		}
		f.Detail += ": " + clean(f.cause.Error(), "")
	}
}

// plain takes the net/http wrapping off an error: the URL in it has the look-up's parameters, and says nothing new.
func plain(err error) error {
	var u *url.Error
	if errors.As(err, &u) {
		return u.Err
	}
	return err
}
