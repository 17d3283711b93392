package steps

import (
	"fmt"
	"slices"
	"time"

	"ordersaga/consumers"
	"ordersaga/domain"
	"ordersaga/events"
	"ordersaga/saga"
)

// poisonError is a message that no repetition will make possible.
type poisonError struct {
	msg   string
	cause error
}

func (e *poisonError) Error() string { return e.msg }
func (e *poisonError) Unwrap() error { return e.cause }
func (e *poisonError) Poison() bool  { return true }

func poison(format string, args ...any) error { return &poisonError{msg: fmt.Sprintf(format, args...)} }

func asPoison(what string, cause error) error {
	return &poisonError{msg: what + ": " + cause.Error(), cause: cause}
}

// misrouted is a message of a type that this handler has no business with: a wrong subscription, or a producer of its own on an
// internal topic.
func misrouted(d *consumers.Delivery) consumers.Result {
	return consumers.Result{Err: poison("group %s does not act on %s", d.Group, d.Type)}
}

// reply answers a delivery with one message that continues its trace.
func reply(d *consumers.Delivery, n events.Name, data any) consumers.Result {
	return consumers.Result{Out: []events.Envelope{{ID: events.NewID(), Type: n, OrderID: d.OrderID, Trace: d.Trace, Data: data}}}
}

func orderOf(d *consumers.Delivery) domain.OrderID { return domain.OrderID(d.OrderID) }

// ordersOf lists the orders of a batch, sorted, each once: the order in which their rows are locked.
func ordersOf(batch []*consumers.Delivery) []domain.OrderID {
	ids := make([]domain.OrderID, len(batch))
	for i, d := range batch {
		ids[i] = orderOf(d)
	}
	slices.SortFunc(ids, domain.OrderID.Compare)
	return slices.Compact(ids)
}

// lapsed reports that a command came after the time up to which it may act; 0 means it may always.
func lapsed(expiresAtMs int64, now saga.Clock) bool {
	return expiresAtMs != 0 && now().After(time.UnixMilli(expiresAtMs))
}

// first reports a command of a kind that was not sent again by us: nothing is known of its order yet, as a rule.
func first[M any](d *consumers.Delivery) bool {
	_, is := d.Data.(M)
	return is && d.Ticket == 0
}
