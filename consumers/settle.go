package consumers

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"time"

	"github.com/google/uuid"

	"ordersaga/events"
)

// claims says whether a delivery with this ticket may act, given its message's row; nil is no row. A message that waits for a copy
// is acted on by that copy only, so that a redelivered original never runs beside its own retry (F35).
func claims(row *InboxRow, ticket int64) bool {
	if row == nil {
		return true
	}
	switch row.State {
	case InboxWaiting, InboxReplaying:
		return row.Ticket == ticket
	case InboxHandled, InboxParked, InboxDead, InboxDiscarded:
		return false
	default:
		return false
	}
}

// decided is the verdict of one item in a transaction that may yet fail.
type decided[T Tx] struct {
	it  *item[T]
	v   *Verdict
	err error
}

// The verdicts that most items have. Nobody writes to them.
var (
	doneVerdict   = &Verdict{Kind: Done}
	repeatVerdict = &Verdict{Kind: Repeat}
	againVerdict  = &Verdict{Kind: Again}
)

// final reports a verdict that an early delivery may come to. Of any other nothing is kept: its copy from Kafka comes to it.
func (v *Verdict) final() bool { return v.Kind == Done || v.Kind == Repeat }

func verdictOf(v Verdict) *Verdict {
	if v.Kind == Done {
		return doneVerdict
	}
	kept := v // only then on the heap
	return &kept
}

// transact applies and settles items in one transaction. If that fails it holds them, tries again, or takes them apart.
func (r *run[T]) transact(ctx context.Context, items []*item[T], apply Apply[T]) {
	if len(items) == 0 || ctx.Err() != nil {
		return
	}
	var verdicts []decided[T]
	r.stats.Transactions++
	err := r.store.InTx(ctx, func(ctx context.Context, tx T) (err error) {
		defer func() {
			if v := recover(); v != nil {
				err = newPanicError(v)
			}
		}()
		verdicts, err = r.decide(ctx, tx, items, apply)
		return err
	})
	switch {
	case err == nil:
		r.tellFollowed()
		r.settleAll(verdicts)
		return
	case !r.followed.begun.IsZero() && ctx.Err() == nil && outage(err) == "":
		r.cfg.Observer.Split(r.cfg.Name, len(items), err)
		r.alone = true
		r.transact(ctx, items, apply)
		return
	}
	if items = leaveEarly(items); len(items) == 0 {
		return
	}
	switch {
	case ctx.Err() != nil: // what is left will be delivered again
	case outage(err) != "":
		r.hold(items, err)
	case dataError(err) || poison(err):
		r.takeApart(ctx, items, apply, err)
	case items[0].whole < wholeTries:
		ready := time.Now().Add(fullJitter(inPlaceMin, inPlaceMax, items[0].whole))
		for _, it := range items {
			it.whole++
			it.ready = ready
		}
	default:
		r.takeApart(ctx, items, apply, err)
	}
}

// takeApart finds the item that fails a transaction, and settles it with the error; the others go on with what was prepared.
func (r *run[T]) takeApart(ctx context.Context, items []*item[T], apply Apply[T], err error) {
	if len(items) > 1 {
		r.cfg.Observer.Split(r.cfg.Name, len(items), err)
		for _, part := range split(items) {
			r.transact(ctx, part, apply)
		}
		return
	}
	if it := items[0]; it.err == nil && !it.skip {
		r.fail(ctx, it, err)
		return
	}
	// Not even the verdict can be stored. Consumption stops here, and is seen to: to go on would be to lose a record.
	r.hold(items, &unstorableError{err})
}

// unstorableError is a verdict that the database does not take.
type unstorableError struct{ err error }

func (e *unstorableError) Error() string { return "the verdict cannot be stored: " + e.err.Error() }
func (e *unstorableError) Unwrap() error { return e.err }
func (*unstorableError) Outage() string  { return "dead letters" }

