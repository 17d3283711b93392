package simulator_test

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"github.com/stripe/stripe-go/v85"

	"ordersaga/cmd/ordersaga/internal/simulator"
)

// sdk is the official client with its full decoding, so that the simulator's answers are read by Stripe's own types.
func (w *world) sdk(t *testing.T) *stripe.Client {
	t.Helper()
	transport := &http.Transport{}
	t.Cleanup(transport.CloseIdleConnections)
	return stripe.NewClient(apiKey, stripe.WithBackends(stripe.NewBackendsWithConfig(&stripe.BackendConfig{
		URL: stripe.String(w.url), MaxNetworkRetries: stripe.Int64(0), HTTPClient: &http.Client{Transport: transport},
		LeveledLogger: &stripe.LeveledLogger{Level: stripe.LevelNull},
	})))
}

func stripeError(t *testing.T, err error) *stripe.Error {
	t.Helper()
	var e *stripe.Error
	require.ErrorAs(t, err, &e)
	return e
}

func TestSDKDrivesEveryCall(t *testing.T) {
	w := open(t, "")
	c := w.sdk(t)
	ctx := t.Context()
	create := func(method string, confirm bool) *stripe.PaymentIntentCreateParams {
		p := &stripe.PaymentIntentCreateParams{
			Amount: stripe.Int64(1000), Currency: stripe.String("eur"), CaptureMethod: stripe.String("manual"), Confirm: stripe.Bool(confirm),
			Description: stripe.String("a thing & more"), Metadata: map[string]string{"order_id": "o-1", "note": "ä=b&c"},
		}
		if method != "" {
			p.PaymentMethod = stripe.String(method)
		}
		return p
	}

	// create, confirm, capture in parts, refund in parts
	in, err := c.V1PaymentIntents.Create(ctx, create("", false))
	require.NoError(t, err)
	require.Equal(t, stripe.PaymentIntentStatusRequiresPaymentMethod, in.Status)
	require.Equal(t, map[string]string{"order_id": "o-1", "note": "ä=b&c"}, in.Metadata)
	require.Equal(t, "a thing & more", in.Description)
	_, err = c.V1PaymentIntents.Confirm(ctx, in.ID, &stripe.PaymentIntentConfirmParams{PaymentMethod: stripe.String("pm_card_chargeDeclined")})
	e := stripeError(t, err)
	require.Equal(t, 402, e.HTTPStatusCode)
	require.Equal(t, stripe.ErrorCodeCardDeclined, e.Code)
	require.Equal(t, stripe.DeclineCodeGenericDecline, e.DeclineCode)
	require.Equal(t, in.ID, e.PaymentIntent.ID)
	in, err = c.V1PaymentIntents.Confirm(ctx, in.ID, &stripe.PaymentIntentConfirmParams{PaymentMethod: stripe.String("pm_card_visa")})
	require.NoError(t, err)
	require.Equal(t, stripe.PaymentIntentStatusRequiresCapture, in.Status)
	require.Equal(t, int64(1000), in.AmountCapturable)
	in, err = c.V1PaymentIntents.Capture(ctx, in.ID, &stripe.PaymentIntentCaptureParams{AmountToCapture: stripe.Int64(700)})
	require.NoError(t, err)
	require.Equal(t, int64(700), in.AmountReceived)
	re, err := c.V1Refunds.Create(ctx, &stripe.RefundCreateParams{PaymentIntent: stripe.String(in.ID), Amount: stripe.Int64(200)})
	require.NoError(t, err)
	require.Equal(t, stripe.RefundStatusSucceeded, re.Status)
	_, err = c.V1Refunds.Create(ctx, &stripe.RefundCreateParams{PaymentIntent: stripe.String(in.ID), Amount: stripe.Int64(501)})
	require.Equal(t, 400, stripeError(t, err).HTTPStatusCode, "more than is left")
	get := &stripe.PaymentIntentRetrieveParams{}
	get.AddExpand("latest_charge")
	in, err = c.V1PaymentIntents.Retrieve(ctx, in.ID, get)
	require.NoError(t, err)
	require.Equal(t, int64(200), in.LatestCharge.AmountRefunded)
	require.False(t, in.LatestCharge.Refunded)
	rest, err := c.V1Refunds.Create(ctx, &stripe.RefundCreateParams{Charge: stripe.String(in.LatestCharge.ID)})
	require.NoError(t, err)
	require.Equal(t, int64(500), rest.Amount)
	_, err = c.V1Refunds.Create(ctx, &stripe.RefundCreateParams{PaymentIntent: stripe.String(in.ID)})
	require.Equal(t, stripe.ErrorCodeChargeAlreadyRefunded, stripeError(t, err).Code)
	got, err := c.V1Refunds.Retrieve(ctx, re.ID, nil)
	require.NoError(t, err)
	require.Equal(t, in.ID, got.PaymentIntent.ID)

	// cancel, and what is refused in which state
	held, err := c.V1PaymentIntents.Create(ctx, create("pm_card_visa", true))
	require.NoError(t, err)
	_, err = c.V1Refunds.Create(ctx, &stripe.RefundCreateParams{PaymentIntent: stripe.String(held.ID)})
	require.Equal(t, stripe.ErrorCodePaymentIntentUnexpectedState, stripeError(t, err).Code)
	held, err = c.V1PaymentIntents.Cancel(ctx, held.ID, &stripe.PaymentIntentCancelParams{CancellationReason: stripe.String("abandoned")})
	require.NoError(t, err)
	require.Equal(t, stripe.PaymentIntentStatusCanceled, held.Status)
	require.NotZero(t, held.CanceledAt)
	for name, err := range map[string]error{
		"cancel of a cancelled":  second(c.V1PaymentIntents.Cancel(ctx, held.ID, nil)),
		"capture of a cancelled": second(c.V1PaymentIntents.Capture(ctx, held.ID, nil)),
		"confirm of a cancelled": second(c.V1PaymentIntents.Confirm(ctx, held.ID, nil)),
		"cancel of a captured":   second(c.V1PaymentIntents.Cancel(ctx, in.ID, nil)),
		"capture of a captured":  second(c.V1PaymentIntents.Capture(ctx, in.ID, nil)),
	} {
		e := stripeError(t, err)
		require.Equal(t, stripe.ErrorCodePaymentIntentUnexpectedState, e.Code, name)
		require.NotNil(t, e.PaymentIntent, name)
	}
	_, err = c.V1PaymentIntents.Retrieve(ctx, "pi_nobody", nil)
	require.Equal(t, 404, stripeError(t, err).HTTPStatusCode)

	// automatic capture, the customer's bank
	auto := create("pm_card_visa", true)
	auto.CaptureMethod = nil
	paid, err := c.V1PaymentIntents.Create(ctx, auto)
	require.NoError(t, err)
	require.Equal(t, stripe.PaymentIntentStatusSucceeded, paid.Status)
	asks, err := c.V1PaymentIntents.Create(ctx, create("pm_card_authenticationRequired", true))
	require.NoError(t, err)
	require.Equal(t, stripe.PaymentIntentStatusRequiresAction, asks.Status)

	// lists and balance
	lp := &stripe.PaymentIntentListParams{CreatedRange: &stripe.RangeQueryParams{GreaterThanOrEqual: in.Created, LesserThan: in.Created + 1000}}
	lp.Limit = stripe.Int64(3)
	var ids []string
	for in, err := range c.V1PaymentIntents.List(ctx, lp).All(ctx) {
		require.NoError(t, err)
		ids = append(ids, in.ID)
	}
	require.Equal(t, []string{asks.ID, paid.ID, held.ID, in.ID}, ids, "newest first, over two pages")
	rp := &stripe.RefundListParams{PaymentIntent: stripe.String(in.ID)}
	rp.Limit = stripe.Int64(1)
	ids = nil
	for re, err := range c.V1Refunds.List(ctx, rp).All(ctx) {
		require.NoError(t, err)
		ids = append(ids, re.ID)
	}
	require.Equal(t, []string{rest.ID, re.ID}, ids)
	b, err := c.V1Balance.Retrieve(ctx, nil)
	require.NoError(t, err)
	require.Equal(t, int64(1000), b.Available[0].Amount)
}

