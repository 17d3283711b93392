//go:build unix

package child_test

import (
	"context"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"ordersaga/adapters/embedded/internal/child"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const grace = 10 * time.Second

// onDyingThread runs f on a thread of its own, which Go ends afterwards.
func onDyingThread(f func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // a goroutine that ends locked takes its thread with it
		f()
	}()
	<-done
}

// The kernel signals a child when the thread that forked it ends, not the process: the reason for this package.
func TestChildOutlivesTheThreadThatAskedForIt(t *testing.T) {
	var p *child.Process
	onDyingThread(func() {
		var err error
		p, err = child.Start(exec.Command("sleep", "60"), syscall.SIGKILL)
		require.NoError(t, err)
	})
	select {
	case <-p.Done():
		require.Fail(t, "killed with a thread")
	case <-time.After(300 * time.Millisecond):
	}
	require.NoError(t, p.Err())
	require.True(t, child.Alive(p.Pid()))
	require.NoError(t, p.Stop(t.Context(), child.Step{Signal: syscall.SIGTERM, Grace: grace}))
	require.Error(t, p.Err())
	require.True(t, child.Ended(p.Pid()))
	require.NoError(t, p.Signal(syscall.SIGTERM), "a child that has ended is no error")
}

func TestStopClimbsItsSteps(t *testing.T) {
	start := func() *child.Process {
		var ready child.Tail
		cmd := exec.Command("sh", "-c", "trap '' TERM; echo ready; while :; do sleep 0.05; done")
		cmd.Stdout = &ready
		cmd.WaitDelay = time.Second
		p, err := child.Start(cmd, syscall.SIGKILL)
		require.NoError(t, err)
		require.Eventually(t, func() bool { return ready.String() == "ready" }, grace, time.Millisecond)
		return p
	}
	p := start()
	require.NoError(t, p.Stop(t.Context(), child.Step{Signal: syscall.SIGTERM, Grace: 50 * time.Millisecond}, child.Step{Signal: syscall.SIGKILL, Grace: grace}))

	p = start()
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	require.NoError(t, p.Stop(cancelled, child.Step{Signal: syscall.SIGTERM, Grace: time.Hour, Polite: true}, child.Step{Signal: syscall.SIGKILL, Grace: grace}))

	p = start()
	require.ErrorContains(t, p.Stop(t.Context(), child.Step{Signal: syscall.SIGTERM, Grace: 50 * time.Millisecond}), "did not end")
	require.NoError(t, p.Stop(t.Context(), child.Step{Signal: syscall.SIGKILL, Grace: grace}))
}

func TestRun(t *testing.T) {
	out, err := child.Run(t.Context(), exec.Command("sh", "-c", "echo said; echo complained >&2"))
	require.NoError(t, err)
	require.Equal(t, "said\ncomplained", out)

	_, err = child.Run(t.Context(), exec.Command("sh", "-c", "echo why; exit 3"))
	require.ErrorContains(t, err, "exit status 3\nwhy")

	_, err = child.Run(t.Context(), exec.Command("/no/such/program"))
	require.ErrorContains(t, err, "start /no/such/program")

	short, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	_, err = child.Run(short, exec.Command("sleep", "60"))
	require.ErrorIs(t, err, context.DeadlineExceeded)
}

func TestChildrenAndWorksIn(t *testing.T) {
	dir := t.TempDir()
	// The trailing command keeps sh from turning into sleep.
	cmd := exec.Command("sh", "-c", "sleep 60; : ", "-D", dir, "")
	cmd.Dir = dir
	p, err := child.Start(cmd, syscall.SIGKILL)
	require.NoError(t, err)
	var pids []int
	require.Eventually(t, func() bool {
		pids, err = child.Children(p.Pid())
		return err == nil && len(pids) == 1
	}, grace, 10*time.Millisecond)
	require.True(t, child.WorksIn(p.Pid(), dir))
	require.False(t, child.WorksIn(p.Pid(), t.TempDir()))
	require.NoError(t, child.Signal(pids[0], syscall.SIGKILL))
	require.NoError(t, p.Stop(t.Context(), child.Step{Signal: syscall.SIGKILL, Grace: grace}))
	require.Eventually(t, func() bool { return child.Ended(pids[0]) }, grace, 10*time.Millisecond)
	require.NoError(t, child.Signal(pids[0], syscall.SIGKILL), "one that has ended is no error")
}

func TestTailKeepsTheEnd(t *testing.T) {
	var tail child.Tail
	for range 100 {
		_, err := tail.Write([]byte(strings.Repeat("x", 1000)))
		require.NoError(t, err)
	}
	_, err := tail.Write([]byte("end"))
	require.NoError(t, err)
	require.Len(t, tail.String(), 64<<10)
	require.True(t, strings.HasSuffix(tail.String(), "xend"))
}
