package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/spf13/cobra"

	"ordersaga/adapters/httpapi"
	"ordersaga/cmd/ordersaga/internal/apiclient"
)

func (g *globals) client() (*apiclient.Client, error) {
	c, err := apiclient.New(g.url, g.token)
	if err != nil {
		return nil, &usageError{err}
	}
	return c, nil
}

func ordersCommand(g *globals) *cobra.Command {
	c := &cobra.Command{Use: "orders", Short: "Submit, read, list, cancel and watch orders"}
	c.AddCommand(ordersSubmit(g), ordersGet(g), ordersList(g), ordersCancel(g), ordersWatch(g))
	return c
}

func ordersSubmit(g *globals) *cobra.Command {
	var file, customer, currency, method, key string
	var items []string
	var wait time.Duration
	c := &cobra.Command{
		Use:   "submit",
		Short: "Place an order",
		Long:  "Places one order, described by flags or by a JSON body (-f, - for standard input). Asked for again with the same --key it is the same order.",
		Example: `  ordersaga orders submit --customer c-17 --item TEA-1=2 --item MUG-1 --wait 10s
  echo '{"customer_id":"c-17","currency":"EUR","items":[{"sku":"TEA-1","quantity":1}],"payment_method":"pm_card_visa"}' | ordersaga orders submit -f -`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cl, err := g.client()
			if err != nil {
				return err
			}
			body, err := orderJSON(cmd.InOrStdin(), file, customer, currency, method, items)
			if err != nil {
				return err
			}
			if key == "" {
				key = uuid.NewString()
			}
			h := http.Header{"Idempotency-Key": {key}}
			if wait > 0 {
				h.Set("Prefer", "wait="+strconv.Itoa(int((wait+time.Second-1)/time.Second)))
			}
			var o httpapi.OrderAccepted
			if err := cl.Do(cmd.Context(), http.MethodPost, "/v1/orders", nil, h, body, &o); err != nil {
				return err
			}
			return one(cmd, g, o, func(w io.Writer) error {
				_, err := fmt.Fprintf(w, "%s  %s%s  %s\n", o.OrderID, o.Status, because(string(o.Reason)), amount(o.TotalMinor, o.Currency))
				return err
			})
		},
	}
	f := c.Flags()
	f.StringVarP(&file, "file", "f", "", "JSON body of the order; - reads standard input")
	f.StringVar(&customer, "customer", "", "customer id")
	f.StringVar(&currency, "currency", "EUR", "ISO 4217 currency")
	f.StringVar(&method, "payment-method", "pm_card_visa", "payment method, in the gateway's words")
	f.StringArrayVar(&items, "item", nil, "SKU, or SKU=quantity (may be repeated)")
	f.StringVar(&key, "key", "", "Idempotency-Key (default: a new one)")
	f.DurationVar(&wait, "wait", 0, "wait so long for the order to end")
	return c
}

func orderJSON(in io.Reader, file, customer, currency, method string, items []string) ([]byte, error) {
	switch {
	case file != "" && (customer != "" || len(items) > 0):
		return nil, usagef("-f holds the whole order: leave --customer and --item out")
	case file == "-":
		return io.ReadAll(in)
	case file != "":
		b, err := os.ReadFile(file)
		if err != nil {
			return nil, usagef("--file: %v", err)
		}
		return b, nil
	case customer == "" || len(items) == 0:
		return nil, usagef("an order needs --customer and at least one --item, or -f with a JSON body")
	}
	b := httpapi.PlaceOrder{CustomerID: customer, Currency: currency, PaymentMethod: method}
	for _, it := range items {
		sku, n, has := strings.Cut(it, "=")
		q := int64(1)
		if has {
			var err error
			if q, err = strconv.ParseInt(n, 10, 64); err != nil || q < 1 {
				return nil, usagef("--item %q: the quantity is a number from 1", it)
			}
		}
		b.Items = append(b.Items, httpapi.PlaceOrderItem{SKU: sku, Quantity: q})
	}
	return json.Marshal(b)
}

func because(reason string) string {
	if reason == "" {
		return ""
	}
	return " (" + reason + ")"
}

