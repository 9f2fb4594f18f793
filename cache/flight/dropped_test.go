// SPDX-License-Identifier: Apache-2.0

package flight

import (
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"
)

// TestWhatIsDroppedHasABound for each domain, and a full one has only its own ranges
// refused, until they end.
func TestWhatIsDroppedHasABound(t *testing.T) {
	other := digest.FromString("another object")
	fill := func(d *dropped, domain string, n int) {
		for i := range n {
			d.add(Key{domain, digest.FromString(fmt.Sprint(domain, i))})
		}
	}
	for name, c := range map[string]struct {
		fill            func(d *dropped)
		most            int
		refused, served []string // domains
	}{
		"one that is not listed": {
			func(d *dropped) { fill(d, "evil.example", 10*maxStrangerDropped) }, maxStrangerDropped + 1,
			[]string{"evil.example"}, []string{"other.example", ListedDomain},
		},
		"all that are not listed": {
			func(d *dropped) {
				for i := range 2 * maxStrangersDropped {
					fill(d, fmt.Sprint("evil", i, ".example"), 2)
				}
			}, maxStrangersDropped + 1,
			[]string{"other.example"}, []string{ListedDomain},
		},
		"the listed ones": {
			func(d *dropped) { fill(d, ListedDomain, 2*maxDropped) }, maxDropped + 1,
			[]string{ListedDomain}, []string{"other.example"},
		},
		"what a start found": {
			func(d *dropped) { fill(d, "", 2*maxDropped) }, maxDropped + 1,
			[]string{ListedDomain, "other.example"}, nil,
		},
		"nearly one": {
			func(d *dropped) { fill(d, "evil.example", maxStrangerDropped) }, maxStrangerDropped,
			nil, []string{"evil.example", "other.example", ListedDomain},
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				d := newDropped()
				c.fill(d)
				if len(d.until) > c.most {
					t.Errorf("%d are remembered", len(d.until))
				}
				for _, domain := range c.refused {
					if !d.refuses(Key{domain, other}, 1) || d.refuses(Key{domain, other}, 0) {
						t.Errorf("%s is not full", domain)
					}
				}
				for _, domain := range c.served {
					if d.refuses(Key{domain, other}, 1) {
						t.Errorf("%s is full", domain)
					}
				}
				time.Sleep(dropFor)
				c.fill(d) // all over again
				time.Sleep(dropFor)
				for _, domain := range append(c.refused, c.served...) {
					if d.refuses(Key{domain, other}, 1) {
						t.Errorf("%s is full for ever", domain)
					}
				}
				d.add(Key{ListedDomain, other})
				if !d.refuses(Key{ListedDomain, other}, 1) || len(d.until) > c.most+1 {
					t.Error("there is no room again")
				}
			})
		})
	}
}

// TestADomainsDropIsItsOwn: but one of which the domain is not known is everybody's.
func TestADomainsDropIsItsOwn(t *testing.T) {
	t.Parallel()
	d, one, two := newDropped(), digest.FromString("one"), digest.FromString("two")
	d.add(Key{"evil.example", one})
	d.add(Key{"", two})
	for k, want := range map[Key]bool{
		{"evil.example", one}: true, {ListedDomain, one}: false, {"other.example", one}: false,
		{"evil.example", two}: true, {ListedDomain, two}: true, {"other.example", two}: true,
	} {
		if d.refuses(k, 1) != want {
			t.Errorf("%v is refused: %v", k, !want)
		}
	}
}
