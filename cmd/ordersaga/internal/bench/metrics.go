package bench

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"net/http"
	"strconv"
	"strings"
)

// Metrics are the sums that one scrape gave, by name without labels; a summary's quantiles are kept with theirs.
type Metrics map[string]float64

// Names of what is read out of the service's metrics.
const (
	metricRSS        = "process_resident_memory_bytes"
	metricCPU        = "process_cpu_seconds_total"
	metricGoroutines = "go_goroutines"
	metricHeap       = "go_memstats_heap_inuse_bytes"
	metricGCSum      = "go_gc_duration_seconds_sum"
	metricGCCount    = "go_gc_duration_seconds_count"
	metricGCMax      = `go_gc_duration_seconds{quantile="1"}`
	metricPublished  = "ordersaga_outbox_published_total"
	metricAllocs     = "go_memstats_alloc_bytes_total"
)

var wantedMetrics = map[string]bool{
	metricRSS: true, metricCPU: true, metricGoroutines: true, metricHeap: true, metricGCSum: true, metricGCCount: true, metricPublished: true, metricAllocs: true,
}

// Scrape reads Prometheus' text format from a path of the endpoint, on a connection of its own.
func Scrape(ctx context.Context, e *Endpoint, token, path string) (Metrics, error) {
	k := NewConn(e)
	defer k.Close()
	h := "Accept: text/plain\r\n"
	if token != "" {
		h += "Authorization: Bearer " + token + "\r\n"
	}
	a, err := k.Do(ctx, &Request{Method: http.MethodGet, Path: path, Head: []byte(h)})
	if err != nil {
		return nil, err
	}
	if a.Status != http.StatusOK {
		return nil, fmt.Errorf("metrics: status %d", a.Status)
	}
	m := Metrics{}
	sc := bufio.NewScanner(bytes.NewReader(a.Body))
	sc.Buffer(nil, 1<<20)
	for sc.Scan() {
		m.take(sc.Text())
	}
	if err := sc.Err(); err != nil {
		return nil, fmt.Errorf("metrics: %w", err)
	}
	return m, nil
}

func (m Metrics) take(line string) {
	name, _, _ := strings.Cut(line, " ")
	bare, _, _ := strings.Cut(name, "{")
	if name == metricGCMax {
		bare = name
	} else if !wantedMetrics[bare] {
		return
	}
	at := strings.LastIndexByte(line, ' ')
	if v, err := strconv.ParseFloat(line[at+1:], 64); err == nil {
		m[bare] += v
	}
}

// add sums the metrics of several processes; of the longest pause the longest.
func (m Metrics) add(o Metrics) {
	for k, v := range o {
		if k == metricGCMax {
			m[k] = max(m[k], v)
		} else {
			m[k] += v
		}
	}
}
