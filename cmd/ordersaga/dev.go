package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"time"

	"github.com/schollz/progressbar/v3"
	"github.com/spf13/cobra"
	"go.uber.org/zap"
	"go.yaml.in/yaml/v3"
	"golang.org/x/term"

	"ordersaga/adapters/embedded"
	"ordersaga/adapters/payment"
	"ordersaga/adapters/telemetry"
	"ordersaga/cmd/ordersaga/internal/apiclient"
	"ordersaga/cmd/ordersaga/internal/audit"
	"ordersaga/cmd/ordersaga/internal/boot"
	"ordersaga/cmd/ordersaga/internal/demo"
	"ordersaga/cmd/ordersaga/internal/simulator"
)

// devFlags are what `dev` can be told.
type devFlags struct {
	dir, httpAddr, kafkaAddr string
	demo                     int
	exit                     bool
	latency                  time.Duration
}

// devConfig is the file in the data directory that says where everything is, for the commands that go to the database and the brokers
// themselves: doctor, audit, topics, migrate.
const devConfig = "dev.yaml"

// writeDevConfig writes it for its owner only: it holds the database's password.
func writeDevConfig(path string, cfg *boot.Config, httpAddr string) error {
	b, err := yaml.Marshal(map[string]any{
		"database": map[string]any{"url": cfg.Database.URL},
		"kafka": map[string]any{
			"brokers": cfg.Kafka.Brokers, "topic_prefix": cfg.Kafka.TopicPrefix, "partitions": cfg.Kafka.Partitions,
			"replication": cfg.Kafka.Replication, "embedded": cfg.Kafka.Embedded,
		},
		"payment": map[string]any{"url": cfg.Payment.URL, "api_key": cfg.Payment.APIKey},
		"http":    map[string]any{"addr": httpAddr},
	})
	if err != nil {
		return fmt.Errorf("%s: %w", devConfig, err)
	}
	b = append([]byte("# Where `ordersaga dev` runs what; written at every start. Use: ordersaga --config THIS_FILE doctor | audit | topics plan\n"), b...)
	// A new file, renamed: one that is there already may be readable for others.
	tmp := path + ".new"
	if err := os.Remove(tmp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%s: %w", devConfig, err)
	}
	if err := os.WriteFile(tmp, b, 0o600); err != nil {
		return fmt.Errorf("%s: %w", devConfig, err)
	}
	return os.Rename(tmp, path)
}

// devKey is the simulator's API key; it opens nothing else.
const devKey = "sk_test_ordersaga_dev"

func devCommand(g *globals) *cobra.Command {
	f := &devFlags{}
	c := &cobra.Command{
		Use: "dev", Short: "Run everything in one process, with nothing to install", Args: cobra.NoArgs,
		Long: `Runs the whole order saga in one process: an in-process Kafka broker with its data on disk, a private Postgres (from local binaries, or
fetched), a simulator of the payment gateway, and every role of the service, with a catalogue to order from. It starts again on its data.
What ORDERSAGA_DATABASE_URL, ORDERSAGA_KAFKA_BROKERS or ORDERSAGA_PAYMENT_URL name is used instead of the embedded one.

--demo N sends N mixed orders through the front doors and then checks the books; with --exit the program stops after that, with status 0
only if they are clean.`,
		Example: "  ordersaga dev\n  ordersaga dev --demo 200 --exit\n  ordersaga dev --data-dir /tmp/trial --http-addr 127.0.0.1:8081 --kafka-addr 127.0.0.1:9093",
		RunE:    func(cmd *cobra.Command, _ []string) error { return dev(cmd, g, f) },
	}
	fs := c.Flags()
	fs.StringVar(&f.dir, "data-dir", "", "where everything is kept (default: ordersaga/dev below the user's data directory)")
	fs.StringVar(&f.httpAddr, "http-addr", "", "where HTTP listens (default 127.0.0.1:8080)")
	fs.StringVar(&f.kafkaAddr, "kafka-addr", "127.0.0.1:9092", "where the broker listens, on 127.0.0.1; port 0: a free one")
	fs.IntVar(&f.demo, "demo", 0, "send so many mixed orders, then check the books")
	fs.BoolVar(&f.exit, "exit", false, "stop after the demo")
	fs.DurationVar(&f.latency, "gateway-latency", 20*time.Millisecond, "how long a call to the simulated gateway takes")
	return c
}

// devStop bounds the stopping of everything.
const devStop = 15 * time.Second

// devHouse is what dev started; Close stops it in the reverse order.
type devHouse struct {
	lock    *embedded.Lock
	closers []func(context.Context) error
	where   [][2]string // what runs where, for people
}

