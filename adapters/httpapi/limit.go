package httpapi

import (
	"sync"
	"time"

	"golang.org/x/time/rate"
)

// limiter is a token bucket a caller. It holds one for each name that a tokens file has had since the last change of it, so the bound
// of that file is its bound.
type limiter struct {
	mu      sync.Mutex
	limits  Limits
	buckets map[string]*rate.Limiter
}

func newLimiter(l Limits) *limiter { return &limiter{limits: l, buckets: map[string]*rate.Limiter{}} }

// set changes the limits of all; what callers have saved up stays, up to the new burst.
func (l *limiter) set(n Limits) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.limits = n
	for _, b := range l.buckets {
		b.SetLimit(rate.Limit(n.Rate))
		b.SetBurst(n.Burst)
	}
}

// keep drops the buckets of callers that known does not know.
func (l *limiter) keep(known func(caller string) bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for name := range l.buckets {
		if !known(name) {
			delete(l.buckets, name)
		}
	}
}

func (l *limiter) bucket(caller string) *rate.Limiter {
	l.mu.Lock()
	defer l.mu.Unlock()
	b := l.buckets[caller]
	if b == nil {
		b = rate.NewLimiter(rate.Limit(l.limits.Rate), l.limits.Burst)
		l.buckets[caller] = b
	}
	return b
}

// allow takes a token, or says in how long there will be one.
func (l *limiter) allow(caller string) (time.Duration, bool) {
	r := l.bucket(caller).Reserve()
	if !r.OK() {
		return maxRetryAfter, false // a burst of 0 lets nobody through
	}
	if d := r.Delay(); d > 0 {
		r.Cancel()
		return d, false
	}
	return 0, true
}
