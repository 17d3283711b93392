package consumers

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/google/uuid"

	"ordersaga/events"
)

// DeadFilter selects dead letters; zero fields select all.
type DeadFilter struct {
	Status      DeadStatus
	Group       events.Group
	Type        string
	Class       string
	Fingerprint string
	OrderID     uuid.UUID
	FailedSince time.Time // last failure at or after
	FailedUntil time.Time // last failure before
}

// DeadReader is the read side of dead letters, outside any transaction of a use case.
type DeadReader interface {
	// DeadLetters answers a page, newest first (descending id), and the cursor of the next page; an empty one means that this was the
	// last. Key, Value and Headers are filled.
	DeadLetters(ctx context.Context, f DeadFilter, cursor string, limit int) (page []DeadLetter, next string, err error)
	// DeadLetter answers nil if there is none.
	DeadLetter(ctx context.Context, id uuid.UUID) (*DeadLetter, error)
	// Operation answers an operation with the results so far, in the order of its selection; nil if there is none.
	Operation(ctx context.Context, id uuid.UUID) (*Operation, []ItemResult, error)
	// OpenOperations lists operations that have items without a result and were not touched for the given time, oldest first, at
	// most limit: they are what a dead process left.
	OpenOperations(ctx context.Context, untouched time.Duration, limit int) ([]uuid.UUID, error)
}

// DeadTx is what a transaction offers the operators' use cases; *postgres.Tx is one, as it is a Tx.
type DeadTx interface {
	// Inbox, SaveInbox, Forward: as in Tx.
	Inbox(ctx context.Context, group events.Group, ids []uuid.UUID) (map[uuid.UUID]InboxRow, error)
	SaveInbox(ctx context.Context, group events.Group, rows []InboxRow) error
	Forward(ctx context.Context, out []events.Raw) error

	// LockDead reads dead letters and locks them in sorted order; ids that have none are left out.
	LockDead(ctx context.Context, ids []uuid.UUID) (map[uuid.UUID]*DeadLetter, error)
	// UpdateDead stores Status, Owner, Note and Ticket of locked dead letters.
	UpdateDead(ctx context.Context, dead []DeadLetter) error
	// SelectDead answers the ids that a filter selects, oldest first, at most limit.
	SelectDead(ctx context.Context, f DeadFilter, limit int) ([]uuid.UUID, error)

	// InsertOperation stores an operation with its frozen selection; ids may be unknown ones.
	InsertOperation(ctx context.Context, op Operation, ids []uuid.UUID) error
	// LockOperation reads an operation and locks it; nil if there is none.
	LockOperation(ctx context.Context, id uuid.UUID) (*Operation, error)
	// PendingItems answers, in the order of the selection, up to limit ids of an operation's items that have no result.
	PendingItems(ctx context.Context, op uuid.UUID, limit int) ([]uuid.UUID, error)
	// SaveItems stores results of items and touches the operation.
	SaveItems(ctx context.Context, op uuid.UUID, results []ItemResult) error

	// RecordActions appends to the operators' append-only audit log, with the database's time.
	RecordActions(ctx context.Context, actions []OperatorAction) error
}

// Action is what an operator does to dead letters.
type Action string

// The actions on dead letters.
const (
	ActionReplay  Action = "replay"
	ActionDiscard Action = "discard"
)

// Operation is a stored replay or discard of a frozen selection.
type Operation struct {
	ID     uuid.UUID // UUIDv7
	Action Action
	Actor  string
	Note   string
	Items  int // size of the selection
}

// ItemResult is what became of one item of an operation.
type ItemResult struct {
	ID      uuid.UUID // of the dead letter
	Outcome string    // replaying, discarded, resolved; would_replay, would_discard of a dry run; empty with an Error
	Error   string    // one sentence; empty if the item went well
}

// OperatorAction is one line of the operators' audit log: dlq.replay or dlq.discard of one dead letter.
type OperatorAction struct {
	Actor  string
	Action string // dlq.replay, dlq.discard
	Target string // id of the dead letter
	Note   string
	Detail string // JSON
}

// Bounds of replay operations.
const (
	MaxSelection  = 100_000 // items of one operation
	replayBatch   = 200     // items of one transaction
	maxNote       = 1000    // bytes
	maxActor      = 200     // bytes
	operationIdle = time.Minute
)

