//go:build unix

// Package testenv gives the tests of every room a Postgres and a Kafka, so that `go test ./...` on a machine with nothing but Go, and in CI,
// is one command. Only tests import it.
//
//	func TestMain(m *testing.M) { testenv.Main(m) }
//
//	Postgres          a fresh database of this process' temporary server (or of ORDERSAGA_TEST_DATABASE_URL)
//	PostgresTemplate  the same with, say, the migrations applied once
//	PostgresServer    a server of the test's own, for crash tests
//	Kafka             a fresh in-process broker
//	RealKafka         a real Kafka, one per process: ORDERSAGA_KAFKA_BROKERS, else a container, else Kafka's jars on a JDK
//	KafkaJars, KafkaContainer   that way and no other; the first can be killed
//	Prefix            what a test's topics and groups on a shared broker begin with
//
// # Promises
//
// What a test needs and cannot be had fails it where CI=true, and skips it loudly elsewhere: nothing hides in CI. A server that the
// environment names and that does not answer fails it everywhere. What is shared starts with
// its first use and is stopped by Main; what a test has for itself ends with the test. If the test process is killed, servers die with
// it (Linux), a container ends itself within two minutes, and temporary directories are removed by the next test process.
package testenv

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
)

const (
	// stopTimeout bounds the end of everything that one test, or the process, has started.
	stopTimeout = 30 * time.Second
	// prefixName bounds how much of a test's name is in its prefix: a topic's name has at most 249 characters.
	prefixName = 40
)

// Main runs the tests, stops what they shared, and ends the process.
func Main(m *testing.M) { os.Exit(run(m)) }

// MainNoLeaks is Main that also fails if goroutines are left once everything has stopped.
func MainNoLeaks(m *testing.M, opts ...goleak.Option) {
	code := run(m)
	if code == 0 {
		if err := goleak.Find(opts...); err != nil {
			fmt.Fprintln(os.Stderr, "goroutines are left after all tests:", err)
			code = 1
		}
	}
	os.Exit(code)
}

func run(m *testing.M) int {
	code := m.Run()
	if err := stopShared(); err != nil {
		fmt.Fprintln(os.Stderr, "stop the shared test servers:", err)
		if code == 0 {
			code = 1
		}
	}
	return code
}

// shared are what must be stopped at the end, the last started first.
var shared struct {
	mu    sync.Mutex
	stops []func(context.Context) error
}

func stopAtEnd(stop func(context.Context) error) {
	shared.mu.Lock()
	defer shared.mu.Unlock()
	shared.stops = append(shared.stops, stop)
}

func stopShared() error {
	shared.mu.Lock()
	defer shared.mu.Unlock()
	ctx, cancel := context.WithTimeout(context.Background(), stopTimeout)
	defer cancel()
	var errs []error
	for i := len(shared.stops) - 1; i >= 0; i-- {
		errs = append(errs, shared.stops[i](ctx))
	}
	shared.stops = nil
	return errors.Join(errs...)
}

// once starts something shared at most once and remembers the failure, so that a hundred tests do not wait for it a hundred times.
type once[T any] struct {
	mu    sync.Mutex
	tried bool
	value T
	err   error
}

func (o *once[T]) get(start func() (T, error)) (T, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if !o.tried {
		o.tried = true
		o.value, o.err = start()
	}
	return o.value, o.err
}

// givenError says that what somebody named in the environment does not work: passing it over would test something else in silence.
type givenError struct {
	variable string
	err      error
}

func (e *givenError) Error() string { return e.variable + ": " + e.err.Error() }
func (e *givenError) Unwrap() error { return e.err }

// need fails or skips a test that lacks what it needs.
func need(tb testing.TB, what string, err error) {
	tb.Helper()
	if err == nil {
		return
	}
	var given *givenError
	if errors.As(err, &given) {
		tb.Fatalf("%s that was given cannot be used: %v", what, err)
	}
	if os.Getenv("CI") == "true" {
		tb.Fatalf("%s cannot be had, and CI=true forbids to skip: %v", what, err)
	}
	tb.Skipf("SKIPPED, NOT PASSED: %s cannot be had: %v", what, err)
}

// stopWith stops something at the end of the test, and fails the test if it does not stop.
func stopWith(tb testing.TB, what string, stop func(context.Context) error) {
	tb.Helper()
	tb.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), stopTimeout)
		defer cancel()
		if err := stop(ctx); err != nil {
			tb.Errorf("stop %s: %v", what, err)
		}
	})
}

// Prefix returns a prefix for topics and groups that no other test has, in this or another process. It ends in a dot and tells
// people whose topic it is.
func Prefix(tb testing.TB) string {
	tb.Helper()
	name := strings.Map(func(r rune) rune {
		switch {
		case r >= 'a' && r <= 'z', r >= '0' && r <= '9':
			return r
		case r >= 'A' && r <= 'Z':
			return r - 'A' + 'a'
		default:
			return '-'
		}
	}, tb.Name())
	if len(name) > prefixName {
		name = name[:prefixName]
	}
	return name + "-" + randomHex(tb, 4) + "."
}

func randomHex(tb testing.TB, n int) string {
	tb.Helper()
	raw := make([]byte, n)
	if _, err := rand.Read(raw); err != nil {
		tb.Fatalf("draw a random name: %v", err)
	}
	return hex.EncodeToString(raw)
}
