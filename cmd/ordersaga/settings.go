package main

import (
	"os"
	"strings"

	"ordersaga/cmd/ordersaga/internal/boot"
)

// settings reads the configuration as the global flags say; more are settings of the command's own flags, which win over all.
func (g *globals) settings(defaults boot.Config, more map[string]any) (boot.Config, error) {
	flags := map[string]any{}
	for _, s := range g.set {
		k, v, ok := strings.Cut(s, "=")
		if !ok || k == "" {
			return boot.Config{}, usagef("--set %q: want key=value, such as http.addr=127.0.0.1:8080", s)
		}
		flags[k] = v
	}
	for k, v := range more {
		flags[k] = v
	}
	c, err := boot.Load(defaults, g.config, os.Environ, flags)
	if err != nil {
		return c, &usageError{err}
	}
	return c, nil
}
