//! One node of a mesh: manager and kernel forwarder as real chains in one process.

use crate::{
    alive::{Alive, Ends},
    excluded::{self, DEFAULT_FILE},
    find::Finder,
};
use nsm_chain::{
    Client, Connector, Endpoint, Peer, Side,
    elements::{
        authorize::Policies,
        clientinfo::ClientInfo,
        connect::ConnectServer,
        discover::Discover,
        discoverforwarder::DiscoverForwarder,
        filtermechanisms::FilterMechanisms,
        mechanisms::Mechanisms,
        mechanismtranslation::MechanismTranslation,
        netsvcmonitor::NetSvcMonitor,
        null::Null,
        recvfd::{RecvFdClient, RecvFdServer},
        roundrobin::RoundRobin,
        sendfd::{SendFdClient, SendFdServer},
    },
    remote::{Caller, Grpc, Identity, InProcess},
    token::{self, Tokens},
};
use nsm_identity::{Svid, X509Source};
use nsm_kernel::{
    Netns,
    elements::{
        KERNEL, NOOP, VXLAN,
        context::{ClientContext, ServerContext},
        vxlan::VxlanServer,
        wire::{WireClient, WireServer},
    },
};
use nsm_proto::registry::{NetworkServiceEndpoint, NetworkServiceLabels};
use nsm_registry::{Call, Context, ManagerRegistry, RegistryClient, Security, Upstream, service};
use nsm_transport::Transport;
use std::{
    net::IpAddr,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;

/// How long after its start a manager waits for endpoints that have not come back yet, and how long each time.
const SETTLING: Duration = Duration::from_secs(20);
const PATIENCE: Duration = Duration::from_secs(3);
/// How often a connection whose client is silent is looked at.
const KEEP_INTERVAL: Duration = Duration::from_secs(30);
/// Renewal of the forwarder's own registration, well below the life of an entry.
const REGISTER_INTERVAL: Duration = Duration::from_secs(20);
const REGISTER_RETRY: Duration = Duration::from_millis(500);
const REGISTER_TIMEOUT: Duration = Duration::from_secs(5);

/// What a node is made of.
#[derive(Clone)]
pub struct NodeConfig {
    /// Name of the manager, its path segment's too.
    pub name: String,
    /// Name of the forwarder. It differs from the manager's and stays the same over restarts.
    pub forwarder_name: String,
    /// Service that forwarders are registered under.
    pub forwarder_service: String,
    /// Labels of the forwarder.
    pub forwarder_labels: Vec<(String, String)>,
    /// Where other nodes reach the manager.
    pub public_url: String,
    /// Labels nodeName, podName and clusterName for requests and endpoints that have none.
    pub labels: Vec<(String, String)>,
    /// Own underlay address of tunnels; without it there are no other nodes.
    pub tunnel_ip: Option<IpAddr>,
    /// Identity of manager and forwarder.
    pub source: X509Source,
    /// Longest life of own tokens.
    pub max_token_lifetime: Duration,
    /// What connecting to a next hop may take.
    pub dial_timeout: Duration,
    /// Policies of manager and forwarder.
    pub policies: Policies,
    /// Policies of the manager's registry.
    pub registry_policies: nsm_registry::Policies,
    /// Policies for what the registry above answers.
    pub registry_client_policies: nsm_registry::ClientPolicies,
    /// List of excluded prefixes.
    pub excluded_prefixes: PathBuf,
    /// Ask for life before a connection is closed by expiry.
    pub keep_alive: bool,
    /// The node's own network namespace.
    pub netns: Netns,
    /// Where the manager keeps what it knows of its local endpoints, for [`Node::recall`].
    pub state: Option<Arc<dyn nsm_registry::store::Store>>,
}

impl NodeConfig {
    /// Stock settings.
    pub fn new(name: &str, public_url: &str, source: X509Source, netns: Netns) -> Self {
        Self {
            name: name.into(),
            forwarder_name: format!("forwarder-{name}"),
            forwarder_service: "forwarder".into(),
            forwarder_labels: vec![("p2p".into(), "true".into())],
            public_url: public_url.into(),
            labels: Vec::new(),
            tunnel_ip: None,
            source,
            max_token_lifetime: Duration::from_secs(600),
            dial_timeout: Duration::from_secs(3),
            policies: Policies::server(),
            registry_policies: nsm_registry::Policies::default(),
            registry_client_policies: nsm_registry::ClientPolicies::default(),
            excluded_prefixes: DEFAULT_FILE.into(),
            keep_alive: true,
            netns,
            state: None,
        }
    }
}

/// Manager, forwarder and the manager's registry.
#[derive(Clone)]
pub struct Node {
    manager: Endpoint,
    forwarder: Endpoint,
    registry: ManagerRegistry,
    config: Arc<NodeConfig>,
}

type Lookup = Arc<dyn nsm_chain::registry::Registry>;

/// Why a node cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// The identity makes no TLS configuration or no peer.
    #[error("identity: {0}")]
    Identity(String),
}

