package bench

import (
	"fmt"
	"strconv"
	"strings"
	"time"
)

// PhaseSpec is a phase as the user asks for it.
type PhaseSpec struct {
	Name     string
	Rate     float64 // orders a second; 0: closed loop or Times
	Times    float64 // of the best rate of ends of the closed-loop phases before; 0: Rate counts
	Slots    int     // orders under way in a closed loop; 0: the default
	Duration time.Duration
	Orders   int
}

// PhaseHelp says how a phase is written.
const PhaseHelp = "saturate, saturate@512 (orders under way), 200/s, or 2x (times the best rate of the saturate phases before), each with a length as in 200/s:30s or 200/s:6000"

// ParsePhase reads a phase; see PhaseHelp.
func ParsePhase(s string, length time.Duration) (PhaseSpec, error) {
	bad := func(why string) (PhaseSpec, error) {
		return PhaseSpec{}, fmt.Errorf("phase %q: %s; it is %s", s, why, PhaseHelp)
	}
	what, long, has := strings.Cut(s, ":")
	p := PhaseSpec{Name: what, Duration: length}
	if has {
		if n, err := strconv.Atoi(long); err == nil && n > 0 {
			p.Orders, p.Duration = n, 0
		} else if d, err := time.ParseDuration(long); err == nil && d >= time.Second {
			p.Duration = d
		} else {
			return bad("its length is a duration of at least 1s, or a number of orders")
		}
	}
	number := func(text string) float64 {
		v, err := strconv.ParseFloat(text, 64)
		if err != nil || !(v > 0 && v <= 1e6) {
			return 0
		}
		return v
	}
	switch {
	case what == "saturate":
	case strings.HasPrefix(what, "saturate@"):
		n, err := strconv.Atoi(strings.TrimPrefix(what, "saturate@"))
		if err != nil || n < 1 || n > queued {
			return bad("orders under way are a number")
		}
		p.Slots = n
	case strings.HasSuffix(what, "/s"):
		if p.Rate = number(strings.TrimSuffix(what, "/s")); p.Rate == 0 {
			return bad("the rate is a number above 0")
		}
	case strings.HasSuffix(what, "x"):
		if p.Times = number(strings.TrimSuffix(what, "x")); p.Times == 0 {
			return bad("the multiple is a number above 0")
		}
	default:
		return bad("unknown")
	}
	return p, nil
}

// CheckPhases says what is wrong with phases in their order.
func CheckPhases(ps []PhaseSpec) error {
	if len(ps) == 0 {
		return fmt.Errorf("no phase: --phase is %s", PhaseHelp)
	}
	saturated := false
	names := map[string]bool{}
	for _, p := range ps {
		if p.Times > 0 && !saturated {
			return fmt.Errorf("phase %s: a saturate phase has to come before it", p.Name)
		}
		saturated = saturated || p.Times == 0 && p.Rate == 0
		if names[p.Name] {
			return fmt.Errorf("phase %s: twice", p.Name)
		}
		names[p.Name] = true
	}
	return nil
}
