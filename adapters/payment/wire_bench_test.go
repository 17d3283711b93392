//go:build unix

package payment

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"os/exec"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"ordersaga/domain"
)

// BenchmarkDoOverHTTP is a call over connections that are kept. The gateway is another process, so cpu-ns/op, what this process used
// of the processors (the kernel's work for it, and the collector's, with it), is the client's alone. Compare two builds with
//
//	go test -c -o new.test ./adapters/payment # and old.test of the commit before, with this file
//	for b in old new old new old new old new old new old new; do ./$b.test -test.run='^$' -test.bench=OverHTTP >>$b.txt; done
//	benchstat old.txt new.txt
func BenchmarkDoOverHTTP(b *testing.B) {
	for _, c := range []struct {
		name    string
		callers int
		tls     bool
		delay   time.Duration
	}{
		{"callers=1", 1, false, 0},
		{"callers=32", 32, false, 0},
		{"callers=32,answer=5ms", 32, false, 5 * time.Millisecond}, // as far away as a gateway is: every call waits
		{"callers=1,tls", 1, true, 0},                              // a server that has HTTP/2 too: the client chooses
		{"callers=32,tls", 32, true, 0},
	} {
		b.Run(c.name, func(b *testing.B) {
			cfg := startResponder(b, c.tls, c.delay)
			g := newGateway(b, cfg)
			callers(b, g, c.callers, c.callers*4)              // connects
			defer debug.SetGCPercent(debug.SetGCPercent(2500)) // collections as rare as with the heap of a service: every 100 MB
			b.ReportAllocs()
			b.ResetTimer()
			before := cpuTime(b)
			callers(b, g, c.callers, b.N)
			b.ReportMetric(float64(cpuTime(b)-before)/float64(b.N), "cpu-ns/op")
		})
	}
}

