package consumers

import (
	"context"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"ordersaga/events"
)

// Whatever is fetched, taken, settled and dropped in whatever order: every record that was not dropped is taken until it is settled,
// in order a lane, and no mark passes an unsettled one.
func TestLanesLoseNothing(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		overlap := rapid.Bool().Draw(t, "overlap")
		l := NewLanes(nil, overlap)
		added, settled, marked := map[int32]int64{}, map[int32]map[int64]bool{}, map[int32]int64{}
		var out []*Batch
		check := func(marks []Place) {
			for _, m := range marks {
				for o := range m.Offset + 1 {
					if !settled[m.Partition][o] {
						t.Fatalf("mark %d passes unsettled %d", m.Offset, o)
					}
				}
				if before, ok := marked[m.Partition]; ok && m.Offset <= before {
					t.Fatalf("mark %d after %d", m.Offset, before)
				}
				marked[m.Partition] = m.Offset
			}
		}
		t.Repeat(map[string]func(*rapid.T){
			"add": func(t *rapid.T) {
				p := rapid.Int32Range(0, 3).Draw(t, "partition")
				var recs []events.Record
				for range rapid.IntRange(1, 5).Draw(t, "n") {
					recs = append(recs, events.Record{Partition: p, Offset: added[p]})
					added[p]++
				}
				l.Add(recs)
			},
			"take": func(t *rapid.T) {
				limit := rapid.IntRange(1, 8).Draw(t, "limit")
				b := l.Take(time.Time{}, limit, nil)
				if b == nil {
					return
				}
				if len(b.Records) > limit {
					t.Fatalf("%d records for a limit of %d", len(b.Records), limit)
				}
				for i := 1; i < len(b.Records); i++ {
					for _, before := range b.Records[:i] {
						if before.Partition == b.Records[i].Partition && before.Offset >= b.Records[i].Offset {
							t.Fatalf("out of order in a batch")
						}
					}
				}
				if !overlap {
					for _, other := range out {
						for _, r := range b.Records {
							if other.Holds([]Lane{{r.Topic, r.Partition}}) {
								t.Fatalf("two batches of one lane")
							}
						}
					}
				}
				out = append(out, b)
			},
			"settle": func(t *rapid.T) {
				if len(out) == 0 {
					return
				}
				i := rapid.IntRange(0, len(out)-1).Draw(t, "batch")
				b := out[i]
				out = slices.Delete(out, i, i+1)
				flags := rapid.SliceOfN(rapid.Bool(), len(b.Records), len(b.Records)).Draw(t, "settled")
				for j, ok := range flags {
					p, o := b.Records[j].Partition, b.Records[j].Offset
					if settled[p] == nil {
						settled[p] = map[int64]bool{}
					}
					if settled[p][o] {
						t.Fatalf("%d/%d was taken after it was settled", p, o)
					}
					settled[p][o] = ok
				}
				check(l.Settle(b, flags))
			},
		})
		all := func(b *Batch) []bool {
			flags := make([]bool, len(b.Records))
			for j := range b.Records {
				flags[j] = true
				p := b.Records[j].Partition
				if settled[p] == nil {
					settled[p] = map[int64]bool{}
				}
				settled[p][b.Records[j].Offset] = true
			}
			return flags
		}
		for _, b := range out {
			check(l.Settle(b, all(b)))
		}
		for b := l.Take(time.Time{}, 3, nil); b != nil; b = l.Take(time.Time{}, 3, nil) {
			check(l.Settle(b, all(b)))
		}
		for p, n := range added {
			if n > 0 && marked[p] != n-1 {
				t.Fatalf("partition %d: marked up to %d of %d", p, marked[p], n)
			}
		}
		if l.Size() != 0 || l.Waiting() != 0 {
			t.Fatalf("size %d, waiting %d at the end", l.Size(), l.Waiting())
		}
	})
}

