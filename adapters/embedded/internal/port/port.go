// Package port finds free TCP ports on loopback for servers that cannot be told to choose one and say which.
package port

import (
	"context"
	"fmt"
	"net"
	"strconv"
)

// Free returns a port of 127.0.0.1 that nobody listened on a moment ago. Another process can take it before the caller's server does:
// whoever uses it tries again with another one if binding fails.
func Free(ctx context.Context) (int, error) {
	listener, err := new(net.ListenConfig).Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return 0, fmt.Errorf("find a free port on 127.0.0.1: %w", err)
	}
	addr, ok := listener.Addr().(*net.TCPAddr)
	if err := listener.Close(); err != nil {
		return 0, fmt.Errorf("find a free port on 127.0.0.1: %w", err)
	}
	if !ok {
		return 0, fmt.Errorf("find a free port on 127.0.0.1: unexpected address %v", listener.Addr())
	}
	return addr.Port, nil
}

// IsFree tells whether port of 127.0.0.1 can be bound now.
func IsFree(ctx context.Context, port int) bool {
	listener, err := new(net.ListenConfig).Listen(ctx, "tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(port)))
	if err != nil {
		return false
	}
	return listener.Close() == nil
}
