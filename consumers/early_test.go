package consumers

import (
	"context"
	"errors"
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

func earlyOf(r events.Record) *events.Record {
	r.Offset = EarlyOffset
	return &r
}

// Whatever comes early, from Kafka, is taken, settled, fails or is dropped, in whatever order: a record is settled once as long as its lane is not dropped,
// never while its copy runs, and no mark passes what is not settled.
func TestEarlyRecordsAndTheirCopiesAreOne(t *testing.T) {
	const lanes = 3
	rapid.Check(t, func(t *rapid.T) {
		l := NewLanes(nil, rapid.Bool().Draw(t, "overlap"))
		pool := records(events.TReserveStock, 40) // record i lies in partition i%3, at the place at which it is added
		var unborn, offered []int
		for i := range pool {
			unborn = append(unborn, i)
		}
		index := map[uuid.UUID]int{}
		for i := range pool {
			index[events.Identity(&pool[i])] = i
		}
		type at struct {
			partition int32
			offset    int64
		}
		next := map[int32]int64{}
		places, settled, running, dropped := map[int]at{}, map[int]bool{}, map[int]bool{}, map[int]bool{}
		added := map[at]int{}
		var out []*Batch
		check := func(marks []Place) {
			for _, m := range marks {
				for o := range m.Offset + 1 {
					if i, ok := added[at{m.Partition, o}]; ok && !settled[i] && !dropped[i] {
						t.Fatalf("mark %d of %d passes record %d, which is not settled", m.Offset, m.Partition, i)
					}
				}
			}
		}
		settle := func(b *Batch, flag func() bool) {
			flags := make([]bool, len(b.Records))
			for j := range b.Records {
				i := index[events.Identity(&b.Records[j])]
				flags[j] = flag()
				settled[i] = settled[i] || flags[j]
				running[i] = false
			}
			check(l.Settle(b, flags))
		}
		take := func(limit int) bool {
			b := l.Take(time.Time{}, limit, nil)
			if b == nil {
				return false
			}
			for j := range b.Records {
				i := index[events.Identity(&b.Records[j])]
				if !dropped[i] && (settled[i] || running[i]) {
					t.Fatalf("record %d is taken, though settled: %v, running: %v", i, settled[i], running[i])
				}
				running[i] = true
			}
			out = append(out, b)
			return true
		}
		add := func(i int) {
			r := pool[i]
			r.Offset = next[r.Partition]
			next[r.Partition]++
			places[i] = at{r.Partition, r.Offset}
			added[places[i]] = i
			check(l.Add([]events.Record{r}))
		}
		pick := func(t *rapid.T, from *[]int) (int, bool) {
			if len(*from) == 0 {
				return 0, false
			}
			n := rapid.IntRange(0, len(*from)-1).Draw(t, "record")
			i := (*from)[n]
			*from = slices.Delete(*from, n, n+1)
			return i, true
		}
		t.Repeat(map[string]func(*rapid.T){
			"offer": func(t *rapid.T) {
				if i, ok := pick(t, &unborn); ok {
					l.Offer(earlyOf(pool[i]), rapid.IntRange(1, 8).Draw(t, "limit"))
					offered = append(offered, i)
				}
			},
			"handled ahead": func(t *rapid.T) {
				if i, ok := pick(t, &unborn); ok {
					l.Settled(events.Identity(&pool[i]), Lane{events.TopicStock, pool[i].Partition}, events.PayloadHash(pool[i].Value))
					settled[i] = true
					offered = append(offered, i)
				}
			},
			"comes": func(t *rapid.T) {
				if i, ok := pick(t, &offered); ok {
					add(i)
				}
			},
			"comes unoffered": func(t *rapid.T) {
				if i, ok := pick(t, &unborn); ok {
					add(i)
				}
			},
			"take": func(t *rapid.T) { take(rapid.IntRange(1, 8).Draw(t, "limit")) },
			"settle": func(t *rapid.T) {
				if len(out) > 0 {
					n := rapid.IntRange(0, len(out)-1).Draw(t, "batch")
					b := out[n]
					out = slices.Delete(out, n, n+1)
					settle(b, func() bool { return rapid.Bool().Draw(t, "settled") })
				}
			},
			"drop": func(t *rapid.T) {
				p := rapid.Int32Range(0, lanes-1).Draw(t, "partition")
				if rapid.IntRange(0, 9).Draw(t, "rarely") > 0 {
					return
				}
				l.Drop([]Lane{{events.TopicStock, p}})
				for i := range pool {
					dropped[i] = dropped[i] || pool[i].Partition == p
				}
			},
		})
		for _, i := range slices.Concat(offered, unborn) {
			add(i)
		}
		for len(out) > 0 || take(5) {
			for _, b := range out {
				settle(b, func() bool { return true })
			}
			out = nil
		}
		for i := range pool {
			if !settled[i] && !dropped[i] {
				t.Fatalf("record %d was never settled", i)
			}
		}
		if l.Size() != 0 || l.Waiting() != 0 {
			t.Fatalf("size %d, waiting %d at the end", l.Size(), l.Waiting())
		}
	})
}

// desk is a handler of batches that lets the test answer them.
type desk struct {
	mu    sync.Mutex
	got   [][]events.Record
	marks []Place
	gate  chan bool // whether the next batch is settled
}

func (d *desk) handle(ctx context.Context, batch []events.Record) ([]bool, error) {
	d.mu.Lock()
	d.got = append(d.got, batch)
	d.mu.Unlock()
	settled := make([]bool, len(batch))
	select {
	case ok := <-d.gate:
		for i := range settled {
			settled[i] = ok
		}
		return settled, nil
	case <-ctx.Done():
		return settled, context.Cause(ctx)
	}
}

func (d *desk) seen() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return len(d.got)
}

