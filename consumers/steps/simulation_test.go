package steps_test

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"slices"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"ordersaga/consumers"
	"ordersaga/consumers/steps"
	"ordersaga/domain"
	"ordersaga/events"
	"ordersaga/saga"
	"ordersaga/saga/sagatest"
)

// simulation is the whole saga over a network that delivers in any order, twice, late, and to processes that die at any moment. The
// real handlers and the real coordinator run; only Kafka, Postgres and the gateway are in memory.
type simulation struct {
	*world
	t        *rapid.T
	handlers map[events.Group]handler
	waiting  map[events.Group][]*consumers.Delivery // delivered next in any order
	flying   []flying                               // prepared, not applied: a process between its calls and its commit
	sent     []*consumers.Delivery                  // every message ever, to be delivered once more at the end
	public   map[domain.OrderID][]*events.OrderEvent
	orders   []domain.OrderID
	stalled  map[string]bool
	promised map[domain.OrderID]bool // a cancel was accepted: it must not end confirmed
	dead     int

	running  events.Group // whose calls are under way
	nested   bool
	between  []flying // what another process did between a call's barrier and its effect
	betweens [][]consumers.Result
	failed   error // of it
}

type flying struct {
	group events.Group
	batch []*consumers.Delivery
	apply consumers.Apply[tx]
}

const (
	lastAttempt = 6 // a message that may end is a dead letter then
	drainRounds = 400
)

var errKilled = errors.New("killed before the commit")

// groups in a fixed order, so that a case can be repeated.
var groups = []events.Group{
	events.GroupOrderCommands, events.GroupStock, events.GroupPayment,
	events.GroupCompensationStock, events.GroupCompensationPayment, events.GroupCoordinator,
}

func newSimulation(t *rapid.T, shop *shop) *simulation {
	w := newWorld()
	cfg := steps.DefaultPayment
	cfg.Calls = 1 // one call after the other, so that a case can be repeated; the two handlers still interleave, see interleave
	w.payment = steps.NewPayment(steps.NewGatewayCalls(consumers.Store[tx](w.db), w.gw, w.clock.now, cfg, nil))
	w.reversals = steps.NewPaymentCompensation(steps.NewGatewayCalls(consumers.Store[tx](w.db), w.gw, w.clock.now, cfg, nil))
	return &simulation{
		world: w, t: t, promised: map[domain.OrderID]bool{},
		handlers: map[events.Group]handler{
			events.GroupOrderCommands: w.orders(shop), events.GroupStock: w.stock, events.GroupPayment: w.payment,
			events.GroupCompensationStock: w.releases, events.GroupCompensationPayment: w.reversals, events.GroupCoordinator: w.replies,
		},
		waiting: map[events.Group][]*consumers.Delivery{},
		public:  map[domain.OrderID][]*events.OrderEvent{},
		stalled: map[string]bool{},
	}
}

// send puts a message on the network.
func (s *simulation) send(d *consumers.Delivery) {
	s.waiting[d.Group] = append(s.waiting[d.Group], d)
	s.sent = append(s.sent, d)
}

// relay carries what committed transactions left in the outbox to the network.
func (s *simulation) relay() {
	for _, e := range s.db.TakeOutbox() {
		t, ok := events.TypeOf(e.Type)
		require.True(s.t, ok)
		if t.Group == "" {
			ev, is := e.Data.(*events.OrderEvent)
			require.True(s.t, is)
			s.public[domain.OrderID(e.OrderID)] = append(s.public[domain.OrderID(e.OrderID)], ev)
			continue
		}
		s.send(&consumers.Delivery{Envelope: e, Group: t.Group, Attempt: 1})
	}
}

// prepare takes some messages of a group and starts on them.
func (s *simulation) prepare(g events.Group, batch []*consumers.Delivery) {
	s.running = g
	apply, err := s.handlers[g].Prepare(context.Background(), batch)
	require.NoError(s.t, err)
	s.flying = append(s.flying, flying{g, batch, apply})
	require.NoError(s.t, s.failed)
	for i, f := range s.between {
		for j, d := range f.batch {
			s.settle(d, s.betweens[i][j].Err)
		}
	}
	s.between, s.betweens = nil, nil
}

