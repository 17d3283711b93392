package payment

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"ordersaga/domain"
)

// peer is one connection as the gateway has it.
type peer struct {
	net.Conn
	in *bufio.Reader
}

// request reads one; false: the connection has ended.
func (p *peer) request() (*http.Request, bool) {
	r, err := http.ReadRequest(p.in)
	if err != nil {
		return nil, false
	}
	body, err := io.ReadAll(r.Body)
	r.Body = io.NopCloser(strings.NewReader(string(body)))
	return r, err == nil
}

func (p *peer) say(s string) { _, _ = io.WriteString(p, s) } // the caller's side tells what is missing

// gatewayOf is a gateway that is written by hand: serve has each connection, with its number from 1.
func gatewayOf(t *testing.T, serve func(p *peer, connection int)) (address string, connections *atomic.Int32) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	connections = &atomic.Int32{}
	var wg sync.WaitGroup
	var mu sync.Mutex
	var open []net.Conn
	wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			open = append(open, c)
			mu.Unlock()
			n := int(connections.Add(1))
			wg.Go(func() {
				defer c.Close()
				serve(&peer{c, bufio.NewReader(c)}, n)
			})
		}
	})
	t.Cleanup(func() {
		_ = ln.Close()
		mu.Lock()
		for _, c := range open {
			_ = c.Close()
		}
		mu.Unlock()
		wg.Wait()
	})
	return ln.Addr().String(), connections
}

func withLength(head, body string) string {
	return fmt.Sprintf("HTTP/1.1 200 OK\r\n%sContent-Length: %d\r\n\r\n%s", head, len(body), body)
}

func inChunks(body, trailer string) string {
	half := len(body) / 2
	return fmt.Sprintf("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n%x;of=two\r\n%s\r\n0\r\n%s\r\n",
		half, body[:half], len(body)-half, body[half:], trailer)
}

