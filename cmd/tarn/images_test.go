// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"tarn/images"
	"tarn/internal/registrytest"

	"github.com/opencontainers/go-digest"
)

// tell runs the program, and returns what it says, and with which code it ends.
func (p *process) tell(args ...string) (stdout, stderr string, code int) {
	p.t.Helper()
	cmd := command(append(args, "--admin", p.socket())...)
	var out, words bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &words
	err := cmd.Run()
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit):
		code = exit.ExitCode()
	case err != nil:
		p.t.Fatal(err)
	}
	return out.String(), words.String(), code
}

// pull gets an image as a client does, by tag.
func (p *process) pull(repository, tag string, blobs ...digest.Digest) {
	p.t.Helper()
	paths := []string{"/manifests/" + tag}
	for _, b := range blobs {
		paths = append(paths, "/blobs/"+b.String())
	}
	for _, path := range paths {
		resp, body, err := p.get("/v2/" + repository + path + "?ns=lab.test")
		if err != nil || resp.StatusCode != 200 {
			p.t.Fatalf("%s: %v %s", path, err, body)
		}
	}
}

func TestImagesArePinnedEvictedAndVerified(t *testing.T) {
	t.Parallel()
	r := registrytest.New(t)
	layers := noises(3, 500_000)
	one, two := r.Image("team/app", "v1", layers[0], layers[1]), r.Image("team/app", "v2", layers[0], layers[2])
	dir := t.TempDir()
	p := run(t, dir, "--upstream", "lab.test="+r.URL, "--max-size", "16MiB")
	p.pull("team/app", "v1", append(one.Layers, one.Config)...)
	p.pull("team/app", "v2", append(two.Layers, two.Config)...)
	all := func() []images.Image {
		t.Helper()
		out, words, code := p.tell("images", "-o", "json")
		var answer struct{ Images []images.Image }
		if err := json.Unmarshal([]byte(out), &answer); err != nil || code != 0 {
			t.Fatalf("%d: %s %s: %v", code, out, words, err)
		}
		return answer.Images
	}
	p.until("both are listed whole", func() bool {
		found := all()
		return len(found) == 2 && found[0].HereBytes == found[0].TotalBytes && found[1].HereBytes == found[1].TotalBytes
	})
	for i, image := range all() {
		if image.Repository != "team/app" || image.Tag != []string{"v1", "v2"}[i] || image.Digest != []digest.Digest{one.Manifest, two.Manifest}[i] ||
			image.HereBytes < 1_000_000 || image.Pinned || image.Confirmed.IsZero() || image.Used.IsZero() {
			t.Errorf("%+v", image)
		}
	}
	mustSay := func(want string, wantCode int, args ...string) {
		t.Helper()
		out, words, code := p.tell(args...)
		if code != wantCode || !strings.Contains(out+words, want) {
			t.Errorf("tarn %s ends with %d: %s%s", strings.Join(args, " "), code, out, words)
		}
	}
	mustSay("977.2KiB of 977.2KiB are here", 0, "pin", "lab.test/team/app:v1")
	mustSay("pinned", 0, "images")
	mustSay("as lab.test/team/app:v1: unpin that first", 1, "evict", "lab.test/team/app:v1")
	r.Image("team/app", "other", layers[1])
	mustSay("0B of 0B", 0, "pin", "lab.test/team/app:other", "--platform", "all")
	mustSay("lab.test/team/app:other   all", 0, "pin")
	mustSay("unpinned", 0, "unpin", "lab.test/team/app:other")
	mustSay("not pinned", 1, "unpin", "lab.test/team/app:other")
	mustSay("not an image", 1, "pin", "lab.test/Team")
	mustSay("not here", 1, "evict", "lab.test/team/app:v3")
	mustSay("3 objects", 0, "evict", "lab.test/team/app@"+two.Manifest.String())
	if images := all(); len(images) != 1 || images[0].HereBytes != images[0].TotalBytes {
		t.Errorf("%+v", images)
	}
	mustSay("--rate", 1, "verify", "--rate", "5%")
	mustSay("0 bad, 0 missing", 0, "verify", "--rate", "0")
	path := filepath.Join(dir, "blobs", "sha256", one.Layers[1].Encoded())
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err == nil {
		_, err = f.WriteAt([]byte("wrong"), 1000)
		f.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	mustSay("bad, dropped: "+one.Layers[1].String(), 1, "verify", "--rate", "0")
	if images := all(); len(images) != 1 || images[0].HereBytes >= images[0].TotalBytes {
		t.Errorf("%+v", images)
	}
	mustSay("0 bad, 0 missing", 0, "verify", "-o", "table")

	// Over the pins' room: three images of 6 MB do not fit into 16 MiB.
	big := noises(4, 6_000_000)
	for i, layer := range big {
		tag := "big" + string(rune('a'+i))
		image := r.Image("team/app", tag, layer)
		p.pull("team/app", tag, image.Config)
		want, code := "are here", 0
		if i >= 2 { // and the one from before
			want, code = "max_size", 1
		}
		p.until("it is stored", func() bool { return len(all()) >= 2+i })
		mustSay(want, code, "pin", "lab.test/team/app:"+tag)
	}
	p.terminate()
	mustSay("is tarn running", 1, "images")
	p = run(t, dir, "--upstream", "lab.test="+r.URL, "--max-size", "16MiB")
	pinned := 0
	for _, image := range all() {
		if image.Pinned {
			pinned++
		}
	}
	if pinned != 3 {
		t.Errorf("%d are pinned after the restart", pinned)
	}
}

// TestWhatChangesSomethingIsNotAPages: a form of another site reaches nothing.
func TestWhatChangesSomethingIsNotAPages(t *testing.T) {
	t.Parallel()
	p := runWith(t, t.TempDir(), "admin_changes: tcp\n") // else it reaches nothing in any case
	for name, headers := range map[string][2]string{
		"a form":       {"Content-Type", "text/plain"},
		"another site": {"Origin", "http://evil.example"},
		"another host": {"Host", "evil.example"},
	} {
		for _, path := range []string{"/api/v1/evict", "/api/v1/pins", "/api/v1/verify"} {
			req, err := http.NewRequest("POST", p.admin+path, strings.NewReader(`{"image": "app"}`))
			if err != nil {
				t.Fatal(err)
			}
			req.Header.Set("Content-Type", "application/json")
			req.Header.Set(headers[0], headers[1])
			if headers[0] == "Host" {
				req.Host = headers[1]
			}
			resp, err := http.DefaultClient.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			io.Copy(io.Discard, resp.Body)
			resp.Body.Close()
			if resp.StatusCode != 403 && resp.StatusCode != 415 {
				t.Errorf("%s to %s: %s", name, path, resp.Status)
			}
		}
	}
}
