package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"time"

	"github.com/google/uuid"
	"github.com/spf13/cobra"

	"ordersaga/adapters/httpapi"
)

func dlqCommand(g *globals) *cobra.Command {
	c := &cobra.Command{Use: "dlq", Short: "List, show, replay and discard dead letters"}
	c.AddCommand(dlqList(g), dlqShow(g), dlqAct(g, "replay"), dlqAct(g, "discard"))
	return c
}

// deadFilter is the flags that select dead letters.
type deadFilter struct{ group, status, class, typ, order, fingerprint string }

func (f *deadFilter) flags(c *cobra.Command, status string) {
	fs := c.Flags()
	fs.StringVar(&f.group, "group", "", "consumer group, such as order-commands")
	fs.StringVar(&f.status, "status", status, "open, replaying, resolved, discarded or superseded")
	fs.StringVar(&f.class, "class", "", "why it is dead: poison, exhausted, id_reused or too_large")
	fs.StringVar(&f.typ, "type", "", "message type, such as ReversePayment")
	fs.StringVar(&f.order, "order", "", "order id")
	fs.StringVar(&f.fingerprint, "fingerprint", "", "only those of the same cause")
	_ = c.RegisterFlagCompletionFunc("status", cobra.FixedCompletions(deadStatuses, cobra.ShellCompDirectiveNoFileComp))
	_ = c.RegisterFlagCompletionFunc("class", cobra.FixedCompletions(deadClasses, cobra.ShellCompDirectiveNoFileComp))
	check := c.RunE
	c.RunE = func(cmd *cobra.Command, args []string) error {
		if err := errors.Join(oneOf("--status", f.status, deadStatuses), oneOf("--class", f.class, deadClasses)); err != nil {
			return err
		}
		return check(cmd, args)
	}
}

var (
	deadStatuses = []string{"open", "replaying", "resolved", "discarded", "superseded"}
	deadClasses  = []string{"poison", "exhausted", "id_reused", "too_large"}
)

func (f *deadFilter) query() url.Values {
	q := url.Values{}
	setIf(q, "group", f.group)
	setIf(q, "status", f.status)
	setIf(q, "class", f.class)
	setIf(q, "type", f.typ)
	setIf(q, "order_id", f.order)
	setIf(q, "fingerprint", f.fingerprint)
	return q
}

func (f *deadFilter) body() (*httpapi.DeadLetterFilter, error) {
	b := &httpapi.DeadLetterFilter{
		Group: f.group, Status: httpapi.DeadLetterStatus(f.status), Class: f.class, Type: f.typ, Fingerprint: f.fingerprint,
	}
	if f.order != "" {
		id, err := uuid.Parse(f.order)
		if err != nil {
			return nil, usagef("--order %q is not a UUID", f.order)
		}
		b.OrderID = &id
	}
	return b, nil
}

func dlqList(g *globals) *cobra.Command {
	f := &deadFilter{}
	var limit int
	c := &cobra.Command{
		Use: "list", Short: "List dead letters, newest first", Args: cobra.NoArgs,
		Example: "  ordersaga dlq list\n  ordersaga dlq list --group order-commands --status open -o json",
		RunE: func(cmd *cobra.Command, _ []string) error {
			rows, err := pages(cmd.Context(), g, "/v1/dlq", f.query(), limit, func(b []byte) ([]httpapi.DeadLetter, string, error) {
				var p httpapi.DeadLetterPage
				err := json.Unmarshal(b, &p)
				return p.DeadLetters, p.NextCursor, err
			})
			if err != nil {
				return err
			}
			return list(cmd, g, rows, []string{"ID", "STATUS", "GROUP", "TYPE", "ORDER", "CLASS", "ATTEMPTS", "FAILED", "REASON"}, deadCells)
		},
	}
	f.flags(c, "")
	c.Flags().IntVar(&limit, "limit", 50, "how many at most; 0: all")
	return c
}

func deadCells(d httpapi.DeadLetter) []string {
	order := ""
	if d.OrderID != nil {
		order = d.OrderID.String()
	}
	return []string{d.ID.String(), string(d.Status), d.Group, d.Type, order, d.Class, fmt.Sprint(d.Attempts), d.LastFailedAt.Format(time.RFC3339), d.Reason}
}

func dlqShow(g *globals) *cobra.Command {
	var full bool
	c := &cobra.Command{
		Use: "show ID", Short: "Show a dead letter", Args: cobra.ExactArgs(1),
		Long:    "Shows a dead letter with what says nothing about a person. --full adds the record as it came; it takes an admin's token, and is recorded.",
		Example: "  ordersaga dlq show 01938f6c-8b8a-7c3e-9d1c-2f4b5a6c7d8e\n  ordersaga dlq show 01938f6c-8b8a-7c3e-9d1c-2f4b5a6c7d8e --full",
		RunE: func(cmd *cobra.Command, args []string) error {
			cl, err := g.client()
			if err != nil {
				return err
			}
			path := "/v1/dlq/" + url.PathEscape(args[0])
			if full {
				path += "?full=true"
			}
			d, err := fetch[httpapi.DeadLetterDetail](cmd.Context(), cl, http.MethodGet, path, nil)
			if err != nil {
				return err
			}
			return one(cmd, g, d, func(w io.Writer) error { return showDead(w, &d) })
		},
	}
	c.Flags().BoolVar(&full, "full", false, "the record as it came, which may hold personal data")
	return c
}

