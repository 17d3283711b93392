package httpapi

import (
	"errors"
	"fmt"
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
	if p := checkSKU(sku); p != nil {
		a.fail(w, r, p)
		return
	}
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

func checkSKU(sku string) *Problem {
	if sku == "" || len(sku) > domain.MaxIDLength || !plain(sku) {
		return badParameter("sku", fmt.Sprintf("a sku is 1 to %d bytes of printable text", domain.MaxIDLength))
	}
	return nil
}

// productBody is PutProduct of the contract, so read that a price of 0 is not what a missing one means.
type productBody struct {
	Name           string `json:"name"`
	UnitPriceMinor *int64 `json:"unit_price_minor"`
	Currency       string `json:"currency"`
	OnHand         *int64 `json:"on_hand"`
	Note           string `json:"note"`
}

// onHandField is where a store complains of fewer on hand than are reserved.
const onHandField = "/on_hand"

// PutProduct implements PUT /v1/products/{sku}.
func (a *API) PutProduct(w http.ResponseWriter, r *http.Request, sku SKU) {
	raw, err := readBody(r)
	var b productBody
	if err == nil {
		err = decodeStrict(raw, &b)
	}
	if p := checkSKU(sku); err == nil && p != nil {
		err = p
	}
	if err == nil {
		err = b.check()
	}
	if err != nil {
		a.fail(w, r, err)
		return
	}
	v, created, err := a.Products.Put(r.Context(), ProductChange{
		Product: domain.Product{SKU: domain.SKU(sku), Name: b.Name, UnitPrice: domain.Money{Minor: *b.UnitPriceMinor, Currency: b.Currency}},
		OnHand:  b.OnHand, Actor: callerOf(r.Context()).Name, Note: clean(b.Note, maxNoteBytes),
	})
	var refusal *domain.Refusal
	switch {
	case errors.As(err, &refusal) && refusal.Field == onHandField:
		a.fail(w, r, problem(http.StatusConflict, "reserved", "Reserved", refusal.Detail).at(onHandField))
	case err != nil:
		a.fail(w, r, err)
	case created:
		answer(w, http.StatusCreated, product(&v))
	default:
		answer(w, http.StatusOK, product(&v))
	}
}

// Bounds of what an admin may write about a product.
const (
	maxProductName = 256  // bytes
	maxOnHand      = 1e12 // pieces
)

func (b *productBody) check() error {
	switch {
	case b.Name == "" || len(b.Name) > maxProductName || !plain(b.Name):
		return notAcceptable("/name", fmt.Sprintf("name is 1 to %d bytes of printable text", maxProductName))
	case b.UnitPriceMinor == nil:
		return notAcceptable("/unit_price_minor", "unit_price_minor is missing")
	case *b.UnitPriceMinor < 0 || *b.UnitPriceMinor > domain.MaxMinor:
		return notAcceptable("/unit_price_minor", fmt.Sprintf("unit_price_minor is between 0 and %d", domain.MaxMinor))
	case !domain.ValidCurrency(b.Currency):
		return notAcceptable("/currency", "currency is a three-letter ISO 4217 code in upper case")
	case b.OnHand != nil && (*b.OnHand < 0 || *b.OnHand > maxOnHand):
		return notAcceptable(onHandField, fmt.Sprintf("on_hand is between 0 and %d", int64(maxOnHand)))
	}
	return checkLength("/note", b.Note, maxNote)
}
