package consumers

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"ordersaga/events"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// The errors of handlers, by behaviour.
type (
	awayError   struct{ after time.Duration }
	poisonError struct{ text string }
	sqlError    struct{ text string }
)

func (awayError) Error() string                  { return "connection refused" }
func (awayError) Outage() string                 { return "payment" }
func (e awayError) RetryAfter() time.Duration    { return e.after }
func (e poisonError) Error() string              { return e.text }
func (poisonError) Poison() bool                 { return true }
func (e sqlError) Error() string                 { return e.text }
func (sqlError) DataError() bool                 { return true }
func transient(text string) error                { return errors.New(text) }
func hasOutage(err error) bool                   { return outage(err) != "" }
func place(t events.Topic, p int32, o int) Place { return Place{t, p, int64(o)} }

// counting is a handler that counts its effects, in the transaction.
type counting struct {
	mu       sync.Mutex
	effects  map[uuid.UUID]int
	prepares [][]uuid.UUID
	applies  int
	prepare  func(ctx context.Context, batch []*Delivery) error
	result   func(d *Delivery) Result // nil: done
	apply    func(batch []*Delivery) error
	seen     []Delivery
}

func (h *counting) Prepare(ctx context.Context, batch []*Delivery) (Apply[*MemoryTx], error) {
	h.mu.Lock()
	ids := make([]uuid.UUID, 0, len(batch))
	for _, d := range batch {
		ids = append(ids, d.ID)
		h.seen = append(h.seen, *d)
	}
	h.prepares = append(h.prepares, ids)
	h.mu.Unlock()
	if h.prepare != nil {
		if err := h.prepare(ctx, batch); err != nil {
			return nil, err
		}
	}
	return func(_ context.Context, tx *MemoryTx, part []*Delivery) ([]Result, error) {
		h.mu.Lock()
		h.applies++
		h.mu.Unlock()
		for _, d := range part {
			if !slices.Contains(batch, d) {
				return nil, errors.New("a delivery that was not prepared")
			}
		}
		if h.apply != nil {
			if err := h.apply(part); err != nil {
				return nil, err
			}
		}
		results := make([]Result, len(part))
		for i, d := range part {
			if h.result != nil {
				results[i] = h.result(d)
			}
			if results[i].Err == nil {
				tx.OnCommit(func() {
					h.mu.Lock()
					defer h.mu.Unlock()
					h.effects[d.ID]++
				})
			}
		}
		return results, nil
	}, nil
}

// noted is an Observer that keeps what it hears.
type noted struct {
	Quiet
	mu     sync.Mutex
	failed []Verdict
	held   int
	splits int
	batch  []BatchStats
	late   []time.Duration
}

func (n *noted) Batch(s BatchStats) { n.mu.Lock(); defer n.mu.Unlock(); n.batch = append(n.batch, s) }
func (n *noted) Failed(_ *Delivery, v Verdict, _ error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.failed = append(n.failed, v)
}
func (n *noted) Held(events.Group, string, int, time.Duration, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.held++
}
func (n *noted) Split(events.Group, int, error) { n.mu.Lock(); defer n.mu.Unlock(); n.splits++ }
func (n *noted) Late(_ events.Group, _ int, d time.Duration) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.late = append(n.late, d)
}

type fixture struct {
	*testing.T
	mem   *Memory
	h     *counting
	obs   *noted
	group *Group[*MemoryTx]
	cfg   GroupConfig
}

var testDelays = []time.Duration{5 * time.Second, 30 * time.Second}

// orderCommands is the group that keeps a row for every message; stock the one that keeps rows for failures.
func orderCommands(t *testing.T, change ...func(*GroupConfig)) *fixture {
	t.Helper()
	return newFixture(t, GroupConfig{Name: events.GroupOrderCommands, Topic: events.TopicCommands, Policy: Policy{Delays: testDelays}}, change...)
}

func stock(t *testing.T, change ...func(*GroupConfig)) *fixture {
	t.Helper()
	return newFixture(t, GroupConfig{
		Name: events.GroupStock, Topic: events.TopicStock, Inbox: InboxFailures, Policy: Policy{Delays: testDelays, EndlessUnknown: true},
	}, change...)
}

