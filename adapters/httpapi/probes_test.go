package httpapi

import (
	"context"
	"errors"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/stretchr/testify/require"
)

// TestProbesAlone: a process that takes no orders answers for its health, and for nothing else.
func TestProbesAlone(t *testing.T) {
	state := map[string]error{"kafka": nil}
	a := NewProbes(Deps{
		Ready: func(context.Context) map[string]error { return state }, Log: slog.New(slog.DiscardHandler),
		Metrics: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusOK) }),
	})
	get := func(path string) int {
		w := httptest.NewRecorder()
		a.ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), http.MethodGet, path, nil))
		return w.Code
	}
	for _, path := range []string{"/healthz", "/readyz", "/metrics"} {
		require.Equal(t, http.StatusOK, get(path), path)
	}
	for _, path := range []string{"/v1/orders", "/v1/dlq", "/debug/pprof/", "/openapi.yaml"} {
		require.Equal(t, http.StatusNotFound, get(path), path)
	}
	a.Drain()
	require.Equal(t, http.StatusServiceUnavailable, get("/readyz"), "it is stopping")
	require.Equal(t, http.StatusOK, get("/healthz"))

	b := NewProbes(Deps{Ready: func(context.Context) map[string]error { return map[string]error{"kafka": errors.New("away")} }, Log: slog.New(slog.DiscardHandler), Metrics: http.NotFoundHandler()})
	w := httptest.NewRecorder()
	b.ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/readyz", nil))
	require.Equal(t, http.StatusServiceUnavailable, w.Code)
	require.Contains(t, w.Body.String(), "away")
}
