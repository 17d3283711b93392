package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"

	"ordersaga/cmd/ordersaga/internal/bench"
)

// The phases' numbers are in the order ids.
const (
	phaseWarm = iota + 1
	phaseSaturate
	phaseRate
)

// Phase is what was measured of one phase of one run.
type Phase struct {
	Orders     int                `json:"orders"`
	AcceptedPS float64            `json:"accepted_per_s"`
	SagasPS    float64            `json:"sagas_per_s"` // until the last saga's last commit
	AcceptP50  float64            `json:"accept_ms_p50"`
	AcceptP99  float64            `json:"accept_ms_p99"`
	P50        float64            `json:"confirmed_ms_p50"` // due to the commit of the order's end
	P99        float64            `json:"confirmed_ms_p99"`
	P999       float64            `json:"confirmed_ms_p99_9"`
	CPU        map[string]float64 `json:"cpu_s_per_1000"` // service, postgres, kafka
	Total      float64            `json:"cpu_s_per_1000_total"`
	Apart      map[string]float64 `json:"cpu_s_per_1000_apart"` // generator, gateway
	WALBytes   float64            `json:"wal_bytes_per_saga"`
	WALRecords float64            `json:"wal_records_per_saga"`
	Flushes    float64            `json:"wal_flushes_per_saga"`
	Commits    float64            `json:"commits_per_saga"`
	Retried    int64              `json:"refused_and_sent_again"`
	RSS        float64            `json:"service_rss_mb"`
	Others     float64            `json:"others_cpu_cores"` // what the machine did beside all that: the noise
}

// Run is one run of one side.
type Run struct {
	Side     string   `json:"side"`
	Round    int      `json:"round"`
	Saturate *Phase   `json:"saturate,omitempty"`
	Rate     *Phase   `json:"rate,omitempty"`
	Wrong    []string `json:"wrong"` // what the books say
}

// meter is one run under way.
type meter struct {
	o       *options
	side    *side
	env     *environment
	p       *process
	gateway *process
	db      *pgx.Conn
	counts  *bench.Database
	to      *bench.Endpoint
}

func (m *meter) cpu() (map[string]float64, error) {
	out := map[string]float64{"generator": bench.OwnCPU()}
	for name, pid := range map[string]int{"service": m.p.pid(), "postgres": m.env.s.pgPID, "kafka": m.env.s.kafka.pid(), "gateway": m.gateway.pid()} {
		v, ok := bench.CPU(pid)
		if !ok {
			return nil, fmt.Errorf("%s ended during the run\n%s", name, tail(m.env.log.Name()))
		}
		out[name] = v
	}
	return out, nil
}

// reading is what is read before and after a phase.
type reading struct {
	cpu  map[string]float64
	busy float64
	db   bench.DatabaseCounts
}

func (m *meter) read(ctx context.Context) (r reading, err error) {
	r.busy = bench.Busy()
	if r.cpu, err = m.cpu(); err == nil {
		r.db, err = m.counts.Counts(ctx)
	}
	return r, err
}

// settle is how long backends get to report what they counted.
const settle = 1300 * time.Millisecond

func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// again is how long an order that was refused waits before it is sent again; so many times at most.
const (
	again      = 10 * time.Millisecond
	againTimes = 3000
)