// OperatorsConfig is what Operators needs to know.
type OperatorsConfig struct {
	// Delays of the retry tiers, as in every group's Policy: a replay copy goes to the first tier's topic of the group that failed, due
	// at once, so that no other group sees it.
	Delays         []time.Duration
	MaxRecordBytes int              // 0: DefaultMaxRecordBytes
	Clock          func() time.Time // nil: time.Now
}

// Operators are the use cases on dead letters: replay and discard, one at a time or by filter. Each is a stored operation with a
// frozen selection: it may die in the middle and Resume ends it, and whatever is pressed twice acts once, because a dead letter's
// status changes in the transaction that sends its copy. What the copy does is the group's: when it is handled the dead letter is
// resolved, when it fails it goes through the tiers and opens the same dead letter again.
type Operators[T DeadTx] struct {
	store Store[T]
	read  DeadReader
	cfg   OperatorsConfig
}

// NewOperators makes the use cases.
func NewOperators[T DeadTx](store Store[T], read DeadReader, cfg OperatorsConfig) (*Operators[T], error) {
	if len(cfg.Delays) == 0 {
		return nil, errors.New("consumers: replay sends copies through the retry topics: give at least one retry delay")
	}
	if cfg.MaxRecordBytes <= 0 {
		cfg.MaxRecordBytes = DefaultMaxRecordBytes
	}
	if cfg.Clock == nil {
		cfg.Clock = time.Now
	}
	return &Operators[T]{store, read, cfg}, nil
}

// Request is one operator's wish.
type Request struct {
	Action Action
	Actor  string // who; required
	Note   string // why; required to discard
	// IDs selects dead letters; without any, Filter does, which must not be empty then: its open ones, whatever Filter.Status says.
	IDs    []uuid.UUID
	Filter *DeadFilter
	DryRun bool
}

// RequestError is a Request that cannot be carried out as it is.
type RequestError struct{ msg string }

func (e *RequestError) Error() string { return e.msg }

func (q *Request) check() error {
	switch {
	case q.Action != ActionReplay && q.Action != ActionDiscard:
		return &RequestError{fmt.Sprintf("unknown action %q: replay or discard", CleanText(string(q.Action), 40))}
	case q.Actor == "":
		return &RequestError{"who does this is missing"}
	case q.Action == ActionDiscard && q.Note == "" && !q.DryRun:
		return &RequestError{"a discard needs a note that says why"}
	case len(q.IDs) == 0 && (q.Filter == nil || *q.Filter == DeadFilter{}):
		return &RequestError{"nothing is selected: give ids, or a filter that is not empty"}
	case len(q.IDs) > 0 && q.Filter != nil:
		return &RequestError{"give either ids or a filter"}
	case len(q.IDs) > MaxSelection:
		return &RequestError{fmt.Sprintf("%d ids are above the limit of %d", len(q.IDs), MaxSelection)}
	}
	return nil
}

// Do stores the request as an operation, carries it out, and answers what became of each item. With DryRun it changes nothing and
// answers what would become of them. An error means that the operation did not come to its end; if the answered Operation is not
// nil it is stored, and goes on with Resume. Unknown ids and dead letters in another status are errors of their items only.
func (o *Operators[T]) Do(ctx context.Context, q Request) (*Operation, []ItemResult, error) {
	if err := q.check(); err != nil {
		return nil, nil, err
	}
	op := Operation{ID: events.NewID(), Action: q.Action, Actor: CleanText(q.Actor, maxActor), Note: CleanText(q.Note, maxNote)}
	if q.DryRun {
		results, err := o.preview(ctx, op, q)
		return nil, results, err
	}
	err := o.store.InTx(ctx, func(ctx context.Context, tx T) error {
		ids, err := selection(ctx, tx, q)
		if err != nil {
			return err
		}
		op.Items = len(ids)
		return tx.InsertOperation(ctx, op, ids)
	})
	if err != nil {
		return nil, nil, fmt.Errorf("store the operation: %w", err)
	}
	if err := o.carryOut(ctx, op.ID); err != nil {
		return &op, nil, fmt.Errorf("operation %s is stored and goes on by itself: %w", op.ID, err)
	}
	_, results, err := o.read.Operation(ctx, op.ID)
	if err != nil {
		return &op, nil, fmt.Errorf("read the results of operation %s: %w", op.ID, err)
	}
	return &op, results, nil
}

