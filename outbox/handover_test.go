package outbox

import (
	"math/rand/v2"
	"strconv"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"

	"ordersaga/events"
)

// of makes a typed message of an order with a value to be found again. The body is none of its type's: no relay looks at it.
func of(order uuid.UUID, typ events.Name, value string) Message {
	return Message{Shard: ShardOf(order), ID: events.NewID(), Type: typ, OrderID: order, Payload: []byte(value)}
}

func urgentOf(value string) Message  { return of(events.NewID(), events.TCapturePayment, value) }
func patientOf(value string) Message { return of(events.NewID(), events.TCommitStock, value) }

// commit is a transaction that announces what it leaves.
func commit(l *memoryLog, r *Relay, ms ...Message) {
	t := l.begin()
	t.emit(ms...)
	done := r.Announce(ms)
	t.commit()
	done(true)
}

func requireNothingWaits(t *testing.T, l *memoryLog, r *Relay) {
	t.Helper()
	backlog, err := l.Backlog(t.Context())
	require.NoError(t, err)
	require.Zero(t, backlog.Rows)
	r.mu.Lock()
	defer r.mu.Unlock()
	require.Empty(t, r.handovers)
	for i := range r.leaving {
		require.Empty(t, r.leaving[i].queue)
	}
	require.Zero(t, r.inFlight)
	require.Zero(t, r.bytes)
}

func TestUrgentMessagesGoWithTheCommitAndOthersInCompany(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, b, h := newMemoryLog(), &broker{}, &heard{}
		r, stop := start(t, l, b, Config{}, h)
		defer stop()
		settled(time.Second)
		windows, _ := l.counts()
		commit(l, r, urgentOf("a"), patientOf("b"))
		synctest.Wait()
		require.Equal(t, []string{"a"}, b.values(), "nobody opened a window for it")
		now, _ := l.counts()
		require.Equal(t, windows, now)
		settled(DefaultConfig.RowsEvery / 4)
		require.Equal(t, []string{"a", "b"}, b.values())
		for i := range 50 { // 10 ms apart: five a window or so
			commit(l, r, urgentOf("u"+strconv.Itoa(i)), patientOf("p"+strconv.Itoa(i)))
			elapse(4 * time.Millisecond)
		}
		settled(time.Second)
		require.Len(t, firsts(b.values()), 102)
		require.Len(t, b.values(), 102, "nothing twice")
		now, _ = l.counts()
		require.Less(t, now-windows, 30, "200 ms of commits in windows 20 ms apart, and polls that find nothing of others")
		require.Equal(t, 102, h.all().produced)
		h.with(func() { require.Equal(t, 51, h.direct) })
		requireNothingWaits(t, l, r)
	})
}

func TestWhatJoinsWaitsALittleForCompany(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, b := newMemoryLog(), &broker{}
		r, stop := start(t, l, b, Config{}, nil)
		defer stop()
		settled(time.Second)
		commit(l, r, of(events.NewID(), events.TStockReserved, "alone"))
		joins, _ := events.TypeOf(events.TStockReserved)
		elapse(joins.Joins - time.Millisecond)
		require.Empty(t, b.values())
		settled(2 * time.Millisecond)
		require.Equal(t, []string{"alone"}, b.values())
		commit(l, r, of(events.NewID(), events.TStockReserved, "joins"))
		elapse(time.Millisecond)
		commit(l, r, urgentOf("no company: a command"))
		synctest.Wait()
		require.Equal(t, []string{"alone", "no company: a command"}, b.values())
		commit(l, r, of(events.NewID(), events.TPaymentAuthorized, "company"))
		synctest.Wait()
		require.Equal(t, []string{"alone", "no company: a command", "joins", "company"}, b.values())
		settled(time.Second)
		requireNothingWaits(t, l, r)
	})
}

func TestTheLogMayMeetAMessageBeforeItsWriterSaysDone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, b := newMemoryLog(), &broker{}
		r, stop := start(t, l, b, Config{}, nil)
		defer stop()
		settled(time.Second)
		slow := []Message{urgentOf("a"), patientOf("b")}
		tx := l.begin()
		tx.emit(slow...)
		done := r.Announce(slow)
		tx.commit()
		settled(time.Second)
		require.ElementsMatch(t, []string{"a", "b"}, b.values(), "visible is committed: the log waits for nobody")
		done(true)
		settled(time.Second)
		require.Len(t, b.values(), 2)
		requireNothingWaits(t, l, r)
	})
}

