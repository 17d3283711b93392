package httpapi

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"math/big"
	"net/http"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/santhosh-tekuri/jsonschema/v6"
	"github.com/stretchr/testify/require"

	"ordersaga/domain"
)

// sse reads a stream of events.
type sse struct {
	t    *testing.T
	body io.ReadCloser
	sc   *bufio.Scanner
}

type sseEvent struct{ id, event, data, comment string }

func (w *world) follow(id domain.OrderID, header ...string) *sse {
	w.t.Helper()
	resp, err := w.client.Do(w.request(http.MethodGet, "/v1/orders/"+id.String()+"/events", "", header...))
	require.NoError(w.t, err)
	require.Equal(w.t, http.StatusOK, resp.StatusCode)
	require.Equal(w.t, "text/event-stream", resp.Header.Get("Content-Type"))
	require.Equal(w.t, "no-store", resp.Header.Get("Cache-Control"))
	w.t.Cleanup(func() { resp.Body.Close() })
	return &sse{w.t, resp.Body, bufio.NewScanner(resp.Body)}
}

// next answers the next event or comment; false at the end of the stream.
func (s *sse) next() (e sseEvent, ok bool) {
	for s.sc.Scan() {
		line := s.sc.Text()
		name, value, _ := strings.Cut(line, ":")
		value = strings.TrimPrefix(value, " ")
		switch {
		case line == "":
			return e, true
		case name == "":
			e.comment = value
		case name == "id":
			e.id = value
		case name == "event":
			e.event = value
		case name == "data":
			e.data += value
		default:
			s.t.Errorf("a line that the format does not have: %q", line)
		}
	}
	return e, false
}

func (s *sse) order() Order {
	s.t.Helper()
	e, ok := s.next()
	require.True(s.t, ok)
	require.Equal(s.t, "order", e.event)
	require.Empty(s.t, e.id)
	var o Order
	require.NoError(s.t, json.Unmarshal([]byte(e.data), &o))
	return o
}

func (s *sse) ended() {
	s.t.Helper()
	e, ok := s.next()
	require.False(s.t, ok, "%+v", e)
}

func update(id domain.OrderID, seq int32, name, data string) Update {
	return Update{Order: id, Sequence: seq, Name: name, Terminal: name != "OrderPlaced", Data: []byte(data)}
}

// subscribed waits until n requests follow the order.
func (w *world) subscribed(id domain.OrderID, n int) {
	w.t.Helper()
	require.Eventually(w.t, func() bool {
		w.hub.mu.Lock()
		defer w.hub.mu.Unlock()
		return len(w.hub.subs[id]) == n
	}, 5*time.Second, tick)
}

func TestStream(t *testing.T) {
	w := newWorld(t)
	t.Run("the order, then its events, each once", func(t *testing.T) {
		id := w.reader.pending()
		s := w.follow(id)
		require.Equal(t, OrderID(id), s.order().OrderID)
		w.hub.Publish(update(id, 1, "OrderPlaced", `{"sequence":1}`))
		w.hub.Publish(update(id, 1, "OrderPlaced", `{"sequence":1}`))
		w.hub.Publish(update(w.reader.pending(), 2, "OrderConfirmed", `{"other":"order"}`))
		w.hub.Publish(update(id, 2, "OrderConfirmed", "{\n  \"sequence\": 2,\r\n\"x\":\"data: \\n\"}\n"))
		e, _ := s.next()
		require.Equal(t, sseEvent{"1", "OrderPlaced", `{"sequence":1}`, ""}, e)
		e, _ = s.next()
		require.Equal(t, sseEvent{"2", "OrderConfirmed", `{"sequence":2,"x":"data: \n"}`, ""}, e)
		s.ended()
		w.subscribed(id, 0)
	})
	t.Run("what was seen is left out", func(t *testing.T) {
		id := w.reader.pending()
		s := w.follow(id, "Last-Event-ID", "1")
		s.order()
		w.hub.Publish(update(id, 1, "OrderPlaced", `{"sequence":1}`))
		w.hub.Publish(update(id, 2, "OrderCancelled", `{"sequence":2}`))
		e, _ := s.next()
		require.Equal(t, "2", e.id)
		s.ended()
	})
	t.Run("what is no JSON did not come from us", func(t *testing.T) {
		id := w.reader.pending()
		s := w.follow(id)
		s.order()
		w.hub.Publish(update(id, 1, "OrderPlaced", "\n\nevent: forged\ndata: {}\n\n"))
		w.hub.Publish(update(id, 2, "Order\r\nConfirmed", `{}`))
		e, _ := s.next()
		require.Equal(t, sseEvent{"2", "Order  Confirmed", `{}`, ""}, e)
		s.ended()
	})
	t.Run("bad Last-Event-ID", func(t *testing.T) {
		path := "/v1/orders/" + w.reader.pending().String() + "/events"
		for _, bad := range []string{"x", "-1", "2147483648", "1.0"} {
			require.Equal(t, "Last-Event-ID", w.refused(w.do(http.MethodGet, path, "", "Last-Event-ID", bad), http.StatusBadRequest, "bad_parameter").Field)
		}
	})
	t.Run("HEAD", func(t *testing.T) {
		a := w.do(http.MethodHead, "/v1/orders/"+w.reader.pending().String()+"/events", "")
		require.Equal(t, http.StatusOK, a.status)
		require.Equal(t, "text/event-stream", a.header.Get("Content-Type"))
	})
	t.Run("the client goes", func(t *testing.T) {
		id := w.reader.pending()
		ctx, leave := context.WithCancel(t.Context())
		r := w.request(http.MethodGet, "/v1/orders/"+id.String()+"/events", "").WithContext(ctx)
		resp, err := w.client.Do(r)
		require.NoError(t, err)
		defer resp.Body.Close()
		w.subscribed(id, 1)
		leave()
		w.subscribed(id, 0)
		require.Eventually(t, func() bool { return len(w.api.streams) == 0 }, 5*time.Second, tick)
	})
	require.Empty(t, w.logs.lines())
}

