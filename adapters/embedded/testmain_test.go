//go:build unix

package embedded_test

import (
	"os"
	"testing"

	"go.uber.org/goleak"
)

// childRole names, in the environment, what this test binary is to be instead of a test run: a process that can be killed.
const childRole = "ORDERSAGA_EMBEDDED_TEST_CHILD"

var childRoles = map[string]func() error{
	"broker":   runBrokerChild,
	"postgres": runPostgresChild,
}

func TestMain(m *testing.M) {
	if run, ok := childRoles[os.Getenv(childRole)]; ok {
		if err := run(); err != nil {
			_, _ = os.Stderr.WriteString("child: " + err.Error() + "\n")
			os.Exit(1)
		}
		os.Exit(0)
	}
	goleak.VerifyTestMain(m)
}
