// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"net/http"
	"strings"
	"time"

	"tarn/history"

	"go.uber.org/zap"
)

// observer is who is told what becomes of requests.
type observer struct {
	metrics   *Metrics
	counted   counted
	history   *history.History
	log       *zap.Logger
	accessLog AccessLog
}

func newObserver(opts Options) observer {
	return observer{
		metrics:   opts.Metrics,
		counted:   newCounted(opts.Metrics, append(opts.Upstreams.Names(), opts.DefaultUpstream)),
		history:   opts.History,
		log:       opts.Logger,
		accessLog: opts.AccessLog,
	}
}

// observe is the one line and the counters of a request.
func (p *Proxy) observe(w *response, r *http.Request, took time.Duration) {
	q := w.request
	if q == nil {
		q = &request{method: r.Method}
	}
	if q.upstream == probeName {
		p.log.Debug("probe", zap.String("method", bounded(r.Method)), zap.Int("status", w.status), zap.String("agent", bounded(r.UserAgent())))
		return
	}
	route := "none"
	if q.base || q.kind != "" {
		route = q.route()
	}
	ended := w.ended()
	p.counted.of(q.upstream).count(q.metricKind(), ended, w.headers)
	p.remember(w, r, q, ended)
	if !p.accessLog.wants(w, ended) {
		return
	}
	level := zap.InfoLevel
	if w.status >= http.StatusInternalServerError {
		level = zap.WarnLevel // the client goes past tarn, or has nothing
	}
	if ce := p.log.Check(level, "request"); ce != nil {
		fields := []zap.Field{
			zap.String("method", bounded(r.Method)),
			zap.String("route", route),
			zap.String("upstream", string(q.upstream)),
			zap.String("repository", bounded(q.repository)),
			zap.String("reference", bounded(q.reference())),
			zap.Int("status", w.status),
			zap.Int64("bytes", w.bytes),
			zap.Duration("took", took),
			zap.String("cache", w.cacheStatus),
			zap.String("client", r.RemoteAddr),
			zap.String("agent", bounded(r.UserAgent())),
		}
		if w.fetcher != nil {
			if from := w.fetcher.from(); len(from) > 0 {
				fields = append(fields, zap.Strings("sources", from))
			}
		}
		if w.err != nil {
			fields = append(fields, zap.String("error", bounded(w.err.Error())))
		}
		ce.Write(fields...)
	}
}

// maxField bounds a field of the log that another side chose, in bytes.
const maxField = 512

// bounded is the beginning of a string, where it is long.
func bounded(s string) string {
	if len(s) <= maxField {
		return s
	}
	return strings.ToValidUTF8(s[:maxField], "") + "..."
}