func TestAWriterThatDoesNotKnowLeavesItToTheLog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, b := newMemoryLog(), &broker{}
		r, stop := start(t, l, b, Config{}, nil)
		defer stop()
		settled(time.Second)
		for _, committed := range []bool{true, false} { // the connection broke, and nobody knows which
			ms := []Message{urgentOf(strconv.FormatBool(committed))}
			tx := l.begin()
			tx.emit(ms...)
			done := r.Announce(ms)
			tx.end(committed)
			done(false)
		}
		settled(time.Second)
		require.Equal(t, []string{"true"}, b.values())
		requireNothingWaits(t, l, r)
	})
}

func TestARelayTakesOverOnlyWhatItHolds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, b := newMemoryLog(), &broker{}
		first, stop := start(t, l, b, Config{}, nil)
		settled(time.Second)
		second, stop2 := start(t, l, b, Config{}, nil)
		settled(8 * time.Second) // they share
		for i := range 200 {
			commit(l, []*Relay{first, second}[i%2], urgentOf("m"+strconv.Itoa(i)))
			elapse(time.Millisecond)
		}
		settled(time.Second)
		require.Len(t, firsts(b.values()), 200)
		require.Len(t, b.values(), 200)
		requireNothingWaits(t, l, first)
		requireNothingWaits(t, l, second)
		stop()
		stop2()
		commit(l, first, urgentOf("after it left"))
		synctest.Wait()
		require.Len(t, b.values(), 200, "whoever comes next has it in the log")
	})
}

func TestARelayThatStopsPassesWhatItWasHanded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, b := newMemoryLog(), &broker{latency: 3 * time.Millisecond}
		r, stop := start(t, l, b, Config{}, nil)
		settled(time.Second)
		for i := range 30 {
			commit(l, r, urgentOf(strconv.Itoa(i)), patientOf("p"+strconv.Itoa(i)))
		}
		l.put(message("k", "of another process"))
		stop()
		_, stop = start(t, l, b, Config{}, nil)
		defer stop()
		settled(time.Second)
		require.Len(t, firsts(b.values()), 61)
		require.Len(t, b.values(), 61, "its successor sends nothing again")
	})
}

func TestAHandedMessageThatComesBackIsMendedWhenTheLogMeetsIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, h := newMemoryLog(), &heard{}
		var away atomic.Bool
		b := &broker{latency: time.Millisecond, judge: func(r events.Record) error {
			switch {
			case string(r.Value) == "too large":
				return refusal("MESSAGE_TOO_LARGE")
			case away.Load():
				return errAway
			}
			return nil
		}}
		r, stop := start(t, l, b, Config{}, h)
		defer stop()
		settled(time.Second)
		order := events.NewID()
		commit(l, r, of(order, events.TReserveStock, "before"), of(order, events.TReserveStock, "too large"), of(order, events.TReserveStock, "after"))
		settled(time.Second)
		require.Equal(t, []string{"before", "after"}, b.values())
		require.Equal(t, []string{"too large"}, h.all().aside)
		away.Store(true)
		commit(l, r, of(order, events.TReserveStock, "later"))
		settled(time.Second)
		require.Len(t, b.values(), 2)
		away.Store(false)
		settled(10 * time.Second)
		require.Equal(t, []string{"before", "after", "later"}, firsts(b.values()))
		requireNothingWaits(t, l, r)
	})
}

func TestABusyProducerLeavesMessagesToTheLog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, b := newMemoryLog(), &broker{hold: true}
		r, stop := start(t, l, b, Config{MaxUnacked: 20}, nil)
		settled(time.Second)
		for i := range 100 {
			commit(l, r, urgentOf(strconv.Itoa(i)))
		}
		settled(time.Second)
		require.LessOrEqual(t, b.most, 20)
		b.release()
		settled(time.Second)
		require.Len(t, firsts(b.values()), 100)
		require.Len(t, b.values(), 100)
		requireNothingWaits(t, l, r)
		stop()
	})
}

