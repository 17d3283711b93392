package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"

	"ordersaga/cmd/ordersaga/internal/bench"
)

// sizes are numbers of orders, as flag values such as 10k,1M.
type sizes []int

func (s *sizes) String() string {
	out := make([]string, len(*s))
	for i, n := range *s {
		out[i] = sizeName(n)
	}
	return strings.Join(out, ",")
}

// Set implements flag.Value.
func (s *sizes) Set(text string) error {
	*s = nil
	for part := range strings.SplitSeq(text, ",") {
		n, err := parseSize(part)
		if err != nil {
			return err
		}
		*s = append(*s, n)
	}
	return nil
}

func parseSize(text string) (int, error) {
	digits, times := strings.TrimRight(text, "kM"), 1
	switch text[len(digits):] {
	case "":
	case "k":
		times = 1_000
	case "M":
		times = 1_000_000
	default:
		digits = ""
	}
	n, err := strconv.Atoi(digits)
	if err != nil || n < 1 {
		return 0, fmt.Errorf("a size is a number such as 10k or 1M, not %q", text)
	}
	return n * times, nil
}

func sizeName(n int) string {
	switch {
	case n%1_000_000 == 0:
		return strconv.Itoa(n/1_000_000) + "M"
	case n%1_000 == 0:
		return strconv.Itoa(n/1_000) + "k"
	}
	return strconv.Itoa(n)
}

// kept is a database that holds orders before a trial begins. A small one is made anew for each, so that it stays small; a large one is
// kept from trial to trial, whose orders are few beside its own.
type kept struct {
	want   int
	name   string // of the large one; empty: not there yet
	url    string
	orders int
	size   int64     // bytes of what the orders left
	until  time.Time // when the last of them came in
	began  time.Time // and the first
}

// keptAbove is how many orders make a database a large one.
const keptAbove = 100_000

// open answers the URL of the database for a trial, and what is to be dropped after it.
func (k *kept) open(ctx context.Context, x *scaling, name string) (url, drop string, err error) {
	if k.want > keptAbove {
		return k.url, "", x.srv.execute(ctx, "CHECKPOINT") // so that each trial writes the same page images
	}
	url, err = k.make(ctx, x, name+"_db")
	return url, name + "_db", err
}

// make makes a database, lets the build at hand place and end some orders in it, and copies those.
func (k *kept) make(ctx context.Context, x *scaling, name string) (url string, err error) {
	if url, err = x.srv.database(ctx, name); err != nil {
		return "", err
	}
	if err := k.template(ctx, x, name, url); err != nil {
		return "", fmt.Errorf("fill: %w", err)
	}
	conn, err := pgx.Connect(ctx, url)
	if err != nil {
		return "", fmt.Errorf("fill: %w", err)
	}
	defer conn.Close(context.WithoutCancel(ctx)) //nolint:errcheck // nothing is lost
	k.until = time.Now().Add(-time.Minute).Truncate(time.Millisecond)
	f := &filler{conn: conn, rate: x.o.pastRate, until: k.until, limit: int64(x.o.diskGB * 1e9), say: sayFill(sizeName(k.want))}
	k.orders, k.size, err = f.fill(ctx, k.want)
	k.began = k.until.Add(-time.Duration(float64(k.want) / x.o.pastRate * float64(time.Second)))
	return url, err
}

// template runs the orders that are copied.
func (k *kept) template(ctx context.Context, x *scaling, name, url string) (err error) {
	t := &trial{x: x, c: &scaleCase{name: "template", load: standard}, out: &Outcome{Case: "template"}}
	stop, err := t.start(ctx, name+"_template", url)
	if err != nil {
		return err
	}
	defer func() {
		stop()
		err = errors.Join(err, x.srv.forget(context.WithoutCancel(ctx), ""))
	}()
	if _, _, err := t.phase(ctx, plan{n: templates}); err != nil {
		return err
	}
	wrong, err := t.books(ctx)
	if err == nil && len(wrong) > 0 {
		err = fmt.Errorf("the books of the orders to copy are wrong: %s", strings.Join(wrong, "; "))
	}
	return err
}

