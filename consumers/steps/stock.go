package steps

import (
	"cmp"
	"context"
	"slices"

	"ordersaga/consumers"
	"ordersaga/domain"
	"ordersaga/events"
	"ordersaga/saga"
)

// Stock reserves and commits: ReserveStock, CommitStock.
type Stock[T StockTx] struct{ now saga.Clock }

// NewStock makes the handler of the stock group. now is database time: expired commands settle without effect.
func NewStock[T StockTx](now saga.Clock) *Stock[T] { return &Stock[T]{now: now} }

// Prepare has nothing to do outside the transaction.
func (s *Stock[T]) Prepare(context.Context, []*consumers.Delivery) (consumers.Apply[T], error) {
	return s.apply, nil
}

// Foresee implements consumers.Foresight.
func (s *Stock[T]) Foresee(tx T, batch []*consumers.Delivery) {
	if !slices.ContainsFunc(batch, func(d *consumers.Delivery) bool { return !first[*events.ReserveStock](d) }) {
		tx.PresumeUnreserved(ordersOf(batch))
		return
	}
	tx.ForeseeReservations(ordersOf(batch))
}

func (s *Stock[T]) apply(ctx context.Context, tx T, batch []*consumers.Delivery) ([]consumers.Result, error) {
	lines := make([][]domain.Line, len(batch)) // of ReserveStock that may still act
	out := make([]consumers.Result, len(batch))
	for i, d := range batch {
		if m, ok := d.Data.(*events.ReserveStock); ok && !lapsed(m.GetExpiresAtMs(), s.now) {
			var err error
			if lines[i], err = reservable(m); err != nil {
				out[i].Err = asPoison("ReserveStock", err)
			}
		}
	}
	sh, err := openShelf(ctx, tx, batch, lines)
	if err != nil {
		return nil, err
	}
	for i, d := range batch {
		if out[i].Err != nil {
			continue
		}
		switch d.Data.(type) {
		case *events.ReserveStock:
			out[i] = sh.reserve(d, lines[i])
		case *events.CommitStock:
			out[i] = sh.commit(d)
		default:
			out[i] = misrouted(d)
		}
	}
	return out, sh.save(ctx, tx)
}

func reservable(m *events.ReserveStock) ([]domain.Line, error) {
	ls := make([]domain.Line, 0, len(m.GetLines()))
	for _, l := range m.GetLines() {
		ls = append(ls, domain.Line{SKU: domain.SKU(l.GetSku()), Quantity: l.GetQuantity()})
	}
	return domain.CheckLines(ls)
}

// StockCompensation releases: ReleaseStock.
type StockCompensation[T StockTx] struct{}

// NewStockCompensation makes the handler of the compensation-stock group.
func NewStockCompensation[T StockTx]() *StockCompensation[T] { return &StockCompensation[T]{} }

// Prepare has nothing to do outside the transaction.
func (s *StockCompensation[T]) Prepare(context.Context, []*consumers.Delivery) (consumers.Apply[T], error) {
	return s.apply, nil
}

// Foresee implements consumers.Foresight.
func (s *StockCompensation[T]) Foresee(tx T, batch []*consumers.Delivery) {
	tx.ForeseeReservations(ordersOf(batch))
}

func (s *StockCompensation[T]) apply(ctx context.Context, tx T, batch []*consumers.Delivery) ([]consumers.Result, error) {
	sh, err := openShelf(ctx, tx, batch, nil)
	if err != nil {
		return nil, err
	}
	out := make([]consumers.Result, len(batch))
	for i, d := range batch {
		if _, ok := d.Data.(*events.ReleaseStock); ok {
			out[i] = sh.release(d)
		} else {
			out[i] = misrouted(d)
		}
	}
	return out, sh.save(ctx, tx)
}

// shelf is the reservations and the stock that one batch works on, in memory between one read of each and one write of each: a hot
// product's row is locked for as long as it takes to count, however many orders of the batch want it.
type shelf struct {
	reservations map[domain.OrderID]*domain.Reservation
	stock        map[domain.SKU]*domain.Stock
	fresh        map[domain.OrderID]bool // to be inserted
	changed      map[domain.OrderID]bool // to be updated
	touched      map[domain.SKU]bool
}