func (h *devHouse) add(name, where string, stop func(context.Context) error) {
	h.where = append(h.where, [2]string{name, where})
	h.closers = append(h.closers, stop)
}

// Close stops what was started, and answers what did not stop.
func (h *devHouse) Close(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), devStop)
	defer cancel()
	var errs []error
	for i := len(h.closers) - 1; i >= 0; i-- {
		errs = append(errs, h.closers[i](ctx))
	}
	if h.lock != nil {
		errs = append(errs, h.lock.Release())
	}
	return errors.Join(errs...)
}

func devDefaults() boot.Config {
	d := boot.Defaults()
	d.Database.URL, d.Payment.URL = "", ""
	d.Kafka.Brokers, d.Kafka.Replication, d.Kafka.Partitions = nil, 1, 8
	d.HTTP.Open, d.HTTP.Rate, d.HTTP.Burst = true, 20_000, 20_000
	d.Payment.Rate, d.Payment.Burst = 20_000, 20_000 // the simulator has no limit
	d.Log.Format = "console"
	return d
}

func dev(cmd *cobra.Command, g *globals, f *devFlags) (err error) {
	if f.exit && f.demo == 0 {
		return usagef("--exit goes with --demo N")
	}
	if f.demo < 0 {
		return usagef("--demo is a number of orders")
	}
	more := map[string]any{}
	if f.httpAddr != "" {
		more["http.addr"] = f.httpAddr
	}
	cfg, err := g.settings(devDefaults(), more)
	if err != nil {
		return err
	}
	dir, err := devDir(f.dir)
	if err != nil {
		return err
	}
	h := &devHouse{}
	defer func() { err = errors.Join(err, h.Close(cmd.Context())) }()
	if h.lock, err = embedded.AcquireLock(dir); err != nil {
		return err
	}
	log, level, closeLog, err := devLog(&cfg, dir, cmd.ErrOrStderr(), f.demo > 0)
	if err != nil {
		return err
	}
	h.closers = append(h.closers, closeLog)
	if cfg.Kafka.InstanceID == "" {
		if cfg.Kafka.InstanceID, err = h.lock.InstanceID(); err != nil {
			return err
		}
	}
	if err := h.furnish(cmd.Context(), &cfg, f, dir, log); err != nil {
		return err
	}
	app, err := boot.New(cmd.Context(), cfg, boot.Options{
		Version: version, ConfigPath: g.config, Reread: func(string) (boot.Config, error) { return g.settings(devDefaults(), more) },
		DataDir: dir, Log: log, Level: level, Prepare: true,
	})
	if err != nil {
		return err
	}
	defer app.Close()
	h.where = append(h.where, [2]string{"http", "http://" + app.HTTPAddr()})
	addrs := map[string]string{}
	for _, w := range h.where {
		where, _, _ := strings.Cut(w[1], " ")
		addrs[w[0]] = strings.TrimPrefix(where, "http://")
	}
	if err := h.lock.Publish(addrs); err != nil {
		return err
	}
	if err := writeDevConfig(filepath.Join(dir, devConfig), &cfg, app.HTTPAddr()); err != nil {
		return err
	}
	return h.live(cmd, g, f, app, &cfg, dir)
}

// live runs the app until it is told to stop, or the demo is over.
func (h *devHouse) live(cmd *cobra.Command, g *globals, f *devFlags, app *boot.App, cfg *boot.Config, dir string) error {
	ctx, stop := context.WithCancel(cmd.Context())
	defer stop()
	ran := make(chan error, 1)
	go func() { ran <- app.Run(ctx) }()
	cl, err := apiclient.New("http://"+app.HTTPAddr(), "")
	if err == nil {
		err = demo.Catalogue(ctx, cl, int64(f.demo))
	}
	if err == nil {
		h.announce(cmd.ErrOrStderr(), cfg, dir)
		if f.demo > 0 {
			err = runDemo(ctx, cmd, g, f, app, cfg, cl)
		}
	}
	if err == nil && !f.exit {
		select {
		case <-ctx.Done():
			say(cmd.ErrOrStderr(), "\nstopping …\n")
		case runErr := <-ran:
			return runErr
		}
	}
	stop()
	if runErr := <-ran; runErr != nil && !errors.Is(runErr, context.Canceled) {
		err = errors.Join(err, runErr)
	}
	if cmd.Context().Err() != nil && errors.Is(err, context.Canceled) {
		return nil // told to stop
	}
	return err
}

