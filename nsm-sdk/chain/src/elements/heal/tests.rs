use super::*;
use crate::{
    Client, ConnectionContext, NetworkServiceRequest, State,
    core::testing::{Hop, HopConnector},
    path,
};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

const TIMEOUT: Duration = Duration::from_secs(15);

struct Probe(Arc<AtomicBool>);

#[async_trait::async_trait]
impl Liveness for Probe {
    async fn alive(&self, _: &Connection, _: Duration) -> bool {
        self.0.load(SeqCst)
    }
}

/// A client of a hop; with a liveness check if `alive` is given.
fn client(alive: Option<&Arc<AtomicBool>>) -> (Client, Arc<Hop>) {
    let hop = Arc::new(Hop::default());
    let mut builder = Client::builder("nsc", Arc::new(HopConnector(hop.clone()))).url("unix:///mgr").element(Life);
    if let Some(alive) = alive {
        builder = builder.liveness(LivenessCheck::new(Arc::new(Probe(alive.clone()))));
    }
    (builder.build(), hop)
}

/// Gives the path a long life, so that refresh stays out of these tests.
struct Life;

#[async_trait::async_trait]
impl Element for Life {
    fn name(&self) -> &'static str {
        "life"
    }

    async fn request(&self, call: RequestCall, next: Next) -> Result<Connection, Error> {
        let mut connection = next.request(call).await?;
        let expires = crate::clock::to_timestamp(crate::clock::now() + Duration::from_secs(1_000_000));
        if let Some(segment) = path::segment_mut(&mut connection, 0) {
            segment.expires = Some(expires);
        }
        Ok(connection)
    }
}

fn request() -> NetworkServiceRequest {
    let connection = Connection {
        id: "c".into(),
        network_service: "svc".into(),
        network_service_endpoint_name: "nse-1".into(),
        ..Default::default()
    };
    NetworkServiceRequest { connection: Some(connection), ..Default::default() }
}

fn last(hop: &Hop) -> Connection {
    hop.requests.lock().unwrap().last().unwrap().1.connection.clone().unwrap()
}

async fn settle() {
    tokio::time::sleep(Duration::from_millis(150)).await;
}

/// Lets the hop report something about the connection.
fn report(hop: &Hop, change: impl FnOnce(&mut Connection)) {
    let hub = hop.hub.lock().unwrap().clone();
    let mut connection = hub.connections().pop().unwrap();
    change(&mut connection);
    hub.update(connection);
}

// Conformance 42
#[tokio::test(start_paused = true)]
async fn control_plane_lost_without_a_check_reselects() {
    let (client, hop) = client(None);
    client.request(request(), TIMEOUT).await.unwrap();
    report(&hop, |connection| connection.set_state(State::Down));
    settle().await;
    assert_eq!((hop.requests(), hop.closes()), (2, 1));
    let healed = last(&hop);
    assert_eq!(healed.state(), State::ReselectRequested);
    assert!(healed.network_service_endpoint_name.is_empty() && healed.mechanism.is_none());
}

// Conformance 44
#[tokio::test(start_paused = true)]
async fn control_plane_lost_with_a_live_data_path_keeps_the_connection() {
    let (client, hop) = client(Some(&Arc::new(AtomicBool::new(true))));
    client.request(request(), TIMEOUT).await.unwrap();
    for round in 2..5 {
        match round {
            2 => hop.restart(),
            3 => report(&hop, |connection| connection.set_state(State::Down)),
            _ => {
                let hub = hop.hub.lock().unwrap().clone();
                let connection = hub.connections().pop().unwrap();
                hub.delete(&connection);
            }
        }
        settle().await;
        assert_eq!((hop.requests(), hop.closes()), (round, 0));
        assert_eq!(last(&hop).network_service_endpoint_name, "nse-1");
    }
}

// Conformance 43
#[tokio::test(start_paused = true)]
async fn a_dead_data_path_reselects_even_if_the_control_plane_is_fine() {
    let alive = Arc::new(AtomicBool::new(true));
    let (client, hop) = client(Some(&alive));
    client.request(request(), TIMEOUT).await.unwrap();
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!(hop.requests(), 1);
    alive.store(false, SeqCst);
    tokio::time::sleep(Duration::from_millis(450)).await;
    assert_eq!(hop.closes(), 1);
    assert_eq!(last(&hop).state(), State::ReselectRequested);
    // The new data path is given a moment, but not for ever.
    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert_eq!(hop.closes(), 1);
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(hop.closes(), 2);
}

