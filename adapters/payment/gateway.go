package payment

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
	"github.com/sony/gobreaker/v2"
	"github.com/stripe/stripe-go/v85"
	"golang.org/x/sync/semaphore"
	"golang.org/x/time/rate"

	"ordersaga/domain"
)

// Observer is told of every HTTP call and of the breaker. Its methods are called on the path of a payment and must not block or
// call the gateway.
type Observer interface {
	// PaymentCall reports one HTTP call, or one that was not sent (result open or saturated, took zero). Both labels come from small
	// fixed sets: authorize, capture, cancel, refund, retrieve, list, ready; and the Class constants.
	PaymentCall(call, result string, took time.Duration)
	// PaymentBreaker reports the breaker's new state: closed, half-open or open.
	PaymentBreaker(state string)
}

type nobody struct{}

func (nobody) PaymentCall(string, string, time.Duration) {}
func (nobody) PaymentBreaker(string)                     {}

// Option changes how a Gateway is built.
type Option func(*Gateway)

// WithObserver has every call reported to o.
func WithObserver(o Observer) Option { return func(g *Gateway) { g.observer = o } }

// WithTransport wraps the HTTP transport, for traces. The wrapper must pass the request's context on.
func WithTransport(wrap func(http.RoundTripper) http.RoundTripper) Option {
	return func(g *Gateway) { g.wrap = wrap }
}

// WithClock replaces time.Now for the window of look-ups.
func WithClock(now func() time.Time) Option { return func(g *Gateway) { g.now = now } }

// Gateway makes payment operations. It is safe for concurrent use and starts no goroutine of its own; Close gives the connections back.
type Gateway struct {
	cfg       Config
	backend   stripe.RawRequestBackend
	transport transport
	wrap      func(http.RoundTripper) http.RoundTripper
	breaker   *gobreaker.CircuitBreaker[answer]
	openUntil atomic.Int64 // ns since 1970: when the open breaker lets a probe through
	gate      atomic.Pointer[gate]
	observer  Observer
	now       func() time.Time
}

