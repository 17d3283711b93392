package postgres

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/url"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/stretchr/testify/require"

	"ordersaga/adapters/embedded/testenv"
	"ordersaga/domain"
	"ordersaga/events"
)

// trips counts pipelines, and keeps what was in them.
type trips struct {
	mu      sync.Mutex
	batches [][]string
}

// take answers the pipelines since it was last asked.
func (t *trips) take() [][]string {
	t.mu.Lock()
	defer t.mu.Unlock()
	out := t.batches
	t.batches = nil
	return out
}

func (t *trips) TraceQueryStart(ctx context.Context, _ *pgx.Conn, d pgx.TraceQueryStartData) context.Context {
	return ctx
}
func (t *trips) TraceQueryEnd(context.Context, *pgx.Conn, pgx.TraceQueryEndData) {}

func (t *trips) TraceBatchStart(ctx context.Context, _ *pgx.Conn, d pgx.TraceBatchStartData) context.Context {
	var sqls []string
	for _, q := range d.Batch.QueuedQueries {
		sqls = append(sqls, q.SQL)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.batches = append(t.batches, sqls)
	return ctx
}
func (t *trips) TraceBatchQuery(context.Context, *pgx.Conn, pgx.TraceBatchQueryData) {}
func (t *trips) TraceBatchEnd(context.Context, *pgx.Conn, pgx.TraceBatchEndData)     {}

func TestTransactionsTakeNoMoreRoundTripsThanReads(t *testing.T) {
	tr := &trips{}
	db := newDB(t, func(c *Config) { c.Tracer = tr })
	ctx := t.Context()

	before := db.Pool(Consumers).Stat().AcquireCount()
	require.NoError(t, db.For(Consumers).InTx(ctx, func(context.Context, *Tx) error { return nil }))
	require.Equal(t, before, db.Pool(Consumers).Stat().AcquireCount(), "nothing queued: no connection")
	require.Empty(t, tr.batches)

	require.NoError(t, db.For(Consumers).InTx(ctx, func(ctx context.Context, tx *Tx) error {
		return errors.Join(tx.SetAway(ctx, "a", true), tx.SetAway(ctx, "b", true))
	}))
	require.Len(t, tr.batches, 1)
	require.Len(t, tr.batches[0], 2, "writes only: one pipeline, which is one transaction without being told")
	require.Equal(t, 2, one[int](t, db, `SELECT count(*) FROM outages`))
	require.Equal(t, 1, one[int](t, db, `SELECT count(DISTINCT xmin::text) FROM outages`))

	tr.batches = nil
	require.NoError(t, db.For(Consumers).InTx(ctx, func(ctx context.Context, tx *Tx) error {
		if err := tx.SetAway(ctx, "c", true); err != nil {
			return err
		}
		away, err := tx.Away(ctx)
		require.Equal(t, map[string]bool{"a": true, "b": true, "c": true}, away, "a read sees what was queued before it")
		return errors.Join(err, tx.SetAway(ctx, "a", false))
	}))
	require.Len(t, tr.batches, 2)
	require.Equal(t, "begin", tr.batches[0][0])
	require.Equal(t, "commit", tr.batches[1][len(tr.batches[1])-1])
}

func TestRollbackLeavesNothing(t *testing.T) {
	db := newDB(t)
	enough := errors.New("enough")
	for name, fn := range map[string]func(ctx context.Context, tx *Tx) error{
		"before anything was sent": func(ctx context.Context, tx *Tx) error {
			return errors.Join(tx.SetAway(ctx, "x", true), enough)
		},
		"after a read": func(ctx context.Context, tx *Tx) error {
			if err := tx.SetAway(ctx, "x", true); err != nil {
				return err
			}
			away, err := tx.Away(ctx)
			require.True(t, away["x"])
			return errors.Join(err, enough)
		},
		"a later statement fails": func(ctx context.Context, tx *Tx) error {
			tx.queue("divide", `SELECT 1/$1::int`, 0)
			return tx.SetAway(ctx, "x", true)
		},
		"an error that was swallowed": func(ctx context.Context, tx *Tx) error {
			if err := tx.SetAway(ctx, "x", true); err != nil {
				return err
			}
			err := tx.query(ctx, "divide", `SELECT 1/$1::int`, []any{0}, func(pgx.Rows) error { return nil })
			require.Error(t, err)
			return nil
		},
		"a panic": func(ctx context.Context, tx *Tx) (err error) {
			if err := tx.SetAway(ctx, "x", true); err != nil {
				return err
			}
			_, err = tx.Away(ctx)
			require.NoError(t, err)
			panic(enough)
		},
	} {
		t.Run(name, func(t *testing.T) {
			err := func() (err error) {
				defer func() {
					if p := recover(); p != nil {
						err = fmt.Errorf("panic: %v", p)
					}
				}()
				return db.For(Consumers).InTx(t.Context(), fn)
			}()
			require.Error(t, err)
			require.Zero(t, one[int](t, db, `SELECT count(*) FROM outages`))
			require.Zero(t, one[int](t, db, `SELECT count(*) FROM pg_stat_activity WHERE state LIKE 'idle in transaction%' AND datname = current_database()`))
		})
	}
}

func TestErrorsNameTheStatement(t *testing.T) {
	db := newDB(t)
	inTx := func(fn func(tx *Tx)) error {
		return db.For(Consumers).InTx(t.Context(), func(_ context.Context, tx *Tx) error { fn(tx); return nil })
	}
	err := inTx(func(tx *Tx) {
		tx.queue("first", `SELECT 1`)
		tx.queue("second", `SELECT 1/$1::int`, 0)
		tx.queue("third", `SELECT 1`)
	})
	require.ErrorContains(t, err, "postgres: second: ")
	require.True(t, isDataError(err), "22012 is the data's fault")
	require.Empty(t, outageOf(err))

	err = inTx(func(tx *Tx) {
		tx.queue("first", `SELECT 1`)
		tx.queue("second", `SELECT * FROM not_there`)
	})
	require.ErrorContains(t, err, "postgres: second: ", "a statement that can't even be prepared")
	require.ErrorContains(t, err, "run ordersaga migrate up")
	require.Equal(t, "postgres", outageOf(err), "no record is at fault for a missing table")

	err = inTx(func(tx *Tx) { tx.queue("only", `SELECT 'x'::text || $1`, "a\x00b") })
	require.ErrorContains(t, err, "postgres: only: ")
	require.True(t, isDataError(err))
}

func outageOf(err error) string {
	var o interface{ Outage() string }
	if errors.As(err, &o) {
		return o.Outage()
	}
	return ""
}

func isDataError(err error) bool {
	var d interface{ DataError() bool }
	return errors.As(err, &d) && d.DataError()
}

func TestClassesOfErrors(t *testing.T) {
	for _, tc := range []struct {
		code, table   string
		outage, data  bool
		startOver     bool
		messageOfCode string
	}{
		{code: "08006", outage: true},
		{code: "57P01", outage: true},
		{code: "57P02", outage: true},
		{code: "57P03", outage: true},
		{code: "57014", outage: true},
		{code: "53300", outage: true},
		{code: "53100", outage: true}, // F22: disk full
		{code: "53200", outage: true},
		{code: "58030", outage: true},
		{code: "25006", outage: true}, // a standby
		{code: "25P03", outage: true, startOver: true},
		{code: "42P01", outage: true}, // not migrated
		{code: "22001", data: true},
		{code: "23514", data: true},
		{code: "23502", data: true},
		{code: "54000", data: true},
		{code: "23505", table: "orders", data: true, startOver: true},
		{code: "23505", table: "inbox_20260101", data: true, startOver: true},
		{code: "23505", table: "barriers", data: true, startOver: true},
		{code: "23505", table: "idempotency_keys", data: true, startOver: true},
		{code: "23505", table: "saga_history", data: true},
		{code: "23505", table: "ordersomething", data: true},
		{code: "40001", startOver: true},
		{code: "40P01", startOver: true},
		{code: "55P03", startOver: true},
		{code: "0A000", messageOfCode: "cached plan must not change result type", startOver: true},
		{code: "XX000"},
	} {
		t.Run(tc.code+tc.table, func(t *testing.T) {
			err := classify(t.Context(), "s", &pgconn.PgError{Code: tc.code, TableName: tc.table, Message: tc.messageOfCode})
			require.Equal(t, tc.outage, outageOf(err) == "postgres")
			require.Equal(t, tc.data, isDataError(err))
			require.Equal(t, tc.startOver, retryable(err))
			require.Same(t, err, classify(t.Context(), "outer", err), "classified once")
		})
	}
}

// A process that was frozen in the middle of a transaction: the server has rolled it back, and the locks went to somebody else. Awake
// again, it starts over.
func TestF05_FrozenTransactionGivesItsLocksBackAndStartsOver(t *testing.T) {
	db := newDB(t)
	var limit string
	require.NoError(t, db.Pool(Consumers).QueryRow(t.Context(), `SELECT current_setting('idle_in_transaction_session_timeout')`).Scan(&limit))
	require.Equal(t, "8s", limit)
	rawExec(t, db, `INSERT INTO stock VALUES ('a', 10, 0, 0)`)
	none := func(pgx.Rows) error { return nil }
	const lock = `SELECT 1 FROM stock WHERE sku = 'a' FOR NO KEY UPDATE`
	attempts := 0
	require.NoError(t, db.For(Consumers).InTx(t.Context(), func(ctx context.Context, tx *Tx) error {
		if attempts++; attempts == 1 {
			if err := tx.query(ctx, "limit", `SELECT set_config('idle_in_transaction_session_timeout', '50ms', true)`, nil, none); err != nil {
				return err
			}
		}
		if err := tx.query(ctx, "lock", lock, nil, none); err != nil {
			return err
		}
		if attempts == 1 { // frozen: meanwhile somebody else gets the row
			if err := db.For(Consumers).InTx(ctx, func(ctx context.Context, other *Tx) error { return other.query(ctx, "lock", lock, nil, none) }); err != nil {
				return err
			}
		}
		return tx.query(ctx, "again", lock, nil, none)
	}))
	require.Equal(t, 2, attempts)
}

// Two transactions that lock two rows in opposite order: the server kills one, which starts over, and both come through.
func TestDeadlockStartsOver(t *testing.T) {
	db := newDB(t)
	rawExec(t, db, `INSERT INTO stock VALUES ('a', 10, 0, 0), ('b', 10, 0, 0)`)
	rawExec(t, db, fmt.Sprintf(`ALTER DATABASE %s SET deadlock_timeout = '20ms'`, one[string](t, db, `SELECT current_database()`)))
	db.Pool(Consumers).Reset()
	var attempts atomic.Int32
	var meet sync.WaitGroup
	meet.Add(2)
	run := func(first, second string) error {
		met := false
		return db.For(Consumers).InTx(t.Context(), func(ctx context.Context, tx *Tx) error {
			attempts.Add(1)
			const q = `SELECT 1 FROM stock WHERE sku = $1 FOR NO KEY UPDATE`
			none := func(pgx.Rows) error { return nil }
			if err := tx.query(ctx, "first", q, []any{first}, none); err != nil {
				return err
			}
			if !met {
				met = true
				meet.Done()
				meet.Wait()
			}
			return tx.query(ctx, "second", q, []any{second}, none)
		})
	}
	errs := make(chan error, 2)
	go func() { errs <- run("a", "b") }()
	go func() { errs <- run("b", "a") }()
	require.NoError(t, <-errs)
	require.NoError(t, <-errs)
	require.GreaterOrEqual(t, attempts.Load(), int32(3))
}

// Many batches with the same products in any order: with the locks taken in sorted order none ever starts over.
func TestF27_ProductsLockedInSortedOrderNeverDeadlock(t *testing.T) {
	db := newDB(t)
	skus := make([]domain.SKU, 40)
	for i := range skus {
		skus[i] = domain.SKU(fmt.Sprintf("sku-%02d", i))
		rawExec(t, db, `INSERT INTO stock VALUES ($1, 1000000, 0, 0)`, string(skus[i]))
	}
	const workers, rounds = 8, 25
	var attempts atomic.Int32
	errs := make(chan error, workers)
	for w := range workers {
		go func() {
			rnd := rand.New(rand.NewPCG(uint64(w), 1))
			errs <- func() error {
				for range rounds {
					mine := append([]domain.SKU(nil), skus...)
					rnd.Shuffle(len(mine), func(i, j int) { mine[i], mine[j] = mine[j], mine[i] })
					mine = mine[:20]
					err := db.For(Consumers).InTx(t.Context(), func(ctx context.Context, tx *Tx) error {
						attempts.Add(1)
						rows, err := tx.LockStock(ctx, mine)
						if err != nil {
							return err
						}
						var save []domain.Stock
						for _, s := range rows {
							s.Available--
							s.Reserved++
							save = append(save, *s)
						}
						return tx.SaveStock(ctx, save)
					})
					if err != nil {
						return err
					}
				}
				return nil
			}()
		}()
	}
	for range workers {
		require.NoError(t, <-errs)
	}
	require.Equal(t, int32(workers*rounds), attempts.Load(), "a transaction started over")
	require.Equal(t, int64(workers*rounds*20), one[int64](t, db, `SELECT sum(reserved)::bigint FROM stock`))
}

func TestF21_KilledBackendIsAnOutageAndTheNextTransactionWorks(t *testing.T) {
	db := newDB(t)
	err := db.For(Consumers).InTx(t.Context(), func(ctx context.Context, tx *Tx) error {
		if _, err := tx.Away(ctx); err != nil {
			return err
		}
		rawExec(t, db, `SELECT pg_terminate_backend($1)`, tx.conn.Conn().PgConn().PID())
		if err := tx.SetAway(ctx, "x", true); err != nil {
			return err
		}
		_, err := tx.Away(ctx)
		return err
	})
	require.Equal(t, "postgres", outageOf(err), "%v", err)
	require.False(t, isDataError(err))
	require.NoError(t, db.For(Consumers).InTx(t.Context(), func(ctx context.Context, tx *Tx) error { return tx.SetAway(ctx, "y", true) }))
	require.Equal(t, "y", one[string](t, db, `SELECT string_agg(dependency, ',') FROM outages`))
}

// The connection is lost while the commit is under way: whether it took effect is unknown, and that is an outage.
func TestF21_ConnectionLostDuringCommitIsAnOutage(t *testing.T) {
	db := newDB(t)
	rawExec(t, db, `CREATE FUNCTION die() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_terminate_backend(pg_backend_pid()); RETURN NULL; END'`)
	rawExec(t, db, `CREATE CONSTRAINT TRIGGER die AFTER INSERT ON outages DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION die()`)
	for name, read := range map[string]bool{"explicit": true, "pipeline": false} {
		t.Run(name, func(t *testing.T) {
			err := db.For(Consumers).InTx(t.Context(), func(ctx context.Context, tx *Tx) error {
				if read {
					if _, err := tx.Away(ctx); err != nil {
						return err
					}
				}
				return tx.SetAway(ctx, "x", true)
			})
			require.Equal(t, "postgres", outageOf(err), "%v", err)
			require.ErrorContains(t, err, "commit")
		})
	}
}

func TestF21_AllConnectionsLost(t *testing.T) {
	db := newDB(t)
	use := func() error {
		return db.For(Consumers).InTx(t.Context(), func(ctx context.Context, tx *Tx) error { _, err := tx.Away(ctx); return err })
	}
	require.NoError(t, use())
	rawExec(t, db, `SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()`)
	require.Eventually(t, func() bool { return use() == nil }, soon, 10*time.Millisecond, "the pool recovers by itself")
}

func TestAbsentServerIsAnOutage(t *testing.T) {
	_, err := Open(t.Context(), Config{URL: "postgres://postgres@127.0.0.1:1/x?sslmode=disable"})
	require.Equal(t, "postgres", outageOf(err), "%v", err)
	_, err = Open(t.Context(), Config{})
	require.ErrorContains(t, err, "ORDERSAGA_DATABASE_URL")
	_, err = Open(t.Context(), Config{URL: "postgres://u:secret@[bad"})
	require.Error(t, err)
	require.NotContains(t, err.Error(), "secret")
	u, err := url.Parse(testenv.Postgres(t))
	require.NoError(t, err)
	u.Path = "/no_such_database"
	_, err = Open(t.Context(), Config{URL: u.String()})
	require.ErrorContains(t, err, "create the database")
}

func TestF23_StarvedPoolIsAnOutageAndNotAHang(t *testing.T) {
	db := newDB(t, func(c *Config) {
		c.Connections, c.AcquireTimeout = map[Purpose]int32{Consumers: 1}, time.Second
	})
	err := db.For(Consumers).InTx(t.Context(), func(ctx context.Context, tx *Tx) error {
		if _, err := tx.Away(ctx); err != nil {
			return err
		}
		inner := db.For(Consumers).InTx(ctx, func(ctx context.Context, tx *Tx) error { return tx.SetAway(ctx, "x", true) })
		require.Equal(t, "postgres", outageOf(inner), "%v", inner)
		_, err := db.Order(ctx, domain.NewOrderID()) // another purpose has connections of its own
		return err
	})
	require.NoError(t, err)
}

func TestTimeoutOfATransactionIsAnOutageAndCancellationIsNot(t *testing.T) {
	db := newDB(t, func(c *Config) { c.TxTimeout = 500 * time.Millisecond })
	require.NoError(t, db.Pool(Operators).Ping(t.Context())) // connected, so that the time goes to the statement
	require.NoError(t, db.Pool(Consumers).Ping(t.Context()))
	sleep := func(ctx context.Context, tx *Tx) error {
		return tx.query(ctx, "sleep", `SELECT pg_sleep(10)`, nil, func(pgx.Rows) error { return nil })
	}
	err := db.For(Operators).InTx(t.Context(), sleep)
	require.Equal(t, "postgres", outageOf(err), "%v", err)
	require.ErrorContains(t, err, "sleep")

	err = db.For(Consumers).InTx(t.Context(), sleep) // the server's statement_timeout may be first
	require.Equal(t, "postgres", outageOf(err), "%v", err)

	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		for db.Pool(Operators).Stat().AcquiredConns() == 0 {
			time.Sleep(time.Millisecond) //nolint:forbidigo // polls an external process
		}
		cancel()
	}()
	err = db.For(Operators).InTx(ctx, sleep)
	require.Equal(t, context.Canceled, err, "as it is")
	require.Empty(t, outageOf(err))
}

