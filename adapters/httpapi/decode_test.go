package httpapi

import (
	"bytes"
	"compress/gzip"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"strconv"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"ordersaga/domain"
)

func TestStrictDecoding(t *testing.T) {
	w := newWorld(t)
	item := func(s string) string {
		return `{"customer_id":"c","currency":"EUR","payment_method":"pm","items":[{"sku":"TEA-2","quantity":1},{"sku":"TEA-1",` + s + `}]}`
	}
	for name, c := range map[string]struct {
		body   string
		detail string // part of it
		field  string
	}{
		"empty":                         {" \n", "empty", ""},
		"not JSON":                      {"hello", "not JSON at byte 1", ""},
		"cut":                           {tea[:40], "not JSON at byte 40", ""},
		"trailing data":                 {tea + "{}", "not JSON at byte " + strconv.Itoa(len(tea)+1), ""},
		"trailing comma":                {item(`"quantity":1,`), "not JSON", ""},
		"comment":                       {"/* */" + tea, "not JSON", ""},
		"NaN":                           {item(`"quantity":NaN`), "not JSON", ""},
		"leading zero":                  {item(`"quantity":01`), "not JSON", ""},
		"unknown field":                 {strings.Replace(tea, "{", `{"colour":"red",`, 1), `unknown field "colour"`, ""},
		"unknown field of an item":      {item(`"quantity":1,"price":1`), `unknown field "price"`, ""},
		"another case":                  {strings.Replace(tea, "customer_id", "Customer_ID", 1), `unknown field "Customer_ID"`, ""},
		"a letter that folds":           {strings.Replace(tea, "sku", "\u017fku", 1), "unknown field", ""},
		"an escaped name":               {strings.Replace(tea, "sku", `\u0073ku`, 1), "unknown field", ""},
		"duplicate key":                 {strings.Replace(tea, "{", `{"currency":"USD",`, 1), `field "currency" is there twice`, ""},
		"duplicate key of an item":      {item(`"quantity":1,"quantity":9`), `field "quantity" is there twice`, ""},
		"string for number":             {item(`"quantity":"1"`), "a JSON string where an integer belongs", "/items/1/quantity"},
		"string for price":              {item(`"quantity":1,"unit_price_minor":"450"`), "a JSON string where an integer belongs", "/items/1/unit_price_minor"},
		"number for string":             {strings.Replace(tea, `"c-17"`, "17", 1), "a JSON number where a string belongs", "/customer_id"},
		"object for array":              {`{"items":{"sku":"a"}}`, "a JSON object where an array belongs", "/items"},
		"array for object":              {`{"items":[[1]]}`, "a JSON array where an object belongs", "/items/0"},
		"array":                         {"[" + tea + "]", "a JSON array where an object belongs", ""},
		"bare string":                   {`"x"`, "a JSON string where an object belongs", ""},
		"bool for string":               {`{"currency": true}`, "a JSON bool where a string belongs", "/currency"},
		"string for object":             {`{"items": ["x", 1]}`, "a JSON string where an object belongs", "/items/0"},
		"float":                         {item(`"quantity":1.5`), "the number 1.5 where an integer belongs", "/items/1/quantity"},
		"integral float":                {item(`"quantity":1.0`), "the number 1.0 where an integer belongs", "/items/1/quantity"},
		"exponent":                      {item(`"quantity":1e2`), "the number 1e2 where an integer belongs", "/items/1/quantity"},
		"beyond 64 bits":                {item(`"quantity":9223372036854775808`), "the number 9223372036854775808 where an integer belongs", "/items/1/quantity"},
		"a number of 60,000 digits":     {item(`"quantity":` + strings.Repeat("9", 60_000)), "…", "/items/1/quantity"},
		"null":                          {"null", "null", ""},
		"null in a field":               {item(`"quantity":1,"unit_price_minor":null`), "null", "/items/1/unit_price_minor"},
		"null in an array":              {`{"items":[null]}`, "null", "/items/0"},
		"no UTF-8":                      {strings.Replace(tea, "c-17", "c-\xff", 1), "not UTF-8", ""},
		"overlong UTF-8":                {strings.Replace(tea, "c-17", "c-\xc0\xaf", 1), "not UTF-8", ""},
		"a surrogate in UTF-8":          {strings.Replace(tea, "c-17", "c-\xed\xa0\x80", 1), "not UTF-8", ""},
		"byte order mark":               {"\ufeff" + tea, "not JSON at byte 1", ""},
		"control character in a string": {strings.Replace(tea, "c-17", "c-\n", 1), "not JSON", ""},
		"deep":                          {`{"items":` + strings.Repeat("[", maxDepth) + strings.Repeat("]", maxDepth) + "}", "deeper than 8", ""},
		"wide":                          {`{"a0":1,` + fields(40) + `}`, "more than 16 fields", ""},
	} {
		t.Run(name, func(t *testing.T) {
			p := w.refused(w.place("k", c.body), http.StatusBadRequest, "malformed")
			require.Contains(t, p.Detail, c.detail)
			require.Equal(t, c.field, p.Field)
			require.LessOrEqual(t, len(p.Detail), maxDetail)
		})
	}
	require.Empty(t, w.intake.submitted(), "nothing malformed reached the intake")
	w.accepted(w.place("k", " \n"+tea+"\t "))
}

