package events

import (
	"bytes"
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"

	"ordersaga/schemas/ordersv1"
)

func isPoison(err error) bool {
	var p interface{ Poison() bool }
	return errors.As(err, &p) && p.Poison()
}

const (
	cePlace  = "ordersaga.orders.v1.PlaceOrder"
	ceCancel = "ordersaga.orders.v1.CancelOrder"
)

var (
	goodKey  = testOrder.String()
	goodBody = `{"order_id":"` + goodKey + `","customer_id":"c-17","currency":"EUR","items":[{"sku":"TEA-1","quantity":2}],"payment_method":"pm_card_visa"}`
)

func TestBadRecordsArePoisonAndSayWhatToDo(t *testing.T) {
	ct := func(v string) Header { return Header{HeaderContentType, []byte(v)} }
	internal := func(ct, body string) *Record {
		r := &Record{Topic: TopicStock, Key: []byte(goodKey), Value: []byte(body), Headers: []Header{{HeaderType, []byte("ordersaga.saga.v1.ReserveStock")}}}
		if ct != "" {
			r.Headers = append(r.Headers, Header{HeaderContentType, []byte(ct)})
		}
		return r
	}
	invalidProto, err := proto.Marshal(&ordersv1.CancelOrder{OrderId: goodKey})
	require.NoError(t, err)
	for name, tc := range map[string]struct {
		r    *Record
		want []string // parts of the error
	}{
		"no ce_type":         {command("", goodKey, goodBody), []string{"ce_type is missing", "ce_type=" + cePlace, "kcat -P -b BROKER -t orders.commands.v1 -k ORDER_ID -H ce_type=" + cePlace}},
		"empty ce_type":      {command("", goodKey, goodBody, Header{HeaderType, nil}), []string{"ce_type is missing"}},
		"no ce_type, inside": {&Record{Topic: TopicReplies, Key: []byte(goodKey)}, []string{"ce_type=ordersaga.saga.v1.StockReserved", "-t saga.replies.v1"}},
		"no ce_type, retry":  {&Record{Topic: "retry.order-commands.5s", Key: []byte(goodKey)}, []string{"ce_type=" + cePlace, "-t orders.commands.v1"}},
		"wrong topic":        {command("ordersaga.saga.v1.PaymentCaptured", goodKey, ""), []string{"PaymentCaptured does not belong on topic orders.commands.v1: it goes to saga.replies.v1"}},
		"event as command":   {command("ordersaga.orders.v1.OrderConfirmed", goodKey, goodBody), []string{"it goes to orders.events.v1"}},
		"specversion":        {command(cePlace, goodKey, goodBody, Header{HeaderSpecVersion, []byte("0.3")}), []string{`ce_specversion is "0.3"`, "1.0"}},

		"no key":        {command(cePlace, "", goodBody), []string{"has no key", "-k ORDER_ID"}},
		"key not uuid":  {command(cePlace, "order-17", goodBody), []string{`key is "order-17"`, "UUID"}},
		"key in braces": {command(cePlace, "{"+goodKey+"}", goodBody), []string{"must be the order's id"}},
		"nil key":       {command(cePlace, uuid.Nil.String(), goodBody), []string{"must be the order's id"}},
		"binary key":    {command(cePlace, string(testOrder[:]), goodBody), []string{"must be the order's id"}},
		"other key":     {command(cePlace, testID.String(), goodBody), []string{"key is " + testID.String(), "order_id of its body is " + goodKey}},

		"no order_id":      {command(cePlace, goodKey, `{}`), []string{"no order_id", "same as the record's key"}},
		"null":             {command(cePlace, goodKey, `null`), []string{"no order_id"}},
		"order_id no uuid": {command(ceCancel, goodKey, `{"order_id":"17"}`), []string{`order_id is "17"`, "UUID"}},
		"array":            {command(cePlace, goodKey, `[]`), []string{"is a JSON array, must be an object"}},
		"empty":            {command(cePlace, goodKey, ` `), []string{"body of PlaceOrder is empty"}},
		"no json":          {command(cePlace, goodKey, `order_id=1`), []string{"not valid JSON", "at byte 1"}},
		"cut off":          {command(cePlace, goodKey, goodBody[:40]), []string{"not valid JSON", "unexpected end"}},
		"trailing":         {command(cePlace, goodKey, goodBody+` {"again":1}`), []string{"not valid JSON", "after top-level value"}},
		"fraction":         {command(cePlace, goodKey, `{"items":[{"quantity":1.5}]}`), []string{`"items.quantity"`, "number 1.5", "no fraction"}},
		"exponent":         {command(cePlace, goodKey, `{"items":[{"quantity":1e2}]}`), []string{`"items.quantity"`, "no exponent"}},
		"out of range":     {command(cePlace, goodKey, `{"items":[{"quantity":9223372036854775808}]}`), []string{`"items.quantity"`, "64 bits"}},
		"number as string": {command(cePlace, goodKey, `{"customer_id":17}`), []string{`"customer_id"`, "is a JSON number, must be a string"}},
		"items no array":   {command(cePlace, goodKey, `{"items":{}}`), []string{`"items"`, "is a JSON object, must be an array"}},
		"item no object":   {command(cePlace, goodKey, `{"items":["TEA-1"]}`), []string{`"items"`, "is a JSON string, must be an object"}},
		"too deep":         {command(cePlace, goodKey, `{"x":`+strings.Repeat("[", 40)+strings.Repeat("]", 40)+`}`), []string{"deeper than 32"}},
		"too large":        {command(cePlace, goodKey, `{"x":"`+strings.Repeat("y", MaxBody)+`"}`), []string{"at most 1048576"}},

		"structured mode":      {command(cePlace, goodKey, goodBody, ct("application/cloudevents+json; charset=utf-8")), []string{"structured mode", "binary mode"}},
		"text":                 {command(cePlace, goodKey, goodBody, ct("text/plain")), []string{`content-type is "text/plain"`, "application/json or application/protobuf"}},
		"charset":              {command(cePlace, goodKey, goodBody, ct("application/json; charset=latin1")), []string{`charset "latin1"`, "UTF-8"}},
		"content type garbage": {command(cePlace, goodKey, goodBody, ct(";;\x1b[31m")), []string{`content-type is ";;?[31m"`}},
		"content type flood":   {command(cePlace, goodKey, goodBody, ct("application/json;"+strings.Repeat("a=b;", 200))), []string{"content-type is"}},
		"no protobuf":          {command(ceCancel, goodKey, string(invalidProto[:20]), ct(ContentProtobuf)), []string{"not valid Protobuf"}},
		"json as protobuf":     {command(cePlace, goodKey, goodBody, ct(ContentProtobuf)), []string{"not valid Protobuf"}},
		"protobuf empty":       {command(cePlace, goodKey, "", ct(ContentProtobuf)), []string{"no order_id"}},
		"internal in json":     {internal(ContentJSON, `{}`), []string{"ReserveStock is an internal message", "content-type says application/json", "send it as application/protobuf"}},
		"internal, no type":    {internal("", ``), []string{"content-type is missing, which means application/json", "application/protobuf"}},
		"internal garbage":     {internal(ContentProtobuf, "\xff\xff"), []string{"ReserveStock is not valid Protobuf"}},
		"event in protobuf": {
			&Record{Topic: TopicEvents, Key: []byte(goodKey), Headers: []Header{{HeaderType, []byte("ordersaga.orders.v1.OrderPlaced")}, ct(ContentProtobuf)}},
			[]string{"OrderPlaced comes in JSON only"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			e, err := Decode(tc.r)
			require.Error(t, err)
			require.Zero(t, e)
			require.True(t, isPoison(err), "%v", err)
			for _, w := range tc.want {
				require.Contains(t, err.Error(), w)
			}
			requireOneLine(t, err)
		})
	}
}

