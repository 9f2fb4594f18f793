// SPDX-License-Identifier: Apache-2.0

package cache

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"tarn/cache/store"
	"tarn/index"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

var evilKey = index.RepositoryKey{Upstream: "evil.example", Repository: "app"}

// withStrangers opens a cache to which only lab.test is listed.
func withStrangers(t *testing.T, maxSize int64) *Cache {
	t.Helper()
	c, err := New(Options{Dir: t.TempDir(), MaxSize: maxSize, Listed: func(upstream string) bool { return upstream == appKey.Upstream }})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// TestATagOfWhatIsNotHereIsNotNoted, until it comes, and then with the same number.
func TestATagOfWhatIsNotHereIsNotNoted(t *testing.T) {
	t.Parallel()
	for _, k := range []index.RepositoryKey{appKey, evilKey} {
		c := withStrangers(t, 1<<30)
		defer c.Close()
		body := []byte(`{"schemaVersion":2,"config":{},"annotations":{"a":"` + strings.Repeat("x", 2*tailHold) + `"}}`)
		note := index.Tag{Digest: digest.FromBytes(body), Sequence: 7, Confirmed: time.Now()}
		known := func(what string, want bool) {
			t.Helper()
			if _, ok := c.Index().Tag(k.TagKey("v1")); ok != want {
				t.Errorf("%s, it is known: %v", what, ok)
			}
		}
		c.NoteTag(k.TagKey("v1"), note)
		known("before it comes", false)
		c.NoteTag(k.TagKey("v1"), index.Tag{Sequence: 7})
		known("when it has gone", false)
		req := parallelRequest(&origin{body: body}, "one")
		if k != appKey {
			req.Domain = k.Upstream
		}
		o := mustOpen(t, goOpen(c, req))
		c.NoteTag(k.TagKey("v1"), note)
		known("while it comes", true)
		o.Close()
		settle(t, "flights", func() bool { return c.Stats().Flights == 0 })
		c.NoteTag(k.TagKey("v2"), note)
		if _, ok := c.Index().Tag(k.TagKey("v2")); !ok {
			t.Error("another tag of what is here is not noted")
		}
		c.NoteTag(k.TagKey("v1"), index.Tag{Digest: digest.FromString("x"), Sequence: 8, Confirmed: time.Now()})
		if now, _ := c.Index().Tag(k.TagKey("v1")); now.Sequence != 8 {
			t.Error("a tag that is known has moved, and is not followed")
		}
	}
}

// TestStrangersTagsEvictNothing: of half a million, nothing is noted, since none is
// of what is here; of those that are, and of their objects, only what fits into the
// strangers' part.
func TestStrangersTagsEvictNothing(t *testing.T) {
	t.Parallel()
	const bound = 17 << 20
	c := withStrangers(t, bound)
	defer c.Close()
	var others [][]byte
	for range 10 { // so that there is room for their part, and not for much more
		others = append(others, randomBytes(1<<20))
		storedBy(t, c, &origin{body: others[len(others)-1]})
	}
	pullImage(t, c, "v1", 1, buildImage(randomBytes(1000), 1000).own()...)
	manifest := []byte(`{"schemaVersion":2,"layers":[{"digest":"` + digest.FromString("x").String() + `"}]}`)
	req := parallelRequest(&origin{body: manifest}, "one")
	req.Domain = evilKey.Upstream
	if _, err := readAll(c, req); err != nil {
		t.Fatal(err)
	}
	settle(t, "flights", func() bool { return c.Stats().Flights == 0 })
	now := time.Now()
	for i := range 500_000 {
		c.NoteTag(evilKey.TagKey(fmt.Sprint("v", i)), index.Tag{Digest: digest.FromString("elsewhere"), Sequence: 1, Confirmed: now})
	}
	if n := c.Index().StrangersBytes(); n != 0 {
		t.Errorf("tags of what is not here take %d bytes", n)
	}
	for i := range 50_000 {
		c.NoteTag(evilKey.TagKey(fmt.Sprint("v", i)), index.Tag{Digest: req.Digest, Sequence: 1, Confirmed: now})
		c.Index().NoteMembership(evilKey.MembershipKey("manifests", digest.FromString(fmt.Sprint(i))), index.Membership{Time: now})
		if i%10_000 == 0 {
			if err := c.Index().Sync(); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := c.Index().Sync(); err != nil {
		t.Fatal(err)
	}
	if err := c.store.Housekeep(); err != nil {
		t.Fatal(err)
	}
	if n := c.Index().StrangersBytes(); n == 0 || n > bound/store.StrangersShare {
		t.Errorf("they take %d bytes", n)
	}
	if s := c.Stats(); s.Evicted.Objects != 0 {
		t.Errorf("something had to go for them: %+v", s)
	}
	list, err := os.ReadFile(filepath.Join(c.store.Dir(), store.ListName))
	if err != nil || len(list) > (4<<20)/store.StrangersShare+4096 || !bytes.Contains(list, []byte("lab.test/app:v1")) || !bytes.Contains(list, []byte("evil.example/app:v1")) {
		t.Errorf("a list of %d bytes: %v", len(list), err)
	}
}

// TestAMediaTypeThatIsNoneIsInNoList, however many tags there are of it.
func TestAMediaTypeThatIsNoneIsInNoList(t *testing.T) {
	t.Parallel()
	c := openChaos(t, t.TempDir(), 1<<30)
	defer c.Close()
	long := strings.Repeat("x", 3<<20)
	body := []byte(`{"mediaType":"application/` + long + `+json","layers":[{"digest":"` + digest.FromString("x").String() + `"}]}`)
	pullImage(t, c, "", 0, body)
	for i := range 100 {
		c.NoteTag(appKey.TagKey(fmt.Sprint("v", i)), index.Tag{Digest: digest.FromBytes(body), Sequence: 1, Confirmed: time.Now()})
	}
	c.Index().NoteMembership(appKey.MembershipKey("manifests", digest.FromBytes(body)), index.Membership{Time: time.Now(), MediaType: "a/b\x1b[0m+json"})
	if err := c.store.Housekeep(); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(filepath.Join(c.store.Dir(), store.ListName))
	var list v1.Index
	if err != nil || json.Unmarshal(data, &list) != nil || len(data) > 1000 || len(list.Manifests) != 0 {
		t.Errorf("a list of %d bytes: %v", len(data), err)
	}
}
