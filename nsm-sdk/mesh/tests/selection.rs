//! Which forwarder and which endpoint a connection gets, keeps, or is moved to. Control plane only: forwarders here make no
//! interfaces.

#![allow(clippy::unwrap_used, reason = "a test states what it expects by unwrapping it")]

mod sandbox;

use nsm_chain::{
    Chain, Client, Connection, Element,
    elements::{
        connect::ConnectServer,
        ipam::{PointToPoint, Strict},
        mechanismtranslation::MechanismTranslation,
        replacelabels::ReplaceLabels,
        replacensename::ReplaceNseName,
    },
    remote::Grpc,
};
use nsm_proto::registry::{
    Destination, Match, network_service_endpoint_registry_client::NetworkServiceEndpointRegistryClient,
};
use nsm_registry::{NetworkService, NetworkServiceEndpoint, NetworkServiceLabels};
use nsm_transport::Address;
use sandbox::*;
use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    time::Duration,
};
use tokio::time::sleep;

/// Two stages before the endpoint, each on the other node than the one before; both nodes may be the same one. Returns the names
/// on the path.
async fn passthrough(here: &str, there: &str) -> Vec<String> {
    let world = World::new();
    let _registry = world.registry().await;
    let mut nodes = vec![world.manager(here, None).await];
    if there != here {
        nodes.push(world.manager(there, None).await);
    }
    let mut forwarders = Vec::new();
    for manager in &nodes {
        forwarders.push(world.forwarder(&format!("fwd-{}", manager.name), manager, &[("p2p", "true")]).await);
    }
    world.service(&nodes[0], sandbox::passthrough_service(&["firewall", "filter"])).await;
    let mut endpoints = Vec::new();
    for (position, stage) in ["firewall", "filter", "nse"].into_iter().enumerate() {
        let manager = &nodes[(position + 1) % nodes.len()];
        let onward = (stage != "nse").then(|| {
            let client = Client::builder(stage, Arc::new(Grpc::new(world.transport(stage))))
                .passthrough()
                .url(world.url(&manager.name))
                .element(MechanismTranslation::new())
                .element(ReplaceLabels::new([("app".to_owned(), stage.to_owned())]))
                .element(ReplaceNseName::new())
                .element(nsm_chain::elements::kernel_mechanism::KernelClient::new())
                .element(nsm_chain::elements::sendfd::SendFdClient)
                .build();
            let chain: Chain = client.chain().clone();
            Arc::new(ConnectServer::new(chain)) as Arc<dyn Element>
        });
        let mut nse = world.endpoint_with(stage, manager, onward.into_iter().collect()).await;
        let app = [("app".to_owned(), stage.to_owned())].into();
        nse.registration.network_service_labels = [(SERVICE.to_owned(), NetworkServiceLabels { labels: app })].into();
        nse.register().await;
        endpoints.push(nse);
    }
    let client = world.client("nsc", &nodes[0], None);
    let connection = client.request(request("c"), TIMEOUT).await.unwrap();
    let refreshed = client.request(again(&connection), TIMEOUT).await.unwrap();
    assert_eq!(ids(&refreshed), ids(&connection));
    client.close(refreshed, TIMEOUT).await.unwrap();
    assert!(endpoints.iter().all(|nse| nse.endpoint.hub().connections().is_empty()));
    names(&connection).into_iter().map(str::to_owned).collect()
}

// Conformance 56, 79
#[tokio::test(flavor = "multi_thread")]
async fn passthrough_endpoints_add_four_segments_each() {
    let stage = |name: &'static str| ["nsmgr", "fwd-nsmgr", name];
    let expected: Vec<&str> = [&["nsc"][..], &stage("firewall"), &stage("filter"), &stage("nse")].concat();
    assert_eq!(passthrough("nsmgr", "nsmgr").await, expected);
}

// Conformance 79
#[tokio::test(flavor = "multi_thread")]
async fn passthrough_endpoints_on_other_nodes_add_six_segments_each() {
    let from_a = |name: &'static str| ["a", "fwd-a", "b", "fwd-b", name];
    let from_b = |name: &'static str| ["b", "fwd-b", "a", "fwd-a", name];
    let expected: Vec<&str> = [&["nsc"][..], &from_a("firewall"), &from_b("filter"), &from_a("nse")].concat();
    assert_eq!(passthrough("a", "b").await, expected);
}

/// A service that leads to the endpoints with this label.
fn leading_to(app: &str) -> NetworkService {
    let destination_selector = [("app".to_owned(), app.to_owned())].into();
    let routes = vec![Destination { destination_selector, ..Default::default() }];
    NetworkService { matches: vec![Match { routes, ..Default::default() }], ..service() }
}

