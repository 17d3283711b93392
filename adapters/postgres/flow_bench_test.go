package postgres

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	"ordersaga/domain"
	"ordersaga/events"
	"ordersaga/saga"
)

// BenchmarkFlow is what the database does for sagas that go well: each transaction of intake, stock, payment and coordinator, with the reads
// and locks that the groups' runtime puts before them. The outbox is left out; it has benchmarks of its own. A batch of one is the price at low
// rates, where what a statement costs before its first row counts; a batch of a hundred is the price under load.
func BenchmarkFlow(b *testing.B) {
	for _, n := range []int{1, 4, 100} {
		b.Run(fmt.Sprintf("batch-%d", n), func(b *testing.B) {
			db := newDB(b)
			rawExec(b, db, `INSERT INTO stock SELECT 'sku-' || lpad(g::text, 4, '0'), 1000000000, 0, 0 FROM generate_series(0, 999) g`)
			f := &flow{b: b, db: db}
			f.run(n) // connections, prepared statements
			cpu := backends(b, db)
			perRow(b, db, n, func() { f.run(n) })
			if used, ok := cpu(); ok {
				b.ReportMetric(float64(used.Microseconds())/float64(f.sagas-n), "backend-µs/row")
			}
		})
	}
}

// backends answers how much CPU the database's backends have used since; not ok where they are no processes of this machine.
func backends(tb testing.TB, db *DB) func() (time.Duration, bool) {
	tb.Helper()
	var pids []int
	rows, err := db.Pool(Operators).Query(tb.Context(), `SELECT pid FROM pg_stat_activity WHERE datname = current_database()`)
	require.NoError(tb, err)
	pids, err = pgx.CollectRows(rows, pgx.RowTo[int])
	require.NoError(tb, err)
	sum := func() (total time.Duration, ok bool) {
		for _, pid := range pids {
			text, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/schedstat")
			if err != nil {
				return 0, false
			}
			ns, err := strconv.ParseInt(strings.Fields(string(text))[0], 10, 64)
			if err != nil {
				return 0, false
			}
			total += time.Duration(ns)
		}
		return total, len(pids) > 0
	}
	before, _ := sum()
	return func() (time.Duration, bool) {
		after, ok := sum()
		return after - before, ok
	}
}

// flow runs sagas side by side, a batch a transaction.
type flow struct {
	b     *testing.B
	db    *DB
	sagas int
}

func (f *flow) tx(ctx context.Context, p Purpose, fn func(ctx context.Context, tx *Tx) error) {
	require.NoError(f.b, f.db.For(p).InTx(ctx, fn))
}

// group is a transaction as the groups' runtime begins it: the inbox, and what the handler will lock, in one round trip.
func (f *flow) group(g events.Group, n int, foresee func(tx *Tx), fn func(ctx context.Context, tx *Tx) error) {
	f.tx(f.b.Context(), Consumers, func(ctx context.Context, tx *Tx) error {
		foresee(tx)
		ids := make([]uuid.UUID, n)
		for i := range ids {
			ids[i] = events.NewID()
		}
		if _, err := tx.Inbox(ctx, g, ids); err != nil {
			return err
		}
		return fn(ctx, tx)
	})
}

func (f *flow) run(n int) {
	orders := make([]*domain.Order, n)
	for i := range orders {
		f.sagas++
		orders[i] = newOrder("customer-"+strconv.Itoa(f.sagas%5000), 1)
		for j := range orders[i].Lines {
			orders[i].Lines[j].SKU = skuOf((f.sagas*7 + j) % 999)
		}
		if orders[i].Lines[0].SKU > orders[i].Lines[1].SKU {
			orders[i].Lines[0], orders[i].Lines[1] = orders[i].Lines[1], orders[i].Lines[0]
		}
	}
	ids := sortedIDs(idsOf(orders))
	f.place(orders)
	f.stock(orders, ids, false)
	f.payment(ids, func(p *domain.Payment) {
		p.BeginAuthorize(domain.Money{Minor: 300, Currency: "EUR"}, "pm_card_visa", false, f.db.Now())
	}, domain.Authorize, domain.PaymentAuthorized)
	f.advance(ids, "reserve_stock")
	f.advance(ids, "authorize_payment")
	f.payment(ids, func(p *domain.Payment) {
		p.BeginCapture(domain.Money{Minor: 300, Currency: "EUR"}, false, f.db.Now())
	}, domain.Capture, domain.PaymentCaptured)
	f.advance(ids, "capture_payment")
	f.stock(orders, ids, true)
	f.advance(ids, "commit_stock")
}

