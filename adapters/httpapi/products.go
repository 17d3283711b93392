package httpapi

import (
	"net/http"

	"ordersaga/domain"
)

// ListProducts implements GET /v1/products.
func (a *API) ListProducts(w http.ResponseWriter, r *http.Request, params ListProductsParams) {
	limit, err := pageLimit(params.Limit, r)
	if err != nil {
		a.fail(w, r, err)
		return
	}
	page, next, err := a.Products.List(r.Context(), params.Cursor, limit)
	if err != nil {
		a.fail(w, r, badCursor(err))
		return
	}
	out := ProductPage{Products: make([]Product, len(page)), NextCursor: next}
	for i := range page {
		out.Products[i] = product(&page[i])
	}
	answer(w, http.StatusOK, out)
}

// GetProduct implements GET /v1/products/{sku}.
func (a *API) GetProduct(w http.ResponseWriter, r *http.Request, sku SKU) {
	p, err := a.Products.Get(r.Context(), domain.SKU(sku))
	switch {
	case err != nil:
		a.fail(w, r, err)
	case p == nil:
		a.fail(w, r, problem(http.StatusNotFound, "not_found", "Not found", "the catalogue has no such product"))
	default:
		answer(w, http.StatusOK, product(p))
	}
}

// PutProduct implements PUT /v1/products/{sku}.
func (a *API) PutProduct(w http.ResponseWriter, r *http.Request, sku SKU) {
	raw, err := readBody(r)
	var b PutProduct
	if err == nil {
		err = decodeStrict(raw, &b)
	}
	if err == nil {
		err = checkProduct(sku, &b)
	}
	if err != nil {
		a.fail(w, r, err)
		return
	}
	v, created, err := a.Products.Put(r.Context(), ProductChange{
		Product: domain.Product{SKU: domain.SKU(sku), Name: b.Name, UnitPrice: domain.Money{Minor: b.UnitPriceMinor, Currency: b.Currency}},
		OnHand:  b.OnHand, Actor: callerOf(r.Context()).Name, Note: clean(b.Note, 1000),
	})
	switch {
	case err != nil:
		a.fail(w, r, err)
	case created:
		answer(w, http.StatusCreated, product(&v))
	default:
		answer(w, http.StatusOK, product(&v))
	}
}

func checkProduct(sku string, b *PutProduct) error {
	bad := func(field, detail string) error {
		return &domain.Refusal{Reason: domain.Invalid, Field: field, Detail: detail}
	}
	switch {
	case sku == "" || len(sku) > domain.MaxIDLength || clean(sku, len(sku)+1) != sku:
		return bad("sku", "a sku is 1 to 128 bytes of printable text")
	case b.Name == "" || len(b.Name) > 256 || clean(b.Name, len(b.Name)+1) != b.Name:
		return bad("/name", "name is 1 to 256 bytes of printable text")
	case b.UnitPriceMinor < 0 || b.UnitPriceMinor > domain.MaxMinor:
		return bad("/unit_price_minor", "unit_price_minor is between 0 and 99999999")
	case !domain.ValidCurrency(b.Currency):
		return bad("/currency", "currency is a three-letter ISO 4217 code in upper case")
	case b.OnHand != nil && (*b.OnHand < 0 || *b.OnHand > 1e12):
		return bad("/on_hand", "on_hand is between 0 and 10^12")
	}
	return nil
}
