package httpapi

import (
	"net/http"

	"github.com/google/uuid"

	"ordersaga/consumers"
)

// ListDeadLetters implements GET /v1/dlq.
func (a *API) ListDeadLetters(w http.ResponseWriter, r *http.Request, params ListDeadLettersParams) {
	limit, err := pageLimit(params.Limit, r)
	if err == nil && params.Status != "" && !params.Status.Valid() {
		err = problem(http.StatusBadRequest, "bad_parameter", "Bad parameter", "status is open, replaying, resolved, discarded or superseded").at("status")
	}
	if err != nil {
		a.fail(w, r, err)
		return
	}
	page, next, err := a.DeadLetters.List(r.Context(), consumers.DeadFilter{
		Status: consumers.DeadStatus(params.Status), Group: consumers.GroupName(params.Group), Type: params.Type, Class: params.Class,
		Fingerprint: params.Fingerprint, OrderID: params.OrderID,
	}, params.Cursor, limit)
	if err != nil {
		a.fail(w, r, badCursor(err))
		return
	}
	out := DeadLetterPage{DeadLetters: make([]DeadLetter, len(page)), NextCursor: next}
	for i := range page {
		out.DeadLetters[i] = deadLetter(&page[i])
	}
	answer(w, http.StatusOK, out)
}

// GetDeadLetter implements GET /v1/dlq/{id}.
func (a *API) GetDeadLetter(w http.ResponseWriter, r *http.Request, id uuid.UUID, params GetDeadLetterParams) {
	c := callerOf(r.Context())
	if params.Full && c.Role != RoleAdmin {
		a.fail(w, r, problem(http.StatusForbidden, "forbidden", "Forbidden", "full shows what may be personal data: it takes the role admin"))
		return
	}
	d, err := a.DeadLetters.Get(r.Context(), id, params.Full, c.Name)
	if err == nil && d == nil {
		err = problem(http.StatusNotFound, "not_found", "Not found", "there is no such dead letter")
	}
	if err != nil {
		a.fail(w, r, err)
		return
	}
	v := DeadLetterDetail{
		DeadLetter: deadLetter(d), HeaderCount: d.HeaderCount, KeyBytes: d.KeyBytes, PayloadBytes: d.ValueBytes, PayloadSha256: d.ValueSHA256,
		Headers: []MessageHeader{},
	}
	if d.Full == nil {
		for _, h := range d.Headers {
			v.Headers = append(v.Headers, MessageHeader{Name: h.Key, Value: h.Value})
		}
	} else {
		v.Key, v.Payload = d.Full.Key, d.Full.Value
		for _, h := range d.Full.Headers {
			v.Headers = append(v.Headers, MessageHeader{Name: clean(h.Key, maxDetail), Value: clean(string(h.Value), maxDetail)})
		}
	}
	answer(w, http.StatusOK, v)
}

// ReplayDeadLetters implements POST /v1/dlq/replay.
func (a *API) ReplayDeadLetters(w http.ResponseWriter, r *http.Request) {
	a.operate(w, r, consumers.ActionReplay)
}

// DiscardDeadLetters implements POST /v1/dlq/discard.
func (a *API) DiscardDeadLetters(w http.ResponseWriter, r *http.Request) {
	a.operate(w, r, consumers.ActionDiscard)
}

// maxResults bounds the results of one answer; the operation itself may be larger.
const maxResults = 1000

func (a *API) operate(w http.ResponseWriter, r *http.Request, action consumers.Action) {
	raw, err := readBody(r)
	var b DeadLetterSelection
	if err == nil {
		err = decodeStrict(raw, &b)
	}
	if err == nil && b.Filter != nil && b.Filter.Status != "" && b.Filter.Status != DeadLetterStatusOpen {
		err = problem(http.StatusUnprocessableEntity, "invalid", "Not acceptable", "only open dead letters can be acted on: leave status out").at("/filter/status")
	}
	if err != nil {
		a.fail(w, r, err)
		return
	}
	req := consumers.Request{Action: action, Actor: callerOf(r.Context()).Name, Note: clean(b.Note, 1000), IDs: b.Ids, DryRun: b.DryRun}
	if f := b.Filter; f != nil {
		req.Filter = &consumers.DeadFilter{Group: consumers.GroupName(f.Group), Type: f.Type, Class: f.Class, Fingerprint: f.Fingerprint}
		if f.OrderID != nil {
			req.Filter.OrderID = *f.OrderID
		}
	}
	op, results, err := a.DeadLetters.Do(r.Context(), req)
	if err != nil {
		a.fail(w, r, err)
		return
	}
	out := DeadLetterOperation{Kind: DeadLetterOperationKind(action), DryRun: b.DryRun, Selected: len(results), Results: make([]DeadLetterResult, 0, min(len(results), maxResults))}
	if op != nil {
		out.OperationID = &op.ID
	}
	for _, x := range results[:min(len(results), maxResults)] {
		v := DeadLetterResult{ID: x.ID, Result: DeadLetterResultResult(x.Outcome), Detail: x.Error}
		if x.Error != "" {
			v.Result = DeadLetterResultResultFailed
		}
		out.Results = append(out.Results, v)
	}
	answer(w, http.StatusOK, out)
}

func deadLetter(d *consumers.DeadView) DeadLetter {
	v := DeadLetter{
		ID: d.ID, Group: string(d.Group), Topic: string(d.Origin.Topic), Partition: d.Origin.Partition, Offset: d.Origin.Offset,
		MessageID: d.MessageID, Type: d.Type, Status: DeadLetterStatus(d.Status), Class: d.Class, Reason: d.Reason, Fingerprint: d.Fingerprint,
		Attempts: d.Attempts, FirstFailedAt: d.FirstFailed.UTC(), LastFailedAt: d.LastFailed.UTC(), Owner: d.Owner, Note: d.Note,
	}
	if d.OrderID != uuid.Nil {
		v.OrderID = &d.OrderID
	}
	return v
}
