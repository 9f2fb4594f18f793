// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"strconv"
	"syscall"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

// What the service manager is told (sd_notify(3)), where there is one: that tarn
// serves, reads its configuration anew, stops; and, as long as tarn answers, that it
// need not be ended (WatchdogSec= of its unit).

// notifier speaks to the service manager. The zero value speaks to nobody.
type notifier struct {
	socket   string
	watchdog time.Duration // 0: nobody watches
	log      *zap.Logger
}

// newNotifier takes from the environment what is this process's only: the programs
// that it starts have nothing to say to the manager.
func newNotifier(log *zap.Logger) notifier {
	n := notifier{socket: os.Getenv("NOTIFY_SOCKET"), log: log}
	usec, err := strconv.ParseInt(os.Getenv("WATCHDOG_USEC"), 10, 64)
	pid := os.Getenv("WATCHDOG_PID")
	if err == nil && usec > 0 && (pid == "" || pid == strconv.Itoa(os.Getpid())) {
		n.watchdog = time.Duration(usec) * time.Microsecond
	}
	for _, name := range []string{"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"} {
		os.Unsetenv(name)
	}
	return n
}

func (n notifier) ready()    { n.tell("READY=1") }
func (n notifier) stopping() { n.tell("STOPPING=1") }

// reloading is followed by ready.
func (n notifier) reloading() {
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
		return
	}
	n.tell(fmt.Sprintf("RELOADING=1\nMONOTONIC_USEC=%d", now.Nano()/int64(time.Microsecond)))
}

func (n notifier) tell(state string) {
	if n.socket == "" {
		return
	}
	c, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: n.socket, Net: "unixgram"})
	if err == nil {
		_, err = c.Write([]byte(state))
		c.Close()
	}
	if err != nil {
		n.log.Warn("the service manager cannot be told", zap.String("state", state), zap.Error(err))
	}
}

// watch tells the watchdog that tarn answers at this listener, as long as it does and
// until the context ends. stop ends that, too.
func (n notifier) watch(ctx context.Context, listener net.Addr, overTLS bool) (stop func()) {
	if n.socket == "" || n.watchdog == 0 {
		return func() {}
	}
	const timesEach = 4 // of which three may go wrong
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		every := n.watchdog / timesEach
		tick := time.NewTicker(every)
		defer tick.Stop()
		for {
			if err := answers(ctx, listener, overTLS, every); err == nil {
				n.tell("WATCHDOG=1")
			} else if ctx.Err() == nil {
				n.log.Error("tarn does not answer itself", zap.Error(err))
			}
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
		}
	}()
	return func() {
		cancel()
		<-done
	}
}

// answers asks tarn itself. Whatever it says is an answer: also the end of the
// handshake for want of a client's certificate, or of a connection too many, which
// others can bring about. A process that hangs says nothing.
func answers(ctx context.Context, listener net.Addr, overTLS bool, within time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	scheme, host := "http", listener.String()
	if overTLS {
		scheme = "https"
	}
	if tcp, ok := listener.(*net.TCPAddr); ok && tcp.IP.IsUnspecified() {
		host = net.JoinHostPort("localhost", strconv.Itoa(tcp.Port))
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodHead, scheme+"://"+host+"/v2/", nil)
	if err != nil {
		return err
	}
	req.Header.Set("User-Agent", "tarn watchdog")
	transport := &http.Transport{
		DisableKeepAlives: true,
		// It asks whether there is an answer, and believes nothing of it.
		TLSClientConfig: &tls.Config{InsecureSkipVerify: true},
	}
	resp, err := transport.RoundTrip(req)
	switch {
	case err == nil:
		resp.Body.Close()
		return nil
	case ctx.Err() != nil, errors.Is(err, syscall.ECONNREFUSED):
		return cmp.Or(context.Cause(ctx), err)
	}
	return nil
}