// selection is what a request is about, each once.
func selection(ctx context.Context, tx DeadTx, q Request) ([]uuid.UUID, error) {
	if len(q.IDs) > 0 {
		seen := make(map[uuid.UUID]bool, len(q.IDs))
		ids := make([]uuid.UUID, 0, len(q.IDs))
		for _, id := range q.IDs {
			if !seen[id] {
				seen[id] = true
				ids = append(ids, id)
			}
		}
		return ids, nil
	}
	f := *q.Filter
	f.Status = DeadOpen
	ids, err := tx.SelectDead(ctx, f, MaxSelection+1)
	if err != nil {
		return nil, fmt.Errorf("select dead letters: %w", err)
	}
	if len(ids) > MaxSelection {
		return nil, &RequestError{fmt.Sprintf("the filter selects more than %d dead letters: narrow it", MaxSelection)}
	}
	return ids, nil
}

func (o *Operators[T]) preview(ctx context.Context, op Operation, q Request) (results []ItemResult, err error) {
	err = o.store.InTx(ctx, func(ctx context.Context, tx T) error {
		results = nil
		ids, err := selection(ctx, tx, q)
		if err != nil {
			return err
		}
		for part := range slices.Chunk(ids, replayBatch) {
			plan, err := o.plan(ctx, tx, op, part)
			if err != nil {
				return err
			}
			for _, res := range plan.results {
				switch res.Outcome {
				case outcomeReplaying, outcomeRepublished:
					res.Outcome = "would_replay"
				case outcomeDiscarded:
					res.Outcome = "would_discard"
				}
				results = append(results, res)
			}
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("preview: %w", err)
	}
	return results, nil
}

// Resume ends operations that a process left in the middle. Call it now and then, in any number of processes.
func (o *Operators[T]) Resume(ctx context.Context) (resumed int, err error) {
	const limit = 10 // the next call goes on
	ids, err := o.read.OpenOperations(ctx, operationIdle, limit)
	if err != nil {
		return 0, fmt.Errorf("find operations to resume: %w", err)
	}
	var errs []error // one that fails does not keep the others waiting
	for _, id := range ids {
		if err := o.carryOut(ctx, id); err != nil {
			errs = append(errs, fmt.Errorf("resume operation %s: %w", id, err))
			continue
		}
		resumed++
	}
	return resumed, errors.Join(errs...)
}

// carryOut works through an operation's items, a transaction for each part. The operation's row is locked meanwhile, so that two who
// carry it out take turns.
func (o *Operators[T]) carryOut(ctx context.Context, id uuid.UUID) error {
	for {
		left := false
		err := o.store.InTx(ctx, func(ctx context.Context, tx T) error {
			op, err := tx.LockOperation(ctx, id)
			if err != nil {
				return fmt.Errorf("lock operation: %w", err)
			}
			if op == nil {
				return fmt.Errorf("there is no operation %s", id)
			}
			ids, err := tx.PendingItems(ctx, id, replayBatch)
			if err != nil {
				return fmt.Errorf("read items: %w", err)
			}
			left = len(ids) == replayBatch
			if len(ids) == 0 {
				return nil
			}
			plan, err := o.plan(ctx, tx, *op, ids)
			if err != nil {
				return err
			}
			return plan.store(ctx, tx, *op)
		})
		if err != nil || !left {
			return err
		}
	}
}

// The outcomes of items.
const (
	outcomeReplaying   = "replaying"
	outcomeRepublished = "resolved" // an event for readers outside: once it is sent there is nobody to say that it was handled
	outcomeDiscarded   = "discarded"
)

// replayPlan is what one transaction of an operation changes.
type replayPlan struct {
	results []ItemResult
	dead    []DeadLetter
	inbox   map[events.Group][]InboxRow
	raw     []events.Raw
	actions []OperatorAction
}

// plan locks dead letters and decides about each; it writes nothing.
func (o *Operators[T]) plan(ctx context.Context, tx DeadTx, op Operation, ids []uuid.UUID) (*replayPlan, error) {
	dead, err := tx.LockDead(ctx, ids)
	if err != nil {
		return nil, fmt.Errorf("lock dead letters: %w", err)
	}
	messages := map[events.Group][]uuid.UUID{}
	for _, d := range dead {
		if d.Group != "" {
			messages[d.Group] = append(messages[d.Group], d.MessageID)
		}
	}
	rows := map[events.Group]map[uuid.UUID]InboxRow{}
	for _, g := range slices.Sorted(maps.Keys(messages)) {
		if rows[g], err = tx.Inbox(ctx, g, sortedIDs(messages[g])); err != nil {
			return nil, fmt.Errorf("read inbox of %s: %w", g, err)
		}
	}
	p := &replayPlan{inbox: map[events.Group][]InboxRow{}}
	for _, id := range ids {
		res := ItemResult{ID: id}
		if d := dead[id]; d == nil {
			res.Error = "there is no dead letter with this id"
		} else {
			row, found := rows[d.Group][d.MessageID]
			res.Outcome, res.Error = o.decide(p, op, *d, row, found)
		}
		p.results = append(p.results, res)
	}
	return p, nil
}

// decide adds what one dead letter's turn changes.
func (o *Operators[T]) decide(p *replayPlan, op Operation, d DeadLetter, row InboxRow, found bool) (outcome, problem string) {
	if d.Status != DeadOpen {
		return "", notOpen(d)
	}
	d.Owner = op.Actor
	if op.Note != "" {
		d.Note = op.Note
	}
	if !found {
		row = InboxRow{MessageID: d.MessageID, Hash: events.PayloadHash(d.Value), New: true}
	}
	row.Ticket = newTicket()
	d.Ticket = row.Ticket
	switch {
	case op.Action == ActionDiscard:
		outcome, d.Status, row.State = outcomeDiscarded, DeadDiscarded, InboxDiscarded
	case found && row.State != InboxDead:
		return "", fmt.Sprintf("its message is %s: there is nothing to replay", row.State)
	default:
		raw := o.replayCopy(&d)
		if n := size(raw.Key, raw.Value, raw.Headers); n > o.cfg.MaxRecordBytes {
			return "", fmt.Sprintf("its copy would have %d bytes, above the limit of %d: raise the limit of record sizes here and max.message.bytes of the topics", n,
				o.cfg.MaxRecordBytes)
		}
		p.raw = append(p.raw, raw)
		outcome, d.Status, row.State = outcomeReplaying, DeadReplaying, InboxReplaying
		if d.Group == "" {
			outcome, d.Status = outcomeRepublished, DeadResolved
		}
	}
	p.dead = append(p.dead, d)
	if d.Group != "" {
		p.inbox[d.Group] = append(p.inbox[d.Group], row)
	}
	detail := fmt.Sprintf(`{"operation":%q,"group":%q,"message_id":%q}`, op.ID, d.Group, d.MessageID)
	p.actions = append(p.actions, OperatorAction{Actor: op.Actor, Action: "dlq." + string(op.Action), Target: d.ID.String(), Note: op.Note, Detail: detail})
	return outcome, ""
}

func notOpen(d DeadLetter) string {
	switch d.Status {
	case DeadReplaying:
		return "it is being replayed already"
	case DeadResolved:
		return "it is resolved: its message was handled"
	case DeadDiscarded:
		return "it was discarded"
	case DeadSuperseded:
		return "its saga ended without it"
	case DeadOpen:
		return ""
	default:
		return fmt.Sprintf("its status is %q", d.Status)
	}
}

// replayCopy is the message for its group alone. A dead letter without a group is a message that Kafka refused, on its way to
// readers outside: it goes to its topic again.
func (o *Operators[T]) replayCopy(d *DeadLetter) events.Raw {
	if d.Group == "" {
		return events.Raw{Topic: d.Origin.Topic, Key: d.Key, Value: d.Value, Headers: d.Headers}
	}
	first := d.FirstFailed
	if first.IsZero() {
		first = o.cfg.Clock()
	}
	s := copyState{
		ticket: d.Ticket, attempt: d.Attempts + 1, first: first, due: o.cfg.Clock(), origin: d.Origin, id: d.MessageID, replay: true, err: d.Error,
	}
	return events.Raw{Topic: events.RetryTopic(d.Group, o.cfg.Delays[0]), Key: d.Key, Value: d.Value, Headers: s.headers(d.Headers)}
}

func (p *replayPlan) store(ctx context.Context, tx DeadTx, op Operation) error {
	for _, g := range slices.Sorted(maps.Keys(p.inbox)) {
		if err := tx.SaveInbox(ctx, g, p.inbox[g]); err != nil {
			return fmt.Errorf("save inbox of %s: %w", g, err)
		}
	}
	if len(p.dead) > 0 {
		if err := tx.UpdateDead(ctx, p.dead); err != nil {
			return fmt.Errorf("update dead letters: %w", err)
		}
		if err := tx.RecordActions(ctx, p.actions); err != nil {
			return fmt.Errorf("record actions: %w", err)
		}
	}
	if len(p.raw) > 0 {
		if err := tx.Forward(ctx, p.raw); err != nil {
			return fmt.Errorf("forward copies: %w", err)
		}
	}
	if err := tx.SaveItems(ctx, op.ID, p.results); err != nil {
		return fmt.Errorf("save results: %w", err)
	}
	return nil
}

// DeadView is a dead letter as it may be shown: what came with the record (key, body, headers), which may hold anything about a
// person, is there only as sizes and a hash, and as the headers of an allow-list. Full is filled for administrators.
type DeadView struct {
	ID          uuid.UUID
	Group       events.Group
	MessageID   uuid.UUID
	Origin      Place
	Type        string
	OrderID     uuid.UUID
	Status      DeadStatus
	Class       string
	Reason      string
	Fingerprint string
	Attempts    int
	FirstFailed time.Time
	LastFailed  time.Time
	Owner, Note string
	KeyBytes    int
	ValueBytes  int
	ValueSHA256 string // hexadecimal
	HeaderCount int
	Headers     []ViewHeader // of the allow-list
	Full        *FullRecord  // nil unless asked for
}

// ViewHeader is a header whose value may be shown.
type ViewHeader struct{ Key, Value string }

// FullRecord is the record as it came.
type FullRecord struct {
	Key     []byte
	Value   []byte
	Headers []events.Header
}

// shownHeaders are attributes of the message, which say nothing about a person; anything else may.
var shownHeaders = []string{
	events.HeaderSpecVersion, events.HeaderID, events.HeaderSource, events.HeaderType, events.HeaderTime, events.HeaderSequence, events.HeaderContentType,
	events.HeaderTraceparent,
}

// View masks a dead letter. All text in it is one line without control characters, whatever a producer sent.
func (d *DeadLetter) View(full bool) DeadView {
	const maxHeader = 200
	sum := sha256.Sum256(d.Value)
	v := DeadView{
		ID: d.ID, Group: d.Group, MessageID: d.MessageID, Origin: d.Origin, Type: CleanText(d.Type, MaxTypeBytes), OrderID: d.OrderID, Status: d.Status,
		Class: d.Class, Reason: CleanText(d.Error, MaxErrorBytes), Fingerprint: d.Fingerprint, Attempts: d.Attempts, FirstFailed: d.FirstFailed,
		LastFailed: d.LastFailed, Owner: CleanText(d.Owner, maxActor), Note: CleanText(d.Note, maxNote), KeyBytes: len(d.Key), ValueBytes: len(d.Value),
		ValueSHA256: hex.EncodeToString(sum[:]), HeaderCount: len(d.Headers),
	}
	for _, h := range d.Headers {
		if slices.Contains(shownHeaders, h.Key) {
			v.Headers = append(v.Headers, ViewHeader{h.Key, CleanText(string(h.Value), maxHeader)})
		}
	}
	if full {
		v.Full = &FullRecord{d.Key, d.Value, d.Headers}
	}
	return v
}

// List answers a page of dead letters, masked. limit is 1 to 500.
func (o *Operators[T]) List(ctx context.Context, f DeadFilter, cursor string, limit int) (page []DeadView, next string, err error) {
	const maxPage = 500
	if limit < 1 || limit > maxPage {
		return nil, "", &RequestError{fmt.Sprintf("limit %d is not between 1 and %d", limit, maxPage)}
	}
	dead, next, err := o.read.DeadLetters(ctx, f, cursor, limit)
	if err != nil {
		return nil, "", fmt.Errorf("list dead letters: %w", err)
	}
	page = make([]DeadView, 0, len(dead))
	for i := range dead {
		page = append(page, dead[i].View(false))
	}
	return page, next, nil
}

// Get answers one dead letter, in full only if asked, or nil if there is none. That it was seen in full is recorded.
func (o *Operators[T]) Get(ctx context.Context, id uuid.UUID, full bool, actor string) (*DeadView, error) {
	d, err := o.read.DeadLetter(ctx, id)
	if err != nil {
		return nil, fmt.Errorf("read dead letter: %w", err)
	}
	if d == nil {
		return nil, nil //nolint:nilnil // there is none
	}
	if full {
		err := o.store.InTx(ctx, func(ctx context.Context, tx T) error {
			return tx.RecordActions(ctx, []OperatorAction{{Actor: CleanText(actor, maxActor), Action: "dlq.reveal", Target: id.String()}})
		})
		if err != nil {
			return nil, fmt.Errorf("record that a dead letter is shown in full: %w", err)
		}
	}
	v := d.View(full)
	return &v, nil
}
