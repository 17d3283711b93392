package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/twmb/franz-go/pkg/kadm"
	"github.com/twmb/franz-go/pkg/kgo"

	"ordersaga/adapters/embedded"
	"ordersaga/cmd/ordersaga/internal/bench"
)

// servers are what both systems run on.
type servers struct {
	dir      string
	pg       *embedded.Postgres
	pgPID    int
	kafka    *process
	brokers  string
	admin    *kadm.Client
	kafkaLog *os.File
}

// Bounds of starting and stopping.
const (
	startWithin = 2 * time.Minute
	stopWithin  = 20 * time.Second
)

func startServers(ctx context.Context, dir, libs string, statements bool) (s *servers, err error) {
	s = &servers{dir: dir}
	defer func() { //nolint:contextcheck // stopping has to happen, whatever ended the start
		if err != nil {
			s.stop()
		}
	}()
	ctx, cancel := context.WithTimeout(ctx, startWithin)
	defer cancel()
	settings := map[string]string{
		"fsync": "on", "shared_buffers": "1GB", "max_wal_size": "4GB", "track_commit_timestamp": "on", "max_connections": "300",
	}
	if statements {
		settings["shared_preload_libraries"] = "pg_stat_statements,auto_explain"
		settings["pg_stat_statements.track"] = "all"
		settings["track_io_timing"] = "on"
	}
	if s.pg, err = embedded.StartPostgres(ctx, embedded.PostgresConfig{DataDir: filepath.Join(dir, "postgres"), Settings: settings, Log: slog.New(slog.DiscardHandler)}); err != nil {
		return s, err
	}
	u, err := url.Parse(s.pg.URL())
	if err != nil {
		return s, fmt.Errorf("postgres: %w", err)
	}
	if s.pgPID = bench.ListenerAt(u.Host); s.pgPID == 0 {
		return s, errors.New("postgres: its process is not to be found")
	}
	return s, s.startKafka(ctx, libs)
}

// startKafka runs Kafka from its jars as its own scripts do: G1, a heap of a gigabyte, the full compiler.
func (s *servers) startKafka(ctx context.Context, libs string) error {
	ports, err := freePorts(ctx, 2)
	if err != nil {
		return err
	}
	s.brokers = "127.0.0.1:" + ports[0]
	controller := "127.0.0.1:" + ports[1]
	dir := filepath.Join(s.dir, "kafka")
	if err := os.MkdirAll(dir, 0o755); err != nil { //nolint:gosec // nothing secret
		return fmt.Errorf("kafka: %w", err)
	}
	config := strings.Join([]string{
		"process.roles=broker,controller", "node.id=1", "controller.quorum.voters=1@" + controller,
		"listeners=PLAINTEXT://" + s.brokers + ",CONTROLLER://" + controller, "advertised.listeners=PLAINTEXT://" + s.brokers,
		"controller.listener.names=CONTROLLER", "listener.security.protocol.map=CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT",
		"log.dirs=" + filepath.Join(dir, "data"), "auto.create.topics.enable=false", "group.initial.rebalance.delay.ms=0",
		"offsets.topic.replication.factor=1", "offsets.topic.num.partitions=16",
		"transaction.state.log.replication.factor=1", "transaction.state.log.min.isr=1",
	}, "\n") + "\n"
	logging := `<?xml version="1.0" encoding="UTF-8"?><Configuration status="WARN"><Appenders><Console name="out" target="SYSTEM_OUT"><PatternLayout pattern="[%d] %p %m (%c)%n"/></Console></Appenders><Loggers><Root level="WARN"><AppenderRef ref="out"/></Root></Loggers></Configuration>`
	for name, text := range map[string]string{"server.properties": config, "log4j2.xml": logging} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			return fmt.Errorf("kafka: %w", err)
		}
	}
	java := func(args ...string) []string {
		return append([]string{"java", "-Dlog4j2.configurationFile=" + filepath.Join(dir, "log4j2.xml"), "-cp", filepath.Join(libs, "*")}, args...)
	}
	format := java("-Xmx256m", "kafka.tools.StorageTool", "format", "-t", "MkU3OEVBNTcwNTJENDM2Qg", "-c", filepath.Join(dir, "server.properties"))
	if out, err := exec.CommandContext(ctx, format[0], format[1:]...).CombinedOutput(); err != nil { //nolint:gosec // running Kafka is the purpose
		return fmt.Errorf("kafka: %w\n%s", err, out)
	}
	if s.kafkaLog, err = os.Create(filepath.Join(s.dir, "kafka.log")); err != nil {
		return fmt.Errorf("kafka: %w", err)
	}
	run := java("-Xms1g", "-Xmx1g", "-XX:+UseG1GC", "-XX:MaxGCPauseMillis=20", "-XX:InitiatingHeapOccupancyPercent=35", "kafka.Kafka", filepath.Join(dir, "server.properties"))
	if s.kafka, err = start(run, nil, s.kafkaLog); err != nil {
		return fmt.Errorf("kafka: %w", err)
	}
	cl, err := kgo.NewClient(kgo.SeedBrokers(s.brokers))
	if err != nil {
		return fmt.Errorf("kafka: %w", err)
	}
	s.admin = kadm.NewClient(cl)
	return until(ctx, "kafka", s.kafka, func() error {
		_, err := s.admin.ListBrokers(ctx)
		return err
	})
}

