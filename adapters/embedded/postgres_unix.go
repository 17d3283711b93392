//go:build unix

package embedded

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"

	"ordersaga/adapters/embedded/internal/child"
	"ordersaga/adapters/embedded/internal/port"
)

const (
	// startTimeout bounds a start whose context has no deadline; crash recovery of much WAL is what takes long.
	startTimeout = 2 * time.Minute
	// readyEvery is how often a starting server is asked whether it is ready.
	readyEvery = 20 * time.Millisecond
	// pingTimeout bounds one such question.
	pingTimeout = 2 * time.Second
	// portAttempts bounds how often a free port may be lost to another process between finding and binding it.
	portAttempts = 5
	// memoryAttempts and memoryPause bound the wait for the sessions of a postmaster that was killed alone.
	memoryAttempts = 20
	memoryPause    = 250 * time.Millisecond
	// fastGrace is what open transactions and the last checkpoint get before an immediate shutdown, which the next start recovers from.
	fastGrace = 10 * time.Second
	// immediateGrace is what an immediate shutdown gets before SIGKILL.
	immediateGrace = 5 * time.Second
	// killGrace bounds the wait for killed processes to be gone.
	killGrace = 10 * time.Second
	// orphanGrace is how long a left-over server, which was signalled when its parent died, gets to end by itself.
	orphanGrace = 3 * time.Second
	// logBytes bounds postgres.log; what was before is kept once as postgres.log.1.
	logBytes = 16 << 20
	// logTrimEvery is how often that bound is looked after.
	logTrimEvery = time.Minute
	// logTailBytes of the log go into the error of a failed start.
	logTailBytes = 4 << 10
)

// ErrStopped says that the server was stopped for good.
var ErrStopped = errors.New("the private PostgreSQL was stopped")

// Postgres is a private PostgreSQL server. Its methods may be called from any goroutine.
type Postgres struct {
	cfg   PostgresConfig
	place *place
	bin   binaries

	mu      sync.Mutex // held while the server is started or ended
	port    int
	log     *os.File
	proc    *child.Process
	stopped bool

	trimStop chan struct{}
	trimDone chan struct{}
}

// StartPostgres starts a server and returns when it answers and its database exists. It fails with *AlreadyRunningError if DataDir is in
// use. A server that a killed process left on the same data is ended first, and the data recovers as after any crash.
func StartPostgres(ctx context.Context, cfg PostgresConfig) (*Postgres, error) {
	if err := checkSettings(cfg.Settings); err != nil {
		return nil, err
	}
	source, err := newBinarySource(cfg)
	if err != nil {
		return nil, fmt.Errorf("start PostgreSQL: %w", err)
	}
	return startPostgres(ctx, cfg, source)
}

func startPostgres(ctx context.Context, cfg PostgresConfig, source binarySource) (*Postgres, error) {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if _, ok := ctx.Deadline(); !ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, startTimeout)
		defer cancel()
	}
	place, err := newPlace(cfg)
	if err != nil {
		return nil, fmt.Errorf("start PostgreSQL: %w", err)
	}
	p := &Postgres{cfg: cfg, place: place, port: cfg.Port, trimStop: make(chan struct{}), trimDone: make(chan struct{})}
	if err := p.begin(ctx, source); err != nil {
		if p.log != nil {
			err = errors.Join(err, p.log.Close())
		}
		return nil, errors.Join(fmt.Errorf("start PostgreSQL: %w", err), place.release())
	}
	go p.trimLog()
	return p, nil
}

// checkSettings refuses what would take back a promise of the package or cannot be a parameter.
func checkSettings(settings map[string]string) error {
	for name := range settings {
		switch name {
		case "listen_addresses", "port", "unix_socket_directories", "data_directory", "hba_file", "password_encryption":
			return fmt.Errorf("PostgreSQL setting %s: the private server decides it itself; use PostgresConfig's fields", name)
		}
		if name == "" || strings.ContainsAny(name, "= \n\x00") {
			return fmt.Errorf("PostgreSQL setting %q: not a parameter's name", name)
		}
	}
	return nil
}

