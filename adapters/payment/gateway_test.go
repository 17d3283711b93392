package payment

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"ordersaga/domain"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const testKey = "sk_test_ofThisPackage"

func testConfig(url string) Config {
	return Config{
		BaseURL: url, APIKey: testKey, Timeout: 2 * time.Second,
		Retry:   Retry{Retries: -1, Base: time.Millisecond, Max: time.Millisecond, Elapsed: 2 * time.Second},
		Breaker: Breaker{Consecutive: 1000, MinCalls: 1000}, Limits: Limits{PerSecond: 1e9, Burst: 1000},
	}
}

func newGateway(tb testing.TB, cfg Config, options ...Option) *Gateway {
	tb.Helper()
	g, err := New(cfg, options...)
	require.NoError(tb, err)
	tb.Cleanup(g.Close)
	return g
}

var testOrder = func() domain.OrderID {
	id, err := domain.ParseOrderID("01932c07-0000-7000-8000-000000000001")
	if err != nil {
		panic(err)
	}
	return id
}()

func testRequest(op domain.PaymentOp) domain.PaymentRequest {
	r := domain.PaymentRequest{Op: op, Order: testOrder, Attempt: 1, Amount: domain.Money{Minor: 1234, Currency: "EUR"}, Method: "pm_card_visa"}
	if op != domain.Authorize {
		r.Ref = "pi_1"
	}
	return r
}

// sent is one request as the gateway saw it.
type sent struct {
	method, path, key, auth string
	form                    url.Values
}

// script is a server that gives one answer after the other and notes what it was asked; the last answer is repeated.
type script struct {
	mu      sync.Mutex
	asked   []sent
	answers []func(http.ResponseWriter)
}

func (s *script) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, _ := io.ReadAll(r.Body)
	form := r.URL.Query()
	if r.Method == http.MethodPost {
		form, _ = url.ParseQuery(string(body))
	}
	s.mu.Lock()
	s.asked = append(s.asked, sent{r.Method, r.URL.Path, r.Header.Get("Idempotency-Key"), r.Header.Get("Authorization"), form})
	answer := s.answers[min(len(s.asked), len(s.answers))-1]
	s.mu.Unlock()
	answer(w)
}

func (s *script) requests() []sent {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.asked
}

func say(status int, body string, headers ...string) func(http.ResponseWriter) {
	return func(w http.ResponseWriter) {
		for i := 0; i < len(headers); i += 2 {
			w.Header().Set(headers[i], headers[i+1])
		}
		w.WriteHeader(status)
		_, _ = io.WriteString(w, body)
	}
}

func intentBody(status string) string {
	return fmt.Sprintf(`{"id":"pi_1","object":"payment_intent","status":%q,"amount":1234,"amount_received":1234,"currency":"eur","created":1700000000,`+
		`"metadata":{"order_id":%q},"latest_charge":null}`, status, testOrder)
}

func errorBody(kind, code string) string {
	return fmt.Sprintf(`{"error":{"type":%q,"code":%q,"message":"because\nof reasons \u001b[31m %s","param":"amount"}}`, kind, code, testKey)
}

func run(t *testing.T, answers ...func(http.ResponseWriter)) (*script, *httptest.Server) {
	t.Helper()
	s := &script{answers: answers}
	srv := httptest.NewServer(s)
	t.Cleanup(srv.Close)
	return s, srv
}

