package postgres

import (
	"context"
	"fmt"
	"runtime"
	"runtime/metrics"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	"ordersaga/events"
	"ordersaga/outbox"
)

// outboxDB is a fresh database whose outbox has partitions of span transaction ids; 0: the default.
func outboxDB(tb testing.TB, span int64) *DB {
	tb.Helper()
	db := newDB(tb)
	_, err := db.MaintainOutbox(tb.Context(), 0) // a copy of the template: it is adopted
	require.NoError(tb, err)
	if span > 0 {
		narrow(tb, db, span)
		_, err = db.MaintainOutbox(tb.Context(), span)
		require.NoError(tb, err)
	}
	return db
}

// narrow replaces the first, empty partition by one of span transaction ids.
func narrow(tb testing.TB, db *DB, span int64) {
	tb.Helper()
	_, err := db.pools[Operators].Exec(tb.Context(), fmt.Sprintf(`DO $$
DECLARE p regclass; lower numeric := pg_snapshot_xmin(pg_current_snapshot())::text::numeric;
BEGIN
  FOR p IN SELECT inhrelid::regclass FROM pg_inherits WHERE inhparent = 'outbox'::regclass LOOP EXECUTE 'DROP TABLE ' || p; END LOOP;
  EXECUTE format('CREATE TABLE %%I PARTITION OF outbox FOR VALUES FROM (%%L) TO (%%L)', 'outbox_p' || lower, lower::text, lower + %d);
END $$`, span))
	require.NoError(tb, err)
}

// sink is a Kafka that keeps the records' values and headers and answers at once, or as judge says.
type sink struct {
	mu     sync.Mutex
	values []string
	ids    []string
	judge  func(r events.Record) error
	null   bool // count only
	n      int
}

func (s *sink) Produce(_ context.Context, r events.Record, done func(error)) {
	s.mu.Lock()
	var err error
	if s.judge != nil {
		err = s.judge(r)
	}
	if err == nil {
		s.n++
		if !s.null {
			s.values = append(s.values, string(r.Value))
			s.ids = append(s.ids, string(r.Header(events.HeaderID)))
		}
	}
	s.mu.Unlock()
	done(err)
}

func (s *sink) Flush(context.Context) error { return nil }

func (s *sink) got() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]string(nil), s.values...)
}

func (s *sink) count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.n
}

func firsts(values []string) []string {
	seen := map[string]bool{}
	var out []string
	for _, v := range values {
		if !seen[v] {
			seen[v] = true
			out = append(out, v)
		}
	}
	return out
}

// listener is an Observer that remembers.
type listener struct {
	outbox.NoObserver
	mu     sync.Mutex
	fenced int
	aside  int
	errs   []string
}

func (l *listener) ShardFenced(int16) { l.mu.Lock(); l.fenced++; l.mu.Unlock() }
func (l *listener) RecordSetAside(*outbox.Message, error, bool) {
	l.mu.Lock()
	l.aside++
	l.mu.Unlock()
}
func (l *listener) RelayFailed(op string, err error) {
	l.mu.Lock()
	l.errs = append(l.errs, op+": "+err.Error())
	l.mu.Unlock()
}

func (l *listener) heard() (fenced, aside int, errs []string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.fenced, l.aside, append([]string(nil), l.errs...)
}

// startRelay runs a relay; stop ends it in order and waits.
func startRelay(tb testing.TB, log outbox.Log, p outbox.Producer, c outbox.Config, o outbox.Observer) (r *outbox.Relay, stop func()) {
	tb.Helper()
	ctx, cancel := context.WithCancel(context.WithoutCancel(tb.Context()))
	relay := outbox.New(log, p, c, o)
	done := make(chan error, 1)
	go func() { done <- relay.Run(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			tb.Error(err)
		}
	})
	tb.Cleanup(stop)
	return relay, stop
}

// forward commits raw records in a transaction of their own.
func forward(tb testing.TB, db *DB, rs ...events.Raw) {
	tb.Helper()
	require.NoError(tb, db.For(Consumers).InTx(tb.Context(), func(ctx context.Context, tx *Tx) error { return tx.Forward(ctx, rs) }))
}

// inOutbox answers the typed messages that were ever written.
func inOutbox(tb testing.TB, db *DB) (out []outbox.Message) {
	tb.Helper()
	err := db.query(tb.Context(), Relay, "read packs", `SELECT id, shard, pack FROM outbox WHERE pack IS NOT NULL ORDER BY id`, nil, func(r pgx.Rows) error {
		var id int64
		var shard int16
		var pack []byte
		if err := r.Scan(&id, &shard, &pack); err != nil {
			return err
		}
		ms, err := outbox.Unpack(id, shard, pack)
		out = append(out, ms...)
		return err
	})
	require.NoError(tb, err)
	return out
}

func raw(key, value string) events.Raw {
	return events.Raw{Topic: "t", Key: []byte(key), Value: []byte(value), Headers: []events.Header{{Key: "h", Value: []byte("v")}}}
}

const tick = 10 * time.Millisecond

// fillOutbox commits rows of about 500 bytes, in transactions of 1,000.
func fillOutbox(tb testing.TB, db *DB, rows int) {
	tb.Helper()
	rawExec(tb, db, `DO $$ BEGIN FOR i IN 1..`+strconv.Itoa((rows+999)/1000)+` LOOP
  INSERT INTO outbox (shard, message_id, type, order_id, payload)
  SELECT j % 16, gen_random_uuid(), 'StockReserved', gen_random_uuid(), convert_to(repeat('x', 400), 'UTF8')
  FROM generate_series(1, least(1000, `+strconv.Itoa(rows)+` - (i - 1) * 1000)) AS j; COMMIT; END LOOP; END $$`)
}

// drainOutbox relays so many rows and answers the most heap in use meanwhile, above what was in use before.
func drainOutbox(tb testing.TB, db *DB, kafka *sink, rows int) (peak uint64) {
	tb.Helper()
	heap := func() uint64 {
		s := []metrics.Sample{{Name: "/memory/classes/heap/objects:bytes"}}
		metrics.Read(s)
		return s[0].Value.Uint64()
	}
	runtime.GC()
	before := heap()
	_, stop := startRelay(tb, NewOutboxLog(db), kafka, outbox.Config{}, nil)
	defer stop()
	require.Eventually(tb, func() bool {
		peak = max(peak, heap())
		return kafka.count() >= rows
	}, time.Minute, tick)
	return peak - min(peak, before)
}
