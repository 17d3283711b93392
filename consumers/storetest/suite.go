// Package storetest is the contract of the runtime's stores, as one suite for every store: consumers.Memory and Postgres pass the same.
//
// It promises nothing about a store that passes beyond the ports' own words, and tests what the runtime and the operators' use cases
// rely on: that a message is claimed by one transaction, that a verdict is all or nothing, that a dead letter keeps its identity
// through replays, and that a stored operation goes on where it stopped.
package storetest

import (
	"context"
	"errors"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"

	"ordersaga/consumers"
	"ordersaga/events"
)

// Tx is what a store's transaction must offer.
type Tx interface {
	consumers.Tx
	consumers.DeadTx
}

// Store is a store under test, empty at first.
type Store[T Tx] struct {
	consumers.Store[T]
	Reader consumers.DeadReader
	// Forwarded answers the raw records that committed transactions have forwarded since the last call, in order.
	Forwarded func() []events.Raw
}

const group = events.GroupOrderCommands

var delays = []time.Duration{5 * time.Second, 30 * time.Second}

// Run runs the suite; open makes a store for each test.
func Run[T Tx](t *testing.T, open func(t *testing.T) Store[T]) {
	t.Helper()
	for name, test := range map[string]func(*suite[T]){
		"InboxKeepsStatesByGroup":           (*suite[T]).inboxKeepsStates,
		"F5_OneOfTwoClaimsStartsOver":       (*suite[T]).oneClaim,
		"F8_RollbackLeavesNothing":          (*suite[T]).rollback,
		"DeadLetterKeepsItsIdentity":        (*suite[T]).deadLetterKeeps,
		"ReplayingIsResolvedAndNothingElse": (*suite[T]).resolve,
		"DeadLettersAreFilteredAndPaged":    (*suite[T]).pages,
		"F16_OperationGoesOnWhereItStopped": (*suite[T]).operation,
		"F15_ReplayThroughTheRuntime":       (*suite[T]).replay,
		"F14_ReplayAfterTheInboxForgot":     (*suite[T]).lateReplay,
		"F26_HostileTextIsKept":             (*suite[T]).hostile,
	} {
		t.Run(name, func(t *testing.T) { test(&suite[T]{t, open(t)}) })
	}
}

type suite[T Tx] struct {
	*testing.T
	s Store[T]
}

func (s *suite[T]) tx(fn func(ctx context.Context, tx T) error) {
	s.Helper()
	require.NoError(s, s.s.InTx(s.Context(), fn))
}

// inbox reads rows, in the only way there is.
func (s *suite[T]) inbox(g events.Group, ids ...uuid.UUID) (rows map[uuid.UUID]consumers.InboxRow) {
	s.Helper()
	s.tx(func(ctx context.Context, tx T) (err error) {
		rows, err = tx.Inbox(ctx, g, sorted(ids))
		return err
	})
	return rows
}

func sorted(ids []uuid.UUID) []uuid.UUID {
	ids = slices.Clone(ids)
	slices.SortFunc(ids, func(a, b uuid.UUID) int { return slices.Compare(a[:], b[:]) })
	return ids
}

func (s *suite[T]) inboxKeepsStates() {
	states := []consumers.InboxState{
		consumers.InboxHandled, consumers.InboxWaiting, consumers.InboxParked, consumers.InboxDead, consumers.InboxReplaying, consumers.InboxDiscarded,
	}
	ids := make([]uuid.UUID, 0, len(states)+1)
	for range states {
		ids = append(ids, events.NewID())
	}
	foreign := events.Identity(&events.Record{Topic: "t", Offset: 7}) // not a UUIDv7
	ids = append(ids, foreign)
	write := func(ticket int64, fresh bool) {
		s.tx(func(ctx context.Context, tx T) error {
			rows, err := tx.Inbox(ctx, group, sorted(ids))
			if err != nil {
				return err
			}
			if fresh == (len(rows) > 0) {
				return errors.New("rows where there should be none, or none where there should be")
			}
			var out []consumers.InboxRow
			for i, id := range ids {
				out = append(out, consumers.InboxRow{MessageID: id, State: states[i%len(states)], Ticket: ticket + int64(i), Hash: -int64(i), New: fresh})
			}
			return tx.SaveInbox(ctx, group, out)
		})
		rows := s.inbox(group, append(ids, events.NewID())...)
		require.Len(s, rows, len(ids))
		for i, id := range ids {
			require.Equal(s, consumers.InboxRow{MessageID: id, State: states[i%len(states)], Ticket: ticket + int64(i), Hash: -int64(i)}, rows[id])
		}
	}
	write(1<<40, true)
	write(1<<60, false)
	require.Empty(s, s.inbox(events.GroupStock, ids...), "another group knows nothing of them")
}

