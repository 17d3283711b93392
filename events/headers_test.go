package events

import (
	"encoding/binary"
	"testing"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"
)

func TestHeadersOf(t *testing.T) {
	t.Run("all", func(t *testing.T) {
		h := HeadersOf(Envelope{ID: testID, Type: TOrderPlaced, Sequence: 7, Trace: testTrace})
		require.Equal(t, []Header{
			{"ce_specversion", []byte("1.0")},
			{"ce_id", []byte(testID.String())},
			{"ce_source", []byte("/ordersaga")},
			{"ce_type", []byte("ordersaga.orders.v1.OrderPlaced")},
			{"ce_time", []byte("2023-06-30T03:34:18.518Z")},
			{"content-type", []byte("application/json")},
			{"traceparent", []byte(testTraceparent)},
			{"ce_sequence", []byte("7")},
		}, h)
	})
	t.Run("least", func(t *testing.T) {
		id := uuid.MustParse("f47ac10b-58cc-4372-a567-0e02b2c3d479")
		require.Equal(t, []Header{
			{"ce_specversion", []byte("1.0")},
			{"ce_id", []byte(id.String())},
			{"ce_source", []byte("/ordersaga")},
			{"ce_type", []byte("ordersaga.saga.v1.CommitStock")},
			{"content-type", []byte("application/protobuf")},
		}, HeadersOf(Envelope{ID: id, Type: TCommitStock}), "only a UUIDv7 tells a time")
	})
	t.Run("no such type", func(t *testing.T) {
		require.Nil(t, HeadersOf(Envelope{ID: testID, Type: "Nope"}))
	})
	t.Run("values do not run into each other", func(t *testing.T) {
		h := HeadersOf(Envelope{ID: testID, Type: TOrderPlaced, Sequence: 2147483647, Trace: testTrace})
		for i := range h {
			before := HeadersOf(Envelope{ID: testID, Type: TOrderPlaced, Sequence: 2147483647, Trace: testTrace})
			_ = append(h[i].Value, "!!"...) //nolint:gocritic // the append must not reach a neighbour
			require.Equal(t, before, h)
		}
	})
	t.Run("allocations", func(t *testing.T) {
		e := Envelope{ID: testID, Type: TOrderPlaced, Sequence: 2147483647, Trace: testTrace}
		require.LessOrEqual(t, testing.AllocsPerRun(100, func() { sink = HeadersOf(e) }), 2.0)
	})
}

var sink []Header

func TestHeaderBlock(t *testing.T) {
	require.Nil(t, AppendHeaders(nil, nil), "no headers are a null column")
	h, err := ParseHeaders(nil)
	require.NoError(t, err)
	require.Empty(t, h)

	rapid.Check(t, func(t *rapid.T) {
		in := rapid.SliceOf(rapid.Custom(func(t *rapid.T) Header {
			h := Header{Key: rapid.OneOf(rapid.SampledFrom([]string{HeaderID, HeaderType, HeaderTraceparent, ""}), rapid.String()).Draw(t, "key")}
			if rapid.Bool().Draw(t, "null") {
				return h
			}
			h.Value = append([]byte{}, rapid.SliceOf(rapid.Byte()).Draw(t, "value")...)
			return h
		})).Draw(t, "headers")
		b := AppendHeaders([]byte("before"), in)
		out, err := ParseHeaders(b[len("before"):])
		if err != nil {
			t.Fatal(err)
		}
		if len(in) == 0 {
			in = nil
		}
		require.Equal(t, in, out, "null and empty are told apart")
		for cut := len("before") + 1; cut < len(b); cut++ {
			if _, err := ParseHeaders(b[len("before"):cut]); err == nil {
				t.Fatalf("a block cut to %d of %d bytes was read", cut, len(b))
			}
		}
	})
}

func TestDamagedHeaderBlocksAreRefused(t *testing.T) {
	good := AppendHeaders(nil, []Header{{"k", []byte("v")}})
	for name, b := range map[string][]byte{
		"other format":   append([]byte{2}, good[1:]...),
		"none":           {1, 0},
		"too many":       {1, 100, 0, 0},
		"bytes after it": append(append([]byte{}, good...), 0),
		"huge count":     binary.AppendUvarint([]byte{1}, 1<<63),
		"huge key":       append([]byte{1, 1}, binary.AppendUvarint(nil, 1<<63)...),
		"huge value":     append([]byte{1, 1, 0}, binary.AppendUvarint(nil, 1<<64-1)...),
		"endless varint": {1, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff},
	} {
		t.Run(name, func(t *testing.T) {
			h, err := ParseHeaders(b)
			require.ErrorIs(t, err, errHeaderBlock)
			require.Nil(t, h)
		})
	}
}

func TestIdentity(t *testing.T) {
	at := func(topic Topic, partition int32, offset int64, h ...Header) *Record {
		return &Record{Topic: topic, Partition: partition, Offset: offset, Headers: h}
	}
	id := func(v string) Header { return Header{HeaderID, []byte(v)} }
	src := func(v string) Header { return Header{HeaderSource, []byte(v)} }
	ours := at(TopicStock, 0, 0, id(testID.String()), src(Source))
	require.Equal(t, testID, Identity(ours), "a message of ours is its own id")

	foreign := map[string]*Record{
		"our id, foreign source": at(TopicCommands, 0, 0, id(testID.String()), src("/shop")),
		"our id, no source":      at(TopicCommands, 0, 0, id(testID.String())),
		"our source, a v4":       at(TopicCommands, 0, 0, id("f47ac10b-58cc-4372-a567-0e02b2c3d479"), src(Source)),
		"our source, no uuid":    at(TopicCommands, 0, 0, id("17"), src(Source)),
		"id a, source bc":        at(TopicCommands, 0, 0, id("a"), src("bc")),
		"id ab, source c":        at(TopicCommands, 0, 0, id("ab"), src("c")),
		"no id":                  at(TopicCommands, 1, 23, src("/shop")),
		"no id, next offset":     at(TopicCommands, 1, 24, src("/shop")),
		"no id, other partition": at(TopicCommands, 12, 3),
		"no id, other topic":     at(TopicEvents, 1, 23),
		"empty id":               at(TopicCommands, 5, 5, id("")),
	}
	seen := map[uuid.UUID]string{}
	for name, r := range foreign {
		u := Identity(r)
		require.Equal(t, u, Identity(r), "%s: it is the same every time", name)
		require.Empty(t, seen[u], "%s has the identity of another", name)
		seen[u] = name
		require.Equal(t, make([]byte, 6), u[:6], "%s: apart from ours in the inbox, which is partitioned by time", name)
		require.EqualValues(t, 8, u.Version())
		require.Equal(t, uuid.RFC4122, u.Variant())
	}

	moved := at("retry.order-commands.5s", 7, 99, id("a"), src("bc"))
	require.Equal(t, Identity(foreign["id a, source bc"]), Identity(moved), "an id counts wherever the record lies")
}
