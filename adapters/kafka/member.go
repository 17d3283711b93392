package kafka

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/kmsg"

	"ordersaga/consumers"
	"ordersaga/events"
)

// Bounds of a member's sessions.
const (
	rebalanceTimeout = 30 * time.Second
	drainTimeout     = 12 * time.Second // of a revoked partition's batch: longer than consumers.DefaultDrain, well below rebalanceTimeout
	commitTimeout    = 5 * time.Second
	commitEvery      = time.Second
	fetchWait        = 2 * time.Second
	fetchPartition   = 512 << 10
	fetchBytes       = 16 << 20
	sessionPauseMin  = 250 * time.Millisecond
	sessionPauseMax  = 10 * time.Second
	sessionSound     = time.Minute // a session that lasted so long was sound: the next pause is short again
	observeEvery     = 5 * time.Second
)

// member is one session of membership in a group: a client, the pump that it feeds, and how far each partition is settled.
type member struct {
	c      *Client
	name   string
	cl     *kgo.Client
	pump   *consumers.Pump
	known  map[string]events.Topic // names in Kafka → ours
	names  map[events.Topic]string // and back
	pauses bool                    // partitions that have enough are paused
	ready  chan struct{}           // closed once cl is set: callbacks wait for it

	mu       sync.Mutex
	assigned map[consumers.Lane]bool
	paused   map[consumers.Lane]bool
	epochs   map[consumers.Lane][]epochFrom
	marks    map[string]map[int32]kgo.EpochOffset // mark's own, used again
	settled  chan struct{}                        // something was marked

	offered    events.Topic // whose records writers of this process may offer; empty: none
	partitions atomic.Int32 // of that topic, as last listed

	gone atomic.Bool // the topic was deleted: our marks say nothing about one that has its name now
}

// epochFrom says which leader epoch the records from an offset on have. It is committed with the offset, so that the next owner
// notices when the broker has lost what was read (an unclean election).
type epochFrom struct {
	offset int64
	epoch  int32
}

// sessions runs session after session until ctx ends. What ends one is reported, and followed by a pause.
func (c *Client) sessions(ctx context.Context, part string, session func(context.Context) error) {
	for failures := 0; ctx.Err() == nil; {
		begun := time.Now()
		err := session(ctx)
		if ctx.Err() != nil {
			return
		}
		c.cfg.Observer.KafkaProblem(part, fmt.Errorf("session ended, a new one begins: %w", err))
		if failures++; time.Since(begun) > sessionSound {
			failures = 0
		}
		sleep(ctx, sessionPauseMin+rand.N(min(sessionPauseMax, sessionPauseMin<<min(failures, 10))))
	}
}

