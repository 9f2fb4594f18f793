// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"

	"tarn/internal/registrytest"

	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// says runs the program and wants it to say this, and to end so.
func (p *process) says(want string, code int, args ...string) {
	p.t.Helper()
	out, words, got := p.tell(args...)
	if got != code || !strings.Contains(out+words, want) {
		p.t.Errorf("tarn %s ends with %d, not with %d and %q: %s%s", strings.Join(args, " "), got, code, want, out, words)
	}
}

// listed waits until so many images are here.
func (p *process) listed(n int) {
	p.t.Helper()
	p.until("the images are listed", func() bool {
		var all struct {
			Images []struct{ HereBytes, TotalBytes int64 }
		}
		fetchJSON(p.t, p.admin+"/api/v1/images", &all)
		whole := 0
		for _, i := range all.Images {
			if i.HereBytes == i.TotalBytes {
				whole++
			}
		}
		return whole == n
	})
}

func TestNamesMeanWhatAPersonMeans(t *testing.T) {
	t.Parallel()
	r := registrytest.New(t)
	p := run(t, t.TempDir(), "--upstream", "lab.test="+r.URL, "--upstream", "docker.io="+r.URL)
	layers := noises(3, 50_000)
	app := r.Image("team/app", "v1.4.2", layers[0])
	tool := r.Image("team/tool", "latest", layers[1])
	r.Image("team/tool", "v2", layers[2])
	r.Manifest("copy/app", "v1.4.2", v1.MediaTypeImageManifest, app.Body)
	r.Blob("copy/app", layers[0])
	p.pull("team/app", "v1.4.2", append(app.Layers, app.Config)...)
	p.pull("team/tool", "latest", append(tool.Layers, tool.Config)...)
	p.listed(2)
	short := func(i registrytest.Image) string { return i.Manifest.String()[:19] }

	// In lists.
	p.says("team/tool", 0, "images", "lab.test/team/tool")
	if out, _, _ := p.tell("images", "lab.test/team/tool"); strings.Contains(out, "team/app") {
		t.Errorf("all are listed: %s", out)
	}
	p.says("team/app", 0, "images", short(app))
	if out, _, _ := p.tell("images", short(app), "lab.test/team/tool:latest"); strings.Count(out, "\n") != 3 {
		t.Errorf("two are named, and listed is: %s", out)
	}
	p.says("lab.test/team/app:v2: the image is not here; of this repository here are: v1.4.2", 1, "images", "lab.test/team/app:v2")

	// A repository alone is its latest, and where that is not here, one must say.
	p.says("pinned lab.test/team/tool:latest", 0, "pin", "LAB.test/team/tool")
	p.says("of this repository here are: v1.4.2", 1, "pin", "lab.test/team/app")
	p.says("of this repository here are: v1.4.2", 1, "evict", "lab.test/team/app")
	p.says("of this repository here are: v1.4.2", 1, "evict", "lab.test/team/app:v2")
	p.says("nothing of this repository is, but of lab.test/team/app", 1, "evict", "app")
	p.says("of this repository these are: latest", 1, "unpin", "lab.test/team/tool:v2")
	p.says("unpinned lab.test/team/tool:latest", 0, "unpin", "lab.test/team/tool")

	// A digest, short or alone.
	p.says("pinned lab.test/team/app@"+app.Manifest.String(), 0, "pin", short(app))
	p.says("unpinned lab.test/team/app@"+app.Manifest.String(), 0, "unpin", short(app))
	p.says("pinned lab.test/team/app@"+app.Manifest.String(), 0, "pin", app.Manifest.String())
	p.says("unpinned lab.test/team/app@"+app.Manifest.String(), 0, "unpin", app.Manifest.String())
	p.says("pinned lab.test/team/app:v1.4.2", 0, "pin", "lab.test/team/app:v1.4.2")
	p.says("unpinned lab.test/team/app:v1.4.2", 0, "unpin", short(app)) // as the list shows it
	p.says("sha256:0123456789ab: the image is not here", 1, "evict", "sha256:0123456789ab")
	p.says("of this repository here are: v1.4.2", 1, "pin", "lab.test/team/app@sha256:0123456789ab")
	p.says("at least 6 digits", 1, "evict", "sha256:0")

	// In two repositories, a pin must say in which.
	p.pull("copy/app", "v1.4.2")
	p.listed(3)
	p.says("which one is meant? There are lab.test/copy/app@"+short(app)+", lab.test/team/app@"+short(app), 1, "pin", short(app))
	p.says("evicted lab.test/", 0, "evict", short(app))
	p.listed(1)
	p.says("evicted lab.test/team/tool:latest", 0, "evict", "lab.test/team/tool")
	p.listed(0)

	// Who asks over the API gets the canonical name, too.
	status, said := order(t, p.overSocket(), "POST", "http://tarn/api/v1/pins", `{"image":"LAB.test/team/tool:v2"}`)
	var answer struct{ Image, Warning string }
	if json.Unmarshal([]byte(said), &answer); status != 200 || answer.Image != "lab.test/team/tool:v2" || answer.Warning != "" {
		t.Errorf("%d %s", status, said)
	}
	for _, long := range []string{`{"image":"` + strings.Repeat("a", 2000) + `"}`,
		`{"image":"lab.test/team/tool:v2","platforms":["` + strings.Repeat("a", 65) + `"]}`,
		`{"image":"lab.test/team/tool:v2","platforms":[` + strings.Repeat(`"linux/amd64",`, 64) + `"linux/amd64"]}`,
	} {
		if status, said := order(t, p.overSocket(), "POST", "http://tarn/api/v1/pins", long); status != 400 || !strings.Contains(said, "is the most") || len(said) > 200 {
			t.Errorf("%.60s: %d %s", long, status, said)
		}
	}
	if status, said := order(t, p.overSocket(), "GET", "http://tarn/api/v1/images?"+strings.Repeat("image=a&", 65), ""); status != 400 || !strings.Contains(said, "is the most") {
		t.Errorf("65 filters: %d %s", status, said)
	}
}