func showDead(w io.Writer, d *httpapi.DeadLetterDetail) error {
	l := &d.DeadLetter
	order := "unknown"
	if l.OrderID != nil {
		order = l.OrderID.String()
	}
	lines := []string{
		fmt.Sprintf("dead letter  %s  %s (%s)", l.ID, l.Status, l.Class),
		"reason       " + l.Reason,
		fmt.Sprintf("message      %s  %s  of order %s", l.Type, l.MessageID, order),
		fmt.Sprintf("lay at       %s[%d]@%d, group %s", l.Topic, l.Partition, l.Offset, l.Group),
		fmt.Sprintf("attempts     %d, first failed %s, last %s", l.Attempts, l.FirstFailedAt.Format(time.RFC3339), l.LastFailedAt.Format(time.RFC3339)),
		"fingerprint  " + l.Fingerprint,
	}
	if l.Owner != "" || l.Note != "" {
		lines = append(lines, "owner, note  "+l.Owner+"  "+l.Note)
	}
	for _, h := range d.Headers {
		lines = append(lines, fmt.Sprintf("header       %s: %s", h.Name, h.Value))
	}
	lines = append(lines, fmt.Sprintf("payload      %d bytes, sha256 %s", d.PayloadBytes, d.PayloadSha256))
	if d.Payload != nil {
		lines = append(lines, "key          "+string(d.Key), string(d.Payload))
	}
	for _, s := range lines {
		if _, err := fmt.Fprintln(w, clean(s)); err != nil {
			return err
		}
	}
	return nil
}

// dlqAct is replay and discard, which differ by a word.
func dlqAct(g *globals, kind string) *cobra.Command {
	f := &deadFilter{}
	var dry, yes bool
	var note string
	short, past := "Send dead letters once more, after the cause is gone", "replayed"
	if kind == "discard" {
		short, past = "Give dead letters up; their rows stay", "discarded"
	}
	c := &cobra.Command{
		Use: kind + " [ID…]", Short: short,
		Long: short + ".\nSelect by ids, or by flags; a selection by flags is shown with --dry-run and carried out with --yes. A message has at most one copy under way and takes effect once.",
		Example: fmt.Sprintf("  ordersaga dlq %[1]s 01938f6c-8b8a-7c3e-9d1c-2f4b5a6c7d8e --note \"price list mended\"\n  ordersaga dlq %[1]s --group order-commands --fingerprint 5f1c9a22 --dry-run\n"+
			"  ordersaga dlq %[1]s --group order-commands --fingerprint 5f1c9a22 --note \"price list mended\" --yes", kind),
		RunE: func(cmd *cobra.Command, args []string) error {
			if kind == "discard" && note == "" && !dry {
				return usagef("a discard needs --note that says why")
			}
			sel, err := f.selection(args, dry, yes, note)
			if err != nil {
				return err
			}
			cl, err := g.client()
			if err != nil {
				return err
			}
			op, err := fetch[httpapi.DeadLetterOperation](cmd.Context(), cl, http.MethodPost, "/v1/dlq/"+kind, sel)
			if err != nil {
				return err
			}
			return reportOperation(cmd, g, &op, past)
		},
	}
	f.flags(c, "open")
	c.Flags().BoolVar(&dry, "dry-run", false, "change nothing, show what would be")
	c.Flags().BoolVar(&yes, "yes", false, "carry a selection by flags out")
	c.Flags().StringVar(&note, "note", "", "why, for the audit log")
	return c
}

func (f *deadFilter) selection(args []string, dry, yes bool, note string) (*httpapi.DeadLetterSelection, error) {
	sel := &httpapi.DeadLetterSelection{DryRun: dry, Note: note}
	for _, a := range args {
		id, err := uuid.Parse(a)
		if err != nil {
			return nil, usagef("%q is not the id of a dead letter (ordersaga dlq list shows them)", clean(a))
		}
		sel.Ids = append(sel.Ids, id)
	}
	if len(args) > 0 {
		return sel, nil
	}
	if f.group == "" && f.class == "" && f.typ == "" && f.order == "" && f.fingerprint == "" {
		return nil, usagef("select by ids, or by at least one of --group, --class, --type, --order, --fingerprint")
	}
	if !dry && !yes {
		return nil, usagef("a selection by flags: look at it with --dry-run, carry it out with --yes")
	}
	var err error
	sel.Filter, err = f.body()
	return sel, err
}

func reportOperation(cmd *cobra.Command, g *globals, op *httpapi.DeadLetterOperation, past string) error {
	bad := 0
	for _, r := range op.Results {
		if r.Result == httpapi.DeadLetterResultResultFailed {
			bad++
		}
	}
	var err error
	if g.output == "text" {
		err = list(cmd, g, op.Results, []string{"ID", "RESULT", "DETAIL"}, func(r httpapi.DeadLetterResult) []string {
			return []string{r.ID.String(), string(r.Result), r.Detail}
		})
		if err == nil && op.DryRun {
			_, err = fmt.Fprintf(cmd.ErrOrStderr(), "dry run: %d would be %s, nothing was changed\n", op.Selected, past)
		}
	} else {
		err = encode(cmd.OutOrStdout(), op, g.output == "json")
	}
	if err != nil {
		return err
	}
	if bad > 0 {
		return &failedError{fmt.Sprintf("%d of %d were not %s", bad, len(op.Results), past)}
	}
	return nil
}
