// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// listen opens a stream of events over a connection of its own, and returns its first
// lines: of a stream up to its first event, else the whole answer.
func (p *process) listen() (c net.Conn, status int, said string) {
	p.t.Helper()
	c, err := net.Dial("tcp", strings.TrimPrefix(p.admin, "http://"))
	if err != nil {
		p.t.Error(err)
		return nil, 0, ""
	}
	p.t.Cleanup(func() { c.Close() })
	io.WriteString(c, "GET /api/v1/events HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
	c.SetReadDeadline(time.Now().Add(20 * time.Second))
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		return c, 0, err.Error()
	}
	if resp.StatusCode == http.StatusOK {
		said, err = bufio.NewReader(resp.Body).ReadString('\n')
	} else {
		var body []byte
		body, err = io.ReadAll(resp.Body)
		said = string(body)
	}
	if err != nil {
		p.t.Error(err)
	}
	return c, resp.StatusCode, said
}

// TestSixteenListenAndTheNextIsRefusedInWords, and a stop waits for none of them.
func TestSixteenListenAndTheNextIsRefusedInWords(t *testing.T) {
	t.Parallel()
	p := run(t, t.TempDir())
	for range 16 {
		if _, status, said := p.listen(); status != http.StatusOK || !strings.HasPrefix(said, `data: {"status":`) {
			t.Fatalf("%d %.100s", status, said)
		}
	}
	if _, status, said := p.listen(); status != http.StatusServiceUnavailable || !strings.Contains(said, "16 listen to events already") || !strings.Contains(said, "/api/v1/status") {
		t.Errorf("the next: %d %s", status, said)
	}
	p.Process.Signal(syscall.SIGTERM)
	p.ended()
	if strings.Contains(p.output.String(), "they are cut") {
		t.Errorf("a stop waited for who listens to events:\n%s", p.output.String())
	}
}

// TestAThousandWhoWantEvents: most are refused, those that are not never read, and
// others drop. Everything else is answered, and memory stays where it was.
func TestAThousandWhoWantEvents(t *testing.T) {
	t.Parallel()
	p := run(t, t.TempDir())
	var asking sync.WaitGroup
	for range 4 {
		asking.Go(func() {
			for i := range 250 {
				c, status, _ := p.listen()
				if status != http.StatusOK && status != http.StatusServiceUnavailable {
					t.Errorf("one of the thousand: %d", status)
				}
				if c != nil && i%3 == 0 {
					c.Close() // the others keep what they have, and read no more of it
				}
			}
		})
	}
	for range 200 { // while they ask
		resp, err := http.Get(p.admin + "/api/v1/status")
		if err != nil {
			t.Fatal(err)
		}
		io.Copy(io.Discard, resp.Body)
		resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			t.Fatalf("the status: %s", resp.Status)
		}
	}
	asking.Wait()
	if peak := p.peakMemory(t); peak > 128<<20 || peak == 0 {
		t.Errorf("%d bytes of memory", peak)
	} else {
		t.Logf("at most %d MiB of memory", peak>>20)
	}
}
