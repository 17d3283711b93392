package postgres

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"slices"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"

	"ordersaga/domain"
	"ordersaga/saga"
)

// LockOrderIDs takes advisory locks of the transaction, in the order of their numbers. An id's lock is one of 4,096: two ids
// may share one, which only makes them wait for each other; a lock an id could fill the server's shared lock table
// (max_locks_per_transaction × max_connections, 6,400 by default) with a few batches.
func (t *Tx) LockOrderIDs(ctx context.Context, ids []domain.OrderID, placing bool) error {
	if len(ids) == 0 {
		return nil
	}
	if placing {
		if locked, err := foreseen(ctx, t, &t.placingAhead, ids); locked != nil || err != nil {
			return err
		}
	}
	t.queueLockOrderIDs(ids, placing)
	return nil
}

func (t *Tx) queueLockOrderIDs(ids []domain.OrderID, placing bool) {
	buckets := make([]int32, len(ids))
	for i := range ids {
		h := sha256.Sum256(ids[i][:]) // clients choose ids: their low bits need not be spread
		buckets[i] = int32(binary.BigEndian.Uint32(h[:4]) % orderIDBucket)
	}
	slices.Sort(buckets)
	buckets = slices.Compact(buckets)
	sql := `SELECT pg_advisory_xact_lock($1, unnest($2::int[]))`
	if placing { // batches of orders share buckets all the time, and need not wait for each other
		sql = `SELECT pg_advisory_xact_lock_shared($1, unnest($2::int[]))`
	}
	t.queue("lock order ids", sql, int32(lockOrderIDs), buckets)
}

// FindOrders reads along the primary key; no lock: whoever needs the answer to stand took LockOrderIDs.
func (t *Tx) FindOrders(ctx context.Context, ids []domain.OrderID) (map[domain.OrderID]int64, error) {
	if len(ids) == 0 {
		return map[domain.OrderID]int64{}, nil
	}
	if found, err := foreseen(ctx, t, &t.ordersAhead, ids); found != nil || err != nil {
		return found, err
	}
	found := make(map[domain.OrderID]int64)
	t.queueFindOrders(ids, found)
	return found, t.send(ctx, false)
}

func (t *Tx) queueFindOrders(ids []domain.OrderID, found map[domain.OrderID]int64) {
	t.queueRead("find orders", `SELECT id, request_hash FROM orders WHERE id = ANY($1)`, []any{ids}, func(r pgx.Rows) error {
		var id domain.OrderID
		var hash int64
		if err := r.Scan((*[16]byte)(&id), &hash); err != nil {
			return err
		}
		found[id] = hash
		return nil
	})
}

// Rows go in sorted by key, as everywhere: two transactions that insert the same keys wait for each other once, not in a circle.
var insertOrders = over("id uuid, customer text, method text, currency text, total bigint, lines text, hash bigint", func(u string) string {
	return `
INSERT INTO orders (id, customer_id, payment_method, currency, total_minor, lines, request_hash)
SELECT id, customer, method, currency, total, lines::json, hash
FROM ` + u
})

// A deadline is in microseconds from now; 0: none, for the saga has ended.
var insertSagas = over("id uuid, def text, defv smallint, total bigint, currency text, after bigint, version int, seq int, phase text, status text, reason text, steps text, undos text, cancel bool, ended bool", func(u string) string {
	return `
INSERT INTO sagas (order_id, definition, def_version, total_minor, currency, deadline, version, sequence, phase, status, reason, steps, undos, cancel, ended_at)
SELECT id, def, defv, total, currency, CASE WHEN after > 0 THEN now() + after * interval '1 microsecond' END, version, seq, phase, status,
       NULLIF(reason, ''), steps, undos, cancel, CASE WHEN ended THEN now() END
FROM ` + u
})

