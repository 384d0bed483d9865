//! NSP and IPAM in one process, over real mTLS sockets on loopback, with restarts.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test states what it expects by unwrapping it")]

use std::net::{Ipv6Addr, TcpListener};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use clap::Parser;
use meridio_common::{Health, connect};
use meridio_proto::ipam::v1::ipam_client::IpamClient;
use meridio_proto::ipam::v1::{Child, IpFamily, Subnet};
use meridio_proto::nsp::v1::configuration_manager_client::ConfigurationManagerClient;
use meridio_proto::nsp::v1::target_registry_client::TargetRegistryClient;
use meridio_proto::nsp::v1::{Attractor, Conduit, Flow, Gateway, Stream, Target, Trench, Vip, target};
use nsm_identity::{Authority, X509Source};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;
use tonic::{Code, Streaming};

const FIXTURE: &str = include_str!("../../endpoints/model/tests/fixture.yaml");
const LIMIT: Duration = Duration::from_secs(20);

#[derive(Parser)]
struct Nsp {
    #[command(flatten)]
    settings: meridio_nsp::Settings,
}

#[derive(Parser)]
struct Ipam {
    #[command(flatten)]
    settings: meridio_ipam::Settings,
}

/// A component that can be stopped and started again.
struct Running {
    stop: CancellationToken,
    task: JoinHandle<anyhow::Result<()>>,
    health: Health,
}

impl Running {
    async fn stop(self) {
        self.stop.cancel();
        tokio::time::timeout(LIMIT, self.task).await.expect("stops in time").unwrap().unwrap();
    }
}

fn free_port() -> u16 {
    TcpListener::bind((Ipv6Addr::UNSPECIFIED, 0)).unwrap().local_addr().unwrap().port()
}

fn nsp(dir: &Path, port: u16, source: &X509Source) -> Running {
    let settings = Nsp::parse_from([
        "nsp",
        &format!("--port={port}"),
        &format!("--config-file={}", dir.join("configuration.yaml").display()),
        &format!("--datasource={}", dir.join("nsp.db").display()),
    ])
    .settings;
    let (stop, health) = (CancellationToken::new(), Health::detached("Meridio-nsp"));
    let task = tokio::spawn(meridio_nsp::run_with(settings, source.clone(), health.clone(), stop.clone()));
    Running { stop, task, health }
}

fn ipam(dir: &Path, port: u16, nsp: u16, source: &X509Source) -> Running {
    let settings = Ipam::parse_from([
        "ipam",
        &format!("--port={port}"),
        &format!("--datasource={}", dir.join("ipam.db").display()),
        "--trench-name=trench-a",
        "--prefix-ipv4=172.16.0.0/16",
        &format!("--nsp-service=127.0.0.1:{nsp}"),
    ])
    .settings;
    let (stop, health) = (CancellationToken::new(), Health::detached("Meridio-ipam"));
    let task = tokio::spawn(meridio_ipam::run_with(settings, source.clone(), health.clone(), stop.clone()));
    Running { stop, task, health }
}

