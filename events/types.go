package events

import (
	"fmt"
	"reflect"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"

	"ordersaga/schemas/sagav1"
)

// The generated internal messages, under names that do not tell where they are generated.

type (
	// ReserveStock asks the stock to set the lines aside, all or none.
	ReserveStock = sagav1.ReserveStock
	// StockReserved says that all lines are set aside.
	StockReserved = sagav1.StockReserved
	// StockRejected says that nothing was set aside.
	StockRejected = sagav1.StockRejected
	// CommitStock turns the reservation into a sale.
	CommitStock = sagav1.CommitStock
	// StockCommitted says that the pieces left the stock.
	StockCommitted = sagav1.StockCommitted
	// ReleaseStock undoes ReserveStock, seen or not.
	ReleaseStock = sagav1.ReleaseStock
	// StockReleased says that nothing is set aside, nor ever will be.
	StockReleased = sagav1.StockReleased
	// AuthorizePayment asks the gateway to hold the amount.
	AuthorizePayment = sagav1.AuthorizePayment
	// PaymentAuthorized says that the amount is held.
	PaymentAuthorized = sagav1.PaymentAuthorized
	// PaymentDeclined says that nothing is held.
	PaymentDeclined = sagav1.PaymentDeclined
	// CapturePayment takes what was held: the pivot.
	CapturePayment = sagav1.CapturePayment
	// PaymentCaptured says that the money was taken.
	PaymentCaptured = sagav1.PaymentCaptured
	// PaymentCaptureFailed says that the money was not taken and will not be.
	PaymentCaptureFailed = sagav1.PaymentCaptureFailed
	// ReversePayment undoes AuthorizePayment and CapturePayment, seen or not.
	ReversePayment = sagav1.ReversePayment
	// PaymentReversed says that nothing is held or stays taken, nor ever will.
	PaymentReversed = sagav1.PaymentReversed
	// StepStalled tells the coordinator that a command stands still; it settles nothing.
	StepStalled = sagav1.StepStalled
	// StockLine is a number of pieces of one product.
	StockLine = sagav1.StockLine
)

// Name is the short name of a message type, as stored in the outbox and in dead letters: ReserveStock.
type Name string

// The message types.
const (
	TReserveStock         Name = "ReserveStock"
	TStockReserved        Name = "StockReserved"
	TStockRejected        Name = "StockRejected"
	TCommitStock          Name = "CommitStock"
	TStockCommitted       Name = "StockCommitted"
	TReleaseStock         Name = "ReleaseStock"
	TStockReleased        Name = "StockReleased"
	TAuthorizePayment     Name = "AuthorizePayment"
	TPaymentAuthorized    Name = "PaymentAuthorized"
	TPaymentDeclined      Name = "PaymentDeclined"
	TCapturePayment       Name = "CapturePayment"
	TPaymentCaptured      Name = "PaymentCaptured"
	TPaymentCaptureFailed Name = "PaymentCaptureFailed"
	TReversePayment       Name = "ReversePayment"
	TPaymentReversed      Name = "PaymentReversed"
	TStepStalled          Name = "StepStalled"

	TPlaceOrder     Name = "PlaceOrder"
	TCancelOrder    Name = "CancelOrder"
	TOrderPlaced    Name = "OrderPlaced"
	TOrderConfirmed Name = "OrderConfirmed"
	TOrderRejected  Name = "OrderRejected"
	TOrderCancelled Name = "OrderCancelled"
)

// Topic is a topic's name without the prefix of the installation.
type Topic string

// The topics. The first two are public, see schemas/asyncapi.yaml.
const (
	TopicCommands     Topic = "orders.commands.v1"
	TopicEvents       Topic = "orders.events.v1"
	TopicStock        Topic = "saga.stock.v1"
	TopicPayment      Topic = "saga.payment.v1"
	TopicCompensation Topic = "saga.compensation.v1"
	TopicReplies      Topic = "saga.replies.v1"
)

