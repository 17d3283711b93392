package postgres

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"sync"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"

	"ordersaga/events"
	"ordersaga/outbox"
)

// OutboxLog is the outbox as one relay sees it. It has two connections of its own, made like those of the relay's pool: control, for
// leases and cursors, and reader, for windows, which may stay open for as long as Kafka takes.
//
// control is also a guard. Cursors in memory are transaction ids, and a server that crashed gives those out again whose log had not
// reached the disk; a standby that took over may too. A cursor from before would take the new rows for seen. But no connection
// survives that: so a cursor counts only as long as the control connection lives through which it was acquired. A new reader is
// trusted only after control answered once more, and Store never uses another connection than the one that acquired.
type OutboxLog struct {
	db    *DB
	names map[string]events.Name

	mu      sync.Mutex // guards control
	control *pgx.Conn
	reading sync.Mutex // guards reader; taken before mu
	reader  *pgx.Conn
}

// NewOutboxLog makes the log of one relay. Leave closes its connections.
func NewOutboxLog(db *DB) *OutboxLog {
	l := &OutboxLog{db: db, names: make(map[string]events.Name, len(events.Types))}
	for i := range events.Types {
		l.names[string(events.Types[i].Name)] = events.Types[i].Name
	}
	return l
}

var errSession = errors.New("postgres: the relay's session ended: acquire the leases again")

// connect makes a connection beside the pool.
func (l *OutboxLog) connect(ctx context.Context, settings ...string) (*pgx.Conn, error) {
	cfg := l.db.pools[Relay].Config().ConnConfig.Copy()
	for i := 0; i+1 < len(settings); i += 2 {
		cfg.RuntimeParams[settings[i]] = settings[i+1]
	}
	if err := l.db.readCertificates(cfg); err != nil {
		return nil, err
	}
	c, err := pgx.ConnectConfig(ctx, cfg)
	if err != nil {
		return nil, classify(ctx, "connect", err)
	}
	registerTypes(c.TypeMap())
	return c, nil
}

// closeTimeout bounds the farewell to a connection.
const closeTimeout = time.Second

func closeConn(ctx context.Context, c *pgx.Conn) {
	if c == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), closeTimeout)
	defer cancel()
	_ = c.Close(ctx) // the server finds out by itself
}

// onControl runs fn on the control connection. Any failure ends the session.
func (l *OutboxLog) onControl(ctx context.Context, name string, open bool, fn func(c *pgx.Conn) error) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.control == nil || l.control.IsClosed() {
		if !open {
			return errSession
		}
		c, err := l.connect(ctx, "synchronous_commit", "off") // a lost cursor or lease costs duplicates only
		if err != nil {
			return err
		}
		l.control = c
	}
	if err := fn(l.control); err != nil {
		err = classify(ctx, name, err)
		closeConn(ctx, l.control)
		l.control = nil
		return err
	}
	return nil
}

const sayRelayLives = `INSERT INTO outbox_relays AS r (id, seen_at) VALUES ($1, clock_timestamp()) ON CONFLICT (id) DO UPDATE SET seen_at = clock_timestamp()`

// fairShare of the shards, rounded up, among the relays seen within a term ($1).
const fairShare = `
SELECT ((SELECT count(*) FROM outbox_shards) + n - 1) / n AS share
FROM (SELECT greatest(count(*), 1) AS n FROM outbox_relays WHERE seen_at > clock_timestamp() - $1::bigint * interval '1 millisecond') AS live`

// A row that another relay took between our reading and our locking it is judged again by the WHERE as it is then.
const acquireShards = `
WITH fair AS MATERIALIZED (SELECT share FROM (` + fairShare + `) AS f),
free AS MATERIALIZED (
  SELECT shard FROM outbox_shards
  WHERE owner IS NULL OR owner <> $2 AND lease_until <= clock_timestamp()
  ORDER BY shard LIMIT greatest((SELECT share FROM fair) - (SELECT count(*) FROM outbox_shards WHERE owner = $2), 0)
  FOR NO KEY UPDATE SKIP LOCKED)
UPDATE outbox_shards AS s SET
  fence = s.fence + CASE WHEN s.owner = $2 THEN 0 ELSE 1 END, owner = $2, lease_until = clock_timestamp() + $1::bigint * interval '1 millisecond'
WHERE s.owner = $2 OR s.shard IN (SELECT shard FROM free)
RETURNING s.shard, s.fence, s.prev::text, coalesce(s.next::text, ''), s.after_id`

