package main

import (
	"encoding/binary"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"
	"github.com/twmb/franz-go/pkg/kgo"

	"ordersaga/cmd/ordersaga/internal/bench"
	"ordersaga/events"
)

// The orders are those of the yardsticks' own driver for ever: a comparison with a run of another day rests on it.
func TestOrdersAreTheYardsticks(t *testing.T) {
	for _, x := range []struct {
		series      series
		i           int
		plain, ours string
	}{
		{series{seed: 1, number: 1}, 0, `{"id":"00000001-0000-4000-8000-000000000000","customer":80996,"items":[{"sku":997,"qty":2,"price":9457}],"total":18914}`,
			`{"order_id":"00000001-0000-4000-8000-000000000000","customer_id":"customer-80996","currency":"EUR","payment_method":"pm_card_visa","items":[{"sku":"bench-00996","quantity":2}]}`},
		{series{seed: 2, number: 2}, 49, `{"id":"00000002-0000-4000-8000-000000000031","customer":3122,"items":[{"sku":123,"qty":3,"price":3942}],"total":11826}`,
			`{"order_id":"00000002-0000-4000-8000-000000000031","customer_id":"customer-3122","currency":"EUR","payment_method":"pm_card_chargeDeclined","items":[{"sku":"bench-00122","quantity":3}]}`},
		{series{seed: 3, number: 0x19a0}, 123456, `{"id":"000019a0-0000-4000-8000-00000001e240","customer":3364,"items":[{"sku":147,"qty":3,"price":6229},{"sku":365,"qty":1,"price":7027},{"sku":705,"qty":2,"price":4580}],"total":34874}`,
			`{"order_id":"000019a0-0000-4000-8000-00000001e240","customer_id":"customer-3364","currency":"EUR","payment_method":"pm_card_visa","items":[{"sku":"bench-00146","quantity":3},{"sku":"bench-00364","quantity":1},{"sku":"bench-00704","quantity":2}]}`},
	} {
		o := standard.order(x.series, x.i)
		require.JSONEq(t, x.plain, string(o.plainBody()))
		require.Equal(t, x.ours, string(o.ourBody()))
	}
}

func TestHotOrders(t *testing.T) {
	w := workload{products: skus, hot: true}
	const n = 2000
	hot := 0
	for i := range n {
		o := w.order(series{seed: 4}, i)
		require.NotEmpty(t, o.Items)
		require.LessOrEqual(t, len(o.Items), 3)
		seen := map[int]bool{}
		for k, it := range o.Items {
			require.False(t, seen[it.SKU], "an order has a product once")
			seen[it.SKU] = true
			require.True(t, k == 0 || o.Items[k-1].SKU < it.SKU, "in the order of products")
			if it.SKU == hotSKU {
				hot++
			}
		}
	}
	require.InDelta(t, n/2, hot, 10, "half of all orders, and hardly any by chance")
}

func TestOrderIDs(t *testing.T) {
	s := series{seed: 9, number: 0xabc, timed: true}
	const i = 720_001
	id := []byte(s.id(i))
	at := time.UnixMilli(1_764_025_200_123)
	stamp(id, at)
	u, err := uuid.ParseBytes(id)
	require.NoError(t, err)
	require.Equal(t, uuid.Version(7), u.Version())
	require.Equal(t, uuid.RFC4122, u.Variant())
	require.Equal(t, at.UnixMilli(), int64(binary.BigEndian.Uint64(u[:8])>>16), "its time is in the first 48 bits")
	require.Equal(t, i, numberOf(u))
	number, n, ok := parseOrderID(id)
	require.True(t, ok)
	require.Equal(t, s.number, number)
	require.Equal(t, i, n)
	require.Less(t, firstID(at), string(id))
	require.Less(t, string(id), firstID(at.Add(time.Millisecond)))
	for _, bad := range []string{"", "x", strings.Repeat("z", 36), string(id) + "0"} {
		_, _, ok := parseOrderID([]byte(bad))
		require.False(t, ok, bad)
	}
	plain := series{number: 3}
	require.Less(t, plain.id(15), plain.id(16), "a range of ids is a range of numbers")
}

