//go:build unix

package embedded_test

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	"ordersaga/adapters/embedded"
	"ordersaga/adapters/embedded/internal/child"
)

func splitPort(addr string) (string, int, error) {
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return "", 0, err
	}
	n, err := strconv.Atoi(port)
	return host, n, err
}

// enterable makes a directory that every user may enter, unlike t.TempDir.
func enterable(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "ordersaga-test-") //nolint:usetesting // see above
	require.NoError(t, err)
	require.NoError(t, os.Chmod(dir, 0o755))
	t.Cleanup(func() { require.NoError(t, os.RemoveAll(dir)) })
	return dir
}

func connect(ctx context.Context, t *testing.T, url string) *pgx.Conn {
	t.Helper()
	conn, err := pgx.Connect(ctx, url)
	require.NoError(t, err)
	return conn
}

func run(ctx context.Context, t *testing.T, url, sql string) {
	t.Helper()
	conn := connect(ctx, t, url)
	_, err := conn.Exec(ctx, sql)
	require.NoError(t, err)
	require.NoError(t, conn.Close(ctx))
}

func query(ctx context.Context, t *testing.T, url, sql string) string {
	t.Helper()
	conn := connect(ctx, t, url)
	var value string
	require.NoError(t, conn.QueryRow(ctx, sql).Scan(&value))
	require.NoError(t, conn.Close(ctx))
	return value
}

func timed(t *testing.T, what string, f func()) {
	t.Helper()
	begin := time.Now()
	f()
	t.Logf("%s: %v", what, time.Since(begin).Round(time.Millisecond))
}

func TestPostgresTemporary(t *testing.T) {
	ctx := testContext(t)
	var pg *embedded.Postgres
	timed(t, "start a temporary server", func() {
		var err error
		pg, err = embedded.StartPostgres(ctx, embedded.PostgresConfig{Settings: map[string]string{"max_connections": "37", "track_commit_timestamp": "on"}})
		require.NoError(t, err)
	})
	require.Equal(t, "37", query(ctx, t, pg.URL(), "SHOW max_connections"))
	require.Equal(t, "on", query(ctx, t, pg.URL(), "SHOW track_commit_timestamp"))
	require.Equal(t, "off", query(ctx, t, pg.URL(), "SHOW fsync"))
	require.Equal(t, "127.0.0.1", query(ctx, t, pg.URL(), "SHOW listen_addresses"))
	require.Empty(t, query(ctx, t, pg.URL(), "SHOW unix_socket_directories"))
	require.Equal(t, "ordersaga", query(ctx, t, pg.URL(), "SELECT current_database()"))

	bad, err := pgx.ParseConfig(pg.URL())
	require.NoError(t, err)
	bad.Password = "guess"
	_, err = pgx.ConnectConfig(ctx, bad)
	require.ErrorContains(t, err, "28P01", "loopback is open to every user of the machine: a password is asked for")

	timed(t, "stop a temporary server", func() { require.NoError(t, pg.Stop(ctx)) })
	require.NoDirExists(t, filepath.Dir(pg.ClusterDir()))
	require.NoError(t, pg.Stop(ctx), "a second Stop is harmless")
	require.ErrorIs(t, pg.Restart(ctx), embedded.ErrStopped)
}

