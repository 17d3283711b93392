package postgres

import (
	"context"
	"fmt"
	"io/fs"
	"path"
	"sync"
	"testing"
	"testing/fstest"

	"github.com/jackc/pgx/v5"
	"github.com/pressly/goose/v3"
	"github.com/stretchr/testify/require"

	"ordersaga/domain"
	"ordersaga/events"
)

// fingerprint is what the database looks like: tables, columns, constraints, indexes, functions, rows.
func fingerprint(t *testing.T, db *DB) string {
	t.Helper()
	const q = `SELECT coalesce(string_agg(x, E'\n' ORDER BY x), '') FROM (
  SELECT 'column ' || table_name || '.' || column_name || ' ' || data_type || ' ' || coalesce(column_default, '') AS x FROM information_schema.columns WHERE table_schema = 'public'
  UNION ALL SELECT 'constraint ' || conrelid::regclass || ' ' || conname || ' ' || pg_get_constraintdef(oid) FROM pg_constraint WHERE connamespace = 'public'::regnamespace
  UNION ALL SELECT 'index ' || indexdef FROM pg_indexes WHERE schemaname = 'public'
  UNION ALL SELECT 'trigger ' || pg_get_triggerdef(oid) FROM pg_trigger WHERE NOT tgisinternal
  UNION ALL SELECT 'function ' || proname || ' ' || prosrc FROM pg_proc WHERE pronamespace = 'public'::regnamespace) o`
	return one[string](t, db, q)
}

func TestMigrationsUpDownUpWithData(t *testing.T) {
	db := emptyDB(t)
	ctx := t.Context()
	require.ErrorContains(t, CheckSchema(ctx, db), "the database is at version 0, this binary needs")
	require.ErrorContains(t, CheckSchema(ctx, db), "run ordersaga migrate up")
	empty := fingerprint(t, db)

	done, err := Migrate(ctx, db, Up)
	require.NoError(t, err)
	require.NotEmpty(t, done)
	require.Equal(t, "00001_schema", done[0].Name)
	require.NoError(t, CheckSchema(ctx, db))
	full := fingerprint(t, db)
	require.Contains(t, full, "sagas_deadline")
	list, err := Migrations(ctx, db)
	require.NoError(t, err)
	require.Len(t, list, len(done))
	for _, m := range list {
		require.False(t, m.Applied.IsZero(), m.Name)
	}

	placeOrders(t, db, newOrder("a", 1))
	again, err := Migrate(ctx, db, Up)
	require.NoError(t, err)
	require.Empty(t, again)
	require.Equal(t, 1, one[int](t, db, `SELECT count(*) FROM orders`))

	_, err = Migrate(ctx, db, Down) // of nothing but a type
	require.NoError(t, err)
	_, err = Migrate(ctx, db, Down)
	require.ErrorContains(t, err, "the outbox holds messages that were not relayed")
	relayed := func() { rawExec(t, db, `UPDATE outbox_shards SET prev = pg_current_snapshot()`) }
	relayed()
	for i := len(list) - 2; i >= 0; i-- { // one by one, with data in the tables
		undone, err := Migrate(ctx, db, Down)
		require.NoError(t, err)
		require.Len(t, undone, 1)
		require.Equal(t, list[i].Name, undone[0].Name)
	}
	_, err = Migrate(ctx, db, Down)
	require.ErrorContains(t, err, "nothing to undo")
	require.ErrorContains(t, CheckSchema(ctx, db), "version 0")
	require.Equal(t, empty, withoutGoose(fingerprint(t, db)))

	_, err = Migrate(ctx, db, Up)
	require.NoError(t, err)
	require.Equal(t, full, fingerprint(t, db))
	placeOrders(t, db, newOrder("a", 1))
	relayed()
	undone, err := Migrate(ctx, db, Reset)
	require.NoError(t, err)
	require.Len(t, undone, len(list))
	_, err = Migrate(ctx, db, "sideways")
	require.ErrorContains(t, err, `unknown command "sideways"`)
}

// withoutGoose leaves out goose's own table, which stays.
func withoutGoose(s string) string {
	out := ""
	for line := range lines(s) {
		if !contains(line, "goose") {
			if out != "" {
				out += "\n"
			}
			out += line
		}
	}
	return out
}

