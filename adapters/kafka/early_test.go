//go:build unix

package kafka

import (
	"context"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"

	"ordersaga/consumers"
	"ordersaga/events"
)

// Two members of a group, and everything offered to both ahead of Kafka: each takes what will lie in its partitions, the copies are settled
// unread, and offsets pass them.
func TestMembersTakeEarlyWhatWillLieInTheirPartitions(t *testing.T) {
	onBoth(t, func(k *env) {
		t := k.T
		const n = 300
		k.topics(6, events.TopicStock)
		l, mem := newLedger(), consumers.NewMemory()
		g, err := consumers.NewGroup(consumers.GroupConfig{Name: events.GroupStock, Topic: events.TopicStock, Inbox: consumers.InboxFailures}, mem, l)
		require.NoError(t, err)
		var mu sync.Mutex
		early, late := 0, 0
		handle := func(ctx context.Context, batch []events.Record) ([]bool, error) {
			mu.Lock()
			for i := range batch {
				if batch[i].Offset == consumers.EarlyOffset {
					early++
				} else {
					late++
				}
			}
			mu.Unlock()
			return g.Handle(ctx, batch)
		}
		count := func() (int, int) {
			mu.Lock()
			defer mu.Unlock()
			return early, late
		}
		var members [2]*Source
		for i := range members {
			src, err := k.client(func(*Config) {}).NewSource(SourceConfig{Group: events.GroupStock, Topic: events.TopicStock})
			require.NoError(t, err)
			members[i] = src
			require.False(t, src.Offer(message(events.TReserveStock, uuid.New())), "it has not begun")
			runs(k, func(ctx context.Context) error { return src.Run(ctx, handle) })
		}
		counted := func(m *member) bool { return m != nil && m.partitions.Load() == 6 }
		shared := func() bool {
			a, b := members[0].now.Load(), members[1].now.Load()
			if !counted(a) || !counted(b) {
				return false
			}
			held := 0
			for _, m := range []*member{a, b} {
				m.mu.Lock()
				if len(m.assigned) == 0 {
					held = -6
				}
				held += len(m.assigned)
				m.mu.Unlock()
			}
			return held == 6
		}
		eventually(t, 30*time.Second, "both have partitions", shared)
		require.False(t, members[0].Offer(message(events.TPlaceOrder, uuid.New())), "another topic")

		recs := messages(events.TReserveStock, n)
		taken := [2]int{}
		for _, r := range recs {
			for i, m := range members {
				if m.Offer(r) {
					taken[i]++
				}
			}
			if (taken[0]+taken[1])%50 == 49 {
				sleep(t.Context(), time.Millisecond)
			}
		}
		require.Positive(t, taken[0])
		require.Positive(t, taken[1])
		require.LessOrEqual(t, taken[0]+taken[1], n, "none is taken twice: a key has one partition")
		eventually(t, 30*time.Second, "what was taken is handled", func() bool { e, _ := count(); return e == taken[0]+taken[1] })
		handled := messages(events.TReserveStock, 60) // in the transactions that emitted them
		for i := range handled {
			holders := 0
			for _, m := range members {
				if lane, ours := m.Holds(handled[i].Key); ours {
					holders++
					m.Settled(events.Identity(&handled[i]), lane, events.PayloadHash(handled[i].Value))
				}
			}
			require.Equal(t, 1, holders)
		}
		k.produce(k.producer(), slices.Concat(recs, handled)...)
		eventually(t, 30*time.Second, "all committed", func() bool { _, lag := k.committed(events.GroupStock, events.TopicStock); return lag == 0 })
		l.exactlyOnce(t, recs)
		e, rest := count()
		require.Equal(t, n, e+rest, "no copy of an early one was handled, nor what had been handled before")
	})
}
