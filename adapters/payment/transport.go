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

// trip is what one HTTP call tells beside its body. The SDK drops status and headers when the body is not the API's JSON, as a
// proxy's page is not, so they are noted below it.
type trip struct {
	body       int         // length of the request's, in bytes
	sent       atomic.Bool // a connection was had: the gateway may have the request
	status     int
	replayed   bool
	retryAfter time.Duration
	requestID  string
}

type tripKey struct{}

func (t *trip) context(ctx context.Context) context.Context {
	ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{GotConn: func(httptrace.GotConnInfo) { t.sent.Store(true) }})
	return context.WithValue(ctx, tripKey{}, t)
}

// recorder notes status and headers of every call into its trip and bounds the body.
//
// It also takes GetBody away from writes: net/http would silently send a request with an Idempotency-Key again when a pooled
// connection breaks. The same key makes that harmless, but tries are counted, limited and spaced by us, all of them.
//
// And it states the body's length, which the SDK leaves out: net/http would send it in chunks, after a goroutine of its own has looked
// whether there is one.
type recorder struct{ next http.RoundTripper }

func (r recorder) RoundTrip(req *http.Request) (*http.Response, error) {
	t, ours := req.Context().Value(tripKey{}).(*trip)
	if req.Method == http.MethodPost {
		once := *req
		once.GetBody = nil
		if ours && t.body > 0 { // a write without a body would be sent again, GetBody or not: every one of ours has parameters
			once.ContentLength = int64(t.body)
		}
		req = &once
	}
	res, err := r.next.RoundTrip(req)
	if err != nil {
		return nil, err
	}
	if ours {
		t.status = res.StatusCode
		t.replayed = res.Header.Get("Idempotent-Replayed") == "true"
		t.retryAfter = parseRetryAfter(res.Header.Get("Retry-After"), time.Now())
		t.requestID = token(res.Header.Get("Request-Id"))
	}
	res.Body = &boundedBody{body: res.Body, left: maxAnswer}
	return res, nil
}

type boundedBody struct {
	body io.ReadCloser
	left int64
}

func (b *boundedBody) Read(p []byte) (int, error) {
	if b.left <= 0 {
		// One byte more tells the end from too much.
		var one [1]byte
		if n, err := b.body.Read(one[:]); n == 0 {
			return 0, err
		}
		return 0, errAnswerTooLarge
	}
	if int64(len(p)) > b.left {
		p = p[:b.left]
	}
	n, err := b.body.Read(p)
	b.left -= int64(n)
	return n, err
}

func (b *boundedBody) Close() error { return b.body.Close() }

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
