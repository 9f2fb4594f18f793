// SPDX-License-Identifier: Apache-2.0

package main

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"os"
	"sync"
	"syscall"
	"time"

	"go.uber.org/zap"
)

const (
	// lookEvery is how often the files are looked at, as long as clients come.
	lookEvery = time.Second
	// endsSoon is how long before a certificate ends the log says so, once each
	// warnEvery as long as clients come.
	endsSoon  = 30 * 24 * time.Hour
	warnEvery = 24 * time.Hour
)

// certificates are what the registry listener shows its clients, and which of them it
// lets in. They follow the files: a handshake looks whether these have changed. What
// cannot be used, such as a certificate whose key is still to come, changes nothing.
type certificates struct {
	log *zap.Logger

	// mu guards what follows, and is held while the files are read: a handshake
	// that comes meanwhile would have to wait for what they say.
	mu      sync.Mutex
	files   TLS
	looked  time.Time
	seen    [3]fileVersion // also of files that were of no use
	current *tls.Config
	warned  time.Time
}

// newCertificates reads the files for the first time.
func newCertificates(files TLS, log *zap.Logger) (*certificates, error) {
	current, seen, err := readCertificates(files)
	if err != nil {
		return nil, err
	}
	c := &certificates{log: log, files: files, looked: time.Now(), seen: seen, current: current}
	c.warn(c.looked)
	return c, nil
}

// use has the certificates follow these files from now on, which readCertificates
// has read.
func (c *certificates) use(files TLS, current *tls.Config, seen [3]fileVersion) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.files, c.current, c.seen, c.warned = files, current, seen, time.Time{}
	c.warn(time.Now())
}

// config is the server's. The connection of a client that is let in by one that is
// replaced meanwhile goes on.
func (c *certificates) config() *tls.Config {
	return &tls.Config{GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
		return c.at(time.Now()), nil
	}}
}

// at looks at the files unless that was done a moment ago.
func (c *certificates) at(now time.Time) *tls.Config {
	c.mu.Lock()
	defer c.mu.Unlock()
	if since := now.Sub(c.looked); since >= 0 && since < lookEvery {
		return c.current
	}
	c.looked = now
	defer c.warn(now)
	if versions(c.files) == c.seen {
		return c.current
	}
	current, seen, err := readCertificates(c.files)
	if c.seen = seen; err != nil {
		c.log.Error("the files of tls: have changed and cannot be used; what they were before is still used", zap.Error(err))
		return c.current
	}
	c.current = current
	c.warned = time.Time{}
	c.log.Info("the files of tls: have changed and are used from now on", zap.Time("not_after", c.ends()))
	return c.current
}

// expiry is when the certificate that is shown ends, in seconds since 1970.
func (c *certificates) expiry() float64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return float64(c.ends().Unix())
}

// ends is when the certificate that is shown does. Called with the lock.
func (c *certificates) ends() time.Time { return c.current.Certificates[0].Leaf.NotAfter }

// warn says that the certificate ends, while there is time. Called with the lock, or
// before anybody else knows of it.
func (c *certificates) warn(now time.Time) {
	if ends := c.ends(); ends.Sub(now) < endsSoon && now.Sub(c.warned) >= warnEvery {
		c.warned = now
		c.log.Warn("the certificate of tls.cert_file ends soon, or has ended: clients go to the registries themselves then",
			zap.String("cert_file", c.files.CertFile), zap.Time("not_after", ends))
	}
}

// readCertificates reads the files, and says which versions of them it has read, or
// older ones.
func readCertificates(files TLS) (*tls.Config, [3]fileVersion, error) {
	seen := versions(files)
	cert, err := readKeyPair(files.CertFile, files.KeyFile)
	if err != nil {
		return nil, seen, fmt.Errorf("tls: cert_file %s, key_file %s: %w", files.CertFile, files.KeyFile, err)
	}
	config := &tls.Config{
		Certificates: []tls.Certificate{cert},
		NextProtos:   []string{"http/1.1"}, // see newServer
		// A ticket would let its holder in whatever client_ca_file says by now.
		SessionTicketsDisabled: true,
	}
	if files.ClientCAFile == "" {
		return config, seen, nil
	}
	if config.ClientCAs, err = readPool(files.ClientCAFile); err != nil {
		return nil, seen, fmt.Errorf("tls: client_ca_file: %w", err)
	}
	config.ClientAuth = tls.RequireAndVerifyClientCert
	return config, seen, nil
}

// maxSettingsBytes is far more than certificates, keys and passwords take.
const maxSettingsBytes = 4 << 20

// readSettings reads a file that the configuration names. It does not wait for the other
// end of a pipe: clients may wait for what it says, and so does the end of tarn.
func readSettings(path string) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if info, err := f.Stat(); err == nil && !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is no file", path)
	}
	data, err := io.ReadAll(io.LimitReader(f, maxSettingsBytes+1))
	if err == nil && len(data) > maxSettingsBytes {
		err = fmt.Errorf("%s has more than %d bytes", path, maxSettingsBytes)
	}
	return data, err
}

func readKeyPair(certFile, keyFile string) (tls.Certificate, error) {
	cert, err := readSettings(certFile)
	if err != nil {
		return tls.Certificate{}, err
	}
	key, err := readSettings(keyFile)
	if err != nil {
		return tls.Certificate{}, err
	}
	return tls.X509KeyPair(cert, key)
}

// readPool reads a file of certificates.
func readPool(path string) (*x509.CertPool, error) {
	pem, err := readSettings(path)
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("%s has no certificate in PEM form", path)
	}
	return pool, nil
}

// fileVersion tells a file from what it was before; the zero value is none.
type fileVersion struct {
	device, inode    uint64
	size             int64
	changed, written syscall.Timespec
}

func versions(files TLS) (v [3]fileVersion) {
	for i, path := range []string{files.CertFile, files.KeyFile, files.ClientCAFile} {
		if info, err := os.Stat(path); err == nil { // else reading it says why
			s := info.Sys().(*syscall.Stat_t)
			v[i] = fileVersion{s.Dev, s.Ino, s.Size, s.Ctim, s.Mtim}
		}
	}
	return v
}
