// SPDX-License-Identifier: Apache-2.0

package upstream

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
)

// fakePlugin writes a plugin that notes each image it is asked about, and a
// configuration for it.
func fakePlugin(t *testing.T, script, matching string) (k *KubeletPlugins, dir string) {
	t.Helper()
	dir = t.TempDir()
	write(t, filepath.Join(dir, "lab"), "#!/bin/sh\nread -r request\necho \"$request\" >> \""+dir+"/asked\"\n"+script+"\n", 0o755)
	write(t, filepath.Join(dir, "plugins.yaml"), providerConfig("lab", matching, "10m"), 0o600)
	k = NewKubeletPlugins(filepath.Join(dir, "plugins.yaml"), dir)
	t.Cleanup(k.Close)
	return k, dir
}

func write(t *testing.T, path, content string, mode os.FileMode) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), mode); err != nil {
		t.Fatal(err)
	}
}

func providerConfig(name, matching, life string, more ...string) string {
	return fmt.Sprintf("kind: CredentialProviderConfig\napiVersion: kubelet.config.k8s.io/v1\nproviders:\n- name: %s\n  matchImages: [%s]\n  defaultCacheDuration: %s\n  apiVersion: credentialprovider.kubelet.k8s.io/v1\n%s",
		name, matching, life, strings.Join(more, "\n"))
}

// says is a script that prints an answer; the password is how often the plugin ran.
func says(cacheKeyType, more, auth string) string {
	return fmt.Sprintf(`n=$(wc -l < "${0%%/*}/asked"); echo "{\"kind\":\"CredentialProviderResponse\",\"apiVersion\":\"credentialprovider.kubelet.k8s.io/v1\",\"cacheKeyType\":\"%s\",%s\"auth\":{%s}}"`,
		cacheKeyType, strings.ReplaceAll(more, `"`, `\"`), strings.ReplaceAll(auth, `"`, `\"`))
}

func asks(t *testing.T, dir string) int {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(dir, "asked"))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	return strings.Count(string(data), "\n")
}

func TestAPluginsAnswerIsKeptForWhatItIsFor(t *testing.T) {
	images := []string{"a.lab.test/x/one", "a.lab.test/x/two", "b.lab.test/x/one", "a.lab.test/x/one", "b.lab.test/x/two"}
	for _, c := range []struct {
		name, kind, more string
		runs             int
	}{
		{"an image", "Image", "", 4},
		{"a registry", "Registry", "", 2},
		{"all", "Global", "", 1},
		{"a duration of its own", "Global", `"cacheDuration":"1h",`, 1},
		{"not kept, it holds for the requests of one pull", "Global", `"cacheDuration":"0s",`, 4},
	} {
		t.Run(c.name, func(t *testing.T) {
			k, dir := fakePlugin(t, says(c.kind, c.more, `"*.lab.test":{"username":"u","password":"p"}`), `"*.lab.test"`)
			for _, image := range images {
				if got, err := k.Get(t.Context(), image); err != nil || got != (Secret{Username: "u", Password: "p"}) {
					t.Fatalf("%s: %v, %v", image, got, err)
				}
			}
			if n := asks(t, dir); n != c.runs {
				t.Errorf("it ran %d times, and not %d", n, c.runs)
			}
			request, _ := os.ReadFile(filepath.Join(dir, "asked"))
			if want := `{"kind":"CredentialProviderRequest","apiVersion":"credentialprovider.kubelet.k8s.io/v1","image":"a.lab.test/x/one"}`; !strings.HasPrefix(string(request), want+"\n") {
				t.Errorf("it was asked %s", request)
			}
		})
	}
}

func TestManyWhoAskAtOnceCostOneRun(t *testing.T) {
	k, dir := fakePlugin(t, says("Registry", "", `"lab.test":{"username":"u","password":"p"}`), "lab.test")
	var all sync.WaitGroup
	for i := range 50 {
		all.Go(func() {
			if got, err := k.Get(t.Context(), fmt.Sprintf("lab.test/app%d", i%5)); err != nil || got.Password != "p" {
				t.Errorf("%v, %v", got, err)
			}
		})
	}
	all.Wait()
	if n := asks(t, dir); n != 1 {
		t.Errorf("it ran %d times", n)
	}
}

