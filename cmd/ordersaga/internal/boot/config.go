// Package boot turns configuration into a running process: it reads the settings, opens the adapters, joins the rooms and runs the
// roles that were asked for until it is told to stop.
//
// It owns the order of starting and stopping. It promises that what it started it stops, in the reverse order and within the
// shutdown timeout, and that a setting nobody knows is an error that names it, never silence.
package boot

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"os"
	"reflect"
	"slices"
	"sort"
	"strings"
	"time"

	"github.com/go-viper/mapstructure/v2"
	"github.com/knadh/koanf/parsers/yaml"
	"github.com/knadh/koanf/providers/confmap"
	"github.com/knadh/koanf/providers/env/v2"
	"github.com/knadh/koanf/providers/file"
	"github.com/knadh/koanf/v2"

	"ordersaga/adapters/kafka"
)

// Config is every setting. Later sources win: defaults, the file, the environment (ORDERSAGA_, __ between levels), flags.
// A field tagged secret is masked wherever the configuration is shown, and may be given as a file by the key with _file behind it.
type Config struct {
	Roles     []string  `koanf:"roles" doc:"what this process does; all or a list"`
	Database  Database  `koanf:"database"`
	Kafka     Kafka     `koanf:"kafka"`
	HTTP      HTTP      `koanf:"http"`
	Payment   Payment   `koanf:"payment"`
	Retry     Retry     `koanf:"retry"`
	Saga      Saga      `koanf:"saga"`
	Intake    Intake    `koanf:"intake"`
	Consumers Consumers `koanf:"consumers"`
	Retention Retention `koanf:"retention"`
	Log       Log       `koanf:"log"`
	Trace     Trace     `koanf:"trace"`
	Shutdown  Shutdown  `koanf:"shutdown"`
}

// Database is where the state lives.
type Database struct {
	URL       string `koanf:"url" secret:"url" doc:"postgres://user:password@host:5432/db?sslmode=verify-full&sslrootcert=…"`
	URLFile   string `koanf:"url_file"`
	Intake    int32  `koanf:"intake_conns" doc:"connections for the HTTP intake"`
	Consumers int32  `koanf:"consumer_conns" doc:"connections for consumers"`
	Relay     int32  `koanf:"relay_conns" doc:"connections for the relay"`
	Operators int32  `koanf:"operator_conns" doc:"connections for reads, operators and upkeep"`
}

// Kafka is the broker.
type Kafka struct {
	Brokers     []string      `koanf:"brokers" doc:"bootstrap addresses"`
	TopicPrefix string        `koanf:"topic_prefix" doc:"before every topic and group"`
	ClientID    string        `koanf:"client_id" doc:"how the brokers know us, for quotas and logs"`
	InstanceID  string        `koanf:"instance_id" doc:"static group membership; unique per process"`
	Session     time.Duration `koanf:"session_timeout" doc:"a member that is silent for so long is gone; after a kill -9 its partitions wait so long"`
	Partitions  int32         `koanf:"partitions" doc:"of the topics that the saga runs on"`
	Compression string        `koanf:"compression" doc:"of what is produced: none, snappy, lz4 or zstd; none costs the least CPU, the others less network and disk"`
	Replication int16         `koanf:"replication" doc:"copies of each topic; with 3, two must have a record before it counts"`
	Embedded    bool          `koanf:"embedded" doc:"the brokers are the in-process one of dev: topics keep by size, not by age"`
	TLS         TLS           `koanf:"tls"`
	SASL        SASL          `koanf:"sasl"`
}

// TLS names certificates; they are read again when they change.
type TLS struct {
	Enabled    bool   `koanf:"enabled" doc:"for Kafka; HTTP speaks TLS if it has a certificate"`
	CAFile     string `koanf:"ca_file" doc:"whom to trust, for Kafka; empty: the authorities of the system"`
	CertFile   string `koanf:"cert_file" doc:"our certificate; files are read again when they change"`
	KeyFile    string `koanf:"key_file"`
	ServerName string `koanf:"server_name" doc:"the name in the brokers' certificates, if it is not the host that is dialled"`
}

// SASL is how Kafka knows us.
type SASL struct {
	Mechanism    string `koanf:"mechanism" doc:"plain, scram-sha-256 or scram-sha-512; empty: none"`
	Username     string `koanf:"username"`
	Password     string `koanf:"password" secret:"all"`
	PasswordFile string `koanf:"password_file"`
}

