package main

import (
	"encoding/json"
	"fmt"
	"strconv"
)

// The orders are those of the yardsticks' own driver, order for order: the same products, quantities and declines.

type item struct {
	SKU   int   `json:"sku"`
	Qty   int   `json:"qty"`
	Price int64 `json:"price"`
}

type order struct {
	ID       string `json:"id"`
	Customer int64  `json:"customer"`
	Items    []item `json:"items"`
	Total    int64  `json:"total"`
}

const (
	skus         = 1000
	declineEvery = 50
)

func mix(x uint64) uint64 { // splitmix64
	x += 0x9e3779b97f4a7c15
	x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9
	x = (x ^ (x >> 27)) * 0x94d049bb133111eb
	return x ^ (x >> 31)
}

// orderOf is order i of a phase: 1 to 3 different products, in ascending order.
func orderOf(phase, i int) order {
	r := mix(uint64(phase)<<40 | uint64(i)) //nolint:gosec // small numbers
	n := 1 + int(r%3)
	o := order{ID: orderID(phase, i), Customer: int64(mix(r) % 100_000)}
	seen := map[int]bool{}
	for len(o.Items) < n {
		r = mix(r)
		s := 1 + int(r%skus)
		if seen[s] {
			continue
		}
		seen[s] = true
		it := item{SKU: s, Qty: 1 + int(r>>20%3), Price: int64(100 + r>>32%9900)}
		o.Items = append(o.Items, it)
		o.Total += it.Price * int64(it.Qty)
	}
	for a := 1; a < n; a++ {
		for b := a; b > 0 && o.Items[b].SKU < o.Items[b-1].SKU; b-- {
			o.Items[b], o.Items[b-1] = o.Items[b-1], o.Items[b]
		}
	}
	return o
}

// orderID is a UUID that carries phase and number.
func orderID(phase, i int) string { return fmt.Sprintf("%08x-0000-4000-8000-%012x", phase, i) }

// declined says whether the card of an order is declined.
func declined(id string) bool {
	const at = 24
	if len(id) <= at {
		return false
	}
	i, err := strconv.ParseInt(id[at:], 16, 64)
	return err == nil && i%declineEvery == declineEvery-1
}

func declinesIn(n int) int { return n / declineEvery }

// plainBody is the order as plain takes it.
func (o *order) plainBody() []byte {
	b, err := json.Marshal(o)
	if err != nil {
		panic(err) // numbers and text
	}
	return b
}

// ourBody is the same order as this system takes it.
func (o *order) ourBody() []byte {
	method := "pm_card_visa"
	if declined(o.ID) {
		method = "pm_card_chargeDeclined"
	}
	b := fmt.Appendf(nil, `{"order_id":"%s","customer_id":"customer-%d","currency":"EUR","payment_method":"%s","items":[`, o.ID, o.Customer, method)
	for i, it := range o.Items {
		if i > 0 {
			b = append(b, ',')
		}
		b = fmt.Appendf(b, `{"sku":"%s","quantity":%d}`, ourSKU(it.SKU), it.Qty)
	}
	return append(b, "]}"...)
}

// ourSKU is the name of product n, 1 to skus, among those that bench.Prepare makes.
func ourSKU(n int) string { return fmt.Sprintf("bench-%05d", n-1) }
