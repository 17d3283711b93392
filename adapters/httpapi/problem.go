package httpapi

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
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

// problem makes an answer that says no; it is an error, so that whatever reads a request can return it.
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

type panicError struct {
	v     any
	stack []byte
}

func (e *panicError) Error() string { return fmt.Sprintf("panic: %v", e.v) }

// titles of refusals, by reason.
var titles = map[domain.Reason]string{
	domain.Invalid:        "The order is not valid",
	domain.UnknownProduct: "Unknown product",
	domain.PriceChanged:   "The price has changed",
}

// fail maps an error of a use case to its answer. What is not the client's doing is logged here, once.
func (a *API) fail(w http.ResponseWriter, r *http.Request, err error) {
	p := known(w, err)
	if p == nil {
		a.fault(w, r, err)
		return
	}
	writeProblem(w, p)
}

// known answers the problem for an error that is part of the contract, with its Retry-After; nil: it is a fault.
func known(w http.ResponseWriter, err error) *Problem {
	var p *Problem
	var refusal *domain.Refusal
	var full *saga.OverloadedError
	var tooLarge *http.MaxBytesError
	var request *consumers.RequestError
	var inFlight interface{ InFlight() bool }
	switch {
	case errors.As(err, &p):
		if p.Status == http.StatusServiceUnavailable {
			retryAfter(w, time.Second)
		}
		return p
	case errors.As(err, &refusal):
		title := titles[refusal.Reason]
		if title == "" {
			title = "Not acceptable"
		}
		return problem(http.StatusUnprocessableEntity, string(refusal.Reason), title, refusal.Detail).at(refusal.Field)
	case errors.As(err, &full):
		retryAfter(w, full.After)
		status := http.StatusServiceUnavailable
		if full.Full {
			status = http.StatusTooManyRequests
		}
		return problem(status, "overloaded", "Overloaded", full.Why+": nothing was stored, try again after Retry-After")
	case errors.As(err, &tooLarge):
		return problem(http.StatusRequestEntityTooLarge, "too_large", "Too large", fmt.Sprintf("the body is larger than %d bytes", tooLarge.Limit))
	case errors.As(err, &request):
		return notAcceptable("", request.Error())
	case errors.As(err, &inFlight) && inFlight.InFlight():
		retryAfter(w, time.Second)
		return problem(http.StatusConflict, "in_flight", "In flight", "a request with the same Idempotency-Key is being answered: try again after Retry-After").at("Idempotency-Key")
	case errors.Is(err, saga.ErrKeyReused):
		return problem(http.StatusUnprocessableEntity, "key_reused", "Idempotency-Key reused", "the Idempotency-Key was used with another body: draw a new one for a new order").at("Idempotency-Key")
	case errors.Is(err, saga.ErrOrderExists):
		return problem(http.StatusConflict, "order_exists", "The order exists", "the order_id belongs to an order placed under another Idempotency-Key").at("/order_id")
	case errors.Is(err, saga.ErrNoSaga):
		return problem(http.StatusNotFound, "not_found", "Not found", "there is no such order")
	}
	return nil
}

// statusClientGone is what metrics show of a request whose client did not wait for its answer; nobody else sees it.
const statusClientGone = 499

// fault answers what is not the client's doing: a dependency that is away, a deadline of ours, a mistake of ours.
func (a *API) fault(w http.ResponseWriter, r *http.Request, err error) {
	if errors.Is(err, context.Canceled) && r.Context().Err() != nil {
		w.WriteHeader(statusClientGone)
		return
	}
	p := problem(http.StatusInternalServerError, "internal", "Internal error", "a fault on this side; it is in the log under the instance")
	var away interface{ Outage() string }
	var later interface{ RetryAfter() time.Duration }
	if errors.As(err, &away) && away.Outage() != "" || errors.As(err, &later) || errors.Is(err, context.DeadlineExceeded) {
		p = problem(http.StatusServiceUnavailable, "unavailable", "Unavailable", "something this service depends on is away: try again; with the same Idempotency-Key nothing happens twice")
		after := time.Second
		if later != nil {
			after = later.RetryAfter()
		}
		retryAfter(w, after)
	}
	var unfinished *unfinishedError
	if errors.As(err, &unfinished) {
		p.Detail = fmt.Sprintf("operation %s is stored and goes on by itself; its dead letters show how far it is", unfinished.op)
	}
	p.Instance = newInstance()
	a.logFault(r, p.Instance, p.Status, err)
	writeProblem(w, p)
}

func newInstance() string { return "urn:uuid:" + uuid.NewString() }

// maxLogged bounds what a log line says of an error, in bytes.
const maxLogged = 2000

func (a *API) logFault(r *http.Request, instance string, status int, err error) {
	level := slog.LevelWarn
	if status == http.StatusInternalServerError {
		level = slog.LevelError
	}
	attrs := []slog.Attr{
		slog.String("instance", instance), slog.String("method", r.Method), slog.String("route", a.Route(r)), slog.Int("status", status),
		slog.String("error", clean(err.Error(), maxLogged)),
	}
	if sc := trace.SpanContextFromContext(r.Context()); sc.IsValid() {
		attrs = append(attrs, slog.String("trace_id", sc.TraceID().String()))
	}
	var p *panicError
	if errors.As(err, &p) {
		attrs = append(attrs, slog.String("stack", string(p.stack)))
	}
	a.Log.LogAttrs(r.Context(), level, "request failed", attrs...)
}

// unreadable answers what the generated routes could not read of a request.
func (a *API) unreadable(w http.ResponseWriter, _ *http.Request, err error) {
	var missing *RequiredHeaderError
	var format *InvalidParamFormatError
	var many *TooManyValuesForParamError
	var p *Problem
	switch {
	case errors.As(err, &missing) && missing.ParamName == idempotencyKey:
		p = problem(http.StatusBadRequest, "idempotency_key_missing", "Idempotency-Key missing", "send an Idempotency-Key header, one an order; a UUID is a good one").at(idempotencyKey)
	case errors.As(err, &format) && format.ParamName == idempotencyKey, errors.As(err, &many) && many.ParamName == idempotencyKey:
		p = badKey()
	case errors.As(err, &format):
		p = badParameter(format.ParamName, "the value of "+format.ParamName+" is not of the kind that it takes; /openapi.yaml says which")
	case errors.As(err, &many):
		p = badParameter(many.ParamName, many.ParamName+" is there more than once")
	default:
		p = badParameter("", err.Error())
	}
	writeProblem(w, p)
}
