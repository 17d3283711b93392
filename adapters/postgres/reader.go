package postgres

import (
	"context"
	"encoding/base64"
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"

	"ordersaga/domain"
	"ordersaga/saga"
)

const (
	viewColumns = orderColumns + `, s.definition, s.def_version, s.version, s.phase, s.steps, s.undos, s.cancel, s.deadline, s.stuck_since, coalesce(s.stuck_reason, ''),
  coalesce(s.stuck_owner, ''), s.updated_at`
)

// place is where a page ended: lists are in descending order of (time, id).
type place struct {
	at time.Time
	id domain.OrderID
}

func (p place) cursor() string {
	return base64.RawURLEncoding.EncodeToString([]byte(strconv.FormatInt(p.at.UnixMicro(), 10) + "." + p.id.String()))
}

func parsePlace(cursor string) (p place, err error) {
	b, err := base64.RawURLEncoding.DecodeString(cursor)
	if err != nil {
		return place{}, badCursor(cursor)
	}
	at, id, ok := strings.Cut(string(b), ".")
	micros, err := strconv.ParseInt(at, 10, 64)
	if err != nil || !ok {
		return place{}, badCursor(cursor)
	}
	if p.id, err = domain.ParseOrderID(id); err != nil {
		return place{}, badCursor(cursor)
	}
	p.at = time.UnixMicro(micros)
	return p, nil
}

// scanView scans viewColumns.
func scanView(r pgx.Rows) (v saga.OrderView, err error) {
	var row orderRow
	var steps, undos, why, owner string
	var deadline, since *time.Time
	s := &v.Saga
	err = r.Scan(append(row.into(), &s.Definition, &s.DefVersion, &s.Version, (*string)(&s.Phase), &steps, &undos, &s.Cancel, &deadline, &since, &why, &owner, &v.UpdatedAt)...)
	if err != nil {
		return v, err
	}
	if v.Order, err = row.order(); err != nil {
		return v, err
	}
	s.Steps, s.Undos, s.Status, s.Reason, s.Sequence = progress(steps), progress(undos), v.Status, v.Reason, v.Sequence
	if deadline != nil {
		v.Deadline = *deadline
	}
	if since != nil {
		s.Stuck = &saga.Stuck{Reason: why, Owner: owner, Since: *since}
	}
	v.CreatedAt = row.createdAt
	return v, nil
}

// Order reads an order with its saga; nil if there is none.
func (db *DB) Order(ctx context.Context, id domain.OrderID) (found *saga.OrderView, err error) {
	err = db.query(ctx, Operators, "get order", `SELECT `+viewColumns+ordersAndSagas+`WHERE o.id = $1`, []any{uuid.UUID(id)}, func(r pgx.Rows) error {
		v, err := scanView(r)
		found = &v
		return err
	})
	return found, err
}

// selection is a WHERE under construction.
type selection struct {
	conds []string
	args  []any
}

// arg adds a value and answers its placeholder.
func (q *selection) arg(v any) string {
	q.args = append(q.args, v)
	return "$" + strconv.Itoa(len(q.args))
}

func (q *selection) and(cond string) { q.conds = append(q.conds, cond) }

func (q *selection) where() string {
	if len(q.conds) == 0 {
		return "true"
	}
	return strings.Join(q.conds, " AND ")
}

// after begins behind the last order of the page before.
func (q *selection) after(cursor string) error {
	if cursor == "" {
		return nil
	}
	p, err := parsePlace(cursor)
	if err == nil {
		q.and(`(o.created_at, o.id) < (` + q.arg(p.at) + `::timestamptz, ` + q.arg(uuid.UUID(p.id)) + `::uuid)`)
	}
	return err
}

const newestFirst = ` ORDER BY o.created_at DESC, o.id DESC `

// Orders lists orders, newest first: pending ones through their sagas' deadlines, others along the time of creation, the customer's
// if one is given.
func (db *DB) Orders(ctx context.Context, f saga.OrderFilter) (page []saga.OrderView, next string, err error) {
	q := &selection{}
	if err := q.after(f.Cursor); err != nil {
		return nil, "", err
	}
	if f.CustomerID != "" {
		q.and(`o.customer_id = ` + q.arg(clean(f.CustomerID)))
	}
	switch f.Status {
	case "":
		return db.list(ctx, "list orders", q, f.Limit)
	case domain.Pending:
		q.and(underWay + ` AND s.status = 'pending'`)
		return db.list(ctx, "list pending orders", q, f.Limit)
	case domain.Confirmed, domain.Rejected, domain.Cancelled:
		return db.search(ctx, "list orders by status", q, `s.status = `, string(f.Status), f.Limit)
	}
	return nil, "", &domain.Refusal{Reason: domain.Invalid, Field: "/status", Detail: fmt.Sprintf("there is no status %.40q: pending, confirmed, rejected or cancelled", f.Status)}
}

// underWay is what the partial index on deadlines holds: each saga that has not ended.
const underWay = `s.deadline IS NOT NULL`