func TestPostgresRestartsOnItsData(t *testing.T) {
	ctx := testContext(t)
	dir := filepath.Join(enterable(t), strings.Repeat("a-long-name-", 12), "postgres") // too long for a Unix socket
	cfg := embedded.PostgresConfig{DataDir: dir}
	var pg *embedded.Postgres
	var err error
	timed(t, "first start", func() {
		pg, err = embedded.StartPostgres(ctx, cfg)
		require.NoError(t, err)
	})
	require.Equal(t, "on", query(ctx, t, pg.URL(), "SHOW fsync"))
	run(ctx, t, pg.URL(), "CREATE TABLE kept AS SELECT 'yes' AS value")
	info, err := os.Stat(filepath.Join(dir, "password"))
	require.NoError(t, err)
	require.Equal(t, os.FileMode(0o600), info.Mode().Perm())

	_, err = embedded.StartPostgres(ctx, cfg)
	var running *embedded.AlreadyRunningError
	require.ErrorAs(t, err, &running)
	require.NotEmpty(t, running.Addrs["postgres"])

	first := pg.URL()
	timed(t, "stop", func() { require.NoError(t, pg.Stop(ctx)) })
	timed(t, "second start", func() {
		pg, err = embedded.StartPostgres(ctx, cfg)
		require.NoError(t, err)
	})
	require.Equal(t, first, pg.URL(), "the same port and password")
	require.Equal(t, "yes", query(ctx, t, pg.URL(), "SELECT value FROM kept"))
	require.NoError(t, pg.Stop(ctx))
}

func TestPostgresKillAndRestart(t *testing.T) {
	ctx := testContext(t)
	pg, err := embedded.StartPostgres(ctx, embedded.PostgresConfig{DataDir: enterable(t)})
	require.NoError(t, err)
	run(ctx, t, pg.URL(), "CREATE TABLE n (i bigint)")
	for round := 1; round <= 3; round++ {
		run(ctx, t, pg.URL(), "INSERT INTO n SELECT generate_series(1, 1000)")
		open := connect(ctx, t, pg.URL())
		_, err := open.Exec(ctx, "BEGIN; INSERT INTO n VALUES (-1)")
		require.NoError(t, err)
		done := pg.Done()
		timed(t, "kill -9", func() { require.NoError(t, pg.Kill()) })
		<-done
		_, err = pgx.Connect(ctx, pg.URL())
		require.Error(t, err)
		_ = open.Close(ctx)
		timed(t, "recovery", func() { require.NoError(t, pg.Restart(ctx)) })
		require.Equal(t, fmt.Sprintf("%d 0", round*1000),
			query(ctx, t, pg.URL(), "SELECT count(*) || ' ' || count(*) FILTER (WHERE i < 0) FROM n"), "all that was committed, nothing else")
	}
	timed(t, "orderly restart", func() { require.NoError(t, pg.Restart(ctx)) })
	require.NoError(t, pg.Kill())
	require.NoError(t, pg.Kill(), "killing a dead server is harmless")
	require.NoError(t, pg.Stop(ctx), "and so is stopping it")
}

// A session with an open transaction does not hold Stop up, and neither does a context that is done.
func TestPostgresStopComesBack(t *testing.T) {
	ctx := testContext(t)
	pg, err := embedded.StartPostgres(ctx, embedded.PostgresConfig{DataDir: enterable(t)})
	require.NoError(t, err)
	conn := connect(ctx, t, pg.URL())
	_, err = conn.Exec(ctx, "BEGIN; CREATE TABLE open ()")
	require.NoError(t, err)
	cancelled, cancel := context.WithCancel(ctx)
	cancel()
	timed(t, "stop with a done context", func() { require.NoError(t, pg.Stop(cancelled)) })
	_ = conn.Close(ctx)
}

func TestPostgresAnswersClearly(t *testing.T) {
	ctx := testContext(t)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer listener.Close()
	_, taken, err := splitPort(listener.Addr().String())
	require.NoError(t, err)
	for name, c := range map[string]struct {
		cfg  embedded.PostgresConfig
		want string
	}{
		"port taken":          {embedded.PostgresConfig{Port: taken}, "choose another port"},
		"no such folder":      {embedded.PostgresConfig{BinDir: "/no/such/folder"}, "PG_BINDIR"},
		"unknown setting":     {embedded.PostgresConfig{Settings: map[string]string{"no_such_setting": "1"}}, `unrecognized configuration parameter "no_such_setting"`},
		"a setting it owns":   {embedded.PostgresConfig{Settings: map[string]string{"listen_addresses": "*"}}, "the private server decides it itself"},
		"no setting at all":   {embedded.PostgresConfig{Settings: map[string]string{"fsync=off -c x": "1"}}, "not a parameter's name"},
		"unwritable data dir": {embedded.PostgresConfig{DataDir: "/proc/no"}, "choose a directory that this user may write to"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := embedded.StartPostgres(ctx, c.cfg)
			require.ErrorContains(t, err, c.want)
		})
	}
}

