package postgres

import (
	"fmt"
	"strings"
	"time"

	"github.com/google/uuid"

	"ordersaga/domain"
)

// overRows is a statement over rows u that are its parameters, in two forms: several are arrays, a column each; one is plain values, which
// at low rates is nearly every batch and costs a quarter to a third less.
type overRows struct{ one, many string }

// over writes both forms. Columns are "id uuid, name text" for $1 and $2; parameters behind them are the statement's own.
//
// Where a SELECT lists several unnest they run side by side; in FROM each would be written to a table of its own first.
func over(columns string, sql func(u string) string) overRows {
	one, many := strings.Split(columns, ", "), strings.Split(columns, ", ")
	for i, c := range one {
		name, kind, _ := strings.Cut(c, " ")
		one[i] = fmt.Sprintf("$%d::%s AS %s", i+1, kind, name)
		many[i] = fmt.Sprintf("unnest($%d::%s[]) AS %s", i+1, kind, name)
	}
	return overRows{
		one:  sql("(SELECT " + strings.Join(one, ", ") + ") AS u"),
		many: sql("(SELECT " + strings.Join(many, ", ") + ") AS u"),
	}
}

// queueRows adds a statement over n rows; columns are slices of n values.
func (t *Tx) queueRows(name string, s overRows, n int, columns []any, more ...any) {
	if n > 1 {
		t.queue(name, s.many, append(columns, more...)...)
		return
	}
	for i := range columns {
		columns[i] = first(columns[i])
	}
	t.queue(name, s.one, append(columns, more...)...)
}

// first is the only value of a column.
func first(column any) any {
	switch c := column.(type) {
	case []domain.OrderID:
		return [16]byte(c[0])
	case []uuid.UUID:
		return [16]byte(c[0])
	case []string:
		return c[0]
	case []int16:
		return c[0]
	case []int32:
		return c[0]
	case []int64:
		return c[0]
	case []bool:
		return c[0]
	case [][]byte:
		return c[0]
	case []*time.Time:
		return c[0]
	}
	panic(fmt.Sprintf("postgres: a column of %T", column))
}
