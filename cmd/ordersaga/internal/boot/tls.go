package boot

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

// certPoll is how often certificate files are read again. Their content is compared, not their times: so a rewrite in place, a rename
// over them and the symlink swap of a Kubernetes secret are all seen.
const certPoll = 5 * time.Second

// reportAt is the poll in a row that fails at which it is reported. A certificate and its key are two files, and whoever replaces them
// writes one first: the first poll that fails may have come between the two.
const reportAt = 2

// maxCertFile bounds a certificate or key file, in bytes: a bundle of every public authority has a quarter of it.
const maxCertFile = 1 << 20

// ServerTLS is TLS, 1.2 or newer, for a server whose certificate may change while it runs: new connections get the newest. If a new
// pair of files is broken, expired or does not fit together the old certificate stays in use, and report hears of it once (also when
// a new one was taken: err is nil). report may be nil. stop ends the watching and waits for it.
func ServerTLS(certFile, keyFile string, report func(error)) (cfg *tls.Config, stop func(), err error) {
	if certFile == "" || keyFile == "" {
		return nil, nil, errors.New("tls: a server needs a certificate file and a key file")
	}
	cert := &watchedFiles[tls.Certificate]{names: []string{certFile, keyFile}, parse: keyPair, report: report}
	if err := cert.load(); err != nil {
		return nil, nil, err
	}
	return &tls.Config{
		MinVersion:     tls.VersionTLS12,
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return cert.current.Load(), nil },
	}, pollFiles(certPoll, cert.poll), nil
}

// ClientTLS is TLS, 1.2 or newer, for connections to a server. caFile names whom to trust (empty: the system's authorities, read once);
// certFile and keyFile are our own certificate, if the server wants one; serverName is the name that the server's certificate must have
// (empty: the host that is dialled; with a caFile and a host that is an IP address it must be given). Files are read again as by ServerTLS.
func ClientTLS(caFile, certFile, keyFile, serverName string, report func(error)) (cfg *tls.Config, stop func(), err error) {
	if (certFile == "") != (keyFile == "") {
		return nil, nil, errors.New("tls: a client's certificate file and key file belong together")
	}
	cfg = &tls.Config{MinVersion: tls.VersionTLS12, ServerName: serverName}
	var polls []func()
	if caFile != "" {
		roots := &watchedFiles[x509.CertPool]{names: []string{caFile}, parse: authorities, report: report}
		if err := roots.load(); err != nil {
			return nil, nil, err
		}
		polls = append(polls, roots.poll)
		// The package tls verifies against a pool that can't be replaced. So its verification is off and ours, which is the same with
		// the pool of now, takes its place: VerifyConnection is called on every handshake, resumed ones included.
		cfg.InsecureSkipVerify = true
		cfg.VerifyConnection = func(cs tls.ConnectionState) error { return verify(cs, serverName, roots.current.Load()) }
	}
	if certFile != "" {
		cert := &watchedFiles[tls.Certificate]{names: []string{certFile, keyFile}, parse: keyPair, report: report}
		if err := cert.load(); err != nil {
			return nil, nil, err
		}
		polls = append(polls, cert.poll)
		cfg.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return cert.current.Load(), nil }
	}
	return cfg, pollFiles(certPoll, polls...), nil
}

func verify(cs tls.ConnectionState, name string, roots *x509.CertPool) error {
	if name == "" {
		name = cs.ServerName
	}
	if name == "" { // tls does not say which address was dialled: what can't be checked is refused
		return errors.New("tls: the server was dialled by IP address: set server_name to a name or address in its certificate")
	}
	if len(cs.PeerCertificates) == 0 {
		return errors.New("tls: the server sent no certificate")
	}
	others := x509.NewCertPool()
	for _, c := range cs.PeerCertificates[1:] {
		others.AddCert(c)
	}
	if _, err := cs.PeerCertificates[0].Verify(x509.VerifyOptions{DNSName: name, Roots: roots, Intermediates: others}); err != nil {
		return fmt.Errorf("tls: %w", err)
	}
	return nil
}

func keyPair(content [][]byte) (*tls.Certificate, error) {
	c, err := tls.X509KeyPair(content[0], content[1])
	if err != nil {
		return nil, fmt.Errorf("certificate and key: %w", err)
	}
	if now := time.Now(); now.After(c.Leaf.NotAfter) {
		return nil, fmt.Errorf("the certificate expired on %s", c.Leaf.NotAfter.UTC().Format(time.RFC3339))
	}
	return &c, nil
}

func authorities(content [][]byte) (*x509.CertPool, error) {
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(content[0]) {
		return nil, errors.New("no certificate in PEM form in it")
	}
	return pool, nil
}

// watchedFiles is what some files hold, as of the last time that they could be read and made sense together.
type watchedFiles[T any] struct {
	names   []string
	parse   func(content [][]byte) (*T, error)
	report  func(error)
	current atomic.Pointer[T]

	content  [][]byte // what current was made of
	failures int      // polls in a row
}

// load reads the files for the first time.
func (w *watchedFiles[T]) load() error {
	content, err := w.read()
	if err == nil {
		err = w.take(content)
	}
	if err != nil {
		return fmt.Errorf("tls: %s: %w", w.names[0], err)
	}
	return nil
}

// poll takes what changed.
func (w *watchedFiles[T]) poll() {
	content, err := w.read()
	if err == nil {
		if w.same(content) {
			w.failures = 0
			return
		}
		err = w.take(content)
	}
	if err == nil {
		w.failures = 0
		return
	}
	if w.failures++; w.failures == reportAt && w.report != nil {
		w.report(fmt.Errorf("tls: %s: %w; the one in use stays in use", w.names[0], err))
	}
}

func (w *watchedFiles[T]) take(content [][]byte) error {
	v, err := w.parse(content)
	if err != nil {
		return err
	}
	w.current.Store(v)
	w.content = content
	return nil
}

func (w *watchedFiles[T]) read() ([][]byte, error) {
	content := make([][]byte, len(w.names))
	for i, name := range w.names {
		info, err := os.Stat(name)
		if err != nil {
			return nil, err
		}
		if !info.Mode().IsRegular() || info.Size() > maxCertFile {
			return nil, fmt.Errorf("%s is no file of at most %d bytes", name, maxCertFile)
		}
		if content[i], err = os.ReadFile(name); err != nil {
			return nil, err
		}
	}
	return content, nil
}

func (w *watchedFiles[T]) same(content [][]byte) bool {
	for i := range content {
		if !bytes.Equal(content[i], w.content[i]) {
			return false
		}
	}
	return true
}

// pollFiles calls the polls until stop is called, which waits.
func pollFiles(every time.Duration, polls ...func()) (stop func()) {
	done := make(chan struct{})
	var wg sync.WaitGroup
	if len(polls) > 0 {
		wg.Go(func() {
			t := time.NewTicker(every)
			defer t.Stop()
			for {
				select {
				case <-t.C:
				case <-done:
					return
				}
				for _, poll := range polls {
					poll()
				}
			}
		})
	}
	return sync.OnceFunc(func() {
		close(done)
		wg.Wait()
	})
}
