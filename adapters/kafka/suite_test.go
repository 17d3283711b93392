//go:build unix

package kafka

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"ordersaga/adapters/embedded/testenv"
	"ordersaga/consumers"
	"ordersaga/events"
)

func TestMain(m *testing.M) {
	if os.Getenv(victimVariable) != "" {
		victim()
		return
	}
	testenv.MainNoLeaks(m,
		// The in-process broker's and the HTTP client of the containers' library end a little after their Close.
		goleak.IgnoreAnyFunction("net/http.(*persistConn).readLoop"), goleak.IgnoreAnyFunction("net/http.(*persistConn).writeLoop"),
	)
}

// onBoth runs a test on the in-process broker, and on a real Kafka.
func onBoth(t *testing.T, test func(k *env)) {
	t.Helper()
	t.Run("in-process", func(t *testing.T) { test(newEnv(t, testenv.Kafka(t))) })
	t.Run("kafka", func(t *testing.T) { test(newEnv(t, testenv.RealKafka(t))) })
}

// env is an installation of its own on a broker.
type env struct {
	*testing.T
	brokers []string
	names   events.Names
	c       *Client
	seen    *heard
}

// heard is an Observer that keeps what it hears.
type heard struct {
	mu       sync.Mutex
	problems []string
	assigned map[string]int
	lag      map[string]int64
}

func (h *heard) KafkaProblem(part string, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.problems = append(h.problems, part+": "+err.Error())
}

func (h *heard) KafkaAssigned(group string, n int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.assigned[group] = n
}

func (h *heard) KafkaLag(group, topic string, partition int32, n int64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.lag[fmt.Sprintf("%s %s/%d", group, topic, partition)] = n
}

func (h *heard) KafkaBuffered(string, int, int) {}

func newEnv(t *testing.T, brokers []string) *env {
	t.Helper()
	k := &env{T: t, brokers: brokers, names: events.Names{Prefix: testenv.Prefix(t)}, seen: &heard{assigned: map[string]int{}, lag: map[string]int64{}}}
	k.c = k.client(func(*Config) {})
	return k
}

func (k *env) client(change func(*Config)) *Client {
	k.Helper()
	cfg := Config{Brokers: k.brokers, Names: k.names, Session: 6 * time.Second, Discover: 500 * time.Millisecond, Observer: k.seen}
	change(&cfg)
	c, err := New(cfg)
	require.NoError(k, err)
	k.Cleanup(c.Close)
	return c
}

// topics makes some topics with this many partitions.
func (k *env) topics(partitions int32, names ...events.Topic) {
	k.Helper()
	specs := make([]TopicSpec, 0, len(names))
	for _, n := range names {
		specs = append(specs, TopicSpec{Name: n, Partitions: partitions, Replication: 1, Configs: map[string]string{"max.message.bytes": "1048588"}})
	}
	k.apply(specs)
}

func (k *env) apply(specs []TopicSpec) {
	k.Helper()
	plan, err := k.c.TopicPlan(k.Context(), specs)
	require.NoError(k, err)
	for _, r := range k.c.ApplyTopics(k.Context(), plan) {
		require.NoError(k, r.Err, r.Topic)
	}
}

func (k *env) producer() *Producer {
	k.Helper()
	p, err := k.c.NewProducer(ProducerConfig{})
	require.NoError(k, err)
	k.Cleanup(p.Close)
	return p
}

// produce sends records and waits until the broker has them.
func (k *env) produce(p *Producer, recs ...events.Record) {
	k.Helper()
	var mu sync.Mutex
	var errs []error
	for _, r := range recs {
		p.Produce(k.Context(), r, func(err error) {
			mu.Lock()
			defer mu.Unlock()
			errs = append(errs, err)
		})
	}
	require.NoError(k, p.Flush(k.Context()))
	mu.Lock()
	defer mu.Unlock()
	require.Len(k, errs, len(recs))
	require.NoError(k, errors.Join(errs...))
}

// message is a message of ours as a record.
func message(name events.Name, order uuid.UUID) events.Record {
	e := events.Envelope{ID: events.NewID(), Type: name, OrderID: order}
	typ, _ := events.TypeOf(name)
	e.Data = typ.New()
	switch d := e.Data.(type) {
	case *events.PlaceOrder:
		d.OrderID = order.String()
	case *events.OrderEvent:
		d.OrderID, d.Sequence, e.Sequence = order.String(), 1, 1
	}
	value, err := events.Encode(e)
	if err != nil {
		panic(err)
	}
	return events.Record{Topic: typ.Topic, Key: []byte(order.String()), Value: value, Headers: events.HeadersOf(e)}
}

func messages(name events.Name, n int) []events.Record {
	out := make([]events.Record, n)
	for i := range out {
		out[i] = message(name, uuid.Must(uuid.NewV7()))
	}
	return out
}

