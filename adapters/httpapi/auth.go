package httpapi

import (
	"bufio"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
)

// Role is what a caller may do.
type Role string

// The roles, as x-required-roles in schemas/openapi.yaml names them.
const (
	RoleClient   Role = "client"
	RoleOperator Role = "operator"
	RoleAdmin    Role = "admin"
)

// Caller is who asks.
type Caller struct {
	Name string
	Role Role
}

var (
	everyRole = []Role{RoleClient, RoleOperator, RoleAdmin}
	operators = []Role{RoleOperator, RoleAdmin}
	admins    = []Role{RoleAdmin}
)

// permissions says which roles a route needs. A route that is neither here nor public is for nobody; a test holds both tables against
// schemas/openapi.yaml.
var permissions = map[string][]Role{
	"POST /v1/orders":                    everyRole,
	"GET /v1/orders":                     everyRole,
	"GET /v1/orders/{order_id}":          everyRole,
	"POST /v1/orders/{order_id}/cancel":  everyRole,
	"GET /v1/orders/{order_id}/events":   everyRole,
	"GET /v1/orders/{order_id}/timeline": everyRole,
	"GET /v1/products":                   everyRole,
	"GET /v1/products/{sku}":             everyRole,
	"PUT /v1/products/{sku}":             admins,
	"GET /v1/sagas":                      operators,
	"GET /v1/sagas/{order_id}":           operators,
	"POST /v1/sagas/{order_id}/resolve":  operators,
	"GET /v1/dlq":                        operators,
	"GET /v1/dlq/{id}":                   operators,
	"POST /v1/dlq/replay":                operators,
	"POST /v1/dlq/discard":               operators,
	"GET /v1/audit-log":                  operators,
	"/debug/":                            admins,
}

// public routes take no token.
var public = map[string]bool{
	"GET /healthz":       true,
	"GET /readyz":        true,
	"GET /metrics":       true,
	"GET /openapi.yaml":  true,
	"GET /asyncapi.yaml": true,
	"GET /json/{file}":   true,
}

// Tokens are the callers by the SHA-256 of their bearer token. Tokens are long and random, so a plain hash is enough. Two tokens may
// have one name, while one takes over from the other: they are one caller, with the same Idempotency-Keys and one rate.
type Tokens struct {
	by    map[[32]byte]Caller
	names map[string]bool
}

// Bounds of a tokens file.
const (
	maxTokens = 10_000 // each caller has a bucket of its rate
	maxName   = 64     // bytes; names are in the audit log and in the key of every order
)

// ParseTokens reads a tokens file: a line a token, `name role sha256-in-hex`; # starts a comment. See `ordersaga token`.
func ParseTokens(r io.Reader) (*Tokens, error) {
	t := &Tokens{by: map[[32]byte]Caller{}, names: map[string]bool{}}
	sc := bufio.NewScanner(r)
	for n := 1; sc.Scan(); n++ {
		line, _, _ := strings.Cut(sc.Text(), "#")
		f := strings.Fields(line)
		if len(f) == 0 {
			continue
		}
		if err := t.add(f); err != nil {
			return nil, fmt.Errorf("tokens, line %d: %w", n, err)
		}
	}
	if err := sc.Err(); err != nil {
		return nil, fmt.Errorf("tokens: %w", err)
	}
	return t, nil
}

func (t *Tokens) add(f []string) error {
	if len(f) != 3 {
		return fmt.Errorf("want `name role sha256`, there are %d words", len(f))
	}
	if err := checkCaller(f[0], Role(f[1])); err != nil {
		return err
	}
	h, err := hex.DecodeString(f[2])
	if err != nil || len(h) != sha256.Size {
		return errors.New("the third word is not a SHA-256 in hex (ordersaga token makes the line)")
	}
	k := [32]byte(h)
	if _, twice := t.by[k]; twice {
		return errors.New("the token is there twice: each caller has one of its own")
	}
	if len(t.by) == maxTokens {
		return fmt.Errorf("there are more than %d tokens", maxTokens)
	}
	t.by[k], t.names[f[0]] = Caller{Name: f[0], Role: Role(f[1])}, true
	return nil
}

