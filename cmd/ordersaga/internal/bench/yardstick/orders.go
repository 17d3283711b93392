package main

import (
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"time"
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

// series is the orders of one phase: seed says what they are like, number is in their ids. The ids of timed ones are UUIDv7s, whose time is stamped
// on when they are sent, as a client's are: rows are added where those of real orders are, behind all others, and whoever goes by that time finds it.
type series struct {
	seed, number int
	timed        bool
}

// id is the id of order i, of a timed series without its time.
func (s series) id(i int) string {
	if s.timed {
		return fmt.Sprintf("00000000-0000-7%03x-8000-%012x", s.number&maxNumber, i)
	}
	return fmt.Sprintf("%08x-0000-4000-8000-%012x", s.number, i)
}

// maxNumber is the highest number of a timed series.
const maxNumber = 1<<12 - 1

// stamp writes the time of a UUIDv7 over what stands where an id begins.
func stamp(id []byte, at time.Time) {
	const digits = "0123456789abcdef"
	t := at.UnixMilli()
	for _, k := range []int{12, 11, 10, 9, 7, 6, 5, 4, 3, 2, 1, 0} { // a hyphen is at 8
		id[k] = digits[t&15]
		t >>= 4
	}
}

// firstID is an id that no order from a moment on is below.
func firstID(at time.Time) string {
	id := []byte("00000000-0000-0000-0000-000000000000")
	stamp(id, at)
	return string(id)
}

// workload is what the orders of all phases are like: how many products there are to order, and whether half of the orders want one of them.
type workload struct {
	products int
	hot      bool
}

// hotSKU is the product that half of all orders want in a hot workload: neither the first nor the last to be locked.
const hotSKU = skus / 2

// standard is the yardsticks' own workload.
var standard = workload{products: skus}

// order is order i of a series: 1 to 3 different products, in ascending order.
func (w workload) order(s series, i int) order {
	r := mix(uint64(s.seed)<<40 | uint64(i)) //nolint:gosec // small numbers
	n := 1 + int(r%3)
	o := order{ID: s.id(i), Customer: int64(mix(r) % 100_000)}
	seen := map[int]bool{}
	if w.hot && i%2 == 0 {
		seen[hotSKU] = true
		o.add(item{SKU: hotSKU, Qty: 1, Price: 1000})
	}
	for len(o.Items) < n {
		r = mix(r)
		s := 1 + int(r%uint64(w.products)) //nolint:gosec // a small number
		if seen[s] {
			continue
		}
		seen[s] = true
		o.add(item{SKU: s, Qty: 1 + int(r>>20%3), Price: int64(100 + r>>32%9900)})
	}
	slices.SortFunc(o.Items, func(a, b item) int { return a.SKU - b.SKU })
	return o
}

func (o *order) add(it item) {
	o.Items = append(o.Items, it)
	o.Total += it.Price * int64(it.Qty)
}

// numberOf is the order's number in the id of an order.
func numberOf(id [16]byte) int {
	i := 0
	for _, b := range id[10:] {
		i = i<<8 | int(b)
	}
	return i
}

// declined says whether the card of an order is declined.
func declined(id string) bool {
	const at = 24
	if len(id) <= at {
		return false
	}
	i, err := strconv.ParseInt(id[at:], 16, 64)
	return err == nil && declinedNumber(int(i))
}

func declinedNumber(i int) bool { return i%declineEvery == declineEvery-1 }

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
