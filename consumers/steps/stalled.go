package steps

import (
	"ordersaga/consumers"
	"ordersaga/events"
)

// Stalled tells the coordinator of a command that waits at the slowest tier or became a dead letter, so that its saga shows it. For
// anything that is not a saga's command, or of which the order cannot be told, it says nothing.
func Stalled(d *consumers.Delivery, v consumers.Verdict) []events.Envelope {
	t, ok := events.TypeOf(d.Type)
	if !ok || t.Topic == events.TopicReplies || t.Topic == events.TopicCommands || d.OrderID == ([16]byte{}) {
		return nil
	}
	return []events.Envelope{{
		ID: events.NewID(), Type: events.TStepStalled, OrderID: d.OrderID, Trace: d.Trace,
		Data: &events.StepStalled{
			Command: string(d.Type), Error: v.Reason, Attempts: int32(min(d.Attempt, 1<<30)), Dead: v.Kind == consumers.Dead, //nolint:gosec // bounded
		},
	}}
}
