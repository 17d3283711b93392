//go:build unix

package kafka

import (
	"errors"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"ordersaga/consumers"
	"ordersaga/events"
)

func retryTopics() (out []events.Topic) {
	for _, d := range tiers {
		out = append(out, events.RetryTopic(events.GroupOrderCommands, d))
	}
	return append(out, events.DLQTopic(events.GroupOrderCommands))
}

// Records fail once, twice, or always; the process's members are stopped and started in the middle.
func TestRetryTiersLoseNothingAndAreNeverEarlyNorReordered(t *testing.T) {
	onBoth(t, func(k *env) {
		t := k.T
		k.topics(3, append(retryTopics(), events.TopicCommands)...)
		l, mem := newLedger(), consumers.NewMemory()
		recs := messages(events.TPlaceOrder, 600)
		always := map[string]bool{}
		for i := range recs {
			if i%50 == 7 {
				always[events.Identity(&recs[i]).String()] = true
			}
		}
		l.fail = func(d *consumers.Delivery, _ int) error {
			switch n := int(d.ID[15]) % 3; {
			case always[d.ID.String()], d.Attempt == 1, d.Attempt == 2 && n == 0:
				return errors.New("gateway answered 503")
			}
			return nil
		}
		g := commandGroup(k, mem, l)
		p := k.producer()
		relay(k, mem, p)
		k.source(k.c, g, func(*SourceConfig) {})
		rs, err := k.c.NewRetrySource([]consumers.Retried{g}, nil, nil)
		require.NoError(t, err)
		stop := runs(k, rs.Run)
		for part := range slices.Chunk(recs, 60) {
			k.produce(p, part...)
			sleep(t.Context(), 50*time.Millisecond)
		}
		eventually(t, 30*time.Second, "the first retries are handled", func() bool { return l.count() > 100 })
		stop()
		stop = runs(k, rs.Run)
		eventually(t, 60*time.Second, "all handled", func() bool { return l.count() == len(recs)-len(always) })
		dead := func() []consumers.DeadLetter {
			page, _, err := mem.DeadLetters(t.Context(), consumers.DeadFilter{}, "", 100)
			require.NoError(t, err)
			return page
		}
		eventually(t, 30*time.Second, "the rest is dead", func() bool { return len(dead()) == len(always) })
		for _, d := range dead() {
			require.True(t, always[d.MessageID.String()])
			require.Equal(t, 3, d.Attempts)
			require.Equal(t, consumers.ClassExhausted, d.Class)
		}
		stop() // commits

		l.mu.Lock()
		defer l.mu.Unlock()
		type lane struct {
			topic     events.Topic
			partition int32
		}
		last := map[lane]int64{}
		var worst time.Duration
		for i, d := range l.order {
			require.Equal(t, 1, l.effects[d.ID])
			at := lane{d.Record.Topic, d.Record.Partition}
			require.Greater(t, d.Record.Offset+1, last[at], "overtaken on %v", at)
			last[at] = d.Record.Offset + 1
			due, err := strconv.ParseInt(string(d.Record.Header(consumers.HeaderDue)), 10, 64)
			require.NoError(t, err)
			late := l.at[i].Sub(time.UnixMilli(due))
			require.GreaterOrEqual(t, late, time.Duration(0), "early")
			worst = max(worst, late)
			require.True(t, strings.HasPrefix(string(d.Record.Topic), "retry."))
		}
		t.Logf("latest after its due time, restart included: %s", worst.Round(time.Millisecond))
		var lag int64
		for _, topic := range rs.groups[0].RetryTopics() {
			_, n := k.committed(GroupRetry, topic)
			lag += n
		}
		require.Zero(t, lag)
	})
}

func TestRetryPartitionsThatHaveEnoughArePaused(t *testing.T) {
	onBoth(t, func(k *env) {
		t := k.T
		k.topics(1, append(retryTopics(), events.TopicCommands)...)
		l, mem := newLedger(), consumers.NewMemory()
		g := commandGroup(k, mem, l)
		// Copies as a group would leave them: more than a lane holds, due in a while.
		n := 3 * laneHigh
		due := strconv.FormatInt(time.Now().Add(4*time.Second).UnixMilli(), 10)
		recs := messages(events.TPlaceOrder, n)
		for i := range recs {
			id := events.Identity(&recs[i])
			recs[i].Topic = events.RetryTopic(g.Name(), tiers[1])
			for key, v := range map[string]string{
				consumers.HeaderTicket: "7", consumers.HeaderAttempt: "2", consumers.HeaderTier: "2", consumers.HeaderDue: due,
				consumers.HeaderMessageID: id.String(), consumers.HeaderOrigin: "orders.commands.v1/0/" + strconv.Itoa(i),
			} {
				recs[i].Headers = append(recs[i].Headers, events.Header{Key: key, Value: []byte(v)})
			}
		}
		k.produce(k.producer(), recs...)
		rs, err := k.c.NewRetrySource([]consumers.Retried{g}, nil, nil)
		require.NoError(t, err)
		runs(k, rs.Run)
		eventually(t, 60*time.Second, "all handled: what was paused is resumed", func() bool { return l.count() == n })
	})
}

// TestTiersOfFormerDelaysAreFound: retry.delays may change while copies wait in topics that the new ones do not name.
func TestTiersOfFormerDelaysAreFound(t *testing.T) {
	onBoth(t, func(k *env) {
		t := k.T
		k.topics(1, events.TopicCommands, events.DLQTopic(events.GroupStock), "retry.stock.5s", "retry.stock.90s", "retry.stock.1h", "retry.compensation-stock.5s", "retry.stock.old.5s",
			"retry.stock.60s") // written otherwise than we write it: not ours
		got, err := k.c.Tiers(t.Context(), events.GroupStock)
		require.NoError(t, err)
		require.ElementsMatch(t, []events.Topic{"retry.stock.5s", "retry.stock.90s", "retry.stock.1h"}, got)
	})
}
