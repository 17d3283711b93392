package consumers

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"

	"ordersaga/events"
)

// InboxMode says for which messages a group keeps inbox rows.
type InboxMode int8

// The inbox modes.
const (
	// InboxAll keeps a row for every message: for handlers that cannot answer a duplicate by themselves.
	InboxAll InboxMode = iota
	// InboxFailures keeps rows only for messages that failed at least once: for handlers whose barrier or machine answers duplicates.
	InboxFailures
)

// Defaults and bounds of a group.
const (
	DefaultMaxRecordBytes = 1_000_000 // below Kafka's default max.message.bytes of 1,048,588
	DefaultDrain          = 5 * time.Second
	// wholeTries is how often a transaction that fails for no stated reason is tried whole before it is taken apart.
	wholeTries = 3
)

// GroupConfig is what a Group needs to know.
type GroupConfig struct {
	Name  events.Group
	Topic events.Topic // what the group reads; its retry topics follow from Name and Policy.Delays
	Inbox InboxMode
	// Ordered keeps the order of a key behind a failed record. It is refused: see NewGroup.
	Ordered bool
	Policy  Policy
	// Former are the group's retry topics of delays that its Policy had once: what waits in them is read too, or it would wait for ever.
	Former []events.Topic
	// MaxRecordBytes is the largest record that retry and dead-letter topics take; 0 means DefaultMaxRecordBytes.
	MaxRecordBytes int
	// Drain is how long a running transaction or call may go on after Handle's context was cancelled; 0 means DefaultDrain.
	Drain time.Duration
	// OnStalled hears of a delivery that failed in the slowest tier and has no last attempt, and of every dead letter (Verdict.Kind is
	// Dead then). What it answers is emitted in the transaction of the verdict. It may be called again if that transaction fails, and
	// gets the delivery of a record that could not be decoded too, with a nil Data. May be nil.
	OnStalled func(d *Delivery, v Verdict) []events.Envelope
	Observer  Observer         // nil: Quiet
	Clock     func() time.Time // nil: time.Now; due times are stamped with it
	// Decode reads a record; nil means events.Decode. Others' handlers bring their own table of types. An error is poison, or
	// *events.UnknownTypeError.
	Decode func(*events.Record) (events.Envelope, error)
	// Owns says whether a type is this group's; a record of another group's is settled unread. Nil: by the table of events, where a
	// type that is not in the table is ours.
	Owns func(events.Name) bool
}

// Group is the runtime of one consumer group. Handle may be called from several goroutines at once.
type Group[T Tx] struct {
	cfg     GroupConfig
	store   Store[T]
	handler Handler[T]
	retry   map[events.Topic]bool
	next    *Group[T] // see FollowedBy; nil: none
	reach   Reach     // of next
}

// NewGroup makes a Group. It answers an error that says what to change if the configuration cannot work.
func NewGroup[T Tx](cfg GroupConfig, store Store[T], handler Handler[T]) (*Group[T], error) {
	switch {
	case cfg.Name == "" || cfg.Topic == "":
		return nil, errors.New("consumers: a group needs a Name and a Topic")
	case cfg.Ordered:
		// Its place is between claim and apply, see run.decide: claimed deliveries whose key is parked are parked behind it.
		return nil, fmt.Errorf("consumers: group %s: Ordered needs parking of later records of a failed key, which this version does not have; "+
			"leave Ordered out and make the handler answer messages out of order", cfg.Name)
	case store == nil || handler == nil:
		return nil, fmt.Errorf("consumers: group %s: a Store and a Handler are needed", cfg.Name)
	case !slices.IsSorted(cfg.Policy.Delays) || len(cfg.Policy.Delays) > 0 && cfg.Policy.Delays[0] < time.Millisecond:
		return nil, fmt.Errorf("consumers: group %s: retry delays %v: give at least 1ms each, shortest first", cfg.Name, cfg.Policy.Delays)
	case cfg.MaxRecordBytes < 0 || cfg.MaxRecordBytes > 0 && cfg.MaxRecordBytes < 4<<10:
		return nil, fmt.Errorf("consumers: group %s: MaxRecordBytes %d is too small for the reason of a failure; at least 4096", cfg.Name, cfg.MaxRecordBytes)
	}
	if cfg.MaxRecordBytes == 0 {
		cfg.MaxRecordBytes = DefaultMaxRecordBytes
	}
	if cfg.Drain <= 0 {
		cfg.Drain = DefaultDrain
	}
	if cfg.Observer == nil {
		cfg.Observer = Quiet{}
	}
	if cfg.Clock == nil {
		cfg.Clock = time.Now
	}
	if cfg.OnStalled == nil {
		cfg.OnStalled = func(*Delivery, Verdict) []events.Envelope { return nil }
	}
	g := &Group[T]{cfg: cfg, store: store, handler: handler, retry: map[events.Topic]bool{}}
	for _, t := range g.RetryTopics() {
		g.retry[t] = true
	}
	return g, nil
}

