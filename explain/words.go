// SPDX-License-Identifier: Apache-2.0

package explain

import (
	"fmt"
	"math"
	"net/http"
	"strings"
	"time"

	"tarn/history"
	"tarn/proxy"

	"github.com/docker/go-units"
	"github.com/opencontainers/go-digest"
)

// judge finds the state of an image, and the words for it.
func judge(x *Explanation, n proxy.ImageName, now time.Time) {
	registry, here := n.Repository.Upstream, &x.Here
	whole := here.TotalBytes > 0 && here.HereBytes == here.TotalBytes && len(here.Missing) == 0
	size := units.BytesSize(float64(here.HereBytes))
	if !whole {
		size = fmt.Sprintf("%s of %s", strings.TrimSpace(size), units.BytesSize(float64(here.TotalBytes)))
	}
	x.Who = who(x, registry)
	what := n.Tag
	if what == "" {
		what = short(n.Digest)
	}
	switch {
	case !x.Access.Allowed:
		x.State = NotAllowed
		x.Verdict = fmt.Sprintf("not allowed: %s is not listed, and allow is set to listed.", registry)
		x.Next = "tarn says that it does not know the image, and the client asks the registry itself."
		x.Advice = fmt.Sprintf("to have it served, add to tarn's configuration: upstreams: [{name: %s}]", registry)
	case here.Fetching:
		x.State = Fetching
		x.Verdict = fmt.Sprintf("being fetched: %s are here, and more is on its way from %s.", size, registry)
		if here.TotalBytes == 0 {
			x.Verdict = fmt.Sprintf("being fetched: its manifest is on its way from %s.", registry)
		}
		x.Next = "Who pulls it now is sent what has come, and the rest as it comes; nothing is fetched twice."
	case x.There.Digest == "":
		judgeUnanswered(x, n, what, size, whole, now)
	case here.HereBytes == 0 && here.Digest == "" || here.HereBytes == 0 && x.neverHere():
		x.State = NeverSeen
		x.Verdict = fmt.Sprintf("never seen: nothing of it is here, and nobody has fetched it here %s.", since(x.Since, now))
		x.Next = fmt.Sprintf("The next pull fetches all of it from %s.", registry)
	case here.Digest != x.There.Digest:
		x.State = Moved
		x.Verdict = fmt.Sprintf("moved: at %s %s means %s now; here is %s, which it meant %s.", registry, what, short(x.There.Digest), short(here.Digest), ago(here.Confirmed, now))
		x.Next = "The next pull fetches what of the new one is not here; layers that both have are not fetched again."
	case whole:
		x.State, x.FromHere = Current, true
		is := " is " + short(here.Digest)
		if n.Tag == "" {
			is = " is known"
		}
		x.Verdict = fmt.Sprintf("current: at %s %s%s now, and all of it is here (%s%s).", registry, what, is, platforms(here), size)
		x.Next = nextWhole(x, n)
	default:
		x.State = Partly
		x.Verdict = fmt.Sprintf("partly here: %s of %s; %s.", size, short(here.Digest), gaps(here, now))
		x.Next = fmt.Sprintf("The next pull fetches %s from %s, and has the rest from this node's disk.", units.BytesSize(float64(here.TotalBytes-here.HereBytes)), registry)
	}
	if here.Pinned {
		x.Verdict += " It is pinned: it is not evicted."
	}
}

func nextWhole(x *Explanation, n proxy.ImageName) string {
	if n.Tag == "" {
		return "The next pull has its bytes from this node's disk; the registry is asked once whether this client may have them, and then not again for " + seconds(x.Access.GrantTTL) + "."
	}
	asks := "one HEAD"
	if x.There.Method == http.MethodGet {
		asks = "a HEAD, and with a GET since that says too little there,"
	}
	return "The next pull asks the registry with " + asks + " what the tag means and who may have it, and has its bytes from this node's disk."
}

// neverHere: nothing that is missing was here, as far as is known.
func (x *Explanation) neverHere() bool {
	for _, g := range x.Here.Missing {
		if g.Cause != history.NeverSeen && g.Cause != history.Moved {
			return false
		}
	}
	return true
}

