//go:build unix

package testenv

import (
	"context"
	_ "embed" // the files that a Kafka of our own needs
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"ordersaga/adapters/embedded/internal/child"
	"ordersaga/adapters/embedded/internal/flock"
	"ordersaga/adapters/embedded/internal/port"
	"ordersaga/adapters/embedded/internal/scratch"
)

const (
	kafkaVersion = "4.1.0"
	// clusterID is any 16 bytes in base64: a broker's directory must be formatted with one.
	clusterID = "MkU3OEVBNTcwNTJENDM2Qg"
	// startedLine is what Kafka logs once it takes requests and is unfenced.
	startedLine = "Kafka Server started"
	// kafkaStopGrace is what an orderly shutdown gets. A test's broker has nothing worth more.
	kafkaStopGrace = 5 * time.Second
	// kafkaKillGrace bounds the wait for a killed JVM to be gone.
	kafkaKillGrace = 10 * time.Second
	// kafkaAttempts bounds how often a free port may be lost to another process.
	kafkaAttempts = 3
)

var (
	//go:embed kafka-pom.xml
	kafkaPOM string
	//go:embed kafka-log4j2.xml
	kafkaLogging string
)

// KafkaProcess is a real Kafka, broker and controller in one JVM, with its data on disk. Its methods may be called from any goroutine.
type KafkaProcess struct {
	libs string
	dir  *scratch.Dir
	addr string

	mu      sync.Mutex // held while the JVM is started or ended
	proc    *child.Process
	stopped bool
}

// KafkaJars starts a real Kafka from its jars, for this test alone. The jars are resolved once per machine, by Maven, into the user's
// cache directory.
func KafkaJars(tb testing.TB) *KafkaProcess {
	tb.Helper()
	ctx, cancel := context.WithTimeout(tb.Context(), kafkaStartTimeout)
	defer cancel()
	k, err := startKafkaProcess(ctx)
	need(tb, "a Kafka from jars", err)
	stopWith(tb, "Kafka", k.Stop)
	return k
}

func startKafkaProcess(ctx context.Context) (*KafkaProcess, error) {
	if _, err := exec.LookPath("java"); err != nil {
		return nil, fmt.Errorf("install a JDK 17 or newer: %w", err)
	}
	libs, err := kafkaLibs(ctx)
	if err != nil {
		return nil, err
	}
	for attempt := 1; ; attempt++ {
		k, err := newKafkaProcess(ctx, libs)
		if err == nil || attempt == kafkaAttempts || !strings.Contains(err.Error(), "Address already in use") {
			return k, err
		}
	}
}

func newKafkaProcess(ctx context.Context, libs string) (*KafkaProcess, error) {
	dir, err := scratch.New("", "ordersaga-kafka-")
	if err != nil {
		return nil, err //nolint:wrapcheck // says it all
	}
	k := &KafkaProcess{libs: libs, dir: dir}
	err = k.format(ctx)
	if err == nil {
		err = k.launch(ctx)
	}
	if err != nil {
		return nil, errors.Join(err, dir.Remove())
	}
	return k, nil
}

