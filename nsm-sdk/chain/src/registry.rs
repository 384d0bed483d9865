//! What elements ask a registry.

use crate::Error;
use futures_util::stream::BoxStream;
pub use nsm_proto::registry::{NetworkService, NetworkServiceEndpoint};
use std::collections::BTreeMap;
use tokio::time::Instant;

/// Looks up network services and endpoints. A look-up ends at `deadline`, which is that of the call it is for; without one the
/// implementation bounds it.
#[async_trait::async_trait]
pub trait Registry: Send + Sync + 'static {
    /// The services that match the template, as they are now. Unset fields match everything.
    async fn find_ns(&self, query: NetworkService, deadline: Option<Instant>) -> Result<Vec<NetworkService>, Error>;
    /// The service of this name: as it is now, if there is one, then each change of it. Ends when the registry is lost.
    async fn watch_ns(&self, name: &str) -> Result<BoxStream<'static, NetworkService>, Error>;
    /// The endpoints that match the template, as they are now. A URL in the template matches every URL it is part of.
    async fn find_nse(
        &self,
        query: NetworkServiceEndpoint,
        deadline: Option<Instant>,
    ) -> Result<Vec<NetworkServiceEndpoint>, Error>;
    /// Those of `endpoints` that the service's matches allow for a request with these labels, best first.
    fn match_endpoints(
        &self,
        service: &NetworkService,
        labels: &BTreeMap<String, String>,
        endpoints: &[NetworkServiceEndpoint],
    ) -> Vec<NetworkServiceEndpoint>;
    /// The same for forwarders, which are endpoints of `forwarder_service`.
    fn match_forwarders(
        &self,
        service: &NetworkService,
        labels: &BTreeMap<String, String>,
        forwarders: &[NetworkServiceEndpoint],
        forwarder_service: &str,
    ) -> Vec<NetworkServiceEndpoint>;
}

/// The service of exactly this name (and payload, if given).
pub(crate) async fn service(
    registry: &dyn Registry,
    name: &str,
    payload: &str,
    deadline: Option<Instant>,
) -> Result<Option<NetworkService>, Error> {
    let query = NetworkService { name: name.to_owned(), payload: payload.to_owned(), ..Default::default() };
    Ok(registry.find_ns(query, deadline).await?.into_iter().find(|service| service.name == name))
}

/// The endpoint of exactly this name, among those whose URL contains `url`.
pub(crate) async fn endpoint(
    registry: &dyn Registry,
    name: &str,
    url: &str,
    deadline: Option<Instant>,
) -> Result<Option<NetworkServiceEndpoint>, Error> {
    let query = NetworkServiceEndpoint { name: name.to_owned(), url: url.to_owned(), ..Default::default() };
    Ok(registry.find_nse(query, deadline).await?.into_iter().find(|endpoint| endpoint.name == name))
}
