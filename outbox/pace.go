package outbox

import "time"

// pace decides when the relay reads next. Reading has a price of its own, some tenths of a millisecond of the database's CPU however
// few rows it finds, and so has what follows: a request to Kafka, and in every group that it feeds a fetch and a transaction. So: after rows it
// polls soon (other processes commit without waking us), after nothing ever later; a wake after a quiet moment reads at once; wakes in a
// stream are gathered, up to gatherMax, as this is the one place where waiting spares work everywhere behind it. Kafka's price is by partition of a
// request, however few records it gets: under load windows are held back longer, until they are worth their eighty partitions.
// Big windows pay for themselves and are never held back.
//
// What writers of this process announce needs none of that: what is urgent is on its way already, and the rest is patient. Polls find what others
// commit; as long as windows bring nothing of others, they are rare.
type pace struct {
	pollMin, pollMax, gatherMax, rowsEvery, cursorsEvery time.Duration

	poll  time.Duration
	cost  time.Duration // of a small window, smoothed
	rows  int           // of the last window that had any
	found time.Time     // when that one ended
	ended time.Time     // when the last one did
}

const (
	gatherFactor = 12   // times the price of a window passes before the next small one
	hotWindow    = 48   // rows from which the next one is gathered for hotGather
	bigWindow    = 1500 // rows from which a window pays for itself
	costWeight   = 8    // the last window counts for one part in so many

	// hotGather costs a saga under load some 15 ms, of hundreds that it waits in queues, and spares an eighth of all CPU.
	hotGather = 8 * time.Millisecond
)

// want is what announced messages want of the next window.
type want int8

const (
	wantNothing want = iota
	wantCursors      // to pass what was handed over
	wantRows         // to carry what was left to the log
)

// read records a window: when it ended, what it took without the waiting for the broker, how many rows it had, and how many of them
// nobody had announced.
func (p *pace) read(ended time.Time, took time.Duration, rows, foreign int) {
	p.ended = ended
	if rows > 0 {
		p.rows, p.found = rows, ended
	}
	switch {
	case foreign > 0 || p.poll == 0:
		p.poll = p.pollMin
	default:
		p.poll = min(2*p.poll, p.pollMax)
	}
	if rows < bigWindow {
		if p.cost == 0 {
			p.cost = took
		}
		p.cost += (took - p.cost) / costWeight
	}
}

// until is how long to wait before reading without a wake, if w has been wanted since then. What is wanted after a quiet moment waits a little
// too: a window at once would be in the way of what is urgent.
func (p *pace) until(now time.Time, w want, since time.Time) time.Duration {
	at := p.ended.Add(p.poll)
	switch w {
	case wantRows:
		at = earlier(at, later(p.ended.Add(p.rowsEvery), since.Add(p.rowsEvery/4)))
	case wantCursors:
		at = earlier(at, since.Add(p.cursorsEvery))
	case wantNothing:
	}
	return max(0, at.Sub(now))
}

func earlier(a, b time.Time) time.Time {
	if b.Before(a) {
		return b
	}
	return a
}

func later(a, b time.Time) time.Time {
	if b.After(a) {
		return b
	}
	return a
}

// gather is how long a wake waits for company. A poll that found nothing does not hold up whoever comes after it.
func (p *pace) gather(now time.Time) time.Duration {
	if p.rows >= bigWindow {
		return 0
	}
	if p.rows >= hotWindow {
		return max(0, p.found.Add(hotGather).Sub(now))
	}
	return max(0, p.found.Add(min(gatherFactor*p.cost, p.gatherMax)).Sub(now))
}
