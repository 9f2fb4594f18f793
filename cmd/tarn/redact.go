// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"errors"
	"regexp"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"
)

// What a bug report may say of what an operator wrote: names of files, never what is in
// them, and URLs without user, password and query.

const leftOut = "LEFT-OUT"

var (
	// userOfURL is greedy: a password may have a slash or an @ that nobody escaped.
	userOfURL  = regexp.MustCompile(`(://)[^\s"']*@`)
	queryOfURL = regexp.MustCompile(`(://[^\s"'?#]*[?#])[^\s"']+`)
)

// withoutSecrets is the text without the user, password, query and fragment of each
// URL in it.
func withoutSecrets(text string) string {
	text = userOfURL.ReplaceAllString(text, "${1}"+leftOut+"@")
	return queryOfURL.ReplaceAllString(text, "${1}"+leftOut)
}

// valueWithoutSecrets is the same for what is one value, which has nothing after its
// URL: a password may have a quotation mark or a space in it that nobody escaped.
func valueWithoutSecrets(value string) string {
	scheme, rest, found := strings.Cut(value, "://")
	if !found {
		return withoutSecrets(value)
	}
	user, query := strings.LastIndexByte(rest, '@'), strings.IndexAny(rest, "?#")
	switch {
	case user >= 0 && query >= 0 && query < user: // which of both it is, nobody knows
		return scheme + "://" + leftOut
	case query >= 0 && query+1 < len(rest):
		rest = rest[:query+1] + leftOut
	}
	if user >= 0 {
		rest = leftOut + rest[user:]
	}
	return scheme + "://" + rest
}

// reported are the variables that bear upon tarn, by what reads them: itself, the
// proxies, Go's TLS and runtime, docker's credentials, and where directories are.
var reported = []string{
	configVariable, "TARN_ADMIN", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR",
	"GODEBUG", "GOGC", "GOMEMLIMIT", "GOMAXPROCS", "GOTRACEBACK", "DOCKER_CONFIG", "XDG_RUNTIME_DIR", "XDG_CACHE_HOME", "HOME", "PATH",
	"KUBERNETES_SERVICE_HOST", "CONTAINER_RUNTIME_ENDPOINT", "NOTIFY_SOCKET", "WATCHDOG_USEC",
}

// reportedEnvironment are those of them that are set, and the names of others that
// begin as tarn's do, in order.
func reportedEnvironment(environment []string) []string {
	all := []string{}
	for _, variable := range environment {
		name, value, _ := strings.Cut(variable, "=")
		known := slices.Contains(reported, name) || slices.Contains(reported, strings.ToUpper(name)) // http_proxy
		switch {
		case known:
			if i := strings.LastIndexByte(value, '@'); i >= 0 && !strings.Contains(value, "://") { // a proxy without a scheme
				value = leftOut + value[i:]
			}
			all = append(all, name+"="+valueWithoutSecrets(value))
		case strings.HasPrefix(name, "TARN_"):
			all = append(all, name+"="+leftOut)
		}
	}
	slices.Sort(all)
	return all
}

// errNoYAML says no more: an error of the parser may quote what it read.
var errNoYAML = errors.New("it is no YAML; tarn serve says where")

// reportedConfig is a configuration file without its comments, without the values of
// keys that tarn does not know, such as a password that somebody put there, and without
// secrets in URLs.
func reportedConfig(data []byte) ([]byte, error) {
	var file yaml.Node
	if err := yaml.Unmarshal(data, &file); err != nil {
		return nil, errNoYAML
	}
	if len(file.Content) == 0 {
		return []byte{}, nil
	}
	redact(&file, knownKeys())
	var out bytes.Buffer
	e := yaml.NewEncoder(&out)
	e.SetIndent(2)
	if err := e.Encode(&file); err != nil {
		return nil, errNoYAML
	}
	return out.Bytes(), nil
}

// redact changes the tree; aliases lead to what is a part of it elsewhere.
func redact(n *yaml.Node, known map[string]bool) {
	n.HeadComment, n.LineComment, n.FootComment = "", "", ""
	if n.Kind == yaml.ScalarNode {
		n.Value = valueWithoutSecrets(withoutUser(n.Value))
	}
	for i, child := range n.Content {
		if n.Kind == yaml.MappingNode && i%2 == 1 && !known[n.Content[i-1].Value] {
			n.Content[i] = &yaml.Node{Kind: yaml.ScalarNode, Value: leftOut}
			continue
		}
		redact(child, known)
	}
}

// withoutUser is a proxy's address without a scheme, which no configuration takes and
// somebody may have tried, without USER:PASSWORD@.
func withoutUser(value string) string {
	user, rest, found := strings.Cut(value, ":")
	i := strings.LastIndexByte(rest, '@')
	if !found || i < 0 || strings.HasPrefix(rest, "//") || strings.Contains(user, "/") {
		return value
	}
	return leftOut + rest[i:]
}

// knownKeys are all that a configuration may have, wherever it stands.
func knownKeys() map[string]bool {
	var c Config
	var u Upstream
	var e Endpoint
	known := make(map[string]bool)
	for _, keys := range [][]key{c.keys(), c.Defaults.keys(), u.keys(), e.keys(), u.Credentials.keys(), u.Credentials.KubeletPlugins.keys(), u.Proxy.keys(), c.TLS.keys()} {
		for _, k := range keys {
			known[k.name] = true
		}
	}
	return known
}
