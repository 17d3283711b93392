package bench

import (
	"bufio"
	"bytes"
	"encoding/hex"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// ticks is the unit of CPU time in /proc: USER_HZ is 100 on every Linux that Go runs on.
const ticks = 100.0

// stat reads a process's parent and its CPU seconds: its own, and those of children that it has waited for.
func stat(pid int) (parent int, own, children float64, ok bool) {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return 0, 0, 0, false
	}
	i := bytes.LastIndexByte(b, ')') // the name before may have spaces and brackets
	if i < 0 {
		return 0, 0, 0, false
	}
	f := strings.Fields(string(b[i+1:]))
	const last = 14
	if len(f) <= last {
		return 0, 0, 0, false
	}
	num := func(k int) float64 { v, _ := strconv.ParseFloat(f[k], 64); return v } // the kernel's own numbers
	parent, _ = strconv.Atoi(f[1])
	return parent, (num(11) + num(12)) / ticks, (num(13) + num(14)) / ticks, true
}

// Tree answers a process and its living descendants; without /proc only itself.
func Tree(root int) []int {
	children := map[int][]int{}
	dirs, _ := filepath.Glob("/proc/[0-9]*") // the pattern is well-formed
	for _, d := range dirs {
		pid, err := strconv.Atoi(filepath.Base(d))
		if err != nil {
			continue
		}
		if parent, _, _, ok := stat(pid); ok {
			children[parent] = append(children[parent], pid)
		}
	}
	out := []int{root}
	for i := 0; i < len(out); i++ {
		out = append(out, children[out[i]]...)
	}
	return out
}

// CPU answers the CPU seconds of a process, its living descendants and those it has waited for; false if it is not there.
func CPU(root int) (float64, bool) {
	if _, _, _, ok := stat(root); !ok {
		return 0, false
	}
	var sum float64
	for _, p := range Tree(root) {
		if _, own, children, ok := stat(p); ok {
			sum += own + children
		}
	}
	return sum, true
}

// OwnCPU answers the CPU seconds of this process alone, without what it started.
func OwnCPU() float64 {
	_, own, _, _ := stat(os.Getpid())
	return own
}

// Memory answers the resident memory of one process in MiB, and of a tree its proportional share, so that shared pages count once.
func Memory(root int) float64 {
	tree := Tree(root)
	if len(tree) == 1 {
		return memoryLine("/proc/"+strconv.Itoa(root)+"/status", "VmRSS:")
	}
	var sum float64
	for _, p := range tree {
		sum += memoryLine("/proc/"+strconv.Itoa(p)+"/smaps_rollup", "Pss:")
	}
	return sum
}

func memoryLine(file, name string) float64 {
	f, err := os.Open(file)
	if err != nil {
		return 0
	}
	defer f.Close()
	sc := bufio.NewScanner(f)
	for sc.Scan() {
		if rest, ok := strings.CutPrefix(sc.Text(), name); ok {
			if fields := strings.Fields(rest); len(fields) > 0 {
				kb, _ := strconv.ParseFloat(fields[0], 64) // the kernel's own number
				return kb / 1024
			}
		}
	}
	return 0
}

// Listener finds the process that listens on a TCP port of this machine; 0: none that we may see.
func Listener(port int) int {
	inodes := map[string]bool{}
	for _, file := range []string{"/proc/net/tcp", "/proc/net/tcp6"} {
		b, err := os.ReadFile(file)
		if err != nil {
			continue
		}
		for line := range strings.Lines(string(b)) {
			f := strings.Fields(line)
			const state, inode, listening = 3, 9, "0A"
			if len(f) <= inode || f[state] != listening {
				continue
			}
			if _, p, ok := strings.Cut(f[1], ":"); ok && portOf(p) == port {
				inodes["socket:["+f[inode]+"]"] = true
			}
		}
	}
	if len(inodes) == 0 {
		return 0
	}
	owner := 0
	fds, _ := filepath.Glob("/proc/[0-9]*/fd/*") // the pattern is well-formed
	for _, fd := range fds {
		if to, err := os.Readlink(fd); err == nil && inodes[to] {
			pid, _ := strconv.Atoi(strings.Split(fd, "/")[2])
			// A server's children inherit its socket: the process that started the others is meant.
			if owner == 0 || pid < owner {
				owner = pid
			}
		}
	}
	return owner
}

func portOf(s string) int {
	b, err := hex.DecodeString(s)
	if err != nil || len(b) != 2 {
		return 0
	}
	return int(b[0])<<8 | int(b[1])
}

// ListenerAt is Listener of a host:port, if the host is this machine.
func ListenerAt(addr string) int {
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return 0
	}
	if ip := net.ParseIP(host); host != "localhost" && (ip == nil || !ip.IsLoopback()) {
		return 0
	}
	p, err := strconv.Atoi(port)
	if err != nil {
		return 0
	}
	return Listener(p)
}

// Busy answers the CPU seconds that all processors of this machine have spent on anything, the host's share included; 0 without /proc.
func Busy() float64 {
	b, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0
	}
	line, _, _ := strings.Cut(string(b), "\n")
	const idle, wait, guest = 4, 5, 9 // guests are in user already
	sum := 0.0
	for i, f := range strings.Fields(line) {
		if v, err := strconv.ParseFloat(f, 64); err == nil && i != idle && i != wait && i < guest {
			sum += v / ticks
		}
	}
	return sum
}