/// A lazy channel fails at once while nobody listens or the server is going, so the call is repeated.
macro_rules! eventually {
    ($call:expr) => {{
        let started = Instant::now();
        loop {
            match $call.await {
                Ok(response) => break response.into_inner(),
                Err(status)
                    if matches!(status.code(), Code::Unavailable | Code::Cancelled) && started.elapsed() < LIMIT =>
                {
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
                Err(status) => panic!("{status}"),
            }
        }
    }};
}

async fn next<M>(stream: &mut Streaming<M>) -> M {
    tokio::time::timeout(LIMIT, stream.message())
        .await
        .expect("a message in time")
        .unwrap()
        .expect("the stream goes on")
}

/// Nothing comes for a while.
async fn quiet<M: std::fmt::Debug>(stream: &mut Streaming<M>) {
    if let Ok(message) = tokio::time::timeout(Duration::from_millis(500), stream.message()).await {
        panic!("{message:?}");
    }
}

fn trench() -> Option<Trench> {
    Some(Trench { name: "trench-a".to_owned() })
}

fn conduit(name: &str) -> Conduit {
    Conduit { name: name.to_owned(), trench: trench(), ..Conduit::default() }
}

fn stream(name: &str) -> Stream {
    Stream { name: name.to_owned(), conduit: Some(conduit("")), ..Stream::default() }
}

fn a_target(status: target::Status) -> Target {
    let stream = Stream { conduit: Some(conduit("conduit-a-1")), ..stream("stream-a-i") };
    Target { ips: vec!["172.16.0.3".to_owned()], status: status.into(), stream: Some(stream), ..Target::default() }
}

fn any_target() -> Target {
    Target { status: target::Status::Any.into(), ..Target::default() }
}

#[tokio::test(flavor = "multi_thread")]
async fn configuration_reaches_every_watch_and_survives_faults_and_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("configuration.yaml");
    std::fs::write(&file, FIXTURE).unwrap();
    let authority = Authority::generate("example.org").unwrap();
    let source = authority.source("/test", Duration::from_secs(3600)).unwrap();
    let port = free_port();
    let server = nsp(dir.path(), port, &source);
    let channel = connect(&source, &format!("127.0.0.1:{port}")).unwrap();
    let mut client = ConfigurationManagerClient::new(channel.clone());

    let mut trenches = eventually!(client.watch_trench(trench().unwrap()));
    assert_eq!(next(&mut trenches).await.trench.unwrap().name, "trench-a");
    let other = Trench { name: "trench-b".to_owned() };
    assert_eq!(next(&mut client.watch_trench(other).await.unwrap().into_inner()).await.trench, None);
    let mut conduits = client.watch_conduit(conduit("")).await.unwrap().into_inner();
    assert_eq!(next(&mut conduits).await.conduits[0].destination_port_nats[0].target_port, 4000);
    let mut streams = client.watch_stream(stream("")).await.unwrap().into_inner();
    assert_eq!(next(&mut streams).await.streams.len(), 2);
    let pattern = Flow { stream: Some(stream("stream-a-ii")), ..Flow::default() };
    let mut flows = client.watch_flow(pattern).await.unwrap().into_inner();
    assert_eq!(next(&mut flows).await.flows[0].name, "flow-a-z-udp");
    let mut vips = client.watch_vip(Vip { trench: trench(), ..Vip::default() }).await.unwrap().into_inner();
    assert_eq!(next(&mut vips).await.vips.len(), 2);
    let mut attractors =
        client.watch_attractor(Attractor { trench: trench(), ..Attractor::default() }).await.unwrap().into_inner();
    assert_eq!(next(&mut attractors).await.attractors[0].gateways.len(), 2);
    let mut gateways =
        client.watch_gateway(Gateway { trench: trench(), ..Gateway::default() }).await.unwrap().into_inner();
    assert_eq!(next(&mut gateways).await.gateways[0].remote_asn, 4_248_829_953);

    // Faults: nobody hears of them, the status does.
    std::fs::write(&file, FIXTURE.replace("20.0.0.1/32", "20.0.0.1")).unwrap();
    quiet(&mut vips).await;
    let notes = server.health.report().lines();
    assert!(
        notes[0]
            .ends_with("vip vip-a-1-v4: address \"20.0.0.1\" is not a CIDR (address/prefix length, e.g. 20.0.0.1/32)"),
        "{notes:?}"
    );

    // A change of the VIP alone: watches of gateways and streams stay quiet.
    std::fs::write(&file, FIXTURE.replace("20.0.0.1/32", "20.0.0.7/32")).unwrap();
    assert_eq!(next(&mut vips).await.vips[0].address, "20.0.0.7/32");
    assert_eq!(next(&mut flows).await.flows[0].vips[0].address, "20.0.0.7/32");
    assert!(server.health.report().notes.is_empty());
    quiet(&mut gateways).await;

    // A restart with a faulty file: the last good configuration at once, never an empty list.
    std::fs::write(&file, "flows: [").unwrap();
    server.stop().await;
    let server = nsp(dir.path(), port, &source);
    let mut vips = eventually!(client.watch_vip(Vip { trench: trench(), ..Vip::default() }));
    assert_eq!(next(&mut vips).await.vips[0].address, "20.0.0.7/32");
    assert!(server.health.report().notes["configuration"].last().unwrap().starts_with("the last good configuration"));

    // Somebody of another trust domain.
    let stranger = Authority::generate("example.com").unwrap().source("/test", Duration::from_secs(3600)).unwrap();
    let refused = ConfigurationManagerClient::new(connect(&stranger, &format!("127.0.0.1:{port}")).unwrap());
    assert!(refused.clone().watch_trench(trench().unwrap()).await.is_err());
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn targets_survive_a_restart_and_a_stuck_client_holds_up_nobody() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("configuration.yaml"), FIXTURE).unwrap();
    let authority = Authority::generate("example.org").unwrap();
    let source = authority.source("/test", Duration::from_secs(3600)).unwrap();
    let port = free_port();
    let server = nsp(dir.path(), port, &source);
    let address = format!("127.0.0.1:{port}");
    let mut client = TargetRegistryClient::new(connect(&source, &address).unwrap());

    let mut watch = eventually!(client.watch(any_target()));
    assert_eq!(next(&mut watch).await.targets.len(), 0);
    client.register(a_target(target::Status::Enabled)).await.unwrap();
    assert_eq!(next(&mut watch).await.targets[0].status(), target::Status::Disabled);
    client.register(a_target(target::Status::Enabled)).await.unwrap();
    assert_eq!(next(&mut watch).await.targets[0].status(), target::Status::Enabled);
    client.register(a_target(target::Status::Enabled)).await.unwrap();
    quiet(&mut watch).await;
    let bad = client.register(Target::default()).await.unwrap_err();
    assert_eq!(
        (bad.code(), bad.message()),
        (Code::InvalidArgument, "target []: ips is empty or holds an empty address")
    );

    // A client that never reads, on a connection of its own, while much changes.
    let mut stuck_client = TargetRegistryClient::new(connect(&source, &address).unwrap());
    let stuck = eventually!(stuck_client.watch(any_target()));
    let seen = Arc::new(AtomicUsize::new(0));
    let reader = tokio::spawn({
        let seen = seen.clone();
        async move {
            loop {
                let count = next(&mut watch).await.targets.len();
                seen.store(count, Ordering::SeqCst);
                if count == 301 {
                    return;
                }
            }
        }
    });
    for n in 0..300 {
        let context = [("filler".to_owned(), "x".repeat(1000))].into();
        let other =
            Target { ips: vec![format!("10.0.{}.{}", n / 250, n % 250)], context, ..a_target(target::Status::Enabled) };
        client.register(other).await.unwrap();
    }
    tokio::time::timeout(LIMIT, reader).await.expect("the other watch goes on").unwrap();
    drop(stuck);

    server.stop().await;
    let server = nsp(dir.path(), port, &source);
    let mut watch = eventually!(client.watch(any_target()));
    let first = next(&mut watch).await;
    assert_eq!(first.targets.len(), 301);
    assert!(first.targets.iter().any(|t| t.ips == ["172.16.0.3"] && t.status() == target::Status::Enabled));
    client.unregister(a_target(target::Status::Disabled)).await.unwrap();
    assert_eq!(next(&mut watch).await.targets.len(), 300);
    server.stop().await;
}