func (d *desk) marked() []Place {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Clone(d.marks)
}

func startDesk(t *testing.T) (*Pump, *desk, func()) {
	t.Helper()
	d := &desk{gate: make(chan bool, 10)}
	p := NewPump(PumpConfig{MaxBatch: 10, Mark: func(ps []Place) { d.mu.Lock(); defer d.mu.Unlock(); d.marks = append(d.marks, ps...) }})
	require.False(t, p.Offer(earlyOf(record(events.TReserveStock, 0, 0))), "nobody works yet")
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { p.Run(ctx, Work{Handle: d.handle}) })
	synctest.Wait()
	return p, d, func() { cancel(); wg.Wait() }
}

func TestPumpSettlesACopyWithItsEarlyRecord(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, d, stop := startDesk(t)
		defer stop()
		rs := records(events.TReserveStock, 4)
		for i := range rs {
			rs[i].Partition, rs[i].Offset = 0, int64(i)
		}
		require.True(t, p.Offer(earlyOf(rs[0])))
		require.False(t, p.Offer(earlyOf(rs[0])), "it is here already")
		d.gate <- true
		synctest.Wait()
		p.Add(rs[:1])
		require.Equal(t, []Place{{events.TopicStock, 0, 0}}, d.marked(), "settled when it comes")

		require.True(t, p.Offer(earlyOf(rs[1])))
		synctest.Wait()
		p.Add(rs[1:2])
		synctest.Wait()
		require.Equal(t, 2, d.seen(), "its copy waits for it")
		d.gate <- true
		synctest.Wait()
		require.Equal(t, Place{events.TopicStock, 0, 1}, d.marked()[1])

		require.True(t, p.Offer(earlyOf(rs[2])))
		synctest.Wait()
		p.Add(rs[2:3])
		d.gate <- false // the early one failed
		synctest.Wait()
		require.Equal(t, 4, d.seen(), "its copy is handled, and at once")
		d.gate <- true
		synctest.Wait()
		require.Equal(t, Place{events.TopicStock, 0, 2}, d.marked()[2])

		require.True(t, p.Offer(earlyOf(rs[3])))
		d.gate <- true
		synctest.Wait()
		other := rs[3]
		other.Value = []byte("another message under its id")
		p.Add([]events.Record{other})
		synctest.Wait()
		require.Equal(t, 6, d.seen(), "which the handler is to judge")
		require.Zero(t, p.lanes.Waiting())
	})
}

func TestPumpTakesNothingEarlyThatWouldOvertake(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, d, stop := startDesk(t)
		defer stop()
		p.Add(records(events.TReserveStock, 3))
		synctest.Wait() // the worker has them
		require.True(t, p.Offer(earlyOf(record(events.TReserveStock, 0, 0))))
		p.Add([]events.Record{record(events.TReserveStock, 1, 3)})
		require.False(t, p.Offer(earlyOf(record(events.TReserveStock, 0, 0))), "something from Kafka waits")
		require.False(t, p.Offer(&events.Record{Topic: events.TopicStock}), "it could not be recognised again")
		d.gate <- true
		d.gate <- true
		d.gate <- true
		synctest.Wait()
		require.Zero(t, p.Size())
		require.True(t, p.Offer(earlyOf(record(events.TReserveStock, 0, 0))))
		synctest.Wait() // the worker has it
		for range p.cfg.MaxBatch {
			require.True(t, p.Offer(earlyOf(record(events.TReserveStock, 0, 0))))
		}
		require.False(t, p.Offer(earlyOf(record(events.TReserveStock, 0, 0))), "no more than a batch waits")
	})
}