// oneClaim has two transactions that both find no row, before either commits.
func (s *suite[T]) oneClaim() {
	id := events.NewID()
	var both sync.WaitGroup
	both.Add(2)
	var mu sync.Mutex
	acted, refused := 0, 0
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() {
			first := true
			claimed := false
			err := s.s.InTx(s.Context(), func(ctx context.Context, tx T) error {
				rows, err := tx.Inbox(ctx, group, []uuid.UUID{id})
				if err != nil {
					return err
				}
				if first {
					first = false
					both.Done()
					both.Wait()
				}
				if _, claimed = rows[id]; claimed {
					return nil
				}
				return tx.SaveInbox(ctx, group, []consumers.InboxRow{{MessageID: id, State: consumers.InboxHandled, New: true}})
			})
			mu.Lock()
			defer mu.Unlock()
			switch {
			case err != nil:
				s.Error(err)
			case claimed:
				refused++
			default:
				acted++
			}
		})
	}
	wg.Wait()
	require.Equal(s, 1, acted)
	require.Equal(s, 1, refused)
}

func letter(n int) consumers.DeadLetter {
	at := time.Date(2026, 11, 24, 12, 0, n, 0, time.UTC)
	return consumers.DeadLetter{
		ID: events.NewID(), Group: group, MessageID: events.NewID(), Origin: consumers.Place{Topic: events.TopicCommands, Partition: 3, Offset: int64(n)},
		Type: "PlaceOrder", OrderID: uuid.Must(uuid.NewV7()), Status: consumers.DeadOpen, Class: consumers.ClassPoison, Error: "no such product", Fingerprint: "f1",
		Attempts: 1, FirstFailed: at, LastFailed: at, Key: []byte{0, 1, 255}, Value: []byte(`{"a":"\u0000"}`),
		Headers: []events.Header{{Key: "ce_id", Value: []byte("1")}, {Key: "empty", Value: []byte{}}}, Ticket: int64(n) + 1,
	}
}

func (s *suite[T]) save(dead ...consumers.DeadLetter) {
	s.Helper()
	s.tx(func(ctx context.Context, tx T) error { return tx.SaveDeadLetters(ctx, dead) })
}

func (s *suite[T]) get(id uuid.UUID) *consumers.DeadLetter {
	s.Helper()
	d, err := s.s.Reader.DeadLetter(s.Context(), id)
	require.NoError(s, err)
	return d
}

func (s *suite[T]) rollback() {
	d, id := letter(1), events.NewID()
	failed := errors.New("failed at the end")
	err := s.s.InTx(s.Context(), func(ctx context.Context, tx T) error {
		_, err := tx.Inbox(ctx, group, []uuid.UUID{id})
		return errors.Join(err,
			tx.SaveInbox(ctx, group, []consumers.InboxRow{{MessageID: id, State: consumers.InboxDead, Ticket: 1, New: true}}),
			tx.SaveDeadLetters(ctx, []consumers.DeadLetter{d}),
			tx.Forward(ctx, []events.Raw{{Topic: events.DLQTopic(group), Key: []byte("k"), Value: []byte("v")}}),
			tx.InsertOperation(ctx, consumers.Operation{ID: id, Action: consumers.ActionReplay, Actor: "a", Items: 1}, []uuid.UUID{d.ID}),
			failed,
		)
	})
	require.ErrorIs(s, err, failed)
	require.Empty(s, s.inbox(group, id))
	require.Nil(s, s.get(d.ID))
	require.Empty(s, s.s.Forwarded())
	op, _, err := s.s.Reader.Operation(s.Context(), id)
	require.NoError(s, err)
	require.Nil(s, op)
}

