package boot

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"go.uber.org/zap"

	"ordersaga/adapters/httpapi"
	"ordersaga/adapters/kafka"
	"ordersaga/adapters/postgres"
	"ordersaga/adapters/telemetry"
	"ordersaga/consumers"
	"ordersaga/consumers/steps"
	"ordersaga/events"
	"ordersaga/outbox"
	"ordersaga/saga"
)

// groupSpec is how one consumer group is run.
type groupSpec struct {
	group    events.Group
	role     string
	inbox    consumers.InboxMode
	inflight int
	gather   time.Duration // see kafka.SourceConfig; 0: its default
	handler  func(calls *steps.GatewayCalls[tx]) consumers.Handler[tx]
}

// undoGather is how long undos wait for company under load. Few come at a time, nobody waits for one, and each batch is a transaction or two.
const undoGather = 25 * time.Millisecond

func (a *App) groups() []groupSpec {
	return []groupSpec{
		{events.GroupOrderCommands, RoleOrderCommands, consumers.InboxAll, 1, 0, func(*steps.GatewayCalls[tx]) consumers.Handler[tx] {
			return steps.NewOrderCommands[tx](a.coord, a.cache)
		}},
		{events.GroupStock, RoleStock, consumers.InboxFailures, 1, 0, func(*steps.GatewayCalls[tx]) consumers.Handler[tx] {
			return steps.NewStock[tx](a.db.Now)
		}},
		{events.GroupPayment, RolePayment, consumers.InboxFailures, a.cfg.Consumers.PaymentInflight, 0, func(c *steps.GatewayCalls[tx]) consumers.Handler[tx] {
			return steps.NewPayment(c)
		}},
		{events.GroupCompensationStock, RoleCompensation, consumers.InboxFailures, 1, undoGather, func(*steps.GatewayCalls[tx]) consumers.Handler[tx] {
			return steps.NewStockCompensation[tx]()
		}},
		{events.GroupCompensationPayment, RoleCompensation, consumers.InboxFailures, a.cfg.Consumers.PaymentInflight, undoGather, func(c *steps.GatewayCalls[tx]) consumers.Handler[tx] {
			return steps.NewPaymentCompensation(c)
		}},
		{events.GroupCoordinator, RoleCoordinator, consumers.InboxFailures, 1, 0, func(*steps.GatewayCalls[tx]) consumers.Handler[tx] {
			return steps.NewReplies[tx](a.coord)
		}},
	}
}

// Run runs the roles until ctx ends, then stops what takes work in, then what carries it on, then the relay.
func (a *App) Run(ctx context.Context) error {
	intake, err := a.intakeStage()
	if err != nil {
		return err
	}
	work, err := a.workStage(ctx)
	if err != nil {
		return err
	}
	relay, err := a.relayStage()
	if err != nil {
		return err
	}
	intake = append(intake, a.probesDrain()...)
	a.log.Info("started", zap.Strings("roles", a.cfg.Roles), zap.String("http", a.HTTPAddr()), zap.String("version", a.opts.Version))
	err = supervise(ctx, a.cfg.Shutdown.Timeout, intake, a.batchStage(), work, relay, a.houseStage())
	a.log.Info("stopped", zap.Error(err))
	return err
}

// intakeStage is what lets requests in.
func (a *App) intakeStage() (stage, error) {
	if a.server == nil {
		return nil, nil
	}
	tail, err := a.kafka.NewTail(events.TopicEvents)
	if err != nil {
		return nil, err
	}
	return stage{
		{"http", func(ctx context.Context) error { return a.listen(ctx, a.server) }},
		{"events", func(ctx context.Context) error {
			return tail.Where(a.waitedFor).While(a.hub.Awaited).Run(ctx, nil, a.publish)
		}},
		{"admission", a.admit.run},
	}, nil
}

// listen answers requests until ctx ends, then lets those under way finish.
func (a *App) listen(ctx context.Context, s *httpapi.Server) error {
	served := make(chan error, 1)
	go func() { served <- s.Serve() }()
	select {
	case err := <-served:
		return err
	case <-ctx.Done():
	}
	stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), a.cfg.Shutdown.Timeout/2)
	defer cancel()
	return errors.Join(s.Shutdown(stop), <-served)
}

// probesDrain makes the probes red when the process begins to stop; they answer until it has.
func (a *App) probesDrain() stage {
	if a.probes == nil {
		return nil
	}
	return stage{{"probes drain", func(ctx context.Context) error {
		<-ctx.Done()
		a.probeAPI.Drain()
		return nil
	}}}
}

// batchStage commits what the intake has queued; it outlives the listener.
func (a *App) batchStage() stage {
	if a.intake == nil {
		return nil
	}
	return stage{{"intake", a.intake.Run}}
}

