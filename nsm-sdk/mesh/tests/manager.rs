//! What clients live through behind managers and forwarders: deaths, restarts, late arrivals. Control plane only: forwarders
//! here make no interfaces.

#![allow(clippy::unwrap_used, reason = "a test states what it expects by unwrapping it")]

mod sandbox;

use nsm_chain::{CloseCall, Connection, Element, Error, Next, RequestCall};
use nsm_proto::registry::network_service_endpoint_registry_client::NetworkServiceEndpointRegistryClient;
use nsm_registry::{NetworkServiceEndpoint, RegistryClient};
use nsm_transport::{Address, Transport};
use sandbox::*;
use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};
use tokio::time::{Instant, sleep, timeout};

// Conformance 42
#[tokio::test(flavor = "multi_thread")]
async fn an_endpoint_that_dies_is_replaced_here_or_on_another_node() {
    let world = World::new();
    let registry = world.registry().await;
    let (here, _fwd_here) = node(&world, "nsmgr-a").await;
    let (there, _fwd_there) = node(&world, "nsmgr-b").await;
    for (id, at) in [("local", &here), ("remote", &there)] {
        let first = world.endpoint(&format!("{id}-1"), at).await;
        let client = world.client("nsc", &here, None);
        let connection = client.request(request(id), TIMEOUT).await.unwrap();
        let segments = if id == "local" { 4 } else { 6 };
        assert_eq!(
            (names(&connection).len(), *names(&connection).last().unwrap()),
            (segments, &*first.registration.name)
        );
        first.remove().await;
        let second = world.endpoint(&format!("{id}-2"), at).await;
        moves_to(&client, id, &second.registration.name).await;
        assert_eq!(second.endpoint.hub().connections().len(), 1);
        let connection = client.connection(id).unwrap();
        let refreshed = client.request(again(&connection), TIMEOUT).await.unwrap();
        assert_eq!(ids(&refreshed), ids(&connection));
        client.close(connection, TIMEOUT).await.unwrap();
        assert_eq!((second.seen.closes(), second.endpoint.hub().connections().len()), (1, 0));
        second.remove().await;
    }
    registry.kill().await;
}

// Conformance 43, 44
#[tokio::test(flavor = "multi_thread")]
async fn a_living_data_path_keeps_the_endpoint_a_dead_one_does_not() {
    let world = World::new();
    let _registry = world.registry().await;
    let (manager, _forwarder) = node(&world, "nsmgr").await;
    let first = world.endpoint("nse-1", &manager).await;
    let alive = Arc::new(AtomicBool::new(true));
    let client = world.client("nsc", &manager, Some(&alive));
    client.request(request("c"), TIMEOUT).await.unwrap();
    let second = world.endpoint("nse-2", &manager).await;
    first.process.kill().await;
    sleep(Duration::from_secs(2)).await;
    assert_eq!((second.seen.requests(), endpoint_of(&client, "c").as_deref()), (0, Some("nse-1")));
    alive.store(false, SeqCst);
    moves_to(&client, "c", "nse-2").await;
}

/// Tells each request another MTU than the one before.
#[derive(Default)]
struct Changes(AtomicUsize);

#[async_trait::async_trait]
impl Element for Changes {
    fn name(&self) -> &'static str {
        "changes"
    }

    async fn request(&self, mut call: RequestCall, next: Next) -> Result<Connection, Error> {
        let number = u32::try_from(self.0.fetch_add(1, SeqCst)).unwrap_or_default();
        call.connection_mut().context.get_or_insert_default().mtu = 1400 + number;
        next.request(call).await
    }
}

// Conformance 55
#[tokio::test(flavor = "multi_thread")]
async fn a_wish_of_the_endpoint_reaches_the_client_through_forwarder_and_manager() {
    let world = World::new();
    let _registry = world.registry().await;
    let (manager, _forwarder) = node(&world, "nsmgr").await;
    let nse = world.endpoint_with("nse", &manager, vec![Arc::new(Changes::default())]).await;
    nse.register().await;
    let client = world.client("nsc", &manager, None);
    let mtu = |connection: &Connection| connection.context.as_ref().map_or(0, |context| context.mtu);
    assert_eq!(mtu(&client.request(request("c"), TIMEOUT).await.unwrap()), 1400);
    for again in 1..4 {
        nse.endpoint.hub().ask_for_refresh();
        eventually("the client has come again", || async {
            client.connection("c").is_some_and(|connection| mtu(&connection) == 1400 + again)
        })
        .await;
    }
    assert_eq!((nse.seen.closes(), nse.endpoint.hub().connections().len()), (0, 1));
}