func TestLanesForgetWhatWasDropped(t *testing.T) {
	l := NewLanes(nil, false)
	recs := []events.Record{{Offset: 5}, {Offset: 6}, {Partition: 1, Offset: 1}}
	l.Add(recs)
	b := l.Take(time.Time{}, 10, nil)
	require.Len(t, b.Records, 3)
	l.Drop([]Lane{{Partition: 0}})
	l.Add([]events.Record{{Offset: 5}, {Offset: 6}}) // it came back, and begins where it was committed
	require.Equal(t, []Place{{Partition: 1, Offset: 1}}, l.Settle(b, []bool{true, true, true}), "verdicts of before say nothing about the new assignment")
	require.Equal(t, 2, l.Size())
	require.Len(t, l.Take(time.Time{}, 10, nil).Records, 2)
}

func TestLanesShareABatch(t *testing.T) {
	l := NewLanes(nil, false)
	for i := range 1000 {
		l.Add([]events.Record{{Partition: 0, Offset: int64(i)}})
	}
	l.Add([]events.Record{{Partition: 1}, {Partition: 2}})
	b := l.Take(time.Time{}, 90, nil)
	require.Len(t, b.Records, 90, "what a short lane leaves, a long one takes")
	parts := map[int32]int{}
	for _, r := range b.Records {
		parts[r.Partition]++
	}
	require.Equal(t, map[int32]int{0: 88, 1: 1, 2: 1}, parts)
}

// tier is a group that the tiers deliver to.
type tier struct {
	name   events.Group
	topics []events.Topic
	mu     sync.Mutex
	got    []events.Record
	at     []time.Time
	fail   func(*events.Record) bool
	hang   bool
}

func (g *tier) Name() events.Group          { return g.name }
func (g *tier) RetryTopics() []events.Topic { return g.topics }
func (g *tier) Handle(ctx context.Context, batch []events.Record) ([]bool, error) {
	if g.hang {
		<-ctx.Done()
		return make([]bool, len(batch)), context.Cause(ctx)
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	settled := make([]bool, len(batch))
	for i := range batch {
		if g.fail != nil && g.fail(&batch[i]) {
			continue
		}
		settled[i] = true
		g.got, g.at = append(g.got, batch[i]), append(g.at, time.Now())
	}
	return settled, nil
}

func retryCopyOf(topic events.Topic, partition int32, offset int64, due time.Time) events.Record {
	s := copyState{ticket: 1, attempt: 2, tier: 1, due: due, origin: Place{"t", 0, 0}, id: uuid.New()}
	return events.Record{Topic: topic, Partition: partition, Offset: offset, Headers: s.headers(nil)}
}

func TestRetryTiersDeliverWhenDueAndInOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := &tier{name: "a", topics: []events.Topic{"retry.a.5s", "retry.a.30s"}}
		b := &tier{name: "b", topics: []events.Topic{"retry.b.5s"}, hang: true} // one group's outage is not another's
		var mu sync.Mutex
		marks := map[Lane]int64{}
		obs := &noted{}
		tiers, err := NewRetryTiers([]Retried{a, b}, obs, nil, func(ps []Place) {
			mu.Lock()
			defer mu.Unlock()
			for _, p := range ps {
				marks[Lane{p.Topic, p.Partition}] = p.Offset
			}
		})
		require.NoError(t, err)
		require.ElementsMatch(t, []events.Topic{"retry.a.5s", "retry.a.30s", "retry.b.5s"}, tiers.Topics())
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		wg.Go(func() { tiers.Run(ctx) })

		tries := map[int64]int{}
		a.fail = func(r *events.Record) bool { tries[r.Offset]++; return tries[r.Offset] < 2 && r.Offset%10 == 0 }
		begun := time.Now()
		rng := rand.New(rand.NewPCG(1, 2))
		total := 0
		for p := range int32(3) {
			for topic, delay := range map[events.Topic]time.Duration{"retry.a.5s": 5 * time.Second, "retry.a.30s": 30 * time.Second, "retry.b.5s": 5 * time.Second} {
				at := begun
				for o := range int64(50) {
					at = at.Add(time.Duration(rng.IntN(100)) * time.Millisecond)
					tiers.Add([]events.Record{retryCopyOf(topic, p, o, at.Add(delay))})
					if topic != "retry.b.5s" {
						total++
					}
				}
			}
		}
		pause(t.Context(), 3*time.Minute)
		synctest.Wait()
		a.mu.Lock()
		require.Len(t, a.got, total, "nothing is lost")
		last := map[Lane]int64{}
		for i := range a.got {
			lane := Lane{a.got[i].Topic, a.got[i].Partition}
			before, seen := last[lane]
			require.True(t, !seen || a.got[i].Offset > before || tries[a.got[i].Offset] > 1, "nothing overtakes")
			last[lane] = max(before, a.got[i].Offset)
			require.False(t, a.at[i].Before(Due(&a.got[i])), "nothing is early")
			if a.got[i].Offset%10 != 0 && a.got[i].Offset < 5 {
				require.Less(t, a.at[i].Sub(Due(&a.got[i])), time.Second, "nor late")
			}
		}
		a.mu.Unlock()
		require.Equal(t, 150, tiers.Size(), "the other group's are held")
		cancel()
		wg.Wait()
		require.Equal(t, int64(49), marks[Lane{"retry.a.30s", 2}])
		require.NotContains(t, marks, Lane{"retry.b.5s", 0})
		require.NotEmpty(t, obs.late)
	})
}

