package postgres

import (
	"encoding/binary"
	"fmt"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5/pgtype"

	"ordersaga/domain"
)

// registerTypes teaches a connection to write arrays of ids without boxing each of them: they are most of what a batch sends.
func registerTypes(m *pgtype.Map) {
	t, ok := m.TypeForOID(pgtype.UUIDArrayOID)
	if !ok {
		return
	}
	if c, is := t.Codec.(*pgtype.ArrayCodec); is {
		m.RegisterType(&pgtype.Type{Name: t.Name, OID: t.OID, Codec: uuidArrays{c}})
	}
}

type uuidArrays struct{ *pgtype.ArrayCodec }

// PlanEncode writes slices of ids directly, anything else as the codec of pgx does.
func (c uuidArrays) PlanEncode(m *pgtype.Map, oid uint32, format int16, value any) pgtype.EncodePlan {
	if format == pgtype.BinaryFormatCode {
		switch value.(type) {
		case []uuid.UUID:
			return uuidPlan[uuid.UUID]{}
		case []domain.OrderID:
			return uuidPlan[domain.OrderID]{}
		}
	}
	return c.ArrayCodec.PlanEncode(m, oid, format, value)
}

type uuidPlan[T ~[16]byte] struct{}

// Encode writes the binary form of a one-dimensional uuid[] without nulls.
func (uuidPlan[T]) Encode(value any, buf []byte) ([]byte, error) {
	ids, ok := value.([]T)
	if !ok {
		return nil, fmt.Errorf("postgres: %T is no %T", value, ids)
	}
	for _, head := range [...]uint32{1, 0, pgtype.UUIDOID, uint32(len(ids)), 1} { //nolint:gosec // a batch
		buf = binary.BigEndian.AppendUint32(buf, head)
	}
	for i := range ids {
		id := [16]byte(ids[i])
		buf = binary.BigEndian.AppendUint32(buf, uint32(len(id)))
		buf = append(buf, id[:]...)
	}
	return buf, nil
}
