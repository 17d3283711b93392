package saga

import (
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"ordersaga/domain"
	"ordersaga/events"
)

// record writes the histories that are not there yet. What is there is never edited: sagas that began under it may still run.
var record = flag.Bool("record", false, "write the recorded histories that are missing")

// history is a saga's course as a build once decided it.
type history struct {
	Definition string
	Version    int16
	Moves      []move
}

type move struct {
	Input    Input
	Version  int32 // of the saga after it; the same as before: nothing changed
	Phase    Phase
	Status   domain.Status
	Reason   domain.Reason `json:",omitempty"`
	Steps    string
	Undos    string
	Cancel   bool   `json:",omitempty"`
	Stuck    string `json:",omitempty"`
	Owner    string `json:",omitempty"`
	Sequence int32
	Commands []events.Name `json:",omitempty"`
	Facts    []events.Name `json:",omitempty"`
	Deadline string        `json:",omitempty"` // set, or none
}

func moved(in Input, o Output) move {
	m := move{
		Input: in, Version: o.State.Version, Phase: o.State.Phase, Status: o.State.Status, Reason: o.State.Reason,
		Steps: letters(o.State.Steps), Undos: letters(o.State.Undos), Cancel: o.State.Cancel, Sequence: o.State.Sequence,
		Commands: o.Commands, Facts: o.Facts,
	}
	if o.State.Stuck != nil {
		m.Stuck, m.Owner = o.State.Stuck.Reason, o.State.Stuck.Owner
	}
	if o.Timer.Change {
		m.Deadline = "none"
		if o.Timer.After > 0 {
			m.Deadline = "set"
		}
	}
	return m
}

// courses are what was recorded, by file name.
var courses = map[string]string{
	"confirmed":               "start|done reserve_stock|done authorize_payment|done authorize_payment|done capture_payment|done commit_stock|done commit_stock", //nolint:dupword // a duplicate is meant
	"out_of_stock":            "start|done authorize_payment|refused reserve_stock|undone stock|done reserve_stock|undone payment",
	"declined":                "start|refused authorize_payment|done reserve_stock|undone payment|undone stock",
	"capture_failed":          "start|done authorize_payment|done reserve_stock|refused capture_payment|undone payment|undone stock",
	"timed_out":               "start|done reserve_stock|expired|done authorize_payment|undone stock|expired|undone payment",
	"cancelled":               "start|done reserve_stock|cancel|undone stock|undone payment|cancel",
	"cancelled_while_capture": "start|done reserve_stock|done authorize_payment|cancel|done capture_payment|undone payment|undone stock",
	"cancelled_before_placed": "cancel|start|cancel",
	"price_changed":           "not-placed price_changed|start",
	"held_then_confirmed":     "start|done reserve_stock|held|done authorize_payment|done capture_payment|expired|retry|done commit_stock",
	"stuck_undo":              "start|refused authorize_payment|stalled payment ReversePayment waits at the slowest retry tier after 5 attempts: 500|took ann|undone stock|expired|retry|undone payment",
}

// TestRecordedHistories replays what earlier builds decided: a saga that began under version 1 goes on as it would have.
func TestRecordedHistories(t *testing.T) {
	dir := filepath.Join("testdata", "histories")
	if *record {
		recordMissing(t, dir)
	}
	files, err := filepath.Glob(filepath.Join(dir, "*.json"))
	require.NoError(t, err)
	require.GreaterOrEqual(t, len(files), len(courses), "histories are missing")
	defs := NewDefinitions(OrderV1(DefaultLimits))
	for _, file := range files {
		t.Run(filepath.Base(file), func(t *testing.T) {
			raw, err := os.ReadFile(file)
			require.NoError(t, err)
			var h history
			require.NoError(t, json.Unmarshal(raw, &h))
			def, err := defs.Of(h.Definition, h.Version)
			require.NoError(t, err, "a definition that sagas may still run under is gone")
			s := def.New()
			for i, want := range h.Moves {
				o, err := def.Step(s, want.Input)
				require.NoError(t, err)
				require.Equal(t, want, moved(want.Input, o), "move %d", i)
				s = o.State
			}
			require.True(t, s.Phase.Ended())
		})
	}
}

func recordMissing(t *testing.T, dir string) {
	t.Helper()
	def := OrderV1(DefaultLimits)
	require.NoError(t, os.MkdirAll(dir, 0o750))
	for name, course := range courses {
		file := filepath.Join(dir, "order-v1-"+name+".json")
		if _, err := os.Stat(file); err == nil {
			continue
		}
		h := history{Definition: def.Name, Version: def.Version}
		s := def.New()
		for line := range strings.SplitSeq(course, "|") {
			in, err := parseInput(line)
			require.NoError(t, err)
			o, err := def.Step(s, in)
			require.NoError(t, err)
			h.Moves = append(h.Moves, moved(in, o))
			s = o.State
		}
		raw, err := json.MarshalIndent(h, "", "  ")
		require.NoError(t, err)
		require.NoError(t, os.WriteFile(file, append(raw, '\n'), 0o600))
	}
}
