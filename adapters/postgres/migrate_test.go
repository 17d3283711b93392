package postgres

import (
	"context"
	"fmt"
	"io/fs"
	"sync"
	"testing"
	"testing/fstest"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"
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

	_, err = Migrate(ctx, db, Down)
	require.ErrorContains(t, err, "the outbox holds messages that were not relayed")
	relayed := func() { rawExec(t, db, `UPDATE outbox_shards SET prev = pg_current_snapshot()`) }
	relayed()
	for i := len(list) - 1; i >= 0; i-- { // one by one, with data in the tables
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
		"a negative total":            {order(`total_minor = -1`), "orders_total_minor_check"},
		"more than the gateway takes": {order(`total_minor = 100000000`), "orders_total_minor_check"},
		"a currency in lower case":    {order(`currency = 'eur'`), "orders_currency_check"},
		"lines that are no list":      {order(`lines = '{}'`), "orders_lines_check"},
		"the same order twice":        {`INSERT INTO orders SELECT * FROM orders`, "orders_pkey"},

		"a status that is none":             {saga(`status = 'shipped'`), "sagas_"},
		"confirmed with a reason":           {saga(`status = 'confirmed', reason = 'invalid'`), "sagas_status"},
		"rejected needs one":                {saga(`phase = 'compensating', status = 'rejected'`), "sagas_status"},
		"rejected with a customer's reason": {saga(`phase = 'compensating', status = 'rejected', reason = 'cancelled_by_customer'`), "sagas_status"},
		"cancelled for another reason":      {saga(`phase = 'compensating', status = 'cancelled', reason = 'timed_out'`), "sagas_status"},
		"cancelled without a reason":        {saga(`phase = 'compensating', status = 'cancelled'`), "sagas_status"},
		"cancelled":                         {saga(`phase = 'compensating', status = 'cancelled', reason = 'cancelled_by_customer'`), ""},
		"pending with a reason":             {saga(`reason = 'timed_out'`), "sagas_status"},
		"nothing to charge":                 {saga(`total_minor = 0`), "sagas_status"},
		"rejected before it had a price":    {saga(`phase = 'compensated', status = 'rejected', reason = 'invalid', total_minor = 0, deadline = NULL, ended_at = now()`), ""},
		"a sequence below 1":                {saga(`sequence = 0`), "sagas_sequence_check"},
		"a phase that is none":              {saga(`phase = 'paused'`), "sagas_phase"},
		"running without a deadline":        {saga(`deadline = NULL`), "sagas_phase"},
		"running and rejected":              {saga(`status = 'rejected', reason = 'timed_out'`), "sagas_phase"},
		"running and confirmed":             {saga(`status = 'confirmed'`), ""},
		"compensating":                      {saga(`phase = 'compensating', status = 'rejected', reason = 'timed_out'`), ""},
		"compensating while pending":        {saga(`phase = 'compensating'`), "sagas_"},
		"compensating while confirmed":      {saga(`phase = 'compensating', status = 'confirmed'`), "sagas_phase"},
		"completed":                         {saga(`phase = 'completed', status = 'confirmed', deadline = NULL, ended_at = now()`), ""},
		"completed with a deadline":         {saga(`phase = 'completed', status = 'confirmed', ended_at = now()`), "sagas_phase"},
		"completed at no time":              {saga(`phase = 'completed', status = 'confirmed', deadline = NULL`), "sagas_phase"},
		"completed while pending":           {saga(`phase = 'completed', deadline = NULL, ended_at = now()`), "sagas_phase"},
		"compensated and confirmed":         {saga(`phase = 'compensated', status = 'confirmed', deadline = NULL, ended_at = now()`), "sagas_phase"},
		"ended and stuck":                   {saga(`phase = 'completed', status = 'confirmed', deadline = NULL, ended_at = now(), stuck_since = now(), stuck_reason = 'x'`), "sagas_phase"},
		"stuck without a reason":            {saga(`stuck_since = now()`), "sagas_stuck"},
		"an owner of what is not stuck":     {saga(`stuck_owner = 'me'`), "sagas_stuck"},
		"a cancel that waits":               {saga(`cancel = true`), ""},
		"a cancel of a confirmed order":     {saga(`cancel = true, status = 'confirmed'`), "sagas_cancel"},
		"progress that is none":             {saga(`steps = 'cx--'`), "sagas_steps_check"},
		"an undo that was refused":          {saga(`undos = 'r-'`), "sagas_undos_check"},
		"history is not changed":            {`UPDATE saga_history SET input = 'x'`, "append-only"},
		"history is not deleted":            {`DELETE FROM saga_history`, "append-only"},
		"history is not emptied":            {`TRUNCATE saga_history`, "append-only"},
		"a version of a saga's twice":       {`INSERT INTO saga_history SELECT * FROM saga_history`, "saga_history_pkey"},
		"the operators' log is not changed": {`UPDATE audit_log SET actor = 'him'`, "append-only"},
		"the operators' log is not deleted": {`DELETE FROM audit_log`, "append-only"},
		"an action of nobody":               {`INSERT INTO audit_log (actor, action, target) VALUES ('', 'x', 'y')`, "audit_log_actor_check"},
		"adjustments are not changed":       {`UPDATE stock_adjustments SET delta = 7`, "append-only"},

		"F29 stock below zero":              {`UPDATE stock SET available = available - 2`, "stock_available_check"},
		"F29 reserved below zero":           {`UPDATE stock SET reserved = -1`, "stock_reserved_check"},
		"F29 sold below zero":               {`UPDATE stock SET sold = -1`, "stock_sold_check"},
		"an adjustment of nothing":          {`INSERT INTO stock_adjustments (sku, delta, on_hand_after, actor) VALUES ('a', 0, 1, 'me')`, "stock_adjustments_delta_check"},
		"a reservation":                     {reservation("reserved", `[["a", 1]]`, "NULL", "NULL"), ""},
		"a reservation of nothing":          {reservation("reserved", `[]`, "NULL", "NULL"), "reservations_state"},
		"a rejection that names no product": {reservation("rejected", `[["a", 1]]`, "NULL", "NULL"), "reservations_state"},
		"a rejection":                       {reservation("rejected", `[["a", 1]]`, "'a'", "0"), ""},
		"a tombstone with lines":            {reservation("tombstone", `[["a", 1]]`, "NULL", "NULL"), "reservations_state"},
		"a tombstone":                       {reservation("tombstone", `[]`, "NULL", "NULL"), ""},

		"a payment step":               {payment(`state = 'done'`), ""},
		"a payment state that is none": {payment(`state = 'maybe'`), "payments_state_check"},
		"an operation that is none":    {payment(`op = 'gift'`), "payments_op_check"},
		"a negative amount":            {payment(`amount_minor = -1`), "payments_amount_minor_check"},
		"a call without a number":      {payment(`attempt = 0`), "payments_numbered"},
		"a tombstone needs no number":  {payment(`attempt = 0, state = 'tombstone'`), ""},

		"a verdict that is none": {`INSERT INTO inbox (message_id, grp, state, ticket, hash) VALUES (` + id + `, 'g', 'lost', 0, 0)`, "inbox_state_check"},
		"half a hash of a body":  {`INSERT INTO idempotency_keys (id, body, order_id, answer) VALUES (` + id + `, 'x', ` + id + `, '')`, "idempotency_keys_body_check"},
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
