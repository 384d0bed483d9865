use super::*;
use crate::{
    Chain, Client, ConnectionContext, MonitorScopeSelector, Path, PathSegment, Side,
    core::testing::{Hop, HopConnector, Spy, request_with},
    elements::{begin::Begin, connect::ConnectServer, metadata::MetadataElement, updatepath::UpdatePath},
};
use futures_util::FutureExt;
use std::{
    sync::{Arc, atomic::Ordering::SeqCst},
    time::Duration,
};

/// A passthrough (manager) in front of a hop.
fn passthrough() -> (Chain, Hub, Arc<Hop>, Arc<Spy>) {
    let (hop, hub, spy) = (Arc::new(Hop::default()), Hub::new(), Arc::new(Spy::default()));
    let client = Client::builder("mgr", Arc::new(HopConnector(hop.clone()))).url("unix:///nse").passthrough().build();
    let chain = Chain::builder()
        .element(UpdatePath::new("mgr"))
        .element(Begin::new(Side::Server))
        .element(MetadataElement::new())
        .element(Monitor::new(hub.clone()))
        .element(ConnectServer::new(client.chain().clone()))
        .element(spy.clone())
        .build();
    (chain, hub, hop, spy)
}

fn connection() -> Connection {
    named("c")
}

fn named(id: &str) -> Connection {
    let own = PathSegment { name: "nsc".into(), id: id.into(), ..Default::default() };
    Connection { id: id.into(), path: Some(Path { index: 0, path_segments: vec![own] }), ..Default::default() }
}

async fn event(events: &mut Subscription) -> (ConnectionEventType, Option<Connection>) {
    let event = tokio::time::timeout(Duration::from_secs(5), events.next()).await.unwrap().unwrap();
    (event.r#type(), event.connections.into_values().next())
}

// Conformance 37, 38
#[tokio::test(start_paused = true)]
async fn announces_what_it_answers() {
    let (chain, hub, _, _) = passthrough();
    let mut events = hub.subscribe(MonitorScopeSelector::default());
    assert_eq!(event(&mut events).await, (ConnectionEventType::InitialStateTransfer, None));
    let answer = chain.request(request_with(connection())).await.unwrap();
    let (kind, announced) = event(&mut events).await;
    let mut announced = announced.unwrap();
    assert_eq!((kind, announced.path.as_ref().unwrap().index), (ConnectionEventType::Update, 1));
    crate::path::restore(&mut announced, 0, "c").unwrap();
    assert_eq!(announced, answer);
    chain.close(CloseCall::new(answer, crate::Context::new())).await.unwrap();
    assert_eq!(event(&mut events).await.0, ConnectionEventType::Delete);
}

// Conformance 39
#[tokio::test(start_paused = true)]
async fn a_next_hop_without_monitor_is_no_obstacle() {
    let (chain, _, hop, _) = passthrough();
    hop.no_monitor.store(true, SeqCst);
    chain.request(request_with(connection())).await.unwrap();
}

// Conformance 40
#[tokio::test(start_paused = true)]
async fn passes_on_what_the_next_hop_reports() {
    let (chain, hub, hop, _) = passthrough();
    let answer = chain.request(request_with(connection())).await.unwrap();
    tokio::time::sleep(Duration::from_millis(10)).await;
    let mut events = hub.subscribe(MonitorScopeSelector::default());
    event(&mut events).await;
    let theirs = || hop.hub.lock().unwrap().clone();

    // ServerUpdate: a changed context, under our own index.
    let mut changed = theirs().connections().pop().unwrap();
    changed.context = Some(ConnectionContext { mtu: 1400, ..Default::default() });
    theirs().update(changed.clone());
    let (kind, update) = event(&mut events).await;
    let update = update.unwrap();
    assert_eq!((kind, update.context.unwrap().mtu), (ConnectionEventType::Update, 1400));
    assert_eq!((update.path.unwrap().index, update.id), (1, answer.path.as_ref().unwrap().path_segments[1].id.clone()));

    // DeleteToDown
    theirs().delete(&changed);
    let (kind, down) = event(&mut events).await;
    assert_eq!((kind, down.unwrap().state()), (ConnectionEventType::Update, State::Down));

    // DeleteOnClientClose
    chain.close(CloseCall::new(answer, crate::Context::new())).await.unwrap();
    assert_eq!(event(&mut events).await.0, ConnectionEventType::Delete);
}

// Conformance 40
#[tokio::test(start_paused = true)]
async fn a_lost_next_hop_is_down_and_so_is_a_failed_refresh() {
    let (chain, hub, hop, spy) = passthrough();
    let answer = chain.request(request_with(connection())).await.unwrap();
    tokio::time::sleep(Duration::from_millis(10)).await;
    let mut events = hub.subscribe(MonitorScopeSelector::default());
    event(&mut events).await;
    hop.restart();
    assert_eq!(event(&mut events).await.1.unwrap().state(), State::Down);
    let answer = chain.request(request_with(answer)).await.unwrap();
    assert_eq!(event(&mut events).await.1.unwrap().state(), State::Up);
    spy.fail_requests(true);
    chain.request(request_with(answer)).await.unwrap_err();
    assert_eq!(event(&mut events).await.1.unwrap().state(), State::Down);
}

// Conformance 40
#[tokio::test(start_paused = true)]
async fn a_next_hop_that_does_not_know_what_it_has_answered_is_lost() {
    let (chain, hub, hop, _) = passthrough();
    chain.request(request_with(named("d"))).await.unwrap();
    let mut events = hub.subscribe(MonitorScopeSelector::default());
    event(&mut events).await;
    hop.forget.store(true, SeqCst);
    let answer = chain.request(request_with(connection())).await.unwrap();
    for state in [State::Up, State::Down] {
        let (kind, announced) = event(&mut events).await;
        let announced = announced.unwrap();
        assert_eq!((kind, announced.state()), (ConnectionEventType::Update, state));
        assert_eq!(announced.id, answer.path.as_ref().unwrap().path_segments[1].id, "the other one is known");
    }
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert!(events.next().now_or_never().is_none());
}
