// Command nsm runs the chains of NSM's own Go SDK as processes, one role each, the way NSM's programs do:
//
//	nsm registry   a registry in memory
//	nsm manager    a network service manager
//	nsm endpoint   registers a service and an endpoint, and serves connections
//	nsm client     requests a connection and keeps it; SIGUSR1 refreshes it
//
// SIGTERM ends each; the endpoint unregisters first, the client closes its connection. Both print one JSON object a line for everything
// that happens. Settings have the names that NSM's programs give them.
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/url"
	"os"
	"os/signal"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/networkservicemesh/sdk/pkg/tools/log"
	"github.com/sirupsen/logrus"
)

type settings struct {
	name, service, iface string
	listenOn             []*url.URL
	connectTo, registry  *url.URL
	lifetime             time.Duration
}

// readSettings takes the settings of all roles from the environment; what a role needs it checks by itself.
func readSettings() (settings, error) {
	s := settings{
		name:    os.Getenv("NSM_NAME"),
		service: os.Getenv("NSM_SERVICE_NAME"),
		iface:   os.Getenv("NSM_INTERFACE"),
	}
	parse := func(key, text string) (*url.URL, error) {
		if text == "" {
			return nil, nil
		}
		u, err := url.Parse(text)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", key, err)
		}
		return u, nil
	}
	for _, text := range strings.Split(os.Getenv("NSM_LISTEN_ON"), ",") {
		u, err := parse("NSM_LISTEN_ON", text)
		if err != nil {
			return s, err
		}
		if u != nil {
			s.listenOn = append(s.listenOn, u)
		}
	}
	var err error
	if s.connectTo, err = parse("NSM_CONNECT_TO", os.Getenv("NSM_CONNECT_TO")); err != nil {
		return s, err
	}
	if s.registry, err = parse("NSM_REGISTRY_URL", os.Getenv("NSM_REGISTRY_URL")); err != nil {
		return s, err
	}
	if s.lifetime, err = time.ParseDuration(os.Getenv("NSM_MAX_TOKEN_LIFETIME")); err != nil {
		return s, fmt.Errorf("NSM_MAX_TOKEN_LIFETIME: %w", err)
	}
	return s, nil
}

var output sync.Mutex

// say prints one event; fields are pairs of name and value.
func say(event string, fields ...any) {
	line := map[string]any{"event": event}
	for i := 0; i+1 < len(fields); i += 2 {
		value := fields[i+1]
		if err, isError := value.(error); isError {
			value = err.Error()
		}
		line[fields[i].(string)] = value
	}
	output.Lock()
	defer output.Unlock()
	_ = json.NewEncoder(os.Stdout).Encode(line)
}

// quiet turns the SDK's tracing off, and its log too unless NSM_LOG_LEVEL names a level.
func quiet() error {
	log.EnableTracing(false)
	level := os.Getenv("NSM_LOG_LEVEL")
	if level == "" {
		logrus.SetOutput(io.Discard)
		return nil
	}
	parsed, err := logrus.ParseLevel(level)
	if err != nil {
		return fmt.Errorf("NSM_LOG_LEVEL: %w", err)
	}
	logrus.SetLevel(parsed)
	logrus.SetOutput(os.Stderr)
	log.EnableTracing(parsed >= logrus.TraceLevel)
	return nil
}

func run(role string) error {
	roles := map[string]func(context.Context, settings, *identity) error{
		"registry": serveRegistry, "manager": serveManager, "endpoint": serveEndpoint, "client": keepConnection,
	}
	work, known := roles[role]
	if !known {
		return fmt.Errorf("%q is none of registry, manager, endpoint, client", role)
	}
	if err := quiet(); err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	s, err := readSettings()
	if err != nil {
		return err
	}
	self, err := newIdentity(ctx, s.lifetime)
	if err != nil {
		return err
	}
	return work(ctx, s, self)
}

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: nsm registry|manager|endpoint|client")
		os.Exit(64)
	}
	if err := run(os.Args[1]); err != nil {
		say("failed", "cause", err)
		os.Exit(1)
	}
}