// Name is the group's name.
func (g *Group[T]) Name() events.Group { return g.cfg.Name }

// Topic is what the group reads.
func (g *Group[T]) Topic() events.Topic { return g.cfg.Topic }

// RetryTopics lists the group's retry topics, fastest first, then former ones.
func (g *Group[T]) RetryTopics() []events.Topic {
	out := make([]events.Topic, 0, len(g.cfg.Policy.Delays)+len(g.cfg.Former))
	for _, d := range g.cfg.Policy.Delays {
		out = append(out, events.RetryTopic(g.cfg.Name, d))
	}
	for _, t := range g.cfg.Former {
		if !slices.Contains(out, t) {
			out = append(out, t)
		}
	}
	return out
}

// Handle takes a batch through decode, prepare, apply and settle, and answers for each record whether it is settled: whether its
// verdict is committed. It returns when all are, or when ctx ends; then with the cause of that as the error. While something is away
// it waits and tries again, for as long as it takes. After ctx has ended nothing new is begun, and what runs has Drain to finish.
func (g *Group[T]) Handle(ctx context.Context, batch []events.Record) ([]bool, error) {
	begun := time.Now()
	work, release := drainContext(ctx, g.cfg.Drain)
	defer release()
	r := &run[T]{Group: g, stats: BatchStats{Group: g.cfg.Name, Records: len(batch)}, settled: make([]bool, len(batch))}
	r.receive(batch)
	for ctx.Err() == nil {
		due, next := r.pending()
		if len(due) == 0 && next.IsZero() {
			break
		}
		if len(due) > 0 {
			r.round(work, due)
			continue
		}
		pause(ctx, time.Until(next))
	}
	r.stats.Duration = time.Since(begun)
	r.stats.Interrupted = r.open() > 0
	g.cfg.Observer.Batch(r.stats)
	if r.stats.Interrupted {
		return r.settled, fmt.Errorf("group %s: interrupted: %w", g.cfg.Name, context.Cause(ctx))
	}
	return r.settled, nil
}

// drainContext is ctx, but ends d after it.
func drainContext(ctx context.Context, d time.Duration) (work context.Context, release func()) {
	work, cancel := context.WithCancel(context.WithoutCancel(ctx))
	stop := context.AfterFunc(ctx, func() {
		pause(work, d)
		cancel()
	})
	return work, func() {
		stop()
		cancel()
	}
}

// pause waits, or until ctx ends.
func pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

// run is one batch on its way.
type run[T Tx] struct {
	*Group[T]
	stats    BatchStats
	items    []*item[T]
	settled  []bool   // by position in the batch
	followed followed // in the transaction that runs, or ran last
	alone    bool     // nothing is followed: a transaction that was has failed
}

// item is one message of a batch, with all its deliveries.
type item[T Tx] struct {
	d        *Delivery
	at       int   // its position in the batch
	again    []int // more positions, if it was delivered more than once with one ticket
	err      error // known without the handler: undecodable, or what failed its transaction
	early    bool  // it came ahead of its copy from Kafka: unless all goes well it is left to that
	skip     bool  // a copy of a type that is another group's by now: settle it without the handler
	twin     bool  // another item of this batch has its id
	reused   bool  // another record of this batch has its id and another payload
	hashed   bool
	hash     int64 // of the payload, once hashed
	tried    Tried
	prepared *prepared[T] // nil: Prepare has not seen it, or must see it again
	whole    int          // transactions that failed with it for no stated reason
	ready    time.Time    // not before
	since    time.Time    // held since
	done     bool
}

// prepared is what one call of Prepare answered.
type prepared[T Tx] struct{ apply Apply[T] }

// actor reports that the handler has a say in it.
func (it *item[T]) actor() bool { return it.err == nil && !it.skip && !it.reused }

