package httpapi

import (
	"crypto/sha256"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"testing"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"
)

// badge is a caller of a test with its token.
type badge struct{ token, line string }

func issue(tb testing.TB, name string, role Role) badge {
	tb.Helper()
	token, line, err := NewToken(name, role)
	require.NoError(tb, err)
	return badge{token, line}
}

func book(tb testing.TB, bs ...badge) *Tokens {
	tb.Helper()
	var lines []string
	for _, b := range bs {
		lines = append(lines, b.line)
	}
	tokens, err := ParseTokens(strings.NewReader(strings.Join(lines, "\n")))
	require.NoError(tb, err)
	return tokens
}

func guarded(tokens *Tokens) func(*setup) {
	return func(s *setup) { s.cfg.Open, s.tokens = false, tokens }
}

func TestAuthentication(t *testing.T) {
	shop := issue(t, "shop", RoleClient)
	w := newWorld(t, guarded(book(t, shop)))
	for name, header := range map[string]string{
		"none":         "",
		"other scheme": "Basic " + shop.token,
		"no token":     "Bearer ",
		"scheme only":  "Bearer",
		"unknown":      "Bearer os_0000",
		"its hash":     "Bearer " + strings.Fields(shop.line)[2],
		"cut":          "Bearer " + shop.token[:len(shop.token)-1],
		"longer":       "Bearer " + shop.token + " ",
	} {
		t.Run(name, func(t *testing.T) {
			r := w.request(http.MethodGet, "/v1/orders", "")
			if header != "" {
				r.Header["Authorization"] = []string{header}
			}
			a, err := w.send(r)
			require.NoError(t, err)
			if name == "longer" { // net/http trims what surrounds a header's value
				require.Equal(t, http.StatusOK, a.status)
				return
			}
			w.refused(a, http.StatusUnauthorized, "unauthorized")
			require.Contains(t, a.header.Get("WWW-Authenticate"), "Bearer")
			require.NotContains(t, string(a.body), "os_")
		})
	}
	require.Equal(t, http.StatusOK, w.do(http.MethodGet, "/v1/orders", "", "Authorization", "bearer  "+shop.token).status)
	for _, open := range []string{"/healthz", "/readyz", "/metrics", "/openapi.yaml", "/asyncapi.yaml", "/json/place-order.schema.json"} {
		require.Equal(t, http.StatusOK, w.do(http.MethodGet, open, "").status, open)
	}
	// Who is not known learns nothing about a request: not whether it was well-formed, not whether the thing is there.
	w.refused(w.do(http.MethodPost, "/v1/orders", "{"), http.StatusUnauthorized, "unauthorized")
	w.refused(w.do(http.MethodGet, "/v1/orders/x?limit=%zz", ""), http.StatusUnauthorized, "unauthorized")
}

func TestRoles(t *testing.T) {
	who := map[Role]badge{RoleClient: issue(t, "shop", RoleClient), RoleOperator: issue(t, "ops", RoleOperator), RoleAdmin: issue(t, "root", RoleAdmin)}
	debug := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusOK) })
	w := newWorld(t, guarded(book(t, who[RoleClient], who[RoleOperator], who[RoleAdmin])), func(s *setup) { s.deps.Debug = debug })
	id := w.reader.pending().String()
	for route, roles := range permissions {
		method, path, found := strings.Cut(route, " ")
		if !found {
			method, path = http.MethodGet, route
		}
		path = strings.NewReplacer("{order_id}", id, "{sku}", "TEA-1", "{id}", uuid.NewString()).Replace(path)
		if strings.HasSuffix(path, "/events") {
			w.reader.ends(w.reader.list[0], "confirmed", "") // the stream ends at once
		}
		for role, b := range who {
			t.Run(route+" as "+string(role), func(t *testing.T) {
				a := w.do(method, path, "", "Authorization", "Bearer "+b.token)
				allowed := false
				for _, r := range roles {
					allowed = allowed || r == role
				}
				if allowed {
					require.NotContains(t, []int{http.StatusUnauthorized, http.StatusForbidden}, a.status)
				} else {
					w.refused(a, http.StatusForbidden, "forbidden")
				}
			})
		}
	}
	calls := w.do(http.MethodPost, "/v1/orders", tea, "Authorization", "Bearer "+who[RoleClient].token, "Idempotency-Key", "k")
	w.accepted(calls)
	sent := w.intake.submitted()
	require.Equal(t, "shop", sent[len(sent)-1].Caller, "keys are scoped by caller")
}

