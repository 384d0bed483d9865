//! The end of a client chain: the real call. And the joint between a manager and a registry in the same process.

use crate::{Call, Chain, Context, Element, Error, Event, Events, Next, Object, Query, RegistryPath};
use futures_util::StreamExt;
use nsm_proto::registry as wire;
use nsm_transport::{Link, OptionalToken};
use std::{sync::Arc, time::Duration};
use tokio::time::Instant;
use tonic::{Request, Response, Status, Streaming, service::interceptor::InterceptedService, transport::Channel};
use wire::{
    NetworkService, NetworkServiceEndpoint,
    network_service_endpoint_registry_client::NetworkServiceEndpointRegistryClient,
    network_service_registry_client::NetworkServiceRegistryClient,
};

const NAME: &str = "connect";
/// Bound of calls that come without a deadline.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(15);

type Service = InterceptedService<Channel, OptionalToken>;

/// An object that has a gRPC service.
#[async_trait::async_trait]
pub trait Remote: Object {
    /// What a find streams.
    type Answer: Send + 'static;
    /// The unary call.
    async fn call_register(service: Service, request: Request<Self>) -> Result<Response<Self>, Status>;
    /// The unary call.
    async fn call_unregister(service: Service, request: Request<Self>) -> Result<Response<()>, Status>;
    /// The streaming call.
    async fn call_find(service: Service, query: Request<Query<Self>>) -> Result<Streaming<Self::Answer>, Status>;
    /// An answer as an event; `None` if it is empty.
    fn event(answer: Self::Answer) -> Option<Event<Self>>;
}

#[async_trait::async_trait]
impl Remote for NetworkService {
    type Answer = wire::NetworkServiceResponse;

    async fn call_register(service: Service, request: Request<Self>) -> Result<Response<Self>, Status> {
        NetworkServiceRegistryClient::new(service).register(request).await
    }
    async fn call_unregister(service: Service, request: Request<Self>) -> Result<Response<()>, Status> {
        NetworkServiceRegistryClient::new(service).unregister(request).await
    }
    async fn call_find(service: Service, query: Request<Query<Self>>) -> Result<Streaming<Self::Answer>, Status> {
        let query =
            query.map(|query| wire::NetworkServiceQuery { network_service: Some(query.template), watch: query.watch });
        Ok(NetworkServiceRegistryClient::new(service).find(query).await?.into_inner())
    }
    fn event(answer: Self::Answer) -> Option<Event<Self>> {
        let object = answer.network_service?;
        Some(Event { deleted: answer.deleted, object })
    }
}

#[async_trait::async_trait]
impl Remote for NetworkServiceEndpoint {
    type Answer = wire::NetworkServiceEndpointResponse;

    async fn call_register(service: Service, request: Request<Self>) -> Result<Response<Self>, Status> {
        NetworkServiceEndpointRegistryClient::new(service).register(request).await
    }
    async fn call_unregister(service: Service, request: Request<Self>) -> Result<Response<()>, Status> {
        NetworkServiceEndpointRegistryClient::new(service).unregister(request).await
    }
    async fn call_find(service: Service, query: Request<Query<Self>>) -> Result<Streaming<Self::Answer>, Status> {
        let query = query.map(|query| wire::NetworkServiceEndpointQuery {
            network_service_endpoint: Some(query.template),
            watch: query.watch,
        });
        Ok(NetworkServiceEndpointRegistryClient::new(service).find(query).await?.into_inner())
    }
    fn event(answer: Self::Answer) -> Option<Event<Self>> {
        let object = answer.network_service_endpoint?;
        Some(Event { deleted: answer.deleted || object.marked_deleted(), object })
    }
}

/// The client-side element: calls the registry behind the link that `dial` has left in the context.
#[derive(Clone, Copy, Debug, Default)]
pub struct Connect;

fn link(ctx: &Context, object: &str) -> Result<Arc<Link>, Error> {
    ctx.link.clone().ok_or_else(|| {
        Error::new(NAME, object, "no grpc.ClientConnInterface provided").with_code(tonic::Code::Internal)
    })
}

/// The request with the path and what is left of the deadline.
fn request<M>(message: M, ctx: &Context) -> (Request<M>, Instant) {
    let mut request = Request::new(message);
    if let Some(path) = &ctx.path {
        path.get().write(request.metadata_mut());
    }
    let deadline = ctx.deadline.unwrap_or_else(|| Instant::now() + DEFAULT_TIMEOUT);
    request.set_timeout(deadline.saturating_duration_since(Instant::now()));
    (request, deadline)
}

