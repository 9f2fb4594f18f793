// SPDX-License-Identifier: Apache-2.0

package upstream

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"
)

// What the kubelet's configuration and the exec protocol have of tarn's concern.
// The types of k8s.io/kubelet are not used: their packages bring the API machinery
// of Kubernetes along.

// pluginFile is a CredentialProviderConfig, kubelet.config.k8s.io.
type pluginFile struct {
	Kind       string     `yaml:"kind"`
	APIVersion string     `yaml:"apiVersion"`
	Providers  []provider `yaml:"providers"`
}

// provider is one plugin as the kubelet's configuration has it.
type provider struct {
	Name        string          `yaml:"name"`
	MatchImages []string        `yaml:"matchImages"`
	Default     *pluginDuration `yaml:"defaultCacheDuration"`
	APIVersion  string          `yaml:"apiVersion"`
	Args        []string        `yaml:"args"`
	Env         []struct {
		Name  string `yaml:"name"`
		Value string `yaml:"value"`
	} `yaml:"env"`
	Token *struct {
		Audience  string   `yaml:"serviceAccountTokenAudience"`
		CacheType string   `yaml:"cacheType"`
		Require   *bool    `yaml:"requireServiceAccount"`
		Required  []string `yaml:"requiredServiceAccountAnnotationKeys"`
		Optional  []string `yaml:"optionalServiceAccountAnnotationKeys"`
	} `yaml:"tokenAttributes"`

	plugin string // the file of the program
}

// pluginDuration is written as in 12h0m0s.
type pluginDuration time.Duration

func (d *pluginDuration) UnmarshalText(text []byte) error {
	parsed, err := time.ParseDuration(string(text))
	if err != nil {
		return errors.New("a duration is written as in 10m or 12h")
	}
	*d = pluginDuration(parsed)
	return nil
}

const (
	// maxPluginConfig bounds a file, maxPluginFiles a folder, of which a mistaken
	// path can make tarn read any.
	maxPluginConfig = 1 << 20
	maxPluginFiles  = 64
)

// The versions that the kubelet takes; all have the same fields.
var (
	configVersions   = []string{"kubelet.config.k8s.io/v1", "kubelet.config.k8s.io/v1beta1", "kubelet.config.k8s.io/v1alpha1"}
	protocolVersions = []string{"credentialprovider.kubelet.k8s.io/v1", "credentialprovider.kubelet.k8s.io/v1beta1", "credentialprovider.kubelet.k8s.io/v1alpha1"}
)

// readProviders reads a file, or a folder's .json, .yaml and .yml in the order of
// their names. Its errors name the file, and no value in it.
func readProviders(config, binDir string) ([]provider, error) {
	files, err := pluginFiles(config)
	if err != nil {
		return nil, err
	}
	var all []provider
	for _, file := range files {
		some, err := readProvidersFile(file)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", file, err)
		}
		for _, p := range some {
			if slices.ContainsFunc(all, func(q provider) bool { return q.Name == p.Name }) {
				return nil, fmt.Errorf("%s: the provider %q is there twice: give each one name", file, p.Name)
			}
			p.plugin = filepath.Join(binDir, p.Name)
			all = append(all, p)
		}
	}
	if len(all) == 0 {
		return nil, fmt.Errorf("%s names no provider", config)
	}
	return all, nil
}

func pluginFiles(config string) ([]string, error) {
	info, err := os.Stat(config)
	if err != nil {
		return nil, lacksFile(config, err)
	}
	if !info.IsDir() {
		return []string{config}, nil
	}
	entries, err := os.ReadDir(config) // sorted by name
	if err != nil {
		return nil, lacksFile(config, err)
	}
	var files []string
	for _, e := range entries {
		if ext := filepath.Ext(e.Name()); !e.IsDir() && (ext == ".json" || ext == ".yaml" || ext == ".yml") {
			files = append(files, filepath.Join(config, e.Name()))
		}
	}
	switch {
	case len(files) == 0:
		return nil, fmt.Errorf("%s has no .json, .yaml or .yml file", config)
	case len(files) > maxPluginFiles:
		return nil, fmt.Errorf("%s has more than %d files", config, maxPluginFiles)
	}
	return files, nil
}

// lacksFile says in words why a file or folder cannot be read.
func lacksFile(path string, err error) error {
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("%s does not exist where tarn runs: in a container it must be mounted", path)
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("%s cannot be read by tarn's user: permission denied", path)
	}
	return fmt.Errorf("%s cannot be read: %w", path, errors.Unwrap(err))
}

func readProvidersFile(path string) ([]provider, error) {
	info, err := os.Stat(path)
	switch {
	case err != nil:
		return nil, lacksFile(path, err)
	case !info.Mode().IsRegular():
		return nil, errors.New("is no file")
	case info.Size() > maxPluginConfig:
		return nil, fmt.Errorf("has more than %d bytes", maxPluginConfig)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, lacksFile(path, err)
	}
	return parseProviders(data)
}