func (p *Postgres) begin(ctx context.Context, source binarySource) error {
	major, err := p.place.major()
	if err != nil {
		return err
	}
	if p.bin, err = source.find(ctx, major); err != nil {
		return err
	}
	if barrier := p.place.account.barrier(p.bin.dir); barrier != "" {
		return fmt.Errorf("PostgreSQL runs as %s here, which may not enter %s on the way to its programs in %s: allow it (chmod o+x %s) or "+
			"install PostgreSQL elsewhere", p.place.account.name, barrier, p.bin.dir, barrier)
	}
	if err := p.place.initialise(ctx, p.bin); err != nil {
		return err
	}
	if filepath.Dir(p.place.cluster) != p.place.home {
		p.cfg.Log.Info("the database is kept outside the data directory, which the server's user may not enter",
			slog.String("data_dir", p.place.home), slog.String("database", p.place.cluster), slog.String("user", p.place.account.name))
	}
	if p.log, err = os.OpenFile(p.place.file(logFile), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600); err != nil {
		return fmt.Errorf("open its log: %w", err)
	}
	if err := p.endOrphan(ctx); err != nil {
		return err
	}
	if err := p.choosePort(ctx); err != nil {
		return err
	}
	if err := p.launch(ctx); err != nil {
		return err
	}
	if err := p.settle(ctx); err != nil {
		return errors.Join(err, p.halt(ctx))
	}
	return nil
}

// settle does what a server that answers still needs: its database, and the note of its port.
func (p *Postgres) settle(ctx context.Context) error {
	if err := p.createDatabase(ctx); err != nil {
		return err
	}
	if p.place.temporary() {
		return nil
	}
	addr := "127.0.0.1:" + strconv.Itoa(p.port)
	return errors.Join(writeFile(p.place.file(portFile), strconv.Itoa(p.port)+"\n", 0o644), p.place.lock.Publish(map[string]string{"postgres": addr}))
}

func (p *Postgres) choosePort(ctx context.Context) error {
	if p.port != 0 {
		return nil
	}
	if raw, err := os.ReadFile(p.place.file(portFile)); err == nil {
		if last, err := strconv.Atoi(strings.TrimSpace(string(raw))); err == nil && last > 0 && port.IsFree(ctx, last) {
			p.port = last
			return nil
		}
	}
	free, err := port.Free(ctx)
	if err != nil {
		return err //nolint:wrapcheck // says it all
	}
	p.port = free
	return nil
}

// launch starts the server and waits until it answers. Only a port of our own choice is given up for another.
func (p *Postgres) launch(ctx context.Context) error {
	for attempt := 1; ; attempt++ {
		from, err := p.logEnd()
		if err != nil {
			return err
		}
		err = p.launchOnce(ctx)
		if err == nil {
			return nil
		}
		said := p.logSince(from)
		if attempt < memoryAttempts && strings.Contains(said, "pre-existing shared memory block") && ctx.Err() == nil {
			// Sessions of a postmaster that was killed alone see its death within moments.
			if err := pause(ctx, memoryPause); err != nil {
				return err
			}
			continue
		}
		busy := strings.Contains(said, "could not bind IPv4 address")
		if busy && p.cfg.Port == 0 && attempt < portAttempts {
			if p.port, err = port.Free(ctx); err != nil {
				return err //nolint:wrapcheck // says it all
			}
			continue
		}
		if busy {
			return fmt.Errorf("127.0.0.1:%d is taken: choose another port: %w", p.port, err)
		}
		return fmt.Errorf("%w; its log %s says:\n%s", err, p.place.file(logFile), said)
	}
}

func pause(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err() //nolint:wrapcheck // the caller says what for
	}
}