// The requests are what the design says, to the parameter.
func TestRequestsOnTheWire(t *testing.T) {
	unexpected := errorBody("invalid_request_error", "payment_intent_unexpected_state")
	for name, c := range map[string]struct {
		op      domain.PaymentOp
		answers []func(http.ResponseWriter)
		want    []sent
		result  domain.PaymentResult
	}{
		"authorize": {
			op: domain.Authorize, answers: []func(http.ResponseWriter){say(200, intentBody("requires_capture"))}, result: domain.PaymentAuthorized,
			want: []sent{{"POST", "/v1/payment_intents", testOrder.String() + "/authorize/1", "", url.Values{
				"amount": {"1234"}, "currency": {"eur"}, "capture_method": {"manual"}, "confirm": {"true"}, "error_on_requires_action": {"true"},
				"payment_method": {"pm_card_visa"}, "payment_method_types[0]": {"card"}, "metadata[order_id]": {testOrder.String()},
			}}},
		},
		"capture": {
			op: domain.Capture, answers: []func(http.ResponseWriter){say(200, intentBody("succeeded"))}, result: domain.PaymentCaptured,
			want: []sent{{"POST", "/v1/payment_intents/pi_1/capture", testOrder.String() + "/capture/1", "", url.Values{"amount_to_capture": {"1234"}}}},
		},
		"reverse": {
			op: domain.Reverse, answers: []func(http.ResponseWriter){say(200, intentBody("canceled"))}, result: domain.PaymentReversed,
			want: []sent{{"POST", "/v1/payment_intents/pi_1/cancel", testOrder.String() + "/reverse/1", "", url.Values{"cancellation_reason": {"abandoned"}}}},
		},
		"reverse after capture": {
			op: domain.Reverse, result: domain.PaymentReversed,
			answers: []func(http.ResponseWriter){say(400, unexpected), say(200, intentBody("succeeded")), say(200, `{"id":"re_1","object":"refund","status":"pending"}`)},
			want: []sent{
				{"POST", "/v1/payment_intents/pi_1/cancel", testOrder.String() + "/reverse/1", "", url.Values{"cancellation_reason": {"abandoned"}}},
				{"GET", "/v1/payment_intents/pi_1", "", "", url.Values{"expand[0]": {"latest_charge"}}},
				{"POST", "/v1/refunds", testOrder.String() + "/reverse/1/refund", "", url.Values{"payment_intent": {"pi_1"}, "metadata[order_id]": {testOrder.String()}}},
			},
		},
		"look up": {
			op: domain.LookUp, answers: []func(http.ResponseWriter){say(200, intentBody("requires_capture"))}, result: domain.PaymentAuthorized,
			want: []sent{{"GET", "/v1/payment_intents/pi_1", "", "", url.Values{"expand[0]": {"latest_charge"}}}},
		},
	} {
		t.Run(name, func(t *testing.T) {
			s, srv := run(t, c.answers...)
			out, err := newGateway(t, testConfig(srv.URL)).Do(t.Context(), testRequest(c.op))
			require.NoError(t, err)
			require.Equal(t, c.result, out.Result)
			for i := range c.want {
				c.want[i].auth = "Bearer " + testKey
			}
			require.Equal(t, c.want, s.requests())
		})
	}
}

// Every status of an intent, for every operation that can meet it.
func TestStatusesOfAnIntent(t *testing.T) {
	type results map[domain.PaymentOp]domain.PaymentResult // missing: an error
	for status, want := range map[string]results{
		"requires_capture":        {domain.Authorize: domain.PaymentAuthorized, domain.LookUp: domain.PaymentAuthorized},
		"succeeded":               {domain.Capture: domain.PaymentCaptured, domain.LookUp: domain.PaymentCaptured},
		"canceled":                {domain.Authorize: domain.PaymentRefused, domain.Reverse: domain.PaymentReversed, domain.LookUp: domain.PaymentReversed},
		"requires_payment_method": {domain.Authorize: domain.PaymentRefused, domain.LookUp: domain.PaymentRefused},
		"requires_confirmation":   {domain.Authorize: domain.PaymentRefused, domain.LookUp: domain.PaymentRefused},
		"requires_action":         {domain.Authorize: domain.PaymentRefused, domain.LookUp: domain.PaymentRefused},
		"processing":              {},
		"of_the_future":           {},
	} {
		_, srv := run(t, say(200, intentBody(status)))
		g := newGateway(t, testConfig(srv.URL))
		for _, op := range []domain.PaymentOp{domain.Authorize, domain.Capture, domain.Reverse, domain.LookUp} {
			out, err := g.Do(t.Context(), testRequest(op))
			if result, ok := want[op]; ok {
				require.NoError(t, err, "%s %s", op, status)
				require.Equal(t, result, out.Result, "%s %s", op, status)
				if result == domain.PaymentRefused {
					require.Equal(t, status, out.Code)
				}
				continue
			}
			var f *Failure
			require.ErrorAs(t, err, &f, "%s %s", op, status)
			require.Equal(t, op != domain.LookUp, f.OutcomeUnknown(), "%s %s", op, status)
			require.Contains(t, []Class{Malformed, Pending}, f.Class)
		}
	}
}

