package telemetry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap"

	"ordersaga/consumers"
	"ordersaga/events"
	"ordersaga/outbox"
	"ordersaga/saga"
)

// exercise gives every metric a sample.
func exercise(m *Metrics) {
	m.Batch(consumers.BatchStats{Group: events.GroupStock, Records: 7, Followed: 1, Transactions: 2, Duration: time.Second, Foreign: 1, Counts: [6]int{3, 1, 1, 1, 1, 0}})
	m.Batch(consumers.BatchStats{Group: events.GroupStock, Interrupted: true})
	d := delivery(events.TReserveStock)
	m.Failed(d, consumers.Verdict{Kind: consumers.Retry, Stalled: true}, &consumers.PanicError{Value: "x"})
	m.Held(events.GroupStock, "payment gateway", 3, 2*time.Second, errors.New("away"))
	m.Split(events.GroupStock, 2, errors.New("x"))
	m.Late(events.GroupStock, 2, time.Second)
	m.SetLag(events.GroupStock, map[int32]int64{0: 5})
	m.KafkaProblem("producer", errors.New("x"))
	m.KafkaAssigned("stock", 4)
	m.KafkaBuffered("stock", 100, 2)
	m.WindowRead(10, time.Millisecond)
	m.Produced(3)
	m.BacklogSeen(outbox.Backlog{Rows: 4, OldestSeconds: 1.5})
	m.CursorLag(time.Second)
	m.LeasesHeld(9)
	m.ShardFenced(1)
	m.RecordSetAside(&outbox.Message{}, errors.New("too large"), true)
	m.RelayFailed("read", errors.New("x"))
	m.PaymentCall("authorize", "ok", 3*time.Millisecond)
	m.PaymentCall("authorize", "open", 0)
	m.PaymentBreaker(breakerOpen)
	m.IntakeBatch(3)
	m.intakeMetrics.submissions.WithLabelValues("accepted").Inc()
	m.requests.WithLabelValues("/v1/orders", "GET", "2xx").Inc()
	m.answering.WithLabelValues("/v1/orders", "GET").Observe(1)
	m.httpPanics.WithLabelValues("/v1/orders").Inc()
	m.WatchSagas(func() (SagaStats, bool) { return SagaStats{Running: 3, Stuck: 1, OldestRunning: time.Minute}, true })
	m.WatchDeadLetters(func() (map[events.Group]int64, bool) { return map[events.Group]int64{events.GroupStock: 2}, true })
	m.WatchPools(func() []PoolStats {
		return []PoolStats{{Name: "intake", Limit: 4, Used: 1, Idle: 2, Acquired: 9, Waited: 2, WaitedFor: 2500 * time.Millisecond, Canceled: 1}}
	})
	m.WatchIntakeQueue(func() (length, limit int) { return 3, 10 })
}

func delivery(n events.Name) *consumers.Delivery {
	return &consumers.Delivery{
		Envelope: events.Envelope{ID: events.NewID(), Type: n, OrderID: uuid.Must(uuid.NewV7()), Data: new(events.ReserveStock)},
		Group:    events.GroupStock, Attempt: 2, Origin: consumers.Place{Topic: events.TopicStock, Partition: 3, Offset: 99},
		Record: events.Record{Topic: events.TopicStock, Partition: 3, Offset: 99},
	}
}

func TestMetricsAreNamedAsPrometheusWants(t *testing.T) {
	m := NewMetrics("v1")
	exercise(m)
	problems, err := testutil.GatherAndLint(m.Registry())
	require.NoError(t, err)
	for _, p := range problems {
		require.Falsef(t, strings.HasPrefix(p.Metric, namespace), "%s: %s", p.Metric, p.Text)
	}
}

var fqName = regexp.MustCompile(`fqName: "([^"]+)".*variableLabels: \{([^}]*)\}`)

