package postgres

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"

	"ordersaga/consumers"
	"ordersaga/domain"
	"ordersaga/events"
)

// The id, the first failure, the bytes, owner and note of one that is there already stay; it is opened again.
const saveDead = `
INSERT INTO dead_letters AS d (id, grp, message_id, topic, partition_no, offset_no, type, order_id, class, error, fingerprint, attempts, first_failed,
  last_failed, key, value, headers, ticket, status, owner, note)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18, 'open', $19, $20)
ON CONFLICT (grp, message_id) DO UPDATE SET status = 'open', class = excluded.class, error = excluded.error, fingerprint = excluded.fingerprint,
  attempts = excluded.attempts, last_failed = excluded.last_failed, ticket = excluded.ticket, updated_at = now()`

// SaveDeadLetters goes row by row (rare, and wide), in the order of (group, message), the last of each.
func (t *Tx) SaveDeadLetters(_ context.Context, dead []consumers.DeadLetter) error {
	dead = slices.Clone(dead)
	same := func(a, b consumers.DeadLetter) int {
		if c := compare(a.Group, b.Group); c != 0 {
			return c
		}
		return compareUUIDs(a.MessageID, b.MessageID)
	}
	slices.SortStableFunc(dead, same)
	for i := range dead {
		if i+1 < len(dead) && same(dead[i], dead[i+1]) == 0 {
			continue
		}
		d := &dead[i]
		var order *domain.OrderID
		if d.OrderID != uuid.Nil {
			order = (*domain.OrderID)(&d.OrderID)
		}
		t.queue("save dead letter", saveDead, d.ID, string(d.Group), d.MessageID, string(d.Origin.Topic), d.Origin.Partition, d.Origin.Offset, clean(d.Type),
			(*[16]byte)(order), clean(d.Class), clean(d.Error), clean(d.Fingerprint), d.Attempts, d.FirstFailed, d.LastFailed, notNil(d.Key), notNil(d.Value),
			events.AppendHeaders([]byte{}, d.Headers), d.Ticket, clean(d.Owner), clean(d.Note))
	}
	return nil
}

// ResolveDeadLetters finds rows by (group, message), in the order of ids.
func (t *Tx) ResolveDeadLetters(_ context.Context, group events.Group, ids []uuid.UUID) error {
	if len(ids) == 0 {
		return nil
	}
	t.queue("resolve dead letters", `
UPDATE dead_letters SET status = 'resolved', updated_at = now() WHERE id IN (
  SELECT id FROM dead_letters WHERE grp = $1 AND message_id = ANY($2) AND status = 'replaying' ORDER BY id FOR NO KEY UPDATE)`, string(group), ids)
	return nil
}

const deadColumns = `id, grp, message_id, topic, partition_no, offset_no, type, coalesce(order_id, '00000000-0000-0000-0000-000000000000'), class, error, fingerprint,
  attempts, first_failed, last_failed, key, value, headers, ticket, status, owner, note`

func scanDead(r pgx.Rows) (d consumers.DeadLetter, err error) {
	var headers []byte
	err = r.Scan((*[16]byte)(&d.ID), (*string)(&d.Group), (*[16]byte)(&d.MessageID), (*string)(&d.Origin.Topic), &d.Origin.Partition, &d.Origin.Offset, &d.Type,
		(*[16]byte)(&d.OrderID), &d.Class, &d.Error, &d.Fingerprint, &d.Attempts, &d.FirstFailed, &d.LastFailed, &d.Key, &d.Value, &headers, &d.Ticket,
		(*string)(&d.Status), &d.Owner, &d.Note)
	if err == nil {
		d.Headers, err = events.ParseHeaders(headers)
	}
	return d, err
}

// LockDead locks in the order of ids.
func (t *Tx) LockDead(ctx context.Context, ids []uuid.UUID) (map[uuid.UUID]*consumers.DeadLetter, error) {
	out := make(map[uuid.UUID]*consumers.DeadLetter, len(ids))
	if len(ids) == 0 {
		return out, nil
	}
	err := t.query(ctx, "lock dead letters", `SELECT `+deadColumns+` FROM dead_letters WHERE id = ANY($1) ORDER BY id FOR NO KEY UPDATE`, []any{ids}, func(r pgx.Rows) error {
		d, err := scanDead(r)
		out[d.ID] = &d
		return err
	})
	return out, err
}

