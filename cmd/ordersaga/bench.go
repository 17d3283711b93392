package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"ordersaga/adapters/kafka"
	"ordersaga/cmd/ordersaga/internal/bench"
	"ordersaga/cmd/ordersaga/internal/boot"
	"ordersaga/events"
)

// benchFlags are what `bench` can be told.
type benchFlags struct {
	cfg       bench.Config
	phases    []string
	length    time.Duration
	brokers   []string
	database  string
	pids      []string
	metrics   []string
	noPrepare bool
	price     int64
	embedded  bool
	latency   time.Duration
}

func benchCommand(g *globals) *cobra.Command {
	f := &benchFlags{}
	c := &cobra.Command{
		Use: "bench", Short: "Send orders at a running service and report throughput, latency and cost", Args: cobra.NoArgs,
		Long: `Sends orders to the service at --url and reports how many were accepted and ended, how long they took and what it cost. With --embedded it
starts the whole of ` + "`ordersaga dev`" + ` in a directory of its own first, and measures that.

Phases run in order: ` + bench.PhaseHelp + `.
In an open-loop phase (200/s, 2x) an order is due at its time whatever became of those before, and its latency counts from there; so a service
that stalls cannot make the load wait for it and look good. A saturate phase keeps a number of orders under way.

Latency is from when an order was due to its end: as read from the topic orders.events.v1 with --kafka-brokers (or kafka.* of the configuration, for TLS and
SASL), else by requests that wait (Prefer: wait), of which the service takes http.max_streams at a time.
Processes on this machine are found by the ports they listen on; --pid names others. The generator's own CPU is never in the total.
The service limits each caller (http.rate_per_caller, 1,000/s by default): raise it there for a load test.

The products it orders are its own (bench-…); making them needs a token with the role admin. Orders that it placed stay in the database.`,
		Example: `  ordersaga bench --embedded
  ordersaga bench --url https://orders.example.com --token "$TOKEN" --phase 200/s:60s
  ordersaga bench --kafka-brokers 127.0.0.1:9092 --database-url "$DATABASE_URL" --phase saturate:30s --phase 200/s:30s --phase 2x:30s -o json >now.json
  ordersaga bench compare before.json now.json
  ordersaga bench chart now.json --o-file now.html`,
		RunE: func(cmd *cobra.Command, _ []string) error { return runBench(cmd, g, f) },
	}
	m := &f.cfg.Mix
	fs := c.Flags()
	fs.StringArrayVar(&f.phases, "phase", []string{"saturate", "200/s"}, "a phase (may be repeated); see above")
	fs.DurationVar(&f.length, "duration", 20*time.Second, "length of phases that name none")
	fs.DurationVar(&f.cfg.WarmUp, "warm-up", 5*time.Second, "load before the first phase, not reported")
	fs.IntVar(&f.cfg.Connections, "connections", 64, "requests at a time")
	fs.IntVar(&f.cfg.Slots, "in-flight", 512, "orders under way in a saturate phase that names no number")
	fs.DurationVar(&f.cfg.Drain, "drain", 30*time.Second, "how long the last orders of a phase get to end")
	fs.DurationVar(&f.cfg.Timeout, "timeout", 30*time.Second, "for the answer to one request")
	fs.DurationVar(&f.cfg.Wait, "wait", 20*time.Second, "what Prefer: wait asks for, without --kafka-brokers")
	fs.StringVar(&f.cfg.Label, "label", "", "a name for the report")
	fs.StringSliceVar(&f.brokers, "kafka-brokers", nil, "learn ends from orders.events.v1 at these brokers")
	fs.StringVar(&f.database, "database-url", "", "count WAL, flushes and commits at this Postgres")
	fs.StringArrayVar(&f.pids, "pid", nil, "measure a process, as name=pid; the one named service is in the chart (may be repeated)")
	fs.StringArrayVar(&f.metrics, "metrics", nil, "base URL of a process whose /metrics count, beside --url (may be repeated)")
	fs.BoolVar(&f.noPrepare, "no-prepare", false, "the products are there already")
	fs.Int64Var(&f.price, "price", 1290, "price of the products that are made, in minor units")
	fs.IntVar(&m.Products, "products", bench.DefaultMix.Products, "products that are ordered")
	fs.IntVar(&m.MaxLines, "max-lines", bench.DefaultMix.MaxLines, "an order has 1 to so many products")
	fs.Float64Var(&m.Hot, "hot", bench.DefaultMix.Hot, "share of orders that have one hot product too")
	fs.Float64Var(&m.Declined, "declined", bench.DefaultMix.Declined, "share of orders whose card is declined")
	fs.Float64Var(&m.OutOfStock, "out-of-stock", bench.DefaultMix.OutOfStock, "share of orders for what is sold out")
	fs.Float64Var(&m.Cancelled, "cancelled", bench.DefaultMix.Cancelled, "share of orders that are cancelled at once")
	fs.Uint64Var(&m.Seed, "seed", bench.DefaultMix.Seed, "the same seed orders the same things again")
	fs.BoolVar(&f.embedded, "embedded", false, "start everything in a directory of its own and measure that")
	fs.DurationVar(&f.latency, "gateway-latency", 5*time.Millisecond, "with --embedded: how long a call to the simulated gateway takes")
	c.AddCommand(benchCompare(g), benchChart())
	return c
}