// described answers name → labels of all metrics of ours.
func described(m *Metrics) map[string]string {
	ch, all := make(chan *prometheus.Desc), map[string]string{}
	go func() {
		m.Registry().Describe(ch)
		close(ch)
	}()
	for d := range ch {
		if f := fqName.FindStringSubmatch(d.String()); f != nil && strings.HasPrefix(f[1], namespace+"_") {
			all[f[1]] = f[2]
		}
	}
	return all
}

func TestTheTableOfMetricsIsComplete(t *testing.T) {
	doc, err := os.ReadFile("doc.go")
	require.NoError(t, err)
	table := map[string]string{}
	for l := range strings.Lines(string(doc)) {
		if f := strings.Fields(strings.TrimPrefix(l, "//")); len(f) > 3 && strings.HasPrefix(f[0], namespace+"_") {
			table[f[0]] = strings.TrimPrefix(f[2], "-")
			require.Contains(t, []string{"counter", "gauge", "histogram"}, f[1], f[0])
		}
	}
	m := NewMetrics("v1")
	require.Equal(t, described(m), table)

	exercise(m)
	families, err := m.Registry().Gather()
	require.NoError(t, err)
	kinds := map[string]string{}
	for _, f := range families {
		kinds[f.GetName()] = strings.ToLower(f.GetType().String())
	}
	for name := range table {
		require.Contains(t, kinds, name, "exercised")
		require.Regexp(t, `(?m)^//\s+`+name+`\s+`+kinds[name]+`\s`, string(doc))
	}
}

func TestAlertsAskForMetricsThatExist(t *testing.T) {
	rules, err := os.ReadFile("../../deploy/alerts.yml")
	require.NoError(t, err)
	known := described(NewMetrics("v1"))
	asked := regexp.MustCompile(`\bordersaga_\w+`).FindAllString(string(rules), -1)
	require.NotEmpty(t, asked)
	for _, name := range asked {
		for _, suffix := range []string{"_bucket", "_sum", "_count"} {
			if _, ok := known[name]; !ok {
				name = strings.TrimSuffix(name, suffix)
			}
		}
		require.Contains(t, known, name)
	}
}

func TestScrape(t *testing.T) {
	m := NewMetrics("v1.2.3")
	exercise(m)
	srv := httptest.NewServer(m.Handler())
	defer srv.Close()
	resp, err := http.Get(srv.URL) //nolint:forbidigo // a test's own server
	require.NoError(t, err)
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	require.NoError(t, err)
	require.Equal(t, http.StatusOK, resp.StatusCode)
	for _, want := range []string{
		`ordersaga_build_info{go_version="go`, `version="v1.2.3"} 1`,
		`ordersaga_consumer_verdicts_total{group="stock",verdict="done"} 3`,
		`ordersaga_consumer_verdicts_total{group="stock",verdict="foreign"} 1`,
		`ordersaga_consumer_failures_total{class="transient",group="stock",type="ReserveStock",verdict="retry"} 1`,
		`ordersaga_consumer_held_seconds{group="stock"} 2`,
		`ordersaga_outbox_oldest_age_seconds 1.5`,
		`ordersaga_outbox_set_aside_total{kind="dead_letter"} 1`,
		`ordersaga_outbox_set_aside_total{kind="message"} 0`,
		`ordersaga_payment_calls_total{call="authorize",result="open"} 1`,
		`ordersaga_payment_call_duration_seconds_count{call="authorize"} 1`,
		`ordersaga_payment_breaker_state{state="open"} 1`, `ordersaga_payment_breaker_state{state="closed"} 0`,
		`ordersaga_sagas_stuck 1`, `ordersaga_saga_oldest_running_age_seconds 60`, `ordersaga_dead_letters_open{group="stock"} 2`,
		`ordersaga_db_pool_connections{pool="intake",state="used"} 1`, `ordersaga_db_pool_acquire_wait_seconds_total{pool="intake"} 2.5`,
		`ordersaga_intake_queue_length 3`,
		`go_goroutines `, `go_sched_latencies_seconds`, `go_gc_`, `process_open_fds`,
	} {
		require.Contains(t, string(body), want)
	}
}