func TestPumpForgetsWhatIsEarlyOfARevokedLane(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, d, stop := startDesk(t)
		defer stop()
		a, b := record(events.TReserveStock, 0, 0), record(events.TReserveStock, 0, 1)
		require.True(t, p.Offer(earlyOf(a)))
		synctest.Wait()
		require.True(t, p.Offer(earlyOf(b)))
		p.Drain(t.Context(), []Lane{{events.TopicStock, 0}})
		require.Empty(t, d.marked())
		require.Zero(t, p.Size())
		p.Add([]events.Record{a, b}) // the partition came back
		d.gate <- true
		d.gate <- true
		synctest.Wait()
		require.Equal(t, Place{events.TopicStock, 0, 1}, d.marked()[len(d.marked())-1])
	})
}

func TestEarlyRecordsAreForgottenInTime(t *testing.T) {
	l := NewLanes(nil, true)
	for range 2 * maxEarly {
		require.True(t, l.Offer(earlyOf(record(events.TReserveStock, 0, 0)), 1))
		b := l.Take(time.Time{}, 1, nil)
		l.Settle(b, []bool{true})
	}
	require.LessOrEqual(t, len(l.ahead)+len(l.aheadOld), maxEarly)
	require.Zero(t, l.Size())
}

// A failure of an early delivery leaves nothing behind, whatever it is; the copy from Kafka comes to it in full.
func TestEarlyDeliveryLeavesItsFailureToTheCopy(t *testing.T) {
	for name, fail := range map[string]func(*fixture){
		"transient": func(f *fixture) { f.h.result = func(*Delivery) Result { return Result{Err: transient("503")} } },
		"poison": func(f *fixture) {
			f.h.result = func(*Delivery) Result { return Result{Err: poisonError{"impossible"}} }
		},
		"outage":   func(f *fixture) { f.h.result = func(*Delivery) Result { return Result{Err: awayError{}} } },
		"prepare":  func(f *fixture) { f.h.prepare = func(context.Context, []*Delivery) error { return awayError{} } },
		"panic":    func(f *fixture) { f.h.result = func(*Delivery) Result { panic("apply") } },
		"database": func(f *fixture) { f.mem.Commit = func() error { return awayError{} } },
		"data":     func(f *fixture) { f.h.apply = func([]*Delivery) error { return sqlError{"out of range"} } },
		"nobody":   func(f *fixture) { f.mem.Commit = func() error { return errors.New("nobody knows") } },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := stock(t)
				r := record(events.TReserveStock, 0, 0)
				fail(f)
				settled, err := f.group.Handle(t.Context(), []events.Record{*earlyOf(r)})
				require.NoError(t, err)
				require.Equal(t, []bool{false}, settled)
				emitted, raw := f.mem.Drain()
				require.Empty(t, emitted)
				require.Empty(t, raw)
				require.Empty(t, f.dead())
				require.Empty(t, f.obs.failed, "its copy tells")
				_, ok := f.mem.Row(f.cfg.Name, events.Identity(&r))
				require.False(t, ok)
				f.h.result, f.h.prepare, f.h.apply, f.mem.Commit = nil, nil, nil, nil
				f.handle(r)
				f.once(r)
			})
		})
	}
}

func TestEarlyDeliveryFailsAlone(t *testing.T) {
	f := stock(t)
	early, poisoned, good := record(events.TReserveStock, 0, 0), record(events.TReserveStock, 1, 0), record(events.TReserveStock, 2, 0)
	undecodable := record(events.TReserveStock, 0, 1)
	undecodable.Value = []byte("no protobuf")
	bad := events.Identity(&poisoned)
	f.h.result = func(d *Delivery) Result {
		if d.ID == bad {
			return Result{Err: poisonError{"impossible"}}
		}
		return Result{}
	}
	settled, err := f.group.Handle(t.Context(), []events.Record{poisoned, good, *earlyOf(early), *earlyOf(undecodable)})
	require.NoError(t, err)
	require.Equal(t, []bool{true, true, true, false}, settled)
	f.once(early, good)
	require.Len(t, f.dead(), 1)
}
