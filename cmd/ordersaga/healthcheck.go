package main

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"time"

	"github.com/spf13/cobra"

	"ordersaga/cmd/ordersaga/internal/apiclient"
	"ordersaga/cmd/ordersaga/internal/boot"
)

func healthcheckCommand(g *globals) *cobra.Command {
	var ready bool
	c := &cobra.Command{
		Use: "healthcheck", Short: "Ask the service on this machine whether it is alive (for container health checks)", Args: cobra.NoArgs,
		Example: "  ordersaga healthcheck --ready",
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := g.settings(boot.Defaults(), nil)
			if err != nil {
				return err
			}
			host, port, err := net.SplitHostPort(cfg.HTTP.Addr)
			if err != nil {
				return usagef("http.addr %q: want host:port", cfg.HTTP.Addr)
			}
			if host == "" || host == "0.0.0.0" || host == "::" {
				host = "127.0.0.1"
			}
			scheme := "http"
			if cfg.HTTP.TLS.CertFile != "" {
				scheme = "https"
			}
			cl, err := apiclient.New(fmt.Sprintf("%s://%s", scheme, net.JoinHostPort(host, port)), "")
			if err != nil {
				return err
			}
			path := "/healthz"
			if ready {
				path = "/readyz"
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), 3*time.Second)
			defer cancel()
			return cl.Do(ctx, http.MethodGet, path, nil, nil, nil, nil)
		},
	}
	c.Flags().BoolVar(&ready, "ready", false, "ask whether it can do its work, not only whether it is alive")
	return c
}
