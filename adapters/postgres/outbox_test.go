package postgres

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	"ordersaga/adapters/embedded/testenv"
	"ordersaga/consumers"
	"ordersaga/events"
	"ordersaga/outbox"
)

func TestEmitReachesKafkaAsItWasWritten(t *testing.T) {
	db := outboxDB(t, 0)
	log := NewOutboxLog(db)
	order, id := events.NewID(), events.NewID()
	trace, ok := events.ParseTraceparent("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
	require.True(t, ok)
	typed := events.Envelope{
		ID: id, Type: events.TOrderConfirmed, OrderID: order, Sequence: 2, Trace: trace,
		Data: &events.OrderEvent{OrderID: order.String(), Sequence: 2, Status: "confirmed"},
	}
	raws := []events.Raw{
		{Topic: "retry.stock.5s", Key: []byte("k"), Value: []byte{0, 1, 2}, Headers: []events.Header{{Key: "a", Value: []byte{255}}, {Key: "b"}}},
		{Topic: "dlq.stock", Value: nil},
	}
	err := db.For(Consumers).InTx(t.Context(), func(ctx context.Context, tx *Tx) error {
		return errors.Join(tx.Emit(ctx, []events.Envelope{typed}), tx.Forward(ctx, raws), tx.Emit(ctx, nil), tx.Forward(ctx, nil))
	})
	require.NoError(t, err)
	select {
	case <-db.Wake():
	default:
		require.Fail(t, "a commit that wrote to the outbox wakes the relay")
	}
	g, err := log.Acquire(t.Context(), "r", time.Minute)
	require.NoError(t, err)
	var got []*outbox.Message
	var next outbox.Snapshot
	read := func(g outbox.Grant) {
		got = nil
		require.NoError(t, log.Window(t.Context(), spansOf(g), func(s outbox.Snapshot) { next = s }, func(m *outbox.Message) error {
			got = append(got, m)
			return nil
		}))
	}
	read(g)
	require.Len(t, got, 3)
	slices.SortFunc(got, func(a, b *outbox.Message) int { return int(a.RowID - b.RowID) })

	want, err := events.Encode(typed)
	require.NoError(t, err)
	r, err := got[0].Record()
	require.NoError(t, err)
	require.Equal(t, events.Record{Topic: events.TopicEvents, Key: []byte(order.String()), Value: want, Headers: events.HeadersOf(typed)}, r)
	back, err := events.Decode(&r)
	require.NoError(t, err)
	require.Equal(t, typed, back)

	for i, raw := range raws {
		r, err = got[1+i].Record()
		require.NoError(t, err)
		require.Equal(t, events.Record{Topic: raw.Topic, Key: raw.Key, Value: raw.Value, Headers: raw.Headers}, r)
		require.GreaterOrEqual(t, got[1+i].Shard, int16(outbox.Shards))
	}

	for i := range g.Leases {
		g.Leases[i].Cursor = outbox.Cursor{Prev: next}
	}
	fenced, err := log.Store(t.Context(), "r", g.Leases)
	require.NoError(t, err)
	require.Empty(t, fenced)
	g, err = log.Acquire(t.Context(), "r", time.Minute)
	require.NoError(t, err)
	read(g)
	require.Empty(t, got, "nothing is unseen any more")
	require.NoError(t, log.Leave(t.Context(), "r"))
}

// spansOf reads every shard by itself.
func spansOf(g outbox.Grant) []outbox.Span {
	var out []outbox.Span
	for _, l := range g.Leases {
		out = append(out, outbox.Span{Shards: []int16{l.Shard}, From: l.Cursor})
	}
	return out
}

func TestLeasesAreSharedFencedAndGivenBack(t *testing.T) {
	db := outboxDB(t, 0)
	ctx := t.Context()
	a, b := NewOutboxLog(db), NewOutboxLog(db)
	const term = 500 * time.Millisecond
	ga, err := a.Acquire(ctx, "a", term)
	require.NoError(t, err)
	require.Len(t, ga.Leases, outbox.TotalShards)
	require.Equal(t, outbox.TotalShards, ga.Share)
	gb, err := b.Acquire(ctx, "b", term)
	require.NoError(t, err)
	require.Empty(t, gb.Leases)
	require.Equal(t, 9, gb.Share)
	ga, err = a.Acquire(ctx, "a", term)
	require.NoError(t, err)
	require.Len(t, ga.Leases, outbox.TotalShards, "kept until drained")
	require.Equal(t, 9, ga.Share)
	require.NoError(t, a.Release(ctx, "a", ga.Leases[9:]))
	gb, err = b.Acquire(ctx, "b", term)
	require.NoError(t, err)
	require.Len(t, gb.Leases, 9)
	require.Greater(t, gb.Leases[0].Fence, ga.Leases[0].Fence, "an owner of its own")

	require.Eventually(t, func() bool { // a goes silent: b has all of it
		gb, err = b.Acquire(ctx, "b", term)
		return err == nil && len(gb.Leases) == outbox.TotalShards
	}, soon, 50*time.Millisecond)
	stale := ga.Leases[0]
	stale.Cursor.Prev = "5:5:"
	fenced, err := a.Store(ctx, "a", []outbox.Lease{stale})
	require.NoError(t, err)
	require.Equal(t, []int16{stale.Shard}, fenced)
	require.Zero(t, one[int](t, db, `SELECT count(*) FROM outbox_shards WHERE prev::text = '5:5:'`))
	require.NoError(t, b.Leave(ctx, "b"))
	require.NoError(t, a.Leave(ctx, "a"))
	require.Zero(t, one[int](t, db, `SELECT count(*) FROM outbox_shards WHERE owner IS NOT NULL`))
	require.Zero(t, one[int](t, db, `SELECT count(*) FROM outbox_relays`))
}

func TestCursorsDoNotOutliveTheSession(t *testing.T) {
	db := outboxDB(t, 0)
	ctx := t.Context()
	log := NewOutboxLog(db)
	g, err := log.Acquire(ctx, "r", time.Minute)
	require.NoError(t, err)
	nothing := func(*outbox.Message) error { return nil }
	require.NoError(t, log.Window(ctx, spansOf(g), func(outbox.Snapshot) {}, nothing))
	// What a crash of the server does to connections; the transaction ids that the cursors know may be given out again after it.
	rawExec(t, db, `SELECT pg_terminate_backend($1), pg_terminate_backend($2)`, log.control.PgConn().PID(), log.reader.PgConn().PID())
	require.Error(t, log.Window(ctx, spansOf(g), func(outbox.Snapshot) {}, nothing))
	require.Error(t, log.Window(ctx, spansOf(g), func(outbox.Snapshot) {}, nothing), "a new reader is not trusted without the old session")
	_, err = log.Store(ctx, "r", g.Leases)
	require.Error(t, err)
	_, err = log.Store(ctx, "r", g.Leases)
	require.ErrorIs(t, err, errSession, "Store makes no session of its own")
	g, err = log.Acquire(ctx, "r", time.Minute)
	require.NoError(t, err)
	require.NoError(t, log.Window(ctx, spansOf(g), func(outbox.Snapshot) {}, nothing))
	require.NoError(t, log.Leave(ctx, "r"))
}

func TestAWindowThatIsBrokenOffComesBackAtOnce(t *testing.T) {
	db := outboxDB(t, 0)
	ctx := t.Context()
	rawExec(t, db, `INSERT INTO outbox (shard, message_id, topic, payload) SELECT 0, gen_random_uuid(), 't', convert_to(repeat('x', 500), 'UTF8') FROM generate_series(1, 50000)`)
	log := NewOutboxLog(db)
	g, err := log.Acquire(ctx, "r", time.Minute)
	require.NoError(t, err)
	enough := errors.New("enough")
	n := 0
	var next outbox.Snapshot
	var last int64
	err = log.Window(ctx, spansOf(g), func(s outbox.Snapshot) { next = s }, func(m *outbox.Message) error {
		last = m.RowID
		if n++; n == 1000 {
			return enough
		}
		return nil
	})
	require.Equal(t, enough, err, "the caller's error as it is")
	forward(t, db, raw("k", "beyond the window"))
	n = 0
	from := outbox.Cursor{Prev: g.Leases[0].Cursor.Prev, Next: next, After: last}
	all := make([]int16, outbox.TotalShards)
	for i := range all {
		all[i] = int16(i)
	}
	require.NoError(t, log.Window(ctx, []outbox.Span{{Shards: all, From: from}}, func(outbox.Snapshot) {}, func(*outbox.Message) error { n++; return nil }))
	require.Equal(t, 49000, n, "the rest of that window, and not what came after it")
	require.NoError(t, log.Leave(ctx, "r"))
}

func TestBacklogCountsAndEstimates(t *testing.T) {
	db := outboxDB(t, 0)
	b, err := db.OutboxBacklog(t.Context())
	require.NoError(t, err)
	require.Equal(t, outbox.Backlog{}, b)
	forward(t, db, raw("a", "1"), raw("b", "2"))
	b, err = db.OutboxBacklog(t.Context())
	require.NoError(t, err)
	require.EqualValues(t, 2, b.Rows)
	require.InDelta(t, 0, b.OldestSeconds, 5)
	old := events.NewID()
	copy(old[:], []byte{0x01, 0x90, 0, 0, 0, 0}) // 2024
	rawExec(t, db, `UPDATE outbox SET message_id = $1 WHERE id = 1`, old)
	b, err = db.OutboxBacklog(t.Context())
	require.NoError(t, err)
	require.Greater(t, b.OldestSeconds, 365*24*3600.0)
	rawExec(t, db, `INSERT INTO outbox (shard, message_id, topic) SELECT i % 18, $1, 't' FROM generate_series(1, 25000) AS i`, old)
	b, err = db.OutboxBacklog(t.Context())
	require.NoError(t, err)
	require.InDelta(t, 25002, b.Rows, 100)
}

func TestPlansOfTheRelayStayAlongTheIndex(t *testing.T) {
	db := outboxDB(t, 5000)
	rawExec(t, db, `INSERT INTO outbox (shard, message_id, topic, payload) SELECT i % 18, gen_random_uuid(), 't', '' FROM generate_series(1, 50000) AS i`)
	rawExec(t, db, `ANALYZE outbox`)
	c, err := db.pools[Relay].Acquire(t.Context())
	require.NoError(t, err)
	defer c.Release()
	for name, q := range map[string]struct {
		sql  string
		args []any
	}{
		"window":  {readWindow, []any{[]int16{0, 1}, "100:200:100,101"}},
		"resumed": {resumeWindow, []any{[]int16{0, 1}, "100:200:100,101", "300:300:", int64(7)}},
		"backlog": {countBacklog, []any{[]int16{0, 1}, "100:200:100,101", "", int64(0), 10}},
	} {
		t.Run(name, func(t *testing.T) {
			rows, err := c.Query(t.Context(), "EXPLAIN "+q.sql, append([]any{pgx.QueryExecModeSimpleProtocol}, q.args...)...)
			require.NoError(t, err)
			var plan []string
			require.NoError(t, eachRow(rows, func(r pgx.Rows) error {
				var line string
				err := r.Scan(&line)
				plan = append(plan, line)
				return err
			}))
			text := strings.Join(plan, "\n")
			require.NotContains(t, text, "Seq Scan", text)
			require.Regexp(t, `Index Cond: \(\(?xid >= `, text)
			require.Regexp(t, `Index Cond: \(\(?xid = `, text)
			require.NotContains(t, text, "Filter: (xid", text)
		})
	}
}

// stressWriters write versions of keys under the lock of the key's row: with early xids and late locks, savepoints and rollbacks.
type stressWriters struct {
	db        *DB
	committed atomic.Int64
	stop      atomic.Bool
	wg        sync.WaitGroup
	slowest   atomic.Int64 // µs of one insert
}

const stressKeys = 200

func (s *stressWriters) start(tb testing.TB, n int) {
	tb.Helper()
	rawExec(tb, s.db, `CREATE TABLE agg (key int PRIMARY KEY, v int NOT NULL)`)
	rawExec(tb, s.db, `INSERT INTO agg SELECT g, 0 FROM generate_series(0, $1) AS g`, stressKeys-1)
	for range n {
		s.wg.Go(func() {
			for !s.stop.Load() {
				if err := s.write(tb.Context()); err != nil {
					tb.Error(err)
					return
				}
			}
		})
	}
}

var errRollback = errors.New("roll back")

func (s *stressWriters) write(ctx context.Context) error {
	k := rand.IntN(stressKeys)
	early, savepoint, wait, rollback := rand.IntN(3) == 0, rand.IntN(5) == 0, rand.IntN(20) == 0, rand.IntN(10) == 0
	err := s.db.For(Consumers).InTx(ctx, func(ctx context.Context, tx *Tx) error {
		if early { // an xid drawn long before the lock: xids and commits in different order
			if err := tx.query(ctx, "xid", `SELECT pg_current_xact_id()::text`, nil, func(pgx.Rows) error { return nil }); err != nil {
				return err
			}
			pause(time.Duration(rand.IntN(3000)) * time.Microsecond)
		}
		var v int
		err := tx.query(ctx, "lock", `UPDATE agg SET v = v + 1 WHERE key = $1 RETURNING v`, []any{k}, func(r pgx.Rows) error { return r.Scan(&v) })
		if err != nil {
			return err
		}
		if savepoint {
			tx.queue("savepoint", "SAVEPOINT s")
		}
		key := "k" + strconv.Itoa(k)
		if err := tx.Forward(ctx, []events.Raw{raw(key, fmt.Sprintf("%s#%d", key, v))}); err != nil {
			return err
		}
		if savepoint {
			tx.queue("release", "RELEASE SAVEPOINT s")
		}
		began := time.Now()
		if err := tx.send(ctx, false); err != nil {
			return err
		}
		if us := time.Since(began).Microseconds(); us > s.slowest.Load() {
			s.slowest.Store(us)
		}
		if wait {
			pause(time.Duration(rand.IntN(5000)) * time.Microsecond)
		}
		if rollback {
			return errRollback
		}
		return nil
	})
	if err == nil {
		s.committed.Add(1)
	}
	if errors.Is(err, errRollback) {
		return nil
	}
	return err
}

// pause is part of what is tested: a transaction that takes its time.
func pause(d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	<-t.C
}

func (s *stressWriters) finish() {
	s.stop.Store(true)
	s.wg.Wait()
}

// openTx is a transaction that has written to the outbox and stays open.
func openTx(tb testing.TB, db *DB, values ...string) pgx.Tx {
	tb.Helper()
	tx, err := db.pools[Operators].Begin(tb.Context())
	require.NoError(tb, err)
	for _, v := range values {
		_, err = tx.Exec(tb.Context(), `INSERT INTO outbox (shard, message_id, topic, key, payload) VALUES (16, $1, 't', 'idle', $2)`, events.NewID(), []byte(v))
		require.NoError(tb, err)
	}
	return tx
}

func requireOrder(tb testing.TB, values []string) {
	tb.Helper()
	last := map[string]int{}
	for _, v := range firsts(values) {
		key, num, _ := strings.Cut(v, "#")
		n, err := strconv.Atoi(num)
		require.NoError(tb, err)
		before, ok := last[key]
		require.Truef(tb, !ok || n > before, "%s came after %s#%d", v, key, before)
		last[key] = n
	}
}

// TestF1_F3_StressLosesInvertsAndRepeatsNothing ports the trial that the cursor's design rests on, with relays that come and go in order
// and partitions that turn over while it runs.
func TestF1_F3_StressLosesInvertsAndRepeatsNothing(t *testing.T) {
	db := outboxDB(t, 2000)
	s := &stressWriters{db: db}
	commit, rollback := openTx(t, db, "idle#1"), openTx(t, db, "never#1")
	s.start(t, 8)
	kafka := &sink{}
	seconds := 6 * time.Second
	if testing.Short() {
		seconds = 3 * time.Second
	}
	deadline := time.Now().Add(seconds)
	var made, dropped int
	var stops []func()
	for time.Now().Before(deadline) {
		_, stop := startRelay(t, NewOutboxLog(db), kafka, outbox.Config{Wake: db.Wake()}, nil)
		stops = append(stops, stop)
		if len(stops) > 3 {
			stops[0]()
			stops = stops[1:]
		}
		m, err := db.MaintainOutbox(t.Context(), 2000)
		require.NoError(t, err)
		made, dropped = made+len(m.Made), dropped+len(m.Dropped)
		pause(400 * time.Millisecond)
	}
	require.NoError(t, commit.Commit(t.Context()))
	require.NoError(t, rollback.Rollback(t.Context()))
	s.finish()
	want := int(s.committed.Load()) + 1
	require.Eventually(t, func() bool { return len(firsts(kafka.got())) >= want }, soon, tick)
	for _, stop := range stops {
		stop()
	}
	got := kafka.got()
	require.Len(t, firsts(got), want, "nothing lost, nothing that was rolled back")
	require.Len(t, got, want, "nothing twice without a crash")
	requireOrder(t, got)
	require.Positive(t, made, "partitions turned over")
	b, err := db.OutboxBacklog(t.Context())
	require.NoError(t, err)
	require.Zero(t, b.Rows)
	// A shard that changed hands while the two transactions were open, and whose new owner stopped before it read, keeps the partitions until the next.
	_, stop := startRelay(t, NewOutboxLog(db), kafka, outbox.Config{IdleStoreEvery: 50 * time.Millisecond}, nil)
	defer stop()
	require.Eventually(t, func() bool {
		m, err := db.MaintainOutbox(t.Context(), 2000)
		require.NoError(t, err)
		dropped += len(m.Dropped)
		return dropped > 0
	}, soon, 10*tick)
	require.Len(t, kafka.got(), want, "nothing is left for it")
	t.Logf("%d rows, %d partitions made, %d dropped, slowest insert %d µs", want, made, dropped, s.slowest.Load())
}

func TestF2_AnOpenTransactionDelaysNobodyElse(t *testing.T) {
	db := outboxDB(t, 0)
	kafka := &sink{}
	_, stop := startRelay(t, NewOutboxLog(db), kafka, outbox.Config{Wake: db.Wake()}, nil)
	defer stop()
	open := openTx(t, db, "idle#1")
	forward(t, db, raw("k", "first"))
	require.Eventually(t, func() bool { return kafka.count() == 1 }, soon, tick)
	var worst time.Duration
	for i := range 200 {
		began := time.Now()
		forward(t, db, raw("k", "k#"+strconv.Itoa(i)))
		for kafka.count() < i+2 {
			pause(200 * time.Microsecond)
			require.Less(t, time.Since(began), soon)
		}
		worst = max(worst, time.Since(began))
	}
	require.Less(t, worst, time.Second)
	require.NoError(t, open.Commit(t.Context()))
	require.Eventually(t, func() bool { return slices.Contains(kafka.got(), "idle#1") }, soon, tick)
	require.Len(t, kafka.got(), 202)
}

// crashLog is a log whose relay can be killed: from then on no call gets through.
type crashLog struct {
	*OutboxLog
	dead    atomic.Bool
	noStore atomic.Bool
	paused  atomic.Pointer[chan struct{}]
}

var errCrashed = errors.New("crashed")

func (l *crashLog) gate() error {
	if c := l.paused.Load(); c != nil {
		<-*c
	}
	if l.dead.Load() {
		return errCrashed
	}
	return nil
}

func (l *crashLog) Acquire(ctx context.Context, relay string, term time.Duration) (outbox.Grant, error) {
	if err := l.gate(); err != nil {
		return outbox.Grant{}, err
	}
	return l.OutboxLog.Acquire(ctx, relay, term)
}

func (l *crashLog) Store(ctx context.Context, relay string, leases []outbox.Lease) ([]int16, error) {
	if err := l.gate(); err != nil || l.noStore.Load() {
		return nil, err
	}
	return l.OutboxLog.Store(ctx, relay, leases)
}

func (l *crashLog) Window(ctx context.Context, spans []outbox.Span, begin func(outbox.Snapshot), each func(*outbox.Message) error) error {
	if err := l.gate(); err != nil {
		return err
	}
	return l.OutboxLog.Window(ctx, spans, begin, func(m *outbox.Message) error {
		if err := l.gate(); err != nil {
			return err
		}
		return each(m)
	})
}

func (l *crashLog) Leave(ctx context.Context, relay string) error {
	if l.dead.Load() {
		return l.OutboxLog.Leave(ctx, "nobody") // closes the connections, as the crash did
	}
	return l.OutboxLog.Leave(ctx, relay)
}

func TestF4_ACrashBetweenProduceAndStoreRepeatsWithTheSameIDs(t *testing.T) {
	db := outboxDB(t, 0)
	kafka := &sink{}
	log := &crashLog{OutboxLog: NewOutboxLog(db)}
	log.noStore.Store(true)
	order := events.NewID()
	emit := func(from, to int) {
		require.NoError(t, db.For(Consumers).InTx(t.Context(), func(ctx context.Context, tx *Tx) error {
			var out []events.Envelope
			for i := from; i < to; i++ {
				seq := int32(i + 1)
				out = append(out, events.Envelope{
					ID: events.NewID(), Type: events.TOrderConfirmed, OrderID: order, Sequence: seq,
					Data: &events.OrderEvent{OrderID: order.String(), Sequence: seq, Status: "confirmed"},
				})
			}
			return tx.Emit(ctx, out)
		}))
	}
	cfg := outbox.Config{Wake: db.Wake(), LeaseTerm: time.Second}
	_, stop := startRelay(t, log, kafka, cfg, nil)
	emit(0, 50)
	require.Eventually(t, func() bool { return kafka.count() == 50 }, soon, tick)
	log.dead.Store(true)
	stop()
	emit(50, 60)
	_, stop = startRelay(t, NewOutboxLog(db), kafka, cfg, nil)
	defer stop()
	require.Eventually(t, func() bool { return kafka.count() == 110 }, soon, tick)
	require.Len(t, firsts(kafka.ids), 60)
	require.Equal(t, kafka.ids[:50], kafka.ids[50:100])
	require.Len(t, firsts(kafka.got()), 60)
}

func TestF3_ARelayPausedBeyondItsLeaseIsFencedWhenItWakes(t *testing.T) {
	db := outboxDB(t, 0)
	kafka := &sink{}
	var first, second listener
	log := &crashLog{OutboxLog: NewOutboxLog(db)}
	cfg := outbox.Config{LeaseTerm: time.Second, CallTimeout: time.Minute} // a call that slept goes on when it wakes
	s := &stressWriters{db: db}
	_, stop := startRelay(t, log, kafka, cfg, &first)
	s.start(t, 4)
	require.Eventually(t, func() bool { return kafka.count() > 200 }, soon, tick)
	wake := make(chan struct{})
	log.paused.Store(&wake) // in the middle of whatever it does
	_, stop2 := startRelay(t, NewOutboxLog(db), kafka, cfg, &second)
	n := kafka.count()
	require.Eventually(t, func() bool { return kafka.count() > n+1000 }, soon, tick)
	log.paused.Store(nil)
	close(wake)
	require.Eventually(t, func() bool { fenced, _, _ := first.heard(); return fenced > 0 }, soon, tick)
	n = kafka.count()
	require.Eventually(t, func() bool { return kafka.count() > n+200 }, soon, tick)
	s.finish()
	require.Eventually(t, func() bool { return len(firsts(kafka.got())) >= int(s.committed.Load()) }, soon, tick)
	stop()
	stop2()
	got := kafka.got()
	require.Len(t, firsts(got), int(s.committed.Load()))
	requireOrder(t, got)
	b, err := db.OutboxBacklog(t.Context())
	require.NoError(t, err)
	require.Zero(t, b.Rows, "no cursor was turned back")
	t.Logf("%d rows, %d of them twice", s.committed.Load(), len(got)-int(s.committed.Load()))
}

// TestF21_KillingPostgresUnderTheRelayLosesNothing: a server that crashed gives transaction ids out again whose log had not reached the
// disk, and the relay's own stores are such: cursors from before the crash must not be believed.
func TestF21_KillingPostgresUnderTheRelayLosesNothing(t *testing.T) {
	pg := testenv.PostgresServer(t)
	db, err := Open(t.Context(), Config{URL: pg.URL(), AcquireTimeout: time.Second, ConnectTimeout: time.Second})
	require.NoError(t, err)
	t.Cleanup(db.Close)
	_, err = Migrate(t.Context(), db, Up)
	require.NoError(t, err)
	kafka := &sink{}
	_, stop := startRelay(t, NewOutboxLog(db), kafka, outbox.Config{Wake: db.Wake(), StoreEvery: 20 * time.Millisecond}, nil)
	defer stop()
	var mu sync.Mutex
	var committed []string
	var wg sync.WaitGroup
	var end atomic.Bool
	for w := range 4 {
		wg.Go(func() {
			key := "w" + strconv.Itoa(w)
			for i := 0; !end.Load(); i++ {
				v := fmt.Sprintf("%s#%d", key, i)
				err := db.For(Consumers).InTx(t.Context(), func(ctx context.Context, tx *Tx) error { return tx.Forward(ctx, []events.Raw{raw(key, v)}) })
				if err != nil {
					pause(5 * time.Millisecond) // whether it took effect is not known
					continue
				}
				mu.Lock()
				committed = append(committed, v)
				mu.Unlock()
			}
		})
	}
	for range 3 {
		n := kafka.count()
		require.Eventually(t, func() bool { return kafka.count() > n+300 }, soon, tick)
		require.NoError(t, pg.Kill())
		require.NoError(t, pg.Restart(t.Context()))
	}
	n := kafka.count()
	require.Eventually(t, func() bool { return kafka.count() > n+300 }, 2*soon, tick)
	end.Store(true)
	wg.Wait()
	require.Eventually(t, func() bool { b, err := db.OutboxBacklog(t.Context()); return err == nil && b.Rows == 0 }, soon, tick)
	got := kafka.got()
	require.Subset(t, toSet(got), toSet(committed), "every row that was committed")
	requireOrder(t, got)
}

func toSet(values []string) map[string]bool {
	out := make(map[string]bool, len(values))
	for _, v := range values {
		out[v] = true
	}
	return out
}

func TestF38_DroppingAPartitionNeverStallsInserts(t *testing.T) {
	db := outboxDB(t, 1000)
	kafka := &sink{}
	_, stop := startRelay(t, NewOutboxLog(db), kafka, outbox.Config{Wake: db.Wake(), IdleStoreEvery: 300 * time.Millisecond}, nil)
	defer stop()
	burn(t, db, 1500)
	forward(t, db, raw("k", "k#0"))
	// The open transaction has read the outbox, all partitions of it: it holds a lock on those that could go.
	open, err := db.pools[Operators].Begin(t.Context())
	require.NoError(t, err)
	_, err = open.Exec(t.Context(), `SELECT count(*) FROM outbox`)
	require.NoError(t, err)
	s := &stressWriters{db: db}
	s.start(t, 4)
	var blocked int
	require.Eventually(t, func() bool {
		m, err := db.MaintainOutbox(t.Context(), 1000)
		require.NoError(t, err)
		require.Empty(t, m.Dropped)
		blocked += len(m.Blocked)
		return blocked >= 5
	}, soon, 100*time.Millisecond)
	require.NoError(t, open.Commit(t.Context()))
	require.Eventually(t, func() bool {
		m, err := db.MaintainOutbox(t.Context(), 1000)
		require.NoError(t, err)
		return len(m.Dropped) > 0
	}, soon, 100*time.Millisecond)
	s.finish()
	slowest := time.Duration(s.slowest.Load()) * time.Microsecond
	t.Logf("slowest of %d inserts: %v", s.committed.Load(), slowest)
	require.Less(t, slowest, 400*time.Millisecond, "50 ms of waiting behind the DROP and a busy machine's own")
	require.Eventually(t, func() bool { return len(firsts(kafka.got())) >= int(s.committed.Load())+1 }, soon, tick)
	requireOrder(t, kafka.got())
}

// burn uses up n transaction ids.
func burn(tb testing.TB, db *DB, n int) {
	tb.Helper()
	rawExec(tb, db, fmt.Sprintf(`DO $$ BEGIN FOR i IN 1..%d LOOP PERFORM pg_current_xact_id(); COMMIT; END LOOP; END $$`, n))
}

func TestAWriterThatFindsNoPartitionMakesIt(t *testing.T) {
	db := outboxDB(t, 100)
	burn(t, db, 5000) // maintenance is far behind
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			err := db.For(Consumers).InTx(t.Context(), func(ctx context.Context, tx *Tx) error {
				return tx.Forward(ctx, []events.Raw{raw("k", strconv.Itoa(i))})
			})
			if err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	require.Equal(t, 8, one[int](t, db, `SELECT count(*) FROM outbox`))
	n := one[int](t, db, `SELECT count(*) FROM pg_inherits WHERE inhparent = 'outbox'::regclass`)
	require.LessOrEqual(t, n, 8, "a leap of transaction ids is one partition, not fifty")
}

type refusal struct{}

func (refusal) Error() string { return "MESSAGE_TOO_LARGE" }
func (refusal) Refused() bool { return true }

func TestF39_ARecordThatKafkaRefusesIsADeadLetterAndItsShardGoesOn(t *testing.T) {
	db := outboxDB(t, 0)
	big := strings.Repeat("x", 2000)
	kafka := &sink{judge: func(r events.Record) error {
		if len(r.Value) > 1000 {
			return refusal{}
		}
		return nil
	}}
	var h listener
	_, stop := startRelay(t, NewOutboxLog(db), kafka, outbox.Config{Wake: db.Wake()}, &h)
	defer stop()
	message, order := events.NewID(), events.NewID()
	copyOf := events.Raw{
		Topic: "retry.order-commands.5s", Key: []byte(order.String()), Value: []byte(big),
		Headers: []events.Header{
			{Key: events.HeaderType, Value: []byte("ordersaga.orders.v1.PlaceOrder")},
			{Key: consumers.HeaderMessageID, Value: []byte(message.String())}, {Key: consumers.HeaderTicket, Value: []byte("77")},
			{Key: consumers.HeaderAttempt, Value: []byte("3")}, {Key: consumers.HeaderOrigin, Value: []byte("orders.commands.v1/4/99")},
		},
	}
	dlq := events.Raw{Topic: "dlq.stock", Key: []byte(order.String()), Value: []byte(big)}
	require.NoError(t, db.For(Consumers).InTx(t.Context(), func(ctx context.Context, tx *Tx) error {
		err := tx.SaveInbox(ctx, "order-commands", []consumers.InboxRow{{MessageID: message, State: consumers.InboxWaiting, Ticket: 77, New: true}})
		return errors.Join(err,
			tx.Forward(ctx, []events.Raw{raw(order.String(), "before"), copyOf, dlq, raw(order.String(), "after")}),
			tx.Emit(ctx, []events.Envelope{{
				ID: message, Type: events.TPlaceOrder, OrderID: order,
				Data: &events.PlaceOrder{OrderID: order.String(), CustomerID: big},
			}}))
	}))
	require.Eventually(t, func() bool { _, aside, _ := h.heard(); return aside == 3 }, soon, tick)
	require.Eventually(t, func() bool { return kafka.count() == 3 }, soon, tick)
	require.Equal(t, []string{"before", "", "after"}, kafka.got(), "the dead letter's record went without its value")

	page, _, err := db.DeadLetters(t.Context(), consumers.DeadFilter{}, "", 10)
	require.NoError(t, err)
	require.Len(t, page, 1, "both are the same message to the same group")
	d := page[0]
	require.Equal(t, consumers.ClassTooLarge, d.Class)
	require.Equal(t, events.GroupOrderCommands, d.Group)
	require.Equal(t, message, d.MessageID)
	require.Equal(t, order, d.OrderID)
	require.Equal(t, "PlaceOrder", d.Type)
	require.Contains(t, d.Error, "MESSAGE_TOO_LARGE")
	require.Equal(t, "dead", one[string](t, db, `SELECT state FROM inbox WHERE message_id = $1`, message), "a replay may follow")
	require.Eventually(t, func() bool { b, err := db.OutboxBacklog(t.Context()); return err == nil && b.Rows == 0 }, soon, tick)
}

func TestDescribesTheCopyThatKafkaRefused(t *testing.T) {
	require.Equal(t, consumers.Place{Topic: "a.b", Partition: 4, Offset: 99}, originOf("a.b/4/99", consumers.Place{}))
	for _, bad := range []string{"", "a", "a/1", "/1/2", "a/x/2"} {
		require.Equal(t, consumers.Place{Topic: "t"}, originOf(bad, consumers.Place{Topic: "t"}), bad)
	}
}

func TestNextPartitions(t *testing.T) {
	for name, c := range map[string]struct {
		end, latest, span int64
		want              []outboxPartition
	}{
		"enough":   {3000, 1000, 1000, nil},
		"one":      {3000, 1001, 1000, []outboxPartition{{"outbox_p3000", 3000, 4000}}},
		"behind":   {1000, 2500, 1000, []outboxPartition{{"outbox_p1000", 1000, 2000}, {"outbox_p2000", 2000, 3000}, {"outbox_p3000", 3000, 4000}, {"outbox_p4000", 4000, 5000}}},
		"far away": {1000, 900_000, 1000, []outboxPartition{{"outbox_p1000", 1000, 901_000}, {"outbox_p901000", 901_000, 902_000}}},
	} {
		require.Equal(t, c.want, nextPartitions(c.end, c.latest, c.span), name)
	}
}

func TestRelayDrainsABigBacklogInBoundedMemory(t *testing.T) {
	rows := 100_000
	if testing.Short() {
		rows = 20_000
	}
	db := outboxDB(t, 0)
	fillOutbox(t, db, rows)
	kafka := &sink{null: true}
	peak := drainOutbox(t, db, kafka, rows)
	require.Equal(t, rows, kafka.count())
	require.Less(t, peak, uint64(120<<20), "not a matter of the backlog's size")
}

// A process with a name of its own does not wait for the leases of the one it replaces (F33); others' stay theirs.
func TestF33_ANamedRelayTakesOverFromItsPredecessorAtOnce(t *testing.T) {
	db := outboxDB(t, 0)
	const term = time.Minute
	ctx := context.WithoutCancel(t.Context()) // the relays leave at the end
	before := NewOutboxLog(db)
	defer func() { require.NoError(t, before.Leave(ctx, "one/aaaaaaaa")) }()
	held, err := before.Acquire(t.Context(), "one/aaaaaaaa", term)
	require.NoError(t, err)
	require.Len(t, held.Leases, outbox.TotalShards)

	after := NewOutboxLog(db)
	defer func() { require.NoError(t, after.Leave(ctx, "one/cccccccc")) }()
	require.NoError(t, db.RetireRelays(t.Context(), "other"))
	got, err := after.Acquire(t.Context(), "one/cccccccc", term)
	require.NoError(t, err)
	require.Empty(t, got.Leases, "the leases have not expired")

	require.NoError(t, db.RetireRelays(t.Context(), "one"))
	got, err = after.Acquire(t.Context(), "one/cccccccc", term)
	require.NoError(t, err)
	require.Len(t, got.Leases, outbox.TotalShards)
	fenced, err := before.Store(t.Context(), "one/aaaaaaaa", held.Leases)
	require.NoError(t, err)
	require.Len(t, fenced, outbox.TotalShards, "the predecessor, should it wake, is fenced")
}
