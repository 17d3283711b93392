package embedded_test

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"ordersaga/adapters/embedded"
)

func TestLockNamesItsHolder(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "made", "by the lock")
	first, err := embedded.AcquireLock(dir)
	require.NoError(t, err)
	require.NoError(t, first.Publish(map[string]string{"http": "127.0.0.1:8080", "kafka": "127.0.0.1:9092"}))

	_, err = embedded.AcquireLock(dir)
	var running *embedded.AlreadyRunningError
	require.ErrorAs(t, err, &running)
	require.Equal(t, os.Getpid(), running.PID)
	require.Equal(t, "127.0.0.1:8080", running.Addrs["http"])
	require.Contains(t, err.Error(), "already running (pid ")
	require.Contains(t, err.Error(), ", http 127.0.0.1:8080, kafka 127.0.0.1:9092)")

	require.NoError(t, first.Release())
	second, err := embedded.AcquireLock(dir)
	require.NoError(t, err)
	require.NoError(t, second.Release())
}

func TestLockWithoutReadableHolder(t *testing.T) {
	dir := t.TempDir()
	first, err := embedded.AcquireLock(dir)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(filepath.Join(dir, "lock"), []byte(`{"pid":`), 0o600))
	_, err = embedded.AcquireLock(dir)
	require.ErrorContains(t, err, "already running by another process on data directory "+dir)
	require.NoError(t, first.Release())
}

func TestInstanceIDIsStable(t *testing.T) {
	dir := t.TempDir()
	var ids []string
	for range 2 {
		lock, err := embedded.AcquireLock(dir)
		require.NoError(t, err)
		for range 2 {
			id, err := lock.InstanceID()
			require.NoError(t, err)
			ids = append(ids, id)
		}
		require.NoError(t, lock.Release())
	}
	require.Regexp(t, `^ordersaga-[0-9a-f-]{36}$`, ids[0])
	require.Equal(t, []string{ids[0], ids[0], ids[0], ids[0]}, ids)
}

func TestLockInUnwritablePlace(t *testing.T) {
	_, err := embedded.AcquireLock("/proc/no/such")
	require.ErrorContains(t, err, "choose a directory that this user may write to")
}
