//go:build unix

package kafka

import (
	"context"
	"errors"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"ordersaga/adapters/embedded/testenv"
	"ordersaga/consumers"
	"ordersaga/events"
)

// The broker is killed under load and comes back after longer than a session: members, retry tiers, tail and producer go on by
// themselves, nothing that was acknowledged is lost, and nothing acts twice.
func TestF20_BrokerIsKilledAndComesBack(t *testing.T) {
	broker := testenv.KafkaJars(t)
	k := newEnv(t, broker.Addrs())
	k.topics(3, append(retryTopics(), events.TopicCommands, events.TopicEvents)...)
	l, mem := newLedger(), consumers.NewMemory()
	l.fail = func(d *consumers.Delivery, _ int) error {
		if d.Attempt == 1 && d.ID[15]%4 == 0 {
			return errors.New("gateway answered 503")
		}
		return nil
	}
	g := commandGroup(k, mem, l)
	k.source(k.c, g, func(*SourceConfig) {})
	rs, err := k.c.NewRetrySource([]consumers.Retried{g}, nil, nil)
	require.NoError(t, err)
	runs(k, rs.Run)
	tail, err := k.c.NewTail(events.TopicEvents)
	require.NoError(t, err)
	var mu sync.Mutex
	tailed := 0
	tailing := make(chan struct{})
	runs(k, func(ctx context.Context) error {
		return tail.Run(ctx, func() { close(tailing) }, func(_ context.Context, batch []events.Envelope) {
			mu.Lock()
			defer mu.Unlock()
			tailed += len(batch)
		})
	})
	<-tailing
	p := k.producer()
	relay(k, mem, p)

	var acked, sent []events.Record
	stop := runs(k, func(ctx context.Context) error {
		for ctx.Err() == nil {
			for _, r := range messages(events.TPlaceOrder, 10) {
				mu.Lock()
				sent = append(sent, r)
				mu.Unlock()
				p.Produce(context.WithoutCancel(ctx), r, func(err error) {
					if err != nil {
						t.Errorf("a record was given up: %v", err)
						return
					}
					mu.Lock()
					defer mu.Unlock()
					acked = append(acked, r)
				})
			}
			sleep(ctx, 20*time.Millisecond)
		}
		return nil
	})
	eventually(t, 30*time.Second, "it flows", func() bool { return l.count() > 300 })
	require.NoError(t, broker.Kill())
	sleep(t.Context(), 8*time.Second)
	var away interface{ Outage() string }
	require.ErrorAs(t, k.c.Ping(t.Context()), &away)
	require.Equal(t, "kafka", away.Outage())
	before := l.count()
	require.NoError(t, broker.Restart(t.Context()))
	back := time.Now()
	eventually(t, 60*time.Second, "it flows again", func() bool { return l.count() > before+300 })
	t.Logf("from the broker's return to the 300th record: %s", time.Since(back).Round(time.Millisecond))
	stop()
	flush, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	require.NoError(t, p.Flush(flush))
	mu.Lock()
	require.Len(t, acked, len(sent), "what is sent while the broker is away waits for it")
	all := len(sent)
	mu.Unlock()
	eventually(t, 60*time.Second, "all handled", func() bool { return l.count() == all })
	l.exactlyOnce(t, sent)
	k.produce(p, messages(events.TOrderPlaced, 5)...)
	eventually(t, 30*time.Second, "the tail goes on", func() bool { mu.Lock(); defer mu.Unlock(); return tailed == 5 })
}
