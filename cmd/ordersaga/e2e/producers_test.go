//go:build linux

package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"
	"github.com/twmb/franz-go/pkg/kgo"
	"google.golang.org/protobuf/proto"

	"ordersaga/adapters/httpapi"
	"ordersaga/cmd/ordersaga/internal/apiclient"
	"ordersaga/schemas/ordersv1"
)

// lacking fails where nothing may be skipped, and skips loudly elsewhere.
func lacking(tb testing.TB, what string, err error) {
	tb.Helper()
	if err == nil {
		return
	}
	if os.Getenv("CI") == "true" {
		tb.Fatalf("%s cannot be had, and CI=true forbids to skip: %v", what, err)
	}
	tb.Skipf("SKIPPED, NOT PASSED: %s cannot be had: %v", what, err)
}

// run runs a tool that is not ours.
func run(tb testing.TB, in, tool string, args ...string) {
	tb.Helper()
	ctx, cancel := context.WithTimeout(tb.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, tool, args...) //nolint:gosec // tools that the test names
	cmd.Stdin = strings.NewReader(in)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err := fork(cmd)
	if err == nil {
		err = cmd.Wait()
	}
	require.NoError(tb, err, "%s %s\n%s", tool, strings.Join(args, " "), out.String())
}

// kcat publishes one command as a person at a terminal would: a key, a type, a body, and no id.
func (s *system) kcat(key, ceType, body string) {
	s.tb.Helper()
	run(s.tb, body+"\n", "kcat", "-b", strings.Join(s.brokers, ","), "-P", "-t", s.prefix+"orders.commands.v1", "-k", key, "-H", "ce_type="+ceType)
}

// python is a producer on confluent-kafka: a record for each line of its input, {"key", "headers", "value"}.
const python = `
import json, sys
from confluent_kafka import Producer

failed = []
producer = Producer({"bootstrap.servers": sys.argv[1], "acks": "all"})
for line in sys.stdin:
    r = json.loads(line)
    producer.produce(sys.argv[2], key=r["key"], value=json.dumps(r["value"]), headers=list(r["headers"].items()),
                     on_delivery=lambda err, msg: failed.append(err) if err else None)
producer.flush(30)
sys.exit(str(failed) if failed else 0)
`

const (
	placeOrder  = "ordersaga.orders.v1.PlaceOrder"
	cancelOrder = "ordersaga.orders.v1.CancelOrder"
)

func commandBody(tb testing.TB, b httpapi.PlaceOrder) string {
	tb.Helper()
	raw, err := json.Marshal(b)
	require.NoError(tb, err)
	return string(raw)
}

// letters lists the dead letters of an order, by the command line.
func (s *system) letters(args ...string) (ls []httpapi.DeadLetter) {
	s.tb.Helper()
	require.NoError(s.tb, json.Unmarshal([]byte(must(s.tb, s.env, append([]string{"dlq", "list", "-o", "json"}, args...)...)), &ls))
	return ls
}

// letter waits for the one dead letter of an order.
func (s *system) letter(order string) httpapi.DeadLetter {
	s.tb.Helper()
	var ls []httpapi.DeadLetter
	require.True(s.tb, waitFor(settleWithin, func() bool {
		ls = s.letters("--order", order)
		return len(ls) > 0
	}), "no dead letter of order %s", order)
	require.Len(s.tb, ls, 1)
	return ls[0]
}

