package events

import (
	"crypto/sha256"
	"encoding/binary"
	"time"

	"github.com/google/uuid"
)

// Source is the ce_source of every message of ours.
const Source = "/ordersaga"

// The headers of a record: CloudEvents 1.0 in binary mode, W3C trace context, and what the retry and dead-letter paths add.
const (
	HeaderSpecVersion = "ce_specversion"
	HeaderID          = "ce_id"
	HeaderSource      = "ce_source"
	HeaderType        = "ce_type"
	HeaderTime        = "ce_time"
	HeaderSequence    = "ce_sequence"
	HeaderContentType = "content-type"
	HeaderTraceparent = "traceparent"
)

// Header is one header of a record.
type Header struct {
	Key   string
	Value []byte
}

// Record is a Kafka record without a client library: what a source hands over and what a producer takes. Topic carries no prefix.
type Record struct {
	Topic     Topic
	Partition int32
	Offset    int64
	Timestamp time.Time
	Key       []byte
	Value     []byte
	Headers   []Header
}

// Header finds the first header of a name; nil where there is none.
func (r *Record) Header(key string) []byte {
	for i := range r.Headers {
		if r.Headers[i].Key == key {
			return r.Headers[i].Value
		}
	}
	return nil
}

// Trace is a W3C trace context: version 00, 16 bytes of trace id, 8 of span id, flags. The zero value is none.
type Trace struct {
	TraceID [16]byte
	SpanID  [8]byte
	Flags   byte
}

// Envelope is a message with its attributes.
type Envelope struct {
	ID       uuid.UUID // identity of the message; ours are UUIDv7
	Type     Name
	OrderID  uuid.UUID // the record's key
	Sequence int32     // public events: ce_sequence; else 0
	Trace    Trace
	Data     any // a pointer to the type that the table names: a generated message, or a struct of public.go

	// Settled says that its group, in this process, handled it in the transaction that emits it, so that nobody waits for it. It is not on the wire.
	Settled bool
}

// Raw is a record to be forwarded as it is: a retry copy or a dead letter.
type Raw struct {
	Topic   Topic
	Key     []byte
	Value   []byte
	Headers []Header
}

// KeyOf is the key of an order's records.
func KeyOf(order uuid.UUID) []byte { return appendUUID(make([]byte, 0, uuidLen), order) }

// NewID draws the id of a message of ours.
func NewID() uuid.UUID { return uuid.Must(uuid.NewV7()) }

// Identity is what a record is deduplicated by. A message of ours is its own UUIDv7. Any other (ce_source, ce_id) is hashed into
// an id whose first six bytes are zero, so that the time-partitioned inbox keeps the two kinds apart; a record without an id is
// identified by where it lies.
func Identity(r *Record) uuid.UUID {
	a := AttributesOf(r)
	return a.Identity(r)
}

// PayloadHash tells two payloads apart: the first eight bytes of SHA-256.
func PayloadHash(value []byte) int64 {
	h := sha256.Sum256(value)
	return int64(binary.BigEndian.Uint64(h[:8])) //nolint:gosec // bits, not a number
}