// judgeUnanswered is for who was given no digest.
func judgeUnanswered(x *Explanation, n proxy.ImageName, what, size string, whole bool, now time.Time) {
	registry, here := n.Repository.Upstream, &x.Here
	have := "Nothing of it is here."
	switch {
	case whole:
		have = fmt.Sprintf("All of %s is here (%s%s), as the registry confirmed %s.", short(here.Digest), platforms(here), size, ago(here.Confirmed, now))
	case here.HereBytes > 0:
		have = fmt.Sprintf("Of %s %s are here; %s.", short(here.Digest), size, gaps(here, now))
	}
	if n.Tag == "" || here.Confirmed.IsZero() {
		have = strings.Replace(have, ", as the registry confirmed "+ago(here.Confirmed, now), "", 1)
	}
	x.Advice = x.There.Advice
	switch cause := x.There.Cause; {
	case x.There.Status == http.StatusUnauthorized || x.There.Status == http.StatusForbidden:
		x.State, x.FromHere = Private, whole
		x.Verdict = fmt.Sprintf("private: %s answers %d to who shows no credential, so what %s means now is known only to who may ask. %s", registry, x.There.Status, what, have)
		x.Next = "The registry is asked with each client's own credential; whom it says yes to has from this node's disk what is here."
	case x.There.Status == http.StatusNotFound || x.There.Status == http.StatusGone:
		x.State = Missing
		if n.Tag != "" && here.Digest == "" { // what was known by it is forgotten then
			have = "Nothing is here by that name."
		}
		x.Verdict = fmt.Sprintf("no such image: %s says %d for %s. %s", registry, x.There.Status, what, have)
		x.Next = "A pull is told the same: some registries say so also to who may not have it."
	case cause == history.NotAllowed:
		x.State = NotAllowed
		x.Verdict = fmt.Sprintf("not allowed: %s.", strings.TrimSuffix(x.There.Error, "."))
		x.Next = "The client is refused, and asks the registry itself."
	case x.There.MayBeStale && now.Before(x.StaleUntil) && whole:
		x.State, x.FromHere = Stale, true
		x.Verdict = fmt.Sprintf("stale: %s cannot be asked (%s). %s", registry, x.There.Error, have)
		x.Next = fmt.Sprintf("Until %s %s is answered from here, marked as stale, to who was given it before; after that a pull fails here, and the client asks the registry itself.", x.StaleUntil.Local().Format(time.DateTime), what)
		if x.Access.StaleForNode && x.There.Away {
			x.Next = strings.Replace(x.Next, "to who was given it before", "to every client of this node", 1)
		}
	default:
		x.State = Away
		how := "cannot be asked"
		if cause == history.Broken {
			how = "answers what is no image"
		}
		x.Verdict = fmt.Sprintf("%s %s: %s. %s", registry, how, strings.TrimSuffix(x.There.Error, "."), have)
		x.Next = "A pull by tag fails here, and the client asks the registry itself."
		if n.Tag == "" {
			x.Next = "A pull by digest fails here, and the client asks the registry itself."
			if ttl := x.Access.GrantTTL; whole && ttl > 0 {
				x.Next = fmt.Sprintf("For %s after the registry has said yes to a client, that one has it from here; then a pull fails here, and the client asks the registry itself.", seconds(ttl))
			}
		}
		if x.Access.StaleIfError == 0 && x.There.MayBeStale {
			x.Next += " stale_if_error, in tarn's configuration, has what was confirmed last served meanwhile."
		}
	}
}

// who says who may have the image.
func who(x *Explanation, registry string) string {
	a := x.Access
	var said string
	switch {
	case a.Shared:
		return "every client of this node may have it, with the node's credential (share)"
	case !a.Anonymous.IsZero():
		said = fmt.Sprintf("%s served it to who shows no credential", registry)
	case x.There.Digest != "" && x.There.As == "anonymous":
		said = fmt.Sprintf("%s answers for it to who shows no credential", registry)
	default:
		said = fmt.Sprintf("whoever %s says yes to, asked with each client's own credential", registry)
	}
	if n := len(a.Remembered); n > 0 {
		said += fmt.Sprintf("; remembered now: %d %s, the last %s", n, plural(n, "yes", "yeses"), a.Remembered[0].As)
	}
	return said
}

func plural(n int, one, more string) string {
	if n == 1 {
		return one
	}
	return more
}

func platforms(h *Here) string {
	if len(h.Platforms) == 0 {
		return ""
	}
	return strings.Join(h.Platforms, ", ") + ", "
}

// gaps says what is missing, and why: the cause that most have.
func gaps(h *Here, now time.Time) string {
	by := map[history.Cause]int{}
	latest := map[history.Cause]time.Time{}
	for _, g := range h.Missing {
		by[g.Cause]++
		if g.At.After(latest[g.Cause]) {
			latest[g.Cause] = g.At
		}
	}
	atLeast := ""
	if len(h.Missing) == maxGaps { // and of others it was not looked why
		atLeast = "at least "
	}
	var parts []string
	for _, c := range causes {
		if n := by[c.cause]; n > 0 && c.went != "" {
			part := fmt.Sprintf("%s%d of %d objects %s", atLeast, n, h.Objects, plural(n, strings.Replace(c.went, "were ", "was ", 1), c.went))
			if at := latest[c.cause]; !at.IsZero() {
				part += ", the last " + ago(at, now)
			}
			parts = append(parts, part)
		}
	}
	return strings.Join(parts, ", ")
}

