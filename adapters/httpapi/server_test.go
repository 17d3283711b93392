package httpapi

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

// raw sends bytes as they are and answers all that comes back until the server closes or patience ends.
func (w *world) raw(parts ...string) string {
	w.t.Helper()
	c, err := net.Dial("tcp", w.server.Addr())
	require.NoError(w.t, err)
	defer c.Close()
	require.NoError(w.t, c.SetDeadline(time.Now().Add(20*time.Second)))
	for _, p := range parts {
		if _, err := io.WriteString(c, p); err != nil {
			break // the server has heard enough
		}
	}
	b, err := io.ReadAll(c)
	if err != nil && !errors.Is(err, io.EOF) {
		var reset *net.OpError
		require.ErrorAs(w.t, err, &reset) // it closed while we were still sending
		require.False(w.t, reset.Timeout(), "the server does not let go")
	}
	return string(b)
}

const head = "POST /v1/orders HTTP/1.1\r\nHost: x\r\nConnection: close\r\nIdempotency-Key: k\r\nContent-Type: application/json\r\n"

func TestRawRequests(t *testing.T) {
	w := newWorld(t)
	length := fmt.Sprintf("Content-Length: %d\r\n\r\n", len(tea))
	for name, c := range map[string]struct {
		parts []string
		want  string // how the answer begins; "" for none
	}{
		"well":                            {[]string{head, length, tea}, "HTTP/1.1 202"},
		"chunked":                         {[]string{head, "Transfer-Encoding: chunked\r\n\r\n", fmt.Sprintf("%x\r\n%s\r\n0\r\n\r\n", len(tea), tea)}, "HTTP/1.1 202"},
		"no host":                         {[]string{"GET /healthz HTTP/1.1\r\n\r\n"}, "HTTP/1.1 400"},
		"length twice":                    {[]string{head, "Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello"}, "HTTP/1.1 400"},
		"bad length":                      {[]string{head, "Content-Length: -1\r\n\r\n"}, "HTTP/1.1 400"},
		"another transfer encoding":       {[]string{head, "Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n"}, "HTTP/1.1 501"},
		"bad chunk":                       {[]string{head, "Transfer-Encoding: chunked\r\n\r\nzz\r\n"}, "HTTP/1.1 400"},
		"space before a colon":            {[]string{"GET /healthz HTTP/1.1\r\nHost : x\r\n\r\n"}, "HTTP/1.1 400"},
		"NUL in a header":                 {[]string{head, "X: a\x00b\r\n\r\n"}, "HTTP/1.1 400"},
		"no HTTP":                         {[]string{"\x16\x03\x01\x02\x00hello\r\n\r\n"}, "HTTP/1.1 400"},
		"HTTP/2 without TLS":              {[]string{"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"}, "HTTP/1.1 404"},
		"a body that ends early":          {[]string{head, "Content-Length: 500\r\n\r\n{"}, ""},
		"OPTIONS for the server":          {[]string{"OPTIONS * HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"}, "HTTP/1.1 200"},
		"F25 header flood: one":           {[]string{head, "X: " + strings.Repeat("x", 64<<10) + "\r\n\r\n"}, "HTTP/1.1 431"},
		"F25 header flood: many":          {[]string{head, strings.Repeat("X: y\r\n", 10_000), "\r\n"}, "HTTP/1.1 431"},
		"F25 header flood: no end":        {[]string{head, strings.Repeat("x", 1<<20)}, "HTTP/1.1 431"},
		"F25 oversized URL":               {[]string{"GET /" + strings.Repeat("u", 64<<10) + " HTTP/1.1\r\nHost: x\r\n\r\n"}, "HTTP/1.1 431"},
		"F25 oversized body, length said": {[]string{head, "Content-Length: 1000000\r\n\r\n", strings.Repeat(" ", 1_000_000)}, "HTTP/1.1 413"},
		"F25 a body without end":          {[]string{head, "Transfer-Encoding: chunked\r\n\r\n", strings.Repeat("1000\r\n"+strings.Repeat(" ", 0x1000)+"\r\n", 1000)}, "HTTP/1.1 413"},
		"CONNECT":                         {[]string{"CONNECT evil.example:443 HTTP/1.1\r\nHost: evil.example:443\r\nConnection: close\r\n\r\n"}, "HTTP/1.1 404"},
		"a whole URL":                     {[]string{"GET http://evil.example/healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"}, "HTTP/1.1 200"},
	} {
		t.Run(name, func(t *testing.T) {
			if name == "a body that ends early" {
				w.cut(head, "Content-Length: 500\r\n\r\n{")
				return
			}
			got := w.raw(c.parts...)
			if strings.HasPrefix(name, "F25 ") && got == "" {
				return // it was reset while we were sending: what was answered is lost with it
			}
			require.True(t, strings.HasPrefix(got, c.want), "%.200q", got)
		})
	}
	placed := len(w.intake.submitted())
	require.Equal(t, 2, placed, "only what was well-formed and whole was handed on")
	require.Equal(t, http.StatusOK, w.do(http.MethodGet, "/healthz", "").status, "and it still answers")
}