// requireOneLine: what reaches logs, terminals and DLQ listings is short, printable and on one line (F26).
func requireOneLine(t *testing.T, err error) {
	t.Helper()
	msg := err.Error()
	require.True(t, utf8.ValidString(msg))
	require.LessOrEqual(t, len(msg), 700, msg)
	require.NotRegexp(t, `[\x00-\x1f\x7f-\x{9f}\x{2028}\x{2029}\x{202a}-\x{202e}]`, msg)
}

func TestF26_ErrorsRepeatLittleOfARecordAndCleanIt(t *testing.T) {
	evil := "\x1b[2J\r\nINFO fake line\u202e\u2028\xff" + strings.Repeat("4242", 500)
	for _, r := range []*Record{
		command(evil, goodKey, goodBody),
		command(cePlace, evil, goodBody),
		command(ceCancel, goodKey, `{"order_id":"`+strings.Repeat("4242", 500)+`"}`),
		command(cePlace, goodKey, goodBody, Header{HeaderSpecVersion, []byte(evil)}),
		command(cePlace, goodKey, goodBody, Header{HeaderContentType, []byte(evil)}),
		command(cePlace, goodKey, evil),
		command(cePlace, goodKey, `{"items":[{"quantity":`+strings.Repeat("4242", 500)+`}]}`),
	} {
		_, err := Decode(r)
		require.Error(t, err)
		requireOneLine(t, err)
		require.NotContains(t, err.Error(), strings.Repeat("4242", 21), "no more than 80 characters of a record")
	}
}

