// SPDX-License-Identifier: Apache-2.0

package rights

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"hash"
	"strconv"
	"strings"
	"sync"
	"time"

	"tarn/index"
)

// Credential is what a question is put with: a client's own Authorization, the
// node's credential, or, the zero value, neither.
type Credential struct {
	Authorization string
	Node          bool
}

// Anonymous tells whether it is nobody's.
func (c Credential) Anonymous() bool { return c == Credential{} }

// Kind is what kind of credential it is: anonymous, node, Basic, Bearer or other.
func (c Credential) Kind() string {
	scheme, _, _ := strings.Cut(c.Authorization, " ")
	switch {
	case c.Node:
		return "node"
	case c.Anonymous():
		return "anonymous"
	case strings.EqualFold(scheme, "Basic"):
		return "Basic"
	case strings.EqualFold(scheme, "Bearer"):
		return "Bearer"
	}
	return "other"
}

// Asker is a credential in a repository.
type Asker struct {
	Credential Credential

	repository      index.RepositoryKey
	name, everybody string
}

// anonymous tells whether it has no credential.
func (a Asker) anonymous() bool { return a.Credential.Anonymous() }

// Name is worth nothing outside of this process.
func (a Asker) Name() string { return a.name }

// lasts tells whether the credential is the same each time that it is shown. A
// token says itself how long it is good for.
func (a Asker) lasts() bool {
	scheme, _, _ := strings.Cut(a.Credential.Authorization, " ")
	return a.anonymous() || a.Credential.Node || strings.EqualFold(scheme, "Basic")
}

// key is an object's in the repository.
func (a Asker) key(o Object) index.MembershipKey { return a.repository.MembershipKey(o.Kind, o.Digest) }

// Asker works out once who a request is.
func (r *Rights) Asker(k index.RepositoryKey, c Credential) Asker {
	a := Asker{repository: k, Credential: c, name: r.names.of(k, c)}
	a.everybody = a.name
	if !a.anonymous() {
		a.everybody = r.names.of(k, Credential{})
	}
	return a
}

// names are HMACs of askers, so that no credential lies in memory in a form that
// is worth something elsewhere.
type names struct{ hashes *sync.Pool }

func newNames() names {
	key := make([]byte, sha256.Size)
	rand.Read(key)
	return names{&sync.Pool{New: func() any { return hmac.New(sha256.New, key) }}}
}

func (n names) of(k index.RepositoryKey, c Credential) string {
	m := n.hashes.Get().(hash.Hash)
	defer n.hashes.Put(m)
	m.Reset()
	var buf [512]byte
	text := buf[:0]
	for _, s := range []string{k.Upstream, k.Repository, c.Authorization} {
		text = binary.AppendUvarint(text, uint64(len(s)))
		text = append(text, s...)
	}
	text = strconv.AppendBool(text, c.Node)
	m.Write(text)
	return string(m.Sum(buf[:0]))
}

// tokenEnd reads when a Bearer token says that it ends (RFC 7519 4.1.4). It is
// not verified: it can only shorten what the authority granted.
func tokenEnd(authorization string) (time.Time, bool) {
	scheme, token, _ := strings.Cut(authorization, " ")
	if !strings.EqualFold(scheme, "Bearer") {
		return time.Time{}, false
	}
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		return time.Time{}, false
	}
	payload, err := base64.RawURLEncoding.DecodeString(strings.TrimRight(parts[1], "="))
	if err != nil {
		return time.Time{}, false
	}
	var claims struct {
		Expires float64 `json:"exp"`
	}
	const forever = 1 << 40 // seconds
	if json.Unmarshal(payload, &claims) != nil || claims.Expires <= 0 || claims.Expires > forever {
		return time.Time{}, false
	}
	return time.Unix(int64(claims.Expires), 0), true
}
