package postgres

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"ordersaga/outbox"
)

// Purpose is what a pool of connections is for. Each has its own, so that none starves another (F23).
type Purpose string

// The purposes.
const (
	Intake    Purpose = "intake"    // placing orders over HTTP
	Consumers Purpose = "consumers" // the groups, the sweeper, retries
	Relay     Purpose = "relay"     // the outbox's windows, leases and cursors
	Operators Purpose = "operators" // reads for people, replay, migrations, maintenance, audit
)

// Purposes lists the purposes.
var Purposes = []Purpose{Intake, Consumers, Relay, Operators}

// hot says which pools pin their plans: few statements, all of them along an index.
func (p Purpose) hot() bool { return p != Operators }

// Config says how to reach the database. Zero fields take the defaults of DefaultConfig.
type Config struct {
	// URL is a postgres:// URL or a keyword/value string as libpq takes it; TLS by its sslmode, sslrootcert, sslcert and sslkey.
	URL string
	// Connections by purpose. The sum, times the number of processes, must stay below the server's max_connections.
	Connections map[Purpose]int32
	// TxTimeout bounds one attempt of a transaction, waiting for a connection included; past it the database counts as away.
	TxTimeout time.Duration
	// AcquireTimeout bounds the wait for a connection.
	AcquireTimeout time.Duration
	// ConnectTimeout bounds the making of one connection.
	ConnectTimeout time.Duration
	// Tracer observes statements, such as otelpgx; nil: none.
	Tracer pgx.QueryTracer
}

// DefaultConfig holds the defaults. The pools are small on purpose: a batch is the unit of work, and connections beyond what the
// server has cores for only wait in it.
var DefaultConfig = Config{
	Connections:    map[Purpose]int32{Intake: 4, Consumers: 16, Relay: 4, Operators: 8},
	TxTimeout:      30 * time.Second,
	AcquireTimeout: 5 * time.Second,
	ConnectTimeout: 5 * time.Second,
}

func (c Config) withDefaults() Config {
	conns := make(map[Purpose]int32, len(Purposes))
	for _, p := range Purposes {
		if conns[p] = c.Connections[p]; conns[p] <= 0 {
			conns[p] = DefaultConfig.Connections[p]
		}
	}
	c.Connections = conns
	if c.TxTimeout <= 0 {
		c.TxTimeout = DefaultConfig.TxTimeout
	}
	if c.AcquireTimeout <= 0 {
		c.AcquireTimeout = DefaultConfig.AcquireTimeout
	}
	if c.ConnectTimeout <= 0 {
		c.ConnectTimeout = DefaultConfig.ConnectTimeout
	}
	return c
}

// betweenStatements bounds how long a transaction of the hot path stands between two statements, where we only decide in memory. The locks
// of a frozen process are free again when its groups' sessions end and others take its work over (F05), who would else wait for them.
const betweenStatements = 8 * time.Second

// pinned keeps the plans of hot statements where they are right at any size (F32): tables are near-empty when a connection first
// plans, and a sequential scan or a hash join that was cheap then would be repeated over millions of rows.
var pinned = map[string]string{
	"enable_seqscan": "off", "enable_bitmapscan": "off", "enable_hashjoin": "off", "enable_mergejoin": "off", "jit": "off", "plan_cache_mode": "force_generic_plan",
}

// DB is the database: a pool for each purpose and the database's clock. Close it when all that uses it has stopped.
type DB struct {
	cfg   Config
	pools map[Purpose]*pgxpool.Pool
	woken chan struct{}
	clock clock

	recall recall

	announced func(ms []outbox.Message) (done func(committed bool)) // nil: nobody wants to know

	stop context.CancelFunc
	wg   sync.WaitGroup
}

// Open connects, measures the clock and starts the goroutine that keeps measuring it. It fails with an OutageError if the database
// can't be reached: the caller tries again.
func Open(ctx context.Context, cfg Config) (*DB, error) {
	if cfg.URL == "" {
		return nil, errors.New("postgres: no database URL: set ORDERSAGA_DATABASE_URL, such as postgres://user@host:5432/ordersaga")
	}
	db := &DB{cfg: cfg.withDefaults(), pools: map[Purpose]*pgxpool.Pool{}, woken: make(chan struct{}, 1)}
	var err error
	if db.recall, err = newRecall(); err != nil {
		return nil, fmt.Errorf("postgres: memory of sagas: %w", err)
	}
	for _, p := range Purposes {
		pc, err := db.poolConfig(p)
		if err == nil {
			db.pools[p], err = pgxpool.NewWithConfig(ctx, pc)
		}
		if err != nil {
			db.closePools()
			return nil, fmt.Errorf("postgres: database URL: %w", err) // pgx masks the password
		}
	}
	if err := db.measureClock(ctx); err != nil {
		db.closePools()
		return nil, err
	}
	run, stop := context.WithCancel(context.WithoutCancel(ctx))
	db.stop = stop
	db.wg.Go(func() { db.keepClock(run) })
	return db, nil
}

