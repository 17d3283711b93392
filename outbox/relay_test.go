package outbox

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"ordersaga/events"
)

// message makes a raw message of a key with a value to be found again; shard by key as in life, but among all shards.
func message(key, value string) Message {
	return Message{
		Shard: int16(keyHash([]byte(key)) % TotalShards), ID: events.NewID(),
		Topic: "t", Key: []byte(key), Payload: []byte(value),
	}
}

func numbered(key string, from, to int) []Message {
	var out []Message
	for i := from; i < to; i++ {
		out = append(out, message(key, key+"#"+strconv.Itoa(i)))
	}
	return out
}

func wanted(key string, from, to int) []string {
	var out []string
	for i := from; i < to; i++ {
		out = append(out, key+"#"+strconv.Itoa(i))
	}
	return out
}

// heard is an Observer that remembers.
type heard struct {
	NoObserver
	mu       sync.Mutex
	fenced   []int16
	aside    []string
	bare     int
	errs     []string
	produced int
	direct   int
	early    int
	held     int
	lag      time.Duration
	backlog  []Backlog
	windows  []int
}

func (h *heard) with(f func()) {
	h.mu.Lock()
	defer h.mu.Unlock()
	f()
}

// all answers what was heard so far.
func (h *heard) all() (seen struct {
	errs, aside                []string
	bare, held, produced, gone int
}) {
	h.with(func() {
		seen.errs, seen.aside, seen.bare, seen.held = append(seen.errs, h.errs...), append(seen.aside, h.aside...), h.bare, h.held
		seen.produced, seen.gone = h.produced, len(h.fenced)
	})
	return seen
}
func (h *heard) WindowRead(rows int, _ time.Duration) {
	h.with(func() { h.windows = append(h.windows, rows) })
}
func (h *heard) Produced(n int)            { h.with(func() { h.produced += n }) }
func (h *heard) HandedOver(n int)          { h.with(func() { h.direct += n }) }
func (h *heard) TakenEarly(n int)          { h.with(func() { h.early += n }) }
func (h *heard) BacklogSeen(b Backlog)     { h.with(func() { h.backlog = append(h.backlog, b) }) }
func (h *heard) CursorLag(d time.Duration) { h.with(func() { h.lag = d }) }
func (h *heard) LeasesHeld(n int)          { h.with(func() { h.held = n }) }
func (h *heard) ShardFenced(s int16)       { h.with(func() { h.fenced = append(h.fenced, s) }) }
func (h *heard) RecordSetAside(m *Message, _ error, bare bool) {
	h.with(func() {
		if bare {
			h.bare++
			return
		}
		h.aside = append(h.aside, string(m.Payload))
	})
}
func (h *heard) RelayFailed(op string, err error) {
	h.with(func() { h.errs = append(h.errs, op+": "+err.Error()) })
}

// start runs a relay; stop ends it and waits.
func start(t *testing.T, l Log, p Producer, c Config, o Observer) (r *Relay, stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	relay := New(l, p, c, o)
	done := make(chan error, 1)
	go func() { done <- relay.Run(ctx) }()
	return relay, sync.OnceFunc(func() {
		cancel()
		require.NoError(t, <-done)
	})
}

// elapse lets virtual time pass.
func elapse(d time.Duration) { <-time.After(d) }

// settled waits, in virtual time, and then until everything is blocked.
func settled(d time.Duration) {
	elapse(d)
	synctest.Wait()
}

func TestRelayCarriesEveryRowOnceInOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, b := newMemoryLog(), &broker{latency: 3 * time.Millisecond}
		wake := make(chan struct{}, 1)
		_, stop := start(t, l, b, Config{Wake: wake}, nil)
		var want int
		for i := range 400 {
			l.put(message("k"+strconv.Itoa(i%7), fmt.Sprintf("k%d#%03d", i%7, i)))
			want++
			signal(wake)
			elapse(time.Duration(rand.IntN(2000)) * time.Microsecond)
		}
		settled(time.Second)
		got := b.values()
		require.Len(t, got, want)
		require.Len(t, firsts(got), want)
		requireOrder(t, got)
		backlog, err := l.Backlog(t.Context())
		require.NoError(t, err)
		require.Zero(t, backlog.Rows, "the stored cursors are past everything")
		stop()
	})
}