func (f *flow) place(orders []*domain.Order) {
	keys := make([]saga.IdempotencyKey, len(orders))
	for i, o := range orders {
		keys[i] = saga.IdempotencyKey{Caller: "shop", Key: o.ID.String(), Order: o.ID, Answer: fmt.Appendf(nil, `{"order_id":"%s","status":"pending"}`, o.ID)}
	}
	f.tx(f.b.Context(), Intake, func(ctx context.Context, tx *Tx) error {
		tx.PresumeNew(nil)
		if _, err := tx.FindKeys(ctx, keys); err != nil {
			return err
		}
		if _, err := coordinator(f.db).Place(ctx, tx, requests(orders...)); err != nil {
			return err
		}
		return tx.InsertKeys(ctx, keys)
	})
}

func (f *flow) stock(orders []*domain.Order, ids []domain.OrderID, commit bool) {
	lines := make(map[domain.OrderID][]domain.Line, len(orders))
	seen := map[domain.SKU]bool{}
	var skus []domain.SKU
	for _, o := range orders {
		lines[o.ID] = o.Lines
		for _, l := range o.Lines {
			if !seen[l.SKU] {
				seen[l.SKU] = true
				skus = append(skus, l.SKU)
			}
		}
	}
	f.group(events.GroupStock, len(ids), func(tx *Tx) { tx.ForeseeReservations(ids) }, func(ctx context.Context, tx *Tx) error {
		prior, err := tx.LockReservations(ctx, ids)
		if err != nil {
			return err
		}
		stock, err := tx.LockStock(ctx, skus)
		if err != nil {
			return err
		}
		rs := make([]domain.Reservation, 0, len(ids))
		for _, id := range ids {
			if !commit {
				r, _ := domain.Reserve(nil, id, lines[id], stock)
				rs = append(rs, r)
				continue
			}
			if _, err := prior[id].Commit(stock); err != nil {
				return err
			}
			rs = append(rs, *prior[id])
		}
		save := make([]domain.Stock, 0, len(stock))
		for _, s := range stock {
			save = append(save, *s)
		}
		if commit {
			err = tx.UpdateReservations(ctx, rs)
		} else {
			err = tx.InsertReservations(ctx, rs)
		}
		return errors.Join(err, tx.SaveStock(ctx, save))
	})
}

func (f *flow) payment(ids []domain.OrderID, begin func(*domain.Payment), op domain.PaymentOp, res domain.PaymentResult) {
	each := func(ctx context.Context, tx *Tx, fn func(*domain.Payment)) error {
		pays, err := tx.LockPayments(ctx, ids)
		if err != nil {
			return err
		}
		list := make([]*domain.Payment, 0, len(ids))
		for _, id := range ids {
			fn(pays[id])
			list = append(list, pays[id])
		}
		return tx.SavePayments(ctx, list)
	}
	f.tx(f.b.Context(), Consumers, func(ctx context.Context, tx *Tx) error { return each(ctx, tx, begin) })
	f.group(events.GroupPayment, len(ids), func(tx *Tx) { tx.ForeseePayments(ids) }, func(ctx context.Context, tx *Tx) error {
		return each(ctx, tx, func(p *domain.Payment) {
			p.Settle(op, 1, domain.PaymentOutcome{Result: res, Ref: "pi_3NqFh2LkdIwHu7ix0xYhYgEt"})
		})
	})
}

func (f *flow) advance(ids []domain.OrderID, step string) {
	f.group(events.GroupCoordinator, len(ids), func(tx *Tx) { tx.ForeseeSagas(ids) }, func(ctx context.Context, tx *Tx) error {
		facts := make([]saga.Fact, len(ids))
		for i, id := range ids {
			facts[i] = saga.Fact{Order: id, Input: done(step), Cause: events.NewID()}
		}
		_, err := coordinator(f.db).Advance(ctx, tx, facts)
		return err
	})
}