// settleAll takes note of committed verdicts. What is held for one reason is held together, so that it goes on as one batch.
func (r *run[T]) settleAll(verdicts []decided[T]) {
	type heldBack struct {
		items []*item[T]
		err   error
	}
	var held map[string]*heldBack
	for _, d := range verdicts {
		if d.it.early && !d.v.final() {
			d.it.done = true
			continue
		}
		if d.v.Kind != Hold {
			r.settle(d.it, *d.v, d.err)
			continue
		}
		d.it.prepared, d.it.err = nil, nil
		h := held[d.v.Dependency]
		if h == nil {
			if held == nil {
				held = map[string]*heldBack{}
			}
			h = &heldBack{err: d.err}
			held[d.v.Dependency] = h
		}
		h.items = append(h.items, d.it)
	}
	for _, h := range held {
		r.hold(h.items, h.err)
	}
}

// settle takes note of one committed verdict, other than Hold.
func (r *run[T]) settle(it *item[T], v Verdict, err error) {
	r.stats.Counts[v.Kind]++
	switch v.Kind {
	case Again:
		it.prepared, it.err, it.reused = nil, nil, false
		it.tried.InPlace++
		it.ready = time.Now().Add(v.Wait)
	case Done, Retry, Dead, Repeat:
		it.done = true
		if v.Kind == Repeat && it.d.Ticket != 0 {
			r.stats.Stale++
		}
		r.settled[it.at] = true
		for _, i := range it.again {
			r.settled[i] = true
		}
		r.stats.Counts[Repeat] += len(it.again)
	case Hold: // see settleAll
	}
	if err != nil {
		r.cfg.Observer.Failed(it.d, v, err)
	}
}

// decide is the transaction: claim, apply, verdicts, the rows that they leave, and what follows from them. It may run more than once and changes
// nothing but tx, and its note of what was followed.
func (r *run[T]) decide(ctx context.Context, tx T, items []*item[T], apply Apply[T]) ([]decided[T], error) {
	r.followed = followed{}
	r.foresee(tx, items, apply)
	claimed, verdicts, err := r.claim(ctx, tx, items)
	if err != nil {
		return nil, err
	}
	// Subscriptions that are Ordered will take the locks on (group, key) here, and park what stands behind a failed record.
	batch := make([]*Delivery, 0, len(claimed))
	for i := range claimed {
		if claimed[i].acts() {
			batch = append(batch, claimed[i].it.d)
		}
	}
	var results []Result
	if len(batch) > 0 {
		if results, err = apply(ctx, tx, batch); err != nil {
			return nil, err
		}
		if len(results) != len(batch) {
			return nil, &brokenHandlerError{fmt.Sprintf("Apply answered %d results for %d deliveries", len(results), len(batch))}
		}
	}
	w := writes{group: r.cfg.Name, out: make([]events.Envelope, 0, outputs(results))}
	now := r.cfg.Clock()
	verdicts = slices.Grow(verdicts, len(claimed))
	for i := range claimed {
		c := &claimed[i]
		res := Result{Err: c.it.err}
		switch {
		case c.reused:
			res.Err = &reusedError{}
		case c.acts():
			res, results = results[0], results[1:]
		}
		if dataError(res.Err) {
			res.Err = &refusedByData{res.Err}
		}
		v := r.cfg.Policy.Decide(c.it.tried, res.Err, now)
		v = r.write(&w, c, v, res.Out, now)
		verdicts = append(verdicts, decided[T]{c.it, verdictOf(v), res.Err})
	}
	if err := r.follow(ctx, tx, &w); err != nil {
		return nil, err
	}
	return verdicts, w.flush(ctx, tx)
}

// outputs is how many messages the handler emits.
func outputs(results []Result) (n int) {
	for i := range results {
		n += len(results[i].Out)
	}
	return n
}

// foresee lets the handler name what it will lock.
func (r *run[T]) foresee(tx T, items []*item[T], apply Apply[T]) {
	f, ok := r.handler.(Foresight[T])
	if !ok || apply == nil {
		return
	}
	if batch := actors(items); len(batch) > 0 {
		f.Foresee(tx, batch)
	}
}

// claim is one item that may act.
type claim[T Tx] struct {
	it     *item[T]
	id     uuid.UUID // its identity; where the id was reused, one of its own
	row    *InboxRow
	reused bool
}

// acts reports that it goes through the handler.
func (c *claim[T]) acts() bool { return c.it.actor() && !c.reused }

