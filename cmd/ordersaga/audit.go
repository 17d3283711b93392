package main

import (
	"context"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"ordersaga/adapters/payment"
	"ordersaga/adapters/postgres"
	"ordersaga/cmd/ordersaga/internal/audit"
	"ordersaga/cmd/ordersaga/internal/boot"
)

func auditCommand(g *globals) *cobra.Command {
	var noLedger bool
	c := &cobra.Command{
		Use: "audit", Short: "Check the books: orders, money against the gateway's ledger, stock, outbox", Args: cobra.NoArgs,
		Long:    "Compares the database with the payment gateway's own ledger. Meant for a system at rest: orders under way are findings too. Exits 1 if anything is wrong.",
		Example: "  ordersaga audit\n  ordersaga audit -o json",
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := g.settings(boot.Defaults(), nil)
			if err != nil {
				return err
			}
			return withDB(cmd.Context(), g, func(ctx context.Context, db *postgres.DB) error {
				var ledger audit.Ledger
				if !noLedger {
					gw, err := payment.New(boot.GatewayConfig(&cfg))
					if err != nil {
						return &usageError{err}
					}
					defer gw.Close()
					ledger = gw
				}
				rep, err := audit.Run(ctx, db, ledger)
				if err != nil {
					return err
				}
				return showAudit(cmd, g, rep)
			})
		},
	}
	c.Flags().BoolVar(&noLedger, "no-ledger", false, "leave the gateway's ledger out")
	return c
}

func showAudit(cmd *cobra.Command, g *globals, r *audit.Report) error {
	if err := one(cmd, g, r, func(w io.Writer) error { return writeAudit(w, r) }); err != nil {
		return err
	}
	if !r.Clean {
		return &failedError{}
	}
	return nil
}

func writeAudit(w io.Writer, r *audit.Report) error {
	var b strings.Builder
	fmt.Fprintf(&b, "orders        %s\n", counts(r.Orders))
	if r.NoLedger {
		b.WriteString("ledger        NOT COMPARED\n")
	} else {
		fmt.Fprintf(&b, "ledger        %d intents; kept, in minor units: %s\n", r.Intents, counts(r.Captured))
	}
	fmt.Fprintf(&b, "products      %d\ndead letters  %s\nunpublished   %d\n", r.Products, counts(r.DeadLetters), r.Unpublished)
	for _, f := range r.Findings {
		fmt.Fprintf(&b, "finding       %s\n", clean(f))
	}
	if r.MoreThan > 0 {
		fmt.Fprintf(&b, "              … and %d more\n", r.MoreThan)
	}
	verdict := "clean"
	if !r.Clean {
		verdict = fmt.Sprintf("%d findings", len(r.Findings)+r.MoreThan)
	}
	fmt.Fprintf(&b, "audit: %s\n", verdict)
	_, err := io.WriteString(w, b.String())
	return err
}

func counts(m map[string]int64) string {
	if len(m) == 0 {
		return "none"
	}
	var out []string
	for _, k := range slices.Sorted(maps.Keys(m)) {
		out = append(out, fmt.Sprintf("%d %s", m[k], k))
	}
	return strings.Join(out, ", ")
}
