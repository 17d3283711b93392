// Package flock takes an exclusive advisory lock on a file. The kernel drops it when its holder ends, however it ends, so a lock never
// outlives a kill -9. The file itself is never removed by a holder: removing a locked file lets two processes hold "the" lock.
package flock

import (
	"context"
	"errors"
	"os"
	"time"
)

// ErrHeld says that somebody else, in this process or another, holds the lock.
var ErrHeld = errors.New("the lock is held")

// retryEvery is how often Wait looks whether the lock is free: the kernel's own waiting cannot be given a context.
const retryEvery = 100 * time.Millisecond

// Wait takes the lock at path, waiting for its present holder until ctx is done. Closing the file releases it.
func Wait(ctx context.Context, path string) (*os.File, error) {
	tick := time.NewTicker(retryEvery)
	defer tick.Stop()
	for {
		file, err := Try(path)
		if !errors.Is(err, ErrHeld) {
			return file, err
		}
		select {
		case <-ctx.Done():
			return nil, errors.Join(err, ctx.Err())
		case <-tick.C:
		}
	}
}
