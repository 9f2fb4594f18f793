// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"strconv"
	"unicode/utf16"
	"unicode/utf8"
)

// What the daemon answers has words in it that registries and clients chose, and while
// tarn is away, whoever has its port may answer. No string of an answer leads a terminal,
// makes a line of its own in a table, or runs backwards.

const (
	// maxAnswer bounds an answer that is one document, and maxAnswerLine a line of
	// others, in bytes: a hundred thousand images are some 50 MiB.
	maxAnswer     = 256 << 20
	maxAnswerLine = 64 << 20
)

// readAnswer reads an answer that is one document.
func readAnswer(body io.Reader) ([]byte, error) {
	text, err := io.ReadAll(io.LimitReader(body, maxAnswer+1))
	if err == nil && len(text) > maxAnswer {
		err = fmt.Errorf("it has more than %s", size(maxAnswer))
	}
	return text, err
}

// answerLines reads an answer line by line: each is a document.
type answerLines struct{ *bufio.Scanner }

func newAnswerLines(body io.Reader) answerLines {
	s := bufio.NewScanner(body)
	s.Buffer(nil, maxAnswerLine)
	return answerLines{s}
}

// next reads the next line; false is for the end, or for what is none.
func (l answerLines) next(into any) bool {
	return l.Scan() && json.Unmarshal(legible(l.Bytes()), into) == nil
}

// legible is a text in JSON in whose strings each character can be printed, and is in
// one line: others are a question mark, or a space.
func legible(text []byte) []byte {
	out := make([]byte, 0, len(text))
	for len(text) > 0 {
		n, replacement := 1, byte(0)
		switch {
		case text[0] == '\\':
			n, replacement = escaped(text)
		case text[0] >= utf8.RuneSelf:
			var r rune
			if r, n = utf8.DecodeRune(text); r == utf8.RuneError && n == 1 || !strconv.IsPrint(r) {
				replacement = '?'
			}
		case text[0] == 0x7f:
			replacement = '?'
		}
		if replacement != 0 {
			out = append(out, replacement)
		} else {
			out = append(out, text[:n]...)
		}
		text = text[n:]
	}
	return out
}

// escaped is how long the escape is with which the text begins, and what is put in its
// place, 0 for nothing.
func escaped(text []byte) (n int, replacement byte) {
	if len(text) < 2 {
		return len(text), 0
	}
	switch text[1] {
	case 'n', 'r', 't':
		return 2, ' '
	case 'b', 'f':
		return 2, '?'
	case 'u':
		r, n := codeUnit(text)
		if utf16.IsSurrogate(r) {
			low, m := codeUnit(text[n:])
			if r = utf16.DecodeRune(r, low); r == utf8.RuneError {
				return n, '?'
			}
			n += m
		}
		if !strconv.IsPrint(r) {
			return n, '?'
		}
		return n, 0
	}
	return 2, 0
}

// codeUnit reads the \uXXXX with which a text begins; what is none is one byte of
// utf8.RuneError, or nothing at the end.
func codeUnit(text []byte) (r rune, n int) {
	const length = len(`\u0000`)
	if len(text) >= length && text[0] == '\\' && text[1] == 'u' {
		if unit, err := strconv.ParseUint(string(text[2:length]), 16, 16); err == nil {
			return rune(unit), length
		}
	}
	return utf8.RuneError, min(1, len(text))
}
