package bench

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"sync/atomic"
	"time"

	"ordersaga/domain"
	"ordersaga/events"
)

// Config is what a run needs.
type Config struct {
	URL, Token  string
	Version     string
	Label       string
	Mix         Mix
	Phases      []PhaseSpec
	WarmUp      time.Duration
	Connections int
	Slots       int           // orders under way where a saturate phase names no number
	Drain       time.Duration // how long the last orders of a phase get to end
	Timeout     time.Duration // of one request; with Prefer: wait the wait is on top

	// Tail streams the public events from now on until ctx ends, calling ready once it will miss nothing; nil: ends are learnt by Prefer: wait.
	Tail func(ctx context.Context, ready func(), each func(context.Context, []events.Envelope)) error
	// Wait is what Prefer: wait asks for, without a Tail.
	Wait time.Duration
	// Database, if not nil, is where WAL and commits are counted.
	Database *Database
	// Processes are measured by name.
	Processes map[string][]int
	// Scrape lists base URLs whose /metrics are read; the first is the service's.
	Scrape []string
	// Progress hears what begins.
	Progress func(format string, args ...any)
}

// Runner runs phases against a service.
type Runner struct {
	cfg     Config
	to      *Endpoint
	scrape  []*Endpoint
	head    []byte // of a request to place, but for its key
	cancel  []byte
	load    *Load
	current atomic.Pointer[Recorder]
	best    float64 // ends a second of the saturate phases so far
	next    int     // number of the next order
}

// NewRunner checks a configuration.
func NewRunner(cfg Config) (*Runner, error) {
	if err := cfg.Mix.Check(); err != nil {
		return nil, err
	}
	if err := CheckPhases(cfg.Phases); err != nil {
		return nil, err
	}
	if cfg.Connections < 1 || cfg.Slots < 1 {
		return nil, errors.New("connections and orders under way are at least 1")
	}
	if cfg.Tail == nil && cfg.Mix.Cancelled > 0 {
		return nil, errors.New("cancelled orders need --kafka-brokers: a request that waits for the end of its order cannot cancel it")
	}
	timeout := cfg.Timeout
	lines := []string{}
	if cfg.Tail == nil {
		timeout += cfg.Wait
		lines = append(lines, "Prefer: wait="+strconv.Itoa(int(cfg.Wait.Seconds())))
	}
	to, err := NewEndpoint(cfg.URL, timeout)
	if err != nil {
		return nil, err
	}
	r := &Runner{cfg: cfg, to: to, head: Heads(cfg.Token, lines...), cancel: Heads(cfg.Token)}
	for _, u := range cfg.Scrape {
		e, err := NewEndpoint(u, cfg.Timeout)
		if err != nil {
			return nil, fmt.Errorf("metrics: %w", err)
		}
		r.scrape = append(r.scrape, e)
	}
	r.load = NewLoad(to, r.place)
	return r, nil
}

// Run warms up, runs the phases in order and reports. On an error it answers what it has so far, if that is anything.
func (r *Runner) Run(ctx context.Context) (*Report, error) {
	rep := &Report{Tool: ReportTool, Version: r.cfg.Version, Label: r.cfg.Label, At: time.Now().UTC().Truncate(time.Second), Target: r.cfg.URL, Terminal: TerminalWait, Host: ThisHost(), Mix: r.cfg.Mix}
	for _, name := range slices.Sorted(maps.Keys(r.cfg.Processes)) {
		rep.Measured = append(rep.Measured, fmt.Sprintf("%s %v", name, r.cfg.Processes[name]))
	}
	if d := r.cfg.Database; d != nil {
		var err error
		if rep.Database, err = d.Settings(ctx); err != nil {
			return nil, err
		}
		if rep.Database["fsync"] != "on" {
			rep.Notes = append(rep.Notes, "the database runs without fsync: what it promises does not survive a crash, and the figures do not count")
		}
	}
	ctx, stop := context.WithCancel(ctx)
	tailed := make(chan error, 1)
	if r.cfg.Tail != nil {
		rep.Terminal = TerminalKafka
		if err := r.tail(ctx, tailed); err != nil {
			stop()
			return nil, err
		}
	} else {
		close(tailed)
	}
	err := r.phases(ctx, rep)
	stop()
	if tailErr := <-tailed; err == nil && tailErr != nil {
		err = fmt.Errorf("events: %w", tailErr)
	}
	return rep, err
}

