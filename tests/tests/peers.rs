//! The SDK against live peers: SPIRE's identities, and registries, managers, clients and endpoints of NSM's own Go SDK in two versions.
//!
//! The kernel forwarder is always ours: either `meridio nsm` is manager and forwarder in one process, or it is the forwarder beside NSM's
//! manager and registry. Every part is a process of its own, and is killed in turn.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test states what it expects by unwrapping it")]

use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use meridio_demo::namespace::Namespace;
use meridio_demo::process::Process;
use meridio_tests::peers::{
    GoSdk, Infra, Log, Mesh, OurClient, OurEndpoint, Pings, TOKEN_LIFETIME, connections, installed, registered,
};
use meridio_tests::scene::turn;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use nsm_chain::{Connection, ConnectionEventType, IpContext, MonitorScopeSelector, PathSegment, PolicyRoute, Route};
use nsm_identity::X509Source;
use nsm_kernel::ping;
use nsm_kernel::{Netns, Rule};
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
        let process = mesh.go(role, SERVICE, interface, namespace).unwrap();
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

/// What the scenarios look at in a connection, whichever side has made it.
struct View {
    /// Names of its path's segments.
    segments: Vec<String>,
    context: IpContext,
}

impl View {
    fn of(connection: Connection) -> Self {
        let segments = connection.path.unwrap().path_segments.into_iter().map(|segment| segment.name).collect();
        let context = connection.context.unwrap();
        assert_eq!(context.mtu, 1400);
        Self { segments, context: context.ip_context.unwrap() }
    }

    /// A connection as a Go peer prints it.
    fn read(connection: &Value) -> Self {
        let texts = |list: &Value, key: &str| -> Vec<String> {
            let list = list.as_array().into_iter().flatten();
            list.map(|one| if key.is_empty() { one } else { &one[key] }.as_str().unwrap_or_default().to_owned())
                .collect()
        };
        assert_eq!(connection["context"]["MTU"], 1400);
        let ip = &connection["context"]["ip_context"];
        let route = |route: &Value| Route {
            prefix: route["prefix"].as_str().unwrap().to_owned(),
            next_hop: route["nextHop"].as_str().unwrap_or_default().to_owned(),
        };
        let policy = |policy: &Value| PolicyRoute {
            from: policy["from"].as_str().unwrap().to_owned(),
            routes: policy["routes"].as_array().unwrap().iter().map(route).collect(),
            ..Default::default()
        };
        let context = IpContext {
            src_ip_addrs: texts(&ip["src_ip_addrs"], ""),
            dst_ip_addrs: texts(&ip["dst_ip_addrs"], ""),
            policies: ip["policies"].as_array().unwrap().iter().map(policy).collect(),
            ..Default::default()
        };
        Self { segments: texts(&connection["path"]["path_segments"], "name"), context }
    }

    /// The endpoint's addresses.
    fn others(&self) -> Vec<IpAddr> {
        self.context.dst_ip_addrs.iter().map(|net| net.split('/').next().unwrap().parse().unwrap()).collect()
    }
}

