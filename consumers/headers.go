package consumers

import (
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"

	"ordersaga/events"
)

// The headers that a retry or replay copy carries beside those of the original, which stay as they came. They are believed only on
// a group's own retry topics: a producer that sends them on a public topic changes nothing.
const (
	HeaderTicket    = "ordersaga_ticket"       // decimal
	HeaderDue       = "ordersaga_due"          // Unix time in milliseconds: not to be delivered before
	HeaderAttempt   = "ordersaga_attempt"      // number of the delivery that this copy is for
	HeaderTier      = "ordersaga_tier"         // 1 for the fastest; absent on a replay, which begins the tiers anew
	HeaderFirst     = "ordersaga_first_failed" // Unix time in milliseconds
	HeaderOrigin    = "ordersaga_origin"       // topic/partition/offset of the original
	HeaderMessageID = "ordersaga_message_id"   // what the original is deduplicated by
	HeaderReplay    = "ordersaga_replay"       // "1": an operator sent it
	HeaderError     = "ordersaga_error"        // why it is retried
)

const ownHeaders = "ordersaga_"

// The headers of a record in a dead-letter queue, beside those of the original. The names are those of other tools for such queues.
const (
	HeaderDLQTopic     = "__dlq.errors.topic"
	HeaderDLQPartition = "__dlq.errors.partition"
	HeaderDLQOffset    = "__dlq.errors.offset"
	HeaderDLQGroup     = "__dlq.errors.group"
	HeaderDLQCount     = "__dlq.errors.delivery.count"
	HeaderDLQMessage   = "__dlq.errors.message"
	HeaderDLQOmitted   = "__dlq.errors.omitted.bytes" // only where the value was left out: its size. The dead letter in the database has it
)

const dlqHeaders = "__dlq."

// recordOverhead is what Kafka adds to a record at most, batch header included; headerOverhead what it adds to one header.
const (
	recordOverhead = 256
	headerOverhead = 10
)

// copyState is what the headers of a copy say.
type copyState struct {
	ticket  int64
	attempt int
	tier    int
	first   time.Time
	due     time.Time
	origin  Place
	id      uuid.UUID
	replay  bool
	err     string
}

// originalHeaders are a record's headers without ours and without those of a dead-letter queue (records that an operator copied
// from one by hand keep nothing of it).
func originalHeaders(hs []events.Header) []events.Header {
	out := make([]events.Header, 0, len(hs))
	for _, h := range hs {
		if !strings.HasPrefix(h.Key, ownHeaders) && !strings.HasPrefix(h.Key, dlqHeaders) {
			out = append(out, h)
		}
	}
	return out
}

func (c copyState) headers(original []events.Header) []events.Header {
	out := slices.Grow(originalHeaders(original), 9)
	add := func(k, v string) { out = append(out, events.Header{Key: k, Value: []byte(v)}) }
	add(HeaderTicket, strconv.FormatInt(c.ticket, 10))
	add(HeaderDue, strconv.FormatInt(c.due.Add(time.Millisecond-1).UnixMilli(), 10)) // rounded up: never early
	add(HeaderAttempt, strconv.Itoa(c.attempt))
	if c.tier > 0 {
		add(HeaderTier, strconv.Itoa(c.tier))
	}
	add(HeaderFirst, strconv.FormatInt(c.first.UnixMilli(), 10))
	add(HeaderOrigin, string(c.origin.Topic)+"/"+strconv.Itoa(int(c.origin.Partition))+"/"+strconv.FormatInt(c.origin.Offset, 10))
	add(HeaderMessageID, c.id.String())
	if c.replay {
		add(HeaderReplay, "1")
	}
	add(HeaderError, c.err)
	return out
}

// readCopy reads the headers of a record on a retry topic; ok is false if they are not those of a copy of ours.
func readCopy(r *events.Record) (c copyState, ok bool) {
	num := func(key string) (n int64) {
		v := r.Header(key)
		if v == nil {
			return 0
		}
		n, err := strconv.ParseInt(string(v), 10, 64)
		if err != nil {
			return 0
		}
		return n
	}
	c.ticket, c.attempt, c.tier = num(HeaderTicket), int(num(HeaderAttempt)), int(num(HeaderTier))
	if ms := num(HeaderFirst); ms > 0 {
		c.first = time.UnixMilli(ms)
	}
	c.due, c.replay = Due(r), string(r.Header(HeaderReplay)) == "1"
	id, err := uuid.ParseBytes(r.Header(HeaderMessageID))
	if err != nil || c.ticket == 0 || c.attempt < 1 || c.tier < 0 {
		return copyState{}, false
	}
	c.id = id
	c.origin, ok = parseOrigin(string(r.Header(HeaderOrigin)))
	return c, ok
}

// Due is when a copy on a retry topic may be delivered; the zero time, at once, where the record does not say.
func Due(r *events.Record) time.Time {
	ms, err := strconv.ParseInt(string(r.Header(HeaderDue)), 10, 64)
	if err != nil {
		return time.Time{}
	}
	return time.UnixMilli(ms)
}

func parseOrigin(s string) (Place, bool) {
	i := strings.LastIndexByte(s, '/')
	if i < 0 {
		return Place{}, false
	}
	j := strings.LastIndexByte(s[:i], '/')
	if j < 1 {
		return Place{}, false
	}
	partition, err := strconv.ParseInt(s[j+1:i], 10, 32)
	if err != nil {
		return Place{}, false
	}
	offset, err := strconv.ParseInt(s[i+1:], 10, 64)
	if err != nil {
		return Place{}, false
	}
	return Place{Topic: events.Topic(s[:j]), Partition: int32(partition), Offset: offset}, true
}

// size estimates from above what a record takes in a Kafka batch of its own.
func size(key, value []byte, headers []events.Header) int {
	n := recordOverhead + len(key) + len(value)
	for _, h := range headers {
		n += headerOverhead + len(h.Key) + len(h.Value)
	}
	return n
}

// deadRecord is what the dead-letter queue gets: the record with the reason, and as much of it as the broker takes. First the value
// is left out, then the record's own headers and its key; the row in dead_letters has everything.
func deadRecord(group events.Group, d *DeadLetter, limit int) events.Raw {
	reason := []events.Header{
		{Key: HeaderDLQTopic, Value: []byte(d.Origin.Topic)},
		{Key: HeaderDLQPartition, Value: strconv.AppendInt(nil, int64(d.Origin.Partition), 10)},
		{Key: HeaderDLQOffset, Value: strconv.AppendInt(nil, d.Origin.Offset, 10)},
		{Key: HeaderDLQGroup, Value: []byte(group)},
		{Key: HeaderDLQCount, Value: strconv.AppendInt(nil, int64(d.Attempts), 10)},
		{Key: HeaderDLQMessage, Value: []byte(d.Error)},
	}
	raw := events.Raw{Topic: events.DLQTopic(group), Key: d.Key, Value: d.Value, Headers: slices.Concat(d.Headers, reason)}
	if size(raw.Key, raw.Value, raw.Headers) <= limit {
		return raw
	}
	reason = append(reason, events.Header{Key: HeaderDLQOmitted, Value: strconv.AppendInt(nil, int64(len(d.Value)), 10)})
	raw.Value, raw.Headers = nil, slices.Concat(d.Headers, reason)
	if size(raw.Key, nil, raw.Headers) <= limit {
		return raw
	}
	raw.Key, raw.Headers = nil, reason
	return raw
}
