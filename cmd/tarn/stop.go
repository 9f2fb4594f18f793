// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/signal"
	"syscall"
	"time"

	"go.uber.org/zap"
)

// How tarn is stopped: nobody new is let in, who is being answered has a while, and
// the log says who is waited for.

const (
	// shutdownGrace is how long running answers may take after SIGTERM. A
	// DaemonSet's pod is given 30 s.
	shutdownGrace = 25 * time.Second
	// adminGrace is the same for what people have asked for.
	adminGrace = time.Second
	// sayEvery is how often the log says what is still waited for.
	sayEvery = 5 * time.Second
)

// untilSignal ends the context with SIGTERM or SIGINT. A SIGINT after that ends the
// process at once, also where it is the first of its container, of which the kernel
// ignores what it does not handle.
func untilSignal(parent context.Context) (ctx context.Context, stop func()) {
	ctx, cancel := context.WithCancel(parent)
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT)
	go func() {
		for {
			select {
			case <-parent.Done():
				return
			case s := <-signals:
				if ctx.Err() != nil && s == syscall.SIGINT {
					fmt.Fprintln(os.Stderr, "tarn: ended by a second SIGINT: what was being answered is cut")
					os.Exit(signalled + int(syscall.SIGINT))
				}
				cancel()
			}
		}
	}()
	return ctx, func() {
		signal.Stop(signals)
		cancel()
	}
}

// signalled is what shells add to the number of a signal that ended a process.
const signalled = 128

// service is a server, where it is reached, and how long its running answers may
// take when it is stopped.
type service struct {
	*http.Server
	listener net.Listener
	grace    time.Duration
}

// serveAll serves until the context ends or a service fails. They are stopped in
// their order. running counts what is being answered to clients.
func serveAll(ctx context.Context, log *zap.Logger, manager notifier, services []service, running func() int64) (err error) {
	failed := make(chan error, len(services))
	for _, s := range services {
		go func() { failed <- s.serve() }()
	}
	manager.ready() // whoever comes before they have begun waits for them
	select {
	case <-ctx.Done():
		manager.stopping()
		log.Info("shutting down: nobody new is let in", zap.Int64("running_answers", running()), zap.Duration("at_most", shutdownGrace))
	case err = <-failed:
	}
	for _, s := range services {
		s.stop(log, running)
	}
	log.Info("no answer is running any more; the data directory is being closed")
	return err
}

// serve serves over TLS where it was told what to show.
func (s service) serve() error {
	if s.TLSConfig != nil {
		return s.ServeTLS(s.listener, "", "")
	}
	return s.Serve(s.listener)
}

// stop closes the listener before it waits, so that clients are refused and go to
// the registry itself, and cuts what is still running when the grace is over.
func (s service) stop(log *zap.Logger, running func() int64) {
	ctx, cancel := context.WithTimeout(context.Background(), s.grace)
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- s.Shutdown(ctx) }() // ends with the grace
	tick := time.NewTicker(sayEvery)
	defer tick.Stop()
	for {
		select {
		case err := <-done:
			if err != nil {
				log.Warn("the time for running answers is over; they are cut", zap.Int64("running_answers", running()))
				s.Close()
			}
			return
		case <-tick.C:
			log.Info("waiting for running answers", zap.Int64("running_answers", running()))
		}
	}
}