// requireOrder checks key#n: first occurrences ascend for each key.
func requireOrder(t *testing.T, values []string) {
	t.Helper()
	last := map[string]int{}
	for _, v := range firsts(values) {
		key, num, _ := strings.Cut(v, "#")
		n, err := strconv.Atoi(num)
		require.NoError(t, err)
		before, ok := last[key]
		require.Truef(t, !ok || n > before, "%s came after %s#%d", v, key, before)
		last[key] = n
	}
}

func TestF1_IDsThatCommitOutOfOrderAreNotSkipped(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, b := newMemoryLog(), &broker{}
		_, stop := start(t, l, b, Config{}, nil)
		defer stop()
		early := l.begin()
		early.emit(message("a", "early"))
		l.put(message("a", "late"))
		settled(time.Second)
		require.Equal(t, []string{"late"}, b.values())
		early.commit()
		settled(time.Second)
		require.Equal(t, []string{"late", "early"}, b.values())
	})
}

func TestF2_AnOpenTransactionDelaysOnlyItsOwnRows(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, b := newMemoryLog(), &broker{}
		_, stop := start(t, l, b, Config{}, nil)
		defer stop()
		open := l.begin()
		open.emit(message("a", "a#99"))
		for i := range 60 {
			l.put(message("a", "a#"+strconv.Itoa(i)))
			settled(time.Second)
			require.Len(t, b.values(), i+1, "nobody waits for the open transaction")
		}
		open.commit()
		settled(time.Second)
		require.Equal(t, append(wanted("a", 0, 60), "a#99"), b.values())
	})
}

func TestF3_RelaysShareShardsAndHandThemOverWithoutDuplicates(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, b := newMemoryLog(), &broker{latency: 20 * time.Millisecond}
		var seen [3]heard
		var stops [3]func()
		i := 0
		for n := range stops { // they come one after the other, under load
			_, stops[n] = start(t, l, b, Config{}, &seen[n])
			for range 40 {
				l.put(message("k"+strconv.Itoa(i%29), fmt.Sprintf("k%d#%d", i%29, i)))
				i++
				elapse(50 * time.Millisecond)
			}
		}
		settled(3 * time.Second)
		for n := range seen {
			require.Equal(t, TotalShards/3, seen[n].all().held)
		}
		stops[0]() // gives its shards back: the others need not wait for them to expire
		for range 40 {
			l.put(message("k"+strconv.Itoa(i%29), fmt.Sprintf("k%d#%d", i%29, i)))
			i++
			elapse(50 * time.Millisecond)
		}
		settled(2 * time.Second)
		got := b.values()
		require.Len(t, got, i, "nothing lost")
		require.Len(t, firsts(got), i, "nothing twice")
		requireOrder(t, got)
		stops[1]()
		stops[2]()
	})
}

func TestF4_ACrashBetweenProduceAndStoreRepeatsAndLosesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, b := newMemoryLog(), &broker{}
		crashed := errors.New("crashed")
		var dead, over atomic.Bool
		l.hook = func(op, _ string) error {
			if !over.Load() && (dead.Load() && op != "acquire" && op != "window" || op == "store") {
				return crashed
			}
			return nil
		}
		_, stop := start(t, l, b, Config{}, nil)
		settled(10 * time.Millisecond)
		l.put(numbered("a", 0, 20)...)
		settled(100 * time.Millisecond) // produced, not stored
		require.Equal(t, wanted("a", 0, 20), b.values())
		dead.Store(true)
		stop()
		over.Store(true)
		l.put(numbered("a", 20, 30)...)
		_, stop = start(t, l, b, Config{}, nil)
		settled(10 * time.Second) // the dead one's leases expire
		require.Equal(t, wanted("a", 0, 30), firsts(b.values()))
		require.Len(t, b.values(), 50, "the twenty came again, with the ids they had")
		stop()
	})
}

