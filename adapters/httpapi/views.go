package httpapi

import (
	"encoding/json"
	"errors"

	"github.com/google/uuid"

	"ordersaga/domain"
	"ordersaga/saga"
)

func (a *API) order(o *saga.OrderView) Order {
	v := Order{
		OrderID: OrderID(o.ID), CustomerID: o.CustomerID, Status: OrderStatus(o.Status), Reason: OrderReason(o.Reason),
		TotalMinor: o.Total.Minor, Currency: o.Total.Currency, PaymentMethod: o.PaymentMethod, Sequence: o.Sequence,
		Items: make([]OrderItem, len(o.Lines)), Saga: a.sagaState(o), CreatedAt: o.CreatedAt.UTC(), UpdatedAt: o.UpdatedAt.UTC(),
	}
	for i, l := range o.Lines {
		v.Items[i] = OrderItem{SKU: string(l.SKU), Quantity: l.Quantity, UnitPriceMinor: l.UnitPrice}
	}
	return v
}

func (a *API) saga(o *saga.OrderView) Saga {
	return Saga{
		OrderID: OrderID(o.ID), Status: OrderStatus(o.Status), Reason: OrderReason(o.Reason), TotalMinor: o.Total.Minor,
		Currency: o.Total.Currency, Saga: a.sagaState(o), CreatedAt: o.CreatedAt.UTC(), UpdatedAt: o.UpdatedAt.UTC(),
	}
}

func (a *API) sagaState(o *saga.OrderView) SagaState {
	s := &o.Saga
	v := SagaState{
		State: SagaPhase(s.Phase), Definition: s.Definition, DefinitionVersion: int32(s.DefVersion), Version: s.Version,
		Steps: []SagaStep{}, Undos: []SagaUndo{}, CancelRequested: s.Cancel,
	}
	if s.Stuck != nil {
		v.Stuck = &Stuck{Reason: s.Stuck.Reason, Owner: s.Stuck.Owner, Since: s.Stuck.Since.UTC()}
	}
	if !o.Deadline.IsZero() {
		d := o.Deadline.UTC()
		v.DeadlineAt = &d
	}
	def, err := a.Definitions.Of(s.Definition, s.DefVersion)
	if err != nil {
		return v // written by a newer version: the state shows, its steps have no names here
	}
	for i, p := range s.Steps {
		v.Steps = append(v.Steps, SagaStep{Name: def.Steps[i].Name, Participant: string(def.Steps[i].Participant), State: StepState(p.String())})
	}
	for i, p := range s.Undos {
		v.Undos = append(v.Undos, SagaUndo{Participant: string(def.Undos[i].Participant), State: StepState(p.String())})
	}
	return v
}

func timelineEntry(h *saga.HistoryEntry) TimelineEntry {
	e := TimelineEntry{
		At: h.At.UTC(), Version: h.Version, Input: string(h.Input.Kind), Name: h.Input.Name, Reason: h.Input.Reason,
		State: SagaPhase(h.Phase), Status: OrderStatus(h.Status), Actor: h.Actor,
	}
	if h.Cause != uuid.Nil {
		e.Cause = h.Cause.String()
	}
	return e
}

func product(p *ProductView) Product {
	return Product{
		SKU: string(p.SKU), Name: p.Name, UnitPriceMinor: p.UnitPrice.Minor, Currency: p.UnitPrice.Currency,
		OnHand: p.Stock.OnHand(), Available: p.Stock.Available, Reserved: p.Stock.Reserved, Sold: p.Stock.Sold,
	}
}

func auditEntry(e *saga.AuditEntry) AuditEntry {
	v := AuditEntry{At: e.At.UTC(), Actor: e.Actor, Action: e.Action, Target: e.Target, Note: e.Note}
	if e.Detail != "" {
		if err := json.Unmarshal([]byte(e.Detail), &v.Detail); err != nil {
			v.Detail = map[string]any{"text": e.Detail}
		}
	}
	return v
}

// badCursor turns a store's refusal of a cursor into the contract's 400.
func badCursor(err error) error {
	var refusal *domain.Refusal
	if errors.As(err, &refusal) && refusal.Field == "/cursor" {
		return badParameter("cursor", refusal.Detail)
	}
	return err
}
