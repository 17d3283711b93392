//go:build unix

package kafka

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"

	"ordersaga/consumers"
	"ordersaga/events"
)

func TestSourceSettlesEverythingOnce(t *testing.T) {
	onBoth(t, func(k *env) {
		t := k.T
		k.topics(4, events.TopicCommands)
		p := k.producer()
		recs := messages(events.TPlaceOrder, 1500)
		k.produce(p, recs[:500]...)
		l, mem := newLedger(), consumers.NewMemory()
		g := commandGroup(k, mem, l)
		stop := k.source(k.c, g, func(*SourceConfig) {})
		k.produce(p, recs[500:]...)
		k.produce(p, recs[:100]...) // a relay that repeats
		eventually(t, 30*time.Second, "all handled", func() bool { return l.count() == len(recs) })
		eventually(t, 10*time.Second, "all committed", func() bool { _, lag := k.committed(g.Name(), g.Topic()); return lag == 0 })
		stop()
		l.exactlyOnce(t, recs)

		k.produce(p, messages(events.TPlaceOrder, 10)...)
		k.source(k.c, g, func(*SourceConfig) {}) // begins where the other left off
		eventually(t, 30*time.Second, "the rest handled", func() bool { return l.count() == len(recs)+10 })
		require.Len(t, l.tries, len(recs)+10)
		for id, n := range l.tries {
			require.Equal(t, 1, n, "message %s was delivered to the handler again, after it was committed", id)
		}
	})
}

func TestF6_PoisonOnATopicBlocksNobody(t *testing.T) {
	onBoth(t, func(k *env) {
		t := k.T
		k.topics(1, events.TopicCommands)
		good := messages(events.TPlaceOrder, 20)
		batch := []events.Record{
			good[0],
			{Topic: events.TopicCommands, Value: []byte("hello")},
			{Topic: events.TopicCommands, Key: good[0].Key, Value: []byte("{"), Headers: good[0].Headers[1:4]},
			{Topic: events.TopicCommands},
		}
		batch = append(batch, good[1:]...)
		k.produce(k.producer(), batch...)
		l, mem := newLedger(), consumers.NewMemory()
		g := commandGroup(k, mem, l)
		k.source(k.c, g, func(*SourceConfig) {})
		eventually(t, 30*time.Second, "the good ones handled", func() bool { return l.count() == len(good) })
		eventually(t, 10*time.Second, "all committed", func() bool { _, lag := k.committed(g.Name(), g.Topic()); return lag == 0 })
		dead, _, err := mem.DeadLetters(t.Context(), consumers.DeadFilter{}, "", 10)
		require.NoError(t, err)
		require.Len(t, dead, 3)
	})
}

func TestF7_OffsetsStopWhereRecordsAreHeld(t *testing.T) {
	onBoth(t, func(k *env) {
		t := k.T
		k.topics(1, events.TopicCommands)
		recs := messages(events.TPlaceOrder, 50)
		k.produce(k.producer(), recs...)
		l, mem := newLedger(), consumers.NewMemory()
		held := events.Identity(&recs[10])
		var back atomic.Bool
		l.fail = func(d *consumers.Delivery, _ int) error {
			if d.ID == held && !back.Load() {
				return away{}
			}
			return nil
		}
		g := commandGroup(k, mem, l)
		stop := k.source(k.c, g, func(*SourceConfig) {})
		eventually(t, 30*time.Second, "all but the held one handled", func() bool { return l.count() == len(recs)-1 })
		stop() // a held batch ends with its member, at once
		committed, _ := k.committed(g.Name(), g.Topic())
		require.Equal(t, int64(10), committed, "the offset stops at the first unsettled record")
		back.Store(true)
		k.source(k.c, g, func(*SourceConfig) {})
		eventually(t, 30*time.Second, "the held one handled", func() bool { return l.count() == len(recs) })
		eventually(t, 10*time.Second, "all committed", func() bool { _, lag := k.committed(g.Name(), g.Topic()); return lag == 0 })
		l.exactlyOnce(t, recs)
	})
}