func TestSizes(t *testing.T) {
	var s sizes
	require.NoError(t, s.Set("10k,1M,2500"))
	require.Equal(t, sizes{10_000, 1_000_000, 2500}, s)
	require.Equal(t, "10k,1M,2500", s.String())
	for _, bad := range []string{"", "k", "-1k", "1G", "1kM", "0", "10k,,1M"} {
		require.ErrorContains(t, s.Set(bad), "such as 10k or 1M", bad)
	}
}

var start0 = time.Unix(1_700_000_000, 0)

// every makes n moments that are d apart.
func every(n int, d time.Duration) []time.Time {
	out := make([]time.Time, n)
	for i := range out {
		out[i] = start0.Add(time.Duration(i) * d)
	}
	return out
}

func TestRates(t *testing.T) {
	even := every(101, 10*time.Millisecond)
	require.InDelta(t, 100, steadyRate(even), 0.1)
	require.InDeltaSlice(t, []float64{100, 100, 100, 100}, sliceRates(even, 4), 0.1)
	require.InDelta(t, 100, rateWithin(even, start0, start0.Add(500*time.Millisecond)), 0.1)
	require.Zero(t, rateWithin(even, start0, start0))
	late := append(every(90, 10*time.Millisecond), start0.Add(time.Minute))
	require.InDelta(t, 100, steadyRate(late), 1, "one straggler is no rate")
	require.Zero(t, steadyRate(nil))
	require.Zero(t, steadyRate(make([]time.Time, 5)), "all at once is no rate")
	require.Nil(t, sliceRates(even[:2], 4), "too few")
	require.Equal(t, []time.Time{even[1], even[2]}, between(even, even[1], even[3]))
	require.Equal(t, []float64{10, 10, 960}, gaps([]time.Time{even[0], even[1], even[2], even[98]}))
}

func TestGrowth(t *testing.T) {
	require.InDelta(t, 1, growth([]float64{90, 100, 100, 100, 100, 100}), 1e-9, "what comes first warms up")
	require.InDelta(t, 2, growth([]float64{1, 1, 1, 1, 2, 2}), 1e-9)
	require.Zero(t, growth([]float64{1, 2}))
	require.Zero(t, growth(make([]float64, 9)))
	require.Nil(t, thin(make([]float64, slicesShown-1)))
	require.Len(t, thin(make([]float64, 10*slicesShown)), slicesShown)
}

func TestReckon(t *testing.T) {
	const n = 4
	ps := newPassage(n)
	for i := range n {
		ps.answered[i], ps.ended[i], ps.status[i] = start0.Add(time.Duration(i)*time.Second), start0.Add(time.Duration(i)*time.Second+1500*time.Millisecond), http.StatusAccepted
	}
	ps.status[3] = http.StatusServiceUnavailable
	at := func(d time.Duration) Sample { return Sample{at: start0.Add(d)} }
	got := []Sample{at(time.Second), at(2 * time.Second), at(10 * time.Second)}
	reckon(got, ps)
	require.Equal(t, []int{2, 2, 0}, []int{got[0].UnderWay, got[1].UnderWay, got[2].UnderWay}, "the refused one never was under way")
	require.Equal(t, []int{0, 1, 2}, []int{got[0].Ended, got[1].Ended, got[2].Ended})
	reckon(nil, ps)
}

func TestExpectedBooks(t *testing.T) {
	const n = 100
	ps := newPassage(n)
	for i := range n {
		ps.status[i] = http.StatusAccepted
	}
	ps.status[0], ps.status[declineEvery-1] = http.StatusTooManyRequests, 0
	ps.from, ps.to = "a", "b"
	want := expected(ps)
	require.Equal(t, placed{from: "a", to: "b", n: n, confirmed: n - 2 - 1, rejected: 1}, want, "one refused, one unknown, one declined")
	require.Equal(t, n-2, ps.accepted())
	require.Zero(t, ps.failed(), "it was never sent")
	ps.due[declineEvery-1] = start0
	require.Equal(t, 1, ps.failed())
}

