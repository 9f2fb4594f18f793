// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// system is something that people put in front of a registry, or the registry
// itself.
type system struct {
	name string
	// command writes what it needs into dir, which is kept from one start to
	// the next, and returns how it is started. nil for the registry itself.
	command func(dir, listen string, u *upstream) ([]string, error)
}

var direct = system{name: "direct"}

// programs are found on the PATH.
func systems() []system {
	return []system{
		direct,
		{"tarn", tarn("")},
		{"nginx", nginxCache("on")},
		{"nginx without lock", nginxCache("off")},
		{"distribution", distribution},
	}
}

var nginxStatic = system{"nginx static", nginx(`
    location / { root %[1]s/static; default_type application/octet-stream; }`)}

// ahead is tarn as it may be set up for cold pulls.
var ahead = system{"tarn, prefetch", tarn("prefetch: layers\n")}

func tarn(more string) func(dir, listen string, u *upstream) ([]string, error) {
	return func(dir, listen string, u *upstream) ([]string, error) {
		config := fmt.Sprintf(`listen: %s
admin_listen: ""
admin_socket: off
log_level: warn # as the others, which write no line a request either
dir: %s
max_size: 100GiB
min_free: 0%%
default_upstream: bench.test
upstreams:
- name: bench.test
  endpoints: ["http://%s"]
%s`, listen, filepath.Join(dir, "data"), u.addr, more)
		file := filepath.Join(dir, "tarn.yaml")
		return []string{"tarn", "serve", "--config", file}, os.WriteFile(file, []byte(config), 0o600)
	}
}

func nginxCache(lock string) func(dir, listen string, u *upstream) ([]string, error) {
	return nginx(`
    proxy_cache_path %[1]s/cache levels=1:2 keys_zone=c:100m max_size=100g inactive=1d use_temp_path=off;
    upstream up { server %[3]s; keepalive 64; keepalive_requests 1000000000; }
    server {
        listen %[2]s backlog=4096;
        location / {
            proxy_pass http://up;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_cache c;
            proxy_cache_valid 200 1d;
            proxy_cache_revalidate on;
            proxy_cache_lock ` + lock + `;
            proxy_cache_lock_timeout 60s;
            proxy_cache_lock_age 60s;
            proxy_max_temp_file_size 4096m;
        }
    }`)
}

func nginx(servers string) func(dir, listen string, u *upstream) ([]string, error) {
	return func(dir, listen string, u *upstream) ([]string, error) {
		body := fmt.Sprintf(servers, dir, listen, u.addr)
		if !strings.Contains(body, "server {") {
			body = "server {\n    listen " + listen + " backlog=4096;" + body + "\n}"
		}
		config := fmt.Sprintf(`user root;
daemon off;
master_process off;
worker_processes 1;
pid %[1]s/nginx.pid;
error_log stderr error;
events { worker_connections 8192; }
http {
    access_log off;
    sendfile on;
    tcp_nopush on;
    keepalive_timeout 600;
    keepalive_requests 1000000000;
    open_file_cache max=1000;
    client_body_temp_path %[1]s/body; proxy_temp_path %[1]s/proxy; fastcgi_temp_path %[1]s/f; uwsgi_temp_path %[1]s/u; scgi_temp_path %[1]s/s;
    %[2]s
}
`, dir, body)
		file := filepath.Join(dir, "nginx.conf")
		return []string{"nginx", "-e", "stderr", "-p", dir, "-c", file}, os.WriteFile(file, []byte(config), 0o600)
	}
}

func distribution(dir, listen string, u *upstream) ([]string, error) {
	config := fmt.Sprintf(`version: 0.1
log: {level: error, accesslog: {disabled: true}}
storage: {filesystem: {rootdirectory: %s}}
http: {addr: %q}
proxy: {remoteurl: "http://%s"}
`, filepath.Join(dir, "data"), listen, u.addr)
	file := filepath.Join(dir, "config.yml")
	return []string{"registry", "serve", file}, os.WriteFile(file, []byte(config), 0o600)
}