// Every status of HTTP, as an error or an outcome, with nothing of the API key or of control characters in it.
func TestClassification(t *testing.T) {
	for name, c := range map[string]struct {
		answer   func(http.ResponseWriter)
		class    Class
		poison   bool
		outage   bool
		unknown  bool
		replayed bool
		after    time.Duration
	}{
		"400":                  {answer: say(400, errorBody("invalid_request_error", "parameter_missing")), class: Rejected, poison: true},
		"400 idempotency":      {answer: say(400, errorBody("idempotency_error", "")), class: Rejected, poison: true},
		"404":                  {answer: say(404, errorBody("invalid_request_error", "resource_missing")), class: Rejected, poison: true},
		"422":                  {answer: say(422, errorBody("invalid_request_error", "")), class: Rejected, poison: true},
		"400 of a proxy":       {answer: say(400, "<html>"), class: Malformed, unknown: true},
		"401":                  {answer: say(401, errorBody("invalid_request_error", "")), class: Auth, outage: true, after: 5 * time.Second},
		"403":                  {answer: say(403, errorBody("invalid_request_error", "")), class: Auth, outage: true, after: 5 * time.Second},
		"403 of a proxy":       {answer: say(403, "no"), class: Auth, outage: true, after: 5 * time.Second},
		"409":                  {answer: say(409, errorBody("idempotency_error", "idempotency_key_in_use")), class: Conflict, unknown: true},
		"429":                  {answer: say(429, errorBody("invalid_request_error", "lock_timeout"), "Retry-After", "30"), class: Throttled, after: 30 * time.Second},
		"500":                  {answer: say(500, errorBody("api_error", "")), class: Server, unknown: true},
		"500 replayed":         {answer: say(500, errorBody("api_error", ""), "Idempotent-Replayed", "true"), class: Server, unknown: true, replayed: true},
		"502 of a proxy":       {answer: say(502, "<html>Bad gateway</html>"), class: Server, unknown: true},
		"503":                  {answer: say(503, "", "Retry-After", "2"), class: Server, unknown: true, after: 2 * time.Second},
		"redirect":             {answer: say(302, "", "Location", "http://127.0.0.1:1/"), class: Malformed, unknown: true},
		"200 that is no JSON":  {answer: say(200, "<html>hello</html>"), class: Malformed, unknown: true},
		"200 of another order": {answer: say(200, strings.Replace(intentBody("requires_capture"), testOrder.String(), "somebody-else", 1)), class: Malformed, unknown: true},
		"200 cut short":        {answer: say(200, intentBody("succeeded")[:80], "Content-Length", "500"), class: Connection, unknown: true},
		"200 without an end":   {answer: func(w http.ResponseWriter) { _, _ = w.Write(bytes.Repeat([]byte(" "), maxAnswer+10)) }, class: Connection, unknown: true},
	} {
		t.Run(name, func(t *testing.T) {
			_, srv := run(t, c.answer)
			_, err := newGateway(t, testConfig(srv.URL)).Do(t.Context(), testRequest(domain.Authorize))
			var f *Failure
			require.ErrorAs(t, err, &f)
			require.Equal(t, c.class, f.Class, "%v", err)
			var p interface{ Poison() bool }
			require.Equal(t, c.poison, errors.As(err, &p) && p.Poison())
			var o interface{ Outage() string }
			require.Equal(t, c.outage, errors.As(err, &o) && o.Outage() == Dependency)
			require.Equal(t, c.unknown, f.OutcomeUnknown())
			require.Equal(t, c.replayed, f.Replayed())
			require.Equal(t, c.after, f.RetryAfter())
			require.NotContains(t, err.Error(), testKey)
			require.Equal(t, -1, strings.IndexFunc(err.Error(), func(r rune) bool { return r < ' ' }), "%q", err.Error())
		})
	}
}

