package payment

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"net/http"
	"net/url"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/semaphore"
)

// wire is the transport to a gateway that no proxy stands before: HTTP/1.1 to one host, in the caller's goroutine. The request is
// written with one system call, and whoever waits for the answer reads it. net/http has two goroutines a connection: at saturation that
// is four hand-overs a call, for two calls a saga. What goes over the wire is net/http's all the same, by its Request.Write and
// ReadResponse; ours are the connections and when they are used.
//
// A request is written once or not at all. A kept connection is looked at first, and where anything has come on it, be it its end, it is
// closed unused and the next one taken. One that breaks later fails the call.
//
// HTTP/2 is not offered: its one connection for all calls needs goroutines to share it. It takes one TLS handshake where wire takes one for
// each call that is in flight at once; then the connections are kept.
type wire struct {
	base    *url.URL // scheme and host of every request
	address string   // host:port
	dialer  dialer
	keep    time.Duration       // idle connections are closed after it
	slots   *semaphore.Weighted // one for each call in flight, so that there are never more connections

	mu      sync.Mutex
	idle    []*wireConn // the one that was used last at the end
	closing bool        // since CloseIdleConnections, until the next call
	sweeper *time.Timer // nil: nothing is idle
}

type dialer interface {
	DialContext(ctx context.Context, network, address string) (net.Conn, error)
}

func newWire(base *url.URL, d *net.Dialer, trust *tls.Config, connections int, keep time.Duration) *wire {
	w := &wire{base: base, address: addressOf(base), dialer: d, keep: keep, slots: semaphore.NewWeighted(int64(connections))}
	if base.Scheme == "https" {
		t := &tls.Config{MinVersion: tls.VersionTLS12}
		if trust != nil {
			t = trust.Clone()
		}
		t.NextProtos = []string{"http/1.1"}
		w.dialer = &tls.Dialer{NetDialer: d, Config: t} // d's time limit holds for the handshake too
	}
	return w
}

func addressOf(u *url.URL) string {
	port := u.Port()
	if port == "" {
		port = map[string]string{"http": "80", "https": "443"}[u.Scheme]
	}
	return net.JoinHostPort(u.Hostname(), port)
}

var (
	errOtherHost = errors.New("the request is not for the payment URL")
	errNoTrip    = errors.New("the request lost its context on its way: the transport's wrapper must pass it on")
)

// RoundTrip implements http.RoundTripper. The connection is given back with the last byte of the answer's body; closing the body before
// closes it.
func (w *wire) RoundTrip(req *http.Request) (*http.Response, error) {
	if req.Body != nil {
		defer req.Body.Close()
	}
	ctx := req.Context()
	switch {
	case req.URL.Scheme != w.base.Scheme || req.URL.Host != w.base.Host:
		return nil, errOtherHost
	case tripOf(ctx) == nil:
		return nil, errNoTrip // nobody would learn whether it was sent
	}
	if err := w.slots.Acquire(ctx, 1); err != nil {
		return nil, err
	}
	c, err := w.connect(ctx)
	if err != nil {
		w.slots.Release(1)
		return nil, err
	}
	return newExchange(w, c, req).run() //nolint:contextcheck // the request has it
}

// connect takes the connection that was used last, so that those too many grow old, or makes one.
func (w *wire) connect(ctx context.Context) (*wireConn, error) {
	for c := w.take(); c != nil; c = w.take() {
		if c.quiet() {
			return c, nil
		}
		c.abandon()
	}
	conn, err := w.dialer.DialContext(ctx, "tcp", w.address)
	if err != nil {
		if deadline, ok := ctx.Deadline(); ok && !time.Now().Before(deadline) {
			<-ctx.Done() // the dialer's timer was a moment ahead of the context's
			err = ctx.Err()
		}
		return nil, err
	}
	return newWireConn(conn), nil
}

func (w *wire) take() *wireConn {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.closing = false
	last := len(w.idle) - 1
	if last < 0 {
		return nil
	}
	c := w.idle[last]
	w.idle = slices.Delete(w.idle, last, last+1)
	return c
}

func (w *wire) give(c *wireConn) {
	if !w.kept(c) {
		_ = c.Close() // nothing is buffered
	}
}

func (w *wire) kept(c *wireConn) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closing {
		return false
	}
	c.since = time.Now()
	w.idle = append(w.idle, c)
	if w.sweeper == nil {
		w.sweeper = time.AfterFunc(w.keep, w.sweep)
	}
	return true
}

// sweep closes what has been idle for too long, and comes again when the next will have been.
func (w *wire) sweep() { closeAll(w.old(time.Now())) }

func (w *wire) old(now time.Time) []*wireConn {
	w.mu.Lock()
	defer w.mu.Unlock()
	n := 0
	for n < len(w.idle) && now.Sub(w.idle[n].since) >= w.keep {
		n++
	}
	old := slices.Clone(w.idle[:n])
	w.idle = slices.Delete(w.idle, 0, n)
	switch {
	case w.sweeper == nil: // stopped meanwhile
	case len(w.idle) == 0:
		w.sweeper = nil
	default:
		w.sweeper.Reset(w.keep - now.Sub(w.idle[0].since))
	}
	return old
}

// CloseIdleConnections closes what is idle, and what calls under way give back, until there is a new call.
func (w *wire) CloseIdleConnections() {
	w.mu.Lock()
	idle := w.idle
	w.idle, w.closing = nil, true
	if w.sweeper != nil {
		w.sweeper.Stop()
		w.sweeper = nil
	}
	w.mu.Unlock()
	closeAll(idle)
}

func closeAll(connections []*wireConn) {
	for _, c := range connections {
		_ = c.Close() // nothing is buffered
	}
}