// ledger is a handler that counts effects, in the transaction of a memory store.
type ledger struct {
	mu      sync.Mutex
	effects map[uuid.UUID]int
	order   []consumers.Delivery
	at      []time.Time
	tries   map[uuid.UUID]int
	prepare func(ctx context.Context, batch []*consumers.Delivery) error
	fail    func(d *consumers.Delivery, try int) error
}

func newLedger() *ledger { return &ledger{effects: map[uuid.UUID]int{}, tries: map[uuid.UUID]int{}} }

func (l *ledger) Prepare(ctx context.Context, batch []*consumers.Delivery) (consumers.Apply[*consumers.MemoryTx], error) {
	if l.prepare != nil {
		if err := l.prepare(ctx, batch); err != nil {
			return nil, err
		}
	}
	return func(_ context.Context, tx *consumers.MemoryTx, part []*consumers.Delivery) ([]consumers.Result, error) {
		out := make([]consumers.Result, len(part))
		for i, d := range part {
			l.mu.Lock()
			l.tries[d.ID]++
			try := l.tries[d.ID]
			l.mu.Unlock()
			if l.fail != nil {
				out[i].Err = l.fail(d, try)
			}
			if out[i].Err == nil {
				tx.OnCommit(func() {
					l.mu.Lock()
					defer l.mu.Unlock()
					l.effects[d.ID]++
					l.order, l.at = append(l.order, *d), append(l.at, time.Now())
				})
			}
		}
		return out, nil
	}, nil
}

func (l *ledger) count() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.effects)
}

// exactlyOnce expects one effect of each.
func (l *ledger) exactlyOnce(t *testing.T, recs []events.Record) {
	t.Helper()
	l.mu.Lock()
	defer l.mu.Unlock()
	for i := range recs {
		require.Equal(t, 1, l.effects[events.Identity(&recs[i])], "record %d", i)
	}
	require.Len(t, l.effects, len(recs))
}

func eventually(t *testing.T, within time.Duration, what string, ok func() bool) {
	t.Helper()
	require.Eventually(t, ok, within, 20*time.Millisecond, what)
}

var tiers = []time.Duration{300 * time.Millisecond, time.Second}

func commandGroup(k *env, mem *consumers.Memory, l *ledger) *consumers.Group[*consumers.MemoryTx] {
	k.Helper()
	g, err := consumers.NewGroup[*consumers.MemoryTx](consumers.GroupConfig{
		Name: events.GroupOrderCommands, Topic: events.TopicCommands, Policy: consumers.Policy{Delays: tiers},
	}, mem, l)
	require.NoError(k, err)
	return g
}

// runs starts something that ends with its context, and answers how to stop it and wait.
func runs(k *env, run func(context.Context) error) (stop func()) {
	ctx, cancel := context.WithCancel(context.WithoutCancel(k.Context()))
	done := make(chan error, 1)
	go func() { done <- run(ctx) }()
	var once sync.Once
	stop = func() {
		once.Do(func() {
			cancel()
			select {
			case err := <-done:
				if err != nil {
					k.Errorf("ended with %v", err)
				}
			case <-time.After(30 * time.Second):
				k.Errorf("did not stop")
			}
		})
	}
	k.Cleanup(stop)
	return stop
}

func (k *env) source(c *Client, g *consumers.Group[*consumers.MemoryTx], change func(*SourceConfig)) (stop func()) {
	k.Helper()
	cfg := SourceConfig{Group: g.Name(), Topic: g.Topic()}
	change(&cfg)
	s, err := c.NewSource(cfg)
	require.NoError(k, err)
	return runs(k, func(ctx context.Context) error { return s.Run(ctx, g.Handle) })
}

// committed sums a group's committed offsets on a topic, and its lag.
func (k *env) committed(group events.Group, topic events.Topic) (committed, lag int64) {
	k.Helper()
	lags, err := k.c.Lags(k.Context(), map[events.Group][]events.Topic{group: {topic}})
	require.NoError(k, err)
	for _, l := range lags {
		committed += max(0, l.Committed)
		lag += l.Records
	}
	return committed, lag
}

// relay carries what a memory store's transactions leave, as outbox.Relay does from the database.
func relay(k *env, mem *consumers.Memory, p *Producer) (stop func()) {
	return runs(k, func(ctx context.Context) error {
		tick := time.NewTicker(5 * time.Millisecond)
		defer tick.Stop()
		for {
			_, raw := mem.Drain()
			for _, r := range raw {
				p.Produce(context.WithoutCancel(ctx), events.Record{Topic: r.Topic, Key: r.Key, Value: r.Value, Headers: r.Headers}, func(err error) {
					if err != nil {
						k.Errorf("produce: %v", err)
					}
				})
			}
			select {
			case <-ctx.Done():
				return nil
			case <-tick.C:
			}
		}
	})
}

type away struct{}

func (away) Error() string  { return "no route to host" }
func (away) Outage() string { return "payment" }

func shuffledKeys(n int) []uuid.UUID {
	keys := make([]uuid.UUID, n)
	for i := range keys {
		keys[i] = uuid.New()
	}
	return slices.Clip(keys)
}