func TestRefusals(t *testing.T) {
	_, srv := run(t, say(402, `{"error":{"type":"card_error","code":"card_declined","decline_code":"lost_card","message":"no","payment_intent":{"id":"pi_9"}}}`),
		say(402, `{"error":{"type":"card_error","message":"no","code":"<script>"}}`), say(400, errorBody("invalid_request_error", "charge_expired_for_capture")))
	g := newGateway(t, testConfig(srv.URL))
	for _, c := range []struct {
		op   domain.PaymentOp
		want domain.PaymentOutcome
	}{
		{domain.Authorize, domain.PaymentOutcome{Result: domain.PaymentRefused, Ref: "pi_9", Code: "lost_card"}},
		{domain.Authorize, domain.PaymentOutcome{Result: domain.PaymentRefused, Code: "unstated"}},
		{domain.Capture, domain.PaymentOutcome{Result: domain.PaymentRefused, Ref: "pi_1", Code: "charge_expired_for_capture"}},
	} {
		out, err := g.Do(t.Context(), testRequest(c.op))
		require.NoError(t, err)
		require.Equal(t, c.want, out)
	}
}

// A refund that is not given is never "reversed".
func TestRefundsThatFailAreErrors(t *testing.T) {
	captured := []func(http.ResponseWriter){
		say(400, errorBody("invalid_request_error", "payment_intent_unexpected_state")), say(200, intentBody("succeeded")),
	}
	for name, answer := range map[string]func(http.ResponseWriter){
		"failed":           say(200, `{"id":"re_1","object":"refund","status":"failed","failure_reason":"lost_or_stolen_card"}`),
		"no balance":       say(402, errorBody("invalid_request_error", "balance_insufficient")),
		"something else":   say(200, `{"id":"re_1","object":"charge","status":"succeeded"}`),
		"disputed":         say(400, errorBody("invalid_request_error", "charge_disputed")),
		"the gateway away": say(500, ""),
	} {
		t.Run(name, func(t *testing.T) {
			_, srv := run(t, append(captured[:2:2], answer)...)
			_, err := newGateway(t, testConfig(srv.URL)).Do(t.Context(), testRequest(domain.Reverse))
			require.Error(t, err)
		})
	}
}

// The gateway contradicts itself, or a stored refusal is older than the intent's state: no guess, an error to repeat.
func TestContradictionsAreErrors(t *testing.T) {
	refused := say(400, errorBody("invalid_request_error", "payment_intent_unexpected_state"))
	for _, c := range []struct {
		op     domain.PaymentOp
		status string
	}{{domain.Capture, "requires_capture"}, {domain.Reverse, "requires_capture"}, {domain.Reverse, "processing"}, {domain.Capture, "processing"}} {
		_, srv := run(t, refused, say(200, intentBody(c.status)))
		_, err := newGateway(t, testConfig(srv.URL)).Do(t.Context(), testRequest(c.op))
		var f *Failure
		require.ErrorAs(t, err, &f, "%s %s", c.op, c.status)
		require.Contains(t, []Class{Conflict, Pending}, f.Class)
	}
}

