package main

import (
	"context"
	"fmt"
	"os"
	"time"

	"github.com/spf13/cobra"

	"ordersaga/cmd/ordersaga/internal/simulator"
)

func simulatorCommand() *cobra.Command {
	var addr, dir, key, faults string
	c := &cobra.Command{
		Use: "simulator", Short: "Run a simulator of the payment gateway (Stripe's PaymentIntents API) with settable faults", Args: cobra.NoArgs,
		Long: "A stateful simulator of the part of Stripe's API that ordersaga uses. Faults (latency, declines, 5xx, timeouts that still took effect) are set at start, or while it runs with PUT /_control.",
		Example: `  ordersaga simulator --addr 127.0.0.1:12111 --data-dir /tmp/gateway
  curl -s -X PUT 127.0.0.1:12111/_control -d '{"latency":"20ms","ops":{"capture":{"error_after":0.1}}}'`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			s, err := simulator.Open(dir, simulator.WithAPIKey(key))
			if err != nil {
				return err
			}
			if faults != "" {
				b, err := os.ReadFile(faults)
				if err != nil {
					return err
				}
				f, err := simulator.ParseFaults(b)
				if err != nil {
					return &usageError{fmt.Errorf("--faults %s: %w", faults, err)}
				}
				if err := s.SetFaults(f); err != nil {
					return &usageError{err}
				}
			}
			at, err := s.Listen(cmd.Context(), addr)
			if err != nil {
				return err
			}
			say(cmd.ErrOrStderr(), "payment gateway simulator at %s\n", at)
			<-cmd.Context().Done()
			return closeWithin(5*time.Second, s.Close)
		},
	}
	f := c.Flags()
	f.StringVar(&addr, "addr", "127.0.0.1:12111", "where to listen")
	f.StringVar(&dir, "data-dir", "", "where to keep the ledger; empty: in memory")
	f.StringVar(&key, "api-key", envOr("ORDERSAGA_PAYMENT_API_KEY", "sk_test_simulator"), "the API key that callers need")
	f.StringVar(&faults, "faults", "", "JSON file of faults, as PUT /_control takes it")
	return c
}

// closeWithin bounds a Close that could hang.
func closeWithin(d time.Duration, closing func() error) error {
	ctx, cancel := context.WithTimeout(context.Background(), d)
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- closing() }()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return fmt.Errorf("not closed within %s", d)
	}
}
