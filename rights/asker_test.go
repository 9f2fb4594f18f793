// SPDX-License-Identifier: Apache-2.0

package rights

import (
	"encoding/base64"
	"encoding/json"
	"testing"
)

func jwt(t *testing.T, claims any) string {
	t.Helper()
	payload, err := json.Marshal(claims)
	if err != nil {
		t.Fatal(err)
	}
	return "Bearer e30." + base64.RawURLEncoding.EncodeToString(payload) + ".x"
}

func TestATokenSaysItsOwnEnd(t *testing.T) {
	t.Parallel()
	for header, want := range map[string]bool{
		jwt(t, map[string]any{"exp": 1}):          true,
		jwt(t, map[string]any{"exp": 1.5e9}):      true,
		jwt(t, map[string]any{"exp": -1}):         false,
		jwt(t, map[string]any{"exp": 1e300}):      false,
		jwt(t, map[string]any{"exp": "tomorrow"}): false,
		jwt(t, []int{1}):                          false,
		"Bearer a.b.c":                            false,
		"Bearer opaque":                           false,
		"Basic e30.e30.e30":                       false,
		"":                                        false,
	} {
		if _, ok := tokenEnd(header); ok != want {
			t.Errorf("%s: %v", header, ok)
		}
	}
}
