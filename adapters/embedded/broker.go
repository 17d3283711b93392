package embedded

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"github.com/twmb/franz-go/pkg/kadm"
	"github.com/twmb/franz-go/pkg/kfake"
	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/kversion"
)

const (
	// defaultRetentionEvery is how often retention is applied: the broker's own ticker runs hourly and not after a restart.
	defaultRetentionEvery = time.Minute
	// MinRetentionBytes is the least retention.bytes that TopicDefaults gives and Check accepts: with room for several of the largest
	// batches (1 MiB) retention can never empty a partition, whose offsets would begin at 0 again after a restart.
	MinRetentionBytes = 16 << 20
	// DefaultRetentionBytes is kept of each partition if the caller has no other wish.
	DefaultRetentionBytes = 256 << 20
	// logDir holds the broker's files, apart from the lock beside it.
	logDir = "log"
)

// BrokerConfig says how the in-process broker runs. The zero value is a broker in memory on a free port.
type BrokerConfig struct {
	// DataDir keeps the records; empty: memory, which never shrinks (about twice what was produced) and is for tests.
	DataDir string
	// Port of 127.0.0.1; 0: a free one.
	Port int
	// SyncWrites makes each produce wait for the disk. Without it what was acknowledged survives kill -9, not a power failure: real
	// Kafka's default too, which counts on replicas that this broker does not have.
	SyncWrites bool
	// RetentionEvery is how often retention.bytes is applied; 0: every minute.
	RetentionEvery time.Duration
	// Log gets the broker's own errors and warnings; nil: nobody.
	Log *slog.Logger
}

// Broker is a Kafka broker inside this process.
type Broker struct {
	cluster *kfake.Cluster
	addr    string
	lock    *Lock // nil in memory
	log     *brokerLog
	every   time.Duration

	closing   sync.Once
	stop      chan struct{} // closed when Close begins
	retention chan struct{} // closed when the retention goroutine has ended
	closed    chan struct{} // closed when the data is on disk and the lock free
	closeErr  error         // set before closed is closed
}

// TopicDefaults are the configs that every topic of this broker must be created with (kadm.CreateTopics takes them as they are).
// Records go by size only: an age limit could empty a quiet partition, whose offsets then begin at 0 again after a restart while its
// groups' committed offsets stay ahead, and every new record would be skipped in silence. Less than MinRetentionBytes is raised to it.
func TopicDefaults(retentionBytes int64) map[string]*string {
	return map[string]*string{
		"retention.ms":    kadm.StringPtr("-1"),
		"retention.bytes": kadm.StringPtr(strconv.FormatInt(max(retentionBytes, MinRetentionBytes), 10)),
	}
}

// StartBroker starts a broker and returns when it can be used. It fails with *AlreadyRunningError if DataDir is in use.
func StartBroker(ctx context.Context, cfg BrokerConfig) (*Broker, error) {
	b, err := openBroker(ctx, cfg)
	if err != nil {
		return nil, fmt.Errorf("start the in-process broker: %w", err)
	}
	go b.applyRetention()
	return b, nil
}

func openBroker(ctx context.Context, cfg BrokerConfig) (*Broker, error) {
	if err := ctx.Err(); err != nil {
		return nil, err //nolint:wrapcheck // StartBroker says what was being done
	}
	b := &Broker{
		log:       &brokerLog{to: cfg.Log},
		every:     cfg.RetentionEvery,
		stop:      make(chan struct{}),
		retention: make(chan struct{}),
		closed:    make(chan struct{}),
	}
	if b.every <= 0 {
		b.every = defaultRetentionEvery
	}
	opts := []kfake.Opt{
		kfake.NumBrokers(1),
		kfake.WithLogger(b.log),
		// Kafka 4's own tools break on the newer requests that it would otherwise offer.
		kfake.MaxVersions(kversion.V3_7_0()),
	}
	if cfg.Port != 0 {
		opts = append(opts, kfake.Ports(cfg.Port))
	}
	if cfg.SyncWrites {
		opts = append(opts, kfake.SyncWrites())
	}
	if cfg.DataDir != "" {
		lock, err := AcquireLock(cfg.DataDir)
		if err != nil {
			return nil, err
		}
		b.lock = lock
		opts = append(opts, kfake.DataDir(filepath.Join(lock.Dir(), logDir)))
	}
	if err := b.open(cfg.Port, opts); err != nil {
		if b.lock != nil {
			err = errors.Join(err, b.lock.Release())
		}
		return nil, err
	}
	return b, nil
}

func (b *Broker) open(port int, opts []kfake.Opt) error {
	cluster, err := kfake.NewCluster(opts...)
	var bind *net.OpError
	switch {
	case errors.As(err, &bind) && bind.Op == "listen":
		return fmt.Errorf("127.0.0.1:%d: %w; choose another port", port, err)
	case err != nil && b.lock != nil:
		return fmt.Errorf("open the data in %s: %w", b.lock.Dir(), err)
	case err != nil:
		return fmt.Errorf("open: %w", err)
	}
	b.cluster = cluster
	b.addr = cluster.ListenAddrs()[0]
	if b.lock != nil {
		if err := b.lock.Publish(map[string]string{"kafka": b.addr}); err != nil {
			cluster.Close()
			return err
		}
	}
	return nil
}

// Addrs are the bootstrap addresses. They stay valid words after Close.
func (b *Broker) Addrs() []string { return []string{b.addr} }

// Cluster is the broker itself, for injecting faults in tests. Its methods block for ever once the broker is closed, and Close waits
// for one that is under way.
func (b *Broker) Cluster() *kfake.Cluster { return b.cluster }