// cut sends a request and closes the sending side: the body ends before its length.
func (w *world) cut(parts ...string) {
	w.t.Helper()
	addr, err := net.ResolveTCPAddr("tcp", w.server.Addr())
	require.NoError(w.t, err)
	c, err := net.DialTCP("tcp", nil, addr)
	require.NoError(w.t, err)
	defer func() { _ = c.Close() }()
	_, err = io.WriteString(c, strings.Join(parts, ""))
	require.NoError(w.t, err)
	require.NoError(w.t, c.CloseWrite())
	b, err := io.ReadAll(c)
	require.NoError(w.t, err)
	require.True(w.t, strings.HasPrefix(string(b), "HTTP/1.1 400"), "%q", b)
	require.Contains(w.t, string(b), "the body ended early")
}

// TestF25_SlowLoris: a client that dribbles its request is cut off, however steadily it dribbles. On a real listener, with timeouts cut
// to a twentieth.
func TestF25_SlowLoris(t *testing.T) {
	w := newWorld(t, func(s *setup) {
		s.server = func(srv *http.Server) {
			srv.ReadHeaderTimeout, srv.ReadTimeout = readHeaderTimeout/20, readTimeout/20
		}
	})
	for name, c := range map[string]struct{ start, drip, want string }{
		"header": {"POST /v1/orders HTTP/1.1\r\nHost: x\r\n", "X: y\r\n", ""},
		"body":   {head + "Content-Length: 60000\r\n\r\n", " ", "HTTP/1.1 400"},
	} {
		t.Run(name, func(t *testing.T) {
			c2, err := net.Dial("tcp", w.server.Addr())
			require.NoError(t, err)
			defer c2.Close()
			_, err = io.WriteString(c2, c.start)
			require.NoError(t, err)
			answer := make(chan string, 1)
			go func() { b, _ := io.ReadAll(c2); answer <- string(b) }() // closed or reset, it is over
			drip := time.NewTicker(20 * time.Millisecond)
			defer drip.Stop()
			patience := time.After(10 * time.Second)
			for {
				select {
				case got := <-answer:
					require.True(t, strings.HasPrefix(got, c.want), "%q", got)
					if c.want != "" && got != "" {
						require.Contains(t, got, "did not arrive in time")
					}
					require.Empty(t, w.intake.submitted())
					return
				case <-drip.C:
					_, _ = io.WriteString(c2, c.drip) // it fails once the server has let go
				case <-patience:
					t.Fatal("the server holds on to a client that dribbles")
				}
			}
		})
	}
}

// TestF25_Timeouts: the server's own timeouts, on synctest's clock.
func TestF25_Timeouts(t *testing.T) {
	for name, c := range map[string]struct {
		send  string
		after time.Duration
		want  string
	}{
		"says nothing":            {"", readHeaderTimeout, ""},
		"header dribbles":         {"GET /healthz HTTP/1.1\r\nHost: x\r\n", readHeaderTimeout, ""},
		"body dribbles":           {head + "Content-Length: 60000\r\n\r\n{", readTimeout, "HTTP/1.1 400"},
		"body never comes":        {head + "Content-Length: 60000\r\n\r\n", readTimeout, "HTTP/1.1 400"},
		"keeps it open, is quiet": {"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n", idleTimeout, "HTTP/1.1 200"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, piped)
				conn, err := w.pipes.dial()
				require.NoError(t, err)
				defer conn.Close()
				start := time.Now()
				done := make(chan string, 1)
				go func() { b, _ := io.ReadAll(conn); done <- string(b) }()
				_, err = io.WriteString(conn, c.send)
				require.NoError(t, err)
				got := <-done
				require.Equal(t, c.after, time.Since(start).Truncate(time.Second))
				require.True(t, strings.HasPrefix(got, c.want), "%q", got)
				if c.want == "" {
					require.Empty(t, got)
				}
			})
		})
	}
	t.Run("never reads its answer", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t, piped)
			conn, err := w.pipes.dial()
			require.NoError(t, err)
			defer conn.Close()
			start := time.Now()
			_, err = io.WriteString(conn, "GET /openapi.yaml HTTP/1.1\r\nHost: x\r\n\r\n")
			require.NoError(t, err)
			time.Sleep(writeTimeout + time.Second) //nolint:forbidigo // synctest's clock
			synctest.Wait()
			_, err = conn.Read(make([]byte, 1))
			require.Error(t, err, "closed by the other side")
			require.Equal(t, writeTimeout+time.Second, time.Since(start))
		})
	})
}

