//go:build !unix

package flock

import (
	"errors"
	"os"
)

var errPlatform = errors.New("the embedded broker and Postgres run on Linux and macOS; here, use `ordersaga serve` with " +
	"ORDERSAGA_KAFKA_BROKERS and ORDERSAGA_DATABASE_URL")

// Try fails: without a lock that the kernel drops with its holder no data directory is safe.
func Try(string) (*os.File, error) { return nil, errPlatform }

// TryExisting fails as Try does.
func TryExisting(string) (*os.File, error) { return nil, errPlatform }