// Members come and go while batches run, some of them long; a handler that is asked twice for one message acts once.
func TestF5_RebalancesWhileBatchesRun(t *testing.T) {
	for _, inflight := range []int{1, 3} {
		t.Run(fmt.Sprintf("%d batches at once", inflight), func(t *testing.T) {
			onBoth(t, func(k *env) {
				t := k.T
				k.topics(6, events.TopicCommands)
				l, mem := newLedger(), consumers.NewMemory()
				var calls atomic.Int64
				l.prepare = func(ctx context.Context, _ []*consumers.Delivery) error {
					d := 5 * time.Millisecond
					if calls.Add(1)%10 == 0 {
						d = 300 * time.Millisecond
					}
					sleep(ctx, d)
					return ctx.Err()
				}
				g := commandGroup(k, mem, l)
				change := func(c *SourceConfig) { c.MaxBatch, c.Inflight = 40, inflight }
				first := k.source(k.client(func(*Config) {}), g, change)
				p := k.producer()
				var all []events.Record
				var mu sync.Mutex
				stopProducing := runs(k, func(ctx context.Context) error {
					for ctx.Err() == nil {
						recs := messages(events.TPlaceOrder, 50)
						k.produce(p, recs...)
						mu.Lock()
						all = append(all, recs...)
						mu.Unlock()
						sleep(ctx, 20*time.Millisecond)
					}
					return nil
				})
				some := func(n int) func() bool { return func() bool { return l.count() > n } }
				eventually(t, 30*time.Second, "the first works", some(100))
				second := k.source(k.client(func(*Config) {}), g, change)
				n := l.count()
				eventually(t, 30*time.Second, "both work", some(n+500))
				first()
				n = l.count()
				eventually(t, 30*time.Second, "the second takes over", some(n+500))
				third := k.source(k.client(func(*Config) {}), g, change)
				n = l.count()
				eventually(t, 30*time.Second, "both work", some(n+500))
				stopProducing()
				second()
				eventually(t, 60*time.Second, "all handled", some(len(all)-1))
				third()
				l.exactlyOnce(t, all)
				_, lag := k.committed(g.Name(), g.Topic())
				require.Zero(t, lag, "who leaves commits what it settled")
			})
		})
	}
}

func TestF30_PartitionsAreAddedWhileRecordsAreInFlight(t *testing.T) {
	onBoth(t, func(k *env) {
		t := k.T
		k.topics(1, events.TopicCommands)
		l, mem := newLedger(), consumers.NewMemory()
		g := commandGroup(k, mem, l)
		k.source(k.c, g, func(*SourceConfig) {})
		p := k.producer()
		keys := shuffledKeys(40) // the same keys before and after
		var all []events.Record
		send := func() {
			recs := make([]events.Record, len(keys))
			for i, key := range keys {
				recs[i] = message(events.TPlaceOrder, key)
			}
			k.produce(p, recs...)
			all = append(all, recs...)
		}
		send()
		k.apply([]TopicSpec{{Name: events.TopicCommands, Partitions: 5, Replication: 1}})
		deadline := time.Now().Add(30 * time.Second)
		parts := map[int32]bool{}
		for len(parts) < 5 && time.Now().Before(deadline) {
			send()
			sleep(t.Context(), 200*time.Millisecond)
			l.mu.Lock()
			for _, d := range l.order {
				parts[d.Record.Partition] = true
			}
			l.mu.Unlock()
		}
		require.Len(t, parts, 5, "new partitions are noticed, and read from their beginning")
		send()
		eventually(t, 30*time.Second, "all handled", func() bool { return l.count() == len(all) })
		l.exactlyOnce(t, all)
	})
}

func TestRecreatedTopicIsReadFromItsBeginning(t *testing.T) {
	onBoth(t, func(k *env) {
		t := k.T
		k.topics(2, events.TopicCommands)
		l, mem := newLedger(), consumers.NewMemory()
		g := commandGroup(k, mem, l)
		k.source(k.c, g, func(*SourceConfig) {})
		before := messages(events.TPlaceOrder, 5)
		k.produce(k.producer(), before...)
		eventually(t, 30*time.Second, "handled", func() bool { return l.count() == 5 })
		// Marks that are not committed yet would be committed by name, to the new topic.
		eventually(t, 10*time.Second, "committed", func() bool { n, _ := k.committed(g.Name(), g.Topic()); return n == 5 })
		name := k.names.Topic(events.TopicCommands)
		_, err := k.c.adm.DeleteTopics(t.Context(), name)
		require.NoError(t, err)
		eventually(t, 20*time.Second, "the topic is gone", func() bool {
			var missing *MissingTopicsError
			return errors.As(k.c.CheckTopics(t.Context(), events.TopicCommands), &missing)
		})
		_, err = k.c.adm.DeleteGroups(t.Context(), "nobody") // keeps the admin connection warm; its answer does not matter
		require.NoError(t, err)
		k.topics(2, events.TopicCommands)
		after := messages(events.TPlaceOrder, 7)
		k.produce(k.producer(), after...)
		t.Cleanup(func() {
			if t.Failed() {
				lags, _ := k.c.Lags(context.WithoutCancel(t.Context()), map[events.Group][]events.Topic{g.Name(): {g.Topic()}})
				t.Logf("handled %d, lags %+v, problems %q", l.count(), lags, k.seen.problems)
			}
		})
		eventually(t, 30*time.Second, "the new topic's handled", func() bool { return l.count() == 12 })
	})
}