/// Loses closes on their way to the manager.
#[derive(Default)]
struct LosesCloses(AtomicBool, AtomicUsize);

#[async_trait::async_trait]
impl Element for LosesCloses {
    fn name(&self) -> &'static str {
        "loses closes"
    }

    async fn close(&self, call: CloseCall, next: Next) -> Result<(), Error> {
        if self.0.load(SeqCst) {
            self.1.fetch_add(1, SeqCst);
            return Err(Error::new("loses closes", call.id(), "told to"));
        }
        next.close(call).await
    }
}

// Conformance 45, 67
#[tokio::test(flavor = "multi_thread")]
async fn a_forwarder_that_dies_is_replaced_and_the_endpoint_stays() {
    let world = World::new();
    let registry = world.registry().await;
    let (here, fwd_here) = node(&world, "nsmgr-a").await;
    let (there, fwd_there) = node(&world, "nsmgr-b").await;
    let nse = world.endpoint("nse", &there).await;
    let loses = Arc::new(LosesCloses::default());
    let client = world.client_with("nsc", &here, None, vec![loses.clone()]);
    let connection = client.request(request("c"), TIMEOUT).await.unwrap();
    assert_eq!(names(&connection), ["nsc", "nsmgr-a", "fwd-nsmgr-a", "nsmgr-b", "fwd-nsmgr-b", "nse"]);
    let uses = |position: usize, name: &'static str| {
        let client = client.clone();
        move || {
            let at = client.connection("c").map(|connection| names(&connection).get(position) == Some(&name));
            async move { at == Some(true) }
        }
    };
    // Of this node: it leaves in order.
    let second = world.forwarder("fwd-a2", &here, &[("p2p", "true")]).await;
    fwd_here.remove().await;
    eventually("another forwarder of this node", uses(2, "fwd-a2")).await;
    // It dies, and the client's close does not even reach the manager.
    let _third = world.forwarder("fwd-a3", &here, &[("p2p", "true")]).await;
    loses.0.store(true, SeqCst);
    second.kill().await;
    eventually("a third forwarder of this node", uses(2, "fwd-a3")).await;
    loses.0.store(false, SeqCst);
    assert!(loses.1.load(SeqCst) > 0);
    assert_eq!(nse.endpoint.hub().connections().len(), 1);
    // Of the other node: it dies, and the registry, which was restarted, still knows it.
    let _fourth = world.forwarder("fwd-b2", &there, &[("p2p", "true")]).await;
    registry.kill().await;
    let _registry = world.registry().await;
    fwd_there.kill().await;
    eventually("another forwarder of the other node", uses(4, "fwd-b2")).await;
    assert_eq!(nse.endpoint.hub().connections().len(), 1);
    client.close(client.connection("c").unwrap(), TIMEOUT).await.unwrap();
    assert!(nse.endpoint.hub().connections().is_empty());
}

// Conformance 46
#[tokio::test(flavor = "multi_thread")]
async fn when_a_node_dies_an_endpoint_of_a_third_one_takes_over() {
    let world = World::new();
    let _registry = world.registry().await;
    let (here, _fwd_here) = node(&world, "nsmgr-a").await;
    let (dies, fwd_dies) = node(&world, "nsmgr-b").await;
    let (third, _fwd_third) = node(&world, "nsmgr-c").await;
    let first = world.endpoint("nse-b", &dies).await;
    let client = world.client("nsc", &here, None);
    client.request(request("c"), TIMEOUT).await.unwrap();
    let second = world.endpoint("nse-c", &third).await;
    first.process.kill().await;
    fwd_dies.kill().await;
    dies.process.kill().await;
    moves_to(&client, "c", "nse-c").await;
    client.close(client.connection("c").unwrap(), TIMEOUT).await.unwrap();
    assert_eq!(second.seen.closes(), 1);
}

