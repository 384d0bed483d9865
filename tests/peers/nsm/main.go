// Command nsm is a client and an endpoint of Network Service Mesh made of the libraries that NSM's own programs stand on (grpc-go,
// go-spiffe, grpcfd, golang-jwt), for tests of the Rust side against them. It shares no code with the Rust side; only the .proto files.
//
//	nsm endpoint   registers a service and an endpoint, and serves connections until it gets SIGTERM
//	nsm client     requests a connection and keeps it; SIGUSR1 refreshes it, SIGTERM closes it
//
// Both print one JSON object a line for everything that happens.
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"
)

// settings are read from the environment, under the names that NSM's programs use.
type settings struct {
	name, connectTo, service, listenOn, iface, protos string
	lifetime                                          time.Duration
}

func readSettings() (settings, error) {
	var missing []string
	get := func(key string) string {
		if os.Getenv(key) == "" {
			missing = append(missing, key)
		}
		return os.Getenv(key)
	}
	s := settings{
		name: get("NSM_NAME"), connectTo: get("NSM_CONNECT_TO"), service: get("NSM_SERVICE_NAME"), protos: get("NSM_PROTOS"),
		listenOn: os.Getenv("NSM_LISTEN_ON"), iface: os.Getenv("NSM_INTERFACE"),
	}
	lifetime, err := time.ParseDuration(get("NSM_MAX_TOKEN_LIFETIME"))
	if len(missing) > 0 {
		return s, fmt.Errorf("not set: %v", missing)
	}
	if err != nil {
		return s, fmt.Errorf("NSM_MAX_TOKEN_LIFETIME: %w", err)
	}
	s.lifetime = lifetime
	return s, nil
}

var output sync.Mutex

// say prints one event; fields are pairs of name and value.
func say(event string, fields ...any) {
	line := object{"event": event}
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

func run(role string) error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	s, err := readSettings()
	if err != nil {
		return err
	}
	wire, err := loadWire(ctx, s.protos)
	if err != nil {
		return err
	}
	self, err := newIdentity(ctx, s.lifetime)
	if err != nil {
		return err
	}
	say("identity", "id", self.id())
	switch role {
	case "endpoint":
		return serve(ctx, s, wire, self)
	case "client":
		return request(ctx, s, wire, self)
	default:
		return fmt.Errorf("%q is neither endpoint nor client", role)
	}
}

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: nsm endpoint|client")
		os.Exit(64)
	}
	if err := run(os.Args[1]); err != nil {
		say("failed", "cause", err)
		os.Exit(1)
	}
}