func parseProviders(data []byte) ([]provider, error) {
	var read pluginFile
	d := yaml.NewDecoder(bytes.NewReader(data)) // JSON is YAML
	d.KnownFields(true)
	if err := d.Decode(&read); err != nil && !errors.Is(err, io.EOF) {
		return nil, errors.New(withoutValues(err))
	}
	switch {
	case read.Kind != "CredentialProviderConfig" || !slices.Contains(configVersions, read.APIVersion):
		return nil, fmt.Errorf("is no CredentialProviderConfig of %s", configVersions[0])
	case d.Decode(new(yaml.Node)) == nil:
		return nil, errors.New("has more than one document, of which the kubelet reads the first: take the others out")
	}
	for i := range read.Providers {
		if err := read.Providers[i].check(); err != nil {
			return nil, fmt.Errorf("providers[%d]: %w", i, err)
		}
	}
	return read.Providers, nil
}

var quotedValue = regexp.MustCompile("`[^`]*`")

// withoutValues is the parser's error with its lines, and without what stands there:
// a value may be a secret.
func withoutValues(err error) string {
	said := strings.ReplaceAll(strings.TrimPrefix(err.Error(), "yaml: "), "\n", "")
	said = strings.ReplaceAll(said, "unmarshal errors:", "")
	said = quotedValue.ReplaceAllString(said, "a value")
	for _, t := range []string{"upstream.pluginFile", "upstream.provider", "upstream.pluginDuration"} {
		said = strings.ReplaceAll(said, t, "CredentialProviderConfig")
	}
	return bounded(strings.TrimSpace(said))
}

// check refuses what the kubelet refuses.
func (p *provider) check() error {
	switch {
	case p.Name == "" || p.Name == "." || p.Name == ".." || strings.ContainsAny(p.Name, "/ \x00"):
		return fmt.Errorf("name: %q is no name of a program in bin_dir", bounded(p.Name))
	case !slices.Contains(protocolVersions, p.APIVersion):
		return fmt.Errorf("apiVersion of %q: must be one of %s", p.Name, strings.Join(protocolVersions, ", "))
	case len(p.MatchImages) == 0:
		return fmt.Errorf("matchImages of %q: at least one is needed", p.Name)
	case p.Default == nil:
		return fmt.Errorf("defaultCacheDuration of %q: must be given; 0s is none", p.Name)
	case *p.Default < 0:
		return fmt.Errorf("defaultCacheDuration of %q: must not be negative", p.Name)
	case p.Token != nil && p.Token.Require == nil:
		return fmt.Errorf("requireServiceAccount of %q: must be given with tokenAttributes", p.Name)
	}
	for _, pattern := range p.MatchImages {
		if _, err := url.Parse("https://" + pattern); err != nil {
			return fmt.Errorf("matchImages of %q: %q is no pattern of images", p.Name, bounded(pattern))
		}
	}
	return nil
}

// needsPod tells whether it only works with the token of a pod's service account,
// which a daemon of the node has not.
func (p *provider) needsPod() bool { return p.Token != nil && *p.Token.Require }

// matches tells whether the plugin is asked about the image, which is
// HOST[:PORT]/REPOSITORY.
func (p *provider) matches(image string) bool {
	return slices.ContainsFunc(p.MatchImages, func(pattern string) bool { return imageMatches(pattern, image) })
}

// imageMatches is the kubelet's rule: the same port, as many parts of the host, each
// of which matches, and the pattern's path is the beginning of the image's. The path
// is compared by letters, so a pattern /team is for /teams, too.
func imageMatches(pattern, image string) bool {
	want, err := url.Parse("https://" + pattern)
	if err != nil {
		return false
	}
	is, err := url.Parse("https://" + image)
	if err != nil || !strings.HasPrefix(is.Path, want.Path) {
		return false
	}
	return hostMatches(want.Host, is.Host)
}

func hostMatches(want, is string) bool {
	wantHost, wantPort := hostAndPort(want)
	isHost, isPort := hostAndPort(is)
	wantParts, isParts := strings.Split(wantHost, "."), strings.Split(isHost, ".")
	if wantPort != isPort || len(wantParts) != len(isParts) {
		return false
	}
	for i := range wantParts {
		if ok, err := filepath.Match(wantParts[i], isParts[i]); err != nil || !ok {
			return false
		}
	}
	return true
}

func hostAndPort(hostport string) (host, port string) {
	host, port, err := net.SplitHostPort(hostport)
	if err != nil {
		return hostport, ""
	}
	return host, port
}

// registryOf is the host and port of an image.
func registryOf(image string) string {
	registry, _, _ := strings.Cut(image, "/")
	return registry
}

// authKey is a key of a plugin's answer as the kubelet compares it: without scheme,
// and /v1/ and /v2/ as if they were not there.
func authKey(key string) string {
	key = strings.TrimPrefix(strings.TrimPrefix(key, "https://"), "http://")
	host, path, _ := strings.Cut(key, "/")
	for _, version := range []string{"v1/", "v2/"} {
		path = strings.TrimPrefix(path, version)
	}
	if path == "" {
		return host
	}
	return host + "/" + path
}
