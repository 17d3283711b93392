package postgres

import (
	"errors"
	"maps"
	"slices"

	"github.com/google/uuid"
	"github.com/maypok86/otter/v2"

	"ordersaga/domain"
	"ordersaga/events"
	"ordersaga/saga"
)

// A transaction of the hot path need not read what this process knows: what it has written last of a saga or a payment that is under way, or that
// a message which comes for the first time has left nothing yet. It presumes that this still holds, writes, and has the database refuse
// the whole if it does not (the domain presumed, or a primary key); then InTx starts over, and that time it reads. So a batch is one round trip
// instead of two, without begin and commit, and nothing is decided on what is not so: whatever was presumed is verified in the transaction that
// rests on it, whether or not that changes it.

// recalled bounds what is remembered, in sagas and in payments: those that are under way at a time, at a rate at which round trips count.
const recalled = 1024

// presumeAtMost is how many rows are presumed at most: in a large batch the round trip counts for little, and to compare costs more than to read.
const presumeAtMost = 16

// recall is what this process has written last.
type recall struct {
	sagas    *otter.Cache[domain.OrderID, *saga.Instance]
	payments *otter.Cache[domain.OrderID, *domain.Payment]
}

func newRecall() (recall, error) {
	sagas, err := otter.New(&otter.Options[domain.OrderID, *saga.Instance]{MaximumSize: recalled, Executor: func(fn func()) { fn() }})
	payments, perr := otter.New(&otter.Options[domain.OrderID, *domain.Payment]{MaximumSize: recalled, Executor: func(fn func()) { fn() }})
	return recall{sagas, payments}, errors.Join(err, perr)
}

// forget forgets everything: the database may have lost what we know of it (a standby that took over).
func (r *recall) forget() {
	r.sagas.InvalidateAll()
	r.payments.InvalidateAll()
}

// presumed is what a transaction rests on, and what of it no statement has verified yet.
type presumed struct {
	careful      bool // nothing is presumed: something was wrong the last time
	relied       bool // something was presumed
	sagaVersions map[domain.OrderID]int32
	rechecked    []domain.OrderID // whose payments were compared
	// What a transaction has written itself: sagas it reads again, payments it knows.
	wroteSagas    bool
	wrotePayments map[domain.OrderID]*domain.Payment
	unpaid        map[domain.OrderID]bool
	unreserved    map[domain.OrderID]bool
	first         map[uuid.UUID]bool

	learnedSagas    []*saga.Instance
	learnedPayments []*domain.Payment
}

// PresumeFirst presumes that a group's inbox has no row of the messages, which Inbox will be asked for next.
func (t *Tx) PresumeFirst(group events.Group, ids []uuid.UUID) {
	if t.careful || len(ids) == 0 || len(ids) > presumeAtMost {
		return
	}
	for _, part := range inboxParts(ids) {
		t.queue("verify inbox", `SELECT CAST(NOT EXISTS (SELECT FROM inbox WHERE message_id BETWEEN $1 AND $2 AND message_id = ANY($3) AND grp = $4) AS presumed)`,
			part[0], part[len(part)-1], part, string(group))
	}
	t.relied = true
	t.first = make(map[uuid.UUID]bool, len(ids))
	for _, id := range ids {
		t.first[id] = true
	}
}

// presumeSagas answers copies of the sagas as they were written last, if all of them are known; else nil.
func (t *Tx) presumeSagas(ids []domain.OrderID) map[domain.OrderID]*saga.Instance {
	if t.careful || t.wroteSagas || len(ids) > presumeAtMost {
		return nil
	}
	out := make(map[domain.OrderID]*saga.Instance, len(ids))
	for _, id := range ids {
		in, ok := t.db.recall.sagas.GetIfPresent(id)
		if !ok {
			return nil
		}
		out[id] = in.Clone()
	}
	t.relied = true
	if t.sagaVersions == nil {
		t.sagaVersions = make(map[domain.OrderID]int32, len(ids))
	}
	for id, in := range out {
		t.sagaVersions[id] = in.State.Version
	}
	return out
}

// versionOf is the version that a saga must have to be updated; -1 if its row was read and is locked.
func (t *Tx) versionOf(id domain.OrderID) int32 {
	if v, ok := t.sagaVersions[id]; ok {
		return v
	}
	return -1
}

// learnSaga remembers a saga as it is written, once that has committed. One that ended needs no remembering, since when one is stuck is for the database to
// say, and what came in a large batch will go on in one, which reads.
func (t *Tx) learnSaga(in *saga.Instance) { t.learnedSagas = append(t.learnedSagas, in) }

// PresumeUnpaid presumes that the orders have no payment yet: LockPayments answers so without looking.
func (t *Tx) PresumeUnpaid(orders []domain.OrderID) {
	if !t.careful {
		t.unpaid = set(orders)
	}
}

// presumePayments answers copies of the payments as they were written last, or none where that is presumed, if that is known of all; else nil.
func (t *Tx) presumePayments(orders []domain.OrderID) map[domain.OrderID]*domain.Payment {
	if t.careful || t.wrotePayments != nil {
		return nil
	}
	out := make(map[domain.OrderID]*domain.Payment, len(orders))
	var known []domain.OrderID
	for _, id := range orders {
		if t.unpaid[id] {
			out[id] = domain.NewPayment(id)
			continue
		}
		p, ok := t.db.recall.payments.GetIfPresent(id)
		if !ok || len(known) == presumeAtMost {
			t.unpaid = nil // all are read
			return nil
		}
		out[id] = copyPayment(p)
		known = append(known, id)
	}
	t.relied = true
	t.verifyPayments(known, out)
	return out
}

