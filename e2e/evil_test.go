// SPDX-License-Identifier: Apache-2.0

//go:build linux

package e2e

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

const (
	evilName = "evil.example"
	// evilIP is a public address of nobody's here: the other end of a cable
	// between two network namespaces.
	evilIP = "93.184.215.14"
	nearIP = "93.184.215.1"
)

// evil is a registry that nobody listed. It wants secrets.
type evil struct {
	roots string // file with its certificate
	bait  map[string][]byte

	mu       sync.Mutex
	demanded demand
	requests []string
}

// demand is what evil asks for, and when.
type demand struct {
	challenge string
	layers    bool // only once a client comes for a layer
}

// startEvil puts the registry at a public address, in a network namespace of
// its own, with TLS.
func startEvil(t *testing.T) *evil {
	t.Helper()
	for _, line := range []string{
		"netns add evil",
		"link add near type veth peer name far netns evil",
		"addr add " + nearIP + "/24 dev near",
		"link set near up",
		"-n evil addr add " + evilIP + "/24 dev far",
		"-n evil link set far up",
	} {
		if err := command(t, nil, "ip", strings.Fields(line)...); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() {
		if err := command(t, nil, "ip", "link", "del", "near"); err != nil {
			t.Error(err)
		}
		if err := command(t, nil, "ip", "netns", "del", "evil"); err != nil {
			t.Error(err)
		}
	})
	cert, file := certificate(t, evilName)
	e := &evil{roots: file, bait: newBait(t)}
	server := &http.Server{Handler: http.HandlerFunc(e.serve), TLSConfig: &tls.Config{Certificates: []tls.Certificate{cert}}}
	l := listenIn(t, "/run/netns/evil", evilIP+":443")
	done := make(chan error, 1)
	go func() { done <- server.ServeTLS(l, "", "") }()
	t.Cleanup(func() {
		server.Close()
		<-done
	})
	return e
}

// listenIn opens a listener in another network namespace, which it stays in
// whoever accepts from it.
func listenIn(t *testing.T, netns, addr string) net.Listener {
	t.Helper()
	var l net.Listener
	err := inNetns(netns, func() (err error) {
		l, err = net.Listen("tcp", addr)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// inNetns does something in another network namespace: a socket that it opens stays
// there.
func inNetns(netns string, do func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		fd, err := unix.Open(netns, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err == nil {
			defer unix.Close(fd)
			err = unix.Setns(fd, unix.CLONE_NEWNET)
		}
		if err == nil {
			err = do()
		}
		done <- err
	}()
	return <-done
}

// certificate is one for that name that vouches for itself, and a file with it.
func certificate(t *testing.T, name string) (tls.Certificate, string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), DNSNames: []string{name}, NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "roots.pem")
	writeFile(t, file, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})))
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, file
}

// serve refuses what it is asked for, and remembers all that it is told.
func (e *evil) serve(w http.ResponseWriter, r *http.Request) {
	dump, err := httputil.DumpRequest(r, true)
	if err != nil {
		dump = fmt.Append(nil, err)
	}
	e.mu.Lock()
	e.requests = append(e.requests, string(dump))
	demanded := e.demanded
	e.mu.Unlock()
	_, name, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, "/v2/"), "/")
	if body, ok := e.bait[name]; ok && demanded.layers {
		w.Header().Set("Content-Type", "application/octet-stream")
		if strings.HasPrefix(name, "manifests/") {
			w.Header().Set("Content-Type", v1.MediaTypeImageManifest)
			w.Header().Set("Docker-Content-Digest", digest.FromBytes(body).String())
		}
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(body))
		return
	}
	if r.URL.Path == "/token" {
		fmt.Fprint(w, `{"token":"given-by-evil"}`)
		return
	}
	w.Header().Set("WWW-Authenticate", demanded.challenge)
	w.WriteHeader(http.StatusUnauthorized)
}

// newBait is an image whose layer is not there.
func newBait(t *testing.T) map[string][]byte {
	t.Helper()
	config, err := json.Marshal(v1.Image{
		Platform: v1.Platform{OS: "linux", Architecture: runtime.GOARCH},
		RootFS:   v1.RootFS{Type: "layers", DiffIDs: []digest.Digest{digest.FromString("layer")}},
	})
	if err != nil {
		t.Fatal(err)
	}
	manifest, err := json.Marshal(v1.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2},
		MediaType: v1.MediaTypeImageManifest,
		Config:    v1.Descriptor{MediaType: v1.MediaTypeImageConfig, Digest: digest.FromBytes(config), Size: int64(len(config))},
		Layers:    []v1.Descriptor{{MediaType: v1.MediaTypeImageLayerGzip, Digest: digest.FromString("packed"), Size: 1000}},
	})
	if err != nil {
		t.Fatal(err)
	}
	return map[string][]byte{
		"manifests/v1": manifest,
		"manifests/" + digest.FromBytes(manifest).String(): manifest,
		"blobs/" + digest.FromBytes(config).String():       config,
	}
}

