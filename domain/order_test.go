package domain_test

import (
	"math"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"ordersaga/domain"
)

func ptr(n int64) *int64 { return &n }

func draft(change func(*domain.Draft)) *domain.Draft {
	d := &domain.Draft{
		CustomerID: "c-1", Currency: "EUR", PaymentMethod: "pm_card_visa",
		Items: []domain.DraftItem{{SKU: "tea", Quantity: 2, UnitPrice: ptr(450)}, {SKU: "cup", Quantity: 1}},
	}
	if change != nil {
		change(d)
	}
	return d
}

var products = map[domain.SKU]domain.Product{
	"tea":   {SKU: "tea", Name: "Tea", UnitPrice: domain.Money{Minor: 450, Currency: "EUR"}},
	"cup":   {SKU: "cup", Name: "Cup", UnitPrice: domain.Money{Minor: 1200, Currency: "EUR"}},
	"gift":  {SKU: "gift", Name: "Gift", UnitPrice: domain.Money{Minor: 0, Currency: "EUR"}},
	"usd":   {SKU: "usd", Name: "Dollar", UnitPrice: domain.Money{Minor: 100, Currency: "USD"}},
	"yacht": {SKU: "yacht", Name: "Yacht", UnitPrice: domain.Money{Minor: math.MaxInt64, Currency: "EUR"}},
	"odd":   {SKU: "odd", Name: "Odd", UnitPrice: domain.Money{Minor: -5, Currency: "EUR"}},
}

func TestPriceMakesAnOrder(t *testing.T) {
	o, r := draft(nil).Price(products)
	require.Nil(t, r)
	require.Equal(t, domain.Money{Minor: 2100, Currency: "EUR"}, o.Total)
	require.Equal(t, []domain.Line{{SKU: "cup", Quantity: 1, UnitPrice: 1200}, {SKU: "tea", Quantity: 2, UnitPrice: 450}}, o.Lines, "sorted by SKU")
	require.Equal(t, domain.Pending, o.Status)
}

func TestPriceRefuses(t *testing.T) {
	item := func(sku domain.SKU, n int64, price *int64) func(*domain.Draft) {
		return func(d *domain.Draft) { d.Items = []domain.DraftItem{{SKU: sku, Quantity: n, UnitPrice: price}} }
	}
	for name, c := range map[string]struct {
		change func(*domain.Draft)
		reason domain.Reason
		field  string
		detail string
	}{
		"no customer":        {func(d *domain.Draft) { d.CustomerID = "" }, domain.Invalid, "/customer_id", "missing"},
		"long customer":      {func(d *domain.Draft) { d.CustomerID = strings.Repeat("x", 129) }, domain.Invalid, "/customer_id", "longer"},
		"customer with LF":   {func(d *domain.Draft) { d.CustomerID = "a\nb" }, domain.Invalid, "/customer_id", "control"},
		"customer with NEL":  {func(d *domain.Draft) { d.CustomerID = "a\u0085b" }, domain.Invalid, "/customer_id", "control"},
		"customer not UTF-8": {func(d *domain.Draft) { d.CustomerID = "a\xff" }, domain.Invalid, "/customer_id", "control"},
		"currency":           {func(d *domain.Draft) { d.Currency = "eur" }, domain.Invalid, "/currency", "ISO 4217"},
		"no method":          {func(d *domain.Draft) { d.PaymentMethod = "" }, domain.Invalid, "/payment_method", "missing"},
		"no items":           {func(d *domain.Draft) { d.Items = nil }, domain.Invalid, "/items", "at least one"},
		"many items":         {func(d *domain.Draft) { d.Items = make([]domain.DraftItem, 101) }, domain.Invalid, "/items", "at most 100"},
		"twice":              {func(d *domain.Draft) { d.Items[1].SKU = "tea" }, domain.Invalid, "/items/1/sku", "twice"},
		"no sku":             {item("", 1, nil), domain.Invalid, "/items/0/sku", "missing"},
		"none":               {item("tea", 0, nil), domain.Invalid, "/items/0/quantity", "between 1"},
		"negative":           {item("tea", -1, nil), domain.Invalid, "/items/0/quantity", "between 1"},
		"too many":           {item("tea", domain.MaxQuantity+1, nil), domain.Invalid, "/items/0/quantity", "between 1"},
		"negative price":     {item("tea", 1, ptr(-1)), domain.Invalid, "/items/0/unit_price_minor", "negative"},
		"unknown":            {item("wine", 1, nil), domain.UnknownProduct, "/items/0/sku", "no product"},
		"price changed":      {item("tea", 1, ptr(449)), domain.PriceChanged, "/items/0/unit_price_minor", "costs 450 now"},
		"other currency":     {item("usd", 1, nil), domain.Invalid, "/currency", "sold in USD"},
		"too dear":           {item("yacht", 1, nil), domain.Invalid, "/items", "above the limit"},
		"overflow":           {item("yacht", 3, nil), domain.Invalid, "/items", "above the limit"},
		"free":               {item("gift", 1, nil), domain.Invalid, "/items", "nothing to charge"},
		"broken catalogue":   {item("odd", 1, nil), domain.Invalid, "/items/0/sku", "correct the product"},
	} {
		t.Run(name, func(t *testing.T) {
			o, r := draft(c.change).Price(products)
			require.Nil(t, o)
			require.NotNil(t, r)
			require.Equal(t, c.reason, r.Reason)
			require.Equal(t, c.field, r.Field)
			require.ErrorContains(t, r, c.detail)
		})
	}
}

