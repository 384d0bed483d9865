package main

import (
	"context"
	"fmt"
	"net/url"
	"time"

	"github.com/edwarnicke/grpcfd"
	"github.com/networkservicemesh/sdk/pkg/tools/grpcutils"
	"github.com/networkservicemesh/sdk/pkg/tools/spiffejwt"
	"github.com/networkservicemesh/sdk/pkg/tools/token"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
)

// identity is what the Workload API says this process is, and the tokens that it signs.
type identity struct {
	source *workloadapi.X509Source
	tokens token.GeneratorFunc
}

func newIdentity(ctx context.Context, lifetime time.Duration) (*identity, error) {
	within, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	source, err := workloadapi.NewX509Source(within)
	if err != nil {
		return nil, fmt.Errorf("workload API: %w", err)
	}
	svid, err := source.GetX509SVID()
	if err != nil {
		return nil, err
	}
	say("identity", "id", svid.ID.String())
	return &identity{source, spiffejwt.TokenGeneratorFunc(source, lifetime)}, nil
}

// server returns mutual TLS that carries file descriptors.
func (i *identity) server() grpc.ServerOption {
	config := tlsconfig.MTLSServerConfig(i.source, i.source, tlsconfig.AuthorizeAny())
	return grpc.Creds(grpcfd.TransportCredentials(credentials.NewTLS(config)))
}

// dial returns the same for whoever calls, with a token for the peer in each call's headers.
func (i *identity) dial() []grpc.DialOption {
	config := tlsconfig.MTLSClientConfig(i.source, i.source, tlsconfig.AuthorizeAny())
	return []grpc.DialOption{
		grpc.WithTransportCredentials(grpcfd.TransportCredentials(credentials.NewTLS(config))),
		grpc.WithDefaultCallOptions(
			grpc.WaitForReady(true),
			grpc.PerRPCCredentials(token.NewPerRPCCredentials(i.tokens)),
		),
		grpcfd.WithChainStreamInterceptor(),
		grpcfd.WithChainUnaryInterceptor(),
	}
}

// serve listens on all addresses until the context ends or one of them fails.
func serve(ctx context.Context, server *grpc.Server, listenOn []*url.URL) error {
	failed := make(chan error, len(listenOn))
	for _, address := range listenOn {
		errs := grpcutils.ListenAndServe(ctx, address, server)
		go func() {
			if err := <-errs; err != nil {
				failed <- fmt.Errorf("%s: %w", address, err)
			}
		}()
	}
	select {
	case err := <-failed:
		return err
	case <-ctx.Done():
		return nil
	}
}
