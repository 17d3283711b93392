package kafka

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/twmb/franz-go/pkg/kadm"
	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kmsg"

	"ordersaga/events"
)

// TopicsConfig is what the topics of an installation should be like.
type TopicsConfig struct {
	Partitions      int32           // of the topics that the saga runs on
	RetryPartitions int32           // of each retry topic; 0: Partitions, at most 4
	DLQPartitions   int32           // of each dead-letter queue; 0: 1
	Replication     int16           // 3 in production
	MinInSync       int16           // 0: 2 with a replication of 3 and more, else 1
	Retention       time.Duration   // 0: 7 days; negative: for ever
	DLQRetention    time.Duration   // 0: 30 days; negative: for ever
	RetentionBytes  int64           // of a partition; 0: no bound
	MaxMessageBytes int32           // 0: Kafka's default of 1,048,588; retry topics and dead-letter queues take a little more, for their headers
	Delays          []time.Duration // of the retry tiers; nil: events.DefaultRetryDelays
}

const (
	defaultRetention    = 7 * 24 * time.Hour
	defaultDLQRetention = 30 * 24 * time.Hour
	defaultMessageBytes = 1_048_588
	failureHeaders      = 64 << 10 // what the headers of a failure may add to a record
	maxRetryPartitions  = 4
)

// TopicSpec is one topic as it should be. Only the settings named in Configs are looked at.
type TopicSpec struct {
	Name        events.Topic
	Partitions  int32
	Replication int16
	Configs     map[string]string
}

// Topics lists all topics of an installation as they should be: public, internal, every group's retry tiers and dead-letter queue.
func (t TopicsConfig) Topics() []TopicSpec {
	t = t.defaults()
	spec := func(name events.Topic, partitions int32, retention time.Duration, extra int32) TopicSpec {
		ms := "-1"
		if retention > 0 {
			ms = strconv.FormatInt(retention.Milliseconds(), 10)
		}
		configs := map[string]string{
			"cleanup.policy": "delete", "retention.ms": ms, "min.insync.replicas": strconv.Itoa(int(t.MinInSync)),
			"max.message.bytes": strconv.Itoa(int(t.MaxMessageBytes + extra)),
		}
		if t.RetentionBytes > 0 {
			configs["retention.bytes"] = strconv.FormatInt(t.RetentionBytes, 10)
		}
		return TopicSpec{name, partitions, t.Replication, configs}
	}
	var out []TopicSpec
	for _, name := range []events.Topic{
		events.TopicCommands, events.TopicEvents, events.TopicStock, events.TopicPayment, events.TopicCompensation, events.TopicReplies,
	} {
		out = append(out, spec(name, t.Partitions, t.Retention, 0))
	}
	for _, g := range events.Groups {
		for _, d := range t.Delays {
			out = append(out, spec(events.RetryTopic(g.Group, d), t.RetryPartitions, t.Retention, failureHeaders))
		}
		out = append(out, spec(events.DLQTopic(g.Group), t.DLQPartitions, t.DLQRetention, failureHeaders))
	}
	return out
}

func (t TopicsConfig) defaults() TopicsConfig {
	t.Partitions = max(1, t.Partitions)
	t.Replication = max(1, t.Replication)
	if t.RetryPartitions <= 0 {
		t.RetryPartitions = min(t.Partitions, maxRetryPartitions)
	}
	if t.DLQPartitions <= 0 {
		t.DLQPartitions = 1
	}
	if t.MinInSync <= 0 {
		t.MinInSync = 1
		if t.Replication >= 3 {
			t.MinInSync = 2
		}
	}
	if t.Retention == 0 {
		t.Retention = defaultRetention
	}
	if t.DLQRetention == 0 {
		t.DLQRetention = defaultDLQRetention
	}
	if t.MaxMessageBytes <= 0 {
		t.MaxMessageBytes = defaultMessageBytes
	}
	if t.Delays == nil {
		t.Delays = events.DefaultRetryDelays
	}
	return t
}

// TopicState is one topic as it is.
type TopicState struct {
	Partitions  int32
	Replication int16 // the lowest of its partitions
	Configs     map[string]string
}

// ChangeKind is what a TopicChange does.
type ChangeKind string

// The kinds of changes to topics.
const (
	CreateTopic   ChangeKind = "create"
	AddPartitions ChangeKind = "partitions"
	SetConfig     ChangeKind = "config"
	CannotChange  ChangeKind = "cannot" // what is otherwise than wanted, and what Apply leaves alone: Detail says what to do
)

// TopicChange is one difference between a topic and its spec.
type TopicChange struct {
	Topic  string // with the prefix
	Kind   ChangeKind
	Key    string // SetConfig
	From   string
	To     string
	Detail string
	spec   TopicSpec
}