// ownPayments answers copies of payments that this transaction has written itself, if it has written all of them; else nil.
func (t *Tx) ownPayments(orders []domain.OrderID) map[domain.OrderID]*domain.Payment {
	if t.wrotePayments == nil {
		return nil
	}
	out := make(map[domain.OrderID]*domain.Payment, len(orders))
	for _, id := range orders {
		p, ok := t.wrotePayments[id]
		if !ok {
			return nil
		}
		out[id] = copyPayment(p)
	}
	return out
}

// verifyPayments locks and compares, in statements, so snapshots, of their own: see LockPayments. A step's state and attempt say it all: nothing else of
// one changes without them.
func (t *Tx) verifyPayments(known []domain.OrderID, pays map[domain.OrderID]*domain.Payment) {
	if len(known) == 0 {
		return
	}
	if t.payments == nil {
		t.payments = make(map[paymentKey]bool, len(known))
	}
	var steps []*domain.PaymentStep
	for _, id := range known {
		for op, s := range pays[id].Steps {
			steps = append(steps, s)
			t.payments[paymentKey{id, op}] = true
		}
	}
	slices.SortFunc(steps, comparePaymentKeys)
	n := len(steps)
	ids, ops, states, attempts := make([]domain.OrderID, n), make([]string, n), make([]string, n), make([]int32, n)
	for i, s := range steps {
		ids[i], ops[i], states[i], attempts[i] = s.Order, string(s.Op), string(s.State), int32(s.Attempt) //nolint:gosec // a handful of attempts
	}
	t.rechecked = append(t.rechecked, known...)
	t.queue("lock authorizations", lockAuthorizations, known)
	t.queueRows("verify payments", verifyPayments, n, []any{ids, ops, states, attempts}, known, n)
}

var verifyPayments = over("id uuid, op text, state text, attempt int", func(u string) string {
	return `
SELECT CAST((SELECT count(*) FROM payments WHERE order_id = ANY($5)) = $6 AND count(*) = $6 AS presumed)
FROM ` + u + ` JOIN payments p ON p.order_id = u.id AND p.op = u.op AND p.state = u.state AND p.attempt = u.attempt`
})

func copyPayment(p *domain.Payment) *domain.Payment {
	c := domain.NewPayment(p.Order)
	for op, s := range p.Steps {
		step := *s
		c.Steps[op] = &step
	}
	return c
}

// PresumeUnreserved presumes that nothing was reserved for the orders, nor refused: LockReservations, which will be asked next for just these, answers so
// without looking.
func (t *Tx) PresumeUnreserved(orders []domain.OrderID) {
	if t.careful || len(orders) == 0 {
		return
	}
	t.relied = true
	t.unreserved = set(orders)
	t.reservationsAhead = &readAhead[*domain.Reservation]{ids: set(orders)}
}

// verify queues what no statement has verified yet: sagas that were not saved, orders for which nothing was inserted.
func (t *Tx) verify() {
	if n := len(t.sagaVersions); n > 0 {
		ids := slices.SortedFunc(maps.Keys(t.sagaVersions), domain.OrderID.Compare)
		versions := make([]int32, n)
		for i, id := range ids {
			versions[i] = t.sagaVersions[id]
		}
		t.queueRows("verify sagas", verifySagas, n, []any{ids, versions}, n)
	}
	if len(t.unpaid) > 0 {
		t.queue("verify payments", `SELECT CAST(NOT EXISTS (SELECT FROM payments WHERE order_id = ANY($1)) AS presumed)`, slices.Collect(maps.Keys(t.unpaid)))
	}
	if len(t.unreserved) > 0 {
		t.queue("verify reservations", `SELECT CAST(NOT EXISTS (SELECT FROM reservations WHERE order_id = ANY($1)) AS presumed)`, slices.Collect(maps.Keys(t.unreserved)))
	}
}

var verifySagas = over("id uuid, version int", func(u string) string {
	return `SELECT CAST(count(*) = $3 AS presumed) FROM ` + u + ` JOIN sagas s ON s.order_id = u.id AND s.version = u.version`
})

// learn takes note of how a transaction ended.
func (t *Tx) learn(err error) {
	r := &t.db.recall
	var away *OutageError
	switch {
	case err == nil:
		few := len(t.learnedSagas)+len(t.learnedPayments) <= 2*presumeAtMost
		for _, in := range t.learnedSagas {
			if few && !in.State.Phase.Ended() && in.State.Stuck == nil {
				r.sagas.Set(in.Order, in.Clone())
			} else {
				r.sagas.Invalidate(in.Order)
			}
		}
		for _, p := range t.learnedPayments {
			if few && !p.Closed() && p.State(domain.Capture) != domain.BarrierDone {
				r.payments.Set(p.Order, copyPayment(p))
			} else {
				r.payments.Invalidate(p.Order)
			}
		}
		return
	case errors.As(err, &away):
		r.forget()
	}
	for _, in := range t.learnedSagas { // whether it committed may be unknown
		r.sagas.Invalidate(in.Order)
	}
	for id := range t.sagaVersions {
		r.sagas.Invalidate(id)
	}
	for _, p := range t.learnedPayments {
		r.payments.Invalidate(p.Order)
	}
	for _, id := range t.rechecked {
		r.payments.Invalidate(id)
	}
}
