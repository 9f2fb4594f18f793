// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"tarn/admin"
	"tarn/images"
	"tarn/internal/registrytest"

	"github.com/spf13/pflag"
)

func TestAPullFetchesWhatIsNamedAndTwoOfThreeAreNotAll(t *testing.T) {
	t.Parallel()
	r := registrytest.New(t)
	layers := noises(2, 700_000)
	r.Image("team/app", "v1", layers[0])
	r.Image("team/app", "v2", layers[1])
	p := run(t, t.TempDir(), "--upstream", "lab.test="+r.URL)
	out, words, code := p.tell("pull", "lab.test/team/app:v1", "lab.test/team/none:v1", "--pin", "lab.test/team/app:v2")
	for _, want := range []string{"layer sha256:", "683.6KiB: fetched", "lab.test/team/app:v2: sha256:", ", pinned, 684", "2 of 3 images are here"} {
		if !strings.Contains(out, want) {
			t.Errorf("it does not say %q:\n%s", want, out)
		}
	}
	if code != 1 || !strings.Contains(words, "lab.test/team/none:v1: lab.test says that it has no such image") || !strings.Contains(words, "to do: look for a typing error") {
		t.Errorf("%d: %s", code, words)
	}
	if out, _, _ := p.tell("pin"); strings.Count(out, "lab.test/team/app:v") != 2 || strings.Contains(out, "none") {
		t.Errorf("pinned are %s", out)
	}
	r.Reset()
	if out, words, code := p.tell("pull", "lab.test/team/app:v1"); code != 0 || !strings.Contains(out, "all of it is here") {
		t.Errorf("again: %d %s%s", code, out, words)
	}
	if n := r.Count("GET", ""); n != 0 {
		t.Errorf("what is here cost %d GETs: %v", n, r.Exchanges())
	}
	out, _, code = p.tell("pull", "-o", "json", "lab.test/team/app:v1", "lab.test/team/none:v1")
	var last admin.PullLine
	for line := range strings.Lines(out) {
		last = admin.PullLine{}
		if err := json.Unmarshal([]byte(line), &last); err != nil {
			t.Fatalf("%q: %v", line, err)
		}
	}
	if s := last.Summary; code != 1 || s == nil || s.Images != 2 || s.Failed != 1 || s.FetchedBytes != 0 || s.HereBytes < 700_000 {
		t.Errorf("as JSON it ends with %d: %+v", code, s)
	}
}

func TestAListToPullIsReadFromStandardInput(t *testing.T) {
	t.Parallel()
	for list, want := range map[string]string{
		"a:1\n\n # all of it\nb:2 c:3 # more\na:1\r\n": "[a:1 b:2 c:3]",
		"":                           "names no image",
		"# none\n":                   "names no image",
		strings.Repeat("a\n", 1<<20): "more than 1048576 bytes",
		strings.Repeat("a", 100_000): "cannot be read",
	} {
		all, err := pullList([]string{"-"}, strings.NewReader(list))
		if got := fmt.Sprint(all, err); !strings.Contains(got, want) {
			t.Errorf("%.40q: %.200s", list, got)
		}
	}
	var many strings.Builder
	for i := range maxPullImages + 1 {
		fmt.Fprintln(&many, "app:", i)
		fmt.Fprintf(&many, "app:%d\n", i)
	}
	if _, err := pullList([]string{"-"}, strings.NewReader(many.String())); err == nil || !strings.Contains(err.Error(), "is the most") {
		t.Error(err)
	}
}