func runBench(cmd *cobra.Command, g *globals, f *benchFlags) error {
	ctx := cmd.Context()
	say := progressTo(cmd.ErrOrStderr())
	f.cfg.Version, f.cfg.Progress, f.cfg.URL, f.cfg.Token = version, say, g.url, g.token
	for _, s := range f.phases {
		p, err := bench.ParsePhase(s, f.length)
		if err != nil {
			return &usageError{err}
		}
		f.cfg.Phases = append(f.cfg.Phases, p)
	}
	if err := errors.Join(bench.CheckPhases(f.cfg.Phases), f.cfg.Mix.Check()); err != nil {
		return &usageError{err}
	}
	if f.embedded {
		h, err := startHouse(ctx, say, f.latency)
		if err != nil {
			return err
		}
		defer h.stop()
		f.cfg.URL, f.brokers, f.database = h.url, []string{h.kafka}, h.database
	}
	stop, err := f.connect(ctx, g)
	if err != nil {
		return err
	}
	defer stop()
	if !f.noPrepare {
		say("products …")
		if err := bench.Prepare(ctx, f.cfg.URL, f.cfg.Token, &f.cfg.Mix, f.price); err != nil {
			return err
		}
	}
	r, err := bench.NewRunner(f.cfg)
	if err != nil {
		return &usageError{err}
	}
	rep, err := r.Run(ctx)
	if err != nil {
		return err
	}
	if f.embedded {
		rep.Notes = append(rep.Notes, "embedded: the process named service is the service, the in-process broker and the gateway's simulator together")
	}
	if err := one(cmd, g, rep, rep.WriteText); err != nil {
		return err
	}
	for i := range rep.Phases {
		if n := rep.Phases[i].NotEnded; n > 0 {
			return &failedError{fmt.Sprintf("phase %s: %d orders that were accepted did not end within %s", rep.Phases[i].Name, n, f.cfg.Drain)}
		}
	}
	return nil
}

// progressTo tells people how far a run is; a terminal that is gone is no reason to end it.
func progressTo(w io.Writer) func(string, ...any) {
	return func(format string, args ...any) {
		_, _ = fmt.Fprintf(w, "bench: "+format+"\n", args...)
	}
}

// connect opens what the run measures with, and finds the processes.
func (f *benchFlags) connect(ctx context.Context, g *globals) (stop func(), err error) {
	var closers []func()
	stop = func() {
		for _, c := range closers {
			c()
		}
	}
	defer func() {
		if err != nil {
			stop()
		}
	}()
	more := map[string]any{}
	if len(f.brokers) > 0 {
		more["kafka.brokers"] = f.brokers
		cfg, err := g.settings(boot.Defaults(), more)
		if err != nil {
			return stop, err
		}
		cl, end, err := boot.OpenKafka(&cfg, nil, nil)
		if err != nil {
			return stop, err
		}
		closers = append(closers, end)
		tail, err := cl.NewTail(events.TopicEvents)
		if err != nil {
			return stop, err
		}
		f.cfg.Tail = tailing(cl, tail)
	}
	if f.database != "" {
		if f.cfg.Database, err = bench.OpenDatabase(ctx, f.database); err != nil {
			return stop, err
		}
		closers = append(closers, func() { f.cfg.Database.Close(context.WithoutCancel(ctx)) })
	}
	f.cfg.Scrape = append([]string{f.cfg.URL}, f.metrics...)
	return stop, f.findProcesses()
}