// TestUnlistedRouteIsForNobody: a route that was forgotten in the tables does not open a door.
func TestUnlistedRouteIsForNobody(t *testing.T) {
	w := newWorld(t)
	w.api.mux.HandleFunc("GET /secret", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusOK) })
	w.refused(w.do(http.MethodGet, "/secret", ""), http.StatusForbidden, "forbidden")
}

func TestOpenMode(t *testing.T) {
	w := newWorld(t)
	require.Equal(t, http.StatusCreated, w.do(http.MethodPut, "/v1/products/TEA-1", `{"name":"Tea","unit_price_minor":450,"currency":"EUR"}`).status, "the caller is admin")
	require.Equal(t, "dev", w.products.puts[0].Actor)
	id := w.reader.pending().String()
	cancel := "/v1/orders/" + id + "/cancel"
	for name, h := range map[string][]string{
		"fetched by a foreign page": {"Sec-Fetch-Site", "cross-site"},
		"from another origin":       {"Origin", "https://evil.example"},
	} {
		t.Run(name, func(t *testing.T) {
			w.refused(w.do(http.MethodPost, cancel, "", h...), http.StatusForbidden, "forbidden")
			require.Equal(t, http.StatusOK, w.do(http.MethodGet, "/v1/orders", "", h...).status)
		})
	}
	require.Empty(t, w.orders.cancels)
	require.Equal(t, http.StatusAccepted, w.do(http.MethodPost, cancel, "", "Sec-Fetch-Site", "same-origin").status)
}

func TestTokensFile(t *testing.T) {
	a, b := issue(t, "a", RoleClient), issue(t, "b", RoleAdmin)
	tokens, err := ParseTokens(strings.NewReader("# who may call\n\n" + a.line + " # the shop\n\t" + strings.ToUpper(strings.Fields(b.line)[2]) + "\n"))
	require.ErrorContains(t, err, "line 4")
	require.Nil(t, tokens)

	tokens, err = ParseTokens(strings.NewReader("# who may call\r\n\r\n" + a.line + " # the shop\r\n\t" + b.line))
	require.NoError(t, err)
	require.Equal(t, 2, tokens.Len())
	require.Equal(t, Caller{"a", RoleClient}, tokens.by[sha256.Sum256([]byte(a.token))])
	require.NotContains(t, a.line, a.token)

	rotated := issue(t, "a", RoleClient)
	require.Equal(t, 2, book(t, a, rotated).Len(), "two tokens of one caller while one takes over")

	hash := strings.Fields(a.line)[2]
	for name, c := range map[string]struct{ file, want string }{
		"too few words":  {"a client", "want `name role sha256`, there are 2 words"},
		"too many words": {a.line + " x", "there are 4 words"},
		"role":           {"a root " + hash, `role "root"`},
		"short hash":     {"a client abcd", "not a SHA-256"},
		"no hash":        {"a client " + strings.Repeat("z", 64), "not a SHA-256"},
		"plain token":    {"a client " + a.token, "not a SHA-256"},
		"token twice":    {a.line + "\nb admin " + hash, "line 2: the token is there twice"},
		"long name":      {strings.Repeat("n", 65) + " client " + hash, "at most 64 bytes"},
		"control":        {"a\x1b[31m client " + hash, "printable"},
		"long line":      {strings.Repeat("x", 70_000), "too long"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := ParseTokens(strings.NewReader(c.file))
			require.ErrorContains(t, err, c.want)
			require.NotContains(t, err.Error(), "\x1b")
			require.NotContains(t, err.Error(), a.token)
		})
	}
	var many strings.Builder
	for i := range maxTokens + 1 {
		fmt.Fprintf(&many, "c client %x\n", sha256.Sum256([]byte(strconv.Itoa(i))))
	}
	_, err = ParseTokens(strings.NewReader(many.String()))
	require.ErrorContains(t, err, "more than 10000 tokens")

	for _, bad := range []string{"", "two words", "a#b", strings.Repeat("n", 65), "a\nb"} {
		_, _, err := NewToken(bad, RoleClient)
		require.Error(t, err, "%q", bad)
	}
	_, _, err = NewToken("a", "root")
	require.ErrorContains(t, err, `role "root"`)
}

