package main

import (
	"fmt"
	"io"
	"os"
	"runtime/debug"

	"github.com/spf13/cobra"

	"ordersaga/adapters/telemetry"
	"ordersaga/cmd/ordersaga/internal/boot"
)

// version is set when a release is built.
var version = "dev"

func serveCommand(g *globals) *cobra.Command {
	var roles []string
	var show bool
	var httpAddr, level string
	c := &cobra.Command{
		Use: "serve", Short: "Run the service, or some of its roles", Args: cobra.NoArgs,
		Long: "Runs the service against your Kafka, Postgres and payment gateway. Each role runs alone or with others, in as many copies as there are partitions.\n" +
			"The schema and the topics are made beforehand: ordersaga migrate up, ordersaga topics apply.",
		Example: "  ordersaga serve\n  ordersaga serve --roles http,relay\n  ordersaga serve --print-config",
		RunE: func(cmd *cobra.Command, _ []string) error {
			more := map[string]any{}
			if len(roles) > 0 {
				more["roles"] = roles
			}
			if httpAddr != "" {
				more["http.addr"] = httpAddr
			}
			if level != "" {
				more["log.level"] = level
			}
			cfg, err := g.settings(boot.Defaults(), more)
			if err != nil {
				return err
			}
			if show {
				return printConfig(cmd, g, &cfg)
			}
			if err := cfg.CheckServe(); err != nil {
				return &usageError{err}
			}
			log, lv, err := telemetry.NewLogger(telemetry.LogConfig{Level: cfg.Log.Level, Format: cfg.Log.Format, Output: cmd.ErrOrStderr()})
			if err != nil {
				return &usageError{err}
			}
			app, err := boot.New(cmd.Context(), cfg, boot.Options{
				Version: version, ConfigPath: g.config, Reread: func(string) (boot.Config, error) { return g.settings(boot.Defaults(), more) }, Log: log, Level: lv,
			})
			if err != nil {
				if cmd.Context().Err() != nil {
					return nil // told to stop while it waited for something
				}
				return err
			}
			defer app.Close()
			paceCollector()
			return app.Run(cmd.Context())
		},
	}
	f := c.Flags()
	f.StringSliceVar(&roles, "roles", nil, "what this process does: all, or some of http, relay, order-commands, stock, payment, compensation, coordinator")
	f.StringVar(&httpAddr, "http-addr", "", "where HTTP listens")
	f.StringVar(&level, "log-level", "", "debug, info, warn or error")
	f.BoolVar(&show, "print-config", false, "print all settings, secrets masked, and exit")
	_ = c.RegisterFlagCompletionFunc("roles", cobra.FixedCompletions(append([]string{"all"}, boot.AllRoles...), cobra.ShellCompDirectiveNoFileComp))
	return c
}

// collectAt is the growth of the heap, in per cent of what lives, at which the garbage collector runs. Little lives and much is allocated:
// at Go's own 100 the collector took a fifth of the process's CPU, at 200 an eighth. At full load the process takes 105 MB with 200 and 145 with 350.
const collectAt = 300

// paceCollector leaves the collector alone where the environment says something (GOGC, GOMEMLIMIT).
func paceCollector() {
	if os.Getenv("GOGC") == "" && os.Getenv("GOMEMLIMIT") == "" {
		debug.SetGCPercent(collectAt)
	}
}

func printConfig(cmd *cobra.Command, g *globals, cfg *boot.Config) error {
	return one(cmd, g, cfg.Printable(), func(w io.Writer) error {
		b, err := cfg.YAML()
		if err != nil {
			return err
		}
		_, err = w.Write(b)
		return err
	})
}

func commands(g *globals) []*cobra.Command {
	return []*cobra.Command{
		devCommand(g), serveCommand(g), migrateCommand(g), topicsCommand(g), ordersCommand(g), sagasCommand(g), dlqCommand(g),
		auditCommand(g), benchCommand(g), doctorCommand(g), tokenCommand(g), simulatorCommand(), healthcheckCommand(g), versionCommand(g),
	}
}

func versionCommand(g *globals) *cobra.Command {
	return &cobra.Command{
		Use: "version", Short: "Print the version", Args: cobra.NoArgs, Example: "  ordersaga version -o json",
		RunE: func(cmd *cobra.Command, _ []string) error {
			return one(cmd, g, map[string]string{"version": version}, func(w io.Writer) error {
				_, err := fmt.Fprintln(w, version)
				return err
			})
		},
	}
}