// amount shows minor units as people write the currency. ISO 4217 gives most currencies two decimals; those with others are few.
func amount(minor int64, currency string) string {
	decimals, other := decimalsOf[currency]
	if !other {
		decimals = 2
	}
	if decimals == 0 {
		return fmt.Sprintf("%d %s", minor, currency)
	}
	unit := int64(1)
	for range decimals {
		unit *= 10
	}
	return fmt.Sprintf("%d.%0*d %s", minor/unit, decimals, minor%unit, currency)
}

// decimalsOf is the currencies of ISO 4217 whose minor unit is not a hundredth.
var decimalsOf = map[string]int{
	"BIF": 0, "CLP": 0, "DJF": 0, "GNF": 0, "ISK": 0, "JPY": 0, "KMF": 0, "KRW": 0, "PYG": 0, "RWF": 0, "UGX": 0, "VND": 0, "VUV": 0, "XAF": 0, "XOF": 0, "XPF": 0,
	"BHD": 3, "IQD": 3, "JOD": 3, "KWD": 3, "LYD": 3, "OMR": 3, "TND": 3,
}

func ordersGet(g *globals) *cobra.Command {
	return &cobra.Command{
		Use: "get ID…", Short: "Read orders", Args: cobra.MinimumNArgs(1),
		Example: "  ordersaga orders get 01938f6c-8b8a-7c3e-9d1c-2f4b5a6c7d8e",
		RunE: func(cmd *cobra.Command, args []string) error {
			return each(cmd, g, args, func(ctx context.Context, cl *apiclient.Client, id string) (httpapi.Order, error) {
				return fetch[httpapi.Order](ctx, cl, http.MethodGet, "/v1/orders/"+url.PathEscape(id), nil)
			}, orderHeader, orderCells)
		},
	}
}

func fetch[T any](ctx context.Context, cl *apiclient.Client, method, path string, body any) (T, error) {
	var v T
	err := cl.Do(ctx, method, path, nil, nil, body, &v)
	return v, err
}

// each does one thing to every id, prints what came of it, and fails at the end if some failed.
func each[T any](cmd *cobra.Command, g *globals, ids []string, do func(context.Context, *apiclient.Client, string) (T, error), header []string, cells func(T) []string) error {
	cl, err := g.client()
	if err != nil {
		return err
	}
	var rows []T
	failed := 0
	for _, id := range ids {
		v, err := do(cmd.Context(), cl, id)
		if err != nil {
			if cmd.Context().Err() != nil {
				return err
			}
			failed++
			say(cmd.ErrOrStderr(), "%s: %v\n", clean(id), err)
			continue
		}
		rows = append(rows, v)
	}
	if len(rows) > 0 || g.output == "json" {
		if err := list(cmd, g, rows, header, cells); err != nil {
			return err
		}
	}
	if failed > 0 {
		return &failedError{fmt.Sprintf("%d of %d failed", failed, len(ids))}
	}
	return nil
}

var orderHeader = []string{"ORDER", "STATUS", "REASON", "TOTAL", "SAGA", "CREATED"}

func orderCells(o httpapi.Order) []string {
	return []string{o.OrderID.String(), string(o.Status), string(o.Reason), amount(o.TotalMinor, o.Currency), sagaWord(o.Saga), o.CreatedAt.Format(time.RFC3339)}
}

func sagaWord(s httpapi.SagaState) string {
	w := string(s.State)
	if s.Stuck != nil {
		w += ", stuck: " + s.Stuck.Reason
	}
	return w
}

func ordersList(g *globals) *cobra.Command {
	var status, customer string
	var limit int
	c := &cobra.Command{
		Use: "list", Short: "List orders, newest first", Args: cobra.NoArgs,
		Example: "  ordersaga orders list --status rejected --limit 20\n  ordersaga orders list --customer c-17 -o jsonl",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := oneOf("--status", status, orderStatuses); err != nil {
				return err
			}
			q := url.Values{}
			setIf(q, "status", status)
			setIf(q, "customer_id", customer)
			rows, err := pages(cmd.Context(), g, "/v1/orders", q, limit, func(b []byte) ([]httpapi.Order, string, error) {
				var p httpapi.OrderPage
				err := json.Unmarshal(b, &p)
				return p.Orders, p.NextCursor, err
			})
			if err != nil {
				return err
			}
			return list(cmd, g, rows, orderHeader, orderCells)
		},
	}
	c.Flags().StringVar(&status, "status", "", "pending, confirmed, rejected or cancelled")
	c.Flags().StringVar(&customer, "customer", "", "customer id")
	c.Flags().IntVar(&limit, "limit", 50, "how many at most; 0: all")
	_ = c.RegisterFlagCompletionFunc("status", cobra.FixedCompletions(orderStatuses, cobra.ShellCompDirectiveNoFileComp))
	return c
}

