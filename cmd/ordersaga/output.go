package main

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"
)

// list prints rows: an array as json (an empty one is []), a line each as jsonl, a table as text.
func list[T any](cmd *cobra.Command, g *globals, rows []T, header []string, cells func(T) []string) error {
	w := cmd.OutOrStdout()
	switch g.output {
	case "json":
		if rows == nil {
			rows = []T{}
		}
		return encode(w, rows, true)
	case "jsonl":
		for _, r := range rows {
			if err := encode(w, r, false); err != nil {
				return err
			}
		}
		return nil
	}
	if len(rows) == 0 {
		_, err := fmt.Fprintln(cmd.ErrOrStderr(), "none")
		return err
	}
	tw := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	if _, err := fmt.Fprintln(tw, strings.Join(header, "\t")); err != nil {
		return err
	}
	for _, r := range rows {
		line := cells(r)
		for i := range line {
			line[i] = strings.Join(strings.Fields(line[i]), " ") // a cell is one line, whatever the error in it
		}
		if _, err := fmt.Fprintln(tw, clean(strings.Join(line, "\t"))); err != nil {
			return err
		}
	}
	return tw.Flush()
}

// one prints a single thing: as json or jsonl the thing, as text what text writes.
func one[T any](cmd *cobra.Command, g *globals, v T, text func(w io.Writer) error) error {
	if g.output == "text" {
		return text(cmd.OutOrStdout())
	}
	return encode(cmd.OutOrStdout(), v, g.output == "json")
}

func encode(w io.Writer, v any, indent bool) error {
	e := json.NewEncoder(w)
	e.SetEscapeHTML(false)
	if indent {
		e.SetIndent("", "  ")
	}
	return e.Encode(v)
}

// clean keeps what others wrote from moving the cursor of the terminal it is shown on.
func clean(s string) string {
	return strings.Map(func(r rune) rune {
		if r < 0x20 && r != '\t' || r >= 0x7f && r < 0xa0 {
			return '\ufffd'
		}
		return r
	}, s)
}

// say tells the person at the terminal something beside the result. A terminal that is gone does not end the command.
func say(w io.Writer, format string, args ...any) { _, _ = fmt.Fprintf(w, format, args...) }
