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
