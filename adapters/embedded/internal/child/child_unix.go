//go:build unix

package child

import (
	"errors"
	"fmt"
	"os"
	"syscall"
)

const killSignal = syscall.SIGKILL

var errGone = os.ErrProcessDone

// Alive tells whether a process has this id, somebody else's included. A zombie counts as alive.
func Alive(pid int) bool {
	err := syscall.Kill(pid, 0)
	return err == nil || errors.Is(err, syscall.EPERM)
}

// Signal sends sig to a process that is not a Process of ours; one that has ended is no error.
func Signal(pid int, sig syscall.Signal) error {
	if err := syscall.Kill(pid, sig); err != nil && !errors.Is(err, syscall.ESRCH) {
		return fmt.Errorf("signal pid %d: %w", pid, err)
	}
	return nil
}
