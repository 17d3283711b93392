package main

import (
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"github.com/stretchr/testify/require"
)

// words splits a line of a shell as far as examples need it: quotes, and nothing else.
func words(line string) (ws []string) {
	var w strings.Builder
	quote, open := rune(0), false
	for _, c := range line {
		switch {
		case quote != 0 && c == quote:
			quote = 0
		case quote != 0:
			w.WriteRune(c)
		case c == '\'' || c == '"':
			quote, open = c, true
		case c == ' ':
			if open {
				ws = append(ws, w.String())
			}
			w.Reset()
			open = false
		default:
			w.WriteRune(c)
			open = true
		}
	}
	if open {
		ws = append(ws, w.String())
	}
	return ws
}

// ours cuts the part that is our program out of an example's line: what stands between `ordersaga` and a pipe or redirection.
func ours(line string) []string {
	ws := words(line)
	for i, w := range ws {
		if w != "ordersaga" {
			continue
		}
		args := ws[i+1:]
		for j, a := range args {
			if a == "|" || strings.HasPrefix(a, ">") {
				return args[:j]
			}
		}
		return args
	}
	return nil
}

// TestExamplesAreUnderstood: what the help shows can be typed.
func TestExamplesAreUnderstood(t *testing.T) {
	seen := 0
	var walk func(c *cobra.Command)
	walk = func(c *cobra.Command) {
		for line := range strings.Lines(c.Example) {
			args := ours(strings.TrimSpace(line))
			if args == nil {
				continue
			}
			root := newRoot()
			found, rest, err := root.Find(args)
			require.NoError(t, err, line)
			require.NoError(t, found.ParseFlags(rest), line)
			require.NoError(t, found.ValidateArgs(found.Flags().Args()), line)
			if c.Runnable() && !c.HasSubCommands() && c.Parent().Name() != "completion" {
				require.Equal(t, c.CommandPath(), found.CommandPath(), "the example is another command's: %s", line)
			}
			seen++
		}
		for _, sub := range c.Commands() {
			walk(sub)
		}
	}
	walk(newRoot())
	require.Greater(t, seen, 30)
}

// TestHelpIsOnStandardOutput: asked for, help is a result.
func TestHelpIsOnStandardOutput(t *testing.T) {
	for _, args := range [][]string{{"--help"}, {"orders"}, {"orders", "list", "--help"}, {"help", "dlq", "replay"}} {
		code, out, errs := run(t, args...)
		require.Zero(t, code, args)
		require.Contains(t, out, "Usage:", args)
		require.Empty(t, errs, args)
	}
}

// service answers like one that has what is given by path, and nothing else.
func service(t *testing.T, answers map[string]string) string {
	t.Helper()
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, ok := answers[r.URL.Path]
		if !ok {
			w.WriteHeader(http.StatusNotFound)
			body = `{"status":404,"code":"not_found","title":"Not found"}`
		}
		_, _ = io.WriteString(w, body)
	}))
	t.Cleanup(srv.Close)
	return srv.URL
}

func TestEmptyLists(t *testing.T) {
	url := service(t, map[string]string{"/v1/orders": `{"orders":[]}`, "/v1/sagas": `{"sagas":[]}`, "/v1/dlq": `{"dead_letters":[]}`})
	for _, args := range [][]string{{"orders", "list"}, {"sagas", "list"}, {"dlq", "list"}} {
		for format, want := range map[string]string{"json": "[]\n", "jsonl": "", "text": ""} {
			code, out, errs := run(t, append(args, "--url", url, "-o", format)...)
			require.Zero(t, code, errs)
			require.Equal(t, want, out, "%v as %s", args, format)
			if format == "text" {
				require.NotEmpty(t, errs, "a person is told that there is none")
			}
		}
	}
}

// letter is a dead letter whose reason wants to write to the terminal of whoever lists it.
const letter = `{"id":"01938f6c-8b8a-7c3e-9d1c-2f4b5a6c7d8e","group":"order-commands","status":"open","class":"poison","type":"PlaceOrder","topic":"orders.commands.v1",
"message_id":"01938f6c-8b8a-7c3e-9d1c-2f4b5a6c7d8f","attempts":1,"reason":"bad \u001b[31mred\r\nnew line","fingerprint":"f","partition":0,"offset":7,
"first_failed_at":"2026-01-02T03:04:05Z","last_failed_at":"2026-01-02T03:04:05Z"}`

