// SPDX-License-Identifier: Apache-2.0

package hosts

import (
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	runtimepkg "runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"tarn/internal/probe"
)

// tarnLike answers for the probe as tarn does, whose own answer the end-to-end tests ask.
func tarnLike(t *testing.T) string {
	t.Helper()
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Query().Get("ns") == probe.Registry {
			w.Header().Set("Cache-Status", probe.CacheStatus)
		}
	}))
	t.Cleanup(s.Close)
	return s.URL
}

// TestWhatContainerdReads computes, for files as operators have them, whether a pull
// goes through tarn. A real containerd is asked the same in the end-to-end tests.
func TestWhatContainerdReads(t *testing.T) {
	url := tarnLike(t)
	const config = "etc/containerd/config.toml"
	const any = "etc/containerd/certs.d/_default/hosts.toml"
	ours := string(render(byInstall, 0, Mirror{URL: url}, nil))
	theirs := func(lines string) string { return strings.ReplaceAll(lines, "TARN", url) }
	const v3 = "version = 3\n[plugins.\"io.containerd.cri.v1.images\"]\n"
	const path3 = "[plugins.\"io.containerd.cri.v1.images\".registry]\nconfig_path = \"/etc/containerd/certs.d\"\n"
	const list3 = "[plugins.\"io.containerd.cri.v1.images\".registry]\nconfig_path = \"/etc/containerd/certs.d:/etc/docker/certs.d\"\n"
	const path2 = "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".registry]\nconfig_path = \"/etc/containerd/certs.d\"\n"
	imported := strings.Replace(path2, "version = 2", "version = 2\nimports = [\"a.toml\"]", 1)
	const importedFile = "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\"]\nsandbox_image = \"pause\"\n"
	for name, c := range map[string]struct {
		version string
		config  string // "" is no file
		files   map[string]string
		want    Verdict
		reason  string // or a note
		fix     string
	}{
		"stock 2.4":                      {"2.4.2+unknown", "", map[string]string{any: ours}, NotUsed, "takes that for one folder", "version = 3"},
		"stock 2.1":                      {"v2.1.5", "", map[string]string{any: ours}, NotUsed, "config_path is not set", "cri.v1.images"},
		"stock 2.0":                      {"v2.0.1", "", map[string]string{any: ours}, NotUsed, "config_path is not set", ""},
		"stock 1.7":                      {"1.7.24~ds1", "", map[string]string{any: ours}, NotUsed, "config_path is not set", `"io.containerd.grpc.v1.cri".registry`},
		"one folder, 2.4":                {"v2.4.2", "version = 3\n" + path3, map[string]string{any: ours}, Used, "asks tarn at", ""},
		"one folder, 1.7":                {"1.7.24", path2, map[string]string{any: ours}, Used, "", ""},
		"version 2 on 2.4":               {"v2.4.2", path2, map[string]string{any: ours}, Used, "", ""},
		"version 4 on 2.4":               {"v2.4.2", "version = 4\n" + path3, map[string]string{any: ours}, Used, "", ""},
		"version 4 on 2.2":               {"v2.2.2", "version = 4\n" + path3, map[string]string{any: ours}, NotUsed, "knows 3 at most", ""},
		"version 3 on 1.7":               {"1.7.24", "version = 3\n" + path3, map[string]string{any: ours}, NotUsed, "knows 2 at most", ""},
		"version 1":                      {"1.7.24", "[plugins.cri.registry]\nconfig_path = \"/etc/containerd/certs.d\"\n", map[string]string{any: ours}, Used, "", ""},
		"old name in version 3":          {"v2.2.2", strings.Replace(path2, "version = 2", "version = 3", 1), map[string]string{any: ours}, NotUsed, "", ""},
		"the same on 2.4":                {"v2.4.2", strings.Replace(path2, "version = 2", "version = 3", 1), map[string]string{any: ours}, Used, "", ""},
		"a list, transfer":               {"v2.4.2", "version = 3\n" + list3, map[string]string{any: ours}, NotUsed, "is the list", `config_path = "/etc/containerd/certs.d"`},
		"a list, local":                  {"v2.4.2", v3 + "use_local_image_pull = true\n" + list3, map[string]string{any: ours}, Used, "", ""},
		"a list, EKS's":                  {"v2.1.4", v3 + "discard_unpacked_layers = true\n" + list3, map[string]string{any: ours}, Used, "", ""},
		"a list, downloads":              {"v2.2.0", v3 + "max_concurrent_downloads = 10\n" + list3, map[string]string{any: ours}, Used, "", ""},
		"a list, 3 downloads":            {"v2.2.0", v3 + "max_concurrent_downloads = 3\n" + list3, map[string]string{any: ours}, NotUsed, "is the list", ""},
		"a list on 2.0":                  {"v2.0.5", "version = 3\n" + list3, map[string]string{any: ours}, Used, "", ""},
		"annotations on":                 {"v2.4.2", v3 + "disable_snapshot_annotations = false\n" + list3, map[string]string{any: ours}, Used, "", ""},
		"sync on":                        {"v2.4.2", v3 + "image_pull_with_sync_fs = true\n" + list3, map[string]string{any: ours}, Used, "", ""},
		"mirrors":                        {"1.7.24", "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".registry.mirrors.\"docker.io\"]\nendpoint = [\"https://x\"]\n", map[string]string{any: ours}, NotUsed, "registry.mirrors is set", "remove the mirrors"},
		"mirrors and a path":             {"1.7.24", path2 + "[plugins.\"io.containerd.grpc.v1.cri\".registry.mirrors.\"docker.io\"]\nendpoint = [\"https://x\"]\n", map[string]string{any: ours}, NotUsed, "beside config_path", ""},
		"configs with tls":               {"1.7.24", path2 + "[plugins.\"io.containerd.grpc.v1.cri\".registry.configs.\"r.corp\".tls]\nca_file = \"/x\"\n", map[string]string{any: ours}, NotUsed, "tls beside config_path", ""},
		"docker's containerd.io":         {"1.7.24", "disabled_plugins = [\"cri\"]\n", map[string]string{any: ours}, NotUsed, "is disabled", "disabled_plugins"},
		"not TOML":                       {"v2.4.2", "version = \n", map[string]string{any: ours}, NotUsed, "does not start with this", ""},
		"an import":                      {"v2.4.2", "version = 3\nimports = [\"conf.d/*.toml\"]\n", map[string]string{any: ours, "etc/containerd/conf.d/a.toml": "version = 3\n" + path3}, Used, "", ""},
		"an import on 1.7 that hides it": {"1.7.24", imported, map[string]string{any: ours, "etc/containerd/a.toml": importedFile}, NotUsed, "config_path is not set", ""},
		"the same import on 2.4":         {"v2.4.2", imported, map[string]string{any: ours, "etc/containerd/a.toml": importedFile}, Used, "", ""},
		"no hosts.toml":                  {"v2.4.2", "version = 3\n" + path3, nil, NotUsed, "there is no /etc/containerd/certs.d/_default/hosts.toml", "tarn hosts install"},
		"another folder":                 {"v2.4.2", "version = 3\n" + strings.Replace(path3, "/etc/containerd", "/opt", 1), map[string]string{any: ours}, NotUsed, "/opt/certs.d", "--certs-dir /opt/certs.d"},
		"an empty _default":              {"v2.4.2", "version = 3\n" + path3, map[string]string{"etc/containerd/certs.d/_default/": ""}, NotUsed, "_default is empty", "tarn hosts install"},
		"a dangling _default":            {"v2.4.2", "version = 3\n" + path3, map[string]string{"etc/containerd/certs.d/_default": "-> /gone"}, NotUsed, "there is no", ""},
		"_default is a file":             {"v2.4.2", "version = 3\n" + path3, map[string]string{"etc/containerd/certs.d/_default": "x"}, NotUsed, "every pull fails", ""},
		"_default through a link":        {"v2.4.2", "version = 3\n" + path3, map[string]string{"run/tarn-hosts/hosts.toml": ours, "etc/containerd/certs.d/_default": "-> /run/tarn-hosts"}, Used, "", ""},
		"not TOML in hosts.toml":         {"v2.4.2", "version = 3\n" + path3, map[string]string{any: ours + "]["}, NotUsed, "ignores", ""},
		"referrers on 2.1":               {"v2.1.4", "version = 3\n" + path3, map[string]string{any: strings.Replace(ours, `"resolve"`, `"resolve", "referrers"`, 1)}, NotUsed, `knows no capability "referrers"`, ""},
		"referrers on 2.2":               {"v2.2.0", "version = 3\n" + path3, map[string]string{any: strings.Replace(ours, `"resolve"`, `"resolve", "referrers"`, 1)}, Used, "", ""},
		"override_path":                  {"v2.4.2", "version = 3\n" + path3, map[string]string{any: ours + "  override_path = true\n"}, NotUsed, "without /v2", "take override_path out"},
		"a path in the URL":              {"v2.4.2", "version = 3\n" + path3, map[string]string{any: strings.Replace(ours, url, url+"/v2/", 1)}, Used, "", ""},
		"k3s":                            {"v2.4.2", "version = 3\n" + strings.Replace(path3, "/etc/containerd/certs.d", "/var/lib/rancher/k3s/agent/etc/containerd/certs.d", 1), nil, NotUsed, "there is no", "registries.yaml"},
		"a table that is there":          {"v2.4.2", "version = 3\n" + strings.Replace(path3, "/etc/containerd/certs.d", "", 1), map[string]string{any: ours}, NotUsed, "takes that for one folder", "that is there"},
		"pull alone":                     {"v2.4.2", "version = 3\n" + path3, map[string]string{any: strings.Replace(ours, `, "resolve"`, "", 1)}, NotUsed, "lets tarn only pull", ""},
		"no capabilities":                {"v2.4.2", "version = 3\n" + path3, map[string]string{any: theirs("[host.\"TARN\"]\n")}, Used, "push too", ""},
		"server in _default":             {"v2.4.2", "version = 3\n" + path3, map[string]string{any: theirs("server = \"https://ghcr.io\"\n[host.\"TARN\"]\n")}, Used, "whatever registry the image is of", ""},
		"TLS on http":                    {"v2.4.2", "version = 3\n" + path3, map[string]string{any: theirs("[host.\"TARN\"]\nskip_verify = true\n")}, Used, "https is tried first", ""},
		"a CA that is not there":         {"v2.4.2", "version = 3\n" + path3, map[string]string{any: theirs("[host.\"TARN\"]\nca = \"gone.crt\"\n")}, NotUsed, "every pull fails", ""},
		"another mirror before":          {"v2.4.2", "version = 3\n" + path3, map[string]string{any: theirs("[host.\"https://mirror.corp\"]\n[host.\"TARN\"]\ncapabilities = [\"pull\", \"resolve\"]\n")}, Used, "https://mirror.corp asked before tarn", ""},
		"another mirror alone":           {"v2.4.2", "version = 3\n" + path3, map[string]string{any: "[host.\"https://mirror.corp\"]\n"}, NotUsed, "does not name tarn", ""},
		"a registry past it":             {"v2.4.2", "version = 3\n" + path3, map[string]string{any: ours, "etc/containerd/certs.d/quay.io/": ""}, Used, "quay.io goes past tarn", ""},
		"a second folder":                {"1.7.24", strings.Replace(path2, "certs.d\"", "certs.d:/etc/docker/certs.d\"", 1), map[string]string{"etc/docker/certs.d/_default/hosts.toml": ours}, Used, "", ""},
		"no version, one folder":         {"", "version = 2\n" + strings.TrimPrefix(path2, "version = 2\n"), map[string]string{any: ours}, Used, "", ""},
		"no version, a list":             {"", strings.Replace(path2, "certs.d\"", "certs.d:/etc/docker/certs.d\"", 1), map[string]string{any: ours}, CannotTell, "depends on containerd's version", "--containerd-version"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			root := t.TempDir()
			lay(t, root, map[string]string{"etc/containerd/": "", "etc/docker/": ""})
			lay(t, root, c.files)
			if c.config != "" {
				lay(t, root, map[string]string{config: c.config})
			}
			f := found{name: "containerd", text: c.version, versions: containerds, config: DefaultConfig, process: process{files: tree{root}}}
			if v, ok := parseVersion(c.version); ok {
				f.versions = []version{v}
			}
			r := CheckOptions{URL: url}.judge(t.Context(), f)
			said := r.Reason + "\n" + strings.Join(r.Notes, "\n")
			if r.Verdict != c.want || !strings.Contains(said, c.reason) || !strings.Contains(r.Fix, c.fix) {
				t.Errorf("%s: %s; to do: %s\nwant %s: %q, %q", r.Verdict, said, r.Fix, c.want, c.reason, c.fix)
			}
		})
	}
}

