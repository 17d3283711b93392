package telemetry

import (
	"context"
	"errors"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"

	"ordersaga/saga"
)

type intakeMetrics struct {
	submissions *prometheus.CounterVec
	submitting  prometheus.Observer
	batchOrders prometheus.Observer
}

func newIntakeMetrics(f promauto.Factory) intakeMetrics {
	const s = "intake"
	return intakeMetrics{
		submissions: counter(f, s, "submissions_total", "Orders handed in over HTTP, by what became of them.", "result"),
		submitting:  histogram(f, s, "submission_duration_seconds", "A submission until it was committed or refused.", quick).WithLabelValues(),
		batchOrders: histogram(f, s, "batch_orders", "Orders placed in one transaction.", sizes).WithLabelValues(),
	}
}

// IntakeBatch takes note of a transaction that placed n orders.
func (m *intakeMetrics) IntakeBatch(n int) { m.batchOrders.Observe(float64(n)) }

// Intake is what takes orders in; *saga.Intake is one.
type Intake interface {
	Submit(ctx context.Context, s *saga.Submission) (saga.Accepted, error)
}

// Intake counts what is handed to next.
func (m *Metrics) Intake(next Intake) Intake {
	return &countedIntake{next, &m.intakeMetrics, m.submissions.WithLabelValues(accepted)}
}

type countedIntake struct {
	next     Intake
	m        *intakeMetrics
	accepted prometheus.Counter
}

const accepted = "accepted"

func (c *countedIntake) Submit(ctx context.Context, s *saga.Submission) (saga.Accepted, error) {
	begun := time.Now()
	a, err := c.next.Submit(ctx, s)
	c.m.submitting.Observe(time.Since(begun).Seconds())
	if err == nil && !a.Repeat {
		c.accepted.Inc()
	} else {
		c.m.submissions.WithLabelValues(submitted(a, err)).Inc()
	}
	return a, err
}

func submitted(a saga.Accepted, err error) string {
	var full *saga.OverloadedError
	var away interface{ Outage() string }
	switch {
	case err == nil && a.Repeat:
		return "repeated"
	case err == nil:
		return accepted
	case errors.As(err, &full) && full.Full:
		return "queue_full"
	case full != nil:
		return "overloaded"
	case errors.Is(err, saga.ErrKeyReused):
		return "key_reused"
	case errors.Is(err, saga.ErrOrderExists):
		return "order_exists"
	case errors.As(err, &away):
		return "unavailable"
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return "cancelled"
	default:
		return otherLabel // refused: unknown product, price changed; or a fault of ours
	}
}
