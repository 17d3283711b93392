package domain

import "strconv"

// PaymentOp is a thing to be done at the payment gateway.
type PaymentOp string

// The operations of the payment gateway.
const (
	Authorize PaymentOp = "authorize" // hold the amount: create and confirm an intent with manual capture
	Capture   PaymentOp = "capture"   // take what was held
	Reverse   PaymentOp = "reverse"   // cancel the intent; refund it where cancelling is refused because it was captured
	LookUp    PaymentOp = "lookup"    // ask what became of an intent
)

// PaymentRequest is one operation on one order's payment.
type PaymentRequest struct {
	Op      PaymentOp
	Order   OrderID
	Attempt int    // n of the idempotency key, from 1; grows only after a look-up proved that nothing took effect
	Amount  Money  // Authorize and Capture
	Method  string // Authorize: payment method
	Ref     string // the intent's id: Capture, Reverse and LookUp. LookUp with an empty Ref searches by order id
}

// Key is the gateway's idempotency key of the request: <order>/<step>/<n>.
func (r PaymentRequest) Key() string {
	return r.Order.String() + "/" + string(r.Op) + "/" + strconv.Itoa(r.Attempt)
}

// PaymentResult is what a payment operation came to, as a fact.
type PaymentResult string

// The results of payment operations.
const (
	PaymentAuthorized PaymentResult = "authorized" // Authorize took effect; LookUp: held and not yet captured
	PaymentCaptured   PaymentResult = "captured"   // Capture took effect; LookUp: captured
	PaymentReversed   PaymentResult = "reversed"   // Reverse took effect (nothing held any more, or refunded in full); LookUp: cancelled or refunded
	PaymentRefused    PaymentResult = "refused"    // a definite no (card declined, intent not capturable any more): nothing took effect and a repeat will not change that
	PaymentUnknown    PaymentResult = "unknown"    // LookUp only: the gateway has no such intent, so nothing took effect
)

// PaymentOutcome is the gateway's answer. Technical failures are errors instead, classified by behaviour (see adapters/payment).
type PaymentOutcome struct {
	Result PaymentResult
	Ref    string // the intent's id
	Code   string // the gateway's own code of a refusal, such as card_declined or insufficient_funds; shown to operators
}