// Each form that an answer can take on the wire, twice: whole ones are read and their connection kept where it can be, and of all others
// the outcome is unknown.
func TestFormsOfAnswers(t *testing.T) {
	body := intentBody(statusRequiresCapture)
	whole := withLength("", body)
	for name, c := range map[string]struct {
		answer string
		early  bool // it comes before the request was read
		closes bool // the gateway closes the connection after it
		kept   bool
		class  Class // empty: an outcome
		status int
	}{
		"with its length":                {answer: whole, kept: true},
		"in chunks":                      {answer: inChunks(body, ""), kept: true},
		"in chunks with a trailer":       {answer: inChunks(body, "Took: 1\r\n"), kept: true},
		"after informational answers":    {answer: "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: <x>\r\n\r\n" + whole, kept: true},
		"until the end":                  {answer: "HTTP/1.1 200 OK\r\n\r\n" + body, closes: true},
		"saying that it closes":          {answer: withLength("Connection: close\r\n", body)},
		"of HTTP/1.0":                    {answer: strings.Replace(whole, "HTTP/1.1", "HTTP/1.0", 1)},
		"with something after it":        {answer: whole + "more"},
		"without a body":                 {answer: "HTTP/1.1 204 No Content\r\n\r\n", kept: true, class: Malformed, status: 204},
		"empty":                          {answer: withLength("", ""), kept: true, class: Malformed, status: 200},
		"none":                           {closes: true, class: Connection},
		"of another protocol":            {answer: "SECRET-2.0-OpenSSH\r\n", closes: true, class: Connection},
		"that changes the protocol":      {answer: "HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: Upgrade\r\n\r\n", class: Connection},
		"cut in its head":                {answer: whole[:20], closes: true, class: Connection},
		"cut in its body":                {answer: whole[:len(whole)-1], closes: true, class: Connection, status: 200},
		"cut in a chunk":                 {answer: inChunks(body, "")[:90], closes: true, class: Connection, status: 200},
		"without its last chunk":         {answer: strings.TrimSuffix(inChunks(body, ""), "0\r\n\r\n"), closes: true, class: Connection, status: 200},
		"in chunks without lengths":      {answer: "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nSECRET\r\n", class: Connection, status: 200},
		"of two lengths":                 {answer: "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n{}", class: Connection},
		"with a head without end":        {answer: "HTTP/1.1 200 OK\r\nX: " + strings.Repeat("x", 2*maxHead), class: Connection},
		"that is always about to come":   {answer: strings.Repeat("HTTP/1.1 102 Processing\r\n\r\n", maxHead/20), class: Connection},
		"of a length that is too large":  {answer: fmt.Sprintf("HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n", maxAnswer+1), class: Connection, status: 200},
		"of the largest length, and cut": {answer: fmt.Sprintf("HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n{", maxAnswer), closes: true, class: Connection, status: 200},
		"with a chunk that is too large": {answer: fmt.Sprintf("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s", 2*maxAnswer, strings.Repeat(" ", maxAnswer+1)), class: Connection, status: 200},
		"of a failure, cut in its body":  {answer: "HTTP/1.1 500 X\r\nContent-Length: 9\r\n\r\n{", closes: true, class: Server, status: 500},
		"before the request was read":    {answer: withLength("Connection: close\r\n", body), early: true},
		"of a conflict":                  {answer: "HTTP/1.1 409 Conflict\r\nContent-Length: 2\r\n\r\n{}", kept: true, class: Conflict, status: 409},
	} {
		t.Run(name, func(t *testing.T) {
			var asked atomic.Int32
			address, connections := gatewayOf(t, func(p *peer, _ int) {
				for {
					if c.early {
						p.say(c.answer)
					}
					if _, ok := p.request(); !ok {
						return
					}
					asked.Add(1)
					if !c.early {
						p.say(c.answer)
					}
					if c.closes {
						return
					}
				}
			})
			g := newGateway(t, testConfig("http://"+address))
			for range 2 {
				out, err := g.Do(t.Context(), testRequest(domain.Authorize))
				if c.class == "" {
					require.NoError(t, err)
					require.Equal(t, domain.PaymentAuthorized, out.Result)
					continue
				}
				var f *Failure
				require.ErrorAs(t, err, &f)
				require.Equal(t, c.class, f.Class, "%v", err)
				require.Equal(t, c.status, f.Status, "%v", err)
				require.True(t, f.OutcomeUnknown())
				require.NotContains(t, err.Error(), "SECRET")
			}
			require.EqualValues(t, 2, asked.Load(), "once a call")
			require.EqualValues(t, map[bool]int{true: 1, false: 2}[c.kept], connections.Load())
		})
	}
}

// A kept connection that breaks with the next request on it: the gateway may have acted, so the call fails, and nobody but the caller sends
// it again. Reads too: every try is counted.
func TestNothingIsSentTwice(t *testing.T) {
	for _, op := range []domain.PaymentOp{domain.Capture, domain.LookUp} {
		var asked atomic.Int32
		address, connections := gatewayOf(t, func(p *peer, _ int) {
			for {
				if _, ok := p.request(); !ok || asked.Add(1) == 2 {
					return
				}
				p.say(withLength("", intentBody(statusSucceeded)))
			}
		})
		g := newGateway(t, testConfig("http://"+address))
		_, err := g.Do(t.Context(), testRequest(op))
		require.NoError(t, err)
		_, err = g.Do(t.Context(), testRequest(op))
		var f *Failure
		require.ErrorAs(t, err, &f)
		require.Equal(t, Connection, f.Class)
		require.Equal(t, op == domain.Capture, f.OutcomeUnknown())
		require.EqualValues(t, 2, asked.Load())
		require.EqualValues(t, 1, connections.Load())
		_, err = g.Do(t.Context(), testRequest(op))
		require.NoError(t, err, "on a new connection")
	}
}

