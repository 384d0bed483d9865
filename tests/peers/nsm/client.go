package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/edwarnicke/grpcfd"
	"google.golang.org/grpc"
	"google.golang.org/grpc/peer"
	"google.golang.org/protobuf/types/known/emptypb"
)

const tryTimeout = 10 * time.Second

// client keeps one connection.
type client struct {
	settings
	*wire
	*identity
	last       *grpc.ClientConn
	connection object
}

// request establishes the connection, refreshes it at a third of its tokens' life, heals it when the monitor says that it is down, and
// at once on SIGUSR1. When the context ends it closes the connection.
func request(ctx context.Context, s settings, w *wire, self *identity) error {
	id := s.name + "-0"
	connection := object{"id": id, "network_service": s.service}
	setSegments(connection, 0, []object{{"name": s.name, "id": id}})
	c := &client{settings: s, wire: w, identity: self, connection: connection}
	defer c.keep(nil)

	now := make(chan os.Signal, 1)
	signal.Notify(now, syscall.SIGUSR1)
	down := make(chan string, 16)
	c.until(ctx, "connected")
	go c.watch(ctx, down)
	for {
		select {
		case <-ctx.Done():
			return c.close(context.Background())
		case <-time.After(c.lifetime / 3):
			c.until(ctx, "refreshed")
		case <-now:
			c.until(ctx, "refreshed")
		case why := <-down:
			say("lost", "cause", why)
			c.until(ctx, "healed")
		}
	}
}

// until requests until it works.
func (c *client) until(ctx context.Context, event string) {
	for ctx.Err() == nil {
		began := time.Now()
		err := c.try(ctx)
		if err == nil {
			say(event, "ms", time.Since(began).Milliseconds(), "connection", c.connection)
			return
		}
		say("not "+event, "cause", err)
		time.Sleep(100 * time.Millisecond)
	}
}

// try sends one request with the own namespace, and checks the answer's path as NSM's clients do.
func (c *client) try(ctx context.Context) error {
	within, cancel := context.WithTimeout(ctx, tryTimeout)
	defer cancel()
	netns, err := grpcfd.FilenameToURL(ownNetns)
	if err != nil {
		return err
	}
	kernel := object{"cls": "LOCAL", "type": "KERNEL", "parameters": object{"inodeURL": netns.String(), "name": c.iface}}
	in, err := c.message("networkservice.NetworkServiceRequest", object{"connection": c.connection, "mechanism_preferences": []any{kernel}})
	if err != nil {
		return err
	}
	out, err := c.empty("connection.Connection")
	if err != nil {
		return err
	}
	perCall, err := c.call(ownNetns)
	if err != nil {
		return err
	}
	var server peer.Peer
	manager, err := c.dial(c.connectTo)
	if err != nil {
		return err
	}
	c.keep(manager)
	if err := manager.Invoke(within, "/networkservice.NetworkService/Request", in, out, perCall, grpc.Peer(&server)); err != nil {
		return err
	}
	answer, err := content(out)
	if err != nil {
		return err
	}
	leaf, err := leafOf(server.AuthInfo)
	if err != nil {
		return err
	}
	index, list := segments(answer)
	if index != 0 || text(answer, "id") != text(c.connection, "id") {
		return fmt.Errorf("the answer is not of this side: index %d, id %s", index, text(answer, "id"))
	}
	if err := checkPath(list, 1, leaf); err != nil {
		return err
	}
	c.connection = answer
	return nil
}

// keep replaces the connection to the manager: every request has one of its own, as NSM's clients do, so that the tokens are by the
// certificate that its handshake has shown.
func (c *client) keep(manager *grpc.ClientConn) {
	if c.last != nil {
		_ = c.last.Close()
	}
	c.last = manager
}

func (c *client) close(ctx context.Context) error {
	within, cancel := context.WithTimeout(ctx, tryTimeout)
	defer cancel()
	in, err := c.message("connection.Connection", c.connection)
	if err != nil {
		return err
	}
	perCall, err := c.call()
	if err != nil {
		return err
	}
	manager, err := c.dial(c.connectTo)
	if err != nil {
		return err
	}
	c.keep(manager)
	if err := manager.Invoke(within, "/networkservice.NetworkService/Close", in, &emptypb.Empty{}, perCall); err != nil {
		return err
	}
	say("closed")
	return nil
}

// watch prints every monitor event of the own connection; `down` hears of the stream's end and of the state DOWN.
func (c *client) watch(ctx context.Context, down chan<- string) {
	id := text(c.connection, "id")
	for ctx.Err() == nil {
		err := c.events(ctx, id, down)
		if ctx.Err() != nil {
			return
		}
		down <- fmt.Sprintf("monitor: %v", err)
		time.Sleep(100 * time.Millisecond)
	}
}

func (c *client) events(ctx context.Context, id string, down chan<- string) error {
	selector, err := c.message("connection.MonitorScopeSelector", object{"path_segments": []any{object{"id": id, "name": c.name}}})
	if err != nil {
		return err
	}
	perCall, err := c.call()
	if err != nil {
		return err
	}
	description := &grpc.StreamDesc{ServerStreams: true}
	manager, err := c.dial(c.connectTo)
	if err != nil {
		return err
	}
	defer func() { _ = manager.Close() }()
	stream, err := manager.NewStream(ctx, description, "/connection.MonitorConnection/MonitorConnections", perCall, grpc.WaitForReady(true))
	if err != nil {
		return err
	}
	if err := errors.Join(stream.SendMsg(selector), stream.CloseSend()); err != nil {
		return err
	}
	for {
		message, err := c.empty("connection.ConnectionEvent")
		if err != nil {
			return err
		}
		if err := stream.RecvMsg(message); err != nil {
			return err
		}
		event, err := content(message)
		if err != nil {
			return err
		}
		for _, connection := range at(event, "connections") {
			state := text(connection.(object), "state")
			say("monitor", "type", text(event, "type"), "state", state)
			if state == "DOWN" {
				down <- "DOWN"
			}
		}
	}
}
