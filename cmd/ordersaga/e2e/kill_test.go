//go:build linux

package e2e

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"
	"github.com/twmb/franz-go/pkg/kgo"

	"ordersaga/adapters/embedded/testenv"
	"ordersaga/adapters/httpapi"
	"ordersaga/cmd/ordersaga/internal/audit"
	"ordersaga/cmd/ordersaga/internal/simulator"
)

const (
	killOrders     = 100 // ORDERSAGA_E2E_ORDERS
	killsLeast     = 6
	ordersPerKill  = 30 // in big runs
	killCustomers  = 8  // at a time
	killSettle     = 3 * time.Minute
	progressWithin = 30 * time.Second // after a restart; the session timeout of the group is 8 s, the term of the relay's lease 6 s
)

// number reads a number from the environment.
func number(tb testing.TB, variable string, otherwise int) int {
	tb.Helper()
	s := os.Getenv(variable)
	if s == "" {
		return otherwise
	}
	n, err := strconv.Atoi(s)
	require.NoError(tb, err, variable)
	require.Positive(tb, n, variable)
	return n
}

// TestF04_KillLoop: customers place orders, again and again under their keys until they are answered, while the service is killed at
// random moments and started again, and its Postgres once. The gateway is another process, lives on, and fails in every way that hides
// whether it took effect. In the end every accepted order has ended, everybody was charged once, and nothing is unpublished.
func TestF04_KillLoop(t *testing.T) {
	t.Parallel()
	orders := number(t, "ORDERSAGA_E2E_ORDERS", killOrders)
	pg := testenv.PostgresServer(t)
	s := newSystem(t, options{db: pg.URL(), env: []string{
		"ORDERSAGA_KAFKA__INSTANCE_ID=e2e-kill", "ORDERSAGA_PAYMENT__TIMEOUT=700ms", "ORDERSAGA_SAGA__RETRIABLE_DEADLINE=10s",
		"ORDERSAGA_SAGA__COMPENSATING_DEADLINE=10s",
	}})
	log := filepath.Join(t.TempDir(), "serve.log")
	start := func() *process { return launchAt(t, log, "serve", s.env, "serve") }
	p := start()
	s.awaitReady(p, s.addr)
	kills := max(killsLeast, orders/ordersPerKill)
	c := newCustomers(t, s, orders)
	conn := s.sql()
	ended := func() int64 { return s.count(conn, "SELECT count(*) FROM sagas WHERE ended_at IS NOT NULL") }
	var progress []time.Duration
	before := int64(0)
	for kill := range kills {
		c.allow(orders * (kill + 1) / kills)
		switch kill % 3 {
		case 0: // once the work goes on
			progress = append(progress, awaitProgress(t, p, before, ended))
			if kill == killsLeast/2 {
				require.NoError(t, conn.Close(t.Context()))
				require.NoError(t, pg.Kill())
				require.NoError(t, pg.Restart(t.Context()))
				conn = s.sql()
			}
			require.NoError(t, pause(t.Context(), rand.N(time.Second)))
		case 1: // among the first records, most of which come a second time
			s.awaitReady(p, s.addr)
			require.NoError(t, pause(t.Context(), rand.N(3*time.Second)))
		case 2: // in the middle of the start
			require.NoError(t, pause(t.Context(), rand.N(2*time.Second)))
		}
		require.False(t, p.ended(), "serve ended by itself: %v\n%s", p.end(), tail(p.said(t), shownOnFailure))
		p.kill()
		before = ended()
		p = start()
	}
	if under := s.count(conn, "SELECT count(*) FROM sagas WHERE ended_at IS NULL"); under > 0 {
		progress = append(progress, awaitProgress(t, p, before, ended))
	}
	books, confirmed := c.everything(orders, conn)
	p.stop(t)
	slices.Sort(progress)
	t.Logf("%d orders through %d kills of the service and one of Postgres: %v, %d confirmed; restart to progress (F33): median %s, worst %s of %d",
		orders, kills, books.Orders, confirmed, progress[len(progress)/2].Round(time.Millisecond), progress[len(progress)-1].Round(time.Millisecond), len(progress))
	require.Less(t, progress[len(progress)-1], progressWithin)
}

