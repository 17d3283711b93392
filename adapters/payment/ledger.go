package payment

import (
	"context"
	"iter"
	"strings"
	"time"

	"github.com/stripe/stripe-go/v85"
)

// Entry is one intent of the gateway's ledger, as the audit compares it with ours.
type Entry struct {
	ID             string
	OrderID        string // metadata.order_id as it stands there; empty: not an intent of ours
	Status         string // the gateway's word: requires_capture, succeeded, canceled, …
	Amount         int64  // minor units, as are the other two
	AmountReceived int64
	AmountRefunded int64
	Currency       string // upper case
	Created        time.Time
}

// Ledger reads back every intent created at or after since, newest first, a page at a time. It ends with the first error. Amounts
// refunded are those of the intent's latest charge: an intent has one charge that succeeded at most.
func (g *Gateway) Ledger(ctx context.Context, since time.Time) iter.Seq2[Entry, error] {
	return func(yield func(Entry, error) bool) {
		for p, err := range g.pages(ctx, since) {
			if err != nil {
				yield(Entry{}, err)
				return
			}
			for i := range p.Data {
				if !yield(p.Data[i].entry(), nil) {
					return
				}
			}
		}
	}
}

func (in *intent) entry() Entry {
	return Entry{
		ID: in.ID, OrderID: clean(in.Metadata.OrderID, ""), Status: token(in.Status), Amount: in.Amount, AmountReceived: in.AmountReceived,
		AmountRefunded: in.LatestCharge.AmountRefunded, Currency: strings.ToUpper(token(in.Currency)), Created: time.Unix(in.Created, 0).UTC(),
	}
}

// pages lists intents created at or after from. Intents created meanwhile come before the page in hand and do not shift it: the next
// page starts after an id, not at a number.
func (g *Gateway) pages(ctx context.Context, from time.Time) iter.Seq2[page, error] {
	return func(yield func(page, error) bool) {
		after := ""
		for {
			p, err := g.page(ctx, from, after)
			if !yield(p, err) || err != nil || !p.HasMore {
				return
			}
			after = p.Data[len(p.Data)-1].ID
		}
	}
}

func (g *Gateway) page(ctx context.Context, from time.Time, after string) (page, error) {
	params := &stripe.PaymentIntentListParams{}
	params.Limit = stripe.Int64(pageSize)
	params.Expand = []*string{stripe.String("data.latest_charge")}
	if s := from.Unix(); s > 0 {
		params.CreatedRange = &stripe.RangeQueryParams{GreaterThanOrEqual: s}
	}
	if after != "" {
		params.StartingAfter = stripe.String(after)
	}
	c := get(callList, intentsPath, params)
	a, err := g.do(ctx, c)
	if err != nil {
		return page{}, err
	}
	if !a.ok() {
		return page{}, a.failure(c).asError()
	}
	p, err := decodePage(a.body)
	if err != nil {
		return page{}, a.malformed(c, err).asError()
	}
	return p, nil
}

// Ready makes one cheap call, past limits, retries and breaker: it tells whether the gateway can be reached and accepts our API key
// for what we do, at this moment. It neither opens nor closes the breaker.
func (g *Gateway) Ready(ctx context.Context) error {
	params := &stripe.PaymentIntentListParams{}
	params.Limit = stripe.Int64(1)
	c := get(callReady, intentsPath, params)
	start := time.Now()
	a, f := g.send(ctx, c)
	class := a.class()
	if f != nil {
		class = f.Class
	}
	g.observer.PaymentCall(c.name, string(class), time.Since(start))
	switch {
	case f != nil:
		return f.asError()
	case !a.ok():
		return a.failure(c).asError()
	}
	if _, err := decodePage(a.body); err != nil {
		return a.malformed(c, err).asError()
	}
	return nil
}