// callers makes n calls from so many goroutines.
func callers(b *testing.B, g *Gateway, goroutines, n int) {
	b.Helper()
	var left atomic.Int64
	left.Store(int64(n))
	ctx, cancel := context.WithCancel(context.Background()) // as in the service: one context for many calls
	defer cancel()
	var wg sync.WaitGroup
	for range goroutines {
		wg.Go(func() {
			r := testRequest(domain.Authorize)
			for left.Add(-1) >= 0 {
				if _, err := g.Do(ctx, r); err != nil {
					b.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
}

// cpuTime is what this process has used of the processors.
func cpuTime(tb testing.TB) time.Duration {
	tb.Helper()
	var u syscall.Rusage
	require.NoError(tb, syscall.Getrusage(syscall.RUSAGE_SELF, &u))
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

const responderEnv = "ORDERSAGA_TEST_RESPONDER" // tls or plain, and the delay

// startResponder starts the gateway's process and answers a configuration for it.
func startResponder(tb testing.TB, withTLS bool, delay time.Duration) Config {
	tb.Helper()
	cmd := exec.CommandContext(tb.Context(), os.Args[0], "-test.run=^TestResponder$") //nolint:gosec // ourselves
	cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%t %s", responderEnv, withTLS, delay))
	in, err := cmd.StdinPipe()
	require.NoError(tb, err)
	out, err := cmd.StdoutPipe()
	require.NoError(tb, err)
	require.NoError(tb, cmd.Start())
	tb.Cleanup(func() {
		_ = in.Close() // ends it
		_ = cmd.Wait()
	})
	line, err := bufio.NewReader(out).ReadString('\n')
	require.NoError(tb, err)
	fields := strings.Fields(line)
	if !withTLS {
		return testConfig("http://" + fields[0])
	}
	cfg := testConfig("https://" + fields[0])
	der, err := base64.StdEncoding.DecodeString(fields[1])
	require.NoError(tb, err)
	cert, err := x509.ParseCertificate(der)
	require.NoError(tb, err)
	cfg.TLS = &tls.Config{RootCAs: x509.NewCertPool(), MinVersion: tls.VersionTLS12}
	cfg.TLS.RootCAs.AddCert(cert)
	return cfg
}

// TestResponder is no test but the gateway's process, which the benchmarks start: it serves until its standard input ends.
func TestResponder(t *testing.T) {
	how := strings.Fields(os.Getenv(responderEnv))
	if len(how) == 0 {
		return
	}
	delay, err := time.ParseDuration(how[1])
	require.NoError(t, err)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	fmt.Print(ln.Addr().String())
	body := intentOfStripe(t)
	if how[0] == "true" {
		srv := tlsServer(t, body)
		fmt.Print(" ", base64.StdEncoding.EncodeToString(srv.TLSConfig.Certificates[0].Certificate[0]))
		go func() { _ = srv.ServeTLS(ln, "", "") }()
	} else {
		go servePlain(ln, wireAnswer(body), delay)
	}
	fmt.Println()
	_, _ = io.Copy(io.Discard, os.Stdin) // whatever ends it ends us
	os.Exit(0)                           // connections are open, and nobody minds
}

// intentOfStripe is a real answer, without its charge.
func intentOfStripe(tb testing.TB) []byte {
	tb.Helper()
	var fields map[string]any
	require.NoError(tb, json.Unmarshal(sample(tb), &fields))
	fields["latest_charge"], fields["status"] = "ch_1", statusRequiresCapture
	fields["metadata"] = map[string]string{orderID: testOrder.String()}
	body, err := json.Marshal(fields)
	require.NoError(tb, err)
	return body
}

// stripeHeaders are those of an answer of api.stripe.com.
var stripeHeaders = [][2]string{
	{"Server", "nginx"},
	{"Date", "Tue, 24 Nov 2026 20:00:00 GMT"},
	{"Content-Type", "application/json"},
	{"Connection", "keep-alive"},
	{"Access-Control-Allow-Credentials", "true"},
	{"Access-Control-Allow-Methods", "GET, HEAD, PUT, PATCH, POST, DELETE"},
	{"Access-Control-Allow-Origin", "*"},
	{"Access-Control-Expose-Headers", "Request-Id, Stripe-Manage-Version, Stripe-Should-Retry, X-Stripe-External-Auth-Required"},
	{"Access-Control-Max-Age", "300"},
	{"Cache-Control", "no-cache, no-store"},
	{"Content-Security-Policy", "base-uri 'none'; default-src 'none'; form-action 'none'; frame-ancestors 'none'; img-src 'self'; script-src 'self'"},
	{"Idempotency-Key", "01932c07-0000-7000-8000-000000000001/authorize/1"},
	{"Original-Request", "req_0123456789abcd"},
	{"Request-Id", "req_0123456789abcd"},
	{"Stripe-Should-Retry", "false"},
	{"Stripe-Version", "2026-03-25"},
	{"Vary", "Origin"},
	{"X-Stripe-Priority-Routing-Enabled", "true"},
	{"X-Wc", "ABGHI"},
	{"Strict-Transport-Security", "max-age=63072000; includeSubDomains; preload"},
}

// wireAnswer is an answer as it goes over the wire.
func wireAnswer(body []byte) []byte {
	out := []byte("HTTP/1.1 200 OK\r\n")
	for _, h := range stripeHeaders {
		out = fmt.Appendf(out, "%s: %s\r\n", h[0], h[1])
	}
	return append(fmt.Appendf(out, "Content-Length: %d\r\n\r\n", len(body)), body...)
}

func servePlain(ln net.Listener, answer []byte, delay time.Duration) {
	for {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		go func() {
			r := bufio.NewReader(c)
			for skipRequest(r) == nil {
				if delay > 0 {
					<-time.After(delay)
				}
				if _, err := c.Write(answer); err != nil {
					return
				}
			}
		}()
	}
}

func skipRequest(r *bufio.Reader) error {
	length := 0
	for {
		line, err := r.ReadSlice('\n')
		if err != nil {
			return err
		}
		if line = bytes.TrimRight(line, "\r\n"); len(line) == 0 {
			break
		}
		if name, value, _ := bytes.Cut(line, []byte(": ")); bytes.EqualFold(name, []byte("Content-Length")) {
			if length, err = strconv.Atoi(string(value)); err != nil {
				return err
			}
		}
	}
	_, err := r.Discard(length)
	return err
}

func tlsServer(t *testing.T, body []byte) *http.Server {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	require.NoError(t, err)
	return &http.Server{
		TLSConfig: &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}, MinVersion: tls.VersionTLS12},
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			_, _ = io.Copy(io.Discard, r.Body)
			for _, h := range stripeHeaders {
				if h[0] != "Connection" {
					w.Header()[h[0]] = []string{h[1]}
				}
			}
			_, _ = w.Write(body)
		}),
		ReadHeaderTimeout: time.Minute,
	}
}
