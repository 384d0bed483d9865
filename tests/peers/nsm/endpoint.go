package main

import (
	"context"
	"errors"
	"net"
	"time"

	"github.com/networkservicemesh/api/pkg/api/networkservice"
	kernelmech "github.com/networkservicemesh/api/pkg/api/networkservice/mechanisms/kernel"
	"github.com/networkservicemesh/api/pkg/api/registry"
	"github.com/networkservicemesh/sdk/pkg/networkservice/chains/endpoint"
	"github.com/networkservicemesh/sdk/pkg/networkservice/common/authorize"
	"github.com/networkservicemesh/sdk/pkg/networkservice/common/mechanisms"
	"github.com/networkservicemesh/sdk/pkg/networkservice/common/mechanisms/kernel"
	"github.com/networkservicemesh/sdk/pkg/networkservice/common/mechanisms/recvfd"
	"github.com/networkservicemesh/sdk/pkg/networkservice/common/mechanisms/sendfd"
	"github.com/networkservicemesh/sdk/pkg/networkservice/common/policyroute"
	"github.com/networkservicemesh/sdk/pkg/networkservice/core/next"
	"github.com/networkservicemesh/sdk/pkg/networkservice/ipam/point2pointipam"
	registryclient "github.com/networkservicemesh/sdk/pkg/registry/chains/client"
	registryauthorize "github.com/networkservicemesh/sdk/pkg/registry/common/authorize"
	registrysendfd "github.com/networkservicemesh/sdk/pkg/registry/common/sendfd"
	authmonitor "github.com/networkservicemesh/sdk/pkg/tools/monitorconnection/authorize"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/emptypb"
)

const (
	policyFrom = "20.0.0.1/32"
	mtu        = 1400
)

// reporter prints what reaches the endpoint, and sets the MTU.
type reporter struct{}

func (reporter) Request(ctx context.Context, request *networkservice.NetworkServiceRequest) (*networkservice.Connection, error) {
	connection := request.GetConnection()
	if connection.Context == nil {
		connection.Context = new(networkservice.ConnectionContext)
	}
	connection.Context.MTU = mtu
	var names []string
	for _, segment := range connection.GetPath().GetPathSegments() {
		names = append(names, segment.GetName())
	}
	say("requested", "id", connection.GetId(), "segments", names)
	return next.Server(ctx).Request(ctx, request)
}

func (reporter) Close(ctx context.Context, connection *networkservice.Connection) (*emptypb.Empty, error) {
	say("closed", "id", connection.GetId())
	return next.Server(ctx).Close(ctx, connection)
}

// policies sends all traffic from an address of the client's into the interface.
func policies() []*networkservice.PolicyRoute {
	routes := []*networkservice.Route{{Prefix: "0.0.0.0/0"}}
	return []*networkservice.PolicyRoute{{From: policyFrom, Routes: routes}}
}

func serveEndpoint(ctx context.Context, s settings, self *identity) error {
	if s.name == "" || s.service == "" || s.connectTo == nil || len(s.listenOn) != 1 {
		return errors.New("NSM_NAME, NSM_SERVICE_NAME, NSM_CONNECT_TO, NSM_LISTEN_ON: one of each is needed")
	}
	_, ipv4, err := net.ParseCIDR("172.16.0.0/24")
	if err != nil {
		return err
	}
	_, ipv6, err := net.ParseCIDR("fd00::/64")
	if err != nil {
		return err
	}
	chain := endpoint.NewServer(ctx, self.tokens,
		endpoint.WithName(s.name),
		endpoint.WithAuthorizeServer(authorize.NewServer()),
		endpoint.WithAuthorizeMonitorConnectionServer(authmonitor.NewMonitorConnectionServer()),
		endpoint.WithAdditionalFunctionality(
			reporter{},
			point2pointipam.NewServer(ipv4),
			point2pointipam.NewServer(ipv6),
			policyroute.NewServer(policies),
			recvfd.NewServer(),
			mechanisms.NewServer(map[string]networkservice.NetworkServiceServer{
				kernelmech.MECHANISM: kernel.NewServer(),
			}),
			sendfd.NewServer(),
		),
	)
	server := grpc.NewServer(self.server())
	chain.Register(server)
	// These end after the endpoint has unregistered.
	life, stop := context.WithCancel(context.Background())
	defer stop()
	failed := make(chan error, 1)
	go func() { failed <- serve(life, server, s.listenOn) }()

	services, endpoints := registryClients(life, s, self)
	if _, err := services.Register(ctx, &registry.NetworkService{Name: s.service, Payload: "ETHERNET"}); err != nil {
		return err
	}
	registration, err := endpoints.Register(ctx, &registry.NetworkServiceEndpoint{
		Name: s.name, NetworkServiceNames: []string{s.service}, Url: s.listenOn[0].String(),
	})
	if err != nil {
		return err
	}
	say("registered", "name", registration.GetName())
	select {
	case err := <-failed:
		return err
	case <-ctx.Done():
	}
	within, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	if _, err := endpoints.Unregister(within, registration); err != nil {
		return err
	}
	say("unregistered")
	return nil
}

func registryClients(
	ctx context.Context, s settings, self *identity,
) (registry.NetworkServiceRegistryClient, registry.NetworkServiceEndpointRegistryClient) {
	services := registryclient.NewNetworkServiceRegistryClient(ctx,
		registryclient.WithClientURL(s.connectTo),
		registryclient.WithDialOptions(self.dial()...),
		registryclient.WithDialTimeout(dialTimeout),
		registryclient.WithAuthorizeNSRegistryClient(registryauthorize.NewNetworkServiceRegistryClient(newOwners())),
	)
	endpoints := registryclient.NewNetworkServiceEndpointRegistryClient(ctx,
		registryclient.WithClientURL(s.connectTo),
		registryclient.WithDialOptions(self.dial()...),
		registryclient.WithDialTimeout(dialTimeout),
		registryclient.WithNSEAdditionalFunctionality(registrysendfd.NewNetworkServiceEndpointRegistryClient()),
		registryclient.WithAuthorizeNSERegistryClient(registryauthorize.NewNetworkServiceEndpointRegistryClient(newOwners())),
	)
	return services, endpoints
}
