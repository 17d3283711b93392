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