func (s *suite[T]) deadLetterKeeps() {
	d := letter(1)
	s.save(d)
	got := s.get(d.ID)
	require.NotNil(s, got)
	same := func(want, got consumers.DeadLetter) {
		s.Helper()
		require.True(s, want.FirstFailed.Equal(got.FirstFailed) && want.LastFailed.Equal(got.LastFailed))
		got.FirstFailed, got.LastFailed = want.FirstFailed, want.LastFailed
		require.Equal(s, want, got)
	}
	same(d, *got)
	s.tx(func(ctx context.Context, tx T) error {
		locked, err := tx.LockDead(ctx, sorted([]uuid.UUID{d.ID, events.NewID()}))
		if err != nil {
			return err
		}
		if len(locked) != 1 {
			return errors.New("ids that have no dead letter are left out")
		}
		l := *locked[d.ID]
		l.Status, l.Owner, l.Note, l.Ticket = consumers.DeadReplaying, "ann", "again", 99
		return tx.UpdateDead(ctx, []consumers.DeadLetter{l})
	})
	d.Status, d.Owner, d.Note, d.Ticket = consumers.DeadReplaying, "ann", "again", 99
	same(d, *s.get(d.ID))

	again := d
	again.ID, again.Owner, again.Note, again.Status = events.NewID(), "", "", consumers.DeadOpen
	again.Class, again.Error, again.Fingerprint, again.Attempts, again.Ticket = consumers.ClassExhausted, "timeout", "f2", 6, 100
	again.FirstFailed, again.LastFailed = d.FirstFailed.Add(time.Hour), d.LastFailed.Add(2*time.Hour)
	s.save(again)
	require.Nil(s, s.get(again.ID), "one message of a group has one dead letter")
	again.ID, again.Owner, again.Note, again.FirstFailed = d.ID, "ann", "again", d.FirstFailed
	same(again, *s.get(d.ID))

	other := d
	other.ID, other.Group, other.Status, other.Owner, other.Note = events.NewID(), events.GroupStock, consumers.DeadOpen, "", ""
	s.save(other)
	require.NotNil(s, s.get(other.ID), "another group's is another one")
}

func (s *suite[T]) status(id uuid.UUID) consumers.DeadStatus {
	s.Helper()
	d := s.get(id)
	require.NotNil(s, d)
	return d.Status
}

func (s *suite[T]) resolve() {
	open, replaying, stranger := letter(1), letter(2), letter(3)
	stranger.Group = events.GroupStock
	s.save(open, replaying, stranger)
	s.tx(func(ctx context.Context, tx T) error {
		ids := sorted([]uuid.UUID{replaying.ID, stranger.ID})
		locked, err := tx.LockDead(ctx, ids)
		if err != nil {
			return err
		}
		var out []consumers.DeadLetter
		for _, id := range ids {
			locked[id].Status = consumers.DeadReplaying
			out = append(out, *locked[id])
		}
		return tx.UpdateDead(ctx, out)
	})
	s.tx(func(ctx context.Context, tx T) error {
		return tx.ResolveDeadLetters(ctx, group, sorted([]uuid.UUID{open.MessageID, replaying.MessageID, stranger.MessageID, events.NewID()}))
	})
	require.Equal(s, consumers.DeadOpen, s.status(open.ID))
	require.Equal(s, consumers.DeadResolved, s.status(replaying.ID))
	require.Equal(s, consumers.DeadReplaying, s.status(stranger.ID))
}