// However far an answer has come: after Timeout the call ends, and its connection with it.
func TestSlowAnswers(t *testing.T) {
	whole := withLength("", intentBody(statusSucceeded))
	for name, came := range map[string]string{"nothing came": "", "some of the head": whole[:20], "some of the body": whole[:len(whole)-9]} {
		t.Run(name, func(t *testing.T) {
			address, connections := gatewayOf(t, func(p *peer, connection int) {
				for {
					if _, ok := p.request(); !ok {
						return
					}
					if connection == 1 {
						p.say(came)
					} else {
						p.say(whole)
					}
				}
			})
			cfg := testConfig("http://" + address)
			cfg.Timeout = 50 * time.Millisecond
			g := newGateway(t, cfg)
			_, err := g.Do(t.Context(), testRequest(domain.Capture))
			var f *Failure
			require.ErrorAs(t, err, &f)
			require.Equal(t, Timeout, f.Class)
			require.True(t, f.OutcomeUnknown())
			require.ErrorIs(t, err, context.DeadlineExceeded)
			g.cfg.Timeout = time.Minute
			_, err = g.Do(t.Context(), testRequest(domain.Capture))
			require.NoError(t, err)
			require.EqualValues(t, 2, connections.Load())
		})
	}
}

// A process that stops does not wait for the gateway.
func TestCallsInFlightAreCancelled(t *testing.T) {
	whole := withLength("", intentBody(statusSucceeded))
	for name, came := range map[string]string{"nothing came": "", "some of the body": whole[:len(whole)-9]} {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			address, _ := gatewayOf(t, func(p *peer, _ int) {
				if _, ok := p.request(); ok {
					p.say(came)
					cancel()
				}
				_, _ = p.in.ReadByte() // until the caller closes
			})
			cfg := testConfig("http://" + address)
			cfg.Timeout = time.Hour
			_, err := newGateway(t, cfg).Do(ctx, testRequest(domain.Capture))
			var f *Failure
			require.ErrorAs(t, err, &f)
			require.Equal(t, Cancelled, f.Class)
			require.True(t, f.OutcomeUnknown())
			require.ErrorIs(t, err, context.Canceled)
		})
	}
}

// What the gateway cannot have is said not to have taken effect.
func TestWithoutAConnectionNothingTookEffect(t *testing.T) {
	silent, _ := gatewayOf(t, func(p *peer, _ int) { _, _ = io.Copy(io.Discard, p.in) })
	for name, c := range map[string]struct {
		url   string
		class Class
	}{
		"nobody listens":              {"http://127.0.0.1:1", Connection},
		"a TLS handshake without end": {"https://" + silent, Timeout},
		"a name that there is not":    {"http://gateway.invalid", Connection},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := testConfig(c.url)
			cfg.Timeout = 300 * time.Millisecond
			cfg.TLS = &tls.Config{InsecureSkipVerify: true}
			_, err := newGateway(t, cfg).Do(t.Context(), testRequest(domain.Capture))
			var f *Failure
			require.ErrorAs(t, err, &f)
			if c.url != "http://gateway.invalid" { // a resolver may be slow
				require.Equal(t, c.class, f.Class, "%v", err)
			}
			require.False(t, f.OutcomeUnknown(), "%v", err)
		})
	}
}

// As many calls at once as there are connections; the others wait, and those that wait in vain were not sent.
func TestConnectionsAreBounded(t *testing.T) {
	const most, calls = 2, 6
	var asked atomic.Int32
	both, release := make(chan struct{}), make(chan struct{})
	address, connections := gatewayOf(t, func(p *peer, _ int) {
		for {
			if _, ok := p.request(); !ok {
				return
			}
			if asked.Add(1) == most {
				close(both)
			}
			<-release
			p.say(withLength("", `{"object":"list","data":[]}`))
		}
	})
	cfg := testConfig("http://" + address)
	cfg.MaxConnections = most
	g := newGateway(t, cfg)
	ended := make(chan error, calls)
	for range calls {
		go func() { ended <- g.Ready(t.Context()) }() // it passes the bulkhead by
	}
	<-both
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	var f *Failure
	require.ErrorAs(t, g.Ready(ctx), &f)
	require.Equal(t, Cancelled, f.Class)
	close(release)
	for range calls {
		require.NoError(t, <-ended)
	}
	require.EqualValues(t, calls, asked.Load())
	require.EqualValues(t, most, connections.Load())
}

