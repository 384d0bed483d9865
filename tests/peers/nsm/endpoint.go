package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"time"

	"github.com/edwarnicke/grpcfd"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"
)

const ownNetns = "/proc/self/ns/net"

// endpoint gives its nth connection the network 172.16.n.0/24 and an interface named after NSM_INTERFACE and n.
type endpoint struct {
	settings
	*wire
	*identity
	lock        sync.Mutex
	connections map[string]object
	watchers    map[chan object]bool
	numbers     map[string]int
}

// serve registers and answers until the context ends; then it unregisters.
func serve(ctx context.Context, s settings, w *wire, self *identity) error {
	e := &endpoint{
		settings: s, wire: w, identity: self,
		connections: map[string]object{}, watchers: map[chan object]bool{}, numbers: map[string]int{},
	}
	_ = os.Remove(s.listenOn)
	listener, err := net.Listen("unix", s.listenOn)
	if err != nil {
		return err
	}
	server := grpc.NewServer(self.server())
	server.RegisterService(&grpc.ServiceDesc{
		ServiceName: "networkservice.NetworkService",
		Methods: []grpc.MethodDesc{
			{MethodName: "Request", Handler: e.unary("networkservice.NetworkServiceRequest", e.request)},
			{MethodName: "Close", Handler: e.unary("connection.Connection", e.close)},
		},
	}, nil)
	server.RegisterService(&grpc.ServiceDesc{
		ServiceName: "connection.MonitorConnection",
		Streams:     []grpc.StreamDesc{{StreamName: "MonitorConnections", Handler: e.monitor, ServerStreams: true}},
	}, nil)
	failed := make(chan error, 1)
	go func() { failed <- server.Serve(listener) }()
	defer server.Stop()
	go e.keepRegistered(ctx)
	select {
	case err := <-failed:
		return err
	case <-ctx.Done():
	}
	within, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	if err := e.registration(within, "Unregister"); err != nil {
		return err
	}
	say("unregistered")
	return nil
}

// keepRegistered registers service and endpoint, and again before the registration ends.
func (e *endpoint) keepRegistered(ctx context.Context) {
	for {
		within, cancel := context.WithTimeout(ctx, 5*time.Second)
		err := e.registration(within, "Register")
		cancel()
		pause := e.lifetime / 3
		if err != nil {
			say("not registered", "cause", err)
			pause = 200 * time.Millisecond
		} else {
			say("registered")
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(pause):
		}
	}
}

func (e *endpoint) registration(ctx context.Context, method string) error {
	connection, err := e.dial(e.connectTo)
	if err != nil {
		return err
	}
	defer func() { _ = connection.Close() }()
	url, err := grpcfd.FilenameToURL(e.listenOn)
	if err != nil {
		return err
	}
	service := object{"name": e.service, "payload": "ETHERNET"}
	nse := object{"name": e.name, "network_service_names": []any{e.service}, "url": url.String()}
	if method == "Register" {
		if err := e.register(ctx, connection, "NetworkService", method, service); err != nil {
			return err
		}
		return e.register(ctx, connection, "NetworkServiceEndpoint", method, nse, e.listenOn)
	}
	return e.register(ctx, connection, "NetworkServiceEndpoint", method, nse)
}

func (e *endpoint) register(ctx context.Context, to *grpc.ClientConn, kind, method string, what object, files ...string) error {
	in, err := e.message("registry."+kind, what)
	if err != nil {
		return err
	}
	var out proto.Message = &emptypb.Empty{}
	if method == "Register" {
		if out, err = e.empty("registry." + kind); err != nil {
			return err
		}
	}
	credentials, err := e.call(files...)
	if err != nil {
		return err
	}
	ctx = metadata.AppendToOutgoingContext(ctx, "path", `{"Index":0,"PathSegments":null}`)
	var header metadata.MD
	if err := to.Invoke(ctx, "/registry."+kind+"Registry/"+method, in, out, credentials, grpc.Header(&header)); err != nil {
		return fmt.Errorf("%s of %s: %w", method, kind, err)
	}
	if len(header.Get("path")) == 0 {
		return fmt.Errorf("%s of %s: no path in the answer's headers", method, kind)
	}
	return nil
}

// unary makes a handler of a function on objects.
func (e *endpoint) unary(name string, work func(context.Context, object) (proto.Message, error)) grpc.MethodHandler {
	return func(_ any, ctx context.Context, decode func(any) error, _ grpc.UnaryServerInterceptor) (any, error) {
		in, err := e.empty(name)
		if err != nil {
			return nil, err
		}
		if err := decode(in); err != nil {
			return nil, err
		}
		o, err := content(in)
		if err != nil {
			return nil, err
		}
		out, err := work(ctx, o)
		if err != nil {
			say("refused", "cause", err)
			return nil, err
		}
		return out, nil
	}
}

