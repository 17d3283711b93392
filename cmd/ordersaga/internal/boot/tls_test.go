package boot

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

// authority signs certificates.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pem  []byte
}

var serial int64

func newAuthority(t *testing.T, name string) *authority {
	t.Helper()
	a := &authority{}
	var err error
	a.key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	tpl := template(name)
	tpl.IsCA, tpl.BasicConstraintsValid, tpl.KeyUsage = true, true, x509.KeyUsageCertSign
	der, err := x509.CreateCertificate(rand.Reader, tpl, tpl, &a.key.PublicKey, a.key)
	require.NoError(t, err)
	a.cert, err = x509.ParseCertificate(der)
	require.NoError(t, err)
	a.pem = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	return a
}

func template(name string) *x509.Certificate {
	serial++
	return &x509.Certificate{
		SerialNumber: big.NewInt(serial), Subject: pkix.Name{CommonName: name},
		// The clock of synctest stands in the year 2000.
		NotBefore: time.Date(1999, 1, 1, 0, 0, 0, 0, time.UTC), NotAfter: time.Now().AddDate(60, 0, 0),
	}
}

// issue answers a certificate for localhost and 127.0.0.1, and its key.
func (a *authority) issue(t *testing.T, name string, change ...func(*x509.Certificate)) (cert, key []byte) {
	t.Helper()
	tpl := template(name)
	tpl.DNSNames, tpl.IPAddresses = []string{"localhost"}, []net.IP{net.IPv4(127, 0, 0, 1)}
	tpl.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
	for _, c := range change {
		c(tpl)
	}
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	der, err := x509.CreateCertificate(rand.Reader, tpl, a.cert, &k.PublicKey, a.key)
	require.NoError(t, err)
	kd, err := x509.MarshalPKCS8PrivateKey(k)
	require.NoError(t, err)
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: kd})
}

func put(t *testing.T, path string, content []byte) {
	t.Helper()
	require.NoError(t, os.WriteFile(path, content, 0o600))
}

// reports collects what is reported.
type reports struct{ got []error }

func (r *reports) add(err error) { r.got = append(r.got, err) }

func served(t *testing.T, cfg *tls.Config) string {
	t.Helper()
	c, err := cfg.GetCertificate(nil)
	require.NoError(t, err)
	return c.Leaf.Subject.CommonName
}

func TestServerCertificateIsReplacedWhileRunning(t *testing.T) {
	dir := t.TempDir()
	certFile, keyFile := filepath.Join(dir, "tls.crt"), filepath.Join(dir, "tls.key")
	a := newAuthority(t, "ca")
	c1, k1 := a.issue(t, "one")
	c2, k2 := a.issue(t, "two")
	c3, k3 := a.issue(t, "three")
	old, oldKey := a.issue(t, "old", func(c *x509.Certificate) { c.NotAfter = time.Date(1999, 6, 1, 0, 0, 0, 0, time.UTC) })
	synctest.Test(t, func(t *testing.T) {
		put(t, certFile, c1)
		put(t, keyFile, k1)
		var r reports
		cfg, stop, err := ServerTLS(certFile, keyFile, r.add)
		require.NoError(t, err)
		defer stop()
		polled := func() {
			time.Sleep(certPoll) //nolint:forbidigo // synctest's clock
			synctest.Wait()
		}
		require.Equal(t, "one", served(t, cfg))
		polled()
		require.Empty(t, r.got, "nothing changed")

		put(t, certFile, c2)
		polled()
		require.Equal(t, "one", served(t, cfg), "half of a pair")
		put(t, keyFile, k2)
		polled()
		require.Equal(t, "two", served(t, cfg))
		require.Empty(t, r.got, "a pair half written between two polls is no failure")

		put(t, certFile, []byte("garbage"))
		for range 5 {
			polled()
		}
		require.Equal(t, "two", served(t, cfg))
		require.Len(t, r.got, 1, "reported once")
		require.ErrorContains(t, r.got[0], "tls.crt")
		require.ErrorContains(t, r.got[0], "stays in use")

		r.got = nil
		require.NoError(t, os.Remove(certFile))
		polled()
		put(t, certFile, old)
		put(t, keyFile, oldKey)
		polled()
		require.Equal(t, "two", served(t, cfg), "an expired one is no replacement")
		require.Empty(t, r.got, "it is broken since before, which was reported")

		put(t, certFile, c3)
		put(t, keyFile, k3)
		polled()
		require.Equal(t, "three", served(t, cfg))
		require.Empty(t, r.got)
	})
}