// TestF05_KillRoles: the roles are split over processes, each in two copies that come and go as ordinary members of their groups; one after
// the other is killed at random while the rest works on.
func TestF05_KillRoles(t *testing.T) {
	t.Parallel()
	orders := number(t, "ORDERSAGA_E2E_ORDERS", killOrders)
	s := newSystem(t, options{env: []string{
		"ORDERSAGA_KAFKA__SESSION_TIMEOUT=6s", "ORDERSAGA_PAYMENT__TIMEOUT=700ms", "ORDERSAGA_SAGA__RETRIABLE_DEADLINE=10s", "ORDERSAGA_SAGA__COMPENSATING_DEADLINE=10s",
	}})
	roles := []string{"http", "relay", "relay", "stock,compensation", "stock,compensation", "payment", "payment", "coordinator,order-commands", "coordinator,order-commands"}
	ps := make([]*process, len(roles))
	start := func(i int) {
		name := fmt.Sprintf("%d-%s", i, strings.ReplaceAll(roles[i], ",", "-"))
		ps[i] = launchAt(t, filepath.Join(t.TempDir(), name+".log"), name, append(append([]string{}, s.env...), "ORDERSAGA_ROLES="+roles[i]), "serve")
	}
	for i := range roles {
		start(i)
	}
	s.awaitReady(ps[0], s.addr)
	c := newCustomers(t, s, orders)
	conn := s.sql()
	kills := max(2*killsLeast, orders/ordersPerKill)
	for kill := range kills {
		c.allow(orders * (kill + 1) / kills)
		require.NoError(t, pause(t.Context(), 200*time.Millisecond+rand.N(1200*time.Millisecond)))
		i := rand.IntN(len(ps))
		require.False(t, ps[i].ended(), "%s ended by itself: %s\n%s", ps[i].name, ps[i].end(), tail(ps[i].said(t), shownOnFailure))
		ps[i].kill()
		start(i)
	}
	books, confirmed := c.everything(orders, conn)
	for _, p := range ps {
		p.stop(t)
	}
	t.Logf("%d orders through %d kills among %d processes: %v, %d confirmed", orders, kills, len(ps), books.Orders, confirmed)
}

// killFaults fails about a sixth of all calls.
func killFaults(seed uint64) simulator.Faults {
	f := simulator.Fault{
		Latency: simulator.Duration(10 * time.Millisecond), Jitter: simulator.Duration(40 * time.Millisecond),
		ErrorBefore: 0.04, ErrorAfter: 0.05, Timeout: 0.04, Throttle: 0.02,
	}
	return simulator.Faults{Fault: f, Seed: seed}
}

// awaitProgress answers how long after its start a process ended the first saga.
func awaitProgress(t *testing.T, p *process, before int64, ended func() int64) time.Duration {
	t.Helper()
	require.True(t, waitFor(killSettle, func() bool { return ended() > before || p.ended() }), "nothing moves after a restart")
	require.False(t, p.ended(), "serve ended by itself: %v\n%s", p.end(), tail(p.said(t), shownOnFailure))
	return time.Since(p.started)
}

// customers place orders of all kinds until each is answered.
type customers struct {
	s        *system
	producer *kgo.Client
	finished chan struct{}
	work     chan int
	allowed  int // of one goroutine
	mu       sync.Mutex
	ids      []uuid.UUID
	errs     []error
}

