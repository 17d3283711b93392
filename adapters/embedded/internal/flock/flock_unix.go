//go:build unix

package flock

import (
	"errors"
	"fmt"
	"os"
	"syscall"
)

// Try takes the lock at path, making the file if there is none; ErrHeld if it is taken. Closing the file releases the lock.
func Try(path string) (*os.File, error) { return try(path, os.O_RDWR|os.O_CREATE) }

// TryExisting is Try for a file that must be there already.
func TryExisting(path string) (*os.File, error) { return try(path, os.O_RDWR) }

func try(path string, flags int) (*os.File, error) {
	file, err := os.OpenFile(path, flags, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open lock file: %w", err)
	}
	for {
		err = syscall.Flock(int(file.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if !errors.Is(err, syscall.EINTR) {
			break
		}
	}
	if err == nil {
		return file, nil
	}
	if errors.Is(err, syscall.EWOULDBLOCK) {
		err = ErrHeld
	}
	return nil, errors.Join(fmt.Errorf("lock %s: %w", path, err), file.Close())
}