func second[T any](_ T, err error) error { return err }

// raw makes one request as curl would.
func (w *world) raw(t *testing.T, method, path, key, idempotency, body string) (int, string, http.Header) {
	t.Helper()
	status, text, header, err := w.request(t, method, path, key, idempotency, body)
	require.NoError(t, err)
	return status, text, header
}

var plainClient = &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}

func (w *world) request(t *testing.T, method, path, key, idempotency, body string) (int, string, http.Header, error) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, w.url+path, strings.NewReader(body))
	if err != nil {
		return 0, "", nil, err
	}
	if key != "" {
		req.Header.Set("Authorization", "Bearer "+key)
	}
	if idempotency != "" {
		req.Header.Set("Idempotency-Key", idempotency)
	}
	res, err := plainClient.Do(req)
	if err != nil {
		return 0, "", nil, err
	}
	b, err := io.ReadAll(res.Body)
	return res.StatusCode, string(b), res.Header, errors.Join(err, res.Body.Close())
}

func TestRequestsAreValidated(t *testing.T) {
	w := open(t, "")
	const good = "amount=100&currency=eur"
	for name, c := range map[string]struct {
		method, path, key, body string
		status                  int
		says                    string
	}{
		"no key":             {"POST", "/v1/payment_intents", "", good, 401, "did not provide"},
		"wrong key":          {"POST", "/v1/payment_intents", "sk_test_x", good, 401, "Invalid API Key"},
		"no amount":          {"POST", "/v1/payment_intents", apiKey, "currency=eur", 400, "parameter_missing"},
		"amount of zero":     {"POST", "/v1/payment_intents", apiKey, "amount=0&currency=eur", 400, "amount"},
		"amount of words":    {"POST", "/v1/payment_intents", apiKey, "amount=ten&currency=eur", 400, "parameter_invalid_integer"},
		"amount too large":   {"POST", "/v1/payment_intents", apiKey, "amount=100000000&currency=eur", 400, "amount"},
		"currency":           {"POST", "/v1/payment_intents", apiKey, "amount=1&currency=euro", 400, "currency"},
		"unknown parameter":  {"POST", "/v1/payment_intents", apiKey, good + "&colour=red", 400, "parameter_unknown"},
		"capture method":     {"POST", "/v1/payment_intents", apiKey, good + "&capture_method=never", 400, "capture_method"},
		"boolean":            {"POST", "/v1/payment_intents", apiKey, good + "&confirm=yes", 400, "Invalid boolean"},
		"confirm of nothing": {"POST", "/v1/payment_intents", apiKey, good + "&confirm=true", 400, "payment method"},
		"not a form":         {"POST", "/v1/payment_intents", apiKey, "amount=%zz", 400, "form-encoded"},
		"body too large":     {"POST", "/v1/payment_intents", apiKey, good + "&description=" + strings.Repeat("x", 300<<10), 400, "too large"},
		"metadata too large": {"POST", "/v1/payment_intents", apiKey, good + "&metadata[k]=" + strings.Repeat("x", 501), 400, "Metadata"},
		"limit":              {"GET", "/v1/payment_intents?limit=101", apiKey, "", 400, "limit"},
		"cursor":             {"GET", "/v1/payment_intents?starting_after=pi_x", apiKey, "", 400, "resource_missing"},
		"created":            {"GET", "/v1/payment_intents?created[gte]=x", apiKey, "", 400, "created"},
		"cancel reason":      {"POST", "/v1/payment_intents/pi_x/cancel", apiKey, "cancellation_reason=because", 400, "cancellation_reason"},
		"refund of nothing":  {"POST", "/v1/refunds", apiKey, "", 400, "parameter_missing"},
		"unknown path":       {"GET", "/v1/customers", apiKey, "", 404, "Unrecognized request URL"},
	} {
		t.Run(name, func(t *testing.T) {
			status, body, _ := w.raw(t, c.method, c.path, c.key, "the-same-key", c.body)
			require.Equal(t, c.status, status, body)
			require.Contains(t, body, c.says)
			require.NotContains(t, body, apiKey)
		})
	}
	require.Empty(t, w.sim.Intents())
	status, _, _ := w.raw(t, "POST", "/v1/payment_intents", apiKey, "the-same-key", good)
	require.Equal(t, 200, status, "what failed validation did not use the key up")
}

