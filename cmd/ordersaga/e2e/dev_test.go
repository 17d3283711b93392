//go:build linux

package e2e

import (
	"encoding/json"
	"fmt"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

const (
	demoOrders = 200
	demoPoison = demoOrders / 20
	// demoWithin bounds the demo from an empty directory, the making of a Postgres cluster included.
	demoWithin = 4 * time.Minute
	// goneWithin bounds how long what dev has started may outlive a killed dev: the server finishes its shutdown.
	goneWithin = 15 * time.Second
	// quick bounds Ctrl-C, with the race detector on a machine that is busy.
	quick = 15 * time.Second
)

// trial is a data directory of dev and where it listens.
type trial struct {
	dir, http, kafka string
	env              []string
}

func newTrial(t *testing.T) trial {
	t.Helper()
	tr := trial{dir: filepath.Join(t.TempDir(), "data"), http: freeAddr(t), kafka: freeAddr(t)}
	tr.env = []string{"ORDERSAGA_URL=http://" + tr.http}
	return tr
}

func (tr trial) dev(t *testing.T, name string, more ...string) *process {
	t.Helper()
	return launch(t, name, tr.env, append([]string{"dev", "--data-dir", tr.dir, "--http-addr", tr.http, "--kafka-addr", tr.kafka}, more...)...)
}

// running waits until dev says that it runs.
func running(t *testing.T, p *process) {
	t.Helper()
	require.Eventually(t, func() bool { return p.ended() || strings.Contains(p.said(t), "Ctrl-C stops everything.") }, readyWithin, tick)
	require.False(t, p.ended(), "%s", p.said(t))
}

// TestDemoOnEmbedded: what a person with nothing installed does first. dev makes all it needs, sends its mix, finds its books clean; it
// starts again on its data, also after a kill -9; there is never a second one, and nothing of it is left when it ends.
func TestDemoOnEmbedded(t *testing.T) {
	t.Parallel()
	tr := newTrial(t)
	p := tr.dev(t, "demo", "--demo", strconv.Itoa(demoOrders), "--exit")
	require.Zero(t, p.wait(t, demoWithin), "%s", p.said(t))
	said := p.said(t)
	require.Contains(t, said, "audit: clean")
	require.Regexp(t, fmt.Sprintf(`poison, on the topic +dead letter +%d`, demoPoison), said)
	t.Logf("dev --demo %d --exit from an empty directory: %s", demoOrders, time.Since(p.started).Round(time.Millisecond))

	p = tr.dev(t, "again")
	running(t, p)
	require.Len(t, strings.Split(strings.TrimSpace(must(t, tr.env, "orders", "list", "--limit", "0", "-o", "jsonl")), "\n"), demoOrders-demoPoison, "its data are still there")
	second := command(t, tr.env, "dev", "--data-dir", tr.dir, "--http-addr", "127.0.0.1:0", "--kafka-addr", "127.0.0.1:0")
	require.Equal(t, 1, second.code)
	for _, part := range []string{"already running", strconv.Itoa(p.pid()), tr.http, tr.kafka} {
		require.Contains(t, second.err, part)
	}
	require.Contains(t, must(t, tr.env, "orders", "submit", "--customer", "c-1", "--item", "TEA-1", "--wait", "20s"), "confirmed")

	below := descendants(t, p.pid())
	require.NotEmpty(t, below, "Postgres is a process of its own")
	code, took := p.interrupt(t, syscall.SIGINT)
	require.Zero(t, code, "%s", tail(p.said(t), shownOnFailure))
	require.Less(t, took, quick)
	require.Empty(t, living(below), "left behind: %s", describe(living(below)))
	t.Logf("Ctrl-C to the end of everything: %s", took.Round(time.Millisecond))

	p = tr.dev(t, "killed")
	running(t, p)
	must(t, tr.env, "orders", "submit", "--customer", "c-1", "--item", "TEA-1")
	below = descendants(t, p.pid())
	require.NotEmpty(t, below)
	p.kill()
	require.True(t, waitFor(goneWithin, func() bool { return len(living(below)) == 0 }), "left behind by a killed dev: %s", describe(living(below)))

	p = tr.dev(t, "after-the-kill", "--demo", "20", "--exit", "-o", "json")
	require.Zero(t, p.wait(t, demoWithin), "%s", p.said(t))
	said = p.said(t)
	var out struct {
		Audit struct {
			Clean  bool             `json:"clean"`
			Orders map[string]int64 `json:"orders"`
		} `json:"audit"`
	}
	begin := strings.Index(said, "\n{")
	require.Positive(t, begin, "%s", said)
	require.NoError(t, json.NewDecoder(strings.NewReader(said[begin:])).Decode(&out))
	require.True(t, out.Audit.Clean)
	total := int64(0)
	for _, n := range out.Audit.Orders {
		total += n
	}
	require.EqualValues(t, demoOrders-demoPoison+2+20-1, total, "the order of the moment of the kill has ended too")
}

func living(pids []int) (left []int) {
	for _, pid := range pids {
		if alive(pid) {
			left = append(left, pid)
		}
	}
	return left
}

// TestDevStopsDuringItsStart: Ctrl-C at any moment of the start ends it, with nothing left behind.
func TestDevStopsDuringItsStart(t *testing.T) {
	t.Parallel()
	tr := newTrial(t)
	for i, after := range []time.Duration{50 * time.Millisecond, 400 * time.Millisecond, 1500 * time.Millisecond, 3 * time.Second} {
		p := tr.dev(t, fmt.Sprintf("start-%d", i))
		require.NoError(t, pause(t.Context(), after))
		below := descendants(t, p.pid())
		_, took := p.interrupt(t, syscall.SIGINT) // in the middle of its start it may well say that it was not finished
		require.Less(t, took, quick)
		require.True(t, waitFor(goneWithin, func() bool { return len(living(below)) == 0 }), "left behind: %s", describe(living(below)))
	}
	p := tr.dev(t, "whole", "--demo", "20", "--exit")
	require.Zero(t, p.wait(t, demoWithin), "%s", p.said(t))
	require.Contains(t, p.said(t), "audit: clean")
}
