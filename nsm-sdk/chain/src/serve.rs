//! A chain as gRPC services.

use crate::{
    Chain, CloseCall, Connection, Context, FdTransceiver, NetworkServiceRequest, RequestCall,
    elements::{authorize::Callers, monitor::Hub},
    events::MonitorServer,
};
use nsm_proto::networkservice::network_service_server::{NetworkService, NetworkServiceServer};
use nsm_transport::{ConnInfo, client_token, grpc_timeout};
use tokio::time::Instant;
use tonic::{Request, Response, Status, service::Routes};

/// Answers `networkservice.NetworkService` and `connection.MonitorConnection` from a chain and its hub.
#[derive(Clone, Debug)]
pub struct ChainService {
    chain: Chain,
    hub: Hub,
    callers: Option<Callers>,
}

impl ChainService {
    /// Both services of one endpoint.
    pub fn new(chain: Chain, hub: Hub) -> Self {
        Self { chain, hub, callers: None }
    }

    /// Only who has a connection may watch it, as far as `callers` knows.
    #[must_use]
    pub fn guarded(mut self, callers: Option<Callers>) -> Self {
        self.callers = callers;
        self
    }

    /// The gRPC server of `networkservice.NetworkService`.
    pub fn network_service(&self) -> NetworkServiceServer<Self> {
        NetworkServiceServer::new(self.clone())
    }

    /// The gRPC server of `connection.MonitorConnection`.
    pub fn monitor(&self) -> MonitorServer {
        MonitorServer::new(self.hub.clone()).guarded(self.callers.clone())
    }

    /// Both, for a server of their own; add registries and health to it.
    pub fn routes(&self) -> Routes {
        Routes::new(self.network_service()).add_service(self.monitor())
    }
}

/// What a call's transport and metadata say: deadline, peer, token, descriptors.
pub fn context<M>(request: &Request<M>) -> Context {
    let info = request.extensions().get::<ConnInfo>();
    Context {
        deadline: grpc_timeout(request.metadata()).map(|timeout| Instant::now() + timeout),
        peer: info.and_then(|info| info.peer.clone()),
        token: client_token(request.metadata()),
        fds: info.and_then(|info| info.fds.clone()).map(FdTransceiver::new),
        ..Context::default()
    }
}

#[tonic::async_trait]
impl NetworkService for ChainService {
    async fn request(&self, request: Request<NetworkServiceRequest>) -> Result<Response<Connection>, Status> {
        let ctx = context(&request);
        let call = RequestCall::new(request.into_inner(), ctx);
        match self.chain.request(call).await {
            Ok(connection) => Ok(Response::new(connection)),
            Err(error) => {
                tracing::info!(%error, "request failed");
                Err(error.into())
            }
        }
    }

    async fn close(&self, request: Request<Connection>) -> Result<Response<()>, Status> {
        let ctx = context(&request);
        let call = CloseCall::new(request.into_inner(), ctx);
        match self.chain.close(call).await {
            Ok(()) => Ok(Response::new(())),
            Err(error) => {
                tracing::info!(%error, "close failed");
                Err(error.into())
            }
        }
    }
}
