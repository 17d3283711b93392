package postgres

import (
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"syscall"

	"github.com/jackc/pgx/v5/pgconn"
)

// Dependency is the name under which this package's errors report the database as away.
const Dependency = "postgres"

// StatementError is a statement that failed, for a reason that is neither an outage nor the data's fault.
type StatementError struct {
	Statement string // our name of it, not its SQL
	Hint      string // what to do, where we know
	err       error
	retry     bool // the whole transaction may be started over
}

func (e *StatementError) Error() string {
	s := "postgres: " + e.Statement + ": " + e.err.Error()
	if e.Hint != "" {
		s += " (" + e.Hint + ")"
	}
	return s
}

func (e *StatementError) Unwrap() error { return e.err }

// OutageError is a statement that failed because the database is away, full, or not ours to use yet. Nothing was decided about the
// data; if the commit itself was under way, whether it took effect is unknown.
type OutageError struct{ StatementError }

// Outage names the dependency that is away.
func (e *OutageError) Outage() string { return Dependency }

// DataFault is a statement that a value made fail: it will fail again with the same value.
type DataFault struct{ StatementError }

// DataError reports that the data was at fault.
func (e *DataFault) DataError() bool { return true }

// errTimeout is the cause of a context that ended because the database took too long, not because the caller gave up.
var errTimeout = errors.New("the database did not answer in time")

// class is what follows from an error.
type class int8

const (
	classPlain  class = iota
	classOutage       // wait, spend no attempt
	classData         // the batch is split until the value is found
)

// classify names the statement that failed and says what follows. ctx is the one the statement ran under: cancellation by the
// caller comes back unwrapped.
func classify(ctx context.Context, statement string, err error) error {
	if err == nil {
		return nil
	}
	if _, done := errors.AsType[*classified](err); done {
		return err
	}
	if ctx.Err() != nil && !errors.Is(context.Cause(ctx), errTimeout) {
		return ctx.Err()
	}
	c, retry, hint := judge(ctx, err)
	e := StatementError{Statement: statement, Hint: hint, err: &classified{err}, retry: retry}
	switch c {
	case classOutage:
		return &OutageError{e}
	case classData:
		return &DataFault{e}
	default:
		return &e
	}
}

// classified marks an error that went through classify, so that it is done once.
type classified struct{ err error }

func (e *classified) Error() string { return e.err.Error() }
func (e *classified) Unwrap() error { return e.err }

func judge(ctx context.Context, err error) (c class, retry bool, hint string) {
	if ctx.Err() != nil || errors.Is(err, errTimeout) {
		return classOutage, false, errTimeout.Error()
	}
	if _, is := errors.AsType[*pgconn.ConnectError](err); is {
		return classOutage, false, connectHint(err)
	}
	if pe, is := errors.AsType[*pgconn.PgError](err); is {
		return judgeCode(pe)
	}
	if pgconn.SafeToRetry(err) { // nothing was sent: the pool held a connection that had died
		return classOutage, true, ""
	}
	var ne net.Error
	if errors.As(err, &ne) || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, net.ErrClosed) ||
		errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.ECONNREFUSED) {
		return classOutage, false, ""
	}
	return classPlain, false, ""
}

func connectHint(err error) string {
	pe, is := errors.AsType[*pgconn.PgError](err)
	if !is {
		return ""
	}
	switch pe.Code {
	case "28P01", "28000":
		return "check user, password and pg_hba.conf"
	case "3D000":
		return "create the database, or name another in the URL"
	case "53300":
		return "raise max_connections, or make the pools smaller"
	}
	return ""
}

// Codes of https://www.postgresql.org/docs/current/errcodes-appendix.html.
func judgeCode(pe *pgconn.PgError) (c class, retry bool, hint string) {
	switch pe.Code {
	case "40001", "40P01", "55P03": // serialisation, deadlock, lock not available
		return classPlain, true, ""
	case "25P03": // idle_in_transaction_session_timeout: we were frozen, and it was rolled back
		return classOutage, true, "this process stood still for too long in the middle of a transaction"
	case "0A000": // "cached plan must not change result type": a migration ran under us
		return classPlain, strings.Contains(pe.Message, "cached plan"), ""
	case "26000": // a pooler gave us a server connection that does not know our prepared statement
		return classPlain, true, "a transaction-mode pooler is in between? use session mode"
	case "23514": // what was presumed is not so
		return classData, pe.ConstraintName == "presumed_check", ""
	case "23505":
		return classData, appeared(pe.TableName), ""
	case "25006":
		return classOutage, false, "connected to a read-only server: a standby, or a failover is under way"
	case "53100":
		return classOutage, false, "the database's disk is full"
	case "57014": // statement_timeout: we did not cancel it, the context is alive
		return classOutage, false, "statement_timeout"
	case "54000": // a value too big for a row or an index
		return classData, false, ""
	case "42P01", "42703", "42883", "42501", "3F000":
		return classOutage, false, "run ordersaga migrate up, or check the grants"
	}
	switch pe.Code[:2] {
	case "08", "53", "58":
		return classOutage, false, ""
	case "57":
		return classOutage, false, "" // 57P01 admin shutdown, 57P02 crash, 57P03 cannot connect now
	case "22", "23":
		return classData, false, ""
	}
	return classPlain, false, ""
}

// meanwhile are the tables in which a key that is there already means that somebody else was faster: what was read before has
// changed, and deciding anew finds it.
var meanwhile = []string{"orders", "sagas", "inbox", "idempotency_keys", "barriers", "reservations", "payments", "dead_letters", "products", "stock"}

func appeared(table string) bool {
	for _, t := range meanwhile {
		if rest, ok := strings.CutPrefix(table, t); ok && (rest == "" || rest[0] == '_') { // inbox_20260102 is a partition
			return true
		}
	}
	return false
}

// retryable reports that a transaction that ended with err may be started over.
func retryable(err error) bool {
	var o *OutageError
	var d *DataFault
	var e *StatementError
	switch {
	case errors.As(err, &o):
		return o.retry
	case errors.As(err, &d):
		return d.retry
	case errors.As(err, &e):
		return e.retry
	}
	return false
}