// Conformance 78
#[tokio::test(flavor = "multi_thread")]
async fn a_connection_follows_its_service_to_another_endpoint() {
    let world = World::new();
    let _registry = world.registry().await;
    let (manager, _forwarder) = node(&world, "nsmgr").await;
    world.service(&manager, leading_to("nse-1")).await;
    let mut endpoints = Vec::new();
    for (name, prefix) in [("nse-1", "172.16.1.0/30"), ("nse-2", "172.16.2.200/30")] {
        // Strict: what a client still has of another endpoint is dropped.
        let prefix: ipnet::IpNet = prefix.parse().unwrap();
        let addresses: Vec<Arc<dyn Element>> =
            vec![Arc::new(Strict::new([prefix])), Arc::new(PointToPoint::new([prefix]))];
        let mut nse = world.endpoint_with(name, &manager, addresses).await;
        let app = [("app".to_owned(), name.to_owned())].into();
        nse.registration.network_service_labels = [(SERVICE.to_owned(), NetworkServiceLabels { labels: app })].into();
        nse.register().await;
        endpoints.push(nse);
    }
    let client = world.client("nsc", &manager, None);
    let address = |connection: &Connection| {
        let context = connection.context.clone().unwrap_or_default().ip_context.unwrap_or_default();
        (context.src_ip_addrs, context.dst_ip_addrs)
    };
    let of = |ip: &str| vec![format!("{ip}/32")];
    let connection = client.request(request("c"), TIMEOUT).await.unwrap();
    assert_eq!(address(&connection), (of("172.16.1.1"), of("172.16.1.0")));

    // A change that still leads there moves nothing.
    world.service(&manager, NetworkService { payload: "IP".into(), ..leading_to("nse-1") }).await;
    sleep(Duration::from_millis(500)).await;
    assert_eq!((endpoints[0].seen.closes(), endpoints[1].seen.requests()), (0, 0));
    world.service(&manager, leading_to("nse-2")).await;
    moves_to(&client, "c", "nse-2").await;
    let connection = client.connection("c").unwrap();
    assert_eq!(address(&connection), (of("172.16.2.201"), of("172.16.2.200")));
    assert_eq!((endpoints[0].seen.closes(), endpoints[0].endpoint.hub().connections().len()), (1, 0));
    client.close(connection, TIMEOUT).await.unwrap();
    assert!(endpoints[1].endpoint.hub().connections().is_empty());
}

/// The manager restarts again and again, each time with one more forwarder: the first one stays.
async fn restarts(remote: bool) {
    let world = World::new();
    let _registry = world.registry().await;
    let (mut manager, first) = node(&world, "nsmgr").await;
    let (there, _forwarder) = node(&world, "other").await;
    let nse = world.endpoint("nse", if remote { &there } else { &manager }).await;
    let alive = Arc::new(AtomicBool::new(true));
    let client = world.client("nsc", &manager, Some(&alive));
    let before = client.request(request("c"), TIMEOUT).await.unwrap();
    assert_eq!(names(&before).len(), if remote { 6 } else { 4 });
    let mut others = Vec::new();
    for n in 0..4 {
        others.push(world.forwarder(&format!("fwd-{n}"), &manager, &[("p2p", "true")]).await);
        let requests = nse.seen.requests();
        manager = manager.restart(&world).await;
        eventually("it was requested again", || async { nse.seen.requests() > requests }).await;
        eventually("the client knows", || async { client.watch("c").borrow().is_up() }).await;
        let connection = client.connection("c").unwrap();
        assert_eq!((names(&connection), ids(&connection)), (names(&before), ids(&before)), "after restart {n}");
    }
    // The forwarder comes back too, and is used again.
    first.kill().await;
    let first = world.forwarder("fwd-nsmgr", &manager, &[("p2p", "true")]).await;
    eventually("it has the connection again", || async { first.endpoint.hub().connections().len() == 1 }).await;
    assert!(others.iter().all(|other| other.seen.requests() == 0), "no other one was ever asked");
    // Its data path is gone as well: any forwarder will do.
    alive.store(false, SeqCst);
    first.kill().await;
    let elsewhere = || async { client.connection("c").is_some_and(|connection| names(&connection)[2] != "fwd-nsmgr") };
    eventually("another forwarder has it", elsewhere).await;
    alive.store(true, SeqCst);
}

// Conformance 51, 68
#[tokio::test(flavor = "multi_thread")]
async fn the_forwarder_stays_over_restarts_of_the_manager() {
    restarts(false).await;
}

// Conformance 51, 68
#[tokio::test(flavor = "multi_thread")]
async fn the_forwarder_stays_over_restarts_of_the_manager_when_the_endpoint_is_on_another_node() {
    restarts(true).await;
}

/// An endpoint that registers when its next refresh is due, and not because the manager was restarted.
#[tokio::test(flavor = "multi_thread")]
async fn after_a_restart_of_the_manager_its_endpoints_are_reached_before_they_register_again() {
    let world = World::new();
    let _registry = world.registry().await;
    let (manager, _forwarder) = node(&world, "nsmgr").await;
    let nse = world.unregistered("nse", &manager).await;
    {
        let link = world.transport("nse").dial(&Address::parse(&world.url("nsmgr")).unwrap(), TIMEOUT).await.unwrap();
        let socket = rustix::fs::open(world.path("nse"), rustix::fs::OFlags::PATH, rustix::fs::Mode::empty()).unwrap();
        let (device, inode) = link.fds.as_ref().unwrap().queue(socket).unwrap();
        let url = format!("inode://{device}/{inode}");
        let endpoint = NetworkServiceEndpoint { url, ..nse.registration.clone() };
        NetworkServiceEndpointRegistryClient::new(link.with_token()).register(endpoint).await.unwrap();
    }
    let connection = world.client("nsc", &manager, None).request(request("c"), TIMEOUT).await.unwrap();
    assert_eq!(*names(&connection).last().unwrap(), "nse");
    let manager = manager.restart(&world).await;
    let connection = world.client("nsc-2", &manager, None).request(request("d"), TIMEOUT).await.unwrap();
    assert_eq!(*names(&connection).last().unwrap(), "nse");
}