// until tries until it goes well; it gives up when ctx or the process ends.
func until(ctx context.Context, what string, p *process, try func() error) error {
	for {
		err := try()
		if err == nil {
			return nil
		}
		select {
		case <-p.ended:
			return fmt.Errorf("%s: it ended while it started", what)
		case <-ctx.Done():
			return fmt.Errorf("%s: not ready in time: %w", what, err)
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// execute runs statements beside all databases of runs.
func (s *servers) execute(ctx context.Context, statements ...string) error {
	conn, err := pgx.Connect(ctx, s.pg.URL())
	if err != nil {
		return fmt.Errorf("postgres: %w", err)
	}
	defer conn.Close(ctx) //nolint:errcheck // nothing is lost
	for _, q := range statements {
		if _, err := conn.Exec(ctx, q); err != nil {
			return fmt.Errorf("postgres: %w", err)
		}
	}
	return nil
}

// database makes a fresh database and answers its URL.
func (s *servers) database(ctx context.Context, name string) (string, error) {
	if err := s.execute(ctx, "DROP DATABASE IF EXISTS "+name+" WITH (FORCE)", "CREATE DATABASE "+name, "CHECKPOINT"); err != nil {
		return "", err
	}
	u, err := url.Parse(s.pg.URL())
	if err != nil {
		return "", fmt.Errorf("postgres: %w", err)
	}
	u.Path = "/" + name
	return u.String(), nil
}

// forget drops the database (if one is named) and the topics of a run: left-over topics cost the broker CPU in the runs that follow.
func (s *servers) forget(ctx context.Context, name string) error {
	if name != "" {
		if err := s.execute(ctx, "DROP DATABASE IF EXISTS "+name+" WITH (FORCE)"); err != nil {
			return err
		}
	}
	topics, err := s.admin.ListTopics(ctx)
	if err != nil {
		return fmt.Errorf("kafka: %w", err)
	}
	if names := topics.Names(); len(names) > 0 {
		if _, err := s.admin.DeleteTopics(ctx, names...); err != nil {
			return fmt.Errorf("kafka: %w", err)
		}
	}
	return nil
}

func (s *servers) stop() {
	if s.admin != nil {
		s.admin.Close()
	}
	if s.kafka != nil {
		s.kafka.stop()
	}
	if s.kafkaLog != nil {
		_ = s.kafkaLog.Close() // removed with the directory
	}
	if s.pg != nil {
		ctx, cancel := context.WithTimeout(context.Background(), stopWithin)
		defer cancel()
		if err := s.pg.Stop(ctx); err != nil {
			fmt.Fprintln(os.Stderr, "yardstick: postgres:", err)
		}
		if d := s.pg.ClusterDir(); !strings.HasPrefix(d, s.dir) {
			_ = os.RemoveAll(d) // ours, and elsewhere only because its account may not enter our directory
		}
	}
}

// process is a child that is stopped with its group.
type process struct {
	cmd   *exec.Cmd
	ended chan struct{}
	stdin io.Closer
}

func start(args, environ []string, log io.Writer) (*process, error) {
	cmd := exec.Command(args[0], args[1:]...) //nolint:gosec,noctx // stopped by stop, with a grace
	cmd.Env = append(os.Environ(), environ...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", args[0], err)
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", args[0], err)
	}
	p := &process{cmd, make(chan struct{}), in}
	go func() {
		_ = cmd.Wait() // how it ended shows in its log
		close(p.ended)
	}()
	return p, nil
}

func (p *process) pid() int { return p.cmd.Process.Pid }

func (p *process) stop() {
	_ = p.stdin.Close()
	_ = syscall.Kill(-p.pid(), syscall.SIGTERM) // it may have ended
	select {
	case <-p.ended:
	case <-time.After(stopWithin):
		_ = syscall.Kill(-p.pid(), syscall.SIGKILL)
		<-p.ended
	}
}

func freePorts(ctx context.Context, n int) (out []string, err error) {
	for range n {
		var lc net.ListenConfig
		ln, err := lc.Listen(ctx, "tcp", "127.0.0.1:0")
		if err != nil {
			return nil, fmt.Errorf("free port: %w", err)
		}
		_, port, err := net.SplitHostPort(ln.Addr().String())
		if err = errors.Join(err, ln.Close()); err != nil {
			return nil, fmt.Errorf("free port: %w", err)
		}
		out = append(out, port)
	}
	return out, nil
}

// kafkaLibs finds Kafka's jars where the tests keep them.
func kafkaLibs() (string, error) {
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", fmt.Errorf("kafka: %w", err)
	}
	found, err := filepath.Glob(filepath.Join(cache, "ordersaga", "kafka-*", "libs"))
	if err != nil || len(found) == 0 {
		return "", errors.New("kafka: no jars; give --kafka-libs (the folder libs of a Kafka distribution), or run the tests of adapters/kafka once, which fetch them")
	}
	return found[len(found)-1], nil
}

// tailOf is the end of a log, for an error.
func tailOf(path string) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return ""
	}
	const most = 3000
	return string(bytes.TrimSpace(b[max(0, len(b)-most):]))
}
