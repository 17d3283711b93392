package postgres

import (
	"context"
	"errors"
	"math/rand/v2"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"ordersaga/domain"
	"ordersaga/outbox"
	"ordersaga/saga"
)

// View is the database through one pool. It satisfies saga.Store[*Tx] and consumers.Store[*Tx].
type View struct {
	db       *DB
	pool     *pgxpool.Pool
	presumes bool
}

// Bounds of starting over: full jitter between 0 and a limit that doubles (F24).
const (
	maxAttempts = 12
	firstPause  = 2 * time.Millisecond
	maxPause    = 250 * time.Millisecond
)

// InTx runs fn in a transaction and commits if fn answers nil. On a serialisation failure, a deadlock or a row that appeared
// meanwhile everything starts over, fn included, up to maxAttempts times. fn must do nothing outside tx that it would not repeat.
func (v *View) InTx(ctx context.Context, fn func(ctx context.Context, tx *Tx) error) error {
	pause := firstPause
	for attempt := 1; ; attempt++ {
		sure, err := v.once(ctx, fn, attempt > 1)
		if !sure {
			continue
		}
		if missingPartition(err) && attempt < maxAttempts { // whoever finds that the outbox has no room makes it
			if err := v.db.makeRoom(ctx); err != nil {
				return err
			}
			continue
		}
		if err == nil || attempt == maxAttempts || !retryable(err) {
			return err
		}
		t := time.NewTimer(rand.N(pause))
		select {
		case <-ctx.Done():
			t.Stop()
			return ctx.Err()
		case <-t.C:
		}
		pause = min(2*pause, maxPause)
	}
}

// once runs fn in one transaction. It is not sure of an error of fn's own that rests on what was presumed: that was not verified.
func (v *View) once(parent context.Context, fn func(ctx context.Context, tx *Tx) error, careful bool) (sure bool, err error) {
	ctx, cancel := context.WithTimeoutCause(parent, v.db.cfg.TxTimeout, errTimeout)
	defer cancel()
	tx := &Tx{db: v.db, pool: v.pool, presumed: presumed{careful: careful || !v.presumes}}
	defer tx.release(ctx)
	if err := fn(ctx, tx); err != nil {
		tx.learn(err)
		return !tx.relied || tx.err != nil || ctx.Err() != nil, err
	}
	return true, tx.finish(ctx)
}

// finish commits. The relay hears of what is left in the outbox before anybody can see it: one that met it first would send it again when it heard.
func (t *Tx) finish(ctx context.Context) error {
	committed, done := false, func(bool) {}
	if len(t.emitted) > 0 {
		done = t.db.announce(t.emitted)
	}
	defer func() { done(committed) }()
	err := t.commit(ctx)
	t.learn(err) // before anybody acts on what was committed
	committed = err == nil
	return err
}

// Tx is one transaction. It takes its connection with the first statement that must go, and is not safe for concurrent use.
type Tx struct {
	db      *DB
	pool    *pgxpool.Pool
	conn    *pgxpool.Conn
	queued  []statement
	ahead   []statement      // reads that go with the next round trip; see ahead.go
	open    bool             // begin was sent
	emitted []outbox.Message // for the outbox
	err     error            // the first failure: the transaction is lost, and every later call says so

	payments map[paymentKey]bool // the rows that LockPayments found

	sagasAhead        *readAhead[*saga.Instance]
	reservationsAhead *readAhead[*domain.Reservation]
	paymentsAhead     *readAhead[*domain.Payment]
	placingAhead      *readAhead[bool] // order ids that are locked to be placed, or will be by what is ahead
	ordersAhead       *readAhead[int64]
	buriedAhead       *readAhead[bool]
	presumed
	newKeys bool // presumed of those that FindKeys will be asked for next
}

type statement struct {
	name string
	sql  string
	args []any
	scan func(pgx.Rows) error // called for each row; nil: rows are not looked at
}

// queue adds a statement that answers nothing. It goes with the next read or with the commit.
func (t *Tx) queue(name, sql string, args ...any) {
	t.queued = append(t.queued, statement{name: name, sql: sql, args: args})
}

// queueRead adds a read whose answer is wanted only when the next one is sent.
func (t *Tx) queueRead(name, sql string, args []any, scan func(pgx.Rows) error) {
	t.queued = append(t.queued, statement{name: name, sql: sql, args: args, scan: scan})
}

