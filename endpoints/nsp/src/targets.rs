//! The gRPC service `TargetRegistry`.

use meridio_proto::nsp::v1::target_registry_server::TargetRegistry;
use meridio_proto::nsp::v1::{Target, TargetResponse};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

use crate::filter;
use crate::registry::{Registry, Snapshot};
use crate::snapshot::{Updates, updates};

/// Answers from the registry.
#[derive(Debug)]
pub(crate) struct Targets {
    registry: Registry,
    stop: CancellationToken,
}

impl Targets {
    pub(crate) fn new(registry: Registry, stop: CancellationToken) -> Self {
        Self { registry, stop }
    }
}

/// Runs a change in a task of its own: a caller that leaves must not part the store from the memory.
async fn detached<F>(change: F) -> Result<Response<()>, Status>
where
    F: Future<Output = Result<(), crate::Error>> + Send + 'static,
{
    let result = tokio::spawn(change).await.map_err(|e| Status::internal(e.to_string()))?;
    result.map_err(|error| {
        tracing::warn!(%error, "request refused");
        Status::from(error)
    })?;
    Ok(Response::new(()))
}

#[tonic::async_trait]
impl TargetRegistry for Targets {
    async fn register(&self, request: Request<Target>) -> Result<Response<()>, Status> {
        let (registry, target) = (self.registry.clone(), request.into_inner());
        detached(async move { registry.register(target).await }).await
    }

    async fn unregister(&self, request: Request<Target>) -> Result<Response<()>, Status> {
        let (registry, target) = (self.registry.clone(), request.into_inner());
        detached(async move {
            registry.unregister(&target).await;
            Ok(())
        })
        .await
    }

    type WatchStream = Updates<TargetResponse>;

    async fn watch(&self, request: Request<Target>) -> Result<Response<Self::WatchStream>, Status> {
        let pattern = request.into_inner();
        let answer = move |all: &Snapshot| TargetResponse {
            targets: all
                .iter()
                .filter(|target| filter::target(&pattern, target))
                .map(|target| (**target).clone())
                .collect(),
        };
        Ok(Response::new(updates(self.registry.watch(), self.stop.clone(), answer)))
    }
}
