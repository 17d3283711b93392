// Package child runs the server processes of the embedded adapters so that none outlives its parent: the kernel signals the child when
// the parent dies, even by kill -9 (Linux; elsewhere the next start finds the orphan and ends it).
//
// The trap it exists for: Linux binds that promise (PR_SET_PDEATHSIG) to the *thread* that forked, and Go ends threads when it likes. So
// every child is started from a goroutine that keeps its thread to itself until the child has ended.
package child

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"runtime"
	"sync"
	"syscall"
	"time"
)

// tailBytes bounds how much of a child's output is kept for an error message.
const tailBytes = 64 << 10

// killGrace is how long the kernel gets to end a killed process, which may hang in a write to a slow disk.
const killGrace = 10 * time.Second

// Process is a started child. Its methods may be called from any goroutine.
type Process struct {
	cmd  *exec.Cmd
	done chan struct{}
	err  error // set before done is closed
}

// Start starts cmd, which is signalled with onParentDeath when this process ends without having stopped it. Cmd's output must go to
// files or to a writer that does not block: the child is only seen to have ended once its output is copied.
func Start(cmd *exec.Cmd, onParentDeath syscall.Signal) (*Process, error) {
	signalOnParentDeath(cmd, onParentDeath)
	p := &Process{cmd: cmd, done: make(chan struct{})}
	started := make(chan error, 1)
	go func() {
		// Never unlocked: the thread ends with this goroutine, which is after the child.
		runtime.LockOSThread()
		err := cmd.Start()
		started <- err
		if err != nil {
			return
		}
		p.err = cmd.Wait()
		close(p.done)
	}()
	if err := <-started; err != nil {
		return nil, fmt.Errorf("start %s: %w", cmd.Path, err)
	}
	return p, nil
}

// Pid is the child's process id.
func (p *Process) Pid() int { return p.cmd.Process.Pid }

// Done is closed when the child has ended and was reaped.
func (p *Process) Done() <-chan struct{} { return p.done }

// Err says how the child ended; nil while it runs and after exit status 0.
func (p *Process) Err() error {
	select {
	case <-p.done:
		return p.err
	default:
		return nil
	}
}

// Signal sends a signal; a child that has ended is no error.
func (p *Process) Signal(sig syscall.Signal) error {
	if err := p.cmd.Process.Signal(sig); err != nil && !errors.Is(err, errGone) {
		return fmt.Errorf("signal %s (pid %d): %w", p.cmd.Path, p.Pid(), err)
	}
	return nil
}

// Step is one rung of a shutdown: send Signal, then wait at most Grace for the child to end.
type Step struct {
	Signal syscall.Signal
	Grace  time.Duration
	// Polite steps are cut short when the context is done; the others are what makes the child end.
	Polite bool
}

// Stop climbs the steps, the last of which should be SIGKILL, until the child has ended.
func (p *Process) Stop(ctx context.Context, steps ...Step) error {
	for _, step := range steps {
		if err := p.Signal(step.Signal); err != nil {
			return err
		}
		var cancelled <-chan struct{}
		if step.Polite {
			cancelled = ctx.Done()
		}
		timer := time.NewTimer(step.Grace)
		select {
		case <-p.done:
			timer.Stop()
			return nil
		case <-timer.C:
		case <-cancelled:
			timer.Stop()
		}
	}
	return fmt.Errorf("%s (pid %d) did not end", p.cmd.Path, p.Pid())
}

// Run runs a short-lived command to its end and returns the last of its output; it is killed when ctx is done or this process dies.
func Run(ctx context.Context, cmd *exec.Cmd) (string, error) {
	var out Tail
	cmd.Stdout, cmd.Stderr = &out, &out
	cmd.WaitDelay = time.Second // a grandchild may keep the pipe open
	p, err := Start(cmd, killSignal)
	if err != nil {
		return "", err
	}
	select {
	case <-p.Done():
		if p.err != nil {
			return out.String(), fmt.Errorf("%s: %w\n%s", cmd.Path, p.err, out.String())
		}
		return out.String(), nil
	case <-ctx.Done():
		err := p.Stop(context.WithoutCancel(ctx), Step{Signal: killSignal, Grace: killGrace})
		return out.String(), errors.Join(fmt.Errorf("%s: %w", cmd.Path, ctx.Err()), err)
	}
}

// Tail is a writer that keeps the last 64 KiB. The zero value is ready; it may be used from several goroutines.
type Tail struct {
	mu  sync.Mutex
	buf []byte
}

// Write never fails.
func (t *Tail) Write(b []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.buf = append(t.buf, b...)
	if over := len(t.buf) - tailBytes; over > 0 {
		t.buf = append(t.buf[:0], t.buf[over:]...)
	}
	return len(b), nil
}

// String returns what is kept, without white space around it.
func (t *Tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return string(bytes.TrimSpace(t.buf))
}
