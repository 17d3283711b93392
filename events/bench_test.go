package events

import (
	"testing"

	"github.com/stretchr/testify/require"
)

func benchEnvelopes(b *testing.B) map[string]Envelope {
	b.Helper()
	out := map[string]Envelope{}
	for _, s := range samples() {
		switch s.env.Type { // one of a kind: small and large, both formats
		case TReserveStock, TCommitStock, TAuthorizePayment, TOrderPlaced, TOrderConfirmed, TPlaceOrder:
			out[string(s.env.Type)] = s.env
		}
	}
	return out
}

func BenchmarkEncode(b *testing.B) {
	for name, e := range benchEnvelopes(b) {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if _, err := Encode(e); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkDecode(b *testing.B) {
	for name, e := range benchEnvelopes(b) {
		payload, err := Encode(e)
		require.NoError(b, err)
		r := recordOf(e, payload)
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if _, err := Decode(r); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkHeadersOf(b *testing.B) {
	e := Envelope{ID: testID, Type: TOrderPlaced, Sequence: 1, Trace: testTrace}
	b.ReportAllocs()
	for b.Loop() {
		sink = HeadersOf(e)
	}
}

func BenchmarkHeaderBlock(b *testing.B) {
	block := AppendHeaders(nil, HeadersOf(Envelope{ID: testID, Type: TOrderPlaced, Sequence: 1, Trace: testTrace}))
	out := make([]byte, 0, len(block))
	b.ReportAllocs()
	for b.Loop() {
		h, err := ParseHeaders(block)
		if err != nil {
			b.Fatal(err)
		}
		out = AppendHeaders(out[:0], h)
	}
}
