//go:build linux

package e2e

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"

	"ordersaga/adapters/embedded/testenv"
	"ordersaga/adapters/httpapi"
	"ordersaga/cmd/ordersaga/internal/apiclient"
	"ordersaga/cmd/ordersaga/internal/simulator"
)

// reloadWithin bounds how soon a changed file counts.
const reloadWithin = 20 * time.Second

// without leaves settings out of an environment.
func without(env []string, names ...string) (out []string) {
next:
	for _, v := range env {
		for _, n := range names {
			if strings.HasPrefix(v, n+"=") {
				continue next
			}
		}
		out = append(out, v)
	}
	return out
}

// draw makes a token, with its line for the tokens file.
func draw(t *testing.T, name, role string) (token, line string) {
	t.Helper()
	var v struct{ Token, Line string }
	require.NoError(t, json.Unmarshal([]byte(must(t, nil, "token", name, "--role", role, "-o", "json")), &v))
	return v.Token, v.Line + "\n"
}

// TestCommandLine: what people and scripts do with a running service, with tokens, and what they are told when it cannot be done.
func TestCommandLine(t *testing.T) {
	t.Parallel()
	s := newSystem(t, options{})
	client, clientLine := draw(t, "shop", "client")
	operator, operatorLine := draw(t, "ops", "operator")
	admin, adminLine := draw(t, "root", "admin")
	tokens := writeFile(t, "tokens.txt", "# who may call\n"+clientLine+operatorLine+adminLine)
	config := writeFile(t, "ordersaga.yaml", "log: {level: info}\nhttp: {tokens_file: "+tokens+"}\n")
	s.env = append(without(s.env, "ORDERSAGA_HTTP__OPEN", "ORDERSAGA_HTTP__RATE_PER_CALLER", "ORDERSAGA_HTTP__BURST_PER_CALLER"), "ORDERSAGA_CONFIG="+config)
	as := func(token string) []string { return append(append([]string{}, s.env...), "ORDERSAGA_TOKEN="+token) }

	p := s.serve("serve")
	api := s.withToken(admin)
	api.product("CLI-1", 1290, 1000)
	api.product("CLI-NONE", 100, 0)

	t.Run("orders", func(t *testing.T) {
		env := as(client)
		var o httpapi.OrderAccepted
		require.NoError(t, json.Unmarshal([]byte(must(t, env, "orders", "submit", "--customer", "c-17", "--item", "CLI-1=2", "--wait", "20s", "--key", "k-1", "-o", "json")), &o))
		require.Equal(t, httpapi.OrderStatusConfirmed, o.Status)
		require.Contains(t, must(t, env, "orders", "submit", "--customer", "c-17", "--item", "CLI-1=2", "--key", "k-1"), o.OrderID.String(), "the same key is the same order")
		piped := commandWith(t, `{"customer_id":"c-18","currency":"EUR","items":[{"sku":"CLI-NONE","quantity":1}],"payment_method":"pm_card_visa"}`, env,
			"orders", "submit", "-f", "-", "--wait", "20s")
		require.Zero(t, piped.code, piped.err)
		require.Contains(t, piped.out, "rejected (out_of_stock)")
		refused := command(t, env, "orders", "submit", "--customer", "c-17", "--item", "CLI-UNKNOWN")
		require.Equal(t, 1, refused.code)
		require.Contains(t, refused.err, "unknown_product")
		require.Contains(t, must(t, env, "orders", "get", o.OrderID.String()), "25.80 EUR")
		var list []httpapi.Order
		require.NoError(t, json.Unmarshal([]byte(must(t, env, "orders", "list", "--customer", "c-17", "-o", "json")), &list))
		require.Len(t, list, 1)
		require.Equal(t, "[]\n", must(t, env, "orders", "list", "--status", "cancelled", "-o", "json"))
		late := command(t, env, "orders", "cancel", o.OrderID.String())
		require.Equal(t, 1, late.code)
		require.Contains(t, late.err, "already_confirmed")
		watched := must(t, env, "orders", "watch", o.OrderID.String(), "-o", "jsonl")
		require.Contains(t, watched, "confirmed")
		s.faults(simulator.Faults{Fault: simulator.Fault{Latency: simulator.Duration(400 * time.Millisecond)}})
		var live httpapi.OrderAccepted
		require.NoError(t, json.Unmarshal([]byte(must(t, env, "orders", "submit", "--customer", "c-20", "--item", "CLI-1", "-o", "json")), &live))
		require.Equal(t, httpapi.OrderStatusPending, live.Status)
		followed := strings.Split(strings.TrimSpace(must(t, env, "orders", "watch", live.OrderID.String())), "\n")
		require.GreaterOrEqual(t, len(followed), 2, "%q", followed)
		require.Contains(t, followed[0], "pending")
		require.Contains(t, followed[len(followed)-1], "OrderConfirmed")
		s.faults(simulator.Faults{})
		some := command(t, env, "orders", "get", o.OrderID.String(), uuid.NewString())
		require.Equal(t, 1, some.code)
		require.Contains(t, some.out, o.OrderID.String(), "what is there is shown")
		require.Contains(t, must(t, as(operator), "sagas", "show", o.OrderID.String()), "capture_payment")
		require.Contains(t, must(t, as(operator), "sagas", "resolve", o.OrderID.String(), "retry", "--dry-run"), "completed")
	})
	t.Run("dead letters", func(t *testing.T) {
		s := s.with(t)
		s.env = as(operator)
		cl := s.kafka()
		id := uuid.Must(uuid.NewV7())
		for range 3 {
			require.NoError(t, s.publish(t.Context(), cl, "orders.commands.v1", id.String(), []byte(`{"order_id":`)))
		}
		var ls []httpapi.DeadLetter
		require.True(t, waitFor(settleWithin, func() bool { ls = s.letters(); return len(ls) == 3 }))
		require.Equal(t, ls[0].Fingerprint, ls[2].Fingerprint, "one cause")
		for _, args := range [][]string{{"replay"}, {"discard", "--note", "x"}} {
			unknown := command(t, s.env, append([]string{"dlq", args[0], uuid.NewString(), "--yes"}, args[1:]...)...)
			require.Equal(t, 1, unknown.code, "an unknown id: %s%s", unknown.out, unknown.err)
		}
		dry := command(t, s.env, "dlq", "discard", "--fingerprint", ls[0].Fingerprint, "--dry-run", "-o", "json")
		require.Zero(t, dry.code, dry.err)
		require.Contains(t, dry.out, "would_discard")
		require.Len(t, s.letters("--status", "open"), 3)
		must(t, s.env, "dlq", "discard", "--fingerprint", ls[0].Fingerprint, "--note", "a producer that stopped in the middle", "--yes")
		require.Len(t, s.letters("--status", "discarded"), 3)
		require.Empty(t, s.letters("--status", "open"))
		full := command(t, s.env, "dlq", "show", "--full", ls[0].ID.String())
		require.Equal(t, 1, full.code, "personal data takes an admin")
	})
	t.Run("roles and tokens", func(t *testing.T) {
		for _, c := range []struct {
			token string
			args  []string
			says  string
		}{
			{"", []string{"orders", "list"}, "ORDERSAGA_TOKEN"}, {"os_wrong", []string{"orders", "list"}, "401"},
			{client, []string{"dlq", "list"}, "403"}, {client, []string{"sagas", "list"}, "403"},
		} {
			r := command(t, as(c.token), c.args...)
			require.Equal(t, 1, r.code, "%v", c.args)
			require.Contains(t, r.err, c.says)
			require.Empty(t, r.out)
		}
		newToken, newLine := draw(t, "shop2", "client")
		require.Equal(t, 1, command(t, as(newToken), "orders", "list").code)
		require.NoError(t, os.WriteFile(tokens, []byte(newLine+operatorLine+adminLine), 0o600))
		require.True(t, waitFor(reloadWithin, func() bool { return command(t, as(newToken), "orders", "list").code == 0 }), "a new token counts without a restart")
		require.Equal(t, 1, command(t, as(client), "orders", "list").code, "one that was taken out does not")
		require.NoError(t, os.WriteFile(tokens, []byte("nonsense\n"), 0o600))
		require.True(t, waitFor(reloadWithin, func() bool { return strings.Contains(p.said(t), "tokens not read again") }))
		require.Zero(t, command(t, as(newToken), "orders", "list").code, "a broken file leaves the tokens as they were")
		require.NoError(t, os.WriteFile(tokens, []byte(clientLine+operatorLine+adminLine), 0o600))
		require.True(t, waitFor(reloadWithin, func() bool { return command(t, as(client), "orders", "list").code == 0 }))
	})
	t.Run("hot reload", func(t *testing.T) {
		rewrite := func(level string, rate, burst int) {
			content := fmt.Sprintf("log: {level: %s}\nhttp: {tokens_file: %s, rate_per_caller: %d, burst_per_caller: %d}\n", level, tokens, rate, burst)
			require.NoError(t, os.WriteFile(config, []byte(content), 0o600))
		}
		require.NotContains(t, p.said(t), `"level":"debug"`)
		rewrite("debug", 1, 2)
		shop, err := apiclient.New("http://"+s.addr, client)
		require.NoError(t, err)
		limited := func() bool {
			for range 5 {
				var p *apiclient.ProblemError
				if err := shop.Do(t.Context(), http.MethodGet, "/v1/orders", nil, nil, nil, nil); errors.As(err, &p) && p.Code == "rate_limited" {
					return true
				}
			}
			return false
		}
		require.True(t, waitFor(reloadWithin, limited), "the new limit counts without a restart")
		rewrite("debug", 1000, 2000)
		require.True(t, waitFor(reloadWithin, func() bool { return strings.Count(p.said(t), "configuration read again") == 2 }), "%s", tail(p.said(t), 2000))
		require.NoError(t, os.WriteFile(config, []byte("log: {level: loud}\n"), 0o600))
		require.True(t, waitFor(reloadWithin, func() bool { return strings.Contains(p.said(t), "configuration not read again") }))
		rewrite("info", 1000, 2000)
		require.True(t, waitFor(reloadWithin, func() bool { return strings.Count(p.said(t), "configuration read again") == 3 }))
		require.False(t, p.ended())
	})
	t.Run("tools", func(t *testing.T) {
		require.Zero(t, command(t, s.env, "healthcheck", "--ready").code)
		require.Equal(t, "[]\n", must(t, s.env, "topics", "plan", "-o", "json"), "all as it should be")
		grown := append(append([]string{}, s.env...), "ORDERSAGA_KAFKA__PARTITIONS=5")
		require.Contains(t, must(t, grown, "topics", "plan"), "partitions")
		require.Equal(t, 2, command(t, grown, "topics", "apply").code, "changes take --yes")
		require.Contains(t, must(t, grown, "topics", "apply", "--dry-run"), "partitions")
		require.NotContains(t, must(t, s.env, "migrate", "status"), "pending")
		require.Equal(t, "[]\n", must(t, s.env, "migrate", "up", "--dry-run", "-o", "json"))
		for _, shell := range []string{"bash", "zsh", "fish"} {
			require.Contains(t, must(t, nil, "completion", shell), "ordersaga")
		}
		var rep map[string]any
		require.NoError(t, json.Unmarshal([]byte(must(t, s.env, "audit", "-o", "json")), &rep))
		require.Equal(t, true, rep["clean"])
	})
	p.stop(t)
	require.Equal(t, 1, command(t, s.env, "healthcheck").code, "nobody is there any more")
}

