package simulator

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"time"
)

// Op names an API call, for faults and counters.
type Op string

// The calls.
const (
	Create      Op = "create"
	Confirm     Op = "confirm"
	Capture     Op = "capture"
	Cancel      Op = "cancel"
	Retrieve    Op = "retrieve"
	List        Op = "list"
	Refund      Op = "refund"
	GetRefund   Op = "get_refund"
	ListRefunds Op = "list_refunds"
	Balance     Op = "balance"
)

var ops = []Op{Create, Confirm, Capture, Cancel, Retrieve, List, Refund, GetRefund, ListRefunds, Balance}

// Duration is a time.Duration that JSON shows as 250ms or 3s.
type Duration time.Duration

// MarshalText writes the form that time.ParseDuration reads.
func (d Duration) MarshalText() ([]byte, error) { return []byte(time.Duration(d).String()), nil }

// UnmarshalText reads 250ms, 3s and the like. A negative duration is an error.
func (d *Duration) UnmarshalText(b []byte) error {
	v, err := time.ParseDuration(string(b))
	if err != nil {
		return fmt.Errorf("%q is not a duration such as 250ms or 3s", b)
	}
	if v < 0 {
		return fmt.Errorf("duration %q is negative", b)
	}
	*d = Duration(v)
	return nil
}

// The kinds of Fault.Outage.
const (
	OutageRefuse = "refuse" // every request is answered 503
	OutageClose  = "close"  // every connection is closed without an answer
)

// Fault is what goes wrong with calls. Shares are between 0 and 1 and add up to at most 1: one call meets one of them.
type Fault struct {
	Latency Duration `json:"latency,omitempty"` // before the effect; a client that does not wait for it meets an unknown outcome
	Jitter  Duration `json:"jitter,omitempty"`  // up to so much more, drawn evenly

	Decline     float64  `json:"decline,omitempty"`      // share of create and confirm that the bank declines
	ErrorBefore float64  `json:"error_before,omitempty"` // share answered 500 without effect
	ErrorAfter  float64  `json:"error_after,omitempty"`  // share answered 500 although it took effect
	Timeout     float64  `json:"timeout,omitempty"`      // share that takes effect, and the connection hangs, then closes
	Throttle    float64  `json:"throttle,omitempty"`     // share answered 429 without effect
	RetryAfter  Duration `json:"retry_after,omitempty"`  // of a 429 and of a refusing outage, in whole seconds
	Hang        Duration `json:"hang,omitempty"`         // how long a Timeout hangs; zero: until the client goes
	Outage      string   `json:"outage,omitempty"`       // refuse or close; empty: none

	// Forget: a 500 is not stored under the key. The next request with the key is carried out, or, where the first one took effect,
	// answered with what it came to. Stripe stores the 500.
	Forget bool `json:"forget,omitempty"`
	// Times bounds how many faults are dealt by this entry (latency is not counted); zero: no bound.
	Times int `json:"times,omitempty"`
}

// Faults is one Fault for every call, and entries that replace it for single calls. The zero value: nothing goes wrong.
type Faults struct {
	Fault
	Seed uint64       `json:"seed,omitempty"` // the generator starts anew with every change of the faults
	Ops  map[Op]Fault `json:"ops,omitempty"`
}

// ParseFaults reads the JSON of PUT /_control. Unknown fields are errors: a fault that is misspelt would never happen.
func ParseFaults(b []byte) (Faults, error) {
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	var f Faults
	if err := d.Decode(&f); err != nil {
		return Faults{}, fmt.Errorf("faults: %w", err)
	}
	if d.More() {
		return Faults{}, errors.New("faults: one JSON object is expected")
	}
	return f, f.check()
}

func (f Faults) check() error {
	errs := []error{f.Fault.check("every call")}
	for op, o := range f.Ops {
		if !knownOp(op) {
			errs = append(errs, fmt.Errorf("faults: there is no call %.20q; the calls are %s", string(op), opNames()))
			continue
		}
		errs = append(errs, o.check(string(op)))
	}
	return errors.Join(errs...)
}

