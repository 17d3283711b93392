package payment

import (
	"context"
	"io"
	"net/http"
)

// exchange is one request with its answer. It is the answer's body, too.
type exchange struct {
	wire *wire
	conn *wireConn
	req  *http.Request
	stop func() bool // false: the context has ended, and conn is being interrupted or soon will be
	body io.Reader
	last bool  // the gateway closes the connection after this answer
	over error // what further reads answer; nil: under way
}

func newExchange(w *wire, c *wireConn, req *http.Request) *exchange {
	return &exchange{wire: w, conn: c, req: req, stop: context.AfterFunc(req.Context(), c.interrupt)}
}

func (e *exchange) run() (*http.Response, error) {
	sent, err := e.conn.send(e.req)
	tripOf(e.req.Context()).sent.Store(sent)
	if err != nil {
		return nil, e.end(err)
	}
	res, err := e.conn.readHead(e.req)
	if err != nil {
		return nil, e.end(err)
	}
	e.body, e.last = res.Body, res.Close
	if res.Body == http.NoBody {
		_ = e.end(io.EOF) // which it is
		return res, nil
	}
	res.Body = e
	return res, nil
}

func (e *exchange) Read(p []byte) (int, error) {
	if e.over != nil {
		return 0, e.over
	}
	n, err := e.body.Read(p)
	switch {
	case err == nil:
		return n, nil
	case err != io.EOF: //nolint:errorlint // a whole body ends with io.EOF itself
		err = readError(err)
	}
	return n, e.end(err)
}

// Close ends an exchange whose answer was not read to its end.
func (e *exchange) Close() error {
	if e.over == nil {
		_ = e.end(http.ErrBodyReadAfterClose) // for reads to come
	}
	return nil
}

// end closes the connection, or gives it back: after a whole answer, where nothing is left on it and nobody interrupts it. It answers what ended
// the exchange: err, or the context, where that did.
func (e *exchange) end(err error) error {
	undisturbed := e.stop()
	if err == io.EOF && undisturbed && !e.last && e.conn.drained() { //nolint:errorlint // a whole body ends with io.EOF itself
		e.wire.give(e.conn)
	} else {
		e.conn.abandon()
	}
	e.wire.slots.Release(1)
	if ended := e.req.Context().Err(); ended != nil && err != io.EOF { //nolint:errorlint // as above
		err = ended
	}
	e.over = err
	return err
}