func fields(n int) string {
	var b []string
	for i := range n {
		b = append(b, `"f`+strconv.Itoa(i)+`":1`)
	}
	return strings.Join(b, ",")
}

func TestMediaType(t *testing.T) {
	w := newWorld(t)
	var zipped bytes.Buffer
	z := gzip.NewWriter(&zipped)
	_, err := io.WriteString(z, tea)
	require.NoError(t, err)
	require.NoError(t, z.Close())
	for name, c := range map[string]struct{ body, header, value string }{
		"form":          {tea, "Content-Type", "application/x-www-form-urlencoded"},
		"text":          {tea, "Content-Type", "text/plain"},
		"other JSON":    {tea, "Content-Type", "application/cloudevents+json"},
		"latin 1":       {tea, "Content-Type", "application/json; charset=iso-8859-1"},
		"no type":       {tea, "Content-Type", ";;"},
		"compressed":    {zipped.String(), "Content-Encoding", "gzip"},
		"deflated":      {tea, "Content-Encoding", "identity, deflate"},
		"said to be so": {tea, "Content-Encoding", "br"},
	} {
		t.Run(name, func(t *testing.T) {
			r := w.request(http.MethodPost, "/v1/orders", c.body, "Idempotency-Key", "k")
			r.Header.Set(c.header, c.value)
			a, err := w.send(r)
			require.NoError(t, err)
			w.refused(a, http.StatusUnsupportedMediaType, "unsupported_media_type")
		})
	}
	t.Run("two of them", func(t *testing.T) {
		w.refused(w.place("k", tea, "Content-Encoding", "identity", "Content-Encoding", "gzip"), http.StatusUnsupportedMediaType, "unsupported_media_type")
	})
	require.Empty(t, w.intake.submitted())
	for i, ct := range []string{"application/json; charset=UTF-8", "Application/JSON", ""} {
		r := w.request(http.MethodPost, "/v1/orders", tea, "Idempotency-Key", strconv.Itoa(i), "Content-Encoding", "identity")
		r.Header.Del("Content-Type")
		if ct != "" {
			r.Header.Set("Content-Type", ct)
		}
		a, err := w.send(r)
		require.NoError(t, err)
		w.accepted(a)
	}
}