// runPostgresChild is the process that the tests kill, and the one that runs as another user.
func runPostgresChild() error {
	ctx, cancel := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer cancel()
	pg, err := embedded.StartPostgres(ctx, embedded.PostgresConfig{DataDir: os.Getenv("CHILD_DIR")})
	if err != nil {
		return err
	}
	fmt.Println("user", pg.User())
	fmt.Println("cluster", pg.ClusterDir())
	fmt.Println("url", pg.URL())
	<-ctx.Done()
	err = pg.Stop(context.Background())
	fmt.Println("stopped", err)
	return err
}

// postmasterPid reads the process id that the server on cluster wrote.
func postmasterPid(t *testing.T, cluster string) int {
	t.Helper()
	raw, err := os.ReadFile(filepath.Join(cluster, "postmaster.pid"))
	require.NoError(t, err)
	line, _, _ := strings.Cut(string(raw), "\n")
	pid, err := strconv.Atoi(line)
	require.NoError(t, err)
	return pid
}

// The process that started the server is killed: the server ends too, and a new process recovers the data.
func TestPostgresDoesNotOutliveItsParent(t *testing.T) {
	for _, persistent := range []bool{true, false} {
		t.Run(fmt.Sprintf("persistent=%v", persistent), func(t *testing.T) {
			ctx := testContext(t)
			dir := ""
			if persistent {
				dir = enterable(t)
			}
			c := startChild(t, "postgres", nil, "CHILD_DIR="+dir)
			cluster, url := c.hear(t, "cluster"), c.hear(t, "url")
			run(ctx, t, url, "CREATE TABLE kept AS SELECT 'yes' AS value")
			pid := postmasterPid(t, cluster)
			c.kill(t)
			if persistent {
				// At once: the old server may still be on its way out.
				var pg *embedded.Postgres
				timed(t, "restart right after kill -9 of the parent", func() {
					var err error
					pg, err = embedded.StartPostgres(ctx, embedded.PostgresConfig{DataDir: dir})
					require.NoError(t, err)
				})
				require.Equal(t, "yes", query(ctx, t, pg.URL(), "SELECT value FROM kept"))
				require.NoError(t, pg.Stop(ctx))
			}
			timed(t, "until the server is gone", func() {
				require.Eventually(t, func() bool { return child.Ended(pid) }, 10*time.Second, 10*time.Millisecond)
			})
			if !persistent {
				// The next one to make a temporary server removes it, when it is no longer young.
				require.NoError(t, os.Chtimes(filepath.Dir(cluster), time.Time{}, time.Now().Add(-time.Hour)))
				pg, err := embedded.StartPostgres(ctx, embedded.PostgresConfig{})
				require.NoError(t, err)
				require.NoDirExists(t, filepath.Dir(cluster))
				require.NoError(t, pg.Stop(ctx))
			}
		})
	}
}

