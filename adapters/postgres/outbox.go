package postgres

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"

	"ordersaga/consumers"
	"ordersaga/events"
	"ordersaga/outbox"
)

// The rows of one statement draw their ids in the order of the arrays. Writes are queued, so ids are drawn after the rows of the
// order, the payment or the reservation were locked: whoever comes second under that lock has the higher ids (F3).
var (
	insertPacks = over("shard smallint, id uuid, pack bytea", func(u string) string {
		return `INSERT INTO outbox (shard, message_id, pack) SELECT shard, id, pack FROM ` + u
	})
	insertRaw = over("shard smallint, id uuid, topic text, key bytea, headers bytea, payload bytea", func(u string) string {
		return `INSERT INTO outbox (shard, message_id, topic, key, headers, payload) SELECT shard, id, topic, key, headers, payload FROM ` + u
	})
)

// Emit queues messages for the outbox, in order. An error is a slip of the caller's, such as data of another type.
func (t *Tx) Emit(_ context.Context, out []events.Envelope) error {
	if len(out) == 0 {
		return nil
	}
	from := len(t.emitted)
	t.emitted = slices.Grow(t.emitted, len(out))
	for i := range out {
		m, err := outbox.FromEnvelope(out[i])
		if err != nil {
			return fmt.Errorf("postgres: emit: %w", err)
		}
		t.emitted = append(t.emitted, m)
	}
	packs := outbox.Packs(t.emitted[from:])
	shards, ids, data := make([]int16, len(packs)), make([]uuid.UUID, len(packs)), make([][]byte, len(packs))
	for i := range packs {
		shards[i], ids[i], data[i] = packs[i].Shard, packs[i].ID, packs[i].Data
	}
	t.queueRows("insert outbox", insertPacks, len(packs), []any{shards, ids, data})
	return nil
}

// Forward queues raw records for the outbox, in order.
func (t *Tx) Forward(_ context.Context, out []events.Raw) error {
	n := len(out)
	if n == 0 {
		return nil
	}
	shards, ids, topics := make([]int16, n), make([]uuid.UUID, n), make([]string, n)
	keys, headers, payloads := make([][]byte, n), make([][]byte, n), make([][]byte, n)
	for i := range out {
		m := outbox.FromRaw(out[i])
		shards[i], ids[i], topics[i], keys[i], payloads[i] = m.Shard, m.ID, string(m.Topic), m.Key, m.Payload
		headers[i] = events.AppendHeaders(nil, m.Headers)
		t.emitted = append(t.emitted, m)
	}
	t.queueRows("insert outbox", insertRaw, n, []any{shards, ids, topics, keys, headers, payloads})
	return nil
}

// SetAside stores a record that Kafka refused as an open dead letter of the group that would have acted on it; of no group if it was
// for readers outside. The copy of a retry turns its message dead, so that a replay can follow. What was for a dead-letter topic is
// a dead letter already.
func (l *OutboxLog) SetAside(ctx context.Context, m *outbox.Message, reason string) error {
	if strings.HasPrefix(string(m.Topic), dlqPrefix) {
		return nil
	}
	d := l.refused(m, reason)
	return l.db.For(Relay).InTx(ctx, func(ctx context.Context, tx *Tx) error {
		if m.Type == "" && d.Group != "" {
			rows, err := tx.Inbox(ctx, d.Group, []uuid.UUID{d.MessageID})
			if err != nil {
				return err
			}
			if row, ok := rows[d.MessageID]; ok && row.Ticket == d.Ticket {
				row.State = consumers.InboxDead
				if err := tx.SaveInbox(ctx, d.Group, []consumers.InboxRow{row}); err != nil {
					return err
				}
			}
		}
		return tx.SaveDeadLetters(ctx, []consumers.DeadLetter{d})
	})
}

const (
	retryPrefix = "retry."
	dlqPrefix   = "dlq."
)

// refused describes a message that Kafka refused. The consumers' room owns the headers of copies; what is missing in them is left out.
func (l *OutboxLog) refused(m *outbox.Message, reason string) consumers.DeadLetter {
	now := l.db.Now()
	d := consumers.DeadLetter{
		ID: events.NewID(), MessageID: m.ID, Type: string(m.Type), OrderID: m.OrderID, Status: consumers.DeadOpen,
		Class: consumers.ClassTooLarge, Error: consumers.CleanText("Kafka refused the record: "+reason, consumers.MaxErrorBytes),
		Attempts: 1, FirstFailed: now, LastFailed: now, Key: m.Key, Value: m.Payload, Headers: m.Headers,
	}
	if t, ok := events.TypeOf(m.Type); ok {
		d.Group, d.Origin.Topic, d.Key = t.Group, t.Topic, []byte(m.OrderID.String())
		d.Headers = events.HeadersOf(events.Envelope{ID: m.ID, Type: m.Type, Sequence: m.Sequence, Trace: m.Trace})
	} else {
		describeCopy(&d, m)
	}
	d.Fingerprint = consumers.Fingerprint(d.Class, d.Type, d.Error)
	return d
}

func describeCopy(d *consumers.DeadLetter, m *outbox.Message) {
	d.Origin.Topic = m.Topic
	r := events.Record{Headers: m.Headers}
	d.Type = consumers.CleanText(string(r.Header(events.HeaderType)), consumers.MaxTypeBytes)
	if t, ok := events.TypeOfCE(d.Type); ok {
		d.Type = string(t.Name)
	}
	if id, err := uuid.ParseBytes(m.Key); err == nil && id != uuid.Nil {
		d.OrderID = id
	}
	group, ok := strings.CutPrefix(string(m.Topic), retryPrefix)
	i := strings.LastIndexByte(group, '.')
	id, err := uuid.ParseBytes(r.Header(consumers.HeaderMessageID))
	if !ok || i < 0 || err != nil {
		return // not a copy of ours: it is published again as it was
	}
	d.Group, d.MessageID = events.Group(group[:i]), id
	d.Ticket = number(r.Header(consumers.HeaderTicket))
	d.Attempts = max(1, int(number(r.Header(consumers.HeaderAttempt))))
	if ms := number(r.Header(consumers.HeaderFirst)); ms > 0 {
		d.FirstFailed = time.UnixMilli(ms)
	}
	d.Origin = originOf(string(r.Header(consumers.HeaderOrigin)), d.Origin)
	d.Headers = nil
	for _, h := range m.Headers {
		if !strings.HasPrefix(h.Key, "ordersaga_") {
			d.Headers = append(d.Headers, h)
		}
	}
}

func number(b []byte) int64 {
	n, err := strconv.ParseInt(string(b), 10, 64)
	if err != nil {
		return 0
	}
	return n
}

// originOf reads topic/partition/offset.
func originOf(s string, fallback consumers.Place) consumers.Place {
	topic, rest, ok := cutLast(s, 2)
	partition, offset, ok2 := strings.Cut(rest, "/")
	if !ok || !ok2 {
		return fallback
	}
	p, err := strconv.ParseInt(partition, 10, 32)
	if err != nil {
		return fallback
	}
	return consumers.Place{Topic: events.Topic(topic), Partition: int32(p), Offset: number([]byte(offset))}
}

// cutLast cuts before the last n parts of a path.
func cutLast(s string, n int) (before, after string, ok bool) {
	i := len(s)
	for range n {
		if i = strings.LastIndexByte(s[:i], '/'); i < 1 {
			return "", "", false
		}
	}
	return s[:i], s[i+1:], true
}

var _ outbox.Log = (*OutboxLog)(nil)