func newFixture(t *testing.T, cfg GroupConfig, change ...func(*GroupConfig)) *fixture {
	t.Helper()
	f := &fixture{T: t, mem: NewMemory(), h: &counting{effects: map[uuid.UUID]int{}}, obs: &noted{}}
	cfg.Observer = f.obs
	for _, c := range change {
		c(&cfg)
	}
	var err error
	f.group, err = NewGroup[*MemoryTx](cfg, f.mem, f.h)
	require.NoError(t, err)
	f.cfg = f.group.cfg
	return f
}

// handle expects that everything is settled.
func (f *fixture) handle(batch ...events.Record) {
	f.Helper()
	settled, err := f.group.Handle(f.Context(), batch)
	require.NoError(f, err)
	require.NotContains(f, settled, false)
	require.Len(f, settled, len(batch))
}

// copies gives forwarded records of a topic the places they would have there.
func (f *fixture) copies(topic events.Topic) []events.Record {
	_, raw := f.mem.Drain()
	return asRecords(raw, topic)
}

func asRecords(raw []events.Raw, topic events.Topic) (out []events.Record) {
	for _, r := range raw {
		if r.Topic == topic {
			out = append(out, events.Record{Topic: topic, Offset: int64(len(out)), Key: r.Key, Value: r.Value, Headers: r.Headers})
		}
	}
	return out
}

func (f *fixture) dead() []DeadLetter {
	f.Helper()
	page, _, err := f.mem.DeadLetters(f.Context(), DeadFilter{}, "", 1000)
	require.NoError(f, err)
	return page
}

func (f *fixture) once(batch ...events.Record) {
	f.Helper()
	for i := range batch {
		require.Equal(f, 1, f.h.effects[events.Identity(&batch[i])], "effects of record %d", i)
	}
}

func record(name events.Name, partition int32, offset int) events.Record {
	order := uuid.Must(uuid.NewV7())
	e := events.Envelope{ID: events.NewID(), Type: name, OrderID: order}
	typ, _ := events.TypeOf(name)
	e.Data = typ.New()
	switch d := e.Data.(type) {
	case *events.PlaceOrder:
		*d = events.PlaceOrder{OrderID: order.String(), CustomerID: "c-1", Currency: "EUR", PaymentMethod: "pm_card_visa"}
	case *events.CancelOrder:
		d.OrderID = order.String()
	}
	value, err := events.Encode(e)
	if err != nil {
		panic(err)
	}
	return events.Record{Topic: typ.Topic, Partition: partition, Offset: int64(offset), Key: []byte(order.String()), Value: value, Headers: events.HeadersOf(e)}
}

func records(name events.Name, n int) []events.Record {
	out := make([]events.Record, n)
	for i := range out {
		out[i] = record(name, int32(i%3), i)
	}
	return out
}

func TestNewGroupSaysWhatToChange(t *testing.T) {
	base := GroupConfig{Name: "g", Topic: "t"}
	for name, tc := range map[string]struct {
		change func(*GroupConfig)
		says   string
	}{
		"no name":        {func(c *GroupConfig) { c.Name = "" }, "needs a Name"},
		"ordered":        {func(c *GroupConfig) { c.Ordered = true }, "Ordered needs parking"},
		"unsorted tiers": {func(c *GroupConfig) { c.Policy.Delays = []time.Duration{2, 1} }, "shortest first"},
		"tiny records":   {func(c *GroupConfig) { c.MaxRecordBytes = 10 }, "at least 4096"},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := base
			tc.change(&cfg)
			_, err := NewGroup[*MemoryTx](cfg, NewMemory(), &counting{})
			require.ErrorContains(t, err, tc.says)
		})
	}
	_, err := NewGroup[*MemoryTx](base, nil, &counting{})
	require.ErrorContains(t, err, "a Store and a Handler")
}

func TestHandleActsOnceAndEmitsInOrder(t *testing.T) {
	f := orderCommands(t)
	f.h.result = func(d *Delivery) Result { return Result{Out: []events.Envelope{{ID: d.ID}}} }
	batch := records(events.TPlaceOrder, 7)
	f.handle(batch...)
	f.once(batch...)
	out, raw := f.mem.Drain()
	require.Empty(t, raw)
	require.Len(t, out, 7)
	for i := range batch {
		require.Equal(t, events.Identity(&batch[i]), out[i].ID)
		row, ok := f.mem.Row(events.GroupOrderCommands, out[i].ID)
		require.True(t, ok)
		require.Equal(t, InboxHandled, row.State)
	}
	require.Equal(t, 1, f.obs.batch[0].Transactions)
}