// Idle connections are closed in their time, those that were used last stay longest, and nothing runs once there are none.
func TestIdleConnectionsAreClosed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		peers := make(chan net.Conn, 2)
		w := newWire(&url.URL{Scheme: "http", Host: "gateway"}, &net.Dialer{}, nil, 2, time.Minute)
		w.dialer = dialerFunc(func() (net.Conn, error) {
			ours, theirs := net.Pipe()
			peers <- theirs
			return ours, nil
		})
		var kept []*wireConn
		for range 2 {
			c, err := w.connect(t.Context())
			require.NoError(t, err)
			kept = append(kept, c)
		}
		first, second := <-peers, <-peers
		w.give(kept[0])
		<-time.After(40 * time.Second)
		w.give(kept[1])
		c, err := w.connect(t.Context())
		require.NoError(t, err)
		require.Same(t, kept[1], c)
		w.give(c)
		start := time.Now()
		_, err = first.Read(make([]byte, 1))
		require.ErrorIs(t, err, io.EOF)
		require.Equal(t, 20*time.Second, time.Since(start))
		_, err = second.Read(make([]byte, 1))
		require.ErrorIs(t, err, io.EOF)
		require.Equal(t, time.Minute, time.Since(start))
		require.Nil(t, w.sweeper)
	})
}

func idleOf(t *testing.T, g *Gateway) []*wireConn {
	t.Helper()
	w, ok := g.transport.(*wire)
	require.True(t, ok)
	return w.idle
}

type dialerFunc func() (net.Conn, error)

func (f dialerFunc) DialContext(context.Context, string, string) (net.Conn, error) { return f() }

// Close leaves calls under way alone, and nothing stays open after them.
func TestCloseGivesTheConnectionsBack(t *testing.T) {
	begun, release, ended := make(chan struct{}), make(chan struct{}), make(chan struct{}, 2)
	address, _ := gatewayOf(t, func(p *peer, connection int) {
		for {
			if _, ok := p.request(); !ok {
				ended <- struct{}{}
				return
			}
			if connection == 2 {
				close(begun)
				<-release
			} else {
				<-begun
			}
			p.say(withLength("", `{"object":"list","data":[]}`))
		}
	})
	g := newGateway(t, testConfig("http://"+address))
	answers := make(chan error, 2)
	for range 2 {
		go func() { answers <- g.Ready(t.Context()) }()
	}
	require.NoError(t, <-answers)
	g.Close()
	<-ended // the idle one
	close(release)
	require.NoError(t, <-answers, "a call under way")
	<-ended
	goleak.VerifyNone(t, goleak.IgnoreCurrent())
	require.Empty(t, idleOf(t, g))
}

// Calls that end at any moment, and their neighbours: nobody gets another's answer.
func TestAnswersAreNotMixedUp(t *testing.T) {
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		form, _ := url.ParseQuery(string(body))
		answer := strings.Replace(intentBody(statusRequiresCapture), testOrder.String(), form.Get("metadata["+orderID+"]"), 1)
		w.Header().Set("Content-Length", fmt.Sprint(len(answer)))
		for half := range strings.SplitAfterSeq(answer, `"status":`) {
			_, _ = io.WriteString(w, half)
			_ = http.NewResponseController(w).Flush()
		}
	}))
	t.Cleanup(srv.Close)
	cfg := testConfig(srv.URL)
	cfg.MaxConnections = 16 // as many as callers: none waits
	g := newGateway(t, cfg)
	var wg sync.WaitGroup
	var good, cancelled atomic.Int32
	for range 16 {
		wg.Go(func() {
			for range 100 {
				ctx, cancel := context.WithTimeout(t.Context(), time.Duration(rand.IntN(4000))*time.Microsecond)
				r := testRequest(domain.Authorize)
				r.Order = domain.NewOrderID()
				_, err := g.Do(ctx, r)
				cancel()
				var f *Failure
				switch {
				case err == nil:
					good.Add(1)
				case errors.As(err, &f) && (f.Class == Cancelled || f.Class == Timeout):
					cancelled.Add(1)
				default:
					t.Error(err) // another's order would be Malformed
				}
			}
		})
	}
	wg.Wait()
	t.Logf("%d answers, %d calls given up", good.Load(), cancelled.Load())
	require.Positive(t, good.Load())
}

