package payment

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptrace"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
)

// maxAnswer bounds an answer. A page of a hundred intents with their charges is about 600 KB.
const maxAnswer = 8 << 20

var errAnswerTooLarge = errors.New("the answer is larger than 8 MiB")

// trip is what one HTTP call tells beside what the SDK says of it. The SDK drops status and headers when the body is not the API's JSON, as a
// proxy's page is not, so they are noted below it.
type trip struct {
	body       string      // the request's
	sent       atomic.Bool // the gateway may have the request
	status     int
	replayed   bool
	retryAfter time.Duration
	requestID  string
	answer     []byte // the body of a 2xx
}

type tripKey struct{}

// tripOf is nil where somebody on the way lost the context.
func tripOf(ctx context.Context) *trip {
	t, _ := ctx.Value(tripKey{}).(*trip)
	return t
}

// recorder stands below the SDK: it notes status and headers of every call into its trip, and reads and bounds the answer. A 2xx's it
// keeps, as the SDK would only copy it.
//
// It also takes GetBody away from writes: net/http would silently send a request with an Idempotency-Key again when a pooled
// connection breaks. The same key makes that harmless, but tries are counted, limited and spaced by us, all of them.
//
// And it gives the body anew, with its length, which the SDK leaves out: net/http would send it in chunks and apart from the header, after a
// goroutine of its own has looked whether there is one.
type recorder struct{ next http.RoundTripper }

func (r recorder) RoundTrip(req *http.Request) (*http.Response, error) {
	t := tripOf(req.Context())
	if t == nil {
		return nil, errNoTrip
	}
	once := *req
	once.GetBody, once.Body, once.ContentLength = nil, http.NoBody, int64(len(t.body))
	if t.body != "" { // a write without a body would be sent again, GetBody or not: every one of ours has parameters
		once.Body = io.NopCloser(strings.NewReader(t.body))
	}
	res, err := r.next.RoundTrip(&once)
	if err != nil {
		return nil, err
	}
	t.status = res.StatusCode
	t.replayed = res.Header.Get("Idempotent-Replayed") == "true"
	t.retryAfter = parseRetryAfter(res.Header.Get("Retry-After"), time.Now())
	t.requestID = token(res.Header.Get("Request-Id"))
	body, err := readAnswer(res)
	_ = res.Body.Close() // it was read, or is given up
	if err == nil && res.StatusCode < http.StatusMultipleChoices {
		t.answer, body = body, nil
	}
	res.Body = &readBody{rest: body, err: err}
	return res, nil
}

// knownLength is up to which Content-Length, in bytes, memory is made ready before anything has come.
const knownLength = 64 << 10

// readAnswer reads an answer's body. What came before an error is answered with it.
func readAnswer(res *http.Response) ([]byte, error) {
	switch length := res.ContentLength; {
	case length > maxAnswer:
		return nil, errAnswerTooLarge
	case length > 0 && length <= knownLength: // 0 may be that nobody said
		b := make([]byte, length)
		n, err := io.ReadFull(res.Body, b)
		return b[:n], err
	}
	b, err := io.ReadAll(io.LimitReader(res.Body, maxAnswer+1))
	if len(b) > maxAnswer {
		return nil, errAnswerTooLarge
	}
	return b, err
}

// readBody is a body that was read, and the error that ended it.
type readBody struct {
	rest []byte
	err  error // nil: io.EOF
}

func (b *readBody) Read(p []byte) (int, error) {
	if len(b.rest) == 0 {
		if b.err != nil {
			return 0, b.err
		}
		return 0, io.EOF
	}
	n := copy(p, b.rest)
	b.rest = b.rest[n:]
	return n, nil
}

func (b *readBody) Close() error { return nil }

// proxied is net/http's transport, for gateways behind a proxy.
type proxied struct{ *http.Transport }

func (p proxied) RoundTrip(req *http.Request) (*http.Response, error) {
	t := tripOf(req.Context())
	if t == nil {
		return nil, errNoTrip // nobody would learn whether it was sent
	}
	trace := &httptrace.ClientTrace{GotConn: func(httptrace.GotConnInfo) { t.sent.Store(true) }}
	return p.Transport.RoundTrip(req.WithContext(httptrace.WithClientTrace(req.Context(), trace)))
}

const maxRetryAfter = time.Hour // a longer wish is a mistake

// parseRetryAfter reads both forms of the header: seconds, or a date. What it cannot read is no wish.
func parseRetryAfter(s string, now time.Time) time.Duration {
	s = strings.TrimSpace(s)
	if s == "" {
		return 0
	}
	if n, err := strconv.ParseInt(s, 10, 64); err == nil {
		return time.Duration(min(max(n, 0), int64(maxRetryAfter/time.Second))) * time.Second
	}
	at, err := http.ParseTime(s)
	if err != nil {
		return 0
	}
	return min(max(at.Sub(now), 0), maxRetryAfter)
}