// TestHandoversUnderStress: writers of all speeds, some of which never learn what became of their transaction, relays that come and go, a broker
// that fails now and then: every message arrives, and those of one order that are not urgent in their order.
func TestHandoversUnderStress(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newMemoryLog()
		b := &broker{latency: 2 * time.Millisecond, judge: func(r events.Record) error {
			// A producer whose record fails lets none of its partition overtake it; this one forgets that, so it fails where no order is kept.
			if r.Topic == events.TopicStock && rand.IntN(200) == 0 {
				return errAway
			}
			return nil
		}}
		relays := make([]*Relay, 3)
		stops := make([]func(), len(relays))
		for i := range relays {
			relays[i], stops[i] = start(t, l, b, Config{}, nil)
		}
		settled(8 * time.Second)
		orders := make([]uuid.UUID, 40)
		for i := range orders {
			orders[i] = events.NewID()
		}
		next := make([]int, len(orders))
		want := 0
		for i := range 1500 {
			if i%300 == 299 {
				n := rand.IntN(len(relays))
				stops[n]()
				relays[n], stops[n] = start(t, l, b, Config{}, nil)
			}
			var ms []Message
			for range 1 + rand.IntN(4) {
				o := rand.IntN(len(orders))
				if rand.IntN(2) == 0 {
					ms = append(ms, of(orders[o], events.TReserveStock, "urgent#"+strconv.Itoa(want+len(ms))))
				} else {
					ms = append(ms, of(orders[o], events.TOrderConfirmed, "o"+strconv.Itoa(o)+"#"+strconv.Itoa(next[o])))
					next[o]++
				}
			}
			tx := l.begin()
			tx.emit(ms...)
			done := relays[rand.IntN(len(relays))].Announce(ms)
			pause := time.Duration(rand.IntN(30)) * time.Millisecond * time.Duration(rand.IntN(2))
			rollback := rand.IntN(20) == 0 && ms[0].Type == events.TReserveStock && len(ms) == 1
			if rollback {
				tx.rollback()
			} else {
				tx.commit()
				want += len(ms)
			}
			known := !rollback && rand.IntN(10) > 0
			time.AfterFunc(pause, func() { done(known) })
			elapse(time.Duration(rand.IntN(3000)) * time.Microsecond)
		}
		settled(time.Minute)
		var ordered []string
		got := firsts(b.values())
		for _, v := range got {
			if v[0] == 'o' {
				ordered = append(ordered, v)
			}
		}
		requireOrder(t, ordered)
		for _, r := range relays {
			requireNothingWaits(t, l, r)
		}
		require.GreaterOrEqual(t, len(got), want, "nothing lost")
		for _, stop := range stops {
			stop()
		}
	})
}

// A message that its reader in this process takes goes to Kafka all the same, with a window.
func TestWhatAReaderTakesGoesToKafkaInCompany(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, b, h := newMemoryLog(), &broker{}, &heard{}
		var taken []string
		full := false
		r, stop := start(t, l, b, Config{Offer: func(r events.Record) bool {
			if full {
				return false
			}
			taken = append(taken, string(r.Value))
			return true
		}}, h)
		defer stop()
		settled(time.Second)
		for i := range 5 {
			commit(l, r, urgentOf("m"+strconv.Itoa(i)), patientOf("p"+strconv.Itoa(i)))
			elapse(time.Millisecond)
		}
		require.Equal(t, []string{"m0", "m1", "m2", "m3", "m4"}, taken, "at once, and nothing that is not urgent")
		require.Empty(t, b.values())
		settled(DefaultConfig.RowsEvery)
		require.Len(t, b.values(), 10)
		full = true
		commit(l, r, urgentOf("refused"))
		synctest.Wait()
		require.Equal(t, "refused", b.values()[10], "it goes at once")
		settled(time.Second)
		require.Len(t, b.values(), 11, "nothing twice")
		h.with(func() {
			require.Equal(t, 5, h.early)
			require.Equal(t, 1, h.direct)
		})
		requireNothingWaits(t, l, r)
	})
}

// The log may meet a message while that still waits for company: then the broker's answer is waited for, though its reader has it.
func TestAReaderTakesWhatTheLogHasMet(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, b := newMemoryLog(), &broker{}
		var taken atomic.Int64
		r, stop := start(t, l, b, Config{RowsEvery: time.Millisecond, Offer: func(events.Record) bool { taken.Add(1); return true }}, nil)
		defer stop()
		settled(time.Second)
		commit(l, r, of(events.NewID(), events.TStockReserved, "waits"), patientOf("opens a window"))
		settled(3 * time.Millisecond)
		require.Zero(t, taken.Load())
		require.Equal(t, []string{"opens a window"}, b.values())
		settled(time.Second)
		require.EqualValues(t, 1, taken.Load())
		require.Equal(t, []string{"opens a window", "waits"}, b.values())
		requireNothingWaits(t, l, r)
	})
}