// Conformance 46, 54
#[tokio::test(start_paused = true)]
async fn a_hop_that_comes_back_is_used_again_within_two_seconds() {
    let (client, hop) = client(Some(&Arc::new(AtomicBool::new(true))));
    client.request(request(), TIMEOUT).await.unwrap();
    let status = client.watch("c");
    hop.down.store(true, SeqCst);
    hop.restart();
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert!(matches!(*status.borrow(), ConnectionStatus::Down(_)));
    let dialled = hop.dialled();
    assert!((20..60).contains(&dialled), "{dialled} attempts in a minute");
    hop.down.store(false, SeqCst);
    tokio::time::sleep(Duration::from_millis(2600)).await;
    assert_eq!((hop.requests(), hop.closes()), (2, 0));
    assert!(status.borrow().is_up());
}

// Conformance 54
#[tokio::test(start_paused = true)]
async fn a_hop_that_dies_within_a_refresh_is_healed_from_within_two_seconds() {
    for alive in [None, Some(&Arc::new(AtomicBool::new(true)))] {
        let (client, hop) = client(alive);
        let mut connection = client.request(request(), TIMEOUT).await.unwrap();
        for round in 0..15_u64 {
            hop.dies.store(true, SeqCst);
            let before = hop.requests();
            let again = NetworkServiceRequest { connection: Some(connection), ..Default::default() };
            let error = client.request(again, TIMEOUT).await.unwrap_err();
            assert_eq!((error.code(), hop.requests()), (tonic::Code::Unavailable, before + 1), "{round}: {error}");
            // It comes back at once or a little later.
            tokio::time::sleep(Duration::from_millis(20 * round)).await;
            hop.down.store(false, SeqCst);
            let back = tokio::time::Instant::now();
            let known = || !hop.hub.lock().unwrap().connections().is_empty();
            while !(known() && client.watch("c").borrow().is_up()) {
                tokio::time::sleep(Duration::from_millis(1)).await;
                assert!(back.elapsed() < Duration::from_secs(2), "round {round}, {:?}", alive.is_some());
            }
            assert_eq!(hop.requests(), before + 2);
            let reselected = last(&hop).state() == State::ReselectRequested;
            assert_eq!(reselected, alive.is_none());
            connection = client.connection("c").unwrap();
        }
        // What was healed stays.
        let requests = hop.requests();
        tokio::time::sleep(Duration::from_secs(60)).await;
        assert_eq!(hop.requests(), requests);
    }
}

// Conformance 48
#[tokio::test(start_paused = true)]
async fn close_ends_endless_healing() {
    let (client, hop) = client(None);
    let connection = client.request(request(), TIMEOUT).await.unwrap();
    hop.down.store(true, SeqCst);
    hop.restart();
    tokio::time::sleep(Duration::from_secs(10)).await;
    let before = tokio::time::Instant::now();
    let _ = client.close(connection, TIMEOUT).await;
    assert!(before.elapsed() < Duration::from_secs(1));
    let dialled = hop.dialled();
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(hop.dialled(), dialled, "still healing");
    assert!(client.connection("c").is_none());
}

// Conformance 49
#[tokio::test(start_paused = true)]
async fn a_failed_refresh_does_not_end_the_watch() {
    let alive = Arc::new(AtomicBool::new(true));
    let (client, hop) = client(Some(&alive));
    let connection = client.request(request(), TIMEOUT).await.unwrap();
    hop.refuse.store(true, SeqCst);
    let again = NetworkServiceRequest { connection: Some(connection), ..Default::default() };
    client.request(again, TIMEOUT).await.unwrap_err();
    hop.refuse.store(false, SeqCst);
    assert_eq!(hop.closes(), 0);
    alive.store(false, SeqCst);
    tokio::time::sleep(Duration::from_millis(450)).await;
    assert_eq!(last(&hop).state(), State::ReselectRequested);
}

// Conformance 49
#[tokio::test(start_paused = true)]
async fn a_loss_inside_a_failed_refresh_is_seen() {
    let (client, hop) = client(None);
    let connection = client.request(request(), TIMEOUT).await.unwrap();
    settle().await;
    hop.restart();
    hop.refuse.store(true, SeqCst);
    let again = NetworkServiceRequest { connection: Some(connection), ..Default::default() };
    client.request(again, TIMEOUT).await.unwrap_err();
    hop.refuse.store(false, SeqCst);
    settle().await;
    assert_eq!(last(&hop).state(), State::ReselectRequested);
    assert!(client.watch("c").borrow().is_up());
    let requests = hop.requests();
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!((hop.requests(), hop.closes()), (requests, 1), "healed once");
}