func checkCaller(name string, role Role) error {
	if name == "" || len(name) > maxName || !plain(name) || strings.ContainsFunc(name, unicode.IsSpace) || strings.Contains(name, "#") {
		return fmt.Errorf("name %.64q: one word of at most %d bytes of printable text, without #", name, maxName)
	}
	if !slices.Contains(everyRole, role) {
		return fmt.Errorf("role %.64q is not client, operator or admin", role)
	}
	return nil
}

// NewToken draws a token and its line for the tokens file.
func NewToken(name string, role Role) (token, line string, err error) {
	if err := checkCaller(name, role); err != nil {
		return "", "", err
	}
	var b [24]byte
	if _, err := rand.Read(b[:]); err != nil {
		return "", "", fmt.Errorf("no randomness: %w", err)
	}
	token = "os_" + hex.EncodeToString(b[:])
	h := sha256.Sum256([]byte(token))
	return token, fmt.Sprintf("%s %s %x", name, role, h), nil
}

// Len is how many tokens there are.
func (t *Tokens) Len() int { return len(t.by) }

func (t *Tokens) has(name string) bool { return t.names[name] }

type callerKey struct{}

// callerOf is who the request was authorised for.
func callerOf(ctx context.Context) Caller {
	c, _ := ctx.Value(callerKey{}).(Caller)
	return c
}

// authorize finds the caller, holds its rate, and answers the request with the caller in its context; false if it was answered.
func (a *API) authorize(w http.ResponseWriter, r *http.Request, pattern string) (*http.Request, bool) {
	if public[pattern] {
		return r, true
	}
	c, p := a.admitted(w, r, pattern)
	if p != nil {
		writeProblem(w, p)
		return nil, false
	}
	w.Header()["Cache-Control"] = noStore
	return r.WithContext(context.WithValue(r.Context(), callerKey{}, c)), true
}

func (a *API) admitted(w http.ResponseWriter, r *http.Request, pattern string) (Caller, *Problem) {
	roles := permissions[pattern]
	if roles == nil {
		return Caller{}, forbidden("this route is for nobody: it has no entry in the table of permissions")
	}
	c, ok := a.caller(r)
	if !ok {
		w.Header().Set("WWW-Authenticate", `Bearer realm="ordersaga"`)
		return Caller{}, problem(http.StatusUnauthorized, "unauthorized", "Unauthorized", "send a known token as `Authorization: Bearer …`")
	}
	if wait, ok := a.limiter.allow(c.Name); !ok {
		retryAfter(w, wait)
		return Caller{}, problem(http.StatusTooManyRequests, "rate_limited", "Too many requests", "this caller asks too often: slow down")
	}
	if !slices.Contains(roles, c.Role) {
		return Caller{}, forbidden(fmt.Sprintf("the role %s does not reach so far: it takes %s", c.Role, join(roles)))
	}
	// Without tokens, any page in a browser on this machine could ask; it could not know a token.
	if a.cfg.Open && a.crossOrigin.Check(r) != nil {
		return Caller{}, forbidden("a page of another origin may not change anything here")
	}
	return c, nil
}

func forbidden(detail string) *Problem {
	return problem(http.StatusForbidden, "forbidden", "Forbidden", detail)
}

func (a *API) caller(r *http.Request) (Caller, bool) {
	if a.cfg.Open {
		return Caller{Name: "dev", Role: RoleAdmin}, true
	}
	h := r.Header.Get("Authorization")
	const prefix = "bearer "
	if len(h) <= len(prefix) || !strings.EqualFold(h[:len(prefix)], prefix) {
		return Caller{}, false
	}
	// A look-up by hash: how long it takes tells nothing about the tokens.
	c, ok := a.tokens.Load().by[sha256.Sum256([]byte(strings.TrimLeft(h[len(prefix):], " ")))]
	return c, ok
}

func join(rs []Role) string {
	s := make([]string, len(rs))
	for i, r := range rs {
		s[i] = string(r)
	}
	return strings.Join(s, " or ")
}

// maxRetryAfter bounds what Retry-After says.
const maxRetryAfter = time.Hour

// retryAfter says when to try again, in whole seconds, at least one.
func retryAfter(w http.ResponseWriter, d time.Duration) {
	d = min(d, maxRetryAfter)
	w.Header().Set("Retry-After", strconv.Itoa(int(max(1, (d+time.Second-1)/time.Second))))
}
