package events

import (
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/proto"

	"ordersaga/schemas/ordersv1"
)

var (
	testID    = uuid.MustParse("01890a5d-ac96-774b-bcce-b302099a8057") // drawn at 2023-06-30T03:34:18.518Z
	testOrder = uuid.MustParse("0198c0de-0000-7000-8000-00000000c0de")
	testTrace = Trace{
		TraceID: [16]byte{0x4b, 0xf9, 0x2f, 0x35, 0x77, 0xb3, 0x4d, 0xa6, 0xa3, 0xce, 0x92, 0x9d, 0x0e, 0x0e, 0x47, 0x36},
		SpanID:  [8]byte{0x00, 0xf0, 0x67, 0xaa, 0x0b, 0xa9, 0x02, 0xb7}, Flags: 1,
	}
)

const testTraceparent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"

func ptr[T any](v T) *T { return &v }

// as is a type assertion that fails the test.
func as[T any](t require.TestingT, v any) T {
	x, ok := v.(T)
	require.True(t, ok, "%T", v)
	return x
}

// sample is a message with every field set, and the golden files that it is written to.
type sample struct {
	file string // in testdata/golden, without the extension
	env  Envelope
}

// samples holds one for each type, in its first version. A later change of a message leaves its sample as it is (new fields unset)
// and adds another one with a file of its own.
func samples() []sample {
	at := time.Date(2026, 11, 24, 12, 0, 0, 0, time.UTC).UnixMilli()
	of := map[Name]any{
		TReserveStock:         &ReserveStock{Lines: []*StockLine{{Sku: "COFFEE-1", Quantity: 1}, {Sku: "TEA-1", Quantity: 2}}, ExpiresAtMs: at},
		TStockReserved:        &StockReserved{},
		TStockRejected:        &StockRejected{Sku: "TEA-1", Available: 1},
		TCommitStock:          &CommitStock{},
		TStockCommitted:       &StockCommitted{},
		TReleaseStock:         &ReleaseStock{},
		TStockReleased:        &StockReleased{},
		TAuthorizePayment:     &AuthorizePayment{AmountMinor: 2599, Currency: "EUR", PaymentMethod: "pm_card_visa", ExpiresAtMs: at},
		TPaymentAuthorized:    &PaymentAuthorized{Ref: "pi_3Kq"},
		TPaymentDeclined:      &PaymentDeclined{Code: "card_declined"},
		TCapturePayment:       &CapturePayment{AmountMinor: 2599, Currency: "EUR", ExpiresAtMs: at},
		TPaymentCaptured:      &PaymentCaptured{Ref: "pi_3Kq"},
		TPaymentCaptureFailed: &PaymentCaptureFailed{Code: "charge_expired_for_capture"},
		TReversePayment:       &ReversePayment{},
		TPaymentReversed:      &PaymentReversed{},
		TStepStalled:          &StepStalled{Command: "ReversePayment", Error: "payment gateway: 500", Attempts: 9, Dead: true},

		TPlaceOrder:     samplePlaceOrder(),
		TCancelOrder:    &CancelOrder{OrderID: testOrder.String(), Reason: "found it cheaper"},
		TOrderPlaced:    sampleOrderPlaced(),
		TOrderConfirmed: &OrderEvent{OrderID: testOrder.String(), Sequence: 2, Status: "confirmed", TotalMinor: 2599, Currency: "EUR"},
		TOrderRejected: &OrderEvent{
			OrderID: testOrder.String(), Sequence: 2, Status: "rejected", Reason: "price_changed",
			Detail: "TEA-1 costs 999 now, not 899", TotalMinor: 0, Currency: "EUR",
		},
		TOrderCancelled: &OrderEvent{
			OrderID: testOrder.String(), Sequence: 2, Status: "cancelled", Reason: "cancelled_by_customer", TotalMinor: 2599, Currency: "EUR",
		},
	}
	out := make([]sample, 0, len(of))
	for i := range Types {
		n := Types[i].Name
		e := Envelope{ID: testID, Type: n, OrderID: testOrder, Trace: testTrace, Data: of[n]}
		if ev, ok := e.Data.(*OrderEvent); ok {
			e.Sequence = ev.Sequence
		}
		out = append(out, sample{file: string(n) + ".v1", env: e})
	}
	return out
}

func samplePlaceOrder() *PlaceOrder {
	return &PlaceOrder{
		OrderID: testOrder.String(), CustomerID: "c-17", Currency: "EUR", PaymentMethod: "pm_card_visa",
		Items: []OrderItem{{SKU: "TEA-1", Quantity: 2, UnitPriceMinor: ptr(int64(899))}, {SKU: "COFFEE-1", Quantity: 1}},
	}
}

func sampleOrderPlaced() *OrderEvent {
	return &OrderEvent{
		OrderID: testOrder.String(), Sequence: 1, Status: "pending", CustomerID: "c-17", TotalMinor: 2599, Currency: "EUR",
		PaymentMethod: "pm_card_visa",
		Items:         []OrderItem{{SKU: "COFFEE-1", Quantity: 1, UnitPriceMinor: ptr(int64(801))}, {SKU: "TEA-1", Quantity: 2, UnitPriceMinor: ptr(int64(899))}},
	}
}

// protoCommand is a command as a producer sends it in Protobuf; nil for what does not come so.
func protoCommand(n Name) proto.Message {
	switch n {
	case TPlaceOrder:
		p := samplePlaceOrder()
		m := &ordersv1.PlaceOrder{OrderId: p.OrderID, CustomerId: p.CustomerID, Currency: p.Currency, PaymentMethod: p.PaymentMethod}
		for _, it := range p.Items {
			m.Items = append(m.Items, &ordersv1.OrderItem{Sku: it.SKU, Quantity: it.Quantity, UnitPriceMinor: it.UnitPriceMinor})
		}
		return m
	case TCancelOrder:
		return &ordersv1.CancelOrder{OrderId: testOrder.String(), Reason: "found it cheaper"}
	}
	return nil
}

// recordOf is what a relay would produce of an envelope.
func recordOf(e Envelope, payload []byte) *Record {
	t, ok := TypeOf(e.Type)
	if !ok {
		panic("no type " + string(e.Type))
	}
	return &Record{Topic: t.Topic, Key: []byte(e.OrderID.String()), Value: payload, Headers: HeadersOf(e)}
}

// command is a record on orders.commands.v1 as kcat would send it.
func command(ceType, key, body string, headers ...Header) *Record {
	h := []Header{}
	if ceType != "" {
		h = append(h, Header{HeaderType, []byte(ceType)})
	}
	r := &Record{Topic: TopicCommands, Partition: 3, Offset: 41, Value: []byte(body), Headers: append(h, headers...)}
	if key != "" {
		r.Key = []byte(key)
	}
	return r
}
