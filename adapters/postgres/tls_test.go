package postgres

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func TestCertificatesAreReadForEachConnection(t *testing.T) {
	file := filepath.Join(t.TempDir(), "ca.pem")
	writeAuthority := func(name string) {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		require.NoError(t, err)
		template := &x509.Certificate{
			SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, NotAfter: time.Now().Add(time.Hour),
			IsCA: true, BasicConstraintsValid: true,
		}
		der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
		require.NoError(t, err)
		require.NoError(t, os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600))
	}
	writeAuthority("first")
	db := &DB{cfg: Config{URL: "postgres://u:secret@db.invalid/x?sslmode=verify-full&sslrootcert=" + file}.withDefaults()}
	pc, err := db.poolConfig(Intake)
	require.NoError(t, err)
	first := pc.ConnConfig.TLSConfig.RootCAs

	writeAuthority("second")
	cc := pc.ConnConfig.Copy()
	require.NoError(t, pc.BeforeConnect(t.Context(), cc))
	require.False(t, first.Equal(cc.TLSConfig.RootCAs), "the new authority must be trusted, not the old one")

	require.NoError(t, os.Remove(file))
	err = pc.BeforeConnect(t.Context(), pc.ConnConfig.Copy())
	require.Error(t, err)
	require.NotContains(t, err.Error(), "secret")
}