// withToken is the system as seen by a caller with a token.
func (s *system) withToken(token string) *system {
	s.tb.Helper()
	part := s.with(s.tb)
	var err error
	part.api, err = apiclient.New("http://"+s.addr, token)
	require.NoError(s.tb, err)
	return part
}

// checked is one line of the doctor.
type checked struct {
	Check  string `json:"check"`
	Result string `json:"result"`
	Detail string `json:"detail"`
	Do     string `json:"what_to_do"`
}

// TestDoctor: healthy, it says so; else it names what is wrong and what to do about it.
func TestDoctor(t *testing.T) {
	t.Parallel()
	s := newSystem(t, options{})
	doctor := func(env ...string) (int, map[string]checked) {
		r := command(t, append(append([]string{}, s.env...), env...), "doctor", "-o", "json")
		var cs []checked
		require.NoError(t, json.Unmarshal([]byte(r.out), &cs), "%s%s", r.out, r.err)
		by := map[string]checked{}
		for _, c := range cs {
			by[c.Check] = c
		}
		return r.code, by
	}
	var code int
	var by map[string]checked
	waitFor(settleWithin, func() bool { // a broker that is busy shows new topics late
		code, by = doctor()
		return code == 0
	})
	require.Zero(t, code, "%+v", by)
	for name, c := range by {
		require.Equal(t, "ok", c.Result, "%s: %+v", name, c)
	}
	stranger, err := url.Parse(s.db)
	require.NoError(t, err)
	stranger.User = url.UserPassword("stranger", "guess")
	for name, c := range map[string]struct{ check, env, do string }{
		"no database":    {"database", "ORDERSAGA_DATABASE_URL=postgres://nobody@127.0.0.1:1/x", "ORDERSAGA_DATABASE_URL"},
		"no schema":      {"schema", "ORDERSAGA_DATABASE_URL=" + testenv.Postgres(t), "ordersaga migrate up"},
		"no brokers":     {"brokers", "ORDERSAGA_KAFKA_BROKERS=127.0.0.1:1", "ORDERSAGA_KAFKA_BROKERS"},
		"no topics":      {"topics", "ORDERSAGA_KAFKA__TOPIC_PREFIX=" + testenv.Prefix(t), "ordersaga topics apply"},
		"no gateway":     {"payment gateway", "ORDERSAGA_PAYMENT_URL=http://127.0.0.1:1", "ORDERSAGA_PAYMENT_URL"},
		"wrong API key":  {"payment gateway", "ORDERSAGA_PAYMENT_API_KEY=sk_test_wrong", "is the key still valid"},
		"wrong password": {"database", "ORDERSAGA_DATABASE_URL=" + stranger.String(), "ORDERSAGA_DATABASE_URL"},
	} {
		t.Run(name, func(t *testing.T) {
			code, by := doctor(c.env)
			require.Equal(t, 1, code, "%+v", by)
			require.Equal(t, "FAILED", by[c.check].Result, "%+v", by)
			require.Contains(t, by[c.check].Do, c.do)
			require.NotEmpty(t, by[c.check].Detail)
		})
	}
}