// TestStreamCatchesUp: an end reached before the subscription is told as the topic would have told it.
func TestStreamCatchesUp(t *testing.T) {
	w := newWorld(t)
	for status, c := range map[domain.Status]struct {
		why  domain.Reason
		name string
		file string
	}{
		domain.Confirmed: {"", "OrderConfirmed", "order-confirmed"},
		domain.Rejected:  {domain.OutOfStock, "OrderRejected", "order-rejected"},
		domain.Cancelled: {domain.CancelledByCustomer, "OrderCancelled", "order-cancelled"},
	} {
		t.Run(c.name, func(t *testing.T) {
			id := w.reader.pending()
			w.reader.ends(id, status, c.why)
			s := w.follow(id, "Last-Event-ID", "1")
			require.Equal(t, OrderStatus(status), s.order().Status)
			e, ok := s.next()
			require.True(t, ok)
			require.Equal(t, "2", e.id)
			require.Equal(t, c.name, e.event)
			schema, err := jsonschema.NewCompiler().Compile("../../schemas/json/" + c.file + ".schema.json")
			require.NoError(t, err)
			v, err := jsonschema.UnmarshalJSON(strings.NewReader(e.data))
			require.NoError(t, err)
			require.NoError(t, schema.Validate(v), e.data)
			s.ended()

			again := w.follow(id, "Last-Event-ID", "2")
			again.order()
			again.ended()
		})
	}
}

func piped(s *setup) { s.pipes = newPipes() }

// The tests below run on synctest's clock, over pipes.

func TestStreamStaysOpen(t *testing.T) {
	_, err := contract()
	require.NoError(t, err)
	certificate := selfSigned(t)
	for name, secure := range map[string]bool{"HTTP/1.1": false, "HTTP/2": true} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, piped, func(s *setup) {
					if secure {
						s.tls = &tls.Config{Certificates: []tls.Certificate{certificate}, MinVersion: tls.VersionTLS12}
					}
				})
				id := w.reader.pending()
				start := time.Now()
				s := w.follow(id)
				s.order()
				n := 0
				for {
					e, ok := s.next()
					if !ok {
						break
					}
					require.Equal(t, "still here", e.comment)
					n++
					require.Equal(t, time.Duration(n)*heartbeat, time.Since(start), "every server timeout is outlived")
				}
				require.NoError(t, s.sc.Err(), "the end is an orderly one")
				require.Equal(t, streamAge, time.Since(start))
				require.InDelta(t, int(streamAge/heartbeat), n, 1, "the last beat meets the end")
			})
		})
	}
}

func selfSigned(t *testing.T) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: time.Unix(0, 0), NotAfter: time.Unix(1<<33, 0)}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
	require.NoError(t, err)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// TestStreamLooksForItself: an event that passed a stream by (its buffer was full, the tail was behind) is made up for.
func TestStreamLooksForItself(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, piped)
		id := w.reader.pending()
		s := w.follow(id)
		s.order()
		start := time.Now()
		w.reader.ends(id, domain.Confirmed, "")
		e, _ := s.next()
		require.Equal(t, "OrderConfirmed", e.event)
		require.LessOrEqual(t, time.Since(start), resyncStream)
		s.ended()
	})
}

