package saga

import (
	"fmt"
	"strings"
	"time"

	"ordersaga/domain"
	"ordersaga/events"
)

// Phase is the state of a saga.
type Phase string

// The phases of a saga.
const (
	Running      Phase = "running"
	Completed    Phase = "completed"
	Compensating Phase = "compensating"
	Compensated  Phase = "compensated"
)

// Ended reports that nothing will be commanded any more.
func (p Phase) Ended() bool { return p == Completed || p == Compensated }

// Progress is how far a step or an undo is, as stored: one letter.
type Progress byte

// The progress of a step or of an undo.
const (
	Idle      Progress = '-' // not commanded
	Commanded Progress = 'c'
	Done      Progress = 'd'
	Refused   Progress = 'r' // steps only
)

func (p Progress) String() string {
	switch p {
	case Idle:
		return "idle"
	case Commanded:
		return "commanded"
	case Done:
		return "done"
	case Refused:
		return "refused"
	}
	return fmt.Sprintf("invalid(%q)", byte(p))
}

// Stuck says why a saga stands still and who looks after it. The database adds since when.
type Stuck struct {
	Reason string // one line
	Owner  string
	Since  time.Time // database time of the flag; set by the store, kept while the flag stands
}

// State is all that the machine knows of a saga.
type State struct {
	Definition string
	DefVersion int16
	Version    int32 // grows by one with every change
	Phase      Phase
	Steps      []Progress // in the definition's order
	Undos      []Progress // in the definition's order
	Cancel     bool       // a cancel waits for the pivot's outcome
	Stuck      *Stuck

	Status   domain.Status // of the order
	Reason   domain.Reason
	Sequence int32 // public events so far
}

func (s State) clone() State {
	both := make([]Progress, 0, len(s.Steps)+len(s.Undos)) // of a handful of bytes: one allocation
	both = append(append(both, s.Steps...), s.Undos...)
	n := len(s.Steps)
	s.Steps, s.Undos = both[:n:n], both[n:]
	if s.Stuck != nil {
		x := *s.Stuck
		s.Stuck = &x
	}
	return s
}

// InputKind is what may happen to a saga.
type InputKind string

// The inputs.
const (
	Started          InputKind = "started"           // the order was accepted
	StepDone         InputKind = "step_done"         // Name: the step
	StepRefused      InputKind = "step_refused"      // Name: the step
	UndoDone         InputKind = "undo_done"         // Name: the participant
	StepStalled      InputKind = "step_stalled"      // Name: the step or participant; Reason: why
	PlacementRefused InputKind = "placement_refused" // Name: the domain.Reason; the order was asked for and can't be placed
	CancelRequested  InputKind = "cancel_requested"  // by the customer or a producer
	DeadlineExpired  InputKind = "deadline_expired"
	DeadlineHeld     InputKind = "deadline_held"  // the deadline came while what the saga waits for is known to be away: it waits on
	OperatorRetry    InputKind = "operator_retry" // command again what is outstanding
	OperatorTook     InputKind = "operator_took"  // Owner
)

// Input is one thing that happened.
type Input struct {
	Kind   InputKind
	Name   string
	Reason string // one line, for the history and the stuck flag
	Owner  string // OperatorTook
}

// Timer is what becomes of the saga's deadline.
type Timer struct {
	Change bool
	After  time.Duration // from the database's now; 0 with Change: no deadline any more
}

// Output is what the machine decided.
type Output struct {
	State    State
	Changed  bool          // anything at all; if not, the rest is empty and the input was a duplicate or came late
	Commands []events.Name // to be emitted, in order
	Facts    []events.Name // public events, in order; Sequence counts them
	Timer    Timer
}

// machine is one decision in progress; its methods are the only writers of State.
type machine struct {
	def *Definition
	s   State
	out Output
}

// New is the state of a saga before its Started input.
func (d *Definition) New() State {
	s := State{
		Definition: d.Name, DefVersion: d.Version, Phase: Running, Status: domain.Pending,
		Steps: make([]Progress, len(d.Steps)), Undos: make([]Progress, len(d.Undos)),
	}
	for i := range s.Steps {
		s.Steps[i] = Idle
	}
	for i := range s.Undos {
		s.Undos[i] = Idle
	}
	return s
}

