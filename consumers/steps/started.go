package steps

import (
	"sync"
	"time"

	"github.com/google/uuid"

	"ordersaga/consumers"
	"ordersaga/domain"
)

// startedFor is how long a step that was started with its command may be called without another look. Its command comes within milliseconds; one that comes
// late was held up by something, and looks first whether it may still act.
const startedFor = time.Second

// startedSteps are steps whose rows were written in the transaction that emitted their commands, by the command's id. A transaction that did not commit has left
// some that nobody will ask for.
type startedSteps struct {
	mu       sync.Mutex
	now, old map[uuid.UUID]startedStep
	turned   time.Time
}

type startedStep struct {
	step domain.PaymentStep
	at   time.Time
}

func (s *startedSteps) note(id uuid.UUID, step domain.PaymentStep, at time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.now == nil || at.Sub(s.turned) >= startedFor {
		s.old, s.now, s.turned = s.now, map[uuid.UUID]startedStep{}, at
	}
	s.now[id] = startedStep{step, at}
}

// take answers the steps that deliveries find started, each once, and the deliveries that do not.
func (s *startedSteps) take(batch []*consumers.Delivery, at time.Time) (steps []domain.PaymentStep, rest []*consumers.Delivery) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, d := range batch {
		e, ok := s.now[d.ID]
		if !ok {
			e, ok = s.old[d.ID]
		}
		delete(s.now, d.ID)
		delete(s.old, d.ID)
		if ok && at.Sub(e.at) < startedFor {
			steps = append(steps, e.step)
		} else {
			rest = append(rest, d)
		}
	}
	return steps, rest
}