// format writes the configuration and makes the storage.
func (k *KafkaProcess) format(ctx context.Context) error {
	ports := make([]int, 2)
	for i := range ports {
		free, err := port.Free(ctx)
		if err != nil {
			return err //nolint:wrapcheck // says it all
		}
		ports[i] = free
	}
	k.addr = "127.0.0.1:" + strconv.Itoa(ports[0])
	controller := "127.0.0.1:" + strconv.Itoa(ports[1])
	config := strings.Join([]string{
		"process.roles=broker,controller",
		"node.id=1",
		"controller.quorum.voters=1@" + controller,
		"listeners=PLAINTEXT://" + k.addr + ",CONTROLLER://" + controller,
		"advertised.listeners=PLAINTEXT://" + k.addr,
		"controller.listener.names=CONTROLLER",
		"listener.security.protocol.map=CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT",
		"log.dirs=" + filepath.Join(k.dir.Path, "data"),
		"auto.create.topics.enable=false",
		"group.initial.rebalance.delay.ms=0",
		// One node: every internal topic has one copy, and few partitions, which are made at the first use.
		"offsets.topic.replication.factor=1",
		"offsets.topic.num.partitions=4",
		"transaction.state.log.replication.factor=1",
		"transaction.state.log.min.isr=1",
		"transaction.state.log.num.partitions=4",
		// A killed broker may register again once its old session is over (9 s by default).
		"broker.session.timeout.ms=3000",
		"broker.heartbeat.interval.ms=500",
		"log.cleaner.dedupe.buffer.size=16777216",
	}, "\n") + "\n"
	if err := os.WriteFile(k.file("server.properties"), []byte(config), 0o600); err != nil {
		return fmt.Errorf("configure Kafka: %w", err)
	}
	if err := os.WriteFile(k.file("log4j2.xml"), []byte(kafkaLogging), 0o600); err != nil {
		return fmt.Errorf("configure Kafka: %w", err)
	}
	if _, err := child.Run(ctx, k.java(ctx, "-Xmx256m", "kafka.tools.StorageTool", "format", "-t", clusterID, "-c", k.file("server.properties"))); err != nil {
		return fmt.Errorf("format Kafka's storage: %w", err)
	}
	return nil
}

func (k *KafkaProcess) file(name string) string { return filepath.Join(k.dir.Path, name) }

// java prepares a JVM with the quick compiler and collector: it lives for seconds or minutes, on few cores.
func (k *KafkaProcess) java(ctx context.Context, args ...string) *exec.Cmd {
	args = append([]string{
		"-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Xshare:auto", "-Dlog4j2.configurationFile=" + k.file("log4j2.xml"),
		"-cp", filepath.Join(k.libs, "*"),
	}, args...)
	cmd := exec.CommandContext(ctx, "java", args...) //nolint:gosec // running Kafka is the purpose
	cmd.Dir = k.dir.Path
	cmd.WaitDelay = time.Second
	return cmd
}

func (k *KafkaProcess) launch(ctx context.Context) error {
	said := newAwaitedOutput(startedLine)
	cmd := k.java(context.WithoutCancel(ctx), "-Xms128m", "-Xmx768m", "kafka.Kafka", k.file("server.properties"))
	cmd.Stdout, cmd.Stderr = said, said
	proc, err := child.Start(cmd, syscall.SIGKILL)
	if err != nil {
		return err //nolint:wrapcheck // says it all
	}
	select {
	case <-said.seen:
		err = awaitKafka(ctx, k.Addrs())
	case <-proc.Done():
		return fmt.Errorf("Kafka ended at its start: %w\n%s", errors.Join(proc.Err(), errEnded), said.tail.String())
	case <-ctx.Done():
		err = ctx.Err()
	}
	if err != nil {
		stopErr := proc.Stop(context.WithoutCancel(ctx), child.Step{Signal: syscall.SIGKILL, Grace: kafkaKillGrace})
		return errors.Join(fmt.Errorf("Kafka did not start: %w\n%s", err, said.tail.String()), stopErr)
	}
	k.proc = proc
	return nil
}

var errEnded = errors.New("the process ended")

// Addrs are the bootstrap addresses; they stay the same over Restart.
func (k *KafkaProcess) Addrs() []string { return []string{k.addr} }

// Kill ends the JVM with SIGKILL and returns when it is gone.
func (k *KafkaProcess) Kill() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.proc.Stop(context.Background(), child.Step{Signal: syscall.SIGKILL, Grace: kafkaKillGrace}) //nolint:wrapcheck // says it all
}

// Restart starts Kafka again on its data, ending it in order first if it still runs.
func (k *KafkaProcess) Restart(ctx context.Context) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.stopped {
		return errors.New("restart Kafka: it was stopped for good")
	}
	if err := k.halt(ctx); err != nil {
		return fmt.Errorf("restart Kafka: %w", err)
	}
	return k.launch(ctx)
}