// openShelf locks the reservations first, then the stock that they or the lines of new ones name: every handler takes the locks in
// this order, and each kind sorted, so no two can wait for each other.
func openShelf(ctx context.Context, tx StockTx, batch []*consumers.Delivery, lines [][]domain.Line) (*shelf, error) {
	sh := &shelf{fresh: map[domain.OrderID]bool{}, changed: map[domain.OrderID]bool{}, touched: map[domain.SKU]bool{}}
	var err error
	if sh.reservations, err = tx.LockReservations(ctx, ordersOf(batch)); err != nil {
		return nil, err
	}
	if sh.reservations == nil {
		sh.reservations = map[domain.OrderID]*domain.Reservation{}
	}
	var skus []domain.SKU
	for i, d := range batch {
		var need []domain.Line
		switch prior := sh.reservations[orderOf(d)]; {
		case prior == nil && lines != nil:
			need = lines[i]
		case prior != nil && prior.State == domain.Reserved && moves(d):
			need = prior.Lines
		}
		for _, l := range need {
			skus = append(skus, l.SKU)
		}
	}
	if len(skus) == 0 {
		return sh, nil
	}
	slices.Sort(skus)
	sh.stock, err = tx.LockStock(ctx, slices.Compact(skus))
	return sh, err
}

// moves reports a command that moves stock which is reserved already; a repeated ReserveStock needs no lock on it.
func moves(d *consumers.Delivery) bool {
	_, again := d.Data.(*events.ReserveStock)
	return !again
}

func (sh *shelf) reserve(d *consumers.Delivery, lines []domain.Line) consumers.Result {
	order := orderOf(d)
	prior := sh.reservations[order]
	if prior == nil && lines == nil {
		return consumers.Result{} // expired: the saga's own deadline has undone the order, or will
	}
	r, changed := domain.Reserve(prior, order, lines, sh.stock)
	if changed {
		sh.put(&r, true, r.State == domain.Reserved)
	}
	if r.Holds() {
		return reply(d, events.TStockReserved, &events.StockReserved{})
	}
	return reply(d, events.TStockRejected, &events.StockRejected{Sku: string(r.Short), Available: r.Have})
}

func (sh *shelf) commit(d *consumers.Delivery) consumers.Result {
	r := sh.reservations[orderOf(d)]
	changed, err := r.Commit(sh.stock)
	if err != nil {
		return consumers.Result{Err: asPoison("CommitStock", err)}
	}
	if changed {
		sh.put(r, false, true)
	}
	return reply(d, events.TStockCommitted, &events.StockCommitted{})
}

func (sh *shelf) release(d *consumers.Delivery) consumers.Result {
	order := orderOf(d)
	prior := sh.reservations[order]
	r, changed, err := domain.Release(prior, order, sh.stock)
	if err != nil {
		return consumers.Result{Err: asPoison("ReleaseStock", err)}
	}
	if changed {
		sh.put(&r, prior == nil, r.State == domain.Released)
	}
	return reply(d, events.TStockReleased, &events.StockReleased{})
}

func (sh *shelf) put(r *domain.Reservation, fresh, moved bool) {
	sh.reservations[r.Order] = r
	if fresh {
		sh.fresh[r.Order] = true
	} else if !sh.fresh[r.Order] {
		sh.changed[r.Order] = true
	}
	if moved {
		for _, l := range r.Lines {
			sh.touched[l.SKU] = true
		}
	}
}

func (sh *shelf) save(ctx context.Context, tx StockTx) error {
	if rs := sh.sorted(sh.fresh); len(rs) > 0 {
		if err := tx.InsertReservations(ctx, rs); err != nil {
			return err
		}
	}
	if rs := sh.sorted(sh.changed); len(rs) > 0 {
		if err := tx.UpdateReservations(ctx, rs); err != nil {
			return err
		}
	}
	if len(sh.touched) == 0 {
		return nil
	}
	stock := make([]domain.Stock, 0, len(sh.touched))
	for sku := range sh.touched {
		stock = append(stock, *sh.stock[sku])
	}
	slices.SortFunc(stock, func(a, b domain.Stock) int { return cmp.Compare(a.SKU, b.SKU) })
	return tx.SaveStock(ctx, stock)
}

func (sh *shelf) sorted(orders map[domain.OrderID]bool) []domain.Reservation {
	rs := make([]domain.Reservation, 0, len(orders))
	for id := range orders {
		rs = append(rs, *sh.reservations[id])
	}
	slices.SortFunc(rs, func(a, b domain.Reservation) int { return a.Order.Compare(b.Order) })
	return rs
}
