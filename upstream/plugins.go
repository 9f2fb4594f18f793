// SPDX-License-Identifier: Apache-2.0

package upstream

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"
)

// KubeletPlugins finds the node's credentials as the kubelet does: by its image
// credential provider plugins, which are programs that answer for an image. What they
// say is kept in memory for as long as they say. It is safe for concurrent use, and for
// several registries: a plugin's answer may be for all.
//
// One plugin runs at a time in this process, whoever asks for it, since the memory of
// all counts on one limit. Nobody waits for a run longer than pluginWait from when it was
// wanted, or from when the one before it began: it goes on, and who comes later has what
// came of it.
//
// Its errors wrap ErrCredentials and name the program or the file.
type KubeletPlugins struct {
	config, binDir string
	limit, wait    time.Duration // pluginTimeout and pluginWait, save in tests

	// mu guards what follows.
	mu        sync.Mutex
	providers []provider // never changed once they are there
	skipped   []string   // those that need the token of a pod's service account
	unread    error      // why there are no providers
	looked    time.Time
	answers   map[pluginKey]pluginEntry // at most maxPluginEntries
	wanted    map[string]*pluginRun     // by image; at most maxPluginRuns
	begun     time.Time                 // when the one that has its turn got it; zero for none
	closed    bool

	stop    chan struct{}
	running sync.WaitGroup
}

// pluginKey says for what a plugin's answer is: an image, a registry, or "" for all.
// A failure is a registry's.
type pluginKey struct {
	plugin string
	about  string
}

type pluginEntry struct {
	auth  map[string]Secret // by the keys of the answer, see authKey
	err   error             // or why there is none
	begun time.Time
	until time.Time
}

// pluginRun is a run for an image, which waits for its turn or is under way.
type pluginRun struct {
	from   time.Time     // pluginWait counts from here
	done   chan struct{} // closed once secret and err are there
	secret Secret
	err    error
}

const (
	// pluginWait leaves a request, which has 9 s, time to do with the client's own
	// credential.
	pluginWait = 5 * time.Second
	// pluginFailureFor keeps a broken plugin from being run for each request.
	pluginFailureFor = 10 * time.Second
	// pullFor is how long an answer holds for its image that says it must not be kept.
	// The kubelet uses such a one for a whole pull, of which tarn sees the requests.
	pullFor = 10 * time.Second
	// maxPluginEntries and maxPluginRuns bound what is kept and what waits: clients name
	// the images.
	maxPluginEntries = 1024
	maxPluginRuns    = 64
)

// pluginTurn is held by the plugin that runs.
var pluginTurn = make(chan struct{}, 1)

// NewKubeletPlugins reads nothing yet. config is a file or a folder like that of
// --image-credential-provider-config, binDir that of --image-credential-provider-bin-dir.
func NewKubeletPlugins(config, binDir string) *KubeletPlugins {
	return &KubeletPlugins{
		config: config, binDir: binDir, limit: pluginTimeout, wait: pluginWait,
		answers: make(map[pluginKey]pluginEntry), wanted: make(map[string]*pluginRun), stop: make(chan struct{}),
	}
}

// Check reads the configuration and looks whether the programs are there and what the
// kernel needs to start them. It runs none.
func (k *KubeletPlugins) Check() error {
	err := k.load(time.Now())
	if err != nil {
		return err
	}
	k.mu.Lock()
	providers := k.providers
	k.mu.Unlock()
	for _, p := range providers {
		if lacking := lacks(p.plugin); lacking != "" {
			err = errors.Join(err, &pluginError{plugin: p.plugin, what: lacking})
		}
	}
	return err
}

// Skipped names the providers that are never asked, since they need the token of a pod's
// service account. It is known after Check.
func (k *KubeletPlugins) Skipped() []string {
	k.mu.Lock()
	defer k.mu.Unlock()
	return slices.Clone(k.skipped)
}

