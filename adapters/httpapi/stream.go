package httpapi

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"strconv"
	"time"

	"ordersaga/domain"
	"ordersaga/saga"
)

const (
	heartbeat    = 15 * time.Second // a comment line while nothing happens
	streamWrite  = 10 * time.Second // a client that does not read for so long is let go
	resyncStream = 5 * time.Second  // how often a stream looks at the order itself, in case an update passed it by
)

// StreamOrderEvents implements GET /v1/orders/{order_id}/events.
func (a *API) StreamOrderEvents(w http.ResponseWriter, r *http.Request, orderID OrderID, params StreamOrderEventsParams) {
	last, err := lastEvent(params.LastEventID)
	if err != nil {
		a.fail(w, r, err)
		return
	}
	select {
	case a.streams <- struct{}{}:
		defer func() { <-a.streams }()
	default:
		a.fail(w, r, problem(http.StatusServiceUnavailable, "overloaded", "Overloaded", "too many streams are open: try again after Retry-After"))
		return
	}
	updates, end := a.Hub.Subscribe(domain.OrderID(orderID))
	defer end()
	o, err := a.find(r.Context(), orderID)
	if err != nil {
		a.fail(w, r, err)
		return
	}
	w.Header().Set("Content-Type", "text/event-stream")
	w.Header().Set("Cache-Control", "no-store")
	w.Header().Set("X-Accel-Buffering", "no") // proxies that would hold events back
	s := &stream{w: w, rc: http.NewResponseController(w), last: last}
	if s.order(a.order(o)) != nil {
		return
	}
	if s.catchUp(o) {
		return
	}
	a.follow(r.Context(), s, domain.OrderID(orderID), updates)
}

func lastEvent(h string) (int32, error) {
	if h == "" {
		return 0, nil
	}
	n, err := strconv.ParseInt(h, 10, 32)
	if err != nil || n < 0 {
		return 0, problem(http.StatusBadRequest, "bad_parameter", "Bad parameter", "Last-Event-ID is the sequence of the last event seen").at("Last-Event-ID")
	}
	return int32(n), nil
}

// follow writes updates until the order has ended, the client is gone or the hub closes.
func (a *API) follow(ctx context.Context, s *stream, id domain.OrderID, updates <-chan Update) {
	beat := time.NewTicker(heartbeat)
	defer beat.Stop()
	resync := time.NewTicker(resyncStream)
	defer resync.Stop()
	for {
		select {
		case u, open := <-updates:
			if !open || s.update(u) != nil || u.Terminal {
				return
			}
		case <-resync.C:
			o, err := a.Reader.Order(ctx, id)
			if err == nil && o != nil && s.catchUp(o) {
				return
			}
		case <-beat.C:
			if s.write(": still here\n\n") != nil {
				return
			}
		case <-ctx.Done():
			return
		}
	}
}

// stream is one client that follows an order.
type stream struct {
	w    http.ResponseWriter
	rc   *http.ResponseController
	last int32
}

func (s *stream) write(text string) error {
	if err := s.rc.SetWriteDeadline(time.Now().Add(streamWrite)); err != nil {
		return fmt.Errorf("stream: %w", err)
	}
	if _, err := s.w.Write([]byte(text)); err != nil {
		return fmt.Errorf("stream: %w", err)
	}
	return s.rc.Flush() //nolint:wrapcheck // ends the stream, nothing more
}

func (s *stream) order(o Order) error {
	b, err := json.Marshal(o)
	if err != nil {
		return fmt.Errorf("stream: %w", err)
	}
	return s.write("event: order\ndata: " + string(b) + "\n\n")
}

// update writes a public event that the client has not seen.
func (s *stream) update(u Update) error {
	if u.Sequence <= s.last {
		return nil
	}
	s.last = u.Sequence
	return s.write(fmt.Sprintf("id: %d\nevent: %s\ndata: %s\n\n", u.Sequence, u.Name, u.Data))
}

// terminalNames are the public events with which an order ends.
var terminalNames = map[domain.Status]string{
	domain.Confirmed: "OrderConfirmed", domain.Rejected: "OrderRejected", domain.Cancelled: "OrderCancelled",
}

// catchUp writes the event of an end that was reached before the subscription, from the order itself. It answers true if the stream
// is over.
func (s *stream) catchUp(o *saga.OrderView) bool {
	if !o.Status.Terminal() {
		return false
	}
	b, err := json.Marshal(map[string]any{
		"order_id": o.ID.String(), "sequence": o.Sequence, "status": o.Status, "reason": o.Reason, "total_minor": o.Total.Minor, "currency": o.Total.Currency,
	})
	if err != nil {
		return true
	}
	_ = s.update(Update{Sequence: o.Sequence, Name: terminalNames[o.Status], Data: b}) // over either way
	return true
}