fn child(conduit: Option<Conduit>, node: &str, name: &str, family: IpFamily) -> Child {
    let subnet = Subnet { conduit, node: node.to_owned(), ip_family: family.into() };
    Child { name: name.to_owned(), subnet: Some(subnet) }
}

async fn allocate(client: &mut IpamClient<Channel>, node: &str, name: &str, family: IpFamily) -> String {
    let wanted = child(Some(conduit("conduit-a-1")), node, name, family);
    let prefix = eventually!(client.allocate(wanted.clone()));
    format!("{}/{}", prefix.address, prefix.prefix_length)
}

#[tokio::test(flavor = "multi_thread")]
async fn addresses_are_the_same_after_restarts_and_without_the_nsp() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("configuration.yaml");
    std::fs::write(&file, FIXTURE).unwrap();
    let authority = Authority::generate("example.org").unwrap();
    let source = authority.source("/test", Duration::from_secs(3600)).unwrap();
    let (nsp_port, ipam_port) = (free_port(), free_port());
    let nsp_server = nsp(dir.path(), nsp_port, &source);
    let server = ipam(dir.path(), ipam_port, nsp_port, &source);
    let mut client = IpamClient::new(connect(&source, &format!("127.0.0.1:{ipam_port}")).unwrap());

    assert_eq!(allocate(&mut client, "node-a", "bridge", IpFamily::Ipv4).await, "172.16.0.1/24");
    assert_eq!(allocate(&mut client, "node-a", "bridge", IpFamily::Ipv6).await, "fd00::1/64");
    assert_eq!(allocate(&mut client, "node-b", "bridge", IpFamily::Ipv4).await, "172.16.1.1/24");
    assert_eq!(allocate(&mut client, "node-a", "x-src", IpFamily::Ipv4).await, "172.16.0.2/24");

    // What cannot be asked for.
    let mut code = async |wanted: Child| client.allocate(wanted).await.unwrap_err().code();
    assert_eq!(code(child(None, "n", "c", IpFamily::Ipv4)).await, Code::InvalidArgument);
    assert_eq!(code(child(Some(Conduit::default()), "n", "c", IpFamily::Ipv4)).await, Code::InvalidArgument);
    let foreign = Conduit { trench: Some(Trench { name: "trench-b".to_owned() }), ..conduit("conduit-a-1") };
    assert_eq!(code(child(Some(foreign.clone()), "n", "c", IpFamily::Ipv4)).await, Code::NotFound);
    let mut request = tonic::Request::new(child(Some(conduit("conduit-x")), "n", "c", IpFamily::Ipv4));
    request.set_timeout(Duration::from_secs(1));
    let started = Instant::now();
    let unknown = client.allocate(request).await.unwrap_err();
    assert_eq!(unknown.code(), Code::NotFound, "{unknown}");
    assert!(started.elapsed() < Duration::from_secs(1));
    for wanted in [child(None, "n", "c", IpFamily::Ipv4), child(Some(foreign), "n", "c", IpFamily::Ipv4)] {
        client.release(wanted).await.unwrap();
    }
    client.release(child(Some(conduit("conduit-a-1")), "node-a", "x-src", IpFamily::Ipv4)).await.unwrap();

    // A conduit that is configured while somebody waits for it.
    let waiting = tokio::spawn({
        let mut client = client.clone();
        async move { client.allocate(child(Some(conduit("conduit-a-2")), "node-a", "bridge", IpFamily::Ipv4)).await }
    });
    tokio::time::sleep(Duration::from_millis(100)).await;
    let more = FIXTURE.replace(
        "    - name: conduit-a-1\n",
        "    - name: conduit-a-2\n      trench: trench-a\n    - name: conduit-a-1\n",
    );
    std::fs::write(&file, more).unwrap();
    let late = tokio::time::timeout(LIMIT, waiting).await.unwrap().unwrap().unwrap().into_inner();
    assert_eq!(late.address, "172.16.16.1");

    // Both go, only the IPAM comes back.
    nsp_server.stop().await;
    server.stop().await;
    let server = ipam(dir.path(), ipam_port, nsp_port, &source);
    assert_eq!(allocate(&mut client, "node-a", "bridge", IpFamily::Ipv4).await, "172.16.0.1/24");
    assert_eq!(allocate(&mut client, "node-a", "y-src", IpFamily::Ipv4).await, "172.16.0.2/24");
    assert!(server.health.report().lines()[0].starts_with("NSPCli waits for the NSP at 127.0.0.1:"));
    server.stop().await;
}