func TestFormats(t *testing.T) {
	url := service(t, map[string]string{"/v1/dlq": `{"dead_letters":[` + letter + `,` + letter + `]}`})
	_, out, _ := run(t, "dlq", "list", "--url", url, "-o", "json")
	var all []map[string]any
	require.NoError(t, json.Unmarshal([]byte(out), &all))
	require.Len(t, all, 2)
	for _, key := range []string{"id", "group", "topic", "partition", "offset", "status", "reason", "attempts"} {
		require.Contains(t, all[0], key)
	}
	_, out, _ = run(t, "dlq", "list", "--url", url, "-o", "jsonl")
	lines := strings.Split(strings.TrimSuffix(out, "\n"), "\n")
	require.Len(t, lines, 2)
	require.NoError(t, json.Unmarshal([]byte(lines[1]), &map[string]any{}))
	_, out, _ = run(t, "dlq", "list", "--url", url)
	require.Len(t, strings.Split(strings.TrimSuffix(out, "\n"), "\n"), 3, "a header and a line each")
}

// TestF26_NothingMovesTheCursor: what others wrote is shown without its control characters.
func TestF26_NothingMovesTheCursor(t *testing.T) {
	url := service(t, map[string]string{
		"/v1/dlq": `{"dead_letters":[` + letter + `]}`, "/v1/dlq/01938f6c-8b8a-7c3e-9d1c-2f4b5a6c7d8e": `{"dead_letter":` + letter + `,"headers":[{"name":"x","value":"\u001b]0;title\u0007"}]}`,
	})
	for _, args := range [][]string{{"dlq", "list"}, {"dlq", "show", "01938f6c-8b8a-7c3e-9d1c-2f4b5a6c7d8e"}, {"orders", "get", "no\x1b[2Jsuch"}} {
		_, out, errs := run(t, append(args, "--url", url)...)
		require.NotEmpty(t, out+errs)
		require.NotContains(t, out+errs, "\x1b", args)
		require.NotContains(t, out+errs, "\a", args)
		require.NotContains(t, out+errs, "\r", args)
	}
}

func TestNobodyAnswers(t *testing.T) {
	code, out, errs := run(t, "orders", "list", "--url", "http://127.0.0.1:1", "-o", "json")
	require.Equal(t, exitFailed, code)
	require.Empty(t, out)
	require.Contains(t, errs, "no answer from http://127.0.0.1:1")
	require.Contains(t, errs, "ORDERSAGA_URL")
}

func TestCompletion(t *testing.T) {
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"orders", ""}, "submit"}, {[]string{"serve", "--roles", ""}, "coordinator"}, {[]string{"-o", ""}, "jsonl"},
		{[]string{"orders", "list", "--status", ""}, "rejected"}, {[]string{"dlq", "list", "--status", ""}, "superseded"},
		{[]string{"sagas", "resolve", "ID", ""}, "mark_done"}, {[]string{"token", "x", "--role", ""}, "operator"},
	} {
		code, out, _ := run(t, append([]string{cobra.ShellCompRequestCmd}, c.args...)...)
		require.Zero(t, code)
		require.Contains(t, out, c.want, c.args)
	}
}

func TestPrintConfigMasksSecrets(t *testing.T) {
	dir := t.TempDir()
	key := filepath.Join(dir, "key")
	require.NoError(t, os.WriteFile(key, []byte("sk_live_hush\n"), 0o600))
	file := filepath.Join(dir, "ordersaga.yaml")
	require.NoError(t, os.WriteFile(file, []byte("payment: {api_key_file: "+key+"}\nkafka: {sasl: {mechanism: plain, username: svc, password: hush2}}\nhttp: {addr: 'file:1', burst_per_caller: 9}\n"), 0o600))
	t.Setenv("ORDERSAGA_DATABASE_URL", "postgres://svc:hush3@db:5432/orders?sslmode=verify-full&sslpassword=hush4")
	t.Setenv("ORDERSAGA_HTTP_ADDR", "env:2")
	t.Setenv("ORDERSAGA_LOG__LEVEL", "warn")
	for _, format := range []string{"text", "json"} {
		code, out, errs := run(t, "serve", "--print-config", "--config", file, "--http-addr", "flag:3", "-o", format)
		require.Zero(t, code, errs)
		require.NotContains(t, out+errs, "hush")
		for _, want := range []string{"flag:3", "warn", "svc", "db:5432", "burst_per_caller"} {
			require.Contains(t, out, want)
		}
		require.NotContains(t, out, "env:2")
		require.NotContains(t, out, "file:1")
	}
	require.NoError(t, os.WriteFile(file, []byte("kafka: {brokerz: [x]}\n"), 0o600))
	code, _, errs := run(t, "serve", "--print-config", "--config", file)
	require.Equal(t, exitUsage, code)
	require.Contains(t, errs, "kafka.brokerz")
}
