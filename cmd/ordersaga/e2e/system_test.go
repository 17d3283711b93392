//go:build linux

package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"
	"github.com/twmb/franz-go/pkg/kadm"
	"github.com/twmb/franz-go/pkg/kgo"

	"ordersaga/adapters/embedded/testenv"
	"ordersaga/adapters/httpapi"
	"ordersaga/cmd/ordersaga/internal/apiclient"
	"ordersaga/cmd/ordersaga/internal/audit"
	"ordersaga/cmd/ordersaga/internal/simulator"
)

const (
	gatewayKey = "sk_test_e2e"
	tick       = 25 * time.Millisecond
	// readyWithin bounds a start, with the race detector on a machine that is busy.
	readyWithin = 45 * time.Second
	// insistFor bounds the tries of one customer.
	insistFor = 2 * time.Minute
	// settleWithin bounds the end of orders that nothing stands in the way of any more.
	settleWithin = 60 * time.Second
)

// system is a Kafka, a Postgres, a payment gateway, and the environment that joins the program to them.
type system struct {
	tb      testing.TB
	brokers []string
	prefix  string
	db      string
	gateway string // base URL of the simulator
	addr    string // where serve listens
	env     []string
	api     *apiclient.Client
	http    *http.Client
}

// options are where a system differs from the usual one.
type options struct {
	brokers []string // default: the shared real Kafka
	db      string   // default: a database of the shared server
	env     []string // settings, which win
}

// newSystem prepares everything but the service itself: schema, topics, a running gateway.
func newSystem(tb testing.TB, o options) *system {
	tb.Helper()
	s := &system{tb: tb, brokers: o.brokers, db: o.db, prefix: testenv.Prefix(tb), addr: freeAddr(tb), http: &http.Client{Timeout: 15 * time.Second}}
	if s.brokers == nil {
		s.brokers = testenv.RealKafka(tb)
	}
	if s.db == "" {
		s.db = testenv.Postgres(tb)
	}
	s.gateway = startGateway(tb)
	s.env = append([]string{
		"ORDERSAGA_DATABASE_URL=" + s.db,
		"ORDERSAGA_KAFKA_BROKERS=" + strings.Join(s.brokers, ","),
		"ORDERSAGA_KAFKA__TOPIC_PREFIX=" + s.prefix,
		"ORDERSAGA_KAFKA__PARTITIONS=4",
		"ORDERSAGA_KAFKA__REPLICATION=1",
		"ORDERSAGA_PAYMENT_URL=" + s.gateway,
		"ORDERSAGA_PAYMENT_API_KEY=" + gatewayKey, "ORDERSAGA_PAYMENT__RATE=10000", "ORDERSAGA_PAYMENT__BURST=10000",
		"ORDERSAGA_HTTP_ADDR=" + s.addr,
		"ORDERSAGA_HTTP__OPEN=true",
		"ORDERSAGA_HTTP__RATE_PER_CALLER=100000",
		"ORDERSAGA_HTTP__BURST_PER_CALLER=100000",
		"ORDERSAGA_RETRY__DELAYS=200ms,1s,3s",
		"ORDERSAGA_URL=http://" + s.addr,
	}, o.env...)
	var err error
	s.api, err = apiclient.New("http://"+s.addr, "")
	require.NoError(tb, err)
	must(tb, s.env, "migrate", "up")
	must(tb, s.env, "topics", "apply", "--yes")
	return s
}

// with is the system as a part of the test sees it.
func (s *system) with(tb testing.TB) *system {
	tb.Helper()
	part := *s
	part.tb = tb
	return &part
}

// freeAddr chooses a port below those that the kernel gives to outgoing connections: it must still be free after the service was killed.
func freeAddr(tb testing.TB) string {
	tb.Helper()
	for range 100 {
		addr := net.JoinHostPort("127.0.0.1", strconv.Itoa(15000+rand.IntN(15000)))
		l, err := (&net.ListenConfig{}).Listen(tb.Context(), "tcp", addr)
		if err == nil {
			require.NoError(tb, l.Close())
			return addr
		}
	}
	require.FailNow(tb, "no free port")
	return ""
}

