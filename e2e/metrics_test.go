// SPDX-License-Identifier: Apache-2.0

//go:build linux

package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

const prometheusAddr = "127.0.0.1:9090"

// promtool runs it, and fails the test where it finds fault.
func promtool(t *testing.T, stdin io.Reader, args ...string) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "promtool", args...)
	cmd.Stdin = stdin
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("promtool %s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

func TestTheAlertsDoWhatTheirTestsSay(t *testing.T) {
	promtool(t, nil, "check", "rules", "../deploy/alerts.yaml")
	promtool(t, nil, "test", "rules", "../deploy/alerts_test.yaml")
}

// startPrometheus has a Prometheus scrape tarn each second, and evaluate the alerts.
func startPrometheus(t *testing.T) {
	t.Helper()
	rules, err := filepath.Abs("../deploy/alerts.yaml")
	if err != nil {
		t.Fatal(err)
	}
	dir := folder(t, work(), "prometheus")
	config := filepath.Join(dir, "prometheus.yml")
	text := fmt.Sprintf("global: {scrape_interval: 1s, evaluation_interval: 1s}\nrule_files: [%q]\nscrape_configs:\n- job_name: tarn\n  static_configs: [{targets: [%q]}]\n", rules, tarnAdminAddr)
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	p := start(t, "prometheus", "prometheus", "--config.file="+config, "--storage.tsdb.path="+filepath.Join(dir, "data"), "--web.listen-address="+prometheusAddr)
	waitFor(t, "prometheus is ready", func() error {
		if err := p.alive(); err != nil {
			t.Fatalf("%v\n%s", err, p.tail(t))
		}
		return askPrometheus("/-/ready", nil)
	})
}

func askPrometheus(path string, into any) error {
	resp, err := http.Get("http://" + prometheusAddr + path)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: %v: %s", resp.Status, err, body)
	}
	if into == nil {
		return nil
	}
	return json.Unmarshal(body, into)
}

// hasValue is nil where the query has one.
func hasValue(query string) error {
	var answer struct {
		Data struct {
			Result []struct{ Value [2]any }
		}
	}
	if err := askPrometheus("/api/v1/query?query="+url.QueryEscape(query), &answer); err != nil {
		return err
	}
	if !slices.ContainsFunc(answer.Data.Result, func(r struct{ Value [2]any }) bool { return r.Value[1] != "NaN" }) {
		return errors.New("no value")
	}
	return nil
}

// panelQueries are the dashboard's, by panel, as Grafana would put them for the last
// minute.
func panelQueries(t *testing.T) map[string][]string {
	t.Helper()
	data, err := os.ReadFile("../deploy/dashboard.json")
	if err != nil {
		t.Fatal(err)
	}
	var dashboard struct {
		Panels []struct {
			Title   string
			Targets []struct{ Expr string }
		}
	}
	if err := json.Unmarshal(data, &dashboard); err != nil {
		t.Fatal(err)
	}
	grafana := strings.NewReplacer("$__rate_interval", "1m", "$__range", "1m", "$instance", ".*")
	all := make(map[string][]string)
	for _, p := range dashboard.Panels {
		for _, target := range p.Targets {
			all[p.Title] = append(all[p.Title], grafana.Replace(target.Expr))
		}
		if len(all[p.Title]) == 0 {
			t.Errorf("the panel %s asks nothing", p.Title)
		}
	}
	return all
}

func TestEachPanelHasAValueAndEachRuleItsMetrics(t *testing.T) {
	n := newNode(t)
	n.registry.quota("100;w=21600", "76;w=21600")
	pushPause(t)
	i := pushIndex(t, "app/many", "v1", "hello, Prometheus")
	c := n.ctr("first")
	startPrometheus(t)
	mustPull(t, c, i.ref())
	metrics, err := http.Get("http://" + tarnAdminAddr + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer metrics.Body.Close()
	promtool(t, metrics.Body, "check", "metrics")
	queries := panelQueries(t)
	if len(queries) < 15 {
		t.Fatalf("%d panels are read", len(queries))
	}
	for title, all := range queries {
		for _, query := range all {
			waitFor(t, title+": "+query, func() error {
				c.forget(t, i.ref()) // and so each object is asked for again, while it is scraped
				mustPull(t, c, i.ref())
				return hasValue(query)
			})
		}
	}
	rules, err := os.ReadFile("../deploy/alerts.yaml")
	if err != nil {
		t.Fatal(err)
	}
	named := regexp.MustCompile(`\b(tarn_[a-z_]+|up)\b`).FindAllString(string(rules), -1)
	if len(named) < 8 {
		t.Fatalf("the rules name %v", named)
	}
	for _, name := range named {
		if name == "tarn_certificate_expiry_timestamp_seconds" { // this tarn has none
			continue
		}
		if err := hasValue(name); err != nil {
			t.Errorf("the rules name %s: %v", name, err)
		}
	}
	var answer struct {
		Data struct {
			Groups []struct {
				Rules []struct{ Name, Health, LastError, State string }
			}
		}
	}
	if err := askPrometheus("/api/v1/rules", &answer); err != nil {
		t.Fatal(err)
	}
	for _, group := range answer.Data.Groups {
		for _, rule := range group.Rules {
			if rule.Health == "err" || rule.State != "inactive" {
				t.Errorf("the rule %s is %s, %s: %s", rule.Name, rule.State, rule.Health, rule.LastError)
			}
		}
	}
}
