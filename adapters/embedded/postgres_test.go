package embedded_test

import (
	"net"
	"strconv"
)

func runPostgresChild() error { return nil }

func splitPort(addr string) (string, int, error) {
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return "", 0, err
	}
	n, err := strconv.Atoi(port)
	return host, n, err
}