// Acquire is one round trip.
func (l *OutboxLog) Acquire(ctx context.Context, relay string, term time.Duration) (outbox.Grant, error) {
	if err := l.ready(ctx); err != nil {
		return outbox.Grant{}, err
	}
	var g outbox.Grant
	err := l.onControl(ctx, "acquire outbox leases", true, func(c *pgx.Conn) error {
		b := &pgx.Batch{}
		b.Queue(sayRelayLives, relay)
		b.Queue(fairShare, term.Milliseconds()).QueryRow(func(r pgx.Row) error { return r.Scan(&g.Share) })
		b.Queue(acquireShards, term.Milliseconds(), relay).Query(func(rows pgx.Rows) error {
			return eachRow(rows, func(r pgx.Rows) error {
				var a outbox.Lease
				err := r.Scan(&a.Shard, &a.Fence, (*string)(&a.Cursor.Prev), (*string)(&a.Cursor.Next), &a.Cursor.After)
				g.Leases = append(g.Leases, a)
				return err
			})
		})
		return c.SendBatch(ctx, b).Close()
	})
	return g, err
}

// ready adopts a restored outbox before a new session takes cursors from it.
func (l *OutboxLog) ready(ctx context.Context) error {
	l.mu.Lock()
	alive := l.control != nil && !l.control.IsClosed()
	l.mu.Unlock()
	if alive {
		return nil
	}
	_, err := l.db.AdoptOutbox(ctx)
	return err
}

// Release gives back what is still the relay's.
func (l *OutboxLog) Release(ctx context.Context, relay string, leases []outbox.Lease) error {
	shards, fences := make([]int16, len(leases)), make([]int64, len(leases))
	for i, a := range leases {
		shards[i], fences[i] = a.Shard, a.Fence
	}
	return l.onControl(ctx, "release outbox leases", false, func(c *pgx.Conn) error {
		_, err := c.Exec(ctx, `
UPDATE outbox_shards AS s SET owner = NULL, lease_until = NULL
FROM unnest($2::smallint[], $3::bigint[]) AS u(shard, fence) WHERE s.shard = u.shard AND s.fence = u.fence AND s.owner = $1`, relay, shards, fences)
		return err
	})
}

// Leave also closes the log's connections.
func (l *OutboxLog) Leave(ctx context.Context, relay string) error {
	_, err := l.db.exec(ctx, Relay, "leave the outbox", `
WITH shards AS (UPDATE outbox_shards SET owner = NULL, lease_until = NULL WHERE owner = $1)
DELETE FROM outbox_relays WHERE id = $1`, relay)
	l.reading.Lock()
	defer l.reading.Unlock()
	l.mu.Lock()
	defer l.mu.Unlock()
	closeConn(ctx, l.reader)
	closeConn(ctx, l.control)
	l.reader, l.control = nil, nil
	return err
}

// Store is one statement for all shards.
func (l *OutboxLog) Store(ctx context.Context, relay string, leases []outbox.Lease) (fenced []int16, err error) {
	n := len(leases)
	shards, fences, prevs, nexts, afters := make([]int16, n), make([]int64, n), make([]string, n), make([]string, n), make([]int64, n)
	for i, a := range leases {
		shards[i], fences[i], prevs[i], nexts[i], afters[i] = a.Shard, a.Fence, string(a.Cursor.Prev), string(a.Cursor.Next), a.Cursor.After
	}
	var stored map[int16]bool
	err = l.onControl(ctx, "store outbox cursors", false, func(c *pgx.Conn) error {
		stored = make(map[int16]bool, n)
		rows, err := c.Query(ctx, `
UPDATE outbox_shards AS s SET prev = u.prev::pg_snapshot, next = nullif(u.next, '')::pg_snapshot, after_id = u.after
FROM unnest($2::smallint[], $3::bigint[], $4::text[], $5::text[], $6::bigint[]) AS u(shard, fence, prev, next, after)
WHERE s.shard = u.shard AND s.fence = u.fence AND s.owner = $1
RETURNING s.shard`, relay, shards, fences, prevs, nexts, afters)
		if err != nil {
			return err
		}
		return eachRow(rows, func(r pgx.Rows) error {
			var shard int16
			err := r.Scan(&shard)
			stored[shard] = true
			return err
		})
	})
	if err != nil {
		return nil, err
	}
	for _, shard := range shards {
		if !stored[shard] {
			fenced = append(fenced, shard)
		}
	}
	return fenced, nil
}

