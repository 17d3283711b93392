package events

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/proto"
)

// Golden files are what was once sent, or may lie in a topic, a table or a backup: they are never edited, and every later version
// reads them. -update writes those that are missing, and nothing else.
var update = flag.Bool("update", false, "write golden files that are missing")

const goldenDir = "testdata/golden"

// sums lists the SHA-256 of every golden file, so that an edited one does not pass by chance together with an edited codec.
const sums = "SHA256SUMS"

func golden(t *testing.T, name string, fresh []byte) []byte {
	t.Helper()
	path := filepath.Join(goldenDir, name)
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) && *update {
		require.NoError(t, os.WriteFile(path, fresh, 0o644))
		f, err := os.OpenFile(filepath.Join(goldenDir, sums), os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o644)
		require.NoError(t, err)
		sum := sha256.Sum256(fresh)
		_, err = fmt.Fprintf(f, "%s  %s\n", hex.EncodeToString(sum[:]), name)
		require.NoError(t, errors.Join(err, f.Close()))
		return fresh
	}
	require.NoError(t, err, "write missing golden files with: go test ./events -run Golden -update")
	return b
}

func ext(f Format) string {
	if f == Protobuf {
		return ".bin"
	}
	return ".json"
}

func headersText(h []Header) []byte {
	var b bytes.Buffer
	for _, x := range h {
		fmt.Fprintf(&b, "%s: %s\n", x.Key, x.Value)
	}
	return b.Bytes()
}

func parseHeadersText(t *testing.T, b []byte) []Header {
	t.Helper()
	var out []Header
	for line := range strings.Lines(string(b)) {
		k, v, ok := strings.Cut(strings.TrimSuffix(line, "\n"), ": ")
		require.True(t, ok, line)
		out = append(out, Header{k, []byte(v)})
	}
	return out
}

func requireEnvelope(t *testing.T, want, got Envelope) {
	t.Helper()
	if m, ok := want.Data.(proto.Message); ok {
		g := as[proto.Message](t, got.Data)
		require.True(t, proto.Equal(m, g), "want %v, got %v", m, g)
		want.Data, got.Data = nil, nil
	}
	require.Equal(t, want, got)
}

// TestF19_GoldenRecordsAreReadForEver: what any version wrote, in each format it may come in, this version reads to the same message.
func TestF19_GoldenRecordsAreReadForEver(t *testing.T) {
	require.Len(t, samples(), len(Types), "every type needs a sample")
	for _, s := range samples() {
		t.Run(s.file, func(t *testing.T) {
			typ, ok := TypeOf(s.env.Type)
			require.True(t, ok)
			payload, err := Encode(s.env)
			require.NoError(t, err)
			file := golden(t, s.file+ext(typ.Format), payload)
			require.Equal(t, string(file), string(payload), "what is written changed: add a sample and a file of its own, leave this one")

			head := golden(t, s.file+".headers", headersText(HeadersOf(s.env)))
			require.Equal(t, string(head), string(headersText(HeadersOf(s.env))))

			r := &Record{Topic: typ.Topic, Key: []byte(testOrder.String()), Value: file, Headers: parseHeadersText(t, head)}
			got, err := Decode(r)
			require.NoError(t, err)
			requireEnvelope(t, s.env, got)

			if m := protoCommand(s.env.Type); m != nil {
				fresh, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
				require.NoError(t, err)
				r.Value = golden(t, s.file+".bin", fresh)
				for i := range r.Headers {
					if r.Headers[i].Key == HeaderContentType {
						r.Headers[i].Value = []byte(ContentProtobuf)
					}
				}
				got, err := Decode(r)
				require.NoError(t, err)
				requireEnvelope(t, s.env, got)
			}
		})
	}
}

func TestGoldenFilesAreNeverEdited(t *testing.T) {
	f, err := os.Open(filepath.Join(goldenDir, sums))
	require.NoError(t, err)
	defer func() { require.NoError(t, f.Close()) }()
	listed := map[string]string{}
	for sc := bufio.NewScanner(f); sc.Scan(); {
		sum, name, ok := strings.Cut(sc.Text(), "  ")
		require.True(t, ok, sc.Text())
		require.NotContains(t, listed, name, "listed twice")
		listed[name] = sum
	}
	entries, err := os.ReadDir(goldenDir)
	require.NoError(t, err)
	var there []string
	for _, e := range entries {
		if e.Name() == sums {
			continue
		}
		there = append(there, e.Name())
		b, err := os.ReadFile(filepath.Join(goldenDir, e.Name()))
		require.NoError(t, err)
		sum := sha256.Sum256(b)
		require.Equal(t, listed[e.Name()], hex.EncodeToString(sum[:]), "%s was edited: restore it, and add a new file for a new form", e.Name())
	}
	require.ElementsMatch(t, slices.Collect(maps.Keys(listed)), there, "a golden file is missing or not listed")
}