// load reads the configuration until that works, once in pluginFailureFor.
func (k *KubeletPlugins) load(now time.Time) error {
	k.mu.Lock()
	loaded, err := len(k.providers)+len(k.skipped) > 0 || k.unread != nil && now.Sub(k.looked) < pluginFailureFor, k.unread
	k.mu.Unlock()
	if loaded {
		return err
	}
	all, err := readProviders(k.config, k.binDir)
	k.mu.Lock()
	defer k.mu.Unlock()
	if len(k.providers)+len(k.skipped) > 0 { // somebody was quicker, and runs point into what they read
		return nil
	}
	k.looked, k.unread = now, nil
	if err != nil {
		k.unread = fmt.Errorf("%w: kubelet_plugins: %w", ErrCredentials, err)
		return k.unread
	}
	for _, p := range all {
		if p.needsPod() {
			k.skipped = append(k.skipped, p.Name)
		} else {
			k.providers = append(k.providers, p)
		}
	}
	return nil
}

// Get returns the secret for the image, by the most particular key that a plugin has for
// it; the zero value when plugins for its registry have none. It waits for at most
// pluginWait.
func (k *KubeletPlugins) Get(ctx context.Context, image string) (Secret, error) {
	now := time.Now()
	if err := k.load(now); err != nil {
		return Secret{}, err
	}
	run, secret, err := k.look(image, now)
	if run == nil {
		return secret, err
	}
	timeout := time.NewTimer(run.from.Add(k.wait).Sub(now))
	defer timeout.Stop()
	select {
	case <-run.done:
		return run.secret, run.err
	case <-timeout.C:
		return Secret{}, fmt.Errorf("%w: the kubelet's plugins for %s have not answered in %v; they are waited for in the background", ErrCredentials, registryOf(image), k.wait)
	case <-ctx.Done():
		return Secret{}, context.Cause(ctx)
	}
}

// look returns what is known, or the run that will tell.
func (k *KubeletPlugins) look(image string, now time.Time) (*pluginRun, Secret, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.closed {
		return nil, Secret{}, fmt.Errorf("%w: tarn does not run with these settings any more", ErrCredentials)
	}
	matching, err := k.matching(image)
	if len(matching) == 0 {
		return nil, Secret{}, err
	}
	if secret, err, known := k.recall(matching, image, now); known {
		return nil, secret, err
	}
	run := k.wanted[image]
	switch {
	case run != nil:
	case len(k.wanted) >= maxPluginRuns:
		return nil, Secret{}, fmt.Errorf("%w: the kubelet's plugins are too slow: %d images wait for them", ErrCredentials, maxPluginRuns)
	default:
		run = &pluginRun{from: now, done: make(chan struct{})}
		if !k.begun.IsZero() { // behind one that hangs, nobody waits
			run.from = k.begun
		}
		k.wanted[image] = run
		k.running.Go(func() { k.ask(run, matching, image) }) // Close waits for it
	}
	return run, Secret{}, nil
}

// matching are the plugins to ask about the image. That none is for its registry at all is
// an error: the operator meant one. Called with the lock.
func (k *KubeletPlugins) matching(image string) (matching []*provider, err error) {
	forHost := false
	for i := range k.providers {
		p := &k.providers[i]
		if p.matches(image) {
			matching = append(matching, p)
		}
		forHost = forHost || slices.ContainsFunc(p.MatchImages, func(pattern string) bool {
			return hostMatches(registryOf(pattern), registryOf(image))
		})
	}
	if forHost {
		return matching, nil
	}
	err = fmt.Errorf("%w: no provider in %s has matchImages for %s", ErrCredentials, k.config, registryOf(image))
	if len(k.skipped) > 0 {
		err = fmt.Errorf("%w; %s cannot be asked: a provider that requires a service account works for pods only", err, strings.Join(k.skipped, ", "))
	}
	return nil, err
}

