// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"fmt"
	"strings"

	"tarn/blobstore"
	"tarn/index"
	"tarn/upstream"

	"github.com/opencontainers/go-digest"
)

// ParseImage reads an image as people write it: [registry/]name[:tag][@digest],
// where the registry is a component with a dot or a port, localhost, or one that
// is listed. Without a registry it is the default upstream's, without tag and
// digest it is latest. With both, the digest is what counts, and the tag is empty.
func (p *Proxy) ParseImage(s string) (k index.RepositoryKey, tag string, d digest.Digest, err error) {
	wrong := func(cause string) error {
		return fmt.Errorf("%q is not an image: %s; it is written as registry/name:tag or registry/name@digest", s, cause)
	}
	name, encoded, byDigest := strings.Cut(s, "@")
	if byDigest {
		if d = digest.Digest(encoded); blobstore.CheckDigest(d) != nil {
			return k, "", "", wrong("its digest is none of sha256 or sha512")
		}
	}
	tag = "latest"
	if colon := strings.LastIndexByte(name, ':'); colon > strings.LastIndexByte(name, '/') {
		if name, tag = name[:colon], name[colon+1:]; !validTag(tag) {
			return k, "", "", wrong("its tag is none")
		}
	}
	q := &request{upstream: p.names.defaultUpstream, repository: name}
	if first, rest, more := strings.Cut(name, "/"); more && (first == "localhost" || strings.Contains(first, ":") || p.names.looksLikeUpstream(first)) {
		if q.upstream, err = upstream.ParseName(first); err != nil {
			return k, "", "", wrong(err.Error())
		}
		q.repository = rest
	}
	if err := q.completeRepository(); err != nil {
		return k, "", "", wrong(err.Error())
	}
	if byDigest {
		tag = ""
	}
	return q.repositoryKey(), tag, d, nil
}
