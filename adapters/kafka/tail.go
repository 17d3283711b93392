package kafka

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/twmb/franz-go/pkg/kgo"

	"ordersaga/events"
)

// Tail reads a topic from now on, without a group: every process sees every record, and nothing is committed.
type Tail struct {
	c     *Client
	topic events.Topic
	want  func(key []byte) bool
}

// Where leaves out, undecoded, the records whose key nobody wants. want is called for every record and must be quick.
func (t *Tail) Where(want func(key []byte) bool) *Tail {
	t.want = want
	return t
}

// tailSkew is how far the clocks of producers may be behind ours before their records are missed at the start.
const tailSkew = 10 * time.Second

// NewTail makes a Tail of a topic.
func (c *Client) NewTail(topic events.Topic) (*Tail, error) {
	if err := checkName("topic", c.cfg.Names.Topic(topic), false); err != nil {
		return nil, err
	}
	return &Tail{c: c, topic: topic}, nil
}

// Run calls each for the messages of every fetch, in order a partition, until ctx ends; then it returns nil. ready, if not nil, is
// called once when the place to read from is known: what is produced later will be seen. A few records from before may be too.
// Records that cannot be read are reported and left out. each must not block for long: nothing is fetched meanwhile.
func (t *Tail) Run(ctx context.Context, ready func(), each func(ctx context.Context, batch []events.Envelope)) error {
	// By time, not by the end of the log: a partition that is added while we run is then read from its beginning.
	from := time.Now().Add(-tailSkew)
	t.c.sessions(ctx, "tail of "+string(t.topic), func(ctx context.Context) error {
		begun := time.Now().Add(-tailSkew)
		err := t.session(ctx, from, func() {
			if ready != nil {
				ready()
				ready = nil
			}
		}, each)
		from = begun // what the session that ended has seen is not shown again
		return err
	})
	return nil
}

func (t *Tail) session(ctx context.Context, from time.Time, ready func(), each func(context.Context, []events.Envelope)) error {
	at := kgo.NewOffset().AfterMilli(from.UnixMilli())
	name := t.c.cfg.Names.Topic(t.topic)
	cl, err := t.c.client(
		kgo.ConsumeTopics(name), kgo.ConsumeStartOffset(at), kgo.ConsumeResetOffset(at), kgo.FetchMaxWait(fetchWait), kgo.FetchMaxPartitionBytes(fetchPartition),
	)
	if err != nil {
		return err
	}
	defer cl.Close()
	if err := cl.Ping(ctx); err != nil {
		return wrong("connect", err)
	}
	ready()
	known := map[string]events.Topic{name: t.topic}
	for ctx.Err() == nil {
		fetches := cl.PollFetches(ctx)
		recs := records(fetches, known)
		batch := make([]events.Envelope, 0, len(recs))
		for i := range recs {
			if t.want != nil && !t.want(recs[i].Key) {
				continue
			}
			env, err := events.Decode(&recs[i])
			if err != nil {
				t.c.cfg.Observer.KafkaProblem("tail of "+name, fmt.Errorf("%d/%d left out: %w", recs[i].Partition, recs[i].Offset, err))
				continue
			}
			batch = append(batch, env)
		}
		if len(batch) > 0 {
			each(ctx, batch)
		}
		var fatal error
		fetches.EachError(func(topic string, partition int32, err error) {
			var lost *kgo.ErrDataLoss
			switch {
			case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
			case errors.As(err, &lost):
				t.c.cfg.Observer.KafkaProblem("tail of "+name, err)
			default:
				fatal = fmt.Errorf("fetch %s/%d: %w", topic, partition, err)
			}
		})
		if fatal != nil {
			return fatal
		}
	}
	return ctx.Err()
}