// payload is events.PayloadHash of the record. Most messages have neither a row nor a twin, and never need it.
func (it *item[T]) payload() int64 {
	if !it.hashed {
		it.hash, it.hashed = events.PayloadHash(it.d.Record.Value), true
	}
	return it.hash
}

// actors are the deliveries of those items in which the handler has a say.
func actors[T Tx](items []*item[T]) []*Delivery {
	batch := make([]*Delivery, 0, len(items))
	for _, it := range items {
		if it.actor() {
			batch = append(batch, it.d)
		}
	}
	return batch
}

// receive decodes the batch, settles what is another group's, and joins what was delivered twice (F31).
func (r *run[T]) receive(batch []events.Record) {
	// One allocation for all of a kind: they live and go together.
	deliveries, items := make([]Delivery, len(batch)), make([]item[T], len(batch))
	r.items = make([]*item[T], 0, len(batch))
	for i := range batch {
		it := &items[i]
		it.d, it.at = &deliveries[i], i
		r.receiveOne(it, &batch[i])
		if it.early = batch[i].Offset == EarlyOffset; it.early && it.err != nil {
			continue
		}
		if it.skip && it.d.Ticket == 0 {
			r.settled[i] = true
			r.stats.Foreign++
			continue
		}
		r.items = append(r.items, it)
	}
	r.join()
}

// join finds the items that have one id. Those with one ticket and one payload too are one message, the first of them; of different
// payloads the first is believed.
func (r *run[T]) join() {
	if len(r.items) < 2 {
		return
	}
	byID := slices.Clone(r.items)
	slices.SortFunc(byID, func(a, b *item[T]) int {
		if c := compareIDs(a.d.ID, b.d.ID); c != 0 {
			return c
		}
		return a.at - b.at
	})
	joined := false
	for i := 1; i < len(byID); i++ {
		it, n := byID[i], i-1
		if byID[n].d.ID != it.d.ID {
			continue
		}
		for n > 0 && byID[n-1].d.ID == it.d.ID {
			n--
		}
		joined = r.joinTo(byID[n:i], it) || joined
	}
	if joined {
		r.items = slices.DeleteFunc(r.items, func(it *item[T]) bool { return it.done })
	}
}

// joinTo compares an item with those before it that have its id, and reports whether it is one of them delivered again.
func (r *run[T]) joinTo(before []*item[T], it *item[T]) bool {
	for _, first := range before {
		if !first.done && first.d.Ticket == it.d.Ticket && first.payload() == it.payload() {
			first.again = append(first.again, it.at)
			it.done = true
			return true
		}
	}
	before[0].twin, it.twin = true, true
	it.reused = before[0].payload() != it.payload()
	return false
}

func (r *run[T]) receiveOne(it *item[T], rec *events.Record) {
	d := it.d
	d.Record, d.Group, d.Attempt, d.Origin = *rec, r.cfg.Name, 1, Place{rec.Topic, rec.Partition, rec.Offset}
	attrs := events.AttributesOf(rec)
	if t, ok := attrs.Known(); ok && !r.owns(t.Name, t) {
		it.skip = true // unread: whether its body is sound is its own group's to say
		d.Type, d.ID = t.Name, attrs.Identity(rec)
	} else {
		d.Envelope, it.err = r.decode(rec, &attrs)
	}
	if it.err != nil {
		d.ID = attrs.Identity(rec)
		d.Type = events.Name(CleanText(string(attrs.Type), MaxTypeBytes))
		if id, err := uuid.ParseBytes(rec.Key); err == nil && len(rec.Key) == 36 {
			d.OrderID = id
		}
	}
	if r.retry[rec.Topic] {
		if c, ok := readCopy(rec); ok {
			d.ID, d.Ticket, d.Attempt, d.First, d.Origin, d.Replay = c.id, c.ticket, c.attempt, c.first, c.origin, c.replay
			it.tried.Tier = c.tier
		} else {
			it.err = &strayCopyError{topic: rec.Topic}
		}
	}
	if it.err != nil {
		it.skip = false
		return
	}
	t, ok := attrs.Known()
	if !ok || t.Name != d.Type { // a decoder of its own may name types as it likes
		t, ok = events.TypeOf(d.Type)
	}
	it.tried.Endless = ok && t.Endless
	it.skip = it.skip || !r.owns(d.Type, t)
}

// owns reports whether a type is this group's. t is its row of the table, nil if it has none.
func (g *Group[T]) owns(n events.Name, t *events.Type) bool {
	if g.cfg.Owns != nil {
		return g.cfg.Owns(n)
	}
	return t == nil || t.Group == g.cfg.Name
}

