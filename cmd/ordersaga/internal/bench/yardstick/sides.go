package main

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"

	"ordersaga/cmd/ordersaga/internal/bench"
)

// side is one of the systems that are compared.
type side struct {
	name string
	bin  string
	env  []string // more settings
	path string   // where orders are posted
	head func(id string) []byte
	body func(*order) []byte
	// start starts it on a fresh database and waits until it takes orders.
	start func(ctx context.Context, e *environment) (*system, error)
	// open counts the sagas of a range of orders that have not ended; orders and sagas tell when each ended.
	open, orders, sagas string
	// books counts confirmed and rejected orders among a range.
	books string
}

// system is a side that runs, as one process or several.
type system struct {
	procs []*process
	urls  []string // that take orders; the first answers reads and metrics too
	log   string   // path
}

// cpu is what all its processes have used, in seconds; false if one has ended.
func (s *system) cpu() (sum float64, alive bool) {
	for _, p := range s.procs {
		v, ok := bench.CPU(p.pid())
		if !ok {
			return 0, false
		}
		sum += v
	}
	return sum, true
}

// memory is the resident memory of all its processes, in MiB.
func (s *system) memory() (sum float64) {
	for _, p := range s.procs {
		sum += bench.Memory(p.pid())
	}
	return sum
}

// stop stops all its processes at a time: those that carry work on get as long as those that take it in.
func (s *system) stop() {
	var wg sync.WaitGroup
	for _, p := range s.procs {
		wg.Go(p.stop)
	}
	wg.Wait()
}

// spec is one process of this system.
type spec struct {
	roles string   // with commas between them; empty: all
	env   []string // more settings, for it alone
}

func (p *spec) http() bool {
	return p.roles == "" || slices.Contains(strings.Split(p.roles, ","), "http")
}

// environment is what a system under test is told.
type environment struct {
	s                       *servers
	database, gateway, http string
	run                     string // unique; in topic names
	partitions              int
	bin                     string
	log                     *os.File
	pprof                   bool
	env                     []string // more settings
	procs                   []spec   // of this system; none: one with all roles, at the address http
}

func jsonHead(lines ...string) []byte { return bench.Heads("", lines...) }

const plainSchema = `
CREATE TABLE orders(
  id uuid PRIMARY KEY, customer bigint NOT NULL, items jsonb NOT NULL, total bigint NOT NULL,
  status text NOT NULL, created_at timestamptz NOT NULL DEFAULT now(), updated_at timestamptz NOT NULL DEFAULT now());
CREATE TABLE stock(sku int PRIMARY KEY, available bigint NOT NULL CHECK (available >= 0), reserved bigint NOT NULL);
CREATE TABLE reservations(order_id uuid PRIMARY KEY, items jsonb NOT NULL, released boolean NOT NULL DEFAULT false);
CREATE TABLE payments(order_id uuid PRIMARY KEY, amount bigint NOT NULL, status text NOT NULL);
INSERT INTO stock SELECT g, 1000000000, 0 FROM generate_series(1, 1000) g;`

const plainName, ourName = "plain", "ordersaga"

func plainSide() *side {
	head := jsonHead()
	return &side{
		name: plainName, path: "/orders",
		head: func(string) []byte { return head }, body: (*order).plainBody,
		start:  startPlain,
		open:   `SELECT count(*) FROM orders WHERE id >= $1 AND id < $2 AND status = 'PENDING'`,
		orders: `SELECT id, pg_xact_commit_timestamp(xmin) FROM orders WHERE id >= $1 AND id < $2 AND status IN ('CONFIRMED', 'REJECTED')`,
		books:  `SELECT count(*) FILTER (WHERE status = 'CONFIRMED'), count(*) FILTER (WHERE status = 'REJECTED') FROM orders WHERE id >= $1 AND id < $2`,
	}
}

func startPlain(ctx context.Context, e *environment) (*system, error) {
	conn, err := pgx.Connect(ctx, e.database)
	if err != nil {
		return nil, fmt.Errorf("plain: %w", err)
	}
	defer conn.Close(ctx) //nolint:errcheck // nothing is lost
	if _, err := conn.Exec(ctx, plainSchema); err != nil {
		return nil, fmt.Errorf("plain: %w", err)
	}
	p, err := start([]string{e.bin, fmt.Sprintf("-partitions=%d", e.partitions)}, append([]string{
		"PG_DSN=" + e.database, "KAFKA=" + e.s.brokers, "RUN_ID=" + e.run, "PAYMENT_URL=" + e.gateway, "LISTEN=" + e.http, "SAGABENCH_PAY_CALLS=2",
	}, e.env...), e.log)
	if err != nil {
		return nil, err
	}
	return &system{procs: []*process{p}, urls: []string{"http://" + e.http}, log: e.log.Name()}, nil
}

func ourSide() *side {
	return &side{
		name: ourName, path: "/v1/orders",
		head:   func(id string) []byte { return jsonHead("Idempotency-Key: " + id) },
		body:   (*order).ourBody,
		start:  startOurs,
		open:   `SELECT count(*) FROM sagas WHERE deadline IS NOT NULL AND order_id >= $1 AND order_id < $2`,
		orders: `SELECT DISTINCT ON (order_id) order_id, pg_xact_commit_timestamp(xmin) FROM saga_history WHERE order_id >= $1 AND order_id < $2 AND status <> 'pending' ORDER BY order_id, version`,
		sagas:  `SELECT order_id, pg_xact_commit_timestamp(xmin) FROM sagas WHERE order_id >= $1 AND order_id < $2 AND ended_at IS NOT NULL`,
		books:  `SELECT count(*) FILTER (WHERE status = 'confirmed'), count(*) FILTER (WHERE status = 'rejected') FROM sagas WHERE order_id >= $1 AND order_id < $2`,
	}
}

