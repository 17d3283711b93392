package events

import (
	"crypto/sha256"
	"encoding/binary"
	"strconv"

	"github.com/google/uuid"
)

// Attributes are the headers of a record that say what it is, found in one pass over them: of several with one name the first, nil where
// there is none. The values are the record's own.
type Attributes struct {
	SpecVersion []byte
	ID          []byte
	Source      []byte
	Type        []byte // ce_type
	ContentType []byte
	Traceparent []byte

	row *Type // of the table; nil: it has none
}

// AttributesOf reads them.
func AttributesOf(r *Record) Attributes {
	const specVersion, id, source, typ, contentType, traceparent = 1, 2, 4, 8, 16, 32
	var a Attributes
	seen := 0
	for i := range r.Headers {
		var value *[]byte
		var which int
		h := &r.Headers[i]
		switch h.Key {
		case HeaderSpecVersion:
			value, which = &a.SpecVersion, specVersion
		case HeaderID:
			value, which = &a.ID, id
		case HeaderSource:
			value, which = &a.Source, source
		case HeaderType:
			value, which = &a.Type, typ
		case HeaderContentType:
			value, which = &a.ContentType, contentType
		case HeaderTraceparent:
			value, which = &a.Traceparent, traceparent
		default:
			continue
		}
		if seen&which == 0 {
			*value = h.Value
			seen |= which
		}
	}
	a.row = byCE[string(a.Type)]
	return a
}

// Known finds the record's type in the table.
func (a *Attributes) Known() (*Type, bool) { return a.row, a.row != nil }

// Identity is that of the record, whose attributes these are; see the function of that name.
func (a *Attributes) Identity(r *Record) uuid.UUID {
	if string(a.Source) == Source && len(a.ID) == uuidLen {
		if u, err := uuid.ParseBytes(a.ID); err == nil && u.Version() == 7 {
			return u
		}
	}
	h := sha256.New()
	if len(a.ID) > 0 {
		var n [8]byte
		binary.BigEndian.PutUint64(n[:], uint64(len(a.Source)))
		h.Write(n[:])
		h.Write(a.Source)
		h.Write(a.ID)
	} else {
		h.Write([]byte(string(r.Topic) + "/" + strconv.Itoa(int(r.Partition)) + "/" + strconv.FormatInt(r.Offset, 10)))
	}
	u := uuid.UUID(h.Sum(nil)[:16])
	copy(u[:6], make([]byte, 6))
	u[6] = u[6]&0x0f | 0x80 // version 8: made by rules of our own
	u[8] = u[8]&0x3f | 0x80
	return u
}
