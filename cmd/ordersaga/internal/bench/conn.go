package bench

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http/httputil"
	"net/url"
	"strconv"
	"syscall"
	"time"
)

// Endpoint is where requests go. The generator shares the machine with what it measures, so it speaks HTTP/1.1 over plain sockets:
// about a quarter of net/http's CPU a request.
type Endpoint struct {
	addr, host, path string
	tls              *tls.Config // nil: none
	// Timeout bounds one request.
	Timeout time.Duration
}

// NewEndpoint reads a base URL.
func NewEndpoint(base string, timeout time.Duration) (*Endpoint, error) {
	u, err := url.Parse(base)
	if err != nil || u.Hostname() == "" || u.Scheme != "http" && u.Scheme != "https" {
		return nil, fmt.Errorf("%q is no URL such as http://127.0.0.1:8080", base)
	}
	e := &Endpoint{host: u.Host, path: u.Path, Timeout: timeout}
	port := u.Port()
	if u.Scheme == "https" {
		e.tls = &tls.Config{MinVersion: tls.VersionTLS12, ServerName: u.Hostname(), NextProtos: []string{"http/1.1"}}
	}
	if port == "" {
		port = map[string]string{"http": "80", "https": "443"}[u.Scheme]
	}
	e.addr = net.JoinHostPort(u.Hostname(), port)
	for len(e.path) > 0 && e.path[len(e.path)-1] == '/' {
		e.path = e.path[:len(e.path)-1]
	}
	return e, nil
}

// Request is one request. Head is header lines, each ending in CRLF, without Host and Content-Length.
type Request struct {
	Method, Path string
	Head, Body   []byte
}

// Answer is what came back. Body is good until the next request on the connection.
type Answer struct {
	Status     int
	RetryAfter time.Duration
	Body       []byte
}

// Conn is one connection that is kept alive, dialled when first used. One goroutine at a time.
type Conn struct {
	to   *Endpoint
	c    net.Conn
	r    *bufio.Reader
	out  []byte
	body []byte
}

// NewConn makes a connection to e.
func NewConn(e *Endpoint) *Conn { return &Conn{to: e} }

// Close closes the connection.
func (k *Conn) Close() {
	if k.c != nil {
		_ = k.c.Close() // nothing is buffered
		k.c = nil
	}
}

// bounds of an answer's parts, in bytes.
const (
	maxHeaderLine = 8 << 10
	maxBody       = 4 << 20
)

// Do sends a request and reads its answer. A kept connection that the server had closed meanwhile is dialled once more: every request of
// ours may be repeated.
func (k *Conn) Do(ctx context.Context, req *Request) (Answer, error) {
	kept := k.c != nil
	a, err := k.once(ctx, req)
	if err != nil && kept && (errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE)) {
		a, err = k.once(ctx, req)
	}
	return a, err
}

func (k *Conn) once(ctx context.Context, req *Request) (a Answer, err error) {
	defer func() {
		if err != nil {
			k.Close()
		}
	}()
	if k.c == nil {
		if err := k.dial(ctx); err != nil {
			return a, err
		}
	}
	if err := k.c.SetDeadline(time.Now().Add(k.to.Timeout)); err != nil {
		return a, fmt.Errorf("deadline: %w", err)
	}
	b := append(k.out[:0], req.Method...)
	b = append(b, ' ')
	b = append(append(b, k.to.path...), req.Path...)
	b = append(append(b, " HTTP/1.1\r\nHost: "...), k.to.host...)
	b = append(append(b, "\r\n"...), req.Head...)
	b = append(b, "Content-Length: "...)
	b = append(strconv.AppendInt(b, int64(len(req.Body)), 10), "\r\n\r\n"...)
	b = append(b, req.Body...)
	k.out = b
	if _, err := k.c.Write(b); err != nil {
		return a, fmt.Errorf("send: %w", err)
	}
	return k.read()
}

func (k *Conn) dial(ctx context.Context) error {
	d := &net.Dialer{Timeout: k.to.Timeout}
	var err error
	if k.to.tls != nil {
		k.c, err = (&tls.Dialer{NetDialer: d, Config: k.to.tls}).DialContext(ctx, "tcp", k.to.addr)
	} else {
		k.c, err = d.DialContext(ctx, "tcp", k.to.addr)
	}
	if err != nil {
		k.c = nil
		return fmt.Errorf("connect: %w", err)
	}
	k.r = bufio.NewReaderSize(k.c, maxHeaderLine)
	return nil
}

// head is what matters of an answer's header.
type head struct {
	length         int
	chunked, close bool
}

func (k *Conn) read() (a Answer, err error) {
	line, err := k.r.ReadSlice('\n')
	if err != nil {
		return a, fmt.Errorf("answer: %w", err)
	}
	if len(line) < len("HTTP/1.1 200") || !bytes.HasPrefix(line, []byte("HTTP/1.")) {
		return a, fmt.Errorf("answer: not HTTP: %.40q", line)
	}
	if a.Status, err = strconv.Atoi(string(line[9:12])); err != nil {
		return a, fmt.Errorf("answer: status: %w", err)
	}
	h := head{}
	for {
		if line, err = k.r.ReadSlice('\n'); err != nil {
			return a, fmt.Errorf("answer's header: %w", err)
		}
		if line = bytes.TrimRight(line, "\r\n"); len(line) == 0 {
			break
		}
		if err := h.take(line, &a); err != nil {
			return a, err
		}
	}
	if err := k.readBody(&h, &a); err != nil {
		return a, err
	}
	if h.close {
		k.Close()
	}
	return a, nil
}

func (h *head) take(line []byte, a *Answer) (err error) {
	name, value, _ := bytes.Cut(line, []byte(":"))
	value = bytes.TrimSpace(value)
	switch len(name) { // most headers are none of these: EqualFold is spared
	case len("content-length"):
		if bytes.EqualFold(name, []byte("content-length")) {
			if h.length, err = strconv.Atoi(string(value)); err != nil || h.length < 0 || h.length > maxBody {
				return fmt.Errorf("answer's length %.20q", value)
			}
		}
	case len("transfer-encoding"):
		h.chunked = h.chunked || bytes.EqualFold(name, []byte("transfer-encoding")) && bytes.EqualFold(value, []byte("chunked"))
	case len("connection"):
		if bytes.EqualFold(name, []byte("connection")) {
			h.close = bytes.EqualFold(value, []byte("close"))
		}
	case len("retry-after"):
		if bytes.EqualFold(name, []byte("retry-after")) {
			if s, err := strconv.Atoi(string(value)); err == nil && s >= 0 {
				a.RetryAfter = time.Duration(s) * time.Second
			}
		}
	}
	return nil
}

func (k *Conn) readBody(h *head, a *Answer) error {
	if h.chunked {
		b, err := io.ReadAll(io.LimitReader(httputil.NewChunkedReader(k.r), maxBody))
		if err != nil {
			return fmt.Errorf("answer's body: %w", err)
		}
		a.Body = b
		if _, err := k.r.Discard(len("\r\n")); err != nil { // what ends the trailer
			return fmt.Errorf("answer's end: %w", err)
		}
		return nil
	}
	if cap(k.body) < h.length {
		k.body = make([]byte, h.length)
	}
	a.Body = k.body[:h.length]
	if _, err := io.ReadFull(k.r, a.Body); err != nil {
		return fmt.Errorf("answer's body: %w", err)
	}
	return nil
}