func (s *suite[T]) pages() {
	var all []consumers.DeadLetter
	for i := range 7 {
		d := letter(i)
		if i%2 == 1 {
			d.Class, d.Type, d.Fingerprint = consumers.ClassExhausted, "CancelOrder", "f2"
		}
		all = append(all, d)
	}
	s.save(all...)
	list := func(f consumers.DeadFilter, limit int) (ids []uuid.UUID) {
		s.Helper()
		cursor := ""
		for range 10 {
			page, next, err := s.s.Reader.DeadLetters(s.Context(), f, cursor, limit)
			require.NoError(s, err)
			require.LessOrEqual(s, len(page), limit)
			for i := range page {
				ids = append(ids, page[i].ID)
			}
			if cursor = next; cursor == "" {
				return ids
			}
		}
		s.Fatal("the last page has no cursor")
		return nil
	}
	of := func(numbers ...int) (ids []uuid.UUID) {
		for _, n := range numbers {
			ids = append(ids, all[n].ID)
		}
		return ids
	}
	require.Equal(s, of(6, 5, 4, 3, 2, 1, 0), list(consumers.DeadFilter{}, 3))
	require.Equal(s, of(5, 3, 1), list(consumers.DeadFilter{Class: consumers.ClassExhausted}, 2))
	require.Equal(s, of(5, 3, 1), list(consumers.DeadFilter{Type: "CancelOrder", Status: consumers.DeadOpen, Group: group}, 100))
	require.Equal(s, of(6, 4, 2, 0), list(consumers.DeadFilter{Fingerprint: "f1"}, 4))
	require.Equal(s, of(2), list(consumers.DeadFilter{OrderID: all[2].OrderID}, 10))
	require.Equal(s, of(4, 3, 2), list(consumers.DeadFilter{FailedSince: all[2].LastFailed, FailedUntil: all[5].LastFailed}, 10))
	require.Empty(s, list(consumers.DeadFilter{Group: events.GroupPayment}, 10))
	require.Empty(s, list(consumers.DeadFilter{Status: consumers.DeadDiscarded}, 10))
	s.tx(func(ctx context.Context, tx T) error {
		ids, err := tx.SelectDead(ctx, consumers.DeadFilter{Class: consumers.ClassExhausted}, 2)
		if err == nil && !slices.Equal(ids, of(1, 3)) {
			return errors.New("a selection is the oldest first, up to its limit")
		}
		return err
	})
}

func (s *suite[T]) operation() {
	op := consumers.Operation{ID: events.NewID(), Action: consumers.ActionDiscard, Actor: "ann", Note: "why", Items: 5}
	items := make([]uuid.UUID, op.Items)
	for i := range items {
		items[i] = uuid.New() // in no order, and unknown ones
	}
	s.tx(func(ctx context.Context, tx T) error { return tx.InsertOperation(ctx, op, items) })
	pending := func(limit int) (ids []uuid.UUID) {
		s.tx(func(ctx context.Context, tx T) error {
			locked, err := tx.LockOperation(ctx, op.ID)
			if err != nil {
				return err
			}
			if locked == nil || *locked != op {
				return errors.New("the operation is not as it was stored")
			}
			ids, err = tx.PendingItems(ctx, op.ID, limit)
			return err
		})
		return ids
	}
	unfinished := func(untouched time.Duration) []uuid.UUID {
		ids, err := s.s.Reader.OpenOperations(s.Context(), untouched, 10)
		require.NoError(s, err)
		return ids
	}
	require.Equal(s, items[:2], pending(2))
	require.Equal(s, items, pending(100))
	require.Equal(s, []uuid.UUID{op.ID}, unfinished(0))
	require.Empty(s, unfinished(time.Hour), "it was touched just now")
	results := []consumers.ItemResult{{ID: items[1], Error: "there is none"}, {ID: items[0], Outcome: "discarded"}}
	s.tx(func(ctx context.Context, tx T) error { return tx.SaveItems(ctx, op.ID, results) })
	require.Equal(s, items[2:], pending(100))
	got, sofar, err := s.s.Reader.Operation(s.Context(), op.ID)
	require.NoError(s, err)
	require.Equal(s, op, *got)
	require.Equal(s, []consumers.ItemResult{results[1], results[0]}, sofar)
	var rest []consumers.ItemResult
	for _, id := range items[2:] {
		rest = append(rest, consumers.ItemResult{ID: id, Outcome: "discarded"})
	}
	s.tx(func(ctx context.Context, tx T) error {
		return errors.Join(tx.SaveItems(ctx, op.ID, rest), tx.RecordActions(ctx, []consumers.OperatorAction{{Actor: "ann", Action: "dlq.discard", Target: "t", Detail: "{}"}}))
	})
	require.Empty(s, pending(10))
	require.Empty(s, unfinished(0))
	s.tx(func(ctx context.Context, tx T) error {
		locked, err := tx.LockOperation(ctx, events.NewID())
		if err == nil && locked != nil {
			return errors.New("an operation that nobody stored")
		}
		return err
	})
}

// handler fails what it is told to and counts the rest. It has no effects of its own: the inbox is what is tested.
type handler[T Tx] struct {
	mu   sync.Mutex
	fail error
	done map[uuid.UUID]int
}