// Step answers an input in any state. It is pure: the same state and input give the same output, and s is not changed. An error
// means that the input can never be meant for this saga (no such step), or that the state is not one of this definition.
func (d *Definition) Step(s State, in Input) (Output, error) {
	if len(s.Steps) != len(d.Steps) || len(s.Undos) != len(d.Undos) {
		return Output{}, fmt.Errorf("saga state has %d steps and %d undos, definition %s v%d has %d and %d",
			len(s.Steps), len(s.Undos), d.Name, d.Version, len(d.Steps), len(d.Undos))
	}
	m := &machine{def: d, s: s.clone()}
	if err := m.take(in); err != nil {
		return Output{}, err
	}
	if !m.out.Changed {
		return Output{State: s}, nil
	}
	m.s.Version++
	m.out.State = m.s
	return m.out, nil
}

func (m *machine) take(in Input) error {
	switch in.Kind {
	case Started:
		m.start()
	case StepDone, StepRefused:
		i := m.def.step(in.Name)
		if i < 0 {
			return fmt.Errorf("definition %s v%d has no step %q", m.def.Name, m.def.Version, in.Name)
		}
		if in.Kind == StepDone {
			m.done(i)
		} else {
			m.refused(i)
		}
	case UndoDone:
		i := m.def.undo(Participant(in.Name))
		if i < 0 {
			return fmt.Errorf("definition %s v%d has no participant %q", m.def.Name, m.def.Version, in.Name)
		}
		m.undone(i)
	case StepStalled:
		m.stalled(in)
	case PlacementRefused:
		m.placementRefused(domain.Reason(in.Name))
	case CancelRequested:
		m.cancel()
	case DeadlineExpired:
		m.expired()
	case DeadlineHeld:
		m.held()
	case OperatorRetry:
		m.operatorRetry()
	case OperatorTook:
		m.operatorTook(in.Owner)
	default:
		return fmt.Errorf("unknown saga input %q", in.Kind)
	}
	return nil
}

func (m *machine) change() { m.out.Changed = true }

func (m *machine) timer(d time.Duration) { m.out.Timer = Timer{Change: true, After: d} }

func (m *machine) fact(n events.Name) {
	m.s.Sequence++
	m.out.Facts = append(m.out.Facts, n)
}

// start commands the first wave. A saga that was started, or cancelled before it was seen, stays as it is.
func (m *machine) start() {
	if m.s.Version > 0 {
		return
	}
	m.change()
	m.fact(events.TOrderPlaced)
	m.timer(m.def.Limits.Forward)
	m.command(0)
}

// placementRefused ends a saga that never commanded anything.
func (m *machine) placementRefused(why domain.Reason) {
	if m.s.Version > 0 {
		return
	}
	m.change()
	m.compensate(domain.Rejected, why)
}

func (m *machine) command(wave int) {
	for i, st := range m.def.Steps {
		if st.Wave == wave && m.s.Steps[i] == Idle {
			m.s.Steps[i] = Commanded
			m.out.Commands = append(m.out.Commands, st.Command)
		}
	}
}

func (m *machine) done(i int) {
	if m.s.Phase != Running || m.s.Steps[i] != Commanded {
		return // a duplicate; or late, and then the undo that was commanded decides
	}
	m.change()
	m.s.Steps[i] = Done
	m.unstick()
	st := m.def.Steps[i]
	if st.Kind == Pivot {
		if m.s.Cancel {
			m.compensate(domain.Cancelled, domain.CancelledByCustomer)
			return
		}
		m.s.Status = domain.Confirmed
		m.fact(events.TOrderConfirmed)
		m.timer(m.def.Limits.Retriable)
	}
	for j, o := range m.def.Steps {
		if o.Wave == st.Wave && m.s.Steps[j] != Done {
			return
		}
	}
	if m.lastWave() == st.Wave {
		m.s.Phase = Completed
		m.timer(0)
		return
	}
	m.command(st.Wave + 1)
}

func (m *machine) lastWave() int { return m.def.Steps[len(m.def.Steps)-1].Wave }

func (m *machine) refused(i int) {
	if m.s.Phase != Running || m.s.Steps[i] != Commanded || m.def.Steps[i].Refused == "" {
		return
	}
	m.change()
	m.s.Steps[i] = Refused
	if m.s.Cancel {
		m.compensate(domain.Cancelled, domain.CancelledByCustomer)
		return
	}
	m.compensate(domain.Rejected, m.def.Steps[i].Reason)
}

// compensate ends the order and commands one undo for every participant of which a step was commanded, answered or not.
func (m *machine) compensate(st domain.Status, why domain.Reason) {
	m.s.Phase, m.s.Status, m.s.Reason, m.s.Cancel, m.s.Stuck = Compensating, st, why, false, nil
	if st == domain.Cancelled {
		m.fact(events.TOrderCancelled)
	} else {
		m.fact(events.TOrderRejected)
	}
	for i, u := range m.def.Undos {
		for j, step := range m.def.Steps {
			if step.Participant == u.Participant && m.s.Steps[j] != Idle {
				m.s.Undos[i] = Commanded
				m.out.Commands = append(m.out.Commands, u.Command)
				break
			}
		}
	}
	m.timer(m.def.Limits.Compensating)
	m.finishUndo()
}

