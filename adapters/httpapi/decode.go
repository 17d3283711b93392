package httpapi

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"strings"
)

// maxDepth bounds how deep a body may nest.
const maxDepth = 8

// readBody reads a request's body within the limit that the API set. Only plain JSON is taken: a compressed body could hold more
// than its limit.
func readBody(r *http.Request) ([]byte, error) {
	if ct := r.Header.Get("Content-Type"); ct != "" {
		mt, params, err := mime.ParseMediaType(ct)
		if err != nil || mt != "application/json" && !strings.HasSuffix(mt, "+json") {
			return nil, problem(http.StatusUnsupportedMediaType, "unsupported_media_type", "Unsupported media type", "send Content-Type: application/json")
		}
		if cs := params["charset"]; cs != "" && !strings.EqualFold(cs, "utf-8") {
			return nil, problem(http.StatusUnsupportedMediaType, "unsupported_media_type", "Unsupported media type", "JSON is UTF-8")
		}
	}
	if ce := r.Header.Get("Content-Encoding"); ce != "" && !strings.EqualFold(ce, "identity") {
		return nil, problem(http.StatusUnsupportedMediaType, "unsupported_media_type", "Unsupported media type", "send the body uncompressed")
	}
	b, err := io.ReadAll(r.Body)
	if err != nil {
		var tooLarge *http.MaxBytesError
		if errors.As(err, &tooLarge) {
			return nil, err //nolint:wrapcheck // mapped by fail
		}
		return nil, problem(http.StatusBadRequest, "malformed", "Malformed body", "the body ended early")
	}
	return b, nil
}

// decodeStrict reads one JSON value into v: no unknown fields, no field twice, nothing behind it, not too deep.
func decodeStrict(b []byte, v any) error {
	if len(bytes.TrimSpace(b)) == 0 {
		return problem(http.StatusBadRequest, "malformed", "Malformed body", "the body is empty: send a JSON object")
	}
	if err := checkShape(b); err != nil {
		return err
	}
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return malformed(err)
	}
	return nil
}

func malformed(err error) *Problem {
	p := problem(http.StatusBadRequest, "malformed", "Malformed body", "")
	var syn *json.SyntaxError
	var typ *json.UnmarshalTypeError
	switch {
	case errors.As(err, &syn):
		p.Detail = fmt.Sprintf("not JSON at byte %d: %s", syn.Offset, clean(syn.Error(), 100))
	case errors.As(err, &typ):
		p.Field = "/" + strings.ReplaceAll(typ.Field, ".", "/")
		p.Detail = fmt.Sprintf("a JSON %s where %s belongs", typ.Value, kindOf(typ.Type.String()))
	case errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, io.EOF):
		p.Detail = "the JSON ends early"
	default:
		p.Detail = clean(strings.TrimPrefix(err.Error(), "json: "), 200)
	}
	return p
}

func kindOf(goType string) string {
	switch {
	case strings.HasPrefix(goType, "int"):
		return "an integer"
	case goType == "string" || strings.HasSuffix(goType, "UUID"):
		return "a string"
	case goType == "bool":
		return "true or false"
	case strings.HasPrefix(goType, "[]"):
		return "an array"
	}
	return "an object"
}

// checkShape walks the tokens: depth, fields twice, anything behind the value.
func checkShape(b []byte) error {
	d := json.NewDecoder(bytes.NewReader(b))
	d.UseNumber()
	type level struct {
		seen map[string]bool // nil: an array
		key  bool            // a key comes next
	}
	var stack []level
	for first := true; ; first = false {
		t, err := d.Token()
		if errors.Is(err, io.EOF) && !first && len(stack) == 0 {
			return nil
		}
		if err != nil {
			return malformed(err)
		}
		if !first && len(stack) == 0 {
			return problem(http.StatusBadRequest, "malformed", "Malformed body", "there is something behind the JSON value")
		}
		if n := len(stack); n > 0 && stack[n-1].seen != nil {
			top := &stack[n-1]
			if k, isKey := t.(string); isKey && top.key {
				if top.seen[k] {
					return problem(http.StatusBadRequest, "malformed", "Malformed body", fmt.Sprintf("field %q is there twice", clean(k, 50)))
				}
				top.seen[k], top.key = true, false
				continue
			}
			top.key = true
		}
		switch t {
		case json.Delim('{'):
			stack = append(stack, level{seen: map[string]bool{}, key: true})
		case json.Delim('['):
			stack = append(stack, level{})
		case json.Delim('}'), json.Delim(']'):
			stack = stack[:len(stack)-1]
		}
		if len(stack) > maxDepth {
			return problem(http.StatusBadRequest, "malformed", "Malformed body", fmt.Sprintf("the JSON nests deeper than %d", maxDepth))
		}
	}
}
