// SPDX-License-Identifier: Apache-2.0

package upstream

import (
	"fmt"
	"net/url"
	"slices"
	"sync"
	"time"

	"go.uber.org/zap"
)

// Trouble with a host is a warning, and so is its end: at most one each minute,
// host and kind. Hosts are named by clients and by registries, so the warnings of a
// minute have a bound, too: for each listed registry, and for all others together.

const (
	warnEvery = time.Minute
	// maxWarnings of a minute are written of one listed registry, or of all others.
	maxWarnings = 16
	// maxStrangers hosts of registries that are not listed are shown as being in
	// trouble: the last ones.
	maxStrangers = 16
)

// effect is what trouble with a registry comes to. The client hears of the error,
// and asks the registry itself.
const effect = "pulls of this registry go past tarn"

// budget is how many warnings may still be written this minute.
type budget struct {
	mu    sync.Mutex
	until time.Time
	spent int
}

// take tells whether one may be written, and whether it is the last.
func (b *budget) take(now time.Time) (ok, last bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if now.After(b.until) {
		b.until, b.spent = now.Add(warnEvery), 0
	}
	b.spent++
	return b.spent <= maxWarnings, b.spent == maxWarnings
}

// due tells whether there was no warning of this kind for a minute, and counts one.
// Called with the registry's lock.
func (h *host) due(kind string, now time.Time) bool {
	if last, ok := h.warned[kind]; ok && now.Sub(last) < warnEvery {
		return false
	}
	if h.warned == nil {
		h.warned = make(map[string]time.Time)
	}
	h.warned[kind] = now
	return true
}

// back is the kind of the warning that a host answers again.
const back = "back"

// trouble notes what ails the host; due tells that it is to be told. Called with the
// registry's lock; what h.failing points to is never changed.
func (h *host) trouble(origin string, t Trouble, now time.Time) (due bool) {
	failing := HostFailing{Origin: origin, Since: now, Last: now, Trouble: t}
	if h.failing != nil && h.failing.Kind == t.Kind {
		failing.Since = h.failing.Since
	}
	h.failing = &failing
	return h.due(t.Kind, now)
}

// tellTrouble tells, where it is due, what ails a host.
func (r *Registry) tellTrouble(e *HostError, failing HostFailing, due bool) {
	if !r.listed {
		r.client.noteStranger(r.name, failing)
	}
	if due {
		r.warn(failing.Last, effect, zap.String("host", e.Host), zap.String("kind", e.Kind),
			zap.String("cause", e.Cause), zap.String("advice", e.Advice), zap.String("url", e.asked))
	}
}

// tellAnswer tells, where it is due, that a host answers again.
func (r *Registry) tellAnswer(u *url.URL, now time.Time, was *HostFailing, due bool) {
	if !r.listed {
		r.client.forgetStranger(r.name, originOf(u))
	}
	if due {
		r.warn(now, "a host of a registry answers again", zap.String("host", u.Host), zap.String("kind", was.Kind), zap.Duration("after", now.Sub(was.Since)))
	}
}

// Refused takes that a registry was asked for that is not listed, where only listed
// ones are served, and tells of it.
func (c *Client) Refused(name Name) {
	r := c.Registry(name)
	u := r.endpoints[0].URL
	e := &HostError{Host: u.Host, asked: shown(u, false), Trouble: Trouble{
		Kind: troubleUnlisted, Cause: "this registry is not listed, and allow is set to listed",
		Advice: fmt.Sprintf("to allow it, list it in tarn's configuration: upstreams: [{name: %q}]", name),
	}}
	r.mu.Lock()
	h := r.host(u)
	due := h.trouble(originOf(u), e.Trouble, time.Now())
	failing := *h.failing
	r.mu.Unlock()
	r.tellTrouble(e, failing, due)
}

// warn writes the message, unless there are too many.
func (r *Registry) warn(now time.Time, message string, fields ...zap.Field) {
	ok, last := r.warnings.take(now)
	if !ok {
		return
	}
	r.client.log.Warn(message, append([]zap.Field{zap.String("upstream", string(r.name)), zap.Bool("listed", r.listed)}, fields...)...)
	if last {
		r.client.log.Warn("there is more trouble with registries than is told in a minute: see upstreams and unlisted in /api/v1/status")
	}
}

// noteStranger shows what ails a host of a registry that is not listed.
func (c *Client) noteStranger(name Name, failing HostFailing) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.dropStranger(name, failing.Origin)
	if len(c.troubled) >= maxStrangers {
		c.troubled = slices.Delete(c.troubled, 0, 1)
	}
	c.troubled = append(c.troubled, Health{Name: name, Failing: []HostFailing{failing}, Effect: effect})
}

// forgetStranger shows it no more.
func (c *Client) forgetStranger(name Name, origin string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.dropStranger(name, origin)
}

// dropStranger is called with the lock.
func (c *Client) dropStranger(name Name, origin string) {
	c.troubled = slices.DeleteFunc(c.troubled, func(h Health) bool { return h.Name == name && h.Failing[0].Origin == origin })
}

// Strangers are the registries that are not listed of which a host gave no answer
// when it was asked last: the last maxStrangers.
func (c *Client) Strangers() []Health {
	c.mu.Lock()
	defer c.mu.Unlock()
	return append([]Health{}, c.troubled...) // a list also when it is empty
}