func (h *handler[T]) Prepare(context.Context, []*consumers.Delivery) (consumers.Apply[T], error) {
	return func(_ context.Context, _ T, batch []*consumers.Delivery) ([]consumers.Result, error) {
		h.mu.Lock()
		defer h.mu.Unlock()
		out := make([]consumers.Result, len(batch))
		for i, d := range batch {
			if out[i].Err = h.fail; h.fail == nil {
				h.done[d.ID]++
			}
		}
		return out, nil
	}, nil
}

type poison struct{}

func (poison) Error() string { return "no such product" }
func (poison) Poison() bool  { return true }

// runtime makes a group, the operators, and a record that is dead already.
func (s *suite[T]) runtime() (*consumers.Group[T], *handler[T], *consumers.Operators[T], events.Record, uuid.UUID) {
	s.Helper()
	h := &handler[T]{done: map[uuid.UUID]int{}, fail: poison{}}
	g, err := consumers.NewGroup[T](consumers.GroupConfig{Name: group, Topic: events.TopicCommands, Policy: consumers.Policy{Delays: delays}}, s.s.Store, h)
	require.NoError(s, err)
	ops, err := consumers.NewOperators[T](s.s.Store, s.s.Reader, consumers.OperatorsConfig{Delays: delays})
	require.NoError(s, err)
	order := uuid.Must(uuid.NewV7())
	e := events.Envelope{ID: events.NewID(), Type: events.TCancelOrder, OrderID: order, Data: &events.CancelOrder{OrderID: order.String()}}
	value, err := events.Encode(e)
	require.NoError(s, err)
	rec := events.Record{Topic: events.TopicCommands, Partition: 1, Offset: 5, Key: []byte(order.String()), Value: value, Headers: events.HeadersOf(e)}
	s.handle(g, rec)
	page, _, err := s.s.Reader.DeadLetters(s.Context(), consumers.DeadFilter{}, "", 10)
	require.NoError(s, err)
	require.Len(s, page, 1)
	require.Len(s, s.copies(events.DLQTopic(group)), 1)
	h.fail = nil
	return g, h, ops, rec, page[0].ID
}

func (s *suite[T]) handle(g *consumers.Group[T], recs ...events.Record) {
	s.Helper()
	settled, err := g.Handle(s.Context(), recs)
	require.NoError(s, err)
	require.NotContains(s, settled, false)
}

func (s *suite[T]) copies(topic events.Topic) (out []events.Record) {
	s.Helper()
	for _, r := range s.s.Forwarded() {
		require.Equal(s, topic, r.Topic)
		out = append(out, events.Record{Topic: r.Topic, Offset: int64(len(out)), Key: r.Key, Value: r.Value, Headers: r.Headers})
	}
	return out
}

func (s *suite[T]) do(ops *consumers.Operators[T], id uuid.UUID) consumers.ItemResult {
	s.Helper()
	_, results, err := ops.Do(s.Context(), consumers.Request{Action: consumers.ActionReplay, Actor: "ann", IDs: []uuid.UUID{id}})
	require.NoError(s, err)
	require.Len(s, results, 1)
	return results[0]
}

func (s *suite[T]) replay() {
	g, h, ops, rec, dead := s.runtime()
	require.Equal(s, "replaying", s.do(ops, dead).Outcome)
	require.Equal(s, "it is being replayed already", s.do(ops, dead).Error)
	first := s.copies(events.RetryTopic(group, delays[0]))
	require.Len(s, first, 1)
	s.handle(g, rec) // redelivered
	require.Empty(s, h.done)

	h.fail = errors.New("timeout") // it fails: the tiers begin anew, and the same dead letter is opened again
	next := first
	for _, d := range delays {
		s.handle(g, next...)
		require.Equal(s, consumers.DeadReplaying, s.status(dead))
		next = s.copies(events.RetryTopic(group, d))
		require.Len(s, next, 1)
	}
	s.handle(g, next...)
	require.Len(s, s.copies(events.DLQTopic(group)), 1)
	require.Equal(s, consumers.DeadOpen, s.status(dead))
	require.Equal(s, 4, s.get(dead).Attempts)

	h.fail = nil
	s.handle(g, first...) // a copy of before
	require.Empty(s, h.done)
	require.Equal(s, "replaying", s.do(ops, dead).Outcome)
	second := s.copies(events.RetryTopic(group, delays[0]))
	var wg sync.WaitGroup
	for range 2 { // the relay repeated it, and two members have it
		wg.Go(func() {
			if settled, err := g.Handle(s.Context(), second); err != nil || slices.Contains(settled, false) {
				s.Errorf("unsettled: %v", err)
			}
		})
	}
	wg.Wait()
	s.handle(g, second...)
	s.handle(g, rec)
	require.Equal(s, consumers.DeadResolved, s.status(dead))
	for _, n := range h.done {
		require.LessOrEqual(s, n, 2) // how often the handler was asked in transactions that may have started over
	}
	require.Equal(s, consumers.InboxHandled, s.inbox(group, events.Identity(&rec))[events.Identity(&rec)].State)
	require.Contains(s, s.do(ops, dead).Error, "resolved")
}