// Stop ends Kafka and removes its data.
func (k *KafkaProcess) Stop(ctx context.Context) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.stopped {
		return nil
	}
	if err := k.halt(ctx); err != nil {
		return fmt.Errorf("stop Kafka: %w", err)
	}
	k.stopped = true
	return k.dir.Remove() //nolint:wrapcheck // says it all
}

func (k *KafkaProcess) halt(ctx context.Context) error {
	select {
	case <-k.proc.Done():
		return nil
	default:
	}
	return k.proc.Stop(ctx, //nolint:wrapcheck // the callers wrap
		child.Step{Signal: syscall.SIGTERM, Grace: kafkaStopGrace, Polite: true},
		child.Step{Signal: syscall.SIGKILL, Grace: kafkaKillGrace})
}

// kafkaLibs returns the folder of Kafka's jars, resolving them through Maven if this user has not yet.
func kafkaLibs(ctx context.Context) (string, error) {
	cache, err := os.UserCacheDir()
	if err != nil {
		cache = os.TempDir() // no HOME
	}
	dir := filepath.Join(cache, "ordersaga", "kafka-"+kafkaVersion)
	libs := filepath.Join(dir, "libs")
	if _, err := os.Stat(libs); err == nil {
		return libs, nil
	}
	mvn, err := exec.LookPath("mvn")
	if err != nil {
		return "", fmt.Errorf("install Maven, which fetches Kafka's jars: %w", err)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil { //nolint:gosec // nothing secret
		return "", fmt.Errorf("make the cache of Kafka's jars: %w", err)
	}
	lock, err := flock.Wait(ctx, filepath.Join(dir, "lock")) // another test process may be at it
	if err != nil {
		return "", fmt.Errorf("wait for another process to fetch Kafka's jars: %w", err)
	}
	defer lock.Close()
	if _, err := os.Stat(libs); err == nil {
		return libs, nil
	}
	if err := os.WriteFile(filepath.Join(dir, "pom.xml"), []byte(kafkaPOM), 0o644); err != nil { //nolint:gosec // nothing secret
		return "", fmt.Errorf("write the list of Kafka's jars: %w", err)
	}
	part := libs + ".part" // renamed when whole
	if err := os.RemoveAll(part); err != nil {
		return "", fmt.Errorf("remove half-fetched jars: %w", err)
	}
	cmd := exec.CommandContext(ctx, mvn, "-q", "-B", "-f", filepath.Join(dir, "pom.xml"), //nolint:gosec // found on PATH
		"dependency:copy-dependencies", "-DincludeScope=runtime", "-DoutputDirectory="+part)
	cmd.Dir = dir
	if _, err := child.Run(ctx, cmd); err != nil {
		return "", fmt.Errorf("fetch Kafka's jars: %w", err)
	}
	if err := os.Rename(part, libs); err != nil {
		return "", fmt.Errorf("keep Kafka's jars: %w", err)
	}
	return libs, nil
}

// awaitedOutput keeps the end of what a process says and tells when it has said a certain text.
type awaitedOutput struct {
	tail child.Tail
	text string
	seen chan struct{}

	mu   sync.Mutex
	last string // what may be the beginning of the text
	told bool
}

var _ io.Writer = (*awaitedOutput)(nil)

func newAwaitedOutput(text string) *awaitedOutput {
	return &awaitedOutput{text: text, seen: make(chan struct{})}
}

// Write never fails.
func (o *awaitedOutput) Write(b []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if !o.told {
		said := o.last + string(b)
		if strings.Contains(said, o.text) {
			o.told = true
			close(o.seen)
		}
		o.last = said[max(0, len(said)-len(o.text)):]
	}
	return o.tail.Write(b) //nolint:wrapcheck // never fails
}
