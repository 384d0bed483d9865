//! What an endpoint or a component uses: registrations that keep themselves alive, and watches that survive restarts.

use crate::{
    Call, Chain, Context, Element, Error, Event, Query,
    elements::{
        authorize::{AuthorizeClient, ClientPolicies},
        begin::Begin,
        clientinfo::ClientInfo,
        connect::Connect,
        descriptors::{RecvFdClient, SendFdClient},
        dial::{Dial, Dialer},
        heal::Heal,
        refresh::Refresh,
        retry::Retry,
    },
    watch::{GRACE, watch},
};
use futures_util::Stream;
use nsm_identity::X509Source;
use nsm_proto::registry::{NetworkService, NetworkServiceEndpoint};
use nsm_transport::{Address, Transport};
use std::{sync::Arc, time::Duration};

/// Default time for connecting: generous, since nothing but a retry is gained by giving up sooner.
const DIAL_TIMEOUT: Duration = Duration::from_secs(3);
const TRY_TIMEOUT: Duration = Duration::from_secs(5);
const FIND_TIMEOUT: Duration = Duration::from_secs(15);

/// A client of a manager's or of a registry's both services. Cheap to clone; clones share the connection and what is registered.
///
/// Registrations are refreshed, and made again by themselves when the peer has lost them. They are not removed when the
/// client is dropped: that is what `unregister_*` is for.
#[derive(Clone)]
pub struct RegistryClient {
    services: Chain<NetworkService>,
    endpoints: Chain<NetworkServiceEndpoint>,
    service_reader: Chain<NetworkService>,
    endpoint_reader: Chain<NetworkServiceEndpoint>,
    grace: Duration,
    patience: Option<Duration>,
}

/// Settings of a [`RegistryClient`].
pub struct Builder {
    url: String,
    source: Option<X509Source>,
    max_token_lifetime: Duration,
    dial_timeout: Duration,
    try_timeout: Duration,
    grace: Duration,
    patience: Option<Duration>,
    info: ClientInfo,
    policies: ClientPolicies,
}

impl Builder {
    /// Longest life of the own tokens (10 minutes).
    #[must_use]
    pub fn max_token_lifetime(mut self, lifetime: Duration) -> Self {
        self.max_token_lifetime = lifetime;
        self
    }
    /// Time for connecting (3 s).
    #[must_use]
    pub fn dial_timeout(mut self, timeout: Duration) -> Self {
        self.dial_timeout = timeout;
        self
    }
    /// Time for one try of a call (5 s).
    #[must_use]
    pub fn try_timeout(mut self, timeout: Duration) -> Self {
        self.try_timeout = timeout;
        self
    }
    /// How long a watch keeps what is missing after a reconnect (2 s).
    #[must_use]
    pub fn grace(mut self, grace: Duration) -> Self {
        self.grace = grace;
        self
    }
    /// How long a registration is tried before it fails with the last cause. Without it, for ever.
    #[must_use]
    pub fn patience(mut self, patience: Duration) -> Self {
        self.patience = Some(patience);
        self
    }
    /// Policies for what the peer answers to registrations; all of them by default.
    #[must_use]
    pub fn policies(mut self, policies: ClientPolicies) -> Self {
        self.policies = policies;
        self
    }
    /// Labels for the endpoints; by default NODE_NAME, POD_NAME and CLUSTER_NAME of the environment.
    #[must_use]
    pub fn client_info(mut self, info: ClientInfo) -> Self {
        self.info = info;
        self
    }

    /// Makes the client. It connects when it is first used.
    ///
    /// # Errors
    /// The URL is no address, or the identity makes no TLS configuration.
    pub fn build(self) -> Result<RegistryClient, Error> {
        let invalid = |cause: nsm_transport::Error| {
            Error::new("registry client", &self.url, cause).with_code(tonic::Code::InvalidArgument)
        };
        let address = Address::parse(&self.url).map_err(invalid)?;
        let transport = match self.source.clone() {
            Some(source) => Transport::new(source).map_err(invalid)?,
            None => Transport::insecure(),
        };
        let dialer =
            Dialer::new(transport.with_max_token_lifetime(self.max_token_lifetime), address, self.dial_timeout);
        Ok(self.over(dialer))
    }

    fn over(self, dialer: Arc<Dialer>) -> RegistryClient {
        let retry = || Retry { try_timeout: self.try_timeout, ..Retry::default() };
        let dial: Arc<dyn Element<NetworkService>> = Arc::new(Dial::new(dialer.clone()));
        let services = Chain::new(vec![
            Arc::new(Begin::known_only()),
            Arc::new(retry()),
            Arc::new(Heal::default()),
            dial.clone(),
            // Below dial, which knows who answers.
            Arc::new(AuthorizeClient::new(self.policies)),
            Arc::new(Connect),
        ]);
        let service_reader = Chain::new(vec![dial, Arc::new(Connect) as Arc<dyn Element<_>>]);

        let dial: Arc<dyn Element<NetworkServiceEndpoint>> = Arc::new(Dial::new(dialer));
        let receive: Arc<dyn Element<NetworkServiceEndpoint>> = Arc::new(RecvFdClient::default());
        let endpoints = Chain::new(vec![
            Arc::new(Begin::new()),
            Arc::new(retry()),
            Arc::new(Heal::default()),
            Arc::new(Refresh::default()),
            dial.clone(),
            Arc::new(AuthorizeClient::new(self.policies)),
            Arc::new(self.info),
            Arc::new(SendFdClient),
            Arc::new(Connect),
        ]);
        let endpoint_reader = Chain::new(vec![dial, receive, Arc::new(Connect)]);
        RegistryClient {
            services,
            endpoints,
            service_reader,
            endpoint_reader,
            grace: self.grace,
            patience: self.patience,
        }
    }
}

