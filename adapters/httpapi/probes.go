package httpapi

import (
	"context"
	"errors"
	"io/fs"
	"maps"
	"net/http"
	"sync"
	"time"
)

// Bounds of readiness, which anybody may ask for: what its checks cost is paid at most so often.
const (
	readyTimeout = 2 * time.Second        // of all checks together
	readyFresh   = 500 * time.Millisecond // for so long the last answer is repeated
)

// readiness remembers what the checks said.
type readiness struct {
	mu     sync.Mutex // held during the checks, so that a crowd waits for one round of them
	at     time.Time
	checks map[string]error
}

func (a *API) checks(ctx context.Context) map[string]error {
	a.readiness.mu.Lock()
	defer a.readiness.mu.Unlock()
	if a.readiness.checks != nil && time.Since(a.readiness.at) < readyFresh {
		return a.readiness.checks
	}
	// The answer is for others too: it does not depend on whether the one who asked is still there.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), readyTimeout)
	defer cancel()
	a.readiness.checks, a.readiness.at = maps.Clone(a.Ready(ctx)), time.Now()
	return a.readiness.checks
}

func (a *API) ready(w http.ResponseWriter, r *http.Request) {
	h := Health{Status: HealthStatusOk, Checks: map[string]string{}}
	for name, err := range a.checks(r.Context()) {
		var d interface{ Degraded() bool }
		switch {
		case err == nil:
			h.Checks[name] = "ok"
		case errors.As(err, &d) && d.Degraded():
			h.Checks[name] = clean("degraded: "+err.Error(), maxDetail)
		default:
			h.Status = HealthStatusUnavailable
			h.Checks[name] = clean(err.Error(), maxDetail)
		}
	}
	if a.draining.Load() {
		h.Status = HealthStatusUnavailable
		h.Checks["process"] = "shutting down"
	}
	status := http.StatusOK
	if h.Status != HealthStatusOk {
		status = http.StatusServiceUnavailable
		retryAfter(w, time.Second)
	}
	answer(w, status, h)
}

func (a *API) health(w http.ResponseWriter, _ *http.Request) {
	answer(w, http.StatusOK, Health{Status: HealthStatusOk})
}

func document(b []byte) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/yaml")
		_, _ = w.Write(b) // the client is gone if it fails
	}
}

// schema answers a JSON Schema. The route's wildcard is one segment, and fs.FS takes no name that leads out of it.
func (a *API) schema(w http.ResponseWriter, r *http.Request) {
	b, err := fs.ReadFile(a.Schemas, "json/"+r.PathValue("file"))
	if err != nil {
		a.fail(w, r, problem(http.StatusNotFound, "not_found", "Not found", "there is no such schema; /asyncapi.yaml names them"))
		return
	}
	answerBytes(w, http.StatusOK, b)
}