func TestAPasswordThatRotatesIsHadWhenTheOldOneEnds(t *testing.T) {
	k, _ := fakePlugin(t, says("Registry", "", `"lab.test":{"username":"u","password":"p$n"}`), "lab.test")
	get := func(want string) {
		t.Helper()
		if got, err := k.Get(t.Context(), "lab.test/app"); err != nil || got.Password != want {
			t.Fatalf("%v, %v, and not %s", got, err, want)
		}
	}
	age := func(by time.Duration) { // as if that had passed
		k.mu.Lock()
		defer k.mu.Unlock()
		for key, e := range k.answers {
			e.begun, e.until = e.begun.Add(-by), e.until.Add(-by)
			k.answers[key] = e
		}
	}
	get("p1")
	k.Forget("lab.test/app") // refused just after it was got: it is no better now
	get("p1")
	age(time.Minute)
	get("p1")
	k.Forget("lab.test/app")
	get("p2")
	age(11 * time.Minute)
	get("p3")
}

func TestTheMostParticularKeyCounts(t *testing.T) {
	auth := `"*.test":{"username":"wild","password":"p"},"lab.test":{"username":"registry","password":"p"},"https://lab.test/v2/team":{"username":"team","password":"p"},"index.docker.io":{"username":"hub","password":"p"},"lab.test:5000":{"username":"port","password":"p"}`
	k, _ := fakePlugin(t, says("Global", "", auth), `"*.test", "*.io", "lab.test:5000", other.example/only`)
	for image, want := range map[string]string{
		"lab.test/app": "registry", "lab.test/team/app": "team", "other.test/app": "wild", "docker.io/library/x": "hub",
		"lab.test:5000/app": "port", "quay.io/app": "", "other.example/not": "",
	} {
		if got, err := k.Get(t.Context(), image); err != nil || got.Username != want {
			t.Errorf("%s: %q, %v, and not %q", image, got.Username, err, want)
		}
	}
	if _, err := k.Get(t.Context(), "lab.example:1/app"); !errors.Is(err, ErrCredentials) || !strings.Contains(err.Error(), "has matchImages for lab.example:1") {
		t.Errorf("%v", err)
	}
}

func TestImagesMatchAsTheKubeletHasIt(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		pattern, image string
		want           bool
	}{
		{"*.dkr.ecr.*.amazonaws.com", "1.dkr.ecr.eu-west-1.amazonaws.com/app", true},
		{"*.io", "a.b.io/app", false},
		{"app*.k8s.io", "app1.k8s.io/x", true},
		{"k8s.*", "k8s.io/x", true},
		{"r.io:80", "r.io/x", false},
		{"r.io", "r.io:80/x", false},
		{"r.io:80/a", "r.io:80/a/b", true},
		{"r.io/a", "r.io/b/a", false},
		{"r.io/team", "r.io/teams/a", true},
		{"[", "r.io/a", false},
	} {
		if got := imageMatches(c.pattern, c.image); got != c.want {
			t.Errorf("%s for %s: %v", c.pattern, c.image, got)
		}
	}
}

func TestABrokenPluginIsNamedWithTheCause(t *testing.T) {
	big := `head -c 104857600 /dev/zero`
	for _, c := range []struct{ name, script, want string }{
		{"fails", `echo first >&2; echo "no role: canary.example/lab?X-Sig=canary-1 password=canary-2 app" >&2; exit 3`, "ended with exit status 3: no role: canary.example/lab?... password=*** ..."},
		{"tells its answer to stderr", `echo '{"password":"canary-3"}'; echo "got canary-3" >&2; exit 1`, "ended with exit status 1: got ***"},
		{"rubbish", `echo canary-4`, "no CredentialProviderResponse"},
		{"nothing", ``, "no CredentialProviderResponse"},
		{"another version", `echo '{"kind":"CredentialProviderResponse","apiVersion":"credentialprovider.kubelet.k8s.io/v1beta1","cacheKeyType":"Image"}'`, "another apiVersion"},
		{"another kind", `echo '{"kind":"Status","apiVersion":"credentialprovider.kubelet.k8s.io/v1","cacheKeyType":"Image"}'`, "no CredentialProviderResponse"},
		{"another key type", says("Pod", "", ""), "cacheKeyType"},
		{"too much", big, "printed more than 1048576 bytes, and was killed"},
		{"too much, and will not stop", `trap '' PIPE; while :; do ` + big + `; done 2>/dev/null`, "printed more than 1048576 bytes, and was killed"},
		{"killed", `kill -9 $$`, "signal: killed"},
	} {
		t.Run(c.name, func(t *testing.T) {
			k, dir := fakePlugin(t, c.script, "lab.test")
			for range 3 {
				_, err := k.Get(t.Context(), "lab.test/app")
				if !errors.Is(err, ErrCredentials) || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), filepath.Join(dir, "lab")) || strings.Contains(err.Error(), "canary-") {
					t.Fatalf("%v", err)
				}
			}
			if n := asks(t, dir); n != 1 {
				t.Errorf("it ran %d times", n)
			}
		})
	}
}

