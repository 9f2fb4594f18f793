// SPDX-License-Identifier: Apache-2.0

package images

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"tarn/cache/store"

	"go.uber.org/zap"
)

// TestWhatPeoplePinIsBounded, in number and in bytes.
func TestWhatPeoplePinIsBounded(t *testing.T) {
	t.Parallel()
	st, _, _, err := store.Open(store.Options{Dir: t.TempDir(), MaxSize: 1 << 30})
	if err != nil {
		t.Fatal(err)
	}
	defer st.Close()
	im := New(st, zap.NewNop())
	st.Start(im.Hooks())
	long := func(n int) string { return strings.Repeat("x", n) }
	platform := "linux/" + long(maxPlatform-len("linux/"))
	for name, p := range map[string]Pin{
		"an upstream":   {Upstream: long(maxName + 1), Repository: "app", Tag: "v1"},
		"a repository":  {Upstream: "lab.test", Repository: long(maxName + 1), Tag: "v1"},
		"a tag":         {Upstream: "lab.test", Repository: "app", Tag: long(maxTag + 1)},
		"a platform":    {Upstream: "lab.test", Repository: "app", Tag: "v1", Platforms: []string{platform + "x"}},
		"the platforms": {Upstream: "lab.test", Repository: "app", Tag: "v1", Platforms: strings.Split(strings.TrimSuffix(strings.Repeat("linux/x,", maxPlatforms+1), ","), ",")},
	} {
		if _, err := im.Pin(p); !errors.Is(err, ErrNoPin) || len(err.Error()) > 500 {
			t.Errorf("%s: %v", name, err)
		}
	}
	pin := func(i int, platforms ...string) error {
		_, err := im.Pin(Pin{Upstream: "lab.test", Repository: "app", Tag: fmt.Sprint("v", i), Platforms: platforms})
		return err
	}
	var many []Pin
	for i := range maxPins - 1 {
		many = append(many, Pin{Upstream: "lab.test", Repository: "app", Tag: fmt.Sprint("v", i)})
	}
	if err := st.Do(func() error { return im.setPins(many) }); err != nil {
		t.Fatal(err)
	}
	if err := pin(maxPins); err != nil {
		t.Error(err)
	}
	if err := pin(maxPins + 1); !errors.Is(err, ErrPinsTooLarge) || !strings.Contains(err.Error(), "unpin") {
		t.Error(err)
	}
	if err := pin(maxPins, "linux/amd64"); err != nil {
		t.Errorf("one that is there cannot be changed: %v", err)
	}
	if err := st.Do(func() error { return im.setPins(nil) }); err != nil {
		t.Fatal(err)
	}
	wide := strings.Split(strings.TrimSuffix(strings.Repeat(platform+",", maxPlatforms), ","), ",")
	many = nil
	for i := range maxPinsBytes / (maxPlatforms * (maxPlatform + 20)) {
		many = append(many, Pin{Upstream: "lab.test", Repository: "app", Tag: fmt.Sprint("v", i), Platforms: wide})
	}
	if err := st.Do(func() error { return im.setPins(many) }); err != nil {
		t.Fatal(err)
	}
	err = nil
	for i := 0; err == nil && i < 100; i++ {
		err = pin(maxPins+i, wide...)
	}
	if !errors.Is(err, ErrPinsTooLarge) || !strings.Contains(err.Error(), "unpin") {
		t.Error(err)
	}
	if info, err := os.Stat(filepath.Join(st.Dir(), store.PinsName)); err != nil || info.Size() > maxPinsBytes {
		t.Errorf("%d bytes: %v", info.Size(), err)
	}
}
