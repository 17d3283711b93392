package main

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"time"
)

// The experiments of which each case is a setting: partitions, batches, processes, the load.

func partitionsExperiment() *experiment {
	return &experiment{
		name: "partitions", asks: "what do 1, 4, 16 and 64 partitions a topic cost and give?", takes: "about 15 min",
		cases: func(*scaleOptions) (out []*scaleCase) {
			for _, n := range []int{16, 1, 4, 64} {
				c := &scaleCase{name: strconv.Itoa(n), partitions: n, load: standard, measure: saturateAndRate}
				if n != 16 {
					c.base = "16"
				}
				out = append(out, c)
			}
			return out
		},
	}
}

func hotExperiment() *experiment {
	return &experiment{
		name: "hot", asks: "what does it cost if half of all orders want one product?", takes: "about 8 min",
		cases: func(*scaleOptions) []*scaleCase {
			return []*scaleCase{
				{name: "uniform", load: standard, measure: saturateAndRate},
				{name: "hot", base: "uniform", load: workload{products: skus, hot: true}, measure: saturateAndRate},
			}
		},
	}
}

func batchExperiment() *experiment {
	return &experiment{
		name: "batch", asks: "what do the largest batches of consumers and of the intake give?", takes: "about 25 min",
		defaults: func(o *scaleOptions) { o.rate = 0 },
		cases: func(*scaleOptions) []*scaleCase {
			const base = "default"
			out := []*scaleCase{{name: base, load: standard, measure: saturateAndRate}}
			for _, n := range []int{1, 20, 100, 500, 2000} {
				out = append(out, &scaleCase{
					name: fmt.Sprintf("c%d", n), base: base, load: standard, part: fewer(n), measure: saturateAndRate, env: []string{fmt.Sprintf("ORDERSAGA_CONSUMERS__MAX_BATCH=%d", n)},
				})
			}
			for _, n := range []int{1, 16, 1000} {
				out = append(out, &scaleCase{
					name: fmt.Sprintf("i%d", n), base: base, load: standard, part: fewer(n), measure: saturateAndRate, env: []string{fmt.Sprintf("ORDERSAGA_INTAKE__MAX_BATCH=%d", n)},
				})
			}
			return out
		},
	}
}

// fewer says that a case of batches of one record is measured with a fifth of the orders: its throughput tells as much.
func fewer(n int) int {
	if n > 1 {
		return 1
	}
	return 5
}

func processesExperiment() *experiment {
	const base = "one"
	return &experiment{
		name: "processes", asks: "what do two processes cost, and roles that are apart?", takes: "about 11 min",
		defaults: func(o *scaleOptions) { o.rate = 100 },
		cases: func(*scaleOptions) []*scaleCase {
			return []*scaleCase{
				{name: base, load: standard, measure: processesMeasure},
				{name: "two", base: base, load: standard, measure: processesMeasure, procs: []spec{{}, {}}},
				{name: "apart", base: base, load: standard, measure: processesMeasure, procs: []spec{
					{roles: "http"}, {roles: "relay,coordinator"}, {roles: "order-commands,stock,payment,compensation"},
				}},
			}
		},
	}
}

// processesMeasure measures a saturated phase and one of a fixed rate, and of that the relay: from an order's commit to when its first event was handed
// to the broker's client, to the millisecond. In other processes rows are found by polling.
func processesMeasure(ctx context.Context, t *trial) error {
	o := t.x.o
	if err := t.warmUp(ctx); err != nil {
		return err
	}
	p, _, err := t.phase(ctx, plan{n: t.orders()})
	if err != nil {
		return fmt.Errorf("saturation: %w", err)
	}
	t.out.throughput(p)
	if o.rate == 0 {
		return nil
	}
	p, _, err = t.phase(ctx, plan{n: int(o.rate * o.length.Seconds()), rate: o.rate})
	if err != nil {
		return fmt.Errorf("%.0f/s: %w", o.rate, err)
	}
	of := fmt.Sprintf("%.0f/s: ", o.rate)
	t.out.latency(of, p)
	relay, err := t.relayLatency(ctx)
	if err != nil {
		return err
	}
	t.out.add(of+"commit to producer p50, ms", 1, quantile(relay, 0.5))
	t.out.add(of+"commit to producer p99, ms", 1, quantile(relay, 0.99))
	return nil
}

// relayLatency is how long after the commit of each order of the latest phase its first event was produced, in milliseconds, sorted.
func (t *trial) relayLatency(ctx context.Context) ([]float64, error) {
	pl := t.placed[len(t.placed)-1]
	produced, err := producedAt(ctx, t.env.s.brokers, t.eventsTopic(), t.x.series, pl.n)
	if err != nil {
		return nil, err
	}
	rows, err := t.db.Query(ctx, `SELECT id, pg_xact_commit_timestamp(xmin) FROM orders WHERE id >= $1 AND id < $2`, pl.from, pl.to)
	if err != nil {
		return nil, fmt.Errorf("database: %w", err)
	}
	defer rows.Close()
	var out []float64
	for rows.Next() {
		var id [16]byte
		var at time.Time
		if err := rows.Scan(&id, &at); err != nil {
			return nil, fmt.Errorf("database: %w", err)
		}
		out = append(out, ms(produced[numberOf(id)].Sub(at)))
	}
	slices.Sort(out)
	return out, rows.Err()
}
