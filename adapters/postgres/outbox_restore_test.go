package postgres

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	"ordersaga/adapters/embedded/testenv"
	"ordersaga/events"
	"ordersaga/outbox"
)

// TestF41_ARestoredDumpSendsWhatItsCursorHadNotSeen dumps a database with relayed and unrelayed rows and restores it into another
// cluster, whose transaction ids begin low, and into one whose ids lie in the middle of the dump's.
func TestF41_ARestoredDumpSendsWhatItsCursorHadNotSeen(t *testing.T) {
	t.Run("lower transaction ids", func(t *testing.T) { restoreElsewhere(t, false) })
	t.Run("transaction ids among those of the dump", func(t *testing.T) { restoreElsewhere(t, true) })
}

func restoreElsewhere(t *testing.T, among bool) {
	t.Helper()
	const latest = `SELECT pg_current_xact_id()::text::bigint`
	home := outboxDB(t, 0)
	burn(t, home, 3000)
	narrow(t, home, 20_000)
	lowest := one[int](t, home, latest)
	first := &sink{}
	_, stop := startRelay(t, NewOutboxLog(home), first, outbox.Config{Wake: home.Wake()}, nil)
	open := openTx(t, home, "open#1")
	burn(t, home, 6000)
	for i := range 10 {
		forward(t, home, raw("k", "k#"+strconv.Itoa(i)))
	}
	require.Eventually(t, func() bool { return first.count() == 10 }, soon, tick)
	stop()
	require.NoError(t, open.Commit(t.Context())) // the cursor knows it as under way
	for i := 10; i < 15; i++ {
		forward(t, home, raw("k", "k#"+strconv.Itoa(i)))
	}

	abroad := testenv.PostgresServer(t).URL()
	dumpAndRestore(t, home.cfg.URL, abroad)
	there, err := Open(t.Context(), Config{URL: abroad})
	require.NoError(t, err)
	t.Cleanup(there.Close)
	if among {
		burn(t, there, lowest+100-one[int](t, there, latest))
		require.Less(t, one[int](t, there, latest), lowest+1000, "ids that the cursors take for seen")
	} else {
		require.Less(t, one[int](t, there, latest), lowest-100)
	}
	// A writer that starts before anybody has noticed.
	forward(t, there, raw("k", "k#15"))
	second := &sink{}
	_, stop = startRelay(t, NewOutboxLog(there), second, outbox.Config{Wake: there.Wake()}, nil)
	defer stop()
	for i := 16; i < 20; i++ {
		forward(t, there, raw("k", "k#"+strconv.Itoa(i)))
	}
	want := []string{"open#1"}
	for i := 10; i < 20; i++ {
		want = append(want, "k#"+strconv.Itoa(i))
	}
	require.Eventually(t, func() bool { return len(firsts(second.got())) >= len(want) }, soon, tick)
	got := firsts(second.got())
	require.ElementsMatch(t, want, got, "what the cursor had seen stays seen, the rest is sent")
	requireOrder(t, got)

	adopted, err := there.AdoptOutbox(t.Context())
	require.NoError(t, err)
	require.Zero(t, adopted, "once")
	m, err := there.MaintainOutbox(t.Context(), 0)
	require.NoError(t, err)
	require.Empty(t, m.Blocked)
	require.Eventually(t, func() bool { b, err := there.OutboxBacklog(t.Context()); return err == nil && b.Rows == 0 }, soon, tick)
	n := second.count()
	forward(t, there, raw("k", "k#20"))
	require.Eventually(t, func() bool { return slices.Contains(second.got(), "k#20") }, soon, tick)
	require.Equal(t, n+1, second.count(), "nothing is sent over and over")
}

// dumpAndRestore copies a database into an empty one of another server with Postgres's own tools; where only the server itself is
// installed, with what those tools do to an outbox.
func dumpAndRestore(t *testing.T, from, to string) {
	t.Helper()
	if dump := postgresTool("pg_dump"); dump != "" {
		file := filepath.Join(t.TempDir(), "dump")
		run(t, dump, "-Fc", "-f", file, from)
		run(t, postgresTool("pg_restore"), "--exit-on-error", "--no-owner", "-d", to, file)
		return
	}
	require.NotEqual(t, "true", os.Getenv("CI"), "CI has pg_dump")
	t.Log("no pg_dump: copying by hand")
	copyOutbox(t, from, to)
}

func postgresTool(name string) string {
	if dir := os.Getenv("PG_BINDIR"); dir != "" {
		return filepath.Join(dir, name)
	}
	found, err := filepath.Glob("/usr/lib/postgresql/*/bin/" + name)
	if err == nil && len(found) > 0 {
		return slices.Max(found)
	}
	path, err := exec.LookPath(name)
	if err != nil {
		return ""
	}
	return path
}

func run(t *testing.T, name string, args ...string) {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), name, args...).CombinedOutput()
	require.NoError(t, err, string(out))
}

// copyOutbox migrates the target and copies the outbox's three tables, partition bounds and sequence included.
func copyOutbox(t *testing.T, from, to string) {
	t.Helper()
	ctx := t.Context()
	src, err := Open(ctx, Config{URL: from})
	require.NoError(t, err)
	defer src.Close()
	dst, err := Open(ctx, Config{URL: to})
	require.NoError(t, err)
	defer dst.Close()
	_, err = Migrate(ctx, dst, Up)
	require.NoError(t, err)
	narrow(t, dst, 1)
	var parts []outboxPartition
	require.NoError(t, src.inOutboxTx(ctx, "list", attachTimeout, func(tx pgx.Tx) (err error) {
		parts, _, err = outboxPartitions(ctx, tx)
		return err
	}))
	for _, p := range parts {
		p.name += "_copy"
		rawExec(t, dst, p.create())
		rawExec(t, dst, p.attach())
	}
	rawExec(t, dst, `DELETE FROM outbox_shards`)
	for _, table := range []string{"outbox", "outbox_shards"} {
		pr := one[string](t, src, `SELECT coalesce(jsonb_agg(to_jsonb(o)), '[]')::text FROM `+table+` AS o`)
		rawExec(t, dst, `INSERT INTO `+table+` OVERRIDING SYSTEM VALUE SELECT * FROM jsonb_populate_recordset(NULL::`+table+`, $1::jsonb)`, pr)
	}
	rawExec(t, dst, `SELECT setval('outbox_id_seq', (SELECT max(id) FROM outbox))`)
}

func TestTheCopyThatStandsInForADumpIsOne(t *testing.T) {
	home := outboxDB(t, 0)
	forward(t, home, raw("k", "k#1"), events.Raw{Topic: "t"})
	to := testenv.PostgresServer(t).URL()
	copyOutbox(t, home.cfg.URL, to)
	there, err := Open(context.WithoutCancel(t.Context()), Config{URL: to})
	require.NoError(t, err)
	defer there.Close()
	adopted, err := there.AdoptOutbox(t.Context())
	require.NoError(t, err)
	require.EqualValues(t, 2, adopted)
}
