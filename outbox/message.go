package outbox

import (
	"fmt"
	"strconv"

	"github.com/google/uuid"

	"ordersaga/events"
)

// FromEnvelope makes the row of a typed message: its body encoded, its headers left to the relay, its shard by the key.
func FromEnvelope(e events.Envelope) (Message, error) {
	payload, err := events.Encode(e)
	if err != nil {
		return Message{}, fmt.Errorf("outbox: %w", err)
	}
	if e.ID == uuid.Nil {
		return Message{}, fmt.Errorf("outbox: %s of order %s has no id: draw one with events.NewID", e.Type, e.OrderID)
	}
	return Message{
		Shard: ShardOf(e.OrderID), ID: e.ID, Type: e.Type, OrderID: e.OrderID, Sequence: e.Sequence, Trace: e.Trace, Payload: payload, Settled: e.Settled,
	}, nil
}

// FromRaw makes the row of a record that is forwarded as it is. Its shard is one of those for raw records, by the key, so that the
// copies of a key stay in order among themselves. The row's id says when it was made and is not part of the record.
func FromRaw(r events.Raw) Message {
	return Message{
		Shard: Shards + int16(keyHash(r.Key)%RawShards), ID: events.NewID(),
		Topic: r.Topic, Key: r.Key, Headers: r.Headers, Payload: r.Value,
	}
}

// ShardOf is the shard of an order's typed messages.
func ShardOf(order uuid.UUID) int16 { return int16(keyHash(order[:]) % Shards) }

// keyHash is FNV-1a. It decides which shard a key's rows are in, so it never changes.
func keyHash(key []byte) uint32 {
	h := uint32(2166136261)
	for _, c := range key {
		h = (h ^ uint32(c)) * 16777619
	}
	return h
}

// unsendableError is a row that no producer of any version could take. It counts as refused: it is set aside and its shard goes on.
type unsendableError struct{ msg string }

func (e *unsendableError) Error() string { return "outbox: " + e.msg }

// Refused reports that the row will never be taken.
func (e *unsendableError) Refused() bool { return true }

// Record expands a row to the record that goes to Kafka. It shares the payload with the row. An error with
// `Refused() bool` true will not go away.
func (m *Message) Record() (events.Record, error) {
	if m.Damage != nil {
		return events.Record{}, fmt.Errorf("outbox: row %d cannot be read, its shard waits: %w", m.RowID, m.Damage)
	}
	if m.Type == "" {
		if m.Topic == "" {
			return events.Record{}, &unsendableError{fmt.Sprintf("row %d has neither a type nor a topic", m.RowID)}
		}
		return events.Record{Topic: m.Topic, Key: m.Key, Value: m.Payload, Headers: m.Headers}, nil
	}
	t, ok := events.TypeOf(m.Type)
	if !ok {
		// A rolling upgrade (F40): who knows the type takes the shard over. Until then it waits; it does not become a dead letter.
		return events.Record{}, fmt.Errorf("outbox: row %d is of type %q, which this version does not know: its shard waits for a newer relay", m.RowID, m.Type)
	}
	return events.Record{
		Topic: t.Topic, Key: events.KeyOf(m.OrderID), Value: m.Payload,
		Headers: events.HeadersOf(events.Envelope{ID: m.ID, Type: m.Type, Sequence: m.Sequence, Trace: m.Trace}),
	}, nil
}

// headerOmitted stands in a dead letter's record for a value that was left out: its size in bytes. The consumers' room writes the
// same one where it knows beforehand.
const headerOmitted = "__dlq.errors.omitted.bytes"

// bare answers the record of a dead letter without its value, for a broker that finds it too large; ok is false for any other record
// and for one that is bare already.
func bare(r events.Record) (_ events.Record, ok bool) {
	if !isDLQ(r.Topic) || len(r.Value) == 0 || r.Header(headerOmitted) != nil {
		return r, false
	}
	size := strconv.Itoa(len(r.Value))
	r.Headers = append(r.Headers[:len(r.Headers):len(r.Headers)], events.Header{Key: headerOmitted, Value: []byte(size)})
	r.Value = []byte{} // not null: Kafka would take that for a deletion
	return r, true
}

func isDLQ(t events.Topic) bool {
	const prefix = "dlq."
	return len(t) > len(prefix) && t[:len(prefix)] == prefix
}
