package httpapi

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"time"

	"go.opentelemetry.io/otel/trace"

	"ordersaga/domain"
	"ordersaga/saga"
)

// PlaceOrder implements POST /v1/orders.
func (a *API) PlaceOrder(w http.ResponseWriter, r *http.Request, params PlaceOrderParams) {
	sub, wait, err := a.submission(r, params)
	if err != nil {
		a.fail(w, r, err)
		return
	}
	res, err := a.Intake.Submit(r.Context(), sub)
	if err != nil {
		a.fail(w, r, err)
		return
	}
	w.Header().Set("Location", "/v1/orders/"+res.Order.String())
	body := res.Answer
	if wait > 0 {
		body = a.waited(w, r, res, wait)
	}
	answerBytes(w, http.StatusAccepted, body)
}

const (
	idempotencyKey = "Idempotency-Key"
	maxKey         = 255 // bytes
)

func badKey() *Problem {
	return problem(http.StatusBadRequest, "bad_idempotency_key", "Bad Idempotency-Key",
		fmt.Sprintf("the Idempotency-Key is one header of 1 to %d characters of printable ASCII", maxKey)).at(idempotencyKey)
}

func (a *API) submission(r *http.Request, params PlaceOrderParams) (*saga.Submission, time.Duration, error) {
	key := params.IdempotencyKey
	if key == "" || len(key) > maxKey || strings.ContainsFunc(key, func(c rune) bool { return c < 0x20 || c > 0x7e }) {
		return nil, 0, badKey()
	}
	wait, err := preferWait(r.Header, a.cfg.MaxWait)
	if err != nil {
		return nil, 0, err
	}
	raw, err := readBody(r)
	if err != nil {
		return nil, 0, err
	}
	draft, err := decodeDraft(raw)
	if err != nil {
		return nil, 0, err
	}
	sub := &saga.Submission{
		Caller: callerOf(r.Context()).Name, Key: key, Body: sha256.Sum256(raw), Draft: draft, Answer: accepted,
	}
	if sc := trace.SpanContextFromContext(r.Context()); sc.IsValid() {
		sub.Trace.TraceID, sub.Trace.SpanID, sub.Trace.Flags = sc.TraceID(), sc.SpanID(), byte(sc.TraceFlags())
	}
	return sub, wait, nil
}

// orderBody is PlaceOrder of the contract with the order id as text, so that a bad one can be answered for what it is.
type orderBody struct {
	OrderID       *string    `json:"order_id,omitempty"`
	CustomerID    string     `json:"customer_id"`
	Currency      string     `json:"currency"`
	PaymentMethod string     `json:"payment_method"`
	Items         []itemBody `json:"items"`
}

type itemBody struct {
	SKU            string `json:"sku"`
	Quantity       int64  `json:"quantity"`
	UnitPriceMinor *int64 `json:"unit_price_minor,omitempty"`
}

func decodeDraft(raw []byte) (domain.Draft, error) {
	b, ok := quickOrder(raw)
	if !ok {
		b = orderBody{}
		if err := decodeStrict(raw, &b); err != nil {
			return domain.Draft{}, err
		}
	}
	d := domain.Draft{CustomerID: b.CustomerID, Currency: b.Currency, PaymentMethod: b.PaymentMethod, Items: make([]domain.DraftItem, len(b.Items))}
	if b.OrderID != nil {
		id, err := domain.ParseOrderID(*b.OrderID)
		if err != nil {
			return domain.Draft{}, &domain.Refusal{Reason: domain.Invalid, Field: "/order_id", Detail: err.Error()}
		}
		d.ID = id
	}
	for i, it := range b.Items {
		d.Items[i] = domain.DraftItem{SKU: domain.SKU(it.SKU), Quantity: it.Quantity, UnitPrice: it.UnitPriceMinor}
	}
	if refusal := d.Check(); refusal != nil {
		return domain.Draft{}, refusal
	}
	return d, nil
}

// accepted renders the 202 that is stored under the key.
func accepted(o *domain.Order) []byte {
	b, err := json.Marshal(acceptedView(o.ID, o.Status, o.Reason, o.Total))
	if err != nil {
		panic("httpapi: a model does not marshal: " + err.Error())
	}
	return append(b, '\n')
}

func acceptedView(id domain.OrderID, st domain.Status, why domain.Reason, total domain.Money) OrderAccepted {
	return OrderAccepted{OrderID: OrderID(id), Status: OrderStatus(st), Reason: OrderReason(why), TotalMinor: total.Minor, Currency: total.Currency}
}

// waitWrite is how long a client may take to read the answer it waited for.
const waitWrite = 10 * time.Second

// waited answers the order as it is when it ends or the time is up. What is stored under the key stays as it was. Where the order cannot
// be waited for, the stored answer stands: the order is accepted all the same, and the preference is only that.
func (a *API) waited(w http.ResponseWriter, r *http.Request, res saga.Accepted, wait time.Duration) []byte {
	select {
	case a.streams <- struct{}{}:
		defer func() { <-a.streams }()
	default:
		return res.Answer // too many wait already
	}
	_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(wait + waitWrite)) // the server's own stands where it cannot be moved
	o, err := a.await(r.Context(), res.Order, wait)
	if err != nil || o == nil {
		return res.Answer
	}
	w.Header().Set("Preference-Applied", "wait="+strconv.Itoa(int(wait/time.Second)))
	b, err := json.Marshal(acceptedView(o.ID, o.Status, o.Reason, o.Total))
	if err != nil {
		return res.Answer
	}
	return append(b, '\n')
}

