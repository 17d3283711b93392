package bench

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"

	"ordersaga/events"
)

func TestParsePhase(t *testing.T) {
	for text, want := range map[string]PhaseSpec{
		"saturate":        {Name: "saturate", Duration: time.Minute},
		"saturate@64:10s": {Name: "saturate@64", Slots: 64, Duration: 10 * time.Second},
		"200/s":           {Name: "200/s", Rate: 200, Duration: time.Minute},
		"0.5/s:30s":       {Name: "0.5/s", Rate: 0.5, Duration: 30 * time.Second},
		"200/s:6000":      {Name: "200/s", Rate: 200, Orders: 6000},
		"2x:5s":           {Name: "2x", Times: 2, Duration: 5 * time.Second},
	} {
		got, err := ParsePhase(text, time.Minute)
		require.NoError(t, err, text)
		require.Equal(t, want, got, text)
	}
	for _, text := range []string{"", "fast", "0/s", "-1/s", "x", "0x", "saturate@0", "saturate@many", "200/s:", "200/s:10ms", "NaN/s", "1e9/s", "200/s:-5"} {
		_, err := ParsePhase(text, time.Minute)
		require.ErrorContains(t, err, "saturate@512", "%s: it says what would do", text)
	}
	require.Error(t, CheckPhases(nil))
	require.ErrorContains(t, CheckPhases([]PhaseSpec{{Name: "2x", Times: 2}, {Name: "saturate"}}), "before it")
	require.ErrorContains(t, CheckPhases([]PhaseSpec{{Name: "1/s", Rate: 1}, {Name: "1/s", Rate: 1}}), "twice")
	require.NoError(t, CheckPhases([]PhaseSpec{{Name: "saturate"}, {Name: "2x", Times: 2}}))
}

func TestMix(t *testing.T) {
	m := Mix{Products: 50, MaxLines: 3, Hot: 0.5, Declined: 0.1, OutOfStock: 0.1, Cancelled: 0.1, Seed: 7}
	require.NoError(t, m.Check())
	counts := map[string]int{}
	const n = 4000
	for i := range n {
		o := m.Order(i)
		var body struct {
			OrderID       string `json:"order_id"`
			PaymentMethod string `json:"payment_method"`
			Items         []struct {
				SKU      string `json:"sku"`
				Quantity int    `json:"quantity"`
			} `json:"items"`
		}
		require.NoError(t, json.Unmarshal(o.Body, &body))
		require.Equal(t, o.ID.String(), body.OrderID)
		seen := map[string]bool{}
		for _, it := range body.Items {
			require.False(t, seen[it.SKU], "a product once")
			require.Positive(t, it.Quantity)
			seen[it.SKU] = true
		}
		require.NotEmpty(t, seen)
		counts["hot"] += toInt(seen[skuHot])
		counts["sold out"] += toInt(seen[skuNone])
		counts["declined"] += toInt(body.PaymentMethod == "pm_card_chargeDeclined")
		counts["cancelled"] += toInt(o.Cancel)
		again := m.Order(i)
		require.Equal(t, o.Body[60:], again.Body[60:], "the same but for its id")
	}
	require.InDelta(t, n/2, counts["hot"], n/20)
	for _, k := range []string{"sold out", "declined", "cancelled"} {
		require.InDelta(t, n/10, counts[k], n/40, k)
	}
	stocked, empty := m.SKUs()
	require.Len(t, stocked, 51)
	require.Equal(t, []string{skuNone}, empty)
	for _, bad := range []Mix{{Products: 0, MaxLines: 1}, {Products: 1}, {Products: 1, MaxLines: 1, Hot: 1.5}, {Products: 1, MaxLines: 1, Declined: 0.6, Cancelled: 0.6}} {
		require.Error(t, bad.Check())
	}
	require.NotEmpty(t, (&Mix{Products: 1, MaxLines: 3}).Order(0).Body, "fewer products than lines")
}

func toInt(b bool) int {
	if b {
		return 1
	}
	return 0
}

