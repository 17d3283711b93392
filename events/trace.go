package events

import "encoding/hex"

const (
	traceparentLen = 55 // 00-<32 hex>-<16 hex>-<2 hex>
	traceBinaryLen = 16 + 8 + 1
)

// IsZero reports that there is no trace context.
func (t Trace) IsZero() bool { return t == Trace{} }

// Sampled reports that whoever started the trace records it.
func (t Trace) Sampled() bool { return t.Flags&1 != 0 }

// String is the traceparent header, or empty if there is none.
func (t Trace) String() string {
	if t.IsZero() {
		return ""
	}
	return string(t.appendText(make([]byte, 0, traceparentLen)))
}

func (t Trace) appendText(b []byte) []byte {
	b = append(b, "00-"...)
	b = hex.AppendEncode(b, t.TraceID[:])
	b = append(b, '-')
	b = hex.AppendEncode(b, t.SpanID[:])
	b = append(b, '-')
	return hex.AppendEncode(b, []byte{t.Flags})
}

// ParseTraceparent reads a traceparent header by the rules of W3C Trace Context: of a version above 00 it reads what 00 has. What is
// malformed, or names the zero trace or span, is no trace context and never a reason to refuse a record.
func ParseTraceparent[S ~string | ~[]byte](header S) (Trace, bool) {
	var b [traceparentLen]byte
	if copy(b[:], header) < traceparentLen || b[2] != '-' || b[35] != '-' || b[52] != '-' {
		return Trace{}, false
	}
	var version [1]byte
	var flags [1]byte
	var t Trace
	if !lowerHex(version[:], b[:2]) || !lowerHex(t.TraceID[:], b[3:35]) || !lowerHex(t.SpanID[:], b[36:52]) || !lowerHex(flags[:], b[53:]) {
		return Trace{}, false
	}
	switch {
	case version[0] == 0xff, t.TraceID == [16]byte{}, t.SpanID == [8]byte{}:
		return Trace{}, false
	case version[0] == 0:
		if len(header) != traceparentLen {
			return Trace{}, false
		}
		t.Flags = flags[0]
	default:
		if len(header) > traceparentLen && header[traceparentLen] != '-' {
			return Trace{}, false
		}
		t.Flags = flags[0] & 1 // what the other bits mean there is not known
	}
	return t, true
}

// lowerHex decodes hexadecimal digits in lower case only, as the standard demands.
func lowerHex(dst, src []byte) bool {
	for _, c := range src {
		if (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return false
		}
	}
	_, err := hex.Decode(dst, src)
	return err == nil
}

// AppendBinary appends the 25 bytes of a trace context (trace id, span id, flags) as the outbox stores them; nothing if there is none.
func (t Trace) AppendBinary(b []byte) []byte {
	if t.IsZero() {
		return b
	}
	b = append(b, t.TraceID[:]...)
	b = append(b, t.SpanID[:]...)
	return append(b, t.Flags)
}

// TraceFromBinary reads what AppendBinary wrote. Anything else is no trace context: a lost trace is no reason to lose a message.
func TraceFromBinary(b []byte) Trace {
	if len(b) != traceBinaryLen {
		return Trace{}
	}
	var t Trace
	copy(t.TraceID[:], b)
	copy(t.SpanID[:], b[16:])
	t.Flags = b[24]
	return t
}