func TestTail(t *testing.T) {
	record := func(i int, kind events.Name, number int) *kgo.Record {
		return &kgo.Record{
			Key:     []byte(series{number: number, timed: true}.id(i)),
			Headers: []kgo.RecordHeader{{Key: events.HeaderType, Value: []byte("ordersaga.orders.v1." + string(kind))}},
		}
	}
	const number = maxNumber + 7 // it begins again
	var tl tail
	var told []int
	tl.take(record(0, events.TOrderConfirmed, number)) // nobody follows
	tl.follow(number, 3, false, func(i int, _ *kgo.Record) { told = append(told, i) })
	for _, r := range []*kgo.Record{
		record(0, events.TOrderPlaced, number), record(1, events.TOrderConfirmed, number), record(1, events.TOrderConfirmed, number), record(0, events.TOrderRejected, number),
		record(2, events.TOrderConfirmed, number+1), record(9, events.TOrderConfirmed, number), {Key: []byte("no id")},
	} {
		tl.take(r)
	}
	require.Equal(t, []int{1, 0}, told, "each end once, of this phase only")
	told = nil
	tl.follow(number, 3, true, func(i int, _ *kgo.Record) { told = append(told, i) })
	tl.take(record(2, events.TOrderConfirmed, number))
	tl.take(record(2, events.TOrderPlaced, number))
	require.Equal(t, []int{2}, told)
	tl.unfollow()
	tl.take(record(1, events.TOrderPlaced, number))
	require.Len(t, told, 1)
}

func TestSpread(t *testing.T) {
	one, err := newSpread([]string{"http://127.0.0.1:1"})
	require.NoError(t, err)
	k := bench.NewConn(one.first())
	require.Same(t, k, one.of(k), "with one address a connection stays what it is")
	two, err := newSpread([]string{"http://127.0.0.1:1", "http://127.0.0.1:2"})
	require.NoError(t, err)
	defer two.close()
	l := bench.NewConn(two.first())
	a, b := two.of(k), two.of(l)
	require.NotSame(t, a, b, "in turn")
	require.Same(t, a, two.of(k), "and for good")
	_, err = newSpread([]string{"nowhere"})
	require.Error(t, err)
}

func TestSpecHasHTTP(t *testing.T) {
	require.True(t, (&spec{}).http())
	require.True(t, (&spec{roles: "relay,http"}).http())
	require.False(t, (&spec{roles: "relay,coordinator"}).http())
}

func TestScaleTable(t *testing.T) {
	run := func(name, base string, round int, rate, rss float64) Outcome {
		o := Outcome{Case: name, Base: base, Round: round}
		o.add("ended/s", 0, rate)
		o.tell("RSS", 1, rss)
		o.series("slices", []float64{rate, 0.5})
		return o
	}
	var b strings.Builder
	require.NoError(t, scaleTable(&b, []Outcome{
		run("a", "", 1, 1000, 10), run("b", "a", 1, 900, 11), run("b", "a", 2, 700, 12), run("a", "", 2, 1200, 10), run("a", "", 3, 1100, 10),
	}, []string{"a", "b"}))
	lines := strings.Split(b.String(), "\n")
	for i, want := range [][]string{
		{"a", "b", "/", "a"},
		{"ended/s", "1100", "800", "0.73"},
		{"…", "all", "runs", "1000", "1200", "1100", "900", "700"},
		{"RSS", "10.0", "11.5"},
		{},
		{"slices,", "slice", "by", "slice"},
		{"a", "1100", "0.500"},
		{"b", "800", "0.500"},
	} {
		require.Equal(t, want, append([]string{}, strings.Fields(lines[i])...), b.String())
	}
}

