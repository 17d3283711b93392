package domain_test

import (
	"maps"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"ordersaga/domain"
)

// lines takes a sku and a quantity in turn.
func lines(of ...any) []domain.Line {
	var out []domain.Line
	for pair := range slices.Chunk(of, 2) {
		sku, isSKU := pair[0].(string)
		n, isNumber := pair[len(pair)-1].(int)
		if !isSKU || !isNumber {
			panic("lines takes a sku and a quantity in turn")
		}
		out = append(out, domain.Line{SKU: domain.SKU(sku), Quantity: int64(n)})
	}
	return out
}

func shelf(of ...any) map[domain.SKU]*domain.Stock {
	out := map[domain.SKU]*domain.Stock{}
	for _, l := range lines(of...) {
		out[l.SKU] = &domain.Stock{SKU: l.SKU, Available: l.Quantity}
	}
	return out
}

func TestReserveIsAllOrNone(t *testing.T) {
	id := domain.NewOrderID()
	stock := shelf("cup", 5, "tea", 1)
	r, changed := domain.Reserve(nil, id, lines("cup", 2, "tea", 2), stock)
	require.True(t, changed)
	require.Equal(t, domain.RejectedStock, r.State)
	require.EqualValues(t, "tea", r.Short)
	require.EqualValues(t, 1, r.Have)
	require.False(t, r.Holds())
	require.EqualValues(t, 5, stock["cup"].Available, "nothing is set aside of a rejected order")

	r, _ = domain.Reserve(nil, id, lines("wine", 1), stock)
	require.Equal(t, domain.RejectedStock, r.State, "a product without stock")

	r, changed = domain.Reserve(nil, id, lines("cup", 5, "tea", 1), stock)
	require.True(t, changed)
	require.True(t, r.Holds())
	require.Equal(t, domain.Stock{SKU: "cup", Available: 0, Reserved: 5}, *stock["cup"])
	require.EqualValues(t, 5, stock["cup"].OnHand())

	again, changed := domain.Reserve(&r, id, lines("cup", 1), stock)
	require.False(t, changed)
	require.Equal(t, r, again, "a repeat answers as the first did")
}

// TestReservationTransitions is the whole table: what every action does in every state.
func TestReservationTransitions(t *testing.T) {
	for _, c := range []struct {
		prior                    domain.ReservationState // empty: none
		reserve, commit, release domain.ReservationState // the state after it
		commitErr, releaseErr    error
	}{
		{"", domain.Reserved, "", domain.TombstonedStock, domain.ErrNoReservation, nil},
		{domain.Reserved, domain.Reserved, domain.CommittedStock, domain.Released, nil, nil},
		{domain.RejectedStock, domain.RejectedStock, domain.RejectedStock, domain.RejectedStock, domain.ErrNoReservation, nil},
		{domain.CommittedStock, domain.CommittedStock, domain.CommittedStock, domain.CommittedStock, nil, domain.ErrCommitted},
		{domain.Released, domain.Released, domain.Released, domain.Released, domain.ErrNoReservation, nil},
		{domain.TombstonedStock, domain.TombstonedStock, domain.TombstonedStock, domain.TombstonedStock, domain.ErrNoReservation, nil},
	} {
		t.Run("from "+string(c.prior), func(t *testing.T) {
			id := domain.NewOrderID()
			prior := func() *domain.Reservation {
				if c.prior == "" {
					return nil
				}
				return &domain.Reservation{Order: id, State: c.prior, Lines: lines("tea", 2)}
			}
			stock := func() map[domain.SKU]*domain.Stock {
				return map[domain.SKU]*domain.Stock{"tea": {SKU: "tea", Available: 3, Reserved: 2, Sold: 7}}
			}

			s := stock()
			r, changed := domain.Reserve(prior(), id, lines("tea", 2), s)
			require.Equal(t, c.reserve, r.State)
			require.Equal(t, c.prior == "", changed)

			s = stock()
			p := prior()
			changed, err := p.Commit(s)
			require.ErrorIs(t, err, c.commitErr)
			require.Equal(t, c.prior == domain.Reserved, changed)
			if p != nil {
				require.Equal(t, c.commit, p.State)
			}
			if changed {
				require.Equal(t, domain.Stock{SKU: "tea", Available: 3, Sold: 9}, *s["tea"])
			} else {
				require.Equal(t, stock(), s)
			}

			s = stock()
			r, changed, err = domain.Release(prior(), id, s)
			require.ErrorIs(t, err, c.releaseErr)
			require.Equal(t, c.release, r.State)
			require.Equal(t, c.prior == "" || c.prior == domain.Reserved, changed)
			if c.prior == domain.Reserved {
				require.Equal(t, domain.Stock{SKU: "tea", Available: 5, Sold: 7}, *s["tea"])
			} else {
				require.Equal(t, stock(), s)
			}
		})
	}
}

