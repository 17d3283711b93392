package embedded

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"

	"ordersaga/adapters/embedded/internal/flock"
)

const (
	lockFile     = "lock"
	instanceFile = "instance"
	// lockFileBytes bounds what is read of a lock file that something else may have written.
	lockFileBytes = 64 << 10
)

// Lock is the exclusive right to a data directory. The kernel takes it back when this process ends, so it is never stale; what the file
// says about its holder is for people.
type Lock struct {
	dir  string
	file *os.File
	note lockNote
}

type lockNote struct {
	PID     int               `json:"pid"`
	Started time.Time         `json:"started"`
	Addrs   map[string]string `json:"addrs,omitempty"`
}

// AlreadyRunningError says that another holder has the data directory.
type AlreadyRunningError struct {
	Dir   string
	PID   int               // 0: the holder has not said
	Addrs map[string]string // what the holder published, e.g. "http": "127.0.0.1:8080"
}

// Error names the holder and what to do.
func (e *AlreadyRunningError) Error() string {
	var holder []string
	if e.PID != 0 {
		holder = append(holder, fmt.Sprintf("pid %d", e.PID))
	}
	for _, name := range slices.Sorted(maps.Keys(e.Addrs)) {
		holder = append(holder, name+" "+e.Addrs[name])
	}
	who := "by another process"
	if len(holder) > 0 {
		who = "(" + strings.Join(holder, ", ") + ")"
	}
	return fmt.Sprintf("already running %s on data directory %s: use that one, stop it, or choose another data directory", who, e.Dir)
}

// AcquireLock makes dir if it is missing and takes its lock, or fails with *AlreadyRunningError. It does not wait.
func AcquireLock(dir string) (*Lock, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("data directory: %w", err)
	}
	// Others may pass through, not list: a Postgres below it runs as another user when this process is root.
	if err := os.MkdirAll(dir, 0o755); err != nil { //nolint:gosec // see above; what is secret in it has its own mode
		return nil, fmt.Errorf("make data directory: %w; choose a directory that this user may write to", err)
	}
	path := filepath.Join(dir, lockFile)
	file, err := flock.Try(path)
	if errors.Is(err, flock.ErrHeld) {
		note := readNote(path)
		return nil, &AlreadyRunningError{Dir: dir, PID: note.PID, Addrs: note.Addrs}
	}
	if err != nil {
		return nil, fmt.Errorf("lock data directory %s: %w", dir, err)
	}
	l := &Lock{dir: dir, file: file, note: lockNote{PID: os.Getpid(), Started: time.Now().UTC()}}
	if err := l.write(); err != nil {
		return nil, errors.Join(err, file.Close())
	}
	return l, nil
}

// Publish writes the addresses that a second start shows to the person who tried it.
func (l *Lock) Publish(addrs map[string]string) error {
	l.note.Addrs = maps.Clone(addrs)
	return l.write()
}

// Dir is the locked directory, as an absolute path.
func (l *Lock) Dir() string { return l.dir }

// InstanceID is a name of the data directory that stays the same over restarts, fit for a Kafka group.instance.id: static membership lets a
// restarted process take its partitions back without waiting for a session to time out. It is made at the first call.
func (l *Lock) InstanceID() (string, error) {
	path := filepath.Join(l.dir, instanceFile)
	raw, err := os.ReadFile(path)
	if err == nil {
		if id := strings.TrimSpace(string(raw)); id != "" {
			return id, nil
		}
	} else if !errors.Is(err, os.ErrNotExist) {
		return "", fmt.Errorf("read instance id: %w", err)
	}
	random, err := uuid.NewRandom()
	if err != nil {
		return "", fmt.Errorf("make instance id: %w", err)
	}
	id := "ordersaga-" + random.String()
	if err := writeFile(path, id+"\n", 0o644); err != nil {
		return "", fmt.Errorf("keep instance id: %w", err)
	}
	return id, nil
}

// Release gives the directory up. The file stays: removing it would let two later processes each lock a file of that name.
func (l *Lock) Release() error {
	if err := errors.Join(l.file.Truncate(0), l.file.Close()); err != nil {
		return fmt.Errorf("release data directory %s: %w", l.dir, err)
	}
	return nil
}

// write replaces the note in place: a rename would put it into a file that is not the locked one.
func (l *Lock) write() error {
	raw, err := json.Marshal(l.note)
	if err != nil {
		return fmt.Errorf("write lock file: %w", err)
	}
	if err := l.file.Truncate(0); err != nil {
		return fmt.Errorf("write lock file: %w", err)
	}
	if _, err := l.file.WriteAt(append(raw, '\n'), 0); err != nil {
		return fmt.Errorf("write lock file: %w", err)
	}
	return nil
}

// readNote reads what the holder wrote; a note that is half written or somebody else's tells nothing.
func readNote(path string) lockNote {
	var note lockNote
	file, err := os.Open(path)
	if err != nil {
		return lockNote{}
	}
	defer file.Close()
	if err := json.NewDecoder(io.LimitReader(file, lockFileBytes)).Decode(&note); err != nil {
		return lockNote{}
	}
	return note
}

// writeFile replaces path whole or not at all, also if the power fails midway.
func writeFile(path, content string, mode os.FileMode) error {
	tmp, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+".new-*")
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	_, err = tmp.WriteString(content)
	err = errors.Join(err, tmp.Chmod(mode), tmp.Sync(), tmp.Close())
	if err == nil {
		err = os.Rename(tmp.Name(), path)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("write %s: %w", path, err), os.Remove(tmp.Name()))
	}
	return syncDir(filepath.Dir(path))
}

// syncDir makes renames and new names in dir survive a power failure.
func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("sync %s: %w", dir, err)
	}
	if err := errors.Join(d.Sync(), d.Close()); err != nil {
		return fmt.Errorf("sync %s: %w", dir, err)
	}
	return nil
}