func TestWhatIsNotKnownHasNoSample(t *testing.T) {
	m := NewMetrics("v1")
	m.WatchSagas(func() (SagaStats, bool) { return SagaStats{}, false })
	m.WatchDeadLetters(func() (map[events.Group]int64, bool) { return nil, false })
	n, err := testutil.GatherAndCount(m.Registry(), "ordersaga_sagas_running", "ordersaga_dead_letters_open", "ordersaga_db_pool_connections")
	require.NoError(t, err)
	require.Zero(t, n)
}

func TestAHoldEndsWithABatchThatDoes(t *testing.T) {
	m := NewMetrics("v1")
	m.Held(events.GroupPayment, "payment gateway", 1, time.Minute, errors.New("away"))
	m.Batch(consumers.BatchStats{Group: events.GroupPayment, Interrupted: true})
	require.InDelta(t, 60, testutil.ToFloat64(m.held.WithLabelValues("payment")), 0)
	m.Batch(consumers.BatchStats{Group: events.GroupPayment})
	require.Zero(t, testutil.ToFloat64(m.held.WithLabelValues("payment")))
}

func TestLagThatIsNotRenewedDisappears(t *testing.T) {
	m := NewMetrics("v1")
	m.KafkaLag("x_stock", "x_saga.stock.v1", 0, 5)
	m.KafkaLag("x_stock", "x_saga.stock.v1", 0, 3)
	m.KafkaLag("x_stock", "x_retry.stock.5s", 0, 1)
	m.lags.set(lagKey{"gone", "t", 1}, 9, time.Now().Add(-lagKeep-time.Second))
	require.NoError(t, testutil.CollectAndCompare(&m.lags, strings.NewReader(`
# HELP ordersaga_consumer_lag_records Records of a partition that the group has not settled.
# TYPE ordersaga_consumer_lag_records gauge
ordersaga_consumer_lag_records{group="x_stock",partition="0",topic="x_retry.stock.5s"} 1
ordersaga_consumer_lag_records{group="x_stock",partition="0",topic="x_saga.stock.v1"} 3
`)))
	for i := range int32(maxLags + 10) {
		m.KafkaLag("g", "t", i, 1)
	}
	require.Len(t, m.lags.by, maxLags)
}

func TestF26_LabelsAreBounded(t *testing.T) {
	m := NewMetrics("v1")
	for i := range 500 {
		d := delivery(events.Name(fmt.Sprintf("evil\n\x1b[31m%d", i)))
		m.Failed(d, consumers.Verdict{Kind: consumers.Retry}, errors.New("x"))
		d.Data = nil
		m.Failed(d, consumers.Verdict{Kind: consumers.Dead, Class: consumers.ClassPoison}, errors.New("x"))
		m.Held(events.GroupStock, fmt.Sprintf("dep\r\n%d", i), 1, 0, errors.New("x"))
		m.RelayFailed(fmt.Sprintf("op %d", i), errors.New("x"))
		m.PaymentCall(fmt.Sprintf("call %d", i), fmt.Sprintf("result %d", i), 1)
		m.PaymentBreaker(fmt.Sprintf("state %d", i))
		m.KafkaProblem(fmt.Sprintf("part %d", i), errors.New("x"))
	}
	require.LessOrEqual(t, testutil.CollectAndCount(m.failures), maxTypes+2)
	require.LessOrEqual(t, testutil.CollectAndCount(m.holds), maxDependencies+1)
	require.LessOrEqual(t, testutil.CollectAndCount(m.problems), maxParts+1)
	require.LessOrEqual(t, testutil.CollectAndCount(m.relayFailures), maxOperations+1)
	require.LessOrEqual(t, testutil.CollectAndCount(m.seconds), maxCalls+1)
	require.Equal(t, 3, testutil.CollectAndCount(m.breaker))
	families, err := m.Registry().Gather()
	require.NoError(t, err)
	for _, f := range families {
		for _, s := range f.GetMetric() {
			for _, l := range s.GetLabel() {
				require.NotRegexp(t, unfit, l.GetValue())
				require.NotContains(t, l.GetValue(), "\n")
			}
		}
	}
	require.Equal(t, strings.Repeat("x", maxLabel-3)+"…", label(strings.Repeat("x", 1000)))
}

