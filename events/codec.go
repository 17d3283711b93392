package events

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"mime"
	"reflect"
	"strings"

	"github.com/google/uuid"
	"google.golang.org/protobuf/proto"

	"ordersaga/schemas/ordersv1"
)

// Bounds of a body. Kafka's own default limit of a record is 1 MiB too.
const (
	MaxBody  = 1 << 20 // bytes
	MaxDepth = 32      // of nested objects and arrays, in fields that are ignored too
)

var unmarshal = proto.UnmarshalOptions{DiscardUnknown: true}

// Encode writes a message's body in the format that the table gives its type. The answer is never nil: Kafka takes a null value for a
// deletion. An error is a slip of the caller's: no such type, another type's data, or data that names another order or sequence than
// the envelope does.
func Encode(e Envelope) ([]byte, error) {
	t, ok := TypeOf(e.Type)
	if !ok {
		return nil, fmt.Errorf("encode: the table has no message type %q", e.Type)
	}
	if got := reflect.TypeOf(e.Data); got != t.goType {
		return nil, fmt.Errorf("encode %s: its data is a %v, must be a %v", e.Type, got, t.goType)
	}
	if reflect.ValueOf(e.Data).IsNil() {
		return nil, fmt.Errorf("encode %s: its data is nil", e.Type)
	}
	if e.OrderID == uuid.Nil {
		return nil, fmt.Errorf("encode %s: it has no order id", e.Type)
	}
	if err := agrees(&e); err != nil {
		return nil, fmt.Errorf("encode %s: %w", e.Type, err)
	}
	if t.Format == JSON {
		b, err := json.Marshal(e.Data)
		if err != nil {
			return nil, fmt.Errorf("encode %s: %w", e.Type, err)
		}
		return b, nil
	}
	m, _ := e.Data.(proto.Message) // goType is one
	b, err := proto.Marshal(m)
	if err != nil {
		return nil, fmt.Errorf("encode %s: %w", e.Type, err)
	}
	if b == nil {
		b = []byte{}
	}
	return b, nil
}

// agrees holds the promise that Decode reads what Encode wrote: a body that repeats attributes repeats those of its envelope.
func agrees(e *Envelope) error {
	var id string
	seq := e.Sequence
	switch d := e.Data.(type) {
	case *PlaceOrder:
		id = d.OrderID
	case *CancelOrder:
		id = d.OrderID
	case *OrderEvent:
		id, seq = d.OrderID, d.Sequence
	default:
		return nil
	}
	if u, ok := orderID(id); !ok || u != e.OrderID {
		return fmt.Errorf("the order_id of its data is %q, the envelope's is %s", clean(id), e.OrderID)
	}
	if seq != e.Sequence {
		return fmt.Errorf("the sequence of its data is %d, the envelope's is %d", seq, e.Sequence)
	}
	return nil
}

const uuidLen = 36 // the canonical form, in either case; the library takes others too

func orderID(s string) (uuid.UUID, bool) {
	if len(s) != uuidLen {
		return uuid.Nil, false
	}
	u, err := uuid.Parse(s)
	return u, err == nil && u != uuid.Nil
}

func orderKey(b []byte) (uuid.UUID, bool) {
	if len(b) != uuidLen {
		return uuid.Nil, false
	}
	u, err := uuid.ParseBytes(b)
	return u, err == nil && u != uuid.Nil
}

// Decode reads a record in CloudEvents' binary mode. Its id is the record's Identity, so a copy in a retry topic must be given with its
// origin if it has no ce_id. An error is either a *UnknownTypeError, which is transient, or answers `Poison() bool`; its text is one
// line, says what to add or change, and repeats little of the record.
func Decode(r *Record) (Envelope, error) {
	a := AttributesOf(r)
	return a.Decode(r)
}

