package outbox

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"ordersaga/events"
)

// memoryLog is a Log with the semantics that Postgres gives it: ids are drawn before commits, snapshots know who was under way.
type memoryLog struct {
	mu        sync.Mutex
	nextXid   uint64
	completed uint64 // the latest xid that ended
	active    map[uint64]bool
	rows      []*memoryRow
	shards    [TotalShards]memoryShard
	relays    map[string]time.Time
	dead      []deadMessage

	windows, stores, sent int
	stored                map[int16][]time.Time
	// hook is called before each call, without the lock; an error is the call's.
	hook func(op, relay string) error
	// onRow is called before each row that a window delivers.
	onRow func(n int) error
}

type deadMessage struct {
	m      *Message
	reason string
}

type memoryRow struct {
	xid       uint64
	committed bool
	m         Message
}

type memoryShard struct {
	owner  string
	fence  int64
	until  time.Time
	cursor Cursor
}

func newMemoryLog() *memoryLog {
	l := &memoryLog{nextXid: 100, completed: 99, active: map[uint64]bool{}, relays: map[string]time.Time{}, stored: map[int16][]time.Time{}}
	for i := range l.shards {
		l.shards[i].cursor = Cursor{Prev: l.snapshot()}
	}
	return l
}

type memoryTx struct {
	l    *memoryLog
	xid  uint64
	rows []*memoryRow
}

func (l *memoryLog) begin() *memoryTx {
	l.mu.Lock()
	defer l.mu.Unlock()
	x := l.nextXid
	l.nextXid++
	l.active[x] = true
	return &memoryTx{l: l, xid: x}
}

// emit draws ids, in order.
func (t *memoryTx) emit(ms ...Message) {
	t.l.mu.Lock()
	defer t.l.mu.Unlock()
	for _, m := range ms {
		m.RowID = int64(len(t.l.rows)) + 1
		r := &memoryRow{xid: t.xid, m: m}
		t.l.rows = append(t.l.rows, r)
		t.rows = append(t.rows, r)
	}
}

func (t *memoryTx) commit()   { t.end(true) }
func (t *memoryTx) rollback() { t.end(false) }

func (t *memoryTx) end(committed bool) {
	t.l.mu.Lock()
	defer t.l.mu.Unlock()
	for _, r := range t.rows {
		r.committed = committed
	}
	delete(t.l.active, t.xid)
	t.l.completed = max(t.l.completed, t.xid)
}

// counts answers how many windows were opened and how many rows they delivered.
func (l *memoryLog) counts() (windows, rows int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.windows, l.sent
}

func (l *memoryLog) storesOf(shard int16) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.stored[shard])
}

func (l *memoryLog) setAside() []deadMessage {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.dead)
}

// put commits messages in a transaction of their own.
func (l *memoryLog) put(ms ...Message) {
	t := l.begin()
	t.emit(ms...)
	t.commit()
}

func (l *memoryLog) snapshot() Snapshot {
	xmax := l.completed + 1
	var xip []string
	xmin := xmax
	for _, x := range slices.Sorted(maps.Keys(l.active)) {
		if x < xmax {
			xip = append(xip, strconv.FormatUint(x, 10))
			xmin = min(xmin, x)
		}
	}
	return Snapshot(fmt.Sprintf("%d:%d:%s", xmin, xmax, strings.Join(xip, ",")))
}

type parsed struct {
	xmax uint64
	xip  map[uint64]bool
}

func parse(s Snapshot) parsed {
	part := strings.Split(string(s), ":")
	number := func(text string) uint64 {
		n, err := strconv.ParseUint(text, 10, 64)
		if err != nil {
			panic(err)
		}
		return n
	}
	p := parsed{xmax: number(part[1]), xip: map[uint64]bool{}}
	if part[2] != "" {
		for x := range strings.SplitSeq(part[2], ",") {
			p.xip[number(x)] = true
		}
	}
	return p
}

func (p parsed) shows(xid uint64) bool { return xid < p.xmax && !p.xip[xid] }

func (l *memoryLog) before(op, relay string) error {
	if l.hook != nil {
		return l.hook(op, relay)
	}
	return nil
}

func (l *memoryLog) Acquire(_ context.Context, relay string, term time.Duration) (Grant, error) {
	if err := l.before("acquire", relay); err != nil {
		return Grant{}, err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Now()
	l.relays[relay] = now
	live := 0
	for _, seen := range l.relays {
		if now.Sub(seen) < term {
			live++
		}
	}
	g := Grant{Share: (TotalShards + live - 1) / live}
	held := 0
	for i := range l.shards {
		if l.shards[i].owner == relay {
			held++
		}
	}
	for i := range l.shards {
		s := &l.shards[i]
		if s.owner != relay && (s.owner == "" || !now.Before(s.until)) && held < g.Share {
			s.owner = relay
			s.fence++
			held++
		}
		if s.owner == relay {
			s.until = now.Add(term)
			g.Leases = append(g.Leases, Lease{Shard: int16(i), Fence: s.fence, Cursor: s.cursor})
		}
	}
	return g, nil
}

func (l *memoryLog) Release(_ context.Context, relay string, leases []Lease) error {
	if err := l.before("release", relay); err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, b := range leases {
		if s := &l.shards[b.Shard]; s.owner == relay && s.fence == b.Fence {
			s.owner = ""
		}
	}
	return nil
}

func (l *memoryLog) Leave(_ context.Context, relay string) error {
	if err := l.before("leave", relay); err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.relays, relay)
	for i := range l.shards {
		if l.shards[i].owner == relay {
			l.shards[i].owner = ""
		}
	}
	return nil
}

