// SPDX-License-Identifier: Apache-2.0

package rights

import (
	"slices"
	"time"

	"tarn/index"
)

// Remembered is a yes of an authority that is remembered.
type Remembered struct {
	// As is the kind of credential: anonymous, node, Basic, Bearer or other.
	As    string    `json:"as"`
	Asked time.Time `json:"asked"` // when the question was sent
	Until time.Time `json:"until"` // until when it stands for another question
}

// Remembered are the grants in a repository that stand for another question, the
// latest first.
func (r *Rights) Remembered(k index.RepositoryKey) []Remembered {
	now := r.opts.Now()
	all := []Remembered{}
	r.mu.Lock()
	for _, g := range r.grants {
		if g.repository == k && now.Before(g.until) {
			all = append(all, Remembered{g.as, g.asked, g.until})
		}
	}
	r.mu.Unlock()
	slices.SortFunc(all, func(a, b Remembered) int { return b.Asked.Compare(a.Asked) })
	return all
}