// workStage is the consumer groups with their retries, and the sweeper.
func (a *App) workStage(ctx context.Context) (stage, error) {
	var st stage
	var retried []consumers.Retried
	groups := map[events.Group]*consumers.Group[tx]{}
	a.readers = map[events.Topic]*kafka.Source{}
	db := a.db.For(postgres.Consumers)
	var calls *steps.GatewayCalls[tx]
	if a.gateway != nil {
		cfg := steps.DefaultPayment
		cfg.Calls = max(cfg.Calls, a.cfg.Payment.Concurrency)
		calls = steps.NewGatewayCalls[tx](db, a.gateway, a.db.Now, cfg, func(err error) { a.log.Warn("the gateway's state was not reported", zap.Error(err)) })
	}
	for _, spec := range a.groups() {
		if !a.cfg.Has(spec.role) {
			continue
		}
		i := slices.IndexFunc(events.Groups, func(g struct {
			Group events.Group
			Topic events.Topic
		}) bool {
			return g.Group == spec.group
		})
		topic := events.Groups[i].Topic
		former, err := a.formerTiers(ctx, spec.group)
		if err != nil {
			return nil, err
		}
		g, err := consumers.NewGroup(consumers.GroupConfig{
			Name: spec.group, Topic: topic, Inbox: spec.inbox, Former: former, OnStalled: steps.Stalled, Observer: a.observer, Clock: a.db.Now,
			Policy: consumers.Policy{Delays: a.cfg.Retry.Delays, InPlace: inPlace(spec.group), EndlessUnknown: topic != events.TopicCommands},
		}, consumers.Store[tx](db), telemetry.Traced(spec.handler(calls), a.tracing))
		if err != nil {
			return nil, err
		}
		src, err := a.kafka.NewSource(kafka.SourceConfig{Group: spec.group, Topic: topic, MaxBatch: a.cfg.Consumers.MaxBatch, Inflight: spec.inflight, Gather: spec.gather})
		if err != nil {
			return nil, err
		}
		if topic != events.TopicCommands && topic != events.TopicCompensation { // those come from outside, or have two groups and no hurry
			a.readers[topic] = src
		}
		retried, groups[spec.group] = append(retried, g), g
		st = append(st, task{"group " + string(spec.group), func(ctx context.Context) error { return src.Run(ctx, g.Handle) }})
	}
	a.follow(groups)
	if len(retried) > 0 {
		lags := map[events.Group][]events.Topic{}
		for _, g := range retried {
			lags[kafka.GroupRetry] = append(lags[kafka.GroupRetry], g.RetryTopics()...)
		}
		for _, g := range events.Groups {
			if slices.ContainsFunc(retried, func(r consumers.Retried) bool { return r.Name() == g.Group }) {
				lags[g.Group] = []events.Topic{g.Topic}
			}
		}
		st = append(st, task{"lag", func(ctx context.Context) error { return a.kafka.ExportLag(ctx, lagEvery, lags) }})
		rs, err := a.kafka.NewRetrySource(retried, a.observer, a.db.Now)
		if err != nil {
			return nil, err
		}
		st = append(st, task{"retries", rs.Run})
	}
	if a.cfg.Has(RoleCoordinator) {
		svc := &saga.Service[tx]{DB: db, Coord: a.coord}
		st = append(st, task{"sweeper", func(ctx context.Context) error {
			return svc.Sweep(ctx, a.cfg.Saga.Sweep, func(err error) { a.log.Warn("sweep failed, tried again", zap.Error(err)) })
		}})
	}
	return st, nil
}

// follow has the coordinator handle the participants' replies in the transactions that emit them.
func (a *App) follow(groups map[events.Group]*consumers.Group[tx]) {
	coord := groups[events.GroupCoordinator]
	if coord == nil || !a.cfg.Consumers.Early {
		return
	}
	for _, g := range groups {
		if g != coord && g.Name() != events.GroupOrderCommands { // whose orders have only begun
			g.FollowedBy(coord, a.readers[events.TopicReplies])
		}
	}
}

// formerTiers are a group's retry topics of delays that are configured no more. They are read like the others: retry.delays may change
// while records wait.
func (a *App) formerTiers(ctx context.Context, group events.Group) (former []events.Topic, err error) {
	err = a.await(ctx, "the list of topics", func(ctx context.Context) (err error) {
		former, err = a.kafka.Tiers(ctx, group)
		return err
	})
	former = slices.DeleteFunc(former, func(t events.Topic) bool {
		return slices.ContainsFunc(a.cfg.Retry.Delays, func(d time.Duration) bool { return events.RetryTopic(group, d) == t })
	})
	if len(former) > 0 {
		a.log.Info("reads retry topics of former delays too", zap.String("group", string(group)), zap.Any("topics", former))
	}
	return former, err
}

