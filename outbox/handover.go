package outbox

import (
	"time"

	"github.com/google/uuid"

	"ordersaga/events"
)

// maxHandovers bounds how many messages the relay knows from their writers and has not met in the log. Beyond it the log alone tells.
const maxHandovers = 1 << 16

// handover is a message that its writer has told the relay of, until both the writer and the log are done with it. The log stays what decides:
// every row is met there in its turn, and only then does the cursor pass it. What was produced before that moment is not produced again.
type handover struct {
	m     *Message
	state handoverState
	err   error  // why it failed
	shard *shard // whose track waits for the answer, since the log met it in flight
	entry int    // its number there
}

type handoverState int8

const (
	announced handoverState = iota // its transaction is about to commit
	met                            // the log was faster than its writer: it was produced from there
	left                           // committed, and left to the log
	handed                         // committed, and at the producer
	delivered
	returned // the producer gave it back
)

// Announce tells the relay of messages whose transaction is about to commit in this process, in order. done must be called once, with whether it
// is known to have committed. Then those that are urgent go to the producer at once, for shards that this relay holds: nobody
// waits for a window, and none needs to be opened for them alone. A message that is not announced, or whose writer dies before it says
// done, is found in the log like any other.
func (r *Relay) Announce(ms []Message) (done func(committed bool)) {
	r.mu.Lock()
	defer r.mu.Unlock()
	own := make([]handover, 0, len(ms))
	now := time.Now()
	for i := range ms {
		if len(r.handovers) >= maxHandovers {
			break
		}
		if !r.reads(ms[i].Shard, now) {
			continue
		}
		own = append(own, handover{m: &ms[i]})
		r.handovers[ms[i].ID] = &own[len(own)-1]
	}
	if n := len(r.handovers); n >= company && n-len(own) < company {
		signal(r.nudge)
	}
	all := len(own) == len(ms)
	return func(committed bool) { r.written(own, committed, all) }
}

// reads reports that a shard is read by this relay and nothing stands in its way. The lock is held.
func (r *Relay) reads(id int16, now time.Time) bool {
	s, ok := r.shards[id]
	return ok && s.state == reading && !s.giveBack && now.Before(r.valid)
}

func (r *Relay) written(own []handover, committed, all bool) { r.send(r.judge(own, committed, all)) }

// judge decides what becomes of the messages of a transaction that has ended, and answers what is to be produced now.
func (r *Relay) judge(own []handover, committed, all bool) (due []*handover) {
	r.mu.Lock()
	defer r.mu.Unlock()
	now := time.Now()
	w := wantNothing
	for i := range own {
		h := &own[i]
		t := typeOf(h.m)
		switch {
		case !committed || h.state == met: // if it has committed after all, the log has it
			r.forgetHandover(h)
		case t.Urgent && !h.m.Settled && r.reads(h.m.Shard, now) && r.roomy():
			h.state = handed
			r.inFlight++
			r.bytes += len(h.m.Payload)
			r.add(h, t, now)
			w = max(w, wantCursors)
		default:
			h.state = left
			w = wantRows
		}
	}
	if committed && !all {
		w = wantRows
	}
	r.wants(w, now)
	return r.leave(now)
}

// leaving is what was handed over and goes at a common moment.
type leaving struct {
	queue []*handover
	due   time.Time // when the queue goes; meaningless while it is empty
	timer *time.Timer
}

// The lines in which urgent messages wait for company: what goes to one reader goes together.
const (
	lineOpening = iota // commands with which orders begin; before the stock's, which follows it
	lineStock
	linePayment
	lineReplies
	numLines
)

func lineOf(t *events.Type) int {
	switch {
	case t.Opens:
		return lineOpening
	case t.Topic == events.TopicStock:
		return lineStock
	case t.Topic == events.TopicPayment:
		return linePayment
	default:
		return lineReplies
	}
}

// add has a message wait for others as long as its type lets it. The lock is held.
func (r *Relay) add(h *handover, t *events.Type, now time.Time) {
	l := &r.leaving[lineOf(t)]
	at := now.Add(t.Joins)
	switch {
	case t.Opens:
		r.opening.came(now)
		if len(l.queue)+1 < r.opening.party(r.cfg.OpenWithin) {
			at = now.Add(r.cfg.OpenWithin)
		}
	case l == &r.leaving[lineStock]: // when its order begins, leave sees to it
		at = at.Add(r.cfg.OpenWithin)
	}
	if len(l.queue) == 0 || at.Before(l.due) {
		l.due = at
	}
	l.queue = append(l.queue, h)
}

// arrivals is how fast orders come.
type arrivals struct {
	last time.Time
	gap  time.Duration // between two of them, of late
}

func (a *arrivals) came(now time.Time) {
	a.gap += (min(now.Sub(a.last), time.Second) - a.gap) / 8
	a.last = now
}

// party is how many orders begin together: as many as come in half the time that one may wait for others, and it. Where few come nobody waits.
func (a *arrivals) party(within time.Duration) int {
	if within <= 0 {
		return 1
	}
	return 1 + min(offerAtMost, int((within/2+a.gap/2)/max(a.gap, 1)))
}