func sleep(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

// join makes a member. It fetches nothing before the first poll.
func (c *Client) join(group events.Group, topics []events.Topic, pump func(mark func([]consumers.Place)) *consumers.Pump, opts ...kgo.Opt) (*member, error) {
	m := &member{
		c: c, name: c.cfg.Names.Group(group), known: map[string]events.Topic{}, names: map[events.Topic]string{}, ready: make(chan struct{}),
		assigned: map[consumers.Lane]bool{}, paused: map[consumers.Lane]bool{}, epochs: map[consumers.Lane][]epochFrom{},
		marks: map[string]map[int32]kgo.EpochOffset{}, settled: make(chan struct{}, 1),
	}
	names := make([]string, 0, len(topics))
	for _, t := range topics {
		name := c.cfg.Names.Topic(t)
		names = append(names, name)
		m.known[name], m.names[t] = t, name
	}
	m.pump = pump(m.mark)
	base := []kgo.Opt{
		kgo.ConsumerGroup(m.name),
		kgo.ConsumeTopics(names...),
		kgo.Balancers(kgo.CooperativeStickyBalancer()),
		kgo.SessionTimeout(c.cfg.Session),
		kgo.HeartbeatInterval(c.cfg.Session / 4),
		kgo.RebalanceTimeout(rebalanceTimeout),
		kgo.BlockRebalanceOnPoll(),
		kgo.AutoCommitMarks(),
		kgo.AutoCommitInterval(commitEvery),
		kgo.AutoCommitCallback(m.onCommit),
		kgo.ConsumeStartOffset(kgo.NewOffset().AtStart()),
		kgo.ConsumeResetOffset(kgo.NewOffset().AtStart()),
		kgo.FetchMaxWait(fetchWait),
		kgo.FetchMaxBytes(fetchBytes),
		kgo.FetchMaxPartitionBytes(fetchPartition),
		kgo.OnPartitionsAssigned(m.onAssigned),
		kgo.OnPartitionsRevoked(m.onRevoked),
		kgo.OnPartitionsLost(m.onLost),
	}
	if c.cfg.InstanceID != "" {
		base = append(base, kgo.InstanceID(c.cfg.InstanceID))
	}
	cl, err := c.client(append(base, opts...)...)
	if err != nil {
		return nil, err
	}
	m.cl = cl
	close(m.ready)
	return m, nil
}

// run polls into the pump while its workers, which work runs, take from it. It ends with ctx or an error that the client cannot mend;
// then it waits for the workers, commits what they settled, and leaves the group (unless its membership is static).
func (m *member) run(ctx context.Context, poll func(context.Context) kgo.Fetches, room func(context.Context), work func(context.Context)) error {
	sctx, stop := context.WithCancel(ctx)
	var wg sync.WaitGroup
	wg.Go(func() { work(sctx) })
	wg.Go(func() { m.observe(sctx) })
	if m.offered != "" {
		wg.Go(func() { m.count(sctx) })
	}
	if m.pauses {
		wg.Go(func() { m.resume(sctx) })
	}
	err := m.poll(sctx, poll, room)
	stop()
	wg.Wait()
	m.leave(ctx)
	return err
}

func (m *member) poll(ctx context.Context, poll func(context.Context) kgo.Fetches, room func(context.Context)) error {
	for ctx.Err() == nil {
		fetches := poll(ctx)
		// From here to AllowRebalance no partition changes hands; nothing in between may wait.
		recs := records(fetches, m.known)
		m.note(fetches)
		m.pump.Add(recs)
		m.pause(recs)
		m.cl.AllowRebalance()
		if err := m.fetchErrors(fetches); err != nil {
			return err
		}
		room(ctx)
	}
	return ctx.Err()
}

// fetchErrors reports what the client deals with itself, and answers what it does not.
func (m *member) fetchErrors(fetches kgo.Fetches) error {
	var fatal error
	fetches.EachError(func(topic string, partition int32, err error) {
		var lost *kgo.ErrDataLoss
		var session *kgo.ErrGroupSession
		switch {
		case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		case errors.As(err, &lost), errors.As(err, &session):
			m.c.cfg.Observer.KafkaProblem("group "+m.name, err)
		default:
			if errors.Is(err, kerr.UnknownTopicID) || errors.Is(err, kerr.InconsistentTopicID) {
				m.gone.Store(true)
			}
			fatal = fmt.Errorf("fetch %s/%d: %w", topic, partition, err)
		}
	})
	return fatal
}

// leave commits and goes. It has its own time: the caller's context has ended, as a rule.
func (m *member) leave(ctx context.Context) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), commitTimeout)
	defer cancel()
	m.cl.AllowRebalance()
	m.commit(ctx)
	if err := m.cl.LeaveGroupContext(ctx); err != nil {
		m.c.cfg.Observer.KafkaProblem("group "+m.name, fmt.Errorf("leave: %w", err))
	}
	m.cl.CloseAllowingRebalance()
}

func (m *member) commit(ctx context.Context) {
	if m.gone.Load() {
		return
	}
	if err := m.cl.CommitMarkedOffsets(ctx); err != nil {
		// What is not committed is delivered again, and met by inbox and barrier.
		m.c.cfg.Observer.KafkaProblem("group "+m.name, fmt.Errorf("commit: %w", err))
	}
}

