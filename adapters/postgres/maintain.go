package postgres

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"ordersaga/domain"
	"ordersaga/events"
)

// Retention says how long things are kept. Zero fields take those of DefaultRetention.
type Retention struct {
	Inbox           time.Duration // rows of the inbox; older duplicates meet barrier, machine or order id
	InboxAhead      time.Duration // how far ahead its partitions are made
	IdempotencyKeys time.Duration
	DeadLetters     time.Duration // those that are resolved, discarded or superseded, and finished operations
	// Ended is for orders that have ended, with their sagas and history; 0 keeps them for ever. It must be longer than any topic
	// keeps a PlaceOrder: after it, the same command again is a new order. Reservations and payments stay: they are barriers.
	Ended time.Duration
}

const day = 24 * time.Hour

// DefaultRetention holds the defaults of DESIGN.
var DefaultRetention = Retention{Inbox: 7 * day, InboxAhead: 3 * day, IdempotencyKeys: 48 * time.Hour, DeadLetters: 90 * day}

func (r Retention) withDefaults() (Retention, error) {
	for _, f := range []struct {
		have *time.Duration
		def  time.Duration
	}{
		{&r.Inbox, DefaultRetention.Inbox},
		{&r.InboxAhead, DefaultRetention.InboxAhead},
		{&r.IdempotencyKeys, DefaultRetention.IdempotencyKeys},
		{&r.DeadLetters, DefaultRetention.DeadLetters},
	} {
		if *f.have <= 0 {
			*f.have = f.def
		}
	}
	if r.Ended > 0 && r.Ended <= r.Inbox {
		return r, fmt.Errorf("postgres: retention of ended orders (%s) must be longer than that of the inbox (%s): a duplicate would be a new order", r.Ended, r.Inbox)
	}
	return r, nil
}

// Maintained is what one run of Maintain did.
type Maintained struct {
	Ran                      bool // false: another process is at it
	PartitionsMade           int
	PartitionsDropped        int
	PartitionsPostponed      int // somebody's transaction holds them; the next run tries again
	InboxRows, Keys          int64
	DeadLetters, Operations  int64
	Superseded, Orders       int64
	RowsInTheDefaultOfTheDay int64 // ids from outside the days that have a partition: clocks that are days off
}

// Bounds of maintenance.
const (
	deleteBatch = 5_000                 // rows a transaction
	lockWait    = 50 * time.Millisecond // what a change of partitions may make inserts wait (F38)
	lockTries   = 10
)

// Maintain makes partitions ahead and drops old ones, deletes what has outlived its retention, and marks dead letters of ended sagas as superseded.
// One process does it at a time; each step is safe to repeat, and one that fails does not keep the others from being done.
func (db *DB) Maintain(ctx context.Context, r Retention) (m Maintained, err error) {
	if r, err = r.withDefaults(); err != nil {
		return m, err
	}
	err = db.session(ctx, func(c *pgxpool.Conn) (err error) {
		if err := c.QueryRow(ctx, `SELECT pg_try_advisory_lock($1, $2)`, int32(lockClass), int32(lockMaintain)).Scan(&m.Ran); err != nil {
			return classify(ctx, "maintenance lock", err)
		}
		if !m.Ran {
			return nil
		}
		defer func() { err = errors.Join(err, unlock(ctx, c, lockMaintain)) }()
		return db.maintain(ctx, r, &m)
	})
	return m, err
}

