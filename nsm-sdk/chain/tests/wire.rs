//! What peers in other languages do on the wire, over mTLS on a unix socket.

#![allow(clippy::unwrap_used, reason = "a test states what it expects by unwrapping it")]

mod world;

use nsm_chain::{ConnectionEventType, MonitorScopeSelector, NetworkServiceRequest, PathSegment};
use nsm_proto::{
    connection::monitor_connection_client::MonitorConnectionClient,
    networkservice::network_service_client::NetworkServiceClient,
};
use std::{sync::atomic::Ordering::SeqCst, time::Duration};
use tonic::Code;
use world::*;

/// Each refresh of a Go client comes over a new connection, and the old one is closed: what it has passed stays valid.
#[tokio::test(flavor = "multi_thread")]
async fn a_refresh_may_come_over_another_transport_connection() {
    let world = World::start().await;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("namespace");
    std::fs::write(&path, "").unwrap();
    let source = world.source("nsc");

    let link = world.link(&source).await;
    let fd = std::fs::File::open(&path).unwrap().into();
    let (dev, ino) = link.fds.clone().unwrap().queue(fd).unwrap();
    let url = format!("inode://{dev}/{ino}");
    let mut first = request("c");
    first.mechanism_preferences = vec![mechanism("KERNEL", &[("inodeURL", &url)])];
    let mut client = NetworkServiceClient::new(link.with_token());
    let mut connection = client.request(timed(first, LIMIT)).await.unwrap().into_inner();
    let ids = |connection: &nsm_chain::Connection| {
        connection.path.clone().unwrap().path_segments.into_iter().map(|segment| segment.id).collect::<Vec<_>>()
    };
    let before = ids(&connection);
    let inside = || world.seen.last.lock().unwrap().mechanism.clone().unwrap().parameters["inodeURL"].clone();
    let held = inside();
    drop((client, link));
    for _ in 0..3 {
        let link = world.link(&source).await;
        let mut client = NetworkServiceClient::new(link.with_token());
        let again = NetworkServiceRequest { connection: Some(connection.clone()), ..Default::default() };
        connection = client.request(timed(again, LIMIT)).await.unwrap().into_inner();
        assert_eq!((ids(&connection), inside()), (before.clone(), held.clone()));
        assert_eq!(std::fs::canonicalize(held.strip_prefix("file://").unwrap()).unwrap(), path);
    }
    assert_eq!((world.known(), world.seen.requests.load(SeqCst)), (1, 4));
    let mut client = world.raw("nsc").await;
    client.close(connection).await.unwrap();
    assert_eq!((world.known(), world.seen.closes.load(SeqCst)), (0, 1));
}

