//go:build unix

package embedded

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"ordersaga/adapters/embedded/internal/child"
	"ordersaga/adapters/embedded/internal/scratch"
)

const (
	// clusterDir is PostgreSQL's own directory, which only the server's account may read.
	clusterDir = "pgdata"
	// newClusterDir is where it is made: it gets its name when it is whole.
	newClusterDir = "pgdata.new"
	// movedFile names where the cluster is when it could not be made in the data directory itself.
	movedFile = "pgdata.moved"
	// movedRoot holds clusters of data directories that the server's account cannot enter.
	movedRoot    = "/var/lib/ordersaga"
	passwordFile = "password"
	portFile     = "port"
	logFile      = "postgres.log"
	// scratchPrefix begins the names of temporary servers' directories.
	scratchPrefix = "ordersaga-pg-"
	passwordBytes = 24
)

// place is where a server lives: home is ours (lock, password, log), cluster is the server's.
type place struct {
	home     string
	cluster  string
	account  account
	password string
	lock     *Lock        // of a persistent one
	scratch  *scratch.Dir // of a temporary one
}

func newPlace(cfg PostgresConfig) (*place, error) {
	if cfg.DataDir == "" {
		return temporaryPlace()
	}
	return persistentPlace(cfg.DataDir, movedRoot)
}

func temporaryPlace() (*place, error) {
	account, err := serverAccount("")
	if err != nil {
		return nil, err
	}
	// TMPDIR may be a place that only root may enter.
	parent := os.TempDir()
	if account.barrier(parent) != "" {
		parent = "/tmp"
	}
	dir, err := scratch.New(parent, scratchPrefix)
	if err != nil {
		return nil, err //nolint:wrapcheck // says it all
	}
	password, err := randomHex(passwordBytes)
	if err != nil {
		return nil, errors.Join(err, dir.Remove())
	}
	return &place{home: dir.Path, cluster: filepath.Join(dir.Path, clusterDir), account: account, password: password, scratch: dir}, nil
}

func persistentPlace(dir, elsewhere string) (*place, error) {
	lock, err := AcquireLock(dir)
	if err != nil {
		return nil, err
	}
	p := &place{home: lock.Dir(), lock: lock}
	if err := p.settle(elsewhere); err != nil {
		return nil, errors.Join(err, lock.Release())
	}
	return p, nil
}

// settle finds or decides where the cluster is, who runs it, and its password.
func (p *place) settle(elsewhere string) error {
	moved, err := os.ReadFile(p.file(movedFile))
	switch {
	case err == nil:
		p.cluster = strings.TrimSpace(string(moved))
	case errors.Is(err, os.ErrNotExist):
		p.cluster = p.file(clusterDir)
	default:
		return fmt.Errorf("find the data: %w", err)
	}
	if p.account, err = serverAccount(p.cluster); err != nil {
		return err
	}
	if moved == nil && p.account.barrier(p.home) != "" {
		if err := p.move(elsewhere); err != nil {
			return err
		}
	}
	if barrier := p.account.barrier(filepath.Dir(p.cluster)); barrier != "" {
		return fmt.Errorf("PostgreSQL runs as %s here, which may not enter %s on the way to its data in %s: choose another data directory, "+
			"or allow it (chmod o+x %s)", p.account.name, barrier, p.cluster, barrier)
	}
	return p.settlePassword()
}

// move decides to keep the cluster elsewhere: the server's account cannot enter the data directory. The place is written down first, and
// has a name of its own, so that a data directory that is removed and made again never meets the old one's orders.
func (p *place) move(elsewhere string) error {
	if _, err := os.Stat(p.cluster); err == nil {
		return fmt.Errorf("PostgreSQL runs as %s here, which may not enter %s on the way to its data in %s: move the data directory, or "+
			"allow it (chmod o+x)", p.account.name, p.account.barrier(p.home), p.cluster)
	}
	name, err := randomHex(8)
	if err != nil {
		return err
	}
	dir := filepath.Join(elsewhere, "postgres-"+name)
	if err := os.MkdirAll(dir, 0o755); err != nil { //nolint:gosec // passed through by the server's account
		return fmt.Errorf("make a place for the data that %s may enter: %w", p.account.name, err)
	}
	p.cluster = filepath.Join(dir, clusterDir)
	return writeFile(p.file(movedFile), p.cluster+"\n", 0o644)
}