var gatewayAt = regexp.MustCompile(`payment gateway simulator at (http://\S+)`)

// startGateway starts the simulator as a process and answers where it listens.
func startGateway(tb testing.TB) string {
	tb.Helper()
	p := launch(tb, "simulator", nil, "simulator", "--addr", "127.0.0.1:0", "--api-key", gatewayKey)
	at := ""
	require.Eventually(tb, func() bool {
		if m := gatewayAt.FindStringSubmatch(p.said(tb)); m != nil {
			at = m[1]
		}
		return at != "" || p.ended()
	}, readyWithin, tick)
	require.NotEmpty(tb, at, "the simulator did not start: %s", p.said(tb))
	return at
}

// faults sets what goes wrong at the gateway from now on.
func (s *system) faults(f simulator.Faults) {
	s.tb.Helper()
	b, err := json.Marshal(f)
	require.NoError(s.tb, err)
	resp := s.gatewayCall(http.MethodPut, "/_control", b)
	require.Contains(s.tb, string(resp), "{")
}

func (s *system) gatewayCall(method, path string, body []byte) []byte {
	s.tb.Helper()
	req, err := http.NewRequestWithContext(s.tb.Context(), method, s.gateway+path, bytes.NewReader(body))
	require.NoError(s.tb, err)
	req.Header.Set("Authorization", "Bearer "+gatewayKey)
	resp, err := s.http.Do(req)
	require.NoError(s.tb, err)
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	require.NoError(s.tb, err)
	require.Equal(s.tb, http.StatusOK, resp.StatusCode, "%s", b)
	return b
}

// intent is what the gateway's own list says of a payment.
type intent struct {
	ID             string            `json:"id"`
	Status         string            `json:"status"`
	Amount         int64             `json:"amount"`
	AmountReceived int64             `json:"amount_received"`
	Metadata       map[string]string `json:"metadata"`
}

// ledger reads the gateway's books through its API: intents by order, and what was refunded of each.
func (s *system) ledger() (intents map[string][]intent, refunded map[string]int64) {
	s.tb.Helper()
	intents, refunded = map[string][]intent{}, map[string]int64{}
	pages(s, "/v1/payment_intents", func(i intent) string {
		id := i.Metadata["order_id"]
		intents[id] = append(intents[id], i)
		return i.ID
	})
	type refund struct {
		ID     string `json:"id"`
		Intent string `json:"payment_intent"`
		Amount int64  `json:"amount"`
		Status string `json:"status"`
	}
	pages(s, "/v1/refunds", func(r refund) string {
		refunded[r.Intent] += r.Amount
		return r.ID
	})
	return intents, refunded
}

func pages[T any](s *system, path string, each func(T) (id string)) {
	s.tb.Helper()
	after := ""
	for {
		q := url.Values{"limit": {"100"}}
		if after != "" {
			q.Set("starting_after", after)
		}
		var page struct {
			Data    []T  `json:"data"`
			HasMore bool `json:"has_more"`
		}
		require.NoError(s.tb, json.Unmarshal(s.gatewayCall(http.MethodGet, path+"?"+q.Encode(), nil), &page))
		for _, v := range page.Data {
			after = each(v)
		}
		if !page.HasMore {
			return
		}
	}
}

// serve starts the service and waits until it is ready. more are settings of this process.
func (s *system) serve(name string, more ...string) *process {
	s.tb.Helper()
	p := s.launch(name, more...)
	s.awaitReady(p, s.addr)
	return p
}

// launch starts the service and does not wait.
func (s *system) launch(name string, more ...string) *process {
	s.tb.Helper()
	return launch(s.tb, name, append(append([]string{}, s.env...), more...), "serve")
}