func (db *DB) maintain(ctx context.Context, r Retention, m *Maintained) error {
	var errs []error
	for _, step := range []func(context.Context, Retention, *Maintained) error{
		db.makePartitions, db.dropPartitions, db.sweepInbox, db.sweepKeys, db.sweepDead, db.supersede, db.sweepEnded,
	} {
		if ctx.Err() != nil {
			return errors.Join(append(errs, ctx.Err())...)
		}
		if err := step(ctx, r, m); err != nil {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// MakePartitions makes the inbox's partitions of the next days; Migrate does it, and Maintain from then on.
func (db *DB) MakePartitions(ctx context.Context) error {
	return db.locked(ctx, lockMaintain, func(ctx context.Context) error {
		return db.makePartitions(ctx, DefaultRetention, &Maintained{})
	})
}

const partitionDay = "20060102"

func partitionName(d time.Time) string { return "inbox_" + d.Format(partitionDay) }

// firstID is the least UUIDv7 of a moment.
func firstID(t time.Time) (id uuid.UUID) {
	var b [8]byte
	binary.BigEndian.PutUint64(b[:], uint64(t.UnixMilli())<<16)
	copy(id[:], b[:6])
	return id
}

// partitionDays lists the days that have a partition, in order.
func (db *DB) partitionDays(ctx context.Context) (days []time.Time, err error) {
	const q = `SELECT right(c.relname::text, 8) FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid WHERE i.inhparent = 'inbox'::regclass AND c.relname ~ '^inbox_[0-9]{8}$' ORDER BY 1`
	err = db.query(ctx, Operators, "list partitions", q, nil, func(r pgx.Rows) error {
		var s string
		if err := r.Scan(&s); err != nil {
			return err
		}
		d, err := time.Parse(partitionDay, s)
		if err == nil {
			days = append(days, d)
		}
		return err
	})
	return days, err
}

// makePartitions makes those that are missing between the first day there is, or yesterday, and some days ahead.
func (db *DB) makePartitions(ctx context.Context, r Retention, m *Maintained) error {
	have, err := db.partitionDays(ctx)
	if err != nil {
		return err
	}
	there := map[time.Time]bool{}
	for _, d := range have {
		there[d] = true
	}
	today := db.Now().UTC().Truncate(day)
	from := today.Add(-day)
	if len(have) > 0 && have[0].Before(from) {
		from = have[0]
	}
	for d := from; !d.After(today.Add(r.InboxAhead)); d = d.Add(day) {
		if there[d] {
			continue
		}
		if err := db.patiently(ctx, func() error { return db.makePartition(ctx, d) }); err != nil {
			return fmt.Errorf("partition %s: %w", partitionName(d), err)
		}
		m.PartitionsMade++
	}
	return nil
}

// makePartition makes a table beside the others and attaches it, which lets inserts into the other partitions go on. Rows of its
// range that went to the default one move: attaching would refuse otherwise.
func (db *DB) makePartition(ctx context.Context, d time.Time) error {
	name, from, to := partitionName(d), firstID(d), firstID(d.Add(day))
	return db.ddl(ctx, "make partition",
		`CREATE TABLE `+name+` (LIKE inbox INCLUDING ALL)`,
		`WITH moved AS (DELETE FROM inbox_default WHERE message_id >= '`+from.String()+`' AND message_id < '`+to.String()+`' RETURNING *) INSERT INTO `+name+` SELECT * FROM moved`,
		`ALTER TABLE inbox ATTACH PARTITION `+name+` FOR VALUES FROM ('`+from.String()+`') TO ('`+to.String()+`')`)
}

// dropPartitions drops those whose last moment is past the retention. DROP wants the whole table for itself for a moment: behind
// somebody's open transaction it gives up at once, for everybody's inserts would queue behind it (F38).
func (db *DB) dropPartitions(ctx context.Context, r Retention, m *Maintained) error {
	have, err := db.partitionDays(ctx)
	if err != nil {
		return err
	}
	keep := db.Now().UTC().Add(-r.Inbox)
	for _, d := range have {
		if d.Add(day).After(keep) {
			break
		}
		err := db.patiently(ctx, func() error { return db.ddl(ctx, "drop partition", `DROP TABLE `+partitionName(d)) })
		switch {
		case isCode(err, lockNotAvailable):
			m.PartitionsPostponed++
			return nil // whoever holds the table holds it for the others too
		case err != nil:
			return fmt.Errorf("partition %s: %w", partitionName(d), err)
		default:
			m.PartitionsDropped++
		}
	}
	return nil
}

// ddl runs statements in one transaction that waits for no lock longer than lockWait.
func (db *DB) ddl(ctx context.Context, name string, statements ...string) error {
	return db.session(ctx, func(c *pgxpool.Conn) error {
		return classify(ctx, name, pgx.BeginFunc(ctx, c, func(tx pgx.Tx) error {
			if _, err := tx.Exec(ctx, `SELECT set_config('lock_timeout', $1, true)`, ms(lockWait)); err != nil {
				return err
			}
			for _, s := range statements {
				if _, err := tx.Exec(ctx, s); err != nil {
					return err
				}
			}
			return nil
		}))
	})
}

const lockNotAvailable = "55P03"

// patiently repeats what did not get its lock in time, leaving room in between for what queued behind it.
func (db *DB) patiently(ctx context.Context, fn func() error) error {
	for try := 1; ; try++ {
		err := fn()
		if !isCode(err, lockNotAvailable) && !isCode(err, "40P01") || try == lockTries {
			return err
		}
		t := time.NewTimer(lockWait + rand.N(4*lockWait))
		select {
		case <-ctx.Done():
			t.Stop()
			return ctx.Err()
		case <-t.C:
		}
	}
}

// inBatches repeats a DELETE … LIMIT $1 until it finds less than a batch; each is a transaction of its own.
func (db *DB) inBatches(ctx context.Context, name, sql string, n *int64, args ...any) error {
	for {
		tag, err := db.exec(ctx, Operators, name, sql, append([]any{deleteBatch}, args...)...)
		if err != nil {
			return err
		}
		*n += tag.RowsAffected()
		if tag.RowsAffected() < deleteBatch {
			return nil
		}
	}
}

// sweepInbox deletes the rows that are in no day's partition by their age.
func (db *DB) sweepInbox(ctx context.Context, r Retention, m *Maintained) error {
	for _, table := range []string{"inbox_foreign", "inbox_default"} {
		q := `DELETE FROM ` + table + ` WHERE ctid = ANY (ARRAY(SELECT ctid FROM ` + table + ` WHERE at < now() - $2::interval ORDER BY at LIMIT $1))`
		if err := db.inBatches(ctx, "sweep "+table, q, &m.InboxRows, r.Inbox); err != nil {
			return err
		}
	}
	return db.query(ctx, Operators, "count rows of the default partition", `SELECT count(*) FROM inbox_default WHERE at > now() - interval '1 day'`, nil, func(r pgx.Rows) error {
		return r.Scan(&m.RowsInTheDefaultOfTheDay)
	})
}

func (db *DB) sweepKeys(ctx context.Context, r Retention, m *Maintained) error {
	const q = `DELETE FROM idempotency_keys WHERE ctid = ANY (ARRAY(SELECT ctid FROM idempotency_keys WHERE created_at < now() - $2::interval ORDER BY created_at LIMIT $1))`
	return db.inBatches(ctx, "sweep idempotency keys", q, &m.Keys, r.IdempotencyKeys)
}

func (db *DB) sweepDead(ctx context.Context, r Retention, m *Maintained) error {
	const dead = `DELETE FROM dead_letters WHERE id = ANY (ARRAY(
  SELECT id FROM dead_letters WHERE status IN ('resolved', 'discarded', 'superseded') AND updated_at < now() - $2::interval LIMIT $1))`
	if err := db.inBatches(ctx, "sweep dead letters", dead, &m.DeadLetters, r.DeadLetters); err != nil {
		return err
	}
	const operations = `DELETE FROM operations WHERE id = ANY (ARRAY(SELECT id FROM operations WHERE finished_at < now() - $2::interval LIMIT $1))`
	return db.inBatches(ctx, "sweep operations", operations, &m.Operations, r.DeadLetters)
}

// sagaGroups are the groups whose messages are the saga's own, and so end with it. A command of a producer's that was refused (its order id
// is another order's, say) or a public event that Kafka did not take is somebody's loss whatever became of the saga: it stays open.
func sagaGroups() (out []string) {
	for _, g := range events.Groups {
		if g.Topic != events.TopicCommands {
			out = append(out, string(g.Group))
		}
	}
	return out
}

// supersede marks open dead letters of ended sagas. Dead letters and sagas are read apart: they need not live in one database.
func (db *DB) supersede(ctx context.Context, _ Retention, m *Maintained) error {
	const page = 1000
	groups := sagaGroups()
	var last uuid.UUID
	for {
		letters := map[domain.OrderID][]uuid.UUID{}
		var orders []domain.OrderID
		n := 0
		const open = `SELECT id, order_id FROM dead_letters WHERE status = 'open' AND order_id IS NOT NULL AND grp = ANY($3) AND id > $1 ORDER BY id LIMIT $2`
		err := db.query(ctx, Operators, "open dead letters", open, []any{last, page, groups}, func(r pgx.Rows) error {
			var order domain.OrderID
			err := r.Scan((*[16]byte)(&last), (*[16]byte)(&order))
			if letters[order] == nil {
				orders = append(orders, order)
			}
			letters[order] = append(letters[order], last)
			n++
			return err
		})
		if err != nil || n == 0 {
			return err
		}
		var ids []uuid.UUID
		err = db.query(ctx, Operators, "ended sagas", `SELECT order_id FROM sagas WHERE order_id = ANY($1) AND ended_at IS NOT NULL`, []any{orders}, func(r pgx.Rows) error {
			var order domain.OrderID
			err := r.Scan((*[16]byte)(&order))
			ids = append(ids, letters[order]...)
			return err
		})
		if err != nil {
			return err
		}
		if len(ids) > 0 {
			tag, err := db.exec(ctx, Operators, "supersede dead letters", `UPDATE dead_letters SET status = 'superseded', updated_at = now() WHERE id = ANY($1) AND status = 'open'`, ids)
			if err != nil {
				return err
			}
			m.Superseded += tag.RowsAffected()
		}
		if n < page {
			return nil
		}
	}
}

// sweepEnded deletes orders that ended long ago, with saga and history, along the time of creation.
func (db *DB) sweepEnded(ctx context.Context, r Retention, m *Maintained) error {
	if r.Ended <= 0 {
		return nil
	}
	const page = 1000
	from := place{at: time.Unix(0, 0)}
	for {
		var ids []domain.OrderID
		n := 0
		const old = `SELECT o.created_at, o.id, coalesce(s.ended_at < now() - $3::interval, false) FROM orders o JOIN sagas s ON s.order_id = o.id
WHERE (o.created_at, o.id) > ($1::timestamptz, $2::uuid) AND o.created_at < now() - $3::interval ORDER BY o.created_at, o.id LIMIT $4`
		err := db.query(ctx, Operators, "old orders", old, []any{from.at, uuid.UUID(from.id), r.Ended, page}, func(rows pgx.Rows) error {
			var ended bool
			err := rows.Scan(&from.at, (*[16]byte)(&from.id), &ended)
			if ended {
				ids = append(ids, from.id)
			}
			n++
			return err
		})
		if err != nil || n == 0 {
			return err
		}
		if len(ids) > 0 {
			err = db.InTx(ctx, func(_ context.Context, tx *Tx) error {
				tx.queue("allow retention", `SELECT set_config('ordersaga.retention', 'on', true)`)
				tx.queue("delete old history", `DELETE FROM saga_history WHERE order_id = ANY($1)`, ids)
				tx.queue("delete old sagas", `DELETE FROM sagas WHERE order_id = ANY($1)`, ids)
				tx.queue("delete old tombstones", `DELETE FROM barriers WHERE order_id = ANY($1)`, ids)
				tx.queue("delete old orders", `DELETE FROM orders WHERE id = ANY($1)`, ids)
				return nil
			})
			if err != nil {
				return err
			}
			m.Orders += int64(len(ids))
		}
		if n < page {
			return nil
		}
	}
}
