package outbox

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/google/uuid"

	"ordersaga/events"
)

// A pack is the typed messages of one transaction and one shard in one row: a row's price in Postgres, its header, its index entry, the statement's
// work on it, is paid once for all of them. The format: packV1, then for each message a byte of flags, its id, its order's id (left out if it is
// that of the message before), its type (the number of an earlier type in this pack, counted from 1, or 0 and the name after its length), its
// sequence where the flags say so, its trace unless it has none or that of the message before, and its body after its length. Lengths and numbers
// are unsigned varints.
const packV1 = 1

const (
	sameOrder byte = 1 << iota
	sameTrace
	hasSequence
	hasTrace
)

// maxPack is how many bytes a pack takes before the next message begins another: two rows fit into a page of Postgres.
const maxPack = 3900

// Pack is a row of typed messages.
type Pack struct {
	Shard int16
	ID    uuid.UUID // of the first message: its time is when the row was made
	Data  []byte

	order uuid.UUID // of the last message
	trace events.Trace
	types []events.Name
}

// Packs puts typed messages into rows, a shard's in their order.
func Packs(ms []Message) []Pack {
	var out []Pack
	open := [Shards]int{} // index + 1 in out of the pack that a shard's next message goes to
	for i := range ms {
		m := &ms[i]
		n := open[m.Shard] - 1
		if n < 0 || len(out[n].Data)+len(m.Payload) > maxPack {
			out = append(out, Pack{Shard: m.Shard, ID: m.ID, Data: append(make([]byte, 0, 64+len(m.Payload)), packV1)})
			n = len(out) - 1
			open[m.Shard] = n + 1
		}
		out[n].add(m)
	}
	return out
}

func (p *Pack) add(m *Message) {
	at := len(p.Data)
	p.Data = append(p.Data, 0)
	p.Data = append(p.Data, m.ID[:]...)
	var flags byte
	if at > 1 && m.OrderID == p.order {
		flags |= sameOrder
	} else {
		p.Data = append(p.Data, m.OrderID[:]...)
		p.order = m.OrderID
	}
	p.addType(m.Type)
	if m.Sequence != 0 {
		flags |= hasSequence
		p.Data = binary.AppendUvarint(p.Data, uint64(uint32(m.Sequence))) //nolint:gosec // bits
	}
	switch {
	case m.Trace.IsZero():
	case m.Trace == p.trace:
		flags |= sameTrace
	default:
		flags |= hasTrace
		p.trace = m.Trace
		n := len(p.Data)
		p.Data = m.Trace.AppendBinary(append(p.Data, 0))
		p.Data[n] = byte(len(p.Data) - n - 1) //nolint:gosec // 25
	}
	p.Data = binary.AppendUvarint(p.Data, uint64(len(m.Payload)))
	p.Data = append(p.Data, m.Payload...)
	p.Data[at] = flags
}

func (p *Pack) addType(name events.Name) {
	for i, t := range p.types {
		if t == name {
			p.Data = binary.AppendUvarint(p.Data, uint64(i)+1)
			return
		}
	}
	p.types = append(p.types, name)
	p.Data = append(p.Data, 0)
	p.Data = binary.AppendUvarint(p.Data, uint64(len(name)))
	p.Data = append(p.Data, name...)
}

var errPack = errors.New("damaged pack of messages")

// Unpack reads the messages of a pack. Their bodies are parts of data. What it allocates is bounded by the length of data.
func Unpack(rowID int64, shard int16, data []byte) ([]Message, error) {
	if len(data) < 2 || data[0] != packV1 {
		return nil, fmt.Errorf("%w: its format is not %d, the only one that this build reads", errPack, packV1)
	}
	const usual = 80 // bytes a message; where they are smaller the list grows
	out := make([]Message, 0, 1+len(data)/usual)
	r := unpacker{rest: data[1:]}
	for len(r.rest) > 0 {
		m := Message{RowID: rowID, Shard: shard, More: true}
		r.message(&m)
		if r.bad {
			return nil, fmt.Errorf("%w: it ends in message %d", errPack, len(out)+1)
		}
		out = append(out, m)
	}
	out[len(out)-1].More = false
	return out, nil
}

type unpacker struct {
	rest  []byte
	order uuid.UUID
	trace events.Trace
	types []events.Name
	bad   bool
}

func (u *unpacker) message(m *Message) {
	flags := u.byte()
	copy(m.ID[:], u.bytes(len(m.ID)))
	if flags&sameOrder == 0 {
		copy(u.order[:], u.bytes(len(u.order)))
	}
	m.OrderID = u.order
	m.Type = u.name()
	if flags&hasSequence != 0 {
		m.Sequence = int32(uint32(u.number())) //nolint:gosec // bits
	}
	if flags&hasTrace != 0 {
		u.trace = events.TraceFromBinary(u.bytes(int(u.byte())))
	}
	if flags&(hasTrace|sameTrace) != 0 {
		m.Trace = u.trace
	}
	m.Payload = u.sized()
}

func (u *unpacker) name() events.Name {
	n := u.number()
	if n > 0 {
		if n > uint64(len(u.types)) {
			u.bad = true
			return ""
		}
		return u.types[n-1]
	}
	b := u.sized()
	name := events.Name(b)
	if t, ok := events.TypeOf(name); ok { // one string for all messages of a type
		name = t.Name
	}
	u.bad = u.bad || name == ""
	u.types = append(u.types, name)
	return name
}

func (u *unpacker) byte() byte {
	if b := u.bytes(1); len(b) == 1 {
		return b[0]
	}
	return 0
}

func (u *unpacker) bytes(n int) []byte {
	if n > len(u.rest) {
		u.bad = true
		u.rest = nil
		return nil
	}
	b := u.rest[:n:n]
	u.rest = u.rest[n:]
	return b
}

func (u *unpacker) number() uint64 {
	v, n := binary.Uvarint(u.rest)
	if n <= 0 {
		u.bad = true
		u.rest = nil
		return 0
	}
	u.rest = u.rest[n:]
	return v
}

func (u *unpacker) sized() []byte {
	n := u.number()
	if n > uint64(len(u.rest)) {
		u.bad = true
		u.rest = nil
		return nil
	}
	return u.bytes(int(n)) //nolint:gosec // at most the length of what is left
}
