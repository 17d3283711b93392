package simulator

import (
	"fmt"
	"iter"
	"maps"
	"math/rand/v2"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"
)

// The statuses of an intent that occur here.
const (
	requiresMethod  = "requires_payment_method"
	requiresConfirm = "requires_confirmation"
	requiresAction  = "requires_action"
	requiresCapture = "requires_capture"
	succeeded       = "succeeded"
	canceled        = "canceled"
)

// maxAmount is Stripe's: eight digits of minor units.
const maxAmount = 99_999_999

// keyLife is how long Stripe keeps a key's answer.
const keyLife = 24 * time.Hour

// intent is a PaymentIntent with its one charge. A value in the ledger is never changed: a request makes a changed copy, which
// takes its place once the journal has it.
type intent struct {
	ID            string            `json:"id"`
	Amount        int64             `json:"amount"`
	Capturable    int64             `json:"capturable"`
	Received      int64             `json:"received"`
	Refunded      int64             `json:"refunded"`
	Captures      int               `json:"captures"` // how often money was taken: never more than once
	Currency      string            `json:"currency"`
	Manual        bool              `json:"manual"`
	NoAction      bool              `json:"no_action"` // error_on_requires_action
	Status        string            `json:"status"`
	PaymentMethod string            `json:"payment_method,omitempty"`
	Types         []string          `json:"types,omitempty"`
	Description   string            `json:"description,omitempty"`
	Created       int64             `json:"created"`
	CanceledAt    int64             `json:"canceled_at,omitempty"`
	CancelReason  string            `json:"cancel_reason,omitempty"`
	Charge        string            `json:"charge,omitempty"`
	Metadata      map[string]string `json:"metadata,omitempty"`
	LastError     *apiError         `json:"last_error,omitempty"`

	place int // in ledger.order
}

type refund struct {
	ID       string            `json:"id"`
	Intent   string            `json:"intent"`
	Charge   string            `json:"charge"`
	Amount   int64             `json:"amount"`
	Currency string            `json:"currency"`
	Created  int64             `json:"created"`
	Reason   string            `json:"reason,omitempty"`
	Metadata map[string]string `json:"metadata,omitempty"`

	place int
}

// stored is an idempotency key: in use for as long as it has no status, and then the answer that it repeats.
type stored struct {
	Key    string `json:"key"`
	Params string `json:"params"` // digest of path and parameters
	Status int    `json:"status"`
	Body   []byte `json:"body"`
	At     int64  `json:"at"` // seconds since 1970
}

// ledger is all state. It does no I/O and knows no lock: its owner holds one.
type ledger struct {
	now         func() time.Time
	rng         *rand.Rand
	last        int64 // created never falls, so that lists stay in order when the clock steps back
	intents     map[string]*intent
	order       []*intent // oldest first
	refunds     map[string]*refund
	refundOrder []*refund
	keys        map[string]*stored
	keyOrder    []*stored // by age, for dropping
}

func newLedger(now func() time.Time) *ledger {
	return &ledger{
		now: now, intents: map[string]*intent{}, refunds: map[string]*refund{}, keys: map[string]*stored{},
		rng: rand.New(rand.NewPCG(rand.Uint64(), rand.Uint64())),
	}
}

func (l *ledger) seconds() int64 { return max(l.now().Unix(), l.last) }

// id is unique by the number of what exists and hard to guess by the rest; it has the shape of Stripe's.
func (l *ledger) id(prefix string, n int) string {
	const letters = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
	b := make([]byte, 0, 32)
	b = append(append(b, prefix...), "_3S"...)
	count := strconv.FormatInt(int64(n), 36)
	b = append(append(b, "00000000"[:max(0, 8-len(count))]...), count...)
	for range 14 {
		b = append(b, letters[l.rng.IntN(len(letters))])
	}
	return string(b)
}

// apply takes a change over. It is the only writer of the ledger, at run time and when the journal is read.
func (l *ledger) apply(c change) {
	if in := c.Intent; in != nil {
		if old := l.intents[in.ID]; old != nil {
			in.place = old.place
			l.order[in.place] = in
		} else {
			in.place = len(l.order)
			l.order = append(l.order, in)
			l.last = max(l.last, in.Created)
		}
		l.intents[in.ID] = in
	}
	if re := c.Refund; re != nil && l.refunds[re.ID] == nil {
		re.place = len(l.refundOrder)
		l.refundOrder = append(l.refundOrder, re)
		l.refunds[re.ID] = re
		l.last = max(l.last, re.Created)
	}
	if k := c.Key; k != nil {
		l.keys[k.Key] = k
		l.keyOrder = append(l.keyOrder, k)
	}
	l.dropExpired()
}

