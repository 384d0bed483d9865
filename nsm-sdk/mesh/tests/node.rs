//! Whole nodes in one process: endpoint and client over their manager's unix socket, interfaces in namespaces of their own.

#![allow(clippy::unwrap_used)] // Tests state what they expect by unwrapping it.

use ipnet::IpNet;
use nsm_chain::{
    Client, Connection, Element, Endpoint, Error, IpContext, Mechanism, NetworkServiceRequest, Next, RequestCall, Side,
    elements::{
        authorize::Policies,
        heal::LivenessCheck,
        mechanisms::Mechanisms,
        sendfd::{SendFdClient, SendFdServer},
    },
    remote::Grpc,
    token,
};
use nsm_identity::{Authority, X509Source};
use nsm_kernel::{
    Netns,
    netlink::{VethEnd, mac_from_seed},
    ping,
};
use nsm_mesh::{Node, NodeConfig};
use nsm_registry::{
    NetworkService, NetworkServiceEndpoint, Registry, RegistryClient, Security, Upstream,
    store::{SqliteStore, Store},
};
use nsm_transport::{Address, Listener, Transport};
use std::{
    net::IpAddr,
    os::{fd::AsRawFd, unix::fs::MetadataExt},
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;

const HOUR: Duration = Duration::from_secs(3600);
const TIMEOUT: Duration = Duration::from_secs(10);
const SERVICE: &str = "svc";

struct World {
    authority: Authority,
    folder: tempfile::TempDir,
    sources: Mutex<Vec<(String, X509Source)>>,
}

impl World {
    fn new() -> Self {
        // RUST_LOG shows what happened when a test fails.
        let filter = tracing_subscriber::EnvFilter::from_default_env();
        let _ = tracing_subscriber::fmt().with_env_filter(filter).with_test_writer().try_init();
        let (authority, folder) = (Authority::generate("example.org").unwrap(), tempfile::tempdir().unwrap());
        Self { authority, folder, sources: Mutex::default() }
    }

    /// One for each process: its tokens are by the key that it shows.
    fn source(&self, name: &str) -> X509Source {
        let mut sources = self.sources.lock().unwrap();
        if let Some((_, source)) = sources.iter().find(|(known, _)| known == name) {
            return source.clone();
        }
        let source = self.authority.source(&format!("/{name}"), HOUR).unwrap();
        sources.push((name.to_owned(), source.clone()));
        source
    }

    /// A new key and certificate for everybody whose name begins so.
    fn rotate(&self, prefix: &str) {
        for (name, source) in self.sources.lock().unwrap().iter().filter(|(name, _)| name.starts_with(prefix)) {
            source.update(self.authority.identity(&format!("/{name}"), HOUR).unwrap());
        }
    }

    fn transport(&self, name: &str) -> Transport {
        Transport::new(self.source(name)).unwrap()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn socket(&self, name: &str) -> String {
        format!("unix://{}", self.path(name).display())
    }
}

/// Something that listens until it is dropped or stopped; the stop is abrupt, as a kill is.
struct Served {
    stop: CancellationToken,
    task: Option<JoinHandle<()>>,
}

impl Served {
    fn start(transport: Transport, listeners: Vec<Listener>, routes: Routes) -> Self {
        let stop = CancellationToken::new();
        let ended = stop.clone();
        let task = tokio::spawn(async move { transport.serve(listeners, routes, ended).await.unwrap() });
        Self { stop, task: Some(task) }
    }

    async fn stop(mut self) {
        self.stop.cancel();
        self.task.take().unwrap().await.unwrap();
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

/// One node as `meridio nsm` builds it.
struct RunningNode {
    served: Served,
    node: Node,
    registry_url: Option<String>,
    tcp: String,
}

async fn listen(url: &str) -> Listener {
    Listener::bind(&Address::parse(url).unwrap()).await.unwrap()
}

/// `registry` is another node's registry, or none to embed one; `tcp` an address used before, to come back to.
async fn start_node(
    world: &World,
    name: &str,
    netns: &Netns,
    tunnel_ip: Option<IpAddr>,
    registry: Option<&str>,
    before: Option<(&str, Option<&str>)>,
) -> RunningNode {
    let source = world.source(name);
    let transport = Transport::new(source.clone()).unwrap();
    let security = Security::new(source.clone());
    let (tcp, registry_listen) = before.unwrap_or(("tcp://127.0.0.1:0", Some("tcp://127.0.0.1:0")));
    let mut listeners = vec![listen(&world.socket(name)).await, listen(tcp).await];
    let tcp = listeners[1].address().to_string();
    let mut registry_url = None;
    let upstream = match registry {
        Some(url) => {
            let address = Address::parse(url).unwrap();
            Upstream::Remote(nsm_registry::Dialer::new(transport.clone(), address, TIMEOUT))
        }
        None => {
            let store: Arc<dyn Store> = Arc::new(SqliteStore::open(&world.path("registry.db")).unwrap());
            let registry = Registry::open(store, &security).await.unwrap();
            let listener = listen(registry_listen.unwrap()).await;
            registry_url = Some(listener.address().to_string());
            let routes = nsm_registry::service::add_routes(
                Routes::default(),
                registry.services.clone(),
                registry.endpoints.clone(),
            );
            listeners.push(listener);
            let served = Served::start(transport.clone(), vec![listeners.pop().unwrap()], routes);
            std::mem::forget(served);
            Upstream::Local(registry)
        }
    };
    let config = NodeConfig {
        labels: vec![("nodeName".into(), name.into())],
        tunnel_ip,
        ..NodeConfig::new(name, &tcp, source, netns.clone())
    };
    let node = Node::new(config, upstream).unwrap();
    node.register_forwarder().await.unwrap();
    let served = Served::start(transport, listeners, node.routes());
    RunningNode { served, node, registry_url, tcp }
}

fn netns_url(netns: &Netns) -> String {
    format!("file:///proc/self/fd/{}", netns.fd().as_raw_fd())
}

fn kernel(netns: &Netns, name: &str) -> Mechanism {
    let parameters = [("inodeURL".to_owned(), netns_url(netns)), ("name".to_owned(), name.to_owned())].into();
    Mechanism { cls: "LOCAL".into(), r#type: "KERNEL".into(), parameters }
}

/// `kernel` of the endpoint, for a namespace that is not the process's own.
struct KernelIn(Netns, &'static str);

#[async_trait::async_trait]
impl Element for KernelIn {
    fn name(&self) -> &'static str {
        "kernel"
    }
    async fn request(&self, mut call: RequestCall, next: Next) -> Result<Connection, Error> {
        call.connection_mut().mechanism = Some(kernel(&self.0, self.1));
        next.request(call).await
    }
}

/// An IPAM that knows one client.
#[derive(Clone, Default)]
struct Addresses(Arc<AtomicUsize>, Arc<AtomicUsize>);

#[async_trait::async_trait]
impl Element for Addresses {
    fn name(&self) -> &'static str {
        "addresses"
    }
    async fn request(&self, mut call: RequestCall, next: Next) -> Result<Connection, Error> {
        self.0.fetch_add(1, Ordering::SeqCst);
        let context = call.connection_mut().context.get_or_insert_default();
        context.mtu = 1400;
        context.ip_context = Some(IpContext {
            src_ip_addrs: vec!["172.16.1.2/24".into(), "fd00:1::2/64".into()],
            dst_ip_addrs: vec!["172.16.1.1/24".into(), "fd00:1::1/64".into()],
            ..Default::default()
        });
        next.request(call).await
    }
    async fn close(&self, call: nsm_chain::CloseCall, next: Next) -> Result<(), Error> {
        self.1.fetch_add(1, Ordering::SeqCst);
        next.close(call).await
    }
}

/// An endpoint process: its chain, its socket, its registration.
struct Nse {
    _served: Served,
    registry: RegistryClient,
    registration: NetworkServiceEndpoint,
    calls: Addresses,
}

async fn start_endpoint(world: &World, manager: &str, netns: &Netns) -> Nse {
    let calls = Addresses::default();
    let tokens = token::from_source(world.source("nse"), HOUR);
    let endpoint = Endpoint::builder("nse", tokens)
        .element(calls.clone())
        .element(Mechanisms::new(Side::Server).with("KERNEL", KernelIn(netns.clone(), "svc-1")))
        .element(SendFdServer)
        .build();
    let url = world.socket("nse.sock");
    let served = Served::start(world.transport("nse"), vec![listen(&url).await], endpoint.service().routes());
    let registry = RegistryClient::builder(manager, world.source("nse")).build().unwrap();
    let service = NetworkService { name: SERVICE.into(), payload: "ETHERNET".into(), ..Default::default() };
    registry.register_ns(service).await.unwrap();
    let registration = NetworkServiceEndpoint {
        name: "nse".into(),
        network_service_names: vec![SERVICE.into()],
        url,
        ..Default::default()
    };
    registry.register_nse(registration.clone()).await.unwrap();
    Nse { _served: served, registry, registration, calls }
}

struct AlwaysAlive;

#[async_trait::async_trait]
impl nsm_chain::elements::heal::Liveness for AlwaysAlive {
    async fn alive(&self, _: &Connection, _: Duration) -> bool {
        true
    }
}

fn client(world: &World, manager: &str) -> Client {
    Client::builder("nsc", Arc::new(Grpc::new(world.transport("nsc"))))
        .url(manager)
        .policies(Policies::client())
        .liveness(LivenessCheck::new(Arc::new(AlwaysAlive)))
        .element(SendFdClient)
        .build()
}

fn request(netns: &Netns) -> NetworkServiceRequest {
    let connection = Connection { id: "nsc-0".into(), network_service: SERVICE.into(), ..Default::default() };
    NetworkServiceRequest { connection: Some(connection), mechanism_preferences: vec![kernel(netns, "nsm-0")] }
}

fn names(connection: &Connection) -> Vec<&str> {
    connection.path.as_ref().unwrap().path_segments.iter().map(|segment| segment.name.as_str()).collect()
}

fn ids(connection: &Connection) -> Vec<&str> {
    connection.path.as_ref().unwrap().path_segments.iter().map(|segment| segment.id.as_str()).collect()
}

async fn index(netns: &Netns, name: &str) -> Option<u32> {
    netns.netlink().await.unwrap().link_by_name(name).await.unwrap().map(|link| link.index)
}

async fn answers(netns: &Netns, ip: &str) -> bool {
    for _ in 0..5 {
        if ping::probe(netns, None, ip.parse().unwrap(), Duration::from_secs(1)).await {
            return true;
        }
    }
    false
}

async fn joined(a: &str, b: &str) -> (Netns, Netns) {
    let (node_a, node_b) = (Netns::anonymous().unwrap(), Netns::anonymous().unwrap());
    let end = |n: &Netns, seed: &str| VethEnd { netns: n.clone(), name: "eth0".into(), mac: mac_from_seed(seed) };
    node_a.netlink().await.unwrap().veth_create(&end(&node_a, "a"), &end(&node_b, "b"), None).await.unwrap();
    for (node, ip) in [(&node_a, a), (&node_b, b)] {
        let netlink = node.netlink().await.unwrap();
        let index = netlink.link_by_name("eth0").await.unwrap().unwrap().index;
        netlink.link_up(index).await.unwrap();
        netlink.address_replace(index, IpNet::new(ip.parse().unwrap(), 24).unwrap()).await.unwrap();
    }
    (node_a, node_b)
}

// Conformance 74, 82, 51
#[tokio::test(flavor = "multi_thread")]
async fn local_connection_its_refresh_a_restart_of_the_node_and_its_close() {
    let world = World::new();
    let (node_ns, client_ns, nse_ns) =
        (Netns::anonymous().unwrap(), Netns::anonymous().unwrap(), Netns::anonymous().unwrap());
    let node = start_node(&world, "nsmgr-a", &node_ns, None, None, None).await;
    let manager = world.socket("nsmgr-a");
    let nse = start_endpoint(&world, &manager, &nse_ns).await;
    let client = client(&world, &manager);

    let first = client.request(request(&client_ns), TIMEOUT).await.unwrap();
    assert_eq!(names(&first), ["nsc", "nsmgr-a", "forwarder-nsmgr-a", "nse"]);
    assert_eq!(first.path.as_ref().unwrap().index, 0);
    let (here, there) = (index(&client_ns, "nsm-0").await.unwrap(), index(&nse_ns, "svc-1").await.unwrap());
    assert!(answers(&client_ns, "172.16.1.1").await && answers(&client_ns, "fd00:1::1").await);
    assert!(answers(&nse_ns, "172.16.1.2").await);

    // A refresh keeps path and interfaces.
    let again = client.request(request(&client_ns), TIMEOUT).await.unwrap();
    assert_eq!(ids(&again), ids(&first));
    assert_eq!(nse.calls.0.load(Ordering::SeqCst), 2);
    assert_eq!(index(&client_ns, "nsm-0").await, Some(here));

    // New keys, for one side of each connection at a time and then for all: connections made with the old ones serve no more.
    for prefix in ["nsc", "nsmgr", "nse", ""] {
        world.rotate(prefix);
        for _ in 0..2 {
            let again = client.request(request(&client_ns), TIMEOUT).await.unwrap();
            assert_eq!(ids(&again), ids(&first));
        }
        nse.registry.register_nse(nse.registration.clone()).await.unwrap();
    }
    assert_eq!(index(&client_ns, "nsm-0").await, Some(here));
    let before = nse.calls.0.load(Ordering::SeqCst);

    // The process comes back with nothing in memory; everybody finds it by themselves.
    let (tcp, registry_url) = (node.tcp.clone(), node.registry_url.clone());
    node.served.stop().await;
    drop(node.node);
    let restarted = std::time::Instant::now();
    let _ = registry_url;
    let node = start_node(&world, "nsmgr-a", &node_ns, None, None, Some((&tcp, Some("tcp://127.0.0.1:0")))).await;
    while nse.calls.0.load(Ordering::SeqCst) <= before {
        assert!(restarted.elapsed() < Duration::from_secs(10), "the client did not heal");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    println!("healed after {:?}", restarted.elapsed());
    let healed = client.request(request(&client_ns), TIMEOUT).await.unwrap();
    assert_eq!(ids(&healed), ids(&first));
    assert_eq!(index(&client_ns, "nsm-0").await, Some(here));
    assert_eq!(index(&nse_ns, "svc-1").await, Some(there));
    assert_eq!(nse.calls.1.load(Ordering::SeqCst), 0, "nothing was closed");

    client.close(healed, TIMEOUT).await.unwrap();
    assert_eq!(nse.calls.1.load(Ordering::SeqCst), 1);
    assert_eq!((index(&client_ns, "nsm-0").await, index(&nse_ns, "svc-1").await), (None, None));
    nse.registry.unregister_nse(nse.registration.clone(), None).await.unwrap();
    drop(node);
}

// Conformance 74
#[tokio::test(flavor = "multi_thread")]
async fn remote_connection_over_vxlan_has_six_segments() {
    let world = World::new();
    let (ns_a, ns_b) = joined("10.9.0.1", "10.9.0.2").await;
    let (client_ns, nse_ns) = (Netns::anonymous().unwrap(), Netns::anonymous().unwrap());
    let node_a = start_node(&world, "nsmgr-a", &ns_a, Some("10.9.0.1".parse().unwrap()), None, None).await;
    let registry = node_a.registry_url.clone().unwrap();
    let node_b = start_node(&world, "nsmgr-b", &ns_b, Some("10.9.0.2".parse().unwrap()), Some(&registry), None).await;
    let nse = start_endpoint(&world, &world.socket("nsmgr-b"), &nse_ns).await;
    let client = client(&world, &world.socket("nsmgr-a"));

    let first = client.request(request(&client_ns), TIMEOUT).await.unwrap();
    assert_eq!(names(&first), ["nsc", "nsmgr-a", "forwarder-nsmgr-a", "nsmgr-b", "forwarder-nsmgr-b", "nse"]);
    assert!(answers(&client_ns, "172.16.1.1").await && answers(&client_ns, "fd00:1::1").await);
    assert!(answers(&nse_ns, "172.16.1.2").await);
    let (here, there) = (index(&client_ns, "nsm-0").await.unwrap(), index(&nse_ns, "svc-1").await.unwrap());

    // The endpoint's node restarts: both ends of the tunnel stay as they are.
    let tcp = node_b.tcp.clone();
    node_b.served.stop().await;
    drop(node_b.node);
    let before = nse.calls.0.load(Ordering::SeqCst);
    let node_b =
        start_node(&world, "nsmgr-b", &ns_b, Some("10.9.0.2".parse().unwrap()), Some(&registry), Some((&tcp, None)))
            .await;
    let restarted = std::time::Instant::now();
    while nse.calls.0.load(Ordering::SeqCst) == before {
        assert!(restarted.elapsed() < Duration::from_secs(10), "the client did not heal");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    println!("healed after {:?}", restarted.elapsed());
    let healed = client.request(request(&client_ns), TIMEOUT).await.unwrap();
    assert_eq!(ids(&healed), ids(&first));
    assert_eq!(index(&client_ns, "nsm-0").await, Some(here));
    assert_eq!(index(&nse_ns, "svc-1").await, Some(there));
    assert!(answers(&client_ns, "172.16.1.1").await);

    client.close(healed, TIMEOUT).await.unwrap();
    assert_eq!((index(&client_ns, "nsm-0").await, index(&nse_ns, "svc-1").await), (None, None));
    drop((node_a, node_b));
}

/// Open files and threads of this process in or of a namespace.
fn holders(ino: u64) -> Vec<String> {
    let is = |path: &std::path::Path| std::fs::metadata(path).is_ok_and(|found| found.ino() == ino);
    let entries = |folder: &str| std::fs::read_dir(folder).unwrap().flatten().map(|entry| entry.path());
    let files = entries("/proc/self/fd").filter(|file| is(file)).map(|file| {
        let info = std::fs::read_to_string(file.to_string_lossy().replace("/fd/", "/fdinfo/")).unwrap_or_default();
        format!("{}: {}", file.display(), info.replace('\n', " "))
    });
    let threads = entries("/proc/self/task").map(|task| task.join("ns/net")).filter(|file| is(file));
    files.chain(threads.map(|thread| thread.display().to_string())).collect()
}

/// A pod that dies without a word takes its interfaces with it: nothing on the node holds its namespace.
#[tokio::test(flavor = "multi_thread")]
async fn nobody_holds_the_namespace_of_a_dead_client() {
    let world = World::new();
    let (node_ns, nse_ns) = (Netns::anonymous().unwrap(), Netns::anonymous().unwrap());
    let node = start_node(&world, "nsmgr-a", &node_ns, None, None, None).await;
    let manager = world.socket("nsmgr-a");
    let nse = start_endpoint(&world, &manager, &nse_ns).await;

    // The client has a runtime of its own, so that it can die with all its tasks.
    let source = world.source("nsc");
    let namespace = tokio::task::spawn_blocking(move || {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let namespace = runtime.block_on(async {
            let client_ns = Netns::anonymous().unwrap();
            let client = Client::builder("nsc", Arc::new(Grpc::new(Transport::new(source).unwrap())))
                .url(manager)
                .liveness(LivenessCheck::new(Arc::new(AlwaysAlive)))
                .element(SendFdClient)
                .build();
            client.request(request(&client_ns), TIMEOUT).await.unwrap();
            client.request(request(&client_ns), TIMEOUT).await.unwrap();
            assert!(index(&client_ns, "nsm-0").await.is_some());
            client_ns.id().ino
        });
        runtime.shutdown_timeout(Duration::from_secs(2));
        namespace
    })
    .await
    .unwrap();

    let died = std::time::Instant::now();
    while index(&nse_ns, "svc-1").await.is_some() {
        let late = died.elapsed() > Duration::from_secs(8);
        assert!(!late, "the interface to a dead client is still there; held by {:?}", holders(namespace));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    println!("gone after {:?}", died.elapsed());
    drop((node, nse));
}