// TestPointerAt: whatever encoding/json cannot use, the pointer leads to it.
func TestPointerAt(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		n := rapid.IntRange(1, 20).Draw(t, "items")
		at := rapid.IntRange(0, n-1).Draw(t, "at")
		field := rapid.SampledFrom([]string{"sku", "quantity", "unit_price_minor"}).Draw(t, "field")
		space := rapid.StringMatching(`[ \t\r\n]{0,3}`)
		var b strings.Builder
		for i := range n {
			if i > 0 {
				b.WriteString(",")
			}
			b.WriteString(space.Draw(t, "space") + "{")
			for j, f := range []string{"unit_price_minor", "sku", "quantity"} {
				if j > 0 {
					b.WriteString(",")
				}
				v := map[string]string{"sku": `"a\"],{\\"`, "quantity": "1", "unit_price_minor": "450"}[f]
				if i == at && f == field {
					v = rapid.SampledFrom([]string{"true", "[]", `{"a":[1]}`, "1.5", "[[1],2]"}).Draw(t, "bad")
				}
				b.WriteString(space.Draw(t, "space") + `"` + f + `"` + space.Draw(t, "space") + ":" + space.Draw(t, "space") + v + space.Draw(t, "space"))
			}
			b.WriteString("}")
		}
		body := `{"items":[` + b.String() + `], "currency": "EUR"}`
		_, err := decodeDraft([]byte(body))
		var p *Problem
		if !errors.As(err, &p) || p.Field != "/items/"+strconv.Itoa(at)+"/"+field {
			t.Fatalf("%s: %v, field %q", body, err, p.Field)
		}
	})
}

// TestF25_OversizeBody: a body beyond the limit is refused, whether its length is said or not, and nothing of it reaches anybody.
func TestF25_OversizeBody(t *testing.T) {
	w := newWorld(t, func(s *setup) { s.cfg.MaxBody = 1000 })
	big := strings.Replace(tea, "c-17", strings.Repeat("c", 1000), 1)
	for name, body := range map[string]io.Reader{"length said": strings.NewReader(big), "chunked": io.MultiReader(strings.NewReader(big))} {
		t.Run(name, func(t *testing.T) {
			r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, w.base+"/v1/orders", body)
			require.NoError(t, err)
			r.Header.Set("Idempotency-Key", "k")
			a, err := w.send(r)
			require.NoError(t, err)
			require.Contains(t, w.refused(a, http.StatusRequestEntityTooLarge, "too_large").Detail, "1000 bytes")
		})
	}
	require.Empty(t, w.intake.submitted())
	exact := strings.Replace(tea, "{", "{"+strings.Repeat(" ", 1000-len(tea)), 1)
	w.accepted(w.place("k", exact))
}

// TestF25_DeepJSON: nesting that would cost a recursive decoder its stack is refused by the first too many.
func TestF25_DeepJSON(t *testing.T) {
	w := newWorld(t)
	for _, open := range []string{"[", `{"a":`} {
		n := 60_000 / len(open)
		body := strings.Repeat(open, n)
		w.refused(w.place("k", body), http.StatusBadRequest, "malformed")
		closing := map[string]string{"[": "]", `{"a":`: "}"}[open]
		whole := strings.Repeat(open, 9000) + "1" + strings.Repeat(closing, 9000)
		w.refused(w.place("k", whole[:min(len(whole), 64<<10)]), http.StatusBadRequest, "malformed")
	}
}