// An order that is due while the service stands still has waited since then: not since the generator could send it.
func TestLatencyCountsFromWhenAnOrderWasDue(t *testing.T) {
	gate := make(chan struct{})
	var answered atomic.Int64
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		<-gate
		answered.Add(1)
		w.WriteHeader(http.StatusAccepted)
	}))
	t.Cleanup(srv.Close)
	to, err := NewEndpoint(srv.URL, 10*time.Second)
	require.NoError(t, err)
	rec := NewRecorder(time.Now())
	load := NewLoad(to, func(ctx context.Context, k *Conn, _ int, due time.Time) Fate {
		id := uuid.New()
		rec.Expect(id, due)
		a, err := k.Do(ctx, &Request{Method: http.MethodPost, Path: "/", Body: []byte("{}")})
		rec.Answered(id, due, time.Now(), a, err)
		rec.Ended(id, time.Now(), OutcomeConfirmed)
		return Over
	})
	const stall = 300 * time.Millisecond
	time.AfterFunc(stall, func() { close(gate) })
	// One connection: all but the first wait in the generator.
	due, unsent, _ := load.Run(t.Context(), Plan{Rate: 200, Orders: 40, Connections: 1})
	require.Equal(t, 40, due)
	require.Zero(t, unsent)
	require.EqualValues(t, 40, answered.Load())
	var p Phase
	rec.into(&p, time.Second)
	require.EqualValues(t, 40, p.Accepted)
	require.GreaterOrEqual(t, p.Latency.Max, 250.0)
	require.GreaterOrEqual(t, p.Latency.P50, 100.0, "half of them were due in the first half of the stall")
}

func TestClosedLoopKeepsSoManyUnderWay(t *testing.T) {
	var mu sync.Mutex
	var underWay, most int
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusAccepted) }))
	t.Cleanup(srv.Close)
	to, err := NewEndpoint(srv.URL, 10*time.Second)
	require.NoError(t, err)
	var load *Load
	var ends sync.WaitGroup
	load = NewLoad(to, func(ctx context.Context, k *Conn, _ int, _ time.Time) Fate {
		mu.Lock()
		underWay++
		most = max(most, underWay)
		mu.Unlock()
		if a, err := k.Do(ctx, &Request{Method: http.MethodPost, Path: "/"}); err != nil || a.Status != http.StatusAccepted {
			return Refused
		}
		ends.Add(1)
		time.AfterFunc(time.Millisecond, func() { // its end comes from elsewhere
			defer ends.Done()
			mu.Lock()
			underWay--
			mu.Unlock()
			load.Ended()
		})
		return UnderWay
	})
	due, _, _ := load.Run(t.Context(), Plan{Orders: 300, Slots: 7, Connections: 3})
	ends.Wait()
	require.Equal(t, 300, due)
	require.LessOrEqual(t, most, 7)
	require.Greater(t, most, 3, "more than there are connections: they are not held while an order is under way")
}

func TestOpenLoopCountsWhatItCouldNotSend(t *testing.T) {
	release := make(chan struct{})
	to, err := NewEndpoint("http://127.0.0.1:1", time.Second)
	require.NoError(t, err)
	var sent atomic.Int64
	load := NewLoad(to, func(context.Context, *Conn, int, time.Time) Fate {
		<-release
		sent.Add(1)
		return Over
	})
	go func() { // however long a busy machine takes to fill the queue
		for load.unsent.Load() == 0 && t.Context().Err() == nil {
			<-time.After(time.Millisecond)
		}
		close(release)
	}()
	due, unsent, _ := load.Run(t.Context(), Plan{Rate: 1e6, Orders: queued + 1000, Connections: 1})
	require.Equal(t, queued+1000, due)
	require.Positive(t, unsent)
	require.EqualValues(t, due, sent.Load()+unsent, "every order is one or the other")
}

func TestConn(t *testing.T) {
	var requests atomic.Int64
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		requests.Add(1)
		b, _ := io.ReadAll(r.Body)
		switch r.URL.Path {
		case "/base/busy":
			w.Header().Set("Retry-After", "7")
			w.WriteHeader(http.StatusTooManyRequests)
		case "/base/chunks":
			_, _ = io.WriteString(w, "one, ")
			_ = http.NewResponseController(w).Flush()
			_, _ = io.WriteString(w, "two")
		case "/base/last":
			w.Header().Set("Connection", "close")
			_, _ = io.WriteString(w, "bye")
		default:
			_, _ = fmt.Fprintf(w, "%s %s %s %s", r.Method, r.URL.Path, r.Header.Get("X-Key"), b)
		}
	}))
	t.Cleanup(srv.Close)
	to, err := NewEndpoint(srv.URL+"/base/", 5*time.Second)
	require.NoError(t, err)
	k := NewConn(to)
	t.Cleanup(k.Close)
	for range 2 {
		a, err := k.Do(t.Context(), &Request{Method: "PUT", Path: "/x", Head: []byte("X-Key: v\r\n"), Body: []byte("body")})
		require.NoError(t, err)
		require.Equal(t, "PUT /base/x v body", string(a.Body))
		a, err = k.Do(t.Context(), &Request{Method: "POST", Path: "/busy"})
		require.NoError(t, err)
		require.Equal(t, Answer{Status: 429, RetryAfter: 7 * time.Second, Body: []byte{}}, a)
		a, err = k.Do(t.Context(), &Request{Method: "GET", Path: "/chunks"})
		require.NoError(t, err)
		require.Equal(t, "one, two", string(a.Body))
		a, err = k.Do(t.Context(), &Request{Method: "GET", Path: "/last"})
		require.NoError(t, err)
		require.Equal(t, "bye", string(a.Body))
	}
	// A kept connection that the server has closed is dialled anew.
	_, err = k.Do(t.Context(), &Request{Method: "GET", Path: "/x"})
	require.NoError(t, err)
	srv.CloseClientConnections()
	_, err = k.Do(t.Context(), &Request{Method: "GET", Path: "/x"})
	require.NoError(t, err)
	for _, bad := range []string{"", "orders:8080", "ftp://x", "http://"} {
		_, err := NewEndpoint(bad, time.Second)
		require.Error(t, err, bad)
	}
}