// interleave lets the undo run from start to end while a forward call is on its way, and the other way round. It runs on the call's
// goroutine while the driver waits.
func (s *simulation) interleave(seed uint64) func(domain.PaymentRequest) {
	n := 0
	return func(domain.PaymentRequest) {
		other := map[events.Group]events.Group{
			events.GroupPayment: events.GroupCompensationPayment, events.GroupCompensationPayment: events.GroupPayment,
		}[s.running]
		n++
		if s.nested || len(s.waiting[other]) == 0 || (seed>>(n%64))&1 == 0 {
			return
		}
		s.nested = true
		defer func() { s.nested = false }()
		f := flying{group: other, batch: s.waiting[other]}
		s.waiting[other] = nil
		res, err := s.try(s.handlers[other], f.batch...)
		if err != nil {
			s.failed = err
			return
		}
		s.between, s.betweens = append(s.between, f), append(s.betweens, res)
	}
}

// finish commits a batch in flight and settles its messages.
func (s *simulation) finish(f flying) {
	res, err := s.apply(context.Background(), f.apply, f.batch)
	if errors.Is(err, errKilled) {
		s.waiting[f.group] = append(s.waiting[f.group], f.batch...)
		return
	}
	require.NoError(s.t, err)
	for i, d := range f.batch {
		if o := s.db.Order(domain.OrderID(d.OrderID)); d.Type == events.TCancelOrder && (o == nil || o.Status != domain.Confirmed) {
			s.promised[domain.OrderID(d.OrderID)] = true
		}
		s.settle(d, res[i].Err)
	}
}

func (s *simulation) settle(d *consumers.Delivery, err error) {
	if err == nil {
		return
	}
	require.False(s.t, isPoison(err), "%s of %d became poison: %v", d.Type, s.index(d.OrderID), err)
	var o interface{ Outage() string }
	again := *d
	if !errors.As(err, &o) || o.Outage() == "" {
		again.Attempt++
	}
	t, _ := events.TypeOf(d.Type)
	if again.Attempt < lastAttempt || t.Endless {
		s.waiting[d.Group] = append(s.waiting[d.Group], &again)
	} else {
		s.dead++
	}
	if again.Attempt >= lastAttempt && !s.stalled[d.ID.String()] {
		s.stalled[d.ID.String()] = true
		s.send(delivery(domain.OrderID(d.OrderID), events.TStepStalled, &events.StepStalled{
			Command: string(d.Type), Error: err.Error(), Attempts: int32(again.Attempt), Dead: !t.Endless,
		}))
	}
}

func (s *simulation) index(id uuid.UUID) int { return slices.Index(s.orders, domain.OrderID(id)) }

// take draws some waiting messages of a group, in any order.
func (s *simulation) take(g events.Group) []*consumers.Delivery {
	n := rapid.IntRange(1, min(4, len(s.waiting[g]))).Draw(s.t, "batch")
	var batch []*consumers.Delivery
	for range n {
		i := rapid.IntRange(0, len(s.waiting[g])-1).Draw(s.t, "which")
		batch = append(batch, s.waiting[g][i])
		s.waiting[g] = slices.Delete(s.waiting[g], i, i+1)
	}
	return batch
}

func (s *simulation) busy() (gs []events.Group) {
	for _, g := range groups {
		if len(s.waiting[g]) > 0 {
			gs = append(gs, g)
		}
	}
	return gs
}