// causes are why something did not come from the disk: for a request, and, for an
// object that is not here, what became of it.
var causes = []struct {
	cause       history.Cause
	words, went string
}{
	{history.Evicted, "it was evicted to make room", "were evicted to make room"},
	{history.Removed, "it was removed by hand", "were removed by hand"},
	{history.Changed, "its file was not as it was stored, and was dropped", "were dropped for not being as stored"},
	{history.Lost, "it was here, and is not known to have gone (a crash, perhaps)", "were here, and went unnoticed"},
	{history.Unfinished, "an earlier download did not come to its end", "were not fetched to the end"},
	{history.Moved, "the tag means something else than before", "were never here"},
	{history.NeverSeen, "it was never seen here", "were never here"},
	{history.Fetching, "another request was having it fetched", ""},
	{history.Unproven, "the registry's yes was not about what is here", ""},
	{history.DiskTrouble, "it could not be stored", ""},
	{history.NotStorable, "such an answer is not stored", ""},
	{history.Refused, "the registry refused", ""},
	{history.Limited, "the registry limits requests", ""},
	{history.Away, "the registry could not be asked", ""},
	{history.Broken, "what came was not what the digest says, or broke off", ""},
	{history.NotAllowed, "tarn may not ask there", ""},
	{history.BadRequest, "the request was wrong", ""},
	{history.Closing, "tarn was being stopped", ""},
	{history.Gone, "the client did not wait for the end", ""},
	{history.Internal, "an error of tarn", ""},
}

func causeWords(c history.Cause) string {
	for _, k := range causes {
		if k.cause == c {
			return k.words
		}
	}
	return string(c)
}

// Words are an entry in a sentence, without its time.
func Words(e history.Entry) string {
	if e.Outcome == history.OutcomeGone {
		return fmt.Sprintf("%s went from the disk (%s): %s", short(e.Digest), units.BytesSize(float64(e.Bytes)), causeWords(e.Cause))
	}
	what := e.Tag
	if what == "" {
		what = strings.TrimSuffix(e.Kind, "s") + " " + short(e.Digest)
	}
	words := e.Client + ": " + what
	if e.Tag != "" && e.Digest != "" {
		words += " is " + short(e.Digest)
	}
	if e.Before != "" {
		words += ", and was " + short(e.Before)
	}
	words += "; " + asked(e) + "; " + outcome(e)
	if e.Count > 1 {
		words += fmt.Sprintf("; %d times", e.Count)
	}
	return words
}

func asked(e history.Entry) string {
	switch {
	case e.Asked == "":
		return "the registry was not asked"
	case e.Shared:
		return "the registry was asked with " + e.Asked + ", for several at once"
	}
	return "the registry was asked with " + e.Asked
}

func outcome(e history.Entry) string {
	bytes := units.BytesSize(float64(e.Bytes))
	if e.Method == http.MethodHead && e.Status < 300 {
		bytes = "the answer to a HEAD"
	}
	var words string
	switch e.Outcome {
	case "hit", "confirmed":
		return bytes + " from the disk"
	case "miss", "bypassed":
		if e.Method == http.MethodHead {
			return "HEAD: nothing is fetched for that; " + causeWords(e.Cause)
		}
		words = bytes + " from the registry"
	case "joined":
		words = bytes + " as they came"
	case "stale":
		words = bytes + " from the disk, stale"
	default:
		words = fmt.Sprintf("answered with %d", e.Status)
	}
	if e.Cause != "" {
		words += ": " + causeWords(e.Cause)
	}
	if e.Detail != "" {
		words += " (" + e.Detail + ")"
	}
	return words
}

// short is a digest as people read it, and as other commands take it.
func short(d digest.Digest) string {
	s := string(d)
	if algorithm, hex, ok := strings.Cut(s, ":"); ok && len(hex) > 12 {
		return algorithm + ":" + hex[:12]
	}
	return s
}

func ago(t, now time.Time) string {
	if t.IsZero() {
		return "before"
	}
	if d := now.Sub(t); d >= time.Second {
		return strings.ToLower(units.HumanDuration(d)) + " ago"
	}
	return "just now"
}

func since(t, now time.Time) string {
	return "in the last " + strings.ToLower(units.HumanDuration(max(time.Second, now.Sub(t)))) + ", as far back as is remembered"
}

func seconds(s float64) string {
	return strings.ToLower(units.HumanDuration(time.Duration(math.Round(s)) * time.Second))
}