func TestConnOverTLS(t *testing.T) {
	srv := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "safe") }))
	t.Cleanup(srv.Close)
	to, err := NewEndpoint(srv.URL, 5*time.Second)
	require.NoError(t, err)
	k := NewConn(to)
	_, err = k.Do(t.Context(), &Request{Method: "GET", Path: "/"})
	require.ErrorContains(t, err, "certificate", "a stranger is not trusted")
	to.tls.RootCAs = x509.NewCertPool()
	to.tls.RootCAs.AddCert(srv.Certificate())
	a, err := k.Do(t.Context(), &Request{Method: "GET", Path: "/"})
	require.NoError(t, err)
	require.Equal(t, "safe", string(a.Body))
	k.Close()
}

func TestConnRefusesWhatIsNotHTTP(t *testing.T) {
	for name, say := range map[string]string{
		"another protocol": "SSH-2.0-OpenSSH_9.2\r\n", "a long body": "HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n",
		"a wrong length": "HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n", "half an answer": "HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf",
	} {
		t.Run(name, func(t *testing.T) {
			ln, err := net.Listen("tcp", "127.0.0.1:0")
			require.NoError(t, err)
			defer ln.Close()
			go func() {
				for {
					c, err := ln.Accept()
					if err != nil {
						return
					}
					_, _ = c.Read(make([]byte, 4096))
					_, _ = io.WriteString(c, say)
					_ = c.Close()
				}
			}()
			to, err := NewEndpoint("http://"+ln.Addr().String(), 2*time.Second)
			require.NoError(t, err)
			k := NewConn(to)
			defer k.Close()
			_, err = k.Do(t.Context(), &Request{Method: "GET", Path: "/"})
			require.Error(t, err)
		})
	}
}

// service is as much of the service as a run needs: it accepts orders and ends them on a stream of events.
type service struct {
	mu     sync.Mutex
	each   func(context.Context, []events.Envelope)
	refuse atomic.Int64 // so many requests are refused first
	orders atomic.Int64
	wait   bool
}

func (s *service) tail(ctx context.Context, ready func(), each func(context.Context, []events.Envelope)) error {
	s.mu.Lock()
	s.each = each
	s.mu.Unlock()
	ready()
	<-ctx.Done()
	return nil
}

func (s *service) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	switch {
	case r.URL.Path == "/metrics":
		_, _ = fmt.Fprintf(w, "# HELP x y\nprocess_resident_memory_bytes 5.24288e+07\ngo_goroutines 42\ngo_gc_duration_seconds{quantile=\"1\"} 0.002\n"+
			"go_gc_duration_seconds_sum 0.01\ngo_gc_duration_seconds_count 10\nordersaga_outbox_published_total %d\n", 10*s.orders.Load())
	case s.refuse.Add(-1) >= 0:
		w.WriteHeader(http.StatusServiceUnavailable)
	case strings.HasSuffix(r.URL.Path, "/cancel"):
		w.WriteHeader(http.StatusAccepted)
	default:
		var o struct {
			OrderID string `json:"order_id"`
			Method  string `json:"payment_method"`
		}
		if r.Header.Get("Idempotency-Key") == "" || json.NewDecoder(r.Body).Decode(&o) != nil {
			w.WriteHeader(http.StatusBadRequest)
			return
		}
		s.orders.Add(1)
		typ, status := events.TOrderConfirmed, "confirmed"
		if o.Method == "pm_card_chargeDeclined" {
			typ, status = events.TOrderRejected, "rejected"
		}
		w.WriteHeader(http.StatusAccepted)
		if s.wait {
			_, _ = fmt.Fprintf(w, `{"order_id":%q,"status":%q}`, o.OrderID, status)
			return
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		s.each(r.Context(), []events.Envelope{{Type: events.TOrderPlaced, OrderID: uuid.MustParse(o.OrderID)}, {Type: typ, OrderID: uuid.MustParse(o.OrderID)}})
	}
}