func TestStockRowMissing(t *testing.T) {
	id := domain.NewOrderID()
	r := domain.Reservation{Order: id, State: domain.Reserved, Lines: lines("cup", 1, "tea", 1)}
	stock := shelf("cup", 1)
	_, err := r.Commit(stock)
	require.ErrorContains(t, err, `"tea"`)
	_, _, err = domain.Release(&r, id, stock)
	require.ErrorContains(t, err, `"tea"`)
	require.Equal(t, shelf("cup", 1), stock, "nothing is changed by half")
	require.Equal(t, domain.Reserved, r.State)
}

func TestCheckLines(t *testing.T) {
	got, err := domain.CheckLines(lines("tea", 1, "cup", 2))
	require.NoError(t, err)
	require.Equal(t, lines("cup", 2, "tea", 1), got)
	for _, bad := range [][]domain.Line{nil, make([]domain.Line, 101), lines("", 1), lines("tea", 0), lines("tea", -1), lines("tea", domain.MaxQuantity+1), lines("tea", 1, "tea", 1)} {
		_, err := domain.CheckLines(bad)
		require.Error(t, err)
	}
}

func TestAdjust(t *testing.T) {
	s := domain.Stock{SKU: "tea", Available: 3, Reserved: 2, Sold: 1}
	require.NoError(t, s.Adjust(10))
	require.Equal(t, domain.Stock{SKU: "tea", Available: 8, Reserved: 2, Sold: 1}, s)
	require.NoError(t, s.Adjust(2))
	require.Error(t, s.Adjust(1))
	require.Error(t, s.Adjust(-1))
	require.EqualValues(t, 2, s.OnHand(), "a refused adjustment changes nothing")
}

// TestF29_StockAddsUp plays any sequence of actions of any orders and counts after each.
func TestF29_StockAddsUp(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		skus := []domain.SKU{"a", "b", "c"}
		stock, start := map[domain.SKU]*domain.Stock{}, map[domain.SKU]int64{}
		for _, sku := range skus {
			start[sku] = rapid.Int64Range(0, 20).Draw(t, "on hand")
			stock[sku] = &domain.Stock{SKU: sku, Available: start[sku]}
		}
		orders := make([]domain.OrderID, 6)
		rs := map[domain.OrderID]*domain.Reservation{}
		for i := range orders {
			orders[i] = domain.NewOrderID()
		}
		for range rapid.IntRange(1, 60).Draw(t, "actions") {
			id := rapid.SampledFrom(orders).Draw(t, "order")
			switch rapid.IntRange(0, 2).Draw(t, "action") {
			case 0:
				want := map[domain.SKU]int64{}
				for range rapid.IntRange(1, 3).Draw(t, "lines") {
					want[rapid.SampledFrom(skus).Draw(t, "sku")] = rapid.Int64Range(1, 6).Draw(t, "quantity")
				}
				var ls []domain.Line
				for sku, n := range maps.All(want) {
					ls = append(ls, domain.Line{SKU: sku, Quantity: n})
				}
				ls, err := domain.CheckLines(ls)
				require.NoError(t, err)
				if r, changed := domain.Reserve(rs[id], id, ls, stock); changed {
					rs[id] = &r
				}
			case 1:
				_, _ = rs[id].Commit(stock) // an error is an answer too
			case 2:
				if r, changed, err := domain.Release(rs[id], id, stock); err == nil && changed {
					rs[id] = &r
				}
			}
			reserved, sold := map[domain.SKU]int64{}, map[domain.SKU]int64{}
			for _, r := range rs {
				for _, l := range r.Lines {
					switch r.State {
					case domain.Reserved:
						reserved[l.SKU] += l.Quantity
					case domain.CommittedStock:
						sold[l.SKU] += l.Quantity
					default: // holds nothing
					}
				}
			}
			for _, sku := range skus {
				s := stock[sku]
				require.True(t, s.Available >= 0 && s.Reserved >= 0 && s.Sold >= 0, "%+v", s)
				require.Equal(t, reserved[sku], s.Reserved)
				require.Equal(t, sold[sku], s.Sold)
				require.Equal(t, start[sku], s.OnHand()+s.Sold)
			}
		}
	})
}
