//! A mesh in one process for scenarios of the control plane: registry, managers, forwarders without a kernel, endpoints and
//! clients, each with its own identity, over unix sockets and mTLS, with all policies on.

#![allow(clippy::unwrap_used, dead_code, unreachable_pub, reason = "shared by tests, each of which uses a part")]

use nsm_chain::{
    Client, CloseCall, Connection, Connector, Element, Endpoint, Error, Mechanism, NetworkServiceRequest, Next,
    RequestCall, Side,
    elements::{
        authorize::Policies,
        connect::ConnectServer,
        discover::Discover,
        filtermechanisms::FilterMechanisms,
        heal::{Liveness, LivenessCheck},
        kernel_mechanism::{KERNEL, KernelClient, KernelServer},
        mechanisms::Mechanisms,
        mechanismtranslation::MechanismTranslation,
        null::Null,
        recvfd::{RecvFdClient, RecvFdServer},
        retry::Retry,
        roundrobin::RoundRobin,
        sendfd::{SendFdClient, SendFdServer},
    },
    remote::Grpc,
    token,
};
use nsm_identity::{Authority, X509Source};
use nsm_kernel::Netns;
use nsm_mesh::{Node, NodeConfig};
use nsm_proto::registry::{Destination, Match};
use nsm_registry::{
    NetworkService, NetworkServiceEndpoint, NetworkServiceLabels, Registry, RegistryClient, Security, Upstream,
    store::{SqliteStore, Store},
};
use nsm_transport::{Address, Listener, Transport};
use std::{
    collections::HashMap,
    future::Future,
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};
use tokio::{task::JoinHandle, time::Instant};
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;

mod behind_node;
#[allow(unused_imports)] // each test uses some
pub use behind_node::*;

pub const HOUR: Duration = Duration::from_secs(3600);
pub const TIMEOUT: Duration = Duration::from_secs(10);
pub const SERVICE: &str = "svc";

pub struct World {
    authority: Authority,
    sources: Mutex<HashMap<String, X509Source>>,
    folder: tempfile::TempDir,
    /// Where the registry listens, the same over restarts.
    registry: Mutex<String>,
}

/// Something that listens until it is stopped; as abrupt as a kill.
pub struct Process {
    stop: CancellationToken,
    task: Option<JoinHandle<()>>,
}

impl Process {
    fn start(transport: Transport, listeners: Vec<Listener>, routes: Routes) -> Self {
        let stop = CancellationToken::new();
        let until = stop.clone();
        let task = tokio::spawn(async move { transport.serve(listeners, routes, until).await.unwrap() });
        Self { stop, task: Some(task) }
    }