/// Ends what takes longer than `timeout`.
fn within(timeout: Option<Duration>) -> Context {
    match timeout {
        Some(timeout) => Context::new().with_timeout(timeout),
        None => Context::new(),
    }
}

impl RegistryClient {
    /// A client of the manager or registry at `url` (`unix:///path` or `tcp://host:port`).
    pub fn builder(url: impl Into<String>, source: X509Source) -> Builder {
        Builder { source: Some(source), ..Self::insecure(url) }
    }

    /// The same without TLS and tokens, for tests.
    pub fn insecure(url: impl Into<String>) -> Builder {
        Builder {
            url: url.into(),
            source: None,
            max_token_lifetime: Duration::from_secs(600),
            dial_timeout: DIAL_TIMEOUT,
            try_timeout: TRY_TIMEOUT,
            grace: GRACE,
            patience: None,
            info: ClientInfo::from_env(),
            policies: ClientPolicies::default(),
        }
    }

    /// Registers a service and keeps it registered. Tries until it works or the patience is over; [`RegistryClient::unregister_ns`]
    /// ends it.
    pub async fn register_ns(&self, service: NetworkService) -> Result<NetworkService, Error> {
        self.services.register(Call::new(service, within(self.patience))).await
    }

    /// Registers an endpoint and keeps it registered, its socket's descriptor included if it is a unix URL. Tries until
    /// it works or the patience is over, also when the future is dropped; [`RegistryClient::unregister_nse`] ends it.
    pub async fn register_nse(&self, endpoint: NetworkServiceEndpoint) -> Result<NetworkServiceEndpoint, Error> {
        self.endpoints.register(Call::new(endpoint, within(self.patience))).await
    }

    /// Removes a service; gives up after 15 s.
    pub async fn unregister_ns(&self, service: NetworkService) -> Result<(), Error> {
        self.services.unregister(Call::new(service, within(Some(FIND_TIMEOUT)))).await
    }

    /// Removes an endpoint and stops keeping it alive; gives up after `timeout` (default 15 s).
    pub async fn unregister_nse(
        &self,
        endpoint: NetworkServiceEndpoint,
        timeout: Option<Duration>,
    ) -> Result<(), Error> {
        self.endpoints.unregister(Call::new(endpoint, within(timeout.or(Some(FIND_TIMEOUT))))).await
    }

    /// The services like `template` as of now.
    pub async fn find_ns(&self, template: NetworkService) -> Result<Vec<NetworkService>, Error> {
        self.service_reader.list(template, within(Some(FIND_TIMEOUT))).await
    }

    /// The endpoints like `template` as of now.
    pub async fn find_nse(&self, template: NetworkServiceEndpoint) -> Result<Vec<NetworkServiceEndpoint>, Error> {
        self.endpoint_reader.list(template, within(Some(FIND_TIMEOUT))).await
    }

    /// Changes of the services like `template`, for ever. See [`crate::watch`].
    pub fn watch_ns(
        &self,
        template: NetworkService,
    ) -> impl Stream<Item = Event<NetworkService>> + Send + Unpin + use<> {
        Box::pin(watch(self.service_reader.clone(), template, self.grace))
    }

    /// Changes of the endpoints like `template`, for ever. See [`crate::watch`].
    pub fn watch_nse(
        &self,
        template: NetworkServiceEndpoint,
    ) -> impl Stream<Item = Event<NetworkServiceEndpoint>> + Send + Unpin + use<> {
        Box::pin(watch(self.endpoint_reader.clone(), template, self.grace))
    }

    /// The chains for discovery elements: services and endpoints, reading only.
    pub fn readers(&self) -> (Chain<NetworkService>, Chain<NetworkServiceEndpoint>) {
        (self.service_reader.clone(), self.endpoint_reader.clone())
    }

    /// One raw watch that ends with its stream, as the wire gives it.
    pub async fn stream_nse(
        &self,
        template: NetworkServiceEndpoint,
    ) -> Result<crate::Events<NetworkServiceEndpoint>, Error> {
        self.endpoint_reader.find(Call::new(Query::watch(template), Context::new())).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_chains_have_their_documented_order() {
        let client = RegistryClient::insecure("tcp://127.0.0.1:1").build().unwrap();
        assert_eq!(client.services.names(), ["begin", "retry", "heal", "dial", "authorize", "connect"]);
        let endpoints = ["begin", "retry", "heal", "refresh", "dial", "authorize", "clientinfo", "sendfd", "connect"];
        assert_eq!(client.endpoints.names(), endpoints);
        let (services, endpoints) = client.readers();
        assert_eq!((services.names(), endpoints.names()), (vec!["dial", "connect"], vec!["dial", "recvfd", "connect"]));
    }
}