// query sends everything queued and this statement in one round trip; scan is called for each row.
func (t *Tx) query(ctx context.Context, name, sql string, args []any, scan func(pgx.Rows) error) error {
	t.queueRead(name, sql, args, scan)
	return t.send(ctx, false)
}

func (t *Tx) commit(ctx context.Context) error {
	if t.err != nil {
		return t.err
	}
	if t.verify(); len(t.queued) == 0 && !t.open {
		return nil
	}
	return t.send(ctx, true)
}

const (
	nameBegin  = "begin"
	nameCommit = "commit"
)

// send is one round trip. A transaction that only wrote is one pipeline, which the server runs as one transaction without being told
// begin and commit; any other is opened with its first statements and closed with its last.
func (t *Tx) send(ctx context.Context, commit bool) error {
	if t.err != nil {
		return t.err
	}
	if t.err = t.sendOnce(ctx, commit); t.err == nil {
		t.queued, t.ahead = t.queued[:0], nil
		t.open = !commit
	}
	return t.err
}

func (t *Tx) sendOnce(ctx context.Context, commit bool) error {
	if t.conn == nil {
		c, err := t.db.acquire(ctx, t.pool)
		if err != nil {
			return err
		}
		t.conn = c
	}
	list := make([]statement, 0, len(t.queued)+len(t.ahead)+2)
	if !t.open && !commit {
		list = append(list, statement{name: nameBegin, sql: "begin"})
	}
	list = append(list, t.queued...)
	if !commit { // what nobody asked for until now, nobody will
		list = append(list, t.ahead...)
	}
	if commit && t.open {
		list = append(list, statement{name: nameCommit, sql: "commit"})
	}
	b := &pgx.Batch{QueuedQueries: make([]*pgx.QueuedQuery, 0, len(list))}
	for i := range list {
		b.Queue(list[i].sql, list[i].args...)
	}
	results := t.conn.SendBatch(ctx, b)
	failed, err := receive(results, list)
	if cerr := results.Close(); err == nil && cerr != nil {
		// Everything was answered but the end of the pipeline: without begin and commit that end is the commit.
		err = cerr
		list = append(list, statement{name: nameCommit})
	}
	if err == nil {
		return nil
	}
	return lost(ctx, t.pool, t.conn, classify(ctx, nameOf(err, list[failed:], list), err))
}

// nameOf names the statement that failed. A server's error is the answer to the statement that was next; when a connection is lost or
// time is up, any of those that were not answered may have been at work.
func nameOf(err error, unanswered, all []statement) string {
	if pre, is := errors.AsType[pgx.ErrPreprocessingBatch](err); is { // could not be prepared, which pgx reports before any result
		for i := range all {
			if all[i].sql == pre.SQL() {
				return all[i].name
			}
		}
	}
	first, last := unanswered[0].name, unanswered[len(unanswered)-1].name
	if _, is := errors.AsType[*pgconn.PgError](err); is || first == last {
		return first
	}
	return first + " … " + last
}

// receive takes the results in order and answers which statement failed.
func receive(results pgx.BatchResults, list []statement) (failed int, err error) {
	for i := range list {
		if scan := list[i].scan; scan != nil {
			rows, err := results.Query()
			if err == nil {
				err = eachRow(rows, scan)
			}
			if err != nil {
				return i, err
			}
			continue
		}
		tag, err := results.Exec()
		if err == nil && list[i].name == nameCommit && tag.String() != "COMMIT" {
			err = errors.New("the server rolled back: " + tag.String())
		}
		if err != nil {
			return i, err
		}
	}
	return len(list), nil
}

// rollbackTimeout bounds the farewell of a failed transaction; past it the connection is closed, which rolls back too.
const rollbackTimeout = 2 * time.Second

// release gives the connection back, after a rollback if the transaction is open still. A connection that is not idle then is
// destroyed by the pool.
func (t *Tx) release(ctx context.Context) {
	if t.conn == nil {
		return
	}
	if pg := t.conn.Conn().PgConn(); !pg.IsClosed() && pg.TxStatus() != 'I' {
		rctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), rollbackTimeout)
		_, _ = pg.Exec(rctx, "rollback").ReadAll() // if it fails the pool destroys the connection
		cancel()
	}
	t.conn.Release()
	t.conn = nil
}

// isCode reports that err is Postgres's answer with this SQLSTATE.
func isCode(err error, code string) bool {
	pe, is := errors.AsType[*pgconn.PgError](err)
	return is && pe.Code == code
}
