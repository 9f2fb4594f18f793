// SPDX-License-Identifier: Apache-2.0

package index

import (
	"bytes"
	"maps"
	"strings"
	"time"

	bolt "go.etcd.io/bbolt"
)

// CloseRepository forgets what anonymous was served in a repository, because its
// authority does not let anonymous in any more. It tells whether there was
// something to forget; only what is flushed is forgotten for good.
func (ix *Index) CloseRepository(k RepositoryKey) (forgot bool) {
	var open map[string]Membership
	prefix := k.bytes("")
	ix.readThenLock(func() {
		open = make(map[string]Membership)
		ix.view(func(tx *bolt.Tx) error {
			c := tx.Bucket(membershipBucket).Cursor()
			for key, value := c.Seek(prefix); bytes.HasPrefix(key, prefix); key, value = c.Next() {
				var m Membership
				if m.decode(value) == nil && !m.Anonymous.IsZero() {
					open[string(key)] = m
				}
			}
			return nil
		})
		ix.mu.Lock()
		defer ix.mu.Unlock()
		maps.DeleteFunc(open, func(key string, _ Membership) bool { _, noted := ix.memberships.now[key]; return noted })
		for key, note := range ix.memberships.now {
			if note != nil && !note.Anonymous.IsZero() && strings.HasPrefix(key, string(prefix)) {
				open[key] = *note
			}
		}
	})
	defer ix.mu.Unlock()
	for key, m := range open {
		if note, noted := ix.memberships.now[key]; noted {
			if note == nil {
				continue // its authority took all of it back in between
			}
			m = *note
		}
		m.Anonymous = time.Time{}
		ix.memberships.set(key, &m, ix.extentOf([]byte(key)))
		forgot = true
	}
	return forgot
}