/// Go's heal takes CANCELLED for a deliberate end and would stop: a server that goes away must not say it.
#[tokio::test(flavor = "multi_thread")]
async fn the_monitors_of_a_stopping_server_do_not_end_with_cancelled() {
    let mut world = World::start().await;
    let link = world.link(&world.source("nsc")).await;
    let mut monitor = MonitorConnectionClient::new(link.with_token());
    let mut events = monitor.monitor_connections(MonitorScopeSelector::default()).await.unwrap().into_inner();
    let first = events.message().await.unwrap().unwrap();
    assert_eq!((first.r#type(), first.connections.len()), (ConnectionEventType::InitialStateTransfer, 0));
    world.stop().await;
    match tokio::time::timeout(LIMIT, events.message()).await.unwrap() {
        Ok(None) => {}
        Ok(Some(event)) => panic!("{event:?}"),
        // With a cause the status was made on this side, by the transport that broke.
        Err(status) => {
            assert!(std::error::Error::source(&status).is_some() || status.code() != Code::Cancelled, "{status:?}");
        }
    }
}

/// Tracing metadata of Go peers, and what is not known at all, is nobody's business here.
#[tokio::test(flavor = "multi_thread")]
async fn metadata_for_tracing_is_ignored() {
    let world = World::start().await;
    let mut client = world.raw("nsc").await;
    let mut call = tonic::Request::new(request("c"));
    for (key, value) in [
        ("grpctracing", "1"),
        ("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
        ("path", "{"),
        ("x-unknown", ""),
    ] {
        call.metadata_mut().insert(key, value.parse().unwrap());
    }
    call.metadata_mut().insert_bin("x-bin", tonic::metadata::MetadataValue::from_bytes(&[0, 255]));
    let connection = client.request(call).await.unwrap().into_inner();
    client.close(connection).await.unwrap();
}

/// A close of something unknown succeeds, and an answer comes within the client's time whatever the chain does.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_unknown_is_closed_already() {
    let world = World::start().await;
    let mut client = world.raw("nsc").await;
    let unknown = request("never-seen").connection.unwrap();
    client.close(timed(unknown, Duration::from_secs(1))).await.unwrap();
    assert_eq!(world.seen.closes.load(SeqCst), 0);
}

/// Ids are the business of who gives them: two clients that chose the same have a connection each.
#[tokio::test(flavor = "multi_thread")]
async fn two_clients_with_equal_ids_do_not_collide() {
    let world = World::start().await;
    let mut connections = Vec::new();
    for name in ["nsc-a", "nsc-b"] {
        let connection = world.raw(name).await.request(request("c")).await.unwrap().into_inner();
        connections.push((name, connection));
    }
    let ours = |n: usize| connections[n].1.path.clone().unwrap().path_segments[1].id.clone();
    let address = |n: usize| connections[n].1.context.clone().unwrap().ip_context.unwrap().src_ip_addrs;
    assert_ne!((ours(0), address(0)), (ours(1), address(1)));
    assert_eq!((world.known(), connections[0].1.id.as_str()), (2, "c"));
    // Who asks for the id alone hears of both.
    let link = world.link(&world.source("nsc-a")).await;
    let mut monitor = MonitorConnectionClient::new(link.with_token());
    let segment = PathSegment { id: "c".into(), ..Default::default() };
    let selector = MonitorScopeSelector { path_segments: vec![segment], ..Default::default() };
    let mut events = monitor.monitor_connections(selector).await.unwrap().into_inner();
    assert_eq!(events.message().await.unwrap().unwrap().connections.len(), 2);
    // Each closes its own.
    for (left, (name, connection)) in [1, 0].into_iter().zip(connections.clone()) {
        world.raw(name).await.close(connection).await.unwrap();
        assert_eq!(world.known(), left);
    }
}

// Conformance 26
#[tokio::test(flavor = "multi_thread")]
async fn a_guarded_monitor_shows_callers_their_own_connections() {
    let world = World::start_with(nsm_chain::EndpointBuilder::guarded_monitor).await;
    let watch = async |name: &str, id: &str| {
        let link = world.link(&world.source(name)).await;
        let mut monitor = MonitorConnectionClient::new(link.with_token());
        let segment = (!id.is_empty()).then(|| PathSegment { id: id.into(), ..Default::default() });
        let selector = MonitorScopeSelector { path_segments: segment.into_iter().collect(), ..Default::default() };
        let mut events = monitor.monitor_connections(selector).await.map_err(|status| status.code())?.into_inner();
        Ok(events.message().await.unwrap().unwrap().connections.len())
    };
    assert_eq!(watch("nsc", "c").await, Err(Code::PermissionDenied), "not yet its own");
    let mut client = world.raw("nsc").await;
    let connection = client.request(request("c")).await.unwrap().into_inner();
    assert_eq!(watch("nsc", "c").await, Ok(1));
    for (name, id) in [("nsc", "d"), ("nsc", ""), ("other", "c")] {
        assert_eq!(watch(name, id).await, Err(Code::PermissionDenied), "{name} {id:?}");
    }
    client.close(connection).await.unwrap();
    assert_eq!(watch("nsc", "c").await, Err(Code::PermissionDenied), "closed");
    // To a client that looks for what an earlier run has left, a refusal says that there is nothing.
    let transport = nsm_transport::Transport::new(world.source("nsc")).unwrap();
    let client = nsm_chain::Client::builder("nsc", std::sync::Arc::new(nsm_chain::remote::Grpc::new(transport)));
    let client = client.url(world.address().to_string()).build();
    assert_eq!(client.find("c").await.unwrap(), None);
}
