package postgres

import (
	"context"
	"database/sql"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/jackc/pgx/v5/stdlib"
	"github.com/pressly/goose/v3"
)

//go:embed migrations/*.sql
var migrationFiles embed.FS

// Advisory locks of ours: a key of two numbers, the first of which says what for. The numbers are part of the contract between
// processes of different versions.
const (
	lockClass     = 0x0d5a_0001
	lockMigrate   = 1
	lockMaintain  = 2
	lockOrderIDs  = 0x0d5a_0002 // a class of its own: the second number is a bucket of order ids
	orderIDBucket = 4096
)

// MigrateCommand is what Migrate shall do.
type MigrateCommand string

// The commands of Migrate.
const (
	Up    MigrateCommand = "up"    // apply all that are pending
	Down  MigrateCommand = "down"  // undo the last one
	Reset MigrateCommand = "reset" // undo all: every table goes
)

// Migration is one step of the schema.
type Migration struct {
	Version int64
	Name    string    // 00001_schema
	Applied time.Time // zero: pending
	Took    time.Duration
}

// Migrate changes the schema, under an advisory lock so that several processes may start at once. Each step is a transaction: one
// that fails leaves the database as it was before it. It answers what was done, also beside an error. After Up the partitions of the inbox are made.
func Migrate(ctx context.Context, db *DB, cmd MigrateCommand) ([]Migration, error) {
	files, err := fs.Sub(migrationFiles, "migrations")
	if err != nil {
		return nil, fmt.Errorf("postgres: embedded migrations: %w", err)
	}
	done, err := migrate(ctx, db, files, cmd)
	if err == nil && cmd == Up {
		err = db.MakePartitions(ctx)
	}
	return done, err
}

func migrate(ctx context.Context, db *DB, files fs.FS, cmd MigrateCommand) (done []Migration, err error) {
	var results []*goose.MigrationResult
	err = db.locked(ctx, lockMigrate, func(ctx context.Context) error {
		return withGoose(db, files, func(p *goose.Provider) (err error) {
			switch cmd {
			case Up:
				results, err = p.Up(ctx)
			case Reset:
				results, err = p.DownTo(ctx, 0)
			case Down:
				var r *goose.MigrationResult
				if r, err = p.Down(ctx); r != nil {
					results = append(results, r)
				}
				if errors.Is(err, goose.ErrNoNextVersion) {
					err = errors.New("nothing to undo: the database is at version 0")
				}
			default:
				err = fmt.Errorf("unknown command %q: up, down or reset", cmd)
			}
			return err
		})
	})
	if partial, is := errors.AsType[*goose.PartialError](err); is {
		results = partial.Applied
		err = fmt.Errorf("migration %s failed and was rolled back: %w", path.Base(partial.Failed.Source.Path), partial.Err)
	}
	for _, r := range results {
		done = append(done, Migration{Version: r.Source.Version, Name: stem(r.Source.Path), Applied: db.Now(), Took: r.Duration})
	}
	if err != nil {
		return done, fmt.Errorf("postgres: migrate %s: %w", cmd, err)
	}
	return done, nil
}

func stem(file string) string {
	b := path.Base(file)
	return b[:len(b)-len(path.Ext(b))]
}

// withGoose hands over a provider on the operators' pool.
func withGoose(db *DB, files fs.FS, fn func(p *goose.Provider) error) (err error) {
	std := stdlib.OpenDBFromPool(db.pools[Operators])
	defer func() { err = errors.Join(err, std.Close()) }() // the pool itself stays open
	return provide(std, files, fn)
}

func provide(std *sql.DB, files fs.FS, fn func(p *goose.Provider) error) error {
	p, err := goose.NewProvider(goose.DialectPostgres, std, files)
	if err != nil {
		return fmt.Errorf("read migrations: %w", err)
	}
	return fn(p)
}