func TestF4_RedeliveredMessageActsOnce(t *testing.T) {
	f := orderCommands(t)
	batch := records(events.TPlaceOrder, 5)
	f.handle(batch...)
	f.handle(batch...)
	moved := slices.Clone(batch)
	for i := range moved {
		moved[i].Partition, moved[i].Offset = 9, int64(100+i)
	}
	f.handle(moved...)
	f.once(batch...)
	require.Equal(t, 5, f.obs.batch[2].Count(Repeat))
}

func TestF5_ZombieAndSuccessorActOnce(t *testing.T) {
	f := orderCommands(t)
	batch := records(events.TPlaceOrder, 20)
	var both sync.WaitGroup
	both.Add(2)
	first := sync.Map{}
	f.h.apply = func(part []*Delivery) error {
		// Both have read the inbox, and found nothing, before either commits.
		if _, met := first.LoadOrStore(part[0], true); !met {
			both.Done()
			both.Wait()
		}
		return nil
	}
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() {
			settled, err := f.group.Handle(t.Context(), batch)
			if err != nil || slices.Contains(settled, false) {
				t.Errorf("unsettled: %v", err)
			}
		})
	}
	wg.Wait()
	f.once(batch...)
}

func TestF6_PoisonFailsAloneInItsBatch(t *testing.T) {
	good := func(name events.Name) []events.Record { return records(name, 9) }
	cases := map[string]struct {
		spoil func(f *fixture, bad *events.Record)
		says  string
	}{
		"undecodable": {func(_ *fixture, bad *events.Record) { bad.Value = []byte("{") }, "not valid JSON"},
		"no type": {func(_ *fixture, bad *events.Record) {
			bad.Headers = nil
			bad.Key = []byte("x")
		}, "ce_type is missing"},
		"impossible": {func(f *fixture, bad *events.Record) {
			id := events.Identity(bad)
			f.h.result = func(d *Delivery) Result {
				if d.ID == id {
					return Result{Err: poisonError{"no such thing"}}
				}
				return Result{}
			}
		}, "no such thing"},
		"data error of one statement for all": {func(f *fixture, bad *events.Record) {
			id := events.Identity(bad)
			f.h.apply = func(part []*Delivery) error {
				if slices.ContainsFunc(part, func(d *Delivery) bool { return d.ID == id }) {
					return fmt.Errorf("save: %w", sqlError{"value out of range"})
				}
				return nil
			}
		}, "value out of range"},
		"panic in apply": {func(f *fixture, bad *events.Record) {
			id := events.Identity(bad)
			f.h.apply = func(part []*Delivery) error {
				if slices.ContainsFunc(part, func(d *Delivery) bool { return d.ID == id }) {
					panic("index out of range")
				}
				return nil
			}
		}, "panicked: index out of range"},
		"panic in prepare": {func(f *fixture, bad *events.Record) {
			id := events.Identity(bad)
			f.h.prepare = func(_ context.Context, batch []*Delivery) error {
				if slices.ContainsFunc(batch, func(d *Delivery) bool { return d.ID == id }) {
					panic("nil map")
				}
				return nil
			}
		}, "panicked: nil map"},
		"data error in prepare": {func(f *fixture, bad *events.Record) {
			id := events.Identity(bad)
			f.h.prepare = func(_ context.Context, batch []*Delivery) error {
				if slices.ContainsFunc(batch, func(d *Delivery) bool { return d.ID == id }) {
					return sqlError{"not a number"}
				}
				return nil
			}
		}, "not a number"},
	}
	for name, tc := range cases {
		t.Run(name, func(t *testing.T) {
			f := orderCommands(t)
			batch := good(events.TPlaceOrder)
			bad := record(events.TPlaceOrder, 1, 77)
			tc.spoil(f, &bad)
			f.handle(append(slices.Clone(batch), bad)...)
			f.once(batch...)
			require.Zero(t, f.h.effects[events.Identity(&bad)])

			dead := f.dead()
			require.Len(t, dead, 1)
			require.Equal(t, ClassPoison, dead[0].Class)
			require.Contains(t, dead[0].Error, tc.says)
			require.Equal(t, place(events.TopicCommands, 1, 77), dead[0].Origin)
			require.Equal(t, bad.Value, dead[0].Value)
			require.Equal(t, 1, dead[0].Attempts)

			dlq := f.copies(events.DLQTopic(events.GroupOrderCommands))
			require.Len(t, dlq, 1)
			require.Equal(t, "orders.commands.v1", string(dlq[0].Header(HeaderDLQTopic)))
			require.Equal(t, "1", string(dlq[0].Header(HeaderDLQPartition)))
			require.Equal(t, "77", string(dlq[0].Header(HeaderDLQOffset)))
			require.Equal(t, "order-commands", string(dlq[0].Header(HeaderDLQGroup)))
			require.Equal(t, "1", string(dlq[0].Header(HeaderDLQCount)))
			require.Contains(t, string(dlq[0].Header(HeaderDLQMessage)), tc.says)
			require.Equal(t, bad.Value, dlq[0].Value)

			f.handle(bad) // redelivered: it is dead already
			require.Len(t, f.dead(), 1)
			_, raw := f.mem.Drain()
			require.Empty(t, raw)
		})
	}
}