func TestWakeFiresAfterACommitThatEmitted(t *testing.T) {
	db := newDB(t)
	emit := func(fail error) error {
		return db.For(Consumers).InTx(t.Context(), func(ctx context.Context, tx *Tx) error {
			id := domain.NewOrderID()
			return errors.Join(fail, tx.Emit(ctx, []events.Envelope{{ID: events.NewID(), Type: events.TReleaseStock, OrderID: [16]byte(id), Data: &events.ReleaseStock{}}}))
		})
	}
	require.Error(t, emit(errors.New("no")))
	select {
	case <-db.Wake():
		t.Fatal("woken by a rollback")
	default:
	}
	require.NoError(t, emit(nil))
	require.NoError(t, emit(nil))
	<-db.Wake()
	select {
	case <-db.Wake():
		t.Fatal("one pending signal stands for many")
	default:
	}
}

func TestF18_DatabaseTimeWithoutARoundTrip(t *testing.T) {
	db := newDB(t)
	offset, trip := db.ClockOffset()
	require.Less(t, offset.Abs(), time.Second, "same machine")
	require.Less(t, trip, time.Second)
	require.WithinDuration(t, one[time.Time](t, db, `SELECT clock_timestamp()`), db.Now(), time.Second)
	// a database that is an hour ahead
	r := *db.clock.at.Load()
	r.db = r.db.Add(time.Hour)
	db.clock.at.Store(&r)
	offset, _ = db.ClockOffset()
	require.InDelta(t, time.Hour.Seconds(), offset.Seconds(), 1)
	require.WithinDuration(t, time.Now().Add(time.Hour), db.Now(), time.Second)
	require.NoError(t, db.measureClock(t.Context()))
	require.WithinDuration(t, time.Now(), db.Now(), time.Second)
}
