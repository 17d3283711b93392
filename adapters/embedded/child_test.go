//go:build unix

package embedded_test

import (
	"bufio"
	"bytes"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"ordersaga/adapters/embedded/internal/child"
)

// childTimeout bounds how long a child may take to say what it has to say.
const childTimeout = time.Minute

// testChild is this test binary in another role.
type testChild struct {
	*child.Process
	said chan string
	errs *bytes.Buffer
}

// startChild starts this test binary as role with extra environment "NAME=value"; cred nil: the same user.
func startChild(t *testing.T, role string, cred *syscall.Credential, env ...string) *testChild {
	t.Helper()
	exe, err := os.Executable()
	require.NoError(t, err)
	cmd := exec.Command(exe)
	cmd.Env = append(os.Environ(), append(env, childRole+"="+role)...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: cred}
	if cred != nil {
		cmd.Dir = "/"
	}
	r, w, err := os.Pipe()
	require.NoError(t, err)
	errs := new(bytes.Buffer)
	cmd.Stdout, cmd.Stderr = w, errs
	cmd.WaitDelay = time.Second
	p, err := child.Start(cmd, syscall.SIGKILL)
	require.NoError(t, w.Close())
	require.NoError(t, err)
	c := &testChild{Process: p, said: make(chan string, 16), errs: errs}
	read := make(chan struct{})
	go func() {
		defer close(read)
		defer close(c.said)
		lines := bufio.NewScanner(r)
		for lines.Scan() {
			c.said <- lines.Text()
		}
	}()
	t.Cleanup(func() {
		c.kill(t)
		_ = r.Close() // ends the reader also if a grandchild still holds the other end
		<-read
	})
	return c
}

// hear waits for the line "name value" and returns the value.
func (c *testChild) hear(t *testing.T, name string) string {
	t.Helper()
	timer := time.NewTimer(childTimeout)
	defer timer.Stop()
	for {
		select {
		case line, ok := <-c.said:
			if !ok {
				<-c.Done()
				require.FailNow(t, "the child ended", "waiting for %q: %v\n%s", name, c.Err(), c.errs)
			}
			if value, found := strings.CutPrefix(line, name+" "); found {
				return value
			}
		case <-timer.C:
			require.FailNow(t, "the child says nothing", "waiting for %q", name)
		}
	}
}

// kill is kill -9 and waits until the process is gone.
func (c *testChild) kill(t *testing.T) {
	t.Helper()
	require.NoError(t, c.Signal(syscall.SIGKILL))
	<-c.Done()
}
