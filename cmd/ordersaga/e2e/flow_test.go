//go:build linux

package e2e

import (
	"context"
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/moby/moby/api/types/container"
	"github.com/stretchr/testify/require"
	"github.com/testcontainers/testcontainers-go"
	"github.com/testcontainers/testcontainers-go/log"
	"github.com/testcontainers/testcontainers-go/wait"
	"github.com/twmb/franz-go/pkg/kgo"

	"ordersaga/adapters/embedded/testenv"
	"ordersaga/cmd/ordersaga/internal/demo"
	"ordersaga/cmd/ordersaga/internal/simulator"
)

// flowOrders is a multiple of the mix's 20.
const flowOrders = 60

// TestFlowOnRealKafka: the whole flow, as an operator sets it up, on a real Kafka and a real Postgres that the environment names.
func TestFlowOnRealKafka(t *testing.T) {
	t.Run("one process", func(t *testing.T) {
		t.Parallel()
		s := newSystem(t, options{})
		p := s.serve("serve")
		mixed(t, s)
		p.stop(t)
		afterStop(t, s)
	})
	t.Run("roles split over three processes, consumers twice", func(t *testing.T) {
		t.Parallel()
		s := newSystem(t, options{})
		consumers := "ORDERSAGA_ROLES=stock,payment,compensation"
		var ps []*process
		for name, roles := range map[string]string{
			"front": "ORDERSAGA_ROLES=http,relay", "consumers-1": consumers, "consumers-2": consumers, "coordinator": "ORDERSAGA_ROLES=coordinator,order-commands",
		} {
			ps = append(ps, s.launch(name, roles))
		}
		for _, p := range ps {
			require.Eventually(t, func() bool { return p.ended() || strings.Contains(p.said(t), `"started"`) }, readyWithin, tick)
			require.False(t, p.ended(), "%s ended: %s", p.name, tail(p.said(t), shownOnFailure))
		}
		require.Eventually(t, func() bool { return s.ready(s.addr) }, readyWithin, tick)
		mixed(t, s)
		for _, p := range ps {
			p.stop(t)
		}
		afterStop(t, s)
	})
	t.Run("Kafka from its jars", func(t *testing.T) {
		t.Parallel()
		s := newSystem(t, options{brokers: testenv.KafkaJars(t).Addrs()})
		p := s.serve("serve")
		mixed(t, s)
		p.stop(t)
	})
	t.Run("Kafka and Postgres in containers", func(t *testing.T) {
		t.Parallel()
		brokers := testenv.KafkaContainer(t) // first: it also knows whether an engine answers
		s := newSystem(t, options{brokers: brokers, db: postgresContainer(t)})
		p := s.serve("serve")
		mixed(t, s)
		p.stop(t)
	})
}

// mixed sends the demo's mix and checks every end, the product's audit, and the sums.
func mixed(t *testing.T, s *system) {
	t.Helper()
	s.faults(simulator.Faults{Fault: simulator.Fault{Latency: simulator.Duration(5 * time.Millisecond)}})
	require.NoError(t, demo.Catalogue(t.Context(), s.api, flowOrders))
	cl := s.kafka()
	rep, err := demo.Run(t.Context(), demo.Config{
		Client: s.api, Orders: flowOrders, Workers: 16, Patience: settleWithin, Progress: func() {},
		Publish: func(ctx context.Context, key, ceType, ceID string, value []byte) error {
			return s.publish(ctx, cl, "orders.commands.v1", key, value,
				kgo.RecordHeader{Key: "ce_type", Value: []byte(ceType)}, kgo.RecordHeader{Key: "ce_id", Value: []byte(ceID)},
				kgo.RecordHeader{Key: "ce_source", Value: []byte("/e2e")})
		},
	})
	require.NoError(t, err)
	require.Empty(t, rep.Unexpected)
	books := s.clean()
	t.Logf("%d orders in %s: %v", flowOrders, rep.Took.Round(time.Millisecond), books.Orders)
	require.EqualValues(t, flowOrders/20, books.DeadLetters["open"], "the poisoned commands, and nothing else")
	ids := s.ids()
	require.Len(t, ids, flowOrders-flowOrders/20, "an order for each command that is one")
	require.EqualValues(t, books.Orders["confirmed"], s.sums(ids))
}

// afterStop: processes that were told to stop leave nothing half done behind.
func afterStop(t *testing.T, s *system) {
	t.Helper()
	r := command(t, s.env, "audit", "-o", "json")
	require.Zero(t, r.code, "%s%s", r.out, r.err)
}

// ids lists every order, by the command line.
func (s *system) ids() []uuid.UUID {
	s.tb.Helper()
	var ids []uuid.UUID
	for line := range strings.Lines(must(s.tb, s.env, "orders", "list", "--limit", "0", "-o", "jsonl")) {
		var o struct {
			OrderID uuid.UUID `json:"order_id"`
		}
		require.NoError(s.tb, json.Unmarshal([]byte(line), &o))
		ids = append(ids, o.OrderID)
	}
	return ids
}

const (
	postgresImage = "postgres:17"
	// containerLife bounds a container that outlived a killed test process, in seconds.
	containerLife = "900"
)

// postgresContainer starts a Postgres in a container, for this test alone. testenv.KafkaContainer has made sure of the engine.
func postgresContainer(t *testing.T) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	c, err := testcontainers.Run(ctx, postgresImage,
		testcontainers.WithLogger(log.NewNoopLogger()),
		testcontainers.WithExposedPorts("5432/tcp"),
		testcontainers.WithEnv(map[string]string{"POSTGRES_USER": "saga", "POSTGRES_PASSWORD": "e2e", "POSTGRES_DB": "orders"}),
		testcontainers.WithEntrypoint("timeout", containerLife, "docker-entrypoint.sh"),
		testcontainers.WithCmd("postgres", "-c", "fsync=off"),
		testcontainers.WithHostConfigModifier(func(h *container.HostConfig) { h.AutoRemove = true }),
		// Twice: the server that sets the database up listens on the socket only.
		testcontainers.WithWaitStrategy(wait.ForLog("database system is ready to accept connections").WithOccurrence(2).WithStartupTimeout(time.Minute)),
	)
	if c != nil {
		t.Cleanup(func() {
			if err := testcontainers.TerminateContainer(c, testcontainers.StopTimeout(0)); err != nil {
				t.Errorf("remove the Postgres container: %v", err)
			}
		})
	}
	require.NoError(t, err)
	at, err := c.PortEndpoint(ctx, "5432/tcp", "")
	require.NoError(t, err)
	return "postgres://saga:e2e@" + at + "/orders?sslmode=disable"
}
