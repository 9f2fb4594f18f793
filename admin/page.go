// SPDX-License-Identifier: Apache-2.0

package admin

import (
	"embed"
	"mime"
	"net/http"
	"path"
)

//go:embed page
var pageFiles embed.FS

// pagePolicy lets the page load what comes from here, and nothing else.
const pagePolicy = "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"

// pageFile serves one file of the page. There is no build step, and no library.
func pageFile(name string) http.HandlerFunc {
	data, err := pageFiles.ReadFile("page/" + name)
	if err != nil {
		panic(err) // the names are constants
	}
	kind := mime.TypeByExtension(path.Ext(name))
	if path.Ext(name) == ".js" {
		kind = "text/javascript; charset=utf-8"
	}
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", kind)
		w.Header().Set("Content-Security-Policy", pagePolicy)
		w.Write(data)
	}
}