func TestF3_APausedRelayThatWakesIsFenced(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, b := newMemoryLog(), &broker{}
		var first, second heard
		paused := make(chan struct{})
		var pausedID atomic.Value
		l.hook = func(op, relay string) error {
			if relay != "" && relay == pausedID.Load() && op != "leave" {
				<-paused
			}
			return nil
		}
		mid := make(chan struct{})
		var once atomic.Bool
		l.onRow = func(n int) error {
			if n == 10 && once.CompareAndSwap(false, true) {
				<-mid // in the middle of a window
			}
			return nil
		}
		r, stop := start(t, l, b, Config{}, &first)
		settled(time.Millisecond)
		pausedID.Store(r.ID())
		l.put(numbered("a", 0, 40)...)
		settled(time.Second)
		require.Len(t, b.values(), 10)
		_, stop2 := start(t, l, b, Config{}, &second)
		settled(8 * time.Second)
		require.Equal(t, wanted("a", 0, 40), firsts(b.values()), "the second took over")
		l.put(numbered("a", 40, 50)...)
		settled(time.Second)
		close(mid)
		close(paused)
		settled(5 * time.Second)
		require.Equal(t, wanted("a", 0, 50), firsts(b.values()))
		require.Positive(t, first.all().gone)
		require.LessOrEqual(t, len(b.values()), 10+50+64, "the paused one noticed soon")
		backlog, err := l.Backlog(t.Context())
		require.NoError(t, err)
		require.Zero(t, backlog.Rows, "the stored cursor was not turned back")
		stop()
		stop2()
	})
}

func TestF39_ARecordTooLargeIsSetAsideAndItsShardGoesOn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, h := newMemoryLog(), &heard{}
		b := &broker{latency: time.Millisecond, judge: func(r events.Record) error {
			if len(r.Value) > 100 {
				return refusal("MESSAGE_TOO_LARGE")
			}
			return nil
		}}
		_, stop := start(t, l, b, Config{}, h)
		defer stop()
		big := strings.Repeat("x", 200)
		l.put(append(append(numbered("a", 0, 5), message("a", big)), numbered("a", 5, 10)...)...)
		settled(2 * time.Second)
		require.Equal(t, wanted("a", 0, 10), firsts(b.values()))
		require.Len(t, b.values(), 10, "a refusal repeats nothing")
		require.Equal(t, []string{big}, h.all().aside)
		require.Len(t, l.setAside(), 1)
		require.Equal(t, "MESSAGE_TOO_LARGE", l.setAside()[0].reason)
		l.put(numbered("a", 10, 12)...)
		settled(time.Second)
		require.Equal(t, wanted("a", 0, 12), b.values())
	})
}

func TestF39_ABatchRefusedForOneRecordLosesOnlyThatOne(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, h := newMemoryLog(), &heard{}
		attempts := map[string]int{}
		b := &broker{latency: time.Millisecond}
		b.judge = func(r events.Record) error {
			v := string(r.Value)
			attempts[v]++
			if attempts[v] == 1 || v == "a#3" { // the first time all are in one batch
				return refusal("MESSAGE_TOO_LARGE")
			}
			return nil
		}
		_, stop := start(t, l, b, Config{}, h)
		defer stop()
		l.put(numbered("a", 0, 6)...)
		settled(2 * time.Second)
		require.Equal(t, []string{"a#0", "a#1", "a#2", "a#4", "a#5"}, b.values())
		require.Equal(t, []string{"a#3"}, h.all().aside)
	})
}

func TestF39_ADeadLetterTooLargeForItsTopicGoesWithoutItsValue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, h := newMemoryLog(), &heard{}
		b := &broker{judge: func(r events.Record) error {
			if len(r.Value) > 100 {
				return refusal("too large")
			}
			return nil
		}}
		_, stop := start(t, l, b, Config{}, h)
		defer stop()
		m := message("a", strings.Repeat("x", 200))
		m.Topic = "dlq.stock"
		m.Headers = []events.Header{{Key: "__dlq.errors.group", Value: []byte("stock")}}
		l.put(m, message("a", "next"))
		settled(2 * time.Second)
		require.Equal(t, []string{"", "next"}, b.values())
		require.Equal(t, "200", string(b.records[0].Header("__dlq.errors.omitted.bytes")))
		require.Equal(t, "stock", string(b.records[0].Header("__dlq.errors.group")))
		require.NotNil(t, b.records[0].Value)
		require.Equal(t, 1, h.all().bare)
		require.Empty(t, l.setAside())
		require.Len(t, m.Headers, 1, "the row's headers are not written to")
	})
}

