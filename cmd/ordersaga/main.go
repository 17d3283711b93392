// Command ordersaga is the order saga: the service, its tools for operators, and a complete trial version of both in one process.
//
//	ordersaga dev      everything in one process, nothing to install
//	ordersaga serve    the service, against your Kafka, Postgres and payment gateway
//
// One file a subcommand; what they share is in internal. Results go to standard output, progress and logs to standard error. The exit
// status is 0 when all is done, 1 when some item failed, 2 when the command was not understood.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
)

// Exit statuses.
const (
	exitFailed = 1
	exitUsage  = 2
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := Main(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// Main is the program as a function: tests run the real thing with it.
func Main(ctx context.Context, args []string, in io.Reader, out, errs io.Writer) int {
	root := newRoot() //nolint:contextcheck // commands take their context from cobra when they run
	root.SetArgs(args)
	root.SetIn(in)
	root.SetOut(out)
	root.SetErr(errs)
	err := root.ExecuteContext(ctx)
	var failed *failedError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &failed):
		if failed.msg != "" {
			say(errs, "ordersaga: %s\n", failed.msg)
		}
		return exitFailed
	case isUsage(err):
		say(errs, "ordersaga: %v\n", err)
		return exitUsage
	default:
		say(errs, "ordersaga: %v\n", err)
		return exitFailed
	}
}

// failedError ends a command that has said what failed already, or says it in msg.
type failedError struct{ msg string }

func (e *failedError) Error() string { return e.msg }

// usageError is a command line that cannot be carried out as it stands.
type usageError struct{ error }

func (e *usageError) Unwrap() error { return e.error }

func usagef(format string, args ...any) error { return &usageError{fmt.Errorf(format, args...)} }

// isUsage knows cobra's own complaints by their words: it has no types for them.
func isUsage(err error) bool {
	var u *usageError
	if errors.As(err, &u) {
		return true
	}
	return slices.ContainsFunc([]string{"unknown command", "unknown flag", "unknown shorthand", "accepts ", "requires ", "required flag", "invalid argument", "flag needs"},
		func(s string) bool { return strings.Contains(err.Error(), s) })
}

// configFile is read where no other is named.
const configFile = "ordersaga.yaml"

// globals are the flags that every command has.
type globals struct {
	output string
	config string
	set    []string
	url    string
	token  string
}

func newRoot() *cobra.Command {
	g := &globals{}
	root := &cobra.Command{
		Use:           "ordersaga",
		Short:         "An event-driven order saga on Kafka and Postgres",
		Long:          "ordersaga takes in orders, reserves stock, takes the payment and confirms, or undoes all of it.\nTry it with nothing installed: ordersaga dev",
		SilenceUsage:  true,
		SilenceErrors: true,
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error {
			// Not for dev: it migrates whatever database it is given, which a file that happens to lie here shall not decide.
			if _, err := os.Stat(configFile); err == nil && g.config == "" && cmd.Name() != "dev" {
				g.config = configFile
			}
			if !slices.Contains([]string{"text", "json", "jsonl"}, g.output) {
				return usagef("--output is text, json or jsonl, not %q", g.output)
			}
			return nil
		},
	}
	p := root.PersistentFlags()
	p.StringVarP(&g.output, "output", "o", "text", "format of the result: text, json or jsonl")
	p.StringVar(&g.config, "config", os.Getenv("ORDERSAGA_CONFIG"), "configuration file (YAML); also ORDERSAGA_CONFIG; else "+configFile+" of the working directory, if there is one (not for dev)")
	p.StringArrayVar(&g.set, "set", nil, "a setting, such as --set kafka.topic_prefix=test_ (may be repeated)")
	p.StringVar(&g.url, "url", envOr("ORDERSAGA_URL", "http://127.0.0.1:8080"), "the service, for orders, sagas and dlq; also ORDERSAGA_URL")
	p.StringVar(&g.token, "token", os.Getenv("ORDERSAGA_TOKEN"), "bearer token for the service; also ORDERSAGA_TOKEN")
	_ = root.RegisterFlagCompletionFunc("output", cobra.FixedCompletions([]string{"text", "json", "jsonl"}, cobra.ShellCompDirectiveNoFileComp))
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return &usageError{err} })
	root.AddCommand(commands(g)...)
	root.InitDefaultCompletionCmd()
	for _, c := range root.Commands() {
		finish(c)
	}
	return root
}

// finish gives a command what cobra leaves out: one that only holds others refuses what it does not know, where cobra would show the
// help and call that success; and the completion commands have examples as every other.
func finish(c *cobra.Command) {
	if c.HasSubCommands() && !c.Runnable() {
		c.RunE = func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return cmd.Help()
			}
			return usagef("unknown command %q for %q (%s --help lists them)", args[0], cmd.CommandPath(), cmd.CommandPath())
		}
	}
	for _, sub := range c.Commands() {
		if c.Name() == "completion" {
			sub.Example = completionExamples[sub.Name()]
		}
		finish(sub)
	}
}

// completionExamples are how each shell loads its script for the session.
var completionExamples = map[string]string{
	"bash":       "  source <(ordersaga completion bash)",
	"zsh":        "  source <(ordersaga completion zsh)",
	"fish":       "  ordersaga completion fish | source",
	"powershell": "  ordersaga completion powershell | Out-String | Invoke-Expression",
}

// oneOf refuses a value of a flag or argument that is none of those allowed; empty is left to the command.
func oneOf(what, value string, allowed []string) error {
	if value == "" || slices.Contains(allowed, value) {
		return nil
	}
	return usagef("%s is %s or %s, not %q", what, strings.Join(allowed[:len(allowed)-1], ", "), allowed[len(allowed)-1], clean(value))
}

func envOr(key, def string) string {
	if v := os.Getenv(key); v != "" {
		return v
	}
	return def
}