func TestSetTokens(t *testing.T) {
	old, fresh := issue(t, "shop", RoleClient), issue(t, "shop", RoleClient)
	w := newWorld(t, guarded(book(t, old)))
	ask := func(b badge) int {
		return w.do(http.MethodGet, "/v1/orders", "", "Authorization", "Bearer "+b.token).status
	}
	require.Equal(t, http.StatusOK, ask(old))
	require.Equal(t, http.StatusUnauthorized, ask(fresh))
	w.api.SetTokens(book(t, old, fresh))
	require.Equal(t, http.StatusOK, ask(fresh))
	w.api.SetTokens(book(t, fresh))
	require.Equal(t, http.StatusUnauthorized, ask(old))
	require.Len(t, w.api.limiter.buckets, 1)
	w.api.SetTokens(book(t, issue(t, "other", RoleClient)))
	require.Empty(t, w.api.limiter.buckets, "what nobody can use is not kept")
}

func TestRateLimit(t *testing.T) {
	a, b := issue(t, "a", RoleClient), issue(t, "b", RoleClient)
	w := newWorld(t, guarded(book(t, a, b)), func(s *setup) { s.limits = Limits{Rate: 0.1, Burst: 2} })
	ask := func(x badge, path string) answered {
		return w.do(http.MethodGet, path, "", "Authorization", "Bearer "+x.token)
	}
	require.Equal(t, http.StatusOK, ask(a, "/v1/orders").status)
	w.refused(ask(a, "/v1/dlq"), http.StatusForbidden, "forbidden") // what is refused counts too
	limited := ask(a, "/v1/orders")
	w.refused(limited, http.StatusTooManyRequests, "rate_limited")
	after, err := strconv.Atoi(limited.header.Get("Retry-After"))
	require.NoError(t, err)
	require.InDelta(t, 10, after, 1)
	require.Equal(t, http.StatusOK, ask(b, "/v1/orders").status, "each caller has a rate of its own")
	require.Equal(t, http.StatusOK, ask(a, "/healthz").status)

	w.api.SetLimits(Limits{Rate: 1e6, Burst: 100})
	require.Eventually(t, func() bool { return ask(a, "/v1/orders").status == http.StatusOK }, tick*100, tick)
	w.api.SetLimits(Limits{Rate: 1e-9, Burst: 0})
	limited = ask(b, "/v1/orders")
	w.refused(limited, http.StatusTooManyRequests, "rate_limited")
	require.Equal(t, "3600", limited.header.Get("Retry-After"))
}

func FuzzParseTokens(f *testing.F) {
	f.Add("a client 8e35c2cd3bf6641bdb0e2050b76932cbb2e6034a0ddacc1d9bea82a6ba57f7cf # x\n")
	f.Add("a client")
	f.Add("\x00 admin zz\r\n\r\n#")
	f.Fuzz(func(t *testing.T, file string) {
		tokens, err := ParseTokens(strings.NewReader(file))
		if err != nil {
			require.Nil(t, tokens)
			return
		}
		for _, c := range tokens.by {
			require.NoError(t, checkCaller(c.Name, c.Role))
			require.True(t, tokens.has(c.Name))
		}
	})
}