// tailing asks the brokers first, so that a wrong address is an error and not silence.
func tailing(cl *kafka.Client, tail *kafka.Tail) func(context.Context, func(), func(context.Context, []events.Envelope)) error {
	return func(ctx context.Context, ready func(), each func(context.Context, []events.Envelope)) error {
		if err := cl.Ping(ctx); err != nil {
			return err
		}
		return tail.Run(ctx, ready, each)
	}
}

func (f *benchFlags) findProcesses() error {
	ps := map[string][]int{}
	found := func(name, addr string) {
		if pid := bench.ListenerAt(addr); pid > 0 && pid != os.Getpid() {
			for _, pids := range ps {
				for _, p := range pids {
					if p == pid {
						return // one process that is two of them: the first name stays
					}
				}
			}
			ps[name] = []int{pid}
		}
	}
	if u, err := url.Parse(f.cfg.URL); err == nil {
		found(bench.ServiceProcess, u.Host)
	}
	if u, err := url.Parse(f.database); err == nil && u.Host != "" {
		found("postgres", u.Host)
	}
	if len(f.brokers) > 0 {
		found("kafka", f.brokers[0])
	}
	for _, s := range f.pids {
		name, number, ok := strings.Cut(s, "=")
		pid, err := strconv.Atoi(number)
		if !ok || err != nil || pid < 1 || name == "" {
			return usagef("--pid %q: want name=pid, such as gateway=4711", s)
		}
		if _, there := bench.CPU(pid); !there {
			return usagef("--pid %q: there is no such process that we may see", s)
		}
		ps[name] = append(ps[name], pid)
	}
	f.cfg.Processes = ps
	return nil
}

// house is an `ordersaga dev` in a process of its own, so that its CPU and the generator's are told apart.
type house struct {
	url, kafka, database string
	cmd                  *exec.Cmd
	ended                chan struct{} // closed when it has, with err set
	err                  error
	dir                  string
	log                  *os.File
	say                  func(string, ...any)
}

// Bounds of the embedded house.
const (
	houseStart = 3 * time.Minute // binaries of Postgres may have to be fetched
	houseStop  = 30 * time.Second
)

func startHouse(ctx context.Context, say func(string, ...any), latency time.Duration) (_ *house, err error) {
	self, err := os.Executable()
	if err != nil {
		return nil, fmt.Errorf("--embedded: %w", err)
	}
	h := &house{ended: make(chan struct{}), say: say}
	if h.dir, err = os.MkdirTemp("", "ordersaga-bench-"); err != nil {
		return nil, fmt.Errorf("--embedded: %w", err)
	}
	defer func() {
		if err != nil {
			h.stop()
		}
	}()
	if err := os.Chmod(h.dir, 0o755); err != nil { //nolint:gosec // Postgres may run as another user below it
		return h, fmt.Errorf("--embedded: %w", err)
	}
	if h.log, err = os.Create(filepath.Join(h.dir, "service.log")); err != nil {
		return h, fmt.Errorf("--embedded: %w", err)
	}
	addr, err := freeAddress(ctx)
	if err != nil {
		return h, err
	}
	if h.kafka, err = freeAddress(ctx); err != nil {
		return h, err
	}
	h.url = "http://" + addr
	data := filepath.Join(h.dir, "data")
	h.cmd = exec.CommandContext(context.WithoutCancel(ctx), self, "dev", "--data-dir", data, "--http-addr", addr, "--kafka-addr", h.kafka, //nolint:gosec // ourselves
		"--gateway-latency", latency.String(), "--set", "http.rate_per_caller=1000000", "--set", "http.burst_per_caller=1000000", "--set", "http.max_streams=20000", "--set", "log.level=warn")
	h.cmd.Stdout, h.cmd.Stderr = h.log, h.log
	h.cmd.Env = append(withoutSettings(os.Environ()), "ORDERSAGA_CONFIG=")
	if err := h.cmd.Start(); err != nil {
		h.cmd = nil
		return h, fmt.Errorf("--embedded: %w", err)
	}
	go func() {
		h.err = h.cmd.Wait()
		close(h.ended)
	}()
	say("starting everything in %s …", h.dir)
	return h, h.await(ctx, data)
}

// withoutSettings keeps the embedded service from taking settings that were meant for another one.
func withoutSettings(environ []string) (out []string) {
	for _, e := range environ {
		if !strings.HasPrefix(e, "ORDERSAGA_") {
			out = append(out, e)
		}
	}
	return out
}

