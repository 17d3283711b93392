//go:build unix

package kafka

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"math/big"
	"net"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"github.com/twmb/franz-go/pkg/kfake"
)

// certificate is a self-signed one for 127.0.0.1.
func certificate(t *testing.T) (tls.Certificate, *x509.CertPool) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "broker"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	require.NoError(t, err)
	parsed, err := x509.ParseCertificate(der)
	require.NoError(t, err)
	pool := x509.NewCertPool()
	pool.AddCert(parsed)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, pool
}

func TestTLSAndSASL(t *testing.T) {
	cert, pool := certificate(t)
	_, others := certificate(t)
	for _, mechanism := range []string{"plain", "scram-sha-256", "scram-sha-512"} {
		t.Run(mechanism, func(t *testing.T) {
			kinds := map[string]string{"plain": "PLAIN", "scram-sha-256": "SCRAM-SHA-256", "scram-sha-512": "SCRAM-SHA-512"}
			cluster, err := kfake.NewCluster(kfake.NumBrokers(1), kfake.TLS(&tls.Config{Certificates: []tls.Certificate{cert}}), kfake.EnableSASL(),
				kfake.User(kinds[mechanism], "ordersaga", "secret"))
			require.NoError(t, err)
			t.Cleanup(cluster.Close)
			trusted := func() (*tls.Config, error) { return &tls.Config{RootCAs: pool}, nil }
			ping := func(change func(*Config)) error {
				cfg := Config{Brokers: cluster.ListenAddrs(), TLS: trusted, SASL: SASL{Mechanism: mechanism, Username: "ordersaga", Password: "secret"}}
				change(&cfg)
				c, err := New(cfg)
				require.NoError(t, err)
				defer c.Close()
				ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
				defer cancel()
				return c.Ping(ctx)
			}
			hopeless := func(err error) {
				t.Helper()
				require.Error(t, err)
				var e *Error
				require.ErrorAs(t, err, &e)
				require.Empty(t, e.Outage(), "waiting does not mend it: %v", err)
			}
			require.NoError(t, ping(func(*Config) {}))
			require.Error(t, ping(func(c *Config) { c.SASL.Password = "guess" })) // this broker just hangs up, which may mean anything
			hopeless(ping(func(c *Config) { c.TLS = func() (*tls.Config, error) { return &tls.Config{RootCAs: others}, nil } }))
			hopeless(ping(func(c *Config) { c.TLS = nil }))

			// Certificates and passwords are asked for at each connection.
			var asked atomic.Int64
			require.NoError(t, ping(func(c *Config) {
				c.TLS = func() (*tls.Config, error) { asked.Add(1); return trusted() }
				c.SASL.Username, c.SASL.Password = "", ""
				c.SASL.Credentials = func(context.Context) (string, string, error) { asked.Add(1); return "ordersaga", "secret", nil }
			}))
			require.GreaterOrEqual(t, asked.Load(), int64(2))
			require.ErrorContains(t, ping(func(c *Config) {
				c.TLS = func() (*tls.Config, error) { return nil, errors.New("ca.pem: no such file") }
			}), "ca.pem")
		})
	}
}
