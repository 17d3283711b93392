//go:build unix

package kafka

import (
	"bytes"
	"context"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"

	"ordersaga/adapters/embedded/testenv"
	"ordersaga/events"
)

func realEnv(t *testing.T) *env {
	t.Helper()
	return newEnv(t, testenv.RealKafka(t))
}

func TestTopicsArePlannedAndApplied(t *testing.T) {
	onBoth(t, func(k *env) {
		t := k.T
		cfg := TopicsConfig{Partitions: 2, Replication: 1, Delays: tiers, RetentionBytes: 64 << 20}
		want := cfg.Topics()
		plan, err := k.c.TopicPlan(t.Context(), want)
		require.NoError(t, err)
		require.Len(t, plan, len(want))
		for _, ch := range plan {
			require.Equal(t, CreateTopic, ch.Kind)
		}
		for range 2 { // two processes at once
			for _, r := range k.c.ApplyTopics(t.Context(), plan) {
				require.NoError(t, r.Err)
			}
		}
		plan, err = k.c.TopicPlan(t.Context(), want)
		require.NoError(t, err)
		require.Empty(t, plan, "applied once, there is nothing left to do")

		cfg.Partitions, cfg.Replication, cfg.Retention, cfg.RetryPartitions = 3, 3, time.Hour, 1
		want = cfg.Topics()
		plan, err = k.c.TopicPlan(t.Context(), want)
		require.NoError(t, err)
		kinds := map[ChangeKind]int{}
		for _, ch := range plan {
			kinds[ch.Kind]++
			if ch.Kind == CannotChange {
				require.NotEmpty(t, ch.Detail)
			}
		}
		require.Equal(t, 6, kinds[AddPartitions])
		require.Equal(t, len(want)+12, kinds[CannotChange], "replication of all, and the retry topics that have more partitions than wanted")
		require.Positive(t, kinds[SetConfig])
		var todo []TopicChange
		for _, ch := range plan {
			if ch.Key != "min.insync.replicas" {
				todo = append(todo, ch)
			}
		}
		for _, r := range k.c.ApplyTopics(t.Context(), todo) {
			require.NoError(t, r.Err, "%s %s", r.Topic, r.Kind)
		}
		eventually(t, 10*time.Second, "only what cannot be changed is left", func() bool {
			plan, err := k.c.TopicPlan(t.Context(), want)
			require.NoError(t, err)
			for _, ch := range plan {
				if ch.Kind != CannotChange && ch.Key != "min.insync.replicas" {
					return false
				}
			}
			return true
		})
		n, err := k.c.Brokers(t.Context())
		require.NoError(t, err)
		require.Equal(t, 1, n)
		require.NoError(t, k.c.Ping(t.Context()))
	})
}

func TestF20_ProductionTopicsKeepThreeCopiesAndNeedTwo(t *testing.T) {
	specs := TopicsConfig{Partitions: 16, Replication: 3}.Topics()
	require.Len(t, specs, 6+len(events.Groups)*(len(events.DefaultRetryDelays)+1))
	for _, s := range specs {
		require.Equal(t, int16(3), s.Replication)
		require.Equal(t, "2", s.Configs["min.insync.replicas"])
		require.NoError(t, checkName("topic", string(s.Name), false))
	}
}

func TestF39_RecordAboveTheLimitIsRefusedAndTheRestGoesOn(t *testing.T) {
	onBoth(t, func(k *env) {
		t := k.T
		k.topics(1, events.TopicCommands)
		p := k.producer()
		big := message(events.TPlaceOrder, uuid.New())
		big.Value = append(big.Value, bytes.Repeat([]byte(" "), 2<<20)...)
		var mu sync.Mutex
		got := map[string]error{}
		send := func(name string, r events.Record) {
			p.Produce(t.Context(), r, func(err error) {
				mu.Lock()
				defer mu.Unlock()
				got[name] = err
			})
		}
		send("before", message(events.TPlaceOrder, uuid.New()))
		send("big", big)
		send("after", message(events.TPlaceOrder, uuid.New()))
		require.NoError(t, p.Flush(t.Context()))
		mu.Lock()
		require.NoError(t, got["before"])
		require.NoError(t, got["after"])
		var refused interface{ Refused() bool }
		require.ErrorAs(t, got["big"], &refused)
		require.True(t, refused.Refused())
		mu.Unlock()

		lost := message(events.TPlaceOrder, uuid.New())
		lost.Topic = "no.such.topic"
		send("lost", lost)
		require.NoError(t, p.Flush(t.Context()))
		mu.Lock()
		defer mu.Unlock()
		require.ErrorContains(t, got["lost"], "ordersaga topics apply")
		require.NotErrorAs(t, got["lost"], &refused, "a topic that is missing may be made: nothing is set aside for it")
	})
}

