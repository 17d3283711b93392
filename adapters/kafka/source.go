package kafka

import (
	"context"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
	"github.com/twmb/franz-go/pkg/kgo"

	"ordersaga/consumers"
	"ordersaga/events"
)

// SourceConfig is what a group reads, and how much of it at once.
type SourceConfig struct {
	Group events.Group
	Topic events.Topic
	// MaxBatch is the number of records of a batch at most; 0 means DefaultMaxBatch.
	MaxBatch int
	// Inflight is how many batches are handled at once; 0 means one. More than one suits handlers that wait for a network and whose
	// messages commute; records of one partition may then run beside each other, and its offset still stops at the first unsettled one.
	Inflight int
	// Gather is how long a batch may wait to grow to GatherTo records while traffic flows; 0 means DefaultGather, negative not at all.
	Gather   time.Duration
	GatherTo int // 0 means DefaultGatherTo, at most MaxBatch
}

// Defaults of SourceConfig.
const (
	DefaultMaxBatch = 500
	DefaultGather   = 200 * time.Microsecond // below ten thousand records a second nobody waits: see consumers.PumpConfig
	DefaultGatherTo = 100
	maxInflight     = 64
)

// Source feeds one group; it is consumers.Source.
type Source struct {
	c   *Client
	cfg SourceConfig
	now atomic.Pointer[member] // the session that runs, if one does
}

var (
	_ consumers.Source = (*Source)(nil)
	_ consumers.Reach  = (*Source)(nil)
)

// NewSource makes a Source. Its connections begin and end with Run.
func (c *Client) NewSource(cfg SourceConfig) (*Source, error) {
	if cfg.MaxBatch <= 0 {
		cfg.MaxBatch = DefaultMaxBatch
	}
	cfg.Inflight = max(1, cfg.Inflight)
	if cfg.Inflight > maxInflight {
		return nil, fmt.Errorf("kafka: group %s: %d batches at once, at most %d", cfg.Group, cfg.Inflight, maxInflight)
	}
	if cfg.Gather == 0 {
		cfg.Gather = DefaultGather
	}
	if cfg.GatherTo <= 0 {
		cfg.GatherTo = DefaultGatherTo
	}
	cfg.GatherTo = min(cfg.GatherTo, cfg.MaxBatch)
	if err := checkName("group", c.cfg.Names.Group(cfg.Group), false); err != nil {
		return nil, err
	}
	if err := checkName("topic", c.cfg.Names.Topic(cfg.Topic), false); err != nil {
		return nil, err
	}
	return &Source{c: c, cfg: cfg}, nil
}

// Offer hands over a record of the source's topic that was committed in this process and is on its way to Kafka, so that the group need not wait for
// it to come from there: if its partition is ours, and nothing is in its way. See consumers.Pump.
func (s *Source) Offer(r events.Record) bool {
	m := s.now.Load()
	return m != nil && r.Topic == s.cfg.Topic && m.offer(&r)
}

// Holds is consumers.Reach's.
func (s *Source) Holds(key []byte) (consumers.Lane, bool) {
	m := s.now.Load()
	if m == nil {
		return consumers.Lane{}, false
	}
	return m.holds(key)
}

// Settled is consumers.Reach's.
func (s *Source) Settled(id uuid.UUID, l consumers.Lane, hash int64) {
	if m := s.now.Load(); m != nil {
		m.pump.Settled(id, l, hash)
	}
}

// Run is consumers.Source's. It returns nil when ctx has ended, after what was settled is committed and the group is left.
func (s *Source) Run(ctx context.Context, handle func(ctx context.Context, batch []events.Record) (settled []bool, err error)) error {
	s.c.sessions(ctx, "group "+s.c.cfg.Names.Group(s.cfg.Group), func(ctx context.Context) error { return s.session(ctx, handle) })
	return nil
}

func (s *Source) session(ctx context.Context, handle consumers.HandleFunc) error {
	m, err := s.c.join(s.cfg.Group, []events.Topic{s.cfg.Topic}, func(mark func([]consumers.Place)) *consumers.Pump {
		return consumers.NewPump(consumers.PumpConfig{
			MaxBatch: s.cfg.MaxBatch, Overlap: s.cfg.Inflight > 1, Gather: s.cfg.Gather, GatherTo: s.cfg.GatherTo, Mark: mark,
		})
	})
	if err != nil {
		return err
	}
	m.offered = s.cfg.Topic
	s.now.Store(m)
	defer s.now.Store(nil)
	// Two batches for each worker: one that it works on, one that is ready when it comes back.
	high := 2 * s.cfg.MaxBatch * s.cfg.Inflight
	return m.run(ctx,
		func(ctx context.Context) kgo.Fetches { return m.cl.PollRecords(ctx, s.cfg.MaxBatch) },
		func(ctx context.Context) { m.pump.Room(ctx, high) },
		func(ctx context.Context) { m.pump.Run(ctx, consumers.Work{Handle: handle, Workers: s.cfg.Inflight}) },
	)
}
