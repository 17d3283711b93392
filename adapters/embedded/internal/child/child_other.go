//go:build !unix

package child

import (
	"os"
	"os/exec"
	"syscall"
)

const killSignal = syscall.SIGKILL

var errGone = os.ErrProcessDone

func signalOnParentDeath(*exec.Cmd, syscall.Signal) {}
