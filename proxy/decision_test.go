// SPDX-License-Identifier: Apache-2.0

package proxy

import "testing"

func TestAClientIsNamedByItsProduct(t *testing.T) {
	for agent, want := range map[string]string{
		"containerd/v2.4.2":                    "containerd",
		"Buildah/1.2 (x)":                      "podman",
		"go-containerregistry/v0.22.1 (crane)": "go-containerregistry",
		"curl/8.1":                             "curl",
		"":                                     "other",
		"<script>/1":                           "other",
		"\x1b[31mred/1":                        "other",
		"a very long product's name of somebody/1": "other",
	} {
		if got := clientName(agent); got != want {
			t.Errorf("%q is named %q, not %q", agent, got, want)
		}
	}
}
