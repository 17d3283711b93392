//go:build linux

package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

const (
	// stopWithin bounds an orderly end: the product's own shutdown timeout and a little.
	stopWithin = 25 * time.Second
	// shownOnFailure is how much of the end of a log a failed test shows, in bytes.
	shownOnFailure = 6 << 10
)

// starter runs every fork on one thread that never ends: the kernel sends the death signal of a child when the thread that forked it
// ends, not the process.
var starter = sync.OnceValue(func() chan<- func() {
	work := make(chan func())
	go func() {
		runtime.LockOSThread()
		for f := range work {
			f()
		}
	}()
	return work
})

func fork(cmd *exec.Cmd) error {
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	forked := make(chan error, 1)
	starter() <- func() { forked <- cmd.Start() }
	return <-forked
}

// process is the program under test, or one like it, running.
type process struct {
	name    string
	log     string // file of what it says
	cmd     *exec.Cmd
	started time.Time
	done    chan struct{}
	err     error // of its end; set before done is closed
}

// environment is ours without the settings of the product, and with env.
func environment(env []string) []string {
	var out []string
	for _, v := range os.Environ() {
		if !strings.HasPrefix(v, "ORDERSAGA_") {
			out = append(out, v)
		}
	}
	out = append(out, "GORACE=atexit_sleep_ms=0 exitcode=66") // by default every process with the race detector ends a second late
	return append(out, env...)
}

// launch starts the program and shows the end of its log if the test fails. Whatever becomes of the test, it ends with it.
func launch(tb testing.TB, name string, env []string, args ...string) *process {
	tb.Helper()
	return launchAt(tb, filepath.Join(tb.TempDir(), name+".log"), name, env, args...)
}

// launchAt is launch with a log of the caller's, to which it appends.
func launchAt(tb testing.TB, log, name string, env []string, args ...string) *process {
	tb.Helper()
	file, err := os.OpenFile(log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	require.NoError(tb, err)
	defer file.Close()
	p := &process{name: name, log: log, done: make(chan struct{}), started: time.Now()}
	p.cmd = exec.CommandContext(context.WithoutCancel(tb.Context()), binary, args...)
	p.cmd.Env = environment(env)
	p.cmd.Stdout, p.cmd.Stderr = file, file
	require.NoError(tb, fork(p.cmd))
	go func() {
		p.err = p.cmd.Wait()
		close(p.done)
	}()
	tb.Cleanup(func() {
		p.kill()
		said := p.said(tb)
		if strings.Contains(said, "WARNING: DATA RACE") {
			tb.Errorf("%s has a data race", name)
		}
		if strings.Contains(said, "\npanic: ") || strings.Contains(said, "fatal error: ") {
			tb.Errorf("%s panicked", name)
		}
		if tb.Failed() {
			tb.Logf("the end of what %s said:\n%s", name, tail(said, shownOnFailure))
		}
	})
	return p
}

func tail(s string, n int) string {
	if len(s) <= n {
		return s
	}
	return "…" + s[len(s)-n:]
}

func (p *process) pid() int { return p.cmd.Process.Pid }

func (p *process) said(tb testing.TB) string {
	tb.Helper()
	b, err := os.ReadFile(p.log)
	require.NoError(tb, err)
	return string(b)
}

func (p *process) ended() bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

// end says how it ended.
func (p *process) end() string {
	if !p.ended() {
		return "it runs"
	}
	return fmt.Sprint(p.err)
}

// kill ends it by SIGKILL and waits until it is gone.
func (p *process) kill() {
	if !p.ended() {
		_ = p.cmd.Process.Kill() // it may end by itself meanwhile
	}
	<-p.done
}

// interrupt signals it with all of its process group, as Ctrl-C in a terminal does, and answers its exit status and how long it took.
func (p *process) interrupt(tb testing.TB, sig syscall.Signal) (code int, took time.Duration) {
	tb.Helper()
	begin := time.Now()
	require.False(tb, p.ended(), "%s has ended already: %v", p.name, p.end())
	require.NoError(tb, syscall.Kill(-p.pid(), sig))
	return p.wait(tb, stopWithin), time.Since(begin)
}

// stop ends it in order, which must go well.
func (p *process) stop(tb testing.TB) {
	tb.Helper()
	code, took := p.interrupt(tb, syscall.SIGTERM)
	require.Zero(tb, code, "%s did not end well after %s:\n%s", p.name, took, tail(p.said(tb), shownOnFailure))
}

// wait waits for its end and answers the exit status.
func (p *process) wait(tb testing.TB, within time.Duration) int {
	tb.Helper()
	timeout := time.NewTimer(within)
	defer timeout.Stop()
	select {
	case <-p.done:
	case <-timeout.C:
		require.FailNow(tb, "does not end", "%s still runs after %s", p.name, within)
	}
	return exitCode(p.err)
}

func exitCode(err error) int {
	var exit *exec.ExitError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &exit):
		return exit.ExitCode()
	}
	return -1
}

// result is what a command that has ended said.
type result struct {
	code     int
	out, err string
}

// commandTimeout bounds one command of the command line.
const commandTimeout = time.Minute

// command runs the program to its end.
func command(tb testing.TB, env []string, args ...string) result {
	tb.Helper()
	return commandWith(tb, "", env, args...)
}

// commandWith is command with standard input.
func commandWith(tb testing.TB, in string, env []string, args ...string) result {
	tb.Helper()
	ctx, cancel := context.WithTimeout(tb.Context(), commandTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, binary, args...)
	cmd.Env = environment(env)
	cmd.Stdin = strings.NewReader(in)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := fork(cmd)
	if err == nil {
		err = cmd.Wait()
	}
	require.NoError(tb, ctx.Err(), "ordersaga %s: %s", strings.Join(args, " "), errs.String())
	require.NotContains(tb, errs.String(), "WARNING: DATA RACE")
	return result{exitCode(err), out.String(), errs.String()}
}

// must runs the program, which must answer 0, and answers what it wrote.
func must(tb testing.TB, env []string, args ...string) string {
	tb.Helper()
	r := command(tb, env, args...)
	require.Zero(tb, r.code, "ordersaga %s\n%s%s", strings.Join(args, " "), r.out, r.err)
	return r.out
}

// descendants lists the processes below pid: its children, theirs, and so on.
func descendants(tb testing.TB, pid int) []int {
	tb.Helper()
	stats, err := filepath.Glob("/proc/[0-9]*/stat")
	require.NoError(tb, err)
	children := map[int][]int{}
	for _, path := range stats {
		b, err := os.ReadFile(path)
		if err != nil {
			continue // ended meanwhile
		}
		fields := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
		id, err := strconv.Atoi(filepath.Base(filepath.Dir(path)))
		if err != nil || len(fields) < 2 {
			continue
		}
		parent, err := strconv.Atoi(fields[1])
		if err == nil {
			children[parent] = append(children[parent], id)
		}
	}
	var all []int
	for queue := []int{pid}; len(queue) > 0; queue = queue[1:] {
		all = append(all, children[queue[0]]...)
		queue = append(queue, children[queue[0]]...)
	}
	return all
}

func describe(pids []int) string {
	var b strings.Builder
	for _, pid := range pids {
		cmdline, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		fmt.Fprintf(&b, "%d %s\n", pid, bytes.ReplaceAll(cmdline, []byte{0}, []byte{' '}))
	}
	return b.String()
}
