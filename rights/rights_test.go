// SPDX-License-Identifier: Apache-2.0

package rights

import (
	"fmt"
	"path/filepath"
	"testing"
	"time"

	"tarn/index"

	"github.com/opencontainers/go-digest"
)

// desk is rights over a real index, with a clock of its own.
type desk struct {
	*Rights
	index *index.Index
	now   time.Time
	terms Terms
	kept  int // how often what was taken back was written
}

var usual = Terms{Grant: time.Minute, Membership: 24 * time.Hour, Stale: time.Hour}

func newDesk(t *testing.T) *desk {
	t.Helper()
	ix, err := index.Open(filepath.Join(t.TempDir(), "index.db"), index.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ix.Close() })
	d := &desk{index: ix, now: time.Unix(1_800_000_000, 0), terms: usual}
	d.Rights = New(Options{
		Index: ix,
		Keep:  func() { d.kept++; ix.Sync() },
		Terms: func(string) Terms { return d.terms },
		Now:   func() time.Time { return d.now },
	})
	return d
}

var (
	repository = index.RepositoryKey{Upstream: "ghcr.io", Repository: "org/app"}
	layer      = Object{"blobs", digest.FromString("layer")}
	other      = Object{"blobs", digest.FromString("other")}
	image      = Object{"manifests", digest.FromString("image")}
)

const size = 1000

func here(n int64) func() int64 { return func() int64 { return n } }

// askers are the kinds that there are.
var askers = map[string]Credential{
	"anonymous": {},
	"password":  {Authorization: "Basic YTpi"},
	"token":     {Authorization: "Bearer abc"},
	"node":      {Node: true},
}

func (d *desk) asker(name string) Asker { return d.Asker(repository, askers[name]) }

// may tells whether the asker may have the object, which is here with its size,
// when it is asked for whole.
func (d *desk) may(a Asker, o Object) bool {
	_, ok := d.Entitled(a, o, here(size), false)
	return ok
}

// served has somebody else be served the object, so that there is a membership.
func (d *desk) served(o Object) {
	d.Learn(d.Asker(repository, Credential{Authorization: "Basic c29tZWJvZHk6cHc="}), o, Evidence{Says: Verified, Asked: d.now, Size: size})
}

// TestTheTable holds each row and column to what it says, for each kind of
// credential: what the evidence about one object opens of that, and of another
// one that somebody was served in the repository.
func TestTheTable(t *testing.T) {
	t.Parallel()
	type makes struct{ member, grant bool }
	for says, columns := range map[Says]map[bool]func(anonymous bool) makes{
		Verified: {
			false: func(bool) makes { return makes{true, true} },
			true:  func(anonymous bool) makes { return makes{true, anonymous} },
		},
		Named: {
			false: func(bool) makes { return makes{true, true} },
			true:  func(anonymous bool) makes { return makes{true, anonymous} },
		},
		Sized: {
			false: func(bool) makes { return makes{true, false} },
			true:  func(bool) makes { return makes{true, false} },
		},
		Mute: {
			false: func(bool) makes { return makes{} },
			true:  func(bool) makes { return makes{} },
		},
	} {
		for redirected, want := range columns {
			for name := range askers {
				d := newDesk(t)
				d.served(other)
				a := d.asker(name)
				e := Evidence{Says: says, Asked: d.now, Redirected: redirected, Size: -1}
				y := d.Learn(a, layer, e)
				w := want(a.anonymous())
				what := fmt.Sprintf("%d, redirected %v, %s", says, redirected, name)
				if y.Proved != w.member {
					t.Errorf("%s: the yes is proved %v", what, y.Proved)
				}
				m, _ := d.index.Membership(a.key(layer))
				if !m.Time.IsZero() != w.member || !m.Anonymous.IsZero() != (w.member && a.anonymous()) {
					t.Errorf("%s: the membership is %+v", what, m)
				}
				if d.Granted(a) != w.grant {
					t.Errorf("%s: granted %v", what, d.Granted(a))
				}
				if d.may(a, layer) != w.member {
					t.Errorf("%s: it may have the object: %v", what, d.may(a, layer))
				}
				// What somebody else was served, never for anonymous.
				if got := d.may(a, other); got != (w.grant && !a.anonymous()) {
					t.Errorf("%s: it may have another object: %v", what, got)
				}
				for stranger := range askers {
					if b := d.asker(stranger); stranger != name && d.may(b, layer) != (a.anonymous() && w.grant) {
						t.Errorf("%s: %s may have it: %v", what, stranger, d.may(b, layer))
					}
				}
				d.now = d.now.Add(usual.Grant)
				if d.may(a, layer) || d.Granted(a) {
					t.Errorf("%s: it lasts longer than grant_ttl", what)
				}
			}
		}
	}
}