func TestCtrlCStopsAPullAtOnceAndTheNextGoesOn(t *testing.T) {
	t.Parallel()
	r := registrytest.New(t)
	layer := noises(1, 12<<20)[0]
	image := r.Image("team/app", "v1", layer)
	var whole atomic.Bool
	r.Hook = func(w http.ResponseWriter, req *http.Request) bool {
		if whole.Load() || !strings.HasSuffix(req.URL.Path, image.Layers[0].String()) {
			return false
		}
		w.Header().Set("Content-Length", fmt.Sprint(len(layer)))
		w.Write(layer[:8<<20])
		http.NewResponseController(w).Flush()
		<-req.Context().Done()
		panic(http.ErrAbortHandler)
	}
	p := run(t, t.TempDir(), "--upstream", "lab.test="+r.URL)
	screen, tty := terminal(t)
	cmd := command("pull", "lab.test/team/app:v1", "--admin", p.socket())
	cmd.Stdout, cmd.Stderr = tty, tty
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	tty.Close()
	var shown bytes.Buffer
	for buf := make([]byte, 4096); !strings.Contains(shown.String(), " 8MiB/12MiB"); { // its bar
		n, err := screen.Read(buf)
		if shown.Write(buf[:n]); err != nil {
			t.Fatalf("%v: %q", err, shown.String())
		}
	}
	cmd.Process.Signal(syscall.SIGINT)
	rest, _ := io.ReadAll(screen)
	cmd.Wait()
	if code := cmd.ProcessState.ExitCode(); code != signalled+int(syscall.SIGINT) || !strings.Contains(string(rest), "the same command goes on") || !strings.Contains(shown.String()+string(rest), "total") {
		t.Errorf("%d: %q", code, rest)
	}
	var flights struct{ Flights []admin.Flight }
	p.until("the download is parked", func() bool {
		fetchJSON(t, p.admin+"/api/v1/flights", &flights)
		return len(flights.Flights) == 1 && flights.Flights[0].Parked
	})
	if f := flights.Flights[0]; f.Digest != image.Layers[0] || f.HereBytes < 7<<20 || f.TotalBytes == nil || *f.TotalBytes != 12<<20 || f.SourceDomain != "listed" || f.Since.IsZero() {
		t.Errorf("%+v", f)
	}
	whole.Store(true)
	if out, words, code := p.tell("pull", "lab.test/team/app:v1"); code != 0 || !strings.Contains(out, "fetched, all but ") || !strings.Contains(out, "MiB were here") {
		t.Errorf("%d: %s%s", code, out, words)
	}
}

func TestWordsThatPeopleTry(t *testing.T) {
	t.Parallel()
	p := run(t, t.TempDir())
	for line, want := range map[string]string{
		"ls":                       "IMAGE",
		"list":                     "IMAGE",
		"rm app":                   "the image is not here",
		"rmi -f app":               "unknown shorthand flag",
		"delete app":               "the image is not here",
		"remove app":               "the image is not here",
		"images --filter x=1":      "there are upstream=, repository=",
		"images -o yaml":           "none of table, json, wide",
		"images --filter unused=1": "no duration",
	} {
		out, words, _ := p.tell(strings.Fields(line)...)
		if !strings.Contains(out+words, want) {
			t.Errorf("tarn %s: %s%s", line, out, words)
		}
	}
	for line, want := range map[string]string{
		"ps -a":                  "tarn status",
		"info":                   "tarn version",
		"prune --all":            "tarn evict IMAGE",
		"logs -f":                "journalctl",
		"login ghcr.io -u me":    "credentials:",
		"pull":                   "name an image, or -",
		"evict":                  "one at a time",
		"unpin a b":              "one at a time",
		"push app":               "only serves pulls",
		"images --admin ftp://x": "neither host:port",
		"images --admin unix:x":  "neither host:port",
	} {
		if said := fails(t, strings.Fields(line)...); !strings.Contains(said, want) {
			t.Errorf("tarn %s: %s", line, said)
		}
	}
	version, err := command("version").Output()
	flag, ferr := command("--version").Output()
	if err != nil || ferr != nil || !bytes.Equal(version, flag) || !bytes.HasPrefix(version, []byte("tarn devel")) {
		t.Errorf("%q %v, %q %v", version, err, flag, ferr)
	}
}

// TestEachOtherWordIsNoCommand, since cobra would take the first of two.
func TestEachOtherWordIsNoCommand(t *testing.T) {
	t.Parallel()
	root := newCommand()
	for _, c := range root.Commands() {
		if c.Hidden {
			continue
		}
		for _, name := range append(slices.Clone(c.Aliases), c.Name()) {
			if _, ok := elsewhere[name]; ok {
				t.Errorf("%s is a command, and in the list of those that are not", name)
			}
		}
	}
}

func TestTheDaemonIsFoundByTheEnvironment(t *testing.T) {
	t.Parallel()
	p := run(t, t.TempDir())
	for _, address := range []string{p.admin, p.admin + "/", strings.TrimPrefix(p.admin, "http://"), p.socket(), "unix://" + strings.TrimPrefix(p.socket(), unixPrefix)} {
		cmd := command("images")
		cmd.Env = append(cmd.Env, adminVariable+"="+address)
		if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), "IMAGE") {
			t.Errorf("%s: %v %s", address, err, out)
		}
	}
}

