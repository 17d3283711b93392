package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http/httputil"
	"net/url"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"
)

// stub is the payment gateway: Stripe's PaymentIntents as far as a saga uses them, and the three calls that plain makes. It speaks HTTP/1.1 over
// plain sockets, for it shares the machine with what is measured, and remembers charges so that a double one shows.
type stub struct {
	delay time.Duration

	mu      sync.Mutex
	intents map[string]*intent // by refOf the order
	calls   int
}

type intent struct {
	key      string // of the call that made it
	amount   int64
	state    string
	twice    bool // made again under another key
	declined bool
}

// stubCounts is what the stub tells at /counts.
type stubCounts struct {
	Calls    int `json:"calls"`
	Captured int `json:"captured"`
	Declined int `json:"declined"`
	Returned int `json:"returned"`
	Twice    int `json:"twice"`
}

// serveStub serves until standard input ends: so it ends with whoever started it.
func serveStub(addr string, delay time.Duration) error {
	s := &stub{delay: delay, intents: map[string]*intent{}}
	ln, err := net.Listen("tcp", addr) //nolint:noctx // for the life of the process
	if err != nil {
		return fmt.Errorf("stub: %w", err)
	}
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go s.conn(c)
		}
	}()
	_, _ = io.Copy(io.Discard, os.Stdin) // whatever ends it ends us
	return ln.Close()
}

// call is one request.
type call struct {
	method, path string
	key          string
	body         []byte
}

func (s *stub) conn(c net.Conn) {
	defer c.Close()
	const size = 16 << 10
	r := bufio.NewReaderSize(c, size)
	var out, body []byte
	for {
		req, err := readCall(r, &body)
		if err != nil {
			return
		}
		out = s.answer(out[:0], &req)
		if _, err := c.Write(out); err != nil {
			return
		}
	}
}

// maxCall bounds a request's body, in bytes.
const maxCall = 1 << 16

var errTooLong = errors.New("a body that is too long")

func readCall(r *bufio.Reader, body *[]byte) (req call, err error) {
	line, err := r.ReadSlice('\n')
	if err != nil {
		return req, err
	}
	parts := bytes.Fields(line)
	if len(parts) != 3 {
		return req, errors.New("not HTTP")
	}
	req.method, req.path = string(parts[0]), string(parts[1])
	n, chunked := 0, false
	for {
		if line, err = r.ReadSlice('\n'); err != nil {
			return req, err
		}
		if line = bytes.TrimRight(line, "\r\n"); len(line) == 0 {
			break
		}
		name, value, _ := bytes.Cut(line, []byte(":"))
		value = bytes.TrimSpace(value)
		switch {
		case bytes.EqualFold(name, []byte("content-length")):
			if n, err = strconv.Atoi(string(value)); err != nil || n < 0 || n > maxCall {
				return req, errTooLong
			}
		case bytes.EqualFold(name, []byte("transfer-encoding")):
			chunked = bytes.EqualFold(value, []byte("chunked"))
		case bytes.EqualFold(name, []byte("idempotency-key")):
			req.key = string(value)
		}
	}
	if chunked {
		if req.body, err = io.ReadAll(io.LimitReader(httputil.NewChunkedReader(r), maxCall)); err == nil {
			_, err = r.Discard(len("\r\n"))
		}
		return req, err
	}
	if cap(*body) < n {
		*body = make([]byte, n)
	}
	req.body = (*body)[:n]
	_, err = io.ReadFull(r, req.body)
	return req, err
}

func reply(out []byte, status int, body []byte) []byte {
	text := map[int]string{200: "OK", 402: "Payment Required", 404: "Not Found", 400: "Bad Request"}[status]
	out = append(out, "HTTP/1.1 "...)
	out = strconv.AppendInt(out, int64(status), 10)
	out = append(append(out, ' '), text...)
	out = append(out, "\r\nContent-Type: application/json\r\nRequest-Id: req_stub\r\nContent-Length: "...)
	out = strconv.AppendInt(out, int64(len(body)), 10)
	out = append(out, "\r\n\r\n"...)
	return append(out, body...)
}

const intentsPath = "/v1/payment_intents"

func (s *stub) answer(out []byte, req *call) []byte {
	switch {
	case req.path == "/counts":
		b, _ := json.Marshal(s.counts()) // numbers
		return reply(out, 200, b)
	case req.path == "/v1/balance":
		return reply(out, 200, []byte(`{"object":"balance","available":[{"amount":0,"currency":"eur"}],"pending":[],"livemode":false}`))
	case req.method == "POST" && req.path == intentsPath:
		return s.create(out, req)
	case req.method == "POST" && len(req.path) > len(intentsPath)+1 && req.path[:len(intentsPath)] == intentsPath:
		id, op, _ := bytes.Cut([]byte(req.path[len(intentsPath)+1:]), []byte("/"))
		return s.move(out, string(id), string(op))
	case req.method == "POST" && (req.path == "/charge" || req.path == "/capture" || req.path == "/refund"):
		return s.plain(out, req)
	}
	return reply(out, 404, []byte(`{"error":{"type":"invalid_request_error","message":"the stub does not know this"}}`))
}

