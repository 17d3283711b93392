package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"github.com/jackc/pgx/v5"
)

// profileAfter is how far into a phase the CPU profile begins: the readings before it take a moment.
const profileAfter = 2 * time.Second

// profiled reports whether this run's phases are profiled.
func (m *meter) profiled() bool { return m.pprof != "" && m.side.name == ourName }

// profiles fetches profiles of our own service while a phase runs, and what the statements cost after it.
func (m *meter) profiles(ctx context.Context, phase string, seconds int) func() error {
	if !m.profiled() {
		return func() error { return nil }
	}
	done := make(chan error, 1)
	go func() {
		err := m.reset(ctx)
		if err == nil {
			err = pause(ctx, profileAfter)
		}
		if err == nil {
			err = m.fetch(ctx, fmt.Sprintf("/debug/pprof/profile?seconds=%d", seconds), phase+"-cpu.pprof")
		}
		done <- err
	}()
	before := m.fetch(ctx, "/debug/pprof/allocs", phase+"-allocs-before.pprof")
	return func() error {
		return errors.Join(before, <-done, m.fetch(ctx, "/debug/pprof/allocs", phase+"-allocs.pprof"), m.fetch(ctx, "/metrics", phase+"-metrics.txt"), m.statements(ctx, phase))
	}
}

func (m *meter) fetch(ctx context.Context, path, file string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, m.sys.urls[0]+path, nil)
	if err != nil {
		return fmt.Errorf("profile: %w", err)
	}
	res, err := (&http.Client{Timeout: time.Minute}).Do(req)
	if err != nil {
		return fmt.Errorf("profile: %w", err)
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return fmt.Errorf("profile %s: %s", path, res.Status)
	}
	f, err := os.Create(filepath.Join(m.pprof, file))
	if err != nil {
		return fmt.Errorf("profile: %w", err)
	}
	_, err = io.Copy(f, res.Body)
	return errors.Join(err, f.Close())
}

func (m *meter) reset(ctx context.Context) error {
	conn, err := pgx.Connect(ctx, m.env.database)
	if err != nil {
		return fmt.Errorf("statements: %w", err)
	}
	defer conn.Close(ctx) //nolint:errcheck // nothing is lost
	if _, err := conn.Exec(ctx, "SELECT pg_stat_statements_reset()"); err != nil {
		return fmt.Errorf("statements: %w", err)
	}
	return nil
}

// statements writes what pg_stat_statements counted, the dearest first.
func (m *meter) statements(ctx context.Context, phase string) error {
	rows, err := m.db.Query(ctx, `SELECT round(total_exec_time::numeric, 1)::text, calls, rows, round(mean_exec_time::numeric, 3)::text, wal_bytes::bigint, shared_blks_hit, regexp_replace(query, '\s+', ' ', 'g')
FROM pg_stat_statements WHERE dbid = (SELECT oid FROM pg_database WHERE datname = current_database()) ORDER BY total_exec_time DESC LIMIT 60`)
	if err != nil {
		return fmt.Errorf("statements: %w", err)
	}
	f, err := os.Create(filepath.Join(m.pprof, phase+"-statements.txt"))
	if err != nil {
		return fmt.Errorf("statements: %w", err)
	}
	var total, mean, query string
	var calls, n, wal, hit int64
	if _, err := fmt.Fprintf(f, "%10s %8s %9s %9s %11s %10s  query\n", "ms", "calls", "rows", "mean ms", "WAL bytes", "blocks"); err != nil {
		return fmt.Errorf("statements: %w", err)
	}
	_, err = pgx.ForEachRow(rows, []any{&total, &calls, &n, &mean, &wal, &hit, &query}, func() error {
		_, err := fmt.Fprintf(f, "%10s %8d %9d %9s %11d %10d  %.300s\n", total, calls, n, mean, wal, hit, query)
		return err
	})
	return errors.Join(err, f.Close())
}