func (l *ledger) dropExpired() {
	horizon := l.now().Add(-keyLife).Unix()
	n := 0
	for n < len(l.keyOrder) && l.keyOrder[n].At < horizon {
		if k := l.keyOrder[n]; l.keys[k.Key] == k { // not one that was used anew since
			delete(l.keys, k.Key)
		}
		l.keyOrder[n] = nil
		n++
	}
	l.keyOrder = l.keyOrder[n:]
}

// changes is the whole ledger as a journal would tell it.
func (l *ledger) changes() iter.Seq[change] {
	return func(yield func(change) bool) {
		for _, in := range l.order {
			if !yield(change{Intent: in}) {
				return
			}
		}
		for _, re := range l.refundOrder {
			if !yield(change{Refund: re}) {
				return
			}
		}
		for _, k := range l.keyOrder {
			if !yield(change{Key: k}) {
				return
			}
		}
	}
}

// declines are the test payment methods that a bank refuses, by what follows pm_card_.
var declines = map[string]struct{ code, decline, message string }{
	"chargeDeclined":                      {"card_declined", "generic_decline", "Your card was declined."},
	"chargeDeclinedInsufficientFunds":     {"card_declined", "insufficient_funds", "Your card has insufficient funds."},
	"chargeDeclinedLostCard":              {"card_declined", "lost_card", "Your card was declined."},
	"chargeDeclinedStolenCard":            {"card_declined", "stolen_card", "Your card was declined."},
	"chargeDeclinedFraudulent":            {"card_declined", "fraudulent", "Your card was declined."},
	"chargeDeclinedVelocityLimitExceeded": {"card_declined", "card_velocity_exceeded", "Your card was declined for making repeated attempts too frequently or exceeding its amount limit."},
	"chargeDeclinedExpiredCard":           {"expired_card", "", "Your card has expired."},
	"chargeDeclinedIncorrectCvc":          {"incorrect_cvc", "", "Your card's security code is incorrect."},
	"chargeDeclinedProcessingError":       {"processing_error", "", "An error occurred while processing your card. Try again in a little bit."},
}

var accepted = []string{"visa", "visa_debit", "mastercard", "mastercard_debit", "mastercard_prepaid", "amex", "discover", "diners", "jcb", "unionpay", "us", "de", "gb", "fr"}

// asksCustomer is the test payment method whose bank wants to see the customer.
const asksCustomer = "pm_card_authenticationRequired"

// judge answers whether a payment method exists and what the bank says of it.
func judge(method string) (refusal, missing *apiError) {
	name, ok := strings.CutPrefix(method, "pm_card_")
	if ok && slices.Contains(accepted, name) {
		return nil, nil
	}
	if _, rest, found := strings.Cut(name, "_"); found && ok && slices.Contains(accepted, strings.TrimSuffix(name, "_"+rest)) {
		name = rest // pm_card_visa_chargeDeclined
	}
	if d, found := declines[name]; ok && found {
		return declined(d.code, d.decline, d.message), nil
	}
	return nil, &apiError{
		status: http.StatusBadRequest, Type: invalidRequest, Code: "resource_missing", Param: "payment_method",
		Message: fmt.Sprintf("No such PaymentMethod: '%.60s'", method),
	}
}

func declined(code, decline, message string) *apiError {
	return &apiError{status: http.StatusPaymentRequired, Type: "card_error", Code: code, DeclineCode: decline, Message: message}
}

// result is what a request comes to: a change that is yet to be written down, and an answer.
type result struct {
	change change
	intent *intent // the answer, or the intent that the error speaks of
	refund *refund
	err    *apiError
}

// draft is a checked create request.
type draft struct {
	amount      int64
	currency    string
	manual      bool
	confirm     bool
	noAction    bool
	method      string
	types       []string
	description string
	metadata    map[string]string
}