// decode guards against a decoder that panics: it reads what anybody may have written.
func (r *run[T]) decode(rec *events.Record, attrs *events.Attributes) (env events.Envelope, err error) {
	defer func() {
		if v := recover(); v != nil {
			env, err = events.Envelope{}, newPanicError(v)
		}
	}()
	if r.cfg.Decode == nil {
		env, err = attrs.Decode(rec)
	} else {
		env, err = r.cfg.Decode(rec)
		env.ID = attrs.Identity(rec) // whatever it made of it: it is what the inbox goes by
	}
	if err == nil {
		return env, nil
	}
	var unknown *events.UnknownTypeError
	if !poison(err) && !errors.As(err, &unknown) {
		err = &undecodableError{err}
	}
	return env, err
}

// strayCopyError is a record on a retry topic that we did not put there.
type strayCopyError struct{ topic events.Topic }

func (e *strayCopyError) Error() string {
	return fmt.Sprintf("the record on %s has no valid %s* headers: retry topics take copies from ordersaga only; send messages to their own topic", e.topic, ownHeaders)
}

func (*strayCopyError) Poison() bool { return true }

// undecodableError makes what a decoder says of a record final.
type undecodableError struct{ err error }

func (e *undecodableError) Error() string { return e.err.Error() }
func (e *undecodableError) Unwrap() error { return e.err }
func (*undecodableError) Poison() bool    { return true }

// pending answers the items that can go on now, and when the next one can that can't.
func (r *run[T]) pending() (due []*item[T], next time.Time) {
	if r.open() == 0 {
		return nil, next
	}
	now := time.Now()
	for _, it := range r.items {
		switch {
		case it.done:
		case !it.ready.After(now):
			if due == nil {
				due = make([]*item[T], 0, len(r.items))
			}
			due = append(due, it)
		case next.IsZero() || it.ready.Before(next):
			next = it.ready
		}
	}
	return due, next
}

// open is the number of items without a final verdict.
func (r *run[T]) open() (n int) {
	for _, it := range r.items {
		if !it.done {
			n++
		}
	}
	return n
}

// round gives every item one try: outcomes that an earlier round prepared are applied, the rest is prepared first.
func (r *run[T]) round(ctx context.Context, items []*item[T]) {
	if items = r.dropStale(ctx, items); len(items) == 0 {
		return
	}
	if !slices.ContainsFunc(items, func(it *item[T]) bool { return it.prepared != nil }) {
		r.prepare(ctx, items)
		return
	}
	var fresh []*item[T]
	var parts []*prepared[T]
	byPrepared := map[*prepared[T]][]*item[T]{}
	for _, it := range items {
		if it.prepared == nil {
			fresh = append(fresh, it)
			continue
		}
		if byPrepared[it.prepared] == nil {
			parts = append(parts, it.prepared)
		}
		byPrepared[it.prepared] = append(byPrepared[it.prepared], it)
	}
	for _, p := range parts {
		r.transact(ctx, byPrepared[p], p.apply)
	}
	r.prepare(ctx, fresh)
}

// dropStale settles copies whose ticket is not the row's any more, before anybody makes a network call for them. It is a look ahead
// only: what counts is the claim in the transaction of the effect.
func (r *run[T]) dropStale(ctx context.Context, items []*item[T]) []*item[T] {
	var ids []uuid.UUID
	for _, it := range items {
		if it.d.Ticket != 0 && it.prepared == nil {
			ids = append(ids, it.d.ID)
		}
	}
	if len(ids) == 0 {
		return items
	}
	var rows map[uuid.UUID]InboxRow
	r.stats.Transactions++
	err := r.store.InTx(ctx, func(ctx context.Context, tx T) (err error) {
		rows, err = tx.Inbox(ctx, r.cfg.Name, sortedIDs(ids))
		return err
	})
	if err != nil {
		return items // the transaction to come meets the same error, and decides
	}
	left := make([]*item[T], 0, len(items))
	for _, it := range items {
		if row, ok := rows[it.d.ID]; ok && it.d.Ticket != 0 && it.prepared == nil && !claims(&row, it.d.Ticket) {
			r.settle(it, Verdict{Kind: Repeat}, nil)
			continue
		}
		left = append(left, it)
	}
	return left
}

