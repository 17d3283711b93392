package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
)

// A filled database holds orders that ended in the past. They are copies, made by the server, of some that this system ended just before: so the
// rows are whatever the build at hand writes, and only their ids, their customers and their times differ.

// filled lists the tables of which a saga leaves rows that stay.
var filled = []string{"orders", "sagas", "saga_history", "reservations", "payments", "idempotency_keys"}

// passing are tables with rows of orders that do not stay: the outbox is dropped by partitions, the rest is for failures and cancels.
var passing = []string{"outbox", "inbox", "barriers", "dead_letters"}

// templates is how many orders the copies are made of.
const templates = 1000

// chunk is how many orders are made in one transaction.
const chunk = 100_000

// ordersOfCustomer is how many orders a customer has.
const ordersOfCustomer = 10

// keysKept is how long idempotency keys are kept.
const keysKept = 48 * time.Hour

// kindOf is a column as far as copying goes.
type kindOf struct {
	name, kind string
	generated  bool
}

// filler copies ended orders.
type filler struct {
	conn   *pgx.Conn
	rate   float64   // orders a second at which the copies came in
	until  time.Time // when the last of them did
	limit  int64     // bytes that all may take
	tables map[string][]kindOf
	// customers is how many there are: each has as many orders in a large database as in a small one, or lists would grow for that reason.
	customers int
	say       func(format string, args ...any)
}

// fill makes n orders, or as many as fit, and answers how many there are and what they take in bytes.
func (f *filler) fill(ctx context.Context, n int) (orders int, size int64, err error) {
	if err := f.learn(ctx); err != nil {
		return 0, 0, err
	}
	f.customers = max(n/ordersOfCustomer, 1)
	began := f.until.Add(-time.Duration(float64(n) / f.rate * float64(time.Second)))
	before, err := f.size(ctx)
	if err != nil {
		return 0, 0, err
	}
	start := time.Now()
	for done := 0; done < n; {
		to := min(done+chunk, n)
		if err := f.chunk(ctx, began, done, to); err != nil {
			return 0, 0, err
		}
		done = to
		if size, err = f.size(ctx); err != nil {
			return 0, 0, err
		}
		size -= before
		f.say("%d of %d orders in %s, %.2f GB, %.0f bytes an order", done, n, time.Since(start).Round(time.Second), float64(size)/1e9, float64(size)/float64(done))
		if most := int(float64(f.limit) / float64(size) * float64(done)); f.limit > 0 && most < n && done >= min(n, 10*chunk) {
			n = max(most, done)
			f.say("%d orders are what fits", n)
		}
	}
	for _, table := range filled {
		if _, err := f.conn.Exec(ctx, "VACUUM (ANALYZE) "+table); err != nil {
			return 0, 0, fmt.Errorf("fill: %s: %w", table, err)
		}
	}
	if _, err := f.conn.Exec(ctx, "CHECKPOINT"); err != nil {
		return 0, 0, fmt.Errorf("fill: %w", err)
	}
	return n, size, nil
}

// learn reads the columns and puts the rows of the templates aside, by their order's number.
func (f *filler) learn(ctx context.Context) error {
	if err := f.forgotten(ctx); err != nil {
		return err
	}
	f.tables = map[string][]kindOf{}
	for _, q := range []string{
		"SET synchronous_commit = off", "SET jit = off", "SET work_mem = '64MB'",
		"CREATE TEMPORARY TABLE fill_order AS SELECT row_number() OVER (ORDER BY id) - 1 AS fill_number, id AS fill_id, created_at AS fill_created FROM orders ORDER BY id LIMIT " + strconv.Itoa(templates),
	} {
		if _, err := f.conn.Exec(ctx, q); err != nil {
			return fmt.Errorf("fill: %w", err)
		}
	}
	for _, table := range filled {
		cols, err := columnsOf(ctx, f.conn, table)
		if err != nil {
			return err
		}
		f.tables[table] = cols
		key := "order_id"
		if table == "orders" {
			key = "id"
		}
		for _, q := range []string{
			fmt.Sprintf("CREATE TEMPORARY TABLE fill_%s AS SELECT o.*, t.* FROM %s t JOIN fill_order o ON o.fill_id = t.%s", table, table, key),
			"ANALYZE fill_" + table,
		} {
			if _, err := f.conn.Exec(ctx, q); err != nil {
				return fmt.Errorf("fill: %s: %w", table, err)
			}
		}
	}
	return nil
}

// forgotten looks for tables that hold rows of the templates and are not known here: a database without their rows would be the smaller for it.
func (f *filler) forgotten(ctx context.Context) error {
	rows, err := f.conn.Query(ctx, `
SELECT c.relname::text FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind IN ('r', 'p') AND NOT c.relispartition AND n.nspname = 'public' AND a.attname = 'order_id' AND NOT a.attisdropped`)
	if err != nil {
		return fmt.Errorf("fill: %w", err)
	}
	names, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return fmt.Errorf("fill: %w", err)
	}
	for _, n := range names {
		if slices.Contains(filled, n) || slices.ContainsFunc(passing, func(p string) bool { return strings.HasPrefix(n, p) }) {
			continue
		}
		var there bool
		if err := f.conn.QueryRow(ctx, "SELECT EXISTS (SELECT FROM "+pgx.Identifier{n}.Sanitize()+")").Scan(&there); err != nil {
			return fmt.Errorf("fill: %w", err)
		}
		if there {
			return fmt.Errorf("fill: a saga leaves rows in the table %s, which is not copied: add it to the list", n)
		}
	}
	return nil
}

