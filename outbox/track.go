package outbox

// track follows the records of one shard from the hand-over to the producer until the broker has them. They are acknowledged in any
// order; the cursor moves over those only that have nothing unacknowledged before them. Not safe for concurrent use.
type track struct {
	entries  []entry
	head     int    // entries before it are done with
	base     int    // number of entries[0]
	acked    Cursor // everything up to here is at the broker
	rows     int    // that acked moved over since rows was last set to 0
	inFlight int
}

type entry struct {
	cursor Cursor // where acked goes when this entry is done
	state  entryState
	failed *failure
}

type entryState int8

const (
	entryInFlight entryState = iota
	entryDone
	entryFailed
	entryMark // no record: a place between records, such as the end of a window
)

// failure is a record that the producer gave back.
type failure struct {
	message *Message
	err     error
}

// push adds a record that is handed over now; its number is for settle or fail.
func (t *track) push(c Cursor) int {
	t.entries = append(t.entries, entry{cursor: c})
	t.inFlight++
	return t.base + len(t.entries) - 1
}

// mark adds a place without a record.
func (t *track) mark(c Cursor) {
	if n := len(t.entries); n > t.head {
		if t.entries[n-1].state == entryMark {
			t.entries[n-1].cursor = c // one mark is as good as many: windows may end without a row
			return
		}
		t.entries = append(t.entries, entry{cursor: c, state: entryMark})
		return
	}
	t.acked = c
}

// settle says that the broker has a record.
func (t *track) settle(n int) {
	t.entries[n-t.base].state = entryDone
	t.inFlight--
	t.advance()
}

// fail says that the producer gave a record back. It stays where it is until it is overcome or the track is reset.
func (t *track) fail(n int, f *failure) {
	e := &t.entries[n-t.base]
	e.state, e.failed = entryFailed, f
	t.inFlight--
}

// failure answers the first record that failed and has nothing unsettled before it; nil if there is none.
func (t *track) failure() *failure {
	if t.head < len(t.entries) && t.entries[t.head].state == entryFailed {
		return t.entries[t.head].failed
	}
	return nil
}

// overcome settles the record that failure answered.
func (t *track) overcome() {
	e := &t.entries[t.head]
	e.state, e.failed = entryDone, nil
	t.advance()
}

// reset forgets everything beyond acked. Nothing may be in flight.
func (t *track) reset() {
	t.base += len(t.entries)
	t.entries, t.head = nil, 0
}

// compactAfter bounds how many entries that are done with are kept for the sake of moving the others rarely.
const compactAfter = 1024

func (t *track) advance() {
	for t.head < len(t.entries) {
		e := &t.entries[t.head]
		if e.state != entryDone && e.state != entryMark {
			break
		}
		if e.state == entryDone {
			t.rows++
		}
		t.acked = e.cursor
		*e = entry{}
		t.head++
	}
	if t.head == len(t.entries) {
		t.base += t.head
		t.entries, t.head = t.entries[:0], 0
	} else if t.head >= compactAfter && t.head > len(t.entries)/2 {
		t.base += t.head
		n := copy(t.entries, t.entries[t.head:])
		clear(t.entries[n:])
		t.entries, t.head = t.entries[:n], 0
	}
}