func TestProducerKeepsTheOrderOfKeys(t *testing.T) {
	onBoth(t, func(k *env) {
		t := k.T
		k.topics(4, events.TopicEvents)
		p := k.producer()
		tail, err := k.c.NewTail(events.TopicEvents)
		require.NoError(t, err)
		ready := make(chan struct{})
		var mu sync.Mutex
		last := map[uuid.UUID]int32{}
		total, inverted := 0, 0
		runs(k, func(ctx context.Context) error {
			return tail.Run(ctx, func() { close(ready) }, func(_ context.Context, batch []events.Envelope) {
				mu.Lock()
				defer mu.Unlock()
				for _, e := range batch {
					if e.Sequence <= last[e.OrderID] {
						continue // a tail that had to connect again shows some records twice
					}
					total++
					if e.Sequence != last[e.OrderID]+1 {
						inverted++
					}
					last[e.OrderID] = e.Sequence
				}
			})
		})
		<-ready
		keys := shuffledKeys(50)
		for seq := int32(1); seq <= 40; seq++ {
			for _, key := range keys {
				e := events.Envelope{ID: events.NewID(), Type: events.TOrderPlaced, OrderID: key, Sequence: seq, Data: &events.OrderEvent{OrderID: key.String(), Sequence: seq}}
				value, err := events.Encode(e)
				require.NoError(t, err)
				p.Produce(t.Context(), events.Record{Topic: events.TopicEvents, Key: []byte(key.String()), Value: value, Headers: events.HeadersOf(e)}, func(err error) {
					if err != nil {
						t.Error(err)
					}
				})
			}
		}
		require.NoError(t, p.Flush(t.Context()))
		eventually(t, 30*time.Second, "all seen", func() bool { mu.Lock(); defer mu.Unlock(); return total == 2000 })
		require.Zero(t, inverted)
	})
}

func TestTailBeginsAtTheEndAndSeesNewPartitions(t *testing.T) {
	onBoth(t, func(k *env) {
		t := k.T
		k.topics(1, events.TopicEvents)
		p := k.producer()
		old := messages(events.TOrderPlaced, 5)
		for i := range old {
			old[i].Timestamp = time.Now().Add(-time.Hour)
		}
		k.produce(p, old...)
		tail, err := k.c.NewTail(events.TopicEvents)
		require.NoError(t, err)
		ready := make(chan struct{})
		var mu sync.Mutex
		seen := map[uuid.UUID]int{}
		runs(k, func(ctx context.Context) error {
			return tail.Run(ctx, func() { close(ready) }, func(_ context.Context, batch []events.Envelope) {
				mu.Lock()
				defer mu.Unlock()
				for _, e := range batch {
					seen[e.ID]++
				}
			})
		})
		<-ready
		var all []events.Record
		send := func() {
			recs := messages(events.TOrderPlaced, 20)
			k.produce(p, recs...)
			k.produce(p, events.Record{Topic: events.TopicEvents, Key: []byte("x"), Value: []byte("not ours")}) // left out
			all = append(all, recs...)
		}
		send()
		k.apply([]TopicSpec{{Name: events.TopicEvents, Partitions: 4, Replication: 1}})
		for range 10 {
			send()
			sleep(t.Context(), 150*time.Millisecond)
		}
		eventually(t, 30*time.Second, "all seen", func() bool { mu.Lock(); defer mu.Unlock(); return len(seen) == len(all) })
		mu.Lock()
		defer mu.Unlock()
		for i := range old {
			require.Zero(t, seen[events.Identity(&old[i])])
		}
		for i := range all {
			require.Equal(t, 1, seen[events.Identity(&all[i])])
		}
	})
}