// Group is a consumer group's name without the prefix of the installation.
type Group string

// The consumer groups.
const (
	GroupStock               Group = "stock"
	GroupPayment             Group = "payment"
	GroupCompensationStock   Group = "compensation-stock"
	GroupCompensationPayment Group = "compensation-payment"
	GroupCoordinator         Group = "coordinator"
	GroupOrderCommands       Group = "order-commands"
)

// Groups lists the groups with the topic that each reads.
var Groups = []struct {
	Group Group
	Topic Topic
}{
	{GroupOrderCommands, TopicCommands},
	{GroupStock, TopicStock},
	{GroupPayment, TopicPayment},
	{GroupCompensationStock, TopicCompensation},
	{GroupCompensationPayment, TopicCompensation},
	{GroupCoordinator, TopicReplies},
}

// Format is how a payload is written.
type Format int8

// The formats, by content-type.
const (
	JSON     Format = iota // application/json: the public topics
	Protobuf               // application/protobuf: the internal topics; commands may come in it too
)

// ContentType is the header value for a format.
func (f Format) ContentType() string {
	if f == Protobuf {
		return ContentProtobuf
	}
	return ContentJSON
}

// The content types on the wire. A record without the header is JSON.
const (
	ContentJSON     = "application/json"
	ContentProtobuf = "application/protobuf"
)

// Type is a row of the table: all that follows from a message's type.
type Type struct {
	Name    Name
	CE      string // ce_type on the wire
	Topic   Topic
	Group   Group  // who acts on it; empty: readers outside
	Format  Format // how we write it
	Endless bool   // no last attempt: it stays at the slowest retry tier and never becomes a dead letter for failing often
	// Urgent is a message that a customer's order waits for, and that may overtake others of its order, as its reader answers whatever comes in any
	// order. It goes to Kafka with the commit; what is not urgent waits some milliseconds for company.
	Urgent bool
	// Joins is how long an urgent message may wait for others to its topic, as its order can hardly go on with it before a call of the gateway has
	// been answered. 0: not at all.
	Joins time.Duration
	// Opens is an urgent command with which an order begins to be worked on: those of several orders may be gathered, so that they go on together.
	Opens bool
	New   func() any

	ce     []byte       // CE, as headers share it; nobody writes to a header's value
	goType reflect.Type // of what New answers
}

const (
	ceSaga   = "ordersaga.saga.v1."
	ceOrders = "ordersaga.orders.v1."
)

func internal[M any, P interface {
	*M
	proto.Message
}](name Name, topic Topic, group Group, endless bool) Type {
	return Type{Name: name, CE: ceSaga + string(name), Topic: topic, Group: group, Format: Protobuf, Endless: endless, New: func() any { return P(new(M)) }}
}

func public[M any](name Name, topic Topic, group Group) Type {
	return Type{Name: name, CE: ceOrders + string(name), Topic: topic, Group: group, Format: JSON, New: func() any { return new(M) }}
}

func urgent(t Type) Type {
	t.Urgent = true
	return t
}

func opens(t Type) Type {
	t.Opens = true
	return t
}

func joins(within time.Duration, t Type) Type {
	t.Joins = within
	return t
}

// A payment takes its order two transactions and a call: some seven milliseconds with a gateway that is quick. Stock is reserved meanwhile, in company and after
// the first of the two, and the coordinator told so, at the latest, together with the payment's reply.
const (
	reserveWithin  = 3 * time.Millisecond
	reservedWithin = 10 * time.Millisecond
)

