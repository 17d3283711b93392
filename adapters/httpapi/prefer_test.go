package httpapi

import (
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func TestPreferWait(t *testing.T) {
	const limit = 30 * time.Second
	for name, c := range map[string]struct {
		lines []string
		want  time.Duration
		bad   bool
	}{
		"none":             {nil, 0, false},
		"empty":            {[]string{""}, 0, false},
		"wait":             {[]string{"wait=5"}, 5 * time.Second, false},
		"zero":             {[]string{"wait=0"}, 0, false},
		"beyond the limit": {[]string{"wait=31"}, limit, false},
		"huge":             {[]string{"wait=4294967295"}, limit, false},
		"too huge":         {[]string{"wait=9223372036854775807"}, 0, true},
		"spaces":           {[]string{"  respond-async ,  WAIT = 7 "}, 7 * time.Second, false},
		"quoted":           {[]string{`wait="7"`}, 7 * time.Second, false},
		"with parameters":  {[]string{"wait=7; why=not"}, 7 * time.Second, false},
		"in a string":      {[]string{`foo="a, wait=9, \", wait=8", wait=7`}, 7 * time.Second, false},
		"second line":      {[]string{"return=minimal", "wait=7"}, 7 * time.Second, false},
		"first counts":     {[]string{"wait=3, wait=7"}, 3 * time.Second, false},
		"others":           {[]string{"waiting=3, return=minimal"}, 0, false},
		"no number":        {[]string{"wait=soon"}, 0, true},
		"no value":         {[]string{"wait"}, 0, true},
		"negative":         {[]string{"wait=-1"}, 0, true},
		"fraction":         {[]string{"wait=1.5"}, 0, true},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := preferWait(http.Header{"Prefer": c.lines}, limit)
			require.Equal(t, c.bad, err != nil, "%v", err)
			require.Equal(t, c.want, got)
		})
	}
	w := newWorld(t)
	require.Equal(t, "Prefer", w.refused(w.place("k", tea, "Prefer", "wait=soon"), http.StatusBadRequest, "bad_parameter").Field)
	require.Empty(t, w.intake.submitted())
	w.accepted(w.place("k", tea, "Prefer", "return=minimal", "Prefer", "wait=0"))
}

func FuzzPreferWait(f *testing.F) {
	for _, s := range []string{"wait=5", `a="b,\"c", wait="9";x=y`, "wait", ",,;=", `"`, `\`} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, line string) {
		const limit = 30 * time.Second
		d, err := preferWait(http.Header{"Prefer": {line}}, limit)
		require.True(t, d >= 0 && d <= limit && d%time.Second == 0)
		require.True(t, err == nil || d == 0)
		if !strings.Contains(strings.ToLower(line), "wait") {
			require.NoError(t, err)
			require.Zero(t, d)
		}
		var joined []string
		for p := range preferences(line) {
			joined = append(joined, p)
		}
		require.Equal(t, line, strings.Join(joined, ","), "nothing is lost")
	})
}