func knownOp(op Op) bool {
	for _, o := range ops {
		if o == op {
			return true
		}
	}
	return false
}

func opNames() string {
	names := make([]string, len(ops))
	for i, o := range ops {
		names[i] = string(o)
	}
	return strings.Join(names, ", ")
}

func (f Fault) check(of string) error {
	sum := 0.0
	for _, s := range []float64{f.Decline, f.ErrorBefore, f.ErrorAfter, f.Timeout, f.Throttle} {
		if !(s >= 0 && s <= 1) {
			return fmt.Errorf("faults of %s: a share is %v, not between 0 and 1", of, s)
		}
		sum += s
	}
	switch {
	case sum > 1+1e-9:
		return fmt.Errorf("faults of %s: the shares add up to %v, more than 1", of, sum)
	case f.Outage != "" && f.Outage != OutageRefuse && f.Outage != OutageClose:
		return fmt.Errorf("faults of %s: outage is %.20q, not refuse or close", of, f.Outage)
	case f.Times < 0 || f.Latency < 0 || f.Jitter < 0 || f.RetryAfter < 0 || f.Hang < 0:
		return fmt.Errorf("faults of %s: a number or duration is negative", of)
	}
	return nil
}

// kind is the one fault that a call meets.
type kind int

const (
	none kind = iota
	refuse
	drop
	throttle
	decline
	errorBefore
	errorAfter
	timeout
)

type dealt struct {
	kind       kind
	latency    time.Duration
	retryAfter time.Duration
	hang       time.Duration
	forget     bool
}

// dealer hands out faults. It has a lock of its own, so that drawing does not wait for the ledger.
type dealer struct {
	mu     sync.Mutex
	faults Faults
	rng    *rand.Rand
	used   map[Op]int // faults dealt by the entry of an op; "": by the entry for every call
	total  map[Op]int // since the start
}

func newDealer() *dealer {
	d := &dealer{total: map[Op]int{}}
	d.set(Faults{})
	return d
}

func (d *dealer) set(f Faults) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.faults, d.used = f, map[Op]int{}
	d.rng = rand.New(rand.NewPCG(f.Seed, f.Seed^0x9e3779b97f4a7c15))
}

func (d *dealer) get() Faults {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.faults
}

func (d *dealer) counts() map[Op]int {
	d.mu.Lock()
	defer d.mu.Unlock()
	out := make(map[Op]int, len(d.total))
	for op, n := range d.total {
		out[op] = n
	}
	return out
}

func (d *dealer) draw(op Op) dealt {
	d.mu.Lock()
	defer d.mu.Unlock()
	f, entry := d.faults.Fault, Op("")
	if o, ok := d.faults.Ops[op]; ok {
		f, entry = o, op
	}
	out := dealt{latency: time.Duration(f.Latency), retryAfter: time.Duration(f.RetryAfter), hang: time.Duration(f.Hang), forget: f.Forget}
	if f.Jitter > 0 {
		out.latency += time.Duration(d.rng.Int64N(int64(f.Jitter) + 1))
	}
	if f.Times > 0 && d.used[entry] >= f.Times {
		return out
	}
	if out.kind = f.pick(op, d.rng); out.kind != none {
		d.used[entry]++
		d.total[op]++
	}
	return out
}

// pick draws once, whatever the shares are, so that a change of one share does not shift what later calls meet.
func (f Fault) pick(op Op, rng *rand.Rand) kind {
	at := rng.Float64()
	switch f.Outage {
	case OutageRefuse:
		return refuse
	case OutageClose:
		return drop
	}
	for _, s := range []struct {
		share float64
		kind  kind
	}{{f.Throttle, throttle}, {f.ErrorBefore, errorBefore}, {f.ErrorAfter, errorAfter}, {f.Timeout, timeout}, {f.Decline, decline}} {
		if at -= s.share; at < 0 {
			if s.kind == decline && op != Create && op != Confirm {
				return none
			}
			return s.kind
		}
	}
	return none
}
