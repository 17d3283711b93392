//go:build unix

package embedded_test

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"github.com/twmb/franz-go/pkg/kadm"
	"github.com/twmb/franz-go/pkg/kgo"

	"ordersaga/adapters/embedded"
)

func testContext(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	t.Cleanup(cancel)
	return ctx
}

func kafkaClient(t *testing.T, addr string, opts ...kgo.Opt) *kgo.Client {
	t.Helper()
	client, err := kgo.NewClient(append(opts, kgo.SeedBrokers(addr))...)
	require.NoError(t, err)
	t.Cleanup(client.Close)
	return client
}

func produce(ctx context.Context, t *testing.T, client *kgo.Client, topic string, values ...string) {
	t.Helper()
	var records []*kgo.Record
	for _, value := range values {
		records = append(records, &kgo.Record{Topic: topic, Key: []byte("k"), Value: []byte(value)})
	}
	require.NoError(t, client.ProduceSync(ctx, records...).FirstErr())
}

// readAll reads n records of topic from its start.
func readAll(ctx context.Context, t *testing.T, addr, topic string, n int64) []string {
	t.Helper()
	client := kafkaClient(t, addr, kgo.ConsumeTopics(topic), kgo.ConsumeResetOffset(kgo.NewOffset().AtStart()))
	var values []string
	for int64(len(values)) < n {
		fetches := client.PollFetches(ctx)
		require.NoError(t, fetches.Err())
		fetches.EachRecord(func(r *kgo.Record) { values = append(values, string(r.Value)) })
	}
	return values
}

func TestBrokerInMemory(t *testing.T) {
	ctx := testContext(t)
	b, err := embedded.StartBroker(ctx, embedded.BrokerConfig{})
	require.NoError(t, err)
	client := kafkaClient(t, b.Addrs()[0])
	_, err = kadm.NewClient(client).CreateTopic(ctx, 3, 1, embedded.TopicDefaults(0), "orders")
	require.NoError(t, err)
	produce(ctx, t, client, "orders", "one", "two")
	require.Equal(t, []string{"one", "two"}, readAll(ctx, t, b.Addrs()[0], "orders", 2))
	found, err := b.Check(ctx)
	require.NoError(t, err)
	require.Empty(t, found)
	client.Close()
	require.NoError(t, b.Close(ctx))
	require.NoError(t, b.Close(ctx), "a second Close is harmless")
}

func TestBrokerRestartsOnItsData(t *testing.T) {
	for _, sync := range []bool{false, true} {
		t.Run(fmt.Sprintf("sync=%v", sync), func(t *testing.T) {
			ctx := testContext(t)
			cfg := embedded.BrokerConfig{DataDir: t.TempDir(), SyncWrites: sync}
			b, err := embedded.StartBroker(ctx, cfg)
			require.NoError(t, err)
			_, port, err := splitPort(b.Addrs()[0])
			require.NoError(t, err)
			cfg.Port = port
			client := kafkaClient(t, b.Addrs()[0])
			admin := kadm.NewClient(client)
			_, err = admin.CreateTopic(ctx, 1, 1, embedded.TopicDefaults(embedded.DefaultRetentionBytes), "orders")
			require.NoError(t, err)
			produce(ctx, t, client, "orders", "one", "two", "three")
			var offsets kadm.Offsets
			offsets.AddOffset("orders", 0, 2, -1)
			require.NoError(t, admin.CommitAllOffsets(ctx, "readers", offsets))
			client.Close()
			require.NoError(t, b.Close(ctx))

			b, err = embedded.StartBroker(ctx, cfg)
			require.NoError(t, err)
			require.Equal(t, []string{"127.0.0.1:" + strconv.Itoa(port)}, b.Addrs())
			require.Equal(t, []string{"one", "two", "three"}, readAll(ctx, t, b.Addrs()[0], "orders", 3))
			found, err := b.Check(ctx)
			require.NoError(t, err)
			require.Empty(t, found)
			require.NoError(t, b.Close(ctx))
		})
	}
}

func TestBrokerRefusesASecondOne(t *testing.T) {
	ctx := testContext(t)
	dir := t.TempDir()
	b, err := embedded.StartBroker(ctx, embedded.BrokerConfig{DataDir: dir})
	require.NoError(t, err)
	_, err = embedded.StartBroker(ctx, embedded.BrokerConfig{DataDir: dir})
	var running *embedded.AlreadyRunningError
	require.ErrorAs(t, err, &running)
	require.Equal(t, b.Addrs()[0], running.Addrs["kafka"])

	_, port, err := splitPort(b.Addrs()[0])
	require.NoError(t, err)
	_, err = embedded.StartBroker(ctx, embedded.BrokerConfig{DataDir: t.TempDir(), Port: port})
	require.ErrorContains(t, err, "choose another port")
	require.NoError(t, b.Close(ctx))
}

