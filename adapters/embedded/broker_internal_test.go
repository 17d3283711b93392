package embedded

import (
	"context"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// The retention goroutine that does not come back stands for anything that holds the broker: Close must still return.
func TestBrokerCloseNeverBlocksForEver(t *testing.T) {
	dir := t.TempDir()
	b, err := openBroker(t.Context(), BrokerConfig{DataDir: dir})
	require.NoError(t, err)

	short, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	require.ErrorIs(t, b.Close(short), context.DeadlineExceeded)
	_, err = AcquireLock(dir)
	var running *AlreadyRunningError
	require.ErrorAs(t, err, &running, "the data stays locked until it is written")

	close(b.retention)
	require.NoError(t, b.Close(t.Context()))
	lock, err := AcquireLock(dir)
	require.NoError(t, err)
	require.NoError(t, lock.Release())
}