var errDraining = errors.New("shutting down")

// await reads the order once it has ended, or after wait. It subscribes before it reads, so that no end is missed in between.
func (a *API) await(ctx context.Context, id domain.OrderID, wait time.Duration) (*saga.OrderView, error) {
	updates, end := a.Hub.Subscribe(id)
	defer end()
	o, err := a.Reader.Order(ctx, id)
	if err != nil || o == nil || o.Status.Terminal() {
		return o, err //nolint:wrapcheck // the caller falls back
	}
	timeout := time.NewTimer(wait)
	defer timeout.Stop()
	for {
		select {
		case u, open := <-updates:
			if !open {
				return nil, errDraining
			}
			if !u.Terminal {
				continue
			}
		case <-timeout.C:
		case <-ctx.Done():
			return nil, ctx.Err() //nolint:wrapcheck // the client is gone
		}
		return a.Reader.Order(ctx, id) //nolint:wrapcheck // the caller falls back
	}
}

// ListOrders implements GET /v1/orders.
func (a *API) ListOrders(w http.ResponseWriter, r *http.Request, params ListOrdersParams) {
	limit, err := pageLimit(params.Limit, r)
	if err == nil && params.Status != "" && !params.Status.Valid() {
		err = badParameter("status", "status is pending, confirmed, rejected or cancelled")
	}
	if err != nil {
		a.fail(w, r, err)
		return
	}
	page, next, err := a.Reader.Orders(r.Context(), saga.OrderFilter{
		Status: domain.Status(params.Status), CustomerID: params.CustomerID, Cursor: params.Cursor, Limit: limit,
	})
	if err != nil {
		a.fail(w, r, badCursor(err))
		return
	}
	out := OrderPage{Orders: make([]Order, len(page)), NextCursor: next}
	for i := range page {
		out.Orders[i] = a.order(&page[i])
	}
	answer(w, http.StatusOK, out)
}

// GetOrder implements GET /v1/orders/{order_id}.
func (a *API) GetOrder(w http.ResponseWriter, r *http.Request, orderID OrderID) {
	o, err := a.find(r.Context(), orderID)
	if err != nil {
		a.fail(w, r, err)
		return
	}
	answer(w, http.StatusOK, a.order(o))
}

func (a *API) find(ctx context.Context, id OrderID) (*saga.OrderView, error) {
	o, err := a.Reader.Order(ctx, domain.OrderID(id))
	if err != nil {
		return nil, err //nolint:wrapcheck // mapped by fail
	}
	if o == nil {
		return nil, saga.ErrNoSaga
	}
	return o, nil
}

// CancelOrder implements POST /v1/orders/{order_id}/cancel.
func (a *API) CancelOrder(w http.ResponseWriter, r *http.Request, orderID OrderID, _ CancelOrderParams) {
	raw, err := readBody(r)
	var body CancelOrder
	if err == nil && len(raw) > 0 {
		err = decodeStrict(raw, &body)
	}
	if err == nil {
		err = checkLength("/reason", body.Reason, domain.MaxIDLength)
	}
	if err != nil {
		a.fail(w, r, err)
		return
	}
	req := saga.CancelRequest{Order: domain.OrderID(orderID), Reason: clean(body.Reason, maxDetail), Actor: callerOf(r.Context()).Name}
	if sc := trace.SpanContextFromContext(r.Context()); sc.IsValid() {
		req.Trace.TraceID, req.Trace.SpanID, req.Trace.Flags = sc.TraceID(), sc.SpanID(), byte(sc.TraceFlags())
	}
	res, err := a.Orders.Cancel(r.Context(), req)
	switch {
	case err != nil:
		a.fail(w, r, err)
	case res.Outcome == saga.CancelUnknown:
		a.fail(w, r, saga.ErrNoSaga)
	case res.Outcome == saga.CancelTooLate:
		a.fail(w, r, problem(http.StatusConflict, "already_confirmed", "Already confirmed", "the order is confirmed: a return is another process"))
	default:
		o, err := a.find(r.Context(), orderID)
		if err != nil {
			a.fail(w, r, err)
			return
		}
		answer(w, http.StatusAccepted, acceptedView(o.ID, o.Status, o.Reason, o.Total))
	}
}

// GetOrderTimeline implements GET /v1/orders/{order_id}/timeline.
func (a *API) GetOrderTimeline(w http.ResponseWriter, r *http.Request, orderID OrderID) {
	entries, err := a.timeline(r.Context(), domain.OrderID(orderID))
	if err != nil {
		a.fail(w, r, err)
		return
	}
	answer(w, http.StatusOK, Timeline{OrderID: orderID, Entries: entries})
}

func (a *API) timeline(ctx context.Context, id domain.OrderID) ([]TimelineEntry, error) {
	hs, err := a.Reader.Timeline(ctx, id)
	if err != nil {
		return nil, err //nolint:wrapcheck // mapped by fail
	}
	if len(hs) == 0 {
		return nil, saga.ErrNoSaga
	}
	out := make([]TimelineEntry, len(hs))
	for i := range hs {
		out[i] = timelineEntry(&hs[i])
	}
	return out, nil
}

// pageLimit answers the size of a page: 50 if none was asked for, an error outside 1 to 500.
func pageLimit(n int, r *http.Request) (int, error) {
	const fallback, most = 50, 500
	if n == 0 && !r.URL.Query().Has("limit") {
		return fallback, nil
	}
	if n < 1 || n > most {
		return 0, badParameter("limit", "limit is between 1 and 500")
	}
	return n, nil
}