// Conformance 49
#[tokio::test(start_paused = true)]
async fn a_hop_that_does_not_know_what_it_has_answered_is_lost() {
    for alive in [None, Some(&Arc::new(AtomicBool::new(true)))] {
        let (client, hop) = client(alive);
        hop.forget.store(true, SeqCst);
        client.request(request(), TIMEOUT).await.unwrap();
        // One of the same hop that it knows is left alone.
        let mut other = request();
        other.connection.as_mut().unwrap().id = "d".into();
        client.request(other, TIMEOUT).await.unwrap();
        let before = tokio::time::Instant::now();
        while hop.requests() < 3 {
            tokio::time::sleep(Duration::from_millis(1)).await;
            assert!(before.elapsed() < Duration::from_secs(2), "it is watched for ever");
        }
        assert!(before.elapsed() > Duration::from_millis(50), "a young one is not healed at once");
        assert_eq!(last(&hop).path.unwrap().path_segments[0].id, "c");
        tokio::time::sleep(Duration::from_secs(60)).await;
        assert_eq!((hop.requests(), hop.closes()), (3, usize::from(alive.is_none())));
        assert!(client.watch("c").borrow().is_up());
    }
}

// Conformance 50
#[tokio::test(start_paused = true)]
async fn a_custom_reselect_function() {
    let hop = Arc::new(Hop::default());
    let client = Client::builder("nsc", Arc::new(HopConnector(hop.clone())))
        .url("unix:///mgr")
        .element(Life)
        .reselect(|request| {
            crate::elements::begin::reselect_same_endpoint(request);
            request.connection.get_or_insert_default().labels.insert("healed".into(), "yes".into());
        })
        .build();
    client.request(request(), TIMEOUT).await.unwrap();
    hop.restart();
    settle().await;
    let healed = last(&hop);
    assert_eq!((healed.labels["healed"].as_str(), healed.network_service_endpoint_name.as_str()), ("yes", "nse-1"));
    assert_eq!(client.connection("c").unwrap().labels["healed"], "yes");
}

// Conformance 55
#[tokio::test(start_paused = true)]
async fn the_other_side_may_ask_for_a_refresh_and_change_the_context() {
    let (client, hop) = client(None);
    client.request(request(), TIMEOUT).await.unwrap();
    settle().await;
    report(&hop, |connection| connection.set_state(State::RefreshRequested));
    settle().await;
    assert_eq!((hop.requests(), hop.closes()), (2, 0));
    let mut status = client.watch("c");
    status.mark_unchanged();
    report(&hop, |connection| connection.context = Some(ConnectionContext { mtu: 1400, ..Default::default() }));
    tokio::time::timeout(TIMEOUT, status.changed()).await.unwrap().unwrap();
    let mtu = status.borrow().connection().unwrap().context.as_ref().unwrap().mtu;
    assert_eq!((mtu, status.borrow().is_up()), (1400, true));
}

// Conformance 55
#[tokio::test(start_paused = true)]
async fn a_wish_about_one_connection_refreshes_all_that_belong_together() {
    for together in [true, false] {
        let hop = Arc::new(Hop::default());
        let builder = Client::builder("nsc", Arc::new(HopConnector(hop.clone()))).url("unix:///mgr").element(Life);
        let client = if together { builder.refresh_together().build() } else { builder.build() };
        for id in ["a", "b", "c"] {
            let mut request = request();
            request.connection.as_mut().unwrap().id = id.into();
            client.request(request, TIMEOUT).await.unwrap();
        }
        settle().await;
        let hub = hop.hub.lock().unwrap().clone();
        let mut wish = hub.connections().remove(0);
        wish.set_state(State::RefreshRequested);
        hub.notify(&wish);
        tokio::time::sleep(Duration::from_secs(60)).await;
        let again = hop.requests() - 3;
        assert_eq!((again, hop.closes()), (if together { 3 } else { 1 }, 0));
        // One that cannot be granted bothers nobody else.
        hop.refuse.store(true, SeqCst);
        hub.notify(&wish);
        tokio::time::sleep(Duration::from_secs(5)).await;
        let requests = hop.requests.lock().unwrap();
        let id = &wish.path.as_ref().unwrap().path_segments[0].id;
        let of_another = |id: &str| requests[3 + again..].iter().any(|(_, r)| r.connection.as_ref().unwrap().id != id);
        assert!(requests.len() > 3 + again && !of_another(id), "{together}");
    }
}