// withoutLoader makes the plugin a dynamic program whose loader is not here, as glibc's is
// not in tarn's image.
func withoutLoader(plugin string) error {
	program, err := os.ReadFile("/bin/sh")
	if err != nil {
		return err
	}
	if !bytes.Contains(program, []byte("/ld-linux")) {
		return errors.New("/bin/sh is not what this test takes for a dynamic program")
	}
	return os.WriteFile(plugin, bytes.Replace(program, []byte("/ld-linux"), []byte("/no-linux"), 1), 0o755)
}

func TestAPluginThatCannotBeStartedIsNamedWithTheCause(t *testing.T) {
	for _, c := range []struct {
		name  string
		spoil func(plugin string) error
		want  string
	}{
		{"is not there", os.Remove, "does not exist where tarn runs"},
		{"is not executable", func(p string) error { return os.Chmod(p, 0o644) }, "may not be executed"},
		{"is a folder", func(p string) error { os.Remove(p); return os.Mkdir(p, 0o755) }, "is no file"},
		{"has no interpreter", func(p string) error { return os.WriteFile(p, []byte("#!/no/such/python3 -u\n"), 0o755) }, "needs /no/such/python3, which is not"},
		{"has no loader", withoutLoader, "/no-linux"},
		{"is no program", func(p string) error { return os.WriteFile(p, []byte("\x7fELF rubbish"), 0o755) }, "exec format error"},
	} {
		t.Run(c.name, func(t *testing.T) {
			k, dir := fakePlugin(t, "", "lab.test")
			if err := c.spoil(filepath.Join(dir, "lab")); err != nil {
				t.Fatal(err)
			}
			if err := k.Check(); c.name != "is no program" && (!errors.Is(err, ErrCredentials) || !strings.Contains(err.Error(), c.want)) {
				t.Errorf("at start: %v", err)
			}
			if _, err := k.Get(t.Context(), "lab.test/app"); !errors.Is(err, ErrCredentials) || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v", err)
			}
		})
	}
}

// alive opens a pipe that the script, with what it starts, holds open from holdsOn on.
// The script waits until it is open here, too. What is read ends when all of them have
// ended.
func alive(t *testing.T, dir string) <-chan *os.File {
	t.Helper()
	path := filepath.Join(dir, "alive")
	if err := syscall.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	opened := make(chan *os.File, 1)
	go func() {
		f, err := os.Open(path)
		if err != nil {
			t.Error(err)
		}
		opened <- f
	}()
	return opened
}

const (
	holdsOn = `exec 3> "${0%/*}/alive"; echo up >&3; `
	hangs   = holdsOn + `sleep 1000 & wait`
)

// allEnd waits until whoever holds the pipe has ended.
func allEnd(t *testing.T, f *os.File) {
	t.Helper()
	defer f.Close()
	if said, err := io.ReadAll(f); err != nil || !strings.HasPrefix("up\n", string(said)) {
		t.Errorf("%q, %v", said, err)
	}
}

func TestAPluginThatHangsIsKilledWithItsChildren(t *testing.T) {
	k, dir := fakePlugin(t, hangs, "lab.test")
	opened := alive(t, dir)
	k.limit, k.wait = time.Second, time.Minute
	_, err := k.Get(t.Context(), "lab.test/app")
	if !errors.Is(err, ErrCredentials) || !strings.Contains(err.Error(), "did not answer in 1s, and was killed") {
		t.Fatalf("%v", err)
	}
	allEnd(t, <-opened)
}