// gate is what a tail asks whether anybody waits.
type gate struct {
	mu sync.Mutex
	ch chan struct{}
}

func newGate() *gate { return &gate{ch: make(chan struct{})} }

func (g *gate) awaited() <-chan struct{} {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.ch
}

// open says that somebody waits; shut, that nobody does any more.
func (g *gate) open() { close(g.ch) }
func (g *gate) shut() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.ch = make(chan struct{})
}

// sight is what a tail has shown.
type sight struct {
	mu   sync.Mutex
	seen map[uuid.UUID]int
}

func (s *sight) each(_ context.Context, batch []events.Envelope) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, e := range batch {
		s.seen[e.ID]++
	}
}

func (s *sight) has(recs []events.Record) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := range recs {
		if s.seen[events.Identity(&recs[i])] == 0 {
			return false
		}
	}
	return true
}

func TestTailRestsUntilSomebodyWaits(t *testing.T) {
	onBoth(t, func(k *env) {
		t := k.T
		k.topics(3, events.TopicEvents)
		p := k.producer()
		tail, err := k.c.NewTail(events.TopicEvents)
		require.NoError(t, err)
		g, s := newGate(), &sight{seen: map[uuid.UUID]int{}}
		tail.While(g.awaited).rest = time.Hour
		g.open()
		runs(k, func(ctx context.Context) error { return tail.Run(ctx, nil, s.each) })
		eventually(t, 30*time.Second, "it reads at once while somebody waits", func() bool {
			probe := messages(events.TOrderPlaced, 1) // again and again: what came before it knew where to begin is not seen
			k.produce(p, probe...)
			s.mu.Lock()
			defer s.mu.Unlock()
			return len(s.seen) > 0
		})
		for range 3 {
			g.shut()
			k.produce(p, messages(events.TOrderPlaced, 1)...) // ends the fetch that is under way; then it rests
			recs := messages(events.TOrderPlaced, 20)
			k.produce(p, recs...)
			g.open()
			more := messages(events.TOrderPlaced, 20)
			k.produce(p, more...)
			eventually(t, 30*time.Second, "nothing of before or after is missed", func() bool { return s.has(recs) && s.has(more) })
		}
	})
}

func TestTailLooksRarelyWhileNobodyWaits(t *testing.T) {
	onBoth(t, func(k *env) {
		t := k.T
		k.topics(3, events.TopicEvents)
		p := k.producer()
		tail, err := k.c.NewTail(events.TopicEvents)
		require.NoError(t, err)
		s := &sight{seen: map[uuid.UUID]int{}}
		runs(k, func(ctx context.Context) error { return tail.While(newGate().awaited).Run(ctx, nil, s.each) })
		eventually(t, 30*time.Second, "it still reads", func() bool {
			k.produce(p, messages(events.TOrderPlaced, 1)...)
			s.mu.Lock()
			defer s.mu.Unlock()
			return len(s.seen) > 2
		})
	})
}

func TestLagIsExported(t *testing.T) {
	onBoth(t, func(k *env) {
		t := k.T
		k.topics(2, events.TopicCommands)
		k.produce(k.producer(), messages(events.TPlaceOrder, 30)...)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		groups := map[events.Group][]events.Topic{events.GroupOrderCommands: {events.TopicCommands}}
		go func() { done <- k.c.ExportLag(ctx, 50*time.Millisecond, groups) }()
		sum := func() (n int64) {
			k.seen.mu.Lock()
			defer k.seen.mu.Unlock()
			for _, v := range k.seen.lag {
				n += v
			}
			return n
		}
		eventually(t, 10*time.Second, "the lag of a group that has not begun is all there is", func() bool { return sum() == 30 })
		cancel()
		require.NoError(t, <-done)
	})
	require.True(t, Lag{Committed: 5, End: 4}.PastEnd())
	require.False(t, Lag{Committed: -1, End: 0}.PastEnd())
}