// TestF40_UnknownTypeIsTransient: during a rolling upgrade an old process meets types and versions it does not know.
func TestF40_UnknownTypeIsTransient(t *testing.T) {
	for _, ce := range []string{
		"ordersaga.orders.v1.ReturnOrder", "ordersaga.orders.v2.PlaceOrder", "ordersaga.saga.v2.ReserveStock", "ordersaga.orders.v1.PlaceOrder ", "PlaceOrder", "com.example.thing",
	} {
		_, err := Decode(command(ce, "not looked at", "nor this"))
		var unknown *UnknownTypeError
		require.ErrorAs(t, err, &unknown, ce)
		require.Equal(t, ce, unknown.CE)
		require.Equal(t, TopicCommands, unknown.Topic)
		require.False(t, isPoison(err), "a dead letter at once would lose the upgrade's first messages")
		require.Contains(t, err.Error(), "this one knows on orders.commands.v1: "+cePlace+", "+ceCancel)
		requireOneLine(t, err)
	}
	_, err := Decode(&Record{Topic: "retry.stock.5s", Headers: []Header{{HeaderType, []byte("ordersaga.saga.v2.ReserveStock")}}})
	require.EqualError(t, err, `unknown ce_type "ordersaga.saga.v2.ReserveStock": a newer version of ordersaga may know it`)
}

// TestF19_NewerFieldsAreIgnored: a newer version adds fields; an older reader takes what it knows, in both formats.
func TestF19_NewerFieldsAreIgnored(t *testing.T) {
	body := strings.Replace(goodBody, `{"order_id"`, `{"gift":{"wrap":[true,null,{"a":1.5}]},"order_id"`, 1)
	e, err := Decode(command(cePlace, goodKey, body))
	require.NoError(t, err)
	require.Equal(t, "c-17", as[*PlaceOrder](t, e.Data).CustomerID)

	b, err := proto.Marshal(&StockRejected{Sku: "TEA-1", Available: 1})
	require.NoError(t, err)
	newer := append(bytes.Clone(b), 0xa2, 0x06, 0x03, 'n', 'e', 'w') // field 100, a string
	got, err := Decode(recordOf(Envelope{ID: testID, Type: TStockRejected, OrderID: testOrder}, newer))
	require.NoError(t, err)
	require.True(t, proto.Equal(&StockRejected{Sku: "TEA-1", Available: 1}, as[*StockRejected](t, got.Data)))
}