// arrive writes the caller's and the own token into the path, and checks it. It returns the caller's index.
func (e *endpoint) arrive(ctx context.Context, connection object) (int, error) {
	leaf, token, expires, err := caller(ctx)
	if err != nil {
		return 0, status.Error(codes.PermissionDenied, err.Error())
	}
	index, list := segments(connection)
	if index >= len(list) || text(list[index], "id") != text(connection, "id") {
		return 0, status.Errorf(codes.InvalidArgument, "index %d and id %s do not fit %d segments", index, text(connection, "id"), len(list))
	}
	list[index]["token"], list[index]["expires"] = token, expires
	own := object{"name": e.name, "id": rand.Text()}
	if index+1 < len(list) && text(list[index+1], "name") == e.name {
		own = list[index+1]
	}
	signed, end, err := e.token(leaf)
	if err != nil {
		return 0, err
	}
	own["token"], own["expires"] = signed, end.Format(time.RFC3339Nano)
	list = append(list[:index+1], own)
	if err := checkPath(list, index, leaf); err != nil {
		return 0, status.Error(codes.PermissionDenied, err.Error())
	}
	setSegments(connection, index+1, list)
	connection["id"] = own["id"]
	return index, nil
}

func (e *endpoint) request(ctx context.Context, in object) (proto.Message, error) {
	connection := at(in, "connection")
	index, err := e.arrive(ctx, connection)
	if err != nil {
		return nil, err
	}
	if text(at(connection, "mechanism"), "type") == "" {
		preferences, _ := in["mechanism_preferences"].([]any)
		for _, preference := range preferences {
			if text(preference.(object), "type") == "KERNEL" {
				connection["mechanism"] = preference
			}
		}
	}
	if text(at(connection, "mechanism"), "type") != "KERNEL" {
		return nil, status.Error(codes.InvalidArgument, "KERNEL is the only mechanism")
	}
	netns, err := grpcfd.FilenameToURL(ownNetns)
	if err != nil {
		return nil, err
	}
	parameters := at(connection, "mechanism", "parameters")
	n := e.number(text(connection, "id"))
	parameters["inodeURL"], parameters["name"] = netns.String(), fmt.Sprintf("%s-%d", e.iface, n)
	context := at(connection, "context")
	context["MTU"] = 1400
	ip := at(context, "ip_context")
	gateway := fmt.Sprintf("172.16.%d.1", n)
	ip["src_ip_addrs"] = []any{fmt.Sprintf("172.16.%d.2/24", n), fmt.Sprintf("fd00:%d::2/64", n), "20.0.0.1/32"}
	ip["dst_ip_addrs"] = []any{gateway + "/24", fmt.Sprintf("fd00:%d::1/64", n)}
	ip["policies"] = []any{object{"from": "20.0.0.1/32", "routes": []any{object{"prefix": "0.0.0.0/0", "nextHop": gateway}}}}

	fds, ok := grpcfd.FromContext(ctx)
	if !ok {
		return nil, errors.New("the transport carries no descriptors")
	}
	select {
	case err := <-fds.SendFilename(ownNetns):
		if err != nil {
			return nil, err
		}
	default:
	}
	e.remember(connection, "UPDATE")
	_, list := segments(connection)
	var names []any
	for _, segment := range list {
		names = append(names, segment["name"])
	}
	say("requested", "id", connection["id"], "segments", names)

	setSegments(connection, index, list)
	connection["id"] = list[index]["id"]
	return e.message("connection.Connection", connection)
}

// number returns the number of a connection, from 1; the same at every refresh.
func (e *endpoint) number(id string) int {
	e.lock.Lock()
	defer e.lock.Unlock()
	if e.numbers[id] == 0 {
		e.numbers[id] = len(e.numbers) + 1
	}
	return e.numbers[id]
}

func (e *endpoint) close(ctx context.Context, connection object) (proto.Message, error) {
	if _, err := e.arrive(ctx, connection); err != nil {
		return nil, err
	}
	e.remember(connection, "DELETE")
	say("closed", "id", connection["id"])
	return &emptypb.Empty{}, nil
}

// remember keeps a connection, or forgets it, and tells all watchers.
func (e *endpoint) remember(connection object, kind string) {
	// A copy of its own: the caller's goes on changing.
	message, err := e.message("connection.Connection", connection)
	if err != nil {
		return
	}
	kept, err := content(message)
	if err != nil {
		return
	}
	e.lock.Lock()
	defer e.lock.Unlock()
	id := text(kept, "id")
	e.connections[id] = kept
	if kind == "DELETE" {
		delete(e.connections, id)
	}
	for watcher := range e.watchers {
		select {
		case watcher <- object{"type": kind, "connections": object{id: kept}}:
		default: // It reads too slowly to be of use in a test.
			say("watcher too slow")
		}
	}
}

// monitor sends what there is to everybody, whatever they have selected, and then every change.
func (e *endpoint) monitor(_ any, stream grpc.ServerStream) error {
	in, err := e.empty("connection.MonitorScopeSelector")
	if err != nil {
		return err
	}
	if err := stream.RecvMsg(in); err != nil {
		return err
	}
	events := make(chan object, 100)
	e.lock.Lock()
	all := object{}
	for id, connection := range e.connections {
		all[id] = connection
	}
	events <- object{"type": "INITIAL_STATE_TRANSFER", "connections": all}
	e.watchers[events] = true
	e.lock.Unlock()
	defer func() {
		e.lock.Lock()
		defer e.lock.Unlock()
		delete(e.watchers, events)
	}()
	for {
		select {
		case <-stream.Context().Done():
			return nil
		case event := <-events:
			message, err := e.message("connection.ConnectionEvent", event)
			if err != nil {
				return err
			}
			if err := stream.SendMsg(message); err != nil {
				return err
			}
		}
	}
}