func TestIdempotencyKeys(t *testing.T) {
	now := time.Now()
	var mu sync.Mutex
	clock := func() time.Time { mu.Lock(); defer mu.Unlock(); return now }
	sim, err := simulator.Open("", simulator.WithAPIKey(apiKey), simulator.WithClock(clock))
	require.NoError(t, err)
	url, err := sim.Listen(t.Context(), "127.0.0.1:0")
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, sim.Close()) })
	w := &world{sim: sim, url: url}
	_, err = sim.Listen(t.Context(), "127.0.0.1:0")
	require.ErrorContains(t, err, "listens already")

	const path, form = "/v1/payment_intents", "amount=100&currency=eur&confirm=true&payment_method=pm_card_visa"
	status, first, h := w.raw(t, "POST", path, apiKey, "k", form)
	require.Equal(t, 200, status)
	require.Empty(t, h.Get("Idempotent-Replayed"))
	require.Equal(t, "k", h.Get("Idempotency-Key"))
	require.NotEmpty(t, h.Get("Request-Id"))
	status, again, h := w.raw(t, "POST", path, apiKey, "k", "payment_method=pm_card_visa&confirm=true&currency=eur&amount=100")
	require.Equal(t, 200, status, "in another order")
	require.Equal(t, first, again)
	require.Equal(t, "true", h.Get("Idempotent-Replayed"))
	status, body, _ := w.raw(t, "POST", path, apiKey, "k", form+"0")
	require.Equal(t, 400, status)
	require.Contains(t, body, "idempotency_error")
	status, body, _ = w.raw(t, "POST", "/v1/refunds", apiKey, "k", "payment_intent=x")
	require.Equal(t, 400, status)
	require.Contains(t, body, "idempotency_error", "another path")

	w.faults(t, one(simulator.Fault{ErrorBefore: 1}))
	for range 2 {
		status, _, h = w.raw(t, "POST", path, apiKey, "k500", form)
		require.Equal(t, 500, status)
		require.Equal(t, "false", h.Get("Stripe-Should-Retry"))
	}
	require.Equal(t, "true", h.Get("Idempotent-Replayed"))
	require.Len(t, sim.Intents(), 1)

	// in use: 409
	w.faults(t, simulator.Faults{Ops: map[simulator.Op]simulator.Fault{simulator.Create: {Latency: simulator.Duration(time.Second)}}})
	done := make(chan int)
	go func() {
		status, _, _, _ := w.request(t, "POST", path, apiKey, "busy", form)
		done <- status
	}()
	require.Eventually(t, func() bool { return sim.Status().Keys == 3 }, 5*time.Second, time.Millisecond)
	status, body, _ = w.raw(t, "POST", path, apiKey, "busy", form)
	require.Equal(t, 409, status)
	require.Contains(t, body, "idempotency_key_in_use")
	require.Equal(t, 200, <-done)
	w.faults(t, simulator.Faults{})

	mu.Lock()
	now = now.Add(24*time.Hour + 2*time.Second)
	mu.Unlock()
	status, later, h := w.raw(t, "POST", path, apiKey, "k", form)
	require.Equal(t, 200, status)
	require.Empty(t, h.Get("Idempotent-Replayed"))
	require.NotEqual(t, first, later, "after 24 hours the key is new")
	require.Equal(t, 1, sim.Status().Keys, "and the old ones are gone")
}