func TestOrderIDs(t *testing.T) {
	id := domain.NewOrderID()
	for _, s := range []string{id.String(), strings.ToUpper(id.String())} {
		got, err := domain.ParseOrderID(s)
		require.NoError(t, err)
		require.Equal(t, id, got)
	}
	for _, s := range []string{"", "1", "{" + id.String() + "}", strings.Repeat("x", 36), "00000000-0000-0000-0000-000000000000", strings.ReplaceAll(id.String(), "-", ""), "urn:uuid:" + id.String()} {
		_, err := domain.ParseOrderID(s)
		require.Error(t, err, s)
	}
	a, b := domain.NewOrderID(), domain.NewOrderID()
	require.Equal(t, -1, a.Compare(b), "later ids sort later")
	require.True(t, domain.OrderID{}.IsZero())
}

func TestMoney(t *testing.T) {
	eur := func(n int64) domain.Money { return domain.Money{Minor: n, Currency: "EUR"} }
	sum, err := eur(1).Add(eur(2))
	require.NoError(t, err)
	require.Equal(t, eur(3), sum)
	_, err = eur(1).Add(domain.Money{Minor: 1, Currency: "USD"})
	require.ErrorIs(t, err, domain.ErrCurrency)
	for _, c := range [][2]int64{{math.MaxInt64, 1}, {math.MinInt64, -1}} {
		_, err = eur(c[0]).Add(eur(c[1]))
		require.ErrorIs(t, err, domain.ErrOverflow)
	}
	for _, c := range [][2]int64{{math.MaxInt64, 2}, {math.MinInt64, -1}, {math.MinInt64, 2}, {math.MaxInt64, -2}} {
		_, err = eur(c[0]).Times(c[1])
		require.ErrorIs(t, err, domain.ErrOverflow, "%v", c)
	}
	for _, c := range [][3]int64{{0, 5, 0}, {5, 0, 0}, {math.MaxInt64, -1, -math.MaxInt64}, {-3, 4, -12}} {
		got, err := eur(c[0]).Times(c[1])
		require.NoError(t, err)
		require.Equal(t, eur(c[2]), got)
	}
	require.Equal(t, "3 EUR", sum.String())
	require.False(t, domain.ValidCurrency("EURO"))
}

func TestStatuses(t *testing.T) {
	for _, s := range domain.Statuses {
		require.Equal(t, s != domain.Pending, s.Terminal())
	}
}

func FuzzParseOrderID(f *testing.F) {
	f.Add("0190b5a0-0000-7000-8000-000000000000")
	f.Add("{0190b5a0-0000-7000-8000-00000000000}")
	f.Add("")
	f.Fuzz(func(t *testing.T, s string) {
		id, err := domain.ParseOrderID(s)
		if err != nil {
			require.True(t, id.IsZero())
			return
		}
		again, err := domain.ParseOrderID(id.String())
		require.NoError(t, err)
		require.Equal(t, id, again)
		require.True(t, strings.EqualFold(s, id.String()), "only the canonical form is taken: %q", s)
	})
}

// FuzzPrice holds that no draft and no catalogue make an order that can't be charged, reserved or stored.
func FuzzPrice(f *testing.F) {
	f.Add("c", "EUR", "pm", "tea", int64(2), int64(450), "cup", int64(1), int64(1200), true)
	f.Add("c", "EUR", "pm", "a", int64(10000), int64(math.MaxInt64), "b", int64(1), int64(-1), false)
	f.Add("\xff", "eur", "", "a", int64(-1), int64(0), "a", int64(math.MinInt64), int64(math.MinInt64), true)
	f.Fuzz(func(t *testing.T, customer, currency, method, sku1 string, n1, price1 int64, sku2 string, n2, price2 int64, given bool) {
		d := &domain.Draft{CustomerID: customer, Currency: currency, PaymentMethod: method, Items: []domain.DraftItem{
			{SKU: domain.SKU(sku1), Quantity: n1}, {SKU: domain.SKU(sku2), Quantity: n2},
		}}
		if given {
			d.Items[0].UnitPrice = &price1
		}
		catalogue := map[domain.SKU]domain.Product{
			domain.SKU(sku1): {SKU: domain.SKU(sku1), UnitPrice: domain.Money{Minor: price1, Currency: currency}},
			domain.SKU(sku2): {SKU: domain.SKU(sku2), UnitPrice: domain.Money{Minor: price2, Currency: currency}},
		}
		o, r := d.Price(catalogue)
		require.NotEqual(t, o == nil, r == nil)
		if r != nil {
			require.NotEmpty(t, r.Error())
			return
		}
		require.Nil(t, d.Check())
		require.True(t, o.Total.Minor >= 1 && o.Total.Minor <= domain.MaxMinor, "total %d", o.Total.Minor)
		var sum int64
		for _, l := range o.Lines {
			require.GreaterOrEqual(t, l.UnitPrice, int64(0))
			sum += l.UnitPrice * l.Quantity
		}
		require.Equal(t, o.Total.Minor, sum)
		lines, err := domain.CheckLines(o.Lines)
		require.NoError(t, err, "what can be ordered can be reserved")
		require.True(t, slices.Equal(lines, o.Lines), "sorted already")
	})
}