// TestF43_PublicJSON: integers are numbers both ways, unknown fields are ignored, white space does not matter.
func TestF43_PublicJSON(t *testing.T) {
	t.Run("an integer in quotes is refused by name", func(t *testing.T) {
		_, err := Decode(command(cePlace, goodKey, strings.Replace(goodBody, `"quantity":2`, `"quantity":"2"`, 1)))
		require.True(t, isPoison(err))
		require.EqualError(t, err, `field "items.quantity" of PlaceOrder is a JSON string, must be an integer as a JSON number: no quotes, no fraction, no exponent, of at most 64 bits`)
	})
	t.Run("integers are written as numbers", func(t *testing.T) {
		b, err := Encode(Envelope{Type: TOrderPlaced, OrderID: testOrder, Sequence: 1, Data: sampleOrderPlaced()})
		require.NoError(t, err)
		var m map[string]any
		d := json.NewDecoder(bytes.NewReader(b))
		d.UseNumber()
		require.NoError(t, d.Decode(&m))
		require.Equal(t, json.Number("2599"), m["total_minor"])
		require.Equal(t, json.Number("1"), m["sequence"])
		require.Equal(t, json.Number("801"), as[map[string]any](t, as[[]any](t, m["items"])[0])["unit_price_minor"])
	})
	t.Run("the largest integer survives", func(t *testing.T) {
		e, err := Decode(command(cePlace, goodKey, strings.Replace(goodBody, `"quantity":2`, `"quantity":9223372036854775807`, 1)))
		require.NoError(t, err)
		require.Equal(t, int64(9223372036854775807), as[*PlaceOrder](t, e.Data).Items[0].Quantity)
	})
	t.Run("white space makes no other message, another body does", func(t *testing.T) {
		id := Header{HeaderID, []byte("producer-7")}
		var spaced bytes.Buffer
		require.NoError(t, json.Indent(&spaced, []byte(goodBody), "", "\t"))
		a, b := command(cePlace, goodKey, goodBody, id), command(cePlace, goodKey, spaced.String(), id)
		ea, err := Decode(a)
		require.NoError(t, err)
		eb, err := Decode(b)
		require.NoError(t, err)
		require.Equal(t, ea, eb)
		require.NotEqual(t, PayloadHash(a.Value), PayloadHash(b.Value), "identity is id and payload hash: a changed body under one id is noticed")
	})
}

func TestDecodeTakesWhatTheStandardAllows(t *testing.T) {
	protobuf, err := proto.Marshal(protoCommand(TPlaceOrder))
	require.NoError(t, err)
	for name, r := range map[string]*Record{
		"no content-type":  command(cePlace, goodKey, goodBody),
		"json":             command(cePlace, goodKey, goodBody, Header{HeaderContentType, []byte("application/json")}),
		"json, parameters": command(cePlace, goodKey, goodBody, Header{HeaderContentType, []byte(`Application/JSON; charset="UTF-8"`)}),
		"protobuf":         command(cePlace, goodKey, string(protobuf), Header{HeaderContentType, []byte("application/protobuf")}),
		"specversion":      command(cePlace, goodKey, goodBody, Header{HeaderSpecVersion, []byte("1.0")}),
		"upper-case key":   command(cePlace, strings.ToUpper(goodKey), goodBody),
		"bad traceparent":  command(cePlace, goodKey, goodBody, Header{HeaderTraceparent, []byte("00-zz")}),
		"retry topic":      {Topic: RetryTopic(GroupOrderCommands, DefaultRetryDelays[0]), Key: []byte(goodKey), Value: []byte(goodBody), Headers: []Header{{HeaderType, []byte(cePlace)}}},
	} {
		t.Run(name, func(t *testing.T) {
			e, err := Decode(r)
			require.NoError(t, err)
			require.Equal(t, TPlaceOrder, e.Type)
			require.Equal(t, testOrder, e.OrderID)
			require.Equal(t, Identity(r), e.ID)
			require.True(t, e.Trace.IsZero())
			require.Equal(t, "c-17", as[*PlaceOrder](t, e.Data).CustomerID)
		})
	}
	e, err := Decode(command(cePlace, goodKey, goodBody, Header{HeaderTraceparent, []byte(testTraceparent)}))
	require.NoError(t, err)
	require.Equal(t, testTrace, e.Trace)
}