func TestSymlinksOfKubernetesSecretsAreFollowed(t *testing.T) {
	dir := t.TempDir()
	a := newAuthority(t, "ca")
	for _, v := range []string{"v1", "v2"} {
		require.NoError(t, os.Mkdir(filepath.Join(dir, v), 0o700))
		c, k := a.issue(t, v)
		put(t, filepath.Join(dir, v, "tls.crt"), c)
		put(t, filepath.Join(dir, v, "tls.key"), k)
	}
	data := filepath.Join(dir, "..data")
	require.NoError(t, os.Symlink("v1", data))
	for _, f := range []string{"tls.crt", "tls.key"} {
		require.NoError(t, os.Symlink(filepath.Join("..data", f), filepath.Join(dir, f)))
	}
	synctest.Test(t, func(t *testing.T) {
		cfg, stop, err := ServerTLS(filepath.Join(dir, "tls.crt"), filepath.Join(dir, "tls.key"), nil)
		require.NoError(t, err)
		defer stop()
		require.Equal(t, "v1", served(t, cfg))
		require.NoError(t, os.Symlink("v2", data+"_tmp"))
		require.NoError(t, os.Rename(data+"_tmp", data))
		time.Sleep(certPoll) //nolint:forbidigo // synctest's clock
		synctest.Wait()
		require.Equal(t, "v2", served(t, cfg))
	})
}

func TestTLSFilesAreCheckedAtTheStart(t *testing.T) {
	dir := t.TempDir()
	at := func(name string, content []byte) string {
		p := filepath.Join(dir, name)
		put(t, p, content)
		return p
	}
	a := newAuthority(t, "ca")
	c1, k1 := a.issue(t, "one")
	_, k2 := a.issue(t, "two")
	past, pastKey := a.issue(t, "past", func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Hour) })
	cert, key, other := at("c", c1), at("k", k1), at("k2", k2)
	expired, expiredKey := at("e", past), at("ek", pastKey)
	for name, tc := range map[string]struct {
		cert, key, want string
	}{
		"no files":  {"", "", "needs a certificate file and a key file"},
		"missing":   {filepath.Join(dir, "none"), key, "no such file"},
		"no match":  {cert, other, "does not match"},
		"swapped":   {key, cert, "certificate and key"},
		"expired":   {expired, expiredKey, "expired on"},
		"directory": {dir, key, "is no file"},
	} {
		t.Run(name, func(t *testing.T) {
			_, _, err := ServerTLS(tc.cert, tc.key, nil)
			require.ErrorContains(t, err, tc.want)
		})
	}
	_, _, err := ClientTLS("", cert, "", "", nil)
	require.ErrorContains(t, err, "belong together")
	_, _, err = ClientTLS(key, "", "", "", nil)
	require.ErrorContains(t, err, "no certificate in PEM form")
	_, _, err = ClientTLS("", cert, other, "", nil)
	require.ErrorContains(t, err, "does not match")
}

// shake makes a connection between a server and a client and answers the client's error.
func shake(t *testing.T, server, client *tls.Config) error {
	t.Helper()
	ln, err := tls.Listen("tcp", "127.0.0.1:0", server)
	require.NoError(t, err)
	done := make(chan struct{})
	go func() {
		defer close(done)
		c, err := ln.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		_, _ = io.WriteString(c, "hello") // the handshake, and in TLS 1.3 the client's certificate, with it
	}()
	d := tls.Dialer{Config: client}
	c, err := d.DialContext(context.Background(), "tcp", ln.Addr().String())
	if err == nil {
		b := make([]byte, 5)
		_, err = io.ReadFull(c, b)
		err = errors.Join(err, c.Close())
	}
	require.NoError(t, ln.Close())
	<-done
	return err
}