// Unknown stays unknown: a later try that certainly had no effect does not undo what an earlier one may have done.
func TestF13_AnEarlierTryKeepsTheOutcomeUnknown(t *testing.T) {
	s, srv := run(t, say(500, errorBody("api_error", "")), say(429, errorBody("invalid_request_error", "")))
	cfg := testConfig(srv.URL)
	cfg.Retry.Retries = 2
	_, err := newGateway(t, cfg).Do(t.Context(), testRequest(domain.Capture))
	var f *Failure
	require.ErrorAs(t, err, &f)
	require.Equal(t, Throttled, f.Class)
	require.True(t, f.OutcomeUnknown())
	require.Len(t, s.requests(), 3)
	for _, r := range s.requests() {
		require.Equal(t, testOrder.String()+"/capture/1", r.key, "every try under the same key")
	}
}

// backoff/v4 would try for 15 minutes on its own. Here the tries are few, end in time, and heed Retry-After.
func TestF24_RetriesAreBounded(t *testing.T) {
	for name, c := range map[string]struct {
		retry  Retry
		answer func(http.ResponseWriter)
		tries  int
	}{
		"by number":                         {Retry{Retries: 3, Base: time.Millisecond, Max: time.Millisecond, Elapsed: time.Minute}, say(503, ""), 4},
		"by time":                           {Retry{Retries: 5, Base: 2 * time.Hour, Max: 2 * time.Hour, Elapsed: time.Nanosecond}, say(503, ""), 1},
		"by a Retry-After that is too long": {Retry{Retries: 5, Base: time.Millisecond, Max: time.Millisecond, Elapsed: 2 * time.Second}, say(429, "", "Retry-After", "60"), 1},
		"none":                              {Retry{Retries: -1}, say(503, ""), 1},
		"poison is not repeated":            {Retry{Retries: 3, Base: time.Millisecond}, say(400, errorBody("invalid_request_error", "")), 1},
		"a replay is not repeated":          {Retry{Retries: 3, Base: time.Millisecond}, say(500, "", "Idempotent-Replayed", "true"), 1},
		"our key is not tried out":          {Retry{Retries: 3, Base: time.Millisecond}, say(401, ""), 1},
	} {
		t.Run(name, func(t *testing.T) {
			s, srv := run(t, c.answer)
			cfg := testConfig(srv.URL)
			cfg.Retry = c.retry
			start := time.Now()
			_, err := newGateway(t, cfg).Do(t.Context(), testRequest(domain.Authorize))
			require.Error(t, err)
			require.Len(t, s.requests(), c.tries)
			require.Less(t, time.Since(start), 2*time.Second)
		})
	}
	_, srv := run(t, say(429, "", "Retry-After", "1"), say(200, intentBody("requires_capture")))
	cfg := testConfig(srv.URL)
	cfg.Retry = Retry{Retries: 1, Base: time.Millisecond, Max: time.Millisecond, Elapsed: 5 * time.Second}
	start := time.Now()
	_, err := newGateway(t, cfg).Do(t.Context(), testRequest(domain.Authorize))
	require.NoError(t, err)
	require.GreaterOrEqual(t, time.Since(start), time.Second, "Retry-After is a least wait")
}

func TestF37_AStoredErrorDoesNotKeepTheBreakerOpen(t *testing.T) {
	failed := errorBody("api_error", "")
	stored := say(500, failed, "Idempotent-Replayed", "true")
	_, srv := run(t, say(500, failed), say(500, failed), stored, say(200, intentBody("requires_capture")))
	cfg := testConfig(srv.URL)
	cfg.Breaker = Breaker{Consecutive: 2, MinCalls: 1000, OpenFor: 50 * time.Millisecond}
	g := newGateway(t, cfg)
	reverse, lookUp := testRequest(domain.Reverse), testRequest(domain.LookUp)
	for range 2 {
		_, err := g.Do(t.Context(), reverse)
		require.Error(t, err)
	}
	require.Equal(t, "open", g.BreakerState())
	var f *Failure
	require.Eventually(t, func() bool {
		_, err := g.Do(t.Context(), reverse)
		return errors.As(err, &f) && f.Class != Open
	}, 5*time.Second, time.Millisecond)
	require.True(t, f.Replayed(), "the probe met the stored answer: %v", f)
	out, err := g.Do(t.Context(), lookUp)
	require.NoError(t, err, "the look-up is the next probe")
	require.Equal(t, domain.PaymentAuthorized, out.Result)
	require.Equal(t, "closed", g.BreakerState())
}

