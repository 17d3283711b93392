package outbox

import (
	"maps"
	"slices"
	"time"
)

// shard is a leased shard: how far it was read, how far the broker has it, how far that is stored. The relay's lock guards it.
type shard struct {
	id     int16
	fence  int64
	read   Cursor // where its next window begins
	stored Cursor
	track  track
	state  shardState
	// gen grows whenever the shard must not go on in the window that is open: rows were skipped, so what follows them must be too.
	gen      int
	giveBack bool // above the fair share: read no further, release when drained

	resumeAt time.Time // after a failure
	failures int       // in a row, without an acknowledgement in between
	behind   time.Time // since when stored is behind read; zero if it is level
}

type shardState int8

const (
	reading   shardState = iota
	failing              // a record came back: nothing more is handed over; when nothing is in flight it is repaired
	repairing            // a goroutine deals with the record that came back
	forgotten            // its cursor in memory is not to be trusted: when nothing is in flight the stored one is asked for
	gone                 // another relay has it
)

// stop makes a shard read no further, for the reason that state tells.
func (s *shard) stop(state shardState) {
	s.state = state
	s.gen++
}

// task is what a shard wants that does not read on.
type task int8

const (
	noTask task = iota
	repairTask
	releaseTask
	forgetTask
)

// task decides what is to be done with a shard now: nothing as long as something of it is in flight.
func (s *shard) task() task {
	switch {
	case s.track.inFlight > 0:
		return noTask
	case s.state == failing:
		return repairTask
	case s.state == forgotten:
		return forgetTask
	case s.state == reading && s.giveBack:
		return releaseTask
	default:
		return noTask
	}
}

// due reports that a shard's cursor wants to be stored. Windows that found nothing move the cursor too; that alone is stored rarely.
func (s *shard) due(idle bool) bool {
	if s.track.acked == s.stored {
		return false
	}
	return s.track.rows > 0 || s.stored.Next != "" || s.giveBack || s.state == forgotten || idle
}

// assign applies a grant: which leases are new, which shards are lost, and which of those held are above the share.
func assign(held map[int16]*shard, g Grant) (added []Lease, lost []*shard) {
	granted := make(map[int16]bool, len(g.Leases))
	for _, l := range g.Leases {
		granted[l.Shard] = true
		s, ok := held[l.Shard]
		if ok && s.fence == l.Fence {
			continue
		}
		if ok { // lost and won back between two calls
			lost = append(lost, s)
		}
		added = append(added, l)
	}
	for id, s := range held {
		if !granted[id] {
			lost = append(lost, s)
		}
	}
	return added, lost
}

// share marks the shards above the fair share to be given back: those with the highest numbers, so that the choice is steady.
func share(held map[int16]*shard, n int) {
	for i, id := range slices.Sorted(maps.Keys(held)) {
		s, surplus := held[id], i >= n
		if surplus && !s.giveBack {
			s.gen++ // rows of it are skipped from now on
		}
		s.giveBack = surplus
	}
}

// member is a shard's part in a window: it takes part as long as its gen stays.
type member struct {
	*shard
	gen int
}

// plan makes the spans of the next window: shards by the window they are in. Those in the middle of one window are read together from
// the least of their places; the others skip what they had.
func plan(held map[int16]*shard, now time.Time) (spans []Span, members map[int16]member) {
	type key struct{ prev, next Snapshot }
	at := map[key]int{}
	members = make(map[int16]member, len(held))
	for _, id := range slices.Sorted(maps.Keys(held)) {
		s := held[id]
		if s.state != reading || s.giveBack || now.Before(s.resumeAt) {
			continue
		}
		members[id] = member{s, s.gen}
		k := key{s.read.Prev, s.read.Next}
		i, ok := at[k]
		if !ok {
			i = len(spans)
			at[k] = i
			spans = append(spans, Span{From: s.read})
		}
		spans[i].Shards = append(spans[i].Shards, id)
		spans[i].From.After = min(spans[i].From.After, s.read.After)
	}
	return spans, members
}
