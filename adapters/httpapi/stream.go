package httpapi

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
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
	streamAge    = 30 * time.Minute // then it ends: the client comes again with Last-Event-ID, and with a token that is still good
)

// StreamOrderEvents implements GET /v1/orders/{order_id}/events.
func (a *API) StreamOrderEvents(w http.ResponseWriter, r *http.Request, orderID OrderID, params StreamOrderEventsParams) {
	last, err := lastEvent(params.LastEventID)
	if err != nil {
		a.fail(w, r, err)
		return
	}
	if a.draining.Load() {
		a.fail(w, r, problem(http.StatusServiceUnavailable, "shutting_down", "Shutting down", "this process is going: ask again, another one answers"))
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
	w.Header().Set("X-Accel-Buffering", "no") // proxies that would hold events back
	if r.Method == http.MethodHead {
		return
	}
	s := &stream{w: w, rc: http.NewResponseController(w), last: last}
	if s.order(a.order(o)) != nil || s.catchUp(o) {
		return
	}
	a.follow(r.Context(), s, domain.OrderID(orderID), updates)
}

// lastEvent reads Last-Event-ID: the last sequence that the client has seen.
func lastEvent(h string) (int32, error) {
	if h == "" {
		return 0, nil
	}
	n, err := strconv.ParseUint(h, 10, 31)
	if err != nil {
		return 0, badParameter("Last-Event-ID", "Last-Event-ID is the sequence of the last event seen")
	}
	return int32(n), nil
}

// follow writes updates until the order has ended, the client is gone or the hub closes.
func (a *API) follow(ctx context.Context, s *stream, id domain.OrderID, updates <-chan Update) {
	beat := time.NewTicker(heartbeat)
	defer beat.Stop()
	resync := time.NewTicker(resyncStream)
	defer resync.Stop()
	age := time.NewTimer(streamAge)
	defer age.Stop()
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
		case <-age.C:
			return
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

// write sends text at once. The deadline holds for this write only: on HTTP/2 one that passes while nothing is written ends the stream.
func (s *stream) write(text string) error {
	if err := s.rc.SetWriteDeadline(time.Now().Add(streamWrite)); err != nil {
		return fmt.Errorf("stream: %w", err)
	}
	if _, err := io.WriteString(s.w, text); err != nil {
		return fmt.Errorf("stream: %w", err)
	}
	if err := s.rc.Flush(); err != nil {
		return fmt.Errorf("stream: %w", err)
	}
	if err := s.rc.SetWriteDeadline(time.Time{}); err != nil {
		return fmt.Errorf("stream: %w", err)
	}
	return nil
}

func (s *stream) order(o Order) error {
	b, err := json.Marshal(o)
	if err != nil {
		return fmt.Errorf("stream: %w", err)
	}
	return s.write("event: order\ndata: " + string(b) + "\n\n")
}

// update writes a public event that the client has not seen. Its body goes on one line, as the format of the stream wants it; one that is
// no JSON came from somebody else and is left out.
func (s *stream) update(u Update) error {
	if u.Sequence <= s.last {
		return nil
	}
	if !json.Valid(u.Data) {
		return nil
	}
	var line bytes.Buffer
	if err := json.Compact(&line, u.Data); err != nil {
		return fmt.Errorf("stream: %w", err)
	}
	s.last = u.Sequence
	return s.write(fmt.Sprintf("id: %d\nevent: %s\ndata: %s\n\n", u.Sequence, clean(u.Name, maxDetail), line.Bytes()))
}

// terminalNames are the public events with which an order ends.
var terminalNames = map[domain.Status]string{
	domain.Confirmed: "OrderConfirmed", domain.Rejected: "OrderRejected", domain.Cancelled: "OrderCancelled",
}

// end is the body of the event with which an order ended, as asyncapi.yaml has it.
type end struct {
	OrderID    string `json:"order_id"`
	Sequence   int32  `json:"sequence"`
	Status     string `json:"status"`
	Reason     string `json:"reason,omitempty"`
	TotalMinor int64  `json:"total_minor"`
	Currency   string `json:"currency"`
}

// catchUp writes the event of an end that was reached before the subscription, or that passed it by, from the order itself. It answers
// true if the stream is over.
func (s *stream) catchUp(o *saga.OrderView) bool {
	if !o.Status.Terminal() {
		return false
	}
	b, err := json.Marshal(end{o.ID.String(), o.Sequence, string(o.Status), string(o.Reason), o.Total.Minor, o.Total.Currency})
	if err == nil {
		_ = s.update(Update{Sequence: o.Sequence, Name: terminalNames[o.Status], Data: b}) // over either way
	}
	return true
}