// recall returns what the plugins have said for the image; known is false when one of
// them has to be asked. Called with the lock.
func (k *KubeletPlugins) recall(matching []*provider, image string, now time.Time) (secret Secret, err error, known bool) {
	best := ""
	for _, p := range matching {
		e, ok := k.entry(p, image, now)
		if !ok {
			return Secret{}, nil, false
		}
		if err == nil {
			err = e.err
		}
		for key, s := range e.auth {
			// The kubelet takes them in the reverse order of the keys, and of equal
			// ones that of the earlier provider.
			if key > best && imageMatches(key, image) {
				best, secret = key, s
			}
		}
		if s, ok := e.auth[hubKey]; ok && best == "" && registryOf(image) == string(DockerHub) {
			secret = s
		}
	}
	if secret != (Secret{}) {
		return secret, nil, true
	}
	return Secret{}, err, true
}

// hubKey is how plugins may call the Docker Hub, as docker does.
const hubKey = "index.docker.io"

// entry is what this plugin has said that is for the image. Called with the lock.
func (k *KubeletPlugins) entry(p *provider, image string, now time.Time) (pluginEntry, bool) {
	for _, about := range []string{image, registryOf(image), ""} {
		if e, ok := k.answers[pluginKey{p.Name, about}]; ok && now.Before(e.until) {
			return e, true
		}
	}
	return pluginEntry{}, false
}

// ask has its turn and asks each plugin of which nothing is known then: the run before
// may have brought an answer for the whole registry.
func (k *KubeletPlugins) ask(run *pluginRun, matching []*provider, image string) {
	select {
	case pluginTurn <- struct{}{}:
		k.mu.Lock()
		k.begun = time.Now()
		k.mu.Unlock()
		for _, p := range matching {
			k.mu.Lock()
			_, known := k.entry(p, image, time.Now())
			known = known || k.closed
			k.mu.Unlock()
			if known {
				continue
			}
			begun := time.Now()
			a, err := p.run(image, k.limit, k.stop)
			k.keep(p, image, begun, a, err)
		}
		k.mu.Lock()
		k.begun = time.Time{}
		k.mu.Unlock()
		<-pluginTurn
	case <-k.stop:
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	known := false
	if run.secret, run.err, known = k.recall(matching, image, time.Now()); !known {
		// An answer ran out while another plugin was asked, or this is the end.
		run.err = fmt.Errorf("%w: the kubelet's plugins for %s have to be asked again", ErrCredentials, registryOf(image))
	}
	delete(k.wanted, image)
	close(run.done)
}

// keep remembers what came of a run, for what and as long as the kubelet would.
func (k *KubeletPlugins) keep(p *provider, image string, begun time.Time, a *pluginAnswer, err error) {
	now := time.Now()
	e := pluginEntry{err: err, begun: begun}
	key := pluginKey{p.Name, registryOf(image)}
	if err != nil {
		e.until = now.Add(pluginFailureFor)
	} else {
		life := time.Duration(*p.Default)
		if a.CacheDuration != nil {
			life = time.Duration(*a.CacheDuration)
		}
		key.about = map[string]string{"Image": image, "Registry": registryOf(image)}[a.CacheKeyType]
		if life <= 0 {
			key.about, life = image, pullFor
		}
		e.until, e.auth = now.Add(life), make(map[string]Secret, len(a.Auth))
		for name, s := range a.Auth {
			e.auth[authKey(name)] = Secret{Username: s.Username, Password: s.Password}
		}
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if len(k.answers) >= maxPluginEntries {
		for old, e := range k.answers {
			if now.After(e.until) {
				delete(k.answers, old)
			}
		}
		if len(k.answers) >= maxPluginEntries {
			clear(k.answers)
		}
	}
	k.answers[key] = e
}

// Forget makes the plugins be asked again about the image, unless they have just been: a
// registry may refuse a good secret as often as somebody asks for what there is not.
func (k *KubeletPlugins) Forget(image string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, p := range k.providers {
		for _, about := range []string{image, registryOf(image), ""} {
			key := pluginKey{p.Name, about}
			if e, ok := k.answers[key]; ok && p.matches(image) && time.Since(e.begun) > failureFor {
				delete(k.answers, key)
			}
		}
	}
}

// Close kills what runs and waits for its end. There is no credential after that.
func (k *KubeletPlugins) Close() {
	k.mu.Lock()
	if !k.closed {
		k.closed = true
		close(k.stop)
	}
	k.mu.Unlock()
	k.running.Wait()
}
