package telemetry

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"time"

	"github.com/go-logr/logr"
	"go.opentelemetry.io/otel/trace"
	"go.uber.org/zap"
	"go.uber.org/zap/exp/zapslog"
	"go.uber.org/zap/zapcore"

	"ordersaga/events"
)

// LogConfig says how to log.
type LogConfig struct {
	Level  string    // debug, info, warn or error; empty: info
	Format string    // json or console; empty: json
	Output io.Writer // nil: standard error. Writes are serialised.
}

// Bounds of what one kind of line (level, logger, message) may write: the first logBurst in a second, then each logEvery-th.
const (
	logWindow   = time.Second
	logBurst    = 100
	logEvery    = 100
	maxLogKinds = 1024
	maxKindText = 200 // bytes of a message that tell kinds apart
)

// NewLogger makes the process's logger, and the level by which it may be made more or less talkative while it runs. Every line is
// cleaned (F26): no control characters or escape sequences, known secrets masked. Of a message that repeats very often some lines are
// left out; the next that is written says how many (suppressed). Stack traces come with errors only.
func NewLogger(cfg LogConfig) (*zap.Logger, zap.AtomicLevel, error) {
	level := zap.NewAtomicLevel()
	if cfg.Level != "" {
		if err := level.UnmarshalText([]byte(cfg.Level)); err != nil {
			return nil, level, fmt.Errorf("telemetry: log level %q: use debug, info, warn or error", cfg.Level)
		}
	}
	enc, err := encoderOf(cfg.Format)
	if err != nil {
		return nil, level, err
	}
	out := cfg.Output
	if out == nil {
		out = os.Stderr
	}
	core := zapcore.Core(cleanCore{zapcore.NewCore(enc, zapcore.Lock(zapcore.AddSync(out)), level)})
	core = &sampledCore{Core: core, limit: newLimiter(logWindow, logBurst, logEvery, maxLogKinds)}
	return zap.New(core, zap.AddCaller(), zap.AddStacktrace(zapcore.ErrorLevel)), level, nil
}

func encoderOf(format string) (zapcore.Encoder, error) {
	c := zapcore.EncoderConfig{
		TimeKey: "ts", LevelKey: "level", NameKey: "logger", CallerKey: "caller", MessageKey: "msg", StacktraceKey: "stacktrace",
		LineEnding: zapcore.DefaultLineEnding, EncodeLevel: zapcore.LowercaseLevelEncoder, EncodeCaller: zapcore.ShortCallerEncoder,
		EncodeTime:     func(t time.Time, enc zapcore.PrimitiveArrayEncoder) { zapcore.ISO8601TimeEncoder(t.UTC(), enc) },
		EncodeDuration: zapcore.SecondsDurationEncoder,
	}
	switch format {
	case "", "json":
		return zapcore.NewJSONEncoder(c), nil
	case "console":
		c.EncodeLevel, c.EncodeDuration = zapcore.CapitalLevelEncoder, zapcore.StringDurationEncoder
		return zapcore.NewConsoleEncoder(c), nil
	default:
		return nil, fmt.Errorf("telemetry: log format %q: use json or console", format)
	}
}

// sampledCore bounds what repeats. Lines that end the process are never left out.
type sampledCore struct {
	zapcore.Core
	limit *limiter
}

func (c *sampledCore) With(fields []zapcore.Field) zapcore.Core {
	return &sampledCore{Core: c.Core.With(fields), limit: c.limit}
}

func (c *sampledCore) Check(ent zapcore.Entry, ce *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	if !c.Enabled(ent.Level) {
		return ce
	}
	if ent.Level > zapcore.ErrorLevel {
		return c.Core.Check(ent, ce)
	}
	ok, suppressed := c.limit.allow(ent.Level.String()+"\x00"+ent.LoggerName+"\x00"+ent.Message[:min(len(ent.Message), maxKindText)], ent.Time)
	switch {
	case !ok:
		return ce
	case suppressed > 0:
		return c.Core.With([]zapcore.Field{zap.Int("suppressed", suppressed)}).Check(ent, ce)
	default:
		return c.Core.Check(ent, ce)
	}
}

// unsampled is log without the bound on repetition, for what has a bound of its own, and without stack traces.
func unsampled(log *zap.Logger) *zap.Logger {
	return log.WithOptions(zap.AddStacktrace(zapcore.FatalLevel), zap.WithCaller(false), zap.WrapCore(func(c zapcore.Core) zapcore.Core {
		if s, ok := c.(*sampledCore); ok {
			return s.Core
		}
		return c
	}))
}

// Slog is the same log for what speaks log/slog. It adds the trace of the context to each record.
func Slog(log *zap.Logger) *slog.Logger { return slog.New(slogHandler(log)) }

// Logr is the same log for libraries that speak logr, such as OpenTelemetry's own.
func Logr(log *zap.Logger) logr.Logger { return logr.FromSlogHandler(slogHandler(log)) }

func slogHandler(log *zap.Logger) slog.Handler {
	return &traceHandler{Handler: zapslog.NewHandler(log.Core(), zapslog.WithName(log.Name()), zapslog.WithCaller(true))}
}

// The keys under which logs name a trace.
const (
	traceKey = "trace_id"
	spanKey  = "span_id"
)

type traceHandler struct{ slog.Handler }

func (h *traceHandler) Handle(ctx context.Context, r slog.Record) error {
	if sc := trace.SpanContextFromContext(ctx); sc.IsValid() {
		named := false
		r.Attrs(func(a slog.Attr) bool {
			named = a.Key == traceKey
			return !named
		})
		if !named {
			r = r.Clone()
			r.AddAttrs(slog.String(traceKey, sc.TraceID().String()), slog.String(spanKey, sc.SpanID().String()))
		}
	}
	return h.Handler.Handle(ctx, r)
}

func (h *traceHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	return &traceHandler{h.Handler.WithAttrs(attrs)}
}

func (h *traceHandler) WithGroup(name string) slog.Handler {
	return &traceHandler{h.Handler.WithGroup(name)}
}

// WithTrace is log with the trace of the context in every line; log itself if there is none.
func WithTrace(ctx context.Context, log *zap.Logger) *zap.Logger {
	if f := TraceFields(ctx); f != nil {
		return log.With(f...)
	}
	return log
}

// TraceFields names the trace of a context; nil if there is none.
func TraceFields(ctx context.Context) []zap.Field {
	sc := trace.SpanContextFromContext(ctx)
	if !sc.IsValid() {
		return nil
	}
	return []zap.Field{zap.String(traceKey, sc.TraceID().String()), zap.String(spanKey, sc.SpanID().String())}
}

// traceField names the trace of a message.
func traceField(t events.Trace) zap.Field {
	if t.IsZero() {
		return zap.Skip()
	}
	return zap.String(traceKey, trace.TraceID(t.TraceID).String())
}