// InsertOrders inserts orders and sagas, two statements. A key that is there already violates the primary key: InTx starts over.
func (t *Tx) InsertOrders(_ context.Context, batch []saga.Placement) error {
	n := len(batch)
	if n == 0 {
		return nil
	}
	sorted := make([]*saga.Placement, n)
	for i := range batch {
		sorted[i] = &batch[i]
	}
	slices.SortFunc(sorted, func(a, b *saga.Placement) int { return a.Order.ID.Compare(b.Order.ID) })
	var (
		ids                                           = make([]domain.OrderID, n)
		customers, methods, currencies, lines         = make([]string, n), make([]string, n), make([]string, n), make([]string, n)
		totals, hashes, after                         = make([]int64, n), make([]int64, n), make([]int64, n)
		seqs, versions                                = make([]int32, n), make([]int32, n)
		statuses, reasons, defs, phases, steps, undos = make([]string, n), make([]string, n), make([]string, n), make([]string, n), make([]string, n), make([]string, n)
		defVersions                                   = make([]int16, n)
		cancels, ended                                = make([]bool, n), make([]bool, n)
	)
	for i, p := range sorted {
		o, s := p.Order, &p.State
		text, err := encodeLines(o.Lines, true)
		if err != nil {
			return err
		}
		ids[i], customers[i], methods[i], lines[i] = o.ID, o.CustomerID, o.PaymentMethod, text
		currencies[i], totals[i], hashes[i] = o.Total.Currency, o.Total.Minor, p.Hash
		seqs[i], statuses[i], reasons[i] = s.Sequence, string(s.Status), string(s.Reason)
		defs[i], defVersions[i], versions[i], phases[i] = s.Definition, s.DefVersion, s.Version, string(s.Phase)
		steps[i], undos[i], cancels[i], ended[i] = letters(s.Steps), letters(s.Undos), s.Cancel, s.Phase.Ended()
		after[i] = max(p.Timer.After.Microseconds(), 0)
		t.learnSaga(&saga.Instance{Order: o.ID, Total: o.Total, State: p.State})
	}
	t.queueRows("insert orders", insertOrders, n, []any{ids, customers, methods, currencies, totals, lines, hashes})
	t.queueRows("insert sagas", insertSagas, n, []any{ids, defs, defVersions, totals, currencies, after, versions, seqs, phases, statuses, reasons, steps, undos, cancels, ended})
	return nil
}

// LoadOrders reads whole orders along the primary key, without locks: what was asked for never changes.
func (t *Tx) LoadOrders(ctx context.Context, ids []domain.OrderID) (map[domain.OrderID]*domain.Order, error) {
	out := make(map[domain.OrderID]*domain.Order, len(ids))
	if len(ids) == 0 {
		return out, nil
	}
	err := t.query(ctx, "load orders", `SELECT `+orderColumns+ordersAndSagas+`WHERE o.id = ANY($1)`, []any{ids}, func(r pgx.Rows) error {
		var row orderRow
		if err := r.Scan(row.into()...); err != nil {
			return err
		}
		o, err := row.order()
		out[o.ID] = &o
		return err
	})
	return out, err
}

const (
	orderColumns   = `o.id, o.customer_id, o.payment_method, o.currency, o.total_minor, o.lines, o.created_at, s.sequence, s.status, coalesce(s.reason, '')`
	ordersAndSagas = ` FROM orders o JOIN sagas s ON s.order_id = o.id `
)

// orderRow scans orderColumns.
type orderRow struct {
	o         domain.Order
	lines     []byte
	createdAt time.Time
}

func (r *orderRow) into() []any {
	return []any{
		(*[16]byte)(&r.o.ID), &r.o.CustomerID, &r.o.PaymentMethod, &r.o.Total.Currency, &r.o.Total.Minor, &r.lines, &r.createdAt,
		&r.o.Sequence, (*string)(&r.o.Status), (*string)(&r.o.Reason),
	}
}

func (r *orderRow) order() (domain.Order, error) {
	lines, err := decodeLines(r.lines)
	r.o.Lines = lines
	return r.o, err
}

// stepPlace is the barrier of placing: its tombstone says that an order was cancelled before it was placed.
const stepPlace = "place"

// Tombstones reads along the primary key; no lock: whoever needs the answer to stand took LockOrderIDs.
func (t *Tx) Tombstones(ctx context.Context, ids []domain.OrderID) (map[domain.OrderID]bool, error) {
	if len(ids) == 0 {
		return map[domain.OrderID]bool{}, nil
	}
	if found, err := foreseen(ctx, t, &t.buriedAhead, ids); found != nil || err != nil {
		return found, err
	}
	found := make(map[domain.OrderID]bool)
	t.queueTombstones(ids, found)
	return found, t.send(ctx, false)
}