// HTTP is the intake and the operators' interface.
type HTTP struct {
	Addr       string        `koanf:"addr" doc:"where HTTP listens"`
	ProbesAddr string        `koanf:"probes_addr" doc:"where /healthz, /readyz and /metrics are served too, without TLS; for processes without the role http"`
	TokensFile string        `koanf:"tokens_file" doc:"hashed bearer tokens with roles"`
	Open       bool          `koanf:"open" doc:"no tokens: every caller is admin; for dev, and for trials on a loopback address"`
	TLS        TLS           `koanf:"tls"`
	MaxBody    int64         `koanf:"max_body_bytes" doc:"of a request"`
	Rate       float64       `koanf:"rate_per_caller" doc:"requests a second and caller"`
	Burst      int           `koanf:"burst_per_caller"`
	MaxWait    time.Duration `koanf:"max_wait" doc:"the longest Prefer: wait"`
	MaxStreams int           `koanf:"max_streams" doc:"SSE streams and waiting requests at a time"`
	Pprof      bool          `koanf:"pprof" doc:"profiles under /debug/pprof, for admins"`
}

// Payment is the gateway.
type Payment struct {
	URL         string        `koanf:"url" doc:"the API that the Stripe SDK speaks to"`
	APIKey      string        `koanf:"api_key" secret:"all"`
	APIKeyFile  string        `koanf:"api_key_file"`
	Timeout     time.Duration `koanf:"timeout" doc:"of one call"`
	Retries     int           `koanf:"retries" doc:"in place, with full jitter"`
	Rate        float64       `koanf:"rate" doc:"calls a second; Stripe allows a live account 100"`
	Burst       int           `koanf:"burst"`
	Concurrency int           `koanf:"concurrency" doc:"calls at a time"`
}

// Retry is what becomes of a record that fails for now.
type Retry struct {
	Delays []time.Duration `koanf:"delays" doc:"a retry topic each; after the last a record is a dead letter"`
}

// Saga bounds how long things may take.
type Saga struct {
	Forward      time.Duration `koanf:"forward_deadline" doc:"an order that is not captured by then is rejected as timed_out"`
	Retriable    time.Duration `koanf:"retriable_deadline" doc:"after the capture: when what is outstanding is commanded anew"`
	Compensating time.Duration `koanf:"compensating_deadline" doc:"the same of an undo"`
	Sweep        time.Duration `koanf:"sweep_every" doc:"how often deadlines are looked for"`
}

// Intake bounds what is taken in.
type Intake struct {
	Workers    int           `koanf:"workers" doc:"transactions of placing at a time"`
	MaxBatch   int           `koanf:"max_batch" doc:"orders in one of them"`
	Queue      int           `koanf:"queue" doc:"submissions that may wait; beyond it 429"`
	MaxRunning int64         `koanf:"max_running" doc:"sagas under way before the intake sheds"`
	MaxLag     time.Duration `koanf:"max_outbox_age" doc:"age of the oldest unpublished row before the intake sheds"`
	MaxDelay   time.Duration `koanf:"max_delay" doc:"when most orders of so long ago are pending still, and nothing is away, only as many are taken in as are worked off; 0: never"`
	MinDisk    int64         `koanf:"min_free_disk_bytes" doc:"below it the intake sheds (where the data directory is known)"`
	CacheTTL   time.Duration `koanf:"catalogue_ttl" doc:"how long a price is believed without asking the catalogue"`
	CacheSize  int           `koanf:"catalogue_size" doc:"products kept"`
}

// Consumers sizes the groups.
type Consumers struct {
	MaxBatch        int           `koanf:"max_batch" doc:"records of a group in one transaction"`
	PaymentInflight int           `koanf:"payment_batches" doc:"batches of payments at a time"`
	Early           bool          `koanf:"early" doc:"act on what was committed in this process while it is on its way through Kafka, and on replies in the transactions that emit them"`
	Gather          time.Duration `koanf:"gather" doc:"how long orders wait, at most, to go on to payment together where they come often: less CPU, more latency; 0: not at all"`
}

// Retention is how long what is no longer needed stays.
type Retention struct {
	Inbox       time.Duration `koanf:"inbox" doc:"what became of messages; older duplicates meet barrier, machine or order id"`
	Keys        time.Duration `koanf:"idempotency_keys" doc:"for so long a key is answered as the first time"`
	DeadLetters time.Duration `koanf:"dead_letters" doc:"those that are resolved, discarded or superseded"`
	Orders      time.Duration `koanf:"ended_orders" doc:"0: for ever"`
}

// Log is the log.
type Log struct {
	Level  string `koanf:"level" doc:"debug, info, warn or error"`
	Format string `koanf:"format" doc:"json or console"`
}