func TestShutdown(t *testing.T) {
	t.Run("lets requests finish", func(t *testing.T) {
		w := newWorld(t)
		w.intake.hold, w.intake.held = make(chan struct{}), make(chan struct{}, 1)
		got := make(chan answered, 1)
		r := w.request(http.MethodPost, "/v1/orders", tea, "Idempotency-Key", "k")
		go func() {
			a, err := w.send(r)
			if err != nil {
				t.Error(err)
			}
			got <- a
		}()
		<-w.intake.held
		down := make(chan error, 1)
		go func() { down <- w.server.Shutdown(t.Context()) }()
		require.Eventually(t, w.api.draining.Load, 5*time.Second, tick)
		close(w.intake.hold)
		w.accepted(<-got)
		require.NoError(t, <-down)
		_, err := net.Dial("tcp", w.server.Addr())
		require.Error(t, err)
	})
	t.Run("cuts what does not finish", func(t *testing.T) {
		w := newWorld(t)
		w.intake.hold, w.intake.held = make(chan struct{}), make(chan struct{}, 1)
		failed := make(chan error, 1)
		r := w.request(http.MethodPost, "/v1/orders", tea, "Idempotency-Key", "k")
		go func() { _, err := w.send(r); failed <- err }()
		<-w.intake.held
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		require.ErrorIs(t, w.server.Shutdown(ctx), context.Canceled)
		require.Error(t, <-failed)
	})
	t.Run("does not wait for who says nothing", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t, piped)
			conn, err := w.pipes.dial()
			require.NoError(t, err)
			defer conn.Close()
			synctest.Wait()
			start := time.Now()
			require.NoError(t, w.server.Shutdown(t.Context()))
			require.Less(t, time.Since(start), 2*silentGrace)
			synctest.Wait()
			w.server.silent.mu.Lock()
			defer w.server.silent.mu.Unlock()
			require.Empty(t, w.server.silent.conns)
		})
	})
}

func TestListenFails(t *testing.T) {
	w := newWorld(t)
	_, err := Listen(t.Context(), w.server.Addr(), w.api, w.api, nil, w.api.Log)
	require.ErrorContains(t, err, "http: listen on 127.0.0.1:")
}

func TestTLS(t *testing.T) {
	w := newWorld(t, func(s *setup) {
		s.tls = &tls.Config{Certificates: []tls.Certificate{selfSigned(t)}, MinVersion: tls.VersionTLS12}
	})
	resp, err := w.client.Do(w.request(http.MethodPost, "/v1/orders", tea, "Idempotency-Key", "k"))
	require.NoError(t, err)
	defer resp.Body.Close()
	require.Equal(t, 2, resp.ProtoMajor)
	require.Equal(t, http.StatusAccepted, resp.StatusCode)
	big := w.place("k2", strings.Repeat(" ", 70_000)+tea)
	w.refused(big, http.StatusRequestEntityTooLarge, "too_large")
	w.accepted(w.place("k2", tea))

	// Plain HTTP on the port of TLS, and a handshake that is none: nothing that anybody has to look at.
	require.Contains(t, w.raw("GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"), "400")
	require.Empty(t, w.raw("\x16\x03\x01\x00\x05hello\x1b[31m\r\n")[7:])
	for _, l := range w.logLines() {
		require.Equal(t, "DEBUG", l.Level, l.Msg)
		require.Equal(t, clean(l.Msg, maxLogged), l.Msg)
	}
}

// TestServerLog: what net/http complains of is seen, on one line.
func TestServerLog(t *testing.T) {
	b := &logBook{}
	l := slog.NewLogLogger(serverLog{slog.NewTextHandler(b, &slog.HandlerOptions{Level: slog.LevelInfo})}, slog.LevelWarn)
	l.Print("http: TLS handshake error from 10.0.0.1: EOF")
	require.Empty(t, b.lines())
	l.Print("http: Accept error: too many open files\r\nlevel=INFO msg=forged\x1b[31m")
	require.Len(t, b.lines(), 1)
	require.Contains(t, b.lines()[0], `level=WARN msg="http: Accept error: too many open files  level=INFO msg=forged [31m"`)
}
