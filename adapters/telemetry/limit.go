package telemetry

import (
	"sync"
	"time"
)

// limiter bounds how often each kind of thing is let through: burst times in a window, then, if every is not 0, each every-th. The
// first of a kind is always let through, also in a storm of other kinds; beyond maxKinds kinds in one window the new ones share a
// place, so that text from outside cannot make it grow.
type limiter struct {
	window   time.Duration
	burst    int
	every    int
	maxKinds int

	mu    sync.Mutex
	kinds map[string]*allowance
	swept time.Time
}

type allowance struct {
	began      time.Time
	seen       int
	suppressed int
}

const overflowKind = "\x00overflow"

func newLimiter(window time.Duration, burst, every, maxKinds int) *limiter {
	return &limiter{window: window, burst: burst, every: every, maxKinds: maxKinds, kinds: map[string]*allowance{}}
}

// allow says whether this one goes through, and how many of its kind did not since the last that did.
func (l *limiter) allow(kind string, now time.Time) (ok bool, suppressed int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	a := l.kinds[kind]
	if a == nil {
		a = l.add(kind, now)
	}
	if age := now.Sub(a.began); age >= l.window || age < 0 {
		a.began, a.seen = now, 0
	}
	a.seen++
	if a.seen <= l.burst || l.every > 0 && (a.seen-l.burst)%l.every == 0 {
		suppressed, a.suppressed = a.suppressed, 0
		return true, suppressed
	}
	a.suppressed++
	return false, 0
}

func (l *limiter) add(kind string, now time.Time) *allowance {
	if len(l.kinds) >= l.maxKinds && now.Sub(l.swept) >= l.window {
		l.swept = now
		for k, a := range l.kinds {
			if now.Sub(a.began) >= l.window {
				delete(l.kinds, k)
			}
		}
	}
	if len(l.kinds) >= l.maxKinds {
		kind = overflowKind
		if a := l.kinds[kind]; a != nil {
			return a
		}
	}
	a := &allowance{began: now}
	l.kinds[kind] = a
	return a
}
