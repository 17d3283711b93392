package postgres

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// The outbox's partitions are ranges of transaction ids without a gap between them. Those ahead are made by MaintainOutbox and, where
// it is late, by the writer that finds none. One is dropped when no cursor can want a row of it any more.
const (
	// OutboxSpan is how many transaction ids a partition spans by default: the better part of an hour under full load.
	OutboxSpan = 1_000_000
	// outboxAhead is how many spans ahead of the latest transaction there are partitions.
	outboxAhead = 2
	// maxOutboxPartitions bounds what one call makes; a database whose transaction ids have leapt gets one wide partition instead.
	maxOutboxPartitions = 8

	lockOutbox     = 3                      // an advisory lock of class lockClass: partitions change in one process at a time
	dropTimeout    = 50 * time.Millisecond  // inserts wait behind a waiting DROP for as long as this at most (F38)
	dropAttempts   = 3                      // in one call; the next call goes on
	dropPause      = 100 * time.Millisecond // between attempts: the inserts that waited get through
	attachTimeout  = 2 * time.Second        // for the lock of an ATTACH, behind which no insert waits
	forgetRelays   = time.Hour              // after which a relay that vanished is no longer listed
	adoptedDrift   = 1 << 20                // transaction ids between the first of a transaction and that of a savepoint in it, at most
	adoptTimeout   = 5 * time.Second        // for the lock of a restored outbox
	partitionStart = "outbox_p"
)

// OutboxMaintenance is what MaintainOutbox did.
type OutboxMaintenance struct {
	Adopted int64    // rows of a restored dump that are sent again
	Made    []string // partitions
	Dropped []string
	Blocked []string // partitions that nobody wants, but somebody's transaction holds: the next call tries again
}

// MaintainOutbox makes partitions ahead and drops those behind every cursor. Call it when a process starts, before it writes, and
// then every few seconds: at full load a span of OutboxSpan lasts minutes. It is safe to call from any number of processes. span is
// the width of new partitions in transaction ids; 0: as wide as the last one, OutboxSpan at most.
func (db *DB) MaintainOutbox(ctx context.Context, span int64) (done OutboxMaintenance, err error) {
	if done.Adopted, err = db.AdoptOutbox(ctx); err != nil {
		return done, err
	}
	if done.Made, err = db.extendOutbox(ctx, span); err != nil {
		return done, err
	}
	if done.Dropped, done.Blocked, err = db.dropOutbox(ctx); err != nil {
		return done, err
	}
	_, err = db.exec(ctx, Operators, "forget vanished relays", `
DELETE FROM outbox_relays AS r WHERE seen_at < now() - $1::bigint * interval '1 second' AND NOT EXISTS (SELECT FROM outbox_shards AS s WHERE s.owner = r.id)`,
		int64(forgetRelays/time.Second))
	return done, err
}

// outboxPartition is the range [from, to) of transaction ids.
type outboxPartition struct {
	name     string
	from, to int64 // a 64-bit transaction id never comes near the sign
}

func (p outboxPartition) create() string {
	return fmt.Sprintf(`CREATE TABLE %s (LIKE outbox INCLUDING DEFAULTS INCLUDING CONSTRAINTS INCLUDING STORAGE) WITH (autovacuum_enabled = false, toast_tuple_target = 8160)`, p.name)
}

// attach takes a lock that no insert conflicts with; CREATE TABLE … PARTITION OF would stall them all.
func (p outboxPartition) attach() string {
	return fmt.Sprintf(`ALTER TABLE outbox ATTACH PARTITION %s FOR VALUES FROM ('%d') TO ('%d')`, p.name, p.from, p.to)
}

// nextPartitions decides which partitions are missing, given where the last one ends and the latest transaction id.
func nextPartitions(end, latest, span int64) []outboxPartition {
	var out []outboxPartition
	for want := latest + outboxAhead*span; end < want; {
		to := end + span
		if (want-end)/span >= maxOutboxPartitions { // transaction ids have leapt
			to = latest + span
		}
		out = append(out, outboxPartition{partitionStart + strconv.FormatInt(end, 10), end, to})
		end = to
	}
	return out
}

var partitionBound = regexp.MustCompile(`^FOR VALUES FROM \('(\d+)'\) TO \('(\d+)'\)$`)

