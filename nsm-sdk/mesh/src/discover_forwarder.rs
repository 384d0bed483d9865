//! Finds the forwarder of a connection, for a manager.

use crate::find::Finder;
use meridio_proto::nsm::registry::NetworkServiceEndpoint;
use nsm_chain::{CloseCall, Connection, Element, Error, Key, Next, RequestCall, Side, State, path};
use nsm_registry::matching::match_forwarders;

const NAME: &str = "discoverforwarder";

/// Sends a connection to a forwarder of this node that suits its service, and to the same one from then on.
pub struct DiscoverForwarder {
    finder: Finder,
    service: String,
    manager_url: String,
    chosen: Key<String>,
}

impl DiscoverForwarder {
    /// Forwarders are the endpoints of `service` that are registered under this manager's URL.
    pub fn new(finder: Finder, service: impl Into<String>, manager_url: impl Into<String>) -> Self {
        Self { finder, service: service.into(), manager_url: manager_url.into(), chosen: Key::new(Side::Client) }
    }

    fn template(&self, name: &str) -> NetworkServiceEndpoint {
        NetworkServiceEndpoint {
            name: name.into(),
            network_service_names: vec![self.service.clone()],
            url: self.manager_url.clone(),
            ..Default::default()
        }
    }

    /// The forwarders to try, in order.
    async fn forwarders(&self, call: &RequestCall, sticky: &str) -> Result<Vec<NetworkServiceEndpoint>, Error> {
        let (id, deadline, connection) = (call.id(), call.ctx.deadline, call.connection());
        let service = self.finder.service(NAME, id, &connection.network_service, "", deadline).await?;
        let all = self.finder.endpoints(NAME, id, self.template(sticky), deadline).await?;
        let mut found = match_forwarders(&service, &connection.labels, &all, &self.service);
        found.retain(|forwarder| sticky.is_empty() || forwarder.name == sticky);
        if found.is_empty() {
            let text = match sticky {
                "" => "no candidates found: this node has no forwarder for the service".to_owned(),
                sticky => format!("forwarder {sticky} is not available"),
            };
            return Err(Error::new(NAME, id, text));
        }
        // After a restart of this manager the path still tells who it was.
        if sticky.is_empty()
            && let Some(previous) = path::segment(&connection, 1)
        {
            found.sort_by_key(|forwarder| forwarder.name != previous.name);
        }
        Ok(found)
    }
}

#[async_trait::async_trait]
impl Element for DiscoverForwarder {
    fn name(&self) -> &'static str {
        NAME
    }

    async fn request(&self, call: RequestCall, next: Next) -> Result<Connection, Error> {
        if call.ctx.client_url.is_some() {
            return next.request(call).await;
        }
        let metadata = call.ctx.metadata(NAME, call.id())?.clone();
        if call.connection().state() == State::ReselectRequested {
            metadata.remove(&self.chosen);
        }
        let sticky = metadata.get(&self.chosen).unwrap_or_default();
        let mut causes = Vec::new();
        let mut code = tonic::Code::Unknown;
        for forwarder in self.forwarders(&call, &sticky).await? {
            let mut attempt = call.clone();
            attempt.ctx.client_url = Some(forwarder.url.clone());
            match next.request(attempt).await {
                Ok(connection) => {
                    metadata.insert(&self.chosen, forwarder.name);
                    return Ok(connection);
                }
                Err(error) => {
                    code = error.code();
                    causes.push(format!("{}: {error}", forwarder.name));
                }
            }
        }
        let text = format!("all forwarders have failed: {}", causes.join("; "));
        Err(Error::new(NAME, call.id(), text).with_code(code))
    }

    async fn close(&self, mut call: CloseCall, next: Next) -> Result<(), Error> {
        let metadata = call.ctx.metadata(NAME, call.id())?.clone();
        let known = metadata.remove(&self.chosen);
        let name = known.or_else(|| path::segment(&call.message, 1).map(|segment| segment.name.clone()));
        if let Some(name) = name.filter(|_| call.ctx.client_url.is_none()) {
            match self.finder.endpoints(NAME, call.id(), self.template(&name), call.ctx.deadline).await {
                Ok(found) => {
                    call.ctx.client_url = found.into_iter().find(|found| found.name == name).map(|found| found.url);
                }
                Err(error) => tracing::info!(%error, "closing without the forwarder's URL"),
            }
        }
        next.close(call).await
    }
}