// A server that got no signal when its parent died (another kernel) is ended by the next start, and a postmaster.pid whose number
// belongs to a stranger is not taken for a server.
func TestPostgresOrphanAndStalePidFile(t *testing.T) {
	ctx := testContext(t)
	dir := enterable(t)
	var pg *embedded.Postgres
	var err error
	timed(t, "first start", func() {
		pg, err = embedded.StartPostgres(ctx, embedded.PostgresConfig{DataDir: dir})
		require.NoError(t, err)
	})
	run(ctx, t, pg.URL(), "CREATE TABLE kept AS SELECT 'yes' AS value")
	pid := postmasterPid(t, pg.ClusterDir())
	// The lock is what tells the next start that nobody owns the server: without it this one is an orphan.
	require.NoError(t, os.Rename(filepath.Join(dir, "lock"), filepath.Join(dir, "lock.held")))

	var second *embedded.Postgres
	timed(t, "ending the orphan and starting", func() {
		second, err = embedded.StartPostgres(ctx, embedded.PostgresConfig{DataDir: dir})
		require.NoError(t, err)
	})
	<-pg.Done()
	require.NotEqual(t, pid, postmasterPid(t, second.ClusterDir()))
	require.Equal(t, "yes", query(ctx, t, second.URL(), "SELECT value FROM kept"))
	require.NoError(t, pg.Stop(ctx))

	cluster := second.ClusterDir()
	require.NoError(t, second.Kill())
	require.NoError(t, second.Stop(ctx))
	raw, err := os.ReadFile(filepath.Join(cluster, "postmaster.pid"))
	require.NoError(t, err, "kill -9 leaves it")
	_, rest, _ := strings.Cut(string(raw), "\n")
	require.NoError(t, os.WriteFile(filepath.Join(cluster, "postmaster.pid"), []byte(strconv.Itoa(os.Getppid())+"\n"+rest), 0o600)) //nolint:gosec // a file of this test
	third, err := embedded.StartPostgres(ctx, embedded.PostgresConfig{DataDir: dir})
	require.NoError(t, err)
	require.Equal(t, "yes", query(ctx, t, third.URL(), "SELECT value FROM kept"))
	require.NoError(t, third.Stop(ctx))
}

// A process killed in the middle of initdb leaves a half-made directory, which must not be taken for data.
func TestPostgresHalfMadeData(t *testing.T) {
	ctx := testContext(t)
	dir := enterable(t)
	require.NoError(t, os.MkdirAll(filepath.Join(dir, "pgdata.new", "data", "base"), 0o700))
	pg, err := embedded.StartPostgres(ctx, embedded.PostgresConfig{DataDir: dir})
	require.NoError(t, err)
	require.NoDirExists(t, filepath.Join(dir, "pgdata.new"))
	require.NoError(t, pg.Stop(ctx))
}

func TestPostgresOfAnotherVersion(t *testing.T) {
	ctx := testContext(t)
	dir := enterable(t)
	require.NoError(t, os.MkdirAll(filepath.Join(dir, "pgdata"), 0o700))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "pgdata", "PG_VERSION"), []byte("9\n"), 0o600))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "password"), []byte("secret\n"), 0o600))
	_, err := embedded.StartPostgres(ctx, embedded.PostgresConfig{DataDir: dir})
	require.ErrorContains(t, err, "no PostgreSQL 9 (the data's version) to run: found only")
	require.ErrorContains(t, err, "ORDERSAGA_DATABASE_URL")
	require.NoError(t, os.Remove(filepath.Join(dir, "password")))
	_, err = embedded.StartPostgres(ctx, embedded.PostgresConfig{DataDir: dir})
	require.ErrorContains(t, err, "has lost its password file")
}

// otherUser is an unprivileged user to run a child as; only root can.
func otherUser(t *testing.T) *syscall.Credential {
	t.Helper()
	found, err := user.Lookup("nobody")
	require.NoError(t, err)
	uid, err := strconv.ParseUint(found.Uid, 10, 32)
	require.NoError(t, err)
	gid, err := strconv.ParseUint(found.Gid, 10, 32)
	require.NoError(t, err)
	return &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}
}

