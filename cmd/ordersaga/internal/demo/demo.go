// Package demo sends a mix of orders through the service's own front doors, HTTP and the command topic, and says what became of each.
//
// It owns the mix and the table; it knows nothing of how the service works. Every order has an outcome that is expected of it, and one
// that ends otherwise is reported as unexpected. A cancel races the order on purpose: there either end is right.
package demo

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"sync"
	"time"

	"github.com/google/uuid"

	"ordersaga/adapters/httpapi"
	"ordersaga/cmd/ordersaga/internal/apiclient"
)

// Kind is a kind of order in the mix.
type Kind string

// The kinds of orders.
const (
	Good       Kind = "good, over HTTP"
	GoodTopic  Kind = "good, from the topic"
	OutOfStock Kind = "out of stock"
	Declined   Kind = "card declined"
	Cancel     Kind = "cancelled at once"
	Poison     Kind = "poison, on the topic"
)

// Kinds lists the kinds in the order of the table.
var Kinds = []Kind{Good, GoodTopic, OutOfStock, Declined, Cancel, Poison}

// The outcomes beside an order's status.
const (
	dead      = "dead letter"
	unsettled = "not ended in time"
)

// expected lists the outcomes that are right for a kind.
var expected = map[Kind][]string{
	Good: {"confirmed"}, GoodTopic: {"confirmed"}, OutOfStock: {"rejected (out_of_stock)"}, Declined: {"rejected (payment_declined)"},
	Cancel: {"cancelled (cancelled_by_customer)", "confirmed"}, Poison: {dead},
}

// Publish sends one record to the command topic and waits for its acknowledgement.
type Publish func(ctx context.Context, key, ceType, ceID string, value []byte) error

// Config is what a run needs.
type Config struct {
	Client   *apiclient.Client
	Publish  Publish
	Orders   int
	Workers  int           // orders at a time
	Patience time.Duration // for one order to end
	Progress func()        // after each order
}

// Report is what became of the orders: counts by kind and outcome.
type Report struct {
	Outcomes   map[Kind]map[string]int
	Unexpected []string // one line an order
	Took       time.Duration
}

// plan deals the kinds out: of 20 orders 11 good over HTTP, 3 good from the topic, 2 without stock, 2 declined, 1 cancelled, 1 poison.
func plan(i int) Kind {
	switch i % 20 {
	case 3, 9, 15:
		return GoodTopic
	case 5, 14:
		return OutOfStock
	case 7, 17:
		return Declined
	case 11:
		return Cancel
	case 19:
		return Poison
	}
	return Good
}

// The products that the demo orders; Catalogue makes them.
const (
	tea  = "TEA-1"
	mug  = "MUG-1"
	rare = "RARE-1"
)

// Catalogue makes the products of the trial version, unless they are there. Stock of the common ones is topped up for n orders.
func Catalogue(ctx context.Context, c *apiclient.Client, n int64) error {
	for _, p := range []struct {
		sku, name     string
		price, onHand int64
	}{{tea, "Assam, 250 g", 1290, 1000 + 4*n}, {mug, "Mug, white", 890, 1000 + 4*n}, {rare, "First flush, sold out", 9900, 0}} {
		var have httpapi.Product
		err := c.Do(ctx, http.MethodGet, "/v1/products/"+p.sku, nil, nil, nil, &have)
		var problem *apiclient.ProblemError
		switch {
		case err == nil && have.Available >= min(p.onHand, 3*n):
			continue
		case errors.As(err, &problem) && problem.Status == http.StatusNotFound || err == nil:
			onHand := have.OnHand + p.onHand
			err = c.Do(ctx, http.MethodPut, "/v1/products/"+p.sku, nil, nil,
				httpapi.PutProduct{Name: p.name, UnitPriceMinor: p.price, Currency: "EUR", OnHand: &onHand, Note: "trial stock"}, nil)
		}
		if err != nil {
			return fmt.Errorf("catalogue: %s: %w", p.sku, err)
		}
	}
	return nil
}

// Run sends the orders and waits for their ends.
func Run(ctx context.Context, cfg Config) (*Report, error) {
	start := time.Now()
	rep := &Report{Outcomes: map[Kind]map[string]int{}}
	var mu sync.Mutex
	var firstErr error
	work := make(chan int)
	var wg sync.WaitGroup
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	for range cfg.Workers {
		wg.Go(func() {
			for i := range work {
				kind := plan(i)
				id := uuid.Must(uuid.NewV7())
				outcome, err := one(ctx, &cfg, kind, id, i)
				mu.Lock()
				if err != nil && firstErr == nil {
					firstErr = fmt.Errorf("order %d (%s): %w", i, kind, err)
					stop()
				}
				rep.add(kind, id, outcome, err)
				mu.Unlock()
				cfg.Progress()
			}
		})
	}
feed:
	for i := range cfg.Orders {
		select {
		case work <- i:
		case <-ctx.Done():
			break feed
		}
	}
	close(work)
	wg.Wait()
	rep.Took = time.Since(start)
	if firstErr == nil {
		firstErr = ctx.Err()
	}
	return rep, firstErr
}

func (r *Report) add(k Kind, id uuid.UUID, outcome string, err error) {
	if err != nil {
		return
	}
	if r.Outcomes[k] == nil {
		r.Outcomes[k] = map[string]int{}
	}
	r.Outcomes[k][outcome]++
	if !slices.Contains(expected[k], outcome) {
		r.Unexpected = append(r.Unexpected, fmt.Sprintf("order %s (%s) ended %s", id, k, outcome))
	}
}

