package httpapi

import (
	"bufio"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/maypok86/otter/v2"
	"golang.org/x/time/rate"
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

// permissions says which roles a route needs. A route under /v1 or /debug that is not here is for nobody; a test holds the table
// against schemas/openapi.yaml.
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

// Tokens are the callers by the SHA-256 of their bearer token. Tokens are long and random, so a plain hash is enough.
type Tokens struct{ by map[[32]byte]Caller }

// ParseTokens reads a tokens file: a line a token, `name role sha256-in-hex`; # starts a comment. See `ordersaga token`.
func ParseTokens(r io.Reader) (*Tokens, error) {
	t := &Tokens{by: map[[32]byte]Caller{}}
	sc := bufio.NewScanner(r)
	for n := 1; sc.Scan(); n++ {
		line, _, _ := strings.Cut(sc.Text(), "#")
		f := strings.Fields(line)
		if len(f) == 0 {
			continue
		}
		if len(f) != 3 {
			return nil, fmt.Errorf("tokens, line %d: want `name role sha256`, there are %d words", n, len(f))
		}
		role := Role(f[1])
		if !slices.Contains(everyRole, role) {
			return nil, fmt.Errorf("tokens, line %d: role %q is not client, operator or admin", n, f[1])
		}
		h, err := hex.DecodeString(f[2])
		if err != nil || len(h) != sha256.Size {
			return nil, fmt.Errorf("tokens, line %d: the third word is not a SHA-256 in hex (ordersaga token makes the line)", n)
		}
		t.by[[32]byte(h)] = Caller{Name: f[0], Role: role}
	}
	if err := sc.Err(); err != nil {
		return nil, fmt.Errorf("tokens: %w", err)
	}
	return t, nil
}

// NewToken draws a token and its line for the tokens file.
func NewToken(name string, role Role) (token, line string, err error) {
	if name == "" || strings.ContainsAny(name, " \t\r\n#") || len(name) > 64 {
		return "", "", fmt.Errorf("name %.64q: one word of at most 64 characters, without #", name)
	}
	if !slices.Contains(everyRole, role) {
		return "", "", fmt.Errorf("role %q is not client, operator or admin", role)
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

type callerKey struct{}

// callerOf is who the request was authorised for.
func callerOf(ctx context.Context) Caller {
	c, _ := ctx.Value(callerKey{}).(Caller)
	return c
}

// authorize finds the caller, holds its rate, and answers the request with the caller in its context; false if it was answered.
func (a *API) authorize(w http.ResponseWriter, r *http.Request, pattern string) (*http.Request, bool) {
	roles, guarded := permissions[pattern]
	if !guarded {
		if strings.Contains(pattern, "/v1/") || strings.Contains(pattern, "/debug") {
			writeProblem(w, problem(http.StatusForbidden, "forbidden", "Forbidden", "this route is for nobody: it has no entry in the table of permissions"))
			return nil, false
		}
		return r, true
	}
	c, ok := a.caller(r)
	if !ok {
		w.Header().Set("WWW-Authenticate", `Bearer realm="ordersaga"`)
		writeProblem(w, problem(http.StatusUnauthorized, "unauthorized", "Unauthorized", "send a known token as `Authorization: Bearer …`"))
		return nil, false
	}
	if !slices.Contains(roles, c.Role) {
		writeProblem(w, problem(http.StatusForbidden, "forbidden", "Forbidden", fmt.Sprintf("the role %s does not reach so far: it takes %s", c.Role, join(roles))))
		return nil, false
	}
	if wait, ok := a.limiter.allow(c.Name); !ok {
		p := problem(http.StatusTooManyRequests, "rate_limited", "Too many requests", "this caller asks too often: slow down")
		retryAfter(w, wait)
		writeProblem(w, p)
		return nil, false
	}
	return r.WithContext(context.WithValue(r.Context(), callerKey{}, c)), true
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
	c, ok := a.tokens.Load().by[sha256.Sum256([]byte(h[len(prefix):]))]
	return c, ok
}

func join(rs []Role) string {
	s := make([]string, len(rs))
	for i, r := range rs {
		s[i] = string(r)
	}
	return strings.Join(s, " or ")
}

func retryAfter(w http.ResponseWriter, d time.Duration) {
	w.Header().Set("Retry-After", strconv.Itoa(int(max(1, (d+time.Second-1)/time.Second))))
}

// maxLimited bounds how many callers' rates are kept.
const maxLimited = 10_000

// limiter is a token bucket a caller.
type limiter struct {
	limits  chan Limits // one, the current
	buckets *otter.Cache[string, *rate.Limiter]
}

func newLimiter(l Limits) *limiter {
	x := &limiter{limits: make(chan Limits, 1), buckets: otter.Must(&otter.Options[string, *rate.Limiter]{MaximumSize: maxLimited})}
	x.limits <- l
	return x
}

func (l *limiter) set(n Limits) {
	<-l.limits
	l.limits <- n
	l.buckets.InvalidateAll()
}

func (l *limiter) allow(caller string) (time.Duration, bool) {
	b, ok := l.buckets.GetIfPresent(caller)
	if !ok {
		cur := <-l.limits
		l.limits <- cur
		b, _ = l.buckets.SetIfAbsent(caller, rate.NewLimiter(rate.Limit(cur.Rate), cur.Burst))
	}
	r := b.Reserve()
	if !r.OK() {
		return time.Second, false
	}
	if d := r.Delay(); d > 0 {
		r.Cancel()
		return d, false
	}
	return 0, true
}
