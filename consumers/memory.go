package consumers

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/google/uuid"

	"ordersaga/events"
)

// Memory is a Store in memory, for tests of handlers and of what is built on the runtime. Transactions run side by side and are
// optimistic: one whose rows were changed by another meanwhile starts over, as it would after a serialisation failure. It keeps
// all that it is given until Drain takes it, and nothing survives the process.
type Memory struct {
	// Begin, if set, is asked before each transaction, and Commit before each commit; their error is the transaction's.
	Begin, Commit func() error

	mu      sync.Mutex
	version int64
	inbox   map[memoryKey]memoryRow
	dead    map[uuid.UUID]DeadLetter
	ops     map[uuid.UUID]*memoryOperation
	actions []OperatorAction
	out     []events.Envelope
	raw     []events.Raw
}

type memoryKey struct {
	group events.Group
	id    uuid.UUID
}

type memoryRow struct {
	InboxRow
	version int64
}

type memoryOperation struct {
	Operation
	ids     []uuid.UUID
	results map[uuid.UUID]ItemResult
	touched time.Time
}

// NewMemory makes an empty Memory.
func NewMemory() *Memory {
	return &Memory{inbox: map[memoryKey]memoryRow{}, dead: map[uuid.UUID]DeadLetter{}, ops: map[uuid.UUID]*memoryOperation{}}
}

// memoryTries bounds how often one transaction starts over.
const memoryTries = 1000

// InTx runs fn until nobody else has changed what it read.
func (m *Memory) InTx(ctx context.Context, fn func(ctx context.Context, tx *MemoryTx) error) error {
	for range memoryTries {
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("memory: %w", err)
		}
		if m.Begin != nil {
			if err := m.Begin(); err != nil {
				return err
			}
		}
		tx := &MemoryTx{m: m, read: map[memoryKey]int64{}, locked: map[uuid.UUID]DeadLetter{}}
		if err := fn(ctx, tx); err != nil {
			return err
		}
		if m.Commit != nil {
			if err := m.Commit(); err != nil {
				return err
			}
		}
		if tx.commit() {
			return nil
		}
	}
	return fmt.Errorf("memory: a transaction started over %d times", memoryTries)
}

// Drain answers what was emitted and forwarded since the last call, in the order of commits.
func (m *Memory) Drain() (out []events.Envelope, raw []events.Raw) {
	m.mu.Lock()
	defer m.mu.Unlock()
	out, raw, m.out, m.raw = m.out, m.raw, nil, nil
	return out, raw
}

// Row answers a message's inbox row.
func (m *Memory) Row(group events.Group, id uuid.UUID) (InboxRow, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	row, ok := m.inbox[memoryKey{group, id}]
	return row.InboxRow, ok
}

// Actions answers the operators' log.
func (m *Memory) Actions() []OperatorAction {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Clone(m.actions)
}

