//go:build unix

package testenv_test

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"
	"github.com/twmb/franz-go/pkg/kadm"
	"github.com/twmb/franz-go/pkg/kgo"

	"ordersaga/adapters/embedded"
	"ordersaga/adapters/embedded/testenv"
)

func TestMain(m *testing.M) { testenv.MainNoLeaks(m) }

func testContext(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	t.Cleanup(cancel)
	return ctx
}

func timed(t *testing.T, what string, f func()) {
	t.Helper()
	begin := time.Now()
	f()
	t.Logf("%s: %v", what, time.Since(begin).Round(time.Millisecond))
}

func databases(ctx context.Context, t *testing.T, address string) []string {
	t.Helper()
	conn, err := pgx.Connect(ctx, address)
	require.NoError(t, err)
	defer conn.Close(ctx) //nolint:errcheck // test
	rows, err := conn.Query(ctx, "SELECT datname FROM pg_database ORDER BY 1")
	require.NoError(t, err)
	names, err := pgx.CollectRows(rows, pgx.RowTo[string])
	require.NoError(t, err)
	return names
}

func nameOf(t *testing.T, address string) string {
	t.Helper()
	u, err := url.Parse(address)
	require.NoError(t, err)
	return u.Path[1:]
}

func exec(ctx context.Context, t *testing.T, address, sql string) {
	t.Helper()
	conn, err := pgx.Connect(ctx, address)
	require.NoError(t, err)
	_, err = conn.Exec(ctx, sql)
	require.NoError(t, err)
	require.NoError(t, conn.Close(ctx))
}

func TestPostgresGivesFreshDatabases(t *testing.T) {
	ctx := testContext(t)
	var kept string
	timed(t, "first database, with the server", func() { kept = testenv.Postgres(t) })
	var dropped string
	t.Run("inner", func(t *testing.T) {
		timed(t, "second database", func() { dropped = testenv.Postgres(t) })
		require.NotEqual(t, kept, dropped)
		exec(ctx, t, dropped, "CREATE TABLE x ()")
		exec(ctx, t, kept, "CREATE TABLE x ()")
		// A connection that the test forgot does not keep the database.
		conn, err := pgx.Connect(ctx, dropped)
		require.NoError(t, err)
		t.Cleanup(func() { _ = conn.Close(context.Background()) })
	})
	names := databases(ctx, t, kept)
	require.Contains(t, names, nameOf(t, kept))
	require.NotContains(t, names, nameOf(t, dropped))
}

func TestPostgresTemplateIsPreparedOnce(t *testing.T) {
	ctx := testContext(t)
	prepared := 0
	prepare := func(ctx context.Context, address string) error {
		prepared++
		exec(ctx, t, address, "CREATE TABLE x AS SELECT 1 AS one")
		return nil
	}
	for range 3 {
		timed(t, "database from a template", func() {
			exec(ctx, t, testenv.PostgresTemplate(t, "one", prepare), "UPDATE x SET one = 2 WHERE one = 1")
		})
	}
	require.Equal(t, 1, prepared)
}

func TestPostgresServerSurvivesKill(t *testing.T) {
	ctx := testContext(t)
	pg := testenv.PostgresServer(t)
	exec(ctx, t, pg.URL(), "CREATE TABLE x AS SELECT generate_series(1, 100)")
	require.NoError(t, pg.Kill())
	timed(t, "recovery", func() { require.NoError(t, pg.Restart(ctx)) })
	exec(ctx, t, pg.URL(), "DO $$ BEGIN ASSERT (SELECT count(*) FROM x) = 100; END $$")
}

// A server that somebody names is used, and left as it was.
func TestPostgresOfTheEnvironment(t *testing.T) {
	ctx := testContext(t)
	pg := testenv.PostgresServer(t)
	stale := fmt.Sprintf("ordersaga_test_%d_stale", time.Now().Add(-24*time.Hour).Unix())
	recent := fmt.Sprintf("ordersaga_test_%d_recent", time.Now().Unix())
	exec(ctx, t, pg.URL(), "CREATE DATABASE "+stale)
	exec(ctx, t, pg.URL(), "CREATE DATABASE "+recent)
	s, stop, err := testenv.StartServerAt(pg.URL())
	require.NoError(t, err)
	name, err := s(ctx)
	require.NoError(t, err)
	require.Contains(t, databases(ctx, t, pg.URL()), name)
	require.NoError(t, stop(ctx))
	names := databases(ctx, t, pg.URL())
	require.NotContains(t, names, name)
	require.NotContains(t, names, stale, "a killed run's database goes")
	require.Contains(t, names, recent, "one that may be in use stays")
}

// roundTrip creates a topic, produces and consumes as a group, and commits.
func roundTrip(t *testing.T, addrs []string, configs map[string]*string) (topic string) {
	t.Helper()
	ctx := testContext(t)
	prefix := testenv.Prefix(t)
	topic = prefix + "orders"
	client, err := kgo.NewClient(kgo.SeedBrokers(addrs...), kgo.ConsumeTopics(topic), kgo.ConsumerGroup(prefix+"group"),
		kgo.ConsumeResetOffset(kgo.NewOffset().AtStart()), kgo.DisableAutoCommit())
	require.NoError(t, err)
	defer client.CloseAllowingRebalance()
	admin := kadm.NewClient(client)
	_, err = admin.CreateTopic(ctx, 3, 1, configs, topic)
	require.NoError(t, err)
	var records []*kgo.Record
	for i := range 100 {
		records = append(records, &kgo.Record{Topic: topic, Key: fmt.Append(nil, i), Value: []byte("v")})
	}
	require.NoError(t, client.ProduceSync(ctx, records...).FirstErr())
	read := 0
	for read < len(records) {
		fetches := client.PollFetches(ctx)
		require.NoError(t, fetches.Err())
		read += fetches.NumRecords()
	}
	require.Equal(t, len(records), read)
	require.NoError(t, client.CommitUncommittedOffsets(ctx))
	return topic
}

