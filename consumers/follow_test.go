package consumers

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"

	"ordersaga/events"
)

// desks is a Reach that holds all keys or none.
type desks struct {
	held    bool
	settled map[uuid.UUID]Lane
	hashes  map[uuid.UUID]int64
}

func (r *desks) Holds([]byte) (Lane, bool) { return Lane{events.TopicReplies, 3}, r.held }

func (r *desks) Settled(id uuid.UUID, l Lane, hash int64) { r.settled[id], r.hashes[id] = l, hash }

// followedFixture is the stock group, whose handler answers StockReserved, followed by a coordinator that commands a capture.
type followedFixture struct {
	*fixture
	coord *counting
	seen  *noted
	reach *desks
	reply map[uuid.UUID]uuid.UUID // by the command's id
}

func followedStock(t *testing.T, change ...func(*GroupConfig)) *followedFixture {
	t.Helper()
	f := &followedFixture{
		fixture: stock(t), coord: &counting{effects: map[uuid.UUID]int{}}, seen: &noted{}, reply: map[uuid.UUID]uuid.UUID{},
		reach: &desks{held: true, settled: map[uuid.UUID]Lane{}, hashes: map[uuid.UUID]int64{}},
	}
	f.h.result = func(d *Delivery) Result {
		f.reply[d.ID] = events.NewID()
		return Result{Out: []events.Envelope{{ID: f.reply[d.ID], Type: events.TStockReserved, OrderID: d.OrderID, Trace: d.Trace, Data: &events.StockReserved{}}}}
	}
	f.coord.result = func(d *Delivery) Result {
		return Result{Out: []events.Envelope{{ID: events.NewID(), Type: events.TCapturePayment, OrderID: d.OrderID, Trace: d.Trace, Data: &events.CapturePayment{AmountMinor: 5, Currency: "EUR"}}}}
	}
	cfg := GroupConfig{Name: events.GroupCoordinator, Topic: events.TopicReplies, Inbox: InboxFailures, Policy: Policy{Delays: testDelays}, Observer: f.seen}
	for _, c := range change {
		c(&cfg)
	}
	next, err := NewGroup[*MemoryTx](cfg, f.mem, f.coord)
	require.NoError(t, err)
	f.group.FollowedBy(next, f.reach)
	return f
}

// emitted answers the types of what was emitted, and which of it was followed.
func (f *followedFixture) emitted() (types []events.Name, settled []uuid.UUID) {
	out, _ := f.mem.Drain()
	for _, e := range out {
		types = append(types, e.Type)
		if e.Settled {
			settled = append(settled, e.ID)
		}
	}
	return types, settled
}

func TestAReplyIsHandledInTheTransactionThatEmitsIt(t *testing.T) {
	f := followedStock(t)
	a, b := record(events.TReserveStock, 0, 0), record(events.TReserveStock, 1, 0)
	f.handle(a, b)
	f.once(a, b)
	types, settled := f.emitted()
	require.Equal(t, []events.Name{events.TStockReserved, events.TStockReserved, events.TCapturePayment, events.TCapturePayment}, types)
	ida, idb := f.reply[events.Identity(&a)], f.reply[events.Identity(&b)]
	require.Equal(t, []uuid.UUID{ida, idb}, settled)
	require.Equal(t, map[uuid.UUID]int{ida: 1, idb: 1}, f.coord.effects)
	require.Equal(t, map[uuid.UUID]Lane{ida: {events.TopicReplies, 3}, idb: {events.TopicReplies, 3}}, f.reach.settled)
	value, err := events.Encode(events.Envelope{ID: ida, Type: events.TStockReserved, OrderID: f.coord.seen[0].OrderID, Data: &events.StockReserved{}})
	require.NoError(t, err)
	require.Equal(t, events.PayloadHash(value), f.reach.hashes[ida])

	require.Equal(t, 1, f.obs.batch[0].Transactions)
	require.Len(t, f.seen.batch, 1)
	s := f.seen.batch[0]
	require.Equal(t, []int{2, 2, 2, 0}, []int{s.Records, s.Followed, s.Count(Done), s.Transactions})
	require.Equal(t, events.GroupCoordinator, s.Group)
	d := f.coord.seen[0]
	require.Equal(t, []any{ida, events.GroupCoordinator, 1, int64(0), EarlyOffset}, []any{d.ID, d.Group, d.Attempt, d.Ticket, d.Record.Offset})
	require.Equal(t, events.TopicReplies, d.Record.Topic)
	require.Equal(t, string(a.Key), string(d.Record.Key))
}

func TestWhatIsNotFollowed(t *testing.T) {
	for name, c := range map[string]struct {
		arrange func(*followedFixture)
		batch   []events.Record
	}{
		"another process has the partition": {arrange: func(f *followedFixture) { f.reach.held = false }},
		"another group's":                   {arrange: func(f *followedFixture) { f.group.next.cfg.Topic = events.TopicPayment }},
		"a large batch":                     {batch: records(events.TReserveStock, followAtMost+1)},
		"beside a failure": {arrange: func(f *followedFixture) {
			done, first := f.h.result, true
			f.h.result = func(d *Delivery) Result {
				if first {
					first = false
					return Result{Err: poisonError{"impossible"}}
				}
				return done(d)
			}
		}, batch: records(events.TReserveStock, 2)},
	} {
		t.Run(name, func(t *testing.T) {
			f := followedStock(t)
			if c.arrange != nil {
				c.arrange(f)
			}
			if c.batch == nil {
				c.batch = records(events.TReserveStock, 1)
			}
			f.handle(c.batch...)
			types, settled := f.emitted()
			require.NotEmpty(t, types)
			require.NotContains(t, types, events.TCapturePayment)
			require.Empty(t, settled)
			require.Empty(t, f.coord.effects)
			require.Empty(t, f.reach.settled)
			require.Empty(t, f.seen.batch)
		})
	}
	f := followedStock(t, func(c *GroupConfig) { c.Inbox = InboxAll })
	require.Nil(t, f.group.next, "it needs a row of each message")
}