// PlanTopics compares topics, by their names in Kafka, with what they should be. It never plans to delete or to shrink.
func PlanTopics(current map[string]TopicState, desired []TopicSpec, names events.Names) []TopicChange {
	var out []TopicChange
	for _, spec := range desired {
		name := names.Topic(spec.Name)
		is, ok := current[name]
		if !ok {
			out = append(out, TopicChange{
				Topic: name, Kind: CreateTopic, To: fmt.Sprintf("%d partitions, replication %d", spec.Partitions, spec.Replication), spec: spec,
			})
			continue
		}
		out = append(out, planPartitions(name, is, spec)...)
		for _, key := range slices.Sorted(maps.Keys(spec.Configs)) {
			if is.Configs[key] != spec.Configs[key] {
				out = append(out, TopicChange{Topic: name, Kind: SetConfig, Key: key, From: is.Configs[key], To: spec.Configs[key], spec: spec})
			}
		}
	}
	return out
}

func planPartitions(name string, is TopicState, spec TopicSpec) (out []TopicChange) {
	from, to := strconv.Itoa(int(is.Partitions)), strconv.Itoa(int(spec.Partitions))
	switch {
	case is.Partitions < spec.Partitions:
		out = append(out, TopicChange{
			Topic: name, Kind: AddPartitions, From: from, To: to, spec: spec,
			Detail: "keys move to other partitions while records are in flight; inbox, barrier and versions hold nevertheless",
		})
	case is.Partitions > spec.Partitions:
		out = append(out, TopicChange{
			Topic: name, Kind: CannotChange, From: from, To: to, spec: spec,
			Detail: "Kafka cannot take partitions away: raise the setting to " + from + ", or make the topic anew while nothing is in it",
		})
	}
	if is.Replication != spec.Replication {
		out = append(out, TopicChange{
			Topic: name, Kind: CannotChange, From: strconv.Itoa(int(is.Replication)), To: strconv.Itoa(int(spec.Replication)), spec: spec,
			Detail: "replication is changed by moving partitions, with kafka-reassign-partitions.sh",
		})
	}
	return out
}

// TopicPlan compares the brokers' topics with what they should be.
func (c *Client) TopicPlan(ctx context.Context, desired []TopicSpec) ([]TopicChange, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	current, err := c.topics(ctx, desired)
	if err != nil {
		return nil, err
	}
	return PlanTopics(current, desired, c.cfg.Names), nil
}

func (c *Client) topics(ctx context.Context, desired []TopicSpec) (map[string]TopicState, error) {
	names := make([]string, 0, len(desired))
	for _, s := range desired {
		name := c.cfg.Names.Topic(s.Name)
		if err := checkName("topic", name, false); err != nil {
			return nil, err
		}
		names = append(names, name)
	}
	current, err := c.describe(ctx, names)
	if err != nil {
		return nil, err
	}
	there := slices.Sorted(maps.Keys(current))
	if len(there) == 0 {
		return current, nil
	}
	configs, err := c.adm.DescribeTopicConfigs(ctx, there...)
	if err != nil {
		return nil, wrong("describe topics' settings", err)
	}
	for _, rc := range configs {
		if rc.Err != nil {
			return nil, wrong("describe settings of topic "+rc.Name, rc.Err)
		}
		for _, kv := range rc.Configs {
			if kv.Value != nil {
				current[rc.Name].Configs[kv.Key] = *kv.Value
			}
		}
	}
	return current, nil
}

// describe answers those of the topics that exist, without their settings. It asks a broker: the client's own copy of the metadata
// may be from before the last change.
func (c *Client) describe(ctx context.Context, names []string) (map[string]TopicState, error) {
	req := kmsg.NewPtrMetadataRequest()
	for _, name := range names {
		t := kmsg.NewMetadataRequestTopic()
		t.Topic = kmsg.StringPtr(name)
		req.Topics = append(req.Topics, t)
	}
	resp, err := req.RequestWith(ctx, c.cl)
	if err != nil {
		return nil, wrong("describe topics", err)
	}
	found := make(map[string]TopicState, len(resp.Topics))
	for _, t := range resp.Topics {
		err := kerr.ErrorForCode(t.ErrorCode)
		if errors.Is(err, kerr.UnknownTopicOrPartition) || t.Topic == nil {
			continue
		}
		if err != nil && !errors.Is(err, kerr.LeaderNotAvailable) {
			return nil, wrong("describe topic "+*t.Topic, err)
		}
		st := TopicState{Partitions: int32(len(t.Partitions)), Configs: map[string]string{}} //nolint:gosec // Kafka counts them in 32 bits
		for _, p := range t.Partitions {
			if n := int16(len(p.Replicas)); st.Replication == 0 || n < st.Replication { //nolint:gosec // a handful
				st.Replication = n
			}
		}
		found[*t.Topic] = st
	}
	return found, nil
}

