package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/twmb/franz-go/pkg/kgo"

	"ordersaga/cmd/ordersaga/internal/bench"
)

// Phase is what was measured of one phase of one run.
type Phase struct {
	Orders     int                `json:"orders"`
	AcceptedPS float64            `json:"accepted_per_s"`
	SagasPS    float64            `json:"sagas_per_s"` // until the last saga's last commit
	AcceptP50  float64            `json:"accept_ms_p50"`
	AcceptP99  float64            `json:"accept_ms_p99"`
	P50        float64            `json:"confirmed_ms_p50"` // due to the commit of the order's end
	P99        float64            `json:"confirmed_ms_p99"`
	P999       float64            `json:"confirmed_ms_p99_9"`
	CPU        map[string]float64 `json:"cpu_s_per_1000"` // service, postgres, kafka
	Total      float64            `json:"cpu_s_per_1000_total"`
	Apart      map[string]float64 `json:"cpu_s_per_1000_apart"` // generator, gateway
	WALBytes   float64            `json:"wal_bytes_per_saga"`
	WALRecords float64            `json:"wal_records_per_saga"`
	WALImages  float64            `json:"wal_page_images_per_saga"`
	Flushes    float64            `json:"wal_flushes_per_saga"`
	Commits    float64            `json:"commits_per_saga"`
	Retried    int64              `json:"refused_and_sent_again"`
	RSS        float64            `json:"service_rss_mb"`
	Others     float64            `json:"others_cpu_cores"` // what the machine did beside all that: the noise
}

// meter measures one side that runs, phase by phase.
type meter struct {
	side    *side
	env     *environment
	sys     *system
	gateway *process
	db      *pgx.Conn
	counts  *bench.Database

	load        workload
	connections int           // requests at a time
	limit       time.Duration // for the sagas of a phase to end
	pprof       string        // folder of profiles; empty: none
	tail        *tail         // what tells of ends meanwhile; nil: nothing does
	placed      []placed
}

// placed is what the books must say of one phase.
type placed struct {
	from, to            string // ids: below to
	n                   int
	confirmed, rejected int
}

// open connects to what is measured.
func (m *meter) open(ctx context.Context) (err error) {
	if m.db, err = pgx.Connect(ctx, m.env.database); err != nil {
		return fmt.Errorf("database: %w", err)
	}
	if m.counts, err = bench.OpenDatabase(ctx, m.env.database); err != nil {
		m.close(ctx)
	}
	return err
}

func (m *meter) close(ctx context.Context) {
	if m.counts != nil {
		m.counts.Close(context.WithoutCancel(ctx))
	}
	if m.db != nil {
		_ = m.db.Close(context.WithoutCancel(ctx)) // nothing is lost
	}
}

// cpu is what everybody has used so far, in seconds, by name.
func (m *meter) cpu() (map[string]float64, error) {
	service, ok := m.sys.cpu()
	if !ok {
		return nil, fmt.Errorf("the service ended during the run\n%s", tailOf(m.sys.log))
	}
	out := map[string]float64{"generator": bench.OwnCPU(), "service": service}
	for name, pid := range map[string]int{"postgres": m.env.s.pgPID, "kafka": m.env.s.kafka.pid(), "gateway": m.gateway.pid()} {
		v, ok := bench.CPU(pid)
		if !ok {
			return nil, fmt.Errorf("%s ended during the run\n%s", name, tailOf(m.sys.log))
		}
		out[name] = v
	}
	return out, nil
}

// reading is what is read before and after a phase.
type reading struct {
	cpu    map[string]float64
	busy   float64
	db     bench.DatabaseCounts
	images float64
}

func (m *meter) read(ctx context.Context) (r reading, err error) {
	r.busy = bench.Busy()
	if r.cpu, err = m.cpu(); err == nil {
		err = m.readDatabase(ctx, &r)
	}
	return r, err
}

func (m *meter) readDatabase(ctx context.Context, r *reading) (err error) {
	if r.db, err = m.counts.Counts(ctx); err != nil {
		return err
	}
	if err := m.db.QueryRow(ctx, `SELECT wal_fpi::float8 FROM pg_stat_wal`).Scan(&r.images); err != nil {
		return fmt.Errorf("database: %w", err)
	}
	return nil
}

// settle is how long backends get to report what they counted.
const settle = 1300 * time.Millisecond

func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// again is how long an order that was refused waits before it is sent again; so many times at most.
const (
	again      = 10 * time.Millisecond
	againTimes = 3000
)

// plan is one phase of load.
type plan struct {
	series series
	n      int
	rate   float64 // orders a second, each due at its time; 0: as fast as they are answered
	slots  int     // sagas under way at a time, of a closed loop with a tail; 0: no bound but that of requests
	once   bool    // an order that is refused is not sent again
}