// TestF25_SlowReaderOfAStream: a client that opens a stream and does not read is let go.
func TestF25_SlowReaderOfAStream(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, piped)
		id := w.reader.pending()
		c, err := w.pipes.dial()
		require.NoError(t, err)
		defer c.Close()
		_, err = fmt.Fprintf(c, "GET /v1/orders/%s/events HTTP/1.1\r\nHost: x\r\n\r\n", id)
		require.NoError(t, err)
		synctest.Wait()
		require.True(t, w.hub.Wanted(id))
		time.Sleep(streamWrite + time.Second) //nolint:forbidigo // synctest's clock
		synctest.Wait()
		require.False(t, w.hub.Wanted(id))
		require.Empty(t, w.api.streams)
	})
}

func TestWait(t *testing.T) {
	await := func(w *world, key, wait string) <-chan answered {
		got := make(chan answered, 1)
		r := w.request(http.MethodPost, "/v1/orders", tea, "Idempotency-Key", key, "Prefer", "wait="+wait)
		go func() {
			a, err := w.send(r)
			if err != nil {
				w.t.Error(err)
			}
			got <- a
		}()
		return got
	}
	placed := func(w *world) domain.OrderID {
		synctest.Wait()
		w.reader.mu.Lock()
		defer w.reader.mu.Unlock()
		return w.reader.list[len(w.reader.list)-1]
	}
	t.Run("ends with the order", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t, piped)
			start := time.Now()
			got := await(w, "k", "20")
			id := placed(w)
			time.Sleep(2 * time.Second) //nolint:forbidigo // synctest's clock
			w.hub.Publish(update(id, 1, "OrderPlaced", "{}"))
			synctest.Wait()
			require.Empty(t, got, "the order has not ended")
			w.reader.ends(id, domain.Rejected, domain.PaymentDeclined)
			w.hub.Publish(update(id, 2, "OrderRejected", "{}"))
			a := <-got
			require.Equal(t, 2*time.Second, time.Since(start))
			o := w.accepted(a)
			require.Equal(t, OrderStatusRejected, o.Status)
			require.Equal(t, OrderReason("payment_declined"), o.Reason)
			require.Equal(t, "wait=20", a.header.Get("Preference-Applied"))
			stored := w.place("k", tea)
			require.Equal(t, OrderStatusPending, w.accepted(stored).Status, "what is stored stays")
			require.Empty(t, stored.header.Get("Preference-Applied"))
		})
	})
	t.Run("time is up, longer than any timeout of the server", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t, piped, func(s *setup) { s.cfg.MaxWait = 3 * time.Minute })
			start := time.Now()
			a := <-await(w, "k", "1000")
			require.Equal(t, 3*time.Minute, time.Since(start))
			require.Equal(t, OrderStatusPending, w.accepted(a).Status)
			require.Equal(t, "wait=180", a.header.Get("Preference-Applied"))
		})
	})
	t.Run("shutting down", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t, piped)
			got := await(w, "k", "20")
			placed(w)
			start := time.Now()
			w.api.Drain()
			a := <-got
			require.Zero(t, time.Since(start))
			w.accepted(a)
			require.Empty(t, a.header.Get("Preference-Applied"))
			require.Equal(t, a.body, w.place("k", tea).body)
		})
	})
	t.Run("too many wait", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t, piped, func(s *setup) { s.cfg.MaxStreams = 1 })
			first := await(w, "k1", "20")
			id := placed(w)
			start := time.Now()
			a := <-await(w, "k2", "20")
			require.Zero(t, time.Since(start))
			require.Empty(t, a.header.Get("Preference-Applied"))
			w.accepted(a)
			full := w.do(http.MethodGet, "/v1/orders/"+id.String()+"/events", "")
			w.refused(full, http.StatusServiceUnavailable, "overloaded")
			w.reader.ends(id, domain.Confirmed, "")
			w.hub.Publish(update(id, 2, "OrderConfirmed", "{}"))
			require.Equal(t, OrderStatusConfirmed, w.accepted(<-first).Status)
			require.Empty(t, w.api.streams)
		})
	})
	t.Run("the order cannot be read", func(t *testing.T) {
		w := newWorld(t)
		w.reader.fails(awayError{})
		a := w.place("k", tea, "Prefer", "wait=5")
		require.Equal(t, OrderStatusPending, w.accepted(a).Status)
		require.Empty(t, a.header.Get("Preference-Applied"))
	})
	t.Run("the client goes", func(t *testing.T) {
		w := newWorld(t)
		ctx, leave := context.WithCancel(t.Context())
		w.reader.looked = make(chan struct{}, 1)
		gone := make(chan error, 1)
		r := w.request(http.MethodPost, "/v1/orders", tea, "Idempotency-Key", "k", "Prefer", "wait=20").WithContext(ctx)
		go func() { _, err := w.send(r); gone <- err }()
		<-w.reader.looked
		leave()
		require.ErrorIs(t, <-gone, context.Canceled)
		require.Eventually(t, func() bool { return len(w.api.streams) == 0 }, 5*time.Second, tick)
		require.Empty(t, w.logs.lines())
	})
}

