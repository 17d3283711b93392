package payment

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"math"
	"net"
	"net/http"
	"time"
)

// Bytes.
const (
	maxHead   = 64 << 10 // of an answer before its body
	readAhead = 8 << 10  // an intent with its head fits into it: one read
)

var (
	errHeadTooLarge = errors.New("the answer's header is larger than 64 KiB")
	errNotHTTP      = errors.New("the answer is not HTTP/1.1")
)

// wireConn is a connection. It has one exchange at a time.
type wireConn struct {
	net.Conn
	below     net.Conn // below TLS
	look      *look
	in        *bufio.Reader
	left      int64 // bytes that may be read until the head is too large
	out       bytes.Buffer
	since     time.Time // idle since
	interrupt func()    // ends reads and writes that wait; it is made once, not for each call
}

func newWireConn(conn net.Conn) *wireConn {
	c := &wireConn{Conn: conn, below: conn}
	if t, ok := conn.(interface{ NetConn() net.Conn }); ok {
		c.below = t.NetConn()
	}
	c.look = newLook(c.below)
	c.in = bufio.NewReaderSize(headLimit{c}, readAhead)
	c.interrupt = func() { _ = c.SetDeadline(time.Unix(1, 0)) } // it fails where the connection is closed
	return c
}

// quiet reports that the connection can be used again as far as one can tell without waiting: it is open, and nothing has come on it.
func (c *wireConn) quiet() bool { return c.look.quiet() }

// drained reports that nothing has come that was not read.
func (c *wireConn) drained() bool { return c.in.Buffered() == 0 }

// abandon closes a connection in the middle of things, without TLS's farewell: that might have to wait.
func (c *wireConn) abandon() { _ = c.below.Close() }

// send writes the request with one call. It answers whether the gateway may have it, or part of it.
func (c *wireConn) send(req *http.Request) (bool, error) {
	c.out.Reset()
	if err := req.Write(&c.out); err != nil {
		return false, err
	}
	n, err := c.Write(c.out.Bytes())
	return n > 0 || err == nil, err
}

// readHead reads an answer as far as its body. Informational answers (1xx) before it are passed over.
func (c *wireConn) readHead(req *http.Request) (*http.Response, error) {
	for c.left = maxHead; ; {
		res, err := http.ReadResponse(c.in, req)
		switch {
		case err != nil:
			return nil, readError(err)
		case res.StatusCode >= http.StatusOK:
			c.left = math.MaxInt64
			return res, nil
		case res.StatusCode == http.StatusSwitchingProtocols:
			return nil, errNotHTTP
		}
	}
}

// readError keeps what the other side wrote out of the message.
func readError(err error) error {
	var network net.Error
	if errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, errHeadTooLarge) || errors.As(err, &network) {
		return err
	}
	return errNotHTTP
}

// headLimit reads from the connection for as long as the head is not too large.
type headLimit struct{ c *wireConn }

func (l headLimit) Read(p []byte) (int, error) {
	if l.c.left <= 0 {
		return 0, errHeadTooLarge
	}
	n, err := l.c.Read(p[:min(int64(len(p)), l.c.left)])
	l.c.left -= int64(n)
	return n, err
}
