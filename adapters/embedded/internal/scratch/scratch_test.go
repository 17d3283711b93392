//go:build unix

package scratch_test

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"ordersaga/adapters/embedded/internal/scratch"
)

func TestDirectoriesOfTheDeadAreSwept(t *testing.T) {
	parent := t.TempDir()
	old := time.Now().Add(-time.Hour)
	alive, err := scratch.New(parent, "mine-")
	require.NoError(t, err)
	// A process that was killed leaves the directory and the file, and no lock.
	for _, name := range []string{"mine-dead", "mine-young", "others-dead"} {
		require.NoError(t, os.Mkdir(filepath.Join(parent, name), 0o755))
		require.NoError(t, os.WriteFile(filepath.Join(parent, name, "scratch.lock"), nil, 0o600))
		require.NoError(t, os.Chtimes(filepath.Join(parent, name), old, old))
	}
	require.NoError(t, os.Chtimes(filepath.Join(parent, "mine-young"), time.Time{}, time.Now()))
	require.NoError(t, os.Mkdir(filepath.Join(parent, "mine-not ours"), 0o755))
	require.NoError(t, os.Chtimes(filepath.Join(parent, "mine-not ours"), old, old))
	require.NoError(t, os.Chtimes(alive.Path, old, old))

	next, err := scratch.New(parent, "mine-")
	require.NoError(t, err)
	require.NoDirExists(t, filepath.Join(parent, "mine-dead"))
	for _, name := range []string{"mine-young", "others-dead", "mine-not ours", filepath.Base(alive.Path)} {
		require.DirExists(t, filepath.Join(parent, name))
	}
	require.NoError(t, next.Remove())
	require.NoDirExists(t, next.Path)
	require.NoError(t, alive.Remove())
}
