package httpapi

import "unicode/utf8"

// quickOrder reads the body of an order as nearly every client writes it: known fields, each once, strings without escapes, whole numbers
// without sign or exponent. Of any other body, sound or not, it answers false: decodeStrict reads that, or says what is wrong with it.
func quickOrder(b []byte) (o orderBody, ok bool) {
	if !utf8.Valid(b) {
		return orderBody{}, false
	}
	c := cursor{b: b}
	const orderID, customerID, currency, paymentMethod, items = 1, 2, 4, 8, 16
	seen := 0
	ok = c.object(func(name []byte) bool {
		field := 0
		switch string(name) {
		case "order_id":
			var id string
			field, id, o.OrderID = orderID, c.text(), new(string)
			*o.OrderID = id
		case "customer_id":
			field, o.CustomerID = customerID, c.text()
		case "currency":
			field, o.Currency = currency, c.text()
		case "payment_method":
			field, o.PaymentMethod = paymentMethod, c.text()
		case "items":
			field, o.Items = items, c.items()
		}
		fresh := field != 0 && seen&field == 0
		seen |= field
		return fresh
	})
	return o, ok && c.next() == 0 && c.i > len(b)
}

// cursor reads a document from its beginning to its end. Once it meets what it does not take it has failed, and everything it answers from
// then on is worthless.
type cursor struct {
	b      []byte
	i      int
	failed bool
}

func (c *cursor) fail() { c.failed = true }

// next answers the next byte that is no white space and moves behind it; 0 at the end, and then i is beyond it.
func (c *cursor) next() byte {
	for c.i < len(c.b) {
		ch := c.b[c.i]
		c.i++
		switch ch {
		case ' ', '\t', '\r', '\n':
		default:
			return ch
		}
	}
	c.i = len(c.b) + 1
	return 0
}

// object reads an object; field is called with each name and reads its value. It reports false where field does.
func (c *cursor) object(field func(name []byte) bool) bool {
	if c.next() != '{' {
		return false
	}
	for first := true; ; first = false {
		switch ch := c.next(); {
		case ch == '}' && first:
			return !c.failed
		case ch != '"':
			return false
		}
		name := c.quoted()
		if c.failed || c.next() != ':' || !field(name) || c.failed {
			return false
		}
		switch c.next() {
		case ',':
		case '}':
			return true
		default:
			return false
		}
	}
}

// quoted reads a string whose opening quote has been read.
func (c *cursor) quoted() []byte {
	for from := c.i; c.i < len(c.b); c.i++ {
		switch ch := c.b[c.i]; {
		case ch == '"':
			c.i++
			return c.b[from : c.i-1]
		case ch == '\\' || ch < ' ':
			c.fail()
			return nil
		}
	}
	c.fail()
	return nil
}

func (c *cursor) text() string {
	if c.next() != '"' {
		c.fail()
		return ""
	}
	return string(c.quoted()) // a copy: who keeps it for long does not keep the body
}

// maxDigits is how many digits every number of 64 bits has room for.
const maxDigits = 18

func (c *cursor) number() (n int64) {
	ch := c.next()
	if ch < '0' || ch > '9' {
		c.fail()
		return 0
	}
	n = int64(ch - '0')
	digits := 1
	for ; c.i < len(c.b) && c.b[c.i] >= '0' && c.b[c.i] <= '9'; digits++ {
		n = n*10 + int64(c.b[c.i]-'0')
		if c.i++; digits == maxDigits {
			c.fail()
			return 0
		}
	}
	if ch == '0' && digits > 1 {
		c.fail()
	}
	return n // a fraction or an exponent fails at what follows a value
}

func (c *cursor) items() []itemBody {
	if c.next() != '[' {
		c.fail()
		return nil
	}
	items := make([]itemBody, 0, 4)
	for !c.failed {
		items = append(items, c.item())
		switch c.next() {
		case ',':
		case ']':
			return items
		default:
			c.fail()
		}
	}
	return nil
}

func (c *cursor) item() (it itemBody) {
	const sku, quantity, price = 1, 2, 4
	seen := 0
	ok := c.object(func(name []byte) bool {
		field := 0
		switch string(name) {
		case "sku":
			field, it.SKU = sku, c.text()
		case "quantity":
			field, it.Quantity = quantity, c.number()
		case "unit_price_minor":
			n := c.number()
			field, it.UnitPriceMinor = price, &n
		}
		fresh := field != 0 && seen&field == 0
		seen |= field
		return fresh
	})
	if !ok {
		c.fail()
	}
	return it
}
