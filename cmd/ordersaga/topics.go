package main

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"ordersaga/adapters/kafka"
	"ordersaga/cmd/ordersaga/internal/boot"
)

type topicRow struct {
	Topic  string `json:"topic"`
	Change string `json:"change"`
	Key    string `json:"key,omitempty"`
	From   string `json:"from,omitempty"`
	To     string `json:"to,omitempty"`
	Detail string `json:"detail,omitempty"`
	Error  string `json:"error,omitempty"`
}

func topicsCommand(g *globals) *cobra.Command {
	c := &cobra.Command{
		Use: "topics", Short: "Compare the topics with what they should be, and make them so",
		Long: "Partitions, replication and retention of every topic: public, internal, retry tiers, dead-letter queues. Never deletes a topic, and never takes partitions away.",
	}
	plan := &cobra.Command{
		Use: "plan", Short: "Show what would be changed", Args: cobra.NoArgs,
		Example: "  ordersaga topics plan\n  ordersaga topics plan --set kafka.partitions=32",
		RunE: func(cmd *cobra.Command, _ []string) error {
			return withTopics(cmd, g, func(_ context.Context, _ *kafka.Client, changes []kafka.TopicChange) error {
				return listTopics(cmd, g, changes, nil)
			})
		},
	}
	var yes, dry bool
	apply := &cobra.Command{
		Use: "apply", Short: "Make the topics as they should be", Args: cobra.NoArgs,
		Example: "  ordersaga topics apply --yes",
		RunE: func(cmd *cobra.Command, _ []string) error {
			return withTopics(cmd, g, func(ctx context.Context, cl *kafka.Client, changes []kafka.TopicChange) error {
				if dry || len(changes) == 0 {
					return listTopics(cmd, g, changes, nil)
				}
				if !yes {
					return usagef("%d changes (ordersaga topics plan shows them): add --yes", len(changes))
				}
				return listTopics(cmd, g, nil, cl.ApplyTopics(ctx, changes))
			})
		},
	}
	apply.Flags().BoolVar(&yes, "yes", false, "do not ask")
	apply.Flags().BoolVar(&dry, "dry-run", false, "only show what would be changed")
	c.AddCommand(plan, apply)
	return c
}

func withTopics(cmd *cobra.Command, g *globals, fn func(context.Context, *kafka.Client, []kafka.TopicChange) error) error {
	cfg, err := g.settings(boot.Defaults(), nil)
	if err != nil {
		return err
	}
	cl, stop, err := boot.OpenKafka(&cfg, nil, nil)
	if err != nil {
		return err
	}
	defer stop()
	changes, err := cl.TopicPlan(cmd.Context(), boot.Topics(&cfg))
	if err != nil {
		return err
	}
	return fn(cmd.Context(), cl, changes)
}

func listTopics(cmd *cobra.Command, g *globals, planned []kafka.TopicChange, done []kafka.TopicResult) error {
	rows := make([]topicRow, 0, len(planned)+len(done))
	row := func(c kafka.TopicChange) topicRow {
		return topicRow{Topic: c.Topic, Change: string(c.Kind), Key: c.Key, From: c.From, To: c.To, Detail: c.Detail}
	}
	for _, c := range planned {
		rows = append(rows, row(c))
	}
	failed := 0
	for _, r := range done {
		x := row(r.TopicChange)
		if r.Err != nil {
			x.Error = r.Err.Error()
			failed++
		}
		rows = append(rows, x)
	}
	if err := list(cmd, g, rows, []string{"TOPIC", "CHANGE", "SETTING", "FROM", "TO", "DETAIL", "ERROR"}, func(r topicRow) []string {
		return []string{r.Topic, r.Change, r.Key, r.From, r.To, r.Detail, r.Error}
	}); err != nil {
		return err
	}
	if failed > 0 {
		return &failedError{fmt.Sprintf("%d of %d changes failed", failed, len(done))}
	}
	return nil
}
