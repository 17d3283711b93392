package payment

import (
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"
)

// Defaults of Config. The limits are Stripe's own for a live account: 100 calls a second.
const (
	DefaultTimeout        = 3 * time.Second
	DefaultRetries        = 2
	DefaultRetryBase      = 100 * time.Millisecond
	DefaultRetryMax       = time.Second
	DefaultRetryElapsed   = 10 * time.Second
	DefaultQueueTimeout   = 30 * time.Second
	DefaultMaxConnections = 256
	DefaultPerSecond      = 100
	DefaultConcurrent     = 64
	DefaultLookUpWindow   = 7 * 24 * time.Hour
)

// MaxRetries bounds the tries in place: a batch of the payment step waits for the slowest of its calls.
const MaxRetries = 5

// Config says where the gateway is and how patient we are with it. The zero value of a field means its default; BaseURL and APIKey
// have none.
type Config struct {
	BaseURL string // scheme://host[:port], without a path: https://api.stripe.com or the simulator's address
	APIKey  string // secret; in no error and no log

	Timeout      time.Duration // one HTTP call, from the request's first byte to the answer's last
	QueueTimeout time.Duration // wait for bulkhead and rate limit before a call gives up without having been sent
	Retry        Retry
	Breaker      Breaker
	Limits       Limits

	// MaxConnections sizes the connection pool and is the highest value that Limits.Concurrent can be set to. All of them may stay
	// idle: a pool that closes what the next batch needs pays a TLS handshake a call.
	MaxConnections int
	TLS            *tls.Config // trust and client certificates; nil: the system's roots

	// LookUpWindow bounds how far back a look-up by order id lists. Seven days is how long a card authorisation lives: an older
	// intent that nobody captured holds nothing.
	LookUpWindow time.Duration
}

// Retry is the patience in place. The SDK's own retries are off.
type Retry struct {
	Retries int           // after the first try; negative: none
	Base    time.Duration // the first wait is drawn from [0, Base], each later one from twice the range
	Max     time.Duration // the widest range
	Elapsed time.Duration // no try starts later than this after the first one started (backoff/v4 would stop at 15 minutes by itself)
}

// Breaker says when the gateway counts as away.
type Breaker struct {
	Consecutive int           // so many technical failures in a row open it (5)
	Ratio       float64       // or this share of failures (0.5) …
	MinCalls    int           // … among at least so many calls (20) …
	Window      time.Duration // … in this time (10 s)
	OpenFor     time.Duration // until one probe is let through (5 s)
}

// Limits protect the gateway, and our share of it, from us. They can be changed at run time.
type Limits struct {
	PerSecond  float64 // token bucket: calls a second
	Burst      int     // tokens it holds at most; zero: one second's worth
	Concurrent int     // bulkhead: calls in flight
}

func (l Limits) withDefaults() Limits {
	if l.PerSecond == 0 {
		l.PerSecond = DefaultPerSecond
	}
	if l.Burst == 0 {
		l.Burst = max(1, int(l.PerSecond))
	}
	if l.Concurrent == 0 {
		l.Concurrent = DefaultConcurrent
	}
	return l
}

func (l Limits) check(maxConnections int) error {
	switch {
	case !(l.PerSecond > 0): // also refuses NaN
		return fmt.Errorf("payment limits: per_second is %v: give a number of calls above 0", l.PerSecond)
	case l.Burst < 1:
		return fmt.Errorf("payment limits: burst is %d: give at least 1", l.Burst)
	case l.Concurrent < 1 || l.Concurrent > maxConnections:
		return fmt.Errorf("payment limits: concurrent is %d: give 1 to %d (max_connections)", l.Concurrent, maxConnections)
	}
	return nil
}

func orDefault[T comparable](v, def T) T {
	var zero T
	if v == zero {
		return def
	}
	return v
}

func (c Config) withDefaults() Config {
	c.Timeout = orDefault(c.Timeout, DefaultTimeout)
	c.QueueTimeout = orDefault(c.QueueTimeout, DefaultQueueTimeout)
	c.MaxConnections = orDefault(c.MaxConnections, DefaultMaxConnections)
	c.LookUpWindow = orDefault(c.LookUpWindow, DefaultLookUpWindow)
	c.Retry.Retries = max(0, orDefault(c.Retry.Retries, DefaultRetries))
	c.Retry.Base = orDefault(c.Retry.Base, DefaultRetryBase)
	c.Retry.Max = orDefault(c.Retry.Max, max(DefaultRetryMax, c.Retry.Base))
	c.Retry.Elapsed = orDefault(c.Retry.Elapsed, DefaultRetryElapsed)
	c.Breaker.Consecutive = orDefault(c.Breaker.Consecutive, 5)
	c.Breaker.Ratio = orDefault(c.Breaker.Ratio, 0.5)
	c.Breaker.MinCalls = orDefault(c.Breaker.MinCalls, 20)
	c.Breaker.Window = orDefault(c.Breaker.Window, 10*time.Second)
	c.Breaker.OpenFor = orDefault(c.Breaker.OpenFor, 5*time.Second)
	if c.Limits.Concurrent == 0 {
		c.Limits.Concurrent = min(DefaultConcurrent, c.MaxConnections)
	}
	c.Limits = c.Limits.withDefaults()
	return c
}