// prepare calls the handler's Prepare for those it has a say in, and hands all to transact.
func (r *run[T]) prepare(ctx context.Context, items []*item[T]) {
	if len(items) == 0 || ctx.Err() != nil {
		return
	}
	batch := actors(items)
	if len(batch) == 0 {
		r.transact(ctx, items, nil)
		return
	}
	apply, err := r.callPrepare(ctx, batch)
	if err == nil {
		p := &prepared[T]{apply}
		for _, it := range items {
			it.prepared = p
		}
		r.transact(ctx, items, apply)
		return
	}
	acting := make([]*item[T], 0, len(batch))
	for _, it := range items {
		if it.actor() {
			acting = append(acting, it)
		}
	}
	if len(acting) < len(items) {
		r.transact(ctx, slices.DeleteFunc(slices.Clone(items), (*item[T]).actor), nil)
	}
	if acting = leaveEarly(acting); len(acting) == 0 {
		return
	}
	switch {
	case ctx.Err() != nil:
	case outage(err) != "":
		r.hold(acting, err)
	case len(acting) > 1:
		r.cfg.Observer.Split(r.cfg.Name, len(acting), err)
		for _, part := range split(acting) {
			r.prepare(ctx, part)
		}
	default:
		r.fail(ctx, acting[0], err)
	}
}

func (r *run[T]) callPrepare(ctx context.Context, batch []*Delivery) (apply Apply[T], err error) {
	defer func() {
		if v := recover(); v != nil {
			apply, err = nil, newPanicError(v)
		}
	}()
	apply, err = r.handler.Prepare(ctx, batch)
	if err == nil && apply == nil {
		err = &brokenHandlerError{"Prepare answered no Apply"}
	}
	return apply, err
}

// brokenHandlerError is a handler that does not keep its contract; the record waits as a dead letter for a repaired one.
type brokenHandlerError struct{ what string }

func (e *brokenHandlerError) Error() string { return "the handler is broken: " + e.what }
func (*brokenHandlerError) Poison() bool    { return true }

// fail settles one item with an error that the handler's results do not carry.
func (r *run[T]) fail(ctx context.Context, it *item[T], err error) {
	if dataError(err) {
		err = &refusedByData{err}
	}
	it.err = err
	r.transact(ctx, []*item[T]{it}, nil)
}

// hold puts items off, because something is away.
func (r *run[T]) hold(items []*item[T], err error) {
	longest, now := time.Duration(0), time.Now()
	for _, it := range items {
		if it.since.IsZero() {
			it.since = now
		}
		longest = max(longest, now.Sub(it.since))
	}
	wait := r.cfg.Policy.holdFor(items[0].tried.Held, retryAfter(err)) // one for all: they go on together
	for _, it := range items {
		it.tried.Held++
		it.ready = now.Add(wait)
	}
	r.stats.Counts[Hold] += len(items)
	r.cfg.Observer.Held(r.cfg.Name, outage(err), len(items), longest, err)
}

// leaveEarly gives up the items that came ahead of their copies: those copies try again, and tell what is wrong. It answers the others.
func leaveEarly[T Tx](items []*item[T]) []*item[T] {
	left := make([]*item[T], 0, len(items))
	for _, it := range items {
		if it.done = it.done || it.early; !it.done {
			left = append(left, it)
		}
	}
	return left
}

// split takes a failed batch apart: by partition, then in halves.
func split[T Tx](items []*item[T]) [][]*item[T] {
	byPartition := map[Place][]*item[T]{}
	var order []Place
	for _, it := range items {
		p := Place{Topic: it.d.Record.Topic, Partition: it.d.Record.Partition}
		if byPartition[p] == nil {
			order = append(order, p)
		}
		byPartition[p] = append(byPartition[p], it)
	}
	if len(order) == 1 {
		half := len(items) / 2
		return [][]*item[T]{items[:half], items[half:]}
	}
	slices.SortFunc(order, func(a, b Place) int {
		if c := strings.Compare(string(a.Topic), string(b.Topic)); c != 0 {
			return c
		}
		return int(a.Partition) - int(b.Partition)
	})
	parts := make([][]*item[T], 0, len(order))
	for _, p := range order {
		parts = append(parts, byPartition[p])
	}
	return parts
}

func sortedIDs(ids []uuid.UUID) []uuid.UUID {
	slices.SortFunc(ids, compareIDs)
	return slices.Compact(ids)
}

func newTicket() int64 { return rand.Int64N(1<<62) + 1 }