// Decode reads the record, whose attributes these are; see the function of that name.
func (a *Attributes) Decode(r *Record) (Envelope, error) {
	t, err := a.typeFor(r.Topic)
	if err != nil {
		return Envelope{}, err
	}
	format, err := a.formatFor(t)
	if err != nil {
		return Envelope{}, err
	}
	key, ok := orderKey(r.Key)
	if !ok {
		return Envelope{}, badKey(r.Key)
	}
	if len(r.Value) > MaxBody {
		return Envelope{}, bad("the body of %s has %d bytes, at most %d are taken", t.Name, len(r.Value), MaxBody)
	}
	e := Envelope{ID: a.Identity(r), Type: t.Name, OrderID: key}
	if a.Traceparent != nil {
		e.Trace, _ = ParseTraceparent(a.Traceparent)
	}
	if format == JSON {
		e.Data = t.New()
		err = decodeJSON(t, r.Value, e.Data)
	} else {
		e.Data, err = decodeProtobuf(t, r.Value)
	}
	if err != nil {
		return Envelope{}, err
	}
	if err := sameOrder(&e); err != nil {
		return Envelope{}, err
	}
	return e, nil
}

func (a *Attributes) typeFor(topic Topic) (*Type, error) {
	if v := a.SpecVersion; v != nil && !bytes.Equal(v, specVersionValue) {
		return nil, bad("header ce_specversion is %q: this reads CloudEvents 1.0, send 1.0 or leave it out", clean(v))
	}
	if len(a.Type) == 0 {
		return nil, missingType(topic)
	}
	t := a.row
	if t == nil {
		return nil, &UnknownTypeError{CE: clean(a.Type), Topic: topic}
	}
	if topic != t.Topic && topics[topic] { // a retry topic holds any type of its group
		return nil, bad("ce_type %s does not belong on topic %s: it goes to %s", t.CE, topic, t.Topic)
	}
	return t, nil
}

func missingType(topic Topic) error {
	example, on := ceOrders+string(TPlaceOrder), TopicCommands
	if known := typesOn(topic); len(known) > 0 {
		example, on = known[0], topic
	}
	return bad("header ce_type is missing: add one that says what the message is, such as ce_type=%s; "+
		"with kcat: kcat -P -b BROKER -t %s -k ORDER_ID -H ce_type=%s", example, on, example)
}

// formatFor reads content-type. Without one a body is JSON.
func (a *Attributes) formatFor(t *Type) (Format, error) {
	h := a.ContentType
	f := JSON
	switch string(h) {
	case "", ContentJSON:
	case ContentProtobuf:
		f = Protobuf
	default:
		var err error
		if f, err = mediaType(h); err != nil {
			return 0, err
		}
	}
	switch {
	case f == t.Format:
		return f, nil
	case t.Format == Protobuf:
		said := "says " + ContentJSON
		if len(h) == 0 {
			said = "is missing, which means " + ContentJSON
		}
		return 0, bad("%s is an internal message and comes in Protobuf only, but header content-type %s: send it as %s", t.Name, said, ContentProtobuf)
	case t.Topic != TopicCommands:
		return 0, bad("%s comes in JSON only, but header content-type says %s: send it as %s", t.Name, ContentProtobuf, ContentJSON)
	}
	return f, nil
}

const maxContentType = 256 // bytes; longer ones are not parsed

func mediaType(h []byte) (Format, error) {
	if len(h) <= maxContentType {
		m, params, err := mime.ParseMediaType(string(h))
		charset := strings.ToLower(params["charset"])
		switch {
		case err != nil:
		case charset != "" && charset != "utf-8" && charset != "us-ascii":
			return 0, bad("header content-type has charset %q: send UTF-8", clean(charset))
		case m == ContentJSON:
			return JSON, nil
		case m == ContentProtobuf:
			return Protobuf, nil
		case strings.HasPrefix(m, "application/cloudevents"):
			return 0, bad("header content-type is %q, CloudEvents' structured mode: send binary mode, attributes as ce_ headers and "+
				"the data alone as body, with content-type %s", clean(m), ContentJSON)
		}
	}
	return 0, bad("header content-type is %q: send %s or %s, or leave it out for JSON", clean(h), ContentJSON, ContentProtobuf)
}

func badKey(key []byte) error {
	if len(key) == 0 {
		return bad("the record has no key: key it by the order's id, a UUID; with kcat: -k ORDER_ID")
	}
	return bad("the record's key is %q: it must be the order's id, a UUID such as 01890a5d-ac96-774b-bcce-b302099a8057", clean(key))
}

