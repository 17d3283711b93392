package postgres

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/require"

	"ordersaga/consumers"
	"ordersaga/domain"
	"ordersaga/events"
	"ordersaga/saga"
)

// statements collects the SQL that goes over the hot pools.
type statements struct {
	mu   sync.Mutex
	seen map[string]bool
}

func (s *statements) add(c *pgx.Conn, sqls ...string) {
	if strings.HasSuffix(c.Config().RuntimeParams["application_name"], string(Operators)) {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, sql := range sqls {
		s.seen[sql] = true
	}
}

func (s *statements) TraceQueryStart(ctx context.Context, c *pgx.Conn, d pgx.TraceQueryStartData) context.Context {
	s.add(c, d.SQL)
	return ctx
}
func (s *statements) TraceQueryEnd(context.Context, *pgx.Conn, pgx.TraceQueryEndData) {}
func (s *statements) TraceBatchStart(ctx context.Context, c *pgx.Conn, d pgx.TraceBatchStartData) context.Context {
	for _, q := range d.Batch.QueuedQueries {
		s.add(c, q.SQL)
	}
	return ctx
}
func (s *statements) TraceBatchQuery(context.Context, *pgx.Conn, pgx.TraceBatchQueryData) {}
func (s *statements) TraceBatchEnd(context.Context, *pgx.Conn, pgx.TraceBatchEndData)     {}

// everything calls each method of the hot paths, with one row to do and with two: those are different statements.
func everything(t *testing.T, db *DB) {
	t.Helper()
	put(t, db, "cup", 100)
	put(t, db, "pot", 100)
	_, err := db.Products(t.Context(), []domain.SKU{"cup"})
	require.NoError(t, err)
	_, err = db.RunningSagas(t.Context(), 10)
	require.NoError(t, err)
	for n := 1; n <= 2; n++ {
		everythingOf(t, db, n)
	}
}

func everythingOf(t *testing.T, db *DB, n int) {
	t.Helper()
	orders := make([]*domain.Order, n)
	for i := range orders {
		orders[i] = newOrder("c", 1)
	}
	ids := sortedIDs(idsOf(orders))
	placeOrders(t, db, orders...)
	complete(t, db, ids...)
	lines := []domain.Line{{SKU: "cup", Quantity: 1}, {SKU: "pot", Quantity: 1}}[:n]
	inTx(t, db, func(ctx context.Context, tx *Tx) error { return reserve(ctx, tx, lines, ids...) })
	inTx(t, db, func(ctx context.Context, tx *Tx) error {
		rs, err := tx.LockReservations(ctx, ids)
		if err != nil {
			return err
		}
		list := make([]domain.Reservation, 0, n)
		for _, r := range rs {
			r.State = domain.Released
			list = append(list, *r)
		}
		return tx.UpdateReservations(ctx, list)
	})
	inTx(t, db, func(_ context.Context, tx *Tx) error {
		tx.PresumeNew(orderIDs(n))
		return nil
	})
	for range 2 {
		inTx(t, db, func(ctx context.Context, tx *Tx) error {
			pays, err := tx.LockPayments(ctx, ids)
			if err != nil {
				return err
			}
			for _, p := range pays {
				p.Put(domain.PaymentStep{Op: domain.Authorize, State: domain.BarrierStarted, Attempt: 1})
			}
			return tx.SavePayments(ctx, slices.Collect(maps.Values(pays)))
		})
	}
	letters := make([]consumers.DeadLetter, n)
	foreign := events.Identity(&events.Record{Topic: "x"})
	msgs := []uuid.UUID{foreign}
	keys := make([]saga.IdempotencyKey, n)
	fresh, known := make([]consumers.InboxRow, n), make([]consumers.InboxRow, n)
	for i := range n {
		letters[i] = deadLetter(10*n + i)
		msgs = append(msgs, letters[i].MessageID)
		keys[i] = saga.IdempotencyKey{Caller: "c", Key: fmt.Sprint(n, i), Order: ids[i]}
		fresh[i] = consumers.InboxRow{MessageID: letters[i].MessageID, State: consumers.InboxWaiting, New: true}
		known[i] = consumers.InboxRow{MessageID: letters[i].MessageID, State: consumers.InboxHandled}
	}
	saveDeadLetters(t, db, letters...)
	inTx(t, db, func(ctx context.Context, tx *Tx) error {
		rows, err := tx.Inbox(ctx, "stock", msgs)
		if err != nil {
			return err
		}
		require.Empty(t, rows)
		_, err1 := tx.FindOrders(ctx, ids)
		_, err2 := tx.LoadOrders(ctx, ids)
		_, err3 := tx.Tombstones(ctx, ids)
		_, err4 := tx.FindKeys(ctx, keys)
		_, err5 := tx.DueSagas(ctx, time.Minute, 10)
		_, err6 := tx.Away(ctx)
		return errors.Join(err1, err2, err3, err4, err5, err6,
			tx.LockOrderIDs(ctx, ids, true), tx.LockOrderIDs(ctx, ids, false),
			tx.InsertTombstones(ctx, ids),
			tx.InsertKeys(ctx, keys),
			tx.SaveInbox(ctx, "stock", fresh), tx.SaveInbox(ctx, "stock", known),
			tx.ResolveDeadLetters(ctx, "stock", msgs), tx.SetAway(ctx, "x", true), tx.SetAway(ctx, "x", false),
			tx.Forward(ctx, []events.Raw{{Topic: "dlq.stock", Value: []byte("x")}}))
	})
}

var (
	placeholder = regexp.MustCompile(`\$(\d+)`)
	forbidden   = regexp.MustCompile(`Seq Scan on (\w+)|Hash Join|Merge Join|Hash Right Join|Hash Left Join`)
	plain       = regexp.MustCompile(`^\s*(?i:select|insert|update|delete|with)\b`)
)

// plan explains a statement as the hot pools plan it: generically.
func plan(t *testing.T, db *DB, sql string) string {
	t.Helper()
	n := 0
	for _, m := range placeholder.FindAllStringSubmatch(sql, -1) {
		var i int
		_, err := fmt.Sscan(m[1], &i)
		require.NoError(t, err)
		n = max(n, i)
	}
	nulls := ""
	if n > 0 {
		nulls = "(" + strings.TrimSuffix(strings.Repeat("NULL,", n), ",") + ")"
	}
	var out []string
	require.NoError(t, db.Pool(Consumers).AcquireFunc(t.Context(), func(pc *pgxpool.Conn) error {
		ctx, c := t.Context(), pc.Conn()
		if _, err := c.Exec(ctx, "PREPARE hot AS "+sql, pgx.QueryExecModeSimpleProtocol); err != nil {
			return fmt.Errorf("%w: %s", err, sql)
		}
		rows, err := c.Query(ctx, "EXPLAIN (COSTS OFF) EXECUTE hot"+nulls, pgx.QueryExecModeSimpleProtocol)
		if err == nil {
			out, err = pgx.CollectRows(rows, pgx.RowTo[string])
		}
		_, derr := c.Exec(ctx, "DEALLOCATE hot", pgx.QueryExecModeSimpleProtocol)
		return errors.Join(err, derr)
	}))
	return strings.Join(out, "\n")
}

// F32: no plan of a hot statement flips, whether the tables are empty, or big, with fresh statistics or with stale ones. The statements
// are those that the hot pools have seen, so that none is forgotten.
func TestF32_PlansOfHotStatementsStayAlongIndexes(t *testing.T) {
	seen := &statements{seen: map[string]bool{}}
	db := newDB(t, func(c *Config) { c.Tracer = seen })
	everything(t, db)
	hot := slices.Sorted(maps.Keys(seen.seen))
	hot = slices.DeleteFunc(hot, func(s string) bool { return !plain.MatchString(s) })
	require.Greater(t, len(hot), 30)

	check := func(when string) {
		for _, sql := range hot {
			p := plan(t, db, sql)
			if m := forbidden.FindString(p); m != "" && m != "Seq Scan on outages" { // a row a dependency, whatever else grows
				t.Errorf("%s: %s in\n%s\n%s", when, m, sql, p)
			}
		}
	}
	check("next to empty")
	rawExec(t, db, `ANALYZE`)
	check("next to empty, analyzed")
	const many = 20_000
	rawExec(t, db, `INSERT INTO stock SELECT 'sku-' || g, 10, 0, 0 FROM generate_series(1, $1::int) g`, many)
	rawExec(t, db, `INSERT INTO products (sku, name, unit_price_minor, currency) SELECT 'sku-' || g, '', 1, 'EUR' FROM generate_series(1, $1::int) g`, many)
	rawExec(t, db, `INSERT INTO orders (id, customer_id, payment_method, currency, total_minor, lines, request_hash) SELECT gen_random_uuid(), 'c', 'pm', 'EUR', 100, '[]', 1 FROM generate_series(1, $1::int) g`, many)
	rawExec(t, db, `INSERT INTO sagas (order_id, definition, def_version, total_minor, currency, version, sequence, phase, status, steps, undos, ended_at)
SELECT id, 'order', 1, 100, 'EUR', 5, 2, 'completed', 'confirmed', 'dddd', '--', now() FROM orders ON CONFLICT DO NOTHING`)
	rawExec(t, db, `INSERT INTO reservations (order_id, lines, state) SELECT id, '[["cup", 1]]', 'committed' FROM orders ON CONFLICT DO NOTHING`)
	rawExec(t, db, `INSERT INTO payments (order_id, op, state, attempt, amount_minor, currency) SELECT id, op, 'done', 1, 100, 'EUR' FROM orders, unnest('{authorize,capture}'::text[]) op ON CONFLICT DO NOTHING`)
	rawExec(t, db, `INSERT INTO barriers (order_id, step, state) SELECT id, 'x', 'done' FROM orders`)
	rawExec(t, db, `INSERT INTO idempotency_keys (id, body, order_id, answer) SELECT id, sha256(''), id, '' FROM orders`)
	rawExec(t, db, `INSERT INTO inbox (message_id, grp, state, ticket, hash) SELECT overlay(gen_random_uuid()::text PLACING left($2::text, 8) FROM 1 FOR 8)::uuid, 'g', 'handled', 0, 0 FROM generate_series(1, $1::int) g`, many, events.NewID().String())
	check("big, statistics of an empty table")
	rawExec(t, db, `ANALYZE`)
	check("big, analyzed")
	// As if there were ten million rows of each: the planner multiplies the density that ANALYZE found by the size of the file.
	rawExec(t, db, `UPDATE pg_class SET reltuples = 1e7, relpages = pg_relation_size(oid) / 8192 WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace AND pg_relation_size(oid) > 0`)
	check("ten million rows")
}

// Reading the inbox touches the partitions of the ids' days only, though the plan is generic.
func TestInboxReadPrunesPartitions(t *testing.T) {
	db := newDB(t)
	now := time.Now().UTC()
	ids := []uuid.UUID{at(now), at(now.Add(time.Millisecond))}
	var out []string
	require.NoError(t, db.Pool(Consumers).AcquireFunc(t.Context(), func(pc *pgxpool.Conn) error {
		ctx, c := t.Context(), pc.Conn()
		if _, err := c.Exec(ctx, "PREPARE hot AS "+readInbox, pgx.QueryExecModeSimpleProtocol); err != nil {
			return err
		}
		rows, err := c.Query(ctx, fmt.Sprintf("EXPLAIN (ANALYZE, COSTS OFF, TIMING OFF) EXECUTE hot('%s', '%s', '{%s,%s}', 'g')", ids[0], ids[1], ids[0], ids[1]), pgx.QueryExecModeSimpleProtocol)
		if err == nil {
			out, err = pgx.CollectRows(rows, pgx.RowTo[string])
		}
		_, derr := c.Exec(ctx, "DEALLOCATE hot", pgx.QueryExecModeSimpleProtocol)
		return errors.Join(err, derr)
	}))
	text := strings.Join(out, "\n")
	require.Contains(t, text, "Subplans Removed: 6", text)
	require.Contains(t, text, partitionName(now))
	require.NotContains(t, text, "inbox_default", "removed before it was opened")
}
