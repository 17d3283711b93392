//go:build unix

package payment

import (
	"errors"
	"net"
	"syscall"
)

// look tells, without waiting, whether anything has come on an idle connection. It reads a byte: where there is one, or the end, the
// connection is closed anyway, be it only TLS that had something to say. net/http has a goroutine wait for that.
type look struct {
	raw   syscall.RawConn // nil: the connection is none of the operating system's
	read  func(fd uintptr) bool
	one   [1]byte
	empty bool
}

func newLook(conn net.Conn) *look {
	l := &look{}
	if s, ok := conn.(syscall.Conn); ok {
		l.raw, _ = s.SyscallConn() // fails where the connection is closed: its use will tell
	}
	l.read = func(fd uintptr) bool {
		_, err := syscall.Read(int(fd), l.one[:])
		l.empty = errors.Is(err, syscall.EAGAIN)
		return true
	}
	return l
}

func (l *look) quiet() bool {
	if l.raw == nil {
		return true
	}
	l.empty = false
	return l.raw.Read(l.read) == nil && l.empty
}