func TestClientTrustsWhomTheFileNamesNow(t *testing.T) {
	dir := t.TempDir()
	a, b := newAuthority(t, "a"), newAuthority(t, "b")
	serverOf := func(ca *authority, change ...func(*x509.Certificate)) *tls.Config {
		c, k := ca.issue(t, "server", change...)
		pair, err := tls.X509KeyPair(c, k)
		require.NoError(t, err)
		return &tls.Config{Certificates: []tls.Certificate{pair}, MinVersion: tls.VersionTLS12}
	}
	caFile := filepath.Join(dir, "ca.pem")
	put(t, caFile, a.pem)

	roots := &watchedFiles[x509.CertPool]{names: []string{caFile}, parse: authorities}
	require.NoError(t, roots.load())
	cfg, stop, err := ClientTLS(caFile, "", "", "localhost", nil)
	require.NoError(t, err)
	defer stop()
	require.NoError(t, shake(t, serverOf(a), cfg))
	require.ErrorContains(t, shake(t, serverOf(b), cfg), "unknown authority")
	require.ErrorContains(t, shake(t, serverOf(a, func(c *x509.Certificate) { c.DNSNames = []string{"elsewhere"} }), cfg), "elsewhere")
	require.ErrorContains(t, shake(t, serverOf(a, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Hour) }), cfg), "expired")
	require.ErrorContains(t, shake(t, serverOf(a, func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth} }), cfg), "usage")
	old := serverOf(a)
	old.MinVersion, old.MaxVersion = tls.VersionTLS10, tls.VersionTLS11
	require.ErrorContains(t, shake(t, old, cfg), "protocol version")

	byIP, stopIP, err := ClientTLS(caFile, "", "", "", nil)
	require.NoError(t, err)
	defer stopIP()
	require.ErrorContains(t, shake(t, serverOf(a), byIP), "set server_name")
	ip, stopNamed, err := ClientTLS(caFile, "", "", "127.0.0.1", nil)
	require.NoError(t, err)
	defer stopNamed()
	require.NoError(t, shake(t, serverOf(a), ip))

	// What happens at a poll, without waiting for one.
	verifyNow := func(server *tls.Config) error {
		c := &tls.Config{ServerName: "localhost", InsecureSkipVerify: true, MinVersion: tls.VersionTLS12, VerifyConnection: func(cs tls.ConnectionState) error {
			return verify(cs, "", roots.current.Load())
		}}
		return shake(t, server, c)
	}
	require.NoError(t, verifyNow(serverOf(a)))
	put(t, caFile, b.pem)
	roots.poll()
	require.NoError(t, verifyNow(serverOf(b)))
	require.ErrorContains(t, verifyNow(serverOf(a)), "unknown authority")
}

func TestClientShowsItsCertificate(t *testing.T) {
	dir := t.TempDir()
	a := newAuthority(t, "a")
	files := map[string]string{}
	for _, n := range []string{"ca", "sc", "sk", "cc", "ck"} {
		files[n] = filepath.Join(dir, n)
	}
	sc, sk := a.issue(t, "server")
	cc, ck := a.issue(t, "client")
	for n, b := range map[string][]byte{"ca": a.pem, "sc": sc, "sk": sk, "cc": cc, "ck": ck} {
		put(t, files[n], b)
	}
	server, stopServer, err := ServerTLS(files["sc"], files["sk"], nil)
	require.NoError(t, err)
	defer stopServer()
	server.ClientAuth = tls.RequireAndVerifyClientCert
	server.ClientCAs = x509.NewCertPool()
	server.ClientCAs.AddCert(a.cert)
	client, stop, err := ClientTLS(files["ca"], files["cc"], files["ck"], "localhost", nil)
	require.NoError(t, err)
	defer stop()
	require.NoError(t, shake(t, server, client))
	bare, stopBare, err := ClientTLS(files["ca"], "", "", "localhost", nil)
	require.NoError(t, err)
	defer stopBare()
	require.Error(t, shake(t, server, bare))
}

// The server of the program: net/http, which clones the configuration and adds HTTP/2 to it.
func TestHTTPServerTakesTheConfiguration(t *testing.T) {
	dir := t.TempDir()
	a := newAuthority(t, "a")
	c, k := a.issue(t, "server")
	certFile, keyFile, caFile := filepath.Join(dir, "c"), filepath.Join(dir, "k"), filepath.Join(dir, "ca")
	put(t, certFile, c)
	put(t, keyFile, k)
	put(t, caFile, a.pem)
	cfg, stop, err := ServerTLS(certFile, keyFile, nil)
	require.NoError(t, err)
	defer stop()
	srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { _, _ = io.WriteString(w, r.Proto) }))
	srv.Config.TLSConfig = cfg
	srv.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelDebug)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	served := make(chan error, 1)
	go func() { served <- srv.Config.ServeTLS(ln, "", "") }()
	client, stopClient, err := ClientTLS(caFile, "", "", "localhost", nil)
	require.NoError(t, err)
	defer stopClient()
	tr := &http.Transport{TLSClientConfig: client, ForceAttemptHTTP2: true}
	defer tr.CloseIdleConnections()
	req, err := http.NewRequestWithContext(context.Background(), http.MethodGet, "https://"+ln.Addr().String(), http.NoBody)
	require.NoError(t, err)
	resp, err := tr.RoundTrip(req)
	require.NoError(t, err)
	b, err := io.ReadAll(resp.Body)
	require.NoError(t, err)
	require.NoError(t, resp.Body.Close())
	require.Equal(t, "HTTP/2.0", string(b))
	require.NoError(t, srv.Config.Close())
	require.ErrorIs(t, <-served, http.ErrServerClosed)
	require.NoError(t, srv.Listener.Close())
}
