package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"time"

	"github.com/spf13/cobra"

	"ordersaga/adapters/httpapi"
	"ordersaga/cmd/ordersaga/internal/apiclient"
)

func sagasCommand(g *globals) *cobra.Command {
	c := &cobra.Command{Use: "sagas", Short: "See where sagas stand, and decide about those that stand still"}
	c.AddCommand(sagasList(g), sagasShow(g), sagasResolve(g))
	return c
}

func sagasList(g *globals) *cobra.Command {
	var phase, older string
	var stuck bool
	var limit int
	c := &cobra.Command{
		Use: "list", Short: "List sagas, newest first", Args: cobra.NoArgs,
		Example: "  ordersaga sagas list --stuck\n  ordersaga sagas list --phase compensating --older-than 10m -o json",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := oneOf("--phase", phase, sagaPhases); err != nil {
				return err
			}
			q := url.Values{}
			setIf(q, "phase", phase)
			setIf(q, "older_than", older)
			if stuck {
				q.Set("stuck", "true")
			}
			rows, err := pages(cmd.Context(), g, "/v1/sagas", q, limit, func(b []byte) ([]httpapi.Saga, string, error) {
				var p httpapi.SagaPage
				err := json.Unmarshal(b, &p)
				return p.Sagas, p.NextCursor, err
			})
			if err != nil {
				return err
			}
			return list(cmd, g, rows, sagaHeader, sagaCells)
		},
	}
	f := c.Flags()
	f.StringVar(&phase, "phase", "", "running, completed, compensating or compensated")
	f.BoolVar(&stuck, "stuck", false, "only those that are flagged as stuck or have not moved for a minute")
	f.StringVar(&older, "older-than", "", "only those that have not changed for so long, such as 10m")
	f.IntVar(&limit, "limit", 50, "how many at most; 0: all")
	_ = c.RegisterFlagCompletionFunc("phase", cobra.FixedCompletions(sagaPhases, cobra.ShellCompDirectiveNoFileComp))
	return c
}

var (
	sagaPhases    = []string{"running", "completed", "compensating", "compensated"}
	sagaDecisions = []string{"retry", "mark_done", "take"}
)

var sagaHeader = []string{"ORDER", "SAGA", "STATUS", "REASON", "UPDATED", "STUCK", "OWNER"}

func sagaCells(s httpapi.Saga) []string {
	why, owner := "", ""
	if s.Saga.Stuck != nil {
		why, owner = s.Saga.Stuck.Reason, s.Saga.Stuck.Owner
	}
	return []string{s.OrderID.String(), string(s.Saga.State), string(s.Status), string(s.Reason), s.UpdatedAt.Format(time.RFC3339), why, owner}
}

func sagasShow(g *globals) *cobra.Command {
	return &cobra.Command{
		Use: "show ID", Short: "Show a saga with its timeline", Args: cobra.ExactArgs(1),
		Example: "  ordersaga sagas show 01938f6c-8b8a-7c3e-9d1c-2f4b5a6c7d8e",
		RunE: func(cmd *cobra.Command, args []string) error {
			cl, err := g.client()
			if err != nil {
				return err
			}
			var d httpapi.SagaDetail
			if err := cl.Do(cmd.Context(), http.MethodGet, "/v1/sagas/"+url.PathEscape(args[0]), nil, nil, nil, &d); err != nil {
				return err
			}
			return one(cmd, g, d, func(w io.Writer) error { return showSaga(w, &d) })
		},
	}
}

