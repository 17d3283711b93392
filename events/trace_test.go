package events

import (
	"testing"

	"github.com/stretchr/testify/require"
)

func TestTraceparent(t *testing.T) {
	const id, span = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
	for name, tc := range map[string]struct {
		in    string
		ok    bool
		flags byte
	}{
		"sampled":             {testTraceparent, true, 1},
		"not sampled":         {"00-" + id + "-" + span + "-00", true, 0},
		"flags are kept":      {"00-" + id + "-" + span + "-03", true, 3},
		"newer version":       {"cc-" + id + "-" + span + "-ff", true, 1},
		"newer, with more":    {"01-" + id + "-" + span + "-01-what-else", true, 1},
		"newer, glued":        {"01-" + id + "-" + span + "-01what", false, 0},
		"00 with more":        {testTraceparent + "-x", false, 0},
		"ff":                  {"ff-" + id + "-" + span + "-01", false, 0},
		"empty":               {"", false, 0},
		"cut off":             {testTraceparent[:54], false, 0},
		"upper case":          {"00-4BF92F3577B34DA6A3CE929D0E0E4736-" + span + "-01", false, 0},
		"no hex":              {"00-4bf92f3577b34da6a3ce929d0e0e473g-" + span + "-01", false, 0},
		"wrong separator":     {"00_" + id + "-" + span + "-01", false, 0},
		"zero trace":          {"00-00000000000000000000000000000000-" + span + "-01", false, 0},
		"zero span":           {"00-" + id + "-0000000000000000-01", false, 0},
		"version is not hex":  {"0x-" + id + "-" + span + "-01", false, 0},
		"flags are not hex":   {"00-" + id + "-" + span + "-0x", false, 0},
		"separator in a span": {"00-" + id + "-00f067aa0ba902-7-01", false, 0},
	} {
		t.Run(name, func(t *testing.T) {
			tr, ok := ParseTraceparent(tc.in)
			fromBytes, okBytes := ParseTraceparent([]byte(tc.in))
			require.Equal(t, tc.ok, ok)
			require.Equal(t, tc.ok, okBytes)
			require.Equal(t, tr, fromBytes)
			if !tc.ok {
				require.True(t, tr.IsZero())
				return
			}
			want := testTrace
			want.Flags = tc.flags
			require.Equal(t, want, tr)
			require.Equal(t, tc.flags&1 != 0, tr.Sampled())
		})
	}
}

func TestTraceAsTextAndBinary(t *testing.T) {
	require.Equal(t, testTraceparent, testTrace.String())
	b := testTrace.AppendBinary([]byte{9})
	require.Len(t, b, 26)
	require.Equal(t, testTrace, TraceFromBinary(b[1:]))

	require.Empty(t, Trace{}.String())
	require.Nil(t, Trace{}.AppendBinary(nil), "no trace is a null column")
	for _, b := range [][]byte{nil, {}, make([]byte, 24), make([]byte, 26)} {
		require.True(t, TraceFromBinary(b).IsZero())
	}
}
