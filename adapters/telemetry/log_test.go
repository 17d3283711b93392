package telemetry

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.opentelemetry.io/otel/trace"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// logTo makes a logger and answers its lines as they stand and decoded.
func logTo(t *testing.T, level, format string) (*zap.Logger, *bytes.Buffer) {
	t.Helper()
	var out bytes.Buffer
	log, _, err := NewLogger(LogConfig{Level: level, Format: format, Output: &out})
	require.NoError(t, err)
	return log, &out
}

func lines(t *testing.T, out *bytes.Buffer) []map[string]any {
	t.Helper()
	var all []map[string]any
	for l := range strings.Lines(out.String()) {
		m := map[string]any{}
		require.NoError(t, json.Unmarshal([]byte(l), &m), "%s", l)
		all = append(all, m)
	}
	return all
}

var (
	unfit = regexp.MustCompile(`[\x00-\x08\x0b-\x1f\x7f-\x{9f}\x{2028}\x{2029}\x{202a}-\x{202e}]`) // but tabs, which the console format has
	evil  = "one\r\nERROR forged line\x1b[31mred\x1b[0m\x1b]0;title\x07\u009b2J\u202etxet\x00 end"
)

// clean reports that no string of a decoded line, keys included, holds what a terminal or a reader of lines would act on.
func requireFit(t *testing.T, v any) {
	t.Helper()
	switch v := v.(type) {
	case string:
		require.NotRegexp(t, unfit, v)
		require.NotContains(t, v, "\n")
		require.NotContains(t, v, "[31m")
	case []any:
		for _, x := range v {
			requireFit(t, x)
		}
	case map[string]any:
		for k, x := range v {
			requireFit(t, k)
			if k != "stacktrace" {
				requireFit(t, x)
			}
		}
	}
}

type evilStringer struct{}

func (evilStringer) String() string { return evil }

func TestF26_NothingFromOutsideReachesTheLogAsItCame(t *testing.T) {
	fields := []zap.Field{
		zap.String("s", evil), zap.ByteString("b", []byte(evil)), zap.Strings("list", []string{evil}), zap.Stringer("st", evilStringer{}),
		zap.Error(fmt.Errorf("wrapped: %w", errors.New(evil))), zap.Errors("errs", []error{errors.New(evil)}), zap.NamedError("joined", errors.Join(errors.New(evil), errors.New("b"))),
		zap.Any("map", map[string]any{evil: evil, "deep": []any{map[string]string{"x": evil}}}),
		zap.Any("struct", struct{ A, Password string }{evil, "hunter2"}),
		zap.Object("obj", zapcore.ObjectMarshalerFunc(func(e zapcore.ObjectEncoder) error {
			e.AddString("api_key", "sk_live_abc123")
			return e.AddArray("arr", zapcore.ArrayMarshalerFunc(func(a zapcore.ArrayEncoder) error {
				a.AppendString(evil)
				return a.AppendReflected(map[string]string{"token": "tok-secret"})
			}))
		})),
		zap.Namespace("ns"), zap.String("authorization", "Basic dXNlcjpwYXNz"), zap.String("inside", evil),
	}
	t.Run("json", func(t *testing.T) {
		log, out := logTo(t, "debug", "json")
		log.Named(evil).With(zap.String("with", evil)).Error(evil, fields...)
		Slog(log).WithGroup("g").Warn(evil, "k", evil, slog.Group("inner", "password", "hunter2", "v", evil), "any", []string{evil})
		Logr(log).Error(errors.New(evil), evil, "k", evil)
		got := lines(t, out)
		require.Len(t, got, 3)
		for _, l := range got {
			requireFit(t, l)
		}
		require.Equal(t, "one ERROR forged linered txet end", got[0]["msg"])
		require.NotContains(t, out.String(), "hunter2")
		require.NotContains(t, out.String(), "abc123")
		require.NotContains(t, out.String(), "tok-secret")
		require.NotContains(t, out.String(), "dXNlcjpwYXNz")
		require.Contains(t, got[0], "ns", "fields after a namespace stay in it")
	})
	t.Run("console", func(t *testing.T) {
		log, out := logTo(t, "debug", "console")
		log.Warn(evil, fields...)
		require.Equal(t, 1, strings.Count(out.String(), "\n"), out.String())
		require.NotRegexp(t, unfit, strings.TrimSuffix(out.String(), "\n"))
		require.NotContains(t, out.String(), "hunter2")
	})
	t.Run("long text is cut", func(t *testing.T) {
		log, out := logTo(t, "debug", "json")
		log.Info(strings.Repeat("ä", 100_000), zap.String("s", strings.Repeat("x", 100_000)))
		require.Less(t, out.Len(), 3*maxText)
	})
}

