// Package sagatest is a store in memory for tests of the coordinator, the use cases and the steps: the same ports that Postgres
// satisfies, with transactions that conflict.
//
// It owns nothing outside the process. It promises serialisable transactions: what a transaction read or locked and another one wrote
// before it committed makes it start over, as a deadlock or a unique violation does in Postgres, and a transaction that fails leaves
// no trace. A row that is written without having been locked is an error, so that a test finds a step which forgets its lock.
package sagatest

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"ordersaga/domain"
	"ordersaga/events"
	"ordersaga/saga"
)

// attempts bounds how often a transaction starts over.
const attempts = 1000

type key struct {
	table string
	id    any
}

type row struct {
	version int64
	value   any // never changed in place
}

// Store is a database in memory.
type Store struct {
	// Now is the database's clock.
	Now saga.Clock
	// BeforeCommit, when set, may fail a transaction that is about to commit, or hold it to let another one in between.
	BeforeCommit func(*Tx) error
	// AfterCommit, when set, may answer an error for a transaction that did commit: its connection broke at that moment.
	AfterCommit func() error

	mu      sync.Mutex
	rows    map[key]row
	version int64
	outbox  []events.Envelope
	history []saga.HistoryEntry
	audit   []saga.AuditEntry
	commits int
}

// NewStore makes an empty store.
func NewStore(now saga.Clock) *Store { return &Store{Now: now, rows: map[key]row{}} }

// DataError is what Postgres answers with SQLSTATE 22 or 23.
type DataError struct{ Msg string }

func (e *DataError) Error() string { return e.Msg }

// DataError tells that the data was at fault.
func (e *DataError) DataError() bool { return true }

var errConflict = errors.New("another transaction was first")

// Tx is a transaction. It satisfies the ports of saga and of consumers/steps.
type Tx struct {
	s       *Store
	reads   map[key]int64
	locked  map[key]bool
	writes  map[key]any
	outbox  []events.Envelope
	history []saga.HistoryEntry
	audit   []saga.AuditEntry
	broken  bool

	presumed bool // that keys and orders are new: what is inserted and there nevertheless is a conflict
}

// InTx runs fn in a transaction, again while others are first.
func (s *Store) InTx(ctx context.Context, fn func(ctx context.Context, tx *Tx) error) error {
	for range attempts {
		if err := ctx.Err(); err != nil {
			return err
		}
		tx := &Tx{s: s, reads: map[key]int64{}, locked: map[key]bool{}, writes: map[key]any{}}
		err := fn(ctx, tx)
		if err == nil && s.BeforeCommit != nil {
			err = s.BeforeCommit(tx)
		}
		if err == nil {
			err = tx.commit()
		}
		if tx.broken || errors.Is(err, errConflict) {
			continue
		}
		if err == nil && s.AfterCommit != nil {
			err = s.AfterCommit()
		}
		return err
	}
	return fmt.Errorf("a transaction started over %d times", attempts)
}

func (tx *Tx) commit() error {
	tx.s.mu.Lock()
	defer tx.s.mu.Unlock()
	for k, v := range tx.reads {
		if tx.s.rows[k].version != v {
			return errConflict
		}
	}
	for k, v := range tx.writes {
		tx.s.version++
		tx.s.rows[k] = row{tx.s.version, v}
	}
	for i := range tx.history {
		tx.history[i].At = tx.s.Now()
	}
	tx.s.outbox = append(tx.s.outbox, tx.outbox...)
	tx.s.history = append(tx.s.history, tx.history...)
	tx.s.audit = append(tx.s.audit, tx.audit...)
	tx.s.commits++
	return nil
}

// read answers a row as this transaction sees it: its own writes first.
func read[V any](tx *Tx, table string, id any) (v V, ok bool) {
	k := key{table, id}
	w, ok := tx.writes[k]
	if !ok {
		tx.s.mu.Lock()
		r := tx.s.rows[k]
		tx.s.mu.Unlock()
		if seen, again := tx.reads[k]; again && seen != r.version {
			tx.broken = true // not repeatable: it would conflict at the commit anyway
		} else {
			tx.reads[k] = r.version
		}
		w = r.value
	}
	v, ok = w.(V)
	return v, ok
}

func lock[V any](tx *Tx, table string, id any) (v V, ok bool) {
	v, ok = read[V](tx, table, id)
	tx.locked[key{table, id}] = true
	return v, ok
}

func (tx *Tx) write(table string, id, v any) { tx.writes[key{table, id}] = v }

// insert refuses a row that is there: it starts the transaction over when the row appeared since it was looked for, and is a data
// error when it had been there all along.
func (tx *Tx) insert(table string, id, v any) error {
	k := key{table, id}
	if _, own := tx.writes[k]; own {
		return &DataError{fmt.Sprintf("duplicate key %v in %s", id, table)}
	}
	tx.s.mu.Lock()
	r := tx.s.rows[k]
	tx.s.mu.Unlock()
	seen, looked := tx.reads[k]
	switch {
	case r.value == nil:
		tx.reads[k] = r.version
	case looked && seen != r.version, tx.presumed:
		return errConflict
	default:
		return &DataError{fmt.Sprintf("duplicate key %v in %s", id, table)}
	}
	tx.write(table, id, v)
	return nil
}

func (tx *Tx) update(table string, id, v any) error {
	if !tx.locked[key{table, id}] {
		return fmt.Errorf("row %v of %s is written without a lock", id, table)
	}
	tx.write(table, id, v)
	return nil
}

func sorted[K any](ids []K, compare func(a, b K) int) error {
	for i := 1; i < len(ids); i++ {
		if compare(ids[i-1], ids[i]) >= 0 {
			return fmt.Errorf("ids are not sorted, or not unique: %v before %v", ids[i-1], ids[i])
		}
	}
	return nil
}

// Emit puts messages into the outbox.
func (tx *Tx) Emit(_ context.Context, out []events.Envelope) error {
	tx.outbox = append(tx.outbox, out...)
	return nil
}

// Emitted is what the transaction has emitted so far.
func (tx *Tx) Emitted() []events.Envelope { return tx.outbox }

// TakeOutbox answers what committed transactions emitted since the last call, in the order of their commits.
func (s *Store) TakeOutbox() []events.Envelope {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := s.outbox
	s.outbox = nil
	return out
}

// Commits counts the transactions that committed.
func (s *Store) Commits() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.commits
}

// each answers the rows of a table.
func each[V any](s *Store, table string) map[any]V {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := map[any]V{}
	for k, r := range s.rows {
		if v, ok := r.value.(V); ok && k.table == table {
			out[k.id] = v
		}
	}
	return out
}

func one[V any](s *Store, table string, id any) (V, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	v, ok := s.rows[key{table, id}].value.(V)
	return v, ok
}

// put writes a row outside any transaction of the code under test.
func (s *Store) put(table string, id, v any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.version++
	s.rows[key{table, id}] = row{s.version, v}
}

// ExpireDeadline makes a saga's deadline due now, if it has one.
func (s *Store) ExpireDeadline(order domain.OrderID) {
	if r, ok := one[sagaRow](s, tableSagas, order); ok && !r.deadline.IsZero() {
		r.deadline = s.Now().Add(-time.Nanosecond)
		s.put(tableSagas, order, r)
	}
}