// freeAddress is an address that nobody listened on a moment ago.
func freeAddress(ctx context.Context) (string, error) {
	var lc net.ListenConfig
	ln, err := lc.Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return "", fmt.Errorf("free port: %w", err)
	}
	return ln.Addr().String(), ln.Close()
}

func (h *house) await(ctx context.Context, data string) error {
	e, err := bench.NewEndpoint(h.url, 5*time.Second)
	if err != nil {
		return err
	}
	k := bench.NewConn(e)
	defer k.Close()
	for until := time.Now().Add(houseStart); time.Now().Before(until); {
		if a, err := k.Do(ctx, &bench.Request{Method: "GET", Path: "/readyz"}); err == nil && a.Status == 200 {
			return h.readAddresses(data)
		}
		select {
		case <-h.ended:
			b, _ := os.ReadFile(h.log.Name()) // the error says that it ended, whatever the log does
			return fmt.Errorf("--embedded: the service ended: %w\n%s", errors.Join(h.err, errors.New("see its log")), tailOf(b))
		case <-time.After(100 * time.Millisecond):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return fmt.Errorf("--embedded: the service was not ready within %s; its log: %s", houseStart, h.log.Name())
}

// tailOf is the end of a log.
func tailOf(b []byte) string {
	const most = 2000
	return string(b[max(0, len(b)-most):])
}

// readAddresses learns where Postgres is from the note in the data directory's lock.
func (h *house) readAddresses(data string) error {
	b, err := os.ReadFile(filepath.Join(data, "lock"))
	var note struct {
		Addrs map[string]string `json:"addrs"`
	}
	if err == nil {
		err = json.Unmarshal(b, &note)
	}
	if err != nil {
		return fmt.Errorf("--embedded: addresses: %w", err)
	}
	h.database = note.Addrs["postgres"]
	return nil
}

func (h *house) stop() {
	if h.cmd != nil {
		_ = h.cmd.Process.Signal(syscall.SIGTERM) // one that has ended needs none
		select {
		case <-h.ended:
		case <-time.After(houseStop):
			_ = h.cmd.Process.Kill()
			<-h.ended
		}
	}
	if h.log != nil {
		_ = h.log.Close() // removed next
	}
	if err := os.RemoveAll(h.dir); err != nil {
		h.say("not removed: %v", err)
	}
}

func benchCompare(g *globals) *cobra.Command {
	return &cobra.Command{
		Use: "compare A.json B.json", Short: "Compare two reports, phase by phase", Args: cobra.ExactArgs(2),
		Long:    "Lists every figure that both reports have, for every phase of the same name, with the ratio of B to A. A move of less than 5 % is not judged: one run's noise is of that size. Compare medians of several runs.",
		Example: "  ordersaga bench compare before.json after.json\n  ordersaga bench compare before.json after.json -o json",
		RunE: func(cmd *cobra.Command, args []string) error {
			a, err := bench.ReadReport(args[0])
			if err != nil {
				return err
			}
			b, err := bench.ReadReport(args[1])
			if err != nil {
				return err
			}
			ds, err := bench.Compare(a, b)
			if err != nil {
				return err
			}
			if g.output == "text" {
				return bench.WriteDifferences(cmd.OutOrStdout(), a, b, ds)
			}
			return list(cmd, g, ds, nil, func(bench.Difference) []string { return nil })
		},
	}
}

func benchChart() *cobra.Command {
	var file string
	c := &cobra.Command{
		Use: "chart REPORT.json", Short: "Draw a report as SVG or as an HTML page", Args: cobra.ExactArgs(1),
		Long:    "Draws throughput and latency over time and latency by share of orders. The file needs nothing from elsewhere. Its ending says what it is: .svg or .html.",
		Example: "  ordersaga bench chart now.json --o-file now.svg\n  ordersaga bench chart now.json --o-file now.html",
		RunE: func(cmd *cobra.Command, args []string) error {
			r, err := bench.ReadReport(args[0])
			if err != nil {
				return err
			}
			write := r.WriteSVG
			switch ext := filepath.Ext(file); ext {
			case ".svg":
			case ".html":
				write = r.WriteHTML
			default:
				return usagef("--o-file %q: its ending is .svg or .html", file)
			}
			out, err := os.Create(file)
			if err != nil {
				return err
			}
			return errors.Join(write(out), out.Close())
		},
	}
	c.Flags().StringVar(&file, "o-file", "", "the file to write")
	_ = c.MarkFlagRequired("o-file")
	return c
}
