//go:build linux

package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"
	"github.com/twmb/franz-go/pkg/kadm"

	"ordersaga/adapters/httpapi"
	"ordersaga/cmd/ordersaga/internal/simulator"
)

// TestCluster: several copies of the service share the work while copies freeze, leave and come, partitions are added, and every offset is
// lost.
func TestCluster(t *testing.T) {
	t.Parallel()
	s := newSystem(t, options{env: []string{"ORDERSAGA_KAFKA__SESSION_TIMEOUT=6s", "ORDERSAGA_PAYMENT__TIMEOUT=1s"}})
	c := &cluster{s: s, owner: t, addrs: []string{s.addr, freeAddr(t)}, n: &atomic.Int32{}}
	for i := range c.addrs {
		c.ps = append(c.ps, nil)
		c.start(i)
	}
	s.product("AWAY", 990, 100_000)
	s.product("AWAY-NONE", 990, 0)
	// Slow enough for work to be under way at any moment, and with outcomes that nobody knows.
	s.faults(simulator.Faults{Fault: simulator.Fault{
		Latency: simulator.Duration(10 * time.Millisecond), Jitter: simulator.Duration(80 * time.Millisecond), ErrorAfter: 0.03, Timeout: 0.01,
	}})
	t.Run("F05_ZombieConsumer", func(t *testing.T) { c.with(t).zombie() })
	t.Run("rolling restart", func(t *testing.T) { c.with(t).rolling() })
	t.Run("F30_PartitionsAreAdded", func(t *testing.T) { c.with(t).grow() })
	t.Run("F14_EveryOffsetIsLost", func(t *testing.T) { c.with(t).rewind() })
	s.faults(simulator.Faults{})
	books := s.clean()
	require.Empty(t, books.DeadLetters)
	s.sums(s.ids())
	for _, p := range c.ps {
		p.stop(t)
	}
}

// frozenFor is longer than the session and the term of a lease, which are 6 s.
const frozenFor = 8 * time.Second

// takenOver bounds how long what a frozen copy had under way stands still: its session, the term of its leases, and the 8 s for which
// Postgres keeps the locks of a transaction that stands still; one may begin after the other.
const takenOver = 25 * time.Second

type cluster struct {
	s     *system
	owner testing.TB // of the processes, which outlive the part of the test that starts them
	addrs []string
	ps    []*process
	n     *atomic.Int32
}

func (c *cluster) with(t *testing.T) *cluster {
	t.Helper()
	part := *c
	part.s = c.s.with(t)
	return &part
}

// start starts copy i and waits until it is ready.
func (c *cluster) start(i int) {
	c.s.tb.Helper()
	env := append(append([]string{}, c.s.env...), "ORDERSAGA_HTTP_ADDR="+c.addrs[i])
	c.ps[i] = launch(c.owner, fmt.Sprintf("copy-%d-%d", i, c.n.Add(1)), env, "serve")
	c.s.awaitReady(c.ps[i], c.addrs[i])
}

// zombie freezes a copy under load for longer than its session: the others take over what it has under way, and its leases. When it wakes it
// goes on as if nothing had been.
func (c *cluster) zombie() {
	t, frozen := c.s.tb, c.ps[1]
	ids := c.s.through(func() {
		require.NoError(t, frozen.cmd.Process.Signal(syscall.SIGSTOP))
		defer func() { _ = frozen.cmd.Process.Signal(syscall.SIGCONT) }() // also if the test fails
		begin := time.Now()
		// Several, for keys go to either copy.
		placed := c.s.placeAll(8, func(_ int, id uuid.UUID) httpapi.PlaceOrder { return placing(id, goodCard, item("AWAY", 1)) })
		require.Equal(t, map[string]int{"confirmed": len(placed)}, c.s.outcomes(placed))
		took := time.Since(begin)
		t.Logf("orders that were placed when a copy froze ended within %s", took.Round(time.Millisecond))
		require.Less(t, took, takenOver, "who waits for a frozen process?")
		require.NoError(t, pause(t.Context(), frozenFor-time.Since(begin)))
	})
	require.Equal(t, map[string]int{"confirmed": len(ids)}, c.s.outcomes(ids))
	require.False(t, frozen.ended(), frozen.end())
}

// rolling stops and starts one copy after the other under load. Those that a client is answered by die under its hands.
func (c *cluster) rolling() {
	t := c.s.tb
	ids := c.s.through(func() {
		for i := range c.ps {
			c.ps[i].stop(t)
			c.start(i)
		}
	})
	require.Equal(t, map[string]int{"confirmed": len(ids)}, c.s.outcomes(ids))
}

// grow adds partitions under load: keys move to others while their records are under way.
func (c *cluster) grow() {
	t := c.s.tb
	ids := c.s.through(func() {
		grown := append(append([]string{}, c.s.env...), "ORDERSAGA_KAFKA__PARTITIONS=7")
		must(t, grown, "topics", "apply", "--yes")
		require.NoError(t, pause(t.Context(), 5*time.Second))
	})
	require.Equal(t, map[string]int{"confirmed": len(ids)}, c.s.outcomes(ids))
}

