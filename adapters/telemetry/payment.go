package telemetry

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"
)

// The states of the payment gateway's breaker.
const (
	breakerClosed = "closed"
	breakerHalf   = "half-open"
	breakerOpen   = "open"
)

var breakerStates = []string{breakerClosed, breakerHalf, breakerOpen}

// maxCalls bounds the calls and the results that are told apart; payment names fewer.
const maxCalls = 32

type paymentMetrics struct {
	calls       *prometheus.CounterVec
	seconds     *prometheus.HistogramVec
	breaker     *prometheus.GaugeVec
	transitions *prometheus.CounterVec
	callNames   *labels
	results     *labels
}

func newPaymentMetrics(f promauto.Factory) paymentMetrics {
	const s = "payment"
	m := paymentMetrics{
		calls:       counter(f, s, "calls_total", "Calls to the payment gateway, sent or not.", "call", "result"),
		seconds:     histogram(f, s, "call_duration_seconds", "Calls to the payment gateway that were sent.", quick, "call"),
		breaker:     gauge(f, s, "breaker_state", "1 for the state that the payment gateway's breaker is in.", "state"),
		transitions: counter(f, s, "breaker_transitions_total", "Times that the breaker entered a state.", "state"),
		callNames:   newLabels(maxCalls), results: newLabels(maxCalls),
	}
	for _, state := range breakerStates {
		m.transitions.WithLabelValues(state)
	}
	m.setBreaker(breakerClosed)
	return m
}

// PaymentCall is payment's Observer's: one call, or one that was not sent (took is 0).
func (m *paymentMetrics) PaymentCall(call, result string, took time.Duration) {
	call = m.callNames.of(call)
	m.calls.WithLabelValues(call, m.results.of(result)).Inc()
	if took > 0 {
		m.seconds.WithLabelValues(call).Observe(took.Seconds())
	}
}

// PaymentBreaker is payment's Observer's: the breaker entered a state.
func (m *paymentMetrics) PaymentBreaker(state string) {
	for _, known := range breakerStates {
		if state == known {
			m.transitions.WithLabelValues(known).Inc()
			m.setBreaker(known)
		}
	}
}

func (m *paymentMetrics) setBreaker(state string) {
	for _, s := range breakerStates {
		v := 0.0
		if s == state {
			v = 1
		}
		m.breaker.WithLabelValues(s).Set(v)
	}
}