// passage is what became of the orders of a phase, by their numbers; a zero time is what did not happen.
type passage struct {
	from, to string // the ids of its orders are from the one and below the other
	began    time.Time
	took     time.Duration // of sending
	due      []time.Time
	sent     []time.Time // when a connection was free
	answered []time.Time
	status   []int16 // of the last answer; 0: it failed on the way
	hinted   []bool  // a refusal that said when to come again
	decided  []time.Time
	ended    []time.Time
	last     time.Time // the last commit
	unsent   int64
	retried  int64
	refusal  string // what one of them said
}

func newPassage(n int) *passage {
	times := func() []time.Time { return make([]time.Time, n) }
	return &passage{due: times(), sent: times(), answered: times(), status: make([]int16, n), hinted: make([]bool, n), decided: times(), ended: times()}
}

// accepted counts the orders that were.
func (ps *passage) accepted() (n int) {
	for _, s := range ps.status {
		if s == http.StatusAccepted {
			n++
		}
	}
	return n
}

// failed counts the orders that were sent and not answered: they may have been taken in.
func (ps *passage) failed() (n int) {
	for i, s := range ps.status {
		if s == 0 && !ps.due[i].IsZero() {
			n++
		}
	}
	return n
}

// phase runs a plan until the last of its sagas has ended, and measures it.
func (m *meter) phase(ctx context.Context, pl plan) (*Phase, *passage, error) {
	if pl.n < 1 {
		return nil, nil, errors.New("a phase has one order at least")
	}
	if err := pause(ctx, settle); err != nil {
		return nil, nil, err
	}
	bodies, heads := m.requests(&pl)
	before, err := m.read(ctx)
	if err != nil {
		return nil, nil, err
	}
	ps, err := m.drive(ctx, &pl, bodies, heads)
	if err != nil {
		return nil, nil, err
	}
	p, err := m.account(ctx, ps, &before)
	return p, ps, err
}

// requests makes what is sent before the clock starts: the generator shares the machine with what is measured.
func (m *meter) requests(pl *plan) (bodies, heads [][]byte) {
	bodies, heads = make([][]byte, pl.n), make([][]byte, pl.n)
	for i := range pl.n {
		o := m.load.order(pl.series, i)
		bodies[i], heads[i] = m.side.body(&o), m.side.head(o.ID)
	}
	return bodies, heads
}

// drive sends the orders of a plan. An error says that some order was not accepted that should have been.
func (m *meter) drive(ctx context.Context, pl *plan, bodies, heads [][]byte) (*passage, error) {
	ps := newPassage(pl.n)
	to, err := newSpread(m.sys.urls)
	if err != nil {
		return nil, err
	}
	defer to.close()
	first := pl.series.id(0)
	inBody, inHead := bytes.Index(bodies[0], []byte(first)), bytes.Index(heads[0], []byte(first))
	ps.from, ps.to = first, pl.series.id(pl.n)
	var retried atomic.Int64
	var failed atomic.Pointer[error]
	var refusal atomic.Pointer[string]
	load := bench.NewLoad(to.first(), func(ctx context.Context, k *bench.Conn, i int, at time.Time) bench.Fate {
		ps.due[i], ps.sent[i] = at, time.Now()
		if pl.series.timed {
			stamp(bodies[i][inBody:], ps.sent[i])
			stamp(heads[i][inHead:], ps.sent[i])
		}
		a, err := m.post(ctx, to.of(k), &bench.Request{Method: http.MethodPost, Path: m.side.path, Head: heads[i], Body: bodies[i]}, pl.once, &retried)
		ps.answered[i] = time.Now()
		ps.status[i], ps.hinted[i] = int16(a.Status), a.RetryAfter > 0 //nolint:gosec // three digits
		switch {
		case err == nil && a.Status == http.StatusAccepted:
			if pl.slots > 0 {
				return bench.UnderWay
			}
			return bench.Over
		case err == nil && pl.once && refused(a.Status):
			if refusal.Load() == nil {
				text := fmt.Sprintf("%d %.300s", a.Status, a.Body)
				refusal.Store(&text)
			}
			return bench.Refused
		case err == nil:
			err = fmt.Errorf("status %d: %.300s", a.Status, a.Body)
		case pl.once && ctx.Err() == nil: // an overload may break connections: that is counted
			ps.status[i] = 0
			return bench.Refused
		}
		failed.CompareAndSwap(nil, &err)
		return bench.Refused
	})
	if pl.slots > 0 {
		m.tail.follow(pl.series.number, pl.n, false, func(int, *kgo.Record) { load.Ended() })
		defer m.tail.unfollow()
	}
	ps.began = time.Now()
	_, ps.unsent, ps.took = load.Run(ctx, bench.Plan{Rate: pl.rate, Orders: pl.n, Connections: m.connections, Slots: pl.slots})
	if pl.series.timed {
		ps.from, ps.to = firstID(ps.began), firstID(time.Now().Add(time.Millisecond))
	}
	ps.retried = retried.Load()
	if r := refusal.Load(); r != nil {
		ps.refusal = *r
	}
	if f := failed.Load(); f != nil {
		return ps, fmt.Errorf("an order was not accepted: %w\n%s", *f, tailOf(m.sys.log))
	}
	if ctx.Err() != nil {
		return ps, ctx.Err()
	}
	if ps.unsent > 0 && !pl.once {
		return ps, fmt.Errorf("%d orders were not sent: more --connections", ps.unsent)
	}
	return ps, nil
}