func (m *machine) undone(i int) {
	if m.s.Phase != Compensating || m.s.Undos[i] != Commanded {
		return
	}
	m.change()
	m.s.Undos[i] = Done
	m.unstick()
	m.finishUndo()
}

func (m *machine) finishUndo() {
	for _, u := range m.s.Undos {
		if u == Commanded {
			return
		}
	}
	m.s.Phase = Compensated
	m.timer(0)
}

// stalled flags the saga if what stalled is what it waits for.
func (m *machine) stalled(in Input) {
	if m.s.Phase.Ended() || m.s.Stuck != nil && m.s.Stuck.Reason == in.Reason {
		return
	}
	if i := m.def.step(in.Name); i >= 0 && m.s.Phase == Running && m.s.Steps[i] == Commanded {
		m.stick(in.Reason)
	}
	if i := m.def.undo(Participant(in.Name)); i >= 0 && m.s.Phase == Compensating && m.s.Undos[i] == Commanded {
		m.stick(in.Reason)
	}
}

// stick raises the flag, or brings its reason up to date; who looks after the saga and since when stay.
func (m *machine) stick(why string) {
	m.change()
	if m.s.Stuck == nil {
		m.s.Stuck = &Stuck{}
	}
	m.s.Stuck.Reason = why
}

// unstick clears the flag after a fact, unless its reason names a command that is still waited for: stock given back does not mean
// that the money is, and whoever looks after it keeps doing so.
func (m *machine) unstick() {
	if m.s.Stuck == nil {
		return
	}
	for _, n := range m.outstanding() {
		if strings.Contains(m.s.Stuck.Reason, string(n)) {
			return
		}
	}
	m.s.Stuck = nil
}

// outstanding lists the commands that the saga waits for.
func (m *machine) outstanding() []events.Name {
	var out []events.Name
	if m.s.Phase == Running {
		for i, p := range m.s.Steps {
			if p == Commanded {
				out = append(out, m.def.Steps[i].Command)
			}
		}
	}
	if m.s.Phase == Compensating {
		for i, p := range m.s.Undos {
			if p == Commanded {
				out = append(out, m.def.Undos[i].Command)
			}
		}
	}
	return out
}

func (m *machine) pivotCommanded() bool {
	for i, st := range m.def.Steps {
		if st.Kind == Pivot && m.s.Steps[i] == Commanded {
			return true
		}
	}
	return false
}

// cancel before the pivot was commanded compensates at once; after, the pivot's outcome decides. A confirmed order stays.
func (m *machine) cancel() {
	if m.s.Version == 0 { // a tombstone: cancelled before it was placed, nothing was commanded
		m.change()
		m.fact(events.TOrderPlaced)
		m.compensate(domain.Cancelled, domain.CancelledByCustomer)
		return
	}
	if m.s.Phase != Running || m.s.Status != domain.Pending || m.s.Cancel {
		return
	}
	m.change()
	if m.pivotCommanded() {
		m.s.Cancel = true
		return
	}
	m.compensate(domain.Cancelled, domain.CancelledByCustomer)
}

// expired: before the order is confirmed it is given up; after, and while undoing, what is outstanding is commanded again.
func (m *machine) expired() {
	switch {
	case m.s.Phase.Ended() || m.s.Version == 0:
	case m.s.Phase == Running && m.s.Status == domain.Pending && m.s.Cancel:
		m.change()
		m.compensate(domain.Cancelled, domain.CancelledByCustomer)
	case m.s.Phase == Running && m.s.Status == domain.Pending:
		m.change()
		m.compensate(domain.Rejected, domain.TimedOut)
	default:
		m.overdue()
	}
}

// What a stall notice says of its command; see stallReason.
const (
	waitsAtSlowest = " waits at the slowest retry tier"
	isDead         = " is a dead letter"
)

