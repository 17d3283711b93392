package main

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"strings"
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
	start func(ctx context.Context, e *environment) (*process, error)
	// open counts the sagas of a range of orders that have not ended; orders and sagas tell when each ended.
	open, orders, sagas string
	// books counts confirmed and rejected orders.
	books string
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
		books:  `SELECT count(*) FILTER (WHERE status = 'CONFIRMED'), count(*) FILTER (WHERE status = 'REJECTED') FROM orders`,
	}
}

func startPlain(ctx context.Context, e *environment) (*process, error) {
	conn, err := pgx.Connect(ctx, e.database)
	if err != nil {
		return nil, fmt.Errorf("plain: %w", err)
	}
	defer conn.Close(ctx) //nolint:errcheck // nothing is lost
	if _, err := conn.Exec(ctx, plainSchema); err != nil {
		return nil, fmt.Errorf("plain: %w", err)
	}
	return start([]string{e.bin, fmt.Sprintf("-partitions=%d", e.partitions)}, append([]string{
		"PG_DSN=" + e.database, "KAFKA=" + e.s.brokers, "RUN_ID=" + e.run, "PAYMENT_URL=" + e.gateway, "LISTEN=" + e.http, "SAGABENCH_PAY_CALLS=2",
	}, e.env...), e.log)
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
		books:  `SELECT count(*) FILTER (WHERE status = 'confirmed'), count(*) FILTER (WHERE status = 'rejected') FROM sagas`,
	}
}

func startOurs(ctx context.Context, e *environment) (*process, error) {
	env := append([]string{
		"ORDERSAGA_DATABASE_URL=" + e.database, "ORDERSAGA_KAFKA_BROKERS=" + e.s.brokers, "ORDERSAGA_HTTP_ADDR=" + e.http,
		"ORDERSAGA_PAYMENT_URL=" + e.gateway, "ORDERSAGA_PAYMENT_API_KEY=sk_test_yardstick",
		"ORDERSAGA_KAFKA__TOPIC_PREFIX=" + e.run + ".", "ORDERSAGA_KAFKA__REPLICATION=1", fmt.Sprintf("ORDERSAGA_KAFKA__PARTITIONS=%d", e.partitions),
		// What protects a gateway and callers from each other would be what is measured otherwise.
		"ORDERSAGA_HTTP__OPEN=true", "ORDERSAGA_HTTP__RATE_PER_CALLER=1000000", "ORDERSAGA_HTTP__BURST_PER_CALLER=1000000",
		"ORDERSAGA_PAYMENT__RATE=1000000", "ORDERSAGA_PAYMENT__BURST=1000000", "ORDERSAGA_LOG__LEVEL=warn",
		fmt.Sprintf("ORDERSAGA_HTTP__PPROF=%t", e.pprof),
	}, e.env...)
	for _, args := range [][]string{{"migrate", "up"}, {"topics", "apply", "--yes"}} {
		cmd := exec.CommandContext(ctx, e.bin, args...) //nolint:gosec // built by us
		cmd.Env = append(os.Environ(), env...)
		if out, err := cmd.CombinedOutput(); err != nil {
			return nil, fmt.Errorf("%s: %w\n%s", strings.Join(args, " "), err, out)
		}
	}
	p, err := start([]string{e.bin, "serve"}, env, e.log)
	if err != nil {
		return nil, err
	}
	if err := ready(ctx, p, e, "/readyz"); err != nil {
		p.stop()
		return nil, err
	}
	m := bench.Mix{Products: skus, MaxLines: 1}
	if err := bench.Prepare(ctx, "http://"+e.http, "", &m, 1000); err != nil {
		p.stop()
		return nil, err
	}
	return p, nil
}

// ready waits until the system answers.
func ready(ctx context.Context, p *process, e *environment, path string) error {
	to, err := bench.NewEndpoint("http://"+e.http, 5*time.Second)
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
		return fmt.Errorf("%w\n%s", err, tail(e.log.Name()))
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