// TestADaemonOfAnotherVersionIsNamedInALine, and what both know works.
func TestADaemonOfAnotherVersionIsNamedInALine(t *testing.T) {
	t.Parallel()
	other := httptest.NewUnstartedServer(nil)
	other.Config.Handler = admin.New(admin.Options{Listener: other.Listener.Addr(), Version: "9.9.9", Status: func() any { return status{Clients: "somebody asked"} }})
	other.Start()
	defer other.Close()
	cmd := command("status", "--admin", other.Listener.Addr().String())
	var out, words bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &words
	if err := cmd.Run(); err != nil || !strings.Contains(out.String(), "somebody asked") || strings.Count(words.String(), "\n") != 1 || !strings.Contains(words.String(), "the daemon is tarn 9.9.9, this command devel") {
		t.Errorf("%v: %s%s", err, out.String(), words.String())
	}
	if said := fails(t, "pull", "app", "--admin", other.Listener.Addr().String()); !strings.Contains(said, "the daemon does not know this yet: it is tarn 9.9.9") {
		t.Error(said)
	}
}

func TestImagesAndPinsAreCompleted(t *testing.T) {
	t.Parallel()
	p, _ := runWithImage(t, 1000)
	complete := func(args ...string) string {
		out, _, _ := p.tell(append([]string{"__complete"}, args...)...)
		return out
	}
	// What is typed before the word that is completed; the test's own --admin comes last.
	for _, c := range [][]string{{"evict", "--admin", p.socket(), ""}, {"images", "--admin", p.socket(), ""}, {"pin", "--admin", p.socket(), ""}} {
		out, err := command(append([]string{"__complete"}, c...)...).Output()
		if err != nil || !strings.Contains(string(out), "lab.test/team/app:v1\n") {
			t.Errorf("%v: %s %v", c, out, err)
		}
	}
	p.tell("pin", "lab.test/team/app:v1")
	if out, err := command("__complete", "unpin", "--admin", p.socket(), "lab").Output(); err != nil || !strings.Contains(string(out), "lab.test/team/app:v1\n") {
		t.Errorf("unpin: %s %v", out, err)
	}
	if out := complete("unpin", "one", ""); strings.Contains(out, "lab.test") {
		t.Errorf("a second image for unpin: %s", out)
	}
	for _, shell := range []string{"bash", "zsh", "fish"} {
		if out, err := command("completion", shell).Output(); err != nil || len(out) < 1000 {
			t.Errorf("%s: %v, %d bytes", shell, err, len(out))
		}
	}
}

// TestImagesFitATerminal of 80 columns, with digests that other commands take.
func TestImagesFitATerminal(t *testing.T) {
	t.Parallel()
	long := images.Image{Upstream: "registry.example.com", Repository: strings.Repeat("long/", 30) + "app", Tag: "release-1.2.3", Digest: "sha256:" + image64, HereBytes: 1 << 30, TotalBytes: 3 << 30}
	var text bytes.Buffer
	showImages(&text, []images.Image{long}, 80)
	for line := range strings.Lines(text.String()) {
		if n := len([]rune(line)) - 1; n > 80 {
			t.Errorf("%d columns: %s", n, line)
		}
	}
	for _, want := range []string{"sha256:0123456789ab ", "33% of 3GiB", "release-1.2.3\n", "registry.e"} {
		if !strings.Contains(text.String(), want) {
			t.Errorf("no %q in\n%s", want, text.String())
		}
	}
	text.Reset()
	showImages(&text, []images.Image{long}, 0)
	if !strings.Contains(text.String(), imageName(long)) {
		t.Errorf("in a pipe:\n%s", text.String())
	}
}

const image64 = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"

// TestEachFlagOfServeHasAKey in the file.
func TestEachFlagOfServeHasAKey(t *testing.T) {
	t.Parallel()
	example, err := os.ReadFile("../../docs/tarn.example.yaml")
	if err != nil {
		t.Fatal(err)
	}
	newServeCommand().Flags().VisitAll(func(f *pflag.Flag) {
		key := strings.ReplaceAll(f.Name, "-", "_")
		if f.Name == "upstream" {
			key = "upstreams"
		}
		if f.Name != "config" && !strings.Contains(string(example), key+":") {
			t.Errorf("--%s has no key %s", f.Name, key)
		}
	})
}