// overdue commands again what is outstanding and silent. What waits at the slowest tier, or lies in the dead letters, is not lost: a
// repetition would stay there beside the first, for ever, and a day of them would keep the gateway busy with one order. A copy that
// waits says so again with each failure, well before the next deadline of a stuck saga; if it does not, it is silent then. A dead
// letter is an operator's, to be replayed or, with a retry of the saga, commanded anew.
func (m *machine) overdue() {
	before, pause := "", m.phaseLimit()
	if m.s.Stuck != nil {
		before, pause = m.s.Stuck.Reason, max(pause, m.def.Limits.Forward)
	}
	waited, keep := m.outstanding(), false
	for _, n := range waited {
		switch {
		case strings.Contains(before, string(n)+isDead):
			keep = true
		case !strings.Contains(before, string(n)+waitsAtSlowest):
			m.out.Commands = append(m.out.Commands, n)
		}
	}
	m.timer(pause)
	if !keep {
		before = "no answer in time: " + join(waited)
	}
	m.stick(before)
}

// phaseLimit is how long an answer may take after the pivot or while undoing.
func (m *machine) phaseLimit() time.Duration {
	if m.s.Phase == Compensating {
		return m.def.Limits.Compensating
	}
	return m.def.Limits.Retriable
}

func join(names []events.Name) string {
	var b strings.Builder
	for i, n := range names {
		if i > 0 {
			b.WriteString(", ")
		}
		b.WriteString(string(n))
	}
	return b.String()
}

// again commands what is outstanding once more (the messages get new ids) and sets the phase's deadline anew.
//
// Before the pivot the deadline stays: it was set once.
func (m *machine) again() {
	m.out.Commands = append(m.out.Commands, m.outstanding()...)
	if m.s.Phase == Compensating || m.s.Status == domain.Confirmed {
		m.timer(m.phaseLimit())
	}
}

// held gives a saga that waits for the pivot, or for what comes before it, its time once more. What it waits for is commanded again:
// the commands that wait for the dependency too may be too old to act by the time it is back.
func (m *machine) held() {
	if m.s.Version == 0 || m.s.Phase != Running || m.s.Status != domain.Pending {
		return
	}
	m.again()
	m.timer(m.def.Limits.Forward)
	m.stick("waits for a dependency that is away")
}

func (m *machine) operatorRetry() {
	if m.s.Phase.Ended() || m.s.Version == 0 {
		return
	}
	m.change()
	m.s.Stuck = nil // by a recorded decision; it is raised again if the saga stands still again
	m.again()
}

func (m *machine) operatorTook(owner string) {
	if m.s.Stuck == nil || m.s.Stuck.Owner == owner {
		return
	}
	m.change()
	m.s.Stuck.Owner = owner
}

// Waits lists the steps and participants that the saga waits for, by name.
func (d *Definition) Waits(s State) []string {
	var out []string
	if s.Phase == Running {
		for i, p := range s.Steps {
			if p == Commanded {
				out = append(out, d.Steps[i].Name)
			}
		}
	}
	if s.Phase == Compensating {
		for i, p := range s.Undos {
			if p == Commanded {
				out = append(out, string(d.Undos[i].Participant))
			}
		}
	}
	return out
}

func (d *Definition) step(name string) int {
	for i := range d.Steps {
		if d.Steps[i].Name == name {
			return i
		}
	}
	return -1
}

func (d *Definition) undo(p Participant) int {
	for i := range d.Undos {
		if d.Undos[i].Participant == p {
			return i
		}
	}
	return -1
}

// InputOf translates a reply to what it means for a saga of this definition. ok is false for a message that is no reply of its.
func (d *Definition) InputOf(n events.Name, data any) (in Input, ok bool) {
	if st, is := data.(*events.StepStalled); is {
		in = Input{Kind: StepStalled, Reason: stallReason(st)}
		for i := range d.Steps {
			if string(d.Steps[i].Command) == st.GetCommand() {
				in.Name = d.Steps[i].Name
				return in, true
			}
		}
		for i := range d.Undos {
			if string(d.Undos[i].Command) == st.GetCommand() {
				in.Name = string(d.Undos[i].Participant)
				return in, true
			}
		}
		return Input{}, false
	}
	for i := range d.Steps {
		switch n {
		case d.Steps[i].Done:
			return Input{Kind: StepDone, Name: d.Steps[i].Name}, true
		case d.Steps[i].Refused:
			return Input{Kind: StepRefused, Name: d.Steps[i].Name}, true
		}
	}
	for i := range d.Undos {
		if n == d.Undos[i].Done {
			return Input{Kind: UndoDone, Name: string(d.Undos[i].Participant)}, true
		}
	}
	return Input{}, false
}

func stallReason(st *events.StepStalled) string {
	where := waitsAtSlowest
	if st.GetDead() {
		where = isDead
	}
	return fmt.Sprintf("%s%s after %d attempts: %s", st.GetCommand(), where, st.GetAttempts(), st.GetError())
}