#[tokio::test]
async fn bad_input_is_named_line_by_line() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::generate("example.org").unwrap();
    let source = authority.source("/test", Duration::from_secs(3600)).unwrap();
    let broken = FIXTURE.replace("20.0.0.1/32", "20.0.0.1").replace("priority: 1", "prio: 1");
    std::fs::write(dir.path().join("configuration.yaml"), broken).unwrap();
    let error = nsp(dir.path(), free_port(), &source).task.await.unwrap().unwrap_err().to_string();
    let lines: Vec<_> = error.lines().collect();
    assert_eq!(lines.len(), 5, "{error}");
    assert!(lines.iter().all(|line| line.starts_with("configuration file /")), "{error}");

    let busy = TcpListener::bind((Ipv6Addr::UNSPECIFIED, 0)).unwrap();
    let port = busy.local_addr().unwrap().port();
    let error = ipam(dir.path(), port, 1, &source).task.await.unwrap().unwrap_err().to_string();
    assert!(error.contains("cannot listen on") && error.contains(&port.to_string()), "{error}");

    let settings =
        Ipam::parse_from(["ipam", "--prefix-ipv4=172.16.0.1/16", "--node-prefix-length-ipv6=128", "--nsp-service=nsp"])
            .settings;
    let faults = settings.validate();
    assert_eq!(faults.len(), 3, "{faults:#?}");
}
