package events

import (
	"encoding/binary"
	"errors"
	"fmt"
	"strconv"
	"time"

	"github.com/google/uuid"
)

// Values that every record of ours has. Headers share them: nobody writes to a header's value.
var (
	specVersionValue = []byte("1.0")
	sourceValue      = []byte(Source)
	jsonValue        = []byte(ContentJSON)
	protobufValue    = []byte(ContentProtobuf)
)

const (
	maxOwnHeaders = 8
	timeLayout    = "2006-01-02T15:04:05.000Z"
	// room for the id, the time, the trace context and the sequence
	ownHeaderBytes = 36 + len(timeLayout) + traceparentLen + 11
)

// HeadersOf writes the attributes of a message of ours as headers; Data and OrderID do not matter. The values must not be written to.
// It answers nil for a type that the table does not have: such a message has no topic either.
func HeadersOf(e Envelope) []Header {
	t, ok := TypeOf(e.Type)
	if !ok {
		return nil
	}
	h := make([]Header, 0, maxOwnHeaders)
	b := make([]byte, 0, ownHeaderBytes) // one allocation for all values that differ between records
	h = append(h,
		Header{HeaderSpecVersion, specVersionValue},
		Header{HeaderID, nil},
		Header{HeaderSource, sourceValue},
		Header{HeaderType, t.ce},
	)
	b = appendUUID(b, e.ID)
	h[1].Value = b[:36:36]
	if at, ok := timeOf(e.ID); ok {
		n := len(b)
		b = at.AppendFormat(b, timeLayout)
		h = append(h, Header{HeaderTime, b[n:len(b):len(b)]})
	}
	if t.Format == Protobuf {
		h = append(h, Header{HeaderContentType, protobufValue})
	} else {
		h = append(h, Header{HeaderContentType, jsonValue})
	}
	if !e.Trace.IsZero() {
		n := len(b)
		b = e.Trace.appendText(b)
		h = append(h, Header{HeaderTraceparent, b[n:len(b):len(b)]})
	}
	if e.Sequence > 0 {
		n := len(b)
		b = strconv.AppendInt(b, int64(e.Sequence), 10)
		h = append(h, Header{HeaderSequence, b[n:len(b):len(b)]})
	}
	return h
}

func appendUUID(b []byte, id uuid.UUID) []byte {
	const digits = "0123456789abcdef"
	for i, c := range id {
		if i == 4 || i == 6 || i == 8 || i == 10 {
			b = append(b, '-')
		}
		b = append(b, digits[c>>4], digits[c&0x0f])
	}
	return b
}

// timeOf is when a UUIDv7 was drawn, to the millisecond.
func timeOf(id uuid.UUID) (time.Time, bool) {
	if id.Version() != 7 {
		return time.Time{}, false
	}
	var b [8]byte
	copy(b[2:], id[:6])
	return time.UnixMilli(int64(binary.BigEndian.Uint64(b[:]))).UTC(), true //nolint:gosec // 48 bits
}

// headersV1 opens every block of headers: then a count, and for each a key and a value, both after their length. The length of a
// value is stored plus one; 0 is a value that is null, which Kafka tells from an empty one.
const headersV1 = 1

// AppendHeaders appends headers in the compact form in which the outbox stores those of a raw record; nothing if there are none.
func AppendHeaders(b []byte, headers []Header) []byte {
	if len(headers) == 0 {
		return b
	}
	b = append(b, headersV1)
	b = binary.AppendUvarint(b, uint64(len(headers)))
	for i := range headers {
		h := &headers[i]
		b = binary.AppendUvarint(b, uint64(len(h.Key)))
		b = append(b, h.Key...)
		if h.Value == nil {
			b = binary.AppendUvarint(b, 0)
			continue
		}
		b = binary.AppendUvarint(b, uint64(len(h.Value))+1)
		b = append(b, h.Value...)
	}
	return b
}

var errHeaderBlock = errors.New("damaged block of headers")

// ParseHeaders reads what AppendHeaders wrote. Values are parts of b. What it allocates is bounded by the length of b.
func ParseHeaders(b []byte) ([]Header, error) {
	if len(b) == 0 {
		return nil, nil
	}
	if b[0] != headersV1 {
		return nil, fmt.Errorf("%w: format %d, this build reads %d", errHeaderBlock, b[0], headersV1)
	}
	n, b, ok := uvarint(b[1:])
	if !ok || n == 0 || n > uint64(len(b))/2 { // each has at least two lengths
		return nil, fmt.Errorf("%w: impossible count", errHeaderBlock)
	}
	out := make([]Header, n)
	for i := range out {
		var key []byte
		if key, b, ok = sized(b, 0); !ok {
			return nil, fmt.Errorf("%w: it ends in key %d of %d", errHeaderBlock, i+1, n)
		}
		out[i].Key = headerName(key)
		if len(b) > 0 && b[0] == 0 {
			b = b[1:]
			continue
		}
		if out[i].Value, b, ok = sized(b, 1); !ok {
			return nil, fmt.Errorf("%w: it ends in value %d of %d", errHeaderBlock, i+1, n)
		}
	}
	if len(b) > 0 {
		return nil, fmt.Errorf("%w: %d bytes after its end", errHeaderBlock, len(b))
	}
	return out, nil
}

func uvarint(b []byte) (v uint64, rest []byte, ok bool) {
	v, n := binary.Uvarint(b)
	if n <= 0 {
		return 0, nil, false
	}
	return v, b[n:], true
}

// sized cuts off bytes that follow their length, which is stored plus bias.
func sized(b []byte, bias uint64) (part, rest []byte, ok bool) {
	n, b, ok := uvarint(b)
	if !ok || n < bias || n-bias > uint64(len(b)) {
		return nil, nil, false
	}
	n -= bias
	return b[:n:n], b[n:], true
}

// headerName avoids allocating the names that nearly every record has.
func headerName(b []byte) string {
	switch string(b) {
	case HeaderSpecVersion:
		return HeaderSpecVersion
	case HeaderID:
		return HeaderID
	case HeaderSource:
		return HeaderSource
	case HeaderType:
		return HeaderType
	case HeaderTime:
		return HeaderTime
	case HeaderSequence:
		return HeaderSequence
	case HeaderContentType:
		return HeaderContentType
	case HeaderTraceparent:
		return HeaderTraceparent
	}
	return string(b)
}
