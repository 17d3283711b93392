//go:build unix

package testenv

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"testing"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/client"
	"github.com/testcontainers/testcontainers-go"
	"github.com/testcontainers/testcontainers-go/log"
	"github.com/testcontainers/testcontainers-go/wait"
)

const (
	kafkaImage = "apache/kafka:" + kafkaVersion
	kafkaPort  = "9092/tcp"
	// engineTimeout bounds the question whether a container engine answers.
	engineTimeout = 10 * time.Second
	// pullTimeout bounds the fetching of the image, once its registry has answered.
	pullTimeout = 5 * time.Minute
	// containerStartTimeout bounds the start of a container from an image that is there.
	containerStartTimeout = 2 * time.Minute
	// heartbeatEvery is how often a container is told that we still live. It ends itself after two minutes without.
	heartbeatEvery = 15 * time.Second
	// startScript is what a container waits for: the broker must be told the port that only a running container has.
	startScript = "/tmp/ordersaga-start.sh"
	aliveFile   = "/tmp/ordersaga-alive"
)

// awaitScript is the container's command. Nobody else removes a container whose test process was killed, so it ends by itself, before
// and after the start script came.
const awaitScript = `touch ` + aliveFile + `
alone() { [ $(( $(date +%s) - $(stat -c %Y ` + aliveFile + `) )) -gt 120 ]; }
while [ ! -s ` + startScript + ` ]; do alone && exit 1; sleep 0.1; done
( while sleep 5; do alone && kill -TERM 1; done ) &
exec sh ` + startScript

// KafkaContainer starts a real Kafka in a container, for this test alone, and returns its bootstrap addresses.
func KafkaContainer(tb testing.TB) []string {
	tb.Helper()
	ctx, cancel := context.WithTimeout(tb.Context(), kafkaStartTimeout)
	defer cancel()
	c, err := startKafkaContainer(ctx)
	need(tb, "a Kafka container", err)
	stopWith(tb, "the Kafka container", c.stop)
	return c.addrs
}

type kafkaContainer struct {
	container testcontainers.Container
	addrs     []string
	beating   context.CancelFunc
	beat      chan struct{} // closed when the heart has stopped
}

func startKafkaContainer(ctx context.Context) (k *kafkaContainer, err error) {
	defer func() {
		if p := recover(); p != nil { // the library panics on some engines that do not answer
			err = fmt.Errorf("container engine: %v", p)
		}
	}()
	if err := containerDefaults(); err != nil {
		return nil, err
	}
	if err := kafkaImageThere(ctx); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, containerStartTimeout)
	defer cancel()
	c, err := testcontainers.Run(ctx, kafkaImage,
		testcontainers.WithLogger(log.NewNoopLogger()),
		testcontainers.WithExposedPorts(kafkaPort),
		testcontainers.WithEnv(kafkaEnvironment()),
		testcontainers.WithEntrypoint("sh"),
		testcontainers.WithCmd("-c", awaitScript),
		testcontainers.WithHostConfigModifier(func(host *container.HostConfig) { host.AutoRemove = true }),
		testcontainers.WithLifecycleHooks(testcontainers.ContainerLifecycleHooks{
			PostStarts: []testcontainers.ContainerHook{nameTheBroker},
		}),
	)
	if err != nil {
		if c != nil {
			err = errors.Join(err, testcontainers.TerminateContainer(c))
		}
		return nil, fmt.Errorf("start %s: %w", kafkaImage, err)
	}
	addr, err := c.PortEndpoint(ctx, kafkaPort, "")
	if err == nil {
		err = awaitKafka(ctx, []string{addr})
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("start %s: %w", kafkaImage, err), testcontainers.TerminateContainer(c))
	}
	k = &kafkaContainer{container: c, addrs: []string{addr}, beat: make(chan struct{})}
	beating, stop := context.WithCancel(context.WithoutCancel(ctx))
	k.beating = stop
	go k.heart(beating)
	return k, nil
}

// containerDefaults sets what the library would otherwise get wrong where it runs inside a container itself: it would dial the default
// gateway, which is not this machine. Its reaper is an image that not every machine can have; our containers end by themselves.
func containerDefaults() error {
	for name, value := range map[string]string{"TESTCONTAINERS_RYUK_DISABLED": "true", "TESTCONTAINERS_HOST_OVERRIDE": "127.0.0.1"} {
		if _, set := os.LookupEnv(name); set {
			continue
		}
		if name == "TESTCONTAINERS_HOST_OVERRIDE" && os.Getenv("DOCKER_HOST") != "" {
			continue // an engine that may be elsewhere
		}
		if err := os.Setenv(name, value); err != nil {
			return fmt.Errorf("set %s: %w", name, err)
		}
	}
	return nil
}

