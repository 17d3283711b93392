package httpapi

import (
	"encoding/json"
	"errors"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"

	"ordersaga/consumers"
	"ordersaga/domain"
	"ordersaga/saga"
)

func TestProducts(t *testing.T) {
	w := newWorld(t)
	put := func(body string) answered { return w.do(http.MethodPut, "/v1/products/TEA-1", body) }
	const whole = `{"name":"Tea","unit_price_minor":450,"currency":"EUR","on_hand":7,"note":"counted\r\n"}`
	require.Equal(t, http.StatusCreated, put(whole).status)
	a := put(strings.Replace(whole, "450", "0", 1))
	require.Equal(t, http.StatusOK, a.status)
	var p Product
	require.NoError(t, json.Unmarshal(a.body, &p))
	require.Equal(t, Product{SKU: "TEA-1", Name: "Tea", Currency: "EUR", OnHand: 7, Available: 7}, p)
	require.Equal(t, "counted  ", w.products.puts[0].Note)
	require.EqualValues(t, 7, *w.products.puts[0].OnHand)
	require.Equal(t, http.StatusOK, put(`{"name":"Tea","unit_price_minor":450,"currency":"EUR"}`).status)
	require.Nil(t, w.products.puts[2].OnHand, "absent leaves it as it is")
	require.Equal(t, http.StatusOK, w.do(http.MethodGet, "/v1/products/TEA-1", "").status)
	require.Equal(t, http.StatusOK, w.do(http.MethodGet, "/v1/products", "").status)
	w.refused(w.do(http.MethodGet, "/v1/products/NONE", ""), http.StatusNotFound, "not_found")

	for name, c := range map[string]struct{ body, field string }{
		"no price":       {`{"name":"Tea","currency":"EUR"}`, "/unit_price_minor"}, // it would cost nothing
		"no name":        {`{"unit_price_minor":450,"currency":"EUR"}`, "/name"},
		"no currency":    {`{"name":"Tea","unit_price_minor":450}`, "/currency"},
		"negative price": {strings.Replace(whole, "450", "-1", 1), "/unit_price_minor"},
		"price too high": {strings.Replace(whole, "450", "100000000", 1), "/unit_price_minor"},
		"currency":       {strings.Replace(whole, "EUR", "euro", 1), "/currency"},
		"negative stock": {strings.Replace(whole, `"on_hand":7`, `"on_hand":-7`, 1), "/on_hand"},
		"too much stock": {strings.Replace(whole, `"on_hand":7`, `"on_hand":1000000000001`, 1), "/on_hand"},
		"long name":      {strings.Replace(whole, "Tea", strings.Repeat("t", 257), 1), "/name"},
		"escape in name": {strings.Replace(whole, "Tea", `\u001b[31m`, 1), "/name"},
		"long note":      {strings.Replace(whole, "counted", strings.Repeat("ü", 1001), 1), "/note"},
	} {
		t.Run(name, func(t *testing.T) {
			require.Equal(t, c.field, w.refused(put(c.body), http.StatusUnprocessableEntity, "invalid").Field)
		})
	}
	require.Equal(t, "/unit_price_minor", w.refused(put(strings.Replace(whole, "450", "null", 1)), http.StatusBadRequest, "malformed").Field)
	require.Equal(t, "/unit_price_minor", w.refused(put(strings.Replace(whole, "450", "4.5", 1)), http.StatusBadRequest, "malformed").Field)
	w.refused(w.do(http.MethodPut, "/v1/products/a%00b", whole), http.StatusBadRequest, "bad_parameter")
	require.Len(t, w.products.puts, 3)

	w.products.err = &domain.Refusal{Reason: domain.Invalid, Field: "/on_hand", Detail: "5 are reserved"}
	require.Equal(t, "/on_hand", w.refused(put(whole), http.StatusConflict, "reserved").Field)
	w.products.err = &domain.Refusal{Reason: domain.Invalid, Field: "/name", Detail: "no such name"}
	w.refused(put(whole), http.StatusUnprocessableEntity, "invalid")
	w.products.err = &domain.Refusal{Reason: domain.Invalid, Field: "/cursor", Detail: "no such cursor"}
	require.Equal(t, "cursor", w.refused(w.do(http.MethodGet, "/v1/products?cursor=x", ""), http.StatusBadRequest, "bad_parameter").Field)
}

