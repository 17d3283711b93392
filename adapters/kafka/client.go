package kafka

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"time"

	"github.com/twmb/franz-go/pkg/kadm"
	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/sasl"
	"github.com/twmb/franz-go/pkg/sasl/oauth"
	"github.com/twmb/franz-go/pkg/sasl/plain"
	"github.com/twmb/franz-go/pkg/sasl/scram"

	"ordersaga/events"
)

// Config is how Kafka is reached, and how this process presents itself.
type Config struct {
	Brokers  []string // host:port
	Names    events.Names
	ClientID string // in the brokers' logs and quotas; empty: ordersaga
	// InstanceID makes the membership of this process in its groups static: after a restart it gets its partitions back without a
	// rebalance, and while it is away nobody else gets them before Session has passed. No two processes may share one.
	InstanceID string
	Session    time.Duration // how long a silent member keeps its partitions, 6s to 10s; 0 means DefaultSession
	Rack       string        // of this process, for brokers that let the nearest replica be read
	// TLS answers the settings of a new connection, so that certificates may change while the process runs; nil: no TLS. An empty
	// ServerName becomes the broker's host.
	TLS  func() (*tls.Config, error)
	SASL SASL
	// Discover is how soon new partitions of a topic are noticed; 0 means DefaultDiscover.
	Discover time.Duration
	Options  []kgo.Opt // hooks and logger, for every client
	Observer Observer  // nil: nobody hears
}

// SASL is how we prove who we are.
type SASL struct {
	Mechanism string // plain, scram-sha-256, scram-sha-512 or oauthbearer; empty: none
	Username  string
	Password  string
	// Credentials, if set, is asked at each connection instead, so that a password may change.
	Credentials func(ctx context.Context) (username, password string, err error)
	Token       func(ctx context.Context) (token string, err error) // oauthbearer
}

// Defaults of Config, and the bounds of a session.
const (
	DefaultSession  = 8 * time.Second
	DefaultDiscover = 30 * time.Second
	defaultClientID = "ordersaga"
	minSession      = time.Second // what a test's broker takes; Kafka's own minimum is 6s unless configured otherwise
	maxSession      = time.Minute
	dialTimeout     = 5 * time.Second
	callTimeout     = 10 * time.Second // of one administrative call
)

// Observer hears what the adapter meets, for metrics and logs. Its methods are called from many goroutines and must not block.
type Observer interface {
	// KafkaProblem is an error that is being dealt with: part says where, such as "group stock".
	KafkaProblem(part string, err error)
	// KafkaAssigned says how many partitions a member holds now.
	KafkaAssigned(group string, partitions int)
	// KafkaBuffered says how many fetched records a member holds, and how many of its partitions are paused because they have enough.
	KafkaBuffered(group string, records, paused int)
	// KafkaLag says how many records of a partition a group has not settled.
	KafkaLag(group, topic string, partition int32, records int64)
}

type quiet struct{}

func (quiet) KafkaProblem(string, error)            {}
func (quiet) KafkaAssigned(string, int)             {}
func (quiet) KafkaBuffered(string, int, int)        {}
func (quiet) KafkaLag(string, string, int32, int64) {}

// Error is an error of a call to Kafka. With Outage the broker is away, which time may mend; without, it says what to change.
type Error struct {
	Op   string
	Err  error
	away bool
}

func (e *Error) Error() string { return "kafka: " + e.Op + ": " + e.Err.Error() }
func (e *Error) Unwrap() error { return e.Err }

// Outage names Kafka if it is away, else nothing.
func (e *Error) Outage() string {
	if e.away {
		return "kafka"
	}
	return ""
}

func wrong(op string, err error) error {
	if err == nil {
		return nil
	}
	return &Error{Op: op, Err: err, away: isAway(err)}
}

// isAway tells a broker that cannot be reached, or is not ready, from one that refuses us.
func isAway(err error) bool {
	var first *kgo.ErrFirstReadEOF
	var dns *net.DNSError
	switch {
	case errors.As(err, &first): // TLS or SASL do not fit
		return false
	case errors.As(err, &dns) && dns.IsNotFound:
		return false
	case errors.Is(err, kerr.SaslAuthenticationFailed), errors.Is(err, kerr.UnsupportedSaslMechanism):
		return false
	}
	var broker *kerr.Error
	if errors.As(err, &broker) {
		return broker.Retriable
	}
	var certificate *tls.CertificateVerificationError
	return !errors.As(err, &certificate)
}

// Client makes sources and producers, and holds one connection of its own for administration.
type Client struct {
	cfg Config
	cl  *kgo.Client
	adm *kadm.Client
}