func TestProduceErrorReadsAgainFromTheFirstUnacknowledged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, h := newMemoryLog(), &heard{}
		away := false
		b := &broker{latency: time.Millisecond}
		b.judge = func(r events.Record) error {
			if away = away || string(r.Value) == "a#7"; away { // as a client does: nothing overtakes what failed
				return errAway
			}
			return nil
		}
		_, stop := start(t, l, b, Config{}, h)
		defer stop()
		l.put(numbered("a", 0, 20)...)
		l.put(numbered("b", 0, 5)...)
		settled(10 * time.Second)
		require.Equal(t, wanted("a", 0, 7), b.values()[:7])
		require.NotEmpty(t, h.all().errs)
		require.Less(t, len(h.all().errs), 60, "with backoff")
		b.mu.Lock()
		away, b.judge = false, nil
		b.mu.Unlock()
		settled(10 * time.Second)
		got := b.values()
		require.Len(t, got, 25, "what was acknowledged is not sent again")
		requireOrder(t, got)
	})
}

func TestInFlightIsBoundedAndAStandstillClosesTheWindow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, b := newMemoryLog(), &broker{hold: true}
		_, stop := start(t, l, b, Config{MaxUnacked: 100}, nil)
		defer stop()
		var ms []Message
		for i := range 1000 {
			ms = append(ms, message("k"+strconv.Itoa(i%50), fmt.Sprintf("k%d#%d", i%50, i)))
		}
		l.put(ms...)
		settled(time.Minute)
		windows, sent := l.counts()
		require.LessOrEqual(t, sent, 101)
		require.LessOrEqual(t, windows, 10, "a standstill is not a busy loop")
		b.release()
		settled(time.Second)
		require.Len(t, b.values(), 1000)
		require.Len(t, firsts(b.values()), 1000)
		require.Equal(t, 100, b.most)
		requireOrder(t, b.values())
	})
}

func TestBytesInFlightAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, b := newMemoryLog(), &broker{hold: true}
		_, stop := start(t, l, b, Config{MaxUnackedBytes: 1000}, nil)
		defer stop()
		for i := range 20 {
			l.put(message("a", "a#"+strconv.Itoa(i)+strings.Repeat(" ", 300)))
		}
		settled(time.Second)
		require.Equal(t, 4, b.most)
		b.release()
		settled(time.Second)
		require.Len(t, b.values(), 20)
	})
}

func TestACrashInABigWindowResumesInItsMiddle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, b := newMemoryLog(), &broker{}
		l.onRow = func(n int) error {
			elapse(time.Millisecond)
			return nil
		}
		var ms []Message
		for i := range 3000 {
			ms = append(ms, message("k"+strconv.Itoa(i%50), fmt.Sprintf("k%d#%d", i%50, i)))
		}
		l.put(ms...)
		var dead atomic.Bool
		l.hook = func(string, string) error {
			if dead.Load() {
				return errAway
			}
			return nil
		}
		_, stop := start(t, l, b, Config{}, nil)
		settled(2 * time.Second) // in the middle of the one window
		windows, before := l.counts()
		require.Equal(t, 1, windows)
		n := len(b.values())
		require.InDelta(t, 2000, n, 100)
		dead.Store(true)
		stop()
		dead.Store(false)
		l.put(message("k1", "k1#9999")) // beyond that window
		_, stop = start(t, l, b, Config{}, nil)
		settled(12 * time.Second)
		_, sent := l.counts()
		require.Less(t, sent-before, 3001-n+500, "not from its start")
		require.Len(t, firsts(b.values()), 3001)
		requireOrder(t, b.values())
		stop()
	})
}