func (p *place) settlePassword() error {
	raw, err := os.ReadFile(p.file(passwordFile))
	if err == nil && len(raw) > 0 {
		p.password = strings.TrimSpace(string(raw))
		return nil
	}
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("read the database password: %w", err)
	}
	if _, err := os.Stat(p.cluster); err == nil {
		return fmt.Errorf("the data in %s has lost its password file %s: put it back, or start on an empty data directory",
			p.cluster, p.file(passwordFile))
	}
	if p.password, err = randomHex(passwordBytes); err != nil {
		return err
	}
	return writeFile(p.file(passwordFile), p.password+"\n", 0o600)
}

func (p *place) file(name string) string { return filepath.Join(p.home, name) }

func (p *place) temporary() bool { return p.scratch != nil }

// major is the version that made the cluster, 0 if there is none yet.
func (p *place) major() (int, error) {
	raw, err := os.ReadFile(filepath.Join(p.cluster, "PG_VERSION"))
	if errors.Is(err, os.ErrNotExist) {
		return 0, nil
	}
	if errors.Is(err, os.ErrPermission) {
		return 0, fmt.Errorf("the data in %s belongs to another user: run as that user, or choose another data directory: %w", p.cluster, err)
	}
	if err != nil {
		return 0, fmt.Errorf("read the data's version: %w", err)
	}
	major, err := strconv.Atoi(strings.TrimSpace(string(raw)))
	if err != nil {
		return 0, fmt.Errorf("read the data's version in %s: %w", p.cluster, err)
	}
	return major, nil
}

// initialise makes the cluster if there is none. A process killed midway leaves pgdata.new, which the next one removes.
func (p *place) initialise(ctx context.Context, bin binaries) error {
	if _, err := os.Stat(p.cluster); err == nil {
		return nil
	}
	staging := filepath.Join(filepath.Dir(p.cluster), newClusterDir)
	if err := os.RemoveAll(staging); err != nil {
		return fmt.Errorf("remove a half-made database: %w", err)
	}
	if err := os.Mkdir(staging, 0o700); err != nil {
		return fmt.Errorf("make the database's directory: %w", err)
	}
	secret := filepath.Join(staging, "pw")
	data := filepath.Join(staging, "data")
	if err := os.WriteFile(secret, []byte(p.password+"\n"), 0o600); err != nil {
		return fmt.Errorf("hand over the password: %w", err)
	}
	if err := errors.Join(p.account.own(secret), p.account.own(staging)); err != nil {
		return err
	}
	args := []string{"-D", data, "-U", databaseUser, "--pwfile=" + secret, "--auth=scram-sha-256", "--encoding=UTF8", "--no-locale"}
	if p.temporary() {
		args = append(args, "--no-sync")
	}
	if _, err := child.Run(ctx, p.command(ctx, bin, "initdb", "/", args...)); err != nil {
		return fmt.Errorf("make the database: %w", err)
	}
	if err := os.Rename(data, p.cluster); err != nil {
		return fmt.Errorf("make the database: %w", err)
	}
	if err := os.RemoveAll(staging); err != nil {
		return fmt.Errorf("make the database: %w", err)
	}
	return syncDir(filepath.Dir(p.cluster))
}

// command prepares a program of PostgreSQL's as the server's account. Its environment is only what is listed: PGOPTIONS, PGDATA and their
// like of the caller's shell are about another server. The working directory must be one that the account may enter.
func (p *place) command(ctx context.Context, bin binaries, name, dir string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, bin.path(name), args...) //nolint:gosec // running PostgreSQL is the purpose
	cmd.Dir = dir
	cmd.Env = []string{"PATH=" + bin.dir + ":/usr/bin:/bin", "LC_ALL=C", "TZ=UTC"}
	if libraries, ok := os.LookupEnv("LD_LIBRARY_PATH"); ok {
		cmd.Env = append(cmd.Env, "LD_LIBRARY_PATH="+libraries)
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: p.account.credential}
	return cmd
}

// release gives the place up; a temporary one is removed.
func (p *place) release() error {
	if p.scratch != nil {
		return p.scratch.Remove() //nolint:wrapcheck // says it all
	}
	return p.lock.Release()
}

func randomHex(n int) (string, error) {
	raw := make([]byte, n)
	if _, err := rand.Read(raw); err != nil {
		return "", fmt.Errorf("draw a random name: %w", err)
	}
	return hex.EncodeToString(raw), nil
}