// What one case has and another has not keeps its place among the lines.
func TestFigureNames(t *testing.T) {
	var a, b Outcome
	a.add("1", 0, 1)
	a.add("3", 0, 1)
	b.add("1", 0, 1)
	b.add("2", 0, 1)
	b.add("3", 0, 1)
	var names []string
	for _, f := range figureNames([]column{{runs: []*Outcome{&a}}, {runs: []*Outcome{&b}}}) {
		names = append(names, f.Name)
	}
	require.Equal(t, []string{"1", "2", "3"}, names)
}

func TestExperiments(t *testing.T) {
	seen := map[string]bool{}
	for _, e := range experiments() {
		require.False(t, seen[e.name], e.name)
		seen[e.name] = true
		require.NotEmpty(t, e.asks)
		require.NotEmpty(t, e.takes)
		require.Contains(t, scaleUsage(), e.name)
		o := scaleOptions{}
		if e.defaults != nil {
			e.defaults(&o)
		}
		all := e.cases(&o)
		names := caseNames(all)
		for _, c := range all {
			require.NotNil(t, c.measure, c.name)
			require.Positive(t, c.load.products, c.name)
			require.Empty(t, strings.Trim(strings.ToLower(c.name), "abcdefghijklmnopqrstuvwxyz0123456789-"), "it becomes the name of a database: %s", c.name)
			if c.base != "" {
				require.Contains(t, names, c.base)
				some, err := choose(all, c.name)
				require.NoError(t, err)
				require.ElementsMatch(t, []string{c.name, c.base}, caseNames(some))
			}
		}
		_, err := choose(all, "nothing")
		require.ErrorContains(t, err, all[0].name)
	}
	require.Len(t, seen, 9)
	require.ErrorContains(t, scaleCommand(t.Context(), []string{"nothing"}), "partitions")
}

func TestCopies(t *testing.T) {
	for want, c := range map[string]struct {
		table string
		kindOf
	}{
		"o.id":                     {"orders", kindOf{name: "id", kind: "uuid"}},
		"md5('fill' || o.n)::uuid": {"idempotency_keys", kindOf{name: "id", kind: "uuid"}},
		`t."updated_at" + (o.at - t.fill_created)`: {"sagas", kindOf{name: "updated_at", kind: "timestamp with time zone"}},
		`t."cause"`:                       {"saga_history", kindOf{name: "cause", kind: "uuid"}},
		"'customer-' || (o.n * 7919 % 5)": {"orders", kindOf{name: "customer_id", kind: "text"}},
	} {
		require.Equal(t, want, copied(c.table, c.kindOf, 5))
	}
	require.Equal(t, "o.id", copied("payments", kindOf{name: "order_id", kind: "uuid"}, 5))
	q := copies("x", []kindOf{{name: "order_id", kind: "uuid"}, {name: "number", kind: "bigint", generated: true}, {name: "a", kind: "text"}}, 5)
	require.Contains(t, q, `INSERT INTO x ("order_id", "a") SELECT o.id, t."a"`, "what the server numbers is left to it")
}

func TestGrowths(t *testing.T) {
	texts := map[int64]string{1: "grows", 2: "stays", 3: "is new"}
	var seen []map[int64]cost
	var a, b cost
	for i := range 9 {
		a.calls, a.ms = a.calls+10, a.ms+10*float64(1+i)
		b.calls, b.ms = b.calls+10, b.ms+10
		now := map[int64]cost{1: a, 2: b}
		if i > 6 {
			now[3] = b
		}
		seen = append(seen, now)
	}
	got := growths(seen, texts)
	require.Len(t, got, 1)
	require.Equal(t, "grows", got[0].text)
	require.InDelta(t, 3, got[0].first, 1e-9)
	require.InDelta(t, 8, got[0].last, 1e-9)
	require.InDelta(t, 5*30, got[0].more, 1e-9)
	require.Nil(t, growths(seen[:3], texts))
}

func TestLoopsOf(t *testing.T) {
	require.Equal(t, []int{1000, 4000}, loopsOf(4000, 60_000))
	require.Equal(t, []int{150, 600}, loopsOf(4000, 3000), "a loop that is closed for a fifth of its orders at most")
	require.Equal(t, []int{1, 4}, loopsOf(4000, 1))
}