func (l *ledger) create(d draft, declineIt bool) result {
	in := &intent{
		ID: l.id("pi", len(l.order)), Amount: d.amount, Currency: d.currency, Manual: d.manual, NoAction: d.noAction, Status: requiresMethod,
		PaymentMethod: d.method, Types: d.types, Description: d.description, Created: l.seconds(), Metadata: d.metadata,
	}
	if d.method != "" {
		in.Status = requiresConfirm
	}
	if d.confirm {
		return l.pay(in, declineIt)
	}
	return result{change: change{Intent: in}, intent: in}
}

// pay has the bank decide. in is this request's own copy.
func (l *ledger) pay(in *intent, declineIt bool) result {
	var refusal, missing *apiError
	switch {
	case in.PaymentMethod != asksCustomer:
		refusal, missing = judge(in.PaymentMethod)
	case in.NoAction:
		refusal = declined("authentication_required", "authentication_required", "Your card was declined. This transaction requires authentication.")
	default:
		in.Status = requiresAction
		return result{change: change{Intent: in}, intent: in}
	}
	if missing != nil {
		return result{err: missing}
	}
	if declineIt && refusal == nil {
		refusal = declined("card_declined", "generic_decline", "Your card was declined.")
	}
	in.Charge = "ch" + strings.TrimPrefix(in.ID, "pi")
	if refusal != nil {
		in.Status, in.LastError, in.PaymentMethod = requiresMethod, refusal, ""
		return result{change: change{Intent: in}, intent: in, err: refusal}
	}
	in.LastError = nil
	if in.Manual {
		in.Status, in.Capturable = requiresCapture, in.Amount
	} else {
		in.Status, in.Received, in.Captures = succeeded, in.Amount, in.Captures+1
	}
	return result{change: change{Intent: in}, intent: in}
}

func (l *ledger) find(id string) (*intent, *apiError) {
	if in := l.intents[id]; in != nil {
		return in, nil
	}
	return nil, missingObject("payment_intent", "intent", id)
}

func wrongState(in *intent, verb, needs string) result {
	return result{intent: in, err: &apiError{
		status: http.StatusBadRequest, Type: invalidRequest, Code: "payment_intent_unexpected_state",
		Message: fmt.Sprintf("This PaymentIntent could not be %s because it has a status of %s. Only a PaymentIntent with one of the following "+
			"statuses may be %s: %s.", verb, in.Status, verb, needs),
	}}
}

func (l *ledger) confirm(id, method string, declineIt bool) result {
	old, err := l.find(id)
	if err != nil {
		return result{err: err}
	}
	if old.Status != requiresMethod && old.Status != requiresConfirm {
		return wrongState(old, "confirmed", "requires_confirmation, requires_payment_method")
	}
	in := *old
	if method != "" {
		in.PaymentMethod = method
	}
	if in.PaymentMethod == "" {
		return wrongState(old, "confirmed", "requires_confirmation")
	}
	return l.pay(&in, declineIt)
}

// capture takes amount; zero: all that is held. What is not taken is released.
func (l *ledger) capture(id string, amount int64) result {
	old, err := l.find(id)
	switch {
	case err != nil:
		return result{err: err}
	case old.Status != requiresCapture:
		return wrongState(old, "captured", "requires_capture")
	case amount > old.Capturable:
		return result{intent: old, err: &apiError{
			status: http.StatusBadRequest, Type: invalidRequest, Code: "amount_too_large", Param: "amount_to_capture",
			Message: fmt.Sprintf("The amount to capture (%d) is above the amount that can be captured (%d).", amount, old.Capturable),
		}}
	case amount == 0:
		amount = old.Capturable
	}
	in := *old
	in.Status, in.Capturable, in.Received, in.Captures = succeeded, 0, amount, in.Captures+1
	return result{change: change{Intent: &in}, intent: &in}
}

func (l *ledger) cancel(id, reason string) result {
	old, err := l.find(id)
	switch {
	case err != nil:
		return result{err: err}
	case old.Status == succeeded || old.Status == canceled:
		return wrongState(old, "canceled", "requires_payment_method, requires_capture, requires_confirmation, requires_action, processing")
	}
	in := *old
	in.Status, in.Capturable, in.CanceledAt, in.CancelReason = canceled, 0, l.seconds(), reason
	return result{change: change{Intent: &in}, intent: &in}
}

// refundDraft is a checked refund request. Amount zero: all that is left.
type refundDraft struct {
	intent, charge, reason string
	amount                 int64
	metadata               map[string]string
}

