package saga

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/cockroachdb/datadriven"
	"github.com/stretchr/testify/require"

	"ordersaga/domain"
)

// TestScenarios plays the files of testdata: a line is an input, its answer what the machine decided. `new` begins a saga; run with
// -rewrite after a change that is meant, and read the difference.
func TestScenarios(t *testing.T) {
	datadriven.Walk(t, "testdata/scenarios", func(t *testing.T, path string) {
		t.Helper()
		def := OrderV1(DefaultLimits)
		s := def.New()
		datadriven.RunTest(t, path, func(t *testing.T, d *datadriven.TestData) string {
			t.Helper()
			switch d.Cmd {
			case "new":
				s = def.New()
			case "feed":
			default:
				t.Fatalf("unknown directive %q", d.Cmd)
			}
			var out strings.Builder
			for line := range strings.Lines(d.Input) {
				in, err := parseInput(strings.TrimSpace(line))
				require.NoError(t, err)
				before := s.clone()
				o, err := def.Step(s, in)
				require.Equal(t, before, s, "the machine changed its argument")
				if err != nil {
					fmt.Fprintf(&out, "error: %v\n", err)
					continue
				}
				out.WriteString(describe(def, s, o))
				s = o.State
			}
			return out.String()
		})
	})
}

// parseInput reads: done NAME, refused NAME, undone NAME, stalled NAME REASON…, invalid REASON, took OWNER, or a bare input.
func parseInput(line string) (Input, error) {
	verb, rest, _ := strings.Cut(line, " ")
	name, more, _ := strings.Cut(rest, " ")
	switch verb {
	case "done":
		return Input{Kind: StepDone, Name: name}, nil
	case "refused":
		return Input{Kind: StepRefused, Name: name}, nil
	case "undone":
		return Input{Kind: UndoDone, Name: name}, nil
	case "stalled":
		return Input{Kind: StepStalled, Name: name, Reason: more}, nil
	case "took":
		return Input{Kind: OperatorTook, Owner: name}, nil
	case "not-placed":
		return Input{Kind: PlacementRefused, Name: name}, nil
	case "start":
		return Input{Kind: Started}, nil
	case "cancel":
		return Input{Kind: CancelRequested}, nil
	case "expired":
		return Input{Kind: DeadlineExpired}, nil
	case "held":
		return Input{Kind: DeadlineHeld}, nil
	case "retry":
		return Input{Kind: OperatorRetry}, nil
	case "nonsense":
		return Input{Kind: "nonsense"}, nil
	}
	return Input{}, fmt.Errorf("no input reads %q", line)
}

func describe(def *Definition, before State, o Output) string {
	if !o.Changed {
		return fmt.Sprintf("v%d: nothing changes\n", before.Version)
	}
	var b strings.Builder
	s := o.State
	fmt.Fprintf(&b, "v%d %s %s", s.Version, s.Phase, s.Status)
	if s.Reason != "" {
		fmt.Fprintf(&b, "(%s)", s.Reason)
	}
	fmt.Fprintf(&b, " steps=%s undos=%s", letters(s.Steps), letters(s.Undos))
	if s.Cancel {
		b.WriteString(" cancel-waits")
	}
	if s.Stuck != nil {
		fmt.Fprintf(&b, " stuck=%q", s.Stuck.Reason)
		if s.Stuck.Owner != "" {
			b.WriteString(" owner=" + s.Stuck.Owner)
		}
	}
	for _, n := range o.Facts {
		fmt.Fprintf(&b, "\n   tell %s", n)
	}
	for _, n := range o.Commands {
		fmt.Fprintf(&b, "\n   send %s", n)
	}
	switch {
	case o.Timer.Change && o.Timer.After > 0:
		fmt.Fprintf(&b, "\n   deadline in %s", o.Timer.After)
	case o.Timer.Change:
		b.WriteString("\n   no deadline")
	}
	return b.String() + "\n"
}

func letters(ps []Progress) string {
	b := make([]byte, len(ps))
	for i, p := range ps {
		b[i] = byte(p)
	}
	return string(b)
}

// allInputs is one of each input that could ever come, those that make no sense for the state included.
func allInputs(def *Definition) []Input {
	ins := []Input{
		{Kind: Started},
		{Kind: CancelRequested},
		{Kind: DeadlineExpired},
		{Kind: DeadlineHeld},
		{Kind: OperatorRetry},
		{Kind: OperatorTook, Owner: "ann"},
		{Kind: PlacementRefused, Name: string(domain.PriceChanged)},
	}
	for _, st := range def.Steps {
		ins = append(ins, Input{Kind: StepDone, Name: st.Name}, Input{Kind: StepRefused, Name: st.Name}, Input{Kind: StepStalled, Name: st.Name, Reason: "late"})
	}
	for _, u := range def.Undos {
		ins = append(ins, Input{Kind: UndoDone, Name: string(u.Participant)}, Input{Kind: StepStalled, Name: string(u.Participant), Reason: "late"})
	}
	return ins
}