// ready asks once whether a process can do its work.
func (s *system) ready(addr string) bool {
	ctx, cancel := context.WithTimeout(s.tb.Context(), 3*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+addr+"/readyz", nil)
	if err != nil {
		return false
	}
	resp, err := s.http.Do(req)
	if err != nil {
		return false
	}
	defer resp.Body.Close()
	return resp.StatusCode == http.StatusOK
}

func (s *system) awaitReady(p *process, addr string) {
	s.tb.Helper()
	require.Eventually(s.tb, func() bool { return p.ended() || s.ready(addr) }, readyWithin, tick, "%s is not ready", p.name)
	require.False(s.tb, p.ended(), "%s ended at its start: %v\n%s", p.name, p.end(), tail(p.said(s.tb), shownOnFailure))
}

// product puts a product into the catalogue, with so many on hand.
func (s *system) product(sku string, price, onHand int64) {
	s.tb.Helper()
	err := s.api.Do(s.tb.Context(), http.MethodPut, "/v1/products/"+sku, nil, nil,
		httpapi.PutProduct{Name: sku, UnitPriceMinor: price, Currency: "EUR", OnHand: &onHand}, nil)
	require.NoError(s.tb, err)
}

func (s *system) stock(sku string) (p httpapi.Product) {
	s.tb.Helper()
	require.NoError(s.tb, s.api.Do(s.tb.Context(), http.MethodGet, "/v1/products/"+sku, nil, nil, nil, &p))
	return p
}

// placing is the body of an order.
func placing(id uuid.UUID, method string, items ...httpapi.PlaceOrderItem) httpapi.PlaceOrder {
	return httpapi.PlaceOrder{OrderID: &id, CustomerID: "e2e", Currency: "EUR", PaymentMethod: method, Items: items}
}

func item(sku string, n int64) httpapi.PlaceOrderItem {
	return httpapi.PlaceOrderItem{SKU: sku, Quantity: n}
}

const (
	goodCard = "pm_card_visa"
	badCard  = "pm_card_chargeDeclined"
)

// order places one of one line, under its id as the key, and answers the id.
func (s *system) order(sku string, n int64) uuid.UUID {
	s.tb.Helper()
	id := uuid.Must(uuid.NewV7())
	require.NoError(s.tb, s.place(placing(id, goodCard, item(sku, n))))
	return id
}

func (s *system) place(b httpapi.PlaceOrder) error {
	return s.api.Do(s.tb.Context(), http.MethodPost, "/v1/orders", nil, http.Header{"Idempotency-Key": {b.OrderID.String()}}, b, nil)
}

// insist places an order through whatever happens to the service, under its id as the key, as a client that wants to know would.
// It answers the refusal, if the service refuses the order itself.
func (s *system) insist(ctx context.Context, b httpapi.PlaceOrder) error {
	ctx, cancel := context.WithTimeout(ctx, insistFor)
	defer cancel()
	for {
		err := s.place(b)
		var p *apiclient.ProblemError
		switch {
		case err == nil:
			return nil
		case errors.As(err, &p) && p.Status < 500 && p.Status != http.StatusTooManyRequests && p.Code != "in_flight":
			return err
		}
		if pause(ctx, 50*time.Millisecond) != nil {
			return fmt.Errorf("gave up after %s: %w", insistFor, err)
		}
	}
}