// leave answers what is due, or sees to it that it goes when it is. The lock is held.
func (r *Relay) leave(now time.Time) (due []*handover) {
	for i := range r.leaving {
		l := &r.leaving[i]
		if len(l.queue) == 0 {
			continue
		}
		if wait := l.due.Sub(now); wait > 0 {
			if l.timer == nil {
				l.timer = time.AfterFunc(wait, r.leaveLate)
			} else {
				l.timer.Reset(wait)
			}
			continue
		}
		due = append(due, l.queue...)
		l.queue = nil
		if i == lineOpening {
			stock := &r.leaving[lineStock]
			stock.due = earlier(stock.due, now.Add(reserve.Joins))
		}
	}
	return due
}

// reserve is the command of an order that is carried out while its payment's call is under way: in company, and out of the way of that.
var reserve, _ = events.TypeOf(events.TReserveStock)

func (r *Relay) leaveLate() {
	r.mu.Lock()
	due := r.leave(time.Now())
	r.mu.Unlock()
	r.send(due)
}

// offerAtMost is how many messages go to readers at a time: more are worth their way through Kafka, which is where they should queue.
const offerAtMost = 32

// send hands each message to its reader in this process, if there is one that takes it, and to the producer. What a reader has taken can wait for
// the log, where it goes to the producer with others.
func (r *Relay) send(due []*handover) {
	records := make([]events.Record, len(due))
	taken := make([]bool, len(due))
	early, offer := 0, r.cfg.Offer != nil && len(due) <= offerAtMost
	for i, h := range due {
		var err error
		if records[i], err = h.m.Record(); err != nil {
			due[i] = nil
			r.answered(h, err)
			continue
		}
		if taken[i] = offer && r.cfg.Offer(records[i]); taken[i] {
			early++
		}
	}
	if early > 0 {
		r.leaveToTheLog(due, taken, early)
	}
	for i, h := range due {
		if h != nil && !taken[i] {
			r.producer.Produce(r.produce, records[i], func(err error) { r.answered(h, err) })
		}
	}
}

// leaveToTheLog gives back the messages that a reader has taken. One that the log has met already, and waits for, goes to the producer at once.
func (r *Relay) leaveToTheLog(due []*handover, taken []bool, early int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.early += early
	for i, h := range due {
		switch {
		case !taken[i]:
		case h.shard != nil:
			taken[i] = false
		default:
			h.state = left
			r.inFlight--
			r.bytes -= len(h.m.Payload)
			r.wants(wantRows, time.Now())
		}
	}
	if r.roomy() {
		signal(r.room)
	}
}

// wants has the log read within the time that a want stands for. The lock is held.
func (r *Relay) wants(w want, now time.Time) {
	if w > r.want {
		r.want, r.wantSince = w, now
		signal(r.nudge)
	}
}

var patient events.Type // what is raw, and what we do not know

func typeOf(m *Message) *events.Type {
	if t, ok := events.TypeOf(m.Type); ok {
		return t
	}
	return &patient
}

// forgetHandover also deals with an id that was announced twice: the later one stays. The lock is held.
func (r *Relay) forgetHandover(h *handover) {
	if r.handovers[h.m.ID] == h {
		delete(r.handovers, h.m.ID)
	}
}

// forgetHandovers forgets those of a shard that is another relay's now. The lock is held.
func (r *Relay) forgetHandovers(shard int16) {
	for id, h := range r.handovers {
		if h.m.Shard == shard {
			delete(r.handovers, id)
		}
	}
}

// meet is the log meeting a message: it answers the handover whose record stands for it, or nil if it is to be produced from the log, and whether the
// message was announced here at all. The lock is held.
func (r *Relay) meet(id uuid.UUID) (h *handover, known bool) {
	h, known = r.handovers[id]
	switch {
	case !known:
		return nil, false
	case h.state == announced:
		h.state = met
		return nil, true
	}
	delete(r.handovers, id)
	if h.state == left || h.state == met { // met before: the shard was read again from its stored cursor
		return nil, true
	}
	return h, true
}

// attach makes a track's entry wait for a handover's answer, or takes it if it is there. The lock is held.
func (r *Relay) attach(h *handover, s *shard, entry int) {
	switch h.state {
	case delivered:
		s.track.settle(entry)
	case returned:
		s.track.fail(entry, &failure{h.m, h.err})
		if s.state == reading {
			s.stop(failing)
		}
		signal(r.tend)
	default:
		h.shard, h.entry = s, entry
	}
}

// answered takes the producer's answer for a message that was handed over.
func (r *Relay) answered(h *handover, err error) {
	r.mu.Lock()
	if err == nil {
		r.direct++
	}
	if s := h.shard; s != nil {
		r.mu.Unlock()
		r.settle(s, h.entry, h.m, err)
		return
	}
	defer r.mu.Unlock()
	h.state, h.err = delivered, err
	if err != nil {
		h.state = returned
	} else {
		r.acked++
	}
	r.inFlight--
	r.bytes -= len(h.m.Payload)
	if r.roomy() {
		signal(r.room)
	}
}