func columnsOf(ctx context.Context, conn *pgx.Conn, table string) ([]kindOf, error) {
	rows, err := conn.Query(ctx, `
SELECT attname::text, format_type(atttypid, NULL), attidentity <> '' OR attgenerated <> '' FROM pg_attribute
WHERE attrelid = $1::text::regclass AND attnum > 0 AND NOT attisdropped ORDER BY attnum`, table)
	if err != nil {
		return nil, fmt.Errorf("columns of %s: %w", table, err)
	}
	out, err := pgx.CollectRows(rows, func(r pgx.CollectableRow) (c kindOf, err error) {
		err = r.Scan(&c.name, &c.kind, &c.generated)
		return c, err
	})
	if err == nil && len(out) == 0 {
		err = errors.New("there are none")
	}
	if err != nil {
		return nil, fmt.Errorf("columns of %s: %w", table, err)
	}
	return out, nil
}

// copies is the SQL that makes rows of the orders $1 to $2 - 1; $3 is when the first of all came in, $4 the seconds between two.
func copies(table string, cols []kindOf, customers int) string {
	var names, values []string
	for _, c := range cols {
		if c.generated {
			continue
		}
		names, values = append(names, pgx.Identifier{c.name}.Sanitize()), append(values, copied(table, c, customers))
	}
	return fmt.Sprintf(`
INSERT INTO %s (%s) SELECT %s FROM (SELECT n, at, (lpad(to_hex((extract(epoch FROM at) * 1000)::bigint), 12, '0') || '7' || lpad(to_hex(n & 4095), 3, '0') || '8' || lpad(to_hex(n), 15, '0'))::uuid AS id
  FROM (SELECT n, $3::timestamptz + n * $4::float8 * interval '1 second' AS at FROM generate_series($1::bigint, $2::bigint - 1) AS n) AS m) AS o
JOIN fill_%s AS t ON t.fill_number = o.n %% (SELECT count(*) FROM fill_order)`, table, strings.Join(names, ", "), strings.Join(values, ", "), table)
}

// copied is what a column of a copy holds.
func copied(table string, c kindOf, customers int) string {
	name := "t." + pgx.Identifier{c.name}.Sanitize()
	switch {
	case c.name == "order_id" || table == "orders" && c.name == "id":
		return "o.id"
	case table == "idempotency_keys" && c.name == "id":
		return "md5('fill' || o.n)::uuid" // as random as the hash that it is
	case table == "orders" && c.name == "customer_id":
		return fmt.Sprintf("'customer-' || (o.n * 7919 %% %d)", customers)
	case c.kind == "timestamp with time zone":
		return name + " + (o.at - t.fill_created)"
	}
	return name
}

// chunk makes the rows of the orders from to to-1 in one transaction.
func (f *filler) chunk(ctx context.Context, began time.Time, from, to int) error {
	step := 1 / f.rate
	err := pgx.BeginFunc(ctx, f.conn, func(tx pgx.Tx) error {
		for _, table := range filled {
			first := from
			if table == "idempotency_keys" { // what is older has been deleted
				first = max(from, int(f.until.Add(-keysKept).Sub(began).Seconds()*f.rate))
			}
			if first >= to {
				continue
			}
			if _, err := tx.Exec(ctx, copies(table, f.tables[table], f.customers), first, to, began, step); err != nil {
				return fmt.Errorf("%s: %w", table, err)
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("fill: %w", err)
	}
	return nil
}

// size is what the tables and their indexes take, in bytes.
func (f *filler) size(ctx context.Context) (sum int64, err error) {
	err = f.conn.QueryRow(ctx, "SELECT sum(pg_total_relation_size(t))::bigint FROM unnest($1::text[]::regclass[]) AS t", filled).Scan(&sum)
	if err != nil {
		return 0, fmt.Errorf("fill: %w", err)
	}
	return sum, nil
}

// copyProducts makes products beyond those that bench.Prepare made, up to n, alike.
func copyProducts(ctx context.Context, conn *pgx.Conn, n int) error {
	if n <= skus {
		return nil
	}
	for _, table := range []string{"products", "stock"} {
		cols, err := columnsOf(ctx, conn, table)
		if err != nil {
			return err
		}
		var names, values []string
		for _, c := range cols {
			if c.generated {
				continue
			}
			name := pgx.Identifier{c.name}.Sanitize()
			names = append(names, name)
			if c.name == "sku" {
				name = "'bench-' || lpad(g::text, 5, '0')"
			}
			values = append(values, name)
		}
		q := fmt.Sprintf("INSERT INTO %s (%s) SELECT %s FROM %s, generate_series($1::int, $2::int - 1) AS g WHERE sku = $3 ON CONFLICT DO NOTHING",
			table, strings.Join(names, ", "), strings.Join(values, ", "), table)
		if _, err := conn.Exec(ctx, q, skus, n, ourSKU(1)); err != nil {
			return fmt.Errorf("products: %s: %w", table, err)
		}
		if _, err := conn.Exec(ctx, "VACUUM (ANALYZE) "+table); err != nil {
			return fmt.Errorf("products: %s: %w", table, err)
		}
	}
	return nil
}

func sayFill(name string) func(string, ...any) {
	return func(format string, args ...any) {
		fmt.Fprintf(os.Stderr, "filling %s: %s\n", name, fmt.Sprintf(format, args...))
	}
}