func outboxPartitions(ctx context.Context, tx pgx.Tx) (list []outboxPartition, latest int64, err error) {
	rows, err := tx.Query(ctx, `
SELECT c.relname, pg_get_expr(c.relpartbound, c.oid), pg_snapshot_xmax(pg_current_snapshot())::text
FROM pg_inherits AS i JOIN pg_class AS c ON c.oid = i.inhrelid WHERE i.inhparent = 'outbox'::regclass`)
	if err != nil {
		return nil, 0, err
	}
	err = eachRow(rows, func(r pgx.Rows) error {
		var p outboxPartition
		var bound, xmax string
		if err := r.Scan(&p.name, &bound, &xmax); err != nil {
			return err
		}
		m := partitionBound.FindStringSubmatch(bound)
		if m == nil {
			return fmt.Errorf("partition %s has bounds that are not ours: %s", p.name, bound)
		}
		var errs [3]error
		p.from, errs[0] = strconv.ParseInt(m[1], 10, 64)
		p.to, errs[1] = strconv.ParseInt(m[2], 10, 64)
		latest, errs[2] = strconv.ParseInt(xmax, 10, 64)
		list = append(list, p)
		return errors.Join(errs[:]...)
	})
	slices.SortFunc(list, func(a, b outboxPartition) int { return int(min(max(a.from-b.from, -1), 1)) })
	return list, latest, err
}

// inOutboxTx runs fn in a transaction that changes partitions, alone among all processes.
func (db *DB) inOutboxTx(ctx context.Context, name string, lockTimeout time.Duration, fn func(tx pgx.Tx) error) error {
	return db.session(ctx, func(c *pgxpool.Conn) error {
		err := pgx.BeginFunc(ctx, c, func(tx pgx.Tx) error {
			if _, err := tx.Exec(ctx, `SELECT pg_advisory_xact_lock($1, $2)`, int32(lockClass), int32(lockOutbox)); err != nil {
				return err
			}
			if _, err := tx.Exec(ctx, `SELECT set_config('lock_timeout', $1, true)`, ms(lockTimeout)); err != nil {
				return err
			}
			return fn(tx)
		})
		return classify(ctx, name, err)
	})
}

