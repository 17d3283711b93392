package main

import (
	"bytes"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"testing"

	"github.com/spf13/cobra"
	"github.com/stretchr/testify/require"

	"ordersaga/cmd/ordersaga/internal/boot"
)

// run runs the program as the shell would.
func run(t *testing.T, args ...string) (code int, out, errs string) {
	t.Helper()
	var o, e bytes.Buffer
	code = Main(t.Context(), args, bytes.NewReader(nil), &o, &e)
	return code, o.String(), e.String()
}

// TestEveryCommandHasAnExample also holds that each says what it does.
func TestEveryCommandHasAnExample(t *testing.T) {
	seen := 0
	var walk func(c *cobra.Command)
	walk = func(c *cobra.Command) {
		require.NotEmpty(t, c.Short, c.CommandPath())
		if !c.HasSubCommands() && c.Name() != "help" {
			require.NotEmpty(t, c.Example, "%s --help shows no example", c.CommandPath())
			seen++
		}
		for _, sub := range c.Commands() {
			walk(sub)
		}
	}
	walk(newRoot())
	require.Greater(t, seen, 20)
}

// TestWhatIsNotUnderstoodExitsWith2: nothing is asked of a service, a database or a broker first.
func TestWhatIsNotUnderstoodExitsWith2(t *testing.T) {
	for name, c := range map[string]struct {
		args []string
		says string
	}{
		"unknown command":            {[]string{"frobnicate"}, `unknown command "frobnicate"`},
		"unknown command of a group": {[]string{"orders", "frobnicate"}, "ordersaga orders --help lists them"},
		"unknown shell":              {[]string{"completion", "tcsh"}, `unknown command "tcsh"`},
		"unknown flag":               {[]string{"orders", "list", "--frob"}, "unknown flag: --frob"},
		"unknown format":             {[]string{"-o", "xml", "version"}, "text, json or jsonl"},
		"no id":                      {[]string{"orders", "get"}, "requires at least 1 arg"},
		"order without items":        {[]string{"orders", "submit", "--customer", "c"}, "--item"},
		"quantity that is no number": {[]string{"orders", "submit", "--customer", "c", "--item", "A=x"}, "the quantity is a number"},
		"order from no file":         {[]string{"orders", "submit", "-f", filepath.Join(t.TempDir(), "none")}, "--file"},
		"unknown status":             {[]string{"orders", "list", "--status", "lost"}, "pending, confirmed, rejected or cancelled"},
		"unknown phase":              {[]string{"sagas", "list", "--phase", "lost"}, "running, completed, compensating or compensated"},
		"unknown class":              {[]string{"dlq", "list", "--class", "bad"}, "poison, exhausted, id_reused or too_large"},
		"unknown decision":           {[]string{"sagas", "resolve", "x", "frob"}, "retry, mark_done or take"},
		"mark_done without a name":   {[]string{"sagas", "resolve", "x", "mark_done"}, "--name"},
		"replay of everything":       {[]string{"dlq", "replay"}, "select by ids"},
		"replay by flags unlooked":   {[]string{"dlq", "replay", "--group", "stock"}, "--dry-run"},
		"discard without a reason":   {[]string{"dlq", "discard", "--group", "stock", "--yes"}, "--note"},
		"migrate down unasked":       {[]string{"migrate", "down"}, "--yes"},
		"exit without demo":          {[]string{"dev", "--exit"}, "--demo"},
		"a URL that is none":         {[]string{"--url", "ftp://x", "orders", "list"}, "is no URL"},
		"unknown setting":            {[]string{"serve", "--set", "htp.addr=x"}, "unknown setting htp"},
		"setting of another kind":    {[]string{"serve", "--set", "http.max_body_bytes=much"}, "http.max_body_bytes"},
		"unknown role of a process":  {[]string{"serve", "--roles", "frob"}, "unknown role"},
		"open to everybody":          {[]string{"serve", "--set", "http.open=true", "--http-addr", ":8080"}, "http.tokens_file"},
		"unknown role of a token":    {[]string{"token", "shop", "--role", "frob"}, "client, operator or admin"},
	} {
		t.Run(name, func(t *testing.T) {
			code, out, errs := run(t, c.args...)
			require.Equal(t, exitUsage, code, errs)
			require.Contains(t, errs, c.says)
			require.Empty(t, out, "results only on standard output")
		})
	}
}

