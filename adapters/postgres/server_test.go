package postgres

import (
	"context"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"ordersaga/adapters/embedded/testenv"
)

func TestMain(m *testing.M) { testenv.MainNoLeaks(m) }

// newDB answers a database of the test's own with the newest schema.
func newDB(tb testing.TB, change ...func(*Config)) *DB {
	tb.Helper()
	return open(tb, testenv.PostgresTemplate(tb, "schema", func(ctx context.Context, url string) error {
		db, err := Open(ctx, Config{URL: url})
		if err != nil {
			return err
		}
		defer db.Close()
		_, err = Migrate(ctx, db, Up)
		return err
	}), change...)
}

// emptyDB answers a database of the test's own that was never migrated.
func emptyDB(tb testing.TB, change ...func(*Config)) *DB {
	tb.Helper()
	return open(tb, testenv.Postgres(tb), change...)
}

func open(tb testing.TB, url string, change ...func(*Config)) *DB {
	tb.Helper()
	cfg := Config{URL: url}
	for _, f := range change {
		f(&cfg)
	}
	db, err := Open(context.Background(), cfg)
	require.NoError(tb, err)
	tb.Cleanup(db.Close)
	return db
}

// rawExec runs SQL past everything.
func rawExec(tb testing.TB, db *DB, sql string, args ...any) {
	tb.Helper()
	_, err := db.Pool(Operators).Exec(context.Background(), sql, args...)
	require.NoError(tb, err, sql)
}

// one answers the single value of a query.
func one[T any](tb testing.TB, db *DB, sql string, args ...any) (v T) {
	tb.Helper()
	require.NoError(tb, db.Pool(Operators).QueryRow(context.Background(), sql, args...).Scan(&v), sql)
	return v
}

// soon bounds waits on what happens within milliseconds.
const soon = 10 * time.Second
