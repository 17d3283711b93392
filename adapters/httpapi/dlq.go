package httpapi

import (
	"fmt"
	"net/http"

	"github.com/google/uuid"

	"ordersaga/consumers"
)

// ListDeadLetters implements GET /v1/dlq.
func (a *API) ListDeadLetters(w http.ResponseWriter, r *http.Request, params ListDeadLettersParams) {
	limit, err := pageLimit(params.Limit, r)
	if err == nil && params.Status != "" && !params.Status.Valid() {
		err = badParameter("status", "status is open, replaying, resolved, discarded or superseded")
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

// Bounds of an operation on dead letters.
const (
	maxIDs     = 1000 // ids of one request
	maxResults = 1000 // results of one answer; the operation itself may be larger
)

// selectionBody is DeadLetterSelection of the contract with the ids as text, so that a bad one can be answered for what it is.
type selectionBody struct {
	IDs    []string    `json:"ids"`
	Filter *filterBody `json:"filter"`
	DryRun bool        `json:"dry_run"`
	Note   string      `json:"note"`
}

type filterBody struct {
	Group       string `json:"group"`
	Status      string `json:"status"`
	Class       string `json:"class"`
	OrderID     string `json:"order_id"`
	Type        string `json:"type"`
	Fingerprint string `json:"fingerprint"`
}

// request reads an operator's wish; what it selects is for consumers to say.
func (b *selectionBody) request() (consumers.Request, error) {
	q := consumers.Request{Note: clean(b.Note, maxNoteBytes), DryRun: b.DryRun}
	if err := checkLength("/note", b.Note, maxNote); err != nil {
		return q, err
	}
	if len(b.IDs) > maxIDs {
		return q, notAcceptable("/ids", fmt.Sprintf("there are more than %d ids: send several requests, or a filter", maxIDs))
	}
	for i, s := range b.IDs {
		id, p := parseID(fmt.Sprintf("/ids/%d", i), s)
		if p != nil {
			return q, p
		}
		q.IDs = append(q.IDs, id)
	}
	f := b.Filter
	if f == nil {
		return q, nil
	}
	if f.Status != "" && f.Status != string(DeadLetterStatusOpen) {
		return q, notAcceptable("/filter/status", "only open dead letters can be acted on: leave status out")
	}
	for _, x := range [][2]string{{"group", f.Group}, {"class", f.Class}, {"type", f.Type}, {"fingerprint", f.Fingerprint}} {
		if len(x[1]) > maxParam || !plain(x[1]) {
			return q, notAcceptable("/filter/"+x[0], fmt.Sprintf("%s is at most %d bytes of printable text", x[0], maxParam))
		}
	}
	q.Filter = &consumers.DeadFilter{Group: consumers.GroupName(f.Group), Type: f.Type, Class: f.Class, Fingerprint: f.Fingerprint}
	if f.OrderID != "" {
		id, p := parseID("/filter/order_id", f.OrderID)
		if p != nil {
			return q, p
		}
		q.Filter.OrderID = id
	}
	return q, nil
}

func parseID(field, s string) (uuid.UUID, *Problem) {
	id, err := uuid.Parse(s)
	if err != nil || len(s) != 36 {
		return uuid.Nil, notAcceptable(field, fmt.Sprintf("%q is not a UUID of 36 characters", clean(s, 40)))
	}
	return id, nil
}

func (a *API) operate(w http.ResponseWriter, r *http.Request, action consumers.Action) {
	raw, err := readBody(r)
	var b selectionBody
	if err == nil {
		err = decodeStrict(raw, &b)
	}
	var req consumers.Request
	if err == nil {
		req, err = b.request()
	}
	if err != nil {
		a.fail(w, r, err)
		return
	}
	req.Action, req.Actor = action, callerOf(r.Context()).Name
	op, results, err := a.DeadLetters.Do(r.Context(), req)
	if err != nil && op != nil {
		err = &unfinishedError{op: op.ID, err: err}
	}
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

// unfinishedError is an operation that is stored and did not come to its end: it goes on by itself.
type unfinishedError struct {
	op  uuid.UUID
	err error
}

func (e *unfinishedError) Error() string {
	return fmt.Sprintf("operation %s is not finished: %v", e.op, e.err)
}
func (e *unfinishedError) Unwrap() error { return e.err }

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
