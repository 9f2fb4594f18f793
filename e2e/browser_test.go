// SPDX-License-Identifier: Apache-2.0

//go:build linux

package e2e

import (
	"context"
	"fmt"
	"io"
	"net"
	"os/exec"
	"strings"
	"sync"
	"testing"
)

const (
	// rebindName is a page's, and by the time that it asks for more, tarn's.
	rebindName = "evil.test"
	// rebindIP has tarn's port, so that the page and tarn are one origin to a
	// browser.
	rebindIP = "127.0.0.2"
)

// page asks for the manifest in every way that a page has, and writes what it may
// read. It waits for each answer, so that all is said once it has loaded.
const page = `<!DOCTYPE html><title>x</title><body><script>
function read(what, method, url) {
	var text = what + ": ";
	try {
		var x = new XMLHttpRequest();
		x.open(method, url, false);
		if (method == "POST") x.setRequestHeader("Content-Type", "application/json");
		x.send(method == "POST" ? '{"image": "app"}' : null);
		text += x.status + " " + x.responseText;
	} catch (e) {
		text += "nothing";
	}
	var p = document.createElement("p");
	p.textContent = text;
	document.body.appendChild(p);
}
read("rebound", "GET", "/v2/%[1]s");
read("elsewhere", "GET", "http://%[2]s/v2/%[1]s");
read("by name", "GET", "http://localhost:5050/v2/%[1]s");
read("the list", "GET", "http://%[3]s/api/v1/images");
read("a change", "POST", "http://%[3]s/api/v1/evict");
</script>`

// TestAPageInABrowserReadsNothing: a real Chromium opens a stranger's page, whose
// name leads to tarn a moment later.
func TestAPageInABrowserReadsNothing(t *testing.T) {
	newRegistry(t, nil)
	i := pushSaying(t, "app/private", "v1", "hello", noise("a", 1<<10, 1))
	for _, c := range []struct {
		name, settings string
		reads          bool
	}{
		{"of a name that is not tarn's", "", false},
		// Which shows that the page would.
		{"of a name that the operator has given to tarn", "names: [" + rebindName + "]\n", true},
	} {
		t.Run(c.name, func(t *testing.T) {
			startTarn(t, folder(t, work(), "data"), c.settings)
			rebound := startRebinding(t, fmt.Sprintf(page, i.repo+"/manifests/v1?ns="+upstreamName, tarnAddr, tarnAdminAddr))
			seen := browse(t, "http://"+rebindName+":5050/")
			for _, part := range []string{"rebound: ", "elsewhere: nothing", "by name: nothing", "the list: nothing", "a change: nothing"} {
				if !strings.Contains(seen, "<p>"+part) {
					t.Errorf("the page does not say %q:\n%s", part, seen)
				}
			}
			if n := rebound(); n == 0 {
				t.Error("the page did not reach tarn under its own name")
			}
			if got := strings.Contains(seen, "layers"); got != c.reads {
				t.Errorf("the page reads the manifest: %v:\n%s", got, seen)
			}
			if got := strings.Contains(seen, "rebound: 421"); got == c.reads {
				t.Errorf("the page is told that the name is not tarn's: %v:\n%s", got, seen)
			}
		})
	}
}

// browse returns what a page came to be once it had loaded.
func browse(t *testing.T, url string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
		"--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
		"--user-data-dir="+t.TempDir(), "--host-resolver-rules=MAP "+rebindName+" "+rebindIP, "--dump-dom", url)
	var words strings.Builder
	cmd.Stderr = &words
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("chromium: %v\n%s", err, words.String())
	}
	return string(out)
}

// startRebinding serves the page at rebindIP, and leads each further connection to
// tarn, byte for byte: what a browser sees of a name server that has changed its
// mind. It returns how many it led.
func startRebinding(t *testing.T, page string) (led func() int) {
	t.Helper()
	l, err := net.Listen("tcp", rebindIP+":5050")
	if err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	var mu sync.Mutex
	served, n := false, 0
	// The page's own server closes its connection, and so the browser asks for
	// the name again.
	serve := func(c net.Conn) {
		defer c.Close()
		buf := make([]byte, 64<<10)
		got, err := c.Read(buf)
		if err != nil {
			return // the browser opens connections ahead
		}
		mu.Lock()
		first := !served
		served = true
		mu.Unlock()
		if first {
			fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s", len(page), page)
			return
		}
		to, err := net.Dial("tcp", tarnAddr)
		if err != nil {
			t.Error(err)
			return
		}
		defer to.Close()
		if strings.HasPrefix(string(buf[:got]), "GET /v2/") {
			mu.Lock()
			n++
			mu.Unlock()
		}
		if _, err := to.Write(buf[:got]); err != nil {
			return
		}
		go func() { io.Copy(to, c); to.Close() }() // ends with the connection
		io.Copy(c, to)
	}
	all.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			all.Go(func() { serve(c) })
		}
	})
	t.Cleanup(func() { l.Close(); all.Wait() })
	return func() int {
		mu.Lock()
		defer mu.Unlock()
		return n
	}
}
