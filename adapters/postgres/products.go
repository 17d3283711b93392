package postgres

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/jackc/pgx/v5"

	"ordersaga/domain"
	"ordersaga/saga"
)

// ProductView is a product with its stock.
type ProductView struct {
	domain.Product
	Stock domain.Stock
}

// ProductChange is what PutProduct shall make of a product.
type ProductChange struct {
	Product domain.Product
	OnHand  *int64 // what lies in the warehouse; nil: as it is
	Actor   string
	Note    string // why, for the adjustment and the operators' log
}

// Products reads prices along the primary key, on the intake's pool; SKUs that it does not know are left out.
func (db *DB) Products(ctx context.Context, skus []domain.SKU) (map[domain.SKU]domain.Product, error) {
	out := make(map[domain.SKU]domain.Product, len(skus))
	if len(skus) == 0 {
		return out, nil
	}
	known := make([]string, 0, len(skus)) // a SKU that can't be stored is one that is not known
	for _, s := range skus {
		if t := string(s); clean(t) == t {
			known = append(known, t)
		}
	}
	const q = `SELECT sku, name, unit_price_minor, currency FROM products WHERE sku = ANY($1)`
	err := db.query(ctx, Intake, "products", q, []any{known}, func(r pgx.Rows) error {
		p, err := scanProduct(r)
		out[p.SKU] = p
		return err
	})
	return out, err
}

func scanProduct(r pgx.Rows) (p domain.Product, err error) {
	err = r.Scan((*string)(&p.SKU), &p.Name, &p.UnitPrice.Minor, &p.UnitPrice.Currency)
	return p, err
}

func checkProduct(c *ProductChange) *domain.Refusal {
	bad := func(field, detail string) *domain.Refusal {
		return &domain.Refusal{Reason: domain.Invalid, Field: field, Detail: detail}
	}
	p := &c.Product
	switch {
	case p.SKU == "" || len(p.SKU) > domain.MaxIDLength || clean(string(p.SKU)) != string(p.SKU):
		return bad("/sku", fmt.Sprintf("a sku has 1 to %d bytes of UTF-8", domain.MaxIDLength))
	case p.UnitPrice.Minor < 0 || p.UnitPrice.Minor > domain.MaxMinor:
		return bad("/unit_price_minor", fmt.Sprintf("unit_price_minor %d is not between 0 and %d", p.UnitPrice.Minor, domain.MaxMinor))
	case !domain.ValidCurrency(p.UnitPrice.Currency):
		return bad("/currency", fmt.Sprintf("currency %.8q is not a three-letter ISO 4217 code in upper case", p.UnitPrice.Currency))
	case c.OnHand != nil && (*c.OnHand < 0 || *c.OnHand > maxOnHand):
		return bad("/on_hand", fmt.Sprintf("on_hand %d is not between 0 and %d", *c.OnHand, int64(maxOnHand)))
	}
	return nil
}

// maxOnHand keeps sums of stock far from the end of 64 bits.
const maxOnHand = 1_000_000_000_000

// PutProduct creates or changes a product and sets what lies in the warehouse. A change of that is a recorded adjustment; any change is in
// the operators' log. It answers a *domain.Refusal if a value is not possible, such as fewer on hand than are reserved. The catalogue and
// the stock are written in one transaction but by statements of their own.
func (db *DB) PutProduct(ctx context.Context, c ProductChange) (view ProductView, created bool, err error) {
	if c.Actor == "" {
		return view, false, errors.New("postgres: put product: no actor")
	}
	if r := checkProduct(&c); r != nil {
		return view, false, r
	}
	c.Product.Name = clean(c.Product.Name)
	err = db.InTx(ctx, func(ctx context.Context, tx *Tx) (err error) {
		view, created, err = tx.putProduct(ctx, &c)
		return err
	})
	return view, created, err
}

func (t *Tx) putProduct(ctx context.Context, c *ProductChange) (view ProductView, created bool, err error) {
	p := c.Product
	sku := string(p.SKU)
	var old *domain.Product
	t.queueRead("lock product", `SELECT sku, name, unit_price_minor, currency FROM products WHERE sku = $1 FOR NO KEY UPDATE`, []any{sku}, func(r pgx.Rows) error {
		o, err := scanProduct(r)
		old = &o
		return err
	})
	rows, err := t.LockStock(ctx, []domain.SKU{p.SKU})
	if err != nil {
		return view, false, err
	}
	switch {
	case old == nil:
		t.queue("insert product", `INSERT INTO products (sku, name, unit_price_minor, currency) VALUES ($1, $2, $3, $4)`, sku, p.Name, p.UnitPrice.Minor, p.UnitPrice.Currency)
	case *old != p:
		t.queue("update product", `UPDATE products SET name = $2, unit_price_minor = $3, currency = $4, updated_at = now() WHERE sku = $1`, sku, p.Name, p.UnitPrice.Minor, p.UnitPrice.Currency)
	}
	stock, delta, err := t.adjust(ctx, rows[p.SKU], c)
	if err == nil && (old == nil || *old != p || delta != 0) {
		err = t.auditProduct(ctx, c, stock.OnHand()-delta, stock.OnHand())
	}
	return ProductView{Product: p, Stock: stock}, old == nil, err
}