// TestMigrations: down and up again, on the command line; a service that starts before its schema waits for it.
func TestMigrations(t *testing.T) {
	t.Parallel()
	s := newSystem(t, options{})
	var ms []map[string]any
	require.NoError(t, json.Unmarshal([]byte(must(t, s.env, "migrate", "status", "-o", "json")), &ms))
	for range ms {
		must(t, s.env, "migrate", "down", "--yes")
	}
	require.Equal(t, len(ms), strings.Count(must(t, s.env, "migrate", "status"), "pending"))
	p := s.launch("early")
	require.True(t, waitFor(readyWithin, func() bool { return strings.Contains(p.said(t), "waiting for the schema") }), "%s", p.said(t))
	must(t, s.env, "migrate", "up")
	s.awaitReady(p, s.addr)
	s.product("MIGRATED", 100, 1)
	require.Equal(t, "confirmed", outcome(s.await(s.order("MIGRATED", 1), settleWithin)))
	p.stop(t)
}

// certificate is one for 127.0.0.1, signed by itself.
func certificate(t *testing.T, serial int64) (cert, key []byte) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(serial), Subject: pkix.Name{CommonName: "e2e"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, private.Public(), private)
	require.NoError(t, err)
	raw, err := x509.MarshalPKCS8PrivateKey(private)
	require.NoError(t, err)
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: raw})
}

