package httpapi

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"mime"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"
)

// Bounds of a body's shape. The deepest body of the contract nests 3 deep and the widest object has 6 fields.
const (
	maxDepth  = 8
	maxFields = 16
)

// readBody reads a request's body within the limits of size (MaxBytesReader) and time (the server's ReadTimeout) that it came with.
// Only plain JSON is taken: a compressed body could hold more than its limit.
func readBody(r *http.Request) ([]byte, error) {
	if p := mediaType(r.Header); p != nil {
		return nil, p
	}
	var b bytes.Buffer
	if n := r.ContentLength; n > 0 {
		b.Grow(int(min(n, 64<<10)) + bytes.MinRead) // what is announced need not come
	}
	_, err := b.ReadFrom(r.Body)
	var tooLarge *http.MaxBytesError
	switch {
	case err == nil:
	case errors.As(err, &tooLarge):
		return nil, err //nolint:wrapcheck // mapped by fail
	case errors.Is(err, os.ErrDeadlineExceeded):
		return nil, malformed("the body did not arrive in time")
	default:
		return nil, malformed("the body ended early")
	}
	return b.Bytes(), nil
}

func mediaType(h http.Header) *Problem {
	bad := func(detail string) *Problem {
		return problem(http.StatusUnsupportedMediaType, "unsupported_media_type", "Unsupported media type", detail)
	}
	for _, ct := range h.Values("Content-Type") {
		mt, params, err := mime.ParseMediaType(ct)
		if err != nil || mt != "application/json" {
			return bad("send Content-Type: application/json (curl does with --json)")
		}
		if cs := params["charset"]; cs != "" && !strings.EqualFold(cs, "utf-8") {
			return bad("JSON is UTF-8")
		}
	}
	for _, ce := range h.Values("Content-Encoding") {
		if !strings.EqualFold(ce, "identity") {
			return bad("send the body uncompressed")
		}
	}
	return nil
}

// decodeStrict reads one JSON value into the struct that v points to: no unknown fields, no field twice, no null, nothing behind it,
// not too deep. Field names are taken as they are written, which encoding/json alone would not do.
func decodeStrict(b []byte, v any) error {
	if len(bytes.TrimSpace(b)) == 0 {
		return malformed("the body is empty: send a JSON object")
	}
	if p := checkShape(b); p != nil {
		return p
	}
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return misfit(b, err)
	}
	return nil
}

func malformed(detail string) *Problem {
	return problem(http.StatusBadRequest, "malformed", "Malformed body", detail)
}

// misfit says what of a well-formed body is not as v wants it.
func misfit(b []byte, err error) *Problem {
	var typ *json.UnmarshalTypeError
	if !errors.As(err, &typ) {
		return malformed(strings.TrimPrefix(err.Error(), "json: "))
	}
	at := pointerAt(b, int(typ.Offset))
	want := kindOf(typ.Type.String())
	if number, is := strings.CutPrefix(typ.Value, "number "); is {
		return malformed(fmt.Sprintf("the number %s where %s belongs", clean(number, 40), want)).at(at)
	}
	return malformed(fmt.Sprintf("a JSON %s where %s belongs", typ.Value, want)).at(at)
}

func kindOf(goType string) string {
	switch {
	case strings.HasPrefix(goType, "int"):
		return "an integer"
	case goType == "string":
		return "a string"
	case goType == "bool":
		return "true or false"
	case strings.HasPrefix(goType, "[]"):
		return "an array"
	}
	return "an object"
}

// level is an object or an array that is open at some place of a document.
type level struct {
	object bool
	named  bool     // of an object: the next string is a value, not a name
	fields []string // of an object: the names so far; the last is that of the value under way
	index  int      // of an array
}

// scan follows a document that json.Valid has accepted, token by token, and knows where it is.
type scan struct {
	b    []byte
	i    int
	open []level
}

// token moves behind the next token and answers where it begins; -1 at the end. Numbers and literals are answered a byte at a time.
func (s *scan) token() int {
	for s.i < len(s.b) {
		at := s.i
		s.i++
		switch s.b[at] {
		case ' ', '\t', '\r', '\n':
			continue
		case '"':
			for s.b[s.i] != '"' {
				if s.b[s.i] == '\\' {
					s.i++
				}
				s.i++
			}
			s.i++
		}
		return at
	}
	return -1
}

// pointer names the value under way, as an RFC 6901 pointer. Names need no escape: they are a to z, 0 to 9 and _.
func (s *scan) pointer() string {
	var p strings.Builder
	for _, l := range s.open {
		p.WriteByte('/')
		if !l.object {
			p.WriteString(strconv.Itoa(l.index))
		} else if len(l.fields) > 0 {
			p.WriteString(l.fields[len(l.fields)-1])
		}
	}
	return p.String()
}

// step applies the token that begins at i.
func (s *scan) step(i int) *Problem {
	var top *level
	if n := len(s.open); n > 0 {
		top = &s.open[n-1]
	}
	switch c := s.b[i]; c {
	case '{', '[':
		if len(s.open) == maxDepth {
			return malformed(fmt.Sprintf("the JSON nests deeper than %d", maxDepth))
		}
		s.open = append(s.open, level{object: c == '{'})
	case '}', ']':
		s.open = s.open[:len(s.open)-1]
	case ',':
		top.named = false
		top.index++
	case ':':
		top.named = true
	case '"':
		if top != nil && top.object && !top.named {
			return top.name(s.b[i+1 : s.i-1])
		}
	case 'n':
		return malformed("null: leave out what is not there").at(s.pointer())
	}
	return nil
}

// name takes the name of a field. The contract's are a to z, 0 to 9 and _: encoding/json would take Customer_ID for customer_id, and
// then again both for the same field.
func (l *level) name(raw []byte) *Problem {
	for _, c := range raw {
		if (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '_' {
			return malformed(fmt.Sprintf("unknown field %q", clean(string(raw), 50)))
		}
	}
	if len(l.fields) == maxFields {
		return malformed(fmt.Sprintf("an object has more than %d fields", maxFields))
	}
	name := string(raw)
	if slices.Contains(l.fields, name) {
		return malformed(fmt.Sprintf("field %q is there twice", clean(name, 50)))
	}
	l.fields = append(l.fields, name)
	return nil
}

// checkShape answers what is wrong with a document before anybody looks at what it means; nil: nothing.
func checkShape(b []byte) *Problem {
	if !utf8.Valid(b) {
		return malformed("the body is not UTF-8")
	}
	if !json.Valid(b) {
		return notJSON(b)
	}
	s := scan{b: b}
	for i := s.token(); i >= 0; i = s.token() {
		if p := s.step(i); p != nil {
			return p
		}
	}
	return nil
}

func notJSON(b []byte) *Problem {
	err := json.Unmarshal(b, &json.RawMessage{})
	var syn *json.SyntaxError
	if errors.As(err, &syn) {
		return malformed(fmt.Sprintf("not JSON at byte %d: %s", syn.Offset, clean(syn.Error(), 100)))
	}
	return malformed("not JSON")
}

// pointerAt names the value whose first token, or last byte, ends at the given offset: there encoding/json found what it could not use.
func pointerAt(b []byte, offset int) string {
	s := scan{b: b}
	for i := s.token(); i >= 0 && s.i < offset; i = s.token() {
		if s.step(i) != nil {
			break // checkShape lets nothing through that ends here
		}
	}
	return s.pointer()
}