// DeadLetters is DeadReader's. The cursor is the last id of the page before.
func (m *Memory) DeadLetters(_ context.Context, f DeadFilter, cursor string, limit int) (page []DeadLetter, next string, err error) {
	var after uuid.UUID
	if cursor != "" {
		if after, err = uuid.Parse(cursor); err != nil {
			return nil, "", fmt.Errorf("memory: cursor %q: %w", cursor, err)
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, id := range slices.Backward(m.sorted()) {
		if d := m.dead[id]; f.matches(&d) && (cursor == "" || compareIDs(id, after) < 0) {
			if len(page) == limit {
				return page, page[limit-1].ID.String(), nil
			}
			page = append(page, d)
		}
	}
	return page, "", nil
}

// DeadLetter is DeadReader's.
func (m *Memory) DeadLetter(_ context.Context, id uuid.UUID) (*DeadLetter, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if d, ok := m.dead[id]; ok {
		return &d, nil
	}
	return nil, nil //nolint:nilnil // the port's "there is none"
}

// Operation is DeadReader's.
func (m *Memory) Operation(_ context.Context, id uuid.UUID) (*Operation, []ItemResult, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	op, ok := m.ops[id]
	if !ok {
		return nil, nil, nil
	}
	var results []ItemResult
	for _, item := range op.ids {
		if res, ok := op.results[item]; ok {
			results = append(results, res)
		}
	}
	return &op.Operation, results, nil
}

// OpenOperations is DeadReader's.
func (m *Memory) OpenOperations(_ context.Context, untouched time.Duration, limit int) ([]uuid.UUID, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	var ids []uuid.UUID
	for id, op := range m.ops {
		if len(op.results) < len(op.ids) && time.Since(op.touched) >= untouched {
			ids = append(ids, id)
		}
	}
	slices.SortFunc(ids, compareIDs)
	return ids[:min(limit, len(ids))], nil
}

func (m *Memory) sorted() []uuid.UUID { return slices.SortedFunc(maps.Keys(m.dead), compareIDs) }

func (f *DeadFilter) matches(d *DeadLetter) bool {
	return (f.Status == "" || f.Status == d.Status) && (f.Group == "" || f.Group == d.Group) && (f.Type == "" || f.Type == d.Type) &&
		(f.Class == "" || f.Class == d.Class) && (f.Fingerprint == "" || f.Fingerprint == d.Fingerprint) &&
		(f.OrderID == uuid.Nil || f.OrderID == d.OrderID) && (f.FailedSince.IsZero() || !d.LastFailed.Before(f.FailedSince)) &&
		(f.FailedUntil.IsZero() || d.LastFailed.Before(f.FailedUntil))
}

func compareIDs(a, b uuid.UUID) int { return bytes.Compare(a[:], b[:]) }

// MemoryTx is a transaction of a Memory: a Tx and a DeadTx.
type MemoryTx struct {
	m      *Memory
	read   map[memoryKey]int64 // version of each row read; 0 for one that was not there
	locked map[uuid.UUID]DeadLetter
	writes []func()
}

// OnCommit adds an effect of a handler: it takes place with the commit, or not at all. It must be short; only one runs at a time.
func (tx *MemoryTx) OnCommit(effect func()) { tx.writes = append(tx.writes, effect) }

func (tx *MemoryTx) commit() bool {
	tx.m.mu.Lock()
	defer tx.m.mu.Unlock()
	for key, version := range tx.read {
		if tx.m.inbox[key].version != version {
			return false
		}
	}
	for id, d := range tx.locked {
		now := tx.m.dead[id]
		if now.Status != d.Status || now.Ticket != d.Ticket {
			return false
		}
	}
	tx.m.version++
	for _, w := range tx.writes {
		w()
	}
	return true
}

// PresumeFirst is Tx's. There is no round trip to spare.
func (tx *MemoryTx) PresumeFirst(events.Group, []uuid.UUID) {}

// Inbox is Tx's.
func (tx *MemoryTx) Inbox(_ context.Context, group events.Group, ids []uuid.UUID) (map[uuid.UUID]InboxRow, error) {
	tx.m.mu.Lock()
	defer tx.m.mu.Unlock()
	rows := map[uuid.UUID]InboxRow{}
	for _, id := range ids {
		row, ok := tx.m.inbox[memoryKey{group, id}]
		tx.read[memoryKey{group, id}] = row.version
		if ok {
			rows[id] = row.InboxRow
		}
	}
	return rows, nil
}

// SaveInbox is Tx's.
func (tx *MemoryTx) SaveInbox(_ context.Context, group events.Group, rows []InboxRow) error {
	for _, row := range rows {
		key := memoryKey{group, row.MessageID}
		version, read := tx.read[key]
		if !read || row.New != (version == 0) {
			return fmt.Errorf("memory: row %s is saved with New=%t, but Inbox answered otherwise", row.MessageID, row.New)
		}
		row.New = false
		tx.OnCommit(func() { tx.m.inbox[key] = memoryRow{row, tx.m.version} })
	}
	return nil
}

// SaveDeadLetters is Tx's.
func (tx *MemoryTx) SaveDeadLetters(_ context.Context, dead []DeadLetter) error {
	for _, d := range dead {
		tx.OnCommit(func() {
			for _, old := range tx.m.dead {
				if old.Group == d.Group && old.MessageID == d.MessageID {
					d.ID, d.FirstFailed, d.Owner, d.Note = old.ID, old.FirstFailed, old.Owner, old.Note
				}
			}
			d.Status = DeadOpen
			tx.m.dead[d.ID] = d
		})
	}
	return nil
}

// ResolveDeadLetters is Tx's.
func (tx *MemoryTx) ResolveDeadLetters(_ context.Context, group events.Group, ids []uuid.UUID) error {
	tx.OnCommit(func() {
		for id, d := range tx.m.dead {
			if d.Group == group && d.Status == DeadReplaying && slices.Contains(ids, d.MessageID) {
				d.Status = DeadResolved
				tx.m.dead[id] = d
			}
		}
	})
	return nil
}

// Emit is Tx's.
func (tx *MemoryTx) Emit(_ context.Context, out []events.Envelope) error {
	tx.OnCommit(func() { tx.m.out = append(tx.m.out, out...) })
	return nil
}

// Forward is Tx's.
func (tx *MemoryTx) Forward(_ context.Context, out []events.Raw) error {
	tx.OnCommit(func() { tx.m.raw = append(tx.m.raw, out...) })
	return nil
}

// LockDead is DeadTx's.
func (tx *MemoryTx) LockDead(_ context.Context, ids []uuid.UUID) (map[uuid.UUID]*DeadLetter, error) {
	tx.m.mu.Lock()
	defer tx.m.mu.Unlock()
	found := map[uuid.UUID]*DeadLetter{}
	for _, id := range ids {
		if d, ok := tx.m.dead[id]; ok {
			tx.locked[id] = d
			found[id] = &d
		}
	}
	return found, nil
}

// UpdateDead is DeadTx's.
func (tx *MemoryTx) UpdateDead(_ context.Context, dead []DeadLetter) error {
	for _, d := range dead {
		tx.OnCommit(func() {
			old := tx.m.dead[d.ID]
			old.Status, old.Owner, old.Note, old.Ticket = d.Status, d.Owner, d.Note, d.Ticket
			tx.m.dead[d.ID] = old
		})
	}
	return nil
}

// SelectDead is DeadTx's.
func (tx *MemoryTx) SelectDead(_ context.Context, f DeadFilter, limit int) ([]uuid.UUID, error) {
	tx.m.mu.Lock()
	defer tx.m.mu.Unlock()
	var ids []uuid.UUID
	for _, id := range tx.m.sorted() {
		if d := tx.m.dead[id]; f.matches(&d) && len(ids) < limit {
			ids = append(ids, id)
		}
	}
	return ids, nil
}

// InsertOperation is DeadTx's.
func (tx *MemoryTx) InsertOperation(_ context.Context, op Operation, ids []uuid.UUID) error {
	tx.OnCommit(func() {
		tx.m.ops[op.ID] = &memoryOperation{op, slices.Clone(ids), map[uuid.UUID]ItemResult{}, time.Now()}
	})
	return nil
}

// LockOperation is DeadTx's.
func (tx *MemoryTx) LockOperation(_ context.Context, id uuid.UUID) (*Operation, error) {
	tx.m.mu.Lock()
	defer tx.m.mu.Unlock()
	if op, ok := tx.m.ops[id]; ok {
		return &op.Operation, nil
	}
	return nil, nil //nolint:nilnil // the port's "there is none"
}

// PendingItems is DeadTx's.
func (tx *MemoryTx) PendingItems(_ context.Context, id uuid.UUID, limit int) ([]uuid.UUID, error) {
	tx.m.mu.Lock()
	defer tx.m.mu.Unlock()
	op, ok := tx.m.ops[id]
	if !ok {
		return nil, fmt.Errorf("memory: no operation %s", id)
	}
	var ids []uuid.UUID
	for _, item := range op.ids {
		if _, done := op.results[item]; !done && len(ids) < limit {
			ids = append(ids, item)
		}
	}
	return ids, nil
}

// SaveItems is DeadTx's.
func (tx *MemoryTx) SaveItems(_ context.Context, id uuid.UUID, results []ItemResult) error {
	tx.OnCommit(func() {
		for _, res := range results {
			tx.m.ops[id].results[res.ID] = res
		}
		tx.m.ops[id].touched = time.Now()
	})
	return nil
}

// RecordActions is DeadTx's.
func (tx *MemoryTx) RecordActions(_ context.Context, actions []OperatorAction) error {
	tx.OnCommit(func() { tx.m.actions = append(tx.m.actions, actions...) })
	return nil
}

var (
	_ Tx         = (*MemoryTx)(nil)
	_ DeadTx     = (*MemoryTx)(nil)
	_ DeadReader = (*Memory)(nil)
)
