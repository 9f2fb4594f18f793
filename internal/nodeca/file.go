// SPDX-License-Identifier: Apache-2.0

package nodeca

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

const (
	dirMode, certMode, keyMode = 0o755, 0o644, 0o600
	// maxFile is far more than any of the files has.
	maxFile = 64 << 10
	// lockName is a file that only the owner can open: everybody who can read the
	// directory could lock that, and keep Ensure waiting for ever.
	lockName = ".lock"
	tempName = ".new-*"
	certType = "CERTIFICATE"
	keyType  = "PRIVATE KEY"
)

// open makes the directory where it is not there, refuses one that others could put a
// CA of their own into, and waits until it is this run's alone. What a crash left
// half-written goes.
func open(dir string) (unlock func(), err error) {
	if err := os.MkdirAll(dir, dirMode); err != nil {
		return nil, err
	}
	info, err := os.Stat(dir)
	if err != nil {
		return nil, err
	}
	if info.Mode().Perm()&0o022 != 0 {
		return nil, fmt.Errorf("%s may be written by others than its owner: chmod go-w %s", dir, dir)
	}
	if owner := info.Sys().(*syscall.Stat_t).Uid; owner != 0 && int(owner) != os.Geteuid() {
		return nil, fmt.Errorf("%s belongs to the user %d, who could put another CA there", dir, owner)
	}
	if err := checkAbove(dir); err != nil {
		return nil, err
	}
	lock, err := os.OpenFile(filepath.Join(dir, lockName), os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, keyMode)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		lock.Close()
		return nil, fmt.Errorf("lock %s: %w", lock.Name(), err)
	}
	left, _ := filepath.Glob(filepath.Join(dir, tempName)) // the pattern is a constant
	for _, path := range left {
		os.Remove(path)
	}
	return func() { lock.Close() }, nil
}

// checkAbove refuses a directory that somebody else could put another one in place of:
// what is made and given away here would be made and given away there.
func checkAbove(dir string) error {
	real, err := filepath.EvalSymlinks(dir)
	if err != nil {
		return err
	}
	for _, path := range []string{dir, real} {
		for ; path != "/"; path = filepath.Dir(path) {
			info, err := os.Lstat(path)
			if err != nil {
				return err
			}
			owner, mode := info.Sys().(*syscall.Stat_t).Uid, info.Mode()
			if owner != 0 && int(owner) != os.Geteuid() || mode.IsDir() && mode.Perm()&0o022 != 0 && mode&fs.ModeSticky == 0 {
				return fmt.Errorf("%s may be changed by others than this user and root, who could put another directory in place of %s: choose another", path, dir)
			}
		}
	}
	return nil
}

// readKey returns nil where there is no key that can be used: none, one that is not
// whole, or one that everybody could have read.
func readKey(path string) (*ecdsa.PrivateKey, error) {
	der, mode, err := readPEM(path, keyType)
	if err != nil || der == nil || mode&0o007 != 0 {
		return nil, err
	}
	parsed, err := x509.ParsePKCS8PrivateKey(der)
	key, ok := parsed.(*ecdsa.PrivateKey)
	if err != nil || !ok || key.Curve != elliptic.P256() {
		return nil, nil
	}
	return key, nil
}

// readCert returns nil where there is no certificate that can be read.
func readCert(path string) (*x509.Certificate, error) {
	der, _, err := readPEM(path, certType)
	if err != nil || der == nil {
		return nil, err
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, nil
	}
	return cert, nil
}

// readPEM returns the one block that a file has, or nil. Only what another run could
// not mend is an error.
func readPEM(path, kind string) (der []byte, mode fs.FileMode, err error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ELOOP) {
		return nil, 0, nil
	}
	if err != nil {
		return nil, 0, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, 0, err
	}
	if !info.Mode().IsRegular() {
		return nil, 0, fmt.Errorf("%s is no file; remove it", path)
	}
	text, err := io.ReadAll(io.LimitReader(f, maxFile))
	if err != nil {
		return nil, 0, fmt.Errorf("read %s: %w", path, err)
	}
	block, rest := pem.Decode(text)
	if block == nil || block.Type != kind || strings.TrimSpace(string(rest)) != "" {
		return nil, 0, nil
	}
	return block.Bytes, info.Mode(), nil
}

func writeKey(path string, key *ecdsa.PrivateKey) error {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	return replace(path, keyType, der, keyMode)
}

func writeCert(path string, cert *x509.Certificate) error {
	return replace(path, certType, cert.Raw, certMode)
}

// replace writes a file anew. The kernel sees, in this order: open of a file of
// another name that only the owner can read, write, fchmod, fsync, close, rename,
// fsync of the directory.
func replace(path, kind string, der []byte, mode fs.FileMode) (err error) {
	f, err := os.CreateTemp(filepath.Dir(path), tempName)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			os.Remove(f.Name())
			err = fmt.Errorf("write %s: %w", path, err)
		}
	}()
	err = pem.Encode(f, &pem.Block{Type: kind, Bytes: der})
	if err == nil {
		err = f.Chmod(mode)
	}
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	if err = os.Rename(f.Name(), path); err != nil {
		return err
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}
