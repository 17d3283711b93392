package simulator_test

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"ordersaga/cmd/ordersaga/internal/simulator"
)

// BenchmarkCreate is what a held payment costs the simulator, journal included: it must stay small beside what it is there to load.
func BenchmarkCreate(b *testing.B) {
	sim, err := simulator.Open(b.TempDir())
	if err != nil {
		b.Fatal(err)
	}
	defer func() { _ = sim.Close() }()
	const form = "amount=100&capture_method=manual&confirm=true&currency=eur&error_on_requires_action=true&metadata%5Border_id%5D=o&" +
		"payment_method=pm_card_visa&payment_method_types%5B0%5D=card"
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		r := httptest.NewRequestWithContext(b.Context(), http.MethodPost, "/v1/payment_intents", strings.NewReader(form))
		r.Header.Set("Authorization", "Bearer sk_test_x")
		r.Header.Set("Idempotency-Key", fmt.Sprint(i))
		w := httptest.NewRecorder()
		if sim.ServeHTTP(w, r); w.Code != http.StatusOK {
			b.Fatal(w.Body.String())
		}
	}
}