func (db *DB) extendOutbox(ctx context.Context, span int64) (made []string, err error) {
	err = db.inOutboxTx(ctx, "make outbox partitions", attachTimeout, func(tx pgx.Tx) error {
		list, latest, err := outboxPartitions(ctx, tx)
		if err != nil {
			return err
		}
		if len(list) == 0 {
			return errors.New("the outbox has no partition to go on from: was one dropped by hand?")
		}
		last := list[len(list)-1]
		if span <= 0 {
			span = min(last.to-last.from, OutboxSpan)
		}
		for _, p := range nextPartitions(last.to, latest, span) {
			for _, sql := range []string{p.create(), p.attach()} {
				if _, err := tx.Exec(ctx, sql); err != nil {
					return err
				}
			}
			made = append(made, p.name)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return made, nil
}

// makeRoom is for a writer whose row found no partition: maintenance is late, or the database was restored and nobody noticed yet.
func (db *DB) makeRoom(ctx context.Context) error {
	if _, err := db.AdoptOutbox(ctx); err != nil {
		return err
	}
	_, err := db.extendOutbox(ctx, 0)
	return err
}

// missingPartition reports that a row of the outbox found no partition to go to.
func missingPartition(err error) bool {
	return isCode(err, "23514") && strings.Contains(err.Error(), `no partition of relation "outbox"`)
}

// dropOutbox drops, oldest first, partitions that end before every transaction that some cursor may want a row of. The last one stays.
func (db *DB) dropOutbox(ctx context.Context) (dropped, blocked []string, err error) {
	var old []string
	err = db.inOutboxTx(ctx, "list outbox partitions", attachTimeout, func(tx pgx.Tx) error {
		var horizon string
		if err := tx.QueryRow(ctx, `SELECT pg_snapshot_xmin(prev)::text FROM outbox_shards ORDER BY pg_snapshot_xmin(prev) LIMIT 1`).Scan(&horizon); err != nil {
			return err
		}
		list, _, err := outboxPartitions(ctx, tx)
		if err != nil {
			return err
		}
		until, err := strconv.ParseInt(horizon, 10, 64)
		for i, p := range list {
			if p.to <= until && i < len(list)-1 {
				old = append(old, p.name)
			}
		}
		return err
	})
	for _, name := range old {
		var done bool
		if done, err = db.dropPartition(ctx, name); err != nil {
			break
		}
		if done {
			dropped = append(dropped, name)
		} else {
			blocked = append(blocked, name)
		}
	}
	return dropped, blocked, err
}

// dropPartition answers false if somebody's transaction is in the way. The DROP waits for the lock no longer than dropTimeout: for so
// long every insert waits behind it.
func (db *DB) dropPartition(ctx context.Context, name string) (bool, error) {
	for attempt := 1; ; attempt++ {
		err := db.inOutboxTx(ctx, "drop "+name, dropTimeout, func(tx pgx.Tx) error {
			_, err := tx.Exec(ctx, `DROP TABLE IF EXISTS `+pgx.Identifier{name}.Sanitize())
			return err
		})
		if err == nil || !isCode(err, "55P03") {
			return err == nil, err
		}
		if attempt == dropAttempts {
			return false, nil
		}
		t := time.NewTimer(dropPause)
		select {
		case <-ctx.Done():
			t.Stop()
			return false, ctx.Err()
		case <-t.C:
		}
	}
}

const (
	thisSystem   = `(SELECT system_identifier FROM pg_control_system())`
	thisDatabase = `(SELECT oid::bigint FROM pg_database WHERE datname = current_database())`
)

const outboxIsForeign = `SELECT EXISTS (SELECT FROM outbox_shards WHERE system_id <> ` + thisSystem + ` OR database_id <> ` + thisDatabase + `)`

// A restored row is to be sent again if the restored cursor had not seen it. A row that was written here after the restore, before
// the outbox was adopted, is too; it is told by its tuple's xmin, which is that of its own transaction or of a savepoint in it, while
// a restored row's is that of the restore.
const restoredUnseen = `
CREATE TEMPORARY TABLE outbox_unseen ON COMMIT DROP AS
SELECT o.* FROM outbox AS o JOIN outbox_shards AS s USING (shard)
WHERE NOT pg_visible_in_snapshot(o.xid, s.prev) AND (s.next IS NULL OR o.id > s.after_id OR NOT pg_visible_in_snapshot(o.xid, s.next))
   OR (o.xmin::text::bigint - o.xid::text::numeric % 4294967296 + 4294967296) % 4294967296 < $1`

const outboxColumns = `sequence, shard, message_id, order_id, type, trace, topic, key, headers, payload, pack`

// AdoptOutbox makes the outbox of a restored dump this server's own (F41): its transaction ids mean nothing here. Rows that the
// restored cursors had not seen are written again, in order, under new ids; everything else goes with the old partitions. It answers
// how many were written again; on a server where the outbox is at home it does nothing. Kafka may be ahead of the restored database:
// its consumers are rewound by a set time, and deduplicate.
func (db *DB) AdoptOutbox(ctx context.Context) (rows int64, err error) {
	var foreign bool
	var before string
	err = db.query(ctx, Operators, "look whose outbox this is", outboxIsForeign, nil, func(r pgx.Rows) error { return r.Scan(&foreign) })
	if err != nil || !foreign {
		return 0, err
	}
	// This snapshot becomes the cursor. It is older than the transaction below, whose rows it therefore does not show.
	err = db.query(ctx, Operators, "snapshot", `SELECT pg_current_snapshot()::text`, nil, func(r pgx.Rows) error { return r.Scan(&before) })
	if err != nil {
		return 0, err
	}
	err = db.inOutboxTx(ctx, "adopt the restored outbox", adoptTimeout, func(tx pgx.Tx) error {
		if err := tx.QueryRow(ctx, outboxIsForeign).Scan(&foreign); err != nil || !foreign {
			return err // another process was faster
		}
		rows, err = adopt(ctx, tx, before)
		return err
	})
	return rows, err
}

func adopt(ctx context.Context, tx pgx.Tx, before string) (int64, error) {
	if _, err := tx.Exec(ctx, `LOCK TABLE outbox IN ACCESS EXCLUSIVE MODE`); err != nil {
		return 0, err
	}
	if _, err := tx.Exec(ctx, restoredUnseen, int64(adoptedDrift)); err != nil {
		return 0, fmt.Errorf("find the rows that were not relayed: %w", err)
	}
	list, latest, err := outboxPartitions(ctx, tx)
	if err != nil {
		return 0, err
	}
	for _, p := range list {
		if _, err := tx.Exec(ctx, `DROP TABLE `+pgx.Identifier{p.name}.Sanitize()); err != nil {
			return 0, err
		}
	}
	oldest, _, _ := strings.Cut(before, ":")
	from, err := strconv.ParseInt(oldest, 10, 64)
	if err != nil {
		return 0, err
	}
	p := outboxPartition{partitionStart + oldest, from, latest + OutboxSpan}
	for _, sql := range []string{p.create(), p.attach()} {
		if _, err := tx.Exec(ctx, sql); err != nil {
			return 0, err
		}
	}
	tag, err := tx.Exec(ctx, `INSERT INTO outbox (`+outboxColumns+`) SELECT `+outboxColumns+` FROM outbox_unseen ORDER BY id`)
	if err != nil {
		return 0, fmt.Errorf("write the rows again: %w", err)
	}
	_, err = tx.Exec(ctx, `
UPDATE outbox_shards SET prev = $1::text::pg_snapshot, next = NULL, after_id = 0, owner = NULL, lease_until = NULL, fence = fence + 1,
  system_id = `+thisSystem+`, database_id = `+thisDatabase, before)
	if err == nil {
		_, err = tx.Exec(ctx, `DELETE FROM outbox_relays`)
	}
	return tag.RowsAffected(), err
}
