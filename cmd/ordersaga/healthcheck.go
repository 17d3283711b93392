package main

import (
	"context"
	"crypto/tls"
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
		Long:    "Asks at http.probes_addr if that is set, else at http.addr. Exits 1 if it is not alive, or not ready.",
		Example: "  ordersaga healthcheck --ready",
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := g.settings(boot.Defaults(), nil)
			if err != nil {
				return err
			}
			addr, scheme := cfg.HTTP.Addr, "http"
			switch {
			case cfg.HTTP.ProbesAddr != "":
				addr = cfg.HTTP.ProbesAddr
			case !cfg.Has(boot.RoleHTTP):
				return usagef("without the role http a process is asked at http.probes_addr, which is not set")
			case cfg.HTTP.TLS.CertFile != "":
				scheme = "https"
			}
			host, port, err := net.SplitHostPort(addr)
			if err != nil {
				return usagef("%q: want host:port", addr)
			}
			if host == "" || host == "0.0.0.0" || host == "::" {
				host = "127.0.0.1"
			}
			cl, err := apiclient.New(fmt.Sprintf("%s://%s", scheme, net.JoinHostPort(host, port)), "", func(t *http.Transport) {
				// It asks its own machine, sends nothing secret and believes only the status; the certificate is for another name.
				t.TLSClientConfig = &tls.Config{InsecureSkipVerify: true} //nolint:gosec // as said above
			})
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