// TestEveryInputInEveryState walks all states that any sequence of inputs leads to and holds each move against what is promised.
func TestEveryInputInEveryState(t *testing.T) {
	def := OrderV1(DefaultLimits)
	type node struct {
		s     State
		timed bool // a deadline runs
	}
	name := func(n node) string {
		x := n.s
		stuck := ""
		if x.Stuck != nil {
			stuck = x.Stuck.Reason + "/" + x.Stuck.Owner
		}
		return fmt.Sprint(x.Phase, x.Status, x.Reason, letters(x.Steps), letters(x.Undos), x.Cancel, stuck, n.timed, x.Version == 0)
	}
	start := node{s: def.New()}
	seen := map[string]bool{name(start): true}
	queue := []node{start}
	ins := allInputs(def)
	for len(queue) > 0 {
		n := queue[0]
		queue = queue[1:]
		for _, in := range ins {
			o, err := def.Step(n.s, in)
			require.NoError(t, err)
			if !o.Changed {
				require.Equal(t, n.s, o.State)
				require.Empty(t, o.Commands)
				require.Empty(t, o.Facts)
				require.Zero(t, o.Timer)
				continue
			}
			holdMove(t, def, n.s, in, o)
			next := node{s: o.State, timed: n.timed}
			if o.Timer.Change {
				next.timed = o.Timer.After > 0
			}
			require.Equal(t, !next.s.Phase.Ended(), next.timed, "an unfinished saga has a deadline, an ended one has none: %s after %+v", name(next), in)
			if !seen[name(next)] {
				seen[name(next)] = true
				queue = append(queue, next)
			}
		}
	}
	t.Logf("%d states", len(seen))
	require.Greater(t, len(seen), 50)
}

// holdMove checks one move.
func holdMove(t *testing.T, def *Definition, before State, in Input, o Output) {
	t.Helper()
	after := o.State
	require.Equal(t, before.Version+1, after.Version)
	require.EqualValues(t, len(o.Facts), after.Sequence-before.Sequence)
	require.False(t, before.Phase.Ended(), "an ended saga moved on %+v", in)
	if before.Status.Terminal() {
		require.Equal(t, before.Status, after.Status, "the end of an order changed on %+v", in)
		require.Equal(t, before.Reason, after.Reason)
	}
	require.Equal(t, before.Version > 0 && before.Status.Terminal() || after.Status == domain.Pending, before.Status == after.Status)
	if after.Status == domain.Confirmed {
		require.Contains(t, []Phase{Running, Completed}, after.Phase)
		require.Equal(t, Done, after.Steps[2], "confirmed without the money")
	}
	if after.Status == domain.Rejected || after.Status == domain.Cancelled {
		require.Contains(t, []Phase{Compensating, Compensated}, after.Phase)
		for i, u := range def.Undos { // F11: whatever was commanded is undone, whether it answered or not
			for j, st := range def.Steps {
				if st.Participant == u.Participant && after.Steps[j] != Idle {
					require.NotEqual(t, Idle, after.Undos[i], "%s was commanded and is not undone", st.Name)
				}
			}
		}
		require.NotEqual(t, Commanded, after.Steps[3], "stock was sold of an order that ended otherwise")
	}
	sent := map[string]int{}
	for _, n := range o.Commands {
		sent[string(n)]++
		require.Equal(t, 1, sent[string(n)], "%s twice in one decision", n)
	}
	if after.Phase.Ended() {
		require.Empty(t, o.Commands)
		require.Nil(t, after.Stuck, "an ended saga is stuck")
	}
}

func TestF17_NoStateWaitsForEver(t *testing.T) {
	// From every state reachable without the clock, deadlines alone either end the saga or raise the flag within a minute.
	def := OrderV1(DefaultLimits)
	for _, steps := range [][]Input{
		{{Kind: Started}},
		{{Kind: Started}, {Kind: StepDone, Name: "reserve_stock"}},
		{{Kind: Started}, {Kind: StepDone, Name: "reserve_stock"}, {Kind: StepDone, Name: "authorize_payment"}},
		{{Kind: Started}, {Kind: StepDone, Name: "reserve_stock"}, {Kind: StepDone, Name: "authorize_payment"}, {Kind: StepDone, Name: "capture_payment"}},
		{{Kind: Started}, {Kind: StepRefused, Name: "reserve_stock"}},
		{{Kind: Started}, {Kind: CancelRequested}},
	} {
		s := def.New()
		for _, in := range steps {
			o, err := def.Step(s, in)
			require.NoError(t, err)
			s = o.State
		}
		var waited time.Duration
		for s.Stuck == nil {
			o, err := def.Step(s, Input{Kind: DeadlineExpired})
			require.NoError(t, err)
			require.True(t, o.Changed)
			require.True(t, o.Timer.Change && o.Timer.After > 0 && o.Timer.After < time.Minute, "the next deadline is %v", o.Timer)
			require.NotEmpty(t, o.Commands, "nothing is tried again")
			waited += o.Timer.After
			s = o.State
		}
		require.LessOrEqual(t, waited, 2*time.Minute)
	}
}

func TestStepRefusesAForeignState(t *testing.T) {
	def := OrderV1(DefaultLimits)
	_, err := def.Step(State{Phase: Running}, Input{Kind: Started})
	require.ErrorContains(t, err, "0 steps")
	for _, in := range []Input{{Kind: StepDone, Name: "no"}, {Kind: StepRefused, Name: "no"}, {Kind: UndoDone, Name: "no"}, {Kind: "no"}} {
		_, err := def.Step(def.New(), in)
		require.Error(t, err)
	}
}
