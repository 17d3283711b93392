package domain

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/google/uuid"
)

// OrderID names an order and its saga. Ours are UUIDv7, so that tables keyed by it grow at one end; a client may bring any UUID.
type OrderID uuid.UUID

// ParseOrderID reads the canonical 36-character form, in either case.
func ParseOrderID(s string) (OrderID, error) {
	if len(s) != 36 {
		return OrderID{}, fmt.Errorf("order id %.40q is not a UUID of 36 characters", s)
	}
	u, err := uuid.Parse(s)
	if err != nil {
		return OrderID{}, fmt.Errorf("order id %q is not a UUID", s)
	}
	if u == uuid.Nil {
		return OrderID{}, errors.New("order id is the nil UUID")
	}
	return OrderID(u), nil
}

// NewOrderID draws a UUIDv7. It fails only when the machine has no randomness.
func NewOrderID() OrderID { return OrderID(uuid.Must(uuid.NewV7())) }

func (id OrderID) String() string { return uuid.UUID(id).String() }

// Compare orders ids as Postgres orders uuid: bytewise. Rows are locked in this order.
func (id OrderID) Compare(o OrderID) int { return bytes.Compare(id[:], o[:]) }

// IsZero reports the id that no order has.
func (id OrderID) IsZero() bool { return id == OrderID{} }

// SKU names a product.
type SKU string

// Line is one product of an order. UnitPrice is what the customer pays for one, fixed when the order is placed.
type Line struct {
	SKU       SKU
	Quantity  int64
	UnitPrice int64 // minor units of the order's currency
}

// Status is what the customer sees of an order.
type Status string

// The statuses of an order: pending → confirmed | rejected | cancelled, and nothing after that.
const (
	Pending   Status = "pending"
	Confirmed Status = "confirmed"
	Rejected  Status = "rejected"
	Cancelled Status = "cancelled"
)

// Statuses lists every status.
var Statuses = []Status{Pending, Confirmed, Rejected, Cancelled}

// Terminal reports that the status will not change any more.
func (s Status) Terminal() bool { return s == Confirmed || s == Rejected || s == Cancelled }

// Reason says why an order was rejected or cancelled.
type Reason string

// The reasons that an order can end for. The set is part of the public contract.
const (
	OutOfStock          Reason = "out_of_stock"
	PaymentDeclined     Reason = "payment_declined"
	CaptureFailed       Reason = "capture_failed"
	TimedOut            Reason = "timed_out"
	PriceChanged        Reason = "price_changed"
	UnknownProduct      Reason = "unknown_product"
	Invalid             Reason = "invalid"
	CancelledByCustomer Reason = "cancelled_by_customer"
)

// Order is what a customer asked for.
type Order struct {
	ID            OrderID
	CustomerID    string
	Lines         []Line // sorted by SKU, one line a SKU
	Total         Money
	PaymentMethod string // the gateway's name of it, such as pm_card_visa
	Status        Status
	Reason        Reason
	Sequence      int32 // number of public events so far
}

// Bounds on what one order may hold.
const (
	MaxLines    = 100
	MaxQuantity = 10_000
	MaxIDLength = 128 // characters of a customer id, a SKU or a payment method
)

// Refusal is why an order cannot be placed: a fact for whoever sent it, not a failure of ours.
type Refusal struct {
	Reason Reason
	Detail string // one sentence for a person
	Field  string // where in the request, as a JSON pointer; empty for the whole
}

func (r *Refusal) Error() string { return string(r.Reason) + ": " + r.Detail }

func invalid(field, format string, args ...any) *Refusal {
	return &Refusal{Reason: Invalid, Field: field, Detail: fmt.Sprintf(format, args...)}
}

// Draft is an order as it was asked for, before the catalogue was consulted. A nil UnitPrice means: at the catalogue's price.
type Draft struct {
	ID            OrderID // zero: one is drawn
	CustomerID    string
	Currency      string
	Items         []DraftItem
	PaymentMethod string
}

// DraftItem is one line of a Draft.
type DraftItem struct {
	SKU       SKU
	Quantity  int64
	UnitPrice *int64
}

// Product is what the catalogue says of a SKU.
type Product struct {
	SKU       SKU
	Name      string
	UnitPrice Money
}