func TestOutcomesOfPrepareSurviveASplit(t *testing.T) {
	f := stock(t)
	batch := records(events.TReserveStock, 8)
	bad := events.Identity(&batch[5])
	f.h.apply = func(part []*Delivery) error {
		if slices.ContainsFunc(part, func(d *Delivery) bool { return d.ID == bad }) {
			return sqlError{"check constraint"}
		}
		return nil
	}
	f.handle(batch...)
	require.Len(t, f.h.prepares, 1, "a call of the gateway is not repeated because another record was bad")
	require.Len(t, f.dead(), 1)
	require.Positive(t, f.obs.splits)
}

func TestF7_OutageFloodsNothingAndSpendsNoAttempt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := stock(t)
		batch := records(events.TReserveStock, 30)
		begun := time.Now()
		const away = 10 * time.Minute
		f.h.result = func(d *Delivery) Result {
			if d.Record.Offset%2 == 0 && time.Since(begun) < away {
				return Result{Err: fmt.Errorf("authorise: %w", awayError{})}
			}
			return Result{}
		}
		done := make(chan struct{})
		go func() {
			defer close(done)
			f.handle(batch...)
		}()
		synctest.Wait()
		f.h.mu.Lock()
		require.Len(t, f.h.effects, 15, "what needs nothing of what is away is committed at once")
		f.h.mu.Unlock()
		<-done
		require.GreaterOrEqual(t, time.Since(begun), away)
		require.Less(t, time.Since(begun), away+6*time.Second, "it goes on when what was away is back")
		f.once(batch...)
		_, raw := f.mem.Drain()
		require.Empty(t, raw, "nothing went to a tier or to a dead-letter queue")
		require.Empty(t, f.dead())
		for _, d := range f.h.seen {
			require.Equal(t, 1, d.Attempt)
		}
		for i, ids := range f.h.prepares[1:] {
			require.Len(t, ids, 15, "try %d: what is held is tried as one batch", i)
		}
		require.Less(t, len(f.h.prepares), 1000, "no busy loop")
	})
}

func TestF7_OutageOfTheDatabaseHoldsTheBatch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := stock(t)
		begun := time.Now()
		f.mem.Begin = func() error {
			if time.Since(begun) < time.Minute {
				return fmt.Errorf("acquire: %w", awayError{})
			}
			return nil
		}
		batch := records(events.TReserveStock, 10)
		f.handle(batch...)
		f.once(batch...)
		require.Len(t, f.h.prepares, 1, "what was prepared is kept until the database is back")
		require.Positive(t, f.obs.held)
		require.Empty(t, f.dead())
	})
}

func TestHeldBatchEndsWithItsContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := stock(t)
		f.h.result = func(d *Delivery) Result {
			if d.Record.Offset == 0 {
				return Result{Err: awayError{}}
			}
			return Result{}
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
		defer cancel()
		begun := time.Now()
		settled, err := f.group.Handle(ctx, records(events.TReserveStock, 3))
		require.ErrorIs(t, err, context.DeadlineExceeded)
		require.Equal(t, []bool{false, true, true}, settled)
		require.Equal(t, time.Hour, time.Since(begun), "a pause ends with the context")
		require.True(t, f.obs.batch[0].Interrupted)
	})
}

