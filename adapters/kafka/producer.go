package kafka

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kgo"

	"ordersaga/events"
	"ordersaga/outbox"
)

// ProducerConfig bounds a Producer.
type ProducerConfig struct {
	MaxBufferedRecords int // 0 means DefaultBufferedRecords
	MaxBufferedBytes   int // 0 means DefaultBufferedBytes
	// MaxRecordBytes is the largest record, and batch, that is sent; 0 means what a topic's max.message.bytes is by default. Topics that
	// take less refuse, those that take more are not asked.
	MaxRecordBytes int32
	// Linger is how long a record may wait for others; 0, the default, sends at once, and batches form by themselves while requests
	// are under way.
	Linger time.Duration
	// Compression is one of Compressions; empty means none. Brokers unpack what they take in to check it, and consumers again: with the small
	// batches of a low latency it costs all three more than it spares on a fast network.
	Compression string
}

// Compressions lists the compressions of ProducerConfig.
var Compressions = []string{"none", "snappy", "lz4", "zstd"}

// codec answers the client's name for a compression.
func codec(name string) (kgo.CompressionCodec, error) {
	switch name {
	case "", "none":
		return kgo.NoCompression(), nil
	case "snappy":
		return kgo.SnappyCompression(), nil
	case "lz4":
		return kgo.Lz4Compression(), nil
	case "zstd":
		return kgo.ZstdCompression(), nil
	}
	return kgo.CompressionCodec{}, fmt.Errorf("kafka: unknown compression %q: one of %s", name, strings.Join(Compressions, ", "))
}

// Defaults of ProducerConfig.
const (
	DefaultBufferedRecords = 20_000
	DefaultBufferedBytes   = 64 << 20
	defaultRecordBytes     = 1_000_012
)

// Producer is outbox.Producer: acks=all, idempotent, in order a partition, retried without end while the broker is away.
type Producer struct {
	cl    *kgo.Client
	names events.Names
}

var _ outbox.Producer = (*Producer)(nil)

// NewProducer makes a Producer; Close it.
func (c *Client) NewProducer(cfg ProducerConfig) (*Producer, error) {
	if cfg.MaxBufferedRecords <= 0 {
		cfg.MaxBufferedRecords = DefaultBufferedRecords
	}
	if cfg.MaxBufferedBytes <= 0 {
		cfg.MaxBufferedBytes = DefaultBufferedBytes
	}
	if cfg.MaxRecordBytes <= 0 {
		cfg.MaxRecordBytes = defaultRecordBytes
	}
	compression, err := codec(cfg.Compression)
	if err != nil {
		return nil, err
	}
	cl, err := c.client(
		kgo.ProducerBatchCompression(compression),
		kgo.RequiredAcks(kgo.AllISRAcks()), // with idempotence on, as it is by default
		kgo.MaxBufferedRecords(cfg.MaxBufferedRecords),
		kgo.MaxBufferedBytes(cfg.MaxBufferedBytes),
		kgo.ProducerBatchMaxBytes(cfg.MaxRecordBytes),
		kgo.ProducerLinger(cfg.Linger),
		kgo.RecordPartitioner(kgo.StickyKeyPartitioner(nil)), // keys hash as in the Java client: upstream and we agree on partitions
		kgo.ProducerOnDataLossDetected(func(topic string, partition int32) {
			c.cfg.Observer.KafkaProblem("producer", fmt.Errorf("%s/%d: the broker lost records that it had acknowledged (unclean election?)", topic, partition))
		}),
	)
	if err != nil {
		return nil, err
	}
	return &Producer{cl, c.cfg.Names}, nil
}

// Produce is outbox.Producer's.
func (p *Producer) Produce(ctx context.Context, r events.Record, done func(error)) {
	p.cl.Produce(ctx, record(&r, p.names), func(_ *kgo.Record, err error) { done(produced(r.Topic, err)) })
}

// Flush waits until nothing is buffered.
func (p *Producer) Flush(ctx context.Context) error { return wrong("flush", p.cl.Flush(ctx)) }

// Close fails what is still buffered, and closes the connections.
func (p *Producer) Close() { p.cl.Close() }

// RefusedError is a record that Kafka will never take as it is.
type RefusedError struct {
	Topic events.Topic
	Err   error
}

func (e *RefusedError) Error() string { return fmt.Sprintf("kafka: topic %s: %v", e.Topic, e.Err) }
func (e *RefusedError) Unwrap() error { return e.Err }

// Refused reports that sending it again would be refused again.
func (e *RefusedError) Refused() bool { return true }

// produced sorts the broker's answers: those that are about the record itself are final.
func produced(topic events.Topic, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, kerr.MessageTooLarge), errors.Is(err, kerr.RecordListTooLarge), errors.Is(err, kerr.InvalidRecord),
		errors.Is(err, kerr.InvalidTimestamp), errors.Is(err, kerr.PolicyViolation):
		return &RefusedError{topic, err}
	case errors.Is(err, kerr.UnknownTopicOrPartition):
		return &Error{Op: "produce", Err: fmt.Errorf("topic %s does not exist: `ordersaga topics apply` makes it: %w", topic, err), away: true}
	default:
		return wrong("produce to "+string(topic), err)
	}
}