/// Requests until it works, as NSM's clients do.
async fn persistently(client: &OurClient) -> Connection {
    let began = Instant::now();
    loop {
        match client.request().await {
            Ok(connection) => return connection,
            Err(cause) => assert!(began.elapsed() < PATIENCE, "no connection: {cause}"),
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

enum Client {
    Rust(OurClient),
    Go(Go),
}

impl Client {
    /// Establishes the connection.
    async fn connect(&mut self) -> View {
        match self {
            Client::Rust(client) => View::of(persistently(client).await),
            Client::Go(client) => View::read(&client.wait("connected").await["connection"]),
        }
    }

    /// Refreshes until it works.
    async fn refresh(&mut self) {
        match self {
            Client::Rust(client) => drop(persistently(client).await),
            Client::Go(client) => {
                client.log.skip();
                client.signal(Signal::SIGUSR1);
                client.wait("refreshed").await;
            }
        }
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

/// The interfaces of a namespace, apart from loopback: their names and indices.
async fn interfaces(netns: &Netns) -> Vec<(String, u32)> {
    let links = netns.netlink().await.unwrap().links().await.unwrap();
    let mut links: Vec<_> =
        links.into_iter().map(|link| (link.name, link.index)).filter(|(name, _)| name != "lo").collect();
    links.sort();
    links
}

/// Interfaces, rules and routes of a namespace.
async fn state(netns: &Netns) -> (Vec<(String, u32)>, Vec<Rule>, Vec<nsm_kernel::Route>) {
    let netlink = netns.netlink().await.unwrap();
    (interfaces(netns).await, netlink.rules().await.unwrap(), netlink.routes(None).await.unwrap())
}

async fn answers(netns: &Netns, destination: IpAddr) -> bool {
    for _ in 0..5 {
        if ping::probe(netns, None, destination, Duration::from_secs(1)).await {
            return true;
        }
    }
    false
}

/// Addresses, policy routes, MTU and the data path of a connection are in the client's namespace what its context says.
async fn check_data_path(client: &Netns, view: &View) {
    let netlink = client.netlink().await.unwrap();
    let link = netlink.link_by_name("nsm-0").await.unwrap().expect("the client's interface");
    assert_eq!(link.mtu, 1400, "{link:?}");
    let addresses = netlink.addresses(Some(link.index)).await.unwrap();
    let own = &view.context.src_ip_addrs;
    assert!(own.len() >= 3, "IPv4, IPv6 and the policy's: {own:?}");
    for wanted in own {
        assert!(addresses.iter().any(|address| address.net.to_string() == *wanted), "{wanted}: {addresses:?}");
    }
    assert_eq!(view.context.policies.len(), 1);
    let rules = netlink.rules().await.unwrap();
    for policy in &view.context.policies {
        let rule = rules.iter().find(|rule| rule.from.is_some_and(|from| from.to_string() == policy.from));
        let routes = netlink.routes(Some(rule.expect("the policy's rule").table)).await.unwrap();
        let gateway = policy.routes[0].next_hop.parse::<IpAddr>().ok();
        let found = |route: &nsm_kernel::Route| {
            route.hops.iter().any(|hop| hop.gateway == gateway && hop.oif == Some(link.index))
        };
        assert!(routes.iter().any(found), "{gateway:?} on {}: {routes:?}", link.index);
    }
    let others = view.others();
    assert!(others.iter().any(IpAddr::is_ipv4) && others.iter().any(IpAddr::is_ipv6), "{others:?}");
    for other in others {
        assert!(answers(client, other).await, "{other}");
    }
}

/// Another client gets a connection to the same endpoint, pings, and closes it.
async fn new_connection(mesh: &Mesh, identity: &X509Source, n: usize) {
    let netns = Netns::anonymous().unwrap();
    let client = OurClient::new(mesh, identity, &format!("other-{n}"), SERVICE, &netns).unwrap();
    let connection = persistently(&client).await;
    check_data_path(&netns, &View::of(connection)).await;
    client.close().await.unwrap();
    assert_eq!(interfaces(&netns).await, []);
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

#[derive(Clone, Copy, Debug)]
struct Cast {
    infra: Infra,
    client: Side,
    endpoint: Side,
    /// Version of the client and the endpoint, where they are Go.
    workloads: GoSdk,
    /// Goes on for longer than any token lives, with no refresh but the client's own.
    long: bool,
}

async fn scenario(programs: &Path, cast: Cast) {
    let label = format!("{cast:?}");
    let began = Instant::now();
    let mesh = Mesh::start(programs, cast.infra, cast.workloads).await.unwrap();
    println!("{label}: SPIRE, registry and node are up after {} ms", began.elapsed().as_millis());
    let identity = mesh.identity().await.unwrap();
    assert_eq!(identity.spiffe_id(), "spiffe://example.org/test");
    let first_leaf = identity.svid().chain()[0].to_vec();
    let (client_pod, endpoint_pod) = (mesh.namespace("client").unwrap(), mesh.namespace("endpoint").unwrap());
    let (client_ns, endpoint_ns) =
        (Netns::named(client_pod.name()).unwrap(), Netns::named(endpoint_pod.name()).unwrap());

    let before = (state(&client_ns).await, state(&endpoint_ns).await);
    let endpoint = match cast.endpoint {
        Side::Rust => Endpoint::Rust(OurEndpoint::start(&mesh, &identity, SERVICE, &endpoint_ns).await.unwrap()),
        Side::Go => {
            let mut go = Go::start(&mesh, "endpoint", "", &endpoint_pod);
            go.wait("registered").await;
            Endpoint::Go(go)
        }
    };
    let mut client = match cast.client {
        Side::Rust => Client::Rust(OurClient::new(&mesh, &identity, "client", SERVICE, &client_ns).unwrap()),
        Side::Go => Client::Go(Go::start(&mesh, "client", "nsm-0", &client_pod)),
    };
    let view = client.connect().await;
    println!("{label}: connected after {} ms", began.elapsed().as_millis());
    let forwarder = if cast.infra == Infra::Ours { "forwarder-nsmgr" } else { "forwarder" };
    let own = if cast.endpoint == Side::Rust { "nse" } else { "endpoint" };
    // NSM's manager is in the path again between forwarder and endpoint; ours answers for an endpoint of its own node at once.
    assert_eq!(view.segments, ["client", "nsmgr", forwarder, own]);
    check_data_path(&client_ns, &view).await;
    let (here, there) = (interfaces(&client_ns).await, interfaces(&endpoint_ns).await);
    assert_eq!((here.len(), there.len()), (1, 1), "{here:?} {there:?}");

    refresh_and_monitor(&mut client, &endpoint).await;
    if let (Client::Rust(first), Side::Go) = (&client, cast.endpoint) {
        second_connection(first, &client_ns, &endpoint_ns).await;
    }
    // Each is killed in turn; the data path has nothing to do with any of them.
    let pings = Pings::start(&client_ns, view.others()[0]).await.unwrap();
    for (n, component) in mesh.components().into_iter().enumerate() {
        let killed = Instant::now();
        mesh.restart(component).await.unwrap();
        let up = killed.elapsed();
        client.refresh().await;
        let refreshed = killed.elapsed();
        new_connection(&mesh, &identity, n).await;
        println!(
            "{label}: {component:?} killed: up again after {} ms, a refresh worked after {} ms, a new connection after {} ms; \
             pings sent and lost so far: {:?}",
            up.as_millis(),
            refreshed.as_millis(),
            killed.elapsed().as_millis(),
            pings.counts()
        );
        assert_eq!(interfaces(&client_ns).await, here, "{component:?}");
        assert_eq!(interfaces(&endpoint_ns).await, there, "{component:?}");
    }
    // The agent's restart has brought new ones.
    assert_ne!(identity.svid().chain()[0].to_vec(), first_leaf, "the identity is the first one still");
    if cast.long {
        outlive_tokens(&endpoint).await;
    }
    client.refresh().await;
    while pings.counts().0 <= 100 {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let (sent, lost) = pings.counts();
    assert_eq!(lost, 0, "{lost} of {sent} pings lost; {}", mesh.logs());

    drop(pings);
    let closes = endpoint.calls().1;
    client.close().await;
    assert_eq!(endpoint.calls().1, closes + 1);
    assert_eq!((state(&client_ns).await, state(&endpoint_ns).await), before, "as before the connection");
    for url in who_monitors(&mesh, cast) {
        assert_eq!(connections(&url, &identity, "client-0").await.unwrap(), Vec::<String>::new(), "{url}");
    }
    assert_eq!(registered(&mesh, &identity, SERVICE).await.unwrap().len(), 1);
    match endpoint {
        Endpoint::Rust(endpoint) => endpoint.end().await.unwrap(),
        Endpoint::Go(mut endpoint) => {
            endpoint.signal(Signal::SIGTERM);
            endpoint.wait("unregistered").await;
        }
    }
    assert_eq!(registered(&mesh, &identity, SERVICE).await.unwrap(), Vec::<String>::new());
    println!("{label}: done after {} ms", began.elapsed().as_millis());
}

/// Who has connections in its memory and tells anybody: NSM's manager tells clients of their own only.
fn who_monitors(mesh: &Mesh, cast: Cast) -> Vec<String> {
    match cast.infra {
        Infra::Ours => vec![mesh.manager()],
        Infra::Go(_) if cast.client == Side::Go => vec![mesh.socket("forwarder.sock")],
        Infra::Go(_) => vec![mesh.manager(), mesh.socket("forwarder.sock")],
    }
}

/// A client's second connection to the same endpoint, over the same transport connections, comes and goes beside the first one.
async fn second_connection(first: &OurClient, client_ns: &Netns, endpoint_ns: &Netns) {
    let before = (interfaces(client_ns).await, interfaces(endpoint_ns).await);
    let second = first.beside();
    let view = View::of(persistently(&second).await);
    for _ in 0..2 {
        let links = interfaces(client_ns).await;
        assert_eq!((&links[..1], links.len()), (&before.0[..], 2), "{links:?}");
        assert_eq!(links[1].0, "nsm-1");
        assert_eq!(interfaces(endpoint_ns).await.len(), 2);
        for other in view.others() {
            assert!(answers(client_ns, other).await, "{other}");
        }
        persistently(first).await;
        persistently(&second).await;
    }
    second.close().await.unwrap();
    assert_eq!((interfaces(client_ns).await, interfaces(endpoint_ns).await), before);
}

/// Nobody but the client itself refreshes, for longer than tokens and identities live.
async fn outlive_tokens(endpoint: &Endpoint) {
    let before = endpoint.calls();
    tokio::time::sleep(TOKEN_LIFETIME + Duration::from_secs(5)).await;
    let after = endpoint.calls();
    println!("over {TOKEN_LIFETIME:?} and 5 s: {} refreshes, {} closes", after.0 - before.0, after.1 - before.1);
    assert!(after.0 >= before.0 + 2, "{before:?} {after:?}");
    assert_eq!(after.1, before.1);
}

/// Refreshes reach the endpoint, and the monitor tells of them.
async fn refresh_and_monitor(client: &mut Client, endpoint: &Endpoint) {
    let before = endpoint.calls().0;
    for _ in 0..3 {
        client.refresh().await;
    }
    assert!(endpoint.calls().0 >= before + 3, "{:?}", endpoint.calls());
    match client {
        Client::Rust(client) => check_monitor(client).await,
        Client::Go(client) => {
            client.log = Log::new(client.process.log());
            assert_eq!(client.wait("monitor").await["type"], "INITIAL_STATE_TRANSFER");
            assert_eq!(client.wait("monitor").await["type"], "UPDATE");
        }
    }
}

/// Runs a scenario in its turn, where there are peers.
fn run(cast: Cast) {
    let _turn = turn();
    let Some(programs) = installed().unwrap() else { return };
    let filter = tracing_subscriber::EnvFilter::from_default_env();
    let _ = tracing_subscriber::fmt().with_env_filter(filter).with_test_writer().try_init();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(scenario(&programs, cast));
}

/// NSM's registry and manager in the version that Meridio 1.2 pins, with our forwarder, endpoint and client.
#[test]
fn pinned_go_manager_and_registry() {
    let infra = Infra::Go(GoSdk::Pinned);
    run(Cast { infra, client: Side::Rust, endpoint: Side::Rust, workloads: GoSdk::Pinned, long: true });
}

/// The same in a current version.
#[test]
fn current_go_manager_and_registry() {
    let infra = Infra::Go(GoSdk::Current);
    run(Cast { infra, client: Side::Rust, endpoint: Side::Rust, workloads: GoSdk::Current, long: false });
}

/// All of it is NSM's but the forwarder.
#[test]
fn our_forwarder_in_a_go_mesh() {
    let infra = Infra::Go(GoSdk::Current);
    run(Cast { infra, client: Side::Go, endpoint: Side::Go, workloads: GoSdk::Pinned, long: false });
}

#[test]
fn go_client_of_our_node() {
    run(Cast { infra: Infra::Ours, client: Side::Go, endpoint: Side::Rust, workloads: GoSdk::Pinned, long: true });
}

#[test]
fn go_endpoint_of_our_node() {
    run(Cast { infra: Infra::Ours, client: Side::Rust, endpoint: Side::Go, workloads: GoSdk::Current, long: false });
}