func TestFaultsAreDealtAsSeeded(t *testing.T) {
	deal := func(seed uint64) string {
		w := open(t, "")
		w.faults(t, simulator.Faults{Seed: seed, Fault: simulator.Fault{Decline: 0.3, ErrorBefore: 0.2, ErrorAfter: 0.2, Throttle: 0.2}})
		out := ""
		for i := range 40 {
			status, _, _ := w.raw(t, "POST", "/v1/payment_intents", apiKey, fmt.Sprint(i), "amount=100&currency=eur&confirm=true&payment_method=pm_card_visa")
			out += fmt.Sprint(status, " ")
		}
		return out
	}
	one := deal(1)
	require.Equal(t, one, deal(1))
	require.NotEqual(t, one, deal(2))
	for _, s := range []string{"200", "402", "429", "500"} {
		require.Contains(t, one, s)
	}
}

func TestLedgerSurvivesAndATornLineIsDropped(t *testing.T) {
	dir := t.TempDir()
	w := open(t, dir)
	const path, form = "/v1/payment_intents", "amount=100&currency=eur&confirm=true&capture_method=manual&payment_method=pm_card_visa&metadata[order_id]=o"
	_, first, _ := w.raw(t, "POST", path, apiKey, "k", form)
	id := w.sim.Intents()[0].ID
	status, _, _ := w.raw(t, "POST", path+"/"+id+"/capture", apiKey, "c", "")
	require.Equal(t, 200, status)
	status, _, _ = w.raw(t, "POST", "/v1/refunds", apiKey, "r", "payment_intent="+id)
	require.Equal(t, 200, status)
	want, counts := w.sim.Intents(), w.sim.Status()
	// No Close: the process was killed, in the middle of its next line.
	file := filepath.Join(dir, "gateway.journal")
	f, err := os.OpenFile(file, os.O_APPEND|os.O_WRONLY, 0)
	require.NoError(t, err)
	_, err = f.WriteString(`{"intent":{"id":"pi_half`)
	require.NoError(t, err)
	require.NoError(t, f.Close())

	again := open(t, dir)
	require.Equal(t, want, again.sim.Intents())
	require.Equal(t, counts.Keys, again.sim.Status().Keys)
	require.Equal(t, counts.Refunds, again.sim.Status().Refunds)
	_, replay, h := again.raw(t, "POST", path, apiKey, "k", form)
	require.Equal(t, first, replay)
	require.Equal(t, "true", h.Get("Idempotent-Replayed"))
	again.raw(t, "POST", path, apiKey, "k2", form)
	require.NotEqual(t, again.sim.Intents()[1].ID, id)
	require.NoError(t, again.sim.Close())

	third := open(t, dir)
	require.Len(t, third.sim.Intents(), 2)
	require.NoError(t, third.sim.Close())
	require.NoError(t, os.WriteFile(file, []byte("{}\nrubbish\n{}\n"), 0o600))
	_, err = simulator.Open(dir)
	require.ErrorContains(t, err, "damaged at line 2")
	require.ErrorContains(t, err, "move the file away")
}

