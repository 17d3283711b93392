package boot

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// TestF22_NearlyFullDiskSheds: the disk of the data directory is looked at before anything is asked of the database, and what is refused
// is told when to come again.
func TestF22_NearlyFullDiskSheds(t *testing.T) {
	a := newAdmission(nil, Intake{MinDisk: 1 << 62}, t.TempDir())
	require.NoError(t, a.check(), "not looked yet")
	a.state.Store(a.look(t.Context()))
	err := a.check()
	require.ErrorContains(t, err, "MiB left")
	var later interface{ RetryAfter() time.Duration }
	require.ErrorAs(t, err, &later)
	require.Positive(t, later.RetryAfter())
}
