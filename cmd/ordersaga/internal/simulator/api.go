package simulator

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
)

// The types and codes of errors that more than one place needs.
const (
	invalidRequest   = "invalid_request_error"
	idempotencyError = "idempotency_error"
	unexpectedState  = "payment_intent_unexpected_state"
)

// apiError is an error in Stripe's shape.
type apiError struct {
	status      int
	Type        string      `json:"type"`
	Code        string      `json:"code,omitempty"`
	DeclineCode string      `json:"decline_code,omitempty"`
	Param       string      `json:"param,omitempty"`
	Message     string      `json:"message"`
	Intent      *intentJSON `json:"payment_intent,omitempty"`
}

func badParam(param, code, message string) *apiError {
	return &apiError{status: http.StatusBadRequest, Type: invalidRequest, Code: code, Param: param, Message: message}
}

func missingObject(object, param, id string) *apiError {
	return &apiError{
		status: http.StatusNotFound, Type: invalidRequest, Code: "resource_missing", Param: param, Message: fmt.Sprintf("No such %s: '%.60s'", object, id),
	}
}

func missingCursor(object, id string) *apiError {
	e := missingObject(object, "starting_after", id)
	e.status = http.StatusBadRequest
	return e
}

func internalError() *apiError {
	return &apiError{
		status: http.StatusInternalServerError, Type: "api_error",
		Message: "An unknown error occurred", // Stripe's words
	}
}

// intentJSON is what the API shows of an intent.
type intentJSON struct {
	ID                 string            `json:"id"`
	Object             string            `json:"object"`
	Amount             int64             `json:"amount"`
	AmountCapturable   int64             `json:"amount_capturable"`
	AmountReceived     int64             `json:"amount_received"`
	CanceledAt         *int64            `json:"canceled_at"`
	CancellationReason *string           `json:"cancellation_reason"`
	CaptureMethod      string            `json:"capture_method"`
	ConfirmationMethod string            `json:"confirmation_method"`
	Created            int64             `json:"created"`
	Currency           string            `json:"currency"`
	Description        *string           `json:"description"`
	LastPaymentError   *apiError         `json:"last_payment_error"`
	LatestCharge       any               `json:"latest_charge"` // id or object
	Livemode           bool              `json:"livemode"`
	Metadata           map[string]string `json:"metadata"`
	NextAction         any               `json:"next_action"`
	PaymentMethod      *string           `json:"payment_method"`
	PaymentMethodTypes []string          `json:"payment_method_types"`
	Status             string            `json:"status"`
}

type chargeJSON struct {
	ID             string            `json:"id"`
	Object         string            `json:"object"`
	Amount         int64             `json:"amount"`
	AmountCaptured int64             `json:"amount_captured"`
	AmountRefunded int64             `json:"amount_refunded"`
	Captured       bool              `json:"captured"`
	Created        int64             `json:"created"`
	Currency       string            `json:"currency"`
	Livemode       bool              `json:"livemode"`
	Metadata       map[string]string `json:"metadata"`
	Paid           bool              `json:"paid"`
	PaymentIntent  string            `json:"payment_intent"`
	Refunded       bool              `json:"refunded"`
	Status         string            `json:"status"`
}

type refundJSON struct {
	ID            string            `json:"id"`
	Object        string            `json:"object"`
	Amount        int64             `json:"amount"`
	Charge        string            `json:"charge"`
	Created       int64             `json:"created"`
	Currency      string            `json:"currency"`
	Metadata      map[string]string `json:"metadata"`
	PaymentIntent string            `json:"payment_intent"`
	Reason        *string           `json:"reason"`
	Status        string            `json:"status"`
}

type listJSON struct {
	Object  string `json:"object"`
	Data    any    `json:"data"`
	HasMore bool   `json:"has_more"`
	URL     string `json:"url"`
}

func orNull[T comparable](v T) *T {
	var zero T
	if v == zero {
		return nil
	}
	return &v
}

func orEmpty(m map[string]string) map[string]string {
	if m == nil {
		return map[string]string{}
	}
	return m
}

func (in *intent) json(expand bool) *intentJSON {
	out := &intentJSON{
		ID: in.ID, Object: "payment_intent", Amount: in.Amount, AmountCapturable: in.Capturable, AmountReceived: in.Received,
		CanceledAt: orNull(in.CanceledAt), CancellationReason: orNull(in.CancelReason), CaptureMethod: "automatic", ConfirmationMethod: "automatic",
		Created: in.Created, Currency: in.Currency, Description: orNull(in.Description), LastPaymentError: in.LastError,
		Metadata: orEmpty(in.Metadata), PaymentMethod: orNull(in.PaymentMethod), PaymentMethodTypes: in.Types, Status: in.Status,
	}
	if in.Manual {
		out.CaptureMethod = "manual"
	}
	switch {
	case in.Charge == "":
	case !expand:
		out.LatestCharge = in.Charge
	default:
		paid := in.Capturable > 0 || in.Received > 0 || in.Status == canceled && in.LastError == nil
		status := "failed"
		if paid {
			status = "succeeded"
		}
		out.LatestCharge = &chargeJSON{
			ID: in.Charge, Object: "charge", Amount: in.Amount, AmountCaptured: in.Received, AmountRefunded: in.Refunded, Captured: in.Captures > 0,
			Created: in.Created, Currency: in.Currency, Metadata: orEmpty(in.Metadata), Paid: paid, PaymentIntent: in.ID,
			Refunded: in.Received > 0 && in.Refunded == in.Received, Status: status,
		}
	}
	return out
}