func (e *evil) demand(d demand) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.demanded, e.requests = d, nil
}

// knows tells whether the secret came here in any form, and how much came.
func (e *evil) knows(name, secret string) (knows bool, requests int) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, r := range e.requests {
		for _, form := range []string{secret, url.QueryEscape(secret), base64.StdEncoding.EncodeToString([]byte(name + ":" + secret))} {
			knows = knows || strings.Contains(r, form)
		}
	}
	return knows, len(e.requests)
}

const (
	basicDemand  = `Basic realm="give me"`
	bearerDemand = `Bearer realm="https://` + evilName + `/token",service="evil",scope="repository:x:pull"`
)

// demands by the repository that they stand in: what one was refused a moment
// ago must not be in the next one's way.
var demands = map[string]demand{
	"basic":        {basicDemand, false},
	"bearer":       {bearerDemand, false},
	"basic-layer":  {basicDemand, true},
	"bearer-layer": {bearerDemand, true},
}

// TestASecretKeptForTarnReachesNoStranger: an image is called
// 127.0.0.1:5050/evil.example/x, and the client has a secret for
// 127.0.0.1:5050.
func TestASecretKeptForTarnReachesNoStranger(t *testing.T) {
	for _, settings := range []string{brokerSettings, ""} {
		name := "with the broker on"
		if settings == "" {
			name = "with the broker off"
		}
		t.Run(name, func(t *testing.T) {
			eachPathClient(t, func(t *testing.T, c pathClient) {
				e := startEvil(t)
				newRegistry(t, nil)
				startTarn(t, folder(t, work(), "tarn"), settings, "env", "SSL_CERT_FILE="+e.roots)
				pull := c.start(t)
				config := secretFor(t, tarnAddr, user, password)
				reached := 0
				for repo, wanted := range demands {
					e.demand(wanted)
					if err := pull(tarnAddr+"/"+evilName+"/"+repo+":v1", config); err == nil {
						t.Errorf("%s: the pull of nothing succeeded", repo)
					}
					knows, requests := e.knows(user, password)
					if knows {
						t.Errorf("%s: evil knows the secret", repo)
					}
					reached += requests
				}
				// Some clients give up at tarn's /token already.
				t.Logf("%d requests reached evil", reached)
			})
		})
	}
}

// TestASecretKeptForTarnReachesNoStrangerThroughAnNsMirror: BuildKit shows a
// mirror the secret that it keeps for the mirror, not for the image's host.
func TestASecretKeptForTarnReachesNoStrangerThroughAnNsMirror(t *testing.T) {
	if os.Getenv(envAllClients) == "" {
		t.Skip("needs BuildKit: make e2e-clients")
	}
	e := startEvil(t)
	newRegistry(t, nil)
	startTarn(t, folder(t, work(), "tarn"), brokerSettings, "env", "SSL_CERT_FILE="+e.roots)
	build := startBuildKit(t, "[registry.\""+evilName+"\"]\n  mirrors = [\""+tarnAddr+"\"]\n")
	config := secretFor(t, tarnAddr, user, password)
	for repo, wanted := range demands {
		e.demand(wanted)
		if err := build(t, evilName+"/"+repo+":v1", config); err == nil {
			t.Errorf("%s: the build from nothing succeeded", repo)
		}
		knows, requests := e.knows(user, password)
		if knows {
			t.Errorf("%s: evil knows the secret", repo)
		}
		if requests == 0 {
			t.Errorf("%s: nothing reached evil, so this proves nothing", repo)
		}
	}
}

// TestEvilKnowsWhatItIsTold is the negative control: a client that keeps a
// secret for evil itself gives it away.
func TestEvilKnowsWhatItIsTold(t *testing.T) {
	e := startEvil(t)
	config := secretFor(t, evilName, user, password)
	for repo, wanted := range demands {
		e.demand(wanted)
		if err := command(t, append(dockerConfig(config), "SSL_CERT_FILE="+e.roots), "crane", "pull", evilName+"/"+repo+":v1", filepath.Join(t.TempDir(), "x.tar")); err == nil {
			t.Errorf("%s: there is an image", repo)
		}
		if knows, requests := e.knows(user, password); !knows {
			t.Errorf("%s: after %d requests evil does not know what it was told", repo, requests)
		}
	}
}