// claim reads the inbox and answers who may act, in the order of the batch, and the verdicts of those who may not.
func (r *run[T]) claim(ctx context.Context, tx T, items []*item[T]) (claimed []claim[T], verdicts []decided[T], err error) {
	ids := make([]uuid.UUID, 0, len(items))
	for _, it := range items {
		ids = append(ids, it.d.ID)
	}
	var rows map[uuid.UUID]InboxRow
	if !r.fresh(items) {
		if r.first(items) {
			tx.PresumeFirst(r.cfg.Name, ids)
		}
		if rows, err = tx.Inbox(ctx, r.cfg.Name, sortedIDs(ids)); err != nil {
			return nil, nil, fmt.Errorf("read inbox: %w", err)
		}
	}
	var strangers []claim[T]
	var acting map[uuid.UUID]bool // of the ids that several items have
	claimed = make([]claim[T], 0, len(items))
	for _, it := range items {
		c := claim[T]{it: it, id: it.d.ID, row: rowOf(rows, it.d.ID)}
		switch {
		case c.row != nil && c.row.Hash != it.payload(), c.row == nil && it.reused:
			c.id, c.row, c.reused = placeIdentity(it.d.Origin), nil, true
			strangers = append(strangers, c)
		case acting[c.id] || !claims(c.row, it.d.Ticket):
			verdicts = append(verdicts, decided[T]{it, repeatVerdict, nil})
		case it.reused:
			// It was taken for a stranger among this batch, and not prepared; but the row is about it.
			verdicts = append(verdicts, decided[T]{it, againVerdict, nil})
		default:
			if it.twin {
				if acting == nil {
					acting = map[uuid.UUID]bool{}
				}
				acting[c.id] = true
			}
			claimed = append(claimed, c)
		}
	}
	if len(strangers) == 0 {
		return claimed, verdicts, nil
	}
	ids = ids[:0]
	for _, c := range strangers {
		ids = append(ids, c.id)
	}
	if rows, err = tx.Inbox(ctx, r.cfg.Name, sortedIDs(ids)); err != nil {
		return nil, nil, fmt.Errorf("read inbox: %w", err)
	}
	for _, c := range strangers {
		if _, found := rows[c.id]; found {
			verdicts = append(verdicts, decided[T]{c.it, repeatVerdict, nil})
			continue
		}
		claimed = append(claimed, c)
	}
	return claimed, verdicts, nil
}

// first reports that the inbox knows none of the items, as far as we do: no copies, in a group that keeps rows only for what failed.
func (r *run[T]) first(items []*item[T]) bool {
	return r.cfg.Inbox == InboxFailures && !slices.ContainsFunc(items, func(it *item[T]) bool { return it.d.Ticket != 0 })
}

// fresh reports that the inbox can't know any of the items: their records have not been in Kafka, nobody has failed at them. Should another relay have
// sent one meanwhile, to somebody who failed at it, then barrier or machine answer whoever acts second.
func (r *run[T]) fresh(items []*item[T]) bool {
	return r.cfg.Inbox == InboxFailures && !slices.ContainsFunc(items, func(it *item[T]) bool { return !it.early })
}

// rowOf is a message's row, nil if it has none: as most have.
func rowOf(rows map[uuid.UUID]InboxRow, id uuid.UUID) *InboxRow {
	if len(rows) == 0 {
		return nil
	}
	row, found := rows[id]
	if !found {
		return nil
	}
	return &row
}

// placeIdentity identifies a record by where it lies, as events.Identity does for one without an id.
func placeIdentity(p Place) uuid.UUID {
	return events.Identity(&events.Record{Topic: p.Topic, Partition: p.Partition, Offset: p.Offset})
}

// writes collects what a transaction leaves, to be written with one call of each kind.
type writes struct {
	group    events.Group
	inbox    []InboxRow
	dead     []DeadLetter
	resolved []uuid.UUID
	out      []events.Envelope
	raw      []events.Raw
}

func (w *writes) flush(ctx context.Context, tx Tx) error {
	if len(w.inbox) > 0 {
		if err := tx.SaveInbox(ctx, w.group, w.inbox); err != nil {
			return fmt.Errorf("save inbox: %w", err)
		}
	}
	if len(w.dead) > 0 {
		if err := tx.SaveDeadLetters(ctx, w.dead); err != nil {
			return fmt.Errorf("save dead letters: %w", err)
		}
	}
	if len(w.resolved) > 0 {
		if err := tx.ResolveDeadLetters(ctx, w.group, w.resolved); err != nil {
			return fmt.Errorf("resolve dead letters: %w", err)
		}
	}
	if len(w.out) > 0 {
		if err := tx.Emit(ctx, w.out); err != nil {
			return fmt.Errorf("emit: %w", err)
		}
	}
	if len(w.raw) > 0 {
		if err := tx.Forward(ctx, w.raw); err != nil {
			return fmt.Errorf("forward: %w", err)
		}
	}
	return nil
}

