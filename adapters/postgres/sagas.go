package postgres

import (
	"context"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"

	"ordersaga/domain"
	"ordersaga/saga"
)

// Locked in the order of order ids by the LockRows above the sort: every batch takes its sagas in this order (F27).
const lockSagas = `
SELECT order_id, definition, def_version, total_minor, currency, version, sequence, phase, status, coalesce(reason, ''), steps, undos, cancel,
       stuck_since, coalesce(stuck_reason, ''), coalesce(stuck_owner, '')
FROM sagas WHERE order_id = ANY($1) ORDER BY order_id FOR NO KEY UPDATE`

// LockSagas reads sagas and locks them.
func (t *Tx) LockSagas(ctx context.Context, ids []domain.OrderID) (map[domain.OrderID]*saga.Instance, error) {
	if len(ids) == 0 {
		return map[domain.OrderID]*saga.Instance{}, nil
	}
	if out, err := foreseen(ctx, t, &t.sagasAhead, ids); out != nil || err != nil {
		return out, err
	}
	if out := t.presumeSagas(ids); out != nil {
		return out, nil
	}
	out := make(map[domain.OrderID]*saga.Instance, len(ids))
	t.queueLockSagas(ids, out)
	return out, t.send(ctx, false)
}

func (t *Tx) queueLockSagas(ids []domain.OrderID, out map[domain.OrderID]*saga.Instance) {
	t.queueRead("lock sagas", lockSagas, []any{ids}, func(r pgx.Rows) error {
		in := &saga.Instance{}
		s := &in.State
		var steps, undos, stuck, owner string
		var since *time.Time
		err := r.Scan((*[16]byte)(&in.Order), &s.Definition, &s.DefVersion, &in.Total.Minor, &in.Total.Currency, &s.Version, &s.Sequence,
			(*string)(&s.Phase), (*string)(&s.Status), (*string)(&s.Reason), &steps, &undos, &s.Cancel, &since, &stuck, &owner)
		if err != nil {
			return err
		}
		s.Steps, s.Undos = progress(steps), progress(undos)
		if since != nil {
			s.Stuck = &saga.Stuck{Reason: stuck, Owner: owner, Since: *since}
		}
		out[in.Order] = in
		return nil
	})
}

func letters(p []saga.Progress) string {
	var b strings.Builder
	for _, x := range p {
		b.WriteByte(byte(x))
	}
	return b.String()
}

func progress(s string) []saga.Progress {
	out := make([]saga.Progress, len(s))
	for i := range len(s) {
		out[i] = saga.Progress(s[i])
	}
	return out
}

// A deadline is in microseconds from now, 0: none any more, -1: as it is; a deadline that stands still keeps the update HOT, although its column is named.
// Since when a saga is stuck stays while the flag stands.
const setSaga = `
UPDATE sagas s SET version = u.version, sequence = u.seq, phase = u.phase, status = u.status, reason = NULLIF(u.reason, ''), steps = u.steps, undos = u.undos,
  cancel = u.cancel, updated_at = now(), ended_at = CASE WHEN u.ended THEN coalesce(s.ended_at, now()) END,
  deadline = CASE WHEN u.after > 0 THEN now() + u.after * interval '1 microsecond' WHEN u.after < 0 THEN s.deadline END,
  stuck_since = CASE WHEN u.stuck THEN coalesce(s.stuck_since, now()) END, stuck_reason = CASE WHEN u.stuck THEN u.why END,
  stuck_owner = CASE WHEN u.stuck THEN NULLIF(u.owner, '') END`

const savedSaga = "id uuid, version int, seq int, phase text, status text, reason text, steps text, undos text, cancel bool, ended bool, after bigint, stuck bool, why text, owner text"

// saveSagas is for rows that LockSagas has locked, savePresumedSagas for some that it has presumed: those must have the version that they were known by (-1:
// locked), or nothing is saved.
var (
	saveSagas = over(savedSaga, func(u string) string {
		return setSaga + ` FROM ` + u + ` WHERE s.order_id = u.id`
	})
	savePresumedSagas = over(savedSaga+", was int", func(u string) string {
		return `
WITH saved AS (` + setSaga + ` FROM ` + u + ` WHERE s.order_id = u.id AND (u.was < 0 OR s.version = u.was) RETURNING 1)
SELECT CAST(count(*) = $16 AS presumed) FROM saved`
	})
)

// SaveSagas stores sagas that LockSagas locked, or presumed to know. The order's status and sequence are columns of the same row.
func (t *Tx) SaveSagas(_ context.Context, changes []saga.Change) error {
	n := len(changes)
	if n == 0 {
		return nil
	}
	changes = slices.Clone(changes)
	slices.SortFunc(changes, func(a, b saga.Change) int { return a.Order.Compare(b.Order) })
	var (
		ids                                     = make([]domain.OrderID, n)
		versions, seqs, was                     = make([]int32, n), make([]int32, n), make([]int32, n)
		phases, statuses, reasons, steps, undos = make([]string, n), make([]string, n), make([]string, n), make([]string, n), make([]string, n)
		whys, owners                            = make([]string, n), make([]string, n)
		cancels, ended, stuck                   = make([]bool, n), make([]bool, n), make([]bool, n)
		after                                   = make([]int64, n)
	)
	for i := range changes {
		c := &changes[i]
		s := &c.State
		ids[i], versions[i], seqs[i], phases[i] = c.Order, s.Version, s.Sequence, string(s.Phase)
		statuses[i], reasons[i], steps[i], undos[i] = string(s.Status), string(s.Reason), letters(s.Steps), letters(s.Undos)
		cancels[i], ended[i], after[i] = s.Cancel, s.Phase.Ended(), -1
		if c.Timer.Change {
			after[i] = max(c.Timer.After.Microseconds(), 0)
		}
		if s.Stuck != nil {
			stuck[i], whys[i], owners[i] = true, clean(s.Stuck.Reason), clean(s.Stuck.Owner)
		}
		was[i] = t.versionOf(c.Order)
		delete(t.sagaVersions, c.Order)
		t.learnSaga(c.Instance)
	}
	t.wroteSagas = true
	columns := []any{ids, versions, seqs, phases, statuses, reasons, steps, undos, cancels, ended, after, stuck, whys, owners}
	if slices.Max(was) < 0 {
		t.queueRows("save sagas", saveSagas, n, columns)
	} else {
		if n > 1 { // so that every batch takes its sagas in one order (F27)
			t.queue("lock presumed sagas", `SELECT FROM sagas WHERE order_id = ANY($1) ORDER BY order_id FOR NO KEY UPDATE`, ids)
		}
		t.queueRows("save presumed sagas", savePresumedSagas, n, append(columns, was), n)
	}
	return nil
}

