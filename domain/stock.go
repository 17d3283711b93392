package domain

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
)

// Stock is what there is of a product. OnHand = Available + Reserved, always; none is ever negative.
type Stock struct {
	SKU       SKU
	Available int64 // may be reserved
	Reserved  int64 // set aside for orders under way
	Sold      int64 // left the stock by committed reservations, ever
}

// OnHand is what lies in the warehouse.
func (s *Stock) OnHand() int64 { return s.Available + s.Reserved }

// ReservationState is where an order's reservation stands. The row is also the barrier of the stock steps.
type ReservationState string

// The states of a reservation.
const (
	Reserved        ReservationState = "reserved"
	RejectedStock   ReservationState = "rejected"  // there was not enough; nothing is set aside
	CommittedStock  ReservationState = "committed" // sold
	Released        ReservationState = "released"
	TombstonedStock ReservationState = "tombstone" // released before it was seen: a late ReserveStock is refused
)

// Reservation is an order's claim on stock.
type Reservation struct {
	Order OrderID
	State ReservationState
	Lines []Line // sorted by SKU; UnitPrice is not used
	// Short and Have tell which product was short, of a rejected reservation.
	Short SKU
	Have  int64
}

// ErrNoReservation says that stock should be committed that was never reserved, or was released: a message out of place.
var ErrNoReservation = errors.New("there is no reservation to commit")

// CheckLines answers the lines sorted by SKU, or why they can't be reserved: a line without pieces or one that is there twice would
// turn a reservation into a gift.
func CheckLines(lines []Line) ([]Line, error) {
	if len(lines) == 0 || len(lines) > MaxLines {
		return nil, fmt.Errorf("a reservation has %d lines, not 1 to %d", len(lines), MaxLines)
	}
	lines = slices.SortedFunc(slices.Values(lines), func(a, b Line) int { return cmp.Compare(a.SKU, b.SKU) })
	for i, l := range lines {
		switch {
		case l.SKU == "":
			return nil, errors.New("a line of a reservation has no sku")
		case l.Quantity < 1 || l.Quantity > MaxQuantity:
			return nil, fmt.Errorf("quantity %d of product %q is not between 1 and %d", l.Quantity, l.SKU, MaxQuantity)
		case i > 0 && lines[i-1].SKU == l.SKU:
			return nil, fmt.Errorf("product %q is there twice in one reservation", l.SKU)
		}
	}
	return lines, nil
}

// Reserve answers the reservation of the lines and takes them out of stock, all or none. prior is the order's reservation if there is
// one: a repeat answers as the first did, and after an undo the answer is a rejection. stock must hold every SKU that is known.
// changed says that the reservation (and perhaps the stock) is to be stored. The lines have passed CheckLines.
func Reserve(prior *Reservation, order OrderID, lines []Line, stock map[SKU]*Stock) (r Reservation, changed bool) {
	if prior != nil {
		return *prior, false
	}
	r = Reservation{Order: order, State: Reserved, Lines: lines}
	for _, l := range lines {
		s := stock[l.SKU]
		if s == nil || s.Available < l.Quantity {
			r.State, r.Short = RejectedStock, l.SKU
			if s != nil {
				r.Have = s.Available
			}
			return r, true
		}
	}
	for _, l := range lines {
		s := stock[l.SKU]
		s.Available -= l.Quantity
		s.Reserved += l.Quantity
	}
	return r, true
}

// Holds reports that the order's lines are set aside or sold.
func (r *Reservation) Holds() bool { return r.State == Reserved || r.State == CommittedStock }

// Commit turns a reservation into a sale. A repeat changes nothing.
func (r *Reservation) Commit(stock map[SKU]*Stock) (changed bool, err error) {
	if r == nil {
		return false, ErrNoReservation
	}
	switch r.State {
	case CommittedStock:
		return false, nil
	case Reserved:
	default:
		return false, fmt.Errorf("%w: it is %s", ErrNoReservation, r.State)
	}
	for _, l := range r.Lines {
		s := stock[l.SKU]
		if s == nil {
			return false, fmt.Errorf("product %q of a reservation has no stock row", l.SKU)
		}
	}
	for _, l := range r.Lines {
		s := stock[l.SKU]
		s.Reserved -= l.Quantity
		s.Sold += l.Quantity
	}
	r.State = CommittedStock
	return true, nil
}

// ErrCommitted says that stock should be released that is sold: an undo after the pivot's point of no return.
var ErrCommitted = errors.New("the reservation is committed: the order is confirmed, a return is another process")

// Release undoes Reserve, seen or not: without a reservation it answers a tombstone that refuses the late one.
func Release(prior *Reservation, order OrderID, stock map[SKU]*Stock) (r Reservation, changed bool, err error) {
	if prior == nil {
		return Reservation{Order: order, State: TombstonedStock}, true, nil
	}
	r = *prior
	switch r.State {
	case CommittedStock:
		return r, false, ErrCommitted
	case Reserved:
	default:
		return r, false, nil
	}
	for _, l := range r.Lines {
		if stock[l.SKU] == nil {
			return r, false, fmt.Errorf("product %q of a reservation has no stock row", l.SKU)
		}
	}
	for _, l := range r.Lines {
		s := stock[l.SKU]
		s.Reserved -= l.Quantity
		s.Available += l.Quantity
	}
	r.State = Released
	return r, true, nil
}

// Adjust sets what lies in the warehouse to onHand, leaving reservations as they are.
func (s *Stock) Adjust(onHand int64) error {
	if onHand < 0 {
		return fmt.Errorf("on_hand %d is negative", onHand)
	}
	if onHand < s.Reserved {
		return fmt.Errorf("on_hand %d is less than the %d that are reserved for orders under way", onHand, s.Reserved)
	}
	s.Available = onHand - s.Reserved
	return nil
}