// Sagas lists sagas, newest first. Stuck and OlderThan are about sagas under way; with an ended phase OlderThan counts from its end.
func (db *DB) Sagas(ctx context.Context, f saga.SagaFilter) (page []saga.OrderView, next string, err error) {
	q := &selection{}
	if err := q.after(f.Cursor); err != nil {
		return nil, "", err
	}
	switch f.Phase {
	case "", saga.Running, saga.Compensating, saga.Completed, saga.Compensated:
	default:
		return nil, "", &domain.Refusal{Reason: domain.Invalid, Field: "/phase", Detail: fmt.Sprintf("there is no phase %.40q: running, completed, compensating or compensated", f.Phase)}
	}
	if f.OlderThan > 0 {
		q.and(`s.updated_at < now() - ` + q.arg(f.OlderThan) + `::interval`)
	}
	if f.Stuck {
		q.and(`(s.stuck_since IS NOT NULL OR s.updated_at < now() - ` + q.arg(stuckAfter) + `::interval)`)
	}
	if f.Phase.Ended() && !f.Stuck {
		if f.OlderThan > 0 { // is about the saga, not the run of orders that is searched
			q.and(`s.phase = ` + q.arg(string(f.Phase)))
			return db.list(ctx, "list sagas", q, f.Limit)
		}
		return db.search(ctx, "list sagas by phase", q, `s.phase = `, string(f.Phase), f.Limit)
	}
	if f.Phase != "" {
		q.and(`s.phase = ` + q.arg(string(f.Phase)))
	}
	if f.Phase != "" || f.Stuck || f.OlderThan > 0 {
		q.and(underWay)
	}
	return db.list(ctx, "list sagas", q, f.Limit)
}

// stuckAfter is how long a saga may stand still before it is listed among the stuck ones.
const stuckAfter = time.Minute

// list answers a page of what a selection names.
func (db *DB) list(ctx context.Context, name string, q *selection, limit int) (page []saga.OrderView, next string, err error) {
	limit = pageLimit(limit)
	sql := `SELECT ` + viewColumns + ordersAndSagas + `WHERE ` + q.where() + newestFirst + `LIMIT ` + q.arg(limit+1)
	page, err = db.views(ctx, name, sql, q.args)
	return cut(page, limit, err)
}

// scanned bounds how many orders one page looks at for a status or phase that few have. There is no index on those (each change of one
// would touch every index of its table), so a page may be shorter than asked for, even empty, and still have a next one.
const scanned = 20_000

// search looks for a value in a bounded run of orders.
func (db *DB) search(ctx context.Context, name string, q *selection, column, value string, limit int) (page []saga.OrderView, next string, err error) {
	limit = pageLimit(limit)
	run := *q
	sql := `SELECT ` + viewColumns + ` FROM (SELECT * FROM orders o WHERE ` + run.where() + newestFirst + `LIMIT ` + run.arg(scanned) + `) o JOIN sagas s ON s.order_id = o.id WHERE ` +
		column + run.arg(value) + newestFirst + `LIMIT ` + run.arg(limit+1)
	page, err = db.views(ctx, name, sql, run.args)
	if err != nil || len(page) > limit {
		return cut(page, limit, err)
	}
	// The run ended before the page was full. If it was a full run, the next page goes on behind it.
	var end place
	found := false
	edge := *q
	sql = `SELECT o.created_at, o.id FROM orders o WHERE ` + edge.where() + newestFirst + `LIMIT 1 OFFSET ` + edge.arg(scanned-1)
	err = db.query(ctx, Operators, name, sql, edge.args, func(r pgx.Rows) error {
		found = true
		return r.Scan(&end.at, (*[16]byte)(&end.id))
	})
	if err == nil && found {
		next = end.cursor()
	}
	return page, next, err
}

func (db *DB) views(ctx context.Context, name, sql string, args []any) (page []saga.OrderView, err error) {
	err = db.query(ctx, Operators, name, sql, args, func(r pgx.Rows) error {
		v, err := scanView(r)
		page = append(page, v)
		return err
	})
	return page, err
}

// cut takes the row that was read to know whether there is a next page.
func cut(page []saga.OrderView, limit int, err error) ([]saga.OrderView, string, error) {
	if err != nil || len(page) <= limit {
		return page, "", err
	}
	last := &page[limit-1]
	return page[:limit], place{last.CreatedAt, last.ID}.cursor(), nil
}

// Timeline reads a saga's history, in order.
func (db *DB) Timeline(ctx context.Context, id domain.OrderID) (out []saga.HistoryEntry, err error) {
	const q = `SELECT version, at, coalesce(cause, '00000000-0000-0000-0000-000000000000'), input, coalesce(name, ''), coalesce(reason, ''), coalesce(owner, ''), phase, status, coalesce(actor, '')
FROM saga_history WHERE order_id = $1 ORDER BY version`
	err = db.query(ctx, Operators, "timeline", q, []any{uuid.UUID(id)}, func(r pgx.Rows) error {
		e := saga.HistoryEntry{Order: id}
		err := r.Scan(&e.Version, &e.At, (*[16]byte)(&e.Cause), (*string)(&e.Input.Kind), &e.Input.Name, &e.Input.Reason, &e.Input.Owner,
			(*string)(&e.Phase), (*string)(&e.Status), &e.Actor)
		out = append(out, e)
		return err
	})
	return out, err
}

// AuditLog lists what operators did, newest first; the cursor is the last entry's number.
func (db *DB) AuditLog(ctx context.Context, cursor string, limit int) (page []saga.AuditEntry, next string, err error) {
	before := int64(math.MaxInt64)
	if cursor != "" {
		if before, err = strconv.ParseInt(cursor, 10, 64); err != nil {
			return nil, "", badCursor(cursor)
		}
	}
	limit = pageLimit(limit)
	var ids []int64
	const q = `SELECT id, at, actor, action, target, note, coalesce(detail::text, '') FROM audit_log WHERE id < $1 ORDER BY id DESC LIMIT $2`
	err = db.query(ctx, Operators, "audit log", q, []any{before, limit + 1}, func(r pgx.Rows) error {
		var id int64
		var e saga.AuditEntry
		err := r.Scan(&id, &e.At, &e.Actor, &e.Action, &e.Target, &e.Note, &e.Detail)
		ids, page = append(ids, id), append(page, e)
		return err
	})
	if err == nil && len(page) > limit {
		page, next = page[:limit], strconv.FormatInt(ids[limit-1], 10)
	}
	return page, next, err
}
