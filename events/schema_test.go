package events

import (
	"bytes"
	"encoding/json"
	"io/fs"
	"os"
	"reflect"
	"strings"
	"testing"

	"github.com/santhosh-tekuri/jsonschema/v6"
	"github.com/stretchr/testify/require"
	"go.yaml.in/yaml/v3"

	"ordersaga/schemas"
)

// contract is what these tests read of asyncapi.yaml.
type contract struct {
	Channels map[string]struct {
		Address  string
		Messages map[string]any
	}
	Components struct {
		Messages map[string]struct {
			Name     string
			Headers  map[string]string
			Payload  map[string]string
			Examples []struct{ Payload any }
		}
		Schemas map[string]map[string]any
	}
}

func asyncAPI(t *testing.T) contract {
	t.Helper()
	var c contract
	require.NoError(t, yaml.Unmarshal(schemas.AsyncAPI, &c))
	return c
}

func document(t *testing.T, file string) map[string]any {
	t.Helper()
	b, err := schemas.JSON.ReadFile(file)
	require.NoError(t, err)
	v, err := jsonschema.UnmarshalJSON(bytes.NewReader(b))
	require.NoError(t, err)
	return as[map[string]any](t, v)
}

// schemaOf compiles the JSON Schema of a public message.
func schemaOf(t *testing.T, n Name) (*jsonschema.Schema, map[string]any) {
	t.Helper()
	ref := asyncAPI(t).Components.Messages[string(n)].Payload["$ref"]
	require.NotEmpty(t, ref, n)
	doc := document(t, strings.TrimPrefix(ref, "./"))
	c := jsonschema.NewCompiler()
	c.AssertFormat()
	require.NoError(t, c.AddResource("schema.json", doc))
	s, err := c.Compile("schema.json")
	require.NoError(t, err)
	return s, doc
}

func validate(t *testing.T, s *jsonschema.Schema, body []byte) error {
	t.Helper()
	v, err := jsonschema.UnmarshalJSON(bytes.NewReader(body))
	require.NoError(t, err)
	return s.Validate(v)
}

func publicTypes() []Type {
	var out []Type
	for i := range Types {
		if Types[i].Format == JSON {
			out = append(out, Types[i])
		}
	}
	return out
}

// TestAsyncAPIListsThePublicMessages: the contract and the table have the same messages, under the same names, on the same topics.
func TestAsyncAPIListsThePublicMessages(t *testing.T) {
	c := asyncAPI(t)
	on := map[string]string{}
	for _, ch := range c.Channels {
		for m := range ch.Messages {
			on[m] = ch.Address
		}
	}
	public := publicTypes()
	require.Len(t, on, len(public))
	require.Len(t, c.Components.Messages, len(public))
	for _, typ := range public {
		require.Equal(t, string(typ.Topic), on[string(typ.Name)], typ.Name)
		require.Equal(t, typ.CE, c.Components.Messages[string(typ.Name)].Name)
	}
}

// TestF19_GoldenJSONConformsToTheSchemas: what was ever sent stays valid, so a schema cannot be narrowed unnoticed.
func TestF19_GoldenJSONConformsToTheSchemas(t *testing.T) {
	files, err := fs.Glob(goldenFS(), "*.json")
	require.NoError(t, err)
	require.NotEmpty(t, files)
	for _, f := range files {
		name, _, _ := strings.Cut(f, ".")
		s, _ := schemaOf(t, Name(name))
		b, err := fs.ReadFile(goldenFS(), f)
		require.NoError(t, err)
		require.NoError(t, validate(t, s, b), f)
	}
}

func TestExamplesOfTheContractAreValidAndRead(t *testing.T) {
	for name, m := range asyncAPI(t).Components.Messages {
		s, _ := schemaOf(t, Name(name))
		require.NotEmpty(t, m.Examples, name)
		for _, ex := range m.Examples {
			b, err := jsonOf(ex.Payload)
			require.NoError(t, err)
			require.NoError(t, validate(t, s, b), name)
			typ, _ := TypeOf(Name(name))
			_, err = Decode(&Record{Topic: typ.Topic, Key: []byte(testOrder.String()), Value: b, Headers: []Header{{HeaderType, []byte(typ.CE)}}})
			require.NoError(t, err, name)
		}
	}
}