func TestRunningWorkMayFinishAfterRevocation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := stock(t)
		ctx, cancel := context.WithCancelCause(t.Context())
		f.h.prepare = func(ctx context.Context, _ []*Delivery) error {
			cancel(ErrRevoked)
			pause(ctx, 3*time.Second) // a gateway call, shorter than Drain
			return ctx.Err()
		}
		batch := records(events.TReserveStock, 3)
		settled, err := f.group.Handle(ctx, batch)
		require.NoError(t, err)
		require.NotContains(t, settled, false)

		f.h.prepare = func(ctx context.Context, _ []*Delivery) error {
			pause(ctx, time.Hour)
			return ctx.Err()
		}
		begun := time.Now()
		settled, err = f.group.Handle(ctx, records(events.TReserveStock, 3))
		require.ErrorIs(t, err, ErrRevoked)
		require.NotContains(t, settled, true)
		require.Less(t, time.Since(begun), time.Second, "nothing new is begun")
	})
}

func TestF8_NoCommitWithoutTheDecision(t *testing.T) {
	f := stock(t)
	f.h.result = func(*Delivery) Result { return Result{Err: transient("gateway answered 500")} }
	crashes := 0
	f.mem.Commit = func() error {
		if crashes++; crashes <= 2 {
			_, raw := f.mem.Drain()
			require.Empty(t, raw)
			return errors.New("connection lost before the commit")
		}
		return nil
	}
	rec := record(events.TReserveStock, 0, 0)
	bad := record(events.TReserveStock, 0, 1)
	bad.Value = []byte{0xff}
	f.handle(rec, bad)
	_, raw := f.mem.Drain()
	require.Len(t, raw, 2, "one copy to the first tier, one to the dead-letter queue")
	require.Equal(t, 3, crashes)
}

func TestTransientFailureGoesThroughTheTiers(t *testing.T) {
	var stalls []Verdict
	onStalled := func(c *GroupConfig) {
		c.OnStalled = func(_ *Delivery, v Verdict) []events.Envelope {
			stalls = append(stalls, v)
			return []events.Envelope{{Type: events.TStepStalled}}
		}
	}
	f := stock(t, onStalled)
	f.h.result = func(*Delivery) Result { return Result{Err: transient("timeout\nwith\x1b[31m colour")} }
	rec := record(events.TReserveStock, 2, 41)
	f.handle(rec)
	id := events.Identity(&rec)
	for tier, delay := range testDelays {
		copies := f.copies(events.RetryTopic(events.GroupStock, delay))
		require.Len(t, copies, 1)
		row, ok := f.mem.Row(events.GroupStock, id)
		require.True(t, ok)
		require.Equal(t, InboxWaiting, row.State)
		c, ok := readCopy(&copies[0])
		require.True(t, ok)
		require.Equal(t, row.Ticket, c.ticket)
		require.Equal(t, tier+2, c.attempt)
		require.Equal(t, place(events.TopicStock, 2, 41), c.origin)
		require.WithinDuration(t, time.Now().Add(delay), c.due, 2*time.Second)
		require.Equal(t, "timeout with [31m colour", string(copies[0].Header(HeaderError)))
		require.Equal(t, rec.Key, copies[0].Key)
		f.handle(copies[0])
		require.Equal(t, tier+2, f.h.seen[len(f.h.seen)-1].Attempt)
	}
	dead := f.dead()
	require.Len(t, dead, 1)
	require.Equal(t, ClassExhausted, dead[0].Class)
	require.Equal(t, 3, dead[0].Attempts)
	require.False(t, dead[0].FirstFailed.IsZero())
	require.Len(t, stalls, 1)
	require.Equal(t, Dead, stalls[0].Kind)
	out, raw := f.mem.Drain()
	require.Len(t, out, 1)
	require.Len(t, raw, 1)
	for _, h := range raw[0].Headers {
		require.False(t, strings.HasPrefix(h.Key, ownHeaders), "the dead-letter queue gets the original's headers, and the reason")
	}
}