func TestFailedMigrationLeavesTheDatabaseAsItWas(t *testing.T) {
	db := newDB(t)
	ctx := t.Context()
	placeOrders(t, db, newOrder("a", 1))
	before := fingerprint(t, db)
	files := fstest.MapFS{}
	names, err := fs.Glob(migrationFiles, "migrations/*.sql")
	require.NoError(t, err)
	for _, n := range names {
		b, err := migrationFiles.ReadFile(n)
		require.NoError(t, err)
		files[n[len("migrations/"):]] = &fstest.MapFile{Data: b}
	}
	files["00900_fine.sql"] = &fstest.MapFile{Data: []byte("-- +goose Up\nCREATE TABLE fine (id int);\n-- +goose Down\nDROP TABLE fine;\n")}
	files["00901_fails.sql"] = &fstest.MapFile{Data: []byte("-- +goose Up\nCREATE TABLE half (id int);\nUPDATE orders SET customer_id = 'spoiled';\nALTER TABLE orders ADD COLUMN extra int;\nSELECT 1/0;\n-- +goose Down\nDROP TABLE half;\n")}

	done, err := migrate(ctx, db, files, Up)
	require.ErrorContains(t, err, "migration 00901_fails.sql failed and was rolled back")
	require.ErrorContains(t, err, "division by zero")
	require.Len(t, done, 1, "the one before it stands")
	undone, err := migrate(ctx, db, files, Down)
	require.NoError(t, err)
	require.Equal(t, "00900_fine", undone[0].Name)
	require.Equal(t, before, fingerprint(t, db))
	require.Equal(t, "a", one[string](t, db, `SELECT customer_id FROM orders`))
	require.NoError(t, CheckSchema(ctx, db))
	require.Zero(t, one[int](t, db, `SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND database = (SELECT oid FROM pg_database WHERE datname = current_database())`))
}

// upTo is the migrations up to a version.
func upTo(t *testing.T, version int64) fs.FS {
	t.Helper()
	files := fstest.MapFS{}
	names, err := fs.Glob(migrationFiles, "migrations/*.sql")
	require.NoError(t, err)
	for _, n := range names {
		v, err := goose.NumericComponent(n)
		require.NoError(t, err)
		if v > version {
			continue
		}
		b, err := migrationFiles.ReadFile(n)
		require.NoError(t, err)
		files[path.Base(n)] = &fstest.MapFile{Data: b}
	}
	return files
}

