package child

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
)

func signalOnParentDeath(cmd *exec.Cmd, sig syscall.Signal) {
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Pdeathsig = sig
}

// Children lists the processes whose parent is pid, zombies left out.
func Children(pid int) ([]int, error) {
	stats, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		return nil, fmt.Errorf("list processes: %w", err)
	}
	var found []int
	for _, path := range stats {
		state, parent, err := stat(path)
		if err != nil || parent != pid || state == 'Z' {
			continue // a process that ended between listing and reading is nobody's child any more
		}
		if id, err := strconv.Atoi(filepath.Base(filepath.Dir(path))); err == nil {
			found = append(found, id)
		}
	}
	return found, nil
}

// Ended tells whether pid is gone, or only a zombie that its parent has not reaped yet.
func Ended(pid int) bool {
	state, _, err := stat(fmt.Sprintf("/proc/%d/stat", pid))
	return err != nil || state == 'Z'
}

// WorksIn tells whether pid's working directory is dir: a postmaster's is its data directory, which tells it from a stranger that was
// given the same process id.
func WorksIn(pid int, dir string) bool {
	cwd, err := os.Readlink(fmt.Sprintf("/proc/%d/cwd", pid))
	if err != nil {
		return false
	}
	if real, err := filepath.EvalSymlinks(dir); err == nil {
		dir = real
	}
	return cwd == dir
}

// stat reads the state letter and the parent of "pid (name) S ppid …"; the name may hold blanks and parentheses.
func stat(path string) (byte, int, error) {
	raw, err := os.ReadFile(path)
	if err != nil {
		return 0, 0, fmt.Errorf("read process state: %w", err)
	}
	fields := bytes.Fields(raw[bytes.LastIndexByte(raw, ')')+1:])
	if len(fields) < 2 || len(fields[0]) != 1 {
		return 0, 0, fmt.Errorf("read process state: %s has an unknown form", path)
	}
	parent, err := strconv.Atoi(string(fields[1]))
	if err != nil {
		return 0, 0, fmt.Errorf("read process state: %w", err)
	}
	return fields[0][0], parent, nil
}
