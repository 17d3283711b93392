package httpapi

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"regexp"
	"strings"
	"sync"
	"testing"

	"github.com/getkin/kin-openapi/openapi3"
	"github.com/getkin/kin-openapi/openapi3filter"
	"github.com/getkin/kin-openapi/routers"
	"github.com/stretchr/testify/require"
)

// contract is schemas/openapi.yaml.
var contract = sync.OnceValues(func() (*openapi3.T, error) {
	openapi3.DefineStringFormatValidator("uuid", openapi3.NewRegexpFormatValidator(`^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$`))
	openapi3filter.RegisterBodyDecoder("application/yaml", openapi3filter.PlainBodyDecoder) // the contracts are text here
	doc, err := openapi3.NewLoader().LoadFromFile("../../schemas/openapi.yaml")
	if err == nil {
		err = doc.Validate(openapi3.NewLoader().Context)
	}
	return doc, err
})

// checked holds every answer that a client gets to the contract: its status is one that the operation lists, its body is of the schema.
type checked struct {
	t    *testing.T
	api  *API
	next http.RoundTripper
}

func (c *checked) RoundTrip(r *http.Request) (*http.Response, error) {
	resp, err := c.next.RoundTrip(r)
	if err != nil {
		return nil, err
	}
	if err := c.check(r, resp); err != nil {
		c.t.Errorf("%s %s: the answer %d breaks the contract: %v", r.Method, r.URL.Path, resp.StatusCode, err)
	}
	return resp, nil
}

func (c *checked) check(r *http.Request, resp *http.Response) error {
	doc, err := contract()
	if err != nil {
		return err
	}
	if resp.Header.Get("X-Content-Type-Options") != "nosniff" {
		return fmt.Errorf("no X-Content-Type-Options")
	}
	method, path, _ := strings.Cut(c.api.Route(r), " ")
	item := doc.Paths.Value(path)
	if item == nil {
		return nil // no path of the contract: 404, 405, /debug
	}
	op := item.GetOperation(method)
	if op == nil {
		return fmt.Errorf("the contract has no %s %s", method, path)
	}
	in := &openapi3filter.ResponseValidationInput{
		RequestValidationInput: &openapi3filter.RequestValidationInput{
			Request: r, Route: &routers.Route{Spec: doc, Path: path, PathItem: item, Method: method, Operation: op},
		},
		Status: resp.StatusCode, Header: resp.Header,
		Options: &openapi3filter.Options{IncludeResponseStatus: true, MultiError: true, AuthenticationFunc: openapi3filter.NoopAuthenticationFunc},
	}
	if strings.HasPrefix(resp.Header.Get("Content-Type"), "text/event-stream") {
		in.Options.ExcludeResponseBody = true
		return openapi3filter.ValidateResponse(r.Context(), in)
	}
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	resp.Body.Close()
	resp.Body = io.NopCloser(bytes.NewReader(b))
	in.SetBodyBytes(b)
	return openapi3filter.ValidateResponse(r.Context(), in)
}

// TestPermissionsAreThoseOfTheContract: what a role reaches is written down for its holders in openapi.yaml; the table is the same.
func TestPermissionsAreThoseOfTheContract(t *testing.T) {
	doc, err := contract()
	require.NoError(t, err)
	want, open := map[string][]Role{"/debug/": {RoleAdmin}}, map[string]bool{}
	for path, item := range doc.Paths.Map() {
		for method, op := range item.Operations() {
			route := method + " " + path
			if op.Security != nil && len(*op.Security) == 0 {
				open[route] = true
				continue
			}
			roles, _ := op.Extensions["x-required-roles"].([]any)
			require.NotEmpty(t, roles, route)
			for _, r := range roles {
				role, is := r.(string)
				require.True(t, is)
				want[route] = append(want[route], Role(role))
			}
		}
	}
	require.Equal(t, want, permissions)
	require.Equal(t, open, public)
}

// TestEveryRouteIsServed: each operation of the contract meets the route of its name, and no other pattern is registered for it.
func TestEveryRouteIsServed(t *testing.T) {
	doc, err := contract()
	require.NoError(t, err)
	w := newWorld(t)
	for path, item := range doc.Paths.Map() {
		for method := range item.Operations() {
			concrete := regexp.MustCompile(`\{[^}]+\}`).ReplaceAllString(path, "x")
			r, err := http.NewRequestWithContext(t.Context(), method, w.base+concrete, nil)
			require.NoError(t, err)
			require.Equal(t, method+" "+path, w.api.Route(r))
		}
	}
	r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, w.base+"/nowhere", nil)
	require.NoError(t, err)
	require.Empty(t, w.api.Route(r))
}

// TestNamesOfBodiesNeedNoFolding: decodeStrict takes names of a to z, 0 to 9 and _ only; bodies of the contract have no others.
func TestNamesOfBodiesNeedNoFolding(t *testing.T) {
	doc, err := contract()
	require.NoError(t, err)
	plainName := regexp.MustCompile(`^[a-z0-9_]+$`)
	var walk func(s *openapi3.Schema, depth int) (deepest int)
	walk = func(s *openapi3.Schema, depth int) int {
		deepest := depth
		require.LessOrEqual(t, len(s.Properties), maxFields)
		for name, p := range s.Properties {
			require.Regexp(t, plainName, name)
			deepest = max(deepest, walk(p.Value, depth+1))
		}
		if s.Items != nil {
			deepest = max(deepest, walk(s.Items.Value, depth+1))
		}
		return deepest
	}
	bodies := 0
	for _, item := range doc.Paths.Map() {
		for _, op := range item.Operations() {
			if op.RequestBody == nil {
				continue
			}
			s := op.RequestBody.Value.Content["application/json"].Schema.Value
			require.LessOrEqual(t, walk(s, 0), maxDepth)
			require.NotNil(t, s.AdditionalProperties.Has, op.OperationID)
			require.False(t, *s.AdditionalProperties.Has, op.OperationID)
			bodies++
		}
	}
	require.Equal(t, 6, bodies)
}