type fakeIntake struct {
	a   saga.Accepted
	err error
}

func (f *fakeIntake) Submit(context.Context, *saga.Submission) (saga.Accepted, error) {
	return f.a, f.err
}

type awayError struct{}

func (awayError) Error() string  { return "database away" }
func (awayError) Outage() string { return "database" }

func TestIntakeIsCounted(t *testing.T) {
	m := NewMetrics("v1")
	f := &fakeIntake{}
	in := m.Intake(f)
	for want, r := range map[string]fakeIntake{
		"accepted": {}, "repeated": {a: saga.Accepted{Repeat: true}}, "queue_full": {err: &saga.OverloadedError{Full: true}},
		"overloaded": {err: fmt.Errorf("shed: %w", &saga.OverloadedError{})}, "key_reused": {err: saga.ErrKeyReused}, "order_exists": {err: saga.ErrOrderExists},
		"unavailable": {err: fmt.Errorf("x: %w", awayError{})}, "cancelled": {err: context.Canceled}, "other": {err: errors.New("no such product")},
	} {
		*f = r
		a, err := in.Submit(context.Background(), &saga.Submission{})
		require.Equal(t, r.a, a)
		require.Equal(t, r.err, err)
		require.InDelta(t, 1, testutil.ToFloat64(m.submissions.WithLabelValues(want)), 0, want)
	}
}

// --- what is logged

func observed(t *testing.T) (*Observer, func() []map[string]any) {
	t.Helper()
	log, out := logTo(t, "debug", "json")
	o := NewObserver(NewMetrics("v1"), log)
	return o, func() []map[string]any {
		defer out.Reset()
		return lines(t, out)
	}
}

func TestAFailureIsLoggedOnceWithWhatAPersonNeeds(t *testing.T) {
	o, logged := observed(t)
	d := delivery(events.TReserveStock)
	d.Trace = events.Trace{TraceID: [16]byte{1}, SpanID: [8]byte{1}}
	v := consumers.Verdict{Kind: consumers.Dead, Class: consumers.ClassPoison, Reason: "quantity 17 is impossible"}
	o.Failed(d, v, errors.New(v.Reason))
	got := logged()
	require.Len(t, got, 1)
	for k, want := range map[string]any{
		"level": "error", "msg": "dead letter", "group": "stock", "type": "ReserveStock", "verdict": "dead", "order_id": d.OrderID.String(), "message_id": d.ID.String(),
		"class": "poison", "error": v.Reason, "fingerprint": consumers.Fingerprint("poison", "ReserveStock", v.Reason), "topic": "saga.stock.v1",
		"trace_id": "01000000000000000000000000000000",
	} {
		require.Equal(t, want, got[0][k], k)
	}
	require.InDelta(t, 2, got[0]["attempt"], 0)
	require.NotContains(t, got[0], "stacktrace", "where the observer stands tells nobody anything")

	for _, tc := range []struct {
		v     consumers.Verdict
		level string
	}{
		{consumers.Verdict{Kind: consumers.Retry, Tier: 2, Reason: "timeout"}, "warn"},
		{consumers.Verdict{Kind: consumers.Retry, Stalled: true, Reason: "timeout"}, "error"},
		{consumers.Verdict{Kind: consumers.Again, Reason: "timeout"}, "debug"},
	} {
		o.Failed(d, tc.v, errors.New("timeout"))
		got = logged()
		require.Len(t, got, 1)
		require.Equal(t, tc.level, got[0]["level"])
	}
	d.OrderID = uuid.Nil
	o.Failed(d, consumers.Verdict{Kind: consumers.Dead, Reason: "x"}, &consumers.PanicError{Value: "x", Stack: []byte("goroutine 1")})
	got = logged()
	require.Equal(t, "goroutine 1", got[0]["stack"])
	require.NotContains(t, got[0], "order_id")
}

