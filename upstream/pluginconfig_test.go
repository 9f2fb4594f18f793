// SPDX-License-Identifier: Apache-2.0

package upstream

import (
	"errors"
	"path/filepath"
	"strings"
	"testing"
)

func TestAFolderOfProvidersIsReadInTheOrderOfNames(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	write(t, filepath.Join(dir, "20.yml"), providerConfig("second", "lab.test", "1m"), 0o600)
	write(t, filepath.Join(dir, "10.json"), `{"kind":"CredentialProviderConfig","apiVersion":"kubelet.config.k8s.io/v1","providers":[{"name":"first","matchImages":["lab.test"],"defaultCacheDuration":"12h","apiVersion":"credentialprovider.kubelet.k8s.io/v1"}]}`, 0o600)
	write(t, filepath.Join(dir, "00.txt"), "no configuration", 0o600)
	all, err := readProviders(dir, "/bin-dir")
	if err != nil || len(all) != 2 || all[0].Name != "first" || all[1].plugin != "/bin-dir/second" {
		t.Fatalf("%+v, %v", all, err)
	}
	write(t, filepath.Join(dir, "30.yaml"), providerConfig("first", "lab.test", "1m"), 0o600)
	if _, err := readProviders(dir, "/bin-dir"); err == nil || !strings.Contains(err.Error(), `30.yaml: the provider "first" is there twice`) {
		t.Errorf("%v", err)
	}
}

func TestAProviderThatRequiresAServiceAccountIsSkippedAndNamed(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	token := "  tokenAttributes: {serviceAccountTokenAudience: a, cacheType: Token, requireServiceAccount: "
	write(t, filepath.Join(dir, "1.yaml"), providerConfig("pods", "pods.test", "1m", token+"true}"), 0o600)
	write(t, filepath.Join(dir, "2.yaml"), providerConfig("both", "lab.test", "1m", token+"false}"), 0o600)
	write(t, filepath.Join(dir, "both"), "#!/bin/sh\n"+`echo '{"kind":"CredentialProviderResponse","apiVersion":"credentialprovider.kubelet.k8s.io/v1","cacheKeyType":"Global","auth":{"lab.test":{"username":"u","password":"p"}}}'`, 0o755)
	k := NewKubeletPlugins(dir, dir)
	defer k.Close()
	if err := k.Check(); err != nil {
		t.Fatal(err)
	}
	if got := k.Skipped(); len(got) != 1 || got[0] != "pods" {
		t.Errorf("%v", got)
	}
	if got, err := k.Get(t.Context(), "lab.test/app"); err != nil || got.Password != "p" {
		t.Errorf("%v, %v", got, err)
	}
	if _, err := k.Get(t.Context(), "pods.test/app"); !errors.Is(err, ErrCredentials) || !strings.Contains(err.Error(), "pods cannot be asked") {
		t.Errorf("%v", err)
	}
}

func TestAWrongConfigurationOfPluginsIsNamed(t *testing.T) {
	t.Parallel()
	good := providerConfig("lab", "lab.test", "1m")
	for name, c := range map[string]struct{ content, want string }{
		"rubbish":         {"canary: [", "plugins.yaml: "},
		"nothing":         {"", "is no CredentialProviderConfig"},
		"another kind":    {strings.Replace(good, "CredentialProviderConfig", "KubeletConfiguration", 1), "is no CredentialProviderConfig"},
		"an unknown key":  {good + "\n  colour: red\n", "line 9: field colour not found"},
		"a wrong value":   {good + "\n  args: canary-secret\n", "line 9: cannot unmarshal !!str a value"},
		"no duration":     {strings.Replace(good, "1m", "canary-soon", 1), "duration"},
		"no default":      {strings.Replace(good, "  defaultCacheDuration: 1m\n", "", 1), `defaultCacheDuration of "lab": must be given`},
		"a path for name": {strings.Replace(good, "name: lab", "name: ../lab", 1), `"../lab" is no name of a program`},
		"another version": {strings.Replace(good, "credentialprovider.kubelet.k8s.io/v1", "v2", 1), `apiVersion of "lab"`},
		"no images":       {strings.Replace(good, "[lab.test]", "[]", 1), "matchImages"},
		"no provider":     {"kind: CredentialProviderConfig\napiVersion: kubelet.config.k8s.io/v1\n", "names no provider"},
		"two documents":   {good + "\n---\nkind: x\n", "more than one document"},
		"too large":       {strings.Repeat("#", maxPluginConfig+1), "more than 1048576 bytes"},
	} {
		path := filepath.Join(t.TempDir(), "plugins.yaml")
		write(t, path, c.content, 0o600)
		k := NewKubeletPlugins(path, t.TempDir())
		err := k.Check()
		if !errors.Is(err, ErrCredentials) || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), path) || strings.Contains(err.Error(), "canary") {
			t.Errorf("%s: %v", name, err)
		}
	}
	empty := t.TempDir()
	for path, want := range map[string]string{empty: "has no .json, .yaml or .yml file", empty + "/none": "does not exist where tarn runs"} {
		if err := NewKubeletPlugins(path, empty).Check(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v", err)
		}
	}
}

func TestAConfigurationThatIsMountedLaterIsRead(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "plugins.yaml")
	k := NewKubeletPlugins(path, t.TempDir())
	defer k.Close()
	get := func() error { _, err := k.Get(t.Context(), "lab.test/app"); return err }
	if err := get(); !errors.Is(err, ErrCredentials) || !strings.Contains(err.Error(), path+" does not exist") {
		t.Fatalf("%v", err)
	}
	write(t, path, providerConfig("lab", "other.test", "1m"), 0o600)
	if err := get(); err == nil || !strings.Contains(err.Error(), "does not exist") {
		t.Errorf("it was looked for at once: %v", err)
	}
	k.mu.Lock()
	k.looked = k.looked.Add(-pluginFailureFor) // as if that had passed
	k.mu.Unlock()
	if err := get(); err == nil || !strings.Contains(err.Error(), "has matchImages for lab.test") {
		t.Errorf("%v", err)
	}
}

func FuzzParseProviders(f *testing.F) {
	f.Add([]byte(providerConfig("lab", "lab.test", "1m")))
	f.Fuzz(func(t *testing.T, data []byte) {
		all, err := parseProviders(data)
		if err == nil {
			for _, p := range all {
				p.matches("lab.test/app")
			}
		}
	})
}
