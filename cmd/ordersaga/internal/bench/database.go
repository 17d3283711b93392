package bench

import (
	"context"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
)

// DatabaseCounts are what Postgres counted so far; the server counts for all databases, but for the commits.
type DatabaseCounts struct {
	WALBytes, WALRecords, Flushes, Commits float64
}

// Database reads a server's counts. Not for concurrent use.
type Database struct {
	conn    *pgx.Conn
	flushes string
}

// OpenDatabase connects.
func OpenDatabase(ctx context.Context, url string) (*Database, error) {
	conn, err := pgx.Connect(ctx, url)
	if err != nil {
		return nil, fmt.Errorf("database: %w", err)
	}
	d := &Database{conn: conn, flushes: "(SELECT wal_sync FROM pg_stat_wal)"}
	var moved bool // PostgreSQL 18 counts them with all other I/O
	const q = `SELECT NOT EXISTS (SELECT FROM pg_attribute WHERE attrelid = 'pg_stat_wal'::regclass AND attname = 'wal_sync' AND NOT attisdropped)`
	if err := conn.QueryRow(ctx, q).Scan(&moved); err != nil {
		return nil, fmt.Errorf("database: %w", err)
	}
	if moved {
		d.flushes = "(SELECT sum(fsyncs) FROM pg_stat_io WHERE object = 'wal')"
	}
	return d, nil
}

// Close closes the connection.
func (d *Database) Close(ctx context.Context) { _ = d.conn.Close(ctx) } // nothing is open on it

// statisticsDelay is how late a backend may report its counts (PGSTAT_MIN_INTERVAL is a second).
const statisticsDelay = 1200 * time.Millisecond

// Counts reads them. Called a moment after the load ended: backends report late.
func (d *Database) Counts(ctx context.Context) (c DatabaseCounts, err error) {
	q := `SELECT pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')::float8, (SELECT wal_records FROM pg_stat_wal)::float8, coalesce(` + d.flushes + `, 0)::float8,
  (SELECT xact_commit FROM pg_stat_database WHERE datname = current_database())::float8`
	if err := d.conn.QueryRow(ctx, q).Scan(&c.WALBytes, &c.WALRecords, &c.Flushes, &c.Commits); err != nil {
		return c, fmt.Errorf("database: %w", err)
	}
	return c, nil
}

func (c DatabaseCounts) since(o DatabaseCounts) DatabaseCounts {
	return DatabaseCounts{c.WALBytes - o.WALBytes, c.WALRecords - o.WALRecords, c.Flushes - o.Flushes, c.Commits - o.Commits}
}

// Settings reads what the durability of the measured thing rests on.
func (d *Database) Settings(ctx context.Context) (map[string]string, error) {
	out := map[string]string{}
	rows, err := d.conn.Query(ctx, `SELECT name, current_setting(name) FROM unnest(ARRAY['server_version', 'fsync', 'synchronous_commit', 'full_page_writes',
  'shared_buffers', 'max_wal_size']) AS u(name)`)
	if err != nil {
		return nil, fmt.Errorf("database: %w", err)
	}
	var name, value string
	if _, err := pgx.ForEachRow(rows, []any{&name, &value}, func() error { out[name] = value; return nil }); err != nil {
		return nil, fmt.Errorf("database: %w", err)
	}
	return out, nil
}
