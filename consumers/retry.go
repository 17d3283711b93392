package consumers

import (
	"context"
	"errors"
	"fmt"
	"time"

	"ordersaga/events"
)

// Retried is a group as the retry tiers see it; *Group is one.
type Retried interface {
	Name() events.Group
	RetryTopics() []events.Topic
	Handle(ctx context.Context, batch []events.Record) (settled []bool, err error)
}

// RetryTiers waits for the retry copies of all groups of a process, in all tiers, and hands those that are due to their group. One
// fetcher feeds it (see adapters/kafka). Copies wait in memory, in the order of their partition: each partition's head decides when
// it goes on. Nothing is delivered before its due time, and no copy overtakes another of its partition.
type RetryTiers struct {
	*Pump
	works  []Work
	topics []events.Topic
}

// maxRetryBatch bounds the copies that one group gets at once.
const maxRetryBatch = 200

// NewRetryTiers makes the tiers of the given groups. mark is PumpConfig.Mark.
func NewRetryTiers(groups []Retried, observer Observer, clock func() time.Time, mark func([]Place)) (*RetryTiers, error) {
	if observer == nil {
		observer = Quiet{}
	}
	t := &RetryTiers{Pump: NewPump(PumpConfig{MaxBatch: maxRetryBatch, Due: Due, Clock: clock, Mark: mark})}
	owner := map[events.Topic]events.Group{}
	for _, g := range groups {
		own := map[events.Topic]bool{}
		for _, topic := range g.RetryTopics() {
			if other, taken := owner[topic]; taken {
				return nil, fmt.Errorf("retry topic %s belongs to group %s and to group %s: give groups names of their own", topic, other, g.Name())
			}
			owner[topic], own[topic] = g.Name(), true
			t.topics = append(t.topics, topic)
		}
		t.works = append(t.works, Work{
			Handle: g.Handle,
			Want:   func(l Lane) bool { return own[l.Topic] },
			Taken: func(b *Batch, now time.Time) {
				var late time.Duration
				for i := range b.Records {
					if due := Due(&b.Records[i]); !due.IsZero() {
						late = max(late, now.Sub(due))
					}
				}
				observer.Late(g.Name(), len(b.Records), late)
			},
		})
	}
	if len(t.topics) == 0 {
		return nil, errors.New("no group has retry topics: give their policies delays, or start no retry source")
	}
	return t, nil
}

// Topics lists the retry topics of all groups.
func (t *RetryTiers) Topics() []events.Topic { return t.topics }

// Run hands out what is due until ctx ends, and returns when every batch has come back.
func (t *RetryTiers) Run(ctx context.Context) { t.Pump.Run(ctx, t.works...) }
