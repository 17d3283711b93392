// Package payment is the payment gateway: Stripe's PaymentIntents API through the official SDK, at a configurable base URL, so that
// the real Stripe, stripe-mock and our simulator are the same to it.
//
// It owns how a payment operation becomes HTTP calls, how long and how often it tries, and what an answer means. It keeps no state
// of orders: which key, which attempt and which intent is the caller's to know (see domain.PaymentRequest).
//
// # What it promises
//
//   - One operation under one key takes effect at most once for as long as the gateway keeps keys (Stripe: 24 h). Every try of an
//     operation, in place or by the caller later, sends the same key and the same parameters.
//   - An outcome is a fact that the gateway stated. Nothing is guessed: what is not known is an error that says so.
//   - PaymentUnknown is answered only when the gateway has no such intent: by id, or after the whole window of the order's life was
//     listed. A search that had to stop early is an error, never "unknown".
//   - Intents hold metadata.order_id, so the ledger can be read back by order through the list call. The search API is not used: it
//     is eventually consistent and must not prove absence.
//   - No API key, card detail or response body gets into errors or metrics.
//
// # What happens when things fail
//
// Errors are classified by behaviour, found with errors.As:
//
//   - Poison() bool — the gateway says that the request itself is wrong (400, 404 and their like), or the request cannot be sent as
//     it is. A repeat will not help.
//   - Outage() string — "payment gateway" is away for us: the breaker is open, our own limits are exhausted, or the gateway refuses
//     our credentials (401, 403: somebody must act). RetryAfter says when it makes sense to look again.
//   - RetryAfter() time.Duration — transient: wait at least so long (zero: no wish).
//   - OutcomeUnknown() bool — true: the operation may have taken effect (timeout, 5xx, connection lost after the request was sent, the
//     same key in use elsewhere). False: nothing took effect.
//   - Replayed() bool — true: the gateway repeated the stored answer of an earlier request with this key. The earlier execution has
//     ended, and another repeat will answer the same for 24 hours: look up, then, if nothing took effect, grow Attempt.
//
// A refusal (card declined, hold expired) is an outcome, not an error.
//
// # The path of a call
//
//	Do ─► operation ─► retry (few, full jitter, Retry-After) ─► bulkhead ─► rate limit ─► breaker ─► one HTTP call (Timeout)
//
// The one HTTP call goes through the SDK's RawRequest to a transport of our own (see wire), which keeps connections and starts no
// goroutine: net/http's client took a fifth of the service's processor time at saturation. It speaks HTTP/1.1, over TLS as well, and asks for
// no compression. Each try is written once; what a connection that breaks leaves open is an error with OutcomeUnknown, never a second
// write. Where the environment names a proxy for the gateway (HTTP_PROXY, HTTPS_PROXY, NO_PROXY), net/http's transport makes the calls, with
// the same promises, and HTTP/2 where the gateway has it. fasthttp's client was weighed as the library for this: it knows no contexts, does not
// tell whether a failed request was sent, does not look at a kept connection before it writes, and leaves a goroutine asleep after Close.
//
// The breaker counts technical failures only, and counts every HTTP call. Bulkhead and rate limit come before it, so that the one
// probe of a half-open breaker does not wait in a queue while everybody else is turned away.
package payment
