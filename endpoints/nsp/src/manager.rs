//! The gRPC service `ConfigurationManager`.

use std::sync::Arc;

use meridio_model::NspLists;
use meridio_proto::nsp::v1::configuration_manager_server::ConfigurationManager;
use meridio_proto::nsp::v1::{
    Attractor, AttractorResponse, Conduit, ConduitResponse, Flow, FlowResponse, Gateway, GatewayResponse, Stream,
    StreamResponse, Trench, TrenchResponse, Vip, VipResponse,
};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

use crate::filter;
use crate::snapshot::{Updates, updates};

/// Answers the seven watches from the latest configuration.
#[derive(Debug)]
pub(crate) struct Manager {
    lists: watch::Receiver<Arc<NspLists>>,
    stop: CancellationToken,
}

impl Manager {
    pub(crate) fn new(lists: watch::Receiver<Arc<NspLists>>, stop: CancellationToken) -> Self {
        Self { lists, stop }
    }

    fn watch<M>(&self, answer: impl Fn(&NspLists) -> M + Send + 'static) -> Result<Response<Updates<M>>, Status>
    where
        M: Clone + PartialEq + Send + 'static,
    {
        Ok(Response::new(updates(self.lists.clone(), self.stop.clone(), move |lists: &Arc<NspLists>| answer(lists))))
    }
}

/// The items that match a pattern.
fn matching<T: Clone>(pattern: &T, items: &[T], matches: fn(&T, &T) -> bool) -> Vec<T> {
    items.iter().filter(|item| matches(pattern, item)).cloned().collect()
}

#[tonic::async_trait]
impl ConfigurationManager for Manager {
    type WatchTrenchStream = Updates<TrenchResponse>;

    async fn watch_trench(&self, request: Request<Trench>) -> Result<Response<Self::WatchTrenchStream>, Status> {
        let pattern = request.into_inner();
        self.watch(move |lists| TrenchResponse {
            trench: (lists.trench.name == pattern.name).then(|| lists.trench.clone()),
        })
    }

    type WatchConduitStream = Updates<ConduitResponse>;

    async fn watch_conduit(&self, request: Request<Conduit>) -> Result<Response<Self::WatchConduitStream>, Status> {
        let pattern = request.into_inner();
        self.watch(move |lists| ConduitResponse { conduits: matching(&pattern, &lists.conduits, filter::conduit) })
    }

    type WatchStreamStream = Updates<StreamResponse>;

    async fn watch_stream(&self, request: Request<Stream>) -> Result<Response<Self::WatchStreamStream>, Status> {
        let pattern = request.into_inner();
        self.watch(move |lists| StreamResponse { streams: matching(&pattern, &lists.streams, filter::stream) })
    }

    type WatchFlowStream = Updates<FlowResponse>;

    async fn watch_flow(&self, request: Request<Flow>) -> Result<Response<Self::WatchFlowStream>, Status> {
        let pattern = request.into_inner();
        self.watch(move |lists| FlowResponse { flows: matching(&pattern, &lists.flows, filter::flow) })
    }

    type WatchVipStream = Updates<VipResponse>;

    async fn watch_vip(&self, request: Request<Vip>) -> Result<Response<Self::WatchVipStream>, Status> {
        let pattern = request.into_inner();
        self.watch(move |lists| VipResponse { vips: matching(&pattern, &lists.vips, filter::vip) })
    }

    type WatchAttractorStream = Updates<AttractorResponse>;

    async fn watch_attractor(
        &self,
        request: Request<Attractor>,
    ) -> Result<Response<Self::WatchAttractorStream>, Status> {
        let pattern = request.into_inner();
        self.watch(move |lists| AttractorResponse {
            attractors: matching(&pattern, &lists.attractors, filter::attractor),
        })
    }

    type WatchGatewayStream = Updates<GatewayResponse>;

    async fn watch_gateway(&self, request: Request<Gateway>) -> Result<Response<Self::WatchGatewayStream>, Status> {
        let pattern = request.into_inner();
        self.watch(move |lists| GatewayResponse { gateways: matching(&pattern, &lists.gateways, filter::gateway) })
    }
}