func newCustomers(t *testing.T, s *system, orders int) *customers {
	t.Helper()
	s.product("KILL-1", 1290, int64(5*orders))
	s.product("KILL-2", 450, int64(5*orders))
	s.product("KILL-NONE", 9900, 0)
	s.faults(killFaults(uint64(orders)))
	c := &customers{s: s, producer: s.kafka(), finished: make(chan struct{}), work: make(chan int, orders)}
	ctx, cancel := context.WithCancel(t.Context())
	work := c.work
	var wg sync.WaitGroup
	for range killCustomers {
		wg.Go(func() {
			for i := range work {
				c.one(ctx, i)
			}
		})
	}
	go func() {
		wg.Wait()
		close(c.finished)
	}()
	t.Cleanup(func() {
		cancel()
		c.allow(0)
		<-c.finished
	})
	return c
}

// allow lets the first n orders be placed, so that they are spread over the kills; 0 ends it.
func (c *customers) allow(n int) {
	for ; c.allowed < n; c.allowed++ {
		c.work <- c.allowed
	}
	if n == 0 && c.work != nil {
		close(c.work)
		c.work = nil
	}
}

// one places the order of number i, of ten: seven good, of which one by the command topic and twice, one declined, one out of stock, one
// cancelled.
func (c *customers) one(ctx context.Context, i int) {
	id := uuid.Must(uuid.NewV7())
	b := placing(id, goodCard, item("KILL-1", int64(1+i%3)))
	if i%2 == 0 {
		b.Items = append(b.Items, item("KILL-2", 1))
	}
	switch i % 10 {
	case 3:
		b.PaymentMethod = badCard
	case 5:
		b.Items = append(b.Items, item("KILL-NONE", 1))
	}
	var err error
	if i%10 == 8 {
		value := []byte(commandBody(c.s.tb, b))
		for range 2 { // under two ids, as a producer that was killed itself may do
			err = errors.Join(err, c.s.publish(ctx, c.producer, "orders.commands.v1", id.String(), value,
				kgo.RecordHeader{Key: "ce_type", Value: []byte(placeOrder)}, kgo.RecordHeader{Key: "ce_id", Value: []byte(uuid.NewString())}))
		}
	} else {
		err = c.s.insist(ctx, b)
	}
	if err == nil && i%10 == 7 {
		// Best effort: the customer is gone after one try.
		_ = c.s.api.Do(ctx, http.MethodPost, "/v1/orders/"+id.String()+"/cancel", nil, nil, httpapi.CancelOrder{Reason: "changed my mind"}, nil)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if err != nil {
		c.errs = append(c.errs, fmt.Errorf("order %d: %w", i, err))
		return
	}
	c.ids = append(c.ids, id)
}

// accept answers the orders that were answered 202, which must be all.
func (c *customers) accept() []uuid.UUID {
	c.s.tb.Helper()
	c.allow(0)
	<-c.finished
	require.Empty(c.s.tb, c.errs)
	return c.ids
}

// everything checks that in the end all is as it should be, and answers the product's own audit and how many were confirmed.
func (c *customers) everything(orders int, conn *pgx.Conn) (*audit.Report, int) {
	s, t := c.s, c.s.tb
	t.Helper()
	s.faults(simulator.Faults{})
	ids := c.accept()
	require.Len(t, ids, orders)
	left := func() int64 {
		return int64(orders) - s.count(conn, "SELECT count(*) FROM sagas WHERE ended_at IS NOT NULL")
	}
	require.True(t, waitFor(killSettle, func() bool { return left() == 0 }), "%d orders have not ended\n%s", left(), command(t, s.env, "sagas", "list", "--phase", "running").out)
	require.True(t, waitFor(readyWithin, func() bool { return s.ready(s.addr) }))
	books := s.clean()
	require.EqualValues(t, orders, books.Orders["confirmed"]+books.Orders["rejected"]+books.Orders["cancelled"], "an order for each key, and no other")
	require.Empty(t, books.DeadLetters["open"], "%s", command(t, s.env, "dlq", "list").out)
	for _, sku := range []string{"KILL-1", "KILL-2"} {
		v := s.stock(sku)
		require.EqualValues(t, 5*orders, v.OnHand+v.Sold, sku)
		require.Zero(t, v.Reserved, sku)
	}
	return books, s.sums(ids)
}