func (re *refund) json() *refundJSON {
	return &refundJSON{
		ID: re.ID, Object: "refund", Amount: re.Amount, Charge: re.Charge, Created: re.Created, Currency: re.Currency,
		Metadata: orEmpty(re.Metadata), PaymentIntent: re.Intent, Reason: orNull(re.Reason), Status: "succeeded",
	}
}

// The parameters that each call takes. Those that change nothing here are taken all the same.
var (
	createParams = []string{
		"amount", "currency", "capture_method", "confirm", "error_on_requires_action", "payment_method", "payment_method_types", "metadata", "description",
		"expand", "off_session", "confirmation_method", "automatic_payment_methods", "return_url", "statement_descriptor_suffix", "receipt_email",
	}
	confirmParams = []string{"payment_method", "error_on_requires_action", "expand", "off_session", "return_url"}
	captureParams = []string{"amount_to_capture", "expand", "metadata", "final_capture"}
	cancelParams  = []string{"cancellation_reason", "expand"}
	refundParams  = []string{"payment_intent", "charge", "amount", "reason", "metadata", "expand"}
	getParams     = []string{"expand"}
	listParams    = []string{"limit", "starting_after", "created", "expand"}
	refundsParams = []string{"limit", "starting_after", "created", "expand", "payment_intent"}
)

// write is a request that can change the ledger, checked and ready to be carried out under the ledger's lock.
type write func(l *ledger, declineIt bool) result

type writeParser func(r *http.Request, p params) (write, *apiError)

func parseCreate(_ *http.Request, p params) (write, *apiError) {
	if e := required(p, "amount", "currency"); e != nil {
		return nil, e
	}
	d := draft{currency: p.Get("currency"), method: p.Get("payment_method"), types: p.list("payment_method_types"), description: p.Get("description")}
	var e [4]*apiError
	d.amount, e[0] = p.int("amount", 0, 1, maxAmount)
	d.confirm, e[1] = p.bool("confirm")
	d.noAction, e[2] = p.bool("error_on_requires_action")
	d.metadata, e[3] = metadata(p)
	for _, err := range e {
		if err != nil {
			return nil, err
		}
	}
	if len(d.types) == 0 {
		d.types = []string{"card"}
	}
	if !validCurrency(d.currency) {
		return nil, badParam("currency", "", fmt.Sprintf("Invalid currency: %.20s.", d.currency))
	}
	switch p.Get("capture_method") {
	case "manual":
		d.manual = true
	case "", "automatic", "automatic_async":
	default:
		return nil, badParam("capture_method", "", "Invalid capture_method: must be one of automatic, automatic_async, or manual")
	}
	if d.confirm && d.method == "" {
		return nil, badParam("payment_method", unexpectedState, "You cannot confirm this PaymentIntent because it's missing a payment method.")
	}
	return func(l *ledger, declineIt bool) result { return l.create(d, declineIt) }, nil
}

func validCurrency(c string) bool {
	return len(c) == 3 && strings.IndexFunc(c, func(r rune) bool { return r < 'a' || r > 'z' }) < 0
}

// metadata holds the bounds that Stripe documents.
func metadata(p params) (map[string]string, *apiError) {
	m := p.hash("metadata")
	if len(m) > 50 {
		return nil, badParam("metadata", "", "Metadata can have up to 50 keys.")
	}
	for k, v := range m {
		if len(k) > 40 || len(v) > 500 {
			return nil, badParam("metadata["+k+"]", "", "Metadata keys can have up to 40 characters and values up to 500.")
		}
	}
	return m, nil
}

func required(p params, names ...string) *apiError {
	for _, n := range names {
		if p.Get(n) == "" {
			return badParam(n, "parameter_missing", "Missing required param: "+n+".")
		}
	}
	return nil
}

func parseConfirm(r *http.Request, p params) (write, *apiError) {
	id, method := r.PathValue("id"), p.Get("payment_method")
	return func(l *ledger, declineIt bool) result { return l.confirm(id, method, declineIt) }, nil
}

func parseCapture(r *http.Request, p params) (write, *apiError) {
	id := r.PathValue("id")
	amount, err := p.int("amount_to_capture", 0, 1, maxAmount)
	return func(l *ledger, _ bool) result { return l.capture(id, amount) }, err
}

