// Package httpapi is the HTTP interface: the intake of orders, their reading and following, and the operators' side.
//
// It owns the protocol and nothing else: authentication and roles, rate limits, strict decoding within bounds, problem details
// (RFC 9457), idempotency headers, waiting and server-sent events. What an order is, and what becomes of it, it asks saga and
// consumers. It promises that a request is refused before anything is written if it is malformed, too large, too deep, unauthorised
// or one too many; that every error says what to do; and that a fault of ours is logged once, with the instance that the answer names.
// Models and routes are generated from schemas/openapi.yaml, and the tests hold every answer to it.
//
// When things fail: a dependency that is away (`Outage() string`), a deadline of ours and what says when to come again
// (`RetryAfter() time.Duration`) are answered 503 with Retry-After; anything else that no contract knows is a 500. An answer that had
// begun when its handler panicked is cut off, never left to look whole. A client that goes gets no answer and leaves no log line. Streams
// and waits end when the process drains; an event that passes them by is made up for by a look at the order itself.
package httpapi