func TestEndlessMessageStaysAtTheSlowestTier(t *testing.T) {
	stalled := 0
	f := stock(t, func(c *GroupConfig) {
		c.OnStalled = func(d *Delivery, v Verdict) []events.Envelope {
			require.True(t, v.Stalled)
			stalled++
			return []events.Envelope{{Type: events.TStepStalled, OrderID: d.OrderID}}
		}
	})
	fail := true
	f.h.result = func(*Delivery) Result {
		if fail {
			return Result{Err: transient("no")}
		}
		return Result{}
	}
	rec := record(events.TCommitStock, 0, 0)
	f.handle(rec)
	f.handle(f.copies(events.RetryTopic(events.GroupStock, testDelays[0]))...)
	for i := range 5 {
		require.Equal(t, i, stalled)
		copies := f.copies(events.RetryTopic(events.GroupStock, testDelays[1]))
		require.Len(t, copies, 1)
		if i == 4 {
			fail = false
		}
		f.handle(copies...)
	}
	require.Empty(t, f.dead())
	f.once(rec)
	row, _ := f.mem.Row(events.GroupStock, events.Identity(&rec))
	require.Equal(t, InboxHandled, row.State)
}

func TestInPlaceTriesComeFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := stock(t, func(c *GroupConfig) { c.Policy.InPlace = 3 })
		tries := 0
		f.h.result = func(d *Delivery) Result {
			if d.Record.Offset == 1 {
				if tries++; tries <= 3 {
					return Result{Err: transient("busy")}
				}
			}
			return Result{}
		}
		batch := records(events.TReserveStock, 3)
		f.handle(batch...)
		f.once(batch...)
		_, raw := f.mem.Drain()
		require.Empty(t, raw)
		require.Equal(t, 4, tries)
	})
}

func TestF31_SameMessageTwiceInOneBatch(t *testing.T) {
	for name, f := range map[string]*fixture{"rows for all": orderCommands(t), "rows for failures": stock(t)} {
		t.Run(name, func(t *testing.T) {
			typ := events.TPlaceOrder
			if f.cfg.Name == events.GroupStock {
				typ = events.TReserveStock
			}
			rec := record(typ, 0, 1)
			again, elsewhere := rec, rec
			again.Offset = 2
			elsewhere.Partition = 5
			settled, err := f.group.Handle(t.Context(), []events.Record{rec, again, elsewhere})
			require.NoError(t, err)
			require.Equal(t, []bool{true, true, true}, settled)
			f.once(rec)
			require.Len(t, f.h.prepares[0], 1)
		})
	}
}

func TestF35_RetryIsNoDuplicateAndOriginalNeverRunsBesideIt(t *testing.T) {
	for name, f := range map[string]*fixture{"rows for all": orderCommands(t), "rows for failures": stock(t)} {
		t.Run(name, func(t *testing.T) {
			typ := events.TPlaceOrder
			if f.cfg.Name == events.GroupStock {
				typ = events.TReserveStock
			}
			fail := true
			f.h.result = func(*Delivery) Result {
				if fail {
					return Result{Err: transient("no")}
				}
				return Result{}
			}
			rec := record(typ, 0, 1)
			f.handle(rec)
			first := f.copies(events.RetryTopic(f.cfg.Name, testDelays[0]))
			require.Len(t, first, 1)
			f.handle(rec) // redelivered while its retry waits
			require.Empty(t, f.copies(events.RetryTopic(f.cfg.Name, testDelays[0])))
			f.handle(first...)
			second := f.copies(events.RetryTopic(f.cfg.Name, testDelays[1]))
			require.Len(t, second, 1)
			fail = false
			prepares := len(f.h.prepares)
			f.handle(first...) // an old copy, redelivered
			require.Len(t, f.h.prepares, prepares, "no network call for a copy that was replaced")
			require.Equal(t, 1, f.obs.batch[len(f.obs.batch)-1].Stale)
			require.Empty(t, f.h.effects)
			f.handle(second...)
			f.handle(second...)
			f.handle(first...)
			if f.cfg.Inbox == InboxAll {
				f.handle(rec)
			}
			f.once(rec)
		})
	}
}