func TestPumpDrainsRevokedLanes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		var marks []Place
		p := NewPump(PumpConfig{MaxBatch: 10, Mark: func(ps []Place) { mu.Lock(); defer mu.Unlock(); marks = append(marks, ps...) }})
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		second := make(chan []events.Record, 1)
		calls := 0
		var wg sync.WaitGroup
		wg.Go(func() {
			p.Run(ctx, Work{Handle: func(ctx context.Context, batch []events.Record) ([]bool, error) {
				if calls++; calls > 1 {
					second <- batch
					settled := make([]bool, len(batch))
					for i := range settled {
						settled[i] = true
					}
					return settled, nil
				}
				<-ctx.Done() // held, until a partition of it is revoked
				settled := make([]bool, len(batch))
				for i := range batch {
					settled[i] = batch[i].Offset == 0
				}
				return settled, context.Cause(ctx)
			}})
		})
		p.Add([]events.Record{{Partition: 0}, {Partition: 0, Offset: 1}, {Partition: 1}, {Partition: 1, Offset: 1}})
		synctest.Wait()
		p.Drain(t.Context(), []Lane{{Partition: 0}})
		mu.Lock()
		require.Subset(t, marks, []Place{{Partition: 0}, {Partition: 1}}, "what was settled is marked before Drain returns")
		require.NotContains(t, marks, Place{Partition: 0, Offset: 1})
		mu.Unlock()
		got := <-second
		require.Equal(t, []events.Record{{Partition: 1, Offset: 1}}, got, "the partition that stays goes on; the one that went is not touched")
		cancel()
		wg.Wait()
	})
}

func TestPumpGathersUnderLoadOnly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := NewPump(PumpConfig{MaxBatch: 500, Gather: 3 * time.Millisecond, GatherTo: 100})
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		var mu sync.Mutex
		var sizes []int
		var waits []time.Duration
		var wg sync.WaitGroup
		wg.Go(func() {
			p.Run(ctx, Work{Handle: func(_ context.Context, batch []events.Record) ([]bool, error) {
				mu.Lock()
				defer mu.Unlock()
				sizes = append(sizes, len(batch))
				waits = append(waits, time.Since(batch[0].Timestamp))
				settled := make([]bool, len(batch))
				for i := range settled {
					settled[i] = true
				}
				return settled, nil
			}})
		})
		offset := int64(0)
		add := func() {
			p.Add([]events.Record{{Offset: offset, Timestamp: time.Now()}})
			offset++
		}
		for range 5 { // idle: one in a second
			add()
			pause(ctx, time.Second)
		}
		synctest.Wait()
		mu.Lock()
		require.Equal(t, []int{1, 1, 1, 1, 1}, sizes)
		require.Equal(t, make([]time.Duration, 5), waits, "a lone record never waits")
		sizes = nil
		mu.Unlock()
		for range 4000 { // ten in a millisecond
			add()
			pause(ctx, 100*time.Microsecond)
		}
		pause(ctx, time.Second)
		synctest.Wait()
		mu.Lock()
		defer mu.Unlock()
		require.Less(t, len(sizes), 400, "batches of ten and more, instead of one or two")
		for _, w := range waits {
			require.LessOrEqual(t, w, 5*time.Millisecond)
		}
		cancel()
		wg.Wait()
	})
}
