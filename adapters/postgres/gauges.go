package postgres

import (
	"context"

	"github.com/jackc/pgx/v5"

	"ordersaga/events"
)

// CountOpenDead counts the open dead letters of each group.
func (db *DB) CountOpenDead(ctx context.Context) (map[events.Group]int64, error) {
	out := map[events.Group]int64{}
	err := db.query(ctx, Operators, "count open dead letters", `SELECT grp, count(*) FROM dead_letters WHERE status = 'open' GROUP BY 1`, nil, func(r pgx.Rows) error {
		var group string
		var n int64
		err := r.Scan(&group, &n)
		out[events.Group(group)] = n
		return err
	})
	return out, err
}

// SagasUnderWay counts the sagas that have not ended, up to bound, along the index on deadlines.
func (db *DB) SagasUnderWay(ctx context.Context, bound int64) (n int64, err error) {
	const q = `SELECT count(*) FROM (SELECT 1 FROM sagas s WHERE ` + underWay + ` LIMIT $1) x`
	err = db.query(ctx, Operators, "count sagas under way", q, []any{bound}, func(r pgx.Rows) error { return r.Scan(&n) })
	return n, err
}