// SKUs lists the SKUs of a draft, sorted, each once.
func (d *Draft) SKUs() []SKU {
	out := make([]SKU, 0, len(d.Items))
	for _, it := range d.Items {
		out = append(out, it.SKU)
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// printable refuses what would act on the terminal, the log or the page that shows it: control characters, line separators, what
// turns the direction of text, and what was no UTF-8.
func printable(s string) bool {
	return !strings.ContainsFunc(s, func(r rune) bool {
		return unicode.IsControl(r) || r == utf8.RuneError || unicode.In(r, unicode.Zl, unicode.Zp, unicode.Bidi_Control)
	})
}

func checkID(field, what, s string) *Refusal {
	switch {
	case s == "":
		return invalid(field, "%s is missing", what)
	case len(s) > MaxIDLength:
		return invalid(field, "%s is longer than %d bytes", what, MaxIDLength)
	case !printable(s):
		return invalid(field, "%s has control characters", what)
	}
	return nil
}

// Check answers nil or the *Refusal for what is wrong with the draft in itself.
func (d *Draft) Check() *Refusal {
	if r := checkID("/customer_id", "customer_id", d.CustomerID); r != nil {
		return r
	}
	if !ValidCurrency(d.Currency) {
		return invalid("/currency", "currency %.8q is not a three-letter ISO 4217 code in upper case", d.Currency)
	}
	if r := checkID("/payment_method", "payment_method", d.PaymentMethod); r != nil {
		return r
	}
	if len(d.Items) == 0 {
		return invalid("/items", "an order needs at least one item")
	}
	if len(d.Items) > MaxLines {
		return invalid("/items", "an order has at most %d items, this one has %d", MaxLines, len(d.Items))
	}
	seen := make(map[SKU]bool, len(d.Items))
	for i, it := range d.Items {
		at := fmt.Sprintf("/items/%d", i)
		if r := checkID(at+"/sku", "sku", string(it.SKU)); r != nil {
			return r
		}
		if seen[it.SKU] {
			return invalid(at+"/sku", "sku %q is there twice: add the quantities", it.SKU)
		}
		seen[it.SKU] = true
		if it.Quantity < 1 || it.Quantity > MaxQuantity {
			return invalid(at+"/quantity", "quantity %d is not between 1 and %d", it.Quantity, MaxQuantity)
		}
		if it.UnitPrice != nil && *it.UnitPrice < 0 {
			return invalid(at+"/unit_price_minor", "unit_price_minor is negative")
		}
	}
	return nil
}

// Price makes an order of a draft at the catalogue's prices, or says why not. products holds what the catalogue knows of the
// draft's SKUs. The lines of the answer are sorted by SKU: every later lock on stock is taken in that order.
func (d *Draft) Price(products map[SKU]Product) (*Order, *Refusal) {
	if r := d.Check(); r != nil {
		return nil, r
	}
	o := &Order{
		ID: d.ID, CustomerID: d.CustomerID, PaymentMethod: d.PaymentMethod, Status: Pending,
		Total: Money{Currency: d.Currency}, Lines: make([]Line, 0, len(d.Items)),
	}
	for i, it := range d.Items {
		p, ok := products[it.SKU]
		if !ok {
			return nil, &Refusal{Reason: UnknownProduct, Field: fmt.Sprintf("/items/%d/sku", i), Detail: fmt.Sprintf("the catalogue has no product %q", it.SKU)}
		}
		if p.UnitPrice.Minor < 0 { // would lower what the other lines cost
			return nil, invalid(fmt.Sprintf("/items/%d/sku", i), "product %q has the price %d in the catalogue: correct the product", it.SKU, p.UnitPrice.Minor)
		}
		if p.UnitPrice.Currency != d.Currency {
			return nil, invalid("/currency", "product %q is sold in %s, the order is in %s", it.SKU, p.UnitPrice.Currency, d.Currency)
		}
		if it.UnitPrice != nil && *it.UnitPrice != p.UnitPrice.Minor {
			return nil, &Refusal{
				Reason: PriceChanged, Field: fmt.Sprintf("/items/%d/unit_price_minor", i),
				Detail: fmt.Sprintf("product %q costs %d now, not %d (minor units of %s)", it.SKU, p.UnitPrice.Minor, *it.UnitPrice, d.Currency),
			}
		}
		sum, err := p.UnitPrice.Times(it.Quantity)
		if err == nil {
			o.Total, err = o.Total.Add(sum)
		}
		if err != nil || o.Total.Minor > MaxMinor {
			return nil, invalid("/items", "the total is above the limit of %d minor units", MaxMinor)
		}
		o.Lines = append(o.Lines, Line{SKU: it.SKU, Quantity: it.Quantity, UnitPrice: p.UnitPrice.Minor})
	}
	if o.Total.Minor < 1 {
		return nil, invalid("/items", "the total is zero: there is nothing to charge")
	}
	slices.SortFunc(o.Lines, func(a, b Line) int { return cmp.Compare(a.SKU, b.SKU) })
	return o, nil
}