var appendHistory = over("id uuid, version int, cause uuid, input text, name text, reason text, owner text, phase text, status text, actor text", func(u string) string {
	return `
INSERT INTO saga_history (order_id, version, cause, input, name, reason, owner, phase, status, actor)
SELECT id, version, NULLIF(cause, '00000000-0000-0000-0000-000000000000'), input, NULLIF(name, ''), NULLIF(reason, ''), NULLIF(owner, ''), phase, status, NULLIF(actor, '')
FROM ` + u
})

// AppendHistory inserts in the order given: a saga's lock is held, so nobody else appends to it.
func (t *Tx) AppendHistory(_ context.Context, entries []saga.HistoryEntry) error {
	n := len(entries)
	if n == 0 {
		return nil
	}
	var (
		ids                                                      = make([]domain.OrderID, n)
		causes                                                   = make([]uuid.UUID, n)
		versions                                                 = make([]int32, n)
		inputs, names, reasons, owners, phases, statuses, actors = make([]string, n), make([]string, n), make([]string, n), make([]string, n), make([]string, n), make([]string, n), make([]string, n)
	)
	for i := range entries {
		e := &entries[i]
		ids[i], versions[i], causes[i] = e.Order, e.Version, e.Cause
		inputs[i], names[i], reasons[i], owners[i] = string(e.Input.Kind), clean(e.Input.Name), clean(e.Input.Reason), clean(e.Input.Owner)
		phases[i], statuses[i], actors[i] = string(e.Phase), string(e.Status), clean(e.Actor)
	}
	t.queueRows("append history", appendHistory, n, []any{ids, versions, causes, inputs, names, reasons, owners, phases, statuses, actors})
	return nil
}

const ever = 100 * 365 * 24 * time.Hour

// DueSagas locks in the order of deadlines and skips what others hold: it never waits, so it closes no circle of waits.
func (t *Tx) DueSagas(ctx context.Context, within time.Duration, limit int) ([]domain.OrderID, error) {
	var out []domain.OrderID
	if within <= 0 {
		within = ever
	}
	const q = `SELECT order_id FROM sagas WHERE deadline <= now() AND deadline >= now() - $2::interval ORDER BY deadline LIMIT $1 FOR NO KEY UPDATE SKIP LOCKED`
	err := t.query(ctx, "due sagas", q, []any{limit, within}, func(r pgx.Rows) error {
		var id domain.OrderID
		err := r.Scan((*[16]byte)(&id))
		out = append(out, id)
		return err
	})
	return out, err
}

// awayFor is how long a report of a dependency as away is believed; whoever finds it away reports it again well within that.
const awayFor = time.Minute

// Away reads the reports of the last minute.
func (t *Tx) Away(ctx context.Context) (map[string]bool, error) {
	out := map[string]bool{}
	err := t.query(ctx, "outages", `SELECT dependency FROM outages WHERE seen_at > now() - $1::interval`, []any{awayFor}, func(r pgx.Rows) error {
		var d string
		err := r.Scan(&d)
		out[d] = true
		return err
	})
	return out, err
}

// SetAway keeps since when a dependency is away as long as the reports follow each other.
func (t *Tx) SetAway(_ context.Context, dependency string, away bool) error {
	if !away {
		t.queue("dependency is back", `DELETE FROM outages WHERE dependency = $1`, dependency)
		return nil
	}
	t.queue("dependency is away", `
INSERT INTO outages AS o (dependency) VALUES ($1) ON CONFLICT (dependency) DO UPDATE
SET seen_at = now(), since = CASE WHEN o.seen_at > now() - $2::interval THEN o.since ELSE now() END`, dependency, awayFor)
	return nil
}

// Audit appends to the operators' log.
func (t *Tx) Audit(_ context.Context, entries []saga.AuditEntry) error {
	n := len(entries)
	if n == 0 {
		return nil
	}
	actors, actions, targets, notes, details := make([]string, n), make([]string, n), make([]string, n), make([]string, n), make([]string, n)
	for i, e := range entries {
		actors[i], actions[i], targets[i], notes[i], details[i] = clean(e.Actor), clean(e.Action), clean(e.Target), clean(e.Note), clean(e.Detail)
	}
	t.queue("audit", insertAudit, actors, actions, targets, notes, details)
	return nil
}

const insertAudit = `
INSERT INTO audit_log (actor, action, target, note, detail)
SELECT actor, action, target, note, NULLIF(detail, '')::jsonb FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::text[]) AS u(actor, action, target, note, detail)`
