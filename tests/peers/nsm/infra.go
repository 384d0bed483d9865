package main

import (
	"context"
	"errors"
	"time"

	"github.com/edwarnicke/genericsync"
	"github.com/networkservicemesh/sdk/pkg/networkservice/chains/nsmgr"
	"github.com/networkservicemesh/sdk/pkg/networkservice/common/authorize"
	"github.com/networkservicemesh/sdk/pkg/registry/chains/memory"
	registryauthorize "github.com/networkservicemesh/sdk/pkg/registry/common/authorize"
	authmonitor "github.com/networkservicemesh/sdk/pkg/tools/monitorconnection/authorize"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
)

// How long a manager waits for what it dials: time enough for a machine under load.
const dialTimeout = 5 * time.Second

// owners remembers who has registered what, for the registry's policy.
type owners = registryauthorize.Option

func newOwners() owners {
	return registryauthorize.WithResourcePathIDsMap(new(genericsync.Map[string, []string]))
}

func serveRegistry(ctx context.Context, s settings, self *identity) error {
	if len(s.listenOn) == 0 {
		return errors.New("NSM_LISTEN_ON is not set")
	}
	server := grpc.NewServer(self.server())
	memory.NewServer(ctx, self.tokens,
		memory.WithDefaultExpiration(s.lifetime),
		memory.WithDialOptions(self.dial()...),
		memory.WithAuthorizeNSRegistryServer(registryauthorize.NewNetworkServiceRegistryServer(newOwners())),
		memory.WithAuthorizeNSERegistryServer(registryauthorize.NewNetworkServiceEndpointRegistryServer(newOwners())),
	).Register(server)
	return serve(ctx, server, s.listenOn)
}

func serveManager(ctx context.Context, s settings, self *identity) error {
	if len(s.listenOn) == 0 || s.name == "" {
		return errors.New("NSM_NAME and NSM_LISTEN_ON: not both are set")
	}
	// Who may watch a connection: the ones that it runs through.
	watchers := new(genericsync.Map[spiffeid.ID, *genericsync.Map[string, struct{}]])
	options := []nsmgr.Option{
		nsmgr.WithName(s.name),
		nsmgr.WithDefaultExpiration(s.lifetime),
		nsmgr.WithDialOptions(self.dial()...),
		nsmgr.WithDialTimeout(dialTimeout),
		nsmgr.WithAuthorizeServer(authorize.NewServer(authorize.WithSpiffeIDConnectionMap(watchers))),
		nsmgr.WithAuthorizeMonitorConnectionServer(
			authmonitor.NewMonitorConnectionServer(authmonitor.WithSpiffeIDConnectionMap(watchers))),
		nsmgr.WithAuthorizeNSRegistryServer(registryauthorize.NewNetworkServiceRegistryServer(newOwners())),
		nsmgr.WithAuthorizeNSRegistryClient(registryauthorize.NewNetworkServiceRegistryClient(newOwners())),
		nsmgr.WithAuthorizeNSERegistryServer(registryauthorize.NewNetworkServiceEndpointRegistryServer(newOwners())),
		nsmgr.WithAuthorizeNSERegistryClient(registryauthorize.NewNetworkServiceEndpointRegistryClient(newOwners())),
	}
	// Without one it keeps the registry itself.
	if s.registry != nil {
		options = append(options, nsmgr.WithRegistry(s.registry))
	}
	for _, address := range s.listenOn {
		if address.Scheme == "tcp" {
			options = append(options, nsmgr.WithURL(address.String()))
		}
	}
	server := grpc.NewServer(self.server())
	nsmgr.NewServer(ctx, self.tokens, options...).Register(server)
	return serve(ctx, server, s.listenOn)
}