func startOurs(ctx context.Context, e *environment) (*system, error) {
	if err := e.prepare(ctx); err != nil {
		return nil, err
	}
	sys, err := e.launch(ctx)
	if err != nil {
		return nil, err
	}
	m := bench.Mix{Products: skus, MaxLines: 1}
	if err := bench.Prepare(ctx, sys.urls[0], "", &m, price); err != nil {
		sys.stop()
		return nil, err
	}
	return sys, nil
}

// price is that of each product, in minor units.
const price = 1000

// settings are those of every command and process of this system.
func (e *environment) settings() []string {
	return append([]string{
		"ORDERSAGA_DATABASE_URL=" + e.database, "ORDERSAGA_KAFKA_BROKERS=" + e.s.brokers, "ORDERSAGA_HTTP_ADDR=" + e.http,
		"ORDERSAGA_PAYMENT_URL=" + e.gateway, "ORDERSAGA_PAYMENT_API_KEY=sk_test_yardstick",
		"ORDERSAGA_KAFKA__TOPIC_PREFIX=" + e.prefix(), "ORDERSAGA_KAFKA__REPLICATION=1", fmt.Sprintf("ORDERSAGA_KAFKA__PARTITIONS=%d", e.partitions),
		// What protects a gateway and callers from each other would be what is measured otherwise.
		"ORDERSAGA_HTTP__OPEN=true", "ORDERSAGA_HTTP__RATE_PER_CALLER=1000000", "ORDERSAGA_HTTP__BURST_PER_CALLER=1000000",
		"ORDERSAGA_PAYMENT__RATE=1000000", "ORDERSAGA_PAYMENT__BURST=1000000", "ORDERSAGA_LOG__LEVEL=warn",
		fmt.Sprintf("ORDERSAGA_HTTP__PPROF=%t", e.pprof),
	}, e.env...)
}

// prefix is what this system's topics begin with.
func (e *environment) prefix() string { return e.run + "." }

// prepare makes the schema and the topics.
func (e *environment) prepare(ctx context.Context) error {
	for _, args := range [][]string{{"migrate", "up"}, {"topics", "apply", "--yes"}} {
		cmd := exec.CommandContext(ctx, e.bin, args...) //nolint:gosec // built by us
		cmd.Env = append(os.Environ(), e.settings()...)
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("%s: %w\n%s", strings.Join(args, " "), err, out)
		}
	}
	return nil
}

// launch starts the processes and waits until all are ready. The first that takes orders does so at the address http.
func (e *environment) launch(ctx context.Context) (sys *system, err error) {
	specs := e.procs
	if len(specs) == 0 {
		specs = []spec{{}}
	}
	ports, err := freePorts(ctx, len(specs))
	if err != nil {
		return nil, err
	}
	sys = &system{log: e.log.Name()}
	defer func() {
		if err != nil {
			sys.stop()
			sys = nil
		}
	}()
	var probed []string
	for i := range specs {
		addr := "127.0.0.1:" + ports[i]
		env := append(e.settings(), specs[i].env...)
		if specs[i].roles != "" {
			env = append(env, "ORDERSAGA_ROLES="+specs[i].roles)
		}
		if specs[i].http() {
			if len(sys.urls) == 0 {
				addr = e.http
			}
			env = append(env, "ORDERSAGA_HTTP_ADDR="+addr)
			sys.urls = append(sys.urls, "http://"+addr)
		} else {
			env = append(env, "ORDERSAGA_HTTP__PROBES_ADDR="+addr)
		}
		p, err := start([]string{e.bin, "serve"}, env, e.log)
		if err != nil {
			return sys, err
		}
		sys.procs, probed = append(sys.procs, p), append(probed, addr)
	}
	for i, p := range sys.procs {
		if err := ready(ctx, p, e, probed[i], "/readyz"); err != nil {
			return sys, err
		}
	}
	return sys, nil
}

// ready waits until a process answers.
func ready(ctx context.Context, p *process, e *environment, addr, path string) error {
	to, err := bench.NewEndpoint("http://"+addr, 5*time.Second)
	if err != nil {
		return err
	}
	k := bench.NewConn(to)
	defer k.Close()
	ctx, cancel := context.WithTimeout(ctx, startWithin)
	defer cancel()
	err = until(ctx, e.bin, p, func() error {
		a, err := k.Do(ctx, &bench.Request{Method: http.MethodGet, Path: path})
		if err == nil && a.Status != http.StatusOK {
			err = fmt.Errorf("status %d: %.500s", a.Status, a.Body)
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("%w\n%s", err, tailOf(e.log.Name()))
	}
	return nil
}

// build builds a main package in its own module.
func build(ctx context.Context, dir, pkg, out string) error {
	cmd := exec.CommandContext(ctx, "go", "build", "-o", out, pkg) //nolint:gosec // what the user named
	cmd.Dir = dir
	if b, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build %s in %s: %w\n%s", pkg, dir, err, b)
	}
	return nil
}