func TestEncodeRefusesSlips(t *testing.T) {
	order := func(n int32) *OrderEvent { return &OrderEvent{OrderID: goodKey, Sequence: n} }
	for name, tc := range map[string]struct {
		e    Envelope
		want string
	}{
		"no type":        {Envelope{Type: "Nope"}, `no message type "Nope"`},
		"other data":     {Envelope{Type: TReserveStock, OrderID: testOrder, Data: &CommitStock{}}, "must be a *sagav1.ReserveStock"},
		"no data":        {Envelope{Type: TReserveStock, OrderID: testOrder}, "its data is a <nil>"},
		"nil data":       {Envelope{Type: TReserveStock, OrderID: testOrder, Data: (*ReserveStock)(nil)}, "its data is nil"},
		"not a pointer":  {Envelope{Type: TCancelOrder, OrderID: testOrder, Data: CancelOrder{}}, "must be a *events.CancelOrder"},
		"no order":       {Envelope{Type: TCommitStock, Data: &CommitStock{}}, "no order id"},
		"other order":    {Envelope{Type: TOrderPlaced, OrderID: testID, Sequence: 1, Data: order(1)}, "the envelope's is " + testID.String()},
		"other sequence": {Envelope{Type: TOrderPlaced, OrderID: testOrder, Sequence: 2, Data: order(1)}, "sequence of its data is 1, the envelope's is 2"},
		"not utf-8":      {Envelope{Type: TStockRejected, OrderID: testOrder, Data: &StockRejected{Sku: "\xff"}}, "UTF-8"},
	} {
		t.Run(name, func(t *testing.T) {
			b, err := Encode(tc.e)
			require.Nil(t, b)
			require.ErrorContains(t, err, tc.want)
		})
	}
}

func TestAnEmptyBodyIsNotNull(t *testing.T) {
	b, err := Encode(Envelope{Type: TCommitStock, OrderID: testOrder, Data: &CommitStock{}})
	require.NoError(t, err)
	require.NotNil(t, b, "Kafka takes a null value for a deletion")
	require.Empty(t, b)
}

// TestRoundTrip: whatever a room emits comes back as it was, through every type and any content.
func TestRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		e := drawEnvelope(t)
		b, err := Encode(e)
		if err != nil {
			t.Fatalf("encode %+v: %v", e, err)
		}
		got, err := Decode(recordOf(e, b))
		if err != nil {
			t.Fatalf("decode %s: %v", b, err)
		}
		if m, ok := e.Data.(proto.Message); ok {
			if !proto.Equal(m, as[proto.Message](t, got.Data)) {
				t.Fatalf("want %v, got %v", m, got.Data)
			}
			e.Data, got.Data = nil, nil
		}
		require.Equal(t, e, got)
	})
}

func drawEnvelope(t *rapid.T) Envelope {
	typ := rapid.SampledFrom(Types).Draw(t, "type")
	e := Envelope{Type: typ.Name, ID: drawUUID(t, 7), OrderID: drawUUID(t, rapid.SampledFrom([]byte{4, 7}).Draw(t, "version")), Data: typ.New()}
	if rapid.Bool().Draw(t, "traced") {
		e.Trace.TraceID[3], e.Trace.SpanID[7], e.Trace.Flags = rapid.ByteMin(1).Draw(t, "trace"), rapid.ByteMin(1).Draw(t, "span"), rapid.Byte().Draw(t, "flags")
	}
	switch d := e.Data.(type) {
	case proto.Message:
		drawMessage(t, d.ProtoReflect())
	case *PlaceOrder:
		*d = rapid.Make[PlaceOrder]().Draw(t, "body")
		d.OrderID = e.OrderID.String()
	case *CancelOrder:
		*d = CancelOrder{OrderID: e.OrderID.String(), Reason: rapid.String().Draw(t, "reason")}
	case *OrderEvent:
		*d = rapid.Make[OrderEvent]().Draw(t, "body")
		d.OrderID, e.Sequence = e.OrderID.String(), d.Sequence
		if len(d.Items) == 0 {
			d.Items = nil // left out
		}
	}
	return e
}

func drawUUID(t *rapid.T, version byte) uuid.UUID {
	u := uuid.UUID(rapid.SliceOfN(rapid.Byte(), 16, 16).Draw(t, "uuid"))
	u[6] = u[6]&0x0f | version<<4
	u[8] = u[8]&0x3f | 0x80
	return u
}