// write adds what a verdict leaves; it may answer another verdict, where a copy would be too large to be sent.
func (r *run[T]) write(w *writes, c *claim[T], v Verdict, out []events.Envelope, now time.Time) Verdict {
	d := c.it.d
	if c.it.early && !v.final() {
		return v
	}
	if v.Kind == Done && c.row == nil && r.cfg.Inbox != InboxAll && !d.Replay { // nearly always
		w.out = append(w.out, out...)
		return v
	}
	row := InboxRow{MessageID: c.id, New: c.row == nil, Hash: c.it.payload()}
	if v.Kind == Retry {
		raw := r.retryCopy(c, v, now)
		n := size(raw.Key, raw.Value, raw.Headers)
		if n <= r.cfg.MaxRecordBytes {
			row.State, row.Ticket = InboxWaiting, raw.ticket
			w.raw = append(w.raw, raw.Raw)
			w.inbox = append(w.inbox, row)
			if v.Stalled {
				w.out = append(w.out, r.cfg.OnStalled(d, v)...)
			}
			return v
		}
		v = Verdict{Kind: Dead, Class: ClassTooLarge, Reason: CleanText("a retry copy would have "+strconv.Itoa(n)+" bytes, above the limit of "+
			strconv.Itoa(r.cfg.MaxRecordBytes)+"; it failed with: "+v.Reason, MaxErrorBytes)}
	}
	switch v.Kind {
	case Done:
		w.out = append(w.out, out...)
		if c.row != nil || r.cfg.Inbox == InboxAll {
			row.State = InboxHandled
			if c.row != nil {
				row.Ticket = c.row.Ticket
			}
			w.inbox = append(w.inbox, row)
		}
		if d.Replay {
			w.resolved = append(w.resolved, c.id)
		}
	case Dead:
		row.State, row.Ticket = InboxDead, newTicket()
		w.inbox = append(w.inbox, row)
		letter := r.deadLetter(c, v, now)
		letter.Ticket = row.Ticket
		w.dead = append(w.dead, letter)
		w.raw = append(w.raw, deadRecord(r.cfg.Name, &letter, r.cfg.MaxRecordBytes))
		w.out = append(w.out, r.cfg.OnStalled(d, v)...)
	case Hold, Again, Retry, Repeat: // nothing is written: it goes on, or has gone on
	}
	return v
}

type ticketed struct {
	events.Raw
	ticket int64
}

func (r *run[T]) retryCopy(c *claim[T], v Verdict, now time.Time) ticketed {
	d := c.it.d
	first := d.First
	if first.IsZero() {
		first = now
	}
	s := copyState{
		ticket: newTicket(), attempt: d.Attempt + 1, tier: v.Tier, first: first, due: v.Due, origin: d.Origin, id: c.id, replay: d.Replay, err: v.Reason,
	}
	return ticketed{events.Raw{
		Topic: events.RetryTopic(r.cfg.Name, r.cfg.Policy.Delays[v.Tier-1]), Key: d.Record.Key, Value: d.Record.Value, Headers: s.headers(d.Record.Headers),
	}, s.ticket}
}

func (r *run[T]) deadLetter(c *claim[T], v Verdict, now time.Time) DeadLetter {
	d := c.it.d
	first := d.First
	if first.IsZero() {
		first = now
	}
	return DeadLetter{
		ID: events.NewID(), Group: r.cfg.Name, MessageID: c.id, Origin: d.Origin, Type: string(d.Type), OrderID: d.OrderID, Status: DeadOpen,
		Class: v.Class, Error: v.Reason, Fingerprint: Fingerprint(v.Class, string(d.Type), v.Reason), Attempts: d.Attempt, FirstFailed: first, LastFailed: now,
		Key: d.Record.Key, Value: d.Record.Value, Headers: originalHeaders(d.Record.Headers),
	}
}
