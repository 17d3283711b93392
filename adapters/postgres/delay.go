package postgres

import (
	"context"
	"time"

	"github.com/jackc/pgx/v5"
)

// Fate is what has become of orders that were placed in some period.
type Fate struct {
	Placed  int
	Pending int
	Away    bool // some dependency is reported as away: that they are pending may be for that
}

// A list of the index's first rows in the range; orders of clients that draw ids of other kinds are not in it, and do not matter to a sample.
const fateOf = `
SELECT count(*), count(*) FILTER (WHERE status = 'pending'), EXISTS (SELECT FROM outages WHERE seen_at > now() - $4::interval)
FROM (SELECT status FROM sagas WHERE order_id >= $1 AND order_id < $2 ORDER BY order_id LIMIT $3) AS s`

// FateOf looks at the first orders, up to limit, that were placed from a moment until another. It goes by the time in their ids (UUIDv7), costs the
// same however many orders there are, and knows those of every process.
func (db *DB) FateOf(ctx context.Context, from, until time.Time, limit int) (f Fate, err error) {
	args := []any{firstID(from), firstID(until), limit, awayFor}
	err = db.query(ctx, Operators, "look at orders of a while ago", fateOf, args, func(r pgx.Rows) error { return r.Scan(&f.Placed, &f.Pending, &f.Away) })
	return f, err
}

// StartedWithin counts sagas under way, up to limit, whose deadline is at least so far ahead: with the forward deadline less some time, those that
// were placed within it. Those that stand still for longer are not among them. It costs 0.2 to 1 µs for each that it counts.
func (db *DB) StartedWithin(ctx context.Context, ahead time.Duration, limit int64) (n int64, err error) {
	const q = `SELECT count(*) FROM (SELECT FROM sagas WHERE deadline >= now() + $1::interval LIMIT $2) AS s`
	err = db.query(ctx, Operators, "count sagas under way", q, []any{ahead, limit}, func(r pgx.Rows) error { return r.Scan(&n) })
	return n, err
}