var orderStatuses = []string{"pending", "confirmed", "rejected", "cancelled"}

func setIf(q url.Values, key, value string) {
	if value != "" {
		q.Set(key, value)
	}
}

// pages follows a list's cursor until limit rows are there (0: all).
func pages[T any](ctx context.Context, g *globals, path string, q url.Values, limit int, decode func([]byte) ([]T, string, error)) ([]T, error) {
	if limit < 0 {
		return nil, usagef("--limit is not negative")
	}
	cl, err := g.client()
	if err != nil {
		return nil, err
	}
	const page = 500
	var rows []T
	for {
		n := page
		if limit > 0 {
			n = min(page, limit-len(rows))
		}
		q.Set("limit", strconv.Itoa(n))
		var b []byte
		if err := cl.Do(ctx, http.MethodGet, path, q, nil, nil, &b); err != nil {
			return nil, err
		}
		more, next, err := decode(b)
		if err != nil {
			return nil, fmt.Errorf("GET %s: the answer is not what this version expects: %w", path, err)
		}
		rows = append(rows, more...)
		if next == "" || limit > 0 && len(rows) >= limit {
			return rows, nil
		}
		q.Set("cursor", next)
	}
}

func ordersCancel(g *globals) *cobra.Command {
	var reason string
	c := &cobra.Command{
		Use: "cancel ID…", Short: "Cancel orders that are not confirmed yet", Args: cobra.MinimumNArgs(1),
		Example: `  ordersaga orders cancel 01938f6c-8b8a-7c3e-9d1c-2f4b5a6c7d8e --reason "changed my mind"`,
		RunE: func(cmd *cobra.Command, args []string) error {
			return each(cmd, g, args, func(ctx context.Context, cl *apiclient.Client, id string) (httpapi.OrderAccepted, error) {
				return fetch[httpapi.OrderAccepted](ctx, cl, http.MethodPost, "/v1/orders/"+url.PathEscape(id)+"/cancel", httpapi.CancelOrder{Reason: reason})
			}, []string{"ORDER", "STATUS", "REASON"}, func(o httpapi.OrderAccepted) []string {
				return []string{o.OrderID.String(), string(o.Status), string(o.Reason)}
			})
		},
	}
	c.Flags().StringVar(&reason, "reason", "", "why, for the timeline")
	return c
}

func ordersWatch(g *globals) *cobra.Command {
	return &cobra.Command{
		Use: "watch ID", Short: "Follow an order until it ends", Args: cobra.ExactArgs(1),
		Example: "  ordersaga orders watch 01938f6c-8b8a-7c3e-9d1c-2f4b5a6c7d8e",
		RunE: func(cmd *cobra.Command, args []string) error {
			cl, err := g.client()
			if err != nil {
				return err
			}
			ended := false
			err = cl.Stream(cmd.Context(), "/v1/orders/"+url.PathEscape(args[0])+"/events", func(e apiclient.Event) (bool, error) {
				var v map[string]any
				if err := json.Unmarshal(e.Data, &v); err != nil {
					return false, fmt.Errorf("event %s: %w", e.Name, err)
				}
				ended = ended || e.Name != "order" && e.Name != "OrderPlaced"
				if g.output != "text" {
					return true, encode(cmd.OutOrStdout(), map[string]any{"event": e.Name, "data": v}, g.output == "json")
				}
				_, err := fmt.Fprintln(cmd.OutOrStdout(), clean(fmt.Sprintf("%-15s %v%s", e.Name, v["status"], because(text(v["reason"])))))
				return true, err
			})
			if err == nil && !ended {
				return errors.New("the service ended the stream before the order ended: watch again")
			}
			return err
		},
	}
}

func text(v any) string {
	s, _ := v.(string)
	return s
}