// What was answered is there after kill -9: a child process serves, is killed at a random moment of its work, and its ledger holds
// everything that we were told.
func TestKilledProcessKeepsWhatItAnswered(t *testing.T) {
	if dir := os.Getenv("SIMULATOR_CHILD_DIR"); dir != "" {
		child(t, dir)
		return
	}
	dir := t.TempDir()
	for round := range 3 {
		cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestKilledProcessKeepsWhatItAnswered$") //nolint:gosec // ourselves
		cmd.Env = append(os.Environ(), "SIMULATOR_CHILD_DIR="+dir)
		out, err := cmd.StdoutPipe()
		require.NoError(t, err)
		require.NoError(t, cmd.Start())
		var address string
		_, err = fmt.Fscanln(out, &address)
		require.NoError(t, err)
		w := &world{url: address}
		answered := map[string]bool{}
		var mu sync.Mutex
		var wg sync.WaitGroup
		for g := range 4 {
			wg.Go(func() {
				for i := 0; ; i++ {
					key := fmt.Sprintf("%d-%d-%d", round, g, i)
					form := url.Values{"amount": {"100"}, "currency": {"eur"}, "confirm": {"true"}, "payment_method": {"pm_card_visa"}, "metadata[order_id]": {key}}
					status, _, _, err := w.request(t, "POST", "/v1/payment_intents", apiKey, key, form.Encode())
					if err != nil || status != 200 {
						return
					}
					mu.Lock()
					answered[key] = true
					enough := len(answered) > 60+round*30
					mu.Unlock()
					if enough {
						_ = cmd.Process.Kill()
					}
				}
			})
		}
		wg.Wait()
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		sim, err := simulator.Open(dir)
		require.NoError(t, err)
		for _, in := range sim.Intents() {
			delete(answered, in.OrderID)
			require.Equal(t, 1, in.Captures)
		}
		require.NoError(t, sim.Close())
		require.Empty(t, answered, "answered and lost")
	}
}

func child(t *testing.T, dir string) {
	t.Helper()
	sim, err := simulator.Open(dir, simulator.WithAPIKey(apiKey))
	require.NoError(t, err)
	address, err := sim.Listen(t.Context(), "127.0.0.1:0")
	require.NoError(t, err)
	_, err = fmt.Fprintln(os.Stdout, address)
	require.NoError(t, err)
	<-t.Context().Done() // until killed
}