async fn within<R>(object: &str, deadline: Instant, call: impl Future<Output = Result<R, Status>>) -> Result<R, Error> {
    match tokio::time::timeout_at(deadline, call).await {
        Ok(result) => nsm_transport::with_deadline_code(result).map_err(|status| Error::remote(NAME, object, &status)),
        Err(_) => Err(Error::deadline(NAME, object, "the registry's answer")),
    }
}

fn take_path<R>(ctx: &Context, response: &Response<R>) {
    if let (Some(own), Some(path)) = (&ctx.path, RegistryPath::read(response.metadata())) {
        own.set(path);
    }
}

#[async_trait::async_trait]
impl<T: Remote> Element<T> for Connect {
    fn name(&self) -> &'static str {
        NAME
    }

    async fn register(&self, mut call: Call<T>, next: Next<T>) -> Result<T, Error> {
        let name = call.message.name().to_owned();
        let link = link(&call.ctx, &name)?;
        let (request, deadline) = request(call.message, &call.ctx);
        let answer = within(&name, deadline, T::call_register(link.with_token(), request)).await?;
        take_path(&call.ctx, &answer);
        call.message = answer.into_inner();
        next.register(call).await
    }

    async fn find(&self, call: Call<Query<T>>, _next: Next<T>) -> Result<Events<T>, Error> {
        let link = link(&call.ctx, call.message.template.name())?;
        let name = call.message.template.name().to_owned();
        let watch = call.message.watch;
        let mut request = Request::new(call.message);
        let deadline = call.ctx.deadline.unwrap_or_else(|| Instant::now() + DEFAULT_TIMEOUT);
        if !watch {
            request.set_timeout(deadline.saturating_duration_since(Instant::now()));
        }
        let answers = within(&name, deadline, T::call_find(link.with_token(), request)).await?;
        Ok(Box::pin(answers.filter_map(move |answer| {
            // The link lives as long as the stream.
            let _ = &link;
            let event = match answer {
                Ok(answer) => T::event(answer).map(Ok),
                Err(status) => Some(Err(Error::remote(NAME, &name, &status))),
            };
            futures_util::future::ready(event)
        })))
    }

    async fn unregister(&self, call: Call<T>, next: Next<T>) -> Result<(), Error> {
        let name = call.message.name().to_owned();
        let link = link(&call.ctx, &name)?;
        let (request, deadline) = request(call.message.clone(), &call.ctx);
        let answer = within(&name, deadline, T::call_unregister(link.with_token(), request)).await?;
        take_path(&call.ctx, &answer);
        next.unregister(call).await
    }
}

/// The server-side element: another chain first (a client chain, or a registry in this process), then the rest of this one.
pub struct Through<T>(Chain<T>);

impl<T: Object> Through<T> {
    /// Passes everything to `chain`.
    pub fn new(chain: Chain<T>) -> Self {
        Self(chain)
    }

    /// The other chain's own `begin` has to work: it does not know the objects of this one.
    fn outward(ctx: &Context) -> Context {
        Context { factory: None, fds: None, peer: None, link: None, ..ctx.clone() }
    }
}

#[async_trait::async_trait]
impl<T: Object> Element<T> for Through<T> {
    fn name(&self) -> &'static str {
        NAME
    }

    async fn register(&self, call: Call<T>, next: Next<T>) -> Result<T, Error> {
        let outward = Self::outward(&call.ctx);
        let answer = self.0.register(Call::new(call.message, outward.clone())).await?;
        match next.register(Call::new(answer.clone(), call.ctx)).await {
            Ok(answer) => Ok(answer),
            Err(error) => {
                if let Err(cause) = self.0.unregister(Call::new(answer, outward)).await {
                    tracing::warn!(%cause, "cannot undo a registration");
                }
                Err(error)
            }
        }
    }

    async fn find(&self, call: Call<Query<T>>, _next: Next<T>) -> Result<Events<T>, Error> {
        let ctx = Self::outward(&call.ctx);
        self.0.find(Call::new(call.message, ctx)).await
    }

    async fn unregister(&self, call: Call<T>, next: Next<T>) -> Result<(), Error> {
        let outward = Self::outward(&call.ctx);
        let result = self.0.unregister(Call::new(call.message.clone(), outward)).await;
        next.unregister(call).await?;
        result
    }
}

#[cfg(test)]
mod tests;
