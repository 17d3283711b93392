package postgres

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"

	"ordersaga/consumers"
	"ordersaga/domain"
	"ordersaga/events"
)

func deadLetter(i int) consumers.DeadLetter {
	now := time.Now().UTC().Truncate(time.Microsecond)
	return consumers.DeadLetter{
		ID: events.NewID(), Group: "stock", MessageID: events.NewID(), Origin: consumers.Place{Topic: events.TopicStock, Partition: 3, Offset: int64(i)},
		Type: "ReserveStock", OrderID: uuid.UUID(domain.NewOrderID()), Class: "poison", Error: fmt.Sprintf("number %d is wrong", i), Fingerprint: "fp",
		Attempts: 1, FirstFailed: now, LastFailed: now, Key: []byte("k"), Value: []byte{0, 1, 0xff},
		Headers: []events.Header{{Key: "a", Value: []byte{0, 0xff}}, {Key: "", Value: []byte{}}}, Status: consumers.DeadOpen, Ticket: 5,
	}
}

func saveDeadLetters(tb testing.TB, db *DB, ds ...consumers.DeadLetter) {
	tb.Helper()
	inTx(tb, db, func(ctx context.Context, tx *Tx) error { return tx.SaveDeadLetters(ctx, ds) })
}

func getDead(tb testing.TB, db *DB, id uuid.UUID) *consumers.DeadLetter {
	tb.Helper()
	d, err := db.DeadLetter(tb.Context(), id)
	require.NoError(tb, err)
	if d != nil {
		d.FirstFailed, d.LastFailed = d.FirstFailed.UTC(), d.LastFailed.UTC()
	}
	return d
}

func TestDeadLettersKeepWhatCame(t *testing.T) {
	db := newDB(t)
	d := deadLetter(1)
	saveDeadLetters(t, db, d)
	require.Equal(t, &d, getDead(t, db, d.ID))
	require.Nil(t, getDead(t, db, uuid.New()))

	hostile := deadLetter(2)
	hostile.Type, hostile.Error, hostile.OrderID, hostile.Key, hostile.Headers = "ev\x00il\xff", "\x00", uuid.Nil, nil, nil
	saveDeadLetters(t, db, hostile)
	got := getDead(t, db, hostile.ID)
	require.Equal(t, "evil\uFFFD", got.Type, "what can't be stored as text must not keep the letter from being stored")
	require.Equal(t, uuid.Nil, got.OrderID)

	// the same message again: opened again, id, first failure, owner and note kept, once though it is twice in the batch
	inTx(t, db, func(ctx context.Context, tx *Tx) error {
		locked, err := tx.LockDead(ctx, []uuid.UUID{d.ID, uuid.New()})
		if err != nil {
			return err
		}
		require.Len(t, locked, 1)
		l := *locked[d.ID]
		l.Status, l.Owner, l.Note, l.Ticket = consumers.DeadReplaying, "olga", "tried again", 6
		return tx.UpdateDead(ctx, []consumers.DeadLetter{l})
	})
	again := d
	again.ID, again.Attempts, again.LastFailed, again.FirstFailed, again.Error, again.Value = events.NewID(), 7, d.LastFailed.Add(time.Minute), d.LastFailed.Add(time.Minute), "worse", []byte("x")
	earlier := again
	earlier.Attempts = 6
	saveDeadLetters(t, db, earlier, again)
	want := d
	want.Attempts, want.LastFailed, want.Error, want.Owner, want.Note = 7, again.LastFailed, "worse", "olga", "tried again"
	require.Equal(t, &want, getDead(t, db, d.ID))
	require.Equal(t, 2, one[int](t, db, `SELECT count(*) FROM dead_letters`))

	inTx(t, db, func(ctx context.Context, tx *Tx) error {
		return tx.ResolveDeadLetters(ctx, "stock", []uuid.UUID{d.MessageID})
	})
	require.Equal(t, consumers.DeadOpen, getDead(t, db, d.ID).Status, "only what is being replayed is resolved")
	rawExec(t, db, `UPDATE dead_letters SET status = 'replaying'`)
	inTx(t, db, func(ctx context.Context, tx *Tx) error {
		return errors.Join(tx.ResolveDeadLetters(ctx, "payment", []uuid.UUID{d.MessageID}), tx.ResolveDeadLetters(ctx, "stock", []uuid.UUID{d.MessageID}))
	})
	require.Equal(t, consumers.DeadResolved, getDead(t, db, d.ID).Status)
	counts, err := db.CountDead(t.Context())
	require.NoError(t, err)
	require.Equal(t, map[string]int64{"resolved": 1, "replaying": 1}, counts)
}

