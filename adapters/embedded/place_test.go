//go:build unix

package embedded

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestLogIsBounded(t *testing.T) {
	path := filepath.Join(t.TempDir(), "postgres.log")
	require.NoError(t, os.WriteFile(path, []byte(strings.Repeat("old", 10)), 0o600))
	writer, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND, 0) // as the server has it
	require.NoError(t, err)
	require.NoError(t, trimFile(path, 30))
	info, err := os.Stat(path)
	require.NoError(t, err)
	require.EqualValues(t, 30, info.Size(), "up to the bound it stays")

	_, err = writer.WriteString("newest")
	require.NoError(t, err)
	require.NoError(t, trimFile(path, 30))
	_, err = writer.WriteString("next")
	require.NoError(t, err)
	require.NoError(t, writer.Close())
	now, err := os.ReadFile(path)
	require.NoError(t, err)
	require.Equal(t, "next", string(now), "no hole where the old was")
	before, err := os.ReadFile(path + ".1")
	require.NoError(t, err)
	require.Equal(t, strings.Repeat("old", 8)+"newest", string(before))
}

func TestBarrierOnTheWayOfAnotherUser(t *testing.T) {
	root, err := os.MkdirTemp("", "ordersaga-test-") //nolint:usetesting // t.TempDir lies below a directory of mode 0700
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, os.RemoveAll(root)) })
	require.NoError(t, os.Chmod(root, 0o755))
	private := filepath.Join(root, "private")
	inner := filepath.Join(private, "open")
	require.NoError(t, os.MkdirAll(inner, 0o755))
	require.NoError(t, os.Chmod(private, 0o700))
	link := filepath.Join(root, "link")
	require.NoError(t, os.Symlink(inner, link))

	stranger := unprivileged("stranger", 4_000_000, 4_000_000)
	require.Empty(t, stranger.barrier(root))
	real, err := filepath.EvalSymlinks(private)
	require.NoError(t, err)
	require.Equal(t, real, stranger.barrier(inner))
	require.Equal(t, real, stranger.barrier(link), "a link leads through its target's parents")
	require.NoError(t, os.Chmod(private, 0o711))
	require.Empty(t, stranger.barrier(inner))
	require.Empty(t, account{}.barrier(private), "ourselves")
}