func TestOneRegistryIsJudgedByItself(t *testing.T) {
	url := tarnLike(t)
	root := t.TempDir()
	lay(t, root, map[string]string{
		"etc/containerd/config.toml":                          "version = 3\n[plugins.\"io.containerd.cri.v1.images\".registry]\nconfig_path = \"/etc/containerd/certs.d\"\n",
		"etc/containerd/certs.d/_default/hosts.toml":          string(render(byInstall, 0, Mirror{URL: url}, nil)),
		"etc/containerd/certs.d/r.corp_5000_/client.cert":     "",
		"etc/containerd/certs.d/quay.io/hosts.toml":           string(render(byInstall, 0, Mirror{URL: url}, &registry{url: "https://quay.io"})),
		"etc/containerd/certs.d/registry.corp:5000/readme.md": "",
	})
	f := found{name: "containerd", text: "v2.4.2", versions: []version{{2, 4}}, config: DefaultConfig, process: process{files: tree{root}}}
	for registry, want := range map[string]Verdict{"ghcr.io": Used, "quay.io": Used, "r.corp:5000": NotUsed, "registry.corp:5000": NotUsed} {
		if r := (CheckOptions{URL: url, Registry: registry}).judge(t.Context(), f); r.Verdict != want {
			t.Errorf("%s: %+v, want %s", registry, r, want)
		}
	}
}