func run(t *testing.T, s *service, change func(*Config)) (*Report, error) {
	t.Helper()
	srv := httptest.NewServer(s)
	t.Cleanup(srv.Close)
	cfg := Config{
		URL: srv.URL, Version: "test", Mix: Mix{Products: 10, MaxLines: 2, Declined: 0.2, Seed: 1}, Connections: 4, Slots: 8, Drain: 5 * time.Second, Timeout: 5 * time.Second,
		Phases:    []PhaseSpec{{Name: "saturate", Orders: 200}, {Name: "200/s", Rate: 200, Orders: 60}, {Name: "2x", Times: 0.1, Orders: 50}},
		Processes: map[string][]int{ServiceProcess: {os.Getpid()}}, Scrape: []string{srv.URL}, Progress: t.Logf,
	}
	if !s.wait {
		cfg.Tail = s.tail
	}
	change(&cfg)
	r, err := NewRunner(cfg)
	require.NoError(t, err)
	return r.Run(t.Context())
}

func TestRun(t *testing.T) {
	for _, wait := range []bool{false, true} {
		t.Run(fmt.Sprintf("wait=%t", wait), func(t *testing.T) {
			s := &service{wait: wait}
			s.refuse.Store(20)
			rep, err := run(t, s, func(c *Config) {
				if wait {
					c.Wait = time.Second
				} else {
					c.Mix.Cancelled = 0.1
				}
			})
			require.NoError(t, err)
			require.Len(t, rep.Phases, 3)
			p := rep.Phases[0]
			require.EqualValues(t, 20, p.Refused)
			require.Equal(t, 200, p.Due)
			require.EqualValues(t, 180, p.Accepted)
			require.EqualValues(t, 180, p.Ended)
			require.Zero(t, p.NotEnded)
			require.EqualValues(t, 20, p.Errors["503"])
			require.EqualValues(t, 180, p.Outcomes[OutcomeConfirmed]+p.Outcomes[OutcomeRejected])
			require.Positive(t, p.Outcomes[OutcomeRejected])
			require.InDelta(t, 10, p.Service.RecordsPer, 0.01)
			require.InDelta(t, 50, p.Service.RSSMax, 0.01)
			require.InDelta(t, 2, p.Service.GCPauseMax, 0.001)
			require.Contains(t, p.CPU, ServiceProcess)
			require.EqualValues(t, 60, rep.Phases[1].Ended)
			require.InDelta(t, 200, rep.Phases[1].AcceptedPerSec, 40)
			require.Positive(t, rep.Phases[2].Offered, "a share of what was reached")
			reportIsReadable(t, rep)
		})
	}
}

func reportIsReadable(t *testing.T, rep *Report) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "r.json")
	b, err := json.Marshal(rep)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(file, b, 0o600))
	again, err := ReadReport(file)
	require.NoError(t, err)
	ds, err := Compare(rep, again)
	require.NoError(t, err)
	for _, d := range ds {
		require.Empty(t, d.Verdict, "%s is what it was", d.Figure)
	}
	again.Phases[0].EndedPerSec *= 2
	again.Phases[0].Latency.P99 *= 2
	ds, err = Compare(rep, again)
	require.NoError(t, err)
	verdicts := map[string]string{}
	for _, d := range ds {
		if d.Phase == rep.Phases[0].Name {
			verdicts[d.Figure] = d.Verdict
		}
	}
	require.Equal(t, "better", verdicts["ended/s"])
	require.Equal(t, "worse", verdicts["latency p99, ms"])
	var text, svg, page bytes.Buffer
	require.NoError(t, WriteDifferences(&text, rep, again, ds))
	require.Contains(t, text.String(), "worse")
	text.Reset()
	require.NoError(t, rep.WriteText(&text))
	require.Contains(t, text.String(), "saturate")
	require.NoError(t, rep.WriteSVG(&svg))
	require.NoError(t, xml.Unmarshal(svg.Bytes(), new(struct{ XMLName xml.Name })))
	require.NotContains(t, svg.String(), "NaN")
	require.NoError(t, rep.WriteHTML(&page))
	require.NotContains(t, page.String(), "src=", "it needs nothing from elsewhere")
}