// tailPatience bounds the wait for the tail's first contact.
const tailPatience = 20 * time.Second

func (r *Runner) tail(ctx context.Context, ended chan error) error {
	ready := make(chan struct{})
	go func() { ended <- r.cfg.Tail(ctx, func() { close(ready) }, r.observe) }()
	select {
	case <-ready:
		return nil
	case err := <-ended:
		return fmt.Errorf("events: %w", err)
	case <-time.After(tailPatience):
		return errors.New("events: the brokers do not answer; without --kafka-brokers ends are learnt by Prefer: wait")
	case <-ctx.Done():
		return ctx.Err()
	}
}

var outcomes = map[events.Name]string{
	events.TOrderConfirmed: OutcomeConfirmed, events.TOrderRejected: OutcomeRejected, events.TOrderCancelled: OutcomeCancelled,
}

// observe takes public events; what is not of the phase under way is somebody else's.
func (r *Runner) observe(_ context.Context, batch []events.Envelope) {
	rec := r.current.Load()
	if rec == nil {
		return
	}
	now := time.Now()
	for i := range batch {
		if outcome, terminal := outcomes[batch[i].Type]; terminal && rec.Ended(batch[i].OrderID, now, outcome) {
			r.load.Ended()
		}
	}
}

func (r *Runner) phases(ctx context.Context, rep *Report) error {
	if r.cfg.WarmUp > 0 {
		r.cfg.Progress("warm-up: %s", r.cfg.WarmUp)
		if _, err := r.phase(ctx, PhaseSpec{Name: "warm-up", Duration: r.cfg.WarmUp}); err != nil {
			return err
		}
	}
	for _, spec := range r.cfg.Phases {
		p, err := r.phase(ctx, spec)
		if err != nil {
			return fmt.Errorf("phase %s: %w", spec.Name, err)
		}
		rep.Phases = append(rep.Phases, *p)
		if p.Offered == 0 {
			r.best = max(r.best, p.EndedPerSec)
		}
		r.cfg.Progress("%s: %.0f accepted/s, %.0f ended/s, p50 %.1f ms, p99 %.1f ms", p.Name, p.AcceptedPerSec, p.EndedPerSec, p.Latency.P50, p.Latency.P99)
		if p.Accepted == 0 {
			return fmt.Errorf("phase %s: no order was accepted; answers: %v", spec.Name, p.Errors)
		}
	}
	return nil
}

// meters is what is read before and after a phase.
type meters struct {
	cpu      map[string]float64
	own      float64
	metrics  Metrics
	database DatabaseCounts
}

func (r *Runner) read(ctx context.Context) (m meters, err error) {
	m.cpu = map[string]float64{}
	for name, pids := range r.cfg.Processes {
		for _, pid := range pids {
			v, ok := CPU(pid)
			if !ok {
				return m, fmt.Errorf("process %s (%d) is not there", name, pid)
			}
			m.cpu[name] += v
		}
	}
	m.own = OwnCPU()
	if m.metrics, err = r.scrapeAll(ctx); err != nil {
		return m, err
	}
	if r.cfg.Database != nil {
		m.database, err = r.cfg.Database.Counts(ctx)
	}
	return m, err
}

func (r *Runner) scrapeAll(ctx context.Context) (Metrics, error) {
	sum := Metrics{}
	for _, e := range r.scrape {
		m, err := Scrape(ctx, e, r.cfg.Token, "/metrics")
		if err != nil {
			return nil, fmt.Errorf("metrics of %s: %w", e.addr, err)
		}
		sum.add(m)
	}
	return sum, nil
}