// onCommit reports commits that failed. A commit that meets a rebalance is no failure: the revocation commits, or another owner does.
func (m *member) onCommit(_ *kgo.Client, _ *kmsg.OffsetCommitRequest, resp *kmsg.OffsetCommitResponse, err error) {
	if resp != nil && err == nil {
		for _, t := range resp.Topics {
			for _, p := range t.Partitions {
				if err == nil {
					err = kerr.ErrorForCode(p.ErrorCode)
				}
			}
		}
	}
	switch {
	case err == nil, errors.Is(err, context.Canceled), errors.Is(err, kerr.RebalanceInProgress), errors.Is(err, kerr.IllegalGeneration):
	default:
		m.c.cfg.Observer.KafkaProblem("group "+m.name, fmt.Errorf("commit: %w", err))
	}
}

// mark is the pump's: lanes may advance behind these places. The pump calls it for one batch after the other.
func (m *member) mark(places []consumers.Place) {
	m.mu.Lock()
	for _, offsets := range m.marks {
		clear(offsets)
	}
	for _, p := range places {
		topic := m.names[p.Topic]
		offsets := m.marks[topic]
		if offsets == nil {
			offsets = make(map[int32]kgo.EpochOffset, len(places))
			m.marks[topic] = offsets
		}
		offsets[p.Partition] = kgo.EpochOffset{Epoch: m.epoch(consumers.Lane{Topic: p.Topic, Partition: p.Partition}, p.Offset), Offset: p.Offset + 1}
	}
	m.mu.Unlock()
	m.cl.MarkCommitOffsets(m.marks)
	select {
	case m.settled <- struct{}{}:
	default:
	}
}

// note remembers which epochs fetched records have.
func (m *member) note(fetches kgo.Fetches) {
	m.mu.Lock()
	defer m.mu.Unlock()
	fetches.EachPartition(func(p kgo.FetchTopicPartition) {
		if len(p.Records) == 0 {
			return
		}
		lane := consumers.Lane{Topic: m.known[p.Topic], Partition: p.Partition}
		es := m.epochs[lane]
		before := len(es)
		for _, r := range p.Records {
			if len(es) == 0 || es[len(es)-1].epoch != r.LeaderEpoch {
				es = append(es, epochFrom{r.Offset, r.LeaderEpoch})
			}
		}
		if len(es) > before {
			m.epochs[lane] = es
		}
	})
}

// epoch is that of the record at an offset; older ones are forgotten. The lock is held.
func (m *member) epoch(lane consumers.Lane, offset int64) int32 {
	es := m.epochs[lane]
	if len(es) == 0 {
		return -1
	}
	old := 0
	for old+1 < len(es) && es[old+1].offset <= offset {
		old++
	}
	if old > 0 {
		m.epochs[lane] = es[old:]
	}
	return es[old].epoch
}

func (m *member) lanes(partitions map[string][]int32) []consumers.Lane {
	var out []consumers.Lane
	for topic, ps := range partitions {
		for _, p := range ps {
			out = append(out, consumers.Lane{Topic: m.known[topic], Partition: p})
		}
	}
	return out
}

func (m *member) onAssigned(_ context.Context, cl *kgo.Client, partitions map[string][]int32) {
	cl.ResumeFetchPartitions(partitions)
	m.change(m.lanes(partitions), true)
}

// onRevoked gives partitions away: their batches end, what they settled is committed, and only then may the next owner begin.
func (m *member) onRevoked(ctx context.Context, cl *kgo.Client, partitions map[string][]int32) {
	<-m.ready
	lanes := m.lanes(partitions)
	drain, cancel := context.WithTimeout(ctx, drainTimeout)
	m.pump.Drain(drain, lanes)
	cancel()
	commit, cancel := context.WithTimeout(context.WithoutCancel(ctx), commitTimeout)
	defer cancel()
	m.commit(commit)
	cl.ResumeFetchPartitions(partitions)
	m.change(lanes, false)
}

