package boot

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"ordersaga/adapters/postgres"
)

// TestF22_NearlyFullDiskSheds: the disk of the data directory is looked at before anything is asked of the database, and what is refused
// is told when to come again.
func TestF22_NearlyFullDiskSheds(t *testing.T) {
	a := newAdmission(nil, Intake{MinDisk: 1 << 62}, 0, t.TempDir())
	require.NoError(t, a.check(), "not looked yet")
	a.state.Store(a.look(t.Context()))
	err := a.check()
	require.ErrorContains(t, err, "MiB left")
	var later interface{ RetryAfter() time.Duration }
	require.ErrorAs(t, err, &later)
	require.Positive(t, later.RetryAfter())
}

// Sagas are counted again before there can be too many of them, and no more often.
func TestSagasAreCountedWhenThereCouldBeTooMany(t *testing.T) {
	require.Zero(t, recountAfter(0))
	require.Zero(t, recountAfter(-5), "while there are too many, each time")
	require.Equal(t, time.Second, recountAfter(placedAtMost))
	require.Equal(t, recountWithin, recountAfter(1<<40))
	a := newAdmission(nil, Intake{}, 0, "")
	now := time.Now()
	a.counted, a.recount = 10, now.Add(time.Second)
	require.False(t, a.tooMany(t.Context(), 100, now), "the database is not asked")
	require.False(t, a.tooMany(t.Context(), 0, now), "no bound")
}

// Orders that are late shed the intake when most of a fair number are, and nobody is away for whom they wait.
func TestOverloadIsToldFromASlowOrderAndFromAnOutage(t *testing.T) {
	require.True(t, tooLate(postgres.Fate{Placed: 200, Pending: 101}))
	require.False(t, tooLate(postgres.Fate{Placed: 200, Pending: 100}), "half are done")
	require.False(t, tooLate(postgres.Fate{Placed: 200, Pending: 200, Away: true}))
	require.False(t, tooLate(postgres.Fate{Placed: 3, Pending: 3}))
	require.False(t, tooLate(postgres.Fate{}))
}

// The throttle closes in on what the rest can do, whatever that is, and is gone when it does not matter any more.
func TestTheThrottleTakesInWhatIsWorkedOff(t *testing.T) {
	for _, rate := range []int64{1000, 2000, 8000} { // orders a second that can be worked off; twice as many come
		var th throttle
		var running, done int64
		placed := []int64{} // by second
		const delay, seconds = 5, 120
		for s := range int64(seconds) {
			var in int64
			for range 5 {
				th.fill(running)
				for range 2 * rate / 5 {
					if th.take() {
						in++
						running++
					}
				}
				n := min(running, rate/5)
				running -= n
				done += n
			}
			placed = append(placed, in)
			// The front: the orders of delay seconds ago are pending if those placed since are fewer than those under way.
			var since int64
			for i := max(0, s-delay+1); i <= s; i++ {
				since += placed[i]
			}
			th.judge(s >= delay && running > since, running)
		}
		require.InDelta(t, rate*seconds, done, float64(rate*seconds)/50, "nobody idles")
		require.Less(t, running, rate*(delay+3))
		require.Greater(t, running, rate, "a queue, so that nobody idles")
		for range 60 {
			th.judge(false, 10)
			th.fill(10)
		}
		require.True(t, th.take())
		require.False(t, th.bound.Load())
	}
}