// Close writes everything to disk and gives the data directory up. Close the clients first: their requests end unanswered. If ctx is
// done before (the disk hangs) it returns an error, the closing goes on by itself, and
// the data directory stays locked until it is through. Closing again waits for the same end.
func (b *Broker) Close(ctx context.Context) error {
	b.closing.Do(func() {
		close(b.stop)
		go b.close()
	})
	select {
	case <-b.closed:
		return b.closeErr
	case <-ctx.Done():
		return fmt.Errorf("close the in-process broker: it is still writing its state: %w", ctx.Err())
	}
}

func (b *Broker) close() {
	defer close(b.closed)
	// First: the cluster answers no call once it is closed.
	<-b.retention
	b.log.forget()
	b.cluster.Close()
	if err := b.log.last(); err != nil {
		b.closeErr = fmt.Errorf("close the in-process broker: %w", err)
	}
	if b.lock != nil {
		b.closeErr = errors.Join(b.closeErr, b.lock.Release())
	}
}

// applyRetention does what the broker itself does hourly, only if a topic asked for it since the start.
func (b *Broker) applyRetention() {
	defer close(b.retention)
	tick := time.NewTicker(b.every)
	defer tick.Stop()
	for {
		select {
		case <-b.stop:
			return
		case <-tick.C:
			b.cluster.ApplyRetention()
		}
	}
}

// Check looks for what would lose records in silence and returns one sentence for each finding; it changes nothing. Run it after the
// topics were created and before the first consumer starts.
//
//   - A committed offset past the end of its partition: the group would skip every new record until the end has caught up.
//   - A topic that keeps its records by age, or by too small a size (see TopicDefaults).
func (b *Broker) Check(ctx context.Context) ([]string, error) {
	client, err := kgo.NewClient(kgo.SeedBrokers(b.addr))
	if err != nil {
		return nil, fmt.Errorf("check the in-process broker: %w", err)
	}
	defer client.Close()
	admin := kadm.NewClient(client)
	retention, err := checkRetention(ctx, admin)
	if err != nil {
		return nil, fmt.Errorf("check the in-process broker: %w", err)
	}
	offsets, err := checkOffsets(ctx, admin)
	if err != nil {
		return nil, fmt.Errorf("check the in-process broker: %w", err)
	}
	return append(offsets, retention...), nil
}

func checkOffsets(ctx context.Context, admin *kadm.Client) ([]string, error) {
	ends, err := admin.ListEndOffsets(ctx)
	if err == nil {
		err = ends.Error()
	}
	if err != nil {
		return nil, fmt.Errorf("list end offsets: %w", err)
	}
	groups, err := admin.ListGroups(ctx)
	if err != nil {
		return nil, fmt.Errorf("list groups: %w", err)
	}
	var found []string
	for _, group := range groups.Groups() {
		committed, err := admin.FetchOffsets(ctx, group)
		if err != nil {
			return nil, fmt.Errorf("fetch offsets of group %s: %w", group, err)
		}
		for _, at := range committed.Sorted() {
			end, ok := ends.Lookup(at.Topic, at.Partition)
			if !ok || at.Err != nil || at.At <= end.Offset {
				continue // no such topic any more: nothing can be skipped
			}
			found = append(found, fmt.Sprintf("group %s has committed offset %d of %s[%d], past its end %d: it would skip the next %d records; "+
				"stop the group and set its offset to the end or earlier", group, at.At, at.Topic, at.Partition, end.Offset, at.At-end.Offset))
		}
	}
	return found, nil
}

func checkRetention(ctx context.Context, admin *kadm.Client) ([]string, error) {
	topics, err := admin.ListTopics(ctx)
	if err != nil {
		return nil, fmt.Errorf("list topics: %w", err)
	}
	if len(topics) == 0 {
		return nil, nil
	}
	configs, err := admin.DescribeTopicConfigs(ctx, topics.Names()...)
	if err != nil {
		return nil, fmt.Errorf("describe topic configs: %w", err)
	}
	var found []string
	for _, topic := range configs {
		if topic.Err != nil {
			return nil, fmt.Errorf("describe configs of %s: %w", topic.Name, topic.Err)
		}
		if problem := retentionProblem(topic); problem != "" {
			found = append(found, fmt.Sprintf("topic %s has %s: an emptied partition begins at offset 0 again after a restart and its "+
				"groups skip records; set retention.ms=-1 and retention.bytes of at least %d", topic.Name, problem, MinRetentionBytes))
		}
	}
	return found, nil
}

func retentionProblem(topic kadm.ResourceConfig) string {
	for _, config := range topic.Configs {
		value, err := strconv.ParseInt(config.MaybeValue(), 10, 64)
		if err != nil || value < 0 {
			continue
		}
		if config.Key == "retention.ms" || (config.Key == "retention.bytes" && value < MinRetentionBytes) {
			return config.Key + "=" + config.MaybeValue()
		}
	}
	return ""
}

// brokerLog hands the broker's complaints on and remembers the last error: that is the only way a failed save at close shows.
type brokerLog struct {
	to *slog.Logger

	mu    sync.Mutex
	worst error
}

// Logf implements kfake.Logger.
func (l *brokerLog) Logf(level kfake.LogLevel, format string, args ...any) {
	if level != kfake.LogLevelError && level != kfake.LogLevelWarn {
		return
	}
	message := fmt.Sprintf(format, args...)
	if level == kfake.LogLevelError {
		l.mu.Lock()
		l.worst = errors.New(message)
		l.mu.Unlock()
	}
	if l.to == nil {
		return
	}
	if level == kfake.LogLevelError {
		l.to.Error("in-process broker", slog.String("says", message))
		return
	}
	l.to.Warn("in-process broker", slog.String("says", message))
}

func (l *brokerLog) forget() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.worst = nil
}

func (l *brokerLog) last() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.worst
}