// kafkaImageThere asks the engine for the image and lets it fetch it. Unlike the library's own fetching it does not try again for a quarter
// of an hour where no registry can be reached.
func kafkaImageThere(ctx context.Context) error {
	ask, cancel := context.WithTimeout(ctx, engineTimeout)
	defer cancel()
	engine, err := testcontainers.NewDockerClientWithOpts(ask)
	if err != nil {
		return fmt.Errorf("no container engine: %w", err)
	}
	defer engine.Close() //nolint:errcheck // nothing is lost
	if _, err := engine.Ping(ask, client.PingOptions{}); err != nil {
		return fmt.Errorf("no container engine answers: %w", err)
	}
	if _, err := engine.ImageInspect(ask, kafkaImage); err == nil {
		return nil
	}
	pull, cancel := context.WithTimeout(ctx, pullTimeout)
	defer cancel()
	progress, err := engine.ImagePull(pull, kafkaImage, client.ImagePullOptions{})
	if err != nil {
		return fmt.Errorf("pull %s: %w", kafkaImage, err)
	}
	_, err = io.Copy(io.Discard, progress)
	if err := errors.Join(err, progress.Close()); err != nil {
		return fmt.Errorf("pull %s: %w", kafkaImage, err)
	}
	if _, err := engine.ImageInspect(pull, kafkaImage); err != nil {
		return fmt.Errorf("pull %s: %w", kafkaImage, err)
	}
	return nil
}

// kafkaEnvironment sets every property: the image drops its defaults once any is given.
func kafkaEnvironment() map[string]string {
	return map[string]string{
		"CLUSTER_ID":                                     clusterID,
		"KAFKA_NODE_ID":                                  "1",
		"KAFKA_PROCESS_ROLES":                            "broker,controller",
		"KAFKA_CONTROLLER_QUORUM_VOTERS":                 "1@localhost:9094",
		"KAFKA_CONTROLLER_LISTENER_NAMES":                "CONTROLLER",
		"KAFKA_LISTENERS":                                "HOST://:9092,BROKER://:9093,CONTROLLER://:9094",
		"KAFKA_LISTENER_SECURITY_PROTOCOL_MAP":           "HOST:PLAINTEXT,BROKER:PLAINTEXT,CONTROLLER:PLAINTEXT",
		"KAFKA_INTER_BROKER_LISTENER_NAME":               "BROKER",
		"KAFKA_AUTO_CREATE_TOPICS_ENABLE":                "false",
		"KAFKA_GROUP_INITIAL_REBALANCE_DELAY_MS":         "0",
		"KAFKA_OFFSETS_TOPIC_REPLICATION_FACTOR":         "1",
		"KAFKA_OFFSETS_TOPIC_NUM_PARTITIONS":             "4",
		"KAFKA_TRANSACTION_STATE_LOG_REPLICATION_FACTOR": "1",
		"KAFKA_TRANSACTION_STATE_LOG_MIN_ISR":            "1",
		"KAFKA_TRANSACTION_STATE_LOG_NUM_PARTITIONS":     "4",
	}
}

// nameTheBroker tells the waiting container under which address clients on this machine reach it.
func nameTheBroker(ctx context.Context, c testcontainers.Container) error {
	endpoint, err := c.PortEndpoint(ctx, kafkaPort, "HOST")
	if err != nil {
		return fmt.Errorf("find the container's port: %w", err)
	}
	script := "export KAFKA_ADVERTISED_LISTENERS=" + endpoint + ",BROKER://localhost:9093\nexec /etc/kafka/docker/run\n"
	if err := c.CopyToContainer(ctx, []byte(script), startScript, 0o755); err != nil {
		return fmt.Errorf("start the broker: %w", err)
	}
	if err := wait.ForLog(startedLine).WithStartupTimeout(containerStartTimeout).WaitUntilReady(ctx, c); err != nil {
		return fmt.Errorf("wait for the broker: %w", err)
	}
	return nil
}

// heart keeps the container alive while this process lives. A beat that fails is made up for by the next.
func (k *kafkaContainer) heart(ctx context.Context) {
	defer close(k.beat)
	tick := time.NewTicker(heartbeatEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			_, _, _ = k.container.Exec(ctx, []string{"touch", aliveFile})
		}
	}
}

func (k *kafkaContainer) stop(ctx context.Context) error {
	k.beating()
	<-k.beat
	// No grace: the broker's data goes with it.
	if err := testcontainers.TerminateContainer(k.container, testcontainers.StopContext(ctx), testcontainers.StopTimeout(0)); err != nil {
		return fmt.Errorf("remove the Kafka container: %w", err)
	}
	return nil
}
