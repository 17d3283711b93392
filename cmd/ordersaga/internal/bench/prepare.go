package bench

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"sync"
	"time"
)

// stock is what the load's products have on hand: more than a run can order, and room for the books to add up over many runs.
const stock = 1_000_000_000

// low is what is topped up.
const low = stock / 2

// prepareAtOnce is how many products are looked at a time.
const prepareAtOnce = 8

// Prepare makes the products of a mix, unless they are there with stock enough.
func Prepare(ctx context.Context, url, token string, m *Mix, price int64) error {
	e, err := NewEndpoint(url, prepareTimeout)
	if err != nil {
		return err
	}
	stocked, empty := m.SKUs()
	type product struct {
		sku    string
		onHand int64
	}
	work := make(chan product)
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var wg sync.WaitGroup
	for range prepareAtOnce {
		wg.Go(func() {
			k := NewConn(e)
			defer k.Close()
			for p := range work {
				if err := prepareOne(ctx, k, token, p.sku, p.onHand, price); err != nil {
					cancel(err)
				}
			}
		})
	}
	deal := func(skus []string, onHand int64) {
		for _, s := range skus {
			select {
			case work <- product{s, onHand}:
			case <-ctx.Done():
				return
			}
		}
	}
	deal(stocked, stock)
	deal(empty, 0)
	close(work)
	wg.Wait()
	return context.Cause(ctx)
}

func prepareOne(ctx context.Context, k *Conn, token, sku string, onHand, price int64) error {
	path, head := "/v1/products/"+sku, Heads(token)
	a, err := k.Do(ctx, &Request{Method: http.MethodGet, Path: path, Head: head})
	if err != nil {
		return fmt.Errorf("products: %w (is the service running? --url chooses another)", err)
	}
	var have struct {
		OnHand    int64 `json:"on_hand"`
		Available int64 `json:"available"`
	}
	switch a.Status {
	case http.StatusOK:
		if err := json.Unmarshal(a.Body, &have); err != nil {
			return fmt.Errorf("product %s: %w", sku, err)
		}
		if have.Available >= low || onHand == 0 {
			return nil
		}
	case http.StatusNotFound:
	default:
		return refusedBy("reading product "+sku, a)
	}
	body, err := json.Marshal(map[string]any{"name": "load test " + sku, "unit_price_minor": price, "currency": "EUR", "on_hand": have.OnHand - have.Available + onHand, "note": "ordersaga bench"})
	if err != nil {
		return fmt.Errorf("product %s: %w", sku, err)
	}
	a, err = k.Do(ctx, &Request{Method: http.MethodPut, Path: path, Head: head, Body: body})
	if err != nil {
		return fmt.Errorf("product %s: %w", sku, err)
	}
	if a.Status != http.StatusOK && a.Status != http.StatusCreated {
		return refusedBy("making product "+sku, a)
	}
	return nil
}

func refusedBy(what string, a Answer) error {
	do := ""
	if a.Status == http.StatusUnauthorized || a.Status == http.StatusForbidden {
		do = "; it needs a token with the role admin (--token), or products that are there already (--no-prepare)"
	}
	return fmt.Errorf("%s: status %d: %.300s%s", what, a.Status, a.Body, do)
}

// prepareTimeout bounds one of its requests.
const prepareTimeout = 30 * time.Second
