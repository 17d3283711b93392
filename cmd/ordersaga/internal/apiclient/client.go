// Package apiclient calls the service's HTTP interface for the command line. It owns the request, the decoding of problems and of
// event streams; it tries nothing twice, since the person at the terminal sees the error.
package apiclient

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"time"

	"ordersaga/adapters/httpapi"
)

// Client calls one service.
type Client struct {
	base  string
	token string
	http  *http.Client
}

// New makes a client of the service at base, such as http://127.0.0.1:8080. More settles what is special about its connections.
func New(base, token string, more ...func(*http.Transport)) (*Client, error) {
	u, err := url.Parse(base)
	if err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
		return nil, fmt.Errorf("the service's address %q is no URL such as http://127.0.0.1:8080", base)
	}
	t := &http.Transport{Proxy: http.ProxyFromEnvironment, IdleConnTimeout: 90 * time.Second, TLSHandshakeTimeout: 10 * time.Second}
	t.MaxIdleConnsPerHost = 64
	t.ResponseHeaderTimeout = time.Minute
	for _, f := range more {
		f(t)
	}
	return &Client{base: strings.TrimRight(base, "/"), token: token, http: &http.Client{Transport: t}}, nil
}

// ProblemError is an answer that says no.
type ProblemError struct{ httpapi.Problem }

func (e *ProblemError) Error() string {
	s := fmt.Sprintf("%s (%d %s)", e.Title, e.Status, e.Code)
	if e.Detail != "" {
		s += ": " + e.Detail
	}
	if e.Field != "" {
		s += " [" + e.Field + "]"
	}
	if e.Status == http.StatusUnauthorized {
		s += "; set ORDERSAGA_TOKEN or --token"
	}
	return s
}

// maxAnswer bounds an answer, in bytes.
const maxAnswer = 64 << 20

// Do sends body (nil: none; []byte: as it is; else as JSON) and decodes the answer into out (nil: it is dropped).
func (c *Client) Do(ctx context.Context, method, path string, q url.Values, header http.Header, body, out any) error {
	resp, err := c.send(ctx, method, path, q, header, body)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return fmt.Errorf("%s %s: %w", method, path, err)
	}
	if out == nil {
		return nil
	}
	if raw, ok := out.(*[]byte); ok {
		*raw = b
		return nil
	}
	if err := json.Unmarshal(b, out); err != nil {
		return fmt.Errorf("%s %s: the answer is not what this version expects: %w", method, path, err)
	}
	return nil
}

func (c *Client) send(ctx context.Context, method, path string, q url.Values, header http.Header, body any) (*http.Response, error) {
	var rd io.Reader
	switch b := body.(type) {
	case nil:
	case []byte:
		rd = bytes.NewReader(b)
	default:
		enc, err := json.Marshal(b)
		if err != nil {
			return nil, fmt.Errorf("request: %w", err)
		}
		rd = bytes.NewReader(enc)
	}
	u := c.base + path
	if len(q) > 0 {
		u += "?" + q.Encode()
	}
	req, err := http.NewRequestWithContext(ctx, method, u, rd)
	if err != nil {
		return nil, fmt.Errorf("request: %w", err)
	}
	for k, vs := range header {
		req.Header[k] = vs
	}
	if rd != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	if c.token != "" {
		req.Header.Set("Authorization", "Bearer "+c.token)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, c.unreachable(ctx, err)
	}
	if resp.StatusCode < http.StatusBadRequest {
		return resp, nil
	}
	defer resp.Body.Close()
	p := &ProblemError{}
	b, _ := io.ReadAll(io.LimitReader(resp.Body, 1<<20)) // what there is of it is shown
	if json.Unmarshal(b, &p.Problem) != nil || p.Code == "" {
		p.Problem = httpapi.Problem{Status: resp.StatusCode, Code: "not_a_problem", Title: resp.Status, Detail: "what answers at " + c.base + " is not ordersaga"}
	}
	return nil, p
}

func (c *Client) unreachable(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	var ue *url.Error
	if errors.As(err, &ue) {
		err = ue.Err
	}
	var untrusted *tls.CertificateVerificationError
	if errors.As(err, &untrusted) {
		return fmt.Errorf("%s is not trusted: %w (SSL_CERT_FILE names the authority to trust)", c.base, err)
	}
	return fmt.Errorf("no answer from %s: %w (is the service running? --url or ORDERSAGA_URL choose another)", c.base, err)
}

// Event is one server-sent event.
type Event struct {
	ID, Name string
	Data     []byte
}

// Stream reads server-sent events until the stream or ctx ends; fn answers false to stop.
func (c *Client) Stream(ctx context.Context, path string, fn func(Event) (more bool, err error)) error {
	resp, err := c.send(ctx, http.MethodGet, path, nil, http.Header{"Accept": {"text/event-stream"}}, nil)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	sc := bufio.NewScanner(resp.Body)
	sc.Buffer(nil, 1<<20)
	var ev Event
	for sc.Scan() {
		line := sc.Text()
		name, value, _ := strings.Cut(line, ":")
		value = strings.TrimPrefix(value, " ")
		switch {
		case line == "" && ev.Data != nil:
			more, err := fn(ev)
			if err != nil || !more {
				return err
			}
			ev = Event{}
		case name == "id":
			ev.ID = value
		case name == "event":
			ev.Name = value
		case name == "data":
			ev.Data = append(ev.Data, value...)
		}
	}
	if err := sc.Err(); err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return fmt.Errorf("stream %s: %w", path, err)
	}
	return nil
}