func TestCursorsAreStoredAtMostFourTimesASecond(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, b := newMemoryLog(), &broker{latency: time.Millisecond}
		wake := make(chan struct{}, 1)
		_, stop := start(t, l, b, Config{Wake: wake}, nil)
		for i := range 5000 {
			l.put(message("a", "a#"+strconv.Itoa(i)))
			signal(wake)
			elapse(time.Millisecond)
		}
		synctest.Wait()
		a := message("a", "").Shard
		require.InDelta(t, 20, l.storesOf(a), 2)
		settled(time.Second)
		n := l.storesOf(a)
		settled(time.Minute)
		require.LessOrEqual(t, l.storesOf(a)-n, 5, "an idle outbox stores rarely")
		stop()
	})
}

func TestIdleRelayPollsRarelyAndAWakeIsNotKeptWaiting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, b := newMemoryLog(), &broker{}
		wake := make(chan struct{}, 1)
		_, stop := start(t, l, b, Config{Wake: wake}, nil)
		defer stop()
		settled(5 * time.Second)
		before, _ := l.counts()
		settled(time.Minute)
		after, _ := l.counts()
		require.InDelta(t, 240, after-before, 10)
		l.put(message("a", "a#1"))
		began := time.Now()
		signal(wake)
		synctest.Wait()
		require.Equal(t, []string{"a#1"}, b.values())
		require.Zero(t, time.Since(began), "read at once")
		l.put(message("a", "a#2")) // by another process: no wake
		settled(6 * time.Millisecond)
		require.Equal(t, []string{"a#1", "a#2"}, b.values(), "polled soon after work")
	})
}

func TestAHotStreamIsGathered(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, b := newMemoryLog(), &broker{}
		l.hook = func(op, _ string) error {
			if op == "window" {
				elapse(500 * time.Microsecond) // the price of a window
			}
			return nil
		}
		wake := make(chan struct{}, 1)
		h := &heard{}
		_, stop := start(t, l, b, Config{Wake: wake}, h)
		defer stop()
		settled(time.Second)
		before, _ := l.counts()
		for i := range 10000 {
			l.put(message("a", "a#"+strconv.Itoa(i)))
			signal(wake)
			elapse(100 * time.Microsecond)
		}
		settled(100 * time.Millisecond)
		require.Len(t, b.values(), 10000)
		after, _ := l.counts()
		require.InDelta(t, 222, after-before, 40, "a second of windows of half a millisecond, four milliseconds apart")
	})
}

func TestAFailedCallForgetsCursorsInMemory(t *testing.T) {
	for _, op := range []string{"acquire", "window", "store"} {
		t.Run(op, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l, b, h := newMemoryLog(), &broker{latency: time.Millisecond}, &heard{}
				var fail atomic.Bool
				l.hook = func(o, _ string) error {
					if fail.Load() && o == op {
						return errors.New("connection lost")
					}
					return nil
				}
				_, stop := start(t, l, b, Config{}, h)
				defer stop()
				l.put(numbered("a", 0, 5)...)
				settled(2 * time.Second)
				require.Equal(t, wanted("a", 0, 5), b.values())
				fail.Store(true)
				l.put(numbered("a", 5, 10)...)
				settled(30 * time.Second)
				require.Less(t, len(h.all().errs), 60, "with backoff")
				require.NotEmpty(t, h.all().errs)
				fail.Store(false)
				l.put(numbered("a", 10, 15)...)
				settled(10 * time.Second)
				require.Equal(t, wanted("a", 0, 15), firsts(b.values()))
				backlog, err := l.Backlog(t.Context())
				require.NoError(t, err)
				require.Zero(t, backlog.Rows)
			})
		})
	}
}

func TestShutdownWaitsForTheBrokerStoresAndLeaves(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, b, h := newMemoryLog(), &broker{latency: 3 * time.Second}, &heard{}
		_, stop := start(t, l, b, Config{}, h)
		settled(time.Millisecond)
		l.put(numbered("a", 0, 5)...)
		settled(300 * time.Millisecond)
		began := time.Now()
		stop()
		require.InDelta(t, 2.8, time.Since(began).Seconds(), 0.3)
		require.Empty(t, l.relays)
		require.Empty(t, h.all().errs)
		require.Equal(t, 5, h.all().produced)
		backlog, err := l.Backlog(t.Context())
		require.NoError(t, err)
		require.Zero(t, backlog.Rows)
		for i := range l.shards {
			require.Empty(t, l.shards[i].owner)
		}
	})
}