func TestF26_SecretsAreMasked(t *testing.T) {
	for name, want := range map[string]bool{
		"password": true, "Api-Key": true, "API_KEY": true, "apiKey": true, "payment.method": true, "Set-Cookie": true, "email": true,
		"order_id": false, "customer_id": false, "key": false, "fingerprint": false, "tokens": false, strings.Repeat("p", 100): false,
	} {
		require.Equal(t, want, secretKey(name), name)
	}
	for in, want := range map[string]string{
		"dial postgres://saga:s3cret@db:5432/orders?x=1 failed": "dial postgres://saga:[masked]@db:5432/orders?x=1 failed",
		"host=db password=s3cret user=x":                        "host=db password=[masked] user=x",
		"host=db password='s3 cret' user=x":                     "host=db password=[masked] user=x",
		"header Authorization: Bearer abcdefgh.ijk":             "header Authorization: Bearer [masked]",
		"key sk_live_4eC39HqLyjWDarjtT1zdp7dc is bad":           "key sk_live_[masked] is bad",
		"https://example.com/a and a@b":                         "https://example.com/a and a@b",
		"the bearer of bad news":                                "the bearer of bad news",
		"a password is needed":                                  "a password is needed",
		"basic facts":                                           "basic facts",
	} {
		require.Equal(t, want, cleanText(in), in)
	}
}

func TestLogLines(t *testing.T) {
	log, out := logTo(t, "", "")
	log.Debug("not shown")
	log.Info("shown", zap.Duration("took", 1500*time.Millisecond))
	log.Warn("warned")
	log.Error("failed")
	got := lines(t, out)
	require.Len(t, got, 3)
	require.Equal(t, "info", got[0]["level"])
	require.InDelta(t, 1.5, got[0]["took"], 0)
	require.Regexp(t, `^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$`, got[0]["ts"], "ISO 8601, UTC")
	require.Contains(t, got[0]["caller"], "telemetry/log_test.go")
	require.NotContains(t, got[0], "stacktrace")
	require.NotContains(t, got[1], "stacktrace")
	require.Contains(t, got[2]["stacktrace"], "TestLogLines")
}

func TestLogLevelChanges(t *testing.T) {
	var out bytes.Buffer
	log, level, err := NewLogger(LogConfig{Level: "error", Output: &out})
	require.NoError(t, err)
	child := log.With(zap.String("k", "v"))
	child.Info("a")
	require.NoError(t, level.UnmarshalText([]byte("debug")))
	child.Debug("b")
	require.Len(t, lines(t, &out), 1)
}

func TestLogConfigIsChecked(t *testing.T) {
	_, _, err := NewLogger(LogConfig{Level: "loud"})
	require.ErrorContains(t, err, "debug, info, warn or error")
	_, _, err = NewLogger(LogConfig{Format: "xml"})
	require.ErrorContains(t, err, "json or console")
}

func TestAStormDoesNotFloodTheLog(t *testing.T) {
	log, out := logTo(t, "info", "json")
	core := log.Core()
	begin := time.Now()
	write := func(msg string, at time.Time) {
		if ce := core.Check(zapcore.Entry{Level: zapcore.WarnLevel, Message: msg, Time: at}, nil); ce != nil {
			ce.Write()
		}
	}
	for range 10_050 {
		write("storm", begin)
	}
	require.Len(t, lines(t, out), logBurst+99)
	out.Reset()
	write("rare", begin)
	require.Len(t, lines(t, out), 1, "the first of another kind")
	out.Reset()
	write("storm", begin.Add(2*logWindow))
	got := lines(t, out)
	require.Len(t, got, 1)
	require.InDelta(t, 50, got[0]["suppressed"], 0, "those since the last that was shown")
}

func TestLinesThatEndTheProcessAreNeverLeftOut(t *testing.T) {
	log, out := logTo(t, "info", "json")
	for range logBurst + 50 {
		require.Panics(t, func() { log.Panic("over") })
	}
	require.Len(t, lines(t, out), logBurst+50)
}

func TestLimiterIsBounded(t *testing.T) {
	l := newLimiter(time.Second, 2, 0, 3)
	now := time.Now()
	passed := 0
	for i := range 1000 {
		if ok, _ := l.allow(fmt.Sprint(i), now); ok {
			passed++
		}
	}
	require.Equal(t, 3+2, passed, "three kinds, and a place for all others")
	require.LessOrEqual(t, len(l.kinds), 4)
	ok, _ := l.allow("new", now.Add(time.Second))
	require.True(t, ok, "old kinds make room")
	ok, n := l.allow("new", now.Add(time.Second))
	require.True(t, ok)
	require.Zero(t, n)
	for range 7 {
		ok, _ = l.allow("new", now.Add(time.Second))
		require.False(t, ok)
	}
	ok, n = l.allow("new", now.Add(3*time.Second))
	require.True(t, ok)
	require.Equal(t, 7, n)
}

func TestTraceIDsInLogs(t *testing.T) {
	sc := trace.NewSpanContext(trace.SpanContextConfig{TraceID: trace.TraceID{1}, SpanID: trace.SpanID{2}})
	ctx := trace.ContextWithSpanContext(context.Background(), sc)
	log, out := logTo(t, "info", "json")
	WithTrace(ctx, log).Info("zap")
	Slog(log).InfoContext(ctx, "slog")
	Slog(log).With("a", 1).InfoContext(ctx, "named", "trace_id", "own")
	WithTrace(context.Background(), log).Info("none")
	got := lines(t, out)
	for _, l := range got[:2] {
		require.Equal(t, sc.TraceID().String(), l["trace_id"])
		require.Equal(t, sc.SpanID().String(), l["span_id"])
	}
	require.Equal(t, "own", got[2]["trace_id"])
	require.Equal(t, 1, strings.Count(strings.Split(out.String(), "\n")[2], "trace_id"))
	require.NotContains(t, got[3], "trace_id")
}
