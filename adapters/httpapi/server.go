package httpapi

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"
)

// Timeouts and bounds of the server: against clients that dribble a request, never read an answer, or send headers without end.
const (
	readHeaderTimeout = 5 * time.Second
	readTimeout       = 15 * time.Second
	writeTimeout      = 60 * time.Second // longer than the longest Prefer: wait; streams move theirs
	idleTimeout       = 2 * time.Minute
	maxHeaderBytes    = 16 << 10
	silentGrace       = 500 * time.Millisecond // at shutdown, for a connection that has sent nothing yet
)

// Server serves the API on one address.
type Server struct {
	api    *API
	srv    *http.Server
	ln     net.Listener
	silent silent
}

// silent keeps the connections on which nothing has come yet: browsers and pools open some to spare, and a shutdown would wait five
// seconds for them to speak.
type silent struct {
	mu    sync.Mutex
	conns map[net.Conn]struct{}
}

func (s *silent) see(c net.Conn, st http.ConnState) {
	if st == http.StateIdle {
		return // after a request, and that was seen
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if st == http.StateNew {
		s.conns[c] = struct{}{}
	} else {
		delete(s.conns, c)
	}
}

func (s *silent) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := range s.conns {
		_ = c.Close() // nothing was promised on it
	}
}

// Listen opens addr (host:port; port 0 draws one). tlsConfig may be nil. handler is the API, perhaps wrapped for telemetry.
func Listen(ctx context.Context, addr string, api *API, handler http.Handler, tlsConfig *tls.Config, log *slog.Logger) (*Server, error) {
	var lc net.ListenConfig
	ln, err := lc.Listen(ctx, "tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("http: listen on %s: %w", addr, err)
	}
	return newServer(ln, api, handler, tlsConfig, log), nil
}

func newServer(ln net.Listener, api *API, handler http.Handler, tlsConfig *tls.Config, log *slog.Logger) *Server {
	s := &Server{api: api, ln: ln, silent: silent{conns: map[net.Conn]struct{}{}}}
	s.srv = &http.Server{
		Handler: handler, TLSConfig: tlsConfig, ErrorLog: slog.NewLogLogger(serverLog{log.Handler()}, slog.LevelWarn),
		ReadHeaderTimeout: readHeaderTimeout, ReadTimeout: readTimeout, WriteTimeout: writeTimeout, IdleTimeout: idleTimeout, MaxHeaderBytes: maxHeaderBytes,
		ConnState: s.silent.see,
	}
	return s
}

// serverLog passes on what net/http complains of, on one line. What any stranger can cause by a bad handshake is for debugging only.
type serverLog struct{ slog.Handler }

// Handle implements slog.Handler.
func (l serverLog) Handle(ctx context.Context, r slog.Record) error {
	level := r.Level
	if strings.Contains(r.Message, "TLS handshake error") {
		level = slog.LevelDebug
	}
	if !l.Enabled(ctx, level) {
		return nil
	}
	return l.Handler.Handle(ctx, slog.NewRecord(r.Time, level, clean(r.Message, maxLogged), 0)) //nolint:wrapcheck // passes through
}

// Addr is where it listens.
func (s *Server) Addr() string { return s.ln.Addr().String() }

// Serve answers requests until Shutdown.
func (s *Server) Serve() error {
	var err error
	if s.srv.TLSConfig != nil {
		err = s.srv.ServeTLS(s.ln, "", "")
	} else {
		err = s.srv.Serve(s.ln)
	}
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return fmt.Errorf("http: %w", err)
}

// Shutdown makes readiness red, ends streams, lets requests finish until ctx ends, then closes what is left.
func (s *Server) Shutdown(ctx context.Context) error {
	s.api.Drain()
	hush := time.AfterFunc(silentGrace, s.silent.close)
	defer hush.Stop()
	if err := s.srv.Shutdown(ctx); err != nil {
		return errors.Join(fmt.Errorf("http: shutdown: %w", err), s.srv.Close())
	}
	return nil
}