func (m *meter) phase(ctx context.Context, phase, n int, rate float64) (*Phase, error) {
	bodies, heads := make([][]byte, n), make([][]byte, n)
	for i := range n {
		o := orderOf(phase, i)
		bodies[i], heads[i] = m.side.body(&o), m.side.head(o.ID)
	}
	due, answered := make([]time.Time, n), make([]time.Time, n)
	var retried atomic.Int64
	var failed atomic.Pointer[error]
	load := bench.NewLoad(m.to, func(ctx context.Context, k *bench.Conn, i int, at time.Time) bench.Fate {
		due[i] = at
		err := m.post(ctx, k, &bench.Request{Method: http.MethodPost, Path: m.side.path, Head: heads[i], Body: bodies[i]}, &retried)
		if err != nil {
			failed.CompareAndSwap(nil, &err)
		}
		answered[i] = time.Now()
		return bench.Over
	})
	if err := pause(ctx, settle); err != nil {
		return nil, err
	}
	before, err := m.read(ctx)
	if err != nil {
		return nil, err
	}
	began := time.Now()
	_, unsent, took := load.Run(ctx, bench.Plan{Rate: rate, Orders: n, Connections: m.o.connections})
	if f := failed.Load(); f != nil {
		return nil, fmt.Errorf("an order was not accepted: %w\n%s", *f, tail(m.env.log.Name()))
	}
	if unsent > 0 {
		return nil, fmt.Errorf("%d orders were not sent: more --connections", unsent)
	}
	if err := m.drained(ctx, phase, n); err != nil {
		return nil, err
	}
	cpu, err := m.cpu()
	if err != nil {
		return nil, err
	}
	others, lasted := bench.Busy()-before.busy, time.Since(began)
	for name, v := range cpu {
		others -= v - before.cpu[name]
	}
	if err := pause(ctx, settle); err != nil {
		return nil, err
	}
	db, err := m.counts.Counts(ctx)
	if err != nil {
		return nil, err
	}
	p := &Phase{Orders: n, AcceptedPS: float64(n) / took.Seconds(), Retried: retried.Load(), RSS: bench.Memory(m.p.pid()), CPU: map[string]float64{}, Apart: map[string]float64{}, Others: max(others, 0) / lasted.Seconds()}
	p.cost(n, &before, cpu, db)
	return p, m.latencies(ctx, p, phase, began, due, answered)
}

// post sends an order until it is accepted.
func (m *meter) post(ctx context.Context, k *bench.Conn, req *bench.Request, retried *atomic.Int64) error {
	for range againTimes {
		a, err := k.Do(ctx, req)
		switch {
		case err != nil:
			return err
		case a.Status == http.StatusAccepted:
			return nil
		case a.Status != http.StatusTooManyRequests && a.Status != http.StatusServiceUnavailable:
			return fmt.Errorf("status %d: %.300s", a.Status, a.Body)
		}
		retried.Add(1)
		if err := pause(ctx, again); err != nil {
			return err
		}
	}
	return errors.New("refused again and again")
}

func (p *Phase) cost(n int, before *reading, cpu map[string]float64, db bench.DatabaseCounts) {
	for name, v := range cpu {
		per := (v - before.cpu[name]) / float64(n) * 1000
		if name == "generator" || name == "gateway" {
			p.Apart[name] = per
			continue
		}
		p.CPU[name] = per
		p.Total += per
	}
	of := func(a, b float64) float64 { return (a - b) / float64(n) }
	p.WALBytes, p.WALRecords = of(db.WALBytes, before.db.WALBytes), of(db.WALRecords, before.db.WALRecords)
	p.Flushes, p.Commits = of(db.Flushes, before.db.Flushes), of(db.Commits, before.db.Commits)
}

// drainEvery is how often the database is asked whether all have ended.
const drainEvery = 400 * time.Millisecond

func (m *meter) drained(ctx context.Context, phase, n int) error {
	limit := time.Now().Add(m.o.limit)
	for {
		var open, there int
		if err := m.db.QueryRow(ctx, m.side.open, orderID(phase, 0), orderID(phase, n)).Scan(&open); err != nil {
			return fmt.Errorf("database: %w", err)
		}
		if open == 0 {
			err := m.db.QueryRow(ctx, `SELECT count(*) FROM orders WHERE id >= $1 AND id < $2`, orderID(phase, 0), orderID(phase, n)).Scan(&there)
			if err != nil {
				return fmt.Errorf("database: %w", err)
			}
			if there != n {
				return fmt.Errorf("%d orders of %d are in the database", there, n)
			}
			return nil
		}
		if time.Now().After(limit) {
			return fmt.Errorf("%d of %d sagas have not ended within %s\n%s", open, n, m.o.limit, tail(m.env.log.Name()))
		}
		if err := pause(ctx, drainEvery); err != nil {
			return err
		}
	}
}

