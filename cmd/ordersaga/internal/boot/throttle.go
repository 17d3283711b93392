package boot

import (
	"context"
	"sync/atomic"
	"time"

	"ordersaga/adapters/postgres"
)

// throttle keeps the orders under way from growing for longer than they are worked off. It decides by how long orders wait, not by how many there
// are: once most orders of Intake.MaxDelay ago are pending still, as many may be under way as are now, and then a little fewer or more, as that
// delay has it. So about as many are taken in as are done, whatever a machine can do; the rest is told to come again.
//
// It must not be a switch: taking in has the better of the CPU over working off, and a machine that alternated would do each half of the time.
type throttle struct {
	limit int64 // sagas under way; 0: no bound
	slack int   // looks in a row at which the limit did not matter

	bound  atomic.Bool
	credit atomic.Int64 // orders that may come in until the next look
}

const (
	throttleEvery  = 200 * time.Millisecond
	throttleFloor  = 2000    // sagas under way are never too many, whatever a slow gateway makes of their delay
	throttleMost   = 200_000 // counted at most
	throttleForget = 20      // looks without a need for the limit after which it is lifted
	throttleRecent = 4       // delays: what was placed before is not counted, it stands still for other reasons
)

// judge adapts the limit, once a second: late says that orders wait for too long, running how many are under way.
func (t *throttle) judge(late bool, running int64) {
	switch {
	case late && t.limit == 0:
		t.limit, t.slack = max(throttleFloor, running*9/10), 0
	case late: // what is decided now shows when the orders that come in now are done: small steps
		t.limit, t.slack = max(throttleFloor, t.limit*96/100), 0
	case t.limit == 0:
	case running >= t.limit*9/10:
		t.limit, t.slack = t.limit*102/100, 0
	default:
		if t.slack++; t.slack >= throttleForget {
			t.limit = 0
		}
	}
}

// fill gives out what may come in until the next look.
func (t *throttle) fill(running int64) {
	t.credit.Store(t.limit - running)
	t.bound.Store(t.limit > 0)
}

// take takes one order in; false if it is too many.
func (t *throttle) take() bool { return !t.bound.Load() || t.credit.Add(-1) >= 0 }

// A sample is the first orders of a period. A few that stand still, for reasons of their own, say nothing.
const (
	samplePeriod = time.Second
	sampleSize   = 200
	sampleLeast  = 20
)

func tooLate(f postgres.Fate) bool {
	return !f.Away && f.Placed >= sampleLeast && 2*f.Pending > f.Placed
}

// late reports that most of the orders of so long ago are pending still. While a dependency is away that is no reason: they wait for it, and those
// that come in may too.
func (a *admission) late(ctx context.Context, delay time.Duration) bool {
	until := a.db.Now().Add(-delay)
	f, err := a.db.FateOf(ctx, until.Add(-samplePeriod), until, sampleSize)
	return err == nil && tooLate(f)
}

// regulate looks at the throttle; whole says that a second has passed. Errors leave it as it is: the intake's own transaction says what is wrong.
func (a *admission) regulate(ctx context.Context, whole bool) {
	t, delay := &a.throttle, a.cfg.Load().MaxDelay
	if delay <= 0 {
		t.limit = 0
		t.fill(0)
		return
	}
	late := whole && a.late(ctx, delay)
	if !late && t.limit == 0 {
		t.fill(0)
		return
	}
	running, err := a.db.StartedWithin(ctx, a.forward-throttleRecent*delay, throttleMost)
	if err != nil {
		return
	}
	if whole {
		t.judge(late, running)
	}
	t.fill(running)
}