// TestWhatARefusalEnds holds the other half of the table, for a credential and an
// anonymous that both may have all.
func TestWhatARefusalEnds(t *testing.T) {
	t.Parallel()
	type left struct{ object, others, begun, stale bool }
	all := left{true, true, true, true}
	for says, want := range map[Says]map[string]left{
		Unauthorised: {"password": {begun: true}, "anonymous": {begun: true}},
		Forbidden:    {"password": {}, "anonymous": {}},
		NoTag:        {"password": {}, "anonymous": {stale: true}},
		TagGone:      {"password": {}, "anonymous": {}},
		NoObject:     {"password": {others: true, stale: true}, "anonymous": {others: true, stale: true}},
		Nothing:      {"password": all, "anonymous": all},
	} {
		for name, want := range want {
			for _, redirected := range []bool{false, true} {
				d := newDesk(t)
				a := d.asker(name)
				for _, o := range []Object{layer, other} {
					y := d.Learn(a, o, Evidence{Says: Verified, Asked: d.now, Size: size})
					d.Begin(a, o, y, 1<<20)()
				}
				d.now = d.now.Add(time.Second)
				o := layer
				if says == NoTag || says == TagGone {
					o = Object{Kind: "manifests"}
				}
				d.Learn(a, o, Evidence{Says: says, Asked: d.now, Redirected: redirected, Size: -1})
				if redirected {
					want = all // it is nobody's word
				}
				d.now = d.now.Add(time.Second)
				var got left
				// A claim stands for the object itself; what begun means is asked of
				// the other one, after the grant.
				got.object = d.may(a, layer)
				got.others = d.may(a, other)
				if says == Unauthorised && !redirected {
					got.object, got.others = d.Granted(a), d.Granted(a)
				}
				_, _, _, got.stale = d.Stale(a, other, false)
				d.now = d.now.Add(25 * time.Second)
				_, got.begun = d.Entitled(a, other, here(size), true)
				if says == NoObject && !redirected {
					got.begun = false
				}
				if got != want {
					t.Errorf("%d, redirected %v, %s: left %+v, want %+v", says, redirected, name, got, want)
				}
			}
		}
	}
}

// TestAClaimIsGoodForItsSizeOnly: the answer did not name the object, and what it
// said is held against what comes here.
func TestAClaimIsGoodForItsSizeOnly(t *testing.T) {
	t.Parallel()
	for name := range askers {
		d := newDesk(t)
		a := d.asker(name)
		y := d.Learn(a, layer, Evidence{Says: Mute, Asked: d.now, Redirected: true, Size: size})
		if !y.Covers(size) || y.Covers(size-1) || y.Covers(-1) {
			t.Errorf("%s: %+v", name, y)
		}
		end := d.Begin(a, layer, y, 1<<20)
		for n, want := range map[int64]bool{size: true, size + 1: false, 0: false, -1: false} {
			if _, ok := d.Entitled(a, layer, here(n), false); ok != want {
				t.Errorf("%s: of %d bytes here: %v", name, n, ok)
			}
		}
		if d.Granted(a) || d.may(a, other) {
			t.Errorf("%s: it opens more than the object", name)
		}
		for stranger := range askers {
			if stranger != name && d.may(d.asker(stranger), layer) {
				t.Errorf("%s has what %s was told", stranger, name)
			}
		}
		end()
		d.now = d.now.Add(finishIdle - time.Second)
		for n, want := range map[int64]bool{size: true, size + 1: false} {
			if _, ok := d.Entitled(a, layer, here(n), true); ok != want {
				t.Errorf("%s: finishing %d bytes: %v", name, n, ok)
			}
		}
	}
	d := newDesk(t)
	a := d.asker("token")
	d.Learn(a, layer, Evidence{Says: Mute, Asked: d.now, Size: -1})
	if d.may(a, layer) {
		t.Error("an answer without name and size opens something")
	}
}

