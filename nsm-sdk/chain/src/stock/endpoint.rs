//! The endpoint chain.

use crate::{
    Chain, Element, Side,
    elements::{
        authorize::{AuthorizeServer, Callers, Policies},
        begin::Begin,
        metadata::MetadataElement,
        monitor::{Hub, Monitor},
        timeout::{KeepAlive, Timeout},
        trimpath::TrimPath,
        updatepath::UpdatePath,
        updatetoken::UpdateToken,
    },
    path,
    remote::LocalService,
    serve::ChainService,
    token::Tokens,
};
use std::{sync::Arc, time::Duration};

/// An endpoint: its chain and its monitor.
///
/// ```
/// use nsm_chain::{Endpoint, elements::null::Null, token::Token};
/// use std::{sync::Arc, time::{Duration, SystemTime}};
///
/// let tokens = Arc::new(|_: Option<&nsm_chain::Peer>| {
///     Ok(Token { jwt: "not.a.token".into(), expires: SystemTime::now() + Duration::from_secs(600) })
/// });
/// let endpoint = Endpoint::builder("nse-1", tokens).element(Null).build();
/// let routes = endpoint.service().routes(); // for nsm_transport::Transport::serve
/// ```
#[derive(Clone, Debug)]
pub struct Endpoint {
    name: String,
    chain: Chain,
    hub: Hub,
    callers: Option<Callers>,
}

impl Endpoint {
    /// Starts an endpoint called `name` (an empty one is made up) that signs with `tokens`.
    pub fn builder(name: impl Into<String>, tokens: Tokens) -> EndpointBuilder {
        let name = Some(name.into()).filter(|name| !name.is_empty());
        EndpointBuilder {
            name: name.unwrap_or_else(|| format!("endpoint-{}", path::new_id())),
            tokens,
            policies: Policies::server(),
            keep: None,
            hub: Hub::new(),
            callers: None,
            elements: Vec::new(),
        }
    }

    /// Its name, which is that of its segment on the path.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The chain.
    pub fn chain(&self) -> &Chain {
        &self.chain
    }

    /// Its connections and who listens.
    pub fn hub(&self) -> &Hub {
        &self.hub
    }

    /// Its gRPC services.
    pub fn service(&self) -> ChainService {
        ChainService::new(self.chain.clone(), self.hub.clone()).guarded(self.callers.clone())
    }

    /// To be called within this process; see [`crate::remote::InProcess`].
    pub fn local(&self, peer: crate::remote::Identity) -> LocalService {
        LocalService { chain: self.chain.clone(), hub: self.hub.clone(), peer }
    }
}

/// Collects what an endpoint is made of.
pub struct EndpointBuilder {
    name: String,
    tokens: Tokens,
    policies: Policies,
    keep: Option<(Arc<dyn KeepAlive>, Duration)>,
    hub: Hub,
    callers: Option<Callers>,
    elements: Vec<Arc<dyn Element>>,
}

impl EndpointBuilder {
    /// Replaces the stock policies. Without any, callers need no identity.
    #[must_use]
    pub fn policies(mut self, policies: Policies) -> Self {
        self.policies = policies;
        self
    }

    /// Lets callers watch only what they name among their own connections (NSM's policy `service_connection`, which it ships switched
    /// off). Without it everybody who is known to the trust domain may watch all. Who looks for a connection that is not its own,
    /// or no longer there, is refused. Connections are known by their callers' ids: who gives one the id of another's may watch both.
    #[must_use]
    pub fn guarded_monitor(mut self) -> Self {
        self.callers = Some(Callers::default());
        self
    }

    /// Asks before a connection is closed by expiry; see [`Timeout::keep_while`].
    #[must_use]
    pub fn keep_while(mut self, keep: Arc<dyn KeepAlive>, interval: Duration) -> Self {
        self.keep = Some((keep, interval));
        self
    }

    /// Adds an element below the others.
    #[must_use]
    pub fn element(self, element: impl Element) -> Self {
        self.shared(Arc::new(element))
    }

    /// Adds an element that others hold too.
    #[must_use]
    pub fn shared(mut self, element: Arc<dyn Element>) -> Self {
        self.elements.push(element);
        self
    }

    /// The endpoint.
    pub fn build(self) -> Endpoint {
        let timeout = match self.keep {
            Some((keep, interval)) => Timeout::new().keep_while(keep, interval),
            None => Timeout::new(),
        };
        let chain = Chain::builder()
            // The id by which everything below knows the connection.
            .element(UpdatePath::new(&self.name))
            // From here on one operation per id, in a task of its own.
            .element(Begin::new(Side::Server))
            // Policies want to see the caller's token in the path.
            .element(UpdateToken::new(self.tokens))
            .element(AuthorizeServer::new(self.policies).noting(self.callers.clone()))
            .element(MetadataElement::new())
            .element(timeout)
            .element(Monitor::new(self.hub.clone()))
            .element(TrimPath::new(Side::Server))
            .extend(self.elements)
            .build();
        Endpoint { name: self.name, chain, hub: self.hub, callers: self.callers }
    }
}