func TestSourceAndTailWaitForTheirTopic(t *testing.T) {
	onBoth(t, func(k *env) {
		t := k.T
		l, mem := newLedger(), consumers.NewMemory()
		g := commandGroup(k, mem, l)
		k.source(k.c, g, func(*SourceConfig) {})
		var missing *MissingTopicsError
		require.ErrorAs(t, k.c.CheckTopics(t.Context(), events.TopicCommands), &missing)
		require.ErrorContains(t, missing, "ordersaga topics apply")
		k.topics(1, events.TopicCommands)
		recs := messages(events.TPlaceOrder, 3)
		k.produce(k.producer(), recs...)
		eventually(t, 40*time.Second, "handled", func() bool { return l.count() == 3 })
	})
}

const (
	victimVariable = "ORDERSAGA_TEST_KAFKA_VICTIM"
	victimSession  = 6 * time.Second
)

// victim is a member in a process of its own, to be killed. It says "handling" whenever it has a batch, and settles none.
func victim() {
	args := strings.Split(os.Getenv(victimVariable), " ")
	c, err := New(Config{Brokers: strings.Split(args[0], ","), Names: events.Names{Prefix: args[1]}, InstanceID: args[2], Session: victimSession})
	if err != nil {
		panic(err)
	}
	s, err := c.NewSource(SourceConfig{Group: events.GroupOrderCommands, Topic: events.TopicCommands})
	if err != nil {
		panic(err)
	}
	_ = s.Run(context.Background(), func(ctx context.Context, batch []events.Record) ([]bool, error) {
		fmt.Println("handling", len(batch)) // what the parent waits for
		<-ctx.Done()
		return make([]bool, len(batch)), ctx.Err()
	})
}

func TestF33_ProgressAfterKill(t *testing.T) {
	for name, tc := range map[string]struct {
		instance string
		within   time.Duration
	}{
		// The session, a heartbeat in which the others hear of it, and the joining.
		"dynamic membership, short session":    {"", victimSession + 5*time.Second},
		"static membership, restarted at once": {"victim-1", 4 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			test := func(k *env) {
				t := k.T
				k.topics(3, events.TopicCommands)
				recs := messages(events.TPlaceOrder, 30)
				k.produce(k.producer(), recs...)

				exe, err := os.Executable()
				require.NoError(t, err)
				cmd := exec.Command(exe)
				cmd.Env = append(os.Environ(), victimVariable+"="+strings.Join(k.brokers, ",")+" "+k.names.Prefix+" "+tc.instance)
				cmd.Stderr = os.Stderr
				out, err := cmd.StdoutPipe()
				require.NoError(t, err)
				require.NoError(t, cmd.Start())
				t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
				_, err = bufio.NewReader(out).ReadString('\n')
				require.NoError(t, err)
				require.NoError(t, cmd.Process.Kill())
				killed := time.Now()

				l, mem := newLedger(), consumers.NewMemory()
				g := commandGroup(k, mem, l)
				k.source(k.client(func(c *Config) { c.InstanceID, c.Session = tc.instance, victimSession }), g, func(*SourceConfig) {})
				eventually(t, 60*time.Second, "all handled", func() bool { return l.count() == len(recs) })
				took := time.Since(killed)
				t.Logf("from kill -9 to progress: %s", took.Round(time.Millisecond))
				require.Less(t, took, tc.within)
				l.exactlyOnce(t, recs)
			}
			if tc.instance == "" {
				onBoth(t, test)
				return
			}
			t.Run("kafka", func(t *testing.T) { test(realEnv(t)) }) // static membership is not the in-process broker's strength
		})
	}
}

func TestNewSaysWhatToChange(t *testing.T) {
	for says, cfg := range map[string]Config{
		"no brokers":             {Brokers: []string{" "}},
		"is not between":         {Brokers: []string{"x:1"}, Session: time.Hour},
		"Kafka takes letters":    {Brokers: []string{"x:1"}, Names: events.Names{Prefix: "a b"}},
		"unknown sasl mechanism": {Brokers: []string{"x:1"}, SASL: SASL{Mechanism: "gssapi", Username: "u", Password: "p"}},
		"needs a username":       {Brokers: []string{"x:1"}, SASL: SASL{Mechanism: "plain", Username: "u"}},
	} {
		_, err := New(cfg)
		require.ErrorContains(t, err, says)
	}
	c, err := New(Config{Brokers: []string{"127.0.0.1:1"}})
	require.NoError(t, err)
	defer c.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	var away interface{ Outage() string }
	require.ErrorAs(t, c.Ping(ctx), &away)
	require.Equal(t, "kafka", away.Outage())
	_, err = c.NewSource(SourceConfig{Group: "g", Topic: "t", Inflight: 1000})
	require.ErrorContains(t, err, "at most")
	_ = uuid.Nil
}
