package outbox

import (
	"context"
	"errors"
	"fmt"
	"time"

	"ordersaga/events"
)

// repair overcomes the records of a shard that came back, in order; nothing of the shard is in flight. A refused record is sent again
// alone: a broker refuses a whole batch for one of its records. If it is refused alone it is set aside and the shard goes on (F39).
// Any other failure makes the shard read again from the first record that the broker does not have, after a while.
func (r *Relay) repair(ctx context.Context, s *shard) {
	for {
		r.mu.Lock()
		f := s.track.failure()
		if f == nil || s.state != repairing {
			r.resume(s)
			r.mu.Unlock()
			break
		}
		r.mu.Unlock()
		err := f.err
		if refused(err) {
			err = r.sendAlone(ctx, f.message)
		}
		r.mu.Lock()
		if err == nil {
			s.track.overcome()
			r.acked++
			r.mu.Unlock()
			continue
		}
		s.failures++
		s.resumeAt = time.Now().Add(r.backoff(s.failures))
		s.track.reset()
		s.read = s.track.acked
		r.resume(s)
		r.mu.Unlock()
		if ctx.Err() == nil {
			r.obs.RelayFailed("produce", fmt.Errorf("shard %d, row %d: %w", s.id, f.message.RowID, err))
		}
		break
	}
	signal(r.kick)
	signal(r.tend)
}

// resume ends a repair. The lock is held.
func (r *Relay) resume(s *shard) {
	if s.state == repairing {
		s.state = reading
	}
}

// refused reports that Kafka will never take the record.
func refused(err error) bool {
	var r interface{ Refused() bool }
	return errors.As(err, &r) && r.Refused()
}

// sendAlone sends a record that was refused once more, alone, and sets it aside if it is refused again. nil: the shard may go on.
func (r *Relay) sendAlone(ctx context.Context, m *Message) error {
	record, err := m.Record()
	if err == nil {
		err = r.produceAndWait(ctx, record)
	}
	if err == nil || !refused(err) {
		return err
	}
	if short, ok := bare(record); ok { // its dead letter keeps the value
		berr := r.produceAndWait(ctx, short)
		if berr == nil {
			r.obs.RecordSetAside(m, err, true)
			return nil
		}
		if !refused(berr) {
			return berr
		}
	}
	if aerr := r.log.SetAside(ctx, m, err.Error()); aerr != nil {
		return fmt.Errorf("set aside, refused with %w: %w", err, aerr)
	}
	r.obs.RecordSetAside(m, err, false)
	return nil
}

// produceAndWait sends one record and waits for the answer.
func (r *Relay) produceAndWait(ctx context.Context, record events.Record) error {
	answer := make(chan error, 1)
	r.producer.Produce(ctx, record, func(err error) { answer <- err })
	select {
	case err := <-answer:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}