// Conformance 47, 53
#[tokio::test(flavor = "multi_thread")]
async fn a_registry_may_restart_or_die_under_connections() {
    let world = World::new();
    let registry = world.registry().await;
    let (manager, _forwarder) = node(&world, "nsmgr").await;
    let nse = world.endpoint("nse", &manager).await;
    let alive = Arc::new(AtomicBool::new(true));
    let client = world.client("nsc", &manager, Some(&alive));
    let connection = client.request(request("c"), TIMEOUT).await.unwrap();

    registry.kill().await;
    let registry = world.registry().await;
    let refreshed = client.request(again(&connection), TIMEOUT).await.unwrap();
    assert_eq!(ids(&refreshed), ids(&connection));
    let other = world.client("nsc-2", &manager, None).request(request("d"), TIMEOUT).await.unwrap();
    assert_eq!(*names(&other).last().unwrap(), "nse");
    assert_eq!(nse.endpoint.hub().connections().len(), 2);

    registry.kill().await;
    client.close(refreshed, TIMEOUT).await.unwrap();
    assert_eq!((nse.seen.closes(), nse.endpoint.hub().connections().len()), (1, 1));
}

// Conformance 52
#[tokio::test(flavor = "multi_thread")]
async fn after_a_restart_of_the_manager_a_reselect_closes_the_old_branch() {
    let world = World::new();
    let _registry = world.registry().await;
    let (manager, forwarder) = node(&world, "nsmgr").await;
    let nse = world.endpoint("nse", &manager).await;
    let client = world.client("nsc", &manager, None);
    client.request(request("c"), TIMEOUT).await.unwrap();
    // The manager has forgotten the connection, so that the client's close ends there; the forwarder is told all the same.
    let _manager = manager.restart(&world).await;
    eventually("the connection was made anew", || async {
        nse.seen.requests() == 2 && nse.endpoint.hub().connections().len() == 1
    })
    .await;
    eventually("the client knows", || async { client.watch("c").borrow().is_up() }).await;
    assert_eq!((forwarder.seen.closes(), nse.seen.closes()), (1, 1));
    client.close(client.connection("c").unwrap(), TIMEOUT).await.unwrap();
    assert_eq!((forwarder.seen.closes(), nse.seen.closes()), (2, 2));
    assert!(forwarder.endpoint.hub().connections().is_empty() && nse.endpoint.hub().connections().is_empty());
}

// Conformance 52
#[tokio::test(flavor = "multi_thread")]
async fn after_a_restart_of_either_manager_or_both_all_hops_close_the_old_branch() {
    for (here_restarts, there_restarts) in [(true, false), (false, true), (true, true)] {
        let what = format!("restarts: {here_restarts} here, {there_restarts} there");
        let world = World::new();
        let _registry = world.registry().await;
        let (mut here, fwd_here) = node(&world, "nsmgr-a").await;
        let (mut there, fwd_there) = node(&world, "nsmgr-b").await;
        let nse = world.endpoint("nse-1", &there).await;
        let client = world.client("nsc", &here, None);
        client.request(request("c"), TIMEOUT).await.unwrap();
        let new = world.endpoint("nse-2", &there).await;
        if here_restarts {
            here = here.restart(&world).await;
        }
        if there_restarts {
            there = there.restart(&world).await;
        }
        let closes = || [&fwd_here.seen, &fwd_there.seen, &nse.seen, &new.seen].map(|seen| seen.closes());
        let connections = || {
            let known = |endpoint: &nsm_chain::Endpoint| endpoint.hub().connections().len();
            [known(&fwd_here.endpoint), known(&fwd_there.endpoint), known(&nse.endpoint) + known(&new.endpoint)]
        };
        eventually(&format!("the connection was made anew, {what}"), || async {
            closes()[..3].iter().all(|closes| *closes > 0)
                && connections() == [1; 3]
                && client.watch("c").borrow().is_up()
        })
        .await;
        // The old branch was closed once at each hop, whichever endpoint the new one ends at; the last close passes all hops.
        assert_eq!(closes(), [1, 1, 1, 0], "{what}");
        client.close(client.connection("c").unwrap(), TIMEOUT).await.unwrap();
        let [fwd_here, fwd_there, nse, new] = closes();
        assert_eq!((fwd_here, fwd_there, nse + new, connections()), (2, 2, 2, [0; 3]), "{what}");
        drop((here, there));
    }
}

