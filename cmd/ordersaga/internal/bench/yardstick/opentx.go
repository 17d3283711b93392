package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
)

func openTxExperiment() *experiment {
	return &experiment{
		name: "opentx", asks: "what does a transaction cost that is open elsewhere for as long as an hour's orders take?", takes: "about 55 min",
		defaults: func(o *scaleOptions) {
			// 720,000 sagas are an hour at 200/s. An hour's clock is scaled too: three quarters of them pass their forward deadline meanwhile.
			o.statements, o.orders, o.rounds, o.rate, o.products, o.forward = true, 720_000, 2, 0, 100_000, 75*time.Second
		},
		small: func(o *scaleOptions) { o.orders, o.products, o.forward = 6_000, 5_000, 5*time.Second },
		cases: openTxCases,
	}
}

func openTxCases(o *scaleOptions) (out []*scaleCase) {
	env := []string{
		"ORDERSAGA_SAGA__FORWARD_DEADLINE=" + o.forward.String(),
		// With that many products every order would ask the catalogue again.
		"ORDERSAGA_INTAKE__CATALOGUE_SIZE=1000000", "ORDERSAGA_INTAKE__CATALOGUE_TTL=1h",
	}
	const fewer = 4
	for _, x := range []struct {
		suffix string
		load   workload
		part   int
	}{
		{"", workload{products: o.products}, 1}, // no row is changed often
		{"-1000", standard, fewer},              // each product's row is changed by some hundreds of sagas
		{"-hot", workload{products: skus, hot: true}, fewer},
	} {
		free := "free" + x.suffix
		out = append(out,
			&scaleCase{name: free, load: x.load, part: x.part, env: env, measure: openTxMeasure(false)},
			&scaleCase{name: "held" + x.suffix, base: free, load: x.load, part: x.part, env: env, measure: openTxMeasure(true)})
	}
	return out
}

// hold opens a transaction that has an id and a snapshot, and keeps both until release is called.
func hold(ctx context.Context, url string) (release func() error, err error) {
	conn, err := pgx.Connect(ctx, url)
	if err != nil {
		return nil, fmt.Errorf("open transaction: %w", err)
	}
	for _, q := range []string{"BEGIN ISOLATION LEVEL REPEATABLE READ", "SELECT pg_current_xact_id()", "SELECT count(*) FROM products"} {
		if _, err := conn.Exec(ctx, q); err != nil {
			return nil, errors.Join(fmt.Errorf("open transaction: %w", err), conn.Close(ctx))
		}
	}
	return func() error {
		_, err := conn.Exec(ctx, "ROLLBACK")
		return errors.Join(err, conn.Close(context.WithoutCancel(ctx)))
	}, nil
}

func openTxMeasure(held bool) func(context.Context, *trial) error {
	return func(ctx context.Context, t *trial) (err error) {
		if err := preload(ctx, t.env.database); err != nil {
			return err
		}
		if err := t.warmUp(ctx); err != nil {
			return err
		}
		st, err := newStatements(ctx, t.env.database)
		if err != nil {
			return err
		}
		defer st.close(ctx)
		release := func() error { return nil }
		if held {
			if release, err = hold(ctx, t.env.database); err != nil {
				return err
			}
		}
		if err := t.underWatch(ctx, st); err != nil {
			return errors.Join(err, release())
		}
		if err := release(); err != nil {
			return fmt.Errorf("open transaction: it did not last: %w", err)
		}
		if t.x.o.orders == 0 {
			return nil
		}
		const after = 6
		p, ps, err := t.phase(ctx, plan{n: max(t.orders()/after, 1), slots: t.x.o.slots})
		if err != nil {
			return fmt.Errorf("afterwards: %w", err)
		}
		t.out.add("afterwards: ended sagas/s", 0, steadyRate(sortedTimes(ps.ended, ps.isAccepted)))
		t.out.add("afterwards: CPU-s per 1,000 sagas", 3, p.Total)
		return nil
	}
}

// underWatch runs the phases during which the transaction is open.
func (t *trial) underWatch(ctx context.Context, st *statements) error {
	o := t.x.o
	var all []Sample
	if o.orders > 0 {
		watch := t.watch(ctx, st.sample)
		p, ps, err := t.phase(ctx, plan{n: t.orders(), slots: o.slots})
		all = watch.stop()
		if err != nil {
			return fmt.Errorf("saturation: %w", err)
		}
		ended := sortedTimes(ps.ended, ps.isAccepted)
		reckon(all, ps)
		t.out.add("ended sagas/s, between the first and the last tenth", 0, steadyRate(ended))
		rates := sliceRates(ended, slicesShown)
		if len(rates) > 0 {
			t.out.add("… in the last slice", 0, rates[len(rates)-1])
		}
		t.out.series("ended/s", rates)
		t.out.cost("", p)
		t.out.add("confirmed p50, ms", 1, p.P50)
		t.out.add("confirmed p99, ms", 1, p.P99)
	}
	if o.rate > 0 {
		watch := t.watch(ctx, st.sample)
		p, ps, err := t.phase(ctx, plan{n: int(o.rate * o.length.Seconds()), rate: o.rate})
		samples := watch.stop()
		if err != nil {
			return fmt.Errorf("%.0f/s: %w", o.rate, err)
		}
		reckon(samples, ps)
		of := fmt.Sprintf("%.0f/s: ", o.rate)
		t.out.latency(of, p)
		for _, name := range []string{"service", "postgres"} {
			var vs []float64
			for i := range samples {
				vs = append(vs, samples[i].CPU[name])
			}
			t.out.series(of+"cores of "+name, thin(vs))
		}
		all = append(all, samples...)
	}
	t.out.Samples = all
	t.out.memory(all)
	return st.conclude(t.out)
}

