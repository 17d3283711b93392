package httpapi

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"time"
)

// Timeouts and bounds of the server: against clients that dribble a request, never read an answer, or send headers without end.
const (
	readHeaderTimeout = 5 * time.Second
	readTimeout       = 15 * time.Second
	writeTimeout      = 60 * time.Second // longer than the longest Prefer: wait; streams move theirs
	idleTimeout       = 2 * time.Minute
	maxHeaderBytes    = 16 << 10
)

// Server serves the API on one address.
type Server struct {
	api *API
	srv *http.Server
	ln  net.Listener
}

// Listen opens addr (host:port; port 0 draws one). tlsConfig may be nil. handler is the API, perhaps wrapped for telemetry.
func Listen(ctx context.Context, addr string, api *API, handler http.Handler, tlsConfig *tls.Config, log *slog.Logger) (*Server, error) {
	var lc net.ListenConfig
	ln, err := lc.Listen(ctx, "tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("http: listen on %s: %w", addr, err)
	}
	s := &Server{api: api, ln: ln, srv: &http.Server{
		Handler: handler, TLSConfig: tlsConfig, ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelDebug),
		ReadHeaderTimeout: readHeaderTimeout, ReadTimeout: readTimeout, WriteTimeout: writeTimeout, IdleTimeout: idleTimeout, MaxHeaderBytes: maxHeaderBytes,
	}}
	return s, nil
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
	if err := s.srv.Shutdown(ctx); err != nil {
		return errors.Join(fmt.Errorf("http: shutdown: %w", err), s.srv.Close())
	}
	return nil
}