// Where orders come often enough for company within the time that one may wait, they begin in twos and threes; where they do not, nobody waits.
func TestOrdersBeginTogetherWhereTheyComeOften(t *testing.T) {
	const within = 10 * time.Millisecond
	for every, together := range map[time.Duration]int{40 * time.Millisecond: 1, 5 * time.Millisecond: 2, 2500 * time.Microsecond: 3, time.Millisecond: 6} {
		synctest.Test(t, func(t *testing.T) {
			l, b := newMemoryLog(), &broker{}
			r, stop := start(t, l, b, Config{OpenWithin: within}, nil)
			defer stop()
			settled(time.Second)
			sent, longest := 0, 0
			var leaves []int // how many left at a time
			for i := range 200 {
				commit(l, r, of(events.NewID(), events.TReserveStock, "stock"), of(events.NewID(), events.TAuthorizePayment, "pay"))
				synctest.Wait()
				if pays := count(b.values(), "pay"); pays > sent {
					leaves = append(leaves, pays-sent)
					sent = pays
				}
				longest = max(longest, i+1-sent)
				elapse(every)
			}
			require.Equal(t, 1, leaves[0], "after a quiet moment nobody waits")
			require.Equal(t, together, leaves[len(leaves)-1])
			require.LessOrEqual(t, time.Duration(longest)*every, within)
			settled(within)
			require.Equal(t, 200, count(b.values(), "pay"), "nobody waits longer")
			settled(time.Second)
			require.Equal(t, 200, count(b.values(), "stock"))
			requireNothingWaits(t, l, r)
		})
	}
}

func TestStockFollowsTheOpeningOfItsOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, b := newMemoryLog(), &broker{}
		r, stop := start(t, l, b, Config{OpenWithin: 10 * time.Millisecond}, nil)
		defer stop()
		settled(time.Second)
		r.opening.gap = 5 * time.Millisecond
		r.opening.last = time.Now()
		order := func(n string) {
			commit(l, r, of(events.NewID(), events.TReserveStock, "stock "+n), of(events.NewID(), events.TAuthorizePayment, "pay "+n))
			synctest.Wait()
		}
		order("1")
		elapse(4 * time.Millisecond)
		synctest.Wait()
		require.Empty(t, b.values())
		order("2")
		require.Equal(t, []string{"pay 1", "pay 2"}, b.values())
		commit(l, r, of(events.NewID(), events.TCapturePayment, "what goes on waits for nobody"))
		synctest.Wait()
		require.Len(t, b.values(), 3)
		settled(reserve.Joins)
		require.Equal(t, []string{"stock 1", "stock 2"}, b.values()[3:])
		order("3")
		settled(10 * time.Millisecond)
		require.Equal(t, "pay 3", b.values()[5], "alone")
		settled(reserve.Joins)
		require.Equal(t, "stock 3", b.values()[6])
		settled(time.Second)
		requireNothingWaits(t, l, r)
	})
}

func count(values []string, value string) (n int) {
	for _, v := range values {
		if v == value {
			n++
		}
	}
	return n
}

func TestWindowsComeSoonerWhenSomebodyWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, b := newMemoryLog(), &broker{}
		var awaited atomic.Bool
		r, stop := start(t, l, b, Config{Awaited: awaited.Load}, nil)
		defer stop()
		for _, waits := range []bool{false, true} {
			settled(time.Second)
			awaited.Store(waits)
			before := len(b.values())
			commit(l, r, patientOf("event"))
			settled(DefaultConfig.RowsEvery / 10)
			require.Equal(t, waits, len(b.values()) > before)
		}
		settled(time.Second)
		requireNothingWaits(t, l, r)
	})
}

func TestWindowsComeSoonerForManyMessages(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, b := newMemoryLog(), &broker{}
		r, stop := start(t, l, b, Config{}, nil)
		defer stop()
		settled(time.Second)
		for i := range company {
			commit(l, r, patientOf(strconv.Itoa(i)))
		}
		settled(DefaultConfig.RowsEvery / soon)
		require.Len(t, b.values(), company)
		settled(time.Second)
		requireNothingWaits(t, l, r)
	})
}

func TestALargeBatchGoesThroughKafka(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, b := newMemoryLog(), &broker{}
		taken := 0
		r, stop := start(t, l, b, Config{Offer: func(events.Record) bool { taken++; return true }}, nil)
		defer stop()
		settled(time.Second)
		var ms []Message
		for i := range offerAtMost + 1 {
			ms = append(ms, urgentOf(strconv.Itoa(i)))
		}
		commit(l, r, ms...)
		synctest.Wait()
		require.Zero(t, taken)
		require.Len(t, b.values(), len(ms), "at once")
		commit(l, r, urgentOf("alone"))
		synctest.Wait()
		require.Equal(t, 1, taken)
		settled(time.Second)
		requireNothingWaits(t, l, r)
	})
}