func TestF39_RecordAtTheLimitIsDeadLetteredWithHeadersOnly(t *testing.T) {
	f := orderCommands(t, func(c *GroupConfig) { c.MaxRecordBytes = 8192 })
	big := record(events.TPlaceOrder, 0, 0)
	big.Value = append(big.Value, []byte(strings.Repeat(" ", 8000))...)
	f.h.result = func(*Delivery) Result { return Result{Err: transient("gateway answered 500")} }
	f.handle(big)
	dead := f.dead()
	require.Len(t, dead, 1)
	require.Equal(t, ClassTooLarge, dead[0].Class)
	require.Contains(t, dead[0].Error, "gateway answered 500")
	require.Equal(t, big.Value, dead[0].Value, "the database keeps all of it")
	dlq := f.copies(events.DLQTopic(f.cfg.Name))
	require.Len(t, dlq, 1)
	require.Empty(t, dlq[0].Value)
	require.Equal(t, big.Key, dlq[0].Key)
	require.Equal(t, fmt.Sprint(len(big.Value)), string(dlq[0].Header(HeaderDLQOmitted)))
	require.LessOrEqual(t, size(dlq[0].Key, dlq[0].Value, dlq[0].Headers), 8192)

	huge := record(events.TPlaceOrder, 0, 1)
	huge.Headers = append(huge.Headers, events.Header{Key: "x", Value: make([]byte, 9000)})
	huge.Value = []byte("{")
	f.handle(huge)
	dlq = f.copies(events.DLQTopic(f.cfg.Name))
	require.Len(t, dlq, 1)
	require.LessOrEqual(t, size(dlq[0].Key, dlq[0].Value, dlq[0].Headers), 8192)
}

func TestF40_UnknownTypeIsTransient(t *testing.T) {
	unknown := func(topic events.Topic) events.Record {
		rec := record(events.TReserveStock, 0, 0)
		rec.Topic = topic
		for i, h := range rec.Headers {
			if h.Key == events.HeaderType {
				rec.Headers[i].Value = []byte("ordersaga.saga.v2.ReserveStock")
			}
		}
		return rec
	}
	t.Run("on a topic of ours it waits for who knows it", func(t *testing.T) {
		f := stock(t)
		next := []events.Record{unknown(events.TopicStock)}
		for i := range 6 {
			f.handle(next...)
			next = f.copies(events.RetryTopic(f.cfg.Name, testDelays[min(i, 1)]))
			require.Len(t, next, 1)
		}
		require.Empty(t, f.dead())
		for i, h := range next[0].Headers { // the upgrade arrives
			if h.Key == events.HeaderType {
				next[0].Headers[i].Value = []byte("ordersaga.saga.v1.ReserveStock")
			}
		}
		f.handle(next...)
		require.Len(t, f.h.effects, 1)
	})
	t.Run("on a public topic it ends as a dead letter that says so", func(t *testing.T) {
		f := orderCommands(t)
		next := []events.Record{unknown(events.TopicCommands)}
		for _, d := range testDelays {
			f.handle(next...)
			next = f.copies(events.RetryTopic(f.cfg.Name, d))
			require.Len(t, next, 1)
		}
		f.handle(next...)
		require.Len(t, f.dead(), 1)
		require.Contains(t, f.dead()[0].Error, "ordersaga.saga.v2.ReserveStock")
		require.Equal(t, "ordersaga.saga.v2.ReserveStock", f.dead()[0].Type)
	})
}

func TestF43_ReusedIDIsADeadLetterAndNeverDropped(t *testing.T) {
	first := record(events.TPlaceOrder, 0, 1)
	other := first
	other.Value = []byte(strings.Replace(string(first.Value), "c-1", "c-2", 1))
	other.Offset = 2
	check := func(t *testing.T, f *fixture) {
		t.Helper()
		f.once(first)
		dead := f.dead()
		require.Len(t, dead, 1)
		require.Equal(t, ClassReused, dead[0].Class)
		require.Contains(t, dead[0].Error, "id reused")
		require.Equal(t, other.Value, dead[0].Value)
		row, _ := f.mem.Row(f.cfg.Name, events.Identity(&first))
		require.Equal(t, InboxHandled, row.State, "the first one's row stays")
		f.mem.Drain()
		f.handle(other)
		f.handle(first)
		require.Len(t, f.dead(), 1)
		_, raw := f.mem.Drain()
		require.Empty(t, raw)
	}
	t.Run("in one batch", func(t *testing.T) {
		f := orderCommands(t)
		f.handle(first, other)
		check(t, f)
	})
	t.Run("in the next batch", func(t *testing.T) {
		f := orderCommands(t)
		f.handle(first)
		f.handle(other)
		check(t, f)
	})
	t.Run("redelivered behind the other", func(t *testing.T) {
		f := orderCommands(t)
		f.handle(first)
		f.handle(other, first)
		check(t, f)
	})
}