// A gateway that has HTTP/2 as well is spoken to in HTTP/1.1, with the caller's trust and without a change to it.
func TestTLSOnTheWire(t *testing.T) {
	var protocols []string
	srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		protocols = append(protocols, r.Proto)
		_, _ = io.WriteString(w, `{"object":"list","data":[]}`)
	}))
	srv.EnableHTTP2 = true
	srv.StartTLS()
	t.Cleanup(srv.Close)
	cfg := testConfig(srv.URL)
	roots := x509.NewCertPool()
	roots.AddCert(srv.Certificate())
	cfg.TLS = &tls.Config{RootCAs: roots, NextProtos: []string{"h2"}, MinVersion: tls.VersionTLS13}
	g := newGateway(t, cfg)
	for range 2 {
		require.NoError(t, g.Ready(t.Context()))
	}
	require.Equal(t, []string{"HTTP/1.1", "HTTP/1.1"}, protocols)
	require.Len(t, idleOf(t, g), 1, "kept")
	require.Equal(t, []string{"h2"}, cfg.TLS.NextProtos)
}

// A wrapper that loses the context would leave open whether a write was sent, and one that goes elsewhere would give the key away.
func TestWrappersCannotHideACall(t *testing.T) {
	s, srv := run(t, say(200, intentBody(statusSucceeded)))
	for name, wrong := range map[string]func(*http.Request) *http.Request{
		"context": func(r *http.Request) *http.Request { return r.WithContext(context.Background()) },
		"host": func(r *http.Request) *http.Request {
			r = r.Clone(r.Context())
			r.URL.Host = "127.0.0.1:1"
			return r
		},
	} {
		g := newGateway(t, testConfig(srv.URL), WithTransport(func(next http.RoundTripper) http.RoundTripper {
			return roundTrip(func(r *http.Request) (*http.Response, error) { return next.RoundTrip(wrong(r)) })
		}))
		_, err := g.Do(t.Context(), testRequest(domain.Capture))
		var f *Failure
		require.ErrorAs(t, err, &f, name)
		require.False(t, f.OutcomeUnknown())
	}
	require.Empty(t, s.requests())
}

const behindProxyEnv = "ORDERSAGA_TEST_BEHIND_PROXY"

// The environment is read once a process, so a process of its own asks through the proxy.
func TestProxyOfTheEnvironment(t *testing.T) {
	if base := os.Getenv(behindProxyEnv); base != "" {
		err := newGateway(t, testConfig(base)).Ready(t.Context())
		if strings.HasPrefix(base, "http:") {
			require.NoError(t, err)
		} else {
			require.Error(t, err, "this proxy makes no tunnels")
		}
		return
	}
	var mu sync.Mutex
	var asked []string
	proxy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		asked = append(asked, r.Method+" "+r.URL.Scheme+" "+r.Host)
		if r.Method == http.MethodConnect {
			w.WriteHeader(http.StatusForbidden)
			return
		}
		_, _ = io.WriteString(w, `{"object":"list","data":[]}`)
	}))
	t.Cleanup(proxy.Close)
	for _, base := range []string{"http://payments.example", "https://payments.example"} {
		cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestProxyOfTheEnvironment$") //nolint:gosec // ourselves
		cmd.Env = append(os.Environ(), behindProxyEnv+"="+base, "HTTP_PROXY="+proxy.URL, "HTTPS_PROXY="+proxy.URL, "NO_PROXY=", "REQUEST_METHOD=")
		out, err := cmd.CombinedOutput()
		require.NoError(t, err, "%s", out)
	}
	require.Equal(t, []string{"GET http payments.example", "CONNECT  payments.example:443"}, asked)
}

// The SDK does not say how long a body is; a gateway, and proxies on the way to it, should not have to put chunks together.
func TestBodiesAreSentWhole(t *testing.T) {
	var lengths []int64
	var encodings [][]string
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		lengths, encodings = append(lengths, r.ContentLength), append(encodings, r.TransferEncoding)
		w.Header().Set("Content-Type", "application/json")
		_, _ = io.WriteString(w, intentBody("requires_capture")) // the caller sees what is missing
	}))
	t.Cleanup(srv.Close)
	_, err := newGateway(t, testConfig(srv.URL)).Do(t.Context(), testRequest(domain.Authorize))
	require.NoError(t, err)
	require.Len(t, lengths, 1)
	require.Positive(t, lengths[0])
	require.Empty(t, encodings[0])
}
