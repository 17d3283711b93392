package saga

import (
	"fmt"
	"time"

	"ordersaga/domain"
	"ordersaga/events"
)

// Kind is what may still happen once a step is done.
type Kind int8

// The kinds of steps.
const (
	Compensatable Kind = iota // can be undone
	Pivot                     // once it is done the order stands
	Retriable                 // after the pivot: repeated until it is done, never undone
)

// Participant is who carries out steps; it has one undo for all of its steps.
type Participant string

// The participants of the order saga.
const (
	StockParticipant   Participant = "stock"
	PaymentParticipant Participant = "payment"
)

// StepDef is a row of the step table.
type StepDef struct {
	Name        string // reserve_stock
	Participant Participant
	Wave        int // steps of one wave run side by side; a wave starts when the one before it is done
	Kind        Kind
	Command     events.Name
	Done        events.Name
	Refused     events.Name   // empty: the step cannot be refused
	Reason      domain.Reason // why the order is rejected if it is refused
}

// UndoDef undoes whatever a participant did.
type UndoDef struct {
	Participant Participant
	Command     events.Name
	Done        events.Name
}

// Definition is a saga's step table, by name and version. Instances store both; old versions stay runnable.
type Definition struct {
	Name    string
	Version int16
	Steps   []StepDef // in order of waves
	Undos   []UndoDef // in the order in which their commands are emitted
	Limits  Limits
}

// Limits are the times a saga may take in its phases.
type Limits struct {
	Forward      time.Duration // from placement to the pivot, then it is rejected as timed_out; also between two looks at a stuck saga
	Retriable    time.Duration // after the pivot, then the outstanding step is commanded again and the saga is stuck
	Compensating time.Duration // then the outstanding undos are commanded again and the saga is stuck
}

// DefaultLimits are those of DESIGN: a quarter of an hour forward, and under a minute of standing still before it shows.
var DefaultLimits = Limits{Forward: 15 * time.Minute, Retriable: 45 * time.Second, Compensating: 45 * time.Second}

// OrderV1 is the order saga: reserve ∥ authorise, capture (the pivot), commit.
func OrderV1(l Limits) *Definition {
	return &Definition{
		Name: "order", Version: 1, Limits: l,
		Steps: []StepDef{
			{
				Name: "reserve_stock", Participant: StockParticipant, Wave: 0, Kind: Compensatable,
				Command: events.TReserveStock, Done: events.TStockReserved, Refused: events.TStockRejected, Reason: domain.OutOfStock,
			},
			{
				Name: "authorize_payment", Participant: PaymentParticipant, Wave: 0, Kind: Compensatable,
				Command: events.TAuthorizePayment, Done: events.TPaymentAuthorized, Refused: events.TPaymentDeclined, Reason: domain.PaymentDeclined,
			},
			{
				Name: "capture_payment", Participant: PaymentParticipant, Wave: 1, Kind: Pivot,
				Command: events.TCapturePayment, Done: events.TPaymentCaptured, Refused: events.TPaymentCaptureFailed, Reason: domain.CaptureFailed,
			},
			{
				Name: "commit_stock", Participant: StockParticipant, Wave: 2, Kind: Retriable,
				Command: events.TCommitStock, Done: events.TStockCommitted,
			},
		},
		Undos: []UndoDef{
			{Participant: StockParticipant, Command: events.TReleaseStock, Done: events.TStockReleased},
			{Participant: PaymentParticipant, Command: events.TReversePayment, Done: events.TPaymentReversed},
		},
	}
}

// Definitions finds a definition by what an instance stores.
type Definitions struct {
	current *Definition
	all     map[string]map[int16]*Definition
}

// NewDefinitions takes the current definition and older ones that instances may still run under.
func NewDefinitions(current *Definition, older ...*Definition) *Definitions {
	d := &Definitions{current: current, all: map[string]map[int16]*Definition{}}
	for _, x := range append(older, current) {
		if d.all[x.Name] == nil {
			d.all[x.Name] = map[int16]*Definition{}
		}
		d.all[x.Name][x.Version] = x
	}
	return d
}

// Current is what new sagas run under.
func (d *Definitions) Current() *Definition { return d.current }

// Of finds the definition of an instance.
func (d *Definitions) Of(name string, version int16) (*Definition, error) {
	if x := d.all[name][version]; x != nil {
		return x, nil
	}
	return nil, fmt.Errorf("no saga definition %s v%d in this build: run a version that has it", name, version)
}