// step does one thing that may happen.
func (s *simulation) step() {
	busy := s.busy()
	switch what := rapid.IntRange(0, 19).Draw(s.t, "step"); {
	case what <= 8 && len(busy) > 0: // a process starts on a batch
		g := rapid.SampledFrom(busy).Draw(s.t, "group")
		s.prepare(g, s.take(g))
	case what <= 13 && len(s.flying) > 0: // one commits
		i := rapid.IntRange(0, len(s.flying)-1).Draw(s.t, "flight")
		f := s.flying[i]
		s.flying = slices.Delete(s.flying, i, i+1)
		switch rapid.IntRange(0, 7).Draw(s.t, "fate") {
		case 0: // killed between its calls and its commit
			s.waiting[f.group] = append(s.waiting[f.group], f.batch...)
		case 1: // killed in the commit
			s.db.BeforeCommit = func(*sagatest.Tx) error { return errKilled }
			s.finish(f)
			s.db.BeforeCommit = nil
		case 2: // committed, and killed before it could acknowledge
			s.finish(f)
			s.waiting[f.group] = append(s.waiting[f.group], f.batch...)
		default:
			s.finish(f)
		}
	case what == 14 && len(s.sent) > 0: // something comes once more
		d := rapid.SampledFrom(s.sent).Draw(s.t, "again")
		s.waiting[d.Group] = append(s.waiting[d.Group], d)
	case what == 15:
		s.clock.advance(time.Duration(rapid.SampledFrom([]int64{1, 50, 400, 1000, 90_000}).Draw(s.t, "seconds")) * time.Second)
		s.sweep()
	case what == 16: // the customer has second thoughts
		id := rapid.SampledFrom(s.orders).Draw(s.t, "cancel")
		if rapid.Bool().Draw(s.t, "by topic") {
			s.send(cancel(id))
			break
		}
		res, err := s.service.Cancel(context.Background(), saga.CancelRequest{Order: id})
		require.NoError(s.t, err)
		require.NotEqual(s.t, saga.CancelAwaits, res.Outcome)
		if res.Outcome == saga.CancelAccepted {
			s.promised[id] = true
		}
	case what == 17: // an operator presses the button
		id := rapid.SampledFrom(s.orders).Draw(s.t, "retry")
		if _, _, err := s.service.Resolve(context.Background(), saga.Decision{Order: id, Kind: saga.Retry, Actor: "ann"}); err != nil {
			require.ErrorIs(s.t, err, saga.ErrNoSaga)
		}
	case what == 18: // the gateway lets go of a hold, as it does after a week
		if rapid.IntRange(0, 3).Draw(s.t, "let go") == 0 {
			s.gw.CancelAtGateway(rapid.SampledFrom(s.orders).Draw(s.t, "hold"))
		}
	}
	s.relay()
}

func (s *simulation) sweep() {
	_, err := s.service.ExpireDue(context.Background(), 100)
	require.NoError(s.t, err)
}

// drain lets everything come to rest with a gateway that works, and answers the rounds it took.
func (s *simulation) drain() {
	for range drainRounds {
		for _, f := range s.flying {
			s.finish(f)
		}
		s.flying = nil
		s.relay()
		busy := s.busy()
		if len(busy) == 0 {
			if !slices.ContainsFunc(s.db.Sagas(), func(in *saga.Instance) bool { return !in.State.Phase.Ended() }) {
				return
			}
			s.clock.advance(20 * time.Minute)
			s.sweep()
			s.relay()
			continue
		}
		for _, g := range busy {
			batch := s.waiting[g]
			s.waiting[g] = nil
			s.prepare(g, batch)
		}
	}
	for _, in := range s.db.Sagas() {
		s.t.Logf("%s: %+v", in.Order, in.State)
	}
	s.t.Fatalf("not at rest after %d rounds", drainRounds)
}

// faultPlan decides by arithmetic, not by draws: calls run side by side, and a case must be repeatable.
func (s *simulation) faultPlan(seed uint64, percent int) func(domain.PaymentRequest) sagatest.Fault {
	times := map[string]int{}
	return func(r domain.PaymentRequest) sagatest.Fault {
		call := fmt.Sprintf("%d %d %s %d", seed, s.index(uuid.UUID(r.Order)), r.Op, r.Attempt)
		times[call]++
		h := fnv.New64a()
		_, _ = fmt.Fprintf(h, "%s %d", call, times[call])
		n := h.Sum64()
		if int(n%100) >= percent {
			return sagatest.NoFault
		}
		return sagatest.Fault(1 + n/100%5)
	}
}

// rest is all that must be the same after late duplicates.
func (s *simulation) rest() string {
	out := ""
	for _, id := range s.orders {
		in, deadline := s.db.Saga(id)
		if in != nil {
			out += fmt.Sprintln(in.State.Version, in.State.Phase, in.State.Status, deadline.IsZero())
		}
		out += fmt.Sprintln(s.gw.Ledger(id), s.db.Reservation(id), len(s.public[id]))
		for _, op := range []domain.PaymentOp{domain.Authorize, domain.Capture, domain.Reverse} {
			out += fmt.Sprintln(op, s.db.Payment(id).State(op))
		}
	}
	for _, sku := range []domain.SKU{"cup", "tea"} {
		out += fmt.Sprintln(s.db.Stock(sku))
	}
	return out
}

func TestAnyInterleavingEndsWell(t *testing.T) {
	rapid.Check(t, simulate)
}