/// An endpoint that asks for all of them gets a few rounds, not one for each.
#[tokio::test(start_paused = true)]
async fn wishes_about_all_that_belong_together_are_no_storm() {
    const COUNT: usize = 50;
    let hop = Arc::new(Hop::default());
    let builder = Client::builder("nsc", Arc::new(HopConnector(hop.clone()))).url("unix:///mgr").element(Life);
    let client = builder.refresh_together().build();
    for n in 0..COUNT {
        let mut request = request();
        request.connection.as_mut().unwrap().id = n.to_string();
        client.request(request, TIMEOUT).await.unwrap();
    }
    settle().await;
    let hub = hop.hub.lock().unwrap().clone();
    for again in 1..3 {
        let before = hop.requests();
        hub.ask_for_refresh();
        tokio::time::sleep(Duration::from_secs(60)).await;
        let requests = hop.requests() - before;
        assert!((2 * COUNT..=5 * COUNT).contains(&requests), "{requests} requests, turn {again}");
    }
    assert!(hub.connections().iter().all(|connection| connection.state() == State::Up));
    assert_eq!(hop.closes(), 0);
}

/// Asks for a refresh while the answer to the first request is on its way up: nobody listens yet.
struct AsksEarly(Arc<Hop>, AtomicBool);

#[async_trait::async_trait]
impl crate::Element for AsksEarly {
    fn name(&self) -> &'static str {
        "asks early"
    }

    async fn request(&self, call: crate::RequestCall, next: crate::Next) -> Result<Connection, crate::Error> {
        let connection = next.request(call).await?;
        if !self.1.swap(true, SeqCst) {
            let hub = self.0.hub.lock().unwrap().clone();
            let mut wish = hub.connections().remove(0);
            wish.set_state(State::RefreshRequested);
            hub.notify(&wish);
        }
        Ok(connection)
    }
}

// Conformance 55
#[tokio::test(start_paused = true)]
async fn a_wish_from_before_the_watch_is_granted_and_one_that_cannot_be_is_no_storm() {
    let hop = Arc::new(Hop::default());
    let client = Client::builder("nsc", Arc::new(HopConnector(hop.clone())))
        .url("unix:///mgr")
        .element(Life)
        .element(AsksEarly(hop.clone(), AtomicBool::new(false)))
        .build();
    client.request(request(), TIMEOUT).await.unwrap();
    assert_eq!(hop.requests(), 1);
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!((hop.requests(), hop.closes()), (2, 0));
    // The hop wants it and refuses it.
    hop.refuse.store(true, SeqCst);
    let hub = hop.hub.lock().unwrap().clone();
    let mut wish = hub.connections().remove(0);
    wish.set_state(State::RefreshRequested);
    hub.notify(&wish);
    tokio::time::sleep(Duration::from_secs(10)).await;
    assert!((10..100).contains(&(hop.requests() - 2)), "{}", hop.requests());
    assert_eq!(hop.closes(), 0);
}

/// News of an earlier watch do not disturb what a later request has established.
#[tokio::test(start_paused = true)]
async fn stale_news_are_dropped() {
    let (client, hop) = client(None);
    client.request(request(), TIMEOUT).await.unwrap();
    hop.refuse.store(true, SeqCst);
    hop.restart();
    tokio::time::sleep(Duration::from_secs(20)).await; // healing, in vain, with long pauses
    hop.refuse.store(false, SeqCst);
    client.request(request(), TIMEOUT).await.unwrap();
    let (requests, closes) = (hop.requests(), hop.closes());
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!((hop.requests(), hop.closes()), (requests, closes));
}

#[tokio::test(start_paused = true)]
async fn a_hop_without_monitor_is_left_in_peace() {
    let (client, hop) = client(None);
    hop.no_monitor.store(true, SeqCst);
    client.request(request(), TIMEOUT).await.unwrap();
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!((hop.requests(), hop.closes()), (1, 0));
}

// Conformance 80
#[tokio::test(start_paused = true)]
async fn nothing_is_left_after_close() {
    let (client, hop) = client(Some(&Arc::new(AtomicBool::new(true))));
    for n in 0..500 {
        let mut request = request();
        request.connection.as_mut().unwrap().id = format!("c{n}");
        let connection = client.request(request, TIMEOUT).await.unwrap();
        client.close(connection, TIMEOUT).await.unwrap();
    }
    settle().await;
    assert_eq!(hop.hub.lock().unwrap().subscribers(), 0);
    assert_eq!(tokio::runtime::Handle::current().metrics().num_alive_tasks(), 0);
}