// Conformance 53
#[tokio::test(flavor = "multi_thread")]
async fn a_forwarder_that_comes_back_knows_nothing_and_everybody_else_cleans_up() {
    let world = World::new();
    let _registry = world.registry().await;
    let (manager, forwarder) = node(&world, "nsmgr").await;
    let nse = world.endpoint("nse", &manager).await;
    let client = world.client("nsc", &manager, None);
    client.request(request("c"), TIMEOUT).await.unwrap();
    forwarder.kill().await;
    let forwarder = world.forwarder("fwd-nsmgr", &manager, &[("p2p", "true")]).await;
    eventually("the connection was made anew", || async { forwarder.endpoint.hub().connections().len() == 1 }).await;
    eventually("the client knows", || async { client.watch("c").borrow().is_up() }).await;
    // The endpoint was told to close the old branch although the forwarder had forgotten it.
    assert_eq!((nse.seen.closes(), nse.endpoint.hub().connections().len()), (1, 1));
    client.close(client.connection("c").unwrap(), TIMEOUT).await.unwrap();
    assert_eq!((nse.seen.closes(), nse.endpoint.hub().connections().len()), (2, 0));
}

// Conformance 65
#[tokio::test(flavor = "multi_thread")]
async fn a_failed_refresh_ends_in_one_close_and_a_new_connection() {
    let world = World::new();
    let _registry = world.registry().await;
    let (manager, forwarder) = node(&world, "nsmgr").await;
    let nse = world.endpoint("nse", &manager).await;
    let client = world.client("nsc", &manager, None);
    let connection = client.request(request("c"), TIMEOUT).await.unwrap();
    forwarder.seen.refuse.store(true, SeqCst);
    client.request(again(&connection), Duration::from_millis(200)).await.unwrap_err();
    forwarder.seen.refuse.store(false, SeqCst);
    eventually("it was made anew", || async {
        nse.seen.requests() >= 2 && client.watch("c").borrow().is_up() && nse.endpoint.hub().connections().len() == 1
    })
    .await;
    sleep(Duration::from_millis(500)).await;
    assert_eq!((nse.seen.closes(), nse.seen.requests()), (1, 2));
}

// Conformance 73
#[tokio::test(flavor = "multi_thread")]
async fn an_endpoint_whose_process_is_gone_disappears_before_its_token_ends() {
    let world = World::new();
    let _registry = world.registry().await;
    let manager = world.manager("nsmgr", None).await;
    let life = Duration::from_secs(4);
    let transport = Transport::new(world.source("nse")).unwrap().with_max_token_lifetime(life);
    let link = transport.dial(&Address::parse(&world.url("nsmgr")).unwrap(), TIMEOUT).await.unwrap();
    let mut raw = NetworkServiceEndpointRegistryClient::new(link.with_token());
    let endpoint = NetworkServiceEndpoint { name: "nse".into(), url: "tcp://127.0.0.1:9".into(), ..Default::default() };
    let finder = RegistryClient::builder(world.url("nsmgr"), world.source("finder")).build().unwrap();
    let there = || async { finder.find_nse(Default::default()).await.is_ok_and(|found| found.len() == 1) };
    // As long as it is refreshed it stays.
    let started = Instant::now();
    for _ in 0..3 {
        let mut call = tonic::Request::new(endpoint.clone());
        call.set_timeout(Duration::from_secs(1));
        raw.register(call).await.unwrap();
        sleep(Duration::from_secs(2)).await;
        assert!(there().await, "after {:?}", started.elapsed());
    }
    let last = Instant::now();
    eventually("the endpoint is gone", || async { !there().await }).await;
    assert!(last.elapsed() < life, "{:?}", last.elapsed());
    drop(manager);
}

// Conformance 75
#[tokio::test(flavor = "multi_thread")]
async fn service_and_endpoint_may_appear_while_the_client_tries() {
    let world = World::new();
    let _registry = world.registry().await;
    let here = world.manager("nsmgr-a", None).await;
    let there = world.manager("nsmgr-b", None).await;
    let client = world.client("nsc", &here, None);
    let asking = tokio::spawn(async move { client.request(request("c"), TIMEOUT).await.map(|found| (client, found)) });
    sleep(Duration::from_millis(200)).await;
    assert!(!asking.is_finished());
    world.service(&there, service()).await;
    let _nse = world.endpoint("nse", &there).await;
    let _forwarders = [
        world.forwarder("fwd-b", &there, &[("p2p", "true")]).await,
        world.forwarder("fwd-a", &here, &[("p2p", "true")]).await,
    ];
    let (_client, connection) = timeout(TIMEOUT, asking).await.unwrap().unwrap().unwrap();
    assert_eq!(names(&connection), ["nsc", "nsmgr-a", "fwd-a", "nsmgr-b", "fwd-b", "nse"]);
}