func (p *Postgres) launchOnce(ctx context.Context) error {
	cmd := p.place.command(context.WithoutCancel(ctx), p.bin, "postgres", p.place.cluster, p.arguments()...)
	cmd.Stdout, cmd.Stderr = p.log, p.log
	// SIGQUIT: immediate shutdown, which the next start recovers from; its own children go with it.
	proc, err := child.Start(cmd, syscall.SIGQUIT)
	if err != nil {
		return err //nolint:wrapcheck // says it all
	}
	if err := p.awaitReady(ctx, proc); err != nil {
		return errors.Join(err, proc.Stop(context.WithoutCancel(ctx),
			child.Step{Signal: syscall.SIGQUIT, Grace: immediateGrace}, child.Step{Signal: syscall.SIGKILL, Grace: killGrace}))
	}
	p.proc = proc
	return nil
}

func (p *Postgres) arguments() []string {
	settings := map[string]string{"max_connections": "200", "log_timezone": "UTC", "timezone": "UTC"}
	if p.place.temporary() {
		// Nothing else is relaxed: what was committed must survive Kill, as synchronous_commit=off and torn pages would not.
		settings["fsync"] = "off"
	}
	maps.Copy(settings, p.cfg.Settings)
	maps.Copy(settings, map[string]string{"listen_addresses": "127.0.0.1", "port": strconv.Itoa(p.port), "unix_socket_directories": ""})
	args := []string{"-D", p.place.cluster}
	for _, name := range slices.Sorted(maps.Keys(settings)) {
		args = append(args, "-c", name+"="+settings[name])
	}
	return args
}

func (p *Postgres) awaitReady(ctx context.Context, proc *child.Process) error {
	tick := time.NewTicker(readyEvery)
	defer tick.Stop()
	for {
		err := p.ping(ctx)
		select {
		case <-proc.Done(): // looked at first: on a port that another server has, that one answered
			return fmt.Errorf("the server ended: %w", errors.Join(proc.Err(), err))
		case <-ctx.Done():
			return fmt.Errorf("the server did not answer: %w", errors.Join(ctx.Err(), err))
		case <-tick.C:
			if err == nil {
				return nil
			}
		}
	}
}

// ping connects once. The bound is for a stranger on the port that takes connections and says nothing.
func (p *Postgres) ping(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, pingTimeout)
	defer cancel()
	conn, err := pgx.Connect(ctx, p.url("postgres"))
	if err != nil {
		return err //nolint:wrapcheck // the caller says what for
	}
	return conn.Close(ctx) //nolint:wrapcheck // the caller says what for
}

func (p *Postgres) createDatabase(ctx context.Context) error {
	conn, err := pgx.Connect(ctx, p.url("postgres"))
	if err != nil {
		return fmt.Errorf("make the database: %w", err)
	}
	defer conn.Close(ctx) //nolint:errcheck // nothing is lost
	var there bool
	if err := conn.QueryRow(ctx, "SELECT EXISTS (SELECT FROM pg_database WHERE datname = $1)", databaseName).Scan(&there); err != nil {
		return fmt.Errorf("make the database: %w", err)
	}
	if there {
		return nil
	}
	if _, err := conn.Exec(ctx, "CREATE DATABASE "+databaseName); err != nil {
		return fmt.Errorf("make the database: %w", err)
	}
	return nil
}

// URL is what pgx and libpq connect with: the superuser, its password and the database. It stays the same over Restart.
func (p *Postgres) URL() string { return p.url(databaseName) }

func (p *Postgres) url(database string) string {
	u := url.URL{
		Scheme:   "postgres",
		User:     url.UserPassword(databaseUser, p.place.password),
		Host:     "127.0.0.1:" + strconv.Itoa(p.port),
		Path:     "/" + database,
		RawQuery: "sslmode=disable",
	}
	return u.String()
}

// ClusterDir is PostgreSQL's own data directory.
func (p *Postgres) ClusterDir() string { return p.place.cluster }

// LogFile is what the server itself logs to, at most 16 MiB and once more as LogFile.1.
func (p *Postgres) LogFile() string { return p.place.file(logFile) }

// Version is the server's major version.
func (p *Postgres) Version() int { return p.bin.major }

// User names the account that the server runs as.
func (p *Postgres) User() string { return p.place.account.name }

// Done is closed when the server that runs now has ended, by whatever cause. After Restart it is another channel.
func (p *Postgres) Done() <-chan struct{} {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.proc.Done()
}