func TestFullJitterDrawsFromTheWholeRange(t *testing.T) {
	g := newGateway(t, Config{BaseURL: "http://127.0.0.1:1", APIKey: testKey, Retry: Retry{Base: 100 * time.Millisecond, Max: 200 * time.Millisecond}})
	low, high := time.Hour, time.Duration(0)
	for range 500 {
		r := g.newRetrying()
		d := r.NextBackOff()
		low, high = min(low, d), max(high, d)
		require.LessOrEqual(t, r.NextBackOff(), 200*time.Millisecond)
	}
	require.Less(t, low, 10*time.Millisecond)
	require.Greater(t, high, 90*time.Millisecond)
	require.LessOrEqual(t, high, 100*time.Millisecond+time.Millisecond)
}

func TestLookUpByOrderStopsWithoutAGuess(t *testing.T) {
	other := strings.Replace(intentBody("succeeded"), testOrder.String(), "other", 1)
	s, srv := run(t, say(200, `{"object":"list","has_more":true,"data":[`+other+`]}`))
	now := time.Date(2026, 1, 10, 0, 0, 0, 0, time.UTC)
	g := newGateway(t, testConfig(srv.URL), WithClock(func() time.Time { return now }))
	r := testRequest(domain.LookUp)
	r.Ref = ""
	_, err := g.Do(t.Context(), r)
	require.ErrorContains(t, err, "without a proof")
	require.Len(t, s.requests(), maxPages)
	want := url.Values{"limit": {"100"}, "created[gte]": {fmt.Sprint(now.Add(-DefaultLookUpWindow).Unix())}, "expand[0]": {"data.latest_charge"}}
	require.Equal(t, want, s.requests()[0].form)
	require.Equal(t, "pi_1", s.requests()[1].form.Get("starting_after"))
}

func TestConfigurationIsChecked(t *testing.T) {
	good := Config{BaseURL: "https://api.stripe.com/", APIKey: "sk_live_secret"}
	for name, c := range map[string]struct {
		change func(*Config)
		says   string
	}{
		"no URL":          {func(c *Config) { c.BaseURL = "" }, "payment URL is not set"},
		"no scheme":       {func(c *Config) { c.BaseURL = "api.stripe.com" }, "http(s)://"},
		"other scheme":    {func(c *Config) { c.BaseURL = "ftp://x" }, "http(s)://"},
		"user in the URL": {func(c *Config) { c.BaseURL = "https://sk_live_secret@x" }, "user part"},
		"path":            {func(c *Config) { c.BaseURL = "https://x/v1" }, "path"},
		"no key":          {func(c *Config) { c.APIKey = "" }, "API key is empty"},
		"key of a file":   {func(c *Config) { c.APIKey = "sk_live_secret\n" }, "control characters"},
		"timeout":         {func(c *Config) { c.Timeout = -1 }, "timeout"},
		"retries":         {func(c *Config) { c.Retry.Retries = 50 }, "at most 5"},
		"ratio":           {func(c *Config) { c.Breaker.Ratio = 2 }, "ratio"},
		"bulkhead":        {func(c *Config) { c.Limits.Concurrent = 1000 }, "max_connections"},
		"rate":            {func(c *Config) { c.Limits.PerSecond = -1 }, "per_second"},
		"connections":     {func(c *Config) { c.MaxConnections = -1 }, "max_connections"},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := good
			c.change(&cfg)
			_, err := New(cfg)
			require.ErrorContains(t, err, c.says)
			require.NotContains(t, err.Error(), "sk_live")
		})
	}
	_, err := New(good)
	require.NoError(t, err)
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x"} {
		require.NotContains(t, fmt.Sprintf(verb, good), "secret", verb)
		require.NotContains(t, fmt.Sprintf(verb, &good), "secret", verb)
		require.NotContains(t, fmt.Sprintf(verb, struct{ C Config }{good}), "secret", verb)
	}
}

