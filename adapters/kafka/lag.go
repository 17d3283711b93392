package kafka

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"time"

	"github.com/twmb/franz-go/pkg/kadm"
	"github.com/twmb/franz-go/pkg/kerr"

	"ordersaga/events"
)

// Lag is how many records of one partition a group has not settled.
type Lag struct {
	Group     events.Group
	Topic     string // with the prefix
	Partition int32
	Records   int64
	Committed int64 // -1: nothing yet
	End       int64
}

// PastEnd reports an offset behind the end of its partition: the broker has lost records, or starts anew after a restore. What comes
// next would be skipped in silence until the offset is reached.
func (l Lag) PastEnd() bool { return l.Committed > l.End }

// Lags answers the lag of groups, for every partition of the topics that they have committed on or are given.
func (c *Client) Lags(ctx context.Context, groups map[events.Group][]events.Topic) ([]Lag, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	var out []Lag
	for group, topics := range groups {
		names := make([]string, 0, len(topics))
		for _, t := range topics {
			names = append(names, c.cfg.Names.Topic(t))
		}
		committed, err := c.adm.FetchOffsets(ctx, c.cfg.Names.Group(group))
		if err != nil && !errors.Is(err, kerr.GroupIDNotFound) { // nobody of it was ever here
			return nil, wrong("fetch offsets of group "+string(group), err)
		}
		ends, err := c.adm.ListEndOffsets(ctx, names...) // after the offsets: only so is one past the end no race
		if err != nil {
			return nil, wrong("list end offsets", err)
		}
		starts, err := c.adm.ListStartOffsets(ctx, names...)
		if err != nil {
			return nil, wrong("list start offsets", err)
		}
		ends.Each(func(end kadm.ListedOffset) {
			if end.Err != nil {
				return
			}
			l := Lag{Group: group, Topic: end.Topic, Partition: end.Partition, End: end.Offset, Committed: -1}
			from := int64(0)
			if s, ok := starts.Lookup(end.Topic, end.Partition); ok && s.Err == nil {
				from = s.Offset
			}
			if o, ok := committed.Lookup(end.Topic, end.Partition); ok && o.Err == nil && o.At >= 0 {
				l.Committed, from = o.At, max(from, o.At)
			}
			l.Records = max(0, end.Offset-from)
			out = append(out, l)
		})
	}
	return out, nil
}

// ExportLag tells the Observer the lag of groups, again and again until ctx ends.
func (c *Client) ExportLag(ctx context.Context, every time.Duration, groups map[events.Group][]events.Topic) error {
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		lags, err := c.Lags(ctx, groups)
		if err != nil && ctx.Err() == nil {
			c.cfg.Observer.KafkaProblem("lag", err)
		}
		for _, l := range lags {
			c.cfg.Observer.KafkaLag(c.cfg.Names.Group(l.Group), l.Topic, l.Partition, l.Records)
			if l.PastEnd() {
				c.cfg.Observer.KafkaProblem("group "+c.cfg.Names.Group(l.Group), fmt.Errorf("%s: committed offset %d is past the end %d: "+
					"the broker has lost records, or was restored; reset the group's offsets to the end or to a time", l.Topic+"/"+strconv.Itoa(int(l.Partition)),
					l.Committed, l.End))
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}