// inPlace is how often a group tries again at once. The payment groups' gateway does so itself.
func inPlace(g events.Group) int {
	if g == events.GroupPayment || g == events.GroupCompensationPayment {
		return 0
	}
	return 2
}

// relayStage carries the outbox to Kafka. It stops after everything that writes to the outbox.
func (a *App) relayStage() (stage, error) {
	if !a.cfg.Has(RoleRelay) {
		return nil, nil
	}
	p, err := a.kafka.NewProducer(kafka.ProducerConfig{Compression: a.cfg.Kafka.Compression})
	if err != nil {
		return nil, err
	}
	a.closers = append(a.closers, p.Close)
	name, log := a.cfg.Kafka.InstanceID, postgres.NewOutboxLog(a.db)
	cfg := outbox.Config{Name: name, OpenWithin: a.cfg.Consumers.Gather, Awaited: a.awaited}
	if a.cfg.Consumers.Early {
		cfg.Offer = a.offer
	}
	r := outbox.New(log, p, cfg, a.observer)
	a.db.AnnounceTo(r.Announce)
	return stage{{"relay", r.Run}}, nil
}

// awaited reports that somebody waits for a public event at the HTTP interface of this process.
func (a *App) awaited() bool {
	if a.hub == nil {
		return false
	}
	select {
	case <-a.hub.Awaited():
		return true
	default:
		return false
	}
}

// offer hands a message to its group, if that runs here.
func (a *App) offer(r events.Record) bool {
	src, ok := a.readers[r.Topic]
	return ok && src.Offer(r)
}

// houseStage is what keeps the house: partitions, retention, operations left half done, metrics, reloading.
func (a *App) houseStage() stage {
	st := stage{{"upkeep", a.upkeep}, {"metrics", a.watchMetrics}}
	if a.probes != nil {
		st = append(st, task{"probes", func(ctx context.Context) error { return a.listen(ctx, a.probes) }})
	}
	if paths := a.watched(); len(paths) > 0 {
		st = append(st, task{"reload", func(ctx context.Context) error { return watch(ctx, paths, a.reload) }})
	}
	return st
}

// upkeepEvery is how often partitions and retention are looked after; a look at what is in order already is cheap.
const upkeepEvery = 15 * time.Second

func (a *App) upkeep(ctx context.Context) error {
	ops, err := a.operators()
	if err != nil {
		return err
	}
	t := time.NewTicker(upkeepEvery)
	defer t.Stop()
	for {
		for what, do := range map[string]func(context.Context) error{
			"maintenance": func(ctx context.Context) error { _, err := a.db.Maintain(ctx, a.retention()); return err },
			"outbox":      func(ctx context.Context) error { _, err := a.db.MaintainOutbox(ctx, 0); return err },
			"operations":  func(ctx context.Context) error { _, err := ops.Resume(ctx); return err },
		} {
			if err := do(ctx); err != nil && ctx.Err() == nil {
				a.log.Warn("upkeep failed, tried again", zap.String("what", what), zap.Error(err))
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
		}
	}
}

func (a *App) watched() []string {
	var out []string
	for _, p := range []string{a.opts.ConfigPath, a.cfg.HTTP.TokensFile} {
		if p != "" {
			out = append(out, p)
		}
	}
	return out
}

// reload takes over what may change while the process runs; a file that does not read leaves everything as it was.
func (a *App) reload(path string) {
	if path == a.cfg.HTTP.TokensFile {
		tokens, err := readTokens(path)
		if err != nil {
			a.log.Error("tokens not read again, the old ones stay", zap.Error(err))
			return
		}
		if a.api != nil {
			a.api.SetTokens(tokens)
		}
		a.log.Info("tokens read again", zap.Int("tokens", tokens.Len()))
		return
	}
	next, err := a.opts.Reread(path)
	if err != nil {
		a.log.Error("configuration not read again, the old one stays", zap.Error(err))
		return
	}
	if err := a.apply(&next); err != nil {
		a.log.Error("configuration not applied", zap.Error(err))
	}
}

func (a *App) apply(next *Config) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	cfg := a.cfg
	restart := cfg.reloadable(next)
	if err := a.opts.Level.UnmarshalText([]byte(cfg.Log.Level)); err != nil {
		return fmt.Errorf("log.level: %w", err)
	}
	if a.gateway != nil {
		if err := a.gateway.SetLimits(gatewayLimits(&cfg)); err != nil {
			return err
		}
	}
	if a.api != nil {
		a.api.SetLimits(httpLimits(&cfg))
	}
	a.admit.set(cfg.Intake)
	a.cfg.Log.Level = cfg.Log.Level
	a.log.Info("configuration read again", zap.Strings("needs a restart", restart))
	return nil
}
