// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"os"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"golang.org/x/term"
)

// newLogger writes to stderr: lines for people on a terminal, and elsewhere JSON,
// where durations are numbers of seconds. The level may be changed later.
func newLogger(level string) (*zap.Logger, zap.AtomicLevel, error) {
	l, err := zap.ParseAtomicLevel(level)
	if err != nil {
		return nil, l, fmt.Errorf("log_level: %q is none of debug, info, warn, error", level)
	}
	c := zap.NewProductionConfig()
	c.Level = l
	c.Sampling = nil // a line a request, and no line lost
	c.DisableStacktrace = true
	c.DisableCaller = true // lines of code are for who writes it
	c.EncoderConfig.EncodeTime = zapcore.ISO8601TimeEncoder
	c.EncoderConfig.EncodeDuration = zapcore.SecondsDurationEncoder
	if term.IsTerminal(int(os.Stderr.Fd())) {
		c.Encoding = "console"
		c.EncoderConfig.EncodeLevel = zapcore.CapitalLevelEncoder
		c.EncoderConfig.EncodeTime = zapcore.TimeEncoderOfLayout("15:04:05.000")
		c.EncoderConfig.EncodeDuration = zapcore.StringDurationEncoder
	}
	log, err := c.Build()
	return log, l, err
}
