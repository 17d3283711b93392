package events

import (
	"errors"
	"testing"

	"github.com/stretchr/testify/require"
)

// FuzzDecode: whatever a producer sends, it is read or refused with an error that is classified and fit for a log; and what was read
// can be written and read again to the same.
func FuzzDecode(f *testing.F) {
	for _, s := range samples() {
		payload, err := Encode(s.env)
		require.NoError(f, err)
		t, _ := TypeOf(s.env.Type)
		f.Add(string(t.Topic), t.CE, t.Format.ContentType(), []byte(testOrder.String()), payload)
	}
	for _, body := range []string{goodBody, goodBody + "x", `{"order_id":1}`, `[[[[`, `null`, "", "{\"items\":[null]}", `{"order_id":"` + goodKey + `","items":null}`} {
		f.Add(string(TopicCommands), cePlace, "", []byte(goodKey), []byte(body))
	}
	f.Add(string(TopicCommands), cePlace, "application/json; charset=utf-8", []byte(goodKey), []byte(goodBody))
	f.Add("retry.stock.5s", "ordersaga.saga.v2.ReserveStock", ContentProtobuf, []byte("k"), []byte{0xff})
	f.Add("", "", "application/cloudevents+json", []byte(nil), []byte(nil))
	f.Fuzz(func(t *testing.T, topic, ce, contentType string, key, value []byte) {
		r := &Record{Topic: Topic(topic), Key: key, Value: value}
		if ce != "" {
			r.Headers = append(r.Headers, Header{HeaderType, []byte(ce)})
		}
		if contentType != "" {
			r.Headers = append(r.Headers, Header{HeaderContentType, []byte(contentType)})
		}
		e, err := Decode(r)
		if err != nil {
			var unknown *UnknownTypeError
			if errors.As(err, &unknown) == isPoison(err) {
				t.Fatalf("%v is neither transient nor poison, or both", err)
			}
			requireOneLine(t, err)
			return
		}
		b, err := Encode(e)
		if err != nil {
			t.Fatalf("what was read cannot be written: %v", err)
		}
		again, err := Decode(recordOf(e, b))
		if err != nil {
			t.Fatalf("what was written cannot be read: %v", err)
		}
		e.ID, again.ID = testID, testID
		b2, err := Encode(again)
		require.NoError(t, err)
		require.Equal(t, string(b), string(b2))
	})
}

// FuzzParseHeaders: no block makes it panic or allocate beyond its length; what it reads is written to the same headers.
func FuzzParseHeaders(f *testing.F) {
	f.Add([]byte(nil))
	f.Add([]byte{1, 0})
	f.Add(AppendHeaders(nil, HeadersOf(Envelope{ID: testID, Type: TOrderPlaced, Sequence: 1, Trace: testTrace})))
	f.Add(AppendHeaders(nil, []Header{{"", nil}, {"k", []byte{}}}))
	f.Add([]byte{1, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x01})
	f.Fuzz(func(t *testing.T, b []byte) {
		h, err := ParseHeaders(b)
		if err != nil {
			return
		}
		if len(h) > len(b) {
			t.Fatalf("%d headers of %d bytes", len(h), len(b))
		}
		again, err := ParseHeaders(AppendHeaders(nil, h))
		require.NoError(t, err)
		require.Equal(t, h, again)
	})
}

// FuzzTraceparent: what is read is written to the same context, as text and as binary.
func FuzzTraceparent(f *testing.F) {
	for _, s := range []string{"", testTraceparent, "01-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-x", "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		tr, ok := ParseTraceparent(s)
		if !ok {
			require.True(t, tr.IsZero())
			return
		}
		again, ok := ParseTraceparent(tr.String())
		require.True(t, ok)
		require.Equal(t, tr, again)
		require.Equal(t, tr, TraceFromBinary(tr.AppendBinary(nil)))
		if s[:2] == "00" {
			require.Equal(t, s, tr.String())
		}
	})
}