// Whatever goes wrong with what follows, the message that it follows from is done, and the reply takes its own way.
func TestWhatFollowsFailsAlone(t *testing.T) {
	for name, fail := range map[string]func(*followedFixture){
		"result": func(f *followedFixture) {
			f.coord.result = func(*Delivery) Result { return Result{Err: poisonError{"no such saga"}} }
		},
		"prepare": func(f *followedFixture) {
			f.coord.prepare = func(context.Context, []*Delivery) error { return transient("no") }
		},
		"apply":  func(f *followedFixture) { f.coord.apply = func([]*Delivery) error { return transient("no") } },
		"data":   func(f *followedFixture) { f.coord.apply = func([]*Delivery) error { return sqlError{"out of range"} } },
		"poison": func(f *followedFixture) { f.coord.apply = func([]*Delivery) error { return poisonError{"impossible"} } },
		"panic":  func(f *followedFixture) { f.coord.result = func(*Delivery) Result { panic("apply") } },
		"commit": func(f *followedFixture) {
			f.mem.Commit = func() error {
				if f.coord.applies > 0 && f.h.applies == 1 {
					return sqlError{"a value that the saga's table refuses"}
				}
				return nil
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := followedStock(t)
				fail(f)
				early, r := record(events.TReserveStock, 0, 0), record(events.TReserveStock, 1, 0)
				f.handle(*earlyOf(early), r)
				f.once(early, r)
				types, settled := f.emitted()
				require.Equal(t, []events.Name{events.TStockReserved, events.TStockReserved}, types)
				require.Empty(t, settled)
				require.Empty(t, f.coord.effects)
				require.Empty(t, f.reach.settled)
				require.Empty(t, f.obs.failed, "it is not the stock's failure")
				require.Empty(t, f.dead())
				want := 1
				if name == "result" {
					want = 0
				}
				require.Equal(t, want, f.obs.splits, "seen by operators")
			})
		})
	}
}

// What is away is waited for, not blamed on what follows.
func TestAnOutageWhileFollowingIsWaitedOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := followedStock(t)
		away := 2
		f.coord.apply = func([]*Delivery) error {
			if away > 0 {
				away--
				return awayError{}
			}
			return nil
		}
		f.handle(record(events.TReserveStock, 0, 0))
		types, settled := f.emitted()
		require.Len(t, types, 2)
		require.Len(t, settled, 1)
		require.Equal(t, 2, f.obs.held)
		require.Zero(t, f.obs.splits)
	})
}

// starting is a handler that can start what comes back to it.
type starting struct {
	*counting
	started []*Delivery
	err     error
}

func (s *starting) Start(_ context.Context, _ *MemoryTx, batch []*Delivery) error {
	s.started = append(s.started, batch...)
	return s.err
}

func TestWhatComesBackIsStartedAtOnce(t *testing.T) {
	for _, err := range []error{nil, errors.New("no")} {
		f := followedStock(t)
		h := &starting{counting: f.h, err: err}
		f.h.result = func(d *Delivery) Result {
			return Result{Out: []events.Envelope{{ID: events.NewID(), Type: events.TPaymentAuthorized, OrderID: d.OrderID, Data: &events.PaymentAuthorized{Ref: "pi"}}}}
		}
		next, reach := f.group.next, f.reach
		var nerr error
		f.group, nerr = NewGroup[*MemoryTx](GroupConfig{Name: events.GroupPayment, Topic: events.TopicPayment, Inbox: InboxFailures, Observer: f.obs}, f.mem, h)
		require.NoError(t, nerr)
		f.group.FollowedBy(next, reach)
		r := record(events.TAuthorizePayment, 0, 0)
		f.handle(r)
		out, _ := f.mem.Drain()
		require.Len(t, h.started, 1)
		if err != nil {
			require.Len(t, out, 1)
			require.False(t, out[0].Settled, "neither followed nor started")
			continue
		}
		require.Len(t, out, 2)
		d := h.started[0]
		require.Equal(t, out[1], d.Envelope)
		require.Equal(t, events.GroupPayment, d.Group)
		require.False(t, out[1].Settled, "started is not settled")
	}
}

func TestPumpSettlesUnreadWhatWasFollowed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, d, stop := startDesk(t)
		defer stop()
		rs := records(events.TReserveStock, 3)
		for i := range rs {
			rs[i].Partition, rs[i].Offset = 0, int64(i)
		}
		lane := Lane{events.TopicStock, 0}
		settled := func(r events.Record, hash int64) { p.Settled(events.Identity(&r), lane, hash) }
		settled(rs[0], events.PayloadHash(rs[0].Value))
		settled(rs[0], 0) // once more
		p.Add(rs[:1])
		require.Equal(t, []Place{{events.TopicStock, 0, 0}}, d.marked())
		require.Zero(t, d.seen())

		settled(rs[1], events.PayloadHash([]byte("another body")))
		p.Add(rs[1:2])
		synctest.Wait()
		require.Equal(t, 1, d.seen(), "the handler is to judge")
		d.gate <- true
		synctest.Wait()

		settled(rs[2], events.PayloadHash(rs[2].Value))
		p.Drain(t.Context(), []Lane{lane}) // the partition goes, and comes back
		p.Add(rs[2:])
		synctest.Wait()
		require.Equal(t, 2, d.seen())
		d.gate <- true
		synctest.Wait()
		require.Zero(t, p.Size())
	})
}