// statements follows what Postgres' statements cost over time. One goroutine at a time.
type statements struct {
	conn  *pgx.Conn
	texts map[int64]string
	seen  []map[int64]cost // a sample each
}

type cost struct {
	calls int64
	ms    float64
}

func newStatements(ctx context.Context, url string) (*statements, error) {
	conn, err := pgx.Connect(ctx, url)
	if err != nil {
		return nil, fmt.Errorf("statements: %w", err)
	}
	return &statements{conn: conn, texts: map[int64]string{}}, nil
}

func (s *statements) close(ctx context.Context) { _ = s.conn.Close(context.WithoutCancel(ctx)) } // nothing is lost

// sample takes the statements' counts, and answers what to keep with the sample.
func (s *statements) sample(ctx context.Context) map[string]float64 {
	out := map[string]float64{}
	var dead, live int64
	if err := s.conn.QueryRow(ctx, "SELECT n_dead_tup, n_live_tup FROM pg_stat_user_tables WHERE relname = 'stock'").Scan(&dead, &live); err == nil {
		out["stock_dead_rows"] = float64(dead)
	}
	now, err := s.costs(ctx)
	if err != nil {
		return out // a sample that is missing is no error of the run
	}
	if n := len(s.seen); n > 0 {
		if id, ok := s.lockStock(); ok {
			out["lock_stock_ms"] = now[id].since(s.seen[n-1][id])
		}
	}
	s.seen = append(s.seen, now)
	return out
}

// since is the mean time of the calls since an earlier count, in milliseconds.
func (c cost) since(o cost) float64 {
	if c.calls <= o.calls {
		return 0
	}
	return (c.ms - o.ms) / float64(c.calls-o.calls)
}

func (s *statements) costs(ctx context.Context) (map[int64]cost, error) {
	rows, err := s.conn.Query(ctx, `SELECT queryid, min(regexp_replace(query, '\s+', ' ', 'g')), sum(calls)::bigint, sum(total_exec_time)::float8
FROM pg_stat_statements WHERE dbid = (SELECT oid FROM pg_database WHERE datname = current_database()) AND queryid IS NOT NULL GROUP BY 1`)
	if err != nil {
		return nil, fmt.Errorf("statements: %w", err)
	}
	out := map[int64]cost{}
	var id int64
	var text string
	var c cost
	_, err = pgx.ForEachRow(rows, []any{&id, &text, &c.calls, &c.ms}, func() error {
		out[id] = c
		s.texts[id] = text
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("statements: %w", err)
	}
	return out, nil
}

// lockStock finds the statement that locks products' rows.
func (s *statements) lockStock() (int64, bool) {
	for id, text := range s.texts {
		if strings.Contains(text, "FROM stock WHERE") && strings.Contains(text, "FOR NO KEY UPDATE") {
			return id, true
		}
	}
	return 0, false
}

// grown is a statement whose calls took longer in the last third of the samples than in the first.
type grown struct {
	text        string
	first, last float64 // ms a call
	more        float64 // ms of all calls in the last third, beyond what they would have taken as in the first
}

// growths lists them, the dearest first.
func growths(seen []map[int64]cost, texts map[int64]string) (out []grown) {
	n := len(seen)
	const thirds = 3
	if n <= thirds {
		return nil
	}
	a, b := n/thirds, n-n/thirds-1
	for id, end := range seen[n-1] {
		first, last := seen[a][id].since(seen[0][id]), end.since(seen[b][id])
		if first == 0 || last <= first {
			continue
		}
		out = append(out, grown{texts[id], first, last, (last - first) * float64(end.calls-seen[b][id].calls)})
	}
	slices.SortFunc(out, func(x, y grown) int {
		switch {
		case x.more > y.more:
			return -1
		case x.more < y.more:
			return 1
		}
		return strings.Compare(x.text, y.text)
	})
	return out
}

// grownShown is how many of them are told.
const grownShown = 6

// conclude adds what the hot rows' statement did, and which statements took longer and longer.
func (s *statements) conclude(o *Outcome) error {
	var dead, lock []float64
	for i := range o.Samples {
		m := o.Samples[i].More
		dead = append(dead, m["stock_dead_rows"])
		if v := m["lock_stock_ms"]; v > 0 {
			lock = append(lock, v)
		}
	}
	if len(lock) == 0 {
		return errors.New("statements: the one that locks products was not found: has it changed?")
	}
	o.add("lock of products, ms a call", 3, mean(lock))
	o.tell("… last third over middle third", 2, growth(lock))
	o.tell("dead rows of stock, at most", 0, quantile(sorted(dead), 1))
	o.series("lock of products, ms a call", thin(lock))
	o.series("dead rows of stock", thin(dead))
	const share = 0.001 // of a second a second
	for i, g := range growths(s.seen, s.texts) {
		third := float64(len(s.seen)) / 3 * sampleEvery.Seconds() * 1e3 // ms
		if i == grownShown || g.more < share*third {
			break
		}
		o.note("%.1f %% of a core more in the last third than in the first: %.3f, then %.3f ms a call: %.140s", g.more/third*100, g.first, g.last, g.text)
	}
	return nil
}
