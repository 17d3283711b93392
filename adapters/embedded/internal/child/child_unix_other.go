//go:build unix && !linux

package child

import (
	"context"
	"fmt"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// psTimeout bounds one look at the process table.
const psTimeout = 5 * time.Second

// No kernel but Linux's signals a child on its parent's death; the next start on the same data finds the orphan.
func signalOnParentDeath(*exec.Cmd, syscall.Signal) {}

func ps(args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), psTimeout)
	defer cancel()
	out, err := exec.CommandContext(ctx, "ps", args...).Output() //nolint:gosec // fixed arguments and numbers
	if err != nil {
		return "", fmt.Errorf("ps: %w", err)
	}
	return string(out), nil
}

// Children lists the processes whose parent is pid, zombies left out.
func Children(pid int) ([]int, error) {
	out, err := ps("-axo", "pid=,ppid=,state=")
	if err != nil {
		return nil, err
	}
	var found []int
	for line := range strings.Lines(out) {
		fields := strings.Fields(line)
		if len(fields) == 3 && fields[1] == strconv.Itoa(pid) && !strings.HasPrefix(fields[2], "Z") {
			if id, err := strconv.Atoi(fields[0]); err == nil {
				found = append(found, id)
			}
		}
	}
	return found, nil
}

// Ended tells whether pid is gone, or only a zombie that its parent has not reaped yet.
func Ended(pid int) bool {
	out, err := ps("-o", "state=", "-p", strconv.Itoa(pid))
	return err != nil || strings.HasPrefix(strings.TrimSpace(out), "Z")
}

// WorksIn tells whether pid is a server of the data directory dir, by its command line: there is no portable way to its working directory.
func WorksIn(pid int, dir string) bool {
	out, err := ps("-o", "command=", "-p", strconv.Itoa(pid))
	return err == nil && strings.Contains(out, "-D "+dir+" ")
}