func refused(status int) bool {
	return status == http.StatusTooManyRequests || status == http.StatusServiceUnavailable
}

// post sends an order until it is accepted; once: until it is answered.
func (m *meter) post(ctx context.Context, k *bench.Conn, req *bench.Request, once bool, retried *atomic.Int64) (a bench.Answer, err error) {
	for range againTimes {
		if a, err = k.Do(ctx, req); err != nil || once || !refused(a.Status) {
			return a, err
		}
		retried.Add(1)
		if err := pause(ctx, again); err != nil {
			return a, err
		}
	}
	return a, errors.New("refused again and again")
}

// account waits until the sagas of a phase have ended, and reads what they cost and when they did.
func (m *meter) account(ctx context.Context, ps *passage, before *reading) (*Phase, error) {
	if err := m.drained(ctx, ps); err != nil {
		return nil, err
	}
	var after reading
	var err error
	if after.cpu, err = m.cpu(); err != nil {
		return nil, err
	}
	others, lasted := bench.Busy()-before.busy, time.Since(ps.began)
	for name, v := range after.cpu {
		others -= v - before.cpu[name]
	}
	if err := pause(ctx, settle); err != nil {
		return nil, err
	}
	if err := m.readDatabase(ctx, &after); err != nil {
		return nil, err
	}
	if err := m.ends(ctx, ps); err != nil {
		return nil, err
	}
	n := ps.accepted()
	p := &Phase{
		Orders: n, AcceptedPS: float64(n) / ps.took.Seconds(), Retried: ps.retried, RSS: m.sys.memory(),
		CPU: map[string]float64{}, Apart: map[string]float64{}, Others: max(others, 0) / lasted.Seconds(),
	}
	p.cost(n, before, &after)
	p.timing(ps)
	m.placed = append(m.placed, expected(ps))
	return p, nil
}

// expected is what the books must say of a phase: an order that was not accepted must not be there.
func expected(ps *passage) placed {
	want := placed{from: ps.from, to: ps.to, n: len(ps.status)}
	for i, s := range ps.status {
		switch {
		case s != http.StatusAccepted:
		case declinedNumber(i):
			want.rejected++
		default:
			want.confirmed++
		}
	}
	return want
}

func (p *Phase) cost(n int, before, after *reading) {
	for name, v := range after.cpu {
		per := (v - before.cpu[name]) / float64(n) * 1000
		if name == "generator" || name == "gateway" {
			p.Apart[name] = per
			continue
		}
		p.CPU[name] = per
		p.Total += per
	}
	of := func(a, b float64) float64 { return (a - b) / float64(n) }
	p.WALBytes, p.WALRecords, p.WALImages = of(after.db.WALBytes, before.db.WALBytes), of(after.db.WALRecords, before.db.WALRecords), of(after.images, before.images)
	p.Flushes, p.Commits = of(after.db.Flushes, before.db.Flushes), of(after.db.Commits, before.db.Commits)
}

// timing fills in rates and latencies of the orders that were accepted.
func (p *Phase) timing(ps *passage) {
	confirmed, accept := []float64{}, []float64{}
	for i, s := range ps.status {
		if s != http.StatusAccepted {
			continue
		}
		confirmed = append(confirmed, ms(ps.decided[i].Sub(ps.due[i])))
		accept = append(accept, ms(ps.answered[i].Sub(ps.due[i])))
	}
	slices.Sort(confirmed)
	slices.Sort(accept)
	p.SagasPS = float64(len(confirmed)) / ps.last.Sub(ps.began).Seconds()
	p.P50, p.P99, p.P999 = quantile(confirmed, 0.5), quantile(confirmed, 0.99), quantile(confirmed, 0.999)
	p.AcceptP50, p.AcceptP99 = quantile(accept, 0.5), quantile(accept, 0.99)
}

func ms(d time.Duration) float64 { return d.Seconds() * 1e3 }

// drainEvery is how often the database is asked whether all have ended.
const drainEvery = 400 * time.Millisecond