// TestSomeFailed: one order of two is there. The one is shown, the other told of, and the status says that not all went well.
func TestSomeFailed(t *testing.T) {
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/v1/orders/there" {
			_, _ = w.Write([]byte(`{"order_id":"01938f6c-8b8a-7c3e-9d1c-2f4b5a6c7d8e","status":"confirmed","total_minor":1234,"currency":"JPY","saga":{"state":"completed"}}`))
			return
		}
		w.WriteHeader(http.StatusNotFound)
		_, _ = w.Write([]byte(`{"code":"not_found","title":"Not found","status":404}`))
	}))
	defer s.Close()
	code, out, errs := run(t, "--url", s.URL, "orders", "get", "there", "gone", "-o", "json")
	require.Equal(t, exitFailed, code)
	require.Contains(t, errs, "gone: Not found (404 not_found)")
	require.Contains(t, errs, "1 of 2 failed")
	var rows []map[string]any
	require.NoError(t, json.Unmarshal([]byte(out), &rows))
	require.Len(t, rows, 1)
	_, out, _ = run(t, "--url", s.URL, "orders", "get", "there")
	require.Contains(t, out, "1234 JPY", "yen have no hundredths")
}

func TestAmounts(t *testing.T) {
	for want, m := range map[string]struct {
		minor    int64
		currency string
	}{"12.05 EUR": {1205, "EUR"}, "0.07 USD": {7, "USD"}, "1205 JPY": {1205, "JPY"}, "1.205 KWD": {1205, "KWD"}} {
		require.Equal(t, want, amount(m.minor, m.currency))
	}
}

// TestDevConfigIsRead: what dev writes about itself is a configuration that the other commands take, and for its owner's eyes only.
func TestDevConfigIsRead(t *testing.T) {
	path := filepath.Join(t.TempDir(), devConfig)
	require.NoError(t, os.WriteFile(path, nil, 0o644))
	cfg := devDefaults()
	cfg.Database.URL, cfg.Payment.URL, cfg.Payment.APIKey = "postgres://u:p@127.0.0.1:1/x", "http://127.0.0.1:2", devKey
	cfg.Kafka.Brokers, cfg.Kafka.Embedded = []string{"127.0.0.1:3"}, true
	require.NoError(t, writeDevConfig(path, &cfg, "127.0.0.1:4"))
	got, err := boot.Load(boot.Defaults(), path, func() []string { return nil }, nil)
	require.NoError(t, err)
	require.Equal(t, cfg.Kafka.Brokers, got.Kafka.Brokers)
	require.True(t, got.Kafka.Embedded)
	require.Equal(t, cfg.Database.URL, got.Database.URL)
	require.Equal(t, devKey, got.Payment.APIKey)
	require.Equal(t, "127.0.0.1:4", got.HTTP.Addr)
	fi, err := os.Stat(path)
	require.NoError(t, err)
	require.Equal(t, os.FileMode(0o600), fi.Mode().Perm())
}

// TestConfigurationOfTheWorkingDirectory: it is read unless another is named.
func TestConfigurationOfTheWorkingDirectory(t *testing.T) {
	t.Chdir(t.TempDir())
	require.NoError(t, os.WriteFile(configFile, []byte("kafka: {topic_prefix: here_}\n"), 0o600))
	require.NoError(t, os.WriteFile("other.yaml", []byte("kafka: {topic_prefix: other_}\n"), 0o600))
	code, out, errs := run(t, "serve", "--print-config")
	require.Zero(t, code, errs)
	require.Contains(t, out, "here_")
	_, out, _ = run(t, "serve", "--print-config", "--config", "other.yaml")
	require.Contains(t, out, "other_")
	require.NotContains(t, out, "here_")
}
