// SPDX-License-Identifier: Apache-2.0

//go:build linux

package e2e

import (
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"testing"

	"github.com/opencontainers/go-digest"
)

// A response writer that hides io.ReaderFrom makes the server copy every byte
// through memory of its own, and nothing but a tracer notices.
func TestACachedBlobIsSentByTheKernelAndNotCopied(t *testing.T) {
	n := &node{registry: newRegistry(t, nil), tarnDir: folder(t, work(), "tarn")}
	i := pushSaying(t, "app/big", "v1", "hello", noise("big", 16<<20, 5))
	blob := i.objects[len(i.objects)-1]

	n.tarn = startTarn(t, n.tarnDir, "")
	fetchBlob(t, i.repo, blob.Digest)
	n.tarn.stop(t)
	n.registry.take()

	// With -D the process that we started is tarn, and the tracer its
	// grandchild, so that a signal reaches tarn.
	trace := filepath.Join(folder(t, work(), "trace"), "strace.txt")
	n.tarn = startTarn(t, n.tarnDir, "", "strace", "-D", "-f", "-q", "-e", "trace=sendfile,splice,write,writev,sendto,sendmsg", "-e", "signal=none", "-s", "0", "-o", trace)
	fetchBlob(t, i.repo, blob.Digest)
	n.tarn.stop(t)
	for _, r := range n.registry.take() {
		if r.method == http.MethodGet && r.span != "bytes=0-0" { // which is the question
			t.Errorf("the blob was not served from disk: the registry got %s", r)
		}
	}

	// The last line is of the thread that the process began with.
	end := regexp.MustCompile(fmt.Sprintf(`(?m)^%d +\+\+\+ exited`, n.tarn.cmd.Process.Pid))
	var raw []byte
	waitFor(t, "the trace has tarn's end", func() (err error) {
		if raw, err = os.ReadFile(trace); err == nil && !end.Match(raw) {
			err = fmt.Errorf("its last bytes are %q", raw[max(0, len(raw)-200):])
		}
		return err
	})
	bytes, calls := map[string]int64{}, map[string]int{}
	for _, m := range returned.FindAllStringSubmatch(string(raw), -1) {
		v, err := strconv.ParseInt(m[2], 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		bytes[m[1]] += v
		calls[m[1]]++
	}
	t.Logf("for a blob of %d bytes: calls %v, bytes %v", blob.Size, calls, bytes)
	// The first bytes may go out with the headers.
	const withHeaders = 64 << 10
	if least := blob.Size - withHeaders; bytes["sendfile"] < least || bytes["sendfile"] > blob.Size {
		t.Errorf("sendfile sent %d bytes in %d calls, want %d to %d", bytes["sendfile"], calls["sendfile"], least, blob.Size)
	}
	var copied int64
	for call, n := range bytes {
		if call != "sendfile" {
			copied += n
		}
	}
	// Logs, headers and wake-ups of threads stay far below the blob.
	if copied > blob.Size/8 {
		t.Errorf("other calls wrote %d bytes, so the body of %d was copied: %v", copied, blob.Size, bytes)
	}
}

// returned finds the calls in a trace that returned a number of bytes: a whole
// call, or the end of one that was interrupted by another thread's line.
var returned = regexp.MustCompile(`(?m)^\d+ +(?:<\.\.\. )?(\w+)(?:\(| resumed>).* = (\d+)$`)

// fetchBlob gets a blob from tarn as containerd does, and checks every byte.
func fetchBlob(t *testing.T, repo string, d digest.Digest) {
	t.Helper()
	resp, err := http.Get("http://" + tarnAddr + "/v2/" + repo + "/blobs/" + d.String() + "?ns=" + upstreamName)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		t.Fatalf("GET %s answers %s", resp.Request.URL, resp.Status)
	}
	v := d.Verifier()
	size, err := io.Copy(v, resp.Body)
	if err != nil || !v.Verified() {
		t.Fatalf("GET %s: %d bytes that do not match, or %v", resp.Request.URL, size, err)
	}
}
