//go:build linux

package e2e

import (
	"encoding/json"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"
	"github.com/twmb/franz-go/pkg/kgo"

	"ordersaga/adapters/embedded/testenv"
	"ordersaga/adapters/httpapi"
	"ordersaga/cmd/ordersaga/internal/simulator"
)

// awayFor is how long a dependency stays away under load.
const awayFor = 4 * time.Second

// TestOutages: what the service depends on goes away under load and comes back. Nothing that was accepted is lost, no attempt is spent,
// no dead letter is written, and everything ends by itself.
func TestOutages(t *testing.T) {
	t.Parallel()
	pg := testenv.PostgresServer(t)
	broker := testenv.KafkaJars(t)
	s := newSystem(t, options{brokers: broker.Addrs(), db: pg.URL(), env: []string{"ORDERSAGA_PAYMENT__TIMEOUT=1s"}})
	p := s.serve("serve")
	s.product("AWAY", 990, 100_000)
	t.Run("F07_GatewayAway", func(t *testing.T) { gatewayAway(t, s.with(t)) })
	t.Run("F37_GatewayFailsForEverybody", func(t *testing.T) { gatewayFails(t, s.with(t)) })
	t.Run("F21_PostgresRestarts", func(t *testing.T) {
		s := s.with(t)
		ids := s.through(func() {
			require.NoError(t, pg.Kill())
			require.True(t, waitFor(readyWithin, func() bool { return !s.ready(s.addr) }), "readiness stays green without a database")
			a := s.post(uuid.NewString(), []byte(commandBody(t, placing(uuid.Must(uuid.NewV7()), goodCard, item("AWAY", 1)))))
			require.NoError(t, a.err)
			require.Equal(t, http.StatusServiceUnavailable, a.status, "%s", a.body)
			require.NotEmpty(t, a.retryAfter)
			early := s.launch("early", "ORDERSAGA_HTTP_ADDR="+freeAddr(t))
			require.True(t, waitFor(readyWithin, func() bool { return early.ended() || strings.Contains(early.said(t), "waiting for the database") }))
			require.NoError(t, pg.Restart(t.Context()))
			require.True(t, waitFor(readyWithin, func() bool { return early.ended() || strings.Contains(early.said(t), `"started"`) }))
			early.stop(t) // it has waited for the database, and worked with the other one since
		})
		require.Equal(t, map[string]int{"confirmed": len(ids)}, s.outcomes(ids))
		require.True(t, waitFor(readyWithin, func() bool { return s.ready(s.addr) }))
	})
	t.Run("F20_BrokerRestarts", func(t *testing.T) {
		s := s.with(t)
		ids := s.through(func() {
			require.NoError(t, broker.Kill())
			require.True(t, waitFor(readyWithin, func() bool { return !s.ready(s.addr) }), "readiness stays green without a broker")
			s.order("AWAY", 1) // taken in all the same: it waits in the outbox
			require.NoError(t, pause(t.Context(), awayFor/2))
			require.NoError(t, broker.Restart(t.Context()))
		})
		require.Equal(t, map[string]int{"confirmed": len(ids)}, s.outcomes(ids))
		require.True(t, waitFor(readyWithin, func() bool { return s.ready(s.addr) }))
	})
	require.False(t, p.ended(), "%v", p.end())
	books := s.clean()
	require.Empty(t, books.DeadLetters)
	s.sums(s.ids())
	p.stop(t)
}

// through places orders without pause while something happens, and a little after, and answers those that were accepted.
func (s *system) through(happens func()) []uuid.UUID {
	s.tb.Helper()
	const customers = 6
	stop := make(chan struct{})
	accepted := make(chan []uuid.UUID, 1)
	refused := make(chan error, customers)
	go func() {
		all := make([][]uuid.UUID, customers)
		atOnce(customers, func(i int) {
			for {
				select {
				case <-stop:
					return
				default:
				}
				id := uuid.Must(uuid.NewV7())
				if err := s.insist(s.tb.Context(), placing(id, goodCard, item("AWAY", 1))); err != nil {
					refused <- err
					return
				}
				all[i] = append(all[i], id)
				if pause(s.tb.Context(), 150*time.Millisecond) != nil {
					return
				}
			}
		})
		var ids []uuid.UUID
		for _, some := range all {
			ids = append(ids, some...)
		}
		accepted <- ids
	}()
	done := false
	defer func() {
		if !done { // happens has failed the test
			close(stop)
			<-accepted
		}
	}()
	require.NoError(s.tb, pause(s.tb.Context(), time.Second))
	happens()
	require.NoError(s.tb, pause(s.tb.Context(), time.Second))
	done = true
	close(stop)
	ids := <-accepted
	require.Empty(s.tb, refused, "a customer gave up")
	require.NotEmpty(s.tb, ids)
	return ids
}