func TestF26_FailuresAreLoggedClean(t *testing.T) {
	o, logged := observed(t)
	d := delivery(events.Name(evil))
	d.Data = nil
	o.Failed(d, consumers.Verdict{Kind: consumers.Dead, Class: consumers.ClassPoison, Reason: evil}, errors.New(evil))
	o.Held(events.GroupStock, evil, 1, time.Second, errors.New(evil))
	o.Split(events.GroupStock, 2, errors.New(evil))
	o.RecordSetAside(&outbox.Message{Topic: events.Topic(evil), Type: events.Name(evil)}, errors.New(evil), false)
	o.RelayFailed(evil, errors.New(evil))
	o.PaymentBreaker(evil)
	o.KafkaProblem(evil, errors.New(evil))
	got := logged()
	require.Len(t, got, 7)
	for _, l := range got {
		requireFit(t, l)
	}
}

func TestAStormOfFailuresIsBoundedAndTheFirstOfEachKindShows(t *testing.T) {
	o, logged := observed(t)
	now := time.Now()
	o.now = func() time.Time { return now }
	fail := func(n events.Name, reason string) {
		d := delivery(n)
		o.Failed(d, consumers.Verdict{Kind: consumers.Retry, Tier: 1, Reason: reason}, errors.New(reason))
	}
	for i := range 5000 {
		fail(events.TReserveStock, fmt.Sprintf("gateway answered 503 for pi_%d", i))
	}
	require.Len(t, logged(), failureBurst, "one cause, whatever ids are in its text")
	fail(events.TReserveStock, "a new cause")
	fail(events.TCommitStock, "gateway answered 503 for pi_1")
	for range 200 {
		o.RelayFailed("read", errors.New("connection refused"))
		o.Held(events.GroupStock, "database", 1, 0, awayError{})
	}
	got := logged()
	require.Len(t, got, 2+2*failureBurst)
	require.Equal(t, "a new cause", got[0]["error"])
	require.Equal(t, "CommitStock", got[1]["type"])
	now = now.Add(failureWindow)
	fail(events.TReserveStock, "gateway answered 503 for pi_77")
	got = logged()
	require.InDelta(t, 5000-failureBurst, got[0]["suppressed"], 0)

	total := testutil.ToFloat64(o.failures.WithLabelValues("stock", "ReserveStock", "retry", "transient"))
	require.InDelta(t, 5002, total, 0, "metrics count all")
}

func TestTheObserverIsNotSampledTwice(t *testing.T) {
	o, logged := observed(t)
	for i := range 300 { // distinct causes, one message text
		reason := "cause " + strings.Repeat("x", i)
		o.Failed(delivery(events.TReserveStock), consumers.Verdict{Kind: consumers.Retry, Reason: reason}, errors.New(reason))
	}
	got := logged()
	require.Len(t, got, 300, "the first of each kind always shows")
	require.False(t, slices.ContainsFunc(got, func(l map[string]any) bool { return l["suppressed"] != nil }))
}

func TestTheObserverDoesNothingForNobody(t *testing.T) {
	o := NewObserver(NewMetrics("v1"), zap.NewNop())
	d, v, err := delivery(events.TReserveStock), consumers.Verdict{Kind: consumers.Again, Reason: "x"}, errors.New("x")
	require.LessOrEqual(t, testing.AllocsPerRun(100, func() { o.Failed(d, v, err) }), 1.0)
}