// Trace is where traces go.
type Trace struct {
	Endpoint string  `koanf:"otlp_endpoint" doc:"http(s)://host:4318; empty: traces are passed on but not exported"`
	Sample   float64 `koanf:"sample" doc:"share of new traces that are recorded"`
}

// Shutdown bounds stopping.
type Shutdown struct {
	Timeout time.Duration `koanf:"timeout" doc:"for everything together, from the signal to the end"`
}

// Roles that a process can have.
const (
	RoleHTTP          = "http"
	RoleRelay         = "relay"
	RoleOrderCommands = "order-commands"
	RoleStock         = "stock"
	RolePayment       = "payment"
	RoleCompensation  = "compensation"
	RoleCoordinator   = "coordinator"
)

// AllRoles lists the roles.
var AllRoles = []string{RoleHTTP, RoleRelay, RoleOrderCommands, RoleStock, RolePayment, RoleCompensation, RoleCoordinator}

// Defaults are the settings where nothing else is said.
func Defaults() Config {
	return Config{
		Roles:    []string{"all"},
		Database: Database{Intake: 4, Consumers: 12, Relay: 2, Operators: 4},
		Kafka: Kafka{
			Brokers: []string{"127.0.0.1:9092"}, ClientID: "ordersaga", Session: 8 * time.Second, Partitions: 16, Replication: 3, Compression: "none",
		},
		HTTP: HTTP{
			Addr: "127.0.0.1:8080", MaxBody: 64 << 10, Rate: 1000, Burst: 2000, MaxWait: 30 * time.Second, MaxStreams: 1000,
		},
		Payment: Payment{
			URL: "https://api.stripe.com", Timeout: 3 * time.Second, Retries: 2, Rate: 100, Burst: 100, Concurrency: 64,
		},
		Retry:     Retry{Delays: []time.Duration{5 * time.Second, 30 * time.Second, 2 * time.Minute, 10 * time.Minute}},
		Saga:      Saga{Forward: 15 * time.Minute, Retriable: 45 * time.Second, Compensating: 45 * time.Second, Sweep: time.Second},
		Intake:    Intake{Workers: 1, MaxBatch: 128, Queue: 1024, MaxRunning: 1_000_000, MaxLag: time.Minute, MaxDelay: 5 * time.Second, MinDisk: 512 << 20, CacheTTL: 10 * time.Second, CacheSize: 10_000},
		Consumers: Consumers{MaxBatch: 500, PaymentInflight: 4, Early: true},
		Retention: Retention{Inbox: 7 * 24 * time.Hour, Keys: 48 * time.Hour, DeadLetters: 90 * 24 * time.Hour},
		Log:       Log{Level: "info", Format: "json"},
		Trace:     Trace{Sample: 0.01},
		Shutdown:  Shutdown{Timeout: 20 * time.Second},
	}
}

// aliases are environment variables that always work, beside the ones with __ between levels.
var aliases = map[string]string{
	"ORDERSAGA_DATABASE_URL":         "database.url",
	"ORDERSAGA_DATABASE_URL_FILE":    "database.url_file",
	"ORDERSAGA_KAFKA_BROKERS":        "kafka.brokers",
	"ORDERSAGA_HTTP_ADDR":            "http.addr",
	"ORDERSAGA_PAYMENT_URL":          "payment.url",
	"ORDERSAGA_PAYMENT_API_KEY":      "payment.api_key",
	"ORDERSAGA_PAYMENT_API_KEY_FILE": "payment.api_key_file",
	"ORDERSAGA_ROLES":                "roles",
}

// notSettings are variables of the same prefix that other parts of the program read.
var notSettings = []string{"ORDERSAGA_CONFIG", "ORDERSAGA_URL", "ORDERSAGA_TOKEN", "ORDERSAGA_TEST_", "ORDERSAGA_E2E_"}

// Load reads the settings: the defaults, then the file at path (if not empty), then the environment, then flags (key → value, such
// as kafka.topic_prefix → x_). It answers an error that names every unknown key and every value that does not fit.
func Load(defaults Config, path string, environ func() []string, flags map[string]any) (Config, error) {
	k := koanf.New(".")
	if path != "" {
		if err := k.Load(file.Provider(path), yaml.Parser()); err != nil {
			return Config{}, fmt.Errorf("configuration file %s: %w", path, err)
		}
	}
	err := k.Load(env.Provider(".", env.Opt{Prefix: "ORDERSAGA_", EnvironFunc: environ, TransformFunc: fromEnv}), nil)
	if err == nil && len(flags) > 0 {
		err = k.Load(confmap.Provider(flags, "."), nil)
	}
	if err != nil {
		return Config{}, fmt.Errorf("configuration: %w", err)
	}
	c := defaults
	if err := unmarshal(k, &c); err != nil {
		return Config{}, err
	}
	if err := c.readSecrets(); err != nil {
		return Config{}, err
	}
	return c, c.check()
}