// The rows that prev did not show: those of transactions that began after it, and those of transactions that it knew as under way. The
// latter are looked up in the index one by one: as "= ANY(array)", or as a join that the planner may turn around (OFFSET 0 forbids
// it), every row ever written could be read instead.
const (
	unseen = `
SELECT o.* FROM outbox AS o WHERE o.xid >= (SELECT pg_snapshot_xmax(prev) FROM c) AND o.shard = ANY($1)
UNION ALL
SELECT o.* FROM (SELECT pg_snapshot_xip(prev) AS x FROM c) AS p, LATERAL (SELECT * FROM outbox AS i WHERE i.xid = p.x AND i.shard = ANY($1) OFFSET 0) AS o`
	windowColumns = `id, shard, message_id, type, order_id, sequence, trace, topic, key, headers, payload, pack`
	readWindow    = `
WITH c AS MATERIALIZED (SELECT $2::text::pg_snapshot AS prev)
SELECT ` + windowColumns + ` FROM (` + unseen + `) AS u ORDER BY id`
	resumeWindow = `
WITH c AS MATERIALIZED (SELECT $2::text::pg_snapshot AS prev, $3::text::pg_snapshot AS next)
SELECT ` + windowColumns + ` FROM (` + unseen + `) AS u WHERE id > $4 AND pg_visible_in_snapshot(xid, (SELECT next FROM c)) ORDER BY id`
)

// Window is one round trip and one transaction; rows are handed on as they arrive, so that its size does not matter to memory.
func (l *OutboxLog) Window(ctx context.Context, spans []outbox.Span, begin func(outbox.Snapshot), each func(*outbox.Message) error) error {
	l.reading.Lock()
	defer l.reading.Unlock()
	if err := l.openReader(ctx); err != nil {
		return err
	}
	b := &pgx.Batch{}
	b.Queue("begin isolation level repeatable read, read only")
	b.Queue("SELECT pg_current_snapshot()::text")
	for _, s := range spans {
		if s.From.Next == "" {
			b.Queue(readWindow, s.Shards, string(s.From.Prev))
		} else {
			b.Queue(resumeWindow, s.Shards, string(s.From.Prev), string(s.From.Next), s.From.After)
		}
	}
	b.Queue("commit")
	results := l.reader.SendBatch(ctx, b)
	err := l.receive(results, len(spans), begin, each)
	if err != nil {
		closeConn(ctx, l.reader) // first: a million rows may be about to arrive, and Close would wait for the last
		l.reader = nil
	}
	if cerr := results.Close(); err == nil && cerr != nil {
		err = cerr
		closeConn(ctx, l.reader)
		l.reader = nil
	}
	if own, is := errors.AsType[*callerError](err); is {
		return own.err
	}
	return classify(ctx, "read the outbox", err)
}

func (l *OutboxLog) receive(results pgx.BatchResults, spans int, begin func(outbox.Snapshot), each func(*outbox.Message) error) error {
	if _, err := results.Exec(); err != nil {
		return err
	}
	var next outbox.Snapshot
	if err := results.QueryRow().Scan((*string)(&next)); err != nil {
		return err
	}
	begin(next)
	for range spans {
		rows, err := results.Query()
		if err != nil {
			return err
		}
		for rows.Next() {
			for _, m := range l.messages(rows.RawValues()) {
				if err := each(m); err != nil {
					return &callerError{err}
				}
			}
		}
		if rows.Close(); rows.Err() != nil {
			return rows.Err()
		}
	}
	_, err := results.Exec()
	return err
}

// callerError is an error that is not the database's and goes back as it is.
type callerError struct{ err error }

func (e *callerError) Error() string { return e.err.Error() }

// openReader makes sure that there is a reader, and that the control connection is older than it.
func (l *OutboxLog) openReader(ctx context.Context) error {
	if l.reader != nil && !l.reader.IsClosed() {
		return nil
	}
	// A window stays open as long as Kafka takes, within the relay's own bound.
	c, err := l.connect(ctx, "statement_timeout", "0", "enable_bitmapscan", "off")
	if err != nil {
		return err
	}
	err = l.onControl(ctx, "ask for the relay's session", false, func(c *pgx.Conn) error { return c.Ping(ctx) })
	if err != nil {
		closeConn(ctx, c)
		return err
	}
	l.reader = c
	return nil
}

// messages reads a row of windowColumns in Postgres's binary format. All its bytes are one allocation.
func (l *OutboxLog) messages(v [][]byte) []*outbox.Message {
	const id, shard, messageID, pack = 0, 1, 2, 11
	m := &outbox.Message{
		RowID: int64(binary.BigEndian.Uint64(v[id])),    //nolint:gosec // bits
		Shard: int16(binary.BigEndian.Uint16(v[shard])), //nolint:gosec // bits
		ID:    uuid.UUID(v[messageID]),
	}
	if v[pack] == nil {
		m.Damage = l.single(m, v)
		return []*outbox.Message{m}
	}
	list, err := outbox.Unpack(m.RowID, m.Shard, bytes.Clone(v[pack]))
	if err != nil {
		m.Damage = err
		return []*outbox.Message{m}
	}
	out := make([]*outbox.Message, len(list))
	for i := range list {
		out[i] = &list[i]
	}
	return out
}