impl Node {
    /// Builds the chains; nothing is registered or listened on yet.
    pub fn new(config: NodeConfig, upstream: Upstream) -> Result<Self, NodeError> {
        let transport = Transport::new(config.source.clone())
            .map_err(|cause| NodeError::Identity(cause.to_string()))?
            .with_max_token_lifetime(config.max_token_lifetime);
        let peer = identity(config.source.clone())?;
        let tokens = token::from_source(config.source.clone(), config.max_token_lifetime);

        let security = Security {
            source: config.source.clone(),
            max_token_lifetime: config.max_token_lifetime,
            policies: config.registry_policies,
            client_policies: config.registry_client_policies,
        };
        let labels = nsm_registry::ClientInfo::new(config.labels.iter().cloned().collect());
        let registry = ManagerRegistry::new(upstream, &config.public_url, labels, &security, config.state.clone());
        let finder = Finder::new(registry.local_services.clone(), registry.local_endpoints.clone());
        let finder: Lookup = Arc::new(finder.settling(SETTLING, PATIENCE));

        let ends = Ends::default();
        let endpoints: Arc<dyn Connector> = Arc::new(Grpc::new(transport.clone()).sharing());
        let forwarder = forwarder(&config, tokens.clone(), finder.clone(), endpoints, &ends);
        let caller = Caller { peer: peer.clone(), tokens: Some(tokens.clone()) };
        let hops = InProcess::new(caller, Some(Arc::new(Grpc::new(transport))));
        hops.add(forwarder_url(&config), forwarder.local(peer));
        let manager = manager(&config, tokens, finder, Arc::new(hops), &ends);
        Ok(Self { manager, forwarder, registry, config: Arc::new(config) })
    }

    /// The gRPC services: network service, monitor, both registries. Health is added by the caller.
    pub fn routes(&self) -> Routes {
        let routes = self.manager.service().routes();
        service::add_routes(routes, self.registry.services.clone(), self.registry.endpoints.clone())
    }

    /// The manager's chain and monitor.
    pub fn manager(&self) -> &Endpoint {
        &self.manager
    }

    /// The forwarder's chain and monitor.
    pub fn forwarder(&self) -> &Endpoint {
        &self.forwarder
    }

    /// The manager's registry.
    pub fn registry(&self) -> &ManagerRegistry {
        &self.registry
    }

    /// Takes over the local endpoints that a former run of this node knew, as far as they are still there; to be called before the
    /// node is served. Returns their names.
    ///
    /// # Errors
    /// The state cannot be read.
    pub async fn recall(&self) -> Result<Vec<String>, nsm_registry::Error> {
        self.registry.recall().await
    }

    /// Registers the forwarder once.
    pub async fn register_forwarder(&self) -> Result<(), nsm_registry::Error> {
        let ctx = Context::new().with_timeout(REGISTER_TIMEOUT);
        let endpoint = forwarder_registration(&self.config, forwarder_url(&self.config));
        self.registry.own_endpoints.register(Call::new(endpoint, ctx)).await.map(drop)
    }

    /// Keeps the forwarder registered until `stop`; `changed` hears whether it is. It is not unregistered then: the node
    /// comes back under the same name.
    pub async fn keep_registered(&self, stop: CancellationToken, changed: impl Fn(Result<(), String>)) {
        let mut before: Option<Result<(), String>> = None;
        loop {
            let result = self.register_forwarder().await.map_err(|cause| cause.to_string());
            if before.as_ref() != Some(&result) {
                if let Err(cause) = &result {
                    tracing::warn!(%cause, "the forwarder is not registered");
                }
                changed(result.clone());
            }
            let pause = if result.is_ok() { REGISTER_INTERVAL } else { REGISTER_RETRY };
            before = Some(result);
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(pause) => {}
            }
        }
    }
}

