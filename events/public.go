package events

// PlaceOrder asks for an order, on orders.commands.v1. Unknown fields are ignored. See schemas/asyncapi.yaml.
type PlaceOrder struct {
	OrderID       string      `json:"order_id"`
	CustomerID    string      `json:"customer_id"`
	Currency      string      `json:"currency"`
	Items         []OrderItem `json:"items"`
	PaymentMethod string      `json:"payment_method"`
}

// OrderItem is one product of a PlaceOrder or of an OrderPlaced.
type OrderItem struct {
	SKU            string `json:"sku"`
	Quantity       int64  `json:"quantity"`
	UnitPriceMinor *int64 `json:"unit_price_minor,omitempty"`
}

// CancelOrder asks that the order does not end confirmed, on orders.commands.v1.
type CancelOrder struct {
	OrderID string `json:"order_id"`
	Reason  string `json:"reason,omitempty"`
}

// OrderEvent is the body of OrderPlaced, OrderConfirmed, OrderRejected and OrderCancelled on orders.events.v1. Sequence counts an
// order's public events from 1; a reader drops what it has seen.
type OrderEvent struct {
	OrderID       string      `json:"order_id"`
	Sequence      int32       `json:"sequence"`
	Status        string      `json:"status"`
	Reason        string      `json:"reason,omitempty"`
	Detail        string      `json:"detail,omitempty"`      // OrderRejected of a refused command: one sentence
	CustomerID    string      `json:"customer_id,omitempty"` // OrderPlaced
	TotalMinor    int64       `json:"total_minor"`
	Currency      string      `json:"currency"`
	Items         []OrderItem `json:"items,omitempty"`          // OrderPlaced
	PaymentMethod string      `json:"payment_method,omitempty"` // OrderPlaced
}