// Migrations lists all steps with when they were applied.
func Migrations(ctx context.Context, db *DB) ([]Migration, error) {
	files, err := fs.Sub(migrationFiles, "migrations")
	if err != nil {
		return nil, fmt.Errorf("postgres: embedded migrations: %w", err)
	}
	var out []Migration
	err = withGoose(db, files, func(p *goose.Provider) error {
		list, err := p.Status(ctx)
		for _, s := range list {
			out = append(out, Migration{Version: s.Source.Version, Name: stem(s.Source.Path), Applied: s.AppliedAt})
		}
		return err
	})
	return out, classify(ctx, "migration status", err)
}

// SchemaVersion answers the version that the database is at (0: never migrated) and the one that this binary needs.
func SchemaVersion(ctx context.Context, db *DB) (has, needs int64, err error) {
	entries, err := fs.ReadDir(migrationFiles, "migrations")
	if err != nil {
		return 0, 0, fmt.Errorf("postgres: embedded migrations: %w", err)
	}
	for _, e := range entries {
		v, err := goose.NumericComponent(e.Name())
		if err != nil {
			return 0, 0, fmt.Errorf("postgres: embedded migration %s: %w", e.Name(), err)
		}
		needs = max(needs, v)
	}
	c, err := db.acquire(ctx, db.pools[Operators])
	if err != nil {
		return 0, needs, err
	}
	defer c.Release()
	var there bool
	err = c.QueryRow(ctx, `SELECT to_regclass('goose_db_version') IS NOT NULL`).Scan(&there)
	if err == nil && there {
		err = c.QueryRow(ctx, `SELECT coalesce(max(version_id), 0) FROM goose_db_version WHERE is_applied`).Scan(&has)
	}
	return has, needs, classify(ctx, "schema version", err)
}

// CheckSchema answers an error that says what to do if the database is older than this binary. A newer one is fine: in a rolling
// upgrade the new binary migrates first, and steps only add what old ones do not miss.
func CheckSchema(ctx context.Context, db *DB) error {
	has, needs, err := SchemaVersion(ctx, db)
	if err == nil && has < needs {
		err = &schemaBehindError{has, needs}
	}
	return err
}

// schemaBehindError is a database that waits for its migration.
type schemaBehindError struct{ has, needs int64 }

func (e *schemaBehindError) Error() string {
	return fmt.Sprintf("postgres: the database is at version %d, this binary needs %d: run ordersaga migrate up", e.has, e.needs)
}

// SchemaBehind reports that a migration mends it: a process that is starting may wait for that.
func (*schemaBehindError) SchemaBehind() bool { return true }

// locked runs fn while holding one of the process-wide advisory locks, waiting for it. The lock is a session's: its connection
// is held beside those that fn takes, which is no transaction's second connection.
func (db *DB) locked(ctx context.Context, lock int32, fn func(ctx context.Context) error) error {
	return db.session(ctx, func(c *pgxpool.Conn) (err error) {
		if _, err = c.Exec(ctx, `SELECT pg_advisory_lock($1, $2)`, int32(lockClass), lock); err != nil {
			return classify(ctx, "advisory lock", err)
		}
		defer func() { err = errors.Join(err, unlock(ctx, c, lock)) }()
		return fn(ctx)
	})
}

// session hands over one connection of the operators' pool.
func (db *DB) session(ctx context.Context, fn func(c *pgxpool.Conn) error) error {
	c, err := db.acquire(ctx, db.pools[Operators])
	if err != nil {
		return err
	}
	defer c.Release()
	return fn(c)
}

// unlock gives an advisory lock back; if it can't, the connection is closed, which gives it back too.
func unlock(ctx context.Context, c *pgxpool.Conn, lock int32) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), rollbackTimeout)
	defer cancel()
	if _, err := c.Exec(ctx, `SELECT pg_advisory_unlock($1, $2)`, int32(lockClass), lock); err != nil {
		return c.Conn().Close(ctx)
	}
	return nil
}