// onLost drops partitions that are somebody else's already: nothing is waited for and nothing committed. It may name partitions that
// we never had.
func (m *member) onLost(ctx context.Context, cl *kgo.Client, partitions map[string][]int32) {
	<-m.ready
	gone, cancel := context.WithCancel(ctx)
	cancel()
	lanes := m.lanes(partitions)
	m.pump.Drain(gone, lanes)
	cl.ResumeFetchPartitions(partitions)
	m.change(lanes, false)
}

func (m *member) change(lanes []consumers.Lane, ours bool) {
	m.mu.Lock()
	for _, l := range lanes {
		delete(m.paused, l)
		delete(m.epochs, l)
		if ours {
			m.assigned[l] = true
		} else {
			delete(m.assigned, l)
		}
	}
	n := len(m.assigned)
	m.mu.Unlock()
	m.c.cfg.Observer.KafkaAssigned(m.name, n)
}

// The bounds of one partition of a retry tier that waits in memory.
const (
	laneHigh = 1000
	laneLow  = laneHigh / 2
)

// pause stops fetching partitions that have enough waiting.
func (m *member) pause(recs []events.Record) {
	if !m.pauses {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	full := map[string][]int32{}
	for i := range recs {
		lane := consumers.Lane{Topic: recs[i].Topic, Partition: recs[i].Partition}
		if !m.paused[lane] && m.pump.Length(lane) >= laneHigh {
			m.paused[lane] = true
			topic := m.names[lane.Topic]
			full[topic] = append(full[topic], lane.Partition)
		}
	}
	if len(full) > 0 {
		m.cl.PauseFetchPartitions(full)
	}
}

// resume fetches again what has room again.
func (m *member) resume(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-m.settled:
		}
		m.mu.Lock()
		again := map[string][]int32{}
		for lane := range m.paused {
			if m.pump.Length(lane) <= laneLow {
				delete(m.paused, lane)
				topic := m.names[lane.Topic]
				again[topic] = append(again[topic], lane.Partition)
			}
		}
		if len(again) > 0 {
			m.cl.ResumeFetchPartitions(again)
		}
		m.mu.Unlock()
	}
}

// keyed answers the partition of a key, as producers do; a record with a key leaves no trace in it.
var keyed = kgo.StickyKeyPartitioner(nil).ForTopic("")

// offer hands the pump a record ahead of its copy, if that will lie in one of our partitions.
func (m *member) offer(r *events.Record) bool {
	l, ours := m.holds(r.Key)
	r.Partition = l.Partition
	return ours && m.pump.Offer(r)
}

// holds tells where records of a key lie, and whether that is ours.
func (m *member) holds(key []byte) (l consumers.Lane, ours bool) {
	n := m.partitions.Load()
	if n == 0 || len(key) == 0 {
		return l, false
	}
	l = consumers.Lane{Topic: m.offered, Partition: int32(keyed.Partition(&kgo.Record{Key: key}, int(n)))} //nolint:gosec // below n
	m.mu.Lock()
	defer m.mu.Unlock()
	return l, m.assigned[l]
}

// count keeps the number of partitions. One that is out of date makes us offer what comes to another member: both act on it, and the barriers of
// the handlers make that harmless.
func (m *member) count(ctx context.Context) {
	tick := time.NewTicker(m.c.cfg.Discover)
	defer tick.Stop()
	name := m.names[m.offered]
	for {
		topics, err := m.c.adm.ListTopics(ctx, name)
		if err != nil && ctx.Err() == nil {
			m.c.cfg.Observer.KafkaProblem("group "+m.name, fmt.Errorf("count partitions: %w", err))
		}
		if t, ok := topics[name]; ok && t.Err == nil {
			m.partitions.Store(int32(len(t.Partitions))) //nolint:gosec // a few thousand at most
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

func (m *member) observe(ctx context.Context) {
	tick := time.NewTicker(observeEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			m.mu.Lock()
			paused := len(m.paused)
			m.mu.Unlock()
			m.c.cfg.Observer.KafkaBuffered(m.name, m.pump.Size(), paused)
		}
	}
}
