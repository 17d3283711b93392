package boot

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/pprof"
	"os"
	"sync"
	"time"

	"go.uber.org/zap"

	"ordersaga/adapters/httpapi"
	"ordersaga/adapters/kafka"
	"ordersaga/adapters/payment"
	"ordersaga/adapters/postgres"
	"ordersaga/adapters/telemetry"
	"ordersaga/consumers"
	"ordersaga/domain"
	"ordersaga/events"
	"ordersaga/saga"
	"ordersaga/schemas"
)

// tx is the one transaction that all rooms share.
type tx = *postgres.Tx

// Options are what the caller knows and the configuration does not.
type Options struct {
	Version    string
	ConfigPath string                            // read again when it changes; empty: nothing to read
	Reread     func(path string) (Config, error) // how
	DataDir    string                            // whose disk is watched; empty: none
	Log        *zap.Logger
	Level      zap.AtomicLevel
	Prepare    bool // bring the schema up and make the topics first, as dev does
}

// App is a process with some roles, ready to run.
type App struct {
	cfg  Config
	opts Options
	log  *zap.Logger
	slog *slog.Logger

	metrics  *telemetry.Metrics
	observer *telemetry.Observer
	tracing  *telemetry.Tracing
	db       *postgres.DB
	kafka    *kafka.Client
	gateway  *payment.Gateway
	coord    *saga.Coordinator
	cache    *saga.CachedCatalogue
	hub      *httpapi.Hub
	api      *httpapi.API
	server   *httpapi.Server
	probeAPI *httpapi.API
	probes   *httpapi.Server // nil: none but the API's own
	intake   *saga.Intake[tx]
	admit    *admission

	readers      map[events.Topic]*kafka.Source // of the groups that run here and are alone with their topics
	outside      *kafka.Producer                // what PublishCommand sends with
	closers      []func()
	mu           sync.Mutex // of cfg while it is reloaded, and of what follows
	gatewayAsked time.Time
	gatewayState error
}

// DatabaseConfig is the database's part of a configuration.
func DatabaseConfig(c *Config) postgres.Config {
	return postgres.Config{URL: c.Database.URL, Connections: map[postgres.Purpose]int32{
		postgres.Intake: c.Database.Intake, postgres.Consumers: c.Database.Consumers,
		postgres.Relay: c.Database.Relay, postgres.Operators: c.Database.Operators,
	}}
}

// GatewayConfig is the payment gateway's part of a configuration.
func GatewayConfig(c *Config) payment.Config {
	return payment.Config{
		BaseURL: c.Payment.URL, APIKey: c.Payment.APIKey, Timeout: c.Payment.Timeout,
		Retry:          payment.Retry{Retries: c.Payment.Retries},
		Limits:         gatewayLimits(c),
		MaxConnections: max(payment.DefaultMaxConnections, c.Payment.Concurrency),
	}
}

func gatewayLimits(c *Config) payment.Limits {
	return payment.Limits{PerSecond: c.Payment.Rate, Burst: c.Payment.Burst, Concurrent: c.Payment.Concurrency}
}

