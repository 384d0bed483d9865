//! The SDK against live peers: SPIRE's identities, and clients and endpoints made of the Go libraries that NSM's own stand on.
//!
//! A node (`meridio nsm`: manager and kernel forwarder) and a registry, processes of their own, stand between them.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test states what it expects by unwrapping it")]

use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use meridio_demo::namespace::Namespace;
use meridio_demo::process::Process;
use meridio_tests::peers::{Component, Log, Mesh, OurClient, OurEndpoint, Pings, installed};
use meridio_tests::scene::turn;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use nsm_chain::{ConnectionEventType, MonitorScopeSelector, PathSegment};
use nsm_identity::X509Source;
use nsm_kernel::Netns;
use nsm_kernel::ping;
use serde_json::Value;

const PATIENCE: Duration = Duration::from_secs(30);
const SERVICE: &str = "svc";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    Rust,
    Go,
}

/// A Go peer and what it prints.
struct Go {
    process: Arc<Process>,
    log: Log,
}

impl Go {
    fn start(mesh: &Mesh, role: &str, interface: &str, namespace: &Namespace) -> Self {
        let process = mesh.go(role, role, SERVICE, interface, namespace).unwrap();
        let log = Log::new(process.log());
        Self { process, log }
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.process.pid().unwrap().cast_signed()), signal).unwrap();
    }

    async fn wait(&mut self, event: &str) -> Value {
        self.log.wait(event, PATIENCE).await.unwrap()
    }
}

enum Client {
    Rust(OurClient),
    Go(Go),
}

impl Client {
    /// Establishes the connection; returns the names of its path's segments.
    async fn connect(&mut self) -> Vec<String> {
        match self {
            Client::Rust(client) => {
                let path = client.request().await.unwrap().path.unwrap();
                path.path_segments.into_iter().map(|segment| segment.name).collect()
            }
            Client::Go(client) => {
                let connected = client.wait("connected").await;
                let segments = connected["connection"]["path"]["path_segments"].as_array().unwrap().clone();
                segments.iter().map(|segment| segment["name"].as_str().unwrap().to_owned()).collect()
            }
        }
    }