func TestShutdownIsBoundedWhenTheBrokerIsAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, b, h := newMemoryLog(), &broker{hold: true}, &heard{}
		_, stop := start(t, l, b, Config{}, h)
		settled(time.Millisecond)
		l.put(numbered("a", 0, 5)...)
		settled(300 * time.Millisecond)
		began := time.Now()
		stop()
		require.Equal(t, DefaultConfig.FlushWithin, time.Since(began))
		require.Len(t, h.all().errs, 1)
		require.Contains(t, h.all().errs[0], "5 records unacknowledged")
		backlog, err := l.Backlog(t.Context())
		require.NoError(t, err)
		require.EqualValues(t, 5, backlog.Rows)
	})
}

func TestF40_ATypeOfANewerVersionWaitsForANewerRelay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, b, h := newMemoryLog(), &broker{}, &heard{}
		_, stop := start(t, l, b, Config{}, h)
		defer stop()
		m := message("a", "new")
		m.Topic, m.Key, m.Type = "", nil, "FromTheFuture"
		l.put(message("a", "a#1"), m, message("a", "a#2"))
		settled(10 * time.Second)
		require.Equal(t, []string{"a#1"}, b.values(), "its shard waits, in order")
		require.Empty(t, l.setAside())
		require.Contains(t, strings.Join(h.all().errs, "\n"), "waits for a newer relay")
	})
}

// TestRelaysUnderStress ports the trial that the cursor's design rests on: writers with late locks after early xids, rollbacks, open
// transactions, relays that come and go, a broker that fails now and then. See the same against Postgres in adapters/postgres.
func TestRelaysUnderStress(t *testing.T) {
	for seed := range uint64(5) {
		t.Run(strconv.FormatUint(seed, 10), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { stress(t, rand.New(rand.NewPCG(seed, seed))) })
		})
	}
}

func stress(t *testing.T, rnd *rand.Rand) {
	t.Helper()
	l := newMemoryLog()
	failing := map[string]bool{} // keys whose partition fails now
	b := &broker{latency: 2 * time.Millisecond}
	b.judge = func(r events.Record) error {
		if failing[string(r.Key)] {
			return errAway
		}
		return nil
	}
	var stops []func()
	version := map[int]int{}
	committed := 0
	write := func() {
		early := l.begin() // its xid is drawn before the lock of the key
		k := rnd.IntN(40)
		tx := early
		if rnd.IntN(3) == 0 { // meanwhile another one locks, writes and commits
			version[k]++
			other := l.begin()
			other.emit(message("k"+strconv.Itoa(k), fmt.Sprintf("k%d#%d", k, version[k])))
			other.commit()
			committed++
		}
		tx.emit(message("k"+strconv.Itoa(k), fmt.Sprintf("k%d#%d", k, version[k]+1)))
		if rnd.IntN(10) == 0 {
			tx.rollback()
			return
		}
		version[k]++
		committed++
		tx.commit()
	}
	idle := l.begin()
	idle.emit(message("idle", "idle#1"))
	for i := range 4000 {
		if i%400 == 0 {
			_, stop := start(t, l, b, Config{}, nil)
			stops = append(stops, stop)
		}
		if i%600 == 599 {
			stops[0]()
			stops = stops[1:]
		}
		if i%100 == 0 {
			b.mu.Lock()
			clear(failing)
			if i%300 == 0 {
				failing["k"+strconv.Itoa(rnd.IntN(40))] = true
			}
			b.mu.Unlock()
		}
		write()
		elapse(time.Duration(rnd.IntN(3000)) * time.Microsecond)
	}
	b.mu.Lock()
	clear(failing)
	b.mu.Unlock()
	idle.commit()
	settled(15 * time.Second)
	got := b.values()
	require.Len(t, firsts(got), committed+1, "nothing lost")
	requireOrder(t, got)
	require.Less(t, len(got), committed+committed/10, "duplicates only where a record failed")
	for _, stop := range stops {
		stop()
	}
}
