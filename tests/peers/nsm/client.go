package main

import (
	"context"
	"errors"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/networkservicemesh/api/pkg/api/networkservice"
	"github.com/networkservicemesh/api/pkg/api/networkservice/mechanisms/cls"
	kernelmech "github.com/networkservicemesh/api/pkg/api/networkservice/mechanisms/kernel"
	"github.com/networkservicemesh/sdk/pkg/networkservice/chains/client"
	"github.com/networkservicemesh/sdk/pkg/networkservice/common/authorize"
	"github.com/networkservicemesh/sdk/pkg/networkservice/common/heal"
	"github.com/networkservicemesh/sdk/pkg/networkservice/common/mechanisms"
	"github.com/networkservicemesh/sdk/pkg/networkservice/common/mechanisms/kernel"
	"github.com/networkservicemesh/sdk/pkg/networkservice/common/mechanisms/sendfd"
	"github.com/networkservicemesh/sdk/pkg/networkservice/common/retry"
	"github.com/networkservicemesh/sdk/pkg/tools/grpcutils"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/encoding/protojson"
)

const tryTimeout = 5 * time.Second

// alive says that the data path works, so that nothing but its own refresh ever changes the connection.
func alive(context.Context, *networkservice.Connection) bool { return true }

func keepConnection(ctx context.Context, s settings, self *identity) error {
	if s.name == "" || s.service == "" || s.connectTo == nil {
		return errors.New("NSM_NAME, NSM_SERVICE_NAME and NSM_CONNECT_TO: not all are set")
	}
	// The chain's tasks go on while the connection is closed.
	life, stop := context.WithCancel(context.Background())
	defer stop()
	nsc := retry.NewClient(client.NewClient(life,
		client.WithName(s.name),
		client.WithClientURL(s.connectTo),
		client.WithDialOptions(self.dial()...),
		client.WithDialTimeout(dialTimeout),
		client.WithAuthorizeClient(authorize.NewClient()),
		client.WithHealClient(heal.NewClient(life, heal.WithLivenessCheck(alive))),
		client.WithAdditionalFunctionality(
			mechanisms.NewClient(map[string]networkservice.NetworkServiceClient{
				kernelmech.MECHANISM: kernel.NewClient(kernel.WithInterfaceName(s.iface)),
			}),
			sendfd.NewClient(),
		),
	), retry.WithTryTimeout(tryTimeout))

	request := &networkservice.NetworkServiceRequest{
		Connection:           &networkservice.Connection{Id: s.name + "-0", NetworkService: s.service},
		MechanismPreferences: []*networkservice.Mechanism{{Cls: cls.LOCAL, Type: kernelmech.MECHANISM}},
	}
	now := make(chan os.Signal, 1)
	signal.Notify(now, syscall.SIGUSR1)
	for event := "connected"; ; event = "refreshed" {
		began := time.Now()
		connection, err := nsc.Request(ctx, request.Clone())
		if err != nil {
			return err
		}
		say(event, "ms", time.Since(began).Milliseconds(), "connection", asJSON{connection})
		if event == "connected" {
			go watch(life, s, self, connection.GetId())
		}
		request.Connection = connection
		select {
		case <-ctx.Done():
			within, cancel := context.WithTimeout(context.Background(), tryTimeout)
			defer cancel()
			if _, err := nsc.Close(within, connection); err != nil {
				return err
			}
			say("closed")
			return nil
		case <-now:
		}
	}
}

type asJSON struct{ *networkservice.Connection }

// MarshalJSON writes the message under the field names of the .proto files.
func (c asJSON) MarshalJSON() ([]byte, error) {
	return protojson.MarshalOptions{UseProtoNames: true}.Marshal(c.Connection)
}

// watch prints every monitor event of the connection.
func watch(ctx context.Context, s settings, self *identity, id string) {
	for ctx.Err() == nil {
		if err := events(ctx, s, self, id); ctx.Err() == nil {
			say("monitor ended", "cause", err)
			time.Sleep(100 * time.Millisecond)
		}
	}
}

func events(ctx context.Context, s settings, self *identity, id string) error {
	manager, err := grpc.DialContext(ctx, grpcutils.URLToTarget(s.connectTo), self.dial()...)
	if err != nil {
		return err
	}
	defer func() { _ = manager.Close() }()
	stream, err := networkservice.NewMonitorConnectionClient(manager).MonitorConnections(ctx, &networkservice.MonitorScopeSelector{
		PathSegments: []*networkservice.PathSegment{{Id: id, Name: s.name}},
	})
	if err != nil {
		return err
	}
	for {
		event, err := stream.Recv()
		if err != nil {
			return err
		}
		for _, connection := range event.GetConnections() {
			say("monitor", "type", event.GetType().String(), "state", connection.GetState().String())
		}
	}
}