// lateReplay replays a dead letter whose inbox row is not there any more: dead letters are kept longer.
func (s *suite[T]) lateReplay() {
	d := letter(1)
	order := uuid.Must(uuid.NewV7())
	e := events.Envelope{ID: events.NewID(), Type: events.TCancelOrder, OrderID: order, Data: &events.CancelOrder{OrderID: order.String()}}
	value, err := events.Encode(e)
	require.NoError(s, err)
	d.MessageID, d.OrderID, d.Key, d.Value, d.Headers = e.ID, order, []byte(order.String()), value, events.HeadersOf(e)
	s.save(d)
	h := &handler[T]{done: map[uuid.UUID]int{}}
	g, err := consumers.NewGroup[T](consumers.GroupConfig{Name: group, Topic: events.TopicCommands, Policy: consumers.Policy{Delays: delays}}, s.s.Store, h)
	require.NoError(s, err)
	ops, err := consumers.NewOperators[T](s.s.Store, s.s.Reader, consumers.OperatorsConfig{Delays: delays})
	require.NoError(s, err)
	require.Equal(s, "replaying", s.do(ops, d.ID).Outcome)
	copies := s.copies(events.RetryTopic(group, delays[0]))
	s.handle(g, copies...)
	s.handle(g, copies...)
	s.handle(g, events.Record{Topic: events.TopicCommands, Offset: 9, Key: d.Key, Value: d.Value, Headers: d.Headers})
	require.Equal(s, map[uuid.UUID]int{e.ID: 1}, h.done)
	require.Equal(s, consumers.DeadResolved, s.status(d.ID))
}

// hostile sends bytes that a text column does not take through the whole of it.
func (s *suite[T]) hostile() {
	g, _, ops, _, _ := s.runtime()
	rec := events.Record{
		Topic: events.TopicCommands, Partition: 1, Offset: 6, Key: []byte("\x00\xff"), Value: []byte("\x00\xff{"),
		Headers: []events.Header{{Key: "ce_type", Value: []byte("x\x00\xffy\r\n")}, {Key: "a\x00\xff", Value: nil}, {Key: events.HeaderContentType, Value: []byte("\x1b[31m")}},
	}
	s.handle(g, rec)
	for next := s.copies(events.RetryTopic(group, delays[0])); len(next) > 0; { // its type may be a newer version's
		s.handle(g, next...)
		next = nil
		for _, r := range s.s.Forwarded() {
			if r.Topic != events.DLQTopic(group) {
				next = append(next, events.Record{Topic: r.Topic, Key: r.Key, Value: r.Value, Headers: r.Headers})
			}
		}
	}
	page, _, err := s.s.Reader.DeadLetters(s.Context(), consumers.DeadFilter{Class: consumers.ClassExhausted}, "", 10)
	require.NoError(s, err)
	require.Len(s, page, 1)
	require.Equal(s, rec.Value, page[0].Value)
	require.Equal(s, rec.Key, page[0].Key)
	require.Len(s, page[0].Headers, len(rec.Headers))
	_, results, err := ops.Do(s.Context(), consumers.Request{
		Action: consumers.ActionDiscard, Actor: "a\x00\xffb", Note: "c\x00\xff\nd", IDs: []uuid.UUID{page[0].ID},
	})
	require.NoError(s, err)
	require.Equal(s, "discarded", results[0].Outcome)
}