    /// Refreshes until it works; returns how long that took.
    async fn refresh(&mut self) -> Duration {
        let began = Instant::now();
        match self {
            Client::Rust(client) => {
                while let Err(cause) = client.request().await {
                    assert!(began.elapsed() < PATIENCE, "not refreshed: {cause}");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
            Client::Go(client) => {
                client.log.skip();
                client.signal(Signal::SIGUSR1);
                client.wait("refreshed").await;
            }
        }
        began.elapsed()
    }

    async fn close(&mut self) {
        match self {
            Client::Rust(client) => client.close().await.unwrap(),
            Client::Go(client) => {
                client.signal(Signal::SIGTERM);
                client.wait("closed").await;
            }
        }
    }
}

#[allow(clippy::large_enum_variant, reason = "one of a test")]
enum Endpoint {
    Rust(OurEndpoint),
    Go(Go),
}

impl Endpoint {
    fn calls(&self) -> (usize, usize) {
        match self {
            Endpoint::Rust(endpoint) => endpoint.calls(),
            Endpoint::Go(endpoint) => (endpoint.log.count("requested"), endpoint.log.count("closed")),
        }
    }
}

async fn index(netns: &Netns, name: &str) -> Option<u32> {
    netns.netlink().await.unwrap().link_by_name(name).await.unwrap().map(|link| link.index)
}

async fn answers(netns: &Netns, source: Option<&str>, destination: &str) -> bool {
    for _ in 0..5 {
        let source = source.map(|source| source.parse().unwrap());
        if ping::probe(netns, source, destination.parse().unwrap(), Duration::from_secs(1)).await {
            return true;
        }
    }
    false
}

/// Addresses, policy route, MTU and the data path of a connection whose endpoint has given it the number `n`.
async fn check_data_path(client: &Netns, n: usize) {
    let netlink = client.netlink().await.unwrap();
    let link = netlink.link_by_name("nsm-0").await.unwrap().expect("the client's interface");
    assert_eq!(link.mtu, 1400, "{link:?}");
    let addresses = netlink.addresses(Some(link.index)).await.unwrap();
    for wanted in [format!("172.16.{n}.2/24"), format!("fd00:{n}::2/64"), "20.0.0.1/32".to_owned()] {
        assert!(addresses.iter().any(|address| address.net.to_string() == wanted), "{wanted}: {addresses:?}");
    }
    let rules = netlink.rules().await.unwrap();
    let rule = rules.iter().find(|rule| rule.from.is_some_and(|from| from.to_string() == "20.0.0.1/32"));
    let routes = netlink.routes(Some(rule.expect("the policy's rule").table)).await.unwrap();
    let gateway: IpAddr = format!("172.16.{n}.1").parse().unwrap();
    assert!(routes.iter().any(|route| route.hops.iter().any(|hop| hop.gateway == Some(gateway))), "{routes:?}");
    assert!(answers(client, None, &gateway.to_string()).await, "IPv4");
    assert!(answers(client, None, &format!("fd00:{n}::1")).await, "IPv6");
}

/// Another client gets a connection to the same endpoint, pings, and closes it.
async fn new_connection(mesh: &Mesh, identity: &X509Source, n: usize) -> Duration {
    let began = Instant::now();
    let netns = Netns::anonymous().unwrap();
    let client = OurClient::new(mesh, identity, &format!("other-{n}"), SERVICE, &netns).unwrap();
    while let Err(cause) = client.request().await {
        assert!(began.elapsed() < PATIENCE, "no new connection: {cause}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let took = began.elapsed();
    check_data_path(&netns, n).await;
    client.close().await.unwrap();
    assert_eq!(index(&netns, "nsm-0").await, None);
    took
}

/// The monitor has our connection at once, and tells of its refresh.
async fn check_monitor(client: &OurClient) {
    let segment = PathSegment { id: client.id().to_owned(), ..Default::default() };
    let selector = MonitorScopeSelector { path_segments: vec![segment], ..Default::default() };
    let mut events = client.client().monitor(selector).await.unwrap();
    let first = tokio::time::timeout(PATIENCE, events.next()).await.unwrap().unwrap().unwrap();
    assert_eq!(first.r#type(), ConnectionEventType::InitialStateTransfer);
    assert_eq!(first.connections.len(), 1);
    client.request().await.unwrap();
    let update = tokio::time::timeout(PATIENCE, events.next()).await.unwrap().unwrap().unwrap();
    assert_eq!(update.r#type(), ConnectionEventType::Update);
}

async fn scenario(programs: &std::path::Path, client_side: Side, endpoint_side: Side) {
    let label = format!("{client_side:?} client, {endpoint_side:?} endpoint");
    let began = Instant::now();
    let mesh = Mesh::start(programs, &["client", "endpoint"]).await.unwrap();
    println!("{label}: SPIRE, registry and node are up after {} ms", began.elapsed().as_millis());
    let identity = mesh.identity().await.unwrap();
    assert_eq!(identity.spiffe_id(), "spiffe://example.org/test");
    let first_leaf = identity.svid().chain()[0].to_vec();
    let (client_pod, endpoint_pod) = (mesh.namespace("client").unwrap(), mesh.namespace("endpoint").unwrap());
    let (client_ns, endpoint_ns) =
        (Netns::named(client_pod.name()).unwrap(), Netns::named(endpoint_pod.name()).unwrap());

    let endpoint = match endpoint_side {
        Side::Rust => Endpoint::Rust(OurEndpoint::start(&mesh, &identity, SERVICE, &endpoint_ns).await.unwrap()),
        Side::Go => {
            let mut go = Go::start(&mesh, "endpoint", "svc", &endpoint_pod);
            go.wait("registered").await;
            Endpoint::Go(go)
        }
    };
    let mut client = match client_side {
        Side::Rust => Client::Rust(OurClient::new(&mesh, &identity, "client", SERVICE, &client_ns).unwrap()),
        Side::Go => Client::Go(Go::start(&mesh, "client", "nsm-0", &client_pod)),
    };
    let names = client.connect().await;
    let own = if endpoint_side == Side::Rust { "nse" } else { "endpoint" };
    assert_eq!(names, ["client", "nsmgr", "forwarder-nsmgr", own]);
    check_data_path(&client_ns, 1).await;
    let (here, there) = (index(&client_ns, "nsm-0").await, index(&endpoint_ns, "svc-1").await);
    assert!(here.is_some() && there.is_some());

    let before = endpoint.calls().0;
    for _ in 0..3 {
        client.refresh().await;
    }
    assert!(endpoint.calls().0 >= before + 3, "{:?}", endpoint.calls());
    match &mut client {
        Client::Rust(client) => check_monitor(client).await,
        Client::Go(client) => {
            client.log = Log::new(client.process.log());
            let first = client.wait("monitor").await;
            assert_eq!(first["type"], "", "the first event is INITIAL_STATE_TRANSFER, the default: {first}");
            assert_eq!(client.wait("monitor").await["type"], "UPDATE");
        }
    }

    // Each is killed in turn; the data path has nothing to do with any of them.
    let pings = Pings::start(&client_ns, "172.16.1.1".parse().unwrap()).await.unwrap();
    let mut n = 1;
    for component in [Component::SpireAgent, Component::SpireServer, Component::Registry, Component::Node] {
        let killed = Instant::now();
        mesh.restart(component).await.unwrap();
        let up = killed.elapsed();
        client.refresh().await;
        let refreshed = killed.elapsed();
        n += 1;
        new_connection(&mesh, &identity, n).await;
        println!(
            "{label}: {component:?} killed: up again after {} ms, a refresh worked after {} ms, a new connection after {} ms; \
             pings sent and lost so far: {:?}",
            up.as_millis(),
            refreshed.as_millis(),
            killed.elapsed().as_millis(),
            pings.counts()
        );
        assert_eq!(index(&client_ns, "nsm-0").await, here, "{component:?}");
        assert_eq!(index(&endpoint_ns, "svc-1").await, there, "{component:?}");
    }
    // Identities rotate at half their life; long enough for each to have done so.
    while identity.svid().chain()[0].to_vec() == first_leaf || pings.counts().0 <= 100 {
        assert!(
            began.elapsed() < Duration::from_secs(90),
            "the identity is the first one still, {:?} pings",
            pings.counts()
        );
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    client.refresh().await;
    let (sent, lost) = pings.counts();
    assert!(sent > 100, "{sent} pings");
    assert_eq!(lost, 0, "{lost} of {sent} pings lost; {}", mesh.logs());

    drop(pings);
    let closes = endpoint.calls().1;
    client.close().await;
    assert_eq!(endpoint.calls().1, closes + 1);
    assert_eq!((index(&client_ns, "nsm-0").await, index(&endpoint_ns, "svc-1").await), (None, None));
    match endpoint {
        Endpoint::Rust(endpoint) => endpoint.end().await.unwrap(),
        Endpoint::Go(mut endpoint) => {
            endpoint.signal(Signal::SIGTERM);
            endpoint.wait("unregistered").await;
        }
    }
    println!("{label}: done after {} ms", began.elapsed().as_millis());
}

/// Runs a scenario in its turn, where there are peers.
fn run(client: Side, endpoint: Side) {
    let _turn = turn();
    let Some(programs): Option<PathBuf> = installed().unwrap() else { return };
    let filter = tracing_subscriber::EnvFilter::from_default_env();
    let _ = tracing_subscriber::fmt().with_env_filter(filter).with_test_writer().try_init();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(scenario(&programs, client, endpoint));
}

#[test]
fn go_client_and_rust_endpoint() {
    run(Side::Go, Side::Rust);
}

#[test]
fn rust_client_and_go_endpoint() {
    run(Side::Rust, Side::Go);
}

#[test]
fn go_client_and_go_endpoint() {
    run(Side::Go, Side::Go);
}
