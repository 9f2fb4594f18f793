// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

const (
	// requests is N: counted is what 2N requests run through more than N do. What
	// a start, a connection and a clock's tick run through is the same in both, or
	// vanishes when it is divided by N.
	requests = 1000
	// patience is how long tarn may take to start and to answer.
	patience = 20 * time.Second
	// database is the module whose transactions and locks are counted, too.
	database = "go.etcd.io/bbolt"
)

// printWarm prints what requests for what is on the disk run through.
func printWarm(w io.Writer, dir string, names bool) error {
	work, err := os.MkdirTemp("", "tarn-house.")
	if err != nil {
		return err
	}
	defer os.RemoveAll(work)
	tarn := filepath.Join(work, "tarn")
	if _, err := command(dir, "go", "build", "-buildvcs=false", "-o", tarn, "-cover", "-covermode=atomic", "-coverpkg=tarn/...,"+database, "./cmd/tarn"); err != nil {
		return err
	}
	databaseDir, err := command(dir, "go", "list", "-m", "-f", "{{.Dir}}", database)
	if err != nil {
		return err
	}
	code, err := readCode(map[string]string{"tarn": dir, database: strings.TrimSpace(databaseDir)})
	if err != nil {
		return err
	}
	blob, manifest := bytes.Repeat([]byte("layer"), 200_000), []byte(`{"schemaVersion":2}`)
	for _, r := range []struct{ name, path string }{
		{"blob", "/v2/app/blobs/" + digest(blob)},
		{"tag", "/v2/app/manifests/latest"},
	} {
		var counts [2]counts
		for i := range counts {
			if counts[i], err = countRun(work, tarn, r.path, (i+1)*requests, blob, manifest); err != nil {
				return fmt.Errorf("%s: %w", r.name, err)
			}
		}
		fmt.Fprintf(w, "\na GET of a warm %s\n", r.name)
		code.print(w, counts[0], counts[1], names)
	}
	return nil
}

// countRun starts a tarn with nothing in it, warms it, sends n requests, and
// stops it.
func countRun(work, tarn, path string, n int, blob, manifest []byte) (_ counts, err error) {
	run, err := os.MkdirTemp(work, "run.")
	if err != nil {
		return nil, err
	}
	upstream := httptest.NewServer(registry(blob, manifest))
	defer upstream.Close()
	addr, err := freeAddress()
	if err != nil {
		return nil, err
	}
	config, covered := filepath.Join(run, "tarn.yaml"), filepath.Join(run, "covered")
	text := fmt.Sprintf("listen: %s\nadmin_listen: ''\nadmin_socket: off\ndir: %s\nmin_free: 0\nmax_size: 1GiB\n"+
		"default_upstream: house.test\nupstreams: [{name: house.test, endpoints: ['%s']}]\n", addr, filepath.Join(run, "data"), upstream.URL)
	if err := errors.Join(os.WriteFile(config, []byte(text), 0o600), os.Mkdir(covered, 0o700)); err != nil {
		return nil, err
	}
	var said bytes.Buffer
	process := exec.Command(tarn, "serve", "--config", config)
	process.Env = append(os.Environ(), "GOCOVERDIR="+covered)
	process.Stderr = &said
	process.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL} // it must not stay behind
	if err := process.Start(); err != nil {
		return nil, err
	}
	exited := make(chan error, 1)
	go func() { exited <- process.Wait() }()
	asked := ask("http://"+addr+path, n)
	process.Process.Signal(syscall.SIGTERM) // it writes its counters when it ends
	if err := errors.Join(asked, <-exited); err != nil {
		return nil, fmt.Errorf("%w\n%s", err, end(said.String()))
	}
	profile := filepath.Join(run, "profile")
	if _, err := command(run, "go", "tool", "covdata", "textfmt", "-i", covered, "-o", profile); err != nil {
		return nil, err
	}
	return readCounts(profile)
}

// ask sends a request until there is an answer, and then n more.
func ask(url string, n int) error {
	client := &http.Client{Timeout: patience, Transport: new(http.Transport)}
	defer client.CloseIdleConnections()
	get := func() error {
		resp, err := client.Get(url)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			return fmt.Errorf("%s: %s", url, resp.Status)
		}
		_, err = io.Copy(io.Discard, resp.Body)
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	err := get()
	for ; errors.Is(err, syscall.ECONNREFUSED) && ctx.Err() == nil; err = get() {
		time.Sleep(10 * time.Millisecond) // nothing tells when another process listens
	}
	for i := 0; i < n && err == nil; i++ {
		err = get()
	}
	return err
}

// registry has one repository with one blob and one manifest.
func registry(blob, manifest []byte) http.Handler {
	mux := http.NewServeMux()
	serve := func(path, mediaType string, body []byte) {
		mux.HandleFunc("GET "+path, func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", mediaType)
			w.Header().Set("Docker-Content-Digest", digest(body))
			http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(body))
		})
	}
	const manifestType = "application/vnd.oci.image.manifest.v1+json"
	serve("/v2/app/blobs/"+digest(blob), "application/octet-stream", blob)
	serve("/v2/app/manifests/latest", manifestType, manifest)
	serve("/v2/app/manifests/"+digest(manifest), manifestType, manifest)
	return mux
}

func digest(body []byte) string { return fmt.Sprintf("sha256:%x", sha256.Sum256(body)) }

func freeAddress() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	defer l.Close()
	return l.Addr().String(), nil
}

func command(dir, name string, args ...string) (string, error) {
	c := exec.Command(name, args...)
	c.Dir = dir
	var said bytes.Buffer
	c.Stderr = &said
	out, err := c.Output()
	if err != nil {
		err = fmt.Errorf("%s: %w\n%s", strings.Join(c.Args, " "), err, end(said.String()))
	}
	return string(out), err
}

// end is the last that somebody said.
func end(said string) string { return said[max(0, len(said)-2000):] }
