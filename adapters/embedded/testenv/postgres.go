//go:build unix

package testenv

import (
	"context"
	"fmt"
	"net/url"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"ordersaga/adapters/embedded"
)

const (
	// DatabaseURLVariable names a server, by a URL of a role that may create databases, to use instead of a private one.
	DatabaseURLVariable = "ORDERSAGA_TEST_DATABASE_URL"
	// databasePrefix begins the names of our databases; the rest is the hour they were made and random digits.
	databasePrefix = "ordersaga_test_"
	// staleAfter is the age at which a database that a killed test process left on a lasting server is removed.
	staleAfter = 6 * time.Hour
	// strategyMajor is the version from which on CREATE DATABASE can be told how to copy.
	strategyMajor = 15
	// databaseTimeout bounds making or dropping one database.
	databaseTimeout = time.Minute
	// serverStartTimeout bounds the start of a server; fetching its binaries is what takes long.
	serverStartTimeout = 3 * time.Minute
)

// testSettings suit many small pools on one server.
func testSettings() map[string]string {
	return map[string]string{"max_connections": "400", "track_commit_timestamp": "on", "max_locks_per_transaction": "256"}
}

// server is where databases are made.
type server struct {
	url string
	// copying ends CREATE DATABASE: copying files takes a third of the time of logging each page where nothing is synced to disk.
	copying string

	mu        sync.Mutex
	templates map[string]string // by the caller's key
}

var postgres once[*server]

// Postgres returns the URL of an empty database that is this test's alone and is dropped at its end.
func Postgres(tb testing.TB) string {
	tb.Helper()
	return sharedServer(tb).create(tb, "template0")
}

// PostgresTemplate is Postgres with content: prepare fills a database once per process and key, and every call returns a copy of it,
// which takes some tens of milliseconds. Prepare must close its connections.
func PostgresTemplate(tb testing.TB, key string, prepare func(ctx context.Context, url string) error) string {
	tb.Helper()
	s := sharedServer(tb)
	template, err := s.template(key, prepare)
	if err != nil {
		tb.Fatalf("prepare the template database %q: %v", key, err)
	}
	return s.create(tb, template)
}

// PostgresServer starts a server that is this test's alone, to be killed and restarted. It has fsync off, which a kill -9 of its
// processes does not notice.
func PostgresServer(tb testing.TB) *embedded.Postgres {
	tb.Helper()
	ctx, cancel := context.WithTimeout(tb.Context(), serverStartTimeout)
	defer cancel()
	pg, err := embedded.StartPostgres(ctx, embedded.PostgresConfig{Settings: testSettings()})
	need(tb, "a private PostgreSQL", err)
	stopWith(tb, "PostgreSQL", pg.Stop)
	return pg
}

func sharedServer(tb testing.TB) *server {
	tb.Helper()
	s, err := postgres.get(startServer)
	need(tb, "PostgreSQL", err)
	return s
}

func startServer() (*server, error) {
	ctx, cancel := context.WithTimeout(context.Background(), serverStartTimeout)
	defer cancel()
	s := &server{url: os.Getenv(DatabaseURLVariable), templates: map[string]string{}}
	if s.url == "" {
		pg, err := embedded.StartPostgres(ctx, embedded.PostgresConfig{Settings: testSettings()})
		if err != nil {
			return nil, err //nolint:wrapcheck // says it all
		}
		stopAtEnd(pg.Stop)
		s.url = pg.URL()
		if pg.Version() >= strategyMajor {
			s.copying = " STRATEGY file_copy"
		}
		return s, nil
	}
	if err := s.dropStale(ctx); err != nil {
		return nil, &givenError{variable: DatabaseURLVariable, err: err}
	}
	stopAtEnd(s.dropTemplates)
	return s, nil
}

