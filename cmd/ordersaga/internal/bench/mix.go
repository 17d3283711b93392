package bench

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"strconv"
	"strings"

	"github.com/google/uuid"
)

// Mix is what the orders are like. Shares are of all orders, and what is left is good.
type Mix struct {
	Products   int     `json:"products"`     // products that are ordered, all equally often
	MaxLines   int     `json:"max_lines"`    // an order has 1 to so many products
	Hot        float64 `json:"hot"`          // share of orders that have the one hot product too
	Declined   float64 `json:"declined"`     // share whose card is declined
	OutOfStock float64 `json:"out_of_stock"` // share that order what is sold out
	Cancelled  float64 `json:"cancelled"`    // share that are cancelled right after they were accepted
	Seed       uint64  `json:"seed"`
}

// DefaultMix is the yardsticks' workload: 1 to 3 of a thousand products, 2 % declined.
var DefaultMix = Mix{Products: 1000, MaxLines: 3, Declined: 0.02, Seed: 1}

// Bounds of a Mix.
const (
	maxProducts = 100_000
	maxLines    = 20
)

// Check says what is wrong with a mix.
func (m *Mix) Check() error {
	for name, share := range map[string]float64{"hot": m.Hot, "declined": m.Declined, "out of stock": m.OutOfStock, "cancelled": m.Cancelled} {
		if !(share >= 0 && share <= 1) {
			return fmt.Errorf("the share of %s orders is between 0 and 1, not %v", name, share)
		}
	}
	switch {
	case m.Declined+m.OutOfStock+m.Cancelled > 1:
		return errors.New("the shares of declined, sold-out and cancelled orders are more than 1 together")
	case m.Products < 1 || m.Products > maxProducts:
		return fmt.Errorf("the number of products is between 1 and %d, not %d", maxProducts, m.Products)
	case m.MaxLines < 1 || m.MaxLines > maxLines:
		return fmt.Errorf("an order has at most 1 to %d products, not %d", maxLines, m.MaxLines)
	}
	return nil
}

// The products of the load. They are apart from everybody else's.
const (
	skuPrefix = "bench-"
	skuHot    = "bench-hot"
	skuNone   = "bench-sold-out"
	// prefixOfCustomers is before a number below customers.
	prefixOfCustomers = "bench-"
	customers         = 100_000
)

func sku(i int) string { return fmt.Sprintf("%s%05d", skuPrefix, i) }

// SKUs lists the products that a mix needs; those that must have stock, and those that must have none.
func (m *Mix) SKUs() (stocked, empty []string) {
	for i := range m.Products {
		stocked = append(stocked, sku(i))
	}
	if m.Hot > 0 {
		stocked = append(stocked, skuHot)
	}
	if m.OutOfStock > 0 {
		empty = append(empty, skuNone)
	}
	return stocked, empty
}

// Order is one order of the load.
type Order struct {
	ID     uuid.UUID
	Body   []byte
	Cancel bool
}

// Order makes an order; i decides what it is like, so that the same run orders the same things again.
func (m *Mix) Order(i int) Order {
	r := rand.New(rand.NewPCG(m.Seed, uint64(i))) //nolint:gosec // a load, not a secret
	o := Order{ID: uuid.Must(uuid.NewV7())}
	method, none := "pm_card_visa", false
	switch p := r.Float64(); {
	case p < m.Declined:
		method = "pm_card_chargeDeclined"
	case p < m.Declined+m.OutOfStock:
		none = true
	case p < m.Declined+m.OutOfStock+m.Cancelled:
		o.Cancel = true
	}
	var items []string
	if none {
		items = append(items, skuNone)
	}
	if m.Hot > 0 && r.Float64() < m.Hot {
		items = append(items, skuHot)
	}
	for n := min(1+r.IntN(m.MaxLines), m.Products); len(items) < n; {
		if s := sku(r.IntN(m.Products)); !contains(items, s) {
			items = append(items, s)
		}
	}
	b := append(make([]byte, 0, 256), `{"order_id":"`...)
	b = append(b, o.ID.String()...)
	b = append(b, `","customer_id":"`+prefixOfCustomers...)
	b = strconv.AppendInt(b, int64(r.IntN(customers)), 10)
	b = append(b, `","currency":"EUR","payment_method":"`...)
	b = append(append(b, method...), `","items":[`...)
	for j, s := range items {
		if j > 0 {
			b = append(b, ',')
		}
		b = append(append(append(b, `{"sku":"`...), s...), `","quantity":`...)
		b = append(strconv.AppendInt(b, int64(1+r.IntN(3)), 10), '}')
	}
	o.Body = append(b, "]}"...)
	return o
}

func contains(list []string, s string) bool {
	for _, x := range list {
		if x == s {
			return true
		}
	}
	return false
}

// Heads are the header lines of a request to the service.
func Heads(token string, lines ...string) []byte {
	var b strings.Builder
	b.WriteString("Content-Type: application/json\r\n")
	if token != "" {
		b.WriteString("Authorization: Bearer " + token + "\r\n")
	}
	for _, l := range lines {
		b.WriteString(l + "\r\n")
	}
	return []byte(b.String())
}
