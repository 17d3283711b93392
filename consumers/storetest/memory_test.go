package storetest_test

import (
	"testing"

	"go.uber.org/goleak"

	"ordersaga/consumers"
	"ordersaga/consumers/storetest"
	"ordersaga/events"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestMemory(t *testing.T) {
	storetest.Run(t, func(*testing.T) storetest.Store[*consumers.MemoryTx] {
		m := consumers.NewMemory()
		return storetest.Store[*consumers.MemoryTx]{Store: m, Reader: m, Forwarded: func() []events.Raw { _, raw := m.Drain(); return raw }}
	})
}