func (m *meter) drained(ctx context.Context, ps *passage) error {
	limit, n, unknown := time.Now().Add(m.limit), ps.accepted(), ps.failed()
	for {
		var open, there int
		if err := m.db.QueryRow(ctx, m.side.open, ps.from, ps.to).Scan(&open); err != nil {
			return fmt.Errorf("database: %w", err)
		}
		if open == 0 {
			if err := m.db.QueryRow(ctx, `SELECT count(*) FROM orders WHERE id >= $1 AND id < $2`, ps.from, ps.to).Scan(&there); err != nil {
				return fmt.Errorf("database: %w", err)
			}
			if there < n || there > n+unknown {
				return fmt.Errorf("%d orders are in the database, and %d were accepted", there, n)
			}
			return nil
		}
		if time.Now().After(limit) {
			return fmt.Errorf("%d of %d sagas have not ended within %s\n%s", open, n, m.limit, tailOf(m.sys.log))
		}
		if err := pause(ctx, drainEvery); err != nil {
			return err
		}
	}
}

// ends reads when each order was decided and when its saga ended: the commits of the rows that say so.
func (m *meter) ends(ctx context.Context, ps *passage) error {
	ps.last = ps.began
	each := func(q string, into []time.Time) error {
		rows, err := m.db.Query(ctx, q, ps.from, ps.to)
		if err != nil {
			return fmt.Errorf("database: %w", err)
		}
		var id [16]byte
		var at time.Time
		_, err = pgx.ForEachRow(rows, []any{&id, &at}, func() error {
			i := numberOf(id)
			into[i] = at
			if ps.status[i] == 0 { // it was taken in, though the answer was lost
				ps.status[i] = http.StatusAccepted
			}
			if at.After(ps.last) {
				ps.last = at
			}
			return nil
		})
		if err != nil {
			return fmt.Errorf("database: %w", err)
		}
		return nil
	}
	if err := each(m.side.orders, ps.decided); err != nil {
		return err
	}
	if m.side.sagas == "" {
		copy(ps.ended, ps.decided)
		return nil
	}
	return each(m.side.sagas, ps.ended)
}

// books compares what became of the orders of all phases with what should have.
func (m *meter) books(ctx context.Context) (wrong []string, err error) {
	var want, got placed
	for _, p := range m.placed {
		var c, r int
		if err := m.db.QueryRow(ctx, m.side.books, p.from, p.to).Scan(&c, &r); err != nil {
			return nil, fmt.Errorf("database: %w", err)
		}
		got.confirmed, got.rejected = got.confirmed+c, got.rejected+r
		want.confirmed, want.rejected = want.confirmed+p.confirmed, want.rejected+p.rejected
	}
	to, err := bench.NewEndpoint(m.env.gateway, 5*time.Second)
	if err != nil {
		return nil, err
	}
	k := bench.NewConn(to)
	defer k.Close()
	a, err := k.Do(ctx, &bench.Request{Method: http.MethodGet, Path: "/counts"})
	if err != nil {
		return nil, fmt.Errorf("gateway: %w", err)
	}
	var g stubCounts
	if err := json.Unmarshal(a.Body, &g); err != nil {
		return nil, fmt.Errorf("gateway: %w", err)
	}
	for _, x := range []struct {
		what      string
		got, want int
	}{{"confirmed", got.confirmed, want.confirmed}, {"rejected", got.rejected, want.rejected}, {"captured", g.Captured, want.confirmed}, {"charged twice", g.Twice, 0}} {
		if x.got != x.want {
			wrong = append(wrong, fmt.Sprintf("%s: %d, not %d", x.what, x.got, x.want))
		}
	}
	return wrong, nil
}

// spread gives each connection of a Load one of several addresses, in turn: a Load knows but one. Safe for concurrent use.
type spread struct {
	to []*bench.Endpoint

	mu    sync.Mutex
	conns map[*bench.Conn]*bench.Conn
}

// requestTimeout bounds one request.
const requestTimeout = time.Minute

func newSpread(urls []string) (*spread, error) {
	s := &spread{conns: map[*bench.Conn]*bench.Conn{}}
	for _, u := range urls {
		e, err := bench.NewEndpoint(u, requestTimeout)
		if err != nil {
			return nil, err
		}
		s.to = append(s.to, e)
	}
	return s, nil
}

func (s *spread) first() *bench.Endpoint { return s.to[0] }

// of is the connection that is used instead of one to the first address.
func (s *spread) of(k *bench.Conn) *bench.Conn {
	if len(s.to) == 1 {
		return k
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	c := s.conns[k]
	if c == nil {
		c = bench.NewConn(s.to[len(s.conns)%len(s.to)])
		s.conns[k] = c
	}
	return c
}

func (s *spread) close() {
	for _, c := range s.conns {
		c.Close()
	}
}

func quantile(sorted []float64, q float64) float64 {
	if len(sorted) == 0 {
		return 0
	}
	return sorted[min(len(sorted)-1, int(q*float64(len(sorted))))]
}