func parseCancel(r *http.Request, p params) (write, *apiError) {
	id, reason := r.PathValue("id"), p.Get("cancellation_reason")
	if reason != "" && !slices.Contains([]string{"duplicate", "fraudulent", "requested_by_customer", "abandoned"}, reason) {
		return nil, badParam("cancellation_reason", "", "Invalid cancellation_reason: must be one of duplicate, fraudulent, requested_by_customer, or abandoned")
	}
	return func(l *ledger, _ bool) result { return l.cancel(id, reason) }, nil
}

func parseRefund(_ *http.Request, p params) (write, *apiError) {
	d := refundDraft{intent: p.Get("payment_intent"), charge: p.Get("charge"), reason: p.Get("reason")}
	if d.intent == "" && d.charge == "" {
		return nil, badParam("charge", "parameter_missing", "One of the following params should be provided for this request: payment_intent or charge.")
	}
	var err *apiError
	if d.amount, err = p.int("amount", 0, 1, maxAmount); err != nil {
		return nil, err
	}
	d.metadata, err = metadata(p)
	return func(l *ledger, _ bool) result { return l.giveBack(d) }, err
}

func parseWindow(p params) (window, *apiError) {
	w := window{after: p.Get("starting_after"), intent: p.Get("payment_intent"), to: math.MaxInt64}
	var err *apiError
	if w.limit, err = p.int("limit", 10, 1, 100); err != nil {
		return w, err
	}
	for bound, set := range map[string]func(int64){
		"gte": func(n int64) { w.from = max(w.from, n) }, "gt": func(n int64) { w.from = max(w.from, n+1) },
		"lte": func(n int64) { w.to = min(w.to, n) }, "lt": func(n int64) { w.to = min(w.to, n-1) },
	} {
		name := "created[" + bound + "]"
		if !p.Has(name) {
			continue
		}
		n, err := p.int(name, 0, 0, math.MaxInt32*4)
		if err != nil {
			return w, err
		}
		set(n)
	}
	return w, nil
}

const (
	maxBody = 256 << 10
	maxKey  = 255 // characters of an idempotency key, Stripe's
)

// read gives the parameters of a request: the query of a GET, the form of a POST.
func readParams(r *http.Request, known []string) (params, *apiError) {
	raw := r.URL.RawQuery
	if r.Method == http.MethodPost {
		b, err := io.ReadAll(io.LimitReader(r.Body, maxBody+1))
		if err != nil || len(b) > maxBody {
			return params{}, badParam("", "", "The request body could not be read or is too large.")
		}
		raw = string(b)
	}
	v, err := url.ParseQuery(raw)
	if err != nil {
		return params{}, badParam("", "", "The parameters are not form-encoded.")
	}
	p := params{v}
	if name := p.unknown(known); name != "" {
		return params{}, badParam(name, "parameter_unknown", fmt.Sprintf("Received unknown parameter: %.60s", name))
	}
	return p, nil
}

// digest identifies what was asked for under a key. Encode sorts, so the order of parameters does not matter.
func digest(r *http.Request, p params) string {
	sum := sha256.Sum256([]byte(r.URL.Path + "\n" + p.Encode()))
	return hex.EncodeToString(sum[:12])
}

// reply is an answer that is ready to be sent.
type reply struct {
	status     int
	body       []byte
	replayed   bool
	stored     bool // under its key: what comes after will be the same
	retryAfter time.Duration
}

func encode(v any) []byte {
	b, err := json.Marshal(v)
	if err != nil { // cannot be: every type above is plain data
		panic("gateway simulator: " + err.Error())
	}
	return append(b, '\n')
}

func (e *apiError) reply() reply {
	return reply{status: e.status, body: encode(map[string]*apiError{"error": e})}
}

func (res result) reply(expand bool) reply {
	switch {
	case res.err != nil && res.intent != nil:
		e := *res.err
		e.Intent = res.intent.json(false)
		return e.reply()
	case res.err != nil:
		return res.err.reply()
	case res.refund != nil:
		return reply{status: http.StatusOK, body: encode(res.refund.json())}
	default:
		return reply{status: http.StatusOK, body: encode(res.intent.json(expand))}
	}
}

func (rep reply) send(w http.ResponseWriter, r *http.Request, requestID string) {
	h := w.Header()
	h.Set("Content-Type", "application/json")
	h.Set("Request-Id", requestID)
	if key := r.Header.Get("Idempotency-Key"); key != "" && r.Method == http.MethodPost {
		h.Set("Idempotency-Key", key)
	}
	if rep.replayed {
		h.Set("Idempotent-Replayed", "true")
	}
	if rep.status >= http.StatusInternalServerError && (rep.stored || rep.replayed) {
		h.Set("Stripe-Should-Retry", "false") // it would be repeated: Stripe says so too
	}
	if rep.retryAfter > 0 {
		h.Set("Retry-After", strconv.FormatInt(int64((rep.retryAfter+time.Second-1)/time.Second), 10))
	}
	h.Set("Content-Length", strconv.Itoa(len(rep.body)))
	w.WriteHeader(rep.status)
	_, _ = w.Write(rep.body) // a client that has gone does not hear it
}