func (r *Runner) phase(ctx context.Context, spec PhaseSpec) (*Phase, error) {
	plan := Plan{Rate: spec.Rate, Duration: spec.Duration, Orders: spec.Orders, Slots: spec.Slots, Connections: r.cfg.Connections, First: r.next}
	p := &Phase{Name: spec.Name}
	if spec.Times > 0 {
		plan.Rate = spec.Times * r.best
	}
	if plan.Rate == 0 && plan.Slots == 0 {
		plan.Slots = r.cfg.Slots
	}
	p.Offered, p.Slots = plan.Rate, plan.Slots
	if r.cfg.Tail == nil && plan.Slots > plan.Connections {
		plan.Connections = plan.Slots // an order under way is a request that waits
	}
	before, err := r.read(ctx)
	if err != nil {
		return nil, err
	}
	rec := NewRecorder(time.Now())
	r.current.Store(rec)
	defer r.current.Store(nil)
	w := r.watch(ctx, rec)
	var window time.Duration
	p.Due, p.Unsent, window = r.load.Run(ctx, plan)
	r.next += p.Due
	rec.Close(rec.start.Add(window))
	select {
	case <-rec.Idle():
	case <-time.After(r.cfg.Drain):
	case <-ctx.Done():
	}
	p.Drained = (time.Since(rec.start) - window).Seconds()
	most := w.stop()
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	return p, r.conclude(ctx, p, rec, window, &before, most)
}

// conclude fills in what the meters say.
func (r *Runner) conclude(ctx context.Context, p *Phase, rec *Recorder, window time.Duration, before *meters, most peaks) error {
	p.Seconds = window.Seconds()
	rec.into(p, window)
	if r.cfg.Database != nil {
		select {
		case <-time.After(statisticsDelay):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	after, err := r.read(ctx)
	if err != nil {
		return err
	}
	orders := float64(max(p.Ended, 1))
	p.Generator = (after.own - before.own) / orders * 1000
	p.CPU, p.RSS = map[string]float64{}, most.memory
	for name, v := range after.cpu {
		p.CPU[name] = (v - before.cpu[name]) / orders * 1000
		p.CPUTotal += p.CPU[name]
	}
	if len(r.scrape) > 0 {
		a, b := after.metrics, before.metrics
		const mb = 1 << 20
		p.Service = &ServiceUse{
			RSSMax: max(most.metrics[metricRSS], a[metricRSS]) / mb, HeapMax: max(most.metrics[metricHeap], a[metricHeap]) / mb,
			Goroutines: max(most.metrics[metricGoroutines], a[metricGoroutines]), GCs: a[metricGCCount] - b[metricGCCount],
			GCPauseMax: a[metricGCMax] * 1e3, AllocPer: (a[metricAllocs] - b[metricAllocs]) / orders / 1024,
			RecordsPer: (a[metricPublished] - b[metricPublished]) / orders,
		}
		if p.Service.GCs > 0 {
			p.Service.GCPauseMean = (a[metricGCSum] - b[metricGCSum]) / p.Service.GCs * 1e3
		}
	}
	if r.cfg.Database != nil {
		d := after.database.since(before.database)
		p.WAL = &DatabaseUse{d.WALBytes / orders, d.WALRecords / orders, d.Flushes / orders, d.Commits / orders}
	}
	return nil
}

// place sends one order, and its cancel if it is one of those.
func (r *Runner) place(ctx context.Context, k *Conn, i int, due time.Time) Fate {
	rec := r.current.Load()
	o := r.cfg.Mix.Order(i)
	rec.Expect(o.ID, due)
	req := Request{Method: http.MethodPost, Path: "/v1/orders", Head: append(slices.Clip(r.head), "Idempotency-Key: "+o.ID.String()+"\r\n"...), Body: o.Body}
	a, err := k.Do(ctx, &req)
	now := time.Now()
	if !rec.Answered(o.ID, due, now, a, err) {
		return Refused
	}
	if r.cfg.Tail == nil {
		if outcome := terminal(a.Body); outcome != "" {
			rec.Ended(o.ID, now, outcome)
		}
		return Over
	}
	if o.Cancel {
		req = Request{Method: http.MethodPost, Path: "/v1/orders/" + o.ID.String() + "/cancel", Head: r.cancel, Body: []byte("{}")}
		if c, err := k.Do(ctx, &req); err != nil || c.Status != http.StatusAccepted && c.Status != http.StatusConflict {
			rec.Failed("cancel", c, err)
		}
	}
	return UnderWay
}

// terminal reads the end of an order out of an answer that waited for it; "" if it was not waited for long enough.
func terminal(body []byte) string {
	var o struct {
		Status domain.Status `json:"status"`
	}
	if json.Unmarshal(body, &o) != nil || !o.Status.Terminal() {
		return ""
	}
	return string(o.Status)
}