// pause is a client's pause between two tries.
func pause(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// look reads an order; nil if the service does not have it or does not answer.
func (s *system) look(id uuid.UUID) *httpapi.Order {
	var o httpapi.Order
	if err := s.api.Do(s.tb.Context(), http.MethodGet, "/v1/orders/"+id.String(), nil, nil, nil, &o); err != nil {
		return nil
	}
	return &o
}

func over(o *httpapi.Order) bool {
	return o != nil && (o.Saga.State == httpapi.SagaPhaseCompleted || o.Saga.State == httpapi.SagaPhaseCompensated)
}

// await waits until an order's saga has ended and answers the order.
func (s *system) await(id uuid.UUID, within time.Duration) *httpapi.Order {
	s.tb.Helper()
	var o *httpapi.Order
	ok := waitFor(within, func() bool {
		if got := s.look(id); got != nil {
			o = got
		}
		return over(o)
	})
	if !ok {
		shown, err := json.Marshal(o)
		require.NoError(s.tb, err)
		require.FailNow(s.tb, "the order does not end", "%s after %s: %s\n%s", id, within, shown, command(s.tb, s.env, "sagas", "show", id.String()).out)
	}
	return o
}

// waitFor asks every tick until it is so or the time is up.
func waitFor(within time.Duration, so func() bool) bool {
	ctx, cancel := context.WithTimeout(context.Background(), within)
	defer cancel()
	for {
		if so() {
			return true
		}
		if pause(ctx, tick) != nil {
			return false
		}
	}
}

// outcome is an order's end in a word.
func outcome(o *httpapi.Order) string {
	if o.Reason == "" {
		return string(o.Status)
	}
	return string(o.Status) + " (" + string(o.Reason) + ")"
}

// clean runs `ordersaga audit` until it is clean: the last acknowledgements come a moment after the last order.
func (s *system) clean() *audit.Report {
	s.tb.Helper()
	var r result
	waitFor(settleWithin, func() bool {
		r = command(s.tb, s.env, "audit", "-o", "json")
		return r.code == 0
	})
	require.Zero(s.tb, r.code, "the books are not clean:\n%s%s", r.out, r.err)
	var rep audit.Report
	require.NoError(s.tb, json.Unmarshal([]byte(r.out), &rep))
	require.True(s.tb, rep.Clean)
	require.False(s.tb, rep.NoLedger)
	return &rep
}

// sums compares, without the product's own audit, every order with the gateway's books and the public topic: a confirmed order was
// paid once and in full, every other one not at all, and each told of itself in the order of its sequence numbers, its end last.
func (s *system) sums(ids []uuid.UUID) (confirmed int) {
	s.tb.Helper()
	intents, refunded := s.ledger()
	told := s.events()
	for _, id := range ids {
		o := s.look(id)
		require.NotNil(s.tb, o, "order %s was accepted and is lost", id)
		require.True(s.tb, over(o), "order %s has not ended: %s, %s", id, o.Status, o.Saga.State)
		var kept int64
		captured := 0
		for _, i := range intents[id.String()] {
			kept += i.AmountReceived - refunded[i.ID]
			if i.AmountReceived > refunded[i.ID] {
				captured++
			}
			require.NotEqual(s.tb, "requires_capture", i.Status, "order %s: money is still held", id)
		}
		want := int64(0)
		if o.Status == httpapi.OrderStatusConfirmed {
			want = o.TotalMinor
			confirmed++
			require.Equal(s.tb, 1, captured, "order %s: charges", id)
		}
		require.Equal(s.tb, want, kept, "order %s is %s: money kept by the gateway", id, o.Status)
		require.Equal(s.tb, tale(o), told[id], "order %s: public events in the order of their first occurrence", id)
	}
	return confirmed
}

// tale is what an ended order told of itself. One that was refused as a command was never placed.
func tale(o *httpapi.Order) []string {
	switch end := map[httpapi.OrderStatus]string{
		httpapi.OrderStatusConfirmed: "OrderConfirmed", httpapi.OrderStatusRejected: "OrderRejected", httpapi.OrderStatusCancelled: "OrderCancelled",
	}[o.Status]; o.Reason {
	case httpapi.OrderReasonUnknownProduct, httpapi.OrderReasonPriceChanged, httpapi.OrderReasonInvalid:
		return []string{"1 " + end}
	default:
		return []string{"1 OrderPlaced", "2 " + end}
	}
}

// events reads orders.events.v1 to its present end: for each order what it told of itself, duplicates left out.
func (s *system) events() map[uuid.UUID][]string {
	s.tb.Helper()
	told := map[uuid.UUID][]string{}
	seen := map[string]bool{}
	s.read("orders.events.v1", func(r *kgo.Record) {
		var e struct {
			OrderID  uuid.UUID `json:"order_id"`
			Sequence int       `json:"sequence"`
		}
		require.NoError(s.tb, json.Unmarshal(r.Value, &e), "%s", r.Value)
		require.Equal(s.tb, e.OrderID.String(), string(r.Key))
		key := fmt.Sprintf("%s %d", e.OrderID, e.Sequence)
		if seen[key] {
			return
		}
		seen[key] = true
		told[e.OrderID] = append(told[e.OrderID], fmt.Sprintf("%d %s", e.Sequence, shortType(header(r, "ce_type"))))
	})
	return told
}

func shortType(ceType string) string { return ceType[strings.LastIndexByte(ceType, '.')+1:] }

func header(r *kgo.Record, key string) string {
	for _, h := range r.Headers {
		if h.Key == key {
			return string(h.Value)
		}
	}
	return ""
}

// read reads a topic (without the prefix) from its beginning to its present end.
func (s *system) read(topic string, each func(*kgo.Record)) {
	s.tb.Helper()
	ctx, cancel := context.WithTimeout(s.tb.Context(), 30*time.Second)
	defer cancel()
	cl := s.kafka(kgo.ConsumeTopics(s.prefix+topic), kgo.ConsumeResetOffset(kgo.NewOffset().AtStart()))
	ends := s.ends(ctx, cl, topic)
	for len(ends) > 0 {
		fs := cl.PollFetches(ctx)
		require.NoError(s.tb, fs.Err())
		fs.EachRecord(func(r *kgo.Record) {
			if end, open := ends[r.Partition]; open {
				if r.Offset < end {
					each(r)
				}
				if r.Offset >= end-1 {
					delete(ends, r.Partition)
				}
			}
		})
	}
}

// publish sends a record to a topic (without the prefix) and waits for the acknowledgement.
func (s *system) publish(ctx context.Context, cl *kgo.Client, topic, key string, value []byte, headers ...kgo.RecordHeader) error {
	return cl.ProduceSync(ctx, &kgo.Record{Topic: s.prefix + topic, Key: []byte(key), Value: value, Headers: headers}).FirstErr()
}

func (s *system) kafka(opts ...kgo.Opt) *kgo.Client {
	s.tb.Helper()
	cl, err := kgo.NewClient(append([]kgo.Opt{kgo.SeedBrokers(s.brokers...)}, opts...)...)
	require.NoError(s.tb, err)
	s.tb.Cleanup(cl.Close)
	return cl
}

// sql opens a connection of the test's own.
func (s *system) sql() *pgx.Conn {
	s.tb.Helper()
	conn, err := pgx.Connect(s.tb.Context(), s.db)
	require.NoError(s.tb, err)
	s.tb.Cleanup(func() { _ = conn.Close(context.WithoutCancel(s.tb.Context())) }) // the server may be gone
	return conn
}

func (s *system) count(conn *pgx.Conn, query string, args ...any) (n int64) {
	s.tb.Helper()
	require.NoError(s.tb, conn.QueryRow(s.tb.Context(), query, args...).Scan(&n))
	return n
}

// writeFile writes a file of the test's own and answers its path.
func writeFile(tb testing.TB, name, content string) string {
	tb.Helper()
	path := filepath.Join(tb.TempDir(), name)
	require.NoError(tb, os.WriteFile(path, []byte(content), 0o600))
	return path
}

// ends answers where the partitions of a topic that hold records end now.
func (s *system) ends(ctx context.Context, cl *kgo.Client, topic string) map[int32]int64 {
	s.tb.Helper()
	admin := kadm.NewClient(cl)
	starts, err := admin.ListStartOffsets(ctx, s.prefix+topic)
	require.NoError(s.tb, err)
	ends, err := admin.ListEndOffsets(ctx, s.prefix+topic)
	require.NoError(s.tb, err)
	out := map[int32]int64{}
	ends.Each(func(o kadm.ListedOffset) {
		if start, ok := starts.Lookup(o.Topic, o.Partition); ok && start.Offset < o.Offset {
			out[o.Partition] = o.Offset
		}
	})
	return out
}
