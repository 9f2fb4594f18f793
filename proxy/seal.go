// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"encoding/base64"
	"encoding/binary"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"time"

	"tarn/upstream"

	"github.com/distribution/distribution/v3/registry/api/errcode"
)

// A registry that takes passwords itself has no token to give, and clients that
// learn from /v2/ alone how to log in take what they are told there for all
// registries: a token. So the broker gives them their own credential back,
// encrypted under a key of this process, for that one upstream, and good for
// minutes. It is opened where the request comes in: to all that follows the
// client has shown its password. What does not open is shown to nobody.

const (
	// sealedPrefix tells a sealed credential from a registry's own token.
	sealedPrefix = "tarn-sealed."
	// sealedLife is how long one is good for; a client asks for another then.
	sealedLife = 5 * time.Minute
)

// sealer has the key.
type sealer struct{ cipher.AEAD }

func newSealer() sealer {
	key := make([]byte, 32)
	rand.Read(key)
	block, err := aes.NewCipher(key)
	if err == nil {
		if aead, err := cipher.NewGCM(block); err == nil {
			return sealer{aead}
		}
	}
	panic(err) // the key has a length that there is
}

// seal makes a token of an Authorization for one upstream.
func (s sealer) seal(name upstream.Name, authorization string, now time.Time) upstream.Token {
	nonce := make([]byte, s.NonceSize())
	rand.Read(nonce)
	text := binary.BigEndian.AppendUint64(nil, uint64(now.Add(sealedLife).Unix()))
	text = append(text, authorization...)
	sealed := s.Seal(nonce, nonce, text, []byte(name))
	return upstream.Token{Value: sealedPrefix + base64.RawURLEncoding.EncodeToString(sealed), Life: sealedLife, Issued: now}
}

// open returns what was sealed for this upstream, if the token is one and is good
// still. ok is false for a sealed one that is not.
func (s sealer) open(name upstream.Name, authorization string, now time.Time) (opened string, ok bool) {
	scheme, token, _ := strings.Cut(authorization, " ")
	encoded, sealed := strings.CutPrefix(strings.TrimSpace(token), sealedPrefix)
	if !sealed || !strings.EqualFold(scheme, "Bearer") {
		return authorization, true
	}
	data, err := base64.RawURLEncoding.DecodeString(encoded)
	if err != nil || len(data) < s.NonceSize() {
		return "", false
	}
	text, err := s.Open(nil, data[:s.NonceSize()], data[s.NonceSize():], []byte(name))
	if err != nil || len(text) < 8 || now.Unix() >= int64(binary.BigEndian.Uint64(text)) {
		return "", false
	}
	return string(text[8:]), true
}

// unseal opens what the client shows, before anything else looks at it.
func (p *Proxy) unseal(w *response, r *http.Request, q *request) (err error) {
	var ok bool
	if q.authorization, ok = p.sealer.open(q.upstream, q.authorization, p.now()); ok {
		return nil
	}
	if err := challengeToken(w, r, q); err != nil {
		return err
	}
	return &apiError{http.StatusUnauthorized, errcode.ErrorCodeUnauthorized,
		"this token of tarn's is over, was for another registry, or is of an earlier process: get a new one"}
}

// challengeToken sends a client to tarn's own /token.
func challengeToken(w *response, r *http.Request, q *request) error {
	if r.Host == "" || strings.ContainsAny(r.Host, `"\`) {
		return badName("no usable Host header")
	}
	// Who names the registry before /v2/ says in no scope which it is.
	realm := url.URL{Scheme: "http", Host: r.Host, Path: strings.TrimSuffix(q.prefix, "v2/") + "token"}
	if r.TLS != nil {
		realm.Scheme = "https"
	}
	w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm="%s",service="tarn"`, realm.String()))
	return nil
}