func (s *server) create(tb testing.TB, template string) string {
	tb.Helper()
	name := databaseName(randomHex(tb, 6))
	ctx, cancel := context.WithTimeout(tb.Context(), databaseTimeout)
	defer cancel()
	if err := s.exec(ctx, "CREATE DATABASE "+name+" TEMPLATE "+template+s.copying); err != nil {
		tb.Fatalf("make a test database: %v", err)
	}
	stopWith(tb, "using database "+name, func(ctx context.Context) error {
		// Forced: a pool that the test forgot must not keep it; goleak is there to find that.
		return s.exec(ctx, "DROP DATABASE IF EXISTS "+name+" WITH (FORCE)")
	})
	address, err := s.database(name)
	if err != nil {
		tb.Fatalf("make a test database: %v", err)
	}
	return address
}

func (s *server) template(key string, prepare func(context.Context, string) error) (string, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if name, ok := s.templates[key]; ok {
		return name, nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), databaseTimeout)
	defer cancel()
	name := databaseName(fmt.Sprintf("template%d_%d", os.Getpid(), len(s.templates)))
	if err := s.exec(ctx, "CREATE DATABASE "+name+" TEMPLATE template0"+s.copying); err != nil {
		return "", err
	}
	address, err := s.database(name)
	if err != nil {
		return "", err
	}
	if err := prepare(ctx, address); err != nil {
		if dropErr := s.exec(ctx, "DROP DATABASE "+name+" WITH (FORCE)"); dropErr != nil {
			return "", fmt.Errorf("%w; and then: %w", err, dropErr)
		}
		return "", err
	}
	// A connection would make every later copy fail.
	if err := s.exec(ctx, "ALTER DATABASE "+name+" ALLOW_CONNECTIONS false"); err != nil {
		return "", err
	}
	s.templates[key] = name
	return name, nil
}

func (s *server) dropTemplates(ctx context.Context) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for key, name := range s.templates {
		if err := s.exec(ctx, "DROP DATABASE IF EXISTS "+name+" WITH (FORCE)"); err != nil {
			return err
		}
		delete(s.templates, key)
	}
	return nil
}

// dropStale removes what test processes that were killed left on a lasting server.
func (s *server) dropStale(ctx context.Context) error {
	conn, err := pgx.Connect(ctx, s.url)
	if err != nil {
		return fmt.Errorf("connect: %w", err)
	}
	defer conn.Close(ctx) //nolint:errcheck // nothing is lost
	rows, err := conn.Query(ctx, "SELECT datname FROM pg_database WHERE datname LIKE $1", strings.ReplaceAll(databasePrefix, "_", `\_`)+"%")
	if err != nil {
		return fmt.Errorf("list databases: %w", err)
	}
	names, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return fmt.Errorf("list databases: %w", err)
	}
	for _, name := range names {
		made, _, _ := strings.Cut(strings.TrimPrefix(name, databasePrefix), "_")
		seconds, err := strconv.ParseInt(made, 10, 64)
		if err != nil || time.Since(time.Unix(seconds, 0)) < staleAfter {
			continue
		}
		if _, err := conn.Exec(ctx, "DROP DATABASE IF EXISTS "+pgx.Identifier{name}.Sanitize()+" WITH (FORCE)"); err != nil {
			return fmt.Errorf("drop %s, which an earlier test run left: %w", name, err)
		}
	}
	return nil
}

func (s *server) exec(ctx context.Context, sql string) error {
	conn, err := pgx.Connect(ctx, s.url)
	if err != nil {
		return fmt.Errorf("connect: %w", err)
	}
	defer conn.Close(ctx) //nolint:errcheck // nothing is lost
	if _, err := conn.Exec(ctx, sql); err != nil {
		return fmt.Errorf("%s: %w", sql, err)
	}
	return nil
}

// database is the server's URL with another database.
func (s *server) database(name string) (string, error) {
	u, err := url.Parse(s.url)
	if err != nil || u.Scheme == "" {
		return "", fmt.Errorf("%s must be a URL, postgres://user:password@host:port/database", DatabaseURLVariable)
	}
	u.Path = "/" + name
	return u.String(), nil
}

func databaseName(rest string) string {
	return databasePrefix + strconv.FormatInt(time.Now().Unix(), 10) + "_" + rest
}