// check answers every fault of the configuration at once, so that one start shows them all.
func (c Config) check() error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if err := checkBaseURL(c.BaseURL); err != nil {
		errs = append(errs, err)
	}
	if c.APIKey == "" || strings.ContainsFunc(c.APIKey, func(r rune) bool { return r <= ' ' || r > '~' }) {
		bad("payment API key is empty or has spaces or control characters: set the gateway's secret key")
	}
	for name, d := range map[string]time.Duration{
		"timeout": c.Timeout, "queue_timeout": c.QueueTimeout, "lookup_window": c.LookUpWindow, "retry.base": c.Retry.Base,
		"retry.max": c.Retry.Max, "retry.elapsed": c.Retry.Elapsed, "breaker.window": c.Breaker.Window, "breaker.open_for": c.Breaker.OpenFor,
	} {
		if d < 0 {
			bad("payment %s is %s: give a positive duration", name, d)
		}
	}
	if c.Retry.Retries > MaxRetries {
		bad("payment retry.retries is %d: give at most %d, the retry topics take it from there", c.Retry.Retries, MaxRetries)
	}
	if c.Retry.Max < c.Retry.Base {
		bad("payment retry.max (%s) is below retry.base (%s)", c.Retry.Max, c.Retry.Base)
	}
	if c.Breaker.Consecutive < 1 || c.Breaker.MinCalls < 1 || !(c.Breaker.Ratio > 0 && c.Breaker.Ratio <= 1) {
		bad("payment breaker: consecutive and min_calls are at least 1, ratio is above 0 and at most 1")
	}
	if c.MaxConnections < 1 {
		bad("payment max_connections is %d: give at least 1", c.MaxConnections)
	}
	if err := c.Limits.check(c.MaxConnections); err != nil {
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// checkBaseURL never repeats the URL's user part: it may be a secret.
func checkBaseURL(s string) error {
	u, err := url.Parse(s)
	switch {
	case s == "":
		return errors.New("payment URL is not set: give https://api.stripe.com or the simulator's address")
	case err != nil || u.Host == "" || (u.Scheme != "http" && u.Scheme != "https"):
		return errors.New("payment URL is not of the form http(s)://host[:port]")
	case u.User != nil:
		return errors.New("payment URL has a user part: give the API key separately")
	case strings.Trim(u.Path, "/") != "" || u.RawQuery != "" || u.Fragment != "":
		return errors.New("payment URL has a path, query or fragment: give scheme, host and port only")
	}
	return nil
}

// String masks the API key, and so does every verb of fmt.
func (c Config) String() string {
	return fmt.Sprintf("payment{url %s, key ***, timeout %s, retries %d, limits %+v}", c.BaseURL, c.Timeout, c.Retry.Retries, c.Limits)
}

// GoString masks the API key under %#v.
func (c Config) GoString() string { return c.String() }

// Format masks the API key under the verbs that String and GoString do not cover.
func (c Config) Format(f fmt.State, _ rune) { _, _ = f.Write([]byte(c.String())) }

// transport makes HTTP calls over connections that it keeps.
type transport interface {
	http.RoundTripper
	CloseIdleConnections()
}

// keepIdle is how long a connection that nobody uses stays open.
const keepIdle = 90 * time.Second

func newTransport(c Config) transport {
	d := &net.Dialer{Timeout: c.Timeout, KeepAlive: 30 * time.Second}
	base, err := url.Parse(c.BaseURL)
	if err == nil {
		var proxy *url.URL
		if proxy, err = http.ProxyFromEnvironment(&http.Request{URL: base}); proxy == nil && err == nil {
			return newWire(base, d, c.TLS, c.MaxConnections, keepIdle)
		}
	}
	t := &http.Transport{ // where the environment names a proxy that cannot be, every call says so
		Proxy:                  http.ProxyFromEnvironment,
		DialContext:            d.DialContext,
		ForceAttemptHTTP2:      true,
		MaxIdleConns:           c.MaxConnections,
		MaxIdleConnsPerHost:    c.MaxConnections,
		MaxConnsPerHost:        c.MaxConnections,
		IdleConnTimeout:        keepIdle,
		TLSHandshakeTimeout:    c.Timeout,
		MaxResponseHeaderBytes: maxHead,
		WriteBufferSize:        4 << 10,
		ReadBufferSize:         16 << 10, // an intent fits in one read
	}
	if c.TLS != nil {
		t.TLSClientConfig = c.TLS.Clone()
	}
	return proxied{t}
}