// Kill ends the server and all its processes as a power failure would end them: SIGKILL, nothing flushed. It returns when they are
// gone. Restart recovers.
func (p *Postgres) Kill() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.kill()
}

func (p *Postgres) kill() error {
	if p.ended() {
		return nil
	}
	// Stopped first: a running postmaster would start new processes while the list is made.
	if err := p.proc.Signal(syscall.SIGSTOP); err != nil {
		return fmt.Errorf("kill PostgreSQL: %w", err)
	}
	pids, err := child.Children(p.proc.Pid())
	if err != nil {
		return errors.Join(fmt.Errorf("kill PostgreSQL: %w", err), p.proc.Signal(syscall.SIGCONT))
	}
	err = p.proc.Signal(syscall.SIGKILL)
	for _, pid := range pids {
		err = errors.Join(err, child.Signal(pid, syscall.SIGKILL))
	}
	if err != nil {
		return fmt.Errorf("kill PostgreSQL: %w", err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), killGrace)
	defer cancel()
	// A new server refuses to start while one of them still has the old one's shared memory.
	if err := awaitEnd(ctx, pids...); err != nil {
		return fmt.Errorf("kill PostgreSQL: %w", err)
	}
	select {
	case <-p.proc.Done():
		return nil
	case <-ctx.Done():
		return fmt.Errorf("kill PostgreSQL: pid %d is still there: %w", p.proc.Pid(), ctx.Err())
	}
}

// Restart starts the server again on the same port and data: after Kill or a crash with recovery, else after an orderly end.
func (p *Postgres) Restart(ctx context.Context) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.stopped {
		return fmt.Errorf("restart PostgreSQL: %w", ErrStopped)
	}
	if _, ok := ctx.Deadline(); !ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, startTimeout)
		defer cancel()
	}
	if err := p.halt(ctx); err != nil {
		return fmt.Errorf("restart PostgreSQL: %w", err)
	}
	// The URL that others hold must stay true, so the port is not given up for another.
	fixed := p.cfg.Port
	p.cfg.Port = p.port
	defer func() { p.cfg.Port = fixed }()
	if err := p.launch(ctx); err != nil {
		return fmt.Errorf("restart PostgreSQL: %w", err)
	}
	return nil
}

// Stop ends the server: open transactions are rolled back and the data is written, or, once ctx is done or ten seconds have gone, what is
// left is recovered by the next start. A temporary server's data is removed. Stopping again does nothing.
func (p *Postgres) Stop(ctx context.Context) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.stopped {
		return nil
	}
	if err := p.halt(ctx); err != nil {
		return fmt.Errorf("stop PostgreSQL: %w", err)
	}
	p.stopped = true
	close(p.trimStop)
	<-p.trimDone
	if err := errors.Join(p.log.Close(), p.place.release()); err != nil {
		return fmt.Errorf("stop PostgreSQL: %w", err)
	}
	return nil
}

func (p *Postgres) ended() bool {
	select {
	case <-p.proc.Done():
		return true
	default:
		return false
	}
}

func (p *Postgres) halt(ctx context.Context) error {
	if p.ended() {
		return nil
	}
	steps := []child.Step{
		{Signal: syscall.SIGINT, Grace: fastGrace, Polite: true}, // fast shutdown
		{Signal: syscall.SIGQUIT, Grace: immediateGrace},
		{Signal: syscall.SIGKILL, Grace: killGrace},
	}
	if p.place.temporary() {
		steps = steps[1:] // nothing is to be kept
	}
	return p.proc.Stop(ctx, steps...) //nolint:wrapcheck // says it all
}