func TestRetryAfterHeader(t *testing.T) {
	now := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	for s, want := range map[string]time.Duration{
		"": 0, "7": 7 * time.Second, " 7 ": 7 * time.Second, "-1": 0, "soon": 0, "999999999999": time.Hour,
		now.Add(time.Minute).Format(http.TimeFormat): time.Minute, now.Add(-time.Minute).Format(http.TimeFormat): 0,
	} {
		require.Equal(t, want, parseRetryAfter(s, now), s)
	}
}

func TestTLSConfigIsUsed(t *testing.T) {
	s := &script{answers: []func(http.ResponseWriter){say(200, `{"object":"list","data":[]}`)}}
	srv := httptest.NewTLSServer(s)
	t.Cleanup(srv.Close)
	cfg := testConfig(srv.URL)
	var f *Failure
	require.ErrorAs(t, newGateway(t, cfg).Ready(t.Context()), &f)
	require.Equal(t, Connection, f.Class, "an unknown authority is refused")
	trusting, ok := srv.Client().Transport.(*http.Transport)
	require.True(t, ok)
	cfg.TLS = trusting.TLSClientConfig
	require.NoError(t, newGateway(t, cfg).Ready(t.Context()))
}

func TestTransportCanBeWrapped(t *testing.T) {
	_, srv := run(t, say(200, intentBody("requires_capture")))
	seen := 0
	g := newGateway(t, testConfig(srv.URL), WithTransport(func(next http.RoundTripper) http.RoundTripper {
		return roundTrip(func(r *http.Request) (*http.Response, error) { seen++; return next.RoundTrip(r) })
	}))
	_, err := g.Do(t.Context(), testRequest(domain.Authorize))
	require.NoError(t, err)
	require.Equal(t, 1, seen)
}

type roundTrip func(*http.Request) (*http.Response, error)

func (f roundTrip) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// BenchmarkDo is the adapter's own work: a call without a network.
func BenchmarkDo(b *testing.B) {
	var fields map[string]any // of a real answer, without its charge
	require.NoError(b, json.Unmarshal(sample(b), &fields))
	fields["latest_charge"], fields["status"] = "ch_1", statusRequiresCapture
	body, err := json.Marshal(fields)
	require.NoError(b, err)
	g := newGateway(b, testConfig("http://127.0.0.1:1"), WithTransport(func(http.RoundTripper) http.RoundTripper {
		return roundTrip(func(r *http.Request) (*http.Response, error) {
			return &http.Response{StatusCode: http.StatusOK, Header: http.Header{}, Body: io.NopCloser(bytes.NewReader(body)), Request: r}, nil
		})
	}))
	r := testRequest(domain.Authorize)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := g.Do(context.Background(), r); err != nil {
			b.Fatal(err)
		}
	}
}

// A payment method that there is not is the customer's mistake and ends the order; a repeat of the request would not change it.
func TestAnUnknownPaymentMethodIsARefusal(t *testing.T) {
	wrong := strings.Replace(errorBody("invalid_request_error", "resource_missing"), `"param":"amount"`, `"param":"payment_method"`, 1)
	for _, status := range []int{http.StatusBadRequest, http.StatusNotFound} {
		s, srv := run(t, say(status, wrong))
		out, err := newGateway(t, testConfig(srv.URL)).Do(t.Context(), testRequest(domain.Authorize))
		require.NoError(t, err)
		require.Equal(t, domain.PaymentOutcome{Result: domain.PaymentRefused, Code: "resource_missing"}, out)
		require.Len(t, s.requests(), 1)
	}
}