// TopicResult is what became of one change.
type TopicResult struct {
	TopicChange
	Err error // nil: done, or already so
}

// ApplyTopics makes changes, one after the other, waits until they show, and answers what became of each. Changes of kind CannotChange are left out. A topic
// that another process has made meanwhile is no error.
func (c *Client) ApplyTopics(ctx context.Context, changes []TopicChange) []TopicResult {
	out := make([]TopicResult, 0, len(changes))
	for _, ch := range changes {
		if ch.Kind == CannotChange {
			continue
		}
		callCtx, cancel := context.WithTimeout(ctx, callTimeout)
		out = append(out, TopicResult{ch, c.applyTopic(callCtx, ch)})
		cancel()
	}
	c.awaitTopics(ctx, out)
	return out
}

// awaitTopics waits, for a bounded time, until the brokers show what was changed: they acknowledge a change before all of them, or even
// the one that is asked next, know of it.
func (c *Client) awaitTopics(ctx context.Context, done []TopicResult) {
	const every = 50 * time.Millisecond
	var specs []TopicSpec
	for _, r := range done {
		if r.Err == nil && !slices.ContainsFunc(specs, func(s TopicSpec) bool { return s.Name == r.spec.Name }) {
			specs = append(specs, r.spec)
		}
	}
	if len(specs) == 0 {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		left, err := c.TopicPlan(ctx, specs)
		if err == nil && !slices.ContainsFunc(left, func(ch TopicChange) bool { return ch.Kind != CannotChange }) {
			return
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

func (c *Client) applyTopic(ctx context.Context, ch TopicChange) error {
	switch ch.Kind {
	case CreateTopic:
		configs := map[string]*string{}
		for k, v := range ch.spec.Configs {
			configs[k] = kadm.StringPtr(v)
		}
		resp, err := c.adm.CreateTopic(ctx, ch.spec.Partitions, ch.spec.Replication, configs, ch.Topic)
		if err == nil {
			err = resp.Err
		}
		if errors.Is(err, kerr.TopicAlreadyExists) {
			return nil
		}
		if err != nil && resp.ErrMessage != "" {
			err = fmt.Errorf("%s: %w", resp.ErrMessage, err)
		}
		return wrong("create topic "+ch.Topic, err)
	case AddPartitions:
		resp, err := c.adm.UpdatePartitions(ctx, int(ch.spec.Partitions), ch.Topic)
		if err == nil {
			err = resp[ch.Topic].Err
		}
		if errors.Is(err, kerr.InvalidPartitions) {
			if now, e := c.topics(ctx, []TopicSpec{ch.spec}); e == nil && now[ch.Topic].Partitions >= ch.spec.Partitions {
				return nil
			}
		}
		return wrong("add partitions to topic "+ch.Topic, err)
	case SetConfig:
		resp, err := c.adm.AlterTopicConfigs(ctx, []kadm.AlterConfig{{Op: kadm.SetConfig, Name: ch.Key, Value: kadm.StringPtr(ch.To)}}, ch.Topic)
		if err == nil && len(resp) > 0 {
			err = resp[0].Err
		}
		return wrong("set "+ch.Key+" of topic "+ch.Topic, err)
	case CannotChange:
		return nil
	default:
		return fmt.Errorf("unknown change %q", ch.Kind)
	}
}

// CheckTopics answers nil if all topics exist, else an error that names those that do not. For readiness and doctor.
func (c *Client) CheckTopics(ctx context.Context, topics ...events.Topic) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	names := make([]string, 0, len(topics))
	for _, t := range topics {
		names = append(names, c.cfg.Names.Topic(t))
	}
	current, err := c.describe(ctx, names)
	if err != nil {
		return err
	}
	var missing []string
	for _, name := range names {
		if _, ok := current[name]; !ok {
			missing = append(missing, name)
		}
	}
	if len(missing) > 0 {
		return &MissingTopicsError{missing}
	}
	return nil
}

// MissingTopicsError names topics that do not exist.
type MissingTopicsError struct{ Topics []string }

func (e *MissingTopicsError) Error() string {
	const shown = 5
	list := strings.Join(e.Topics[:min(shown, len(e.Topics))], ", ")
	if n := len(e.Topics) - shown; n > 0 {
		list += fmt.Sprintf(" and %d more", n)
	}
	return "kafka: topics are missing: " + list + ": `ordersaga topics apply` makes them"
}

// Brokers counts the brokers that answer; doctor compares it with the replication that is wanted.
func (c *Client) Brokers(ctx context.Context) (int, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	brokers, err := c.adm.ListBrokers(ctx)
	return len(brokers), wrong("list brokers", err)
}
