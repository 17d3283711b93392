package outbox

import (
	"context"
	"strconv"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"

	"ordersaga/events"
)

func confirmed(order uuid.UUID) events.Envelope {
	trace, _ := events.ParseTraceparent("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
	return events.Envelope{
		ID: events.NewID(), Type: events.TOrderConfirmed, OrderID: order, Sequence: 3, Trace: trace,
		Data: &events.OrderEvent{OrderID: order.String(), Sequence: 3, Status: "confirmed", TotalMinor: 1999, Currency: "EUR"},
	}
}

func TestATypedMessageBecomesTheRecordThatDecodesToIt(t *testing.T) {
	e := confirmed(uuid.New())
	m, err := FromEnvelope(e)
	require.NoError(t, err)
	require.Empty(t, m.Topic)
	require.Empty(t, m.Headers, "headers are made by the relay")
	require.Less(t, m.Shard, int16(Shards))
	r, err := m.Record()
	require.NoError(t, err)
	require.Equal(t, events.TopicEvents, r.Topic)
	require.Equal(t, e.OrderID.String(), string(r.Key))
	back, err := events.Decode(&r)
	require.NoError(t, err)
	require.Equal(t, e, back)
}

func TestFromEnvelopeRefusesWhatCouldNotBeRead(t *testing.T) {
	e := confirmed(uuid.New())
	e.Data = &events.PlaceOrder{}
	_, err := FromEnvelope(e)
	require.ErrorContains(t, err, "its data is a")
	e = confirmed(uuid.New())
	e.ID = uuid.Nil
	_, err = FromEnvelope(e)
	require.ErrorContains(t, err, "draw one with events.NewID")
}

func TestARawMessageStaysAsItIs(t *testing.T) {
	raw := events.Raw{Topic: "retry.stock.5s", Key: []byte("k"), Value: []byte("v"), Headers: []events.Header{{Key: "h", Value: nil}}}
	m := FromRaw(raw)
	require.GreaterOrEqual(t, m.Shard, int16(Shards))
	require.Less(t, m.Shard, int16(TotalShards))
	require.Equal(t, m.Shard, FromRaw(raw).Shard)
	require.EqualValues(t, 7, m.ID.Version(), "its time is the row's age")
	r, err := m.Record()
	require.NoError(t, err)
	require.Equal(t, events.Record{Topic: raw.Topic, Key: raw.Key, Value: raw.Value, Headers: raw.Headers}, r)
	_, err = (&Message{}).Record()
	require.True(t, refused(err))
}

// The shard of an order is stored in rows: two versions that disagreed about it would put the order's records out of order.
func TestShardsNeverChange(t *testing.T) {
	for id, want := range map[string]int16{
		"00000000-0000-0000-0000-000000000000": 5,
		"01890a5d-ac96-774b-bcce-b302099a8057": 3,
		"ffffffff-ffff-ffff-ffff-ffffffffffff": 5,
	} {
		require.Equal(t, want, ShardOf(uuid.MustParse(id)), id)
	}
	var n [Shards]int
	for range 16_000 {
		n[ShardOf(events.NewID())]++
	}
	for s, c := range n {
		require.InDelta(t, 1000, c, 200, "shard %d", s)
	}
}

func TestTrackMovesOverAcknowledgedPrefixesOnly(t *testing.T) {
	var k track
	at := func(n int) Cursor { return Cursor{Prev: "p", Next: "n", After: int64(n)} }
	k.mark(at(0))
	require.Equal(t, at(0), k.acked, "nothing is in flight")
	a, b, c := k.push(at(1)), k.push(at(2)), k.push(at(3))
	k.mark(Cursor{Prev: "n"})
	k.mark(Cursor{Prev: "o"})
	k.settle(c)
	require.Equal(t, at(0), k.acked)
	k.settle(a)
	require.Equal(t, at(1), k.acked)
	k.fail(b, &failure{err: errAway})
	require.Equal(t, at(1), k.acked)
	require.Zero(t, k.inFlight)
	require.Equal(t, errAway, k.failure().err)
	k.overcome()
	require.Equal(t, Cursor{Prev: "o"}, k.acked)
	require.Equal(t, 3, k.rows)
	require.Nil(t, k.failure())

	d, e := k.push(at(4)), k.push(at(5))
	k.fail(d, &failure{})
	k.settle(e)
	k.reset()
	require.Equal(t, Cursor{Prev: "o"}, k.acked)
	var ns []int
	for i := range 5000 {
		ns = append(ns, k.push(at(10+i)))
	}
	for i := range ns[:4000] {
		k.settle(ns[i])
	}
	require.Equal(t, at(10+3999), k.acked)
	require.Less(t, len(k.entries), 4000, "what is done with goes")
	for i := 4999; i >= 4000; i-- {
		k.settle(ns[i])
	}
	require.Equal(t, at(10+4999), k.acked)
}

func TestPace(t *testing.T) {
	now := time.Unix(0, 0)
	p := pace{pollMin: 5 * time.Millisecond, pollMax: 250 * time.Millisecond, gatherMax: 4 * time.Millisecond}
	require.Zero(t, p.until(now, wantNothing, now), "at once, at first")
	p.read(now, time.Millisecond, 3, 3)
	require.Equal(t, 5*time.Millisecond, p.until(now, wantNothing, now))
	p.read(now, 250*time.Microsecond, 3, 3)
	p.cost = 250 * time.Microsecond
	require.Equal(t, 3*time.Millisecond, p.gather(now), "twelve times its price")
	require.Zero(t, p.gather(now.Add(3*time.Millisecond)), "a lone wake is not held up")
	p.read(now.Add(5*time.Millisecond), 250*time.Microsecond, 0, 0)
	require.Zero(t, p.gather(now.Add(5*time.Millisecond)), "nor by a poll that found nothing")
	for range 10 {
		p.read(now, time.Millisecond, 0, 0)
	}
	require.Equal(t, 250*time.Millisecond, p.until(now, wantNothing, now))
	for range 100 {
		p.read(now, 20*time.Millisecond, 1, 1)
	}
	require.Equal(t, 4*time.Millisecond, p.gather(now), "bounded")
	p.read(now, time.Millisecond, hotWindow, hotWindow)
	require.Equal(t, hotGather, p.gather(now), "under load windows grow")
	p.read(now, time.Second, 10_000, 10_000)
	require.Zero(t, p.gather(now), "a big window pays for itself")
}

func TestPlanGroupsShardsByWindow(t *testing.T) {
	now := time.Now()
	held := map[int16]*shard{
		0: {id: 0, read: Cursor{Prev: "a"}},
		1: {id: 1, read: Cursor{Prev: "a", Next: "b", After: 9}},
		2: {id: 2, read: Cursor{Prev: "a"}},
		3: {id: 3, read: Cursor{Prev: "a", Next: "b", After: 7}},
		4: {id: 4, read: Cursor{Prev: "a"}, state: failing},
		5: {id: 5, read: Cursor{Prev: "a"}, giveBack: true},
		6: {id: 6, read: Cursor{Prev: "a"}, resumeAt: now.Add(time.Second)},
	}
	spans, members := plan(held, now)
	require.Equal(t, []Span{{Shards: []int16{0, 2}, From: Cursor{Prev: "a"}}, {Shards: []int16{1, 3}, From: Cursor{Prev: "a", Next: "b", After: 7}}}, spans)
	require.Len(t, members, 4)
}

func TestAssignAndShare(t *testing.T) {
	a, b := &shard{id: 0, fence: 1}, &shard{id: 1, fence: 1}
	held := map[int16]*shard{0: a, 1: b}
	added, lost := assign(held, Grant{Leases: []Lease{{Shard: 0, Fence: 1}, {Shard: 1, Fence: 3}, {Shard: 2, Fence: 1}}})
	require.Equal(t, []Lease{{Shard: 1, Fence: 3}, {Shard: 2, Fence: 1}}, added, "lost and won back is another lease")
	require.Equal(t, []*shard{b}, lost)
	_, lost = assign(held, Grant{})
	require.Len(t, lost, 2)
	share(held, 1)
	require.False(t, a.giveBack)
	require.True(t, b.giveBack)
	require.Equal(t, 1, b.gen, "rows of the open window are skipped from here on")
	share(held, 2)
	require.False(t, b.giveBack)
	require.Equal(t, 1, b.gen)
}

func BenchmarkFromEnvelope(b *testing.B) {
	e := confirmed(uuid.New())
	b.ReportAllocs()
	for b.Loop() {
		if _, err := FromEnvelope(e); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkRecord(b *testing.B) {
	m, err := FromEnvelope(confirmed(uuid.New()))
	require.NoError(b, err)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := m.Record(); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkRelay is the relay's own price for a row: a log and a broker in memory.
func BenchmarkRelay(b *testing.B) {
	l, k := newMemoryLog(), &broker{}
	tx := l.begin()
	for i := range b.N {
		tx.emit(message("k"+strconv.Itoa(i%50), "v"))
	}
	tx.commit()
	k.records = make([]events.Record, 0, b.N)
	b.ReportAllocs()
	b.ResetTimer()
	r := New(l, k, Config{}, nil)
	done := make(chan error, 1)
	ctx, cancel := context.WithCancel(b.Context())
	go func() { done <- r.Run(ctx) }()
	for len(k.values()) < b.N {
		<-time.After(time.Millisecond)
	}
	b.StopTimer()
	cancel()
	require.NoError(b, <-done)
}