func (m *meter) latencies(ctx context.Context, p *Phase, phase int, began time.Time, due, answered []time.Time) error {
	var confirmed, accept []float64
	last := began
	each := func(q string, fn func(i int, at time.Time)) error {
		rows, err := m.db.Query(ctx, q, orderID(phase, 0), orderID(phase, len(due)))
		if err != nil {
			return fmt.Errorf("database: %w", err)
		}
		var id uuid.UUID
		var at time.Time
		_, err = pgx.ForEachRow(rows, []any{(*[16]byte)(&id), &at}, func() error {
			i := 0
			for _, b := range id[10:] {
				i = i<<8 | int(b)
			}
			fn(i, at)
			return nil
		})
		if err != nil {
			return fmt.Errorf("database: %w", err)
		}
		return nil
	}
	end := func(at time.Time) {
		if at.After(last) {
			last = at
		}
	}
	err := each(m.side.orders, func(i int, at time.Time) { confirmed = append(confirmed, at.Sub(due[i]).Seconds()*1e3); end(at) })
	if err == nil && m.side.sagas != "" {
		err = each(m.side.sagas, func(_ int, at time.Time) { end(at) })
	}
	if err != nil {
		return err
	}
	for i := range due {
		accept = append(accept, answered[i].Sub(due[i]).Seconds()*1e3)
	}
	slices.Sort(confirmed)
	slices.Sort(accept)
	p.SagasPS = float64(len(due)) / last.Sub(began).Seconds()
	p.P50, p.P99, p.P999 = quantile(confirmed, 0.5), quantile(confirmed, 0.99), quantile(confirmed, 0.999)
	p.AcceptP50, p.AcceptP99 = quantile(accept, 0.5), quantile(accept, 0.99)
	return nil
}

func quantile(sorted []float64, q float64) float64 {
	if len(sorted) == 0 {
		return 0
	}
	return sorted[min(len(sorted)-1, int(q*float64(len(sorted))))]
}

// books compares what became of the orders with what should have.
func (m *meter) books(ctx context.Context, phases map[int]int) (wrong []string, err error) {
	confirmed, rejected := 0, 0
	for _, n := range phases {
		confirmed, rejected = confirmed+n-declinesIn(n), rejected+declinesIn(n)
	}
	var c, r int
	if err := m.db.QueryRow(ctx, m.side.books).Scan(&c, &r); err != nil {
		return nil, fmt.Errorf("database: %w", err)
	}
	to, err := bench.NewEndpoint(m.env.gateway, 5*time.Second)
	if err != nil {
		return nil, err
	}
	k := bench.NewConn(to)
	defer k.Close()
	a, err := k.Do(ctx, &bench.Request{Method: http.MethodGet, Path: "/counts"})
	if err != nil {
		return nil, fmt.Errorf("gateway: %w", err)
	}
	var g stubCounts
	if err := json.Unmarshal(a.Body, &g); err != nil {
		return nil, fmt.Errorf("gateway: %w", err)
	}
	for _, x := range []struct {
		what      string
		got, want int
	}{{"confirmed", c, confirmed}, {"rejected", r, rejected}, {"captured", g.Captured, confirmed}, {"charged twice", g.Twice, 0}} {
		if x.got != x.want {
			wrong = append(wrong, fmt.Sprintf("%s: %d, not %d", x.what, x.got, x.want))
		}
	}
	return wrong, nil
}

// profileAfter is how far into a phase the CPU profile begins: the readings before it take a moment.
const profileAfter = 2 * time.Second

// profiled reports whether this run's phases are profiled.
func (m *meter) profiled() bool { return m.o.pprof != "" && m.side.name == ourName }

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
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+m.env.http+path, nil)
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
	f, err := os.Create(filepath.Join(m.o.pprof, file))
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
	f, err := os.Create(filepath.Join(m.o.pprof, phase+"-statements.txt"))
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