// New checks the configuration; it connects to nothing yet.
func New(cfg Config) (*Client, error) {
	if cfg.Session == 0 {
		cfg.Session = DefaultSession
	}
	if cfg.Discover <= 0 {
		cfg.Discover = DefaultDiscover
	}
	if cfg.ClientID == "" {
		cfg.ClientID = defaultClientID
	}
	if cfg.Observer == nil {
		cfg.Observer = quiet{}
	}
	cfg.Brokers = slices.DeleteFunc(slices.Clone(cfg.Brokers), func(b string) bool { return strings.TrimSpace(b) == "" })
	if len(cfg.Brokers) == 0 {
		return nil, errors.New("kafka: no brokers: set ORDERSAGA_KAFKA_BROKERS to host:port, several with commas between them")
	}
	if cfg.Session < minSession || cfg.Session > maxSession {
		return nil, fmt.Errorf("kafka: session %s is not between %s and %s; 6s to 10s suit most", cfg.Session, minSession, maxSession)
	}
	if err := checkName("prefix", cfg.Names.Prefix, true); err != nil {
		return nil, err
	}
	if _, err := cfg.SASL.mechanism(); err != nil {
		return nil, err
	}
	c := &Client{cfg: cfg}
	var err error
	if c.cl, err = c.client(); err != nil {
		return nil, err
	}
	c.adm = kadm.NewClient(c.cl)
	return c, nil
}

// checkName holds names to what Kafka takes: the in-process broker takes anything, and would hide it.
func checkName(what, name string, empty bool) error {
	const limit = 249
	if name == "" && empty {
		return nil
	}
	ok := name != "" && len(name) <= limit && name != "." && name != ".."
	for _, r := range name {
		ok = ok && (r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '.' || r == '_' || r == '-')
	}
	if !ok {
		return fmt.Errorf("kafka: %s %q: Kafka takes letters, digits, dot, underscore and hyphen, at most %d of them", what, name, limit)
	}
	return nil
}

// Close closes the connection for administration. Sources and producers end by themselves.
func (c *Client) Close() { c.cl.Close() }

// client makes a franz-go client with what all have in common.
func (c *Client) client(opts ...kgo.Opt) (*kgo.Client, error) {
	base := []kgo.Opt{
		kgo.SeedBrokers(c.cfg.Brokers...),
		kgo.ClientID(c.cfg.ClientID),
		kgo.SoftwareNameAndVersion("ordersaga", "1"),
		kgo.MetadataMaxAge(c.cfg.Discover),
		kgo.MetadataMinAge(min(c.cfg.Discover, time.Second)),
		kgo.DisableClientMetrics(), // ours are exported by the process itself
		kgo.Dialer(c.dial),
	}
	mechanism, err := c.cfg.SASL.mechanism()
	if err != nil {
		return nil, err
	}
	if mechanism != nil {
		base = append(base, kgo.SASL(mechanism))
	}
	if c.cfg.Rack != "" {
		base = append(base, kgo.Rack(c.cfg.Rack))
	}
	cl, err := kgo.NewClient(slices.Concat(base, c.cfg.Options, opts)...)
	if err != nil {
		return nil, fmt.Errorf("kafka: %w", err)
	}
	return cl, nil
}

func (c *Client) dial(ctx context.Context, network, address string) (net.Conn, error) {
	d := net.Dialer{Timeout: dialTimeout}
	if c.cfg.TLS == nil {
		return d.DialContext(ctx, network, address)
	}
	cfg, err := c.cfg.TLS()
	if err != nil {
		return nil, fmt.Errorf("tls settings: %w", err)
	}
	cfg = cfg.Clone()
	if cfg.ServerName == "" {
		if cfg.ServerName, _, err = net.SplitHostPort(address); err != nil {
			return nil, fmt.Errorf("broker address %q: %w", address, err)
		}
	}
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	return (&tls.Dialer{NetDialer: &d, Config: cfg}).DialContext(ctx, network, address)
}

func (s SASL) fixed(ctx context.Context) (username, password string, err error) {
	return s.Username, s.Password, ctx.Err()
}

func (s SASL) mechanism() (sasl.Mechanism, error) {
	credentials := s.Credentials
	if credentials == nil {
		credentials = s.fixed
	}
	if s.Mechanism != "" && s.Mechanism != "oauthbearer" && s.Credentials == nil && (s.Username == "" || s.Password == "") {
		return nil, fmt.Errorf("kafka: sasl %s needs a username and a password", s.Mechanism)
	}
	scrams := func(ctx context.Context) (scram.Auth, error) {
		user, pass, err := credentials(ctx)
		return scram.Auth{User: user, Pass: pass}, err
	}
	switch strings.ToLower(s.Mechanism) {
	case "":
		return nil, nil //nolint:nilnil // no mechanism is a setting too
	case "plain":
		return plain.Plain(func(ctx context.Context) (plain.Auth, error) {
			user, pass, err := credentials(ctx)
			return plain.Auth{User: user, Pass: pass}, err
		}), nil
	case "scram-sha-256":
		return scram.Sha256(scrams), nil
	case "scram-sha-512":
		return scram.Sha512(scrams), nil
	case "oauthbearer":
		if s.Token == nil {
			return nil, errors.New("kafka: sasl oauthbearer needs a source of tokens")
		}
		return oauth.Oauth(func(ctx context.Context) (oauth.Auth, error) {
			token, err := s.Token(ctx)
			return oauth.Auth{Token: token}, err
		}), nil
	default:
		return nil, fmt.Errorf("kafka: unknown sasl mechanism %q: plain, scram-sha-256, scram-sha-512 or oauthbearer", s.Mechanism)
	}
}

// Ping asks a broker for an answer. Its error answers Outage() if that may come with time.
func (c *Client) Ping(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	return wrong("ask the brokers "+strings.Join(c.cfg.Brokers, ","), c.cl.Ping(ctx))
}