// TestTarnMustAnswer: what names another server, or none, does not use tarn.
func TestTarnMustAnswer(t *testing.T) {
	other := httptest.NewServer(http.NotFoundHandler())
	t.Cleanup(other.Close)
	gone := httptest.NewServer(http.NotFoundHandler())
	gone.Close()
	for url, want := range map[string]string{other.URL: "is not tarn", gone.URL: "connection refused"} {
		root := t.TempDir()
		lay(t, root, map[string]string{
			"etc/containerd/config.toml":                 "version = 3\n[plugins.\"io.containerd.cri.v1.images\".registry]\nconfig_path = \"/etc/containerd/certs.d\"\n",
			"etc/containerd/certs.d/_default/hosts.toml": string(render(byInstall, 0, Mirror{URL: url}, nil)),
		})
		f := found{name: "containerd", text: "v2.4.2", versions: []version{{2, 4}}, config: DefaultConfig, process: process{files: tree{root}}}
		if r := (CheckOptions{URL: DefaultURL}).judge(t.Context(), f); r.Verdict != NotUsed || !strings.Contains(r.Reason, want) {
			t.Errorf("%+v, want %q", r, want)
		}
	}
}

// TestAChangeAfterTheStartIsSaid: this very process stands for a runtime.
func TestAChangeAfterTheStartIsSaid(t *testing.T) {
	url := tarnLike(t)
	root := t.TempDir()
	lay(t, root, map[string]string{"etc/containerd/config.toml": "version = 3\n[plugins.\"io.containerd.cri.v1.images\".registry]\nconfig_path = \"/etc/containerd/certs.d\"\n"})
	started, err := startOf(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	if ago := time.Since(started); ago < 0 || ago > time.Hour {
		t.Fatalf("this process was started %v ago", ago)
	}
	f := found{name: "containerd", text: "v2.4.2", versions: []version{{2, 4}}, config: DefaultConfig, seen: true, process: process{files: tree{root}, started: started}}
	if r := (CheckOptions{URL: url}).judge(t.Context(), f); r.Verdict != CannotTell || r.Fix != "tarn hosts install, then restart containerd" {
		t.Errorf("%+v", r)
	}
	f.process.started = time.Now().Add(time.Minute)
	if r := (CheckOptions{URL: url}).judge(t.Context(), f); r.Verdict != NotUsed {
		t.Errorf("%+v", r)
	}
}

// TestSyncKeepsItWhileTarnAnswers follows a tarn that goes away and comes back.
func TestSyncKeepsItWhileTarnAnswers(t *testing.T) {
	up := make(chan bool, 1)
	answering := true
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		select {
		case answering = <-up:
		default:
		}
		if !answering {
			w.WriteHeader(http.StatusServiceUnavailable)
			return
		}
		w.Header().Set("Cache-Status", probe.CacheStatus)
	}))
	t.Cleanup(s.Close)
	root := t.TempDir()
	certs := filepath.Join(root, "certs.d")
	told := make(chan string, 16)
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error)
	go func() {
		done <- Sync{CertsDir: certs, Mirror: Mirror{URL: s.URL}, Client: s.Client(), Every: time.Millisecond,
			Told: func(m string) { told <- m }, dir: filepath.Join(root, "run/hosts")}.Run(ctx)
	}()
	place := filepath.Join(certs, "_default/hosts.toml")
	if said := <-told; !strings.HasPrefix(said, "tarn answers: ") {
		t.Errorf("it says %q", said)
	}
	if text, err := os.ReadFile(place); err != nil || !strings.HasPrefix(string(text), firstLine+"sync") {
		t.Errorf("%s, %v", text, err)
	}
	if _, err := PlanInstall(Options{certs, Mirror{URL: s.URL}, nil}); err == nil {
		t.Error("install takes its place")
	}
	if plan, err := PlanRemove(certs, nil); err != nil || !plan.Empty() {
		t.Errorf("remove takes it away: %v, %v", plan.Paths(), err)
	}
	second := Sync{CertsDir: certs, Mirror: Mirror{URL: s.URL}, Client: s.Client(), Every: time.Millisecond, dir: filepath.Join(root, "run/hosts")}
	if err := second.Run(ctx); err == nil || !strings.Contains(err.Error(), "another tarn hosts sync") {
		t.Errorf("a second one: %v", err)
	}
	if err := os.Remove(filepath.Join(certs, "_default")); err != nil {
		t.Fatal(err)
	}
	deadline := time.Now().Add(20 * time.Second)
	for {
		if _, err := os.Stat(place); err == nil {
			break // it is put back
		}
		if time.Now().After(deadline) {
			t.Fatal("the link that somebody removed does not come back")
		}
		runtimepkg.Gosched()
	}
	up <- false
	if said := <-told; !strings.Contains(said, "is not tarn") {
		t.Errorf("it says %q", said)
	}
	if _, err := os.Stat(place); !os.IsNotExist(err) {
		t.Errorf("it is there: %v", err)
	}
	up <- true
	<-told
	if _, err := os.Stat(place); err != nil {
		t.Error(err)
	}
	stop()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(certs); !os.IsNotExist(err) {
		t.Errorf("it left the directory that it made: %v", err)
	}
	if _, err := os.Stat(filepath.Join(root, "run/hosts")); !os.IsNotExist(err) {
		t.Errorf("it left its directory: %v", err)
	}
}