// New opens what the roles need, waiting for a database or broker that is not there yet until ctx ends. Close what it answers.
func New(ctx context.Context, cfg Config, opts Options) (a *App, err error) {
	a = &App{cfg: cfg, opts: opts, log: opts.Log, slog: telemetry.Slog(opts.Log), hub: httpapi.NewHub()}
	defer func() {
		if err != nil {
			a.Close()
			a = nil
		}
	}()
	a.metrics = telemetry.NewMetrics(opts.Version)
	a.observer = telemetry.NewObserver(a.metrics, opts.Log)
	if a.tracing, err = telemetry.StartTracing(ctx, telemetry.TracingConfig{
		Endpoint: cfg.Trace.Endpoint, Sample: cfg.Trace.Sample, Version: opts.Version, Instance: cfg.Kafka.InstanceID, Log: opts.Log,
	}); err != nil {
		return a, err
	}
	a.closers = append(a.closers, func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
		defer cancel()
		if err := a.tracing.Close(ctx); err != nil {
			a.log.Warn("traces not flushed", zap.Error(err))
		}
	})
	if err := a.openDatabase(ctx); err != nil {
		return a, err
	}
	if err := a.openKafka(ctx); err != nil {
		return a, err
	}
	if err := a.openGateway(); err != nil {
		return a, err
	}
	limits := saga.Limits{Forward: cfg.Saga.Forward, Retriable: cfg.Saga.Retriable, Compensating: cfg.Saga.Compensating}
	a.coord = &saga.Coordinator{Defs: saga.NewDefinitions(saga.OrderV1(limits)), Now: a.db.Now}
	if a.cache, err = saga.NewCachedCatalogue(a.db, saga.CatalogueConfig{
		Products: cfg.Intake.CacheSize, TTL: cfg.Intake.CacheTTL, Absent: min(cfg.Intake.CacheTTL, absentTTL), Load: saga.DefaultCatalogue.Load,
	}); err != nil {
		return a, err
	}
	a.closers = append(a.closers, a.cache.Close)
	a.admit = newAdmission(a.db, cfg.Intake, cfg.Saga.Forward, opts.DataDir)
	if cfg.Has(RoleHTTP) {
		if err := a.openHTTP(ctx); err != nil {
			return a, err
		}
	} else if cfg.HTTP.ProbesAddr == "" {
		a.log.Warn("nobody can ask this process how it is: set http.probes_addr for /healthz, /readyz and /metrics")
	}
	return a, a.openProbes(ctx)
}

// openProbes serves the probes and metrics on an address of their own, if one is set.
func (a *App) openProbes(ctx context.Context) (err error) {
	if a.cfg.HTTP.ProbesAddr == "" {
		return nil
	}
	a.probeAPI = httpapi.NewProbes(httpapi.Deps{Ready: a.ready, Log: a.slog, Metrics: a.metrics.Handler()})
	if a.probes, err = httpapi.Listen(ctx, a.cfg.HTTP.ProbesAddr, a.probeAPI, a.probeAPI, nil, a.slog); err != nil {
		return fmt.Errorf("%w (http.probes_addr chooses another address)", err)
	}
	return nil
}

// absentTTL is how long "no such product" is believed: whoever has just made a product in another process wants to order it.
const absentTTL = time.Second

// Close closes what New opened; Run must have returned.
func (a *App) Close() {
	for i := len(a.closers) - 1; i >= 0; i-- {
		a.closers[i]()
	}
	a.closers = nil
}

// HTTPAddr is where the HTTP interface listens; empty without that role.
func (a *App) HTTPAddr() string {
	if a.server == nil {
		return ""
	}
	return a.server.Addr()
}

// startPatience is how long a start waits for a database or broker that is not there yet.
const startPatience = 2 * time.Minute

// await tries until it goes well, ctx ends or patience does; what is wrong is logged when it changes.
func (a *App) await(ctx context.Context, what string, try func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, startPatience)
	defer cancel()
	last := ""
	for {
		err := try(ctx)
		if err == nil {
			return nil
		}
		if !worthWaiting(err) {
			return err
		}
		if err.Error() != last {
			last = err.Error()
			a.log.Warn("waiting for "+what, zap.Error(err))
		}
		select {
		case <-time.After(500 * time.Millisecond):
		case <-ctx.Done():
			return fmt.Errorf("gave up waiting for %s: %w", what, err)
		}
	}
}

// worthWaiting reports an error that others may be about to mend: who starts a server, migrates or makes the topics. Brokers also need
// a moment to tell each other of topics that were just made.
func worthWaiting(err error) bool {
	var away interface{ Outage() string }
	var behind interface{ SchemaBehind() bool }
	var missing *kafka.MissingTopicsError
	return errors.As(err, &away) || errors.As(err, &behind) || errors.As(err, &missing)
}