func TestOtherGroupsTypesAreSettledUnread(t *testing.T) {
	f := newFixture(t, GroupConfig{
		Name: events.GroupCompensationStock, Topic: events.TopicCompensation, Inbox: InboxFailures, Policy: Policy{Delays: testDelays},
	})
	ours, theirs := record(events.TReleaseStock, 0, 0), record(events.TReversePayment, 0, 1)
	theirs.Value = []byte{0xff} // broken, and not our concern
	f.handle(ours, theirs)
	f.once(ours)
	require.Empty(t, f.dead())
	require.Equal(t, 1, f.obs.batch[0].Foreign)
}

func TestStrayRecordOnARetryTopicIsADeadLetter(t *testing.T) {
	f := stock(t)
	rec := record(events.TReserveStock, 0, 0)
	rec.Topic = f.group.RetryTopics()[0]
	f.handle(rec)
	require.Len(t, f.dead(), 1)
	require.Contains(t, f.dead()[0].Error, "retry topics take copies from ordersaga only")
	require.Empty(t, f.h.effects)
}

func TestProducersCannotForgeTheHeadersOfCopies(t *testing.T) {
	f := orderCommands(t)
	rec := record(events.TPlaceOrder, 0, 0)
	forged := copyState{ticket: 7, attempt: 99, tier: 2, id: uuid.New(), origin: place("x", 1, 1), replay: true}
	rec.Headers = forged.headers(rec.Headers)
	f.handle(rec)
	require.Equal(t, 1, f.h.seen[0].Attempt)
	require.Zero(t, f.h.seen[0].Ticket)
	require.Equal(t, events.Identity(&rec), f.h.seen[0].ID)
}

func TestRecordWithoutIDKeepsItsIdentityThroughTheTiers(t *testing.T) {
	f := orderCommands(t)
	rec := record(events.TPlaceOrder, 3, 12)
	rec.Headers = slices.DeleteFunc(rec.Headers, func(h events.Header) bool { return h.Key == events.HeaderID || h.Key == events.HeaderSource })
	fail := true
	f.h.result = func(*Delivery) Result {
		if fail {
			return Result{Err: transient("no")}
		}
		return Result{}
	}
	f.handle(rec)
	copies := f.copies(events.RetryTopic(f.cfg.Name, testDelays[0]))
	fail = false
	f.handle(copies...)
	f.handle(rec)
	f.once(rec)
}

func TestDeadLetterThatCannotBeStoredStopsConsumption(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := stock(t)
		bad := record(events.TReserveStock, 0, 0)
		bad.Value = []byte{0xff}
		good := record(events.TReserveStock, 1, 0)
		until := time.Now().Add(time.Minute)
		f.mem.Commit = func() error {
			if time.Now().Before(until) && len(f.h.effects) > 0 {
				return sqlError{"dead_letters is read-only"}
			}
			return nil
		}
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		defer cancel()
		f.handle(good)
		settled, err := f.group.Handle(ctx, []events.Record{bad})
		require.Error(t, err)
		require.Equal(t, []bool{false}, settled)
		f.handle(bad)
		require.Len(t, f.dead(), 1)
	})
}

func TestBrokenHandlerIsToldApart(t *testing.T) {
	require.True(t, poison(&brokenHandlerError{"x"}))
	require.True(t, hasOutage(fmt.Errorf("wrapped: %w", awayError{})))
	require.False(t, hasOutage(errors.New("x")))
}

// TestCopiesOfFormerTiersAreHandled: a copy waits in the topic of a delay that is configured no more.
func TestCopiesOfFormerTiersAreHandled(t *testing.T) {
	former := events.RetryTopic(events.GroupOrderCommands, time.Hour)
	old := newFixture(t, GroupConfig{Name: events.GroupOrderCommands, Topic: events.TopicCommands, Policy: Policy{Delays: []time.Duration{time.Hour}}})
	old.h.result = func(*Delivery) Result { return Result{Err: transient("no")} }
	rec := record(events.TPlaceOrder, 0, 0)
	old.handle(rec)
	copies := old.copies(former)
	require.Len(t, copies, 1)

	f := newFixture(t, GroupConfig{
		Name: events.GroupOrderCommands, Topic: events.TopicCommands, Policy: Policy{Delays: testDelays}, Former: []events.Topic{former, events.RetryTopic(events.GroupOrderCommands, testDelays[0])},
	})
	require.Len(t, f.group.RetryTopics(), len(testDelays)+1, "each once")
	f.handle(copies...)
	f.once(rec)
	require.Empty(t, f.dead())
}
