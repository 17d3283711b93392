package httpapi

import (
	"net/http"
	"time"

	"ordersaga/domain"
	"ordersaga/saga"
)

// ListSagas implements GET /v1/sagas.
func (a *API) ListSagas(w http.ResponseWriter, r *http.Request, params ListSagasParams) {
	limit, err := pageLimit(params.Limit, r)
	f := saga.SagaFilter{Phase: saga.Phase(params.Phase), Stuck: params.Stuck, Cursor: params.Cursor, Limit: limit}
	if err == nil && params.Phase != "" && !params.Phase.Valid() {
		err = badParameter("phase", "phase is running, completed, compensating or compensated")
	}
	if err == nil && params.OlderThan != "" {
		f.OlderThan, err = time.ParseDuration(params.OlderThan)
		if err != nil || f.OlderThan < 0 {
			err = badParameter("older_than", "older_than is a number with a unit, such as 90s, 10m or 2h")
		}
	}
	if err != nil {
		a.fail(w, r, err)
		return
	}
	page, next, err := a.Reader.Sagas(r.Context(), f)
	if err != nil {
		a.fail(w, r, badCursor(err))
		return
	}
	out := SagaPage{Sagas: make([]Saga, len(page)), NextCursor: next}
	for i := range page {
		out.Sagas[i] = a.saga(&page[i])
	}
	answer(w, http.StatusOK, out)
}

// GetSaga implements GET /v1/sagas/{order_id}.
func (a *API) GetSaga(w http.ResponseWriter, r *http.Request, orderID OrderID) {
	o, err := a.find(r.Context(), orderID)
	if err != nil {
		a.fail(w, r, err)
		return
	}
	entries, err := a.timeline(r.Context(), domain.OrderID(orderID))
	if err != nil {
		a.fail(w, r, err)
		return
	}
	answer(w, http.StatusOK, SagaDetail{Saga: a.saga(o), Timeline: entries})
}

// Bounds of what an operator may write.
const (
	maxNote      = 1000        // characters
	maxNoteBytes = maxNote * 4 // of UTF-8
)

func checkDecision(b *ResolveSaga) error {
	switch {
	case !b.Decision.Valid():
		return notAcceptable("/decision", "decision is retry, mark_done or take")
	case b.Decision == SagaDecisionMarkDone && b.Name == "":
		return notAcceptable("/name", "mark_done takes the name of the step, or of the participant whose undo was done")
	case b.Decision != SagaDecisionMarkDone && b.Name != "":
		return notAcceptable("/name", "only mark_done takes a name")
	case !plain(b.Name):
		return notAcceptable("/name", "name is printable text")
	}
	if err := checkLength("/name", b.Name, domain.MaxIDLength); err != nil {
		return err
	}
	return checkLength("/note", b.Note, maxNote)
}

// ResolveSaga implements POST /v1/sagas/{order_id}/resolve.
func (a *API) ResolveSaga(w http.ResponseWriter, r *http.Request, orderID OrderID) {
	raw, err := readBody(r)
	var b ResolveSaga
	if err == nil {
		err = decodeStrict(raw, &b)
	}
	if err == nil {
		err = checkDecision(&b)
	}
	if err != nil {
		a.fail(w, r, err)
		return
	}
	_, changed, err := a.Orders.Resolve(r.Context(), saga.Decision{
		Order: domain.OrderID(orderID), Kind: saga.DecisionKind(b.Decision), Name: b.Name, Note: clean(b.Note, maxNoteBytes), Actor: callerOf(r.Context()).Name,
	})
	if err == nil && !changed {
		err = problem(http.StatusConflict, "does_not_fit", "The decision does not fit", "the saga is not in a state in which the decision changes anything; look at it with GET /v1/sagas/{order_id}")
	}
	if err != nil {
		a.fail(w, r, err)
		return
	}
	o, err := a.find(r.Context(), orderID)
	if err != nil {
		a.fail(w, r, err)
		return
	}
	answer(w, http.StatusOK, a.saga(o))
}

// ListAuditLog implements GET /v1/audit-log.
func (a *API) ListAuditLog(w http.ResponseWriter, r *http.Request, params ListAuditLogParams) {
	limit, err := pageLimit(params.Limit, r)
	if err != nil {
		a.fail(w, r, err)
		return
	}
	page, next, err := a.Reader.AuditLog(r.Context(), params.Cursor, limit)
	if err != nil {
		a.fail(w, r, badCursor(err))
		return
	}
	out := AuditPage{Entries: make([]AuditEntry, len(page)), NextCursor: next}
	for i := range page {
		out.Entries[i] = auditEntry(&page[i])
	}
	answer(w, http.StatusOK, out)
}
