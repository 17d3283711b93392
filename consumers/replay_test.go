package consumers

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"

	"ordersaga/events"
)

func operators(f *fixture) *Operators[*MemoryTx] {
	f.Helper()
	o, err := NewOperators[*MemoryTx](f.mem, f.mem, OperatorsConfig{Delays: testDelays})
	require.NoError(f, err)
	return o
}

// deadLetters makes n dead letters of the group and forgets what was forwarded for them.
func (f *fixture) deadLetters(n int) ([]events.Record, []uuid.UUID) {
	f.Helper()
	f.h.result = func(*Delivery) Result { return Result{Err: poisonError{"the catalogue is down"}} }
	batch := records(events.TPlaceOrder, n)
	f.handle(batch...)
	f.mem.Drain()
	f.h.result = nil
	ids := make([]uuid.UUID, n)
	for _, d := range f.dead() {
		for i := range batch {
			if d.MessageID == events.Identity(&batch[i]) {
				ids[i] = d.ID
			}
		}
	}
	return batch, ids
}

func (f *fixture) status(id uuid.UUID) DeadStatus {
	f.Helper()
	d, err := f.mem.DeadLetter(f.Context(), id)
	require.NoError(f, err)
	return d.Status
}

func TestReplayFinishesTheMessageOnce(t *testing.T) {
	f := orderCommands(t)
	batch, ids := f.deadLetters(1)
	o := operators(f)

	_, results, err := o.Do(t.Context(), Request{Action: ActionReplay, Actor: "ann", IDs: ids, DryRun: true})
	require.NoError(t, err)
	require.Equal(t, []ItemResult{{ID: ids[0], Outcome: "would_replay"}}, results)
	require.Equal(t, DeadOpen, f.status(ids[0]))

	op, results, err := o.Do(t.Context(), Request{Action: ActionReplay, Actor: "ann", IDs: ids, Note: "catalogue is back"})
	require.NoError(t, err)
	require.Equal(t, 1, op.Items)
	require.Equal(t, []ItemResult{{ID: ids[0], Outcome: "replaying"}}, results)
	require.Equal(t, DeadReplaying, f.status(ids[0]))
	require.Equal(t, "dlq.replay", f.mem.Actions()[0].Action)
	require.Equal(t, ids[0].String(), f.mem.Actions()[0].Target)

	copies := f.copies(events.RetryTopic(f.cfg.Name, testDelays[0]))
	require.Len(t, copies, 1)
	require.False(t, Due(&copies[0]).After(time.Now().Add(time.Second)))
	f.handle(batch...) // the original does not act beside its replay
	require.Empty(t, f.h.effects)
	f.handle(copies...)
	f.once(batch...)
	require.True(t, f.h.seen[len(f.h.seen)-1].Replay)
	require.Equal(t, 2, f.h.seen[len(f.h.seen)-1].Attempt)
	require.Equal(t, DeadResolved, f.status(ids[0]))
	f.handle(copies...)
	f.handle(batch...)
	f.once(batch...)
}

func TestReplayThatFailsOpensTheSameDeadLetterAgain(t *testing.T) {
	f := orderCommands(t)
	_, ids := f.deadLetters(1)
	_, _, err := operators(f).Do(t.Context(), Request{Action: ActionReplay, Actor: "ann", IDs: ids})
	require.NoError(t, err)
	f.h.result = func(*Delivery) Result { return Result{Err: transient("still down")} }
	next := f.copies(events.RetryTopic(f.cfg.Name, testDelays[0]))
	for _, d := range testDelays { // a replay begins the tiers anew
		require.Len(t, next, 1)
		f.handle(next...)
		require.Equal(t, DeadReplaying, f.status(ids[0]))
		next = f.copies(events.RetryTopic(f.cfg.Name, d))
	}
	f.handle(next...)
	dead := f.dead()
	require.Len(t, dead, 1)
	require.Equal(t, ids[0], dead[0].ID)
	require.Equal(t, DeadOpen, dead[0].Status)
	require.Equal(t, 4, dead[0].Attempts)
	require.Equal(t, ClassExhausted, dead[0].Class)
	require.Equal(t, "ann", dead[0].Owner)

	f.mem.Drain()
	f.h.result = nil
	_, results, err := operators(f).Do(t.Context(), Request{Action: ActionReplay, Actor: "bob", IDs: ids})
	require.NoError(t, err)
	require.Equal(t, "replaying", results[0].Outcome)
	f.handle(f.copies(events.RetryTopic(f.cfg.Name, testDelays[0]))...)
	require.Equal(t, DeadResolved, f.status(ids[0]))
}