// TestTLSRotation: HTTP over TLS, and a certificate that is replaced while the service runs.
func TestTLSRotation(t *testing.T) {
	t.Parallel()
	s := newSystem(t, options{})
	cert, key := certificate(t, 1)
	certFile, keyFile := writeFile(t, "tls.crt", string(cert)), writeFile(t, "tls.key", string(key))
	ca := filepath.Join(t.TempDir(), "ca.pem")
	s.env = append(without(s.env, "ORDERSAGA_URL"), "ORDERSAGA_HTTP__TLS__CERT_FILE="+certFile, "ORDERSAGA_HTTP__TLS__KEY_FILE="+keyFile, "ORDERSAGA_URL=https://"+s.addr, "SSL_CERT_FILE="+ca)
	require.NoError(t, os.WriteFile(ca, cert, 0o600))
	p := s.launch("serve")
	serial := func() int64 {
		d := tls.Dialer{Config: &tls.Config{InsecureSkipVerify: true}}
		conn, err := d.DialContext(t.Context(), "tcp", s.addr)
		if err != nil {
			return 0
		}
		defer conn.Close()
		secured, ok := conn.(*tls.Conn)
		require.True(t, ok)
		return secured.ConnectionState().PeerCertificates[0].SerialNumber.Int64()
	}
	require.True(t, waitFor(readyWithin, func() bool { return serial() == 1 }), "%s", p.said(t))
	require.Equal(t, "[]\n", must(t, s.env, "orders", "list", "-o", "json"))
	require.Zero(t, command(t, s.env, "healthcheck").code)
	plain := answered{}
	resp, err := s.http.Get("http://" + s.addr + "/healthz")
	if err == nil {
		plain.status = resp.StatusCode
		require.NoError(t, resp.Body.Close())
	}
	require.NotEqual(t, http.StatusOK, plain.status, "TLS only")

	cert, key = certificate(t, 2)
	require.NoError(t, os.WriteFile(keyFile, key, 0o600))
	require.NoError(t, os.WriteFile(certFile, cert, 0o600))
	require.True(t, waitFor(reloadWithin, func() bool { return serial() == 2 }), "the new certificate is not used")
	require.Equal(t, 1, command(t, s.env, "orders", "list").code, "whoever trusts the old one only")
	require.NoError(t, os.WriteFile(ca, cert, 0o600))
	require.Zero(t, command(t, s.env, "orders", "list").code)
	require.NoError(t, os.WriteFile(certFile, []byte("broken"), 0o600))
	require.True(t, waitFor(reloadWithin, func() bool { return strings.Contains(p.said(t), "certificate") }), "nobody is told")
	require.EqualValues(t, 2, serial(), "a broken file leaves the certificate as it was")
	p.stop(t)
}