func TestAPinOfWhatTheRegistryHasNotIsRefused(t *testing.T) {
	t.Parallel()
	r := registrytest.New(t)
	img := r.Image("app", "v1", noises(1, 1000)[0])
	var children []string
	for _, platform := range []string{`{"os":"linux","architecture":"s390x"}`, `{"os":"linux","architecture":"arm64","variant":"v8"}`, `{"os":"unknown","architecture":"unknown"}`} {
		children = append(children, fmt.Sprintf(`{"mediaType":%q,"digest":%q,"size":%d,"platform":%s}`, v1.MediaTypeImageManifest, img.Manifest, len(img.Body), platform))
	}
	r.Manifest("app", "many", v1.MediaTypeImageIndex, fmt.Appendf(nil, `{"schemaVersion":2,"mediaType":%q,"manifests":[%s]}`, v1.MediaTypeImageIndex, strings.Join(children, ",")))
	var answers atomic.Int64
	r.Hook = func(w http.ResponseWriter, req *http.Request) bool {
		if status := answers.Load(); status != 0 {
			w.WriteHeader(int(status))
		}
		return answers.Load() != 0
	}
	p := run(t, t.TempDir(), "--upstream", "lab.test="+r.URL)
	p.says("pinned lab.test/app:v1", 0, "pin", "lab.test/app:v1")
	p.says("lab.test says that it has no such image: lab.test/app:v2", 1, "pin", "lab.test/app:v2")
	p.says("no such image: lab.test/app:latest", 1, "pin", "lab.test/app")
	p.says("no such image", 1, "pin", "lab.test/app@sha256:"+strings.Repeat("0", 64))
	p.says("is for linux/s390x, linux/arm64, and not for \"linux/riscv64\"", 1, "pin", "lab.test/app:many", "--platform", "linux/riscv64")
	p.says("and not for \"linux/riscv64\"", 1, "pin", "lab.test/app:many", "--platform", "linux/arm64,linux/riscv64")
	p.says("and not for \"windows/amd64\"", 1, "pin", "lab.test/app:v1", "--platform", "windows/amd64")
	p.says("pinned lab.test/app:many", 0, "pin", "lab.test/app:many", "--platform", "linux/arm64/v8,linux/s390x")
	p.says("pinned lab.test/app:many", 0, "pin", "lab.test/app:many", "--platform", "all")

	// What is here may be kept, whatever the registry says of it today.
	p.pull("app", "v1", append(img.Layers, img.Config)...)
	p.listed(1)
	answers.Store(404)
	p.says("what is here of it is kept", 0, "pin", "lab.test/app:v1")
	p.says("pinned lab.test/app@"+img.Manifest.String(), 0, "pin", img.Manifest.String())
	for _, status := range []int64{401, 403, 429, 500} {
		answers.Store(status)
		tag := fmt.Sprint("lab.test/app:s", status)
		p.says("tarn: warning: lab.test ", 0, "pin", tag)
		p.says("pinned "+tag, 0, "pin", tag)
	}
	r.Close()
	p.says("tarn: warning: lab.test could not be asked", 0, "pin", "lab.test/app:v3")

	listed := runWith(t, t.TempDir(), "allow: listed\n")
	listed.says("not listed, and allow is set to listed", 1, "pin", "ghcr.io/org/app:v1")
}
