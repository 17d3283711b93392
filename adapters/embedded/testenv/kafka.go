//go:build unix

package testenv

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/twmb/franz-go/pkg/kadm"
	"github.com/twmb/franz-go/pkg/kgo"

	"ordersaga/adapters/embedded"
)

const (
	// BrokersVariable names a real Kafka, as a comma-separated list of bootstrap addresses, to test against.
	BrokersVariable = "ORDERSAGA_KAFKA_BROKERS"
	// brokersTimeout bounds the look whether those answer.
	brokersTimeout = 15 * time.Second
	// kafkaStartTimeout bounds the start of a real broker, the fetching of its image or jars included.
	kafkaStartTimeout = 8 * time.Minute
)

// Kafka starts an in-process broker in memory, for this test alone, and returns its bootstrap addresses. Topics are the caller's to create.
func Kafka(tb testing.TB) []string {
	tb.Helper()
	return KafkaBroker(tb).Addrs()
}

// KafkaBroker is Kafka for tests that inject faults through Cluster.
func KafkaBroker(tb testing.TB) *embedded.Broker {
	tb.Helper()
	b, err := embedded.StartBroker(tb.Context(), embedded.BrokerConfig{})
	if err != nil {
		tb.Fatalf("start the in-process broker: %v", err)
	}
	stopWith(tb, "the in-process broker", b.Close)
	return b
}

var realKafka once[[]string]

// RealKafka returns the bootstrap addresses of a real Kafka that the tests of this process share: ORDERSAGA_KAFKA_BROKERS, else a container
// where an engine answers and has or gets the image, else Kafka's jars through Maven on a JDK. Use Prefix for topics and groups.
func RealKafka(tb testing.TB) []string {
	tb.Helper()
	addrs, err := realKafka.get(startRealKafka)
	need(tb, "a real Kafka", err)
	return addrs
}

func startRealKafka() ([]string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), kafkaStartTimeout)
	defer cancel()
	if list := os.Getenv(BrokersVariable); list != "" {
		return givenKafka(ctx, list, brokersTimeout)
	}
	container, containerErr := startKafkaContainer(ctx)
	if containerErr == nil {
		stopAtEnd(container.stop)
		return container.addrs, nil
	}
	process, jarsErr := startKafkaProcess(ctx)
	if jarsErr == nil {
		stopAtEnd(process.Stop)
		return process.Addrs(), nil
	}
	return nil, fmt.Errorf("%s is not set; container: %w; jars: %w", BrokersVariable, containerErr, jarsErr)
}

// givenKafka takes the brokers that somebody named, who then wants those and no others.
func givenKafka(ctx context.Context, list string, within time.Duration) ([]string, error) {
	var addrs []string
	for addr := range strings.SplitSeq(list, ",") {
		if addr = strings.TrimSpace(addr); addr != "" {
			addrs = append(addrs, addr)
		}
	}
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	if err := awaitKafka(ctx, addrs); err != nil {
		return nil, &givenError{variable: BrokersVariable + "=" + list, err: err}
	}
	return addrs, nil
}

// awaitKafka waits until a broker answers and says that it is in the cluster.
func awaitKafka(ctx context.Context, addrs []string) error {
	client, err := kgo.NewClient(kgo.SeedBrokers(addrs...))
	if err != nil {
		return fmt.Errorf("connect: %w", err)
	}
	defer client.Close()
	admin := kadm.NewClient(client)
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		brokers, err := admin.ListBrokers(ctx)
		if err == nil && len(brokers) > 0 {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("no broker answers: %w", errors.Join(ctx.Err(), err))
		case <-tick.C:
		}
	}
}
