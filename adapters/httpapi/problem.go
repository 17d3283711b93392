package httpapi

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/google/uuid"
	"go.opentelemetry.io/otel/trace"

	"ordersaga/consumers"
	"ordersaga/domain"
	"ordersaga/saga"
)

const problemBase = "urn:ordersaga:problem:"

// maxDetail bounds what an error says to a client, in bytes.
const maxDetail = 500

// problem is an answer that says no; it is an error so that helpers can return it.
func problem(status int, code, title, detail string) *Problem {
	return &Problem{Type: problemBase + code, Status: status, Code: code, Title: title, Detail: clean(detail, maxDetail)}
}

// Error implements error.
func (p *Problem) Error() string { return p.Code + ": " + p.Detail }

func (p *Problem) at(field string) *Problem {
	p.Field = field
	return p
}

func writeProblem(w http.ResponseWriter, p *Problem) {
	b, err := json.Marshal(p)
	if err != nil {
		panic("httpapi: a problem does not marshal: " + err.Error())
	}
	w.Header().Set("Content-Type", "application/problem+json")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(p.Status)
	_, _ = w.Write(append(b, '\n')) // the client is gone if it fails
}

type panicError struct{ v any }

func (e panicError) Error() string { return fmt.Sprintf("panic: %v", e.v) }

// titles of refusals, by reason.
var titles = map[domain.Reason]string{
	domain.Invalid:        "The order is not valid",
	domain.UnknownProduct: "Unknown product",
	domain.PriceChanged:   "The price has changed",
}

// fail maps an error of a use case to its answer. What is not the client's doing is logged here, once.
func (a *API) fail(w http.ResponseWriter, r *http.Request, err error) {
	var p *Problem
	var refusal *domain.Refusal
	var full *saga.OverloadedError
	var tooLarge *http.MaxBytesError
	var request *consumers.RequestError
	switch {
	case errors.As(err, &p):
		if p.Status == http.StatusServiceUnavailable || p.Code == "in_flight" {
			retryAfter(w, time.Second)
		}
	case errors.As(err, &refusal):
		title := titles[refusal.Reason]
		if title == "" {
			title = "Not acceptable"
		}
		p = problem(http.StatusUnprocessableEntity, string(refusal.Reason), title, refusal.Detail).at(refusal.Field)
	case errors.As(err, &full):
		p = problem(http.StatusServiceUnavailable, "overloaded", "Overloaded", full.Why+": nothing was stored, try again after Retry-After")
		if full.Full {
			p.Status = http.StatusTooManyRequests
		}
		retryAfter(w, full.After)
	case errors.As(err, &tooLarge):
		p = problem(http.StatusRequestEntityTooLarge, "too_large", "Too large", fmt.Sprintf("the body is larger than %d bytes", tooLarge.Limit))
	case errors.As(err, &request):
		p = problem(http.StatusUnprocessableEntity, "invalid", "Not acceptable", request.Error())
	case errors.Is(err, saga.ErrKeyReused):
		p = problem(http.StatusUnprocessableEntity, "key_reused", "Idempotency-Key reused", "the Idempotency-Key was used with another body: draw a new one for a new order").at("Idempotency-Key")
	case errors.Is(err, saga.ErrOrderExists):
		p = problem(http.StatusConflict, "order_exists", "The order exists", "the order_id belongs to an order placed under another Idempotency-Key").at("/order_id")
	case errors.Is(err, saga.ErrNoSaga):
		p = problem(http.StatusNotFound, "not_found", "Not found", "there is no such order")
	default:
		a.fault(w, r, err)
		return
	}
	writeProblem(w, p)
}

// fault answers what is not the client's doing: a dependency that is away, a deadline of ours, a mistake of ours.
func (a *API) fault(w http.ResponseWriter, r *http.Request, err error) {
	if r.Context().Err() != nil && errors.Is(err, context.Canceled) {
		return // the client is gone
	}
	instance := "urn:uuid:" + uuid.NewString()
	p := problem(http.StatusInternalServerError, "internal", "Internal error", "a fault on this side; it is in the log under the instance")
	var away interface{ Outage() string }
	if errors.As(err, &away) || errors.Is(err, context.DeadlineExceeded) {
		p = problem(http.StatusServiceUnavailable, "unavailable", "Unavailable", "something this service depends on is away: try again; with the same Idempotency-Key nothing happens twice")
		retryAfter(w, time.Second)
	}
	p.Instance = instance
	a.Log.LogAttrs(r.Context(), levelOf(p.Status), "request failed",
		attr("instance", instance), attr("method", r.Method), attr("route", r.Pattern), attr("status", p.Status), attr("error", err.Error()),
		attr("trace_id", trace.SpanContextFromContext(r.Context()).TraceID().String()))
	writeProblem(w, p)
}

// badParameter answers what the generated routes could not read.
func (a *API) badParameter(w http.ResponseWriter, _ *http.Request, err error) {
	var missing *RequiredHeaderError
	var format *InvalidParamFormatError
	var many *TooManyValuesForParamError
	p := problem(http.StatusBadRequest, "bad_parameter", "Bad parameter", err.Error())
	switch {
	case errors.As(err, &missing) && missing.ParamName == "Idempotency-Key":
		p = problem(http.StatusBadRequest, "idempotency_key_missing", "Idempotency-Key missing", "send an Idempotency-Key header, one an order; a UUID is a good one").at("Idempotency-Key")
	case errors.As(err, &missing):
		p.Field = missing.ParamName
	case errors.As(err, &format):
		p.Field = format.ParamName
	case errors.As(err, &many):
		p.Field = many.ParamName
	}
	writeProblem(w, p)
}

// clean keeps one line of printable text of at most n bytes.
func clean(s string, n int) string {
	s = strings.Map(func(r rune) rune {
		if r < 0x20 || r >= 0x7f && r < 0xa0 || r == '\u2028' || r == '\u2029' {
			return ' '
		}
		return r
	}, s)
	if len(s) > n {
		s = strings.ToValidUTF8(s[:n-3], "") + "…"
	}
	return s
}