// 00003 gives most columns other types: whatever is stored is the same before, between and after, and so is the schema before and after.
func TestLeanRowsKeepWhatIsStored(t *testing.T) {
	db := emptyDB(t)
	_, err := migrate(t.Context(), db, upTo(t, 2), Up)
	require.NoError(t, err)
	require.NoError(t, db.MakePartitions(t.Context()))
	placed, rejected, late := domain.NewOrderID(), domain.NewOrderID(), domain.NewOrderID()
	rawExec(t, db, `INSERT INTO orders (id, customer_id, payment_method, currency, total_minor, lines, request_hash)
SELECT id, 'c', 'pm', 'EUR', 100, '[["a \"é\"", 1, 100], ["b", 2, 0]]', -7 FROM unnest($1::uuid[]) id`, []domain.OrderID{placed, rejected})
	rawExec(t, db, `INSERT INTO sagas (order_id, definition, def_version, total_minor, currency, deadline, version, sequence, phase, status, steps, undos, cancel, stuck_since, stuck_reason)
VALUES ($1, 'order', 1, 100, 'EUR', now(), 3, 1, 'running', 'pending', 'cd-r', '-c', true, now(), 'x')`, placed)
	rawExec(t, db, `INSERT INTO sagas (order_id, definition, def_version, total_minor, currency, version, sequence, phase, status, reason, steps, undos, ended_at)
VALUES ($1, 'order', 1, 0, 'EUR', 1, 1, 'compensated', 'rejected', 'price_changed', '----', '--', now())`, rejected)
	rawExec(t, db, `INSERT INTO reservations (order_id, lines, state) VALUES ($1, '[["a", 1]]', 'reserved'), ($2, '[]', 'tombstone')`, placed, late)
	rawExec(t, db, `INSERT INTO reservations (order_id, lines, short, have, state) VALUES ($1, '[["b", 2]]', 'b', 0, 'rejected')`, rejected)
	rawExec(t, db, `INSERT INTO payments (order_id, op, amount_minor, currency, attempt, state) VALUES ($1, 'capture', 5, 'EUR', 2, 'done'), ($2, 'authorize', 0, '', 0, 'tombstone')`, placed, late)
	rawExec(t, db, `INSERT INTO stock VALUES ('a', 9, 1, 0)`)
	rawExec(t, db, `INSERT INTO barriers (order_id, step, state) VALUES ($1, 'place', 'tombstone')`, late)
	rawExec(t, db, `INSERT INTO idempotency_keys (id, body, order_id, answer) VALUES ($1, sha256('x'), $1, '{}')`, placed)
	rawExec(t, db, `INSERT INTO inbox (message_id, grp, state, ticket, hash) VALUES ($1, 'stock', 'handled', 1, -1)`, events.NewID())

	stored := func() string {
		out := ""
		for _, table := range []string{"orders", "sagas", "reservations", "payments", "stock", "barriers", "idempotency_keys", "inbox"} {
			out += one[string](t, db, `SELECT coalesce(string_agg(x::text, E'\n' ORDER BY x::text), '') FROM `+table+` x`) + "\n"
		}
		return out
	}
	before, schema := stored(), fingerprint(t, db)
	done, err := migrate(t.Context(), db, upTo(t, 3), Up)
	require.NoError(t, err)
	require.Len(t, done, 1)
	require.Equal(t, before, stored())
	require.NotEqual(t, schema, fingerprint(t, db))
	_, err = migrate(t.Context(), db, upTo(t, 3), Down)
	require.NoError(t, err)
	require.Equal(t, before, stored())
	require.Equal(t, schema, fingerprint(t, db))
	_, err = Migrate(t.Context(), db, Up)
	require.NoError(t, err)
	require.Equal(t, []domain.Line{{SKU: `a "é"`, Quantity: 1, UnitPrice: 100}, {SKU: "b", Quantity: 2}}, view(t, db, rejected).Lines)
	require.Equal(t, "cd-r", letters(view(t, db, placed).Saga.Steps))
}

func TestSeveralProcessesMigrateAtOnce(t *testing.T) {
	first := emptyDB(t)
	ctx := t.Context()
	var wg sync.WaitGroup
	errs, counts := make([]error, 6), make([]int, 6)
	for i := range errs {
		wg.Go(func() {
			db, err := Open(ctx, first.cfg)
			if err == nil {
				defer db.Close()
				var done []Migration
				done, err = Migrate(ctx, db, Up)
				counts[i] = len(done)
			}
			errs[i] = err
		})
	}
	wg.Wait()
	total := 0
	for i := range errs {
		require.NoError(t, errs[i])
		total += counts[i]
	}
	list, err := Migrations(ctx, first)
	require.NoError(t, err)
	require.Len(t, list, total, "each was applied once")
	require.NoError(t, CheckSchema(ctx, first))
}

func TestNewerDatabaseIsAcceptedInARollingUpgrade(t *testing.T) {
	db := newDB(t)
	rawExec(t, db, `INSERT INTO goose_db_version (version_id, is_applied) VALUES (9999, true)`)
	require.NoError(t, CheckSchema(t.Context(), db))
}

