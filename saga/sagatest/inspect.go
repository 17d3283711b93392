package sagatest

import (
	"slices"
	"time"

	"ordersaga/domain"
	"ordersaga/saga"
)

// Saga answers an order's saga and its deadline (zero: none); nil if there is no such saga.
func (s *Store) Saga(id domain.OrderID) (in *saga.Instance, deadline time.Time) {
	r, ok := one[sagaRow](s, tableSagas, id)
	if !ok {
		return nil, time.Time{}
	}
	c := cloneInstance(&r.in)
	return &c, r.deadline
}

// Sagas answers every saga, by order id.
func (s *Store) Sagas() []*saga.Instance {
	var out []*saga.Instance
	for _, r := range each[sagaRow](s, tableSagas) {
		c := cloneInstance(&r.in)
		out = append(out, &c)
	}
	slices.SortFunc(out, func(a, b *saga.Instance) int { return a.Order.Compare(b.Order) })
	return out
}

// PutSaga stores a saga as it is, past the machine: what another build may have left.
func (s *Store) PutSaga(in *saga.Instance, deadline time.Time) {
	s.put(tableSagas, in.Order, sagaRow{cloneInstance(in), deadline})
}

// Order answers nil if there is none.
func (s *Store) Order(id domain.OrderID) *domain.Order {
	r, ok := one[orderRow](s, tableOrders, id)
	if !ok {
		return nil
	}
	o := cloneOrder(&r.order)
	return &o
}

// Orders counts the orders.
func (s *Store) Orders() int { return len(each[orderRow](s, tableOrders)) }

// Payment answers the steps of an order's payment.
func (s *Store) Payment(id domain.OrderID) *domain.Payment {
	p := domain.NewPayment(id)
	for _, op := range paymentOps {
		if step, ok := one[domain.PaymentStep](s, tablePayments, stepID{id, op}); ok {
			p.Steps[op] = &step
		}
	}
	return p
}

// PutPayment stores steps as they are: what was left by a process that died.
func (s *Store) PutPayment(steps ...domain.PaymentStep) {
	for _, st := range steps {
		s.put(tablePayments, stepID{st.Order, st.Op}, st)
	}
}

// Reservation answers nil if there is none.
func (s *Store) Reservation(id domain.OrderID) *domain.Reservation {
	r, ok := one[domain.Reservation](s, tableReservations, id)
	if !ok {
		return nil
	}
	return &r
}

// Reservations answers every reservation.
func (s *Store) Reservations() []domain.Reservation {
	var out []domain.Reservation
	for _, r := range each[domain.Reservation](s, tableReservations) {
		out = append(out, r)
	}
	slices.SortFunc(out, func(a, b domain.Reservation) int { return a.Order.Compare(b.Order) })
	return out
}

// PutStock stores a product's stock.
func (s *Store) PutStock(stock ...domain.Stock) {
	for _, st := range stock {
		s.put(tableStock, st.SKU, st)
	}
}

// Stock answers a product's stock; zero if there is none.
func (s *Store) Stock(sku domain.SKU) domain.Stock {
	st, _ := one[domain.Stock](s, tableStock, sku)
	return st
}

// History answers an order's history, in order.
func (s *Store) History(id domain.OrderID) []saga.HistoryEntry {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []saga.HistoryEntry
	for _, h := range s.history {
		if h.Order == id {
			out = append(out, h)
		}
	}
	return out
}

// AuditLog answers the operators' log.
func (s *Store) AuditLog() []saga.AuditEntry {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.audit)
}

// SetAway reports a dependency outside any transaction.
func (s *Store) SetAway(dependency string, away bool) {
	var since time.Time
	if away {
		since = s.Now()
	}
	s.put(tableAway, dependency, since)
}

// IsAway answers whether a dependency is reported as away.
func (s *Store) IsAway(dependency string) bool {
	since, ok := one[time.Time](s, tableAway, dependency)
	return ok && s.Now().Sub(since) <= awayFor
}