func fromEnv(key, value string) (string, any) {
	if a, ok := aliases[key]; ok {
		return a, value
	}
	for _, n := range notSettings {
		if key == n || strings.HasSuffix(n, "_") && strings.HasPrefix(key, n) {
			return "", nil
		}
	}
	k := strings.ToLower(strings.TrimPrefix(key, "ORDERSAGA_"))
	return strings.ReplaceAll(k, "__", "."), value
}

func unmarshal(k *koanf.Koanf, c *Config) error {
	var md mapstructure.Metadata
	err := k.UnmarshalWithConf("", c, koanf.UnmarshalConf{Tag: "koanf", DecoderConfig: &mapstructure.DecoderConfig{
		TagName: "koanf", Result: c, WeaklyTypedInput: true, Metadata: &md, ZeroFields: true,
		DecodeHook: mapstructure.ComposeDecodeHookFunc(
			trimHook,
			mapstructure.StringToTimeDurationHookFunc(),
			mapstructure.StringToWeakSliceHookFunc(","), // the other one knows lists of strings only
		),
	}})
	if err != nil {
		// mapstructure lists what does not fit under a heading of its own, a line each.
		_, list, _ := strings.Cut(err.Error(), "\n\n")
		if list == "" {
			list = err.Error()
		}
		return fmt.Errorf("configuration: %s", strings.ReplaceAll(list, "\n", "; "))
	}
	if len(md.Unused) > 0 {
		sort.Strings(md.Unused)
		return fmt.Errorf("configuration: unknown setting %s (`ordersaga serve --print-config` lists all)", strings.Join(md.Unused, ", "))
	}
	return nil
}

func trimHook(_, _ reflect.Type, data any) (any, error) {
	if s, ok := data.(string); ok {
		return strings.TrimSpace(s), nil
	}
	return data, nil
}

func (c *Config) readSecrets() error {
	for _, s := range []struct {
		key, path string
		to        *string
	}{
		{"database.url", c.Database.URLFile, &c.Database.URL},
		{"kafka.sasl.password", c.Kafka.SASL.PasswordFile, &c.Kafka.SASL.Password},
		{"payment.api_key", c.Payment.APIKeyFile, &c.Payment.APIKey},
	} {
		if s.path == "" {
			continue
		}
		b, err := os.ReadFile(s.path)
		if err != nil {
			return fmt.Errorf("configuration: %s_file: %w", s.key, err)
		}
		*s.to = strings.TrimSpace(string(b))
	}
	return nil
}

