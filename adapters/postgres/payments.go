package postgres

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/jackc/pgx/v5"

	"ordersaga/domain"
)

type paymentKey struct {
	order domain.OrderID
	op    domain.PaymentOp
}

func comparePaymentKeys(a, b *domain.PaymentStep) int {
	if c := a.Order.Compare(b.Order); c != 0 {
		return c
	}
	return compare(a.Op, b.Op)
}

// LockPayments locks the authorize rows, in the order of order ids, and reads all rows in a statement, so a snapshot, of its own: what
// another transaction inserted under that lock while this one waited for it is seen. Both go in one round trip. An order that has no
// authorize row has none at all and can't be locked: two that find none meet in the primary key of the row they insert, so an undo that
// finds no action must leave its tombstone under the action's own operation.
func (t *Tx) LockPayments(ctx context.Context, orders []domain.OrderID) (map[domain.OrderID]*domain.Payment, error) {
	if len(orders) == 0 {
		return map[domain.OrderID]*domain.Payment{}, nil
	}
	if out, err := foreseen(ctx, t, &t.paymentsAhead, orders); out != nil || err != nil {
		return out, err
	}
	if out := t.ownPayments(orders); out != nil {
		return out, nil
	}
	if out := t.presumePayments(orders); out != nil {
		return out, nil
	}
	out := make(map[domain.OrderID]*domain.Payment, len(orders))
	t.queueLockPayments(orders, out)
	return out, t.send(ctx, false)
}

func (t *Tx) queueLockPayments(orders []domain.OrderID, out map[domain.OrderID]*domain.Payment) {
	for _, id := range orders {
		out[id] = domain.NewPayment(id)
	}
	if t.payments == nil {
		t.payments = make(map[paymentKey]bool, len(orders))
	}
	t.queue("lock authorizations", lockAuthorizations, orders)
	const q = `SELECT order_id, op, state, attempt, amount_minor, currency, method, ref, code, begun FROM payments WHERE order_id = ANY($1)`
	t.queueRead("lock payments", q, []any{orders}, func(r pgx.Rows) error {
		s, err := scanPayment(r)
		if err != nil {
			return err
		}
		out[s.Order].Steps[s.Op] = &s
		t.payments[paymentKey{s.Order, s.Op}] = true
		return nil
	})
}

const lockAuthorizations = `SELECT FROM payments WHERE order_id = ANY($1) AND op = 'authorize' ORDER BY order_id FOR NO KEY UPDATE`

func scanPayment(r pgx.Rows) (s domain.PaymentStep, err error) {
	err = r.Scan((*[16]byte)(&s.Order), (*string)(&s.Op), (*string)(&s.State), &s.Attempt, &s.Amount.Minor, &s.Amount.Currency, &s.Method, &s.Ref, &s.Code, &s.Begun)
	return s, err
}

const paymentRow = "id uuid, op text, state text, attempt int, amount bigint, currency text, method text, ref text, code text, begun timestamptz"

// A step that has no time yet begins now, by the database's clock.
var insertPayments = over(paymentRow, func(u string) string {
	return `
INSERT INTO payments (order_id, op, state, attempt, amount_minor, currency, method, ref, code, begun)
SELECT id, op, state, attempt, amount, currency, method, ref, code, coalesce(begun, now())
FROM ` + u
})

var updatePayments = over(paymentRow, func(u string) string {
	return `
UPDATE payments p SET state = u.state, attempt = u.attempt, amount_minor = u.amount, currency = u.currency, method = u.method, ref = u.ref, code = u.code,
  begun = coalesce(u.begun, now())
FROM ` + u + ` WHERE p.order_id = u.id AND p.op = u.op`
})

// SavePayments updates the changed steps that LockPayments of this transaction found and inserts the others. One that is there
// already violates the primary key: InTx starts over and finds it. A step whose Begun is zero begins at the database's now.
func (t *Tx) SavePayments(_ context.Context, ps []*domain.Payment) error {
	var fresh, known []*domain.PaymentStep
	if t.wrotePayments == nil {
		t.wrotePayments = make(map[domain.OrderID]*domain.Payment, len(ps))
	}
	for _, p := range ps {
		delete(t.unpaid, p.Order) // the primary key verifies it
		t.learnedPayments, t.wrotePayments[p.Order] = append(t.learnedPayments, p), p
		for op := range p.Changed {
			s := p.Steps[op]
			if s == nil {
				return fmt.Errorf("postgres: save payments: order %s has no step %s to save", p.Order, op)
			}
			if t.payments[paymentKey{s.Order, op}] {
				known = append(known, s)
			} else {
				fresh = append(fresh, s)
			}
		}
	}
	if len(fresh) > 0 {
		t.queueRows("insert payments", insertPayments, len(fresh), paymentColumns(fresh))
		for _, s := range fresh {
			if t.payments == nil {
				t.payments = map[paymentKey]bool{}
			}
			t.payments[paymentKey{s.Order, s.Op}] = true
		}
	}
	if len(known) > 0 {
		t.queueRows("update payments", updatePayments, len(known), paymentColumns(known))
	}
	return nil
}

func paymentColumns(list []*domain.PaymentStep) []any {
	slices.SortFunc(list, comparePaymentKeys)
	n := len(list)
	ids, ops, states, attempts, amounts := make([]domain.OrderID, n), make([]string, n), make([]string, n), make([]int32, n), make([]int64, n)
	currencies, methods, refs, codes, begun := make([]string, n), make([]string, n), make([]string, n), make([]string, n), make([]*time.Time, n)
	for i, s := range list {
		ids[i], ops[i], states[i], attempts[i], amounts[i] = s.Order, string(s.Op), string(s.State), int32(s.Attempt), s.Amount.Minor //nolint:gosec // a handful of attempts
		currencies[i], methods[i], refs[i], codes[i] = s.Amount.Currency, clean(s.Method), clean(s.Ref), clean(s.Code)
		if !s.Begun.IsZero() {
			begun[i] = &s.Begun
		}
	}
	return []any{ids, ops, states, attempts, amounts, currencies, methods, refs, codes, begun}
}