func TestWhatAPluginLeavesIsKilled(t *testing.T) {
	k, dir := fakePlugin(t, holdsOn+`sleep 1000 & `+says("Image", "", `"lab.test":{"username":"u","password":"p"}`), "lab.test")
	opened := alive(t, dir)
	if got, err := k.Get(t.Context(), "lab.test/app"); err != nil || got.Password != "p" {
		t.Fatalf("%v, %v", got, err)
	}
	allEnd(t, <-opened)
}

func TestNobodyWaitsLongForAPluginAndItGoesOn(t *testing.T) {
	k, dir := fakePlugin(t, `cat "${0%/*}/go"; `+says("Image", "", `"lab.test":{"username":"u","password":"p"}`), "lab.test")
	if err := syscall.Mkfifo(filepath.Join(dir, "go"), 0o600); err != nil {
		t.Fatal(err)
	}
	k.wait = 50 * time.Millisecond
	for range 3 {
		if _, err := k.Get(t.Context(), "lab.test/app"); !errors.Is(err, ErrCredentials) || !strings.Contains(err.Error(), "in the background") {
			t.Fatalf("%v", err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	k.mu.Lock()
	run := k.wanted["lab.test/app"]
	k.mu.Unlock()
	if run == nil {
		t.Fatal("nothing goes on")
	}
	write(t, filepath.Join(dir, "go"), "", 0o600)
	<-run.done
	if got, err := k.Get(ctx, "lab.test/app"); err != nil || got.Password != "p" {
		t.Fatalf("%v, %v", got, err)
	}
	if n := asks(t, dir); n != 1 {
		t.Errorf("it ran %d times", n)
	}
}

func TestCloseEndsWhatRunsAndWhatWaits(t *testing.T) {
	before := goleak.IgnoreCurrent()
	k, dir := fakePlugin(t, hangs, "lab.test")
	opened := alive(t, dir)
	k.wait = time.Millisecond
	for i := range maxPluginRuns + 1 {
		_, err := k.Get(t.Context(), fmt.Sprintf("lab.test/app%d", i))
		if full := i == maxPluginRuns; err == nil || strings.Contains(err.Error(), "too slow") != full {
			t.Fatalf("%d: %v", i, err)
		}
	}
	f := <-opened
	if n, err := f.Read(make([]byte, 3)); n == 0 { // it runs
		t.Fatal(err)
	}
	k.Close()
	allEnd(t, f)
	if n := asks(t, dir); n != 1 {
		t.Errorf("%d ran at once", n)
	}
	if _, err := k.Get(t.Context(), "lab.test/app"); !errors.Is(err, ErrCredentials) {
		t.Errorf("%v", err)
	}
	goleak.VerifyNone(t, before)
}

func TestAPluginHasItsOwnEnvironment(t *testing.T) {
	t.Setenv("TARN_CANARY", "canary")
	t.Setenv("HTTPS_PROXY", "http://proxy.corp:3128")
	k, dir := fakePlugin(t, `env > "${0%/*}/env"; echo "$*" > "${0%/*}/args"; `+says("Image", "", ""), "lab.test")
	write(t, filepath.Join(dir, "plugins.yaml"), providerConfig("lab", "lab.test", "0s", "  args: [get, all]", "  env: [{name: REGION, value: north}, {name: HOME, value: /nowhere}]"), 0o600)
	if got, err := k.Get(t.Context(), "lab.test/app"); err != nil || got != (Secret{}) {
		t.Fatalf("%v, %v", got, err)
	}
	env, _ := os.ReadFile(filepath.Join(dir, "env"))
	for _, want := range []string{"REGION=north\n", "HOME=/nowhere\n", "HTTPS_PROXY=http://proxy.corp:3128\n", "PATH=" + os.Getenv("PATH") + "\n"} {
		if !strings.Contains(string(env), want) {
			t.Errorf("no %s in %s", want, env)
		}
	}
	if strings.Contains(string(env), "canary") {
		t.Errorf("%s", env)
	}
	if args, _ := os.ReadFile(filepath.Join(dir, "args")); string(args) != "get all\n" {
		t.Errorf("%s", args)
	}
}