func rowsExperiment() *experiment {
	return &experiment{
		name: "rows", asks: "does any step grow with the orders in the database?", takes: "about 35 min, of which 20 fill the databases",
		defaults: func(o *scaleOptions) {
			o.sizes, o.diskGB, o.pastRate = sizes{10_000, 1_000_000, 10_000_000}, 30, 200
		},
		small: func(o *scaleOptions) { o.sizes = sizes{2_000, 20_000, 150_000} },
		cases: func(o *scaleOptions) (out []*scaleCase) {
			for i, n := range o.sizes {
				c := &scaleCase{name: sizeName(n), load: standard, database: &kept{want: n}, measure: rowsMeasure}
				if i > 0 {
					c.base = sizeName(o.sizes[0])
				}
				out = append(out, c)
			}
			return out
		},
		fill: func(ctx context.Context, x *scaling) (err error) {
			for _, c := range x.cases {
				k := c.database
				if k.want <= keptAbove {
					continue
				}
				k.name = "kept_" + strings.ToLower(sizeName(k.want))
				if k.url, err = k.make(ctx, x, k.name); err != nil {
					return err
				}
			}
			return nil
		},
	}
}

func rowsMeasure(ctx context.Context, t *trial) error {
	k := t.c.database
	if err := saturateAndRate(ctx, t); err != nil {
		return err
	}
	t.out.tell("orders beforehand", 0, float64(k.orders))
	t.out.tell("their rows and indexes, GB", 2, float64(k.size)/1e9)
	return t.reads(ctx)
}

// readCalls is how often each read is asked.
const readCalls = 200

// reads measures what people ask for, one call at a time, of orders from the whole of the past.
func (t *trial) reads(ctx context.Context) error {
	type known struct{ id, customer string }
	var some []known
	k := t.c.database
	r := rand.New(rand.NewPCG(1, uint64(k.want))) //nolint:gosec // a load, not a secret
	for range readCalls {
		at := k.began.Add(time.Duration(r.Float64() * float64(k.orders) / t.x.o.pastRate * float64(time.Second)))
		var o known
		err := t.db.QueryRow(ctx, `SELECT id::text, customer_id FROM orders WHERE created_at <= $1 ORDER BY created_at DESC LIMIT 1`, at).Scan(&o.id, &o.customer)
		if errors.Is(err, pgx.ErrNoRows) {
			continue // before the first
		}
		if err != nil {
			return fmt.Errorf("database: %w", err)
		}
		some = append(some, o)
	}
	if len(some) == 0 {
		return errors.New("reads: no orders to ask for")
	}
	to, err := bench.NewEndpoint(t.sys.urls[0], requestTimeout)
	if err != nil {
		return err
	}
	conn := bench.NewConn(to)
	defer conn.Close()
	for _, q := range []struct {
		name string
		path func(o known) string
	}{
		{"order", func(o known) string { return "/v1/orders/" + o.id }},
		{"timeline", func(o known) string { return "/v1/orders/" + o.id + "/timeline" }},
		{"list of a customer", func(o known) string { return "/v1/orders?customer_id=" + o.customer }},
		{"list confirmed", func(known) string { return "/v1/orders?status=confirmed" }},
		{"list rejected", func(known) string { return "/v1/orders?status=rejected" }},
		{"list pending", func(known) string { return "/v1/orders?status=pending" }},
		{"list rejected of a customer", func(o known) string { return "/v1/orders?status=rejected&customer_id=" + o.customer }},
	} {
		var took []float64
		for i := range readCalls {
			began := time.Now()
			a, err := conn.Do(ctx, &bench.Request{Method: http.MethodGet, Path: q.path(some[i%len(some)])})
			took = append(took, ms(time.Since(began)))
			if err == nil && a.Status != http.StatusOK {
				err = fmt.Errorf("status %d: %.300s", a.Status, a.Body)
			}
			if err != nil {
				return fmt.Errorf("read %s: %w", q.name, err)
			}
		}
		slices.Sort(took)
		t.out.add("read "+q.name+" p50, ms", 2, quantile(took, 0.5))
		t.out.add("read "+q.name+" p99, ms", 2, quantile(took, 0.99))
	}
	return nil
}