func (a *App) openDatabase(ctx context.Context) error {
	cfg := DatabaseConfig(&a.cfg)
	cfg.Tracer = a.tracing.PgxTracer()
	err := a.await(ctx, "the database", func(ctx context.Context) (err error) {
		a.db, err = postgres.Open(ctx, cfg)
		return err
	})
	if err != nil {
		return err
	}
	a.closers = append(a.closers, a.db.Close)
	if a.opts.Prepare {
		if _, err := postgres.Migrate(ctx, a.db, postgres.Up); err != nil {
			return err
		}
	}
	if err := a.await(ctx, "the schema", func(ctx context.Context) error { return postgres.CheckSchema(ctx, a.db) }); err != nil {
		return err
	}
	// Before anything is written: a database that was restored from a dump adopts its outbox first (F41), and partitions are there.
	if _, err = a.db.MaintainOutbox(ctx, 0); err != nil {
		return err
	}
	if a.cfg.Kafka.InstanceID == "" || !a.cfg.Has(RoleRelay) {
		return nil
	}
	return a.db.RetireRelays(ctx, a.cfg.Kafka.InstanceID) // our predecessor's: nobody else has this name
}

func (a *App) openGateway() error {
	if !a.cfg.Has(RolePayment) && !a.cfg.Has(RoleCompensation) {
		return nil
	}
	g, err := payment.New(GatewayConfig(&a.cfg), payment.WithObserver(a.observer), payment.WithTransport(a.tracing.Transport))
	if err != nil {
		return fmt.Errorf("%w (payment.url and payment.api_key; ORDERSAGA_PAYMENT_URL, ORDERSAGA_PAYMENT_API_KEY or …_API_KEY_FILE)", err)
	}
	a.gateway = g
	a.closers = append(a.closers, g.Close)
	return nil
}

// products joins the catalogue's table with this process's cache of it.
type products struct {
	db    *postgres.DB
	cache *saga.CachedCatalogue
}

func (p products) Put(ctx context.Context, c httpapi.ProductChange) (httpapi.ProductView, bool, error) {
	v, created, err := p.db.PutProduct(ctx, postgres.ProductChange{Product: c.Product, OnHand: c.OnHand, Actor: c.Actor, Note: c.Note})
	p.cache.Invalidate(c.Product.SKU)
	return httpapi.ProductView(v), created, err
}

func (p products) Get(ctx context.Context, sku domain.SKU) (*httpapi.ProductView, error) {
	v, err := p.db.GetProduct(ctx, sku)
	if v == nil {
		return nil, err
	}
	return (*httpapi.ProductView)(v), err
}

func (p products) List(ctx context.Context, cursor string, limit int) ([]httpapi.ProductView, string, error) {
	page, next, err := p.db.ListProducts(ctx, cursor, limit)
	out := make([]httpapi.ProductView, len(page))
	for i := range page {
		out[i] = httpapi.ProductView(page[i])
	}
	return out, next, err
}

func (a *App) openHTTP(ctx context.Context) error {
	var tokens *httpapi.Tokens
	if a.cfg.HTTP.TokensFile != "" {
		var err error
		if tokens, err = readTokens(a.cfg.HTTP.TokensFile); err != nil {
			return err
		}
	}
	if !a.cfg.HTTP.Open && (tokens == nil || tokens.Len() == 0) {
		return errors.New("http: no tokens, so nobody could call: set http.tokens_file (ORDERSAGA_HTTP__TOKENS_FILE); `ordersaga token NAME --role admin` makes its lines")
	}
	a.intake = saga.NewIntake(a.db.For(postgres.Intake), a.coord, a.cache, saga.IntakeConfig{
		Workers: a.cfg.Intake.Workers, MaxBatch: a.cfg.Intake.MaxBatch, Queue: a.cfg.Intake.Queue, Committed: a.metrics.IntakeBatch,
	}, a.admit.check)
	operators, err := a.operators()
	if err != nil {
		return err
	}
	var debug http.Handler
	if a.cfg.HTTP.Pprof {
		debug = profiles()
	}
	a.api = httpapi.New(httpapi.Config{
		Open: a.cfg.HTTP.Open, MaxBody: a.cfg.HTTP.MaxBody, MaxWait: a.cfg.HTTP.MaxWait, MaxStreams: a.cfg.HTTP.MaxStreams,
	}, tokens, httpLimits(&a.cfg), httpapi.Deps{
		Intake: a.metrics.Intake(a.intake), Orders: &saga.Service[tx]{DB: a.db.For(postgres.Operators), Coord: a.coord}, Reader: a.db, Definitions: a.coord.Defs,
		Products: products{a.db, a.cache}, DeadLetters: operators, Hub: a.hub, Ready: a.ready, Log: a.slog,
		Metrics: a.metrics.Handler(), OpenAPI: schemas.OpenAPI, AsyncAPI: schemas.AsyncAPI, Schemas: schemas.JSON, Debug: debug,
	})
	var tlsConfig *tls.Config
	stop := func() {}
	if a.cfg.HTTP.TLS.CertFile != "" {
		if tlsConfig, stop, err = ServerTLS(a.cfg.HTTP.TLS.CertFile, a.cfg.HTTP.TLS.KeyFile, a.certificateFailed("http")); err != nil {
			return err
		}
	}
	a.closers = append(a.closers, stop)
	handler := telemetry.HTTPMiddleware(a.api, a.api.Route, a.tracing, a.metrics, a.log)
	if a.server, err = httpapi.Listen(ctx, a.cfg.HTTP.Addr, a.api, handler, tlsConfig, a.slog); err != nil {
		return fmt.Errorf("%w (http.addr, --http-addr or ORDERSAGA_HTTP_ADDR choose another address)", err)
	}
	return nil
}

