package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"ordersaga/adapters/kafka"
	"ordersaga/adapters/payment"
	"ordersaga/adapters/postgres"
	"ordersaga/cmd/ordersaga/internal/boot"
)

// Findings of the doctor.
const (
	well    = "ok"
	warning = "warning"
	failure = "FAILED"
)

type checkup struct {
	Check  string `json:"check"`
	Result string `json:"result"`
	Detail string `json:"detail,omitempty"`
	Do     string `json:"what_to_do,omitempty"`
}

func doctorCommand(g *globals) *cobra.Command {
	return &cobra.Command{
		Use: "doctor", Short: "Check brokers, topics, database, schema, gateway and clock, and say what to do", Args: cobra.NoArgs,
		Long:    "Checks everything that the configuration names and says what to do about what is wrong. Changes nothing. Exits 1 if a check failed.",
		Example: "  ordersaga doctor\n  ordersaga doctor --config ordersaga.yaml -o json",
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := g.settings(boot.Defaults(), nil)
			if err != nil {
				return err
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), time.Minute)
			defer cancel()
			var cs []checkup
			cs = append(cs, checkDatabase(ctx, &cfg)...)
			cs = append(cs, checkKafka(ctx, &cfg)...)
			cs = append(cs, checkGateway(ctx, &cfg))
			if err := list(cmd, g, cs, []string{"CHECK", "RESULT", "DETAIL", "WHAT TO DO"}, func(c checkup) []string {
				return []string{c.Check, c.Result, c.Detail, c.Do}
			}); err != nil {
				return err
			}
			bad := 0
			for _, c := range cs {
				if c.Result == failure {
					bad++
				}
			}
			if bad > 0 {
				return &failedError{fmt.Sprintf("%d of %d checks failed", bad, len(cs))}
			}
			return nil
		},
	}
}

// Thresholds of the doctor.
const (
	clockWarn  = 500 * time.Millisecond
	clockFail  = 10 * time.Second
	outboxWarn = 10.0 // seconds
	outboxFail = 60.0
)

func checkDatabase(ctx context.Context, cfg *boot.Config) []checkup {
	db, err := postgres.Open(ctx, boot.DatabaseConfig(cfg))
	if err != nil {
		return []checkup{{"database", failure, err.Error(), "set database.url (ORDERSAGA_DATABASE_URL) to a Postgres of version 14 or later that this machine reaches"}}
	}
	defer db.Close()
	cs := []checkup{{Check: "database", Result: well}}
	if err := postgres.CheckSchema(ctx, db); err != nil {
		return append(cs, checkup{"schema", failure, err.Error(), "ordersaga migrate up"})
	}
	cs = append(cs, checkup{Check: "schema", Result: well})
	offset, trip := db.ClockOffset()
	c := checkup{Check: "clock", Result: well, Detail: fmt.Sprintf("%s from the database's, give or take %s", offset.Round(time.Millisecond), (trip / 2).Round(time.Microsecond))}
	if d := offset.Abs(); d > clockFail {
		c.Result, c.Do = failure, "set this machine's clock by NTP: message ids carry its time"
	} else if d > clockWarn {
		c.Result, c.Do = warning, "set this machine's clock by NTP"
	}
	cs = append(cs, c, checkOutbox(ctx, db), checkSagas(ctx, db))
	dead, err := db.CountDead(ctx)
	if err != nil {
		return append(cs, checkup{"dead letters", failure, err.Error(), ""})
	}
	c = checkup{Check: "dead letters", Result: well, Detail: counts(dead)}
	if dead["open"] > 0 {
		c.Result, c.Do = warning, "ordersaga dlq list --status open"
	}
	return append(cs, c)
}

func checkOutbox(ctx context.Context, db *postgres.DB) checkup {
	b, err := db.OutboxBacklog(ctx)
	if err != nil {
		return checkup{"outbox", failure, err.Error(), ""}
	}
	c := checkup{Check: "outbox", Result: well, Detail: fmt.Sprintf("%d messages not published, the oldest for %.1f s", b.Rows, b.OldestSeconds)}
	switch {
	case b.OldestSeconds > outboxFail:
		c.Result, c.Do = failure, "is a process with the role relay running, and does it reach the brokers?"
	case b.OldestSeconds > outboxWarn:
		c.Result, c.Do = warning, "is a process with the role relay running?"
	}
	return c
}

func checkSagas(ctx context.Context, db *postgres.DB) checkup {
	running, stuck, err := db.CountSagasUnderWay(ctx)
	if err != nil {
		return checkup{"sagas", failure, err.Error(), ""}
	}
	c := checkup{Check: "sagas", Result: well, Detail: fmt.Sprintf("%d under way, %d stuck", running, stuck)}
	if stuck > 0 {
		c.Result, c.Do = warning, "ordersaga sagas list --stuck"
	}
	return c
}

func checkKafka(ctx context.Context, cfg *boot.Config) []checkup {
	cl, stop, err := boot.OpenKafka(cfg, nil, nil)
	if err == nil {
		defer stop()
		err = cl.Ping(ctx)
	}
	if err != nil {
		return []checkup{{"brokers", failure, err.Error(), "set kafka.brokers (ORDERSAGA_KAFKA_BROKERS), and kafka.tls and kafka.sasl if the brokers want them"}}
	}
	cs := []checkup{{Check: "brokers", Result: well}}
	specs := boot.Topics(cfg)
	plan, err := cl.TopicPlan(ctx, specs)
	if err != nil {
		return append(cs, checkup{"topics", failure, err.Error(), ""})
	}
	c := checkup{Check: "topics", Result: well, Detail: fmt.Sprintf("%d as they should be", len(specs))}
	if len(plan) > 0 {
		c.Result, c.Detail, c.Do = warning, fmt.Sprintf("%d differences", len(plan)), "ordersaga topics plan says which, ordersaga topics apply makes them"
	}
	if slices.ContainsFunc(plan, func(ch kafka.TopicChange) bool { return ch.Kind == kafka.CreateTopic }) {
		c.Result = failure
	}
	return append(cs, c)
}

func checkGateway(ctx context.Context, cfg *boot.Config) checkup {
	gw, err := payment.New(boot.GatewayConfig(cfg))
	if err == nil {
		defer gw.Close()
		err = gw.Ready(ctx)
	}
	if err == nil {
		return checkup{Check: "payment gateway", Result: well, Detail: cfg.Payment.URL}
	}
	c := checkup{"payment gateway", failure, err.Error(), "set payment.url and payment.api_key (ORDERSAGA_PAYMENT_URL, ORDERSAGA_PAYMENT_API_KEY)"}
	var away interface{ Outage() string }
	if errors.As(err, &away) {
		c.Do = "does this machine reach " + cfg.Payment.URL + ", and is the key still valid?"
	}
	return c
}