// TestSyncWaitsForItsPlace, and for the tarn that is meant.
func TestSyncWaitsForItsPlace(t *testing.T) {
	var instance atomic.Value
	instance.Store("")
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Cache-Status", probe.CacheStatus)
		w.Header().Set(probe.InstanceHeader, probe.Instance(instance.Load().(string)))
	}))
	t.Cleanup(s.Close)
	root := t.TempDir()
	certs := filepath.Join(root, "certs.d")
	foreign := filepath.Join(certs, anyRegistry, fileName)
	if err := errors.Join(os.MkdirAll(filepath.Dir(foreign), 0o755), os.WriteFile(foreign, []byte("somebody's"), 0o644)); err != nil {
		t.Fatal(err)
	}
	told := make(chan string, 16)
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error)
	go func() {
		done <- Sync{CertsDir: certs, Mirror: Mirror{URL: s.URL}, Client: s.Client(), Every: time.Millisecond, Instance: "mine",
			Told: func(m string) { told <- m }, dir: filepath.Join(root, "run/hosts")}.Run(ctx)
	}()
	says := func(want string) {
		t.Helper()
		if said := <-told; !strings.Contains(said, want) {
			t.Errorf("it says %q, not %q", said, want)
		}
	}
	says("is there and is not sync's")
	if text, err := os.ReadFile(foreign); string(text) != "somebody's" {
		t.Errorf("somebody's settings are %q, %v", text, err)
	}
	if err := os.RemoveAll(filepath.Dir(foreign)); err != nil {
		t.Fatal(err)
	}
	says("another tarn answers")
	if _, err := os.Stat(foreign); !os.IsNotExist(err) {
		t.Errorf("pulls are sent to another tarn: %v", err)
	}
	instance.Store("other")
	instance.Store("mine")
	says("tarn answers")
	instance.Store("other")
	says("another tarn answers")
	if _, err := os.Stat(foreign); !os.IsNotExist(err) {
		t.Errorf("pulls are sent to another tarn: %v", err)
	}
	stop()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// TestSyncChangesNothingElsewhere: what stands in place of its directory is not followed,
