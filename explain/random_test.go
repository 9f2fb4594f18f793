// SPDX-License-Identifier: Apache-2.0

package explain

import (
	"fmt"
	"math/rand/v2"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"tarn/history"
	"tarn/internal/registrytest"

	"github.com/opencontainers/go-digest"
)

// oracle is what a test knows of one node without asking tarn: what it has removed,
// which files have gone, what the registry was asked and has answered.
type oracle struct {
	*node
	random *rand.Rand

	mu     sync.Mutex
	asked  []exchange // by the request that is under way
	faults fault

	here  map[digest.Digest]bool          // on the disk, as of now
	gone  map[digest.Digest]history.Cause // of what was there
	means map[string]digest.Digest        // what tarn was told that a tag means, where it keeps that
	tells map[digest.Digest]string        // the same where it does as soon as the manifest comes
	moved map[digest.Digest]bool          // tarn was told that a tag means that now, and meant another one
}

type exchange struct {
	method, path string
	status       int
}

type fault int

const (
	none fault = iota
	refuses
	hasNot
	breaks
	hangsUp
	lies // sends other bytes of blobs
)

// serve answers in the registry's place, and notes what it was asked.
func (o *oracle) serve(w http.ResponseWriter, r *http.Request) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	status := map[fault]int{refuses: 403, hasNot: 404, breaks: 500}[o.faults]
	blob := strings.Contains(r.URL.Path, "/blobs/")
	o.asked = append(o.asked, exchange{r.Method, r.URL.Path, status})
	switch {
	case status != 0:
		w.WriteHeader(status)
	case o.faults == hangsUp:
		panic(http.ErrAbortHandler)
	case o.faults == lies && blob && r.Header.Get("Range") != "bytes=0-0":
		w.Write([]byte("something else"))
	default:
		return false
	}
	return true
}

// settle looks which files have come and gone since, and notes why.
func (o *oracle) settle(why history.Cause) {
	for d, was := range o.here {
		if is := o.has(d); was && !is {
			o.here[d], o.gone[d] = false, why
		}
	}
}

func (o *oracle) expected(d digest.Digest) history.Cause {
	if why, was := o.gone[d]; was {
		return why
	}
	if o.moved[d] {
		return history.Moved
	}
	return history.NeverSeen
}

// request asks, and holds what is remembered of it to what the test knows.
func (o *oracle) request(method, repository, kind, reference string, means digest.Digest) {
	o.t.Helper()
	o.mu.Lock()
	o.asked = nil
	f := o.faults
	o.mu.Unlock()
	key, tag := repository+":"+reference, kind == "manifests" && !strings.Contains(reference, ":")
	was := o.here[means]
	status, _ := o.get(method, "/v2/"+repository+"/"+kind+"/"+reference)
	o.mu.Lock()
	asked := o.asked
	o.mu.Unlock()
	if status == 200 && tag {
		if before := o.means[key]; before != "" && before != means {
			o.moved[means] = true
		}
	}
	want := history.Cause("")
	switch {
	case status == 403 || status == 404:
		want = history.Refused
	case status == 502 && f == lies:
		want = history.Broken
	case status >= 500:
		want = history.Away
	case f == lies && kind == "blobs" && method == "HEAD" && was && len(asked) > 0:
		want = history.Unproven
	case status != 200:
		o.t.Fatalf("%s %s/%s/%s: %d", method, repository, kind, reference, status)
	case !was:
		want = o.expected(means)
	}
	if status == 200 && method == "GET" && !was {
		o.stored(means)
		o.here[means] = true
		delete(o.gone, means)
	}
	switch {
	case status == 200 && tag && (o.means[key] != "" || o.here[means]):
		o.means[key] = means
	case status == 200 && tag:
		o.tells[means] = key
	case status == 200 && method == "GET" && o.tells[means] != "":
		o.means[o.tells[means]] = means
		delete(o.tells, means)
	}
	e := o.latest()
	if e.Cause != want || e.Status != status || (e.Asked != "") != (len(asked) > 0) || status == 200 && e.Digest != means {
		o.t.Errorf("%s %s/%s/%s with fault %d was %d; the registry was asked %v\n got %+v\nwant %q (it was here: %v)", method, repository, kind, reference, f, status, asked, e, want, was)
	}
}

// latest is the entry in which the last request is counted.
func (o *oracle) latest() (last history.Entry) {
	var at time.Time
	for _, e := range o.history.Find(func(e *history.Entry) bool { return e.Outcome != history.OutcomeGone }, 50) {
		if e.At.After(at) {
			last, at = e, e.At
		}
		if e.Last.After(at) {
			last, at = e, e.Last
		}
	}
	return last
}

// tell is one random history of a repository.
func (o *oracle) tell(repository string, seed uint64) {
	common := random(seed, 2000)
	images := []registrytest.Image{
		o.registry.Image(repository, "v1", random(seed+1, 3000), common),
		o.registry.Image(repository, "v2", common, random(seed+2, 4000)),
	}
	now := images[0]
	for range 8 + o.random.IntN(8) {
		img := images[o.random.IntN(2)]
		blob := append(img.Layers[:len(img.Layers):len(img.Layers)], img.Config)[o.random.IntN(3)]
		method := []string{"GET", "GET", "GET", "HEAD"}[o.random.IntN(4)]
		switch o.random.IntN(12) {
		case 0, 1:
			now = img
			o.registry.Tag(repository, "v1", now.Manifest)
		case 2, 3, 4:
			o.request(method, repository, "manifests", "v1", now.Manifest)
		case 5:
			o.request(method, repository, "manifests", img.Manifest.String(), img.Manifest)
		case 6, 7, 8:
			o.request(method, repository, "blobs", blob.String(), blob)
		case 9:
			o.evict(blob, img.Manifest)
			o.settle(history.Removed)
		case 10:
			if err := o.cache.Store().Evict(int64(1 + o.random.IntN(20_000))); err != nil {
				o.t.Fatal(err)
			}
			o.settle(history.Evicted)
		case 11:
			o.forward(time.Duration(o.random.IntN(7200)) * time.Second)
			o.mu.Lock()
			o.faults = fault(o.random.IntN(int(lies) + 1))
			o.mu.Unlock()
			o.request(method, repository, "blobs", blob.String(), blob)
			if f := o.faults; f != hasNot { // or who knows what it means after that
				o.request(method, repository, "manifests", "v1", now.Manifest)
			}
			o.mu.Lock()
			o.faults = none
			o.mu.Unlock()
			o.forward(2 * time.Minute) // wrong bytes have ranges refused for a while
		}
	}
}

func TestTheReasonOfEachMissIsTheTrueOne(t *testing.T) {
	const nodes = 20
	histories := 1000
	if testing.Short() {
		histories = 100
	}
	var all sync.WaitGroup
	defer all.Wait()
	one := func(k int) {
		t.Run(fmt.Sprint(k), func(t *testing.T) {
			o := &oracle{node: start(t, options{rules: usual}), random: rand.New(rand.NewPCG(uint64(k), 7)),
				here: map[digest.Digest]bool{}, gone: map[digest.Digest]history.Cause{}, means: map[string]digest.Digest{}, tells: map[digest.Digest]string{}, moved: map[digest.Digest]bool{}}
			o.hook(o.serve)
			for i := range histories / nodes {
				if o.tell(fmt.Sprintf("app%d", i), uint64(k*1000+i)*3); t.Failed() {
					t.Fatalf("in history %d", i)
				}
			}
		})
	}
	for k := range nodes { // they mostly wait for the disk
		all.Go(func() { one(k) })
	}
}