    pub async fn kill(mut self) {
        self.stop.cancel();
        self.task.take().unwrap().await.unwrap();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

impl World {
    pub fn new() -> Self {
        // RUST_LOG shows what happened when a test fails.
        let filter = tracing_subscriber::EnvFilter::from_default_env();
        let _ = tracing_subscriber::fmt().with_env_filter(filter).with_test_writer().try_init();
        Self {
            authority: Authority::generate("example.org").unwrap(),
            sources: Mutex::default(),
            folder: tempfile::tempdir().unwrap(),
            registry: Mutex::new("tcp://127.0.0.1:0".into()),
        }
    }

    pub fn source(&self, name: &str) -> X509Source {
        let issue = || self.authority.source(&format!("/{name}"), HOUR).unwrap();
        self.sources.lock().unwrap().entry(name.to_owned()).or_insert_with(issue).clone()
    }

    pub fn transport(&self, name: &str) -> Transport {
        Transport::new(self.source(name)).unwrap()
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn url(&self, name: &str) -> String {
        format!("unix://{}", self.path(name).display())
    }

    async fn listen(&self, url: &str) -> Listener {
        Listener::bind(&Address::parse(url).unwrap()).await.unwrap()
    }

    /// The registry, with what it had before.
    pub async fn registry(&self) -> Process {
        let store: Arc<dyn Store> = Arc::new(SqliteStore::open(&self.path("registry.db")).unwrap());
        let registry = Registry::open(store, &Security::new(self.source("registry"))).await.unwrap();
        let url = self.registry.lock().unwrap().clone();
        let listener = self.listen(&url).await;
        *self.registry.lock().unwrap() = listener.address().to_string();
        let routes = nsm_registry::service::add_routes(Routes::default(), registry.services, registry.endpoints);
        Process::start(self.transport("registry"), vec![listener], routes)
    }

    /// A manager without its own forwarder. `tcp` is the public address of an earlier run.
    pub async fn manager(&self, name: &str, tcp: Option<&str>) -> Manager {
        let listeners = vec![self.listen(&self.url(name)).await, self.listen(tcp.unwrap_or("tcp://127.0.0.1:0")).await];
        let tcp = listeners[1].address().to_string();
        let address = Address::parse(&self.registry.lock().unwrap()).unwrap();
        let dialer = nsm_registry::Dialer::new(self.transport(name), address, TIMEOUT);
        let config = NodeConfig {
            labels: vec![("nodeName".into(), name.into())],
            keep_alive: false,
            dial_timeout: Duration::from_millis(750),
            state: Some(Arc::new(SqliteStore::open(&self.path(&format!("{name}.db"))).unwrap())),
            ..NodeConfig::new(name, &tcp, self.source(name), Netns::current().unwrap())
        };
        let node = Node::new(config, Upstream::Remote(dialer)).unwrap();
        node.recall().await.unwrap();
        let process = Process::start(self.transport(name), listeners, node.routes());
        Manager { name: name.into(), process, node, tcp }
    }

    /// A whole node: manager and kernel forwarder, with interfaces.
    pub async fn kernel_node(&self, name: &str, netns: &Netns) -> Manager {
        let listeners = vec![self.listen(&self.url(name)).await, self.listen("tcp://127.0.0.1:0").await];
        let tcp = listeners[1].address().to_string();
        let address = Address::parse(&self.registry.lock().unwrap()).unwrap();
        let dialer = nsm_registry::Dialer::new(self.transport(name), address, TIMEOUT);
        let config = NodeConfig::new(name, &tcp, self.source(name), netns.clone());
        let node = Node::new(config, Upstream::Remote(dialer)).unwrap();
        node.register_forwarder().await.unwrap();
        let process = Process::start(self.transport(name), listeners, node.routes());
        Manager { name: name.into(), process, node, tcp }
    }

    /// A forwarder of that manager: real discovery and mechanisms, no interfaces.
    pub async fn forwarder(&self, name: &str, manager: &Manager, labels: &[(&str, &str)]) -> Forwarder {
        let registry = RegistryClient::builder(self.url(&manager.name), self.source(name)).build().unwrap();
        let (services, endpoints) = registry.readers();
        let finder: Arc<dyn nsm_chain::registry::Registry> = Arc::new(nsm_mesh::find::Finder::new(services, endpoints));
        let seen = Arc::<Seen>::default();
        let client = Client::builder(name, self.connector(name))
            .passthrough()
            .dial_timeout(Duration::from_millis(750))
            .element(MechanismTranslation::new())
            .element(Offer)
            .element(FilterMechanisms)
            .element(RecvFdClient::new())
            .element(SendFdClient)
            .build();
        let endpoint = Endpoint::builder(name, token::from_source(self.source(name), HOUR))
            .element(RecvFdServer::new())
            .element(seen.clone())
            .element(Discover::new(finder))
            .element(RoundRobin::default())
            .element(Mechanisms::new(Side::Server).with(KERNEL, Null).with("VXLAN", Null))
            .element(ConnectServer::new(client.chain().clone()))
            .build();
        let process = self.serve(name, &endpoint).await;
        let labels = labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        let registration = NetworkServiceEndpoint {
            name: name.into(),
            network_service_names: vec!["forwarder".into()],
            network_service_labels: [("forwarder".to_owned(), NetworkServiceLabels { labels })].into(),
            url: self.url(name),
            ..Default::default()
        };
        registry.register_nse(registration.clone()).await.unwrap();
        Forwarder { process, endpoint, registry, registration, seen }
    }

    fn connector(&self, name: &str) -> Arc<dyn Connector> {
        Arc::new(Grpc::new(self.transport(name)))
    }

    pub async fn serve(&self, name: &str, endpoint: &Endpoint) -> Process {
        let listener = self.listen(&self.url(name)).await;
        Process::start(self.transport(name), vec![listener], endpoint.service().routes())
    }

    pub async fn service(&self, manager: &Manager, service: NetworkService) {
        let registry = RegistryClient::builder(self.url(&manager.name), self.source("operator")).build().unwrap();
        registry.register_ns(service).await.unwrap();
    }

    /// An endpoint that serves and is registered.
    pub async fn endpoint(&self, name: &str, manager: &Manager) -> Nse {
        let nse = self.unregistered(name, manager).await;
        nse.register().await;
        nse
    }

    pub async fn unregistered(&self, name: &str, manager: &Manager) -> Nse {
        self.endpoint_with(name, manager, Vec::new()).await
    }

    pub async fn endpoint_with(&self, name: &str, manager: &Manager, elements: Vec<Arc<dyn Element>>) -> Nse {
        let seen = Arc::<Seen>::default();
        let mut builder = Endpoint::builder(name, token::from_source(self.source(name), HOUR)).element(seen.clone());
        for element in elements {
            builder = builder.shared(element);
        }
        let endpoint = builder
            .element(Mechanisms::new(Side::Server).with(KERNEL, KernelServer::new()))
            .element(SendFdServer)
            .build();
        let process = self.serve(name, &endpoint).await;
        let registry = RegistryClient::builder(self.url(&manager.name), self.source(name)).build().unwrap();
        let registration = NetworkServiceEndpoint {
            name: name.into(),
            network_service_names: vec![SERVICE.into()],
            url: self.url(name),
            ..Default::default()
        };
        Nse { process, endpoint, registry, registration, seen }
    }

    /// A client of that manager that tries until it works; with a data path that is as alive as `alive` says.
    pub fn client(&self, name: &str, manager: &Manager, alive: Option<&Arc<AtomicBool>>) -> Client {
        self.client_with(name, manager, alive, Vec::new())
    }

    /// The same with these elements above its mechanisms.
    pub fn client_with(
        &self,
        name: &str,
        manager: &Manager,
        alive: Option<&Arc<AtomicBool>>,
        elements: Vec<Arc<dyn Element>>,
    ) -> Client {
        let mut builder = Client::builder(name, self.connector(name))
            .url(self.url(&manager.name))
            .policies(Policies::client())
            .retry(Retry { interval: Duration::from_millis(50), try_timeout: Duration::from_secs(5) });
        for element in elements {
            builder = builder.element(element);
        }
        let mut builder =
            builder.element(Mechanisms::new(Side::Client).with(KERNEL, KernelClient::new())).element(SendFdClient);
        if let Some(alive) = alive {
            builder = builder.liveness(LivenessCheck::new(Arc::new(Alive(alive.clone()))));
        }
        builder.build()
    }
}

pub struct Manager {
    pub name: String,
    pub process: Process,
    pub node: Node,
    pub tcp: String,
}

impl Manager {
    /// Kills it and starts it again, with nothing in memory.
    pub async fn restart(self, world: &World) -> Manager {
        let Manager { name, process, node, tcp } = self;
        process.kill().await;
        drop(node);
        world.manager(&name, Some(&tcp)).await
    }
}

pub struct Forwarder {
    pub process: Process,
    pub endpoint: Endpoint,
    registry: RegistryClient,
    registration: NetworkServiceEndpoint,
    pub seen: Arc<Seen>,
}

impl Forwarder {
    /// Dies, and nobody tells the registry.
    pub async fn kill(self) {
        self.process.kill().await;
    }

    pub async fn remove(self) {
        self.registry.unregister_nse(self.registration, None).await.unwrap();
        self.process.kill().await;
    }
}

pub struct Nse {
    pub process: Process,
    pub endpoint: Endpoint,
    pub registry: RegistryClient,
    pub registration: NetworkServiceEndpoint,
    pub seen: Arc<Seen>,
}

impl Nse {
    pub async fn register(&self) {
        self.registry.register_nse(self.registration.clone()).await.unwrap();
    }

    pub async fn remove(self) {
        self.registry.unregister_nse(self.registration, None).await.unwrap();
        self.process.kill().await;
    }
}

/// Counts what comes by, and refuses on demand.
#[derive(Default)]
pub struct Seen {
    requests: AtomicUsize,
    closes: AtomicUsize,
    pub refuse: AtomicBool,
    pub delay: Mutex<Duration>,
    /// Namespace URL of the last request, as it is inside.
    pub netns: Mutex<Option<String>>,
}

impl Seen {
    pub fn requests(&self) -> usize {
        self.requests.load(SeqCst)
    }

    pub fn closes(&self) -> usize {
        self.closes.load(SeqCst)
    }
}

#[async_trait::async_trait]
impl Element for Seen {
    fn name(&self) -> &'static str {
        "seen"
    }

    async fn request(&self, call: RequestCall, next: Next) -> Result<Connection, Error> {
        self.requests.fetch_add(1, SeqCst);
        let offered =
            call.message.mechanism_preferences.iter().chain(call.connection().mechanism.as_ref()).last().cloned();
        *self.netns.lock().unwrap() = offered.and_then(|mechanism| mechanism.parameters.get("inodeURL").cloned());
        let delay = *self.delay.lock().unwrap();
        tokio::time::sleep(delay).await;
        if self.refuse.load(SeqCst) {
            return Err(Error::new("seen", call.id(), "told to refuse"));
        }
        next.request(call).await
    }

    async fn close(&self, call: CloseCall, next: Next) -> Result<(), Error> {
        self.closes.fetch_add(1, SeqCst);
        next.close(call).await
    }
}

/// What a forwarder offers to the next hop: an interface here, a tunnel elsewhere.
struct Offer;

#[async_trait::async_trait]
impl Element for Offer {
    fn name(&self) -> &'static str {
        "offer"
    }

    async fn request(&self, mut call: RequestCall, next: Next) -> Result<Connection, Error> {
        for (cls, kind) in [("LOCAL", KERNEL), ("REMOTE", "VXLAN")] {
            let offer = Mechanism { cls: cls.into(), r#type: kind.into(), ..Default::default() };
            call.message.mechanism_preferences.push(offer);
        }
        next.request(call).await
    }
}

struct Alive(Arc<AtomicBool>);

#[async_trait::async_trait]
impl Liveness for Alive {
    async fn alive(&self, _: &Connection, _: Duration) -> bool {
        self.0.load(SeqCst)
    }
}

pub fn service() -> NetworkService {
    NetworkService { name: SERVICE.into(), payload: "ETHERNET".into(), ..Default::default() }
}

pub fn request(id: &str) -> NetworkServiceRequest {
    let connection = Connection { id: id.into(), network_service: SERVICE.into(), ..Default::default() };
    NetworkServiceRequest { connection: Some(connection), ..Default::default() }
}

pub fn again(connection: &Connection) -> NetworkServiceRequest {
    NetworkServiceRequest { connection: Some(connection.clone()), ..Default::default() }
}

pub fn names(connection: &Connection) -> Vec<&str> {
    connection.path.as_ref().unwrap().path_segments.iter().map(|segment| segment.name.as_str()).collect()
}

pub fn ids(connection: &Connection) -> Vec<&str> {
    connection.path.as_ref().unwrap().path_segments.iter().map(|segment| segment.id.as_str()).collect()
}

/// Waits until `check` holds.
pub async fn eventually<F: Future<Output = bool>>(what: &str, check: impl Fn() -> F) {
    let limit = Duration::from_secs(20);
    let deadline = Instant::now() + limit;
    while !check().await {
        assert!(Instant::now() < deadline, "not within {limit:?}: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// A service whose requests pass these stages, one after the other, and end at "nse". Labels say where one has been.
pub fn passthrough_service(stages: &[&str]) -> NetworkService {
    let app = |name: &str| [("app".to_owned(), name.to_owned())].into();
    let to = |name: &str| vec![Destination { destination_selector: app(name), ..Default::default() }];
    let after = stages.iter().enumerate().map(|(n, stage)| {
        let routes = to(stages.get(n + 1).unwrap_or(&"nse"));
        Match { source_selector: app(stage), routes, ..Default::default() }
    });
    let first = Match { routes: to(stages[0]), ..Default::default() };
    NetworkService { matches: after.chain([first]).collect(), ..service() }
}

/// One node with one forwarder and the service.
pub async fn node(world: &World, name: &str) -> (Manager, Forwarder) {
    let manager = world.manager(name, None).await;
    let forwarder = world.forwarder(&format!("fwd-{name}"), &manager, &[("p2p", "true")]).await;
    world.service(&manager, service()).await;
    (manager, forwarder)
}

/// The endpoint of the connection as the client knows it now.
pub fn endpoint_of(client: &Client, id: &str) -> Option<String> {
    let connection = client.connection(id)?;
    connection.path?.path_segments.last().map(|segment| segment.name.clone())
}

pub async fn moves_to(client: &Client, id: &str, endpoint: &str) {
    let there = || async { endpoint_of(client, id).as_deref() == Some(endpoint) };
    eventually(&format!("the connection is at {endpoint}"), there).await;
}