func TestKafkaInProcess(t *testing.T) {
	first, second := testenv.Kafka(t), testenv.Kafka(t)
	require.NotEqual(t, first, second)
	roundTrip(t, first, embedded.TopicDefaults(0))
}

func TestRealKafkaIsShared(t *testing.T) {
	var addrs []string
	timed(t, "real Kafka", func() { addrs = testenv.RealKafka(t) })
	timed(t, "round trip", func() { roundTrip(t, addrs, nil) })
	require.Equal(t, addrs, testenv.RealKafka(t))
}

// The environment's broker wins over everything, and one that does not answer fails instead of being passed over.
func TestRealKafkaOfTheEnvironment(t *testing.T) {
	addrs := testenv.Kafka(t)
	t.Setenv(testenv.BrokersVariable, " "+addrs[0]+" ,")
	got, err := testenv.StartRealKafka()
	require.NoError(t, err)
	require.Equal(t, addrs, got)

	_, err = testenv.GivenKafka(t.Context(), "127.0.0.1:1", 100*time.Millisecond)
	r := &recorder{TB: t}
	require.PanicsWithError(t, errOver.Error(), func() { testenv.Need(r, "a real Kafka", err) })
	require.Contains(t, r.failed, "a real Kafka that was given cannot be used: "+testenv.BrokersVariable+"=127.0.0.1:1: no broker answers")
}

func TestKafkaFromJars(t *testing.T) {
	ctx := testContext(t)
	var k *testenv.KafkaProcess
	timed(t, "Kafka from jars", func() { k = testenv.KafkaJars(t) })
	var topic string
	timed(t, "round trip", func() { topic = roundTrip(t, k.Addrs(), nil) })
	addrs := k.Addrs()
	require.NoError(t, k.Kill())
	timed(t, "restart after kill -9", func() { require.NoError(t, k.Restart(ctx)) })
	require.Equal(t, addrs, k.Addrs())
	client, err := kgo.NewClient(kgo.SeedBrokers(addrs...))
	require.NoError(t, err)
	ends, err := kadm.NewClient(client).ListEndOffsets(ctx, topic)
	require.NoError(t, err)
	var total int64
	ends.Each(func(o kadm.ListedOffset) { total += o.Offset })
	client.Close()
	require.EqualValues(t, 100, total, "the page cache keeps what a killed JVM wrote")
	timed(t, "orderly restart", func() { require.NoError(t, k.Restart(ctx)) })
	timed(t, "stop", func() { require.NoError(t, k.Stop(ctx)) })
	require.Error(t, k.Restart(ctx))
}

// The library would dial the default gateway where it runs in a container itself, an address that is not this machine.
func TestF34_KafkaContainerIsReachedOnLoopback(t *testing.T) {
	var addrs []string
	timed(t, "Kafka container", func() { addrs = testenv.KafkaContainer(t) })
	require.Len(t, addrs, 1)
	if os.Getenv("DOCKER_HOST") == "" {
		require.Regexp(t, `^127\.0\.0\.1:\d+$`, addrs[0])
	}
	timed(t, "round trip", func() { roundTrip(t, addrs, nil) })
}

func TestPrefix(t *testing.T) {
	t.Run("A Name/with ünusual §characters, and much longer than a topic of Kafka could be", func(t *testing.T) {
		first, second := testenv.Prefix(t), testenv.Prefix(t)
		require.NotEqual(t, first, second)
		require.Regexp(t, `^testprefix-a-name-with--nusual--characte-[0-9a-f]{8}\.$`, first)
	})
}

// recorder is a test that notes how it ended.
type recorder struct {
	testing.TB
	failed, skipped string
}

var errOver = errors.New("over")

func (r *recorder) Helper() {}
func (r *recorder) Fatalf(format string, args ...any) {
	r.failed = fmt.Sprintf(format, args...)
	panic(errOver)
}
func (r *recorder) Skipf(format string, args ...any) {
	r.skipped = fmt.Sprintf(format, args...)
	panic(errOver)
}

func TestNothingIsSkippedInCI(t *testing.T) {
	for ci, want := range map[string]string{"true": "CI=true forbids to skip", "": "SKIPPED, NOT PASSED"} {
		t.Setenv("CI", ci)
		r := &recorder{TB: t}
		require.PanicsWithError(t, errOver.Error(), func() { testenv.Need(r, "a thing", errors.New("it is not there")) })
		require.Contains(t, r.failed+r.skipped, want)
		require.Equal(t, ci == "true", r.failed != "")
	}
}

// Two processes that need the jars at once fetch them once; here the second finds them.
func TestKafkaJarsAreCached(t *testing.T) {
	libs, err := testenv.KafkaLibs(testContext(t))
	require.NoError(t, err)
	require.FileExists(t, filepath.Join(libs, "kafka_2.13-4.1.0.jar"))
	before, err := os.Stat(libs)
	require.NoError(t, err)
	again, err := testenv.KafkaLibs(testContext(t))
	require.NoError(t, err)
	after, err := os.Stat(again)
	require.NoError(t, err)
	require.Equal(t, before.ModTime(), after.ModTime())
}