func (l *ledger) giveBack(d refundDraft) result {
	id := d.intent
	if id == "" {
		id = "pi" + strings.TrimPrefix(d.charge, "ch")
	}
	old := l.intents[id]
	if old == nil || d.charge != "" && old.Charge != d.charge {
		e := missingObject("payment_intent", "payment_intent", id)
		if d.intent == "" {
			e = missingObject("charge", "charge", d.charge)
		}
		e.status = http.StatusBadRequest // named by a parameter, not by the path
		return result{err: e}
	}
	left := old.Received - old.Refunded
	switch {
	case old.Status != succeeded:
		return result{err: &apiError{
			status: http.StatusBadRequest, Type: invalidRequest, Code: unexpectedState, Param: "payment_intent",
			Message: fmt.Sprintf("This PaymentIntent (%s) does not have a successful charge to refund.", old.ID),
		}}
	case left == 0:
		return result{err: &apiError{
			status: http.StatusBadRequest, Type: invalidRequest, Code: "charge_already_refunded", Message: fmt.Sprintf("Charge %s has already been refunded.", old.Charge),
		}}
	case d.amount > left:
		return result{err: badParam("amount", "", fmt.Sprintf("Refund amount (%d) is greater than unrefunded amount on charge (%d)", d.amount, left))}
	case d.amount == 0:
		d.amount = left
	}
	in := *old
	in.Refunded += d.amount
	re := &refund{
		ID: l.id("re", len(l.refundOrder)), Intent: in.ID, Charge: in.Charge, Amount: d.amount, Currency: in.Currency,
		Created: l.seconds(), Reason: d.reason, Metadata: d.metadata,
	}
	return result{change: change{Intent: &in, Refund: re}, refund: re}
}

// Intent is one intent of the ledger, for tests and audits in the same process.
type Intent struct {
	ID, OrderID, Status, Currency    string
	Amount, Received, Refunded, Held int64 // minor units
	Captures                         int
}

func (l *ledger) view() []Intent {
	out := make([]Intent, 0, len(l.order))
	for _, in := range l.order {
		out = append(out, Intent{
			ID: in.ID, OrderID: in.Metadata["order_id"], Status: in.Status, Currency: in.Currency, Amount: in.Amount,
			Received: in.Received, Refunded: in.Refunded, Held: in.Capturable, Captures: in.Captures,
		})
	}
	return out
}

// window is what a list call asks for.
type window struct {
	limit    int64
	after    string // id; empty: from the newest
	from, to int64  // created, both included
	intent   string // refunds of one intent
}

// listIntents walks from the newest. Created never falls with the place, so the walk ends where the window does.
func (l *ledger) listIntents(w window) (page []*intent, more bool, err *apiError) {
	at := len(l.order) - 1
	if w.after != "" {
		in := l.intents[w.after]
		if in == nil {
			return nil, false, missingCursor("payment_intent", w.after)
		}
		at = in.place - 1
	}
	for ; at >= 0 && l.order[at].Created >= w.from; at-- {
		if l.order[at].Created > w.to {
			continue
		}
		if int64(len(page)) == w.limit {
			return page, true, nil
		}
		page = append(page, l.order[at])
	}
	return page, false, nil
}

func (l *ledger) listRefunds(w window) (page []*refund, more bool, err *apiError) {
	at := len(l.refundOrder) - 1
	if w.after != "" {
		re := l.refunds[w.after]
		if re == nil {
			return nil, false, missingCursor("refund", w.after)
		}
		at = re.place - 1
	}
	for ; at >= 0 && l.refundOrder[at].Created >= w.from; at-- {
		re := l.refundOrder[at]
		if re.Created > w.to || w.intent != "" && re.Intent != w.intent {
			continue
		}
		if int64(len(page)) == w.limit {
			return page, true, nil
		}
		page = append(page, re)
	}
	return page, false, nil
}

// balance adds up what was captured and not given back, by currency.
func (l *ledger) balance() map[string]int64 {
	out := map[string]int64{}
	for _, in := range l.order {
		if in.Received > 0 {
			out[in.Currency] += in.Received - in.Refunded
		}
	}
	return out
}

func currencies(m map[string]int64) []string { return slices.Sorted(maps.Keys(m)) }