func devDir(dir string) (string, error) {
	if dir == "" {
		base := os.Getenv("XDG_DATA_HOME")
		if base == "" {
			home, err := os.UserHomeDir()
			if err != nil {
				return "", usagef("no home directory to keep the data in: give --data-dir")
			}
			base = filepath.Join(home, ".local", "share")
		}
		dir = filepath.Join(base, "ordersaga", "dev")
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return "", fmt.Errorf("--data-dir: %w", err)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil { //nolint:gosec // Postgres may run as another user below it
		return "", fmt.Errorf("--data-dir: %w", err)
	}
	return dir, nil
}

// devLog logs to the terminal, or to a file where the progress of a demo is shown.
func devLog(cfg *boot.Config, dir string, terminal io.Writer, quiet bool) (*zap.Logger, zap.AtomicLevel, func(context.Context) error, error) {
	out, closing := terminal, func(context.Context) error { return nil }
	if quiet {
		file, err := os.OpenFile(filepath.Join(dir, "dev.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
		if err != nil {
			return nil, zap.AtomicLevel{}, nil, fmt.Errorf("log: %w", err)
		}
		out, closing = file, func(context.Context) error { return file.Close() }
	}
	log, level, err := telemetry.NewLogger(telemetry.LogConfig{Level: cfg.Log.Level, Format: cfg.Log.Format, Output: out})
	return log, level, closing, err
}

// furnish starts what the configuration does not name: Postgres, the broker, the gateway.
func (h *devHouse) furnish(ctx context.Context, cfg *boot.Config, f *devFlags, dir string, log *zap.Logger) error {
	slog := telemetry.Slog(log)
	if cfg.Database.URL == "" {
		pg, err := embedded.StartPostgres(ctx, embedded.PostgresConfig{DataDir: filepath.Join(dir, "postgres"), Log: slog})
		if err != nil {
			return err
		}
		cfg.Database.URL = pg.URL()
		h.add("postgres", pg.URL(), pg.Stop)
	} else {
		h.where = append(h.where, [2]string{"postgres", "the given one"})
	}
	if len(cfg.Kafka.Brokers) == 0 {
		port, err := devPort(f.kafkaAddr)
		if err != nil {
			return err
		}
		b, err := embedded.StartBroker(ctx, embedded.BrokerConfig{DataDir: filepath.Join(dir, "kafka"), Port: port, Log: slog})
		if err != nil {
			return fmt.Errorf("%w (with --kafka-addr; port 0 takes a free one)", err)
		}
		cfg.Kafka.Brokers, cfg.Kafka.Embedded = b.Addrs(), true
		h.add("kafka", strings.Join(b.Addrs(), ","), b.Close)
		wrong, err := b.Check(ctx)
		if err != nil {
			return err
		}
		log := log.WithOptions(zap.AddStacktrace(zap.FatalLevel)) // where it stands tells nobody anything
		for _, w := range wrong {
			log.Error("embedded broker: "+w, zap.String("what to do", "stop, remove "+filepath.Join(dir, "kafka")+", start again: the outbox is relayed anew"))
		}
	} else {
		h.where = append(h.where, [2]string{"kafka", strings.Join(cfg.Kafka.Brokers, ",")})
	}
	if cfg.Payment.URL != "" {
		h.where = append(h.where, [2]string{"gateway", cfg.Payment.URL})
		return nil
	}
	sim, err := simulator.Open(filepath.Join(dir, "gateway"), simulator.WithAPIKey(devKey))
	if err != nil {
		return err
	}
	if err := sim.SetFaults(simulator.Faults{Fault: simulator.Fault{Latency: simulator.Duration(f.latency)}}); err != nil {
		return err
	}
	addr, err := sim.Listen(ctx, "127.0.0.1:0")
	if err != nil {
		return err
	}
	cfg.Payment.URL, cfg.Payment.APIKey = addr, devKey
	h.add("gateway", cfg.Payment.URL+" (simulator with API key "+devKey+"; faults: PUT /_control)", func(context.Context) error { return sim.Close() })
	return nil
}

// self is how this program is called again.
func self() string {
	if strings.Contains(os.Args[0], "go-build") {
		return "go run ./cmd/ordersaga" // which keeps no binary
	}
	return os.Args[0]
}

func devPort(addr string) (int, error) {
	host, p, err := net.SplitHostPort(addr)
	if err != nil {
		return 0, usagef("--kafka-addr %q: want 127.0.0.1:port", addr)
	}
	if host != "" && host != "127.0.0.1" && host != "localhost" {
		return 0, usagef("--kafka-addr %q: the embedded broker listens on 127.0.0.1 only", addr)
	}
	port, err := strconv.Atoi(p)
	if err != nil || port < 0 || port > 65535 {
		return 0, usagef("--kafka-addr %q: the port is a number", addr)
	}
	return port, nil
}

func (h *devHouse) announce(w io.Writer, cfg *boot.Config, dir string) {
	var b strings.Builder
	b.WriteString("\nordersaga " + version + " is running (" + runtime.Version() + "); its data is in " + dir + "\n")
	base := ""
	for _, x := range h.where {
		fmt.Fprintf(&b, "  %-9s %s\n", x[0], x[1])
		if x[0] == "http" {
			base = x[1]
		}
	}
	fmt.Fprintf(&b, `
Try:
  curl -s %[1]s/v1/orders -H 'Idempotency-Key: a1' -H 'Prefer: wait=10' -H 'Content-Type: application/json' -d '{"customer_id":"c-17","currency":"EUR","items":[{"sku":"TEA-1","quantity":2}],"payment_method":"pm_card_visa"}'
  %[4]s --url %[1]s orders list
  kcat -b %[2]s -C -t %[3]sorders.events.v1 -o beginning -e
The commands doctor, audit, topics and migrate find all of it with --config %[5]s
Ctrl-C stops everything.

`, base, cfg.Kafka.Brokers[0], cfg.Kafka.TopicPrefix, self(), filepath.Join(dir, devConfig))
	_, _ = io.WriteString(w, b.String()) // to the terminal
}

// Bounds of the demo.
const (
	demoWorkers  = 16
	demoPatience = 2 * time.Minute
	demoSettle   = 30 * time.Second // for the last messages to be published and acted on
)

func runDemo(ctx context.Context, cmd *cobra.Command, g *globals, f *devFlags, app *boot.App, cfg *boot.Config, cl *apiclient.Client) error {
	progress := func() {}
	if w, ok := cmd.ErrOrStderr().(*os.File); ok && term.IsTerminal(int(w.Fd())) {
		bar := progressbar.NewOptions(f.demo, progressbar.OptionSetWriter(w), progressbar.OptionSetDescription("orders"), progressbar.OptionShowCount(), progressbar.OptionClearOnFinish())
		progress = func() { _ = bar.Add(1) }
	}
	rep, err := demo.Run(ctx, demo.Config{
		Client: cl, Publish: app.PublishCommand, Orders: f.demo, Workers: demoWorkers, Patience: demoPatience, Progress: progress,
	})
	if err != nil {
		return err
	}
	gw, err := payment.New(boot.GatewayConfig(cfg))
	if err != nil {
		return err
	}
	defer gw.Close()
	books, err := settled(ctx, app, gw)
	if err != nil {
		return err
	}
	if err := writeDemo(cmd, g, rep, books); err != nil {
		return err
	}
	if !books.Clean || len(rep.Unexpected) > 0 {
		return &failedError{fmt.Sprintf("the demo did not end as it should: %d orders ended otherwise than expected, %d findings in the books", len(rep.Unexpected), len(books.Findings))}
	}
	return nil
}

// settled audits until the books are clean or it has waited long enough: the last acknowledgements come a moment after the last order.
func settled(ctx context.Context, app *boot.App, gw *payment.Gateway) (*audit.Report, error) {
	for until := time.Now().Add(demoSettle); ; {
		rep, err := audit.Run(ctx, app.DB(), gw)
		if err != nil || rep.Clean || time.Now().After(until) {
			return rep, err
		}
		select {
		case <-time.After(200 * time.Millisecond):
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

func writeDemo(cmd *cobra.Command, g *globals, rep *demo.Report, books *audit.Report) error {
	if g.output != "text" {
		unexpected := append([]string{}, rep.Unexpected...) // an empty list is [], not null
		return encode(cmd.OutOrStdout(), map[string]any{"outcomes": rep.Outcomes, "unexpected": unexpected, "seconds": rep.Took.Seconds(), "audit": books}, g.output == "json")
	}
	if err := list(cmd, g, rep.Rows(), []string{"ORDERS", "OUTCOME", "COUNT"}, func(r [3]string) []string { return r[:] }); err != nil {
		return err
	}
	w := cmd.OutOrStdout()
	for _, u := range rep.Unexpected {
		if _, err := fmt.Fprintln(w, "unexpected: "+clean(u)); err != nil {
			return err
		}
	}
	if _, err := fmt.Fprintf(w, "took          %s\n", rep.Took.Round(time.Millisecond)); err != nil {
		return err
	}
	return writeAudit(w, books)
}