func TestResolveSaga(t *testing.T) {
	w := newWorld(t)
	id := w.reader.pending()
	path := "/v1/sagas/" + id.String() + "/resolve"
	for _, body := range []string{`{"decision":"retry"}`, `{"decision":"take","note":"mine\n"}`, `{"decision":"mark_done","name":"commit_stock","note":"by hand"}`} {
		a := w.do(http.MethodPost, path, body)
		require.Equal(t, http.StatusOK, a.status, "%s", a.body)
	}
	require.Equal(t, []saga.Decision{
		{Order: id, Kind: saga.Retry, Actor: "dev"},
		{Order: id, Kind: saga.Take, Note: "mine ", Actor: "dev"},
		{Order: id, Kind: saga.MarkDone, Name: "commit_stock", Note: "by hand", Actor: "dev"},
	}, w.orders.decided)
	for body, field := range map[string]string{
		`{}`:                       "/decision",
		`{"decision":"undo"}`:      "/decision",
		`{"decision":"mark_done"}`: "/name",
		`{"decision":"retry","name":"commit_stock"}`:                         "/name",
		`{"decision":"mark_done","name":"a\nb"}`:                             "/name",
		`{"decision":"mark_done","name":"` + strings.Repeat("n", 129) + `"}`: "/name",
		`{"decision":"take","note":"` + strings.Repeat("n", 1001) + `"}`:     "/note",
	} {
		require.Equal(t, field, w.refused(w.do(http.MethodPost, path, body), http.StatusUnprocessableEntity, "invalid").Field, body)
	}
	require.Len(t, w.orders.decided, 3)
	w.refused(w.do(http.MethodPost, "/v1/sagas/"+uuid.NewString()+"/resolve", `{"decision":"retry"}`), http.StatusNotFound, "not_found")
	w.orders.no = true
	w.refused(w.do(http.MethodPost, path, `{"decision":"retry"}`), http.StatusConflict, "does_not_fit")
	w.orders.err = &domain.Refusal{Reason: domain.Invalid, Field: "/name", Detail: "the saga has no step \"x\""}
	w.refused(w.do(http.MethodPost, path, `{"decision":"mark_done","name":"x"}`), http.StatusUnprocessableEntity, "invalid")
}

func TestAuditLog(t *testing.T) {
	w := newWorld(t)
	w.reader.log = []saga.AuditEntry{
		{Actor: "ops", Action: "saga.resolve.retry", Target: "x", Detail: `{"name":"commit_stock"}`, At: time.Unix(1e9, 0)},
		{Actor: "ops", Action: "dlq.discard", Target: "y", Note: "n", Detail: "no JSON", At: time.Unix(1e9, 0)},
	}
	a := w.do(http.MethodGet, "/v1/audit-log", "")
	require.Equal(t, http.StatusOK, a.status)
	var page AuditPage
	require.NoError(t, json.Unmarshal(a.body, &page))
	require.Equal(t, map[string]any{"name": "commit_stock"}, page.Entries[0].Detail)
	require.Equal(t, map[string]any{"text": "no JSON"}, page.Entries[1].Detail)
}

func TestReadDeadLetters(t *testing.T) {
	ops, root := issue(t, "ops", RoleOperator), issue(t, "root", RoleAdmin)
	w := newWorld(t, guarded(book(t, ops, root)))
	v := consumers.DeadView{
		ID: uuid.New(), Group: "payment", MessageID: uuid.New(), Origin: consumers.Place{Topic: "saga.payment.v1", Partition: 3, Offset: 42},
		Type: "CapturePayment", OrderID: uuid.New(), Status: "open", Class: "poison", Reason: "why", Fingerprint: "f", Attempts: 4,
		FirstFailed: time.Unix(1e9, 0), LastFailed: time.Unix(1e9+60, 0), Headers: []consumers.ViewHeader{{Key: "ce_type", Value: "x"}},
		HeaderCount: 9, KeyBytes: 36, ValueBytes: 100, ValueSHA256: "ab",
	}
	anon := v
	anon.ID, anon.OrderID = uuid.New(), uuid.Nil
	w.dead.views = []consumers.DeadView{v, anon}
	as := func(b badge) []string { return []string{"Authorization", "Bearer " + b.token} }

	a := w.do(http.MethodGet, "/v1/dlq?group=payment&status=open&class=poison&type=CapturePayment&fingerprint=f&order_id="+v.OrderID.String(), "", as(ops)...)
	require.Equal(t, http.StatusOK, a.status)
	var page DeadLetterPage
	require.NoError(t, json.Unmarshal(a.body, &page))
	require.Len(t, page.DeadLetters, 2)
	require.Nil(t, page.DeadLetters[1].OrderID)
	require.Equal(t, consumers.DeadFilter{Status: "open", Group: "payment", Type: "CapturePayment", Class: "poison", Fingerprint: "f", OrderID: v.OrderID}, w.dead.filter)

	one := "/v1/dlq/" + v.ID.String()
	a = w.do(http.MethodGet, one, "", as(ops)...)
	require.Equal(t, http.StatusOK, a.status)
	require.NotContains(t, string(a.body), "payload\":")
	w.refused(w.do(http.MethodGet, one+"?full=true", "", as(ops)...), http.StatusForbidden, "forbidden")
	require.Zero(t, w.dead.fulls)
	a = w.do(http.MethodGet, one+"?full=true", "", as(root)...)
	require.Equal(t, http.StatusOK, a.status)
	var d DeadLetterDetail
	require.NoError(t, json.Unmarshal(a.body, &d))
	require.Equal(t, []byte{0xff, 0}, d.Payload)
	require.Equal(t, []MessageHeader{{Name: "x  y", Value: " [31mred\ufffd"}}, d.Headers)
	w.refused(w.do(http.MethodGet, "/v1/dlq/"+uuid.NewString(), "", as(ops)...), http.StatusNotFound, "not_found")
}