// single reads what a row says of its one message: a raw one, or a typed one from before there were packs.
func (l *OutboxLog) single(m *outbox.Message, v [][]byte) error {
	const typ, orderID, sequence, trace, topic, key, headers, payload = 3, 4, 5, 6, 7, 8, 9, 10
	m.Trace = events.TraceFromBinary(v[trace])
	m.Topic = events.Topic(v[topic])
	if v[orderID] != nil {
		m.OrderID = uuid.UUID(v[orderID])
	}
	if v[sequence] != nil {
		m.Sequence = int32(binary.BigEndian.Uint32(v[sequence])) //nolint:gosec // bits
	}
	if v[typ] != nil {
		name, ok := l.names[string(v[typ])]
		if !ok {
			name = events.Name(v[typ])
		}
		m.Type = name
	}
	own := make([]byte, 0, len(v[key])+len(v[headers])+len(v[payload]))
	take := func(b []byte) []byte {
		if b == nil {
			return nil
		}
		n := len(own)
		own = append(own, b...)
		return own[n:len(own):len(own)]
	}
	m.Key, m.Payload = take(v[key]), take(v[payload])
	var err error
	m.Headers, err = events.ParseHeaders(take(v[headers]))
	return err
}

// backlogBound is how many rows Backlog counts one by one. It is asked for every second or two, for each place of a cursor, most often when a machine
// is busy: counting 10,000 rows took 8 % of its CPU.
const backlogBound = 20

// The rows of one place, oldest transactions first, up to a bound: how many, and the first of them.
const countBacklog = `
WITH c AS MATERIALIZED (SELECT $2::text::pg_snapshot AS prev, nullif($3::text, '')::pg_snapshot AS next),
u AS (` + unseen + `),
bounded AS (
  SELECT id, message_id FROM u, c WHERE c.next IS NULL OR u.id > $4 OR NOT pg_visible_in_snapshot(u.xid, c.next) LIMIT $5)
SELECT count(*) OVER (), id, message_id FROM bounded ORDER BY id LIMIT 1`

// Backlog counts up to backlogBound rows; beyond, it estimates by the ids that were drawn, which are dense but for rollbacks.
func (l *OutboxLog) Backlog(ctx context.Context) (outbox.Backlog, error) {
	return l.db.OutboxBacklog(ctx)
}

// OutboxBacklog is Backlog without a relay.
func (db *DB) OutboxBacklog(ctx context.Context) (outbox.Backlog, error) {
	type place struct {
		shards     []int16
		prev, next string
		after      int64
	}
	var places []place
	err := db.query(ctx, Relay, "read outbox cursors", `
SELECT array_agg(shard), prev::text, coalesce(next::text, ''), after_id FROM outbox_shards GROUP BY 2, 3, 4`, nil, func(r pgx.Rows) error {
		var p place
		err := r.Scan(&p.shards, &p.prev, &p.next, &p.after)
		places = append(places, p)
		return err
	})
	var b outbox.Backlog
	var first int64
	var oldest time.Time
	for _, p := range places {
		if err != nil {
			break
		}
		// One row at least: a place that is far behind must not be hidden by others that are merely busy.
		args := []any{p.shards, p.prev, p.next, p.after, max(backlogBound-b.Rows, 1)}
		err = db.query(ctx, Relay, "count the outbox's backlog", countBacklog, args, func(r pgx.Rows) error {
			var n, id int64
			var message uuid.UUID
			if err := r.Scan(&n, &id, (*[16]byte)(&message)); err != nil {
				return err
			}
			b.Rows += n
			if first == 0 || id < first {
				first = id
				oldest = time.Unix(message.Time().UnixTime())
			}
			return nil
		})
	}
	if err == nil && b.Rows >= backlogBound {
		err = db.query(ctx, Relay, "estimate the outbox's backlog", `SELECT greatest($1, last_value - $2 + 1) FROM outbox_id_seq`, []any{b.Rows, first},
			func(r pgx.Rows) error { return r.Scan(&b.Rows) })
	}
	if err == nil && b.Rows > 0 {
		b.OldestSeconds = max(0, db.Now().Sub(oldest).Seconds())
	}
	return b, err
}