// Rows is the table: kind, outcome, count.
func (r *Report) Rows() [][3]string {
	var rows [][3]string
	for _, k := range Kinds {
		for _, o := range slices.Sorted(maps.Keys(r.Outcomes[k])) {
			rows = append(rows, [3]string{string(k), o, fmt.Sprint(r.Outcomes[k][o])})
		}
	}
	return rows
}

func one(ctx context.Context, cfg *Config, kind Kind, id uuid.UUID, i int) (string, error) {
	body := httpapi.PlaceOrder{
		OrderID: &id, CustomerID: fmt.Sprintf("demo-%d", i%50), Currency: "EUR", PaymentMethod: "pm_card_visa",
		Items: []httpapi.PlaceOrderItem{{SKU: tea, Quantity: int64(1 + i%3)}},
	}
	if i%4 == 0 {
		body.Items = append(body.Items, httpapi.PlaceOrderItem{SKU: mug, Quantity: 1})
	}
	if kind == OutOfStock {
		body.Items[0] = httpapi.PlaceOrderItem{SKU: rare, Quantity: 1}
	}
	if kind == Declined {
		body.PaymentMethod = "pm_card_chargeDeclined"
	}
	if kind == GoodTopic || kind == Poison {
		return viaTopic(ctx, cfg, kind, id, body)
	}
	if err := post(ctx, cfg, body, id); err != nil {
		return "", err
	}
	if kind == Cancel {
		err := cfg.Client.Do(ctx, http.MethodPost, "/v1/orders/"+id.String()+"/cancel", nil, nil, httpapi.CancelOrder{Reason: "demo"}, nil)
		var p *apiclient.ProblemError
		if err != nil && (!errors.As(err, &p) || p.Code != "already_confirmed") {
			return "", err
		}
	}
	return ended(ctx, cfg, id)
}

// post places the order, again as long as the service says that it is busy.
func post(ctx context.Context, cfg *Config, body httpapi.PlaceOrder, id uuid.UUID) error {
	for {
		err := cfg.Client.Do(ctx, http.MethodPost, "/v1/orders", nil, http.Header{"Idempotency-Key": {id.String()}}, body, nil)
		var p *apiclient.ProblemError
		if !errors.As(err, &p) || p.Status != http.StatusTooManyRequests && p.Status != http.StatusServiceUnavailable {
			return err
		}
		if err := pause(ctx, time.Second); err != nil {
			return err
		}
	}
}

func viaTopic(ctx context.Context, cfg *Config, kind Kind, id uuid.UUID, body httpapi.PlaceOrder) (string, error) {
	value := []byte(`{"order_id": "` + id.String() + `", "customer_id": 17, "items": [`) // a producer that stopped in the middle
	if kind == GoodTopic {
		var err error
		if value, err = json.Marshal(body); err != nil {
			return "", fmt.Errorf("command: %w", err)
		}
	}
	if err := cfg.Publish(ctx, id.String(), "ordersaga.orders.v1.PlaceOrder", uuid.NewString(), value); err != nil {
		return "", fmt.Errorf("command topic: %w", err)
	}
	if kind == GoodTopic {
		return ended(ctx, cfg, id)
	}
	return buried(ctx, cfg, id)
}

// every is how often the demo asks what has become of an order.
const every = 20 * time.Millisecond

// ended waits until the order and its saga have ended.
func ended(ctx context.Context, cfg *Config, id uuid.UUID) (string, error) {
	for until := time.Now().Add(cfg.Patience); time.Now().Before(until); {
		var o httpapi.Order
		err := cfg.Client.Do(ctx, http.MethodGet, "/v1/orders/"+id.String(), nil, nil, nil, &o)
		var p *apiclient.ProblemError
		switch {
		case errors.As(err, &p) && (p.Status == http.StatusNotFound || p.Status == http.StatusTooManyRequests || p.Status == http.StatusServiceUnavailable):
			// not placed yet, or busy
		case err != nil:
			return "", err
		case o.Saga.State == httpapi.SagaPhaseCompleted || o.Saga.State == httpapi.SagaPhaseCompensated:
			if o.Reason != "" {
				return fmt.Sprintf("%s (%s)", o.Status, o.Reason), nil
			}
			return string(o.Status), nil
		}
		if err := pause(ctx, every); err != nil {
			return "", err
		}
	}
	return unsettled, nil
}

// buried waits until a dead letter of the order can be listed.
func buried(ctx context.Context, cfg *Config, id uuid.UUID) (string, error) {
	for until := time.Now().Add(cfg.Patience); time.Now().Before(until); {
		var page httpapi.DeadLetterPage
		err := cfg.Client.Do(ctx, http.MethodGet, "/v1/dlq", url.Values{"order_id": {id.String()}}, nil, nil, &page)
		var p *apiclient.ProblemError
		if err != nil && (!errors.As(err, &p) || p.Status < http.StatusTooManyRequests) {
			return "", err
		}
		if len(page.DeadLetters) > 0 {
			return dead, nil
		}
		if err := pause(ctx, every); err != nil {
			return "", err
		}
	}
	return unsettled, nil
}

func pause(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