func (s *stub) counts() (c stubCounts) {
	s.mu.Lock()
	defer s.mu.Unlock()
	c.Calls = s.calls
	for _, in := range s.intents {
		switch {
		case in.declined:
			c.Declined++
		case in.state == "succeeded":
			c.Captured++
		case in.state == "canceled":
			c.Returned++
		}
		if in.twice {
			c.Twice++
		}
	}
	return c
}

// made notes that a payment was asked for, and answers it.
func (s *stub) made(order, key string, amount int64, declined bool) *intent {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.calls++
	in := s.intents[order]
	switch {
	case in == nil:
		in = &intent{key: key, amount: amount, state: "requires_capture", declined: declined}
		s.intents[order] = in
	case in.key != key:
		in.twice = true
	}
	return in
}

func (s *stub) create(out []byte, req *call) []byte {
	f, err := url.ParseQuery(string(req.body))
	order := f.Get("metadata[order_id]")
	ref := refOf(order)
	amount, numErr := strconv.ParseInt(f.Get("amount"), 10, 64)
	if err != nil || numErr != nil || order == "" {
		return reply(out, 400, []byte(`{"error":{"type":"invalid_request_error","message":"amount and metadata[order_id] are needed"}}`))
	}
	<-time.After(s.delay)
	declined := f.Get("payment_method") == "pm_card_chargeDeclined"
	in := s.made(ref, req.key, amount, declined)
	if declined {
		b := append([]byte(`{"error":{"type":"card_error","code":"card_declined","decline_code":"generic_decline","message":"Your card was declined.","payment_intent":`), intentJSON(order, in.amount, "requires_payment_method", 0)...)
		return reply(out, 402, append(b, "}}"...))
	}
	return reply(out, 200, intentJSON(order, in.amount, "requires_capture", 0))
}

func (s *stub) move(out []byte, id, op string) []byte {
	<-time.After(s.delay)
	to := map[string]string{"capture": "succeeded", "cancel": "canceled"}[op]
	const prefix = "pi_"
	order := ""
	if len(id) > len(prefix) {
		order = id[len(prefix):]
	}
	s.mu.Lock()
	s.calls++
	in := s.intents[order]
	if in == nil || to == "" {
		s.mu.Unlock()
		return reply(out, 404, []byte(`{"error":{"type":"invalid_request_error","code":"resource_missing","message":"No such payment_intent"}}`))
	}
	in.state = to
	amount := in.amount
	s.mu.Unlock()
	received := int64(0)
	if to == "succeeded" {
		received = amount
	}
	return reply(out, 200, intentJSON(order, amount, to, received))
}

// refOf is the part of an intent's id that an order's id gives.
func refOf(order string) string { return strings.ReplaceAll(order, "-", "") }

// intentJSON is as long as what Stripe answers for a bare card payment.
func intentJSON(order string, amount int64, state string, received int64) []byte {
	return fmt.Appendf(make([]byte, 0, 1024), `{"id":"pi_%s","object":"payment_intent","amount":%d,"amount_capturable":0,"amount_details":{"tip":{}},"amount_received":%d,"application":null,"application_fee_amount":null,"automatic_payment_methods":null,"canceled_at":null,"cancellation_reason":null,"capture_method":"manual","client_secret":"pi_%s_secret_stub","confirmation_method":"automatic","created":%d,"currency":"eur","customer":null,"description":null,"last_payment_error":null,"latest_charge":"ch_stub","livemode":false,"metadata":{"order_id":"%s"},"next_action":null,"on_behalf_of":null,"payment_method":"pm_card_visa","payment_method_options":{},"payment_method_types":["card"],"processing":null,"receipt_email":null,"review":null,"setup_future_usage":null,"shipping":null,"source":null,"statement_descriptor":null,"statement_descriptor_suffix":null,"status":"%s","transfer_data":null,"transfer_group":null}`,
		refOf(order), amount, received, refOf(order), time.Now().Unix(), order, state)
}

// plain answers what plain asks: by order, declined by its number.
func (s *stub) plain(out []byte, req *call) []byte {
	var b struct {
		OrderID string `json:"order_id"`
		Amount  int64  `json:"amount"`
	}
	if err := json.Unmarshal(req.body, &b); err != nil || b.OrderID == "" {
		return reply(out, 400, []byte("{}"))
	}
	<-time.After(s.delay)
	if req.path == "/charge" {
		if in := s.made(refOf(b.OrderID), req.key, b.Amount, declined(b.OrderID)); in.declined {
			return reply(out, 402, []byte(`{"status":"declined"}`))
		}
		return reply(out, 200, []byte(`{"status":"ok"}`))
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.calls++
	in := s.intents[refOf(b.OrderID)]
	if in == nil {
		return reply(out, 404, []byte("{}"))
	}
	in.state = map[string]string{"/capture": "succeeded", "/refund": "canceled"}[req.path]
	return reply(out, 200, []byte(`{"status":"ok"}`))
}