func TestBrokerCheckFindsWhatWouldSkipRecords(t *testing.T) {
	ctx := testContext(t)
	b, err := embedded.StartBroker(ctx, embedded.BrokerConfig{})
	require.NoError(t, err)
	client := kafkaClient(t, b.Addrs()[0])
	admin := kadm.NewClient(client)
	_, err = admin.CreateTopic(ctx, 1, 1, embedded.TopicDefaults(0), "orders")
	require.NoError(t, err)
	_, err = admin.CreateTopic(ctx, 1, 1, nil, "by-age")
	require.NoError(t, err)
	produce(ctx, t, client, "orders", "one")
	var offsets kadm.Offsets
	offsets.AddOffset("orders", 0, 5, -1)
	require.NoError(t, admin.CommitAllOffsets(ctx, "ahead", offsets))
	var fine kadm.Offsets
	fine.AddOffset("orders", 0, 1, -1)
	require.NoError(t, admin.CommitAllOffsets(ctx, "fine", fine))

	found, err := b.Check(ctx)
	require.NoError(t, err)
	require.Len(t, found, 2)
	require.Contains(t, found[0], "group ahead has committed offset 5 of orders[0], past its end 1: it would skip the next 4 records")
	require.Contains(t, found[1], "topic by-age has retention.ms=")
	client.Close()
	require.NoError(t, b.Close(ctx))
}

func TestBrokerAppliesRetentionBySize(t *testing.T) {
	ctx := testContext(t)
	b, err := embedded.StartBroker(ctx, embedded.BrokerConfig{DataDir: t.TempDir(), RetentionEvery: 20 * time.Millisecond})
	require.NoError(t, err)
	client := kafkaClient(t, b.Addrs()[0], kgo.ProducerBatchCompression(kgo.NoCompression()))
	admin := kadm.NewClient(client)
	_, err = admin.CreateTopic(ctx, 1, 1, embedded.TopicDefaults(0), "big")
	require.NoError(t, err)
	value := string(make([]byte, 512<<10))
	for range 2*embedded.MinRetentionBytes/len(value) + 1 {
		produce(ctx, t, client, "big", value)
	}
	require.Eventually(t, func() bool {
		starts, err := admin.ListStartOffsets(ctx, "big")
		if err != nil {
			return false
		}
		start, ok := starts.Lookup("big", 0)
		return ok && start.Offset > 0
	}, 20*time.Second, 20*time.Millisecond, "the oldest records go")
	starts, err := admin.ListStartOffsets(ctx, "big")
	require.NoError(t, err)
	ends, err := admin.ListEndOffsets(ctx, "big")
	require.NoError(t, err)
	start, _ := starts.Lookup("big", 0)
	end, _ := ends.Lookup("big", 0)
	require.Greater(t, end.Offset-start.Offset, int64(10), "the newest stay")
	client.Close()
	require.NoError(t, b.Close(ctx))
}

// runBrokerChild is the process that TestBrokerSurvivesKill9 kills.
func runBrokerChild() error {
	ctx, cancel := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer cancel()
	b, err := embedded.StartBroker(ctx, embedded.BrokerConfig{DataDir: os.Getenv("CHILD_DIR")})
	if err != nil {
		return err
	}
	fmt.Println("broker", b.Addrs()[0])
	<-ctx.Done()
	return b.Close(context.Background())
}

func TestBrokerSurvivesKill9(t *testing.T) {
	ctx := testContext(t)
	dir := filepath.Join(t.TempDir(), "kafka")
	var acked atomic.Int64
	var committed int64
	for round := range 3 {
		c := startChild(t, "broker", nil, "CHILD_DIR="+dir)
		addr := c.hear(t, "broker")
		client := kafkaClient(t, addr, kgo.MaxBufferedRecords(200))
		admin := kadm.NewClient(client)
		if round == 0 {
			_, err := admin.CreateTopic(ctx, 1, 1, embedded.TopicDefaults(0), "orders")
			require.NoError(t, err)
		}
		committed = acked.Load()
		var offsets kadm.Offsets
		offsets.AddOffset("orders", 0, committed, -1)
		require.NoError(t, admin.CommitAllOffsets(ctx, "readers", offsets))

		enough := acked.Load() + 2000
		reached := make(chan struct{})
		for i := range 100_000 {
			client.Produce(ctx, &kgo.Record{Topic: "orders", Value: fmt.Appendf(nil, "%d-%d", round, i)}, func(_ *kgo.Record, err error) {
				if err == nil && acked.Add(1) == enough {
					close(reached)
				}
			})
			if acked.Load() >= enough {
				break
			}
		}
		<-reached
		c.kill(t)      // with up to 200 records in flight
		client.Close() // not Flush: a record of unknown outcome waits for its broker to come back
	}

	b, err := embedded.StartBroker(ctx, embedded.BrokerConfig{DataDir: dir})
	require.NoError(t, err)
	client := kafkaClient(t, b.Addrs()[0])
	admin := kadm.NewClient(client)
	ends, err := admin.ListEndOffsets(ctx, "orders")
	require.NoError(t, err)
	end, ok := ends.Lookup("orders", 0)
	require.True(t, ok)
	require.GreaterOrEqual(t, end.Offset, acked.Load(), "every acknowledged record is there")
	values := readAll(ctx, t, b.Addrs()[0], "orders", end.Offset)
	require.Len(t, values, int(end.Offset))
	seen := map[string]bool{}
	for _, value := range values {
		require.False(t, seen[value], "%s twice", value)
		seen[value] = true
	}
	offsets, err := admin.FetchOffsets(ctx, "readers")
	require.NoError(t, err)
	at, ok := offsets.Lookup("orders", 0)
	require.True(t, ok)
	require.Equal(t, committed, at.At)
	found, err := b.Check(ctx)
	require.NoError(t, err)
	require.Empty(t, found)
	client.Close()
	require.NoError(t, b.Close(ctx))
}
