//! The gRPC services over a chain.

use crate::{Call, Chain, ClientToken, Context, Event, Object, PathHandle, Query, RegistryPath};
use futures_util::{StreamExt, stream::BoxStream};
use nsm_proto::registry as wire;
use nsm_transport::{ConnInfo, client_token, grpc_timeout};
use tonic::{Request, Response, Status, service::Routes};
use wire::{
    NetworkService, NetworkServiceEndpoint,
    network_service_endpoint_registry_server::{NetworkServiceEndpointRegistry, NetworkServiceEndpointRegistryServer},
    network_service_registry_server::{NetworkServiceRegistry, NetworkServiceRegistryServer},
};

/// Serves a chain as `registry.NetworkServiceRegistry` or `registry.NetworkServiceEndpointRegistry`.
#[derive(Clone)]
pub struct Service<T>(Chain<T>);

impl<T: Object> Service<T> {
    /// Wraps a chain.
    pub fn new(chain: Chain<T>) -> Self {
        Self(chain)
    }

    async fn register(&self, request: Request<T>) -> Result<Response<T>, Status> {
        let ctx = context(&request);
        let path = ctx.path.clone();
        let answer = self.0.register(Call::new(request.into_inner(), ctx)).await?;
        Ok(respond(answer, path))
    }

    async fn unregister(&self, request: Request<T>) -> Result<Response<()>, Status> {
        let ctx = context(&request);
        let path = ctx.path.clone();
        self.0.unregister(Call::new(request.into_inner(), ctx)).await?;
        Ok(respond((), path))
    }

    async fn find<A: Send + 'static>(
        &self,
        query: Request<Query<T>>,
        answer: fn(Event<T>) -> A,
    ) -> Result<Response<BoxStream<'static, Result<A, Status>>>, Status> {
        let mut ctx = context(&query);
        ctx.path = None;
        let query = query.into_inner();
        if query.watch {
            // A watch ends with its reader, not with the time it took to open it.
            ctx.deadline = None;
        }
        let events = self.0.find(Call::new(query, ctx)).await?;
        Ok(Response::new(Box::pin(events.map(move |event| match event {
            Ok(event) => Ok(answer(event)),
            // Whoever watches takes CANCELLED for its own doing.
            Err(error) if error.code() == tonic::Code::Cancelled => Err(Status::unavailable(error.to_string())),
            Err(error) => Err(error.into()),
        }))))
    }
}

fn context<M>(request: &Request<M>) -> Context {
    let metadata = request.metadata();
    let info = request.extensions().get::<ConnInfo>().cloned().unwrap_or_default();
    let token = client_token(metadata).map(|token| ClientToken { jwt: token.jwt, expires: token.expires });
    let ctx = Context {
        peer: info.peer,
        token,
        fds: info.fds,
        pid: info.unix_cred.and_then(|cred| cred.pid),
        path: Some(RegistryPath::read(metadata).map(PathHandle::new).unwrap_or_default()),
        ..Context::new()
    };
    match grpc_timeout(metadata) {
        Some(timeout) => ctx.with_timeout(timeout),
        None => ctx,
    }
}

fn respond<M>(message: M, path: Option<PathHandle>) -> Response<M> {
    let mut response = Response::new(message);
    if let Some(path) = path {
        path.get().write(response.metadata_mut());
    }
    response
}

fn missing(what: &str) -> Status {
    Status::invalid_argument(format!("the query has no {what}"))
}

#[tonic::async_trait]
impl NetworkServiceRegistry for Service<NetworkService> {
    type FindStream = BoxStream<'static, Result<wire::NetworkServiceResponse, Status>>;

    async fn register(&self, request: Request<NetworkService>) -> Result<Response<NetworkService>, Status> {
        Service::register(self, request).await
    }

    async fn find(&self, request: Request<wire::NetworkServiceQuery>) -> Result<Response<Self::FindStream>, Status> {
        let (metadata, extensions, query) = request.into_parts();
        let template = query.network_service.ok_or_else(|| missing("network service"))?;
        let query = Request::from_parts(metadata, extensions, Query { template, watch: query.watch });
        Service::find(self, query, |event| wire::NetworkServiceResponse {
            network_service: Some(event.object),
            deleted: event.deleted,
        })
        .await
    }

    async fn unregister(&self, request: Request<NetworkService>) -> Result<Response<()>, Status> {
        Service::unregister(self, request).await
    }
}

#[tonic::async_trait]
impl NetworkServiceEndpointRegistry for Service<NetworkServiceEndpoint> {
    type FindStream = BoxStream<'static, Result<wire::NetworkServiceEndpointResponse, Status>>;

    async fn register(
        &self,
        request: Request<NetworkServiceEndpoint>,
    ) -> Result<Response<NetworkServiceEndpoint>, Status> {
        let mut request = request;
        // Never keep what would end at once.
        if request.get_ref().marked_deleted() {
            request.get_mut().expiration_time = None;
        }
        Service::register(self, request).await
    }

    async fn find(
        &self,
        request: Request<wire::NetworkServiceEndpointQuery>,
    ) -> Result<Response<Self::FindStream>, Status> {
        let (metadata, extensions, query) = request.into_parts();
        let template = query.network_service_endpoint.ok_or_else(|| missing("network service endpoint"))?;
        let query = Request::from_parts(metadata, extensions, Query { template, watch: query.watch });
        Service::find(self, query, |event| wire::NetworkServiceEndpointResponse {
            network_service_endpoint: Some(event.object),
            deleted: event.deleted,
        })
        .await
    }

    async fn unregister(&self, request: Request<NetworkServiceEndpoint>) -> Result<Response<()>, Status> {
        Service::unregister(self, request).await
    }
}

/// Adds both services of a registry to a server's routes.
pub fn add_routes(routes: Routes, services: Chain<NetworkService>, endpoints: Chain<NetworkServiceEndpoint>) -> Routes {
    routes
        .add_service(NetworkServiceRegistryServer::new(Service::new(services)))
        .add_service(NetworkServiceEndpointRegistryServer::new(Service::new(endpoints)))
}