// TestAYesThatCrossedARefusalMakesNothing, whatever it says.
func TestAYesThatCrossedARefusalMakesNothing(t *testing.T) {
	t.Parallel()
	for _, no := range []Says{Unauthorised, Forbidden, TagGone, NoObject} {
		d := newDesk(t)
		d.served(other)
		a := d.asker("password")
		asked := d.now
		d.now = d.now.Add(time.Second)
		d.Learn(a, layer, Evidence{Says: no, Asked: asked, Size: -1})
		d.now = d.now.Add(time.Second)
		d.Learn(a, layer, Evidence{Says: Verified, Asked: asked, Size: size})
		if d.may(a, layer) || no != NoObject && d.may(a, other) {
			t.Errorf("%d: it made something", no)
		}
		// Nor by what it lets begin.
		d.Begin(a, layer, Yes{Asked: asked, Size: size, Proved: true}, 1<<20)()
		if _, ok := d.Entitled(a, layer, here(size), true); ok {
			t.Errorf("%d: the download may be finished", no)
		}
	}
}

// TestADownloadThatGoesOnIsEndedByNobodyElse: range after range, past the grant and
// somebody else's 404; a 403 to its own credential ends it.
func TestADownloadThatGoesOnIsEndedByNobodyElse(t *testing.T) {
	t.Parallel()
	d := newDesk(t)
	a, other := d.asker("password"), d.asker("token")
	end := d.Begin(a, layer, d.Learn(a, layer, Evidence{Says: Verified, Asked: d.now, Size: size}), 1<<20)
	for n := range 20 {
		end()
		d.now = d.now.Add(20 * time.Second)
		switch n {
		case 1:
			d.Learn(other, layer, Evidence{Says: NoObject, Asked: d.now})
			if d.may(a, layer) {
				t.Error("the whole goes out, and the registry has said that it is gone")
			}
		case 2: // a token that ran out may be renewed
			d.Learn(a, Object{Kind: manifests}, Evidence{Says: Unauthorised, Asked: d.now})
		}
		y, ok := d.Entitled(a, layer, here(size), true)
		if !ok {
			t.Fatalf("range %d is refused", n)
		}
		end = d.Begin(a, layer, y, 1<<20)
	}
	end()
	d.Learn(a, Object{Kind: manifests}, Evidence{Says: Forbidden, Asked: d.now})
	if _, ok := d.Entitled(a, layer, here(size), true); ok {
		t.Error("after a 403")
	}
}

// TestARefusalIsNoYes, whatever it says besides.
func TestARefusalIsNoYes(t *testing.T) {
	t.Parallel()
	d := newDesk(t)
	for says := Unauthorised; says <= Nothing; says++ {
		if y := d.Learn(d.asker("password"), layer, Evidence{Says: says, Asked: d.now, Size: size}); y.Covers(size) {
			t.Errorf("%d: %+v", says, y)
		}
	}
}

// TestStaleIsForWhom: the owner, or with StaleForNode and nobody answering, every
// client; after a restart without the passwords.
func TestStaleIsForWhom(t *testing.T) {
	t.Parallel()
	for _, forNode := range []bool{false, true} {
		for name := range askers {
			d := newDesk(t)
			d.terms.StaleForNode = forNode
			a := d.asker(name)
			d.Learn(a, layer, Evidence{Says: Named, Asked: d.now, Size: size})
			d.now = d.now.Add(30 * time.Minute)
			for _, away := range []bool{false, true} {
				for who := range askers {
					owner := who == name && name != "token"
					want := owner || name == "anonymous" || forNode && away
					if _, age, _, ok := d.Stale(d.asker(who), layer, away); ok != want || ok && age != 30*time.Minute {
						t.Errorf("served to %s, asked by %s, for the node %v, away %v: %v, %v old", name, who, forNode, away, ok, age)
					}
				}
			}
			restarted := New(d.opts)
			for who := range askers {
				want := name == "anonymous" || forNode
				if _, _, _, ok := restarted.Stale(restarted.Asker(repository, askers[who]), layer, true); ok != want {
					t.Errorf("after a restart, served to %s, asked by %s, for the node %v: %v", name, who, forNode, ok)
				}
			}
			d.now = d.now.Add(30 * time.Minute)
			if _, _, _, ok := d.Stale(a, layer, true); ok {
				t.Errorf("served to %s: it lasts longer than stale_if_error", name)
			}
		}
	}
}