func FuzzDecodeDraft(f *testing.F) {
	for _, s := range []string{tea, "", "null", `{"items":[null]}`, `{"items":[{"sku":"a","sku":"b"}]}`, `{"customer_id":"\ud800"}`, `{"a":"\\\""}`, `[[[[[[[[[[]]]]]]]]]]`, `{"Items":[]}`, "{}{}", `{"items":[{"quantity":1e99}]}`, "\xff"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		d, err := decodeDraft(b)
		if err == nil {
			require.True(t, utf8.Valid(b))
			require.Nil(t, d.Check())
			// What was taken says the same when it is written again with each field once and in order.
			again, err := json.Marshal(orderOf(&d))
			require.NoError(t, err)
			d2, err := decodeDraft(again)
			require.NoError(t, err)
			require.Equal(t, d, d2)
			return
		}
		var p *Problem
		var refusal *domain.Refusal
		switch {
		case errors.As(err, &p):
			require.Equal(t, http.StatusBadRequest, p.Status)
			require.LessOrEqual(t, len(p.Detail), maxDetail)
			require.Equal(t, clean(p.Detail, maxDetail), p.Detail)
		case errors.As(err, &refusal):
			require.NotEmpty(t, refusal.Field)
		default:
			t.Fatalf("error of an unknown kind: %v", err)
		}
	})
}

func orderOf(d *domain.Draft) orderBody {
	b := orderBody{CustomerID: d.CustomerID, Currency: d.Currency, PaymentMethod: d.PaymentMethod}
	if !d.ID.IsZero() {
		id := d.ID.String()
		b.OrderID = &id
	}
	for _, it := range d.Items {
		b.Items = append(b.Items, itemBody{SKU: string(it.SKU), Quantity: it.Quantity, UnitPriceMinor: it.UnitPrice})
	}
	return b
}

// FuzzCheckShape: the walk over the bytes and encoding/json agree about what there is.
// The quick way is only that: what it takes, the strict one takes for the same.
func FuzzQuickOrder(f *testing.F) {
	for _, s := range []string{
		tea, "{}", " {\n} ", "{} x", `{"items":[]}`, `{"items":[{"sku":"a","quantity":01}]}`, `{"items":[{"sku":"a","quantity":1.0}]}`, `{"items":[{"quantity":-1}]}`,
		`{"items":[{"quantity":9223372036854775808}]}`, `{"items":[{"quantity":999999999999999999},{"unit_price_minor":0}]}`, `{"order_id":"x","order_id":"y"}`, `{"currency":"E\u0055R"}`,
		`{"customer_id":"a` + "\x01" + `"}`, `{"customer_id":"ä"}`, `{"customer_id":null}`, `{"items":[{},]}`, `{"a":1}`, "{}\x00", `{"items":[{"sku":"a"}`, `{"items":[{"quantity":1 2}]}`,
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		quick, ok := quickOrder(b)
		if !ok {
			return
		}
		var strict orderBody
		require.NoError(t, decodeStrict(b, &strict))
		require.Equal(t, strict, quick)
	})
}

func TestQuickOrderTakesWhatIsUsual(t *testing.T) {
	for _, s := range []string{tea, `{"order_id":"6e1f","items":[ {"sku":"a" , "quantity":10,"unit_price_minor":0} ] }`, "\t{\r\n\"currency\":\"EUR\"}\n"} {
		_, ok := quickOrder([]byte(s))
		require.True(t, ok, s)
	}
}

func FuzzCheckShape(f *testing.F) {
	for _, s := range []string{tea, `[1,{"a":[{}]},"x\\"]`, `{"a":1,"a":2}`, `{"a":{"b":[1,[2]]}}`, `"\""`, " [ ] ", `{"a":nul}`} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		p := checkShape(b)
		if p != nil {
			require.Equal(t, "malformed", p.Code)
			return
		}
		d := json.NewDecoder(bytes.NewReader(b))
		d.UseNumber()
		depth, values := 0, 0
		for {
			tok, err := d.Token()
			if errors.Is(err, io.EOF) {
				break
			}
			require.NoError(t, err)
			require.NotNil(t, tok, "null")
			switch tok {
			case json.Delim('{'), json.Delim('['):
				depth++
			case json.Delim('}'), json.Delim(']'):
				depth--
			}
			require.LessOrEqual(t, depth, maxDepth)
			if depth == 0 {
				values++
			}
		}
		require.Equal(t, 1, values)
		var v any
		require.NoError(t, json.Unmarshal(b, &v))
	})
}
