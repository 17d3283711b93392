//go:build unix

package embedded

import (
	"errors"
	"fmt"
	"math"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"syscall"
)

// account is who the server runs as. PostgreSQL refuses root, so root hands over to an unprivileged user; everybody else runs it as
// themselves (credential nil).
type account struct {
	name       string
	uid, gid   uint32
	credential *syscall.Credential
}

// serverAccount chooses the account: root takes the owner of existing data, else the user postgres, else nobody.
func serverAccount(data string) (account, error) {
	if os.Geteuid() != 0 {
		return account{name: "uid " + strconv.Itoa(os.Geteuid()), uid: uint32(os.Geteuid()), gid: uint32(os.Getegid())}, nil //nolint:gosec // ids
	}
	if uid, gid, err := ownerOf(data); err == nil && uid != 0 {
		return unprivileged("uid "+strconv.FormatUint(uint64(uid), 10), uid, gid), nil
	}
	for _, name := range []string{"postgres", "nobody"} {
		found, err := user.Lookup(name)
		if err != nil {
			continue
		}
		uid, err1 := strconv.ParseUint(found.Uid, 10, 32)
		gid, err2 := strconv.ParseUint(found.Gid, 10, 32)
		if err1 == nil && err2 == nil && uid != 0 {
			return unprivileged(name, uint32(uid), uint32(gid)), nil
		}
	}
	return account{}, errors.New("running as root, which PostgreSQL refuses, and there is no user postgres or nobody to run it as: " +
		"add one (useradd --system postgres), run as another user, or give a server in ORDERSAGA_DATABASE_URL")
}

func unprivileged(name string, uid, gid uint32) account {
	return account{name: name, uid: uid, gid: gid, credential: &syscall.Credential{Uid: uid, Gid: gid}}
}

// own gives path to the account, so that its server may write there.
func (a account) own(path string) error {
	if a.credential == nil {
		return nil
	}
	if err := os.Chown(path, int(a.uid), int(a.gid)); err != nil {
		return fmt.Errorf("give %s to %s: %w", path, a.name, err)
	}
	return nil
}

// barrier returns the first directory on the way to path that the account may not enter, or "".
func (a account) barrier(path string) string {
	if a.credential == nil {
		return "" // our own right to enter shows by itself
	}
	if real, err := filepath.EvalSymlinks(path); err == nil {
		path = real
	}
	barrier := ""
	for dir := filepath.Clean(path); ; dir = filepath.Dir(dir) {
		if info, err := os.Stat(dir); err == nil && info.IsDir() && !a.mayEnter(info) {
			barrier = dir
		}
		if dir == filepath.Dir(dir) {
			return barrier
		}
	}
}

func (a account) mayEnter(info os.FileInfo) bool {
	stat, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return true
	}
	mode := info.Mode().Perm()
	switch {
	case stat.Uid == a.uid:
		return mode&0o100 != 0
	case stat.Gid == a.gid:
		return mode&0o010 != 0
	default:
		return mode&0o001 != 0
	}
}

func ownerOf(path string) (uid, gid uint32, err error) {
	info, err := os.Stat(path)
	if err != nil {
		return 0, 0, fmt.Errorf("find the owner of the data: %w", err)
	}
	stat, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return math.MaxUint32, math.MaxUint32, fmt.Errorf("find the owner of %s: not known here", path)
	}
	return stat.Uid, stat.Gid, nil
}
