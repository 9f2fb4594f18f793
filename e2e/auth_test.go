// SPDX-License-Identifier: Apache-2.0

//go:build linux

package e2e

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/distribution/distribution/v3/configuration"
	_ "github.com/distribution/distribution/v3/registry/auth/htpasswd"
	"github.com/distribution/distribution/v3/registry/auth/token"
	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"golang.org/x/crypto/bcrypt"
)

const (
	user     = "lab"
	password = "canary-long-lived-password"
	// stranger is a user whom the registry knows and gives nothing.
	stranger = "eve"

	tokenAddr = "127.0.0.1:5003"
	wireAddr  = "127.0.0.1:5055" // tarn, with a record of what clients send
)

// basicAuth is the registry's own check of a password.
func basicAuth(t *testing.T) configuration.Auth {
	t.Helper()
	hash, err := bcrypt.GenerateFromPassword([]byte(password), bcrypt.MinCost)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(folder(t, work(), "auth"), "htpasswd")
	if err := os.WriteFile(file, []byte(user+":"+string(hash)+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	return configuration.Auth{"htpasswd": configuration.Parameters{"realm": "the tests", "path": file}}
}

// tokenService hands out tokens that the registry believes, as distribution's
// "Token Authentication" has it: with the right to pull what is asked for to
// user, and with no right to everybody else.
type tokenService struct {
	signer jose.Signer
	delay  atomic.Int64 // nanoseconds that each answer takes

	mu   sync.Mutex
	seen []string // credentials
}

// bearerAuth starts a token service and makes the registry believe it.
func bearerAuth(t *testing.T) (*tokenService, configuration.Auth) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	public, err := json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: key.Public(), KeyID: "tests", Algorithm: "ES256", Use: "sig"}}})
	if err != nil {
		t.Fatal(err)
	}
	jwks := filepath.Join(folder(t, work(), "auth"), "jwks.json")
	if err := os.WriteFile(jwks, public, 0o600); err != nil {
		t.Fatal(err)
	}
	s := &tokenService{}
	s.signer, err = jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: key, KeyID: "tests"}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	serve(t, tokenAddr, http.HandlerFunc(s.serve))
	return s, configuration.Auth{"token": configuration.Parameters{
		"realm": "http://" + tokenAddr + "/token", "service": "tests", "issuer": "tests", "jwks": jwks,
	}}
}

func (s *tokenService) serve(w http.ResponseWriter, r *http.Request) {
	<-time.After(time.Duration(s.delay.Load()))
	name, given, ok := r.BasicAuth()
	if r.FormValue("grant_type") == "password" {
		name, given, ok = r.FormValue("username"), r.FormValue("password"), true
	}
	s.mu.Lock()
	s.seen = append(s.seen, given)
	s.mu.Unlock()
	if ok && (name != user && name != stranger || given != password) {
		http.Error(w, "who?", http.StatusUnauthorized)
		return
	}
	now := time.Now()
	claims := token.ClaimSet{
		Issuer: "tests", Subject: name, Audience: token.AudienceList{"tests"}, JWTID: rand.Text(),
		IssuedAt: now.Unix(), NotBefore: now.Unix(), Expiration: now.Add(time.Minute).Unix(),
	}
	for _, scope := range strings.Fields(strings.Join(r.Form["scope"], " ")) {
		if part := strings.Split(scope, ":"); name == user && len(part) == 3 {
			claims.Access = append(claims.Access, &token.ResourceActions{Type: part[0], Name: part[1], Actions: []string{"pull"}})
		}
	}
	signed, err := jwt.Signed(s.signer).Claims(claims).Serialize()
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	json.NewEncoder(w).Encode(map[string]any{"token": signed, "access_token": signed, "expires_in": 60})
}

// sawPassword tells whether a client showed the service the password.
func (s *tokenService) sawPassword() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, p := range s.seen {
		if p == password {
			return true
		}
	}
	return false
}

// wire passes connections to tarn on, and records what clients send.
type wire struct {
	mu   sync.Mutex
	sent bytes.Buffer
}

func (w *wire) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.sent.Write(p)
}

func tapTarn(t *testing.T) *wire {
	t.Helper()
	l, err := net.Listen("tcp", wireAddr)
	if err != nil {
		t.Fatal(err)
	}
	w := &wire{}
	var running sync.WaitGroup
	var mu sync.Mutex
	open := map[net.Conn]bool{}
	running.Go(func() {
		for {
			client, err := l.Accept()
			if err != nil {
				return
			}
			server, err := net.Dial("tcp", tarnAddr)
			if err != nil {
				client.Close()
				continue
			}
			mu.Lock()
			open[client], open[server] = true, true
			mu.Unlock()
			running.Go(func() {
				io.Copy(io.MultiWriter(server, w), client)
				server.(*net.TCPConn).CloseWrite()
			})
			running.Go(func() {
				io.Copy(client, server)
				client.Close()
				server.Close()
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		mu.Lock()
		for c := range open {
			c.Close()
		}
		mu.Unlock()
		running.Wait()
	})
	return w
}

// count is how often clients sent this text to tarn so far.
func (w *wire) count(text string) int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return bytes.Count(w.sent.Bytes(), []byte(text))
}

// has tells whether a client sent the text to tarn, as it is, escaped, or in
// the base64 of a Basic credential.
func (w *wire) has(name, secret string) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, form := range []string{secret, url.QueryEscape(secret), base64.StdEncoding.EncodeToString([]byte(name + ":" + secret))} {
		if bytes.Contains(w.sent.Bytes(), []byte(form)) {
			return true
		}
	}
	return false
}