func TestDeadLettersAreListedByEveryFilter(t *testing.T) {
	db := newDB(t)
	var ds []consumers.DeadLetter
	for i := range 7 {
		d := deadLetter(i)
		switch i {
		case 1:
			d.Group = "payment"
		case 2:
			d.Type = "CommitStock"
		case 3:
			d.Class = "exhausted"
		case 4:
			d.Fingerprint = "other"
		case 5:
			d.LastFailed = d.LastFailed.Add(-time.Hour)
		}
		ds = append(ds, d)
	}
	saveDeadLetters(t, db, ds...)
	list := func(f consumers.DeadFilter, limit int) (out []int) {
		cursor := ""
		for {
			page, next, err := db.DeadLetters(t.Context(), f, cursor, limit)
			require.NoError(t, err)
			for _, d := range page {
				out = append(out, int(d.Origin.Offset))
			}
			if cursor = next; next == "" {
				return out
			}
		}
	}
	require.Equal(t, []int{6, 5, 4, 3, 2, 1, 0}, list(consumers.DeadFilter{}, 3))
	require.Equal(t, []int{6, 5, 4, 3, 2, 1, 0}, list(consumers.DeadFilter{Status: consumers.DeadOpen}, 7))
	require.Empty(t, list(consumers.DeadFilter{Status: consumers.DeadResolved}, 3))
	require.Equal(t, []int{1}, list(consumers.DeadFilter{Group: "payment"}, 3))
	require.Equal(t, []int{2}, list(consumers.DeadFilter{Type: "CommitStock"}, 3))
	require.Equal(t, []int{3}, list(consumers.DeadFilter{Class: "exhausted"}, 3))
	require.Equal(t, []int{4}, list(consumers.DeadFilter{Fingerprint: "other"}, 3))
	require.Equal(t, []int{0}, list(consumers.DeadFilter{OrderID: ds[0].OrderID, Status: consumers.DeadOpen}, 3))
	require.Equal(t, []int{5}, list(consumers.DeadFilter{FailedUntil: time.Now().Add(-time.Minute)}, 3))
	require.Equal(t, []int{6, 4, 3, 2, 1, 0}, list(consumers.DeadFilter{FailedSince: time.Now().Add(-time.Minute)}, 3))
	require.Empty(t, list(consumers.DeadFilter{Type: "'; DROP TABLE dead_letters; --"}, 3))
	_, _, err := db.DeadLetters(t.Context(), consumers.DeadFilter{}, "2", 1)
	require.ErrorContains(t, err, "start without one")
	inTx(t, db, func(ctx context.Context, tx *Tx) error {
		ids, err := tx.SelectDead(ctx, consumers.DeadFilter{Group: "stock"}, 2)
		require.Equal(t, []uuid.UUID{ds[0].ID, ds[2].ID}, ids, "oldest first")
		return err
	})
}

// F16: an operation's selection is frozen; whoever comes after a death goes on where it stood.
func TestF16_OperationsSurviveTheirProcess(t *testing.T) {
	db := newDB(t)
	ids := []uuid.UUID{events.NewID(), events.NewID(), events.NewID()}
	op := consumers.Operation{ID: events.NewID(), Action: consumers.ActionReplay, Actor: "olga", Note: "n", Items: 3}
	inTx(t, db, func(ctx context.Context, tx *Tx) error {
		return errors.Join(tx.InsertOperation(ctx, op, ids),
			tx.InsertOperation(ctx, consumers.Operation{ID: events.NewID(), Action: consumers.ActionDiscard, Actor: "olga"}, nil),
			tx.RecordActions(ctx, []consumers.OperatorAction{{Actor: "olga", Action: "dlq.replay", Target: ids[0].String(), Detail: `{"n": 1}`}}))
	})
	open := func(untouched time.Duration) []uuid.UUID {
		out, err := db.OpenOperations(t.Context(), untouched, 10)
		require.NoError(t, err)
		return out
	}
	require.Equal(t, []uuid.UUID{op.ID}, open(0), "one without items has nothing to do")
	require.Empty(t, open(time.Minute))
	step := func(limit int) (pending []uuid.UUID) {
		inTx(t, db, func(ctx context.Context, tx *Tx) error {
			got, err := tx.LockOperation(ctx, op.ID)
			if err != nil {
				return err
			}
			require.Equal(t, &op, got)
			if pending, err = tx.PendingItems(ctx, op.ID, limit); err != nil {
				return err
			}
			results := make([]consumers.ItemResult, len(pending))
			for i, id := range pending {
				results[i] = consumers.ItemResult{ID: id, Outcome: "replaying"}
				if id == ids[1] {
					results[i] = consumers.ItemResult{ID: id, Error: "there is no such dead letter"}
				}
			}
			return tx.SaveItems(ctx, op.ID, results)
		})
		return pending
	}
	require.Equal(t, ids[:2], step(2))
	require.Equal(t, []uuid.UUID{op.ID}, open(0))
	require.Equal(t, ids[2:], step(2))
	require.Empty(t, step(2))
	require.Empty(t, open(0))
	got, results, err := db.Operation(t.Context(), op.ID)
	require.NoError(t, err)
	require.Equal(t, &op, got)
	require.Equal(t, []consumers.ItemResult{{ID: ids[0], Outcome: "replaying"}, {ID: ids[1], Error: "there is no such dead letter"}, {ID: ids[2], Outcome: "replaying"}}, results)
	got, _, err = db.Operation(t.Context(), uuid.New())
	require.NoError(t, err)
	require.Nil(t, got)
	inTx(t, db, func(ctx context.Context, tx *Tx) error {
		none, err := tx.LockOperation(ctx, uuid.New())
		require.Nil(t, none)
		return err
	})
	require.Equal(t, "olga", one[string](t, db, `SELECT actor FROM audit_log WHERE action = 'dlq.replay' AND detail = '{"n": 1}'`))
}