func (t *Tx) queueTombstones(ids []domain.OrderID, found map[domain.OrderID]bool) {
	const q = `SELECT order_id FROM barriers WHERE order_id = ANY($1) AND step = $2 AND state = 'tombstone'`
	t.queueRead("find tombstones", q, []any{ids, stepPlace}, func(r pgx.Rows) error {
		var id domain.OrderID
		err := r.Scan((*[16]byte)(&id))
		found[id] = true
		return err
	})
}

// InsertTombstones leaves those that are there already: the second cancel of an unknown order changes nothing.
func (t *Tx) InsertTombstones(_ context.Context, ids []domain.OrderID) error {
	if len(ids) == 0 {
		return nil
	}
	ids = slices.Clone(ids)
	slices.SortFunc(ids, domain.OrderID.Compare)
	t.queue("insert tombstones", `INSERT INTO barriers (order_id, step, state) SELECT id, $2, 'tombstone' FROM unnest($1::uuid[]) AS u(id) ON CONFLICT (order_id, step) DO NOTHING`,
		slices.Compact(ids), stepPlace)
	return nil
}

// keyID is the row of an Idempotency-Key: callers can't meet in it, for none has a NUL in its name.
func keyID(k *saga.IdempotencyKey) uuid.UUID {
	h := sha256.New()
	h.Write([]byte(k.Caller))
	h.Write([]byte{0})
	h.Write([]byte(k.Key))
	return uuid.UUID(h.Sum(nil)[:16])
}

// FindKeys reads along the primary key, without locks: a key that comes meanwhile makes InsertKeys start over.
func (t *Tx) FindKeys(ctx context.Context, keys []saga.IdempotencyKey) ([]*saga.IdempotencyKey, error) {
	out := make([]*saga.IdempotencyKey, len(keys))
	if len(keys) == 0 || t.newKeys {
		t.newKeys = false
		return out, nil
	}
	ids := make([]uuid.UUID, len(keys))
	for i := range keys {
		ids[i] = keyID(&keys[i])
	}
	found := map[uuid.UUID]*saga.IdempotencyKey{}
	err := t.query(ctx, "find idempotency keys", `SELECT id, body, order_id, answer FROM idempotency_keys WHERE id = ANY($1)`, []any{ids}, func(r pgx.Rows) error {
		var id uuid.UUID
		var body []byte
		k := &saga.IdempotencyKey{}
		if err := r.Scan((*[16]byte)(&id), &body, (*[16]byte)(&k.Order), &k.Answer); err != nil {
			return err
		}
		copy(k.Body[:], body)
		found[id] = k
		return nil
	})
	for i := range keys {
		if k := found[ids[i]]; k != nil {
			x := *k
			x.Caller, x.Key = keys[i].Caller, keys[i].Key
			out[i] = &x
		}
	}
	return out, err
}

// InsertKeys inserts in the order of their ids. One that is there already violates the primary key: InTx starts over.
func (t *Tx) InsertKeys(_ context.Context, keys []saga.IdempotencyKey) error {
	n := len(keys)
	if n == 0 {
		return nil
	}
	type row struct {
		id uuid.UUID
		k  *saga.IdempotencyKey
	}
	rows := make([]row, n)
	for i := range keys {
		rows[i] = row{keyID(&keys[i]), &keys[i]}
	}
	slices.SortFunc(rows, func(a, b row) int { return domain.OrderID(a.id).Compare(domain.OrderID(b.id)) })
	ids, orders, bodies, answers := make([]uuid.UUID, n), make([]domain.OrderID, n), make([][]byte, n), make([][]byte, n)
	for i, r := range rows {
		ids[i], orders[i], bodies[i], answers[i] = r.id, r.k.Order, r.k.Body[:], notNil(r.k.Answer)
	}
	t.queueRows("insert idempotency keys", insertKeys, n, []any{ids, bodies, orders, answers})
	return nil
}

var insertKeys = over("id uuid, body bytea, o uuid, answer bytea", func(u string) string {
	return `INSERT INTO idempotency_keys (id, body, order_id, answer) SELECT id, body, o, answer FROM ` + u
})

// notNil keeps an empty value from becoming NULL.
func notNil(b []byte) []byte {
	if b == nil {
		return []byte{}
	}
	return b
}
