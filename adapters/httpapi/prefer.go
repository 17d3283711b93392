package httpapi

import (
	"net/http"
	"strconv"
	"strings"
	"time"
)

// preferWait reads `Prefer: wait=N` (RFC 7240); other preferences are ignored, as it asks. The answer is at most limit.
func preferWait(h http.Header, limit time.Duration) (time.Duration, error) {
	for _, line := range h.Values("Prefer") {
		for p := range preferences(line) {
			p, _, _ = strings.Cut(p, ";") // parameters of a preference; wait has none
			name, val, _ := strings.Cut(p, "=")
			if !strings.EqualFold(strings.TrimSpace(name), "wait") {
				continue
			}
			n, err := strconv.ParseUint(strings.Trim(strings.TrimSpace(val), `"`), 10, 32)
			if err != nil {
				return 0, badParameter("Prefer", "Prefer: wait=N takes a whole number of seconds")
			}
			return min(time.Duration(n)*time.Second, limit), nil
		}
	}
	return 0, nil
}

// preferences splits a header line at the commas that are not inside a quoted string.
func preferences(line string) func(yield func(string) bool) {
	return func(yield func(string) bool) {
		quoted, from := false, 0
		for i := 0; i < len(line); i++ {
			switch c := line[i]; {
			case c == '\\' && quoted:
				i++
			case c == '"':
				quoted = !quoted
			case c == ',' && !quoted:
				if !yield(line[from:i]) {
					return
				}
				from = i + 1
			}
		}
		yield(line[from:])
	}
}
