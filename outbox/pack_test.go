package outbox

import (
	"bytes"
	"strings"
	"testing"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"

	"ordersaga/events"
)

func packed(n, size int) []Message {
	trace, _ := events.ParseTraceparent("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
	order := events.NewID()
	ms := make([]Message, n)
	for i := range ms {
		if i%3 == 0 {
			order = events.NewID()
		}
		ms[i] = of(order, events.Types[i%len(events.Types)].Name, strings.Repeat("x", i%(size+1)))
		ms[i].Sequence = int32(i % 4)
		if i%5 < 3 {
			ms[i].Trace = trace
		}
	}
	return ms
}

func TestPacksBringBackWhatWentIn(t *testing.T) {
	require.Empty(t, Packs(nil))
	for _, ms := range [][]Message{packed(1, 0), packed(2, 50), packed(500, 300), packed(30, 5000)} {
		want := map[int16][]Message{}
		for _, m := range ms {
			want[m.Shard] = append(want[m.Shard], m)
		}
		got := map[int16][]Message{}
		for i, p := range Packs(ms) {
			if len(p.Data) > maxPack+200 {
				require.Less(t, bytes.Count(p.Data, []byte("x")), 5000+maxPack)
			}
			list, err := Unpack(int64(i), p.Shard, p.Data)
			require.NoError(t, err)
			require.Equal(t, p.ID, list[0].ID)
			for j := range list {
				require.Equal(t, j < len(list)-1, list[j].More)
				require.EqualValues(t, i, list[j].RowID)
				list[j].More, list[j].RowID = false, 0
			}
			got[p.Shard] = append(got[p.Shard], list...)
		}
		require.Len(t, got, len(want))
		for shard := range want {
			require.Len(t, got[shard], len(want[shard]))
			for i := range want[shard] {
				if len(want[shard][i].Payload) == 0 {
					got[shard][i].Payload = want[shard][i].Payload // nil or empty: the codec knows no difference
				}
				require.Equal(t, want[shard][i], got[shard][i])
			}
		}
	}
}

// The form is stored in rows that another version may read: it does not change.
func TestThePacksFormatStays(t *testing.T) {
	order, a, b := uuid.UUID{1}, uuid.UUID{2}, uuid.UUID{3}
	p := Packs([]Message{
		{Shard: 3, ID: a, OrderID: order, Type: "OrderPlaced", Sequence: 300, Trace: events.Trace{TraceID: [16]byte{9}, SpanID: [8]byte{8}, Flags: 1}, Payload: []byte("body")},
		{Shard: 3, ID: b, OrderID: order, Type: "OrderPlaced", Trace: events.Trace{TraceID: [16]byte{9}, SpanID: [8]byte{8}, Flags: 1}},
	})
	require.Len(t, p, 1)
	zeros := func(n int) string { return strings.Repeat("\x00", n) }
	want := "\x01" + "\x0c" + "\x02" + zeros(15) + "\x01" + zeros(15) + "\x00\x0bOrderPlaced" + "\xac\x02" +
		"\x19" + "\x09" + zeros(15) + "\x08" + zeros(7) + "\x01" + "\x04body" +
		"\x03" + "\x03" + zeros(15) + "\x01" + "\x00"
	require.Equal(t, []byte(want), p[0].Data)
}

func TestADamagedPackSaysSoAndItsShardWaits(t *testing.T) {
	whole := Packs(packed(3, 10))[0].Data
	for n := range whole {
		if list, err := Unpack(1, 0, whole[:n]); err == nil {
			require.NotEmpty(t, list, "cut between two messages")
			require.False(t, list[len(list)-1].More)
		}
	}
	_, err := Unpack(7, 0, []byte{2, 0})
	require.ErrorContains(t, err, "the only one that this build reads")
	_, err = (&Message{RowID: 7, Damage: err}).Record()
	require.ErrorContains(t, err, "row 7 cannot be read")
	require.False(t, refused(err), "a newer relay may read it: it is no dead letter")
}

func FuzzUnpack(f *testing.F) {
	f.Add([]byte{})
	f.Add([]byte{packV1})
	for _, p := range Packs(packed(9, 20)) {
		f.Add(p.Data)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		list, err := Unpack(1, 2, data)
		if err != nil {
			return
		}
		require.NotEmpty(t, list)
		var again []Message
		for _, p := range Packs(list) {
			more, err := Unpack(1, 2, p.Data)
			require.NoError(t, err)
			again = append(again, more...)
		}
		require.Len(t, again, len(list))
		for i := range list {
			list[i].More, again[i].More = false, false
			require.Equal(t, list[i].ID, again[i].ID)
			require.Equal(t, list[i].Type, again[i].Type)
			require.True(t, bytes.Equal(list[i].Payload, again[i].Payload))
		}
	})
}