// adjust sets the stock of a product, locked or not there yet, and records by how much it changed.
func (t *Tx) adjust(ctx context.Context, locked *domain.Stock, c *ProductChange) (stock domain.Stock, delta int64, err error) {
	stock = domain.Stock{SKU: c.Product.SKU}
	if locked != nil {
		stock = *locked
	}
	if c.OnHand != nil {
		delta = *c.OnHand - stock.OnHand()
		if err := stock.Adjust(*c.OnHand); err != nil {
			return stock, 0, &domain.Refusal{Reason: domain.Invalid, Field: "/on_hand", Detail: err.Error()}
		}
	}
	if locked == nil {
		t.queue("insert stock", `INSERT INTO stock (sku, available, reserved, sold) VALUES ($1, $2, 0, 0)`, string(stock.SKU), stock.Available)
	}
	if delta == 0 {
		return stock, 0, nil
	}
	t.queue("record adjustment", `INSERT INTO stock_adjustments (sku, delta, on_hand_after, actor, note) VALUES ($1, $2, $3, $4, $5)`,
		string(stock.SKU), delta, stock.OnHand(), clean(c.Actor), clean(c.Note))
	if locked != nil {
		err = t.SaveStock(ctx, []domain.Stock{stock})
	}
	return stock, delta, err
}

func (t *Tx) auditProduct(ctx context.Context, c *ProductChange, before, after int64) error {
	detail, err := json.Marshal(map[string]any{
		"name": c.Product.Name, "unit_price_minor": c.Product.UnitPrice.Minor, "currency": c.Product.UnitPrice.Currency, "on_hand_before": before, "on_hand": after,
	})
	if err != nil {
		return fmt.Errorf("postgres: audit of a product: %w", err)
	}
	return t.Audit(ctx, []saga.AuditEntry{{Actor: c.Actor, Action: "product.put", Target: string(c.Product.SKU), Note: c.Note, Detail: string(detail)}})
}

// GetProduct answers nil if there is none.
func (db *DB) GetProduct(ctx context.Context, sku domain.SKU) (*ProductView, error) {
	if clean(string(sku)) != string(sku) {
		return nil, nil //nolint:nilnil // there is none
	}
	list, err := db.productViews(ctx, `sku = $1`, string(sku))
	if err != nil || len(list) == 0 {
		return nil, err
	}
	return &list[0], nil
}

// ListProducts lists products by SKU; the cursor is the last SKU of the page before.
func (db *DB) ListProducts(ctx context.Context, cursor string, limit int) (page []ProductView, next string, err error) {
	limit = pageLimit(limit)
	page, err = db.productViews(ctx, `sku > $1 ORDER BY sku LIMIT $2`, clean(cursor), limit+1)
	if err == nil && len(page) > limit {
		page, next = page[:limit], string(page[limit-1].SKU)
	}
	return page, next, err
}

// productViews reads the catalogue, then the stock of what it found: two statements, for they may live in two databases one day.
func (db *DB) productViews(ctx context.Context, cond string, args ...any) (list []ProductView, err error) {
	at := map[string]int{}
	err = db.query(ctx, Operators, "list products", `SELECT sku, name, unit_price_minor, currency FROM products WHERE `+cond, args, func(r pgx.Rows) error {
		p, err := scanProduct(r)
		at[string(p.SKU)] = len(list)
		list = append(list, ProductView{Product: p, Stock: domain.Stock{SKU: p.SKU}})
		return err
	})
	if err != nil || len(list) == 0 {
		return list, err
	}
	skus := make([]string, len(list))
	for i := range list {
		skus[i] = string(list[i].SKU)
	}
	err = db.query(ctx, Operators, "list stock", `SELECT sku, available, reserved, sold FROM stock WHERE sku = ANY($1)`, []any{skus}, func(r pgx.Rows) error {
		s, err := scanStock(r)
		list[at[string(s.SKU)]].Stock = s
		return err
	})
	return list, err
}