// sameOrder checks the order id of a body that has one, and takes over its sequence.
func sameOrder(e *Envelope) error {
	var id string
	switch d := e.Data.(type) {
	case *PlaceOrder:
		id = d.OrderID
	case *CancelOrder:
		id = d.OrderID
	case *OrderEvent:
		id, e.Sequence = d.OrderID, d.Sequence
	default:
		return nil
	}
	if id == "" {
		return bad("the body of %s has no order_id: add it, a UUID, the same as the record's key", e.Type)
	}
	u, ok := orderID(id)
	if !ok {
		return bad("order_id is %q: it must be a UUID such as 01890a5d-ac96-774b-bcce-b302099a8057", clean(id))
	}
	if u != e.OrderID {
		return bad("the record's key is %s, but the order_id of its body is %s: key the record by its order_id, so that the records of an order stay in order",
			e.OrderID, u)
	}
	return nil
}

func decodeJSON(t *Type, b []byte, into any) error {
	if len(bytes.TrimSpace(b)) == 0 {
		return bad("the body of %s is empty: send a JSON object", t.Name)
	}
	if tooDeep(b) {
		return bad("the body of %s is nested deeper than %d levels", t.Name, MaxDepth)
	}
	err := json.Unmarshal(b, into)
	if err == nil {
		return nil
	}
	var wrong *json.UnmarshalTypeError
	if errors.As(err, &wrong) {
		return bad("%s", wrongType(t, wrong))
	}
	var syntax *json.SyntaxError
	if errors.As(err, &syntax) {
		return bad("the body of %s is not valid JSON: %s, at byte %d", t.Name, clean(syntax.Error()), syntax.Offset)
	}
	return bad("the body of %s is not valid JSON: %s", t.Name, clean(err.Error()))
}

// wrongType says which field is of the wrong kind, and of what kind it should be. A frequent slip: integers in quotes.
func wrongType(t *Type, e *json.UnmarshalTypeError) string {
	if e.Field == "" {
		return fmt.Sprintf("the body of %s is a JSON %s, must be an object", t.Name, clean(e.Value))
	}
	want := "a string"
	switch e.Type.Kind() { //nolint:exhaustive // the kinds that fields have; the rest are strings
	case reflect.Int64, reflect.Int32:
		want = "an integer as a JSON number: no quotes, no fraction, no exponent"
		if e.Type.Kind() == reflect.Int64 {
			want += ", of at most 64 bits"
		}
	case reflect.Slice:
		want = "an array"
	case reflect.Struct:
		want = "an object"
	}
	return fmt.Sprintf("field %q of %s is a JSON %s, must be %s", clean(e.Field), t.Name, clean(e.Value), want)
}

// tooDeep bounds nesting before the parser sees it. It need not know whether the JSON is valid.
func tooDeep(b []byte) bool {
	depth, quoted := 0, false
	for i := 0; i < len(b); i++ {
		switch c := b[i]; {
		case quoted && c == '\\':
			i++
		case c == '"':
			quoted = !quoted
		case quoted:
		case c == '{' || c == '[':
			if depth++; depth > MaxDepth {
				return true
			}
		case c == '}' || c == ']':
			depth--
		}
	}
	return false
}

// decodeProtobuf reads an internal message, or a command that a producer sent in Protobuf, which becomes what its JSON would be.
func decodeProtobuf(t *Type, b []byte) (any, error) {
	var m proto.Message
	switch t.Name {
	case TPlaceOrder:
		m = new(ordersv1.PlaceOrder)
	case TCancelOrder:
		m = new(ordersv1.CancelOrder)
	default:
		m, _ = t.New().(proto.Message) // the formats were compared
	}
	if err := unmarshal.Unmarshal(b, m); err != nil {
		return nil, bad("the body of %s is not valid Protobuf of that message: %s", t.Name, clean(err.Error()))
	}
	switch m := m.(type) {
	case *ordersv1.PlaceOrder:
		return placeOrder(m), nil
	case *ordersv1.CancelOrder:
		return &CancelOrder{OrderID: m.GetOrderId(), Reason: m.GetReason()}, nil
	}
	return m, nil
}

func placeOrder(m *ordersv1.PlaceOrder) *PlaceOrder {
	p := &PlaceOrder{
		OrderID: m.GetOrderId(), CustomerID: m.GetCustomerId(), Currency: m.GetCurrency(), PaymentMethod: m.GetPaymentMethod(),
		Items: make([]OrderItem, len(m.GetItems())),
	}
	for i, it := range m.GetItems() {
		p.Items[i] = OrderItem{SKU: it.GetSku(), Quantity: it.GetQuantity(), UnitPriceMinor: it.UnitPriceMinor}
	}
	return p
}