// UpdateDead stores what an operator's action changes of locked dead letters.
func (t *Tx) UpdateDead(_ context.Context, dead []consumers.DeadLetter) error {
	n := len(dead)
	if n == 0 {
		return nil
	}
	dead = slices.Clone(dead)
	slices.SortFunc(dead, func(a, b consumers.DeadLetter) int { return compareUUIDs(a.ID, b.ID) })
	ids, statuses, owners, notes, tickets := make([]uuid.UUID, n), make([]string, n), make([]string, n), make([]string, n), make([]int64, n)
	for i := range dead {
		d := &dead[i]
		ids[i], statuses[i], owners[i], notes[i], tickets[i] = d.ID, string(d.Status), clean(d.Owner), clean(d.Note), d.Ticket
	}
	t.queue("update dead letters", `
UPDATE dead_letters d SET status = u.status, owner = u.owner, note = u.note, ticket = u.ticket, updated_at = now()
FROM unnest($1::uuid[], $2::text[], $3::text[], $4::text[], $5::bigint[]) AS u(id, status, owner, note, ticket) WHERE d.id = u.id`, ids, statuses, owners, notes, tickets)
	return nil
}

// where writes a filter as SQL. Only conditions that are set appear, so that the planner sees which index serves.
func where(f *consumers.DeadFilter) (sql string, args []any) {
	var conds []string
	add := func(cond string, v any) {
		args = append(args, v)
		conds = append(conds, cond+" $"+strconv.Itoa(len(args)))
	}
	for _, c := range []struct{ column, value string }{
		{"status", string(f.Status)},
		{"grp", string(f.Group)},
		{"type", f.Type},
		{"class", f.Class},
		{"fingerprint", f.Fingerprint},
	} {
		if c.value != "" {
			add(c.column+" =", clean(c.value))
		}
	}
	if f.OrderID != uuid.Nil {
		add("order_id =", f.OrderID)
	}
	if !f.FailedSince.IsZero() {
		add("last_failed >=", f.FailedSince)
	}
	if !f.FailedUntil.IsZero() {
		add("last_failed <", f.FailedUntil)
	}
	if conds == nil {
		return "true", nil
	}
	return strings.Join(conds, " AND "), args
}

// SelectDead answers the oldest ids of a filter, without locks: LockDead decides about each.
func (t *Tx) SelectDead(ctx context.Context, f consumers.DeadFilter, limit int) ([]uuid.UUID, error) {
	var out []uuid.UUID
	cond, args := where(&f)
	args = append(args, limit)
	err := t.query(ctx, "select dead letters", `SELECT id FROM dead_letters WHERE `+cond+` ORDER BY id LIMIT $`+strconv.Itoa(len(args)), args, func(r pgx.Rows) error {
		var id uuid.UUID
		err := r.Scan((*[16]byte)(&id))
		out = append(out, id)
		return err
	})
	return out, err
}

// DeadLetters answers a page, newest first; the cursor is the last id of the page before.
func (db *DB) DeadLetters(ctx context.Context, f consumers.DeadFilter, cursor string, limit int) (page []consumers.DeadLetter, next string, err error) {
	cond, args := where(&f)
	if cursor != "" {
		after, err := uuid.Parse(cursor)
		if err != nil {
			return nil, "", badCursor(cursor)
		}
		args = append(args, after)
		cond += " AND id < $" + strconv.Itoa(len(args))
	}
	limit = pageLimit(limit)
	args = append(args, limit+1)
	q := `SELECT ` + deadColumns + ` FROM dead_letters WHERE ` + cond + ` ORDER BY id DESC LIMIT $` + strconv.Itoa(len(args))
	err = db.query(ctx, Operators, "list dead letters", q, args, func(r pgx.Rows) error {
		d, err := scanDead(r)
		page = append(page, d)
		return err
	})
	if len(page) > limit {
		page = page[:limit]
		next = page[limit-1].ID.String()
	}
	return page, next, err
}

// DeadLetter answers nil if there is none.
func (db *DB) DeadLetter(ctx context.Context, id uuid.UUID) (found *consumers.DeadLetter, err error) {
	err = db.query(ctx, Operators, "get dead letter", `SELECT `+deadColumns+` FROM dead_letters WHERE id = $1`, []any{id}, func(r pgx.Rows) error {
		d, err := scanDead(r)
		found = &d
		return err
	})
	return found, err
}

// maxPage bounds a page of any list.
const maxPage = 500

func pageLimit(n int) int { return min(max(n, 1), maxPage) }

func badCursor(c string) error {
	return &domain.Refusal{Reason: domain.Invalid, Field: "/cursor", Detail: fmt.Sprintf("cursor %.80q was not answered by this list: start without one", c)}
}
