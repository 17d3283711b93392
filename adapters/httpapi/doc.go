// Package httpapi is the HTTP interface: the intake of orders, their reading and following, and the operators' side.
//
// It owns the protocol and nothing else: authentication and roles, rate limits, strict decoding within bounds, problem details
// (RFC 9457), idempotency headers, waiting and server-sent events. What an order is, and what becomes of it, it asks saga and
// consumers. It promises that a request is refused before anything is written if it is malformed, too large, too deep, unauthorised
// or one too many; that every error says what to do; and that a fault of ours is logged once, with the instance that the answer names.
// Models and routes are generated from schemas/openapi.yaml.
package httpapi