/// Manager and forwarder towards each other. The certificate is read, and kept, once for all connections.
fn identity(source: X509Source) -> Result<Identity, NodeError> {
    let read = |svid: &Svid| Peer::from_leaf(svid.chain().first().map_or(&[], |leaf| leaf));
    let svid = source.svid();
    let peer = read(&svid).map_err(|cause| NodeError::Identity(cause.to_string()))?;
    let known = Mutex::new((svid, peer));
    Ok(Identity::new(move || {
        let mut known = known.lock().unwrap_or_else(PoisonError::into_inner);
        let svid = source.svid();
        if !Arc::ptr_eq(&known.0, &svid) {
            *known = (svid.clone(), read(&svid).ok()?);
        }
        Some(known.1.clone())
    }))
}

/// What the forwarder of `config` is registered as when it is reached under `url`.
fn forwarder_registration(config: &NodeConfig, url: String) -> NetworkServiceEndpoint {
    let labels = NetworkServiceLabels { labels: config.forwarder_labels.iter().cloned().collect() };
    NetworkServiceEndpoint {
        name: config.forwarder_name.clone(),
        network_service_names: vec![config.forwarder_service.clone()],
        network_service_labels: [(config.forwarder_service.clone(), labels)].into(),
        url,
        path_ids: vec![config.source.spiffe_id()],
        ..Default::default()
    }
}

/// A kernel forwarder by itself, for a manager in another process (of whatever implementation).
#[derive(Clone)]
pub struct Forwarder {
    endpoint: Endpoint,
    registry: RegistryClient,
    config: Arc<NodeConfig>,
}

impl Forwarder {
    /// Finds endpoints in, and registers itself at, the registry of the manager that `registry` is connected to.
    /// Of the configuration only what concerns the forwarder is used.
    pub fn new(config: NodeConfig, registry: RegistryClient) -> Result<Self, NodeError> {
        let transport = Transport::new(config.source.clone())
            .map_err(|cause| NodeError::Identity(cause.to_string()))?
            .with_max_token_lifetime(config.max_token_lifetime);
        let tokens = token::from_source(config.source.clone(), config.max_token_lifetime);
        let (services, endpoints) = registry.readers();
        let finder: Lookup = Arc::new(Finder::new(services, endpoints).settling(SETTLING, PATIENCE));
        let endpoints: Arc<dyn Connector> = Arc::new(Grpc::new(transport).sharing());
        let endpoint = forwarder(&config, tokens, finder, endpoints, &Ends::default());
        Ok(Self { endpoint, registry, config: Arc::new(config) })
    }

    /// The gRPC services: network service and monitor.
    pub fn routes(&self) -> Routes {
        self.endpoint.service().routes()
    }

    /// Registers it under the unix URL it listens on, for good; tries until it works.
    pub async fn register(&self, url: &str) -> Result<(), nsm_registry::Error> {
        let endpoint = forwarder_registration(&self.config, url.to_owned());
        self.registry.register_nse(NetworkServiceEndpoint { path_ids: Vec::new(), ..endpoint }).await.map(drop)
    }
}

/// The URL of the forwarder within this process.
fn forwarder_url(config: &NodeConfig) -> String {
    format!("inproc://{}", config.forwarder_name)
}

/// Endpoint chain → clientinfo → discoverforwarder → netsvcmonitor → excludedprefixes → recvfd → connect[client chain] → sendfd.
fn manager(config: &NodeConfig, tokens: Tokens, finder: Lookup, hops: Arc<dyn Connector>, ends: &Ends) -> Endpoint {
    let receive = RecvFdClient::new();
    let from_caller = RecvFdServer::new().releasing(Some(&receive));
    let client = manager_client(config, hops, receive);
    let discover = DiscoverForwarder::new(finder.clone(), &config.forwarder_service, &config.public_url);
    let mut builder = Endpoint::builder(&config.name, tokens).policies(config.policies.clone());
    if config.keep_alive {
        builder = builder.keep_while(Arc::new(Alive::manager(ends.clone())), KEEP_INTERVAL);
    }
    builder
        .element(ClientInfo::new(config.labels.iter().cloned()))
        .element(discover.settling(SETTLING))
        .element(NetSvcMonitor::new(finder))
        .element(excluded::from_file(config.excluded_prefixes.clone()))
        .element(from_caller)
        .element(ConnectServer::new(client.chain().clone()))
        .element(SendFdServer)
        .build()
}

/// Client chain → recvfd → sendfd → the rest of the client chain.
fn manager_client(config: &NodeConfig, hops: Arc<dyn Connector>, receive: RecvFdClient) -> Client {
    Client::builder(&config.name, hops)
        .passthrough()
        .dial_timeout(config.dial_timeout)
        .element(receive)
        .element(SendFdClient)
        .build()
}