// rewind sets every group back to the beginning of every topic: all that ever happened is delivered again, and changes nothing.
func (c *cluster) rewind() {
	s, t := c.s, c.s.tb
	declined := placing(uuid.Must(uuid.NewV7()), badCard, item("AWAY", 1))
	none := placing(uuid.Must(uuid.NewV7()), goodCard, item("AWAY", 1), item("AWAY-NONE", 1))
	require.NoError(t, s.place(declined))
	require.NoError(t, s.place(none))
	require.Equal(t, "rejected (payment_declined)", outcome(s.await(*declined.OrderID, settleWithin)))
	require.Equal(t, "rejected (out_of_stock)", outcome(s.await(*none.OrderID, settleWithin)))
	s.faults(simulator.Faults{})
	s.clean()
	before := c.snapshot()
	for _, p := range c.ps {
		p.stop(t)
	}
	admin := kadm.NewClient(s.kafka())
	groups := c.groups(admin)
	require.GreaterOrEqual(t, len(groups), 7)
	records := int64(0)
	for _, g := range groups {
		offsets, err := admin.FetchOffsets(t.Context(), g)
		require.NoError(t, err)
		offsets.Each(func(o kadm.OffsetResponse) {
			records += o.At
			o.At = 0
			offsets[o.Topic][o.Partition] = o
		})
		require.NoError(t, admin.CommitAllOffsets(t.Context(), g, offsets.Offsets()), g)
	}
	begin := time.Now()
	for i := range c.ps {
		c.start(i)
	}
	require.True(t, waitFor(2*time.Minute, func() bool { return c.lag(admin, groups) == 0 }), "%d records are not read", c.lag(admin, groups))
	t.Logf("%d records delivered once more in %s", records, time.Since(begin).Round(time.Millisecond))
	s.clean()
	require.Equal(t, before, c.snapshot())
}

// snapshot is all that may not change: the orders, the stock, and the gateway's books.
func (c *cluster) snapshot() map[string]string {
	s, out := c.s, map[string]string{}
	conn := s.sql()
	for name, query := range map[string]string{
		"orders":       `SELECT md5(string_agg(o::text, '|' ORDER BY id)) FROM orders o`,
		"sagas":        `SELECT md5(string_agg(s::text, '|' ORDER BY order_id)) FROM sagas s`,
		"history":      `SELECT count(*)::text FROM saga_history`,
		"stock":        `SELECT md5(string_agg(s::text, '|' ORDER BY sku)) FROM stock s`,
		"reservations": `SELECT md5(string_agg(r::text, '|' ORDER BY order_id)) FROM reservations r`,
		"payments":     `SELECT md5(string_agg(p::text, '|' ORDER BY order_id, op)) FROM payments p`,
	} {
		var v string
		require.NoError(s.tb, conn.QueryRow(s.tb.Context(), query).Scan(&v))
		out[name] = v
	}
	intents, refunds := s.ledger()
	for what, v := range map[string]any{"intents": intents, "refunds": refunds} {
		b, err := json.Marshal(v)
		require.NoError(s.tb, err)
		out[what] = string(b)
	}
	return out
}

func (c *cluster) groups(admin *kadm.Client) (names []string) {
	c.s.tb.Helper()
	all, err := admin.ListGroups(c.s.tb.Context())
	require.NoError(c.s.tb, err)
	for _, g := range all.Groups() {
		if strings.HasPrefix(g, c.s.prefix) {
			names = append(names, g)
		}
	}
	slices.Sort(names)
	return names
}

// lag sums what the groups have not committed yet.
func (c *cluster) lag(admin *kadm.Client, groups []string) (n int64) {
	ctx, cancel := context.WithTimeout(c.s.tb.Context(), 10*time.Second)
	defer cancel()
	lags, err := admin.Lag(ctx, groups...)
	if err != nil {
		return -1
	}
	for _, g := range lags {
		if g.Error() != nil {
			return -1
		}
		n += g.Lag.Total()
	}
	return n
}

// TestF23_SmallestPools: with one connection for each purpose, and as little of everything else as there may be, the work is slow and does
// not stop: nobody takes a second connection while holding one.
func TestF23_SmallestPools(t *testing.T) {
	t.Parallel()
	s := newSystem(t, options{env: []string{
		"ORDERSAGA_DATABASE__INTAKE_CONNS=1", "ORDERSAGA_DATABASE__CONSUMER_CONNS=1", "ORDERSAGA_DATABASE__RELAY_CONNS=1", "ORDERSAGA_DATABASE__OPERATOR_CONNS=2",
		"ORDERSAGA_INTAKE__WORKERS=1", "ORDERSAGA_INTAKE__QUEUE=8", "ORDERSAGA_INTAKE__MAX_BATCH=4", "ORDERSAGA_CONSUMERS__MAX_BATCH=3",
		"ORDERSAGA_CONSUMERS__PAYMENT_BATCHES=1", "ORDERSAGA_PAYMENT__CONCURRENCY=1", "ORDERSAGA_HTTP__MAX_STREAMS=1",
	}})
	p := s.serve("serve")
	s.product("SMALL", 100, 1000)
	var shed atomic.Int32
	ids := make([]uuid.UUID, 60)
	errs := make([]error, len(ids))
	atOnce(len(ids), func(i int) {
		ids[i] = uuid.Must(uuid.NewV7())
		b := placing(ids[i], goodCard, item("SMALL", 1))
		a := s.post(ids[i].String(), []byte(commandBody(t, b)))
		if a.status == http.StatusServiceUnavailable && a.retryAfter != "" {
			shed.Add(1)
		}
		errs[i] = s.insist(t.Context(), b)
	})
	for i, err := range errs {
		require.NoError(t, err, "order %d", i)
	}
	require.Equal(t, map[string]int{"confirmed": len(ids)}, s.outcomes(ids))
	t.Logf("%d of %d first posts were told to come back later", shed.Load(), len(ids))
	require.Empty(t, s.clean().DeadLetters)
	s.sums(ids)
	p.stop(t)
}