func gatewayAway(t *testing.T, s *system) {
	t.Helper()
	begin := time.Now()
	var ids []uuid.UUID
	for _, kind := range []string{simulator.OutageRefuse, simulator.OutageClose} {
		ids = append(ids, s.through(func() {
			s.faults(simulator.Faults{Fault: simulator.Fault{Outage: kind}})
			require.NoError(t, pause(t.Context(), awayFor))
			s.faults(simulator.Faults{})
		})...)
	}
	require.Equal(t, map[string]int{"confirmed": len(ids)}, s.outcomes(ids))
	t.Logf("%d orders through two outages of the gateway of %s each, all ended after %s", len(ids), awayFor, time.Since(begin).Round(time.Millisecond))
	// What was under way when the gateway went is a failure like any other, until the breaker opens; nothing after that is tried.
	tiers := map[string]int{}
	for _, tier := range []string{"200ms", "1s", "3s"} {
		s.read("retry.payment."+tier, func(*kgo.Record) { tiers[tier]++ })
	}
	t.Logf("copies on the retry tiers: %v", tiers)
	require.Less(t, tiers["200ms"], len(ids)/3, "the open breaker spends attempts: %v", tiers)
	require.Zero(t, tiers["3s"], "%v", tiers)
	require.Empty(t, s.letters())
}

// gatewayFails: the gateway answers, always wrongly, for some seconds: with errors that it stores under their keys, before the effect and
// after it, and not at all although the effect took place. It ends with everybody charged once, and no dead letter.
func gatewayFails(t *testing.T, s *system) {
	t.Helper()
	for name, f := range map[string]simulator.Fault{
		"errors before the effect": {ErrorBefore: 1}, "errors after the effect": {ErrorAfter: 1}, "no answers": {Timeout: 1},
	} {
		begin := time.Now()
		ids := s.through(func() {
			s.faults(simulator.Faults{Fault: f})
			require.NoError(t, pause(t.Context(), awayFor/2))
			s.faults(simulator.Faults{})
		})
		require.Equal(t, map[string]int{"confirmed": len(ids)}, s.outcomes(ids), name)
		t.Logf("%s: %d orders, all ended after %s", name, len(ids), time.Since(begin).Round(time.Millisecond))
		require.Empty(t, s.letters(), name)
	}
}

// TestStuck: what stands still shows within a minute, and ends once it can.
func TestStuck(t *testing.T) {
	t.Parallel()
	s := newSystem(t, options{env: []string{
		"ORDERSAGA_SAGA__FORWARD_DEADLINE=4s", "ORDERSAGA_SAGA__RETRIABLE_DEADLINE=2s", "ORDERSAGA_SAGA__COMPENSATING_DEADLINE=2s", "ORDERSAGA_PAYMENT__RETRIES=1",
	}})
	p := s.serve("serve")
	s.product("STUCK", 990, 100)
	s.product("STUCK-NONE", 990, 0)
	t.Run("F12_UndoThatFailsForLong", func(t *testing.T) {
		s := s.with(t)
		s.faults(simulator.Faults{Ops: map[simulator.Op]simulator.Fault{simulator.Cancel: {ErrorBefore: 1}, simulator.Refund: {ErrorBefore: 1}}})
		begin := time.Now()
		id := uuid.Must(uuid.NewV7())
		require.NoError(t, s.place(placing(id, goodCard, item("STUCK", 1), item("STUCK-NONE", 1))))
		o := s.awaitStuck(id)
		t.Logf("an undo that fails shows as stuck after %s: %s", time.Since(begin).Round(time.Millisecond), o.Saga.Stuck.Reason)
		require.Equal(t, httpapi.SagaPhaseCompensating, o.Saga.State)
		require.Equal(t, "rejected (out_of_stock)", outcome(o), "the customer knows already")
		must(t, s.env, "sagas", "resolve", id.String(), "take", "--note", "I look after it")
		require.Contains(t, must(t, s.env, "sagas", "list", "--stuck"), id.String())
		require.Contains(t, must(t, s.env, "sagas", "show", id.String()), "stuck   since")
		s.faults(simulator.Faults{})
		o = s.await(id, settleWithin)
		require.Nil(t, o.Saga.Stuck, "what resolves it clears the flag")
		require.Equal(t, "[]\n", must(t, s.env, "sagas", "list", "--stuck", "-o", "json"))
	})
	t.Run("F17_HangingSaga", func(t *testing.T) {
		s := s.with(t)
		p.stop(t)
		front := s.serve("front", "ORDERSAGA_ROLES=http,relay,order-commands,stock,coordinator") // nobody takes payments
		begin := time.Now()
		id := s.order("STUCK", 1)
		o := s.awaitStuck(id)
		t.Logf("a saga that nobody works on shows as stuck after %s: %s", time.Since(begin).Round(time.Millisecond), o.Saga.Stuck.Reason)
		require.Equal(t, "rejected (timed_out)", outcome(o), "it was ended by its deadline, before the pivot")
		rest := s.launch("rest", "ORDERSAGA_ROLES=payment,compensation")
		s.await(id, settleWithin)
		intents, _ := s.ledger()
		for _, i := range intents[id.String()] {
			require.Zero(t, i.AmountReceived, "the late command charges nobody")
		}
		front.stop(t)
		rest.stop(t)
	})
	p = s.serve("serve-again")
	s.clean()
	s.sums(s.ids())
	p.stop(t)
}

// awaitStuck waits until `sagas list --stuck` has the order.
func (s *system) awaitStuck(id uuid.UUID) (o *httpapi.Order) {
	s.tb.Helper()
	require.True(s.tb, waitFor(time.Minute, func() bool {
		o = s.look(id)
		return o != nil && o.Saga.Stuck != nil
	}), "order %s does not show as stuck within a minute: %+v", id, o)
	var listed []httpapi.Saga
	out := must(s.tb, s.env, "sagas", "list", "--stuck", "-o", "json")
	require.NoError(s.tb, json.Unmarshal([]byte(out), &listed))
	require.Contains(s.tb, out, id.String())
	return o
}
