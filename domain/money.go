package domain

import (
	"errors"
	"fmt"
	"math"
)

// Money is an amount in minor units (cents for EUR) of one ISO 4217 currency.
type Money struct {
	Minor    int64
	Currency string // three upper-case letters
}

// MaxMinor bounds an order's total in minor units. It equals the largest amount the payment gateway takes (eight digits).
const MaxMinor = 99_999_999

// ErrCurrency says that two amounts of different currencies met.
var ErrCurrency = errors.New("amounts of different currencies")

// ErrOverflow says that an amount left the range of MaxMinor.
var ErrOverflow = errors.New("amount out of range")

// Add sums two amounts of one currency.
func (m Money) Add(o Money) (Money, error) {
	if m.Currency != o.Currency {
		return Money{}, fmt.Errorf("%w: %s and %s", ErrCurrency, m.Currency, o.Currency)
	}
	if o.Minor > 0 && m.Minor > math.MaxInt64-o.Minor || o.Minor < 0 && m.Minor < math.MinInt64-o.Minor {
		return Money{}, ErrOverflow
	}
	return Money{Minor: m.Minor + o.Minor, Currency: m.Currency}, nil
}

// Times multiplies an amount by a quantity.
func (m Money) Times(n int64) (Money, error) {
	p := m.Minor * n
	// The smallest integer times -1 is itself again, so dividing back would not notice.
	if n != 0 && (p/n != m.Minor || n == -1 && m.Minor == math.MinInt64) {
		return Money{}, ErrOverflow
	}
	return Money{Minor: p, Currency: m.Currency}, nil
}

// ValidCurrency reports whether c has the shape of an ISO 4217 code. Whether anybody sells in it is the catalogue's to say.
func ValidCurrency(c string) bool {
	if len(c) != 3 {
		return false
	}
	for i := range 3 {
		if c[i] < 'A' || c[i] > 'Z' {
			return false
		}
	}
	return true
}

func (m Money) String() string { return fmt.Sprintf("%d %s", m.Minor, m.Currency) }