// Conformance 76
#[tokio::test(flavor = "multi_thread")]
async fn busy_endpoints_are_passed_over() {
    let world = World::new();
    let _registry = world.registry().await;
    let (here, _fwd_here) = node(&world, "nsmgr-a").await;
    let (there, _fwd_there) = node(&world, "nsmgr-b").await;
    let mut endpoints = Vec::new();
    for n in 0..4 {
        endpoints.push(world.endpoint(&format!("nse-{n}"), &there).await);
    }
    for free in [2, 0] {
        for (n, nse) in endpoints.iter().enumerate() {
            nse.seen.refuse.store(n != free, SeqCst);
        }
        let client = world.client("nsc", &here, None);
        let connection = client.request(request(&format!("c{free}")), TIMEOUT).await.unwrap();
        assert_eq!(*names(&connection).last().unwrap(), format!("nse-{free}"));
        client.close(connection, TIMEOUT).await.unwrap();
        assert_eq!(endpoints[free].endpoint.hub().connections().len(), 0);
    }
}

// Conformance 77
#[tokio::test(flavor = "multi_thread")]
async fn an_endpoint_that_restarts_is_waited_for_and_a_dead_one_is_an_error() {
    let world = World::new();
    let _registry = world.registry().await;
    let (manager, _forwarder) = node(&world, "nsmgr").await;
    let first = world.endpoint("nse", &manager).await;
    first.process.kill().await;
    let client = world.client("nsc", &manager, None);
    let started = Instant::now();
    let limit = Duration::from_secs(1);
    let error = client.request(request("dead"), limit).await.unwrap_err();
    assert!(started.elapsed() < limit + Duration::from_secs(1), "{error} after {:?}", started.elapsed());

    let asking = tokio::spawn(async move { client.request(request("c"), TIMEOUT).await });
    sleep(Duration::from_millis(300)).await;
    assert!(!asking.is_finished());
    let _second = world.endpoint("nse", &manager).await;
    let connection = timeout(TIMEOUT, asking).await.unwrap().unwrap().unwrap();
    assert_eq!(*names(&connection).last().unwrap(), "nse");
}

// Conformance 81
#[tokio::test(flavor = "multi_thread")]
async fn a_full_endpoint_may_bring_another_one_up() {
    let world = Arc::new(World::new());
    let _registry = world.registry().await;
    let (manager, _forwarder) = node(&world, "nsmgr").await;
    let full = world.endpoint("nse-1", &manager).await;
    full.seen.refuse.store(true, SeqCst);
    let client = world.client("nsc", &manager, None);
    let asking = tokio::spawn(async move { client.request(request("c"), TIMEOUT).await.map(|found| (client, found)) });
    eventually("the full endpoint was asked", || async { full.seen.requests() > 0 }).await;
    let second = world.endpoint("nse-2", &manager).await;
    let (client, connection) = timeout(TIMEOUT, asking).await.unwrap().unwrap().unwrap();
    assert_eq!(*names(&connection).last().unwrap(), "nse-2");
    client.request(again(&connection), TIMEOUT).await.unwrap();
    assert_eq!(second.seen.requests(), 2);
    client.close(connection, TIMEOUT).await.unwrap();
    assert_eq!((second.seen.closes(), full.seen.closes()), (1, 0));
}

// Conformance 83
#[tokio::test(flavor = "multi_thread")]
async fn the_second_forwarder_gets_the_namespace_too() {
    let world = World::new();
    let _registry = world.registry().await;
    let (manager, first) = node(&world, "nsmgr").await;
    let second = world.forwarder("fwd-second", &manager, &[("p2p", "true")]).await;
    let _nse = world.endpoint("nse", &manager).await;
    for (refuses, serves) in [(&first, &second), (&second, &first)] {
        refuses.seen.refuse.store(true, SeqCst);
        serves.seen.refuse.store(false, SeqCst);
        let client = world.client("nsc", &manager, None);
        for n in 0..3 {
            let connection = client.request(request(&format!("c{n}")), TIMEOUT).await.unwrap();
            let inside = serves.seen.netns.lock().unwrap().clone().unwrap();
            assert!(inside.starts_with("file:///proc/"), "{inside}");
            client.close(connection, TIMEOUT).await.unwrap();
        }
    }
    for forwarder in [&first, &second] {
        let inside = forwarder.seen.netns.lock().unwrap().clone().unwrap();
        assert!(inside.starts_with("file:///proc/"), "{inside}");
        assert!(forwarder.endpoint.hub().connections().is_empty());
    }
}
