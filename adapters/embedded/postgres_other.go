//go:build !unix

package embedded

import (
	"context"
	"errors"
)

// ErrStopped says that the server was stopped for good.
var ErrStopped = errors.New("the private PostgreSQL was stopped")

var errNoPostgres = errors.New("a private PostgreSQL runs on Linux and macOS only: give a running server in ORDERSAGA_DATABASE_URL")

// Postgres cannot be had on this system: StartPostgres fails, so there is never one.
type Postgres struct{}

// StartPostgres fails and says what to do.
func StartPostgres(context.Context, PostgresConfig) (*Postgres, error) { return nil, errNoPostgres }

// URL is empty.
func (*Postgres) URL() string { return "" }

// ClusterDir is empty.
func (*Postgres) ClusterDir() string { return "" }

// LogFile is empty.
func (*Postgres) LogFile() string { return "" }

// Version is 0.
func (*Postgres) Version() int { return 0 }

// User is empty.
func (*Postgres) User() string { return "" }

// Done is never closed.
func (*Postgres) Done() <-chan struct{} { return nil }

// Kill fails.
func (*Postgres) Kill() error { return errNoPostgres }

// Restart fails.
func (*Postgres) Restart(context.Context) error { return errNoPostgres }

// Stop fails.
func (*Postgres) Stop(context.Context) error { return errNoPostgres }
