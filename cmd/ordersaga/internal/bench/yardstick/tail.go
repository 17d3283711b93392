package main

import (
	"context"
	"encoding/hex"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/twmb/franz-go/pkg/kgo"

	"ordersaga/events"
)

// tail reads this system's public events as a customer would. It tells of orders that have ended, so that a closed loop can hold a number of
// sagas under way; or it keeps when each order's first event was produced. Safe for concurrent use.
type tail struct {
	cl   *kgo.Client
	done chan struct{}

	mu     sync.Mutex
	number int
	seen   []bool // orders that are followed and were told of
	told   func(i int, r *kgo.Record)
	first  bool // the first event of each is told of, else the last
}

// startTail reads a topic from its beginning, until ctx ends or it is closed.
func startTail(ctx context.Context, brokers, topic string) (*tail, error) {
	cl, err := kgo.NewClient(kgo.SeedBrokers(brokers), kgo.ConsumeTopics(topic), kgo.ConsumeResetOffset(kgo.NewOffset().AtStart()), kgo.FetchMaxWait(250*time.Millisecond))
	if err != nil {
		return nil, fmt.Errorf("events: %w", err)
	}
	t := &tail{cl: cl, done: make(chan struct{})}
	go t.run(ctx)
	return t, nil
}

// close ends the reading. It may be called once.
func (t *tail) close() {
	t.cl.Close()
	<-t.done
}

// follow calls told once for each end among the n orders of a timed series' number, from now on; with first once for each order's first event.
func (t *tail) follow(number, n int, first bool, told func(i int, r *kgo.Record)) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.number, t.seen, t.first, t.told = number&maxNumber, make([]bool, n), first, told
}

// unfollow ends it.
func (t *tail) unfollow() { t.follow(0, 0, false, nil) }

func (t *tail) run(ctx context.Context) {
	defer close(t.done)
	for {
		f := t.cl.PollFetches(ctx)
		if f.IsClientClosed() || ctx.Err() != nil {
			return
		}
		t.mu.Lock()
		f.EachRecord(t.take)
		t.mu.Unlock()
	}
}

// typePlaced is what the type of an order's first event ends with.
var typePlaced = string(events.TOrderPlaced)

// take looks at a record, under mu.
func (t *tail) take(r *kgo.Record) {
	number, i, ok := parseOrderID(r.Key)
	if !ok || t.told == nil || number != t.number || i >= len(t.seen) || t.seen[i] {
		return
	}
	placed := false
	for _, h := range r.Headers {
		if h.Key == events.HeaderType {
			placed = strings.HasSuffix(string(h.Value), typePlaced)
		}
	}
	if placed == t.first {
		t.seen[i] = true
		t.told(i, r)
	}
}

// producedWithin bounds the reading of events that are there already.
const producedWithin = time.Minute

// producedAt reads when the first event of each order of a phase was handed to the producer, by number.
func producedAt(ctx context.Context, brokers, topic string, number, n int) ([]time.Time, error) {
	ctx, cancel := context.WithTimeout(ctx, producedWithin)
	defer cancel()
	out := make([]time.Time, n)
	all := make(chan struct{})
	left := n
	t, err := startTail(ctx, brokers, topic)
	if err != nil {
		return nil, err
	}
	defer t.close()
	t.follow(number, n, true, func(i int, r *kgo.Record) {
		out[i] = r.Timestamp
		if left--; left == 0 {
			close(all)
		}
	})
	select {
	case <-all:
		return out, nil
	case <-ctx.Done():
		return nil, fmt.Errorf("not every order's first event is in the topic: %w", ctx.Err())
	}
}

// parseOrderID reads the numbers of a timed series and of its order in an id.
func parseOrderID(text []byte) (number, i int, ok bool) {
	const length, version, last = 36, 14, 24
	if len(text) != length {
		return 0, 0, false
	}
	var b [2 + 6]byte // the version's digit and the number, then the order's
	if _, err := hex.Decode(b[:2], text[version:version+4]); err != nil {
		return 0, 0, false
	}
	if _, err := hex.Decode(b[2:], text[last:]); err != nil {
		return 0, 0, false
	}
	for _, v := range b[2:] {
		i = i<<8 | int(v)
	}
	return (int(b[0])<<8 | int(b[1])) & maxNumber, i, true
}
