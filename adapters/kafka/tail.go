package kafka

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/twmb/franz-go/pkg/kadm"
	"github.com/twmb/franz-go/pkg/kgo"

	"ordersaga/events"
)

// Tail reads a topic from now on, without a group: every process sees every record, and nothing is committed.
type Tail struct {
	c       *Client
	topic   events.Topic
	want    func(key []byte) bool
	awaited func() <-chan struct{}
	rest    time.Duration
}

// Where leaves out, undecoded, the records whose key nobody wants. want is called for every record and must be quick.
func (t *Tail) Where(want func(key []byte) bool) *Tail {
	t.want = want
	return t
}

// tailRest is between two looks at a topic that nobody waits for. The client fetches ahead once between them, so that is how often brokers and
// we have work with it, instead of with every record that is produced.
const tailRest = 100 * time.Millisecond

// While makes the tail rest between its fetches as long as nobody waits for what it reads. awaited answers a channel that is closed, or will
// be, when somebody does. Then it goes on at once, from where it was: who waits first and then looks at the state that the records tell of
// misses none.
func (t *Tail) While(awaited func() <-chan struct{}) *Tail {
	t.awaited = awaited
	return t
}

// tailSkew is how far the clocks of producers may be behind ours before their records are missed at the start.
const tailSkew = 10 * time.Second

// NewTail makes a Tail of a topic.
func (c *Client) NewTail(topic events.Topic) (*Tail, error) {
	if err := checkName("topic", c.cfg.Names.Topic(topic), false); err != nil {
		return nil, err
	}
	return &Tail{c: c, topic: topic, rest: tailRest}, nil
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
	name := t.c.cfg.Names.Topic(t.topic)
	begin, err := t.begin(ctx, name, from)
	if err != nil {
		return err
	}
	at := kgo.NewOffset().AfterMilli(from.UnixMilli())
	cl, err := t.c.client(
		kgo.ConsumePartitions(map[string]map[int32]kgo.Offset{name: begin}), kgo.ConsumeResetOffset(at), kgo.FetchMaxWait(fetchWait), kgo.FetchMaxPartitionBytes(fetchPartition),
	)
	if err != nil {
		return err
	}
	defer cl.Close()
	ready()
	looked := time.Now()
	for ctx.Err() == nil {
		t.pause(ctx)
		poll, cancel := context.WithTimeout(ctx, t.c.cfg.Discover)
		fetches := cl.PollFetches(poll)
		cancel()
		if batch := t.read(fetches); len(batch) > 0 {
			each(ctx, batch)
		}
		if err := t.fetchErrors(fetches); err != nil {
			return err
		}
		if time.Since(looked) >= t.c.cfg.Discover {
			t.discover(ctx, cl, name, begin)
			looked = time.Now()
		}
	}
	return ctx.Err()
}

// begin finds where each partition is read from: its first record since a moment, or its end. The ends are asked for first. The client would ask for the
// moment, and where nothing has come since, for the end afterwards, and miss what came between the two.
func (t *Tail) begin(ctx context.Context, name string, from time.Time) (map[int32]kgo.Offset, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	ends, err := t.c.adm.ListEndOffsets(ctx, name)
	if err == nil {
		err = ends.Error()
	}
	if err != nil {
		return nil, wrong("find the end of "+name, err)
	}
	since, err := t.c.adm.ListOffsetsAfterMilli(ctx, from.UnixMilli(), name)
	if err == nil {
		err = since.Error()
	}
	if err != nil {
		return nil, wrong("find the place in "+name, err)
	}
	begin := map[int32]kgo.Offset{}
	ends.Each(func(end kadm.ListedOffset) {
		at := end.Offset
		if o, ok := since.Lookup(name, end.Partition); ok {
			at = min(at, o.Offset)
		}
		begin[end.Partition] = kgo.NewOffset().At(at)
	})
	return begin, nil
}

// discover has new partitions read from their beginning. If it fails the next look finds them.
func (t *Tail) discover(ctx context.Context, cl *kgo.Client, name string, known map[int32]kgo.Offset) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	topics, err := t.c.adm.ListTopics(ctx, name)
	if err != nil {
		t.problem(fmt.Errorf("look for new partitions: %w", err))
		return
	}
	fresh := map[int32]kgo.Offset{}
	for p := range topics[name].Partitions {
		if _, ok := known[p]; !ok {
			fresh[p] = kgo.NewOffset().AtStart()
			known[p] = fresh[p]
		}
	}
	if len(fresh) > 0 {
		cl.AddConsumePartitions(map[string]map[int32]kgo.Offset{name: fresh})
	}
}

// fetchErrors reports what the client deals with itself, and answers what it does not.
func (t *Tail) fetchErrors(fetches kgo.Fetches) error {
	var fatal error
	fetches.EachError(func(topic string, partition int32, err error) {
		var lost *kgo.ErrDataLoss
		switch {
		case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		case errors.As(err, &lost):
			t.problem(err)
		default:
			fatal = fmt.Errorf("fetch %s/%d: %w", topic, partition, err)
		}
	})
	return fatal
}

// pause waits for tailRest, until somebody waits for the records or ctx ends.
func (t *Tail) pause(ctx context.Context) {
	if t.awaited == nil {
		return
	}
	awaited := t.awaited()
	select {
	case <-awaited:
		return
	default:
	}
	timer := time.NewTimer(t.rest)
	defer timer.Stop()
	select {
	case <-awaited:
	case <-timer.C:
	case <-ctx.Done():
	}
}

// read decodes the records that somebody wants.
func (t *Tail) read(fetches kgo.Fetches) (batch []events.Envelope) {
	fetches.EachRecord(func(r *kgo.Record) {
		if t.want != nil && !t.want(r.Key) {
			return
		}
		rec := received(r, t.topic, appendHeaders(nil, r))
		env, err := events.Decode(&rec)
		if err != nil {
			t.problem(fmt.Errorf("%d/%d left out: %w", r.Partition, r.Offset, err))
			return
		}
		batch = append(batch, env)
	})
	return batch
}

func (t *Tail) problem(err error) {
	t.c.cfg.Observer.KafkaProblem("tail of "+t.c.cfg.Names.Topic(t.topic), err)
}
