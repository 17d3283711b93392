package schemas

import (
	"io/fs"
	"path"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"go.yaml.in/yaml/v3"
)

func document(t *testing.T, b []byte) map[string]any {
	t.Helper()
	var d map[string]any
	require.NoError(t, yaml.Unmarshal(b, &d))
	return d
}

// refs calls fn for every $ref of a document.
func refs(node any, fn func(ref string)) {
	switch n := node.(type) {
	case map[string]any:
		for k, v := range n {
			if s, ok := v.(string); ok && k == "$ref" {
				fn(s)
				continue
			}
			refs(v, fn)
		}
	case []any:
		for _, v := range n {
			refs(v, fn)
		}
	}
}

// at follows a JSON pointer; nil if it leads nowhere.
func at(doc any, pointer string) any {
	for part := range strings.SplitSeq(strings.TrimPrefix(pointer, "#/"), "/") {
		m, ok := doc.(map[string]any)
		if !ok {
			return nil
		}
		doc = m[strings.NewReplacer("~1", "/", "~0", "~").Replace(part)]
	}
	return doc
}

func TestReferencesLeadSomewhere(t *testing.T) {
	for name, b := range map[string][]byte{"openapi.yaml": OpenAPI, "asyncapi.yaml": AsyncAPI} {
		doc := document(t, b)
		n := 0
		refs(doc, func(ref string) {
			n++
			if strings.HasPrefix(ref, "#/") {
				require.NotNil(t, at(doc, ref), "%s: %s", name, ref)
				return
			}
			require.NotEmpty(t, read(t, path.Clean(ref)), "%s: %s", name, ref)
		})
		require.NotZero(t, n, name)
	}
}

func read(t *testing.T, file string) []byte {
	t.Helper()
	b, err := JSON.ReadFile(file)
	require.NoError(t, err)
	return b
}

func TestEveryJSONSchemaIsReferredTo(t *testing.T) {
	var used []string
	refs(document(t, AsyncAPI), func(ref string) {
		if !strings.HasPrefix(ref, "#/") {
			used = append(used, path.Clean(ref))
		}
	})
	there, err := fs.Glob(JSON, "json/*")
	require.NoError(t, err)
	slices.Sort(used)
	require.Equal(t, there, slices.Compact(used))
}

// TestEveryOperationNamesItsRoles: an operation is open to all on purpose, or names the roles that reach it, or it is a mistake.
func TestEveryOperationNamesItsRoles(t *testing.T) {
	doc := document(t, OpenAPI)
	ids := map[string]bool{}
	for p, item := range asMap(t, doc["paths"]) {
		for method, o := range asMap(t, item) {
			if method == "parameters" {
				continue
			}
			op := asMap(t, o)
			id, _ := op["operationId"].(string)
			require.NotEmpty(t, id, "%s %s", method, p)
			require.False(t, ids[id], "operationId %s is there twice", id)
			ids[id] = true
			if sec, open := op["security"]; open {
				require.Empty(t, sec, id)
				require.False(t, strings.HasPrefix(p, "/v1/"), "%s: nothing under /v1 is open", id)
				require.NotContains(t, op, "x-required-roles", id)
				continue
			}
			roles, _ := op["x-required-roles"].([]any)
			require.NotEmpty(t, roles, id)
			require.Contains(t, roles, "admin", id)
			for _, r := range roles {
				require.Contains(t, []any{"client", "operator", "admin"}, r, id)
			}
			responses := asMap(t, op["responses"])
			for _, code := range []string{"400", "401", "403", "429", "500", "503"} {
				require.Contains(t, responses, code, id)
			}
		}
	}
}

// TestSchemasSayNothingUnintended finds slips of YAML's flow style: a comma in a description that was not quoted makes new keys.
func TestSchemasSayNothingUnintended(t *testing.T) {
	known := strings.Fields("type format description example enum required properties additionalProperties items minItems maxItems " +
		"minLength maxLength minimum maximum pattern default $ref x-go-type-skip-optional-pointer")
	var check func(where string, s map[string]any)
	check = func(where string, s map[string]any) {
		for k, v := range s {
			require.Contains(t, known, k, where)
			if k != "properties" {
				if sub, ok := v.(map[string]any); ok && k == "items" {
					check(where+"[]", sub)
				}
				continue
			}
			for name, p := range asMap(t, v) {
				check(where+"."+name, asMap(t, p))
			}
		}
		for _, r := range asList(s["required"]) {
			require.Contains(t, s["properties"], r, "%s requires what it does not have", where)
		}
	}
	for name, s := range asMap(t, at(document(t, OpenAPI), "#/components/schemas")) {
		check(name, asMap(t, s))
	}
}

func asList(v any) []any { l, _ := v.([]any); return l }

func asMap(t *testing.T, v any) map[string]any {
	t.Helper()
	m, ok := v.(map[string]any)
	require.True(t, ok, "%T", v)
	return m
}
