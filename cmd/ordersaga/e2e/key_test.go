//go:build linux

package e2e

import (
	"bytes"
	"encoding/json"
	"io"
	"net/http"
	"sync"
	"testing"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"

	"ordersaga/adapters/httpapi"
)

// answered is what one post came to.
type answered struct {
	status     int
	body       []byte
	location   string
	retryAfter string
	err        error
}

func (s *system) post(key string, body []byte) (a answered) {
	req, err := http.NewRequestWithContext(s.tb.Context(), http.MethodPost, "http://"+s.addr+"/v1/orders", bytes.NewReader(body))
	if err != nil {
		return answered{err: err}
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("Idempotency-Key", key)
	resp, err := s.http.Do(req)
	if err != nil {
		return answered{err: err}
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return answered{resp.StatusCode, b, resp.Header.Get("Location"), resp.Header.Get("Retry-After"), err}
}

// TestSixteenPostsOneKey: sixteen posts of one key at the same time make one order and one charge, and all that are answered 202 are
// answered alike, byte for byte; so is the same post after the order has ended and after a restart.
func TestSixteenPostsOneKey(t *testing.T) {
	t.Parallel()
	s := newSystem(t, options{})
	p := s.serve("serve")
	// A second copy: what one process may hold in memory does not help, and the posts are spread over both.
	second := &system{tb: t, addr: freeAddr(t), http: s.http}
	other := s.launch("second", "ORDERSAGA_HTTP_ADDR="+second.addr)
	s.awaitReady(other, second.addr)
	s.product("KEY-1", 700, 100)
	for round := range 5 {
		// Without an order_id: only the key says that it is the same order.
		body := []byte(`{"customer_id":"e2e","currency":"EUR","items":[{"sku":"KEY-1","quantity":1}],"payment_method":"pm_card_visa"}`)
		key := uuid.NewString()
		const posts = 16
		answers := make([]answered, posts)
		begin := make(chan struct{})
		var wg sync.WaitGroup
		for i := range posts {
			wg.Go(func() {
				<-begin
				answers[i] = []*system{s, second}[i%2].post(key, body)
			})
		}
		close(begin)
		wg.Wait()
		var first *answered
		for i := range answers {
			a := &answers[i]
			require.NoError(t, a.err)
			if a.status == http.StatusConflict {
				require.Contains(t, string(a.body), `"in_flight"`)
				continue
			}
			require.Equal(t, http.StatusAccepted, a.status, "%s", a.body)
			if first == nil {
				first = a
			}
			require.Equal(t, string(first.body), string(a.body))
			require.Equal(t, first.location, a.location)
		}
		require.NotNil(t, first, "round %d: nobody was answered 202", round)
		var o httpapi.OrderAccepted
		require.NoError(t, json.Unmarshal(first.body, &o))
		require.Equal(t, "confirmed", outcome(s.await(o.OrderID, settleWithin)))
		require.Len(t, s.ids(), round+1)
		again := s.post(key, body)
		require.Equal(t, string(first.body), string(again.body), "the stored answer says pending, though the order has ended")
		reused := second.post(key, append(body, ' '))
		require.Equal(t, http.StatusUnprocessableEntity, reused.status, "%s", reused.body)
		require.Contains(t, string(reused.body), `"key_reused"`)
		if round == 0 {
			p.stop(t)
			p = s.serve("serve-again")
			require.Equal(t, string(first.body), string(s.post(key, body).body))
		}
	}
	intents, _ := s.ledger()
	require.Len(t, intents, 5)
	for id, is := range intents {
		require.Len(t, is, 1, "order %s", id)
		require.EqualValues(t, 700, is[0].AmountReceived)
	}
	require.EqualValues(t, 5, s.stock("KEY-1").Sold)
	s.clean()
	s.sums(s.ids())
	p.stop(t)
	other.stop(t)
}
