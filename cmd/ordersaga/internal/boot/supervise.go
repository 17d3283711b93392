package boot

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"
)

// task is something that runs until its context ends.
type task struct {
	name string
	run  func(context.Context) error
}

// stage is tasks that stop together. Stages are stopped one after the other: what takes work in before what carries it on.
type stage []task

// supervise runs all tasks of all stages until ctx ends or one of them fails, then stops the stages in order and waits for each,
// within timeout for all together. It answers the first failure.
func supervise(ctx context.Context, timeout time.Duration, stages ...stage) error {
	type running struct {
		stop context.CancelFunc
		done sync.WaitGroup
	}
	failed := make(chan error, 1)
	rs := make([]*running, len(stages))
	base := context.WithoutCancel(ctx)
	for i, st := range stages {
		sctx, stop := context.WithCancel(base)
		r := &running{stop: stop}
		rs[i] = r
		for _, t := range st {
			r.done.Go(func() {
				err := t.run(sctx)
				if sctx.Err() != nil && (err == nil || errors.Is(err, context.Canceled)) {
					return
				}
				if err == nil {
					err = errors.New("ended by itself")
				}
				select {
				case failed <- fmt.Errorf("%s: %w", t.name, err):
				default:
				}
			})
		}
	}
	var err error
	select {
	case <-ctx.Done():
	case err = <-failed:
	}
	deadline := time.NewTimer(timeout)
	defer deadline.Stop()
	for i, r := range rs {
		r.stop()
		gone := make(chan struct{})
		go func() {
			r.done.Wait()
			close(gone)
		}()
		select {
		case <-gone:
		case <-deadline.C:
			for _, rest := range rs[i:] {
				rest.stop()
			}
			return errors.Join(err, fmt.Errorf("not everything stopped within %s: what was under way will be done again after the next start", timeout))
		}
	}
	if err == nil { // a task may have failed while stopping
		select {
		case err = <-failed:
		default:
		}
	}
	return err
}