// endOrphan ends a server that still runs on our data although the process that started it is gone: we hold its lock. On Linux it was
// signalled when its parent died and may be about to end; elsewhere, or when the signal was lost, it would run for ever.
func (p *Postgres) endOrphan(ctx context.Context) error {
	pid, err := p.postmaster()
	if err != nil || pid == 0 {
		return err
	}
	wait, cancel := context.WithTimeout(ctx, orphanGrace)
	defer cancel()
	if awaitEnd(wait, pid) == nil {
		return nil
	}
	p.cfg.Log.Warn("ending a PostgreSQL server that a killed process left on this data", slog.Int("pid", pid))
	for _, step := range []child.Step{
		{Signal: syscall.SIGINT, Grace: fastGrace}, {Signal: syscall.SIGQUIT, Grace: immediateGrace}, {Signal: syscall.SIGKILL, Grace: killGrace},
	} {
		if err := child.Signal(pid, step.Signal); err != nil {
			return fmt.Errorf("end the server that a killed process left on this data: %w", err)
		}
		wait, cancel := context.WithTimeout(ctx, step.Grace)
		err := awaitEnd(wait, pid)
		cancel()
		if err == nil {
			return nil
		}
	}
	return fmt.Errorf("a server with pid %d, left by a killed process, does not end: end it by hand", pid)
}

// postmaster returns the process that works on our data, 0 if there is none. A postmaster.pid whose number belongs to a stranger now is
// removed: PostgreSQL itself would take the stranger for a server and refuse to start.
func (p *Postgres) postmaster() (int, error) {
	path := filepath.Join(p.place.cluster, "postmaster.pid")
	raw, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("look for a running server: %w", err)
	}
	first, _, _ := strings.Cut(string(raw), "\n")
	pid, err := strconv.Atoi(strings.TrimSpace(first))
	if err == nil && pid > 0 && child.Alive(pid) && child.WorksIn(pid, p.place.cluster) {
		return pid, nil
	}
	if err := os.Remove(path); err != nil {
		return 0, fmt.Errorf("remove a stale postmaster.pid: %w", err)
	}
	return 0, nil
}

// awaitEnd waits until all processes have ended; they may be others' children, whose end nobody tells us.
func awaitEnd(ctx context.Context, pids ...int) error {
	tick := time.NewTicker(readyEvery)
	defer tick.Stop()
	for {
		pids = slices.DeleteFunc(pids, child.Ended)
		if len(pids) == 0 {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("processes %v are still there: %w", pids, ctx.Err())
		case <-tick.C:
		}
	}
}

func (p *Postgres) logEnd() (int64, error) {
	info, err := os.Stat(p.place.file(logFile))
	if err != nil {
		return 0, fmt.Errorf("read its log: %w", err)
	}
	return info.Size(), nil
}

// logSince returns the end of what was logged since offset from.
func (p *Postgres) logSince(from int64) string {
	file, err := os.Open(p.place.file(logFile))
	if err != nil {
		return err.Error()
	}
	defer file.Close()
	if info, err := file.Stat(); err == nil {
		from = max(from, info.Size()-logTailBytes)
	}
	raw, err := io.ReadAll(io.NewSectionReader(file, from, logTailBytes))
	if err != nil {
		return err.Error()
	}
	return strings.TrimSpace(string(raw))
}

// trimLog bounds the log: the server appends to it through a file that it inherited, so it cannot be renamed, but it can be emptied.
func (p *Postgres) trimLog() {
	defer close(p.trimDone)
	tick := time.NewTicker(logTrimEvery)
	defer tick.Stop()
	for {
		if err := trimFile(p.place.file(logFile), logBytes); err != nil {
			p.cfg.Log.Warn("PostgreSQL's log grows past its bound", slog.String("error", err.Error()))
		}
		select {
		case <-p.trimStop:
			return
		case <-tick.C:
		}
	}
}

// trimFile moves the content of a file that is longer than limit to path.1. Lines written between copying and emptying are lost.
func trimFile(path string, limit int64) error {
	info, err := os.Stat(path)
	if err != nil || info.Size() <= limit {
		return err //nolint:wrapcheck // names the file
	}
	raw, err := os.ReadFile(path)
	if err != nil {
		return err //nolint:wrapcheck // names the file
	}
	if err := os.WriteFile(path+".1", raw[max(0, len(raw)-int(limit)):], 0o600); err != nil { //nolint:gosec // a path made here
		return err //nolint:wrapcheck // names the file
	}
	return os.Truncate(path, 0) //nolint:wrapcheck // names the file
}
