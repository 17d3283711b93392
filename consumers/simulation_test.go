package consumers

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"ordersaga/events"
)

// A log that repeats, two members that do not know of each other, a handler, a database and a process that fail in every way there is,
// and operators who replay what died, twice: in the end every message has had its effect once, and nothing is dead or on its way.
func TestSimulationEveryMessageActsOnce(t *testing.T) {
	for seed := range uint64(24) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { simulate(t, seed) })
		})
	}
}

type world struct {
	*fixture
	mu   sync.Mutex
	rng  *rand.Rand
	calm bool // nothing fails any more
}

func (w *world) chance(percent int) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return !w.calm && w.rng.IntN(100) < percent
}

func simulate(t *testing.T, seed uint64) {
	t.Helper()
	w := &world{rng: rand.New(rand.NewPCG(seed, 7))}
	w.fixture = orderCommands(t, func(c *GroupConfig) { c.Policy.InPlace = int(seed % 3) })
	w.mem.Begin = func() error {
		if w.chance(3) {
			return awayError{}
		}
		return nil
	}
	w.mem.Commit = func() error {
		switch {
		case w.chance(3):
			return awayError{}
		case w.chance(3):
			return errors.New("nobody knows")
		case w.chance(1):
			return sqlError{"out of range"}
		}
		return nil
	}
	w.h.prepare = func(context.Context, []*Delivery) error {
		switch {
		case w.chance(3):
			return awayError{after: time.Second}
		case w.chance(2):
			panic("prepare")
		case w.chance(2):
			return errors.New("prepare")
		}
		return nil
	}
	w.h.result = func(*Delivery) Result {
		switch {
		case w.chance(10):
			return Result{Err: errors.New("503")}
		case w.chance(3):
			return Result{Err: poisonError{"impossible"}}
		case w.chance(3):
			return Result{Err: awayError{}}
		case w.chance(1):
			panic("apply")
		}
		return Result{}
	}

	original := records(events.TPlaceOrder, 60)
	log := slices.Clone(original) // what a member may be given: originals and copies, again and again
	ops := operators(w.fixture)
	for round := range 40 {
		if round == 30 {
			w.mu.Lock()
			w.calm = true
			w.mu.Unlock()
		}
		w.deliver(log)
		_, raw := w.mem.Drain()
		for _, topic := range w.group.RetryTopics() {
			log = append(log, asRecords(raw, topic)...)
		}
		if round%5 == 4 {
			w.replayAll(ops)
			_, raw := w.mem.Drain()
			log = append(log, asRecords(raw, w.group.RetryTopics()[0])...)
		}
	}
	w.once(original...)
	for _, d := range w.dead() {
		require.Equal(t, DeadResolved, d.Status)
	}
	for i := range original {
		row, ok := w.mem.Row(w.cfg.Name, events.Identity(&original[i]))
		require.True(t, ok)
		require.Equal(t, InboxHandled, row.State)
	}
}

// deliver gives batches of the log to two members at once, some of them twice, and kills some on their way.
func (w *world) deliver(log []events.Record) {
	w.mu.Lock()
	shuffled := slices.Clone(log)
	w.rng.Shuffle(len(shuffled), func(i, j int) { shuffled[i], shuffled[j] = shuffled[j], shuffled[i] })
	again := slices.Clone(shuffled[:w.rng.IntN(len(shuffled))])
	life := time.Duration(w.rng.IntN(20)) * time.Second
	w.mu.Unlock()
	var wg sync.WaitGroup
	for _, part := range [][]events.Record{shuffled, again} {
		wg.Go(func() {
			for batch := range slices.Chunk(part, 17) {
				ctx, cancel := context.WithCancel(w.Context())
				if w.chance(20) {
					time.AfterFunc(life, cancel)
				}
				settled, err := w.group.Handle(ctx, batch)
				cancel()
				if err == nil && slices.Contains(settled, false) {
					w.Errorf("unsettled without an error")
				}
			}
		})
	}
	wg.Wait()
}

// replayAll replays what is open, by two operators at once.
func (w *world) replayAll(ops *Operators[*MemoryTx]) {
	var wg sync.WaitGroup
	for _, actor := range []string{"ann", "bob"} {
		wg.Go(func() {
			for {
				_, _, err := ops.Do(w.Context(), Request{Action: ActionReplay, Actor: actor, Filter: &DeadFilter{Group: w.cfg.Name}})
				if err == nil {
					return
				}
			}
		})
	}
	wg.Wait()
	for {
		if _, err := ops.Resume(w.Context()); err == nil {
			return
		}
	}
}
