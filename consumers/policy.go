package consumers

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime/debug"
	"time"

	"ordersaga/events"
)

// Kind is what becomes of a delivery.
type Kind int8

// The kinds of verdicts.
const (
	Done   Kind = iota // handled, or nothing to do
	Hold               // a dependency is away: try again after Wait, no attempt is spent, no offset passes it
	Again              // transient, tried again here after Wait
	Retry              // transient, a copy goes to tier Tier
	Dead               // dead letter
	Repeat             // a duplicate, or a copy that another copy has replaced: settled without acting
	numKinds
)

func (k Kind) String() string {
	return [numKinds]string{"done", "hold", "again", "retry", "dead", "repeat"}[k]
}

// Verdict is the decision about one delivery.
type Verdict struct {
	Kind       Kind
	Class      string        // Dead: a Class constant
	Dependency string        // Hold: what is away
	Wait       time.Duration // Hold, Again: how long
	Tier       int           // Retry: 1 for the fastest
	Due        time.Time     // Retry: not before
	Stalled    bool          // Retry: all tiers are used up, and the message has no last attempt
	Reason     string        // the error, one clean line of at most MaxErrorBytes
}

// Tried is what Decide knows of a delivery.
type Tried struct {
	Tier    int  // the tier that the copy came from; 0 for an original or a replay
	InPlace int  // tries made here, since it was delivered
	Held    int  // times in a row it was held
	Endless bool // its type has no last attempt
}

// Policy decides. The zero value has no tiers and tries nothing in place: what fails for now is a dead letter.
type Policy struct {
	// Delays of the retry tiers, fastest first.
	Delays []time.Duration
	// InPlace is how often a transient failure is tried again at once, within the delivery, before it goes to a tier. 0 for handlers
	// that do so themselves.
	InPlace int
	// EndlessUnknown keeps messages of unknown type at the slowest tier, as a rolling upgrade may last longer than all tiers do. For
	// topics that only we write to: on a public topic a misspelt type would wait for ever where nobody looks.
	EndlessUnknown bool
	// HoldMin and HoldMax bound the pauses while something is away; 0 means 100 ms and 5 s.
	HoldMin, HoldMax time.Duration
}

const (
	inPlaceMin = 20 * time.Millisecond
	inPlaceMax = 500 * time.Millisecond
	holdMin    = 100 * time.Millisecond
	holdMax    = 5 * time.Second
	minPause   = 5 * time.Millisecond
)

// Decide answers what becomes of a delivery that ended with err. It is a function of its arguments but for the jitter of Wait.
func (p Policy) Decide(t Tried, err error, now time.Time) Verdict {
	if err == nil {
		return Verdict{Kind: Done}
	}
	reason := CleanText(err.Error(), MaxErrorBytes)
	if away := outage(err); away != "" {
		return Verdict{Kind: Hold, Dependency: away, Wait: p.holdFor(t.Held, retryAfter(err)), Reason: reason}
	}
	var reused *reusedError
	if errors.As(err, &reused) {
		return Verdict{Kind: Dead, Class: ClassReused, Reason: reason}
	}
	if poison(err) {
		return Verdict{Kind: Dead, Class: ClassPoison, Reason: reason}
	}
	wait := retryAfter(err)
	var unknown *events.UnknownTypeError
	isUnknown := errors.As(err, &unknown)
	if !isUnknown && wait == 0 && t.InPlace < p.InPlace {
		return Verdict{Kind: Again, Wait: fullJitter(inPlaceMin, inPlaceMax, t.InPlace), Reason: reason}
	}
	if t.Tier < len(p.Delays) {
		// The tiers are queues: a record that waits longer than its tier's delay would hold up those behind it. So a long
		// RetryAfter chooses a slower tier, and the slowest bounds it.
		tier := t.Tier + 1
		for tier < len(p.Delays) && p.Delays[tier-1] < wait {
			tier++
		}
		return Verdict{Kind: Retry, Tier: tier, Due: now.Add(p.Delays[tier-1]), Reason: reason}
	}
	if len(p.Delays) > 0 && (t.Endless || isUnknown && p.EndlessUnknown) {
		return Verdict{Kind: Retry, Tier: len(p.Delays), Due: now.Add(p.Delays[len(p.Delays)-1]), Stalled: true, Reason: reason}
	}
	return Verdict{Kind: Dead, Class: ClassExhausted, Reason: reason}
}

func (p Policy) holdFor(held int, asked time.Duration) time.Duration {
	lo, hi := p.HoldMin, p.HoldMax
	if lo <= 0 {
		lo = holdMin
	}
	if hi <= 0 {
		hi = holdMax
	}
	if asked > 0 {
		// Whoever is away said when to come back: everybody who waits for it comes a little later than that, not all at once.
		return min(asked, hi) + rand.N(min(asked, hi)/10+1)
	}
	return fullJitter(lo, hi, held)
}

// fullJitter draws uniformly from 0 to lo·2ⁿ, at most hi; never less than minPause, so that a draw of zero is no busy loop.
func fullJitter(lo, hi time.Duration, n int) time.Duration {
	d := hi
	if n < 20 && lo<<n < hi {
		d = lo << n
	}
	return max(minPause, rand.N(d+1))
}

// outage names the dependency that is away, if err says so.
func outage(err error) string {
	var o interface{ Outage() string }
	if errors.As(err, &o) {
		return o.Outage()
	}
	return ""
}

func poison(err error) bool {
	var p interface{ Poison() bool }
	return errors.As(err, &p) && p.Poison()
}

func dataError(err error) bool {
	if err == nil {
		return false // the usual case: errors.As would allocate for it
	}
	var d interface{ DataError() bool }
	return errors.As(err, &d) && d.DataError()
}

func retryAfter(err error) time.Duration {
	var r interface{ RetryAfter() time.Duration }
	if errors.As(err, &r) {
		return max(0, r.RetryAfter())
	}
	return 0
}

// PanicError is a panic of a handler, caught. It is poison for the record that causes it.
type PanicError struct {
	Value any
	Stack []byte // at most 8 KiB, for the log
}

func newPanicError(v any) *PanicError {
	const limit = 8 << 10
	stack := debug.Stack()
	return &PanicError{Value: v, Stack: stack[:min(len(stack), limit)]}
}

func (e *PanicError) Error() string { return fmt.Sprintf("the handler panicked: %v", e.Value) }

// Poison reports that trying again would panic again.
func (e *PanicError) Poison() bool { return true }

// reusedError is an id that came twice, with different payloads.
type reusedError struct{}

func (*reusedError) Error() string {
	return "id reused: an earlier message with the same ce_source and ce_id has another payload; send a new message under a new ce_id"
}

// refusedByData is a single record whose transaction the database refused for its data.
type refusedByData struct{ err error }

func (e *refusedByData) Error() string { return e.err.Error() }
func (e *refusedByData) Unwrap() error { return e.err }
func (*refusedByData) Poison() bool    { return true }
