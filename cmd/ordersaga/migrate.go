package main

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"ordersaga/adapters/postgres"
	"ordersaga/cmd/ordersaga/internal/boot"
)

func migrateCommand(g *globals) *cobra.Command {
	c := &cobra.Command{
		Use: "migrate", Short: "Bring the database's schema up or down",
		Long: "Each migration is one transaction: one that fails leaves the database as it was. Several processes may run this at once, one does the work.",
	}
	var yes, dry bool
	up := &cobra.Command{
		Use: "up", Short: "Apply all migrations that are pending", Args: cobra.NoArgs,
		Example: "  ORDERSAGA_DATABASE_URL=postgres://… ordersaga migrate up",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if dry {
				return withDB(cmd.Context(), g, func(ctx context.Context, db *postgres.DB) error {
					ms, err := postgres.Migrations(ctx, db)
					if err != nil {
						return err
					}
					pending := ms[:0]
					for _, m := range ms {
						if m.Applied.IsZero() {
							pending = append(pending, m)
						}
					}
					return listMigrations(cmd, g, pending)
				})
			}
			return runMigration(cmd, g, postgres.Up)
		},
	}
	up.Flags().BoolVar(&dry, "dry-run", false, "only list what is pending")
	down := &cobra.Command{
		Use: "down", Short: "Undo the last migration, with the data it holds", Args: cobra.NoArgs,
		Example: "  ordersaga migrate down --yes",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if !yes {
				return usagef("migrate down drops tables with their data: add --yes")
			}
			return runMigration(cmd, g, postgres.Down)
		},
	}
	down.Flags().BoolVar(&yes, "yes", false, "do not ask")
	status := &cobra.Command{
		Use: "status", Short: "List the migrations, applied and pending", Args: cobra.NoArgs,
		Example: "  ordersaga migrate status -o json",
		RunE: func(cmd *cobra.Command, _ []string) error {
			return withDB(cmd.Context(), g, func(ctx context.Context, db *postgres.DB) error {
				ms, err := postgres.Migrations(ctx, db)
				if err != nil {
					return err
				}
				return listMigrations(cmd, g, ms)
			})
		},
	}
	c.AddCommand(up, down, status)
	return c
}

func runMigration(cmd *cobra.Command, g *globals, what postgres.MigrateCommand) error {
	return withDB(cmd.Context(), g, func(ctx context.Context, db *postgres.DB) error {
		done, err := postgres.Migrate(ctx, db, what)
		if lerr := listMigrations(cmd, g, done); err == nil {
			err = lerr
		}
		return err
	})
}

// withDB opens the database of the configuration for one command.
func withDB(ctx context.Context, g *globals, fn func(context.Context, *postgres.DB) error) error {
	cfg, err := g.settings(boot.Defaults(), nil)
	if err != nil {
		return err
	}
	db, err := postgres.Open(ctx, boot.DatabaseConfig(&cfg))
	if err != nil {
		return err
	}
	defer db.Close()
	return fn(ctx, db)
}

type migrationRow struct {
	Version int64      `json:"version"`
	Name    string     `json:"name"`
	Applied *time.Time `json:"applied_at,omitempty"`
	Took    string     `json:"took,omitempty"`
}

func listMigrations(cmd *cobra.Command, g *globals, ms []postgres.Migration) error {
	rows := make([]migrationRow, len(ms))
	for i, m := range ms {
		rows[i] = migrationRow{Version: m.Version, Name: m.Name}
		if !m.Applied.IsZero() {
			at := m.Applied.UTC()
			rows[i].Applied = &at
		}
		if m.Took > 0 {
			rows[i].Took = m.Took.Round(time.Millisecond).String()
		}
	}
	return list(cmd, g, rows, []string{"VERSION", "NAME", "APPLIED", "TOOK"}, func(r migrationRow) []string {
		at := "pending"
		if r.Applied != nil {
			at = r.Applied.Format(time.RFC3339)
		}
		return []string{fmt.Sprint(r.Version), r.Name, at, r.Took}
	})
}