// New checks the configuration and builds a Gateway. It makes no call: Ready does.
func New(cfg Config, options ...Option) (*Gateway, error) {
	cfg = cfg.withDefaults()
	if err := cfg.check(); err != nil {
		return nil, err
	}
	g := &Gateway{cfg: cfg, transport: newTransport(cfg), observer: nobody{}, now: time.Now}
	for _, o := range options {
		o(g)
	}
	var round http.RoundTripper = g.transport
	if g.wrap != nil {
		round = g.wrap(round)
	}
	backend, ok := stripe.GetBackendWithConfig(stripe.APIBackend, &stripe.BackendConfig{
		URL: stripe.String(strings.TrimRight(cfg.BaseURL, "/")),
		HTTPClient: &http.Client{
			Transport: recorder{next: round},
			// A redirected POST would lose its body, or send the key to somebody else.
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
		MaxNetworkRetries: stripe.Int64(0),
		EnableTelemetry:   stripe.Bool(false),
		LeveledLogger:     &stripe.LeveledLogger{Level: stripe.LevelNull}, // it would log bodies; we report by error and Observer
	}).(stripe.RawRequestBackend)
	if !ok {
		return nil, errors.New("the Stripe SDK's backend makes no raw requests: pin the SDK to a major version that does (v85)")
	}
	g.backend = backend
	g.breaker = gobreaker.NewCircuitBreaker[answer](g.breakerSettings())
	if err := g.SetLimits(cfg.Limits); err != nil {
		return nil, err
	}
	return g, nil
}

func (g *Gateway) breakerSettings() gobreaker.Settings {
	b := g.cfg.Breaker
	return gobreaker.Settings{
		Name: Dependency, MaxRequests: 1, Interval: b.Window, BucketPeriod: max(b.Window/10, time.Millisecond), Timeout: b.OpenFor,
		ReadyToTrip: func(n gobreaker.Counts) bool {
			return int64(n.ConsecutiveFailures) >= int64(b.Consecutive) ||
				int64(n.Requests) >= int64(b.MinCalls) && float64(n.TotalFailures) >= b.Ratio*float64(n.Requests)
		},
		OnStateChange: func(_ string, _, to gobreaker.State) {
			if to == gobreaker.StateOpen {
				g.openUntil.Store(time.Now().Add(b.OpenFor).UnixNano())
			}
			g.observer.PaymentBreaker(to.String())
		},
		// A conflict is the gateway at work. Everything else that is an error is it, or the way to it, not working; that counts 429 (a
		// gateway that throttles for long is as good as away) and 401 (every call would be refused).
		IsSuccessful: func(err error) bool {
			var f *Failure
			return err == nil || errors.As(err, &f) && f.Class == Conflict
		},
		// A stored 500 says nothing of the gateway as it is now. If it counted, a payment whose key has one would open the breaker anew with
		// every probe, and the look-up that it needs, and everybody else's payments, would never be let through (F37).
		IsExcluded: func(err error) bool {
			var f *Failure
			return errors.As(err, &f) && (f.Class == Cancelled || f.replayed)
		},
	}
}

// SetLimits changes rate limit and bulkhead at once. Calls in flight keep the slots they have: for as long as they run, old and new
// calls together may exceed the new number. Zero fields mean their defaults.
func (g *Gateway) SetLimits(l Limits) error {
	if l.Concurrent == 0 {
		l.Concurrent = min(DefaultConcurrent, g.cfg.MaxConnections)
	}
	l = l.withDefaults()
	if err := l.check(g.cfg.MaxConnections); err != nil {
		return err
	}
	g.gate.Store(&gate{
		limits: l, slots: semaphore.NewWeighted(int64(l.Concurrent)), tokens: rate.NewLimiter(rate.Limit(l.PerSecond), l.Burst),
	})
	return nil
}

// Limits answers the limits in force.
func (g *Gateway) Limits() Limits { return g.gate.Load().limits }

// BreakerState answers closed, half-open or open.
func (g *Gateway) BreakerState() string { return g.breaker.State().String() }

// Close closes idle connections. Calls under way end by themselves.
func (g *Gateway) Close() { g.transport.CloseIdleConnections() }

// Do makes one payment operation. What it answers without an error is a fact; see the package comment for the errors. It may be
// called again with the same request at any time within the life of the gateway's keys (24 h).
func (g *Gateway) Do(ctx context.Context, r domain.PaymentRequest) (domain.PaymentOutcome, error) {
	if err := checkRequest(r); err != nil {
		return domain.PaymentOutcome{}, err
	}
	switch r.Op {
	case domain.Authorize:
		return g.authorize(ctx, r)
	case domain.Capture:
		return g.capture(ctx, r)
	case domain.Reverse:
		return g.reverse(ctx, r)
	case domain.LookUp:
		if r.Ref == "" {
			return g.search(ctx, r.Order)
		}
		return g.lookUp(ctx, r)
	default:
		return domain.PaymentOutcome{}, invalid("payment", "there is no operation %.20q", string(r.Op))
	}
}

func checkRequest(r domain.PaymentRequest) error {
	op := string(r.Op)
	switch {
	case r.Order.IsZero():
		return invalid(op, "the request has no order id")
	case r.Op != domain.LookUp && r.Attempt < 1:
		return invalid(op, "attempt is %d: the first is 1", r.Attempt)
	case (r.Op == domain.Capture || r.Op == domain.Reverse) && r.Ref == "":
		return invalid(op, "the request has no intent id: look the payment up by its order first")
	case r.Ref != "" && !validRef(r.Ref):
		return invalid(op, "%.40q is not an intent's id", r.Ref)
	}
	if r.Op != domain.Authorize && r.Op != domain.Capture {
		return nil
	}
	switch {
	case r.Amount.Minor < 1 || r.Amount.Minor > domain.MaxMinor:
		return invalid(op, "amount %d is not between 1 and %d minor units", r.Amount.Minor, domain.MaxMinor)
	case !domain.ValidCurrency(r.Amount.Currency):
		return invalid(op, "currency %.8q is not a three-letter code in upper case", r.Amount.Currency)
	case r.Op == domain.Authorize && (r.Method == "" || len(r.Method) > domain.MaxIDLength):
		return invalid(op, "the payment method is missing or longer than %d bytes", domain.MaxIDLength)
	}
	return nil
}

const intentsPath = "/v1/payment_intents"

// orderID is the metadata key by which look-ups and the audit find an order's intents.
const orderID = "order_id"

func (g *Gateway) authorize(ctx context.Context, r domain.PaymentRequest) (domain.PaymentOutcome, error) {
	c := write(callAuthorize, intentsPath, r.Key(), authorizeForm(r))
	a, in, err := g.intent(ctx, c)
	if err != nil {
		return domain.PaymentOutcome{}, err
	}
	switch {
	case a.status == http.StatusPaymentRequired:
		return domain.PaymentOutcome{Result: domain.PaymentRefused, Ref: a.intentID, Code: orUnstated(a.reason)}, nil
	case a.about(paramMethod):
		// The customer named a payment method that there is not. That is a fact about the order, not a mistake of ours: as poison it
		// would hold the stock until the deadline and ask for an operator each time somebody mistypes.
		return domain.PaymentOutcome{Result: domain.PaymentRefused, Code: orUnstated(a.reason)}, nil
	case !a.ok():
		return domain.PaymentOutcome{}, a.failure(c).asError()
	}
	if err := belongs(in, r.Order); err != nil {
		return domain.PaymentOutcome{}, a.malformed(c, err).asError()
	}
	switch in.Status {
	case statusRequiresCapture:
		return domain.PaymentOutcome{Result: domain.PaymentAuthorized, Ref: in.ID}, nil
	case statusRequiresMethod, statusRequiresConfirm, statusRequiresAction, statusCanceled:
		return domain.PaymentOutcome{Result: domain.PaymentRefused, Ref: in.ID, Code: orUnstated(in.reason())}, nil
	default:
		return domain.PaymentOutcome{}, unexpected(c, a, in)
	}
}

// paramMethod is the parameter by which Authorize names what the customer pays with.
const paramMethod = "payment_method"

// Codes that refuse a capture for good, beside those of an intent in another state.
var expiredHold = map[string]bool{
	string(stripe.ErrorCodeChargeExpiredForCapture):           true,
	string(stripe.ErrorCodeCaptureChargeAuthorizationExpired): true,
}

const unexpectedState = string(stripe.ErrorCodePaymentIntentUnexpectedState)

func (g *Gateway) capture(ctx context.Context, r domain.PaymentRequest) (domain.PaymentOutcome, error) {
	c := write(callCapture, intentsPath+"/"+r.Ref+"/capture", r.Key(), captureForm(r))
	a, in, err := g.intent(ctx, c)
	switch {
	case err != nil:
		return domain.PaymentOutcome{}, err
	case a.status == http.StatusPaymentRequired || expiredHold[a.code]:
		return domain.PaymentOutcome{Result: domain.PaymentRefused, Ref: r.Ref, Code: orUnstated(a.reason)}, nil
	case a.code == unexpectedState:
		return g.notCapturable(ctx, c, a, r)
	case !a.ok():
		return domain.PaymentOutcome{}, a.failure(c).asError()
	case in.Status == statusSucceeded:
		return domain.PaymentOutcome{Result: domain.PaymentCaptured, Ref: in.ID}, nil
	default:
		return domain.PaymentOutcome{}, unexpected(c, a, in)
	}
}

// notCapturable finds out why an intent could not be captured: captured before (under another key, say) is captured, cancelled or
// refunded is a definite no.
func (g *Gateway) notCapturable(ctx context.Context, c call, a answer, r domain.PaymentRequest) (domain.PaymentOutcome, error) {
	now, err := g.lookUp(ctx, r)
	if err != nil {
		return domain.PaymentOutcome{}, err
	}
	switch now.Result {
	case domain.PaymentCaptured:
		return now, nil
	case domain.PaymentReversed, domain.PaymentRefused:
		return domain.PaymentOutcome{Result: domain.PaymentRefused, Ref: r.Ref, Code: orUnstated(a.code)}, nil
	default:
		// Refused just now, capturable again: the gateway contradicts itself, or a stored answer is older than the intent's state.
		f := a.failure(c)
		f.Class, f.Detail = Conflict, "the gateway refused to capture an intent that can be captured"
		return domain.PaymentOutcome{}, f.asError()
	}
}

// reverse cancels, and refunds in full where cancelling is refused because the intent was captured.
func (g *Gateway) reverse(ctx context.Context, r domain.PaymentRequest) (domain.PaymentOutcome, error) {
	c := post(callCancel, intentsPath+"/"+r.Ref+"/cancel", r.Key(), &stripe.PaymentIntentCancelParams{
		CancellationReason: stripe.String(string(stripe.PaymentIntentCancellationReasonAbandoned)),
	})
	a, in, err := g.intent(ctx, c)
	switch {
	case err != nil:
		return domain.PaymentOutcome{}, err
	case a.ok() && in.Status == statusCanceled:
		return domain.PaymentOutcome{Result: domain.PaymentReversed, Ref: r.Ref}, nil
	case a.ok():
		return domain.PaymentOutcome{}, unexpected(c, a, in)
	case a.code != unexpectedState:
		return domain.PaymentOutcome{}, a.failure(c).asError()
	}
	// The refusal may be a stored answer: the intent's state now decides, not its state then.
	now, err := g.lookUp(ctx, r)
	if err != nil {
		return domain.PaymentOutcome{}, err
	}
	switch now.Result {
	case domain.PaymentReversed:
		return now, nil
	case domain.PaymentCaptured:
		return g.refund(ctx, r)
	default:
		f := a.failure(c)
		f.Class, f.Detail = Conflict, fmt.Sprintf("the gateway refused to cancel, and yet the payment is %s", now.Result)
		return domain.PaymentOutcome{}, f.asError()
	}
}

// refund gives back all that is left of what was captured. One key names one request at the gateway, so the refund's is the
// reversal's with a suffix.
func (g *Gateway) refund(ctx context.Context, r domain.PaymentRequest) (domain.PaymentOutcome, error) {
	c := post(callRefund, "/v1/refunds", r.Key()+"/refund", &stripe.RefundParams{
		PaymentIntent: stripe.String(r.Ref),
		Metadata:      map[string]string{orderID: r.Order.String()},
	})
	a, err := g.do(ctx, c)
	switch {
	case err != nil:
		return domain.PaymentOutcome{}, err
	case a.code == string(stripe.ErrorCodeChargeAlreadyRefunded):
		return domain.PaymentOutcome{Result: domain.PaymentReversed, Ref: r.Ref}, nil
	case !a.ok():
		// 402 too: the balance cannot cover the refund. The money is still with us, so this is no outcome but a failure that stays visible.
		return domain.PaymentOutcome{}, a.failure(c).asError()
	}
	re, err := decodeRefund(a.body)
	if err != nil {
		return domain.PaymentOutcome{}, a.malformed(c, err).asError()
	}
	switch stripe.RefundStatus(re.Status) {
	case stripe.RefundStatusSucceeded, stripe.RefundStatusPending: // pending: accepted, the bank has yet to book it
		return domain.PaymentOutcome{Result: domain.PaymentReversed, Ref: r.Ref}, nil
	default:
		return domain.PaymentOutcome{}, &Failure{
			Op: callRefund, Class: Server, Status: a.status, Code: token(re.FailureReason), RequestID: a.requestID, replayed: a.replayed,
			Detail: fmt.Sprintf("the refund is %s: the money was not given back", token(re.Status)),
		}
	}
}

// lookUp asks for the intent by id.
func (g *Gateway) lookUp(ctx context.Context, r domain.PaymentRequest) (domain.PaymentOutcome, error) {
	params := &stripe.PaymentIntentParams{}
	params.Expand = []*string{stripe.String("latest_charge")}
	c := get(callRetrieve, intentsPath+"/"+r.Ref, params)
	a, in, err := g.intent(ctx, c)
	switch {
	case err != nil:
		return domain.PaymentOutcome{}, err
	case r.Op == domain.LookUp && a.status == http.StatusNotFound && a.code == string(stripe.ErrorCodeResourceMissing):
		return domain.PaymentOutcome{Result: domain.PaymentUnknown}, nil
	case !a.ok():
		return domain.PaymentOutcome{}, a.failure(c).asError()
	}
	if err := belongs(in, r.Order); err != nil {
		return domain.PaymentOutcome{}, invalid(callRetrieve, "%s: %s", in.ID, err)
	}
	if in.Status == statusProcessing {
		return domain.PaymentOutcome{}, pending(c, a)
	}
	out, ok := in.outcome()
	if !ok {
		return domain.PaymentOutcome{}, unexpected(c, a, in)
	}
	return out, nil
}

// Bounds of a look-up by order id.
const (
	pageSize = 100 // Stripe's highest
	// maxPages bounds one search: a hundred thousand intents. A window that holds more cannot prove absence in one call.
	maxPages = 1000
	// clockSkew is how far ahead a client's clock may be when it draws an order id, and how far ours may differ from the gateway's.
	clockSkew = 24 * time.Hour
)

// search finds an order's intent by listing, newest first. Of several intents, one that holds or has money wins over one that was
// reversed, and that over one that was refused: after a lost answer and a second attempt, the older may be the live one. So only a
// live one ends the search early, and PaymentUnknown needs the whole window.
func (g *Gateway) search(ctx context.Context, id domain.OrderID) (domain.PaymentOutcome, error) {
	want := id.String()
	found := domain.PaymentOutcome{Result: domain.PaymentUnknown}
	c := call{name: callList, method: http.MethodGet}
	pages := 0
	for p, err := range g.pages(ctx, g.searchFrom(id)) {
		if err != nil {
			return domain.PaymentOutcome{}, err
		}
		for i := range p.Data {
			in := &p.Data[i]
			if in.Metadata.OrderID != want {
				continue
			}
			if in.Status == statusProcessing {
				return domain.PaymentOutcome{}, pending(c, answer{})
			}
			out, ok := in.outcome()
			if !ok {
				return domain.PaymentOutcome{}, unexpected(c, answer{}, *in)
			}
			if holdsMoney(out.Result) {
				return out, nil
			}
			if found.Result == domain.PaymentUnknown || found.Result == domain.PaymentRefused && out.Result == domain.PaymentReversed {
				found = out
			}
		}
		if pages++; pages >= maxPages && p.HasMore {
			return domain.PaymentOutcome{}, &Failure{
				Op: callList, Class: Pending,
				Detail: fmt.Sprintf("stopped after %d intents without a proof; look the intent up by its id or shorten the look-up window", pages*pageSize),
			}
		}
	}
	return found, nil
}

func holdsMoney(r domain.PaymentResult) bool {
	return r == domain.PaymentCaptured || r == domain.PaymentAuthorized
}

// searchFrom is where the window of an order's look-up begins. A UUIDv7 tells when it was drawn, but a client's clock may have
// drawn it: it only ever shortens the window by what even a clock a day ahead cannot have got wrong, and a time to come is ignored.
func (g *Gateway) searchFrom(id domain.OrderID) time.Time {
	now := g.now()
	from := now.Add(-g.cfg.LookUpWindow)
	if u := uuid.UUID(id); u.Version() == 7 {
		sec, nsec := u.Time().UnixTime()
		if drawn := time.Unix(sec, nsec); drawn.Before(now) && drawn.Add(-clockSkew).After(from) {
			from = drawn.Add(-clockSkew)
		}
	}
	return from
}

// outcome reads the state of an intent; false: a status that this code does not know.
func (in *intent) outcome() (domain.PaymentOutcome, bool) {
	out := domain.PaymentOutcome{Ref: in.ID}
	switch in.Status {
	case statusRequiresCapture:
		out.Result = domain.PaymentAuthorized
	case statusSucceeded:
		out.Result = domain.PaymentCaptured
		if in.LatestCharge.Refunded || in.AmountReceived > 0 && in.LatestCharge.AmountRefunded >= in.AmountReceived {
			out.Result = domain.PaymentReversed
		}
	case statusCanceled:
		out.Result = domain.PaymentReversed
	case statusRequiresMethod, statusRequiresConfirm, statusRequiresAction:
		out.Result, out.Code = domain.PaymentRefused, orUnstated(in.reason())
	default:
		return domain.PaymentOutcome{}, false
	}
	return out, true
}

func (in *intent) reason() string {
	if c := in.LastError.code(); c != "" {
		return c
	}
	return token(in.Status)
}

// orUnstated keeps a refusal from being shown without any word.
func orUnstated(code string) string {
	if code == "" {
		return "unstated"
	}
	return code
}

// belongs refuses an intent that names another order: capturing or refunding it would move somebody else's money.
func belongs(in intent, id domain.OrderID) error {
	if o := in.Metadata.OrderID; o != "" && !strings.EqualFold(o, id.String()) {
		return fmt.Errorf("the intent belongs to order %.36q, not to %s", clean(o, ""), id)
	}
	return nil
}

// intent makes a call whose 2xx is an intent.
func (g *Gateway) intent(ctx context.Context, c call) (answer, intent, error) {
	a, err := g.do(ctx, c)
	if err != nil || !a.ok() {
		return a, intent{}, err
	}
	in, err := decodeIntent(a.body)
	if err != nil {
		return answer{}, intent{}, a.malformed(c, err).asError()
	}
	return a, in, nil
}

func unexpected(c call, a answer, in intent) error {
	if in.Status == statusProcessing {
		return pending(c, a)
	}
	return a.malformed(c, fmt.Errorf("the intent's status is %q, which this call does not lead to", token(in.Status))).asError()
}

// pending: the gateway has taken the request and not decided it yet.
func pending(c call, a answer) error {
	return &Failure{
		Op: c.name, Class: Pending, Status: a.status, RequestID: a.requestID, unknown: c.writes(), replayed: a.replayed,
		retryAfter: time.Second, Detail: "the gateway is still processing the intent",
	}
}