/// Endpoint chain → recvfd → discover → roundrobin → connectioncontext → mechanisms → ends → wire → connect[client chain].
/// There is no `sendfd` towards the caller: the namespace in its answer is the one the caller has sent, and would lie about
/// unclaimed.
fn forwarder(
    config: &NodeConfig,
    tokens: Tokens,
    finder: Lookup,
    endpoints: Arc<dyn Connector>,
    ends: &Ends,
) -> Endpoint {
    let receive = RecvFdClient::new();
    let from_caller = RecvFdServer::new().releasing(Some(&receive));
    let client = forwarder_client(config, endpoints, receive, ends);
    let mut mechanisms = Mechanisms::new(Side::Server).with(KERNEL, Null).with(NOOP, Null);
    if let Some(ip) = config.tunnel_ip {
        mechanisms = mechanisms.with(VXLAN, VxlanServer::new(ip));
    }
    let mut builder = Endpoint::builder(&config.forwarder_name, tokens).policies(config.policies.clone());
    if config.keep_alive {
        builder = builder.keep_while(Arc::new(Alive::forwarder(ends.clone())), KEEP_INTERVAL);
    }
    builder
        .element(from_caller)
        .element(Discover::new(finder))
        .element(RoundRobin::default())
        .element(ServerContext::new())
        .element(mechanisms)
        .element(ends.client())
        .element(WireServer)
        .element(ConnectServer::new(client.chain().clone()))
        .build()
}

/// Client chain → mechanismtranslation → withoutnamespace → ends → connectioncontext → wire → filtermechanisms → recvfd → sendfd →
/// the rest of the client chain. Towards an endpoint only its own namespace is passed, so that `endpoints` may share its sockets.
fn forwarder_client(config: &NodeConfig, endpoints: Arc<dyn Connector>, receive: RecvFdClient, ends: &Ends) -> Client {
    Client::builder(&config.forwarder_name, endpoints)
        .passthrough()
        .dial_timeout(config.dial_timeout)
        .element(MechanismTranslation::new())
        .element(ends.without_namespace())
        .element(ends.endpoint())
        .element(ClientContext::new())
        .element(WireClient::new(config.netns.clone(), config.tunnel_ip))
        .element(FilterMechanisms)
        .element(receive)
        .element(SendFdClient)
        .build()
}

#[cfg(test)]
mod tests {
    use super::*;
    use nsm_identity::Authority;

    /// What stands below what is the whole of what a manager and a forwarder do: one element elsewhere is another program.
    #[tokio::test]
    async fn the_order_of_the_elements() {
        let hour = Duration::from_secs(3600);
        let authority = Authority::generate("example.org").unwrap();
        let source = authority.source("/node", hour).unwrap();
        let store = Arc::new(nsm_registry::store::MemoryStore::default());
        let registry = nsm_registry::Registry::open(store, &Security::new(source.clone())).await.unwrap();
        let config = NodeConfig::new("node", "tcp://127.0.0.1:1", source.clone(), Netns::current().unwrap());
        let node = Node::new(config.clone(), Upstream::Local(registry)).unwrap();
        let endpoint =
            ["updatepath", "begin", "updatetoken", "authorize", "metadata", "timeout", "monitor", "trimpath"];
        let server = |own: &[&'static str]| [&endpoint[..], own].concat();
        let own =
            ["clientinfo", "discoverforwarder", "netsvcmonitor", "excludedprefixes", "recvfd", "connect", "sendfd"];
        assert_eq!(node.manager().chain().names(), server(&own));
        let own = [
            "recvfd",
            "discover",
            "roundrobin",
            "connectioncontextkernel-server",
            "mechanisms",
            "ends",
            "wire-server",
            "connect",
        ];
        assert_eq!(node.forwarder().chain().names(), server(&own));

        let grpc: Arc<dyn Connector> = Arc::new(Grpc::new(Transport::new(source).unwrap()));
        let client = |own: &[&'static str]| {
            let before = ["updatepath", "begin", "metadata", "observe", "clienturl", "clientconn", "dial"];
            [&before[..], own, &["authorize", "trimpath", "connect"]].concat()
        };
        let chain = manager_client(&config, grpc.clone(), RecvFdClient::new());
        assert_eq!(chain.chain().names(), client(&["recvfd", "sendfd"]));
        let chain = forwarder_client(&config, grpc, RecvFdClient::new(), &Ends::default());
        let own = [
            "mechanismtranslation",
            "withoutnamespace",
            "ends",
            "connectioncontextkernel-client",
            "wire",
            "filtermechanisms",
            "recvfd",
            "sendfd",
        ];
        assert_eq!(chain.chain().names(), client(&own));
    }
}
