//! Looking things up in the registry of the node, for the elements that route.

use meridio_proto::nsm::registry::{NetworkService, NetworkServiceEndpoint};
use nsm_chain::Error;
use nsm_registry::{Chain, Context};
use std::time::{Duration, SystemTime};
use tokio::time::Instant;

/// What one look-up may take.
const TIMEOUT: Duration = Duration::from_secs(5);
/// Pause between look-ups for an endpoint that is expected back.
const AGAIN: Duration = Duration::from_millis(50);

/// Reads a registry: services and endpoints.
#[derive(Clone)]
pub struct Finder {
    services: Chain<NetworkService>,
    endpoints: Chain<NetworkServiceEndpoint>,
    /// Until then endpoints that are not found are waited for.
    settled: Instant,
    patience: Duration,
}

impl Finder {
    /// Reads these chains.
    pub fn new(services: Chain<NetworkService>, endpoints: Chain<NetworkServiceEndpoint>) -> Self {
        Self { services, endpoints, settled: Instant::now(), patience: Duration::ZERO }
    }

    /// For `settling` from now a named endpoint that is not found is waited for, up to `patience` per look-up: after a
    /// restart of the manager its endpoints need a moment to register again, while clients already ask for them.
    #[must_use]
    pub fn settling(mut self, settling: Duration, patience: Duration) -> Self {
        self.settled = Instant::now() + settling;
        self.patience = patience;
        self
    }

    fn context(deadline: Option<Instant>) -> Context {
        Context { deadline, ..Context::new() }.with_timeout(TIMEOUT)
    }

    /// The service of exactly that name and, if given, payload.
    pub async fn service(
        &self,
        element: &'static str,
        id: &str,
        name: &str,
        payload: &str,
        deadline: Option<Instant>,
    ) -> Result<NetworkService, Error> {
        let template = NetworkService { name: name.into(), payload: payload.into(), ..Default::default() };
        let found = self.services.list(template, Self::context(deadline)).await;
        let found = found.map_err(|cause| Error::new(element, id, "cannot ask the registry").with_cause(cause))?;
        found
            .into_iter()
            .find(|service| service.name == name)
            .ok_or_else(|| Error::new(element, id, format!("network service {name} is not found")))
    }

    /// The endpoints like `template` that have not expired.
    pub async fn endpoints(
        &self,
        element: &'static str,
        id: &str,
        template: NetworkServiceEndpoint,
        deadline: Option<Instant>,
    ) -> Result<Vec<NetworkServiceEndpoint>, Error> {
        let found = self.endpoints.list(template, Self::context(deadline)).await;
        let mut found = found.map_err(|cause| Error::new(element, id, "cannot ask the registry").with_cause(cause))?;
        let now = SystemTime::now();
        found.retain(|endpoint| nsm_registry::Object::expiration(endpoint).is_none_or(|end| end > now));
        Ok(found)
    }

    /// The endpoint of exactly that name.
    pub async fn endpoint(
        &self,
        element: &'static str,
        id: &str,
        name: &str,
        deadline: Option<Instant>,
    ) -> Result<NetworkServiceEndpoint, Error> {
        let patience = (Instant::now() + self.patience).min(deadline.unwrap_or(Instant::now() + TIMEOUT));
        loop {
            let template = NetworkServiceEndpoint { name: name.into(), ..Default::default() };
            let found = self.endpoints(element, id, template, deadline).await?;
            if let Some(endpoint) = found.into_iter().find(|endpoint| endpoint.name == name) {
                return Ok(endpoint);
            }
            let now = Instant::now();
            if now >= self.settled || now >= patience {
                return Err(Error::new(element, id, format!("network service endpoint {name} not found")));
            }
            tokio::time::sleep(AGAIN).await;
        }
    }
}