// simulate plays one case: any interleaving, then rest, then everything once more.
func simulate(t *rapid.T) {
	s := newSimulation(t, &shop{prices: map[domain.SKU]int64{"cup": 700, "tea": 450}})
	start := map[domain.SKU]int64{}
	for _, sku := range []domain.SKU{"cup", "tea"} {
		start[sku] = rapid.Int64Range(0, 9).Draw(t, string(sku))
		s.db.PutStock(domain.Stock{SKU: sku, Available: start[sku]})
	}
	for i := range rapid.IntRange(1, 4).Draw(t, "orders") {
		id := domain.OrderID{0x01, 0x90, byte(i + 1), 15: 1}
		s.orders = append(s.orders, id)
		s.send(place(id, func(m *events.PlaceOrder) {
			m.Items = []events.OrderItem{{SKU: "tea", Quantity: rapid.Int64Range(1, 4).Draw(t, "quantity")}}
			if rapid.Bool().Draw(t, "two lines") {
				m.Items = append(m.Items, events.OrderItem{SKU: "cup", Quantity: 2})
			}
			if rapid.IntRange(0, 4).Draw(t, "method") == 0 {
				m.PaymentMethod = sagatest.MethodDeclined
			}
		}))
	}
	s.follow = rapid.Bool().Draw(t, "follow")
	s.gw.Fault = s.faultPlan(rapid.Uint64().Draw(t, "seed"), rapid.SampledFrom([]int{0, 10, 40, 70}).Draw(t, "faults"))
	s.gw.Before = s.interleave(rapid.Uint64().Draw(t, "interleaving"))
	for range rapid.IntRange(0, 120).Draw(t, "steps") {
		s.step()
	}
	s.gw.Fault = nil
	s.drain()
	s.hold(start)
	s.gw.Before = nil

	atRest := s.rest()
	for _, d := range slices.Clone(s.sent) { // a replay of everything, long after
		s.waiting[d.Group] = append(s.waiting[d.Group], d)
	}
	s.clock.advance(40 * 24 * time.Hour)
	s.drain()
	require.Equal(t, atRest, s.rest(), "late duplicates changed something")
}

// hold checks what must hold once everything is at rest: ends, money, stock, what was told in public.
func (s *simulation) hold(start map[domain.SKU]int64) {
	sold := map[domain.SKU]int64{}
	for i, id := range s.orders {
		o := s.db.Order(id)
		require.NotNil(s.t, o, "order %d was accepted and is lost", i)
		in, deadline := s.db.Saga(id)
		require.True(s.t, in.State.Phase.Ended())
		require.Nil(s.t, in.State.Stuck)
		require.True(s.t, deadline.IsZero())
		require.True(s.t, o.Status.Terminal(), "order %d is %s", i, o.Status)
		require.Equal(s.t, o.Status == domain.Confirmed, in.State.Phase == saga.Completed)

		l := s.gw.Ledger(id)
		require.Zero(s.t, l.Held, "order %d (%s): money stays held", i, o.Status)
		if o.Status == domain.Confirmed {
			require.False(s.t, s.promised[id], "order %d: its cancel was accepted", i)
			require.Equal(s.t, o.Total.Minor, l.Captured, "order %d: charged once, in full", i)
			require.Zero(s.t, l.Refunded)
			require.Equal(s.t, domain.CommittedStock, s.db.Reservation(id).State)
			for _, ln := range o.Lines {
				sold[ln.SKU] += ln.Quantity
			}
		} else {
			require.Zero(s.t, l.Captured, "order %d (%s %s) was charged", i, o.Status, o.Reason)
			require.NotEmpty(s.t, o.Reason)
		}
		s.holdPublic(i, o)
	}
	for sku, n := range start {
		st := s.db.Stock(sku)
		require.Zero(s.t, st.Reserved, "%s stays reserved", sku)
		require.Equal(s.t, sold[sku], st.Sold)
		require.Equal(s.t, n, st.OnHand()+st.Sold)
	}
}

func (s *simulation) holdPublic(i int, o *domain.Order) {
	told := s.public[o.ID]
	require.Len(s.t, told, int(o.Sequence), "order %d", i)
	for n, e := range told {
		require.EqualValues(s.t, n+1, e.Sequence, "told in order, each once")
		want := string(domain.Pending)
		if n == len(told)-1 {
			want = string(o.Status)
		}
		require.Equal(s.t, want, e.Status)
	}
}