func (c *Config) check() error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	for _, r := range c.Roles {
		if r != "all" && !slices.Contains(AllRoles, r) {
			bad("roles: unknown role %q: all, or some of %s", r, strings.Join(AllRoles, ", "))
		}
	}
	if len(c.Retry.Delays) == 0 || len(c.Retry.Delays) > 8 {
		bad("retry.delays: between 1 and 8 delays, not %d", len(c.Retry.Delays))
	}
	for i, d := range c.Retry.Delays {
		if d < 10*time.Millisecond || i > 0 && d <= c.Retry.Delays[i-1] {
			bad("retry.delays: each at least 10ms and longer than the one before, not %s", d)
		}
	}
	if (c.HTTP.TLS.CertFile == "") != (c.HTTP.TLS.KeyFile == "") {
		bad("http.tls: cert_file and key_file belong together")
	}
	if t := c.HTTP.TLS; t.Enabled && t.CertFile == "" {
		bad("http.tls: enabled, and there is no cert_file and key_file")
	} else if t.CAFile != "" || t.ServerName != "" {
		bad("http.tls: ca_file and server_name would be ignored: callers are known by their tokens")
	}
	if t := c.Kafka.TLS; !t.Enabled && t != (TLS{}) {
		bad("kafka.tls: set enabled too, or what it says would be ignored and the connection be in the clear")
	}
	if !slices.Contains(kafka.Compressions, c.Kafka.Compression) {
		bad("kafka.compression: %s, not %q", strings.Join(kafka.Compressions, ", "), c.Kafka.Compression)
	}
	if s := c.Kafka.Session; s < time.Second || s > time.Minute {
		bad("kafka.session_timeout: between 1s and 1m, not %s", s)
	}
	if !slices.Contains([]string{"debug", "info", "warn", "error"}, c.Log.Level) {
		bad("log.level: debug, info, warn or error, not %q", c.Log.Level)
	}
	if !slices.Contains([]string{"json", "console"}, c.Log.Format) {
		bad("log.format: json or console, not %q", c.Log.Format)
	}
	for key, n := range map[string]int64{
		"database.intake_conns": int64(c.Database.Intake), "database.consumer_conns": int64(c.Database.Consumers),
		"database.relay_conns": int64(c.Database.Relay), "database.operator_conns": int64(c.Database.Operators),
		"kafka.partitions": int64(c.Kafka.Partitions), "kafka.replication": int64(c.Kafka.Replication),
		"http.max_body_bytes": c.HTTP.MaxBody, "http.max_streams": int64(c.HTTP.MaxStreams), "http.burst_per_caller": int64(c.HTTP.Burst),
		"payment.concurrency": int64(c.Payment.Concurrency), "payment.burst": int64(c.Payment.Burst),
		"intake.workers": int64(c.Intake.Workers), "intake.max_batch": int64(c.Intake.MaxBatch), "intake.queue": int64(c.Intake.Queue),
		"consumers.max_batch": int64(c.Consumers.MaxBatch), "consumers.payment_batches": int64(c.Consumers.PaymentInflight),
	} {
		if n < 1 {
			bad("%s: at least 1, not %d", key, n)
		}
	}
	if c.Consumers.Gather < 0 || c.Consumers.Gather > time.Second {
		bad("consumers.gather: 0 to 1s, not %s; 10ms spares most of what there is to spare", c.Consumers.Gather)
	}
	if n := c.Database.Operators; n == 1 { // maintenance holds a lock on one and works on another (F23)
		bad("database.operator_conns: at least 2, not %d", n)
	}
	if len(errs) > 0 {
		return fmt.Errorf("configuration: %w", errors.Join(errs...))
	}
	return nil
}

// CheckServe refuses what only dev may do: be open to callers from elsewhere.
func (c *Config) CheckServe() error {
	if !c.HTTP.Open {
		return nil
	}
	host, _, err := net.SplitHostPort(c.HTTP.Addr)
	if ip, perr := netip.ParseAddr(host); err == nil && (host == "localhost" || perr == nil && ip.IsLoopback()) {
		return nil
	}
	return fmt.Errorf("configuration: http.open makes every caller an admin, so http.addr must be on loopback, such as 127.0.0.1:8080, not %q: set http.tokens_file instead", c.HTTP.Addr)
}

// Has reports whether the process has a role.
func (c *Config) Has(role string) bool {
	return slices.Contains(c.Roles, "all") || slices.Contains(c.Roles, role)
}

// Printable is the configuration as key → value, secrets masked.
func (c *Config) Printable() map[string]any { return printable(reflect.ValueOf(*c)) }

const mask = "••••"

func printable(v reflect.Value) map[string]any {
	out := map[string]any{}
	for i := range v.NumField() {
		f, x := v.Type().Field(i), v.Field(i)
		key := f.Tag.Get("koanf")
		switch {
		case key == "-":
		case f.Tag.Get("secret") == "url":
			out[key] = maskURL(x.String())
		case f.Tag.Get("secret") != "" && x.String() != "":
			out[key] = mask
		case x.Kind() == reflect.Struct:
			out[key] = printable(x)
		case f.Type == reflect.TypeFor[time.Duration]():
			out[key] = time.Duration(x.Int()).String()
		case f.Type == reflect.TypeFor[[]time.Duration]():
			ds := make([]string, x.Len())
			for j := range ds {
				ds[j] = time.Duration(x.Index(j).Int()).String()
			}
			out[key] = ds
		default:
			out[key] = x.Interface()
		}
	}
	return out
}

// maskURL hides the password of a connection string, in URL form or as key=value pairs.
func maskURL(s string) string {
	if u, err := url.Parse(s); err == nil && u.Scheme != "" {
		if _, has := u.User.Password(); has {
			u.User = url.UserPassword(u.User.Username(), "MASKED")
		}
		q := u.Query()
		for _, k := range []string{"password", "sslpassword"} {
			if q.Has(k) {
				q.Set(k, "MASKED")
			}
		}
		u.RawQuery = q.Encode()
		return u.String()
	}
	if strings.Contains(s, "password") {
		return mask
	}
	return s
}