func httpLimits(c *Config) httpapi.Limits {
	return httpapi.Limits{Rate: c.HTTP.Rate, Burst: c.HTTP.Burst}
}

func (a *App) certificateFailed(what string) func(error) {
	return func(err error) {
		a.log.Error("certificate not read again, the old one stays", zap.String("of", what), zap.Error(err))
	}
}

func readTokens(path string) (*httpapi.Tokens, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("http.tokens_file: %w", err)
	}
	defer f.Close()
	return httpapi.ParseTokens(f)
}

// profiles serves pprof for admins; the API guards the path.
func profiles() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("/debug/pprof/", pprof.Index)
	mux.HandleFunc("/debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("/debug/pprof/symbol", pprof.Symbol)
	mux.HandleFunc("/debug/pprof/trace", pprof.Trace)
	return mux
}

func (a *App) operators() (*consumers.Operators[tx], error) {
	return consumers.NewOperators(a.db.For(postgres.Operators), a.db, consumers.OperatorsConfig{Delays: a.cfg.Retry.Delays, Clock: a.db.Now})
}

// ready asks what the roles of this process depend on.
func (a *App) ready(ctx context.Context) map[string]error {
	checks := map[string]func(context.Context) error{
		"postgres": a.db.Ping,
		"schema":   func(ctx context.Context) error { return postgres.CheckSchema(ctx, a.db) },
		"kafka":    a.kafka.Ping,
	}
	if a.gateway != nil {
		checks["payment gateway"] = a.gatewayReady
	}
	var mu sync.Mutex
	var wg sync.WaitGroup
	out := make(map[string]error, len(checks))
	for name, check := range checks {
		wg.Go(func() {
			err := check(ctx)
			mu.Lock()
			defer mu.Unlock()
			out[name] = err
		})
	}
	wg.Wait()
	return out
}

// degradedError is what is wrong with a dependency without which orders are still taken in.
type degradedError struct{ error }

func (e degradedError) Unwrap() error { return e.error }

// Degraded reports that the process can do its work meanwhile.
func (degradedError) Degraded() bool { return true }

// gatewayEvery is how long an answer about the gateway is good for: probes come often, and its calls are counted.
const gatewayEvery = 15 * time.Second

// gatewayReady asks the gateway now and then. Away, it stops payments, not the intake: sagas wait for it.
func (a *App) gatewayReady(ctx context.Context) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if time.Since(a.gatewayAsked) > gatewayEvery {
		a.gatewayState, a.gatewayAsked = a.gateway.Ready(ctx), time.Now()
	}
	if a.gatewayState != nil {
		return degradedError{a.gatewayState}
	}
	return nil
}

// DB is the database, for whoever checks the books.
func (a *App) DB() *postgres.DB { return a.db }

func (a *App) retention() postgres.Retention {
	r := a.cfg.Retention
	return postgres.Retention{Inbox: r.Inbox, IdempotencyKeys: r.Keys, DeadLetters: r.DeadLetters, Ended: r.Orders}
}
