// SPDX-License-Identifier: Apache-2.0

package admin

import (
	"context"
	"net"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"

	"tarn/explain"
	"tarn/index"
	"tarn/proxy"
)

// TestWhoFillsAPortKeepsNobodyFromTheSocket: what is explained asks a registry, which may
// be a silent one that somebody chose.
func TestWhoFillsAPortKeepsNobodyFromTheSocket(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		silent := make(chan struct{})
		o := Options{
			Listener: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 5051},
			Parse: func(name string) (proxy.ImageName, error) {
				return proxy.ImageName{Repository: index.RepositoryKey{Upstream: "reg.corp", Repository: name}, Tag: "v1"}, nil
			},
			Explain: func(_ context.Context, n proxy.ImageName) explain.Explanation {
				if n.Repository.Repository == "silent" {
					<-silent
				}
				return explain.Explanation{Image: n.String()}
			},
		}
		port := New(o)
		o.Listener = &net.UnixAddr{Name: "/run/tarn/admin.sock", Net: "unix"}
		socket := New(o)
		for range maxAtOnce {
			go func() {
				r := httptest.NewRequest("GET", "http://127.0.0.1:5051/api/v1/explain?image=silent", nil)
				port.ServeHTTP(httptest.NewRecorder(), r)
			}()
		}
		synctest.Wait()
		w := httptest.NewRecorder()
		port.ServeHTTP(w, httptest.NewRequest("GET", "http://127.0.0.1:5051/api/v1/explain?image=app", nil))
		if w.Code != 503 || !strings.Contains(w.Body.String(), `"busy"`) || w.Header().Get("Retry-After") == "" {
			t.Errorf("%d: %s", w.Code, w.Body)
		}
		w = httptest.NewRecorder()
		socket.ServeHTTP(w, httptest.NewRequest("GET", "http://localhost/api/v1/explain?image=app", nil))
		if w.Code != 200 {
			t.Errorf("%d: %s", w.Code, w.Body)
		}
		close(silent)
		synctest.Wait()
	})
}