// Types is the table.
var Types = []Type{
	public[PlaceOrder](TPlaceOrder, TopicCommands, GroupOrderCommands),
	public[CancelOrder](TCancelOrder, TopicCommands, GroupOrderCommands),
	public[OrderEvent](TOrderPlaced, TopicEvents, ""),
	public[OrderEvent](TOrderConfirmed, TopicEvents, ""),
	public[OrderEvent](TOrderRejected, TopicEvents, ""),
	public[OrderEvent](TOrderCancelled, TopicEvents, ""),

	joins(reserveWithin, urgent(internal[ReserveStock](TReserveStock, TopicStock, GroupStock, false))),
	internal[CommitStock](TCommitStock, TopicStock, GroupStock, true),
	opens(urgent(internal[AuthorizePayment](TAuthorizePayment, TopicPayment, GroupPayment, false))),
	urgent(internal[CapturePayment](TCapturePayment, TopicPayment, GroupPayment, false)),
	internal[ReleaseStock](TReleaseStock, TopicCompensation, GroupCompensationStock, true),
	internal[ReversePayment](TReversePayment, TopicCompensation, GroupCompensationPayment, true),

	joins(reservedWithin, urgent(internal[StockReserved](TStockReserved, TopicReplies, GroupCoordinator, true))),
	urgent(internal[StockRejected](TStockRejected, TopicReplies, GroupCoordinator, true)),
	internal[StockCommitted](TStockCommitted, TopicReplies, GroupCoordinator, true),
	internal[StockReleased](TStockReleased, TopicReplies, GroupCoordinator, true),
	urgent(internal[PaymentAuthorized](TPaymentAuthorized, TopicReplies, GroupCoordinator, true)),
	urgent(internal[PaymentDeclined](TPaymentDeclined, TopicReplies, GroupCoordinator, true)),
	urgent(internal[PaymentCaptured](TPaymentCaptured, TopicReplies, GroupCoordinator, true)),
	urgent(internal[PaymentCaptureFailed](TPaymentCaptureFailed, TopicReplies, GroupCoordinator, true)),
	internal[PaymentReversed](TPaymentReversed, TopicReplies, GroupCoordinator, true),
	internal[StepStalled](TStepStalled, TopicReplies, GroupCoordinator, true),
}

var (
	byName = map[Name]*Type{}
	byCE   = map[string]*Type{}
	topics = map[Topic]bool{}
)

func init() {
	for i := range Types {
		t := &Types[i]
		t.ce, t.goType = slices.Clip([]byte(t.CE)), reflect.TypeOf(t.New())
		byName[t.Name], byCE[t.CE], topics[t.Topic] = t, t, true
	}
}

// TypeOf finds a row by short name.
func TypeOf(n Name) (*Type, bool) { t, ok := byName[n]; return t, ok }

// TypeOfCE finds a row by ce_type.
func TypeOfCE(ce string) (*Type, bool) { t, ok := byCE[ce]; return t, ok }

// DefaultRetryDelays are the retry tiers, fastest first.
var DefaultRetryDelays = []time.Duration{5 * time.Second, 30 * time.Second, 2 * time.Minute, 10 * time.Minute}

// RetryTopic is the topic where a group's records wait for d.
func RetryTopic(g Group, d time.Duration) Topic { return Topic("retry." + string(g) + "." + tier(d)) }

// DLQTopic is a group's dead-letter queue.
func DLQTopic(g Group) Topic { return Topic("dlq." + string(g)) }

// tier writes a delay as short as it goes: 5s, 2m, 1h, 250ms.
func tier(d time.Duration) string {
	switch {
	case d >= time.Hour && d%time.Hour == 0:
		return fmt.Sprintf("%dh", d/time.Hour)
	case d >= time.Minute && d%time.Minute == 0:
		return fmt.Sprintf("%dm", d/time.Minute)
	case d >= time.Second && d%time.Second == 0:
		return fmt.Sprintf("%ds", d/time.Second)
	default:
		return fmt.Sprintf("%dms", d.Milliseconds())
	}
}

// Names puts the installation's prefix before topics and groups.
type Names struct{ Prefix string }

// Topic is a topic's name in Kafka.
func (n Names) Topic(t Topic) string { return n.Prefix + string(t) }

// Group is a group's name in Kafka.
func (n Names) Group(g Group) string { return n.Prefix + string(g) }
