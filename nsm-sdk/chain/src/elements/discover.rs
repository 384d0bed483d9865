//! Finds endpoints for a request.

use crate::{
    Candidates, CloseCall, Connection, Context, Element, Error, Next, RequestCall, clock,
    registry::{NetworkServiceEndpoint, Registry, endpoint, service},
};
use std::sync::Arc;
use tokio::time::Instant;
use tonic::Code;

/// Puts the URL of the endpoint that is named, or all candidates of the service, into the context. Does not wait for
/// anything to appear.
pub struct Discover(Arc<dyn Registry>);

const NAME: &str = "discover";

impl Discover {
    /// An element that asks `registry`.
    pub fn new(registry: Arc<dyn Registry>) -> Self {
        Self(registry)
    }

    async fn candidates(&self, connection: &Connection, deadline: Option<Instant>) -> Result<Candidates, Error> {
        let missing = |text: String| Error::new(NAME, &connection.id, text).with_code(Code::NotFound);
        let name = &connection.network_service;
        let network_service = service(&*self.0, name, &connection.payload, deadline)
            .await?
            .ok_or_else(|| missing(format!("network service {name} is not found")))?;
        let query = NetworkServiceEndpoint { network_service_names: vec![name.clone()], ..Default::default() };
        let now = clock::now();
        let alive = |endpoint: &NetworkServiceEndpoint| {
            endpoint.expiration_time.as_ref().is_none_or(|end| clock::from_timestamp(end) > now)
        };
        let mut found = self.0.find_nse(query, deadline).await?;
        found.retain(alive);
        let endpoints = self.0.match_endpoints(&network_service, &connection.labels, &found);
        if endpoints.is_empty() {
            return Err(missing(format!("network service endpoint candidates not found for {name}")));
        }
        Ok(Candidates { network_service, endpoints })
    }

    async fn url(&self, connection: &Connection, deadline: Option<Instant>) -> Result<String, Error> {
        let name = &connection.network_service_endpoint_name;
        let found = endpoint(&*self.0, name, "", deadline).await?;
        found.map(|endpoint| endpoint.url).ok_or_else(|| {
            let text = format!("network service endpoint {name} not found");
            Error::new(NAME, &connection.id, text).with_code(Code::NotFound)
        })
    }

    async fn find(&self, ctx: &mut Context, connection: &mut Connection) -> Result<(), Error> {
        if !connection.network_service_endpoint_name.is_empty() {
            ctx.client_url = Some(self.url(connection, ctx.deadline).await?);
        } else {
            let candidates = self.candidates(connection, ctx.deadline).await?;
            connection.payload.clone_from(&candidates.network_service.payload);
            ctx.candidates = Some(Arc::new(candidates));
        }
        Ok(())
    }
}

#[async_trait::async_trait]
impl Element for Discover {
    fn name(&self) -> &'static str {
        NAME
    }

    async fn request(&self, mut call: RequestCall, next: Next) -> Result<Connection, Error> {
        if call.ctx.client_url.is_none() {
            let RequestCall { message, ctx } = &mut call;
            let connection = message.connection.get_or_insert_default();
            self.find(ctx, connection).await.map_err(|error| error.about(&connection.id))?;
        }
        next.request(call).await
    }

    async fn close(&self, mut call: CloseCall, next: Next) -> Result<(), Error> {
        if call.ctx.client_url.is_none() {
            match self.url(&call.message, call.ctx.deadline).await {
                Ok(url) => call.ctx.client_url = Some(url),
                Err(error) => tracing::info!(%error, "closing without the endpoint's URL"),
            }
        }
        next.close(call).await
    }
}

#[cfg(test)]
mod tests;