// TestNoEndIsMissed: an order that ends between the look at it and the answer of that look is not waited for.
func TestNoEndIsMissed(t *testing.T) {
	t.Run("by a wait", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t, piped)
			w.endsAfterLook()
			start := time.Now()
			require.Equal(t, OrderStatusConfirmed, w.accepted(w.place("k", tea, "Prefer", "wait=20")).Status)
			require.Zero(t, time.Since(start))
		})
	})
	t.Run("by a stream", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t, piped)
			id := w.reader.pending()
			w.endsAfterLook()
			start := time.Now()
			s := w.follow(id)
			require.Equal(t, OrderStatusPending, s.order().Status)
			e, _ := s.next()
			require.Equal(t, "OrderConfirmed", e.event)
			s.ended()
			require.Zero(t, time.Since(start))
		})
	})
}

func (w *world) endsAfterLook() {
	w.reader.after = func(id domain.OrderID) {
		w.reader.ends(id, domain.Confirmed, "")
		w.hub.Publish(update(id, 2, "OrderConfirmed", "{}"))
	}
}

func TestDrain(t *testing.T) {
	w := newWorld(t)
	id := w.reader.pending()
	s := w.follow(id)
	s.order()
	require.Equal(t, http.StatusOK, w.do(http.MethodGet, "/readyz", "").status)
	w.api.Drain()
	w.api.Drain()
	s.ended()
	red := w.do(http.MethodGet, "/readyz", "")
	require.Equal(t, http.StatusServiceUnavailable, red.status)
	require.Contains(t, string(red.body), "shutting down")
	require.Equal(t, http.StatusOK, w.do(http.MethodGet, "/healthz", "").status)
	w.refused(w.do(http.MethodGet, "/v1/orders/"+id.String()+"/events", ""), http.StatusServiceUnavailable, "shutting_down")
	require.Equal(t, http.StatusOK, w.do(http.MethodGet, "/v1/orders/"+id.String(), "").status, "what still comes is answered")
	w.accepted(w.place("k", tea, "Prefer", "wait=20"))
}

func TestHub(t *testing.T) {
	h, id := NewHub(), domain.NewOrderID()
	require.False(t, h.Wanted(id))
	h.Publish(Update{Order: id})
	a, endA := h.Subscribe(id)
	b, endB := h.Subscribe(id)
	require.True(t, h.Wanted(id))
	for i := range updateBuffer * 3 { // nobody reads: what is too much is dropped, and nobody waits
		h.Publish(Update{Order: id, Sequence: int32(i)})
	}
	require.Len(t, a, updateBuffer)
	require.Len(t, b, updateBuffer)
	require.EqualValues(t, 0, (<-a).Sequence)
	endA()
	endA()
	h.Publish(Update{Order: id, Sequence: 99})
	require.Len(t, a, updateBuffer-1, "nothing more comes after the end")
	h.Close()
	h.Close()
	n := 0
	for range b {
		n++
	}
	require.Equal(t, updateBuffer, n)
	endB()
	late, end := h.Subscribe(id)
	_, open := <-late
	require.False(t, open)
	end()
	h.Publish(Update{Order: id})
	require.Empty(t, h.subs, "nothing is kept of orders that nobody waits for")
}

func TestHubSaysWhetherAnybodyWaits(t *testing.T) {
	h, id := NewHub(), domain.NewOrderID()
	waits := func() bool {
		select {
		case <-h.Awaited():
			return true
		default:
			return false
		}
	}
	require.False(t, waits())
	before := h.Awaited()
	_, endA := h.Subscribe(id)
	<-before // whoever rests until then is woken
	_, endB := h.Subscribe(domain.NewOrderID())
	endA()
	endA()
	require.True(t, waits(), "the other one still does")
	endB()
	require.False(t, waits())
	_, end := h.Subscribe(id)
	require.True(t, waits())
	end()
	end()
	require.False(t, waits())
}

func TestHubInTheCrowd(t *testing.T) {
	h := NewHub()
	ids := []domain.OrderID{domain.NewOrderID(), domain.NewOrderID()}
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for n := range 200 {
				c, end := h.Subscribe(ids[n%2])
				h.Publish(Update{Order: ids[n%2], Sequence: int32(n)})
				<-c
				end()
			}
			if i == 0 {
				h.Close()
			}
		})
	}
	wg.Wait()
	require.Empty(t, h.subs)
}