// The constraints hold what the code promises: each of these is refused by the database whatever the program believes.
func TestConstraintsRefuseWhatTheCodePromises(t *testing.T) {
	db := newDB(t)
	id, other := "'0197aaaa-0000-7000-8000-000000000001'", "'0197aaaa-0000-7000-8000-000000000002'"
	order := func(set string) string {
		return `INSERT INTO orders (id, customer_id, payment_method, currency, total_minor, lines, request_hash) VALUES (` + other + `, 'c', 'pm', 'EUR', 100, '[]', 1);
UPDATE orders SET ` + set + ` WHERE id = ` + other
	}
	saga := func(set string) string {
		return `INSERT INTO sagas (order_id, definition, def_version, total_minor, currency, deadline, version, sequence, phase, status, steps, undos)
VALUES (` + other + `, 'order', 1, 100, 'EUR', now(), 1, 1, 'running', 'pending', 'cc--', '--'); UPDATE sagas SET ` + set + ` WHERE order_id = ` + other
	}
	reservation := func(state, lines, short, have string) string {
		return fmt.Sprintf(`INSERT INTO reservations (order_id, state, lines, short, have) VALUES (%s, '%s', '%s', %s, %s)`, other, state, lines, short, have)
	}
	payment := func(set string) string {
		return `INSERT INTO payments (order_id, op, state, attempt, amount_minor, currency) VALUES (` + other + `, 'authorize', 'started', 1, 100, 'EUR'); UPDATE payments SET ` + set
	}
	rawExec(t, db, `INSERT INTO orders (id, customer_id, payment_method, currency, total_minor, lines, request_hash) VALUES (`+id+`, 'c', 'pm', 'EUR', 100, '[]', 1)`)
	rawExec(t, db, `INSERT INTO saga_history (order_id, version, input, phase, status) VALUES (`+id+`, 1, 'started', 'running', 'pending')`)
	rawExec(t, db, `INSERT INTO audit_log (actor, action, target) VALUES ('me', 'x', 'y')`)
	rawExec(t, db, `INSERT INTO stock_adjustments (sku, delta, on_hand_after, actor) VALUES ('a', 1, 1, 'me')`)
	rawExec(t, db, `INSERT INTO stock VALUES ('a', 1, 1, 1)`)
	for name, tc := range map[string]struct {
		sql     string
		refused string // constraint; "" : it is legal
	}{
		"a negative total":            {order(`total_minor = -1`), "amount_minor_check"},
		"more than the gateway takes": {order(`total_minor = 100000000`), "amount_minor_check"},
		"a currency in lower case":    {order(`currency = 'eur'`), "currency_code_check"},
		"lines that are no list":      {order(`lines = '{}'`), "order_lines_check"},
		"the same order twice":        {`INSERT INTO orders SELECT * FROM orders`, "orders_pkey"},

		"a status that is none":             {saga(`status = 'shipped'`), "order_status_check"},
		"confirmed with a reason":           {saga(`status = 'confirmed', reason = 'invalid'`), "sagas_state"},
		"rejected needs one":                {saga(`phase = 'compensating', status = 'rejected'`), "sagas_state"},
		"cancelled without a reason":        {saga(`phase = 'compensating', status = 'cancelled'`), "sagas_state"},
		"cancelled":                         {saga(`phase = 'compensating', status = 'cancelled', reason = 'cancelled_by_customer'`), ""},
		"pending with a reason":             {saga(`reason = 'timed_out'`), "sagas_state"},
		"rejected before it had a price":    {saga(`phase = 'compensated', status = 'rejected', reason = 'invalid', total_minor = 0, deadline = NULL, ended_at = now()`), ""},
		"a sequence below 1":                {saga(`sequence = 0`), "positive_check"},
		"a phase that is none":              {saga(`phase = 'paused'`), "saga_phase_check"},
		"running without a deadline":        {saga(`deadline = NULL`), "sagas_state"},
		"running and rejected":              {saga(`status = 'rejected', reason = 'timed_out'`), "sagas_state"},
		"running and confirmed":             {saga(`status = 'confirmed'`), ""},
		"compensating":                      {saga(`phase = 'compensating', status = 'rejected', reason = 'timed_out'`), ""},
		"compensating while pending":        {saga(`phase = 'compensating'`), "sagas_state"},
		"compensating while confirmed":      {saga(`phase = 'compensating', status = 'confirmed'`), "sagas_state"},
		"completed":                         {saga(`phase = 'completed', status = 'confirmed', deadline = NULL, ended_at = now()`), ""},
		"completed with a deadline":         {saga(`phase = 'completed', status = 'confirmed', ended_at = now()`), "sagas_state"},
		"completed at no time":              {saga(`phase = 'completed', status = 'confirmed', deadline = NULL`), "sagas_state"},
		"compensated and confirmed":         {saga(`phase = 'compensated', status = 'confirmed', deadline = NULL, ended_at = now()`), "sagas_state"},
		"ended and stuck":                   {saga(`phase = 'completed', status = 'confirmed', deadline = NULL, ended_at = now(), stuck_since = now(), stuck_reason = 'x'`), "sagas_state"},
		"stuck without a reason":            {saga(`stuck_since = now()`), "sagas_state"},
		"a cancel that waits":               {saga(`cancel = true`), ""},
		"progress that is none":             {saga(`steps = 'cx--'`), "step_letters_check"},
		"an undo that was refused":          {saga(`undos = 'r-'`), "undo_letters_check"},
		"history is not changed":            {`UPDATE saga_history SET input = 'x'`, "append-only"},
		"history is not deleted":            {`DELETE FROM saga_history`, "append-only"},
		"history is not emptied":            {`TRUNCATE saga_history`, "append-only"},
		"a version of a saga's twice":       {`INSERT INTO saga_history SELECT * FROM saga_history`, "saga_history_pkey"},
		"the operators' log is not changed": {`UPDATE audit_log SET actor = 'him'`, "append-only"},
		"the operators' log is not deleted": {`DELETE FROM audit_log`, "append-only"},
		"an action of nobody":               {`INSERT INTO audit_log (actor, action, target) VALUES ('', 'x', 'y')`, "audit_log_actor_check"},
		"adjustments are not changed":       {`UPDATE stock_adjustments SET delta = 7`, "append-only"},

		"F29 stock below zero":              {`UPDATE stock SET available = available - 2`, "pieces_check"},
		"F29 reserved below zero":           {`UPDATE stock SET reserved = -1`, "pieces_check"},
		"F29 sold below zero":               {`UPDATE stock SET sold = -1`, "pieces_check"},
		"an adjustment of nothing":          {`INSERT INTO stock_adjustments (sku, delta, on_hand_after, actor) VALUES ('a', 0, 1, 'me')`, "stock_adjustments_delta_check"},
		"a reservation":                     {reservation("reserved", `[["a", 1]]`, "NULL", "NULL"), ""},
		"a reservation of nothing":          {reservation("reserved", `[]`, "NULL", "NULL"), "reservations_state"},
		"a rejection that names no product": {reservation("rejected", `[["a", 1]]`, "NULL", "NULL"), "reservations_state"},
		"a rejection":                       {reservation("rejected", `[["a", 1]]`, "'a'", "0"), ""},
		"a tombstone with lines":            {reservation("tombstone", `[["a", 1]]`, "NULL", "NULL"), "reservations_state"},
		"a tombstone":                       {reservation("tombstone", `[]`, "NULL", "NULL"), ""},

		"a payment step":               {payment(`state = 'done'`), ""},
		"a payment state that is none": {payment(`state = 'maybe'`), "barrier_state_check"},
		"an operation that is none":    {payment(`op = 'gift'`), "payment_op_check"},
		"a negative amount":            {payment(`amount_minor = -1`), "amount_minor_check"},
		"a call without a number":      {payment(`attempt = 0`), "payments_numbered"},
		"a tombstone needs no number":  {payment(`attempt = 0, state = 'tombstone'`), ""},

		"a verdict that is none": {`INSERT INTO inbox (message_id, grp, state, ticket, hash) VALUES (` + id + `, 'g', 'lost', 0, 0)`, "inbox_state_check"},
		"half a hash of a body":  {`INSERT INTO idempotency_keys (id, body, order_id, answer) VALUES (` + id + `, 'x', ` + id + `, '')`, "sha256_hash_check"},
		"a negative price":       {`INSERT INTO products (sku, name, unit_price_minor, currency) VALUES ('x', '', -1, 'EUR')`, "products_unit_price_minor_check"},
	} {
		t.Run(name, func(t *testing.T) {
			err := pgx.BeginFunc(t.Context(), db.Pool(Operators), func(tx pgx.Tx) error {
				if _, err := tx.Exec(context.Background(), tc.sql, pgx.QueryExecModeSimpleProtocol); err != nil {
					return err
				}
				return pgx.ErrTxCommitRollback // leave nothing for the next one
			})
			if tc.refused == "" {
				require.ErrorIs(t, err, pgx.ErrTxCommitRollback)
				return
			}
			require.ErrorContains(t, err, tc.refused)
		})
	}
}