func (db *DB) poolConfig(p Purpose) (*pgxpool.Config, error) {
	pc, err := pgxpool.ParseConfig(db.cfg.URL)
	if err != nil {
		return nil, err
	}
	pc.MaxConns = db.cfg.Connections[p]
	pc.MinConns = 0
	pc.MinIdleConns = min(2, pc.MaxConns)
	pc.MaxConnIdleTime = 5 * time.Minute
	pc.MaxConnLifetime = time.Hour
	pc.MaxConnLifetimeJitter = 10 * time.Minute
	cc := pc.ConnConfig
	cc.ConnectTimeout = db.cfg.ConnectTimeout
	cc.DialFunc = (&net.Dialer{KeepAlive: 15 * time.Second}).DialContext
	cc.Tracer = db.cfg.Tracer
	params := cc.RuntimeParams
	if params["application_name"] == "" {
		params["application_name"] = "ordersaga"
	}
	params["application_name"] += " " + string(p)
	params["timezone"] = "UTC"
	// A process that was frozen (SIGSTOP, a paused machine) must not hold its locks for ever.
	params["idle_in_transaction_session_timeout"] = ms(db.cfg.TxTimeout + 5*time.Second)
	if p == Intake || p == Consumers {
		params["idle_in_transaction_session_timeout"] = ms(min(betweenStatements, db.cfg.TxTimeout))
	}
	if p.hot() {
		for k, v := range pinned {
			params[k] = v
		}
		params["statement_timeout"] = ms(db.cfg.TxTimeout)
	}
	pc.BeforeConnect = func(_ context.Context, cc *pgx.ConnConfig) error { return db.readCertificates(cc) }
	pc.AfterConnect = func(_ context.Context, c *pgx.Conn) error {
		registerTypes(c.TypeMap())
		return nil
	}
	return pc, nil
}

// readCertificates reads what the URL says of TLS once more, so that each new connection takes the certificates of the day; connections
// live for an hour. Without TLS it does nothing.
func (db *DB) readCertificates(cc *pgx.ConnConfig) error {
	if cc.TLSConfig == nil {
		return nil
	}
	now, err := pgx.ParseConfig(db.cfg.URL)
	if err != nil {
		return fmt.Errorf("postgres: TLS of the database URL: %w", err) // pgx masks the password
	}
	cc.TLSConfig, cc.Fallbacks = now.TLSConfig, now.Fallbacks
	return nil
}

func ms(d time.Duration) string { return fmt.Sprint(d.Milliseconds()) }

// Close stops the clock and closes the pools; it waits for connections in use.
func (db *DB) Close() {
	db.stop()
	db.wg.Wait()
	db.closePools()
}

func (db *DB) closePools() {
	for _, p := range db.pools {
		p.Close()
	}
}

// Pool is the pool of a purpose, for its statistics and for what is no Tx.
func (db *DB) Pool(p Purpose) *pgxpool.Pool { return db.pools[p] }

// Wake receives after a commit of this process that left something in the outbox, if no relay hears of it otherwise. It is a hint: one pending
// signal stands for many.
func (db *DB) Wake() <-chan struct{} { return db.woken }

// AnnounceTo has every transaction of this process announce to a relay what it leaves in the outbox, before it commits; see
// outbox.Relay.Announce. Call it before anything is written.
func (db *DB) AnnounceTo(announce func(ms []outbox.Message) (done func(committed bool))) {
	db.announced = announce
}

func (db *DB) announce(ms []outbox.Message) (done func(committed bool)) {
	if db.announced != nil {
		return db.announced(ms)
	}
	return func(committed bool) {
		if !committed {
			return
		}
		select {
		case db.woken <- struct{}{}:
		default:
		}
	}
}

// Ping asks the database for a sign of life, on the operators' pool.
func (db *DB) Ping(ctx context.Context) error {
	return classify(ctx, "ping", db.pools[Operators].Ping(ctx))
}

// For answers the view of the database through one purpose's pool.
func (db *DB) For(p Purpose) *View { return &View{db: db, pool: db.pools[p], presumes: p.hot()} }

// InTx runs a transaction on the operators' pool; see View.InTx.
func (db *DB) InTx(ctx context.Context, fn func(ctx context.Context, tx *Tx) error) error {
	return db.For(Operators).InTx(ctx, fn)
}

// acquire takes a connection from a pool, within AcquireTimeout.
func (db *DB) acquire(ctx context.Context, pool *pgxpool.Pool) (*pgxpool.Conn, error) {
	actx, cancel := context.WithTimeoutCause(ctx, db.cfg.AcquireTimeout, errTimeout)
	defer cancel()
	c, err := pool.Acquire(actx)
	return c, classify(actx, "connect", err)
}

// lost looks at an error: where the server closed the connection it has closed the others too, or soon will. They are dropped at once, so
// that a restart costs each pool one failed statement and not one a connection.
func lost(ctx context.Context, pool *pgxpool.Pool, c *pgxpool.Conn, err error) error {
	var o *OutageError
	if ctx.Err() == nil && c.Conn().IsClosed() && errors.As(err, &o) {
		pool.Reset()
	}
	return err
}

// query reads on a pool, outside any transaction; scan is called for each row.
func (db *DB) query(ctx context.Context, p Purpose, name, sql string, args []any, scan func(pgx.Rows) error) error {
	c, err := db.acquire(ctx, db.pools[p])
	if err != nil {
		return err
	}
	defer c.Release()
	rows, err := c.Query(ctx, sql, args...)
	if err == nil {
		err = eachRow(rows, scan)
	}
	return lost(ctx, db.pools[p], c, classify(ctx, name, err))
}

// exec runs one statement on a pool, as a transaction of its own.
func (db *DB) exec(ctx context.Context, p Purpose, name, sql string, args ...any) (pgconn.CommandTag, error) {
	c, err := db.acquire(ctx, db.pools[p])
	if err != nil {
		return pgconn.CommandTag{}, err
	}
	defer c.Release()
	tag, err := c.Exec(ctx, sql, args...)
	return tag, lost(ctx, db.pools[p], c, classify(ctx, name, err))
}

func eachRow(rows pgx.Rows, scan func(pgx.Rows) error) error {
	defer rows.Close()
	for rows.Next() {
		if err := scan(rows); err != nil {
			return err
		}
	}
	return rows.Err()
}
