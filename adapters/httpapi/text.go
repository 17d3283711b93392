package httpapi

import (
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"unicode"
	"unicode/utf8"
)

// clean keeps one line of text of at most n bytes that does nothing to a terminal, a log or the direction of what follows it: what
// unicode calls printable, everything else as a space.
func clean(s string, n int) string {
	s = strings.Map(func(r rune) rune {
		if r == ' ' || unicode.IsPrint(r) {
			return r
		}
		return ' '
	}, s)
	if len(s) > n {
		s = strings.ToValidUTF8(s[:max(0, n-len("…"))], "") + "…"
	}
	return s
}

// plain reports text that may be stored and shown: valid, without control characters, line separators and what turns the direction of
// writing. Unlike clean it lets joiners through, which some scripts need.
func plain(s string) bool {
	return utf8.ValidString(s) && !strings.ContainsFunc(s, func(r rune) bool {
		return unicode.IsControl(r) || r == utf8.RuneError || r == '\u2028' || r == '\u2029' || r >= '\u202a' && r <= '\u202e' || r >= '\u2066' && r <= '\u2069'
	})
}

// maxParam bounds a value in a query, in bytes.
const maxParam = 256

// checkQuery answers what is wrong with a query: net/http drops what it cannot read, and then a list would answer more than was asked.
func checkQuery(u *url.URL) *Problem {
	if u.RawQuery == "" {
		return nil
	}
	q, err := url.ParseQuery(u.RawQuery)
	if err != nil {
		return badParameter("", "the query cannot be read: "+err.Error())
	}
	for name, values := range q {
		for _, v := range values {
			if len(v) > maxParam || !plain(v) {
				return badParameter(clean(name, 50), fmt.Sprintf("a parameter is at most %d bytes of printable text", maxParam))
			}
		}
	}
	return nil
}

func badParameter(field, detail string) *Problem {
	return problem(http.StatusBadRequest, "bad_parameter", "Bad parameter", detail).at(field)
}

// checkLength refuses text that is longer than the contract says, in characters.
func checkLength(field, s string, most int) error {
	if utf8.RuneCountInString(s) <= most {
		return nil
	}
	return notAcceptable(field, fmt.Sprintf("%s is longer than %d characters", strings.TrimPrefix(field, "/"), most))
}

func notAcceptable(field, detail string) *Problem {
	return problem(http.StatusUnprocessableEntity, "invalid", "Not acceptable", detail).at(field)
}
