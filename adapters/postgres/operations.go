package postgres

import (
	"context"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"

	"ordersaga/consumers"
)

// InsertOperation freezes a selection: an item a row, in its order.
func (t *Tx) InsertOperation(_ context.Context, op consumers.Operation, ids []uuid.UUID) error {
	t.queue("insert operation", `
INSERT INTO operations (id, action, actor, note, items, finished_at) VALUES ($1, $2, $3, $4, $5::int, CASE WHEN $5::int = 0 THEN now() END)`,
		op.ID, string(op.Action), clean(op.Actor), clean(op.Note), len(ids))
	if len(ids) > 0 {
		t.queue("insert operation's items", `
INSERT INTO operation_items (operation_id, position, dead_letter_id) SELECT $1, n, id FROM unnest($2::uuid[]) WITH ORDINALITY AS u(id, n)`, op.ID, ids)
	}
	return nil
}

const operationColumns = `id, action, actor, note, items`

func scanOperation(r pgx.Rows) (*consumers.Operation, error) {
	op := &consumers.Operation{}
	err := r.Scan((*[16]byte)(&op.ID), (*string)(&op.Action), &op.Actor, &op.Note, &op.Items)
	return op, err
}

// LockOperation keeps two processes from working on one operation at once; nil if there is none.
func (t *Tx) LockOperation(ctx context.Context, id uuid.UUID) (op *consumers.Operation, err error) {
	err = t.query(ctx, "lock operation", `SELECT `+operationColumns+` FROM operations WHERE id = $1 FOR NO KEY UPDATE`, []any{id}, func(r pgx.Rows) (err error) {
		op, err = scanOperation(r)
		return err
	})
	return op, err
}

// PendingItems reads along the partial index of items without a result: as quick at the end of a long operation as at its start.
func (t *Tx) PendingItems(ctx context.Context, op uuid.UUID, limit int) ([]uuid.UUID, error) {
	var out []uuid.UUID
	const q = `SELECT dead_letter_id FROM operation_items WHERE operation_id = $1 AND at IS NULL ORDER BY position LIMIT $2`
	err := t.query(ctx, "pending items", q, []any{op, limit}, func(r pgx.Rows) error {
		var id uuid.UUID
		err := r.Scan((*[16]byte)(&id))
		out = append(out, id)
		return err
	})
	return out, err
}

// SaveItems stores results under the operation's lock, and notes when the last one is there.
func (t *Tx) SaveItems(_ context.Context, op uuid.UUID, results []consumers.ItemResult) error {
	n := len(results)
	ids, outcomes, errs := make([]uuid.UUID, n), make([]string, n), make([]string, n)
	for i, r := range results {
		ids[i], outcomes[i], errs[i] = r.ID, clean(r.Outcome), clean(r.Error)
	}
	if n > 0 {
		t.queue("save operation's items", `
UPDATE operation_items i SET outcome = u.outcome, error = u.error, at = now()
FROM unnest($2::uuid[], $3::text[], $4::text[]) AS u(id, outcome, error) WHERE i.operation_id = $1 AND i.dead_letter_id = u.id`, op, ids, outcomes, errs)
	}
	t.queue("touch operation", `
UPDATE operations o SET touched_at = now(),
  finished_at = CASE WHEN NOT EXISTS (SELECT FROM operation_items i WHERE i.operation_id = o.id AND i.at IS NULL) THEN coalesce(o.finished_at, now()) END
WHERE o.id = $1`, op)
	return nil
}

// RecordActions appends to the operators' log.
func (t *Tx) RecordActions(_ context.Context, actions []consumers.OperatorAction) error {
	n := len(actions)
	if n == 0 {
		return nil
	}
	actors, names, targets, notes, details := make([]string, n), make([]string, n), make([]string, n), make([]string, n), make([]string, n)
	for i, a := range actions {
		actors[i], names[i], targets[i], notes[i], details[i] = clean(a.Actor), clean(a.Action), clean(a.Target), clean(a.Note), clean(a.Detail)
	}
	t.queue("record actions", insertAudit, actors, names, targets, notes, details)
	return nil
}

// Operation answers an operation with the results so far; nil if there is none.
func (db *DB) Operation(ctx context.Context, id uuid.UUID) (op *consumers.Operation, results []consumers.ItemResult, err error) {
	err = db.query(ctx, Operators, "get operation", `SELECT `+operationColumns+` FROM operations WHERE id = $1`, []any{id}, func(r pgx.Rows) (err error) {
		op, err = scanOperation(r)
		return err
	})
	if err != nil || op == nil {
		return nil, nil, err
	}
	const q = `SELECT dead_letter_id, outcome, error FROM operation_items WHERE operation_id = $1 AND at IS NOT NULL ORDER BY position`
	err = db.query(ctx, Operators, "get operation's items", q, []any{id}, func(r pgx.Rows) error {
		var res consumers.ItemResult
		err := r.Scan((*[16]byte)(&res.ID), &res.Outcome, &res.Error)
		results = append(results, res)
		return err
	})
	return op, results, err
}

// OpenOperations lists what a dead process left, oldest first.
func (db *DB) OpenOperations(ctx context.Context, untouched time.Duration, limit int) (ids []uuid.UUID, err error) {
	const q = `SELECT id FROM operations WHERE finished_at IS NULL AND touched_at <= now() - $1::interval ORDER BY id LIMIT $2`
	err = db.query(ctx, Operators, "open operations", q, []any{untouched, limit}, func(r pgx.Rows) error {
		var id uuid.UUID
		err := r.Scan((*[16]byte)(&id))
		ids = append(ids, id)
		return err
	})
	return ids, err
}