// Whoever runs the tests is one case; root also tries an unprivileged user, on its own new data and on data that root made.
func TestPostgresAsRootAndAsAnotherUser(t *testing.T) {
	ctx := testContext(t)
	dir := enterable(t)
	c := startChild(t, "postgres", nil, "CHILD_DIR="+dir)
	name := c.hear(t, "user")
	run(ctx, t, c.hear(t, "url"), "CREATE TABLE kept AS SELECT 'yes' AS value")
	require.NoError(t, c.Signal(syscall.SIGTERM))
	require.Equal(t, "<nil>", c.hear(t, "stopped"))
	if os.Geteuid() != 0 {
		require.Equal(t, "uid "+strconv.Itoa(os.Geteuid()), name)
		return
	}
	require.Contains(t, []string{"postgres", "nobody"}, name)

	cred := otherUser(t)
	exe, err := os.Executable()
	require.NoError(t, err)
	require.NoError(t, openPath(exe), "the test binary must be one that the other user may run")
	own := enterable(t)
	require.NoError(t, os.Chown(own, int(cred.Uid), int(cred.Gid)))
	for round := range 2 {
		c = startChild(t, "postgres", cred, "CHILD_DIR="+filepath.Join(own, "made"), "HOME=/nonexistent", "TMPDIR=/tmp")
		require.Equal(t, fmt.Sprintf("uid %d", cred.Uid), c.hear(t, "user"))
		url := c.hear(t, "url")
		if round == 0 {
			run(ctx, t, url, "CREATE TABLE kept AS SELECT 'yes' AS value")
		}
		require.Equal(t, "yes", query(ctx, t, url, "SELECT value FROM kept"))
		require.NoError(t, c.Signal(syscall.SIGTERM))
		require.Equal(t, "<nil>", c.hear(t, "stopped"))
	}
	// Root goes on with a user's data as that user.
	pg, err := embedded.StartPostgres(ctx, embedded.PostgresConfig{DataDir: filepath.Join(own, "made")})
	require.NoError(t, err)
	require.Equal(t, fmt.Sprintf("uid %d", cred.Uid), pg.User())
	require.Equal(t, "yes", query(ctx, t, pg.URL(), "SELECT value FROM kept"))
	require.NoError(t, pg.Stop(ctx))

	// A user cannot go on with root's data, and is told so.
	c = startChild(t, "postgres", cred, "CHILD_DIR="+dir)
	<-c.Done()
	require.Error(t, c.Err())
	require.Contains(t, c.errs.String(), "permission denied")
}

// openPath lets everybody pass to a file that this process owns below a temporary directory.
func openPath(path string) error {
	for dir := filepath.Dir(path); strings.HasPrefix(dir, os.TempDir()+"/"); dir = filepath.Dir(dir) {
		if err := os.Chmod(dir, 0o755); err != nil {
			return err
		}
	}
	return nil
}

// Root's data directory lies where the server's user cannot enter: the database goes elsewhere, always to the same place.
func TestPostgresDataBelowAPrivateDirectory(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Log("only root hands the server to another user: nothing to try")
		return
	}
	ctx := testContext(t)
	private := enterable(t)
	require.NoError(t, os.Chmod(private, 0o700))
	dir := filepath.Join(private, "data")
	var log strings.Builder
	cfg := embedded.PostgresConfig{DataDir: dir, Log: slog.New(slog.NewTextHandler(&log, nil))}
	pg, err := embedded.StartPostgres(ctx, cfg)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, os.RemoveAll(filepath.Dir(pg.ClusterDir()))) })
	require.Regexp(t, `^/var/lib/ordersaga/postgres-[0-9a-f]{16}/pgdata$`, pg.ClusterDir())
	require.Contains(t, log.String(), pg.ClusterDir())
	run(ctx, t, pg.URL(), "CREATE TABLE kept AS SELECT 'yes' AS value")
	require.NoError(t, pg.Stop(ctx))
	again, err := embedded.StartPostgres(ctx, cfg)
	require.NoError(t, err)
	require.Equal(t, pg.ClusterDir(), again.ClusterDir())
	require.Equal(t, "yes", query(ctx, t, again.URL(), "SELECT value FROM kept"))
	require.NoError(t, again.Stop(ctx))
}
