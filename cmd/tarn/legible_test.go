// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"testing"
	"unicode/utf8"
)

// evil clears a screen, sets a window's title, runs backwards, and makes a line that
// looks like another image's.
const evil = "app\x1b[2J\x1b]0;title\x07\u202egpj\u009b31m\r\nsha256:forged\tline\x7f\xff\u00ad"

// TestNoAnswerLeadsATerminal, whoever answers at tarn's port while tarn is away.
func TestNoAnswerLeadsATerminal(t *testing.T) {
	t.Parallel()
	quoted, err := json.Marshal(evil)
	if err != nil {
		t.Fatal(err)
	}
	image := fmt.Sprintf(`{"upstream": %[1]s, "repository": %[1]s, "tag": %[1]s, "digest": %[1]s, "platforms": [%[1]s]}`, quoted)
	answers := map[string]string{
		"/api/v1/status": fmt.Sprintf(`{"clients": %[1]s, "listen": %[1]s, "dir": %[1]s, "version": %[1]s, "cache": {"trouble": %[1]s}, "upstreams": [
			{"name": %[1]s, "effect": %[1]s, "failing": [{"origin": %[1]s, "cause": %[1]s, "advice": %[1]s}]}]}`, quoted),
		"/api/v1/images":  `{"images": [` + image + `]}`,
		"/api/v1/pins":    `{"pins": [` + image + `]}`,
		"/api/v1/evict":   fmt.Sprintf(`{"image": %s}`, quoted),
		"/api/v1/explain": fmt.Sprintf(`{"image": %[1]s, "verdict": %[1]s, "next": %[1]s, "advice": %[1]s, "who": %[1]s, "there": {"error": %[1]s}, "happened": [{"words": %[1]s}]}`, quoted),
		"/api/v1/verify":  fmt.Sprintf(`{"bad": [%[1]s], "missing": [%[1]s], "error": %[1]s}`, quoted),
		"/api/v1/pull": strings.ReplaceAll(fmt.Sprintf(`{"image": %[1]s, "object": {"digest": %[1]s, "kind": %[1]s, "stored": true}}
			{"image": %[1]s, "failure": {"error": %[1]s, "next": %[1]s}}
			{"summary": {"images": 1, "failed": 1}}`, quoted), "\t\t\t", ""),
	}
	impostor := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, answers[r.URL.Path]) }))
	defer impostor.Close()
	for _, args := range []string{"status", "images", "images -o wide", "pin", "pin app", "evict app", "explain app", "verify", "pull app", "__complete evict"} {
		words := strings.Fields(args)
		words = append(words, "--admin", impostor.Listener.Addr().String())
		if words[0] == "__complete" {
			words = append(words, "")
		}
		said, _ := command(words...).CombinedOutput()
		if !bytes.Contains(said, []byte("app?[2J?]0;title??gpj?31m")) && args != "pin app" {
			t.Errorf("%s says nothing of it: %q", args, said)
		}
		for _, r := range string(said) {
			if r != '\n' && r != '…' && !strconv.IsPrint(r) {
				t.Errorf("%s prints %q: %q", args, r, said)
				break
			}
		}
		if strings.Contains(string(said), "\nsha256:forged") {
			t.Errorf("%s has a line that the answer made up: %q", args, said)
		}
	}
}

func FuzzLegible(f *testing.F) {
	for _, s := range []string{`"\ud83d\ude00"`, `"\ud83d"`, `"\u001b\n\\n\""`, `"\u`, `\`, "\"\x9b\u202e\"", `{"a": [1, "é"]}`} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		out := legible(text)
		if json.Valid(text) && !json.Valid(out) {
			t.Fatalf("%q has become %q", text, out)
		}
		var is any
		if json.Unmarshal(out, &is) != nil {
			return
		}
		if s, ok := is.(string); ok {
			for _, r := range s {
				if !strconv.IsPrint(r) && r != utf8.RuneError {
					t.Fatalf("%q has %q", out, r)
				}
			}
		}
	})
}
