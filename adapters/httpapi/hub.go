package httpapi

import (
	"sync"

	"ordersaga/domain"
)

// Update is a public event of an order, as it passed on orders.events.v1.
type Update struct {
	Order    domain.OrderID
	Sequence int32
	Name     string // OrderConfirmed
	Terminal bool
	Data     []byte // its body, JSON
}

// updateBuffer bounds what waits for a subscriber: an order has two public events, duplicates may follow.
const updateBuffer = 16

// Hub passes public events on to the requests that wait for them. It holds nothing for orders that nobody waits for, and never
// waits for a subscriber: one that does not read misses updates, and looks at the order itself when its time is up.
type Hub struct {
	mu      sync.Mutex
	subs    map[domain.OrderID]map[chan Update]struct{}
	awaited chan struct{} // closed while there are subscribers
	closed  bool
}

// NewHub makes an empty Hub.
func NewHub() *Hub {
	return &Hub{subs: map[domain.OrderID]map[chan Update]struct{}{}, awaited: make(chan struct{})}
}

// Awaited answers a channel that is closed while anybody waits for updates, or will be when somebody does: a reader of the topic may rest
// until then. Whoever has subscribed has closed it, so what is published of an order later than that is looked for in time.
func (h *Hub) Awaited() <-chan struct{} {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.awaited
}

// Publish hands an update to the subscribers of its order.
func (h *Hub) Publish(u Update) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for c := range h.subs[u.Order] {
		select {
		case c <- u:
		default:
		}
	}
}

// Subscribe answers a channel of updates, closed when the hub closes, and the function that ends the subscription.
func (h *Hub) Subscribe(id domain.OrderID) (<-chan Update, func()) {
	c := make(chan Update, updateBuffer)
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed {
		close(c)
		return c, func() {}
	}
	if len(h.subs) == 0 {
		close(h.awaited)
	}
	if h.subs[id] == nil {
		h.subs[id] = map[chan Update]struct{}{}
	}
	h.subs[id][c] = struct{}{}
	return c, func() { h.unsubscribe(id, c) }
}

func (h *Hub) unsubscribe(id domain.OrderID, c chan Update) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed || h.subs[id] == nil {
		return
	}
	delete(h.subs[id], c)
	if len(h.subs[id]) == 0 {
		delete(h.subs, id)
	}
	if len(h.subs) == 0 {
		h.awaited = make(chan struct{})
	}
}

// Wanted reports whether anybody waits for an order, so that a reader of the topic need not decode what nobody wants.
func (h *Hub) Wanted(id domain.OrderID) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.subs[id]) > 0
}

// Close ends all subscriptions.
func (h *Hub) Close() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed {
		return
	}
	h.closed = true
	for _, cs := range h.subs {
		for c := range cs {
			close(c)
		}
	}
	h.subs = map[domain.OrderID]map[chan Update]struct{}{}
}
