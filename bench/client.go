// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"math"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// client is one connection that costs as little as it can: requests are written
// as they are, and of an answer only the status and the length are looked at.
type client struct {
	conn net.Conn
	r    *bufio.Reader
	buf  []byte
}

func dial(addr string) (*client, error) {
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		return nil, err
	}
	return &client{conn: conn, r: bufio.NewReaderSize(conn, 64<<10), buf: make([]byte, 256<<10)}, nil
}

func (c *client) close() { c.conn.Close() }

const accept = "Accept: application/vnd.oci.image.manifest.v1+json, application/vnd.oci.image.index.v1+json, */*\r\n"

func requestText(method, path string) []byte {
	return []byte(method + " " + path + " HTTP/1.1\r\nHost: 127.0.0.1\r\n" + accept + "\r\n")
}

var errStatus = errors.New("status")

type reply struct {
	status int
	length int64
	first  time.Duration // until the first byte of the body
}

// do sends a request and reads all of its answer.
func (c *client) do(request []byte) (reply, error) {
	start := time.Now()
	c.conn.SetDeadline(start.Add(2 * time.Minute))
	if _, err := c.conn.Write(request); err != nil {
		return reply{}, err
	}
	a := reply{length: -1}
	chunked := false
	for line := 0; ; line++ {
		text, err := c.r.ReadSlice('\n')
		if err != nil {
			return a, err
		}
		text = bytes.TrimRight(text, "\r\n")
		switch {
		case line == 0 && len(text) >= 12:
			if a.status, err = strconv.Atoi(string(text[9:12])); err != nil {
				return a, err
			}
		case len(text) == 0:
			if a.status >= 300 {
				return a, fmt.Errorf("%w %d", errStatus, a.status)
			}
			if bytes.HasPrefix(request, []byte("HEAD ")) || a.status == 304 {
				return a, nil
			}
			return a, c.body(&a, chunked, start)
		default:
			name, value, _ := bytes.Cut(text, []byte(": "))
			if bytes.EqualFold(name, []byte("Content-Length")) {
				if a.length, err = strconv.ParseInt(string(value), 10, 64); err != nil {
					return a, err
				}
			}
			chunked = chunked || bytes.EqualFold(name, []byte("Transfer-Encoding"))
		}
	}
}

func (c *client) body(a *reply, chunked bool, start time.Time) error {
	if !chunked {
		if a.length < 0 {
			return errors.New("an answer without a length")
		}
		return c.discard(a, a.length, start)
	}
	a.length = 0
	for {
		line, err := c.r.ReadString('\n')
		if err != nil {
			return err
		}
		n, err := strconv.ParseInt(strings.TrimSpace(line), 16, 64)
		if err != nil {
			return err
		}
		a.length += n
		if err := c.discard(a, n+2, start); err != nil || n == 0 {
			return err
		}
	}
}

func (c *client) discard(a *reply, n int64, start time.Time) error {
	for n > 0 {
		got := 0
		var err error
		if buffered := c.r.Buffered(); buffered > 0 {
			got, err = c.r.Discard(min(buffered, int(n)))
		} else {
			got, err = c.conn.Read(c.buf[:min(int64(len(c.buf)), n)])
		}
		if a.first == 0 && got > 0 {
			a.first = time.Since(start)
		}
		if n -= int64(got); err != nil {
			return err
		}
	}
	return nil
}

// pull fetches an image as containerd does: the tag by HEAD, the manifest by
// its digest, the config, and three layers at a time.
func pull(addr string, i image) (time.Duration, error) {
	const parallel = 3
	start := time.Now()
	first, err := dial(addr)
	if err != nil {
		return 0, err
	}
	defer first.close()
	if _, err := first.do(requestText("HEAD", "/v2/"+i.repository+"/manifests/"+i.tag)); err != nil {
		return 0, fmt.Errorf("tag: %w", err)
	}
	get := func(c *client, kind string, o *content) error {
		a, err := c.do(requestText("GET", "/v2/"+i.repository+"/"+kind+"/"+o.digest))
		if err == nil && a.length != o.size() {
			err = fmt.Errorf("%d bytes, not %d", a.length, o.size())
		}
		if err != nil {
			return fmt.Errorf("%s %s: %w", kind, o.digest[:19], err)
		}
		return nil
	}
	if err := get(first, "manifests", i.manifest); err != nil {
		return 0, err
	}
	if err := get(first, "blobs", i.blobs[0]); err != nil {
		return 0, err
	}
	layers := make(chan *content, len(i.blobs))
	for _, l := range i.blobs[1:] {
		layers <- l
	}
	close(layers)
	errs := make(chan error, parallel)
	for n := range parallel {
		go func() {
			c := first
			if n > 0 {
				var err error
				if c, err = dial(addr); err != nil {
					errs <- err
					return
				}
				defer c.close()
			}
			var err error
			for l := range layers {
				if err == nil {
					err = get(c, "blobs", l)
				}
			}
			errs <- err
		}()
	}
	for range parallel {
		err = errors.Join(err, <-errs)
	}
	return time.Since(start), err
}

// load is what a number of connections got in a while.
type load struct {
	requests  int64
	bytes     int64
	took      time.Duration
	latencies []time.Duration // sorted
}

func (l load) rate() float64 { return float64(l.requests) / l.took.Seconds() }

func (l load) percentile(p float64) time.Duration {
	if len(l.latencies) == 0 {
		return 0
	}
	return l.latencies[min(len(l.latencies)-1, int(math.Ceil(p*float64(len(l.latencies)))))]
}

// hammer sends requests over that many connections for a while; next gives
// each connection its n-th one.
func hammer(addr string, connections int, d time.Duration, next func(connection, n int) []byte) (load, error) {
	var wg sync.WaitGroup
	loads, errs := make([]load, connections), make([]error, connections)
	start := time.Now()
	for i := range connections {
		c, err := dial(addr)
		if err != nil {
			return load{}, err
		}
		defer c.close()
		wg.Go(func() {
			l := &loads[i]
			for n := 0; time.Since(start) < d; n++ {
				begun := time.Now()
				request := next(i, n)
				if request == nil {
					return
				}
				a, err := c.do(request)
				if err != nil {
					errs[i] = err
					return
				}
				l.requests++
				l.bytes += max(0, a.length)
				l.latencies = append(l.latencies, time.Since(begun))
			}
		})
	}
	wg.Wait()
	all := load{took: time.Since(start)}
	for _, l := range loads {
		all.requests += l.requests
		all.bytes += l.bytes
		all.latencies = append(all.latencies, l.latencies...)
	}
	slices.Sort(all.latencies)
	return all, errors.Join(errs...)
}