func (l *memoryLog) Window(ctx context.Context, spans []Span, begin func(Snapshot), each func(*Message) error) error {
	if err := l.before("window", ""); err != nil {
		return err
	}
	l.mu.Lock()
	l.windows++
	next := l.snapshot()
	var out []*Message
	for _, span := range spans {
		prev, end := parse(span.From.Prev), parse(next)
		if span.From.Next != "" {
			end = parse(span.From.Next)
		}
		for _, r := range l.rows {
			seen := prev.shows(r.xid) || !end.shows(r.xid) || !r.committed || r.m.RowID <= span.From.After
			if !seen && slices.Contains(span.Shards, r.m.Shard) {
				m := r.m
				out = append(out, &m)
			}
		}
	}
	l.mu.Unlock()
	begin(next)
	for i, m := range out {
		if err := ctx.Err(); err != nil {
			return err
		}
		if l.onRow != nil {
			if err := l.onRow(i); err != nil {
				return err
			}
		}
		l.mu.Lock()
		l.sent++
		l.mu.Unlock()
		if err := each(m); err != nil {
			return err
		}
	}
	return nil
}

func (l *memoryLog) Store(_ context.Context, relay string, leases []Lease) (fenced []int16, err error) {
	if err := l.before("store", relay); err != nil {
		return nil, err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.stores++
	for _, c := range leases {
		s := &l.shards[c.Shard]
		if s.owner != relay || s.fence != c.Fence {
			fenced = append(fenced, c.Shard)
			continue
		}
		s.cursor = c.Cursor
		l.stored[c.Shard] = append(l.stored[c.Shard], time.Now())
	}
	return fenced, nil
}

func (l *memoryLog) Backlog(context.Context) (Backlog, error) {
	if err := l.before("backlog", ""); err != nil {
		return Backlog{}, err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	var b Backlog
	for _, r := range l.rows {
		c := l.shards[r.m.Shard].cursor
		if r.committed && !parse(c.Prev).shows(r.xid) && (c.Next == "" || !parse(c.Next).shows(r.xid) || r.m.RowID > c.After) {
			b.Rows++
		}
	}
	return b, nil
}

func (l *memoryLog) SetAside(_ context.Context, m *Message, reason string) error {
	if err := l.before("set aside", ""); err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.dead = append(l.dead, deadMessage{m, reason})
	return nil
}

// broker is a Producer that keeps what it took, with an answer after a latency or on demand.
type broker struct {
	mu      sync.Mutex
	records []events.Record
	latency time.Duration
	held    []func() // answers that wait for release, in order
	hold    bool
	most    int // answers that were outstanding at once
	open    int
	// judge answers the error for a record, nil to take it; a record that fails is not kept.
	judge func(r events.Record) error
}

type refusal string

func (e refusal) Error() string { return string(e) }
func (refusal) Refused() bool   { return true }

var errAway = errors.New("the broker is away")

func (b *broker) Produce(_ context.Context, r events.Record, done func(error)) {
	b.mu.Lock()
	var err error
	if b.judge != nil {
		err = b.judge(r)
	}
	if err == nil {
		b.records = append(b.records, r)
	}
	b.open++
	b.most = max(b.most, b.open)
	answer := func() {
		b.mu.Lock()
		b.open--
		b.mu.Unlock()
		done(err)
	}
	if b.hold {
		b.held = append(b.held, answer)
		b.mu.Unlock()
		return
	}
	b.mu.Unlock()
	if b.latency > 0 {
		time.AfterFunc(b.latency, answer)
		return
	}
	answer()
}

// release answers what is held and goes on without holding.
func (b *broker) release() {
	b.mu.Lock()
	held := b.held
	b.held, b.hold = nil, false
	b.mu.Unlock()
	for _, f := range held {
		f()
	}
}

func (b *broker) Flush(context.Context) error { return nil }

// values are the payloads in the order in which the broker got them.
func (b *broker) values() []string {
	b.mu.Lock()
	defer b.mu.Unlock()
	out := make([]string, len(b.records))
	for i := range b.records {
		out[i] = string(b.records[i].Value)
	}
	return out
}

// firsts are values without what came before.
func firsts(values []string) []string {
	seen := map[string]bool{}
	var out []string
	for _, v := range values {
		if !seen[v] {
			seen[v] = true
			out = append(out, v)
		}
	}
	return out
}
