package postgres

import (
	"context"
	"fmt"
	"net/url"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"ordersaga/adapters/embedded"
)

// One server for the package, started by the first test that needs it, with a migrated database that each test gets a copy of.
var server struct {
	sync.Once
	pg  *embedded.Postgres
	err error
	n   atomic.Int64
}

const template = "ordersaga_template"

func TestMain(m *testing.M) {
	code := m.Run()
	if server.pg != nil {
		if err := server.pg.Stop(context.Background()); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	if err := goleak.Find(); code == 0 && err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

func databaseURL(tb testing.TB, database string) string {
	tb.Helper()
	server.Do(func() {
		server.pg, server.err = embedded.StartPostgres(context.Background(), embedded.PostgresConfig{Settings: map[string]string{"max_connections": "300"}})
		if server.err == nil {
			server.err = makeTemplate(context.Background())
		}
	})
	require.NoError(tb, server.err)
	return urlOf(database)
}

func urlOf(database string) string {
	u, err := url.Parse(server.pg.URL())
	if err != nil {
		panic(err)
	}
	u.Path = "/" + database
	return u.String()
}

func makeTemplate(ctx context.Context) error {
	if err := onServer(ctx, "CREATE DATABASE "+template); err != nil {
		return err
	}
	db, err := Open(ctx, Config{URL: urlOf(template)})
	if err != nil {
		return err
	}
	defer db.Close()
	_, err = Migrate(ctx, db, Up)
	return err
}

func onServer(ctx context.Context, sql string) error {
	c, err := pgx.Connect(ctx, server.pg.URL())
	if err != nil {
		return err
	}
	_, err = c.Exec(ctx, sql)
	if cerr := c.Close(ctx); err == nil {
		err = cerr
	}
	return err
}

// newDB answers a database of the test's own with the newest schema.
func newDB(tb testing.TB, change ...func(*Config)) *DB {
	tb.Helper()
	return openCopy(tb, template, change...)
}

// emptyDB answers a database of the test's own that was never migrated.
func emptyDB(tb testing.TB, change ...func(*Config)) *DB {
	tb.Helper()
	return openCopy(tb, "template0", change...)
}

func openCopy(tb testing.TB, of string, change ...func(*Config)) *DB {
	tb.Helper()
	databaseURL(tb, "")
	name := fmt.Sprintf("t%d", server.n.Add(1))
	require.NoError(tb, onServer(context.Background(), fmt.Sprintf("CREATE DATABASE %s TEMPLATE %s", name, of)))
	cfg := Config{URL: urlOf(name)}
	for _, f := range change {
		f(&cfg)
	}
	db, err := Open(context.Background(), cfg)
	require.NoError(tb, err)
	tb.Cleanup(func() {
		db.Close()
		require.NoError(tb, onServer(context.Background(), "DROP DATABASE "+name+" WITH (FORCE)"))
	})
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