// server is a system that runs, on a core of its own.
type server struct {
	system  system
	dir     string
	addr    string
	u       *upstream
	process *exec.Cmd
	ready   time.Duration // from its start to the first answer
	exited  chan error
}

// serverCore is the last one; the registry and the load have the first.
var serverCore = strconv.Itoa(cores() - 1)

func cores() int {
	n, err := filepath.Glob("/sys/devices/system/cpu/cpu[0-9]*")
	if err != nil || len(n) == 0 {
		return 1
	}
	return len(n)
}

// start runs a system over a directory that may have been used before.
func (s system) start(dir string, u *upstream) (*server, error) {
	if s.command == nil {
		return &server{system: s, addr: u.addr}, nil
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	addr := l.Addr().String()
	l.Close()
	dir = strings.ReplaceAll(dir, " ", "-") // nginx's configuration wants none
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	argv, err := s.command(dir, addr, u)
	if err != nil {
		return nil, err
	}
	r := &server{system: s, dir: dir, addr: addr, u: u, exited: make(chan error, 1)}
	r.process = exec.Command("taskset", append([]string{"-c", serverCore}, argv...)...)
	r.process.Env = append(os.Environ(), "OTEL_TRACES_EXPORTER=none")
	r.process.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	var said strings.Builder
	r.process.Stderr = &said
	start := time.Now()
	if err := r.process.Start(); err != nil {
		return nil, err
	}
	go func() { r.exited <- r.process.Wait() }()
	for time.Since(start) < 30*time.Second {
		c, err := dial(addr)
		if err == nil {
			_, err = c.do(requestText("GET", "/"))
			c.close()
		}
		if errors.Is(err, errStatus) || err == nil { // an answer is an answer
			r.ready = time.Since(start)
			return r, nil
		}
		select {
		case err := <-r.exited:
			return nil, fmt.Errorf("%s: %v: %s", s.name, err, said.String())
		case <-time.After(time.Millisecond):
		}
	}
	r.stop()
	return nil, fmt.Errorf("%s does not answer: %s", s.name, said.String())
}

func (r *server) stop() {
	if r.process == nil {
		return
	}
	r.process.Process.Signal(syscall.SIGTERM)
	select {
	case <-r.exited:
	case <-time.After(10 * time.Second):
		r.process.Process.Kill()
		<-r.exited
	}
}

// cpu is what it has used so far.
func (r *server) cpu() time.Duration {
	if r.process == nil {
		return 0
	}
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", r.process.Process.Pid))
	if err != nil {
		return 0
	}
	fields := strings.Fields(string(data[strings.LastIndexByte(string(data), ')')+2:]))
	user, _ := strconv.ParseInt(fields[11], 10, 64)
	system, _ := strconv.ParseInt(fields[12], 10, 64)
	const tick = 10 * time.Millisecond // USER_HZ is 100 on Linux
	return time.Duration(user+system) * tick
}

// memory is its own now, in bytes: what of it is backed by no file.
func (r *server) memory() int64 {
	if r.process == nil {
		return 0
	}
	f, err := os.Open(fmt.Sprintf("/proc/%d/status", r.process.Process.Pid))
	if err != nil {
		return 0
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		if rest, ok := strings.CutPrefix(s.Text(), "RssAnon:"); ok {
			kb, _ := strconv.ParseInt(strings.Fields(rest)[0], 10, 64)
			return kb << 10
		}
	}
	return 0
}

// watch samples the memory until the result is called.
func (r *server) watch() (peak func() int64) {
	stop, done := make(chan struct{}), make(chan int64)
	go func() {
		most := int64(0)
		tick := time.NewTicker(10 * time.Millisecond)
		defer tick.Stop()
		for {
			most = max(most, r.memory())
			select {
			case <-stop:
				done <- most
				return
			case <-tick.C:
			}
		}
	}()
	return func() int64 {
		close(stop)
		return <-done
	}
}