// TestKcatAndPythonProducers: producers that know nothing of us place and cancel orders on the command topic, in plain JSON. What is wrong
// with a command is told in words, and it blocks nobody; after its cause is gone a replay finishes the order, once (F15).
func TestKcatAndPythonProducers(t *testing.T) {
	t.Parallel()
	s := newSystem(t, options{})
	p := s.serve("serve")
	s.product("TOPIC-1", 1290, 1000)

	t.Run("kcat", func(t *testing.T) {
		s := s.with(t)
		_, err := exec.LookPath("kcat")
		lacking(t, "kcat", err)
		good, gone, malformed, keyless := uuid.Must(uuid.NewV7()), uuid.Must(uuid.NewV7()), uuid.Must(uuid.NewV7()), uuid.Must(uuid.NewV7())
		s.kcat(malformed.String(), placeOrder, fmt.Sprintf(`{"order_id":"%s","customer_id":"c-17","currency":"EUR","items":[{"sku":"TOPIC-1","quantity":"2"}]}`, malformed))
		s.kcat(keyless.String(), placeOrder, `{"customer_id":"c-17"}`)
		s.kcat(good.String(), placeOrder, commandBody(t, placing(good, goodCard, item("TOPIC-1", 2))))
		s.kcat(gone.String(), placeOrder, commandBody(t, placing(gone, goodCard, item("TOPIC-GONE", 1))))
		require.Equal(t, "confirmed", outcome(s.await(good, settleWithin)))
		require.Equal(t, "rejected (unknown_product)", outcome(s.await(gone, settleWithin)), "a command that decodes is refused, not a dead letter")
		l := s.letter(malformed.String())
		require.Equal(t, "order-commands", l.Group)
		require.Equal(t, "poison", l.Class)
		require.Equal(t, httpapi.DeadLetterStatusOpen, l.Status)
		require.Equal(t, "orders.commands.v1", l.Topic, "as the contract names it, without the installation's prefix")
		require.Contains(t, l.Reason, `field "items.quantity" of PlaceOrder is a JSON string, must be an integer`)
		require.Contains(t, s.letter(keyless.String()).Reason, "has no order_id: add it")
		shown := must(t, s.env, "dlq", "show", l.ID.String())
		require.Contains(t, shown, "items.quantity")
		require.NotContains(t, shown, "c-17", "personal data is shown only when asked for")
		require.Contains(t, must(t, s.env, "dlq", "show", "--full", l.ID.String()), "c-17")
		buried := map[string]*kgo.Record{}
		require.True(t, waitFor(settleWithin, func() bool {
			s.read("dlq.order-commands", func(r *kgo.Record) { buried[string(r.Key)] = r })
			return buried[malformed.String()] != nil
		}), "the dead-letter topic has it too")
		r := buried[malformed.String()]
		require.Equal(t, s.prefix+"orders.commands.v1", s.prefix+header(r, "__dlq.errors.topic"))
		require.Equal(t, fmt.Sprint(l.Partition), header(r, "__dlq.errors.partition"))
		require.Equal(t, fmt.Sprint(l.Offset), header(r, "__dlq.errors.offset"))
		require.Equal(t, "order-commands", header(r, "__dlq.errors.group"))
		require.Equal(t, "1", header(r, "__dlq.errors.delivery.count"))
		require.Contains(t, header(r, "__dlq.errors.message"), "items.quantity")
	})

	t.Run("Protobuf", func(t *testing.T) {
		s := s.with(t)
		id := uuid.Must(uuid.NewV7())
		body, err := proto.Marshal(&ordersv1.PlaceOrder{
			OrderId: id.String(), CustomerId: "c-19", Currency: "EUR", PaymentMethod: goodCard, Items: []*ordersv1.OrderItem{{Sku: "TOPIC-1", Quantity: 2}},
		})
		require.NoError(t, err)
		require.NoError(t, s.publish(t.Context(), s.kafka(), "orders.commands.v1", id.String(), body,
			kgo.RecordHeader{Key: "ce_type", Value: []byte(placeOrder)}, kgo.RecordHeader{Key: "content-type", Value: []byte("application/protobuf")}))
		o := s.await(id, settleWithin)
		require.Equal(t, "confirmed", outcome(o))
		require.EqualValues(t, 2*1290, o.TotalMinor)
	})

	t.Run("one order by both doors", func(t *testing.T) {
		s := s.with(t)
		cl := s.kafka()
		var ids []uuid.UUID
		for range 10 {
			id := uuid.Must(uuid.NewV7())
			ids = append(ids, id)
			b := placing(id, goodCard, item("TOPIC-1", 1))
			errs := make([]error, 4)
			atOnce(len(errs), func(i int) {
				if i%2 == 0 {
					errs[i] = s.publish(t.Context(), cl, "orders.commands.v1", id.String(), []byte(commandBody(t, b)), kgo.RecordHeader{Key: "ce_type", Value: []byte(placeOrder)})
					return
				}
				errs[i] = s.insist(t.Context(), b)
				var p *apiclient.ProblemError
				if errors.As(errs[i], &p) && p.Code == "order_exists" {
					errs[i] = nil // the topic was first
				}
			})
			require.NoError(t, errors.Join(errs...))
		}
		require.Equal(t, map[string]int{"confirmed": len(ids)}, s.outcomes(ids))
	})

	t.Run("Python", func(t *testing.T) {
		s := s.with(t)
		interpreter := os.Getenv("ORDERSAGA_TEST_PYTHON")
		if interpreter == "" {
			interpreter = "python3"
		}
		err := exec.CommandContext(t.Context(), interpreter, "-c", "import confluent_kafka").Run() //nolint:gosec // whoever runs the tests names it
		lacking(t, "a Python with confluent_kafka (ORDERSAGA_TEST_PYTHON)", err)
		type record struct {
			Key     string            `json:"key"`
			Headers map[string]string `json:"headers"`
			Value   any               `json:"value"`
		}
		var in bytes.Buffer
		enc := json.NewEncoder(&in)
		var placed []uuid.UUID
		for range 20 {
			id := uuid.Must(uuid.NewV7())
			placed = append(placed, id)
			r := record{id.String(), map[string]string{"ce_type": placeOrder, "ce_id": uuid.NewString(), "ce_source": "/erp"}, placing(id, goodCard, item("TOPIC-1", 1))}
			require.NoError(t, enc.Encode(r))
			require.NoError(t, enc.Encode(r)) // as at-least-once producers do
		}
		early := uuid.Must(uuid.NewV7()) // cancelled before it is placed
		require.NoError(t, enc.Encode(record{early.String(), map[string]string{"ce_type": cancelOrder}, map[string]string{"order_id": early.String(), "reason": "never mind"}}))
		require.NoError(t, enc.Encode(record{early.String(), map[string]string{"ce_type": placeOrder}, placing(early, goodCard, item("TOPIC-1", 1))}))
		typeless := uuid.Must(uuid.NewV7())
		require.NoError(t, enc.Encode(record{typeless.String(), map[string]string{}, placing(typeless, goodCard, item("TOPIC-1", 1))}))
		script := writeFile(t, "producer.py", python)
		run(t, in.String(), interpreter, script, strings.Join(s.brokers, ","), s.prefix+"orders.commands.v1")
		for _, id := range placed {
			require.Equal(t, "confirmed", outcome(s.await(id, settleWithin)))
		}
		require.Equal(t, "cancelled (cancelled_by_customer)", outcome(s.await(early, settleWithin)))
		require.Contains(t, s.letter(typeless.String()).Reason, "header ce_type is missing: add one")
	})

	t.Run("F15_ReplayPressedTwiceActsOnce", func(t *testing.T) {
		s := s.with(t)
		_, err := exec.LookPath("kcat")
		lacking(t, "kcat", err)
		// Somebody's rule in the database refuses a customer: the command is sound, and the cause can go away.
		conn := s.sql()
		_, err = conn.Exec(t.Context(), `ALTER TABLE orders ADD CONSTRAINT embargo CHECK (customer_id <> 'embargoed') NOT VALID`)
		require.NoError(t, err)
		id, other := uuid.Must(uuid.NewV7()), uuid.Must(uuid.NewV7())
		b := placing(id, goodCard, item("TOPIC-1", 3))
		b.CustomerID = "embargoed"
		s.kcat(id.String(), placeOrder, commandBody(t, b))
		s.kcat(other.String(), placeOrder, commandBody(t, placing(other, goodCard, item("TOPIC-1", 1))))
		require.Equal(t, "confirmed", outcome(s.await(other, settleWithin)), "the record behind it is not held up")
		l := s.letter(id.String())
		require.Contains(t, l.Reason, "embargo")
		require.Nil(t, s.look(id))

		dry := command(t, s.env, "dlq", "replay", l.ID.String(), "--dry-run")
		require.Zero(t, dry.code, dry.err)
		require.Contains(t, dry.out, "would_replay")
		require.Equal(t, httpapi.DeadLetterStatusOpen, s.letter(id.String()).Status)
		// Too early: it fails again, in the same row.
		must(t, s.env, "dlq", "replay", l.ID.String(), "--yes")
		require.True(t, waitFor(settleWithin, func() bool {
			again := s.letter(id.String())
			return again.Status == httpapi.DeadLetterStatusOpen && again.Attempts > l.Attempts
		}), "a replay before the cause is gone is a dead letter again: %+v", s.letter(id.String()))

		_, err = conn.Exec(t.Context(), `ALTER TABLE orders DROP CONSTRAINT embargo`)
		require.NoError(t, err)
		const presses = 4
		var codes [presses]int
		var wg sync.WaitGroup
		for i := range presses {
			wg.Go(func() { codes[i] = command(t, s.env, "dlq", "replay", l.ID.String(), "--yes").code })
		}
		wg.Wait()
		require.Contains(t, codes, 0, "one of them replays")
		require.Equal(t, "confirmed", outcome(s.await(id, settleWithin)))
		require.True(t, waitFor(settleWithin, func() bool { return s.letter(id.String()).Status == httpapi.DeadLetterStatusResolved }))
		late := command(t, s.env, "dlq", "replay", l.ID.String(), "--yes")
		require.Equal(t, 1, late.code, "it is resolved: %s%s", late.out, late.err)
		require.EqualValues(t, 1, s.count(conn, `SELECT count(*) FROM saga_history WHERE order_id = $1 AND version = 1`, id))
		require.EqualValues(t, 2, s.count(conn, `SELECT count(*) FROM audit_log WHERE action = 'dlq.replay' AND target = $1`, l.ID.String()),
			"the one that was too early, and one of four")
	})
	s.clean()
	s.sums(s.ids())
	p.stop(t)
}
