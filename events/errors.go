package events

import (
	"fmt"
	"strings"
	"unicode"
)

// badRecordError is a record that no repetition will make readable. Its text is one line and says what to add or change.
type badRecordError struct{ msg string }

func (e *badRecordError) Error() string { return e.msg }

// Poison sends the record to the dead letters at once.
func (e *badRecordError) Poison() bool { return true }

func bad(format string, args ...any) error { return &badRecordError{msg: fmt.Sprintf(format, args...)} }

// UnknownTypeError is a ce_type that this build does not know: a type or a version that is newer than it, as a rolling upgrade
// brings, or a slip of the producer. It is transient: who knows the type may take over before the last retry.
type UnknownTypeError struct {
	CE    string // the ce_type, cleaned and cut
	Topic Topic  // where it lies
}

func (e *UnknownTypeError) Error() string {
	msg := fmt.Sprintf("unknown ce_type %q: a newer version of ordersaga may know it", e.CE)
	if known := typesOn(e.Topic); len(known) > 0 {
		msg += "; this one knows on " + string(e.Topic) + ": " + strings.Join(known, ", ")
	}
	return msg
}

func typesOn(topic Topic) []string {
	var out []string
	for i := range Types {
		if Types[i].Topic == topic {
			out = append(out, Types[i].CE)
		}
	}
	return out
}

// maxQuoted bounds what an error repeats of a record, in characters.
const maxQuoted = 80

// clean makes foreign text fit for one line of a log or a terminal: what is not printable becomes ?, any space a space, and it is cut
// after maxQuoted characters.
func clean[S ~string | ~[]byte](s S) string {
	cut := s
	if len(cut) > maxQuoted*4 { // four bytes a character at most: do not convert a megabyte to read its beginning
		cut = cut[:maxQuoted*4]
	}
	return cleanTo(string(cut), maxQuoted)
}

func cleanTo(s string, limit int) string {
	var b strings.Builder
	n := 0
	for _, r := range s {
		if n == limit {
			b.WriteString("…")
			break
		}
		n++
		switch {
		case r == 0xfffd || !unicode.IsPrint(r) && !unicode.IsSpace(r):
			b.WriteByte('?')
		case unicode.IsSpace(r):
			b.WriteByte(' ')
		default:
			b.WriteRune(r)
		}
	}
	return b.String()
}
