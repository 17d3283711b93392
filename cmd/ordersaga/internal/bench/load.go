package bench

import (
	"context"
	"sync"
	"sync/atomic"
	"time"
)

// Plan is one phase of load: open-loop with a Rate, else closed-loop.
type Plan struct {
	Rate     float64       // orders a second, each due at its time whatever became of those before
	Duration time.Duration // 0: until Orders are sent
	Orders   int           // 0: until Duration is over
	// Slots bounds orders under way in a closed loop: one begins when one ended. 0: one begins when one was answered.
	Slots       int
	Connections int // requests at a time
	First       int // number of the first order
}

// Fate is what became of an order once it was answered.
type Fate int8

// The fates.
const (
	Refused  Fate = iota // not accepted
	UnderWay             // accepted; Load.Ended hears of its end
	Over                 // accepted, and its end is not waited for any more
)

// Sender sends order i on a connection.
type Sender func(ctx context.Context, k *Conn, i int, due time.Time) Fate

// queued bounds the orders that are due and wait for a free connection. What is due beyond is not sent, and counted.
const queued = 1 << 16

// crowdPause is how long a connection rests after a refusal in a closed loop, which would spin otherwise.
const crowdPause = 20 * time.Millisecond

// Load sends orders. One Run at a time.
type Load struct {
	to   *Endpoint
	send Sender

	slots  atomic.Pointer[chan struct{}]
	unsent atomic.Int64
	jobs   chan job
}

type job struct {
	i   int
	due time.Time
}

// NewLoad makes a Load.
func NewLoad(to *Endpoint, send Sender) *Load { return &Load{to: to, send: send} }

// Ended tells that an order that was under way has ended.
func (l *Load) Ended() {
	if s := l.slots.Load(); s != nil {
		select {
		case <-*s:
		default: // of a phase before
		}
	}
}

// Run sends the orders of a plan and returns when all were answered: how many were due, and for how long it sent.
func (l *Load) Run(ctx context.Context, p Plan) (due int, unsent int64, took time.Duration) {
	l.unsent.Store(0)
	l.slots.Store(nil)
	closed := p.Rate <= 0
	depth := queued
	if closed {
		depth = 0 // nothing is due before somebody can send it
		if p.Slots > 0 {
			slots := make(chan struct{}, p.Slots)
			l.slots.Store(&slots)
		}
	}
	l.jobs = make(chan job, depth)
	var wg sync.WaitGroup
	for range p.Connections {
		wg.Go(func() { l.work(ctx, closed) })
	}
	start := time.Now()
	if closed {
		due = l.deal(ctx, &p, start)
	} else {
		due = l.pace(ctx, &p, start)
	}
	took = time.Since(start)
	close(l.jobs)
	wg.Wait()
	return due, l.unsent.Load(), took
}

func (l *Load) work(ctx context.Context, closed bool) {
	k := NewConn(l.to)
	defer k.Close()
	for j := range l.jobs {
		if closed {
			j.due = time.Now()
		}
		fate := l.send(ctx, k, j.i, j.due)
		if !closed || fate == UnderWay {
			continue
		}
		l.Ended()
		if fate == Refused {
			select {
			case <-time.After(crowdPause):
			case <-ctx.Done():
			}
		}
	}
}

// deal hands out orders as fast as they are taken and, with slots, as fast as they end.
func (l *Load) deal(ctx context.Context, p *Plan, start time.Time) int {
	end := forever
	if p.Duration > 0 {
		end = p.Duration
	}
	timer := time.NewTimer(time.Until(start.Add(end)))
	defer timer.Stop()
	slots := l.slots.Load()
	n := 0
	for p.Orders == 0 || n < p.Orders {
		if slots != nil {
			select {
			case *slots <- struct{}{}:
			case <-timer.C:
				return n
			case <-ctx.Done():
				return n
			}
		}
		select {
		case l.jobs <- job{i: p.First + n}:
			n++
		case <-timer.C:
			return n
		case <-ctx.Done():
			return n
		}
	}
	return n
}

// forever is the length of a phase that ends by itself.
const forever = 24 * time.Hour

// pace makes each order due at its time. It never slows down for those before: that is what makes the latency honest.
func (l *Load) pace(ctx context.Context, p *Plan, start time.Time) int {
	total := p.Orders
	if p.Duration > 0 {
		if n := int(p.Rate * p.Duration.Seconds()); total == 0 || n < total {
			total = n
		}
	}
	for n := range total {
		at := start.Add(time.Duration(float64(n) / p.Rate * float64(time.Second)))
		if d := time.Until(at); d > 0 {
			t := time.NewTimer(d)
			select {
			case <-t.C:
			case <-ctx.Done():
				t.Stop()
				return n
			}
		} else if ctx.Err() != nil {
			return n
		}
		select {
		case l.jobs <- job{p.First + n, at}:
		default:
			l.unsent.Add(1)
		}
	}
	return total
}
