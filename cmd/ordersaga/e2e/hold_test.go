//go:build linux

package e2e

import (
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	"ordersaga/adapters/httpapi"
	"ordersaga/events"
)

const (
	holdFor = 10 * time.Second // ORDERSAGA_E2E_HOLD
	// noStall bounds accept to confirmed, with the race detector. A machine that does other things too shows in the orders before the
	// transaction, of which the slowest counts twice.
	noStall = 2 * time.Second
)

// timed is how long an order took from its post to its end.
type timed struct {
	id     uuid.UUID
	took   time.Duration
	at     time.Time
	status string
}

// stream posts orders one after the other on each of n connections, waiting for the end of each, until stop is closed.
func (s *system) stream(n int, sku string, stop <-chan struct{}) func() []timed {
	var mu sync.Mutex
	var all []timed
	var wg sync.WaitGroup
	for range n {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				one := s.timeOne(sku)
				mu.Lock()
				all = append(all, one)
				mu.Unlock()
			}
		})
	}
	return func() []timed {
		wg.Wait()
		return all
	}
}

func (s *system) timeOne(sku string) timed {
	id := uuid.Must(uuid.NewV7())
	begin := time.Now()
	var o httpapi.OrderAccepted
	err := s.api.Do(s.tb.Context(), http.MethodPost, "/v1/orders", nil, http.Header{"Idempotency-Key": {id.String()}, "Prefer": {"wait=10"}},
		placing(id, goodCard, item(sku, 1)), &o)
	one := timed{id, time.Since(begin), begin, string(o.Status)}
	if err != nil {
		one.status = err.Error()
	}
	return one
}

// TestF02_HeldTransactionDelaysNobody: somebody's transaction has written to the outbox and stays open, while the partition before it is
// due to be dropped (F38). Everybody else's orders are confirmed as fast as ever; its own row goes out when it commits.
func TestF02_HeldTransactionDelaysNobody(t *testing.T) {
	t.Parallel()
	hold := holdFor
	if v := os.Getenv("ORDERSAGA_E2E_HOLD"); v != "" {
		var err error
		hold, err = time.ParseDuration(v)
		require.NoError(t, err)
	}
	s := newSystem(t, options{})
	conn := s.sql()
	old := narrowPartition(t, s, conn)
	p := s.serve("serve")
	s.product("HOLD-1", 500, 1_000_000)
	stop := make(chan struct{})
	collect := s.stream(4, "HOLD-1", stop)
	// Until the first partition is behind every cursor. Its transactions are those of the orders themselves.
	require.True(t, waitFor(settleWithin, func() bool {
		return s.count(conn, `SELECT count(*) FROM outbox_shards WHERE pg_snapshot_xmin(prev)::text::bigint < $1`, old.to) == 0
	}), "the cursors do not pass the first partition")

	held := s.sql()
	tx, err := held.Begin(t.Context())
	require.NoError(t, err)
	late := uuid.Must(uuid.NewV7())
	leave(t, tx, late, placing(late, goodCard, item("HOLD-1", 1)))
	begun := time.Now()
	// Upkeep runs when a process starts: a second one wants to drop the partition at once, and may not wait for the lock. It also takes
	// half of the shards over.
	second := s.launch("second", "ORDERSAGA_ROLES=relay")
	var blocked bool
	for time.Since(begun) < hold {
		require.NoError(t, pause(t.Context(), 5*tick))
		blocked = blocked || strings.Contains(second.said(t), `"started"`)
		require.False(t, second.ended(), "%s", tail(second.said(t), shownOnFailure))
	}
	require.True(t, blocked, "the second process did not start while the transaction was open")
	require.EqualValues(t, 1, s.partitions(conn, old.name), "dropped under an open transaction that holds its parent: the test proves nothing")
	require.Nil(t, s.look(late), "its row is not committed")
	require.NoError(t, tx.Commit(t.Context()))
	released := time.Now()
	require.Equal(t, "confirmed", outcome(s.await(late, settleWithin)), "its row goes out when it commits")
	tookLate := time.Since(released)
	require.True(t, waitFor(settleWithin, func() bool { return s.partitions(conn, old.name) == 0 }), "the partition is dropped once nobody holds it")
	close(stop)
	all := collect()

	var during []time.Duration
	bound := noStall
	ids := []uuid.UUID{late}
	for _, o := range all {
		require.Equal(t, "confirmed", o.status, "order %s", o.id)
		ids = append(ids, o.id)
		if o.at.Before(released) && o.at.Add(o.took).After(begun) {
			during = append(during, o.took)
		} else if o.at.Before(begun) {
			bound = max(bound, 2*o.took)
		}
	}
	slices.Sort(during)
	t.Logf("%d orders while a transaction was open for %s: accepted to confirmed median %s, p99 %s, worst %s; its own row took %s after its commit",
		len(during), hold, during[len(during)/2].Round(time.Millisecond), during[len(during)*99/100].Round(time.Millisecond),
		during[len(during)-1].Round(time.Millisecond), tookLate.Round(time.Millisecond))
	require.Less(t, during[len(during)-1], bound)
	s.clean()
	s.sums(ids)
	second.stop(t)
	p.stop(t)
}

type partition struct {
	name string
	to   int64
}

// narrowPartition replaces the outbox's first partition, which spans a million transactions, by one that ends in a few hundred, and
// one after it.
func narrowPartition(t *testing.T, s *system, conn *pgx.Conn) partition {
	t.Helper()
	const width, next = 300, 100_000
	var name string
	require.NoError(t, conn.QueryRow(t.Context(), `SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhparent = 'outbox'::regclass`).Scan(&name))
	from := s.count(conn, `SELECT (regexp_match(pg_get_expr(relpartbound, oid), '\d+'))[1]::bigint FROM pg_class WHERE oid = $1::regclass`, name)
	to := s.count(conn, `SELECT pg_snapshot_xmax(pg_current_snapshot())::text::bigint`) + width
	old := partition{fmt.Sprintf("outbox_p%d", from), to}
	for _, sql := range []string{
		`DROP TABLE ` + name,
		fmt.Sprintf(`CREATE TABLE %s PARTITION OF outbox FOR VALUES FROM ('%d') TO ('%d')`, old.name, from, to),
		fmt.Sprintf(`CREATE TABLE outbox_p%d PARTITION OF outbox FOR VALUES FROM ('%d') TO ('%d')`, to, to, to+next),
	} {
		_, err := conn.Exec(t.Context(), sql)
		require.NoError(t, err)
	}
	return old
}

func (s *system) partitions(conn *pgx.Conn, name string) int64 {
	s.tb.Helper()
	return s.count(conn, `SELECT count(*) FROM pg_class WHERE relname = $1 AND relkind = 'r'`, name)
}

// leave writes a row to the outbox as a transaction of the service does: a command for the command topic.
func leave(t *testing.T, tx pgx.Tx, key uuid.UUID, b httpapi.PlaceOrder) {
	t.Helper()
	body, err := json.Marshal(b)
	require.NoError(t, err)
	headers := events.AppendHeaders(nil, []events.Header{{Key: events.HeaderType, Value: []byte(placeOrder)}})
	_, err = tx.Exec(t.Context(), `INSERT INTO outbox (shard, message_id, topic, key, headers, payload) VALUES (3, $1, 'orders.commands.v1', $2, $3, $4)`,
		uuid.Must(uuid.NewV7()), []byte(key.String()), headers, body)
	require.NoError(t, err)
}
