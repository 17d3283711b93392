// Package saga decides what happens to an order: the step table, the pure machine over it, the coordinator that feeds it batches,
// and the use cases place, cancel, expire and resolve.
//
// It owns every decision about an order's course. It promises that a saga reaches an end, or is flagged as stuck within a minute of
// standing still; that every step that was commanded is undone if the order is not confirmed; and that a duplicate or a late input
// changes nothing. The machine is a function: state and input in; new state, commands, public facts and the next deadline out.
//
//	                 all of a wave done         pivot done              last step done
//	running ───────────► next wave ──────────────► confirmed ────────────► completed
//	   │ a step refused · cancelled · deadline before the pivot
//	   ▼
//	compensating ── every participant that was commanded is undone ──► compensated
//
// Stuck is a flag over the state, not a state: reason, since when, who looks after it. A late fact that gets the saga moving clears
// it; so does an operator's recorded decision.
package saga