func TestRunSaysWhatIsWrong(t *testing.T) {
	s := &service{}
	s.refuse.Store(1 << 40)
	_, err := run(t, s, func(c *Config) { c.Phases = []PhaseSpec{{Name: "10/s", Rate: 100, Orders: 10}} })
	require.ErrorContains(t, err, "no order was accepted")
	require.ErrorContains(t, err, "503")
	_, err = run(t, &service{}, func(c *Config) {
		c.Tail = func(context.Context, func(), func(context.Context, []events.Envelope)) error {
			return errors.New("broken")
		}
	})
	require.ErrorContains(t, err, "broken")
	_, err = run(t, &service{}, func(c *Config) { c.Processes = map[string][]int{"gone": {1 << 30}} })
	require.ErrorContains(t, err, "gone")
	_, err = NewRunner(Config{URL: "http://x", Mix: Mix{Products: 1, MaxLines: 1, Cancelled: 0.1}, Phases: []PhaseSpec{{Name: "saturate"}}, Connections: 1, Slots: 1})
	require.ErrorContains(t, err, "--kafka-brokers")
}

// Orders that never end are counted, and waited for no longer than was said.
func TestOrdersThatDoNotEndAreCounted(t *testing.T) {
	s := &service{}
	rep, err := run(t, s, func(c *Config) {
		c.Drain = 50 * time.Millisecond
		c.Phases = []PhaseSpec{{Name: "100/s", Rate: 100, Orders: 20}}
		c.Tail = func(ctx context.Context, ready func(), each func(context.Context, []events.Envelope)) error {
			return s.tail(ctx, ready, func(ctx context.Context, batch []events.Envelope) {
				if s.orders.Load()%2 == 0 {
					each(ctx, batch)
				}
			})
		}
	})
	require.NoError(t, err)
	require.EqualValues(t, 10, rep.Phases[0].NotEnded)
	require.EqualValues(t, 10, rep.Phases[0].Ended)
}

func TestReadReportRefusesStrangers(t *testing.T) {
	file := filepath.Join(t.TempDir(), "r.json")
	for _, text := range []string{"", "{}", `{"tool":"wrk"}`, `[]`} {
		require.NoError(t, os.WriteFile(file, []byte(text), 0o600))
		_, err := ReadReport(file)
		require.Error(t, err, text)
	}
	_, err := ReadReport(file + ".no")
	require.ErrorIs(t, err, os.ErrNotExist)
	_, err = Compare(&Report{Phases: []Phase{{Name: "a"}}}, &Report{Phases: []Phase{{Name: "b"}}})
	require.Error(t, err)
}

func TestProcesses(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer ln.Close()
	if _, err := os.Stat("/proc/self/stat"); err != nil {
		require.Zero(t, ListenerAt(ln.Addr().String()), "nothing is known without /proc, and nothing breaks")
		return
	}
	require.Equal(t, os.Getpid(), ListenerAt(ln.Addr().String()))
	require.Zero(t, ListenerAt("192.0.2.1:80"), "another machine's")
	cpu, ok := CPU(os.Getpid())
	require.True(t, ok)
	require.GreaterOrEqual(t, cpu, OwnCPU()-0.1)
	require.Positive(t, Memory(os.Getpid()))
	_, ok = CPU(1 << 30)
	require.False(t, ok)
}

func TestPrepareMakesWhatIsMissing(t *testing.T) {
	var mu sync.Mutex
	have := map[string]int64{"bench-00000": stock, "bench-00001": 5}
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		sku := strings.TrimPrefix(r.URL.Path, "/v1/products/")
		n, ok := have[sku]
		switch {
		case r.Header.Get("Authorization") != "Bearer secret":
			w.WriteHeader(http.StatusForbidden)
		case r.Method == http.MethodGet && !ok:
			w.WriteHeader(http.StatusNotFound)
		case r.Method == http.MethodGet:
			_, _ = fmt.Fprintf(w, `{"on_hand":%d,"available":%d}`, n+3, n) // three are reserved
		default:
			var b struct {
				OnHand int64 `json:"on_hand"`
			}
			if json.NewDecoder(r.Body).Decode(&b) != nil {
				w.WriteHeader(http.StatusBadRequest)
				return
			}
			have[sku] = b.OnHand
		}
	}))
	t.Cleanup(srv.Close)
	m := &Mix{Products: 4, MaxLines: 1, Hot: 0.1, OutOfStock: 0.1}
	require.NoError(t, Prepare(t.Context(), srv.URL, "secret", m, 100))
	require.Equal(t, map[string]int64{"bench-00000": stock, "bench-00001": stock + 3, "bench-00002": stock, "bench-00003": stock, skuHot: stock, skuNone: 0}, have)
	require.ErrorContains(t, Prepare(t.Context(), srv.URL, "wrong", m, 100), "role admin")
}
