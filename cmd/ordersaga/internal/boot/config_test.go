package boot

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func environ(vs ...string) func() []string { return func() []string { return vs } }

func TestLaterSourcesWin(t *testing.T) {
	file := filepath.Join(t.TempDir(), "ordersaga.yaml")
	require.NoError(t, os.WriteFile(file, []byte("http:\n  addr: file:1\n  rate_per_caller: 7\nkafka:\n  brokers: [a:1, b:2]\nlog:\n  level: warn\n"), 0o600))
	c, err := Load(Defaults(), file, environ("ORDERSAGA_HTTP_ADDR=env:2", "ORDERSAGA_LOG__LEVEL=error", "HOME=/"), map[string]any{"http.addr": "flag:3"})
	require.NoError(t, err)
	require.Equal(t, "flag:3", c.HTTP.Addr, "flag over environment over file")
	require.Equal(t, "error", c.Log.Level, "environment over file")
	require.InDelta(t, 7, c.HTTP.Rate, 0, "file over defaults")
	require.Equal(t, []string{"a:1", "b:2"}, c.Kafka.Brokers)
	require.Equal(t, Defaults().Payment, c.Payment)
}

func TestListsInTheEnvironment(t *testing.T) {
	c, err := Load(Defaults(), "", environ("ORDERSAGA_RETRY__DELAYS=200ms, 1s,3s", "ORDERSAGA_KAFKA_BROKERS=a:1, b:2", "ORDERSAGA_ROLES=http,relay"), nil)
	require.NoError(t, err)
	require.Equal(t, []time.Duration{200 * time.Millisecond, time.Second, 3 * time.Second}, c.Retry.Delays)
	require.Equal(t, []string{"a:1", "b:2"}, c.Kafka.Brokers)
	require.True(t, c.Has(RoleRelay))
	require.False(t, c.Has(RoleStock))
}

func TestF23_MaintenanceNeedsAConnectionBesideItsLock(t *testing.T) {
	_, err := Load(Defaults(), "", environ("ORDERSAGA_DATABASE__OPERATOR_CONNS=1"), nil)
	require.ErrorContains(t, err, "database.operator_conns: at least 2")
}

func TestServeIsOpenOnLoopbackOnly(t *testing.T) {
	for addr, fine := range map[string]bool{
		"127.0.0.1:8080": true, "[::1]:8080": true, "localhost:80": true, ":8080": false, "0.0.0.0:80": false, "10.0.0.1:80": false, "shop.example:80": false, "": false,
	} {
		c := Defaults()
		c.HTTP.Addr, c.HTTP.Open = addr, true
		require.Equal(t, fine, c.CheckServe() == nil, "%q: %v", addr, c.CheckServe())
		c.HTTP.Open = false
		require.NoError(t, c.CheckServe(), addr)
	}
}

func TestWhatDoesNotFitIsNamedOnOneLine(t *testing.T) {
	_, err := Load(Defaults(), "", environ("ORDERSAGA_HTTP__MAX_BODY_BYTES=much", "ORDERSAGA_KAFKA__PARTITIONS=x"), nil)
	require.ErrorContains(t, err, "http.max_body_bytes")
	require.ErrorContains(t, err, "kafka.partitions")
	require.NotContains(t, err.Error(), "\n")
}

// TestPrintedConfigurationIsRead: what is printed is a file that gives the same settings.
func TestPrintedConfigurationIsRead(t *testing.T) {
	c := Defaults()
	c.Kafka.TopicPrefix, c.Retry.Delays, c.Roles = "x_", []time.Duration{time.Second, time.Minute}, []string{"http", "relay"}
	b, err := c.YAML()
	require.NoError(t, err)
	require.Contains(t, string(b), "# before every topic and group\n")
	file := filepath.Join(t.TempDir(), "printed.yaml")
	require.NoError(t, os.WriteFile(file, b, 0o600))
	got, err := Load(Defaults(), file, environ(), nil)
	require.NoError(t, err)
	require.Equal(t, c, got)

	c.Database.URL, c.Payment.APIKey, c.Kafka.SASL.Password = "postgres://u:hush@h/d", "hush", "hush"
	b, err = c.YAML()
	require.NoError(t, err)
	require.NotContains(t, string(b), "hush")
}

// TestTLSIsNeverHalfConfigured: what would be ignored in silence is refused.
func TestTLSIsNeverHalfConfigured(t *testing.T) {
	for set, want := range map[string]string{
		"ORDERSAGA_HTTP__TLS__ENABLED=true":        "no cert_file",
		"ORDERSAGA_HTTP__TLS__CERT_FILE=c.pem":     "belong together",
		"ORDERSAGA_HTTP__TLS__CA_FILE=ca.pem":      "would be ignored",
		"ORDERSAGA_KAFKA__TLS__CA_FILE=ca.pem":     "in the clear",
		"ORDERSAGA_KAFKA__TLS__SERVER_NAME=broker": "in the clear",
	} {
		_, err := Load(Defaults(), "", environ(set), nil)
		require.ErrorContains(t, err, want, set)
	}
	_, err := Load(Defaults(), "", environ("ORDERSAGA_KAFKA__TLS__ENABLED=true", "ORDERSAGA_KAFKA__TLS__CA_FILE=ca.pem"), nil)
	require.NoError(t, err)
}