// TestARefusalOfAnonymousIsRememberedForAMoment, with how to show a password, and
// for an outage.
func TestARefusalOfAnonymousIsRememberedForAMoment(t *testing.T) {
	t.Parallel()
	d := newDesk(t)
	a := d.asker("anonymous")
	d.Learn(a, image, Evidence{Says: Unauthorised, Asked: d.now, Challenge: []string{`Basic realm="x"`}})
	if r, ok := d.Refused(a); !ok || len(r.Challenge) != 1 {
		t.Errorf("%+v, %v", r, ok)
	}
	if _, ok := d.Refused(d.asker("password")); ok {
		t.Error("a password is refused for it")
	}
	d.now = d.now.Add(refusedFor)
	if _, ok := d.Refused(a); ok {
		t.Error("for too long")
	}
	if _, _, challenge, ok := d.Stale(a, image, false); ok || challenge == "" {
		t.Errorf("in an outage: %q, %v", challenge, ok)
	}
	d.Learn(a, image, Evidence{Says: Named, Asked: d.now, Size: size})
	if _, _, challenge, ok := d.Stale(a, image, false); !ok || challenge != "" {
		t.Errorf("once it is open: %q, %v", challenge, ok)
	}
	d.Learn(a, image, Evidence{Says: Unauthorised, Asked: d.now, Challenge: []string{fmt.Sprintf("Basic %05000d", 0)}})
	if _, ok := d.Refused(a); ok {
		t.Error("a challenge of 5,000 bytes is remembered")
	}
}

// TestWhatIsTakenBackIsWrittenOnce, and only when there was something.
func TestWhatIsTakenBackIsWrittenOnce(t *testing.T) {
	t.Parallel()
	d := newDesk(t)
	a := d.asker("anonymous")
	refuse := func() { d.Learn(a, Object{Kind: "manifests"}, Evidence{Says: Forbidden, Asked: d.now}) }
	if refuse(); d.kept != 0 {
		t.Error("of nothing")
	}
	d.now = d.now.Add(time.Second)
	d.Learn(a, layer, Evidence{Says: Named, Asked: d.now, Size: size})
	d.now = d.now.Add(time.Second)
	for range 3 {
		refuse()
	}
	if d.kept != 1 {
		t.Errorf("written %d times", d.kept)
	}
}

// TestEachTableIsBounded: past the bound it costs a question.
func TestEachTableIsBounded(t *testing.T) {
	t.Parallel()
	d := newDesk(t)
	for i := range maxRights + 1000 {
		a := d.Asker(index.RepositoryKey{Upstream: "ghcr.io", Repository: fmt.Sprint("r", i)}, Credential{Authorization: "Basic YTpi"})
		d.Learn(a, layer, Evidence{Says: Mute, Asked: d.now, Size: size})
		d.Learn(a, Object{Kind: "manifests"}, Evidence{Says: Named, Asked: d.now, Size: -1})
		d.Learn(a, Object{Kind: "manifests"}, Evidence{Says: NoTag, Asked: d.now.Add(-time.Hour)})
		b := d.Asker(a.repository, Credential{})
		d.Learn(b, Object{Kind: "manifests"}, Evidence{Says: Unauthorised, Asked: d.now})
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for what, n := range map[string]int{"grants": len(d.grants), "claims": d.claims.n, "refused": len(d.lastNo), "closed": len(d.closed)} {
		if n > maxRights {
			t.Errorf("%d %s", n, what)
		}
	}
	if len(d.challenges) > maxRefusals {
		t.Errorf("%d refusals", len(d.challenges))
	}
}

// TestRetiredRightsRememberNoYes: others have taken their place, under other terms.
func TestRetiredRightsRememberNoYes(t *testing.T) {
	t.Parallel()
	for name := range askers {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			d := newDesk(t)
			a := d.asker(name)
			d.Retire()
			yes := d.Learn(a, layer, Evidence{Says: Verified, Asked: d.now, Size: size})
			if !yes.Covers(size) {
				t.Error("the answer does not serve the request that it answers")
			}
			if d.may(a, layer) || d.Granted(a) {
				t.Error("the yes is remembered")
			}
			if _, ok := d.index.Membership(a.key(layer)); ok {
				t.Error("the yes is in the index")
			}
		})
	}
	d := newDesk(t)
	a := d.asker("anonymous")
	d.Learn(a, layer, Evidence{Says: Verified, Asked: d.now, Size: size})
	d.Retire()
	d.now = d.now.Add(time.Second)
	d.Learn(a, other, Evidence{Says: Forbidden, Asked: d.now, Size: -1})
	if m, _ := d.index.Membership(a.key(layer)); !m.Anonymous.IsZero() {
		t.Error("a refusal ends nothing any more")
	}
}
