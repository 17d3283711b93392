package kafka

import (
	"context"
	"strings"
	"time"

	"github.com/twmb/franz-go/pkg/kgo"

	"ordersaga/consumers"
	"ordersaga/events"
)

// GroupRetry is the group that reads the retry topics. Every process reads those of the groups that it runs.
const GroupRetry events.Group = "retry"

// Tiers answers the retry topics that there are of a group, whatever delays they were made for.
func (c *Client) Tiers(ctx context.Context, group events.Group) ([]events.Topic, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	all, err := c.adm.ListTopics(ctx)
	if err != nil {
		return nil, wrong("list topics", err)
	}
	return tierTopics(all.Names(), c.cfg.Names, group), nil
}

// tierTopics picks a group's retry topics, as events.RetryTopic names them, from names in Kafka.
func tierTopics(all []string, names events.Names, group events.Group) (out []events.Topic) {
	for _, name := range all {
		own, ok := strings.CutPrefix(name, names.Prefix)
		if !ok {
			continue
		}
		delay, ok := strings.CutPrefix(own, "retry."+string(group)+".")
		if d, err := time.ParseDuration(delay); ok && err == nil && d > 0 && events.RetryTopic(group, d) == events.Topic(own) {
			out = append(out, events.Topic(own))
		}
	}
	return out
}

// RetrySource feeds the retry tiers of a process's groups: one member, whatever their number.
type RetrySource struct {
	c        *Client
	groups   []consumers.Retried
	observer consumers.Observer
	clock    func() time.Time
}

// NewRetrySource makes the retry source of these groups. clock is what due times are compared with; it should be the one that the
// groups stamp them with. Its connection begins and ends with Run.
func (c *Client) NewRetrySource(groups []consumers.Retried, observer consumers.Observer, clock func() time.Time) (*RetrySource, error) {
	tiers, err := consumers.NewRetryTiers(groups, observer, clock, nil)
	if err != nil {
		return nil, err
	}
	for _, t := range tiers.Topics() {
		if err := checkName("topic", c.cfg.Names.Topic(t), false); err != nil {
			return nil, err
		}
	}
	return &RetrySource{c, groups, observer, clock}, nil
}

// Run hands copies to their groups when they are due. It returns nil when ctx has ended, after what was settled is committed and the
// group is left. Copies wait in memory: nothing blocks the poll, so one member serves all tiers, and a slow tier holds up no fast one.
func (s *RetrySource) Run(ctx context.Context) error {
	s.c.sessions(ctx, "group "+s.c.cfg.Names.Group(GroupRetry), s.session)
	return nil
}

func (s *RetrySource) session(ctx context.Context) error {
	var tiers *consumers.RetryTiers
	var m *member
	tiers, err := consumers.NewRetryTiers(s.groups, s.observer, s.clock, func(places []consumers.Place) { m.mark(places) })
	if err != nil {
		return err
	}
	const fetchRetry = 256 << 10 // of a partition: what waits for ten minutes need not be here at once
	m, err = s.c.join(GroupRetry, tiers.Topics(), func(func([]consumers.Place)) *consumers.Pump { return tiers.Pump }, kgo.FetchMaxPartitionBytes(fetchRetry))
	if err != nil {
		return err
	}
	return m.run(ctx,
		// Not PollRecords with a bound: pausing a partition would drop the rest of what is buffered for it.
		m.cl.PollFetches,
		func(context.Context) {},
		tiers.Run,
	)
}
