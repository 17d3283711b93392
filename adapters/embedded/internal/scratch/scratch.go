// Package scratch makes temporary directories that do not pile up: each is locked by the process that made it, and the next process to
// make one removes those whose maker is gone (after a kill -9 nobody else would).
package scratch

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"ordersaga/adapters/embedded/internal/flock"
)

const (
	lockName = "scratch.lock"
	// young protects a directory whose maker has not locked it yet.
	young = time.Minute
	// attempts bounds how often New loses the race for a directory that it just made.
	attempts = 5
)

// Dir is a locked temporary directory.
type Dir struct {
	Path string
	lock *os.File
}

// New makes a directory below parent (os.TempDir if empty) named prefix and random digits, open to others for passing through.
func New(parent, prefix string) (*Dir, error) {
	if parent == "" {
		parent = os.TempDir()
	}
	sweep(parent, prefix)
	for range attempts {
		path, err := os.MkdirTemp(parent, prefix)
		if err != nil {
			return nil, fmt.Errorf("make a temporary directory: %w", err)
		}
		lock, err := flock.Try(filepath.Join(path, lockName))
		if errors.Is(err, flock.ErrHeld) {
			continue // a sweeper was quicker, and removes it
		}
		if err != nil {
			return nil, errors.Join(err, os.RemoveAll(path))
		}
		if err := os.Chmod(path, 0o711); err != nil { //nolint:gosec // a server with another user id passes through; its data is its own
			return nil, errors.Join(fmt.Errorf("open the temporary directory: %w", err), lock.Close(), os.RemoveAll(path))
		}
		return &Dir{Path: path, lock: lock}, nil
	}
	return nil, fmt.Errorf("make a temporary directory in %s: another process removes it at once", parent)
}

// Remove removes the directory with all in it. Whatever ran on it has ended before.
func (d *Dir) Remove() error {
	if err := errors.Join(os.RemoveAll(d.Path), d.lock.Close()); err != nil {
		return fmt.Errorf("remove temporary directory %s: %w", d.Path, err)
	}
	return nil
}

// sweep removes what processes that are gone left. It does what it can: other users' directories, and any that resist, stay.
func sweep(parent, prefix string) {
	paths, err := filepath.Glob(filepath.Join(parent, prefix+"*"))
	if err != nil {
		return
	}
	for _, path := range paths {
		info, err := os.Lstat(path)
		if err != nil || !info.IsDir() || time.Since(info.ModTime()) < young {
			continue
		}
		lock, err := flock.TryExisting(filepath.Join(path, lockName))
		if err != nil {
			continue
		}
		_ = os.RemoveAll(path) // best effort: the next sweep tries again
		_ = lock.Close()
	}
}