// TestSchemasKnowEveryField: each JSON field of a struct is in the schemas of its messages, with a fitting type, and the other way round.
func TestSchemasKnowEveryField(t *testing.T) {
	fields := map[reflect.Type]map[string]reflect.Type{}
	for _, typ := range publicTypes() {
		_, doc := schemaOf(t, typ.Name)
		st := typ.goType.Elem()
		if fields[st] == nil {
			fields[st] = map[string]reflect.Type{}
		}
		for p := range as[map[string]any](t, doc["properties"]) {
			fields[st][p] = nil
		}
		has := jsonFields(st)
		for name, prop := range as[map[string]any](t, doc["properties"]) {
			require.Contains(t, has, name, "%s: the schema has a field that is never read or written", typ.Name)
			requireKind(t, has[name], as[map[string]any](t, prop), string(typ.Name)+"."+name)
		}
		item := jsonFields(reflect.TypeFor[OrderItem]())
		if defs, ok := doc["definitions"].(map[string]any); ok {
			props := as[map[string]any](t, as[map[string]any](t, defs["item"])["properties"])
			require.Len(t, props, len(item), typ.Name)
			for name, prop := range props {
				require.Contains(t, item, name)
				requireKind(t, item[name], as[map[string]any](t, prop), string(typ.Name)+".items."+name)
			}
		}
	}
	for st, inSchemas := range fields {
		for name := range jsonFields(st) {
			require.Contains(t, inSchemas, name, "%v.%s is in no schema", st, name)
		}
	}
}

func jsonFields(st reflect.Type) map[string]reflect.Type {
	out := map[string]reflect.Type{}
	for i := range st.NumField() {
		name, _, _ := strings.Cut(st.Field(i).Tag.Get("json"), ",")
		out[name] = st.Field(i).Type
	}
	return out
}

func requireKind(t *testing.T, got reflect.Type, prop map[string]any, where string) {
	t.Helper()
	want, ok := prop["type"].(string)
	if !ok { // const and enum, of strings
		want = "string"
	}
	if got.Kind() == reflect.Pointer {
		got = got.Elem()
	}
	kinds := map[string][]reflect.Kind{"string": {reflect.String}, "integer": {reflect.Int32, reflect.Int64}, "array": {reflect.Slice}}
	require.Contains(t, kinds[want], got.Kind(), where)
}

// TestSchemasRefuseWhatIsRefused: the schemas are no mere decoration.
func TestSchemasRefuseWhatIsRefused(t *testing.T) {
	s, _ := schemaOf(t, TPlaceOrder)
	require.NoError(t, validate(t, s, []byte(goodBody)))
	for _, edit := range [][2]string{
		{`"quantity":2`, `"quantity":"2"`},
		{`"quantity":2`, `"quantity":0`},
		{`"quantity":2`, `"quantity":1.5`},
		{`"EUR"`, `"eur"`},
		{`"customer_id":"c-17",`, ``},
		{testOrder.String(), "17"},
	} {
		require.Error(t, validate(t, s, []byte(strings.Replace(goodBody, edit[0], edit[1], 1))), edit[1])
	}
}

// TestHeadersConformToTheContract: the headers of events are those that asyncapi.yaml promises.
func TestHeadersConformToTheContract(t *testing.T) {
	c := asyncAPI(t)
	for _, sm := range samples() {
		m, public := c.Components.Messages[string(sm.env.Type)]
		if !public {
			continue
		}
		doc := c.Components.Schemas[strings.TrimPrefix(m.Headers["$ref"], "#/components/schemas/")]
		require.NotNil(t, doc, m.Headers)
		b, err := jsonOf(doc)
		require.NoError(t, err)
		parsed, err := jsonschema.UnmarshalJSON(bytes.NewReader(b))
		require.NoError(t, err)
		comp := jsonschema.NewCompiler()
		comp.DefaultDraft(jsonschema.Draft7)
		comp.AssertFormat()
		require.NoError(t, comp.AddResource("headers.json", parsed))
		s, err := comp.Compile("headers.json")
		require.NoError(t, err)
		h := map[string]any{}
		for _, x := range HeadersOf(sm.env) {
			h[x.Key] = string(x.Value)
			require.Contains(t, doc["properties"], x.Key, "%s: a header that the contract does not have", sm.env.Type)
		}
		require.NoError(t, s.Validate(h), sm.env.Type)
	}
}

func goldenFS() fs.FS { return os.DirFS(goldenDir) }

func jsonOf(v any) ([]byte, error) { return json.Marshal(v) }