func TestOperateOnDeadLetters(t *testing.T) {
	w := newWorld(t)
	a, b := uuid.New(), uuid.New()
	w.dead.op = &consumers.Operation{ID: uuid.New()}
	w.dead.results = []consumers.ItemResult{{ID: a, Outcome: "replaying"}, {ID: b, Error: "there is no such dead letter"}}
	ans := w.do(http.MethodPost, "/v1/dlq/replay", `{"ids":["`+a.String()+`","`+b.String()+`"],"note":"fixed\r\n"}`)
	require.Equal(t, http.StatusOK, ans.status)
	var op DeadLetterOperation
	require.NoError(t, json.Unmarshal(ans.body, &op))
	require.Equal(t, 2, op.Selected)
	require.Equal(t, DeadLetterResultResultReplaying, op.Results[0].Result)
	require.Equal(t, DeadLetterResultResultFailed, op.Results[1].Result)
	require.Equal(t, w.dead.op.ID, *op.OperationID)
	require.Equal(t, consumers.Request{Action: consumers.ActionReplay, Actor: "dev", Note: "fixed  ", IDs: []uuid.UUID{a, b}}, w.dead.wishes[0])

	w.dead.op, w.dead.results = nil, make([]consumers.ItemResult, 1500)
	for i := range w.dead.results {
		w.dead.results[i] = consumers.ItemResult{ID: uuid.New(), Outcome: "would_discard"}
	}
	ans = w.do(http.MethodPost, "/v1/dlq/discard", `{"filter":{"group":"payment","class":"poison","type":"T","fingerprint":"f","status":"open","order_id":"`+a.String()+`"},"dry_run":true}`)
	op = DeadLetterOperation{}
	require.NoError(t, json.Unmarshal(ans.body, &op))
	require.Nil(t, op.OperationID)
	require.Equal(t, 1500, op.Selected)
	require.Len(t, op.Results, maxResults)
	require.Equal(t, consumers.Request{
		Action: consumers.ActionDiscard, Actor: "dev", DryRun: true,
		Filter: &consumers.DeadFilter{Group: "payment", Class: "poison", Type: "T", Fingerprint: "f", OrderID: a},
	}, w.dead.wishes[1])

	many := `{"ids":["` + strings.Repeat(a.String()+`","`, maxIDs) + a.String() + `"]}`
	for body, field := range map[string]string{
		`{"ids":["` + a.String() + `","7"]}`:      "/ids/1",
		`{"ids":["urn:uuid:` + a.String() + `"]}`: "/ids/0",
		many:                               "/ids",
		`{"filter":{"order_id":"x"}}`:      "/filter/order_id",
		`{"filter":{"status":"resolved"}}`: "/filter/status",
		`{"filter":{"type":"` + strings.Repeat("t", 257) + `"}}`:                    "/filter/type",
		`{"ids":["` + a.String() + `"],"note":"` + strings.Repeat("n", 1001) + `"}`: "/note",
	} {
		require.Equal(t, field, w.refused(w.do(http.MethodPost, "/v1/dlq/replay", body), http.StatusUnprocessableEntity, "invalid").Field, "%.80s", body)
	}
	w.refused(w.do(http.MethodPost, "/v1/dlq/replay", ""), http.StatusBadRequest, "malformed")
	require.Len(t, w.dead.wishes, 2)

	// What consumers themselves refuse.
	_, _, err := (&consumers.Operators[consumers.DeadTx]{}).Do(t.Context(), consumers.Request{Action: consumers.ActionDiscard, Actor: "dev", IDs: []uuid.UUID{a}})
	w.dead.err = err
	require.Contains(t, w.refused(w.do(http.MethodPost, "/v1/dlq/discard", `{"ids":["`+a.String()+`"]}`), http.StatusUnprocessableEntity, "invalid").Detail, "needs a note")

	// An operation that is stored goes on, whatever becomes of the request.
	w.dead.op, w.dead.err = &consumers.Operation{ID: uuid.New()}, errors.Join(awayError{})
	p := w.refused(w.do(http.MethodPost, "/v1/dlq/replay", `{"ids":["`+a.String()+`"]}`), http.StatusServiceUnavailable, "unavailable")
	require.Contains(t, p.Detail, w.dead.op.ID.String())
	w.dead.err = &domain.Refusal{Reason: domain.Invalid, Field: "/cursor", Detail: "no such cursor"}
	require.Equal(t, "cursor", w.refused(w.do(http.MethodGet, "/v1/dlq?cursor=x", ""), http.StatusBadRequest, "bad_parameter").Field)
}