func showSaga(w io.Writer, d *httpapi.SagaDetail) error {
	s := &d.Saga
	lines := []string{
		fmt.Sprintf("order   %s  %s%s  %s", s.OrderID, s.Status, because(string(s.Reason)), amount(s.TotalMinor, s.Currency)),
		fmt.Sprintf("saga    %s  (%s v%d, version %d)", s.Saga.State, s.Saga.Definition, s.Saga.DefinitionVersion, s.Saga.Version),
	}
	if s.Saga.Stuck != nil {
		lines = append(lines, fmt.Sprintf("stuck   since %s: %s; owner: %s", s.Saga.Stuck.Since.Format(time.RFC3339), s.Saga.Stuck.Reason, orNobody(s.Saga.Stuck.Owner)))
	}
	if s.Saga.DeadlineAt != nil {
		lines = append(lines, "next    looked at again at "+s.Saga.DeadlineAt.Format(time.RFC3339)+" if nothing happens")
	}
	for _, st := range s.Saga.Steps {
		lines = append(lines, fmt.Sprintf("step    %-18s %s", st.Name, st.State))
	}
	for _, u := range s.Saga.Undos {
		lines = append(lines, fmt.Sprintf("undo    %-18s %s", u.Participant, u.State))
	}
	for _, e := range d.Timeline {
		who := ""
		if e.Actor != "" {
			who = "  by " + e.Actor
		}
		lines = append(lines, fmt.Sprintf("%s  v%-2d %-18s %-18s → %s, %s%s  %s", e.At.Format("2006-01-02T15:04:05.000Z07:00"), e.Version, e.Input, e.Name, e.State, e.Status, who, e.Reason))
	}
	for _, l := range lines {
		if _, err := fmt.Fprintln(w, clean(l)); err != nil {
			return err
		}
	}
	return nil
}

func orNobody(s string) string {
	if s == "" {
		return "nobody"
	}
	return s
}

func sagasResolve(g *globals) *cobra.Command {
	var name, note string
	var yes, dry bool
	c := &cobra.Command{
		Use:   "resolve ID retry|mark_done|take",
		Short: "Decide about a saga that stands still",
		Long:  "retry commands again what is outstanding; mark_done records that a step or an undo was done by hand; take says that you look after it. Every decision is recorded.",
		Example: `  ordersaga sagas resolve 01938f6c-8b8a-7c3e-9d1c-2f4b5a6c7d8e retry
  ordersaga sagas resolve 01938f6c-8b8a-7c3e-9d1c-2f4b5a6c7d8e mark_done --name payment --note "refunded by hand, case 4711" --yes`,
		Args: cobra.ExactArgs(2),
		ValidArgsFunction: func(_ *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
			if len(args) == 1 {
				return sagaDecisions, cobra.ShellCompDirectiveNoFileComp
			}
			return nil, cobra.ShellCompDirectiveNoFileComp
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := oneOf("the decision", args[1], sagaDecisions); err != nil {
				return err
			}
			if args[1] == "mark_done" && name == "" {
				return usagef("mark_done needs --name: a step, or the participant whose undo was done")
			}
			if args[1] == "mark_done" && !yes && !dry {
				return usagef("mark_done takes your word for it that money or stock was moved by hand: add --yes")
			}
			if dry {
				return each(cmd, g, args[:1], func(ctx context.Context, cl *apiclient.Client, id string) (httpapi.Saga, error) {
					d, err := fetch[httpapi.SagaDetail](ctx, cl, http.MethodGet, "/v1/sagas/"+url.PathEscape(id), nil)
					return d.Saga, err
				}, sagaHeader, sagaCells)
			}
			return each(cmd, g, args[:1], func(ctx context.Context, cl *apiclient.Client, id string) (httpapi.Saga, error) {
				return fetch[httpapi.Saga](ctx, cl, http.MethodPost, "/v1/sagas/"+url.PathEscape(id)+"/resolve",
					httpapi.ResolveSaga{Decision: httpapi.SagaDecision(args[1]), Name: name, Note: note})
			}, sagaHeader, sagaCells)
		},
	}
	f := c.Flags()
	f.StringVar(&name, "name", "", "mark_done: the step or participant")
	f.StringVar(&note, "note", "", "why, for the audit log")
	f.BoolVar(&yes, "yes", false, "do not ask")
	f.BoolVar(&dry, "dry-run", false, "only show the saga that would be changed")
	return c
}
