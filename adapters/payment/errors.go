package payment

import (
	"fmt"
	"strings"
	"time"
)

// Dependency is what Outage answers: the name under which consumption is paused.
const Dependency = "payment gateway"

// Class is what kind of end a call to the gateway came to. It is a metric label: the set is small and fixed.
type Class string

// The classes. OK, Refused and Rejected are answers; the others are failures.
const (
	OK         Class = "ok"
	Refused    Class = "refused"    // 402
	Rejected   Class = "rejected"   // 400, 404 and other statuses that say that the request is wrong
	Auth       Class = "auth"       // 401, 403: the API key is wrong or may not do this
	Conflict   Class = "conflict"   // 409: another request with this key is being worked on
	Throttled  Class = "throttled"  // 429
	Server     Class = "server"     // 5xx
	Timeout    Class = "timeout"    // no answer in time
	Connection Class = "connection" // could not connect, or the connection broke
	Malformed  Class = "malformed"  // an answer that is not the API's
	Pending    Class = "pending"    // the gateway is still working on the intent
	Open       Class = "open"       // the breaker is open: not sent
	Saturated  Class = "saturated"  // our own limits: not sent
	Cancelled  Class = "cancelled"  // the caller gave up
	Invalid    Class = "invalid"    // the request cannot be sent as it is
)

// Failure is a technical failure of a payment operation. Failures that are poison or an outage come wrapped in types that say so by
// their method sets; every one of them gives its *Failure to errors.As.
type Failure struct {
	Op        string // the operation or call, for a person
	Class     Class
	Status    int    // HTTP status; 0: there was no answer
	Code      string // the gateway's code; empty: it gave none
	RequestID string // the gateway's own name of the request, for its support
	Detail    string // one sentence, free of secrets and control characters

	unknown    bool
	replayed   bool
	retryAfter time.Duration
	cause      error // of the transport or the context; never the SDK's error, which prints the whole answer
}

func (f *Failure) Error() string {
	var b strings.Builder
	b.WriteString(Dependency + ": " + f.Op + ": " + string(f.Class))
	if f.Status != 0 {
		fmt.Fprintf(&b, " (HTTP %d)", f.Status)
	}
	if f.Code != "" {
		b.WriteString(" " + f.Code)
	}
	if f.Detail != "" {
		b.WriteString(": " + f.Detail)
	}
	if f.replayed {
		b.WriteString(" [stored answer of an earlier request]")
	}
	if f.unknown {
		b.WriteString(" [may have taken effect]")
	}
	if f.RequestID != "" {
		b.WriteString(" [request " + f.RequestID + "]")
	}
	return b.String()
}

// Unwrap gives the transport's or the context's error, where there is one.
func (f *Failure) Unwrap() error { return f.cause }

// OutcomeUnknown reports that the operation may have taken effect.
func (f *Failure) OutcomeUnknown() bool { return f.unknown }

// Replayed reports that the gateway repeated a stored answer: the first execution under this key is over, and repeating the key
// again changes nothing for as long as the gateway keeps it.
func (f *Failure) Replayed() bool { return f.replayed }

// RetryAfter is the least time to wait; zero when nobody stated one.
func (f *Failure) RetryAfter() time.Duration { return f.retryAfter }

// retryable says whether another try in place, under the same key, may do better or tell more. Stripe-Should-Retry is not asked: it
// says "false" on a stored 500 because the answer will be the same, but the repeat tells us by Idempotent-Replayed that the first
// execution is over, and that is what the caller needs to know before it looks up and takes a new key.
func (f *Failure) retryable() bool {
	switch f.Class {
	case Conflict, Throttled, Server, Timeout, Connection, Malformed:
		return !f.replayed
	default:
		return false
	}
}

type poison struct{ *Failure }

func (p poison) Poison() bool  { return true }
func (p poison) Unwrap() error { return p.Failure }

type outage struct{ *Failure }

func (o outage) Outage() string { return Dependency }
func (o outage) Unwrap() error  { return o.Failure }

// asError gives a failure the method set of its class.
func (f *Failure) asError() error {
	switch f.Class {
	case Rejected, Invalid:
		return poison{f}
	case Auth, Open, Saturated:
		return outage{f}
	default:
		return f
	}
}

func invalid(op, format string, args ...any) error {
	return (&Failure{Op: op, Class: Invalid, Detail: fmt.Sprintf(format, args...)}).asError()
}

const maxDetail = 240 // bytes of the gateway's own words in one of our errors

// clean makes text of the gateway fit for one line of a log: bounded, without control characters, without the API key.
func clean(s, apiKey string) string {
	if apiKey != "" {
		s = strings.ReplaceAll(s, apiKey, "***")
	}
	if len(s) > maxDetail {
		s = s[:maxDetail]
	}
	return strings.Map(func(r rune) rune {
		if r < 0x20 || r == 0x7f || r >= 0x80 && r < 0xa0 || r == 0xfffd || r == '\u2028' || r == '\u2029' {
			return ' '
		}
		return r
	}, s)
}

const maxToken = 64 // bytes of a code or a request id

// token lets through what looks like one of the gateway's codes or ids, and nothing else: it becomes a label and a column.
func token(s string) string {
	if s == "" || len(s) > maxToken {
		return ""
	}
	for i := range len(s) {
		c := s[i]
		if !(c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '_' || c == '-' || c == '.') {
			return ""
		}
	}
	return s
}
