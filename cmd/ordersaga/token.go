package main

import (
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"ordersaga/adapters/httpapi"
)

func tokenCommand(g *globals) *cobra.Command {
	var role string
	c := &cobra.Command{
		Use: "token NAME", Short: "Draw a bearer token, and the line for the tokens file", Args: cobra.ExactArgs(1),
		Long:    "Draws a random bearer token. The service keeps only its hash: add the printed line to the file that http.tokens_file names; it is read again when it changes.",
		Example: "  ordersaga token shop --role client",
		RunE: func(cmd *cobra.Command, args []string) error {
			token, line, err := httpapi.NewToken(args[0], httpapi.Role(role))
			if err != nil {
				return &usageError{err}
			}
			return one(cmd, g, map[string]string{"token": token, "line": line}, func(w io.Writer) error {
				_, err := fmt.Fprintf(w, "token  %s\nline   %s\n", token, line)
				return err
			})
		},
	}
	c.Flags().StringVar(&role, "role", "client", "client, operator or admin")
	_ = c.RegisterFlagCompletionFunc("role", cobra.FixedCompletions([]string{"client", "operator", "admin"}, cobra.ShellCompDirectiveNoFileComp))
	return c
}