func TestF15_ReplayPressedTwiceSendsOneCopy(t *testing.T) {
	f := orderCommands(t)
	_, ids := f.deadLetters(3)
	o := operators(f)
	var wg sync.WaitGroup
	var mu sync.Mutex
	outcomes := map[string]int{}
	for range 8 {
		wg.Go(func() {
			_, results, err := o.Do(t.Context(), Request{Action: ActionReplay, Actor: "ann", IDs: append(ids, ids...)})
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				outcomes[err.Error()]++
			}
			for _, r := range results {
				outcomes[r.Outcome+r.Error]++
			}
		})
	}
	wg.Wait()
	require.Equal(t, map[string]int{"replaying": 3, "it is being replayed already": 21}, outcomes)
	require.Len(t, f.copies(events.RetryTopic(f.cfg.Name, testDelays[0])), 3)
}

func TestF16_BulkReplayDiesInTheMiddleAndIsResumed(t *testing.T) {
	f := orderCommands(t)
	batch, ids := f.deadLetters(500)
	o := operators(f)
	f.h.effects = map[uuid.UUID]int{}
	commits := 0
	f.mem.Commit = func() error {
		if commits++; commits > 2 { // the operation is stored, the first part sent
			return errors.New("killed")
		}
		return nil
	}
	op, _, err := o.Do(t.Context(), Request{Action: ActionReplay, Actor: "ann", Filter: &DeadFilter{Group: f.cfg.Name}})
	require.ErrorContains(t, err, "is stored and goes on by itself")
	require.Equal(t, 500, op.Items)
	f.mem.Commit = nil
	first := f.copies(events.RetryTopic(f.cfg.Name, testDelays[0]))
	require.Len(t, first, replayBatch)

	// More dead letters come, which match the filter; the selection is frozen.
	_, later := f.deadLetters(2)

	n, err := o.Resume(t.Context())
	require.NoError(t, err)
	require.Zero(t, n, "an operation that is under way is left alone")
	f.mem.mu.Lock()
	f.mem.ops[op.ID].touched = time.Now().Add(-time.Hour)
	f.mem.mu.Unlock()
	var wg sync.WaitGroup
	for range 3 { // by several processes
		wg.Go(func() {
			if _, err := o.Resume(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	rest := f.copies(events.RetryTopic(f.cfg.Name, testDelays[0]))
	require.Len(t, rest, 500-replayBatch)
	f.handle(append(first, rest...)...)
	f.once(batch...)
	for _, id := range ids {
		require.Equal(t, DeadResolved, f.status(id))
	}
	for _, id := range later {
		require.Equal(t, DeadOpen, f.status(id))
	}
	_, results, err := f.mem.Operation(t.Context(), op.ID)
	require.NoError(t, err)
	require.Len(t, results, 500)
	require.Len(t, f.mem.Actions(), 500)
}

func TestItemsFailAlone(t *testing.T) {
	f := orderCommands(t)
	_, ids := f.deadLetters(2)
	unknown := uuid.New()
	o := operators(f)
	_, results, err := o.Do(t.Context(), Request{Action: ActionDiscard, Actor: "ann", Note: "test order", IDs: []uuid.UUID{ids[0], unknown}})
	require.NoError(t, err)
	require.Equal(t, []ItemResult{{ID: ids[0], Outcome: "discarded"}, {ID: unknown, Error: "there is no dead letter with this id"}}, results)
	_, results, err = o.Do(t.Context(), Request{Action: ActionReplay, Actor: "ann", IDs: ids})
	require.NoError(t, err)
	require.Equal(t, []ItemResult{{ID: ids[0], Error: "it was discarded"}, {ID: ids[1], Outcome: "replaying"}}, results)
	require.Len(t, f.copies(events.RetryTopic(f.cfg.Name, testDelays[0])), 1)
}

func TestRequestsThatCannotBeCarriedOut(t *testing.T) {
	f := orderCommands(t)
	o := operators(f)
	for says, q := range map[string]Request{
		"unknown action":      {Action: "x", Actor: "a", IDs: []uuid.UUID{{1}}},
		"who does this":       {Action: ActionReplay, IDs: []uuid.UUID{{1}}},
		"nothing is selected": {Action: ActionReplay, Actor: "a", Filter: &DeadFilter{}},
		"either ids or":       {Action: ActionReplay, Actor: "a", IDs: []uuid.UUID{{1}}, Filter: &DeadFilter{Group: "g"}},
		"needs a note":        {Action: ActionDiscard, Actor: "a", IDs: []uuid.UUID{{1}}},
	} {
		_, _, err := o.Do(t.Context(), q)
		var bad *RequestError
		require.ErrorAs(t, err, &bad)
		require.ErrorContains(t, err, says)
	}
}

func TestReplayOfWhatKafkaRefusedGoesToItsTopic(t *testing.T) {
	f := orderCommands(t)
	d := DeadLetter{
		ID: events.NewID(), MessageID: events.NewID(), Origin: Place{Topic: events.TopicEvents}, Status: DeadOpen, Key: []byte("k"), Value: []byte("v"),
		Headers: []events.Header{{Key: "ce_id", Value: []byte("1")}},
	}
	require.NoError(t, f.mem.InTx(t.Context(), func(ctx context.Context, tx *MemoryTx) error { return tx.SaveDeadLetters(ctx, []DeadLetter{d}) }))
	_, results, err := operators(f).Do(t.Context(), Request{Action: ActionReplay, Actor: "ann", IDs: []uuid.UUID{d.ID}})
	require.NoError(t, err)
	require.Equal(t, "resolved", results[0].Outcome)
	_, raw := f.mem.Drain()
	require.Equal(t, []events.Raw{{Topic: events.TopicEvents, Key: d.Key, Value: d.Value, Headers: d.Headers}}, raw)
}

func TestF26_ListingsShowNothingThatAProducerWrote(t *testing.T) {
	f := orderCommands(t)
	rec := record(events.TPlaceOrder, 0, 0)
	rec.Value = []byte(`{"customer_id": "jane@example.com"`)
	rec.Headers = append(rec.Headers, events.Header{Key: "x-customer", Value: []byte("jane@example.com")},
		events.Header{Key: events.HeaderTime, Value: []byte("12:00\r\n\x1b[2Jforged line")})
	f.handle(rec)
	o := operators(f)
	page, next, err := o.List(t.Context(), DeadFilter{Status: DeadOpen}, "", 10)
	require.NoError(t, err)
	require.Empty(t, next)
	require.Len(t, page, 1)
	shown := fmt.Sprintf("%+v", page[0])
	require.NotContains(t, shown, "jane")
	for _, r := range shown {
		require.True(t, r >= ' ' && r != 0x7f, "control character %q", r)
	}
	require.Equal(t, len(rec.Value), page[0].ValueBytes)
	require.Nil(t, page[0].Full)
	full, err := o.Get(t.Context(), page[0].ID, true, "root")
	require.NoError(t, err)
	require.Equal(t, rec.Value, full.Full.Value)
	require.Equal(t, "dlq.reveal", f.mem.Actions()[0].Action)
}

func TestF26_ErrorTextIsOneCleanLine(t *testing.T) {
	for in, want := range map[string]string{
		"a\r\nb\tc":             "a b c",
		"  \x1b[31mred\x00 ":    "[31mred",
		"x\u202eevil\u2028 y":   "x evil y",
		"bad \xff\xfe bytes":    "bad \ufffd\ufffd bytes",
		"":                      "",
		"naïve, déjà vu, 東京 ok": "naïve, déjà vu, 東京 ok",
	} {
		require.Equal(t, want, CleanText(in, 100))
	}
	for n := range 20 {
		long := CleanText("東京東京東京東京東京東京", 10+n)
		require.LessOrEqual(t, len(long), 10+n)
		require.NotContains(t, long, "\ufffd")
	}
}

func TestFingerprintIsTheSameForOneCause(t *testing.T) {
	a := Fingerprint(ClassPoison, "PlaceOrder", "order 0190a5d0-ac96-774b-bcce-b302099a8057: intent pi_3Nx9 not found after 3 tries")
	b := Fingerprint(ClassPoison, "PlaceOrder", "order ffffffff-abcd-abcd-abcd-aabbccddeeff: intent pi_8ZZ1 not found after 12 tries")
	require.Equal(t, a, b)
	require.NotEqual(t, a, Fingerprint(ClassPoison, "CancelOrder", "order 1: intent pi_3Nx9 not found after 3 tries"))
	require.NotEqual(t, a, Fingerprint(ClassPoison, "PlaceOrder", "no key"))
}

func TestF24_PausesAreSpreadAndBounded(t *testing.T) {
	p := Policy{}
	var below, above int
	for range 2000 {
		d := p.Decide(Tried{Held: 30}, awayError{}, time.Time{}).Wait
		require.LessOrEqual(t, d, holdMax)
		require.GreaterOrEqual(t, d, minPause)
		if d < holdMax/2 {
			below++
		} else {
			above++
		}
		asked := p.Decide(Tried{}, awayError{after: time.Second}, time.Time{}).Wait
		require.GreaterOrEqual(t, asked, time.Second, "who is away said when to come back")
		require.LessOrEqual(t, asked, 1100*time.Millisecond)
	}
	require.InDelta(t, 1000, below, 200, "full jitter")
	require.InDelta(t, 1000, above, 200)
}

func TestLongRetryAfterChoosesASlowerTier(t *testing.T) {
	p := Policy{Delays: testDelays}
	now := time.Now()
	require.Equal(t, 1, p.Decide(Tried{}, afterError(time.Second), now).Tier)
	require.Equal(t, 2, p.Decide(Tried{}, afterError(6*time.Second), now).Tier)
	v := p.Decide(Tried{}, afterError(time.Hour), now)
	require.Equal(t, 2, v.Tier)
	require.Equal(t, now.Add(30*time.Second), v.Due)
}

type afterError time.Duration

func (afterError) Error() string               { return "429" }
func (e afterError) RetryAfter() time.Duration { return time.Duration(e) }