// waited for, or taken away.
func TestSyncChangesNothingElsewhere(t *testing.T) {
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Cache-Status", probe.CacheStatus)
	}))
	t.Cleanup(s.Close)
	for name, put := range map[string]func(dir, elsewhere string) error{
		"a link":                          func(dir, elsewhere string) error { return os.Symlink(elsewhere, dir) },
		"a directory that all may change": func(dir, _ string) error { return errors.Join(os.Mkdir(dir, 0o755), os.Chmod(dir, 0o777)) },
		"a file":                          func(dir, _ string) error { return os.WriteFile(dir, nil, 0o644) },
	} {
		for _, url := range []string{s.URL, "http://127.0.0.1:1"} {
			root := t.TempDir()
			dir, elsewhere := filepath.Join(root, "hosts"), filepath.Join(root, "elsewhere")
			precious := filepath.Join(elsewhere, "hosts.toml")
			if err := errors.Join(os.Mkdir(elsewhere, 0o755), os.WriteFile(precious, []byte("precious"), 0o644), put(dir, elsewhere)); err != nil {
				t.Fatal(err)
			}
			ctx, stop := context.WithCancel(t.Context())
			var told string
			err := Sync{CertsDir: filepath.Join(root, "certs.d"), Mirror: Mirror{URL: url}, Client: s.Client(), Every: time.Hour,
				Told: func(m string) { told = m; stop() }, dir: dir}.Run(ctx)
			if err == nil || !strings.Contains(err.Error(), "remove it") {
				t.Errorf("%s, %s: it says %q, and %v at the end", name, url, told, err)
			}
			if text, err := os.ReadFile(precious); err != nil || string(text) != "precious" {
				t.Errorf("%s, %s: elsewhere there is %q, %v", name, url, text, err)
			}
			if _, err := os.Lstat(filepath.Join(root, "certs.d", anyRegistry)); !os.IsNotExist(err) {
				t.Errorf("%s, %s: the link is left: %v", name, url, err)
			}
		}
	}
}

func TestAFileThatIsNamedMustBeThere(t *testing.T) {
	r := Check(t.Context(), CheckOptions{Socket: filepath.Join(t.TempDir(), "gone.sock"), Config: filepath.Join(t.TempDir(), "config.toml"), Version: "2.4"})
	if r.Verdict != CannotTell || !strings.Contains(r.Reason, "config.toml: no such file") {
		t.Errorf("%+v", r)
	}
	if r := Check(t.Context(), CheckOptions{Live: true, Registry: "quay.io"}); r.Verdict != CannotTell || !strings.Contains(r.Fix, "leave out --live") {
		t.Errorf("%+v", r)
	}
}
