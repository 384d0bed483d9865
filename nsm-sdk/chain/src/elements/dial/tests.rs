use super::*;
use crate::{
    Chain, Client, CloseCall,
    core::testing::{Hop, HopConnector, Spy, request_id, request_with},
    elements::{
        connect::{Connect, ConnectServer},
        metadata::MetadataElement,
    },
};
use std::sync::{Mutex, atomic::Ordering::SeqCst};

fn chain() -> (Chain, Arc<Hop>) {
    let hop = Arc::new(Hop::default());
    let chain = Chain::builder()
        .element(MetadataElement::new())
        .element(Dial::new(Arc::new(HopConnector(hop.clone())), Duration::ZERO))
        .element(Connect)
        .build();
    (chain, hop)
}

fn request(url: &str) -> RequestCall {
    request_id("c", Context { client_url: Some(url.into()), ..Context::new() })
}

fn close() -> CloseCall {
    CloseCall::new(Connection { id: "c".into(), ..Default::default() }, Context::new())
}

// Conformance 63
#[tokio::test(start_paused = true)]
async fn one_connection_until_it_breaks() {
    let (chain, hop) = chain();
    for _ in 0..3 {
        chain.request(request("a")).await.unwrap();
    }
    assert_eq!((hop.requests(), hop.dialled()), (3, 1));
    hop.restart();
    chain.request(request("a")).await.unwrap();
    assert_eq!((hop.requests(), hop.dialled()), (4, 2));
    chain.close(close()).await.unwrap();
    assert_eq!((hop.closes(), hop.dialled()), (1, 2));
    chain.request(request("a")).await.unwrap();
    assert_eq!(hop.dialled(), 3);
}

// Conformance 63
#[tokio::test(start_paused = true)]
async fn another_url_closes_at_the_old_one() {
    let (chain, hop) = chain();
    chain.request(request("a")).await.unwrap();
    chain.request(request("b")).await.unwrap();
    let at = |list: &Mutex<Vec<(String, Connection)>>| {
        list.lock().unwrap().iter().map(|(url, _)| url.clone()).collect::<Vec<_>>()
    };
    assert_eq!(at(&hop.closes), ["a"]);
    chain.close(close()).await.unwrap();
    assert_eq!(at(&hop.closes), ["a", "b"]);
}

// Conformance 63
#[tokio::test(start_paused = true)]
async fn another_url_closes_at_the_old_one_even_if_the_call_is_nearly_over() {
    for left in [0, 1] {
        let (chain, hop) = chain();
        *hop.delay.lock().unwrap() = Duration::from_secs(1);
        chain.request(request("a")).await.unwrap();
        let mut late = request("b");
        late.ctx.deadline = Some(Instant::now() + Duration::from_millis(left));
        let error = chain.request(late).await.unwrap_err();
        assert_eq!(error.code(), tonic::Code::DeadlineExceeded);
        tokio::time::sleep(Duration::from_secs(2)).await;
        let closes: Vec<_> = hop.closes.lock().unwrap().iter().map(|(url, _)| url.clone()).collect();
        assert_eq!(closes, ["a"], "{left} ms left");
    }
}

/// Connects to "a" once and then never again, to others always.
struct Once(HopConnector, std::sync::atomic::AtomicBool);

#[async_trait::async_trait]
impl Connector for Once {
    async fn connect(&self, url: &str, deadline: Instant) -> Result<Remote, Error> {
        match url == "a" && self.1.swap(true, SeqCst) {
            true => std::future::pending().await,
            false => self.0.connect(url, deadline).await,
        }
    }
}

// Conformance 63
#[tokio::test(start_paused = true)]
async fn a_dead_old_hop_does_not_eat_the_time_of_the_new_one() {
    for (limit, waited) in [(3, 1), (60, 5)].map(|(a, b)| (Duration::from_secs(a), Duration::from_secs(b))) {
        let hop = Arc::new(Hop::default());
        let once = Once(HopConnector(hop.clone()), false.into());
        let chain = Chain::builder()
            .element(MetadataElement::new())
            .element(Dial::new(Arc::new(once), Duration::ZERO))
            .element(Connect)
            .build();
        chain.request(request("a")).await.unwrap();
        hop.restart();
        let mut other = request("b");
        other.ctx.deadline = Some(Instant::now() + limit);
        let before = Instant::now();
        chain.request(other).await.unwrap();
        assert_eq!((before.elapsed(), hop.closes()), (waited, 0));
        // Nothing goes on for ever.
        tokio::time::sleep(Duration::from_secs(10)).await;
        assert_eq!(tokio::runtime::Handle::current().metrics().num_alive_tasks(), 0);
    }
}

// Conformance 63
#[tokio::test(start_paused = true)]
async fn what_cannot_be_reached_is_an_error_but_close_goes_on() {
    let (chain, hop) = chain();
    hop.down.store(true, SeqCst);
    let error = chain.request(request("a")).await.unwrap_err();
    assert_eq!(error.to_string(), "dial (connection c): failed to dial a: connection refused");
    hop.down.store(false, SeqCst);
    chain.request(request("a")).await.unwrap();
    hop.down.store(true, SeqCst);
    chain.close(close()).await.unwrap_err();
    let no_url = request_id("c", Context::new());
    assert_eq!(chain.request(no_url).await.unwrap_err().code(), tonic::Code::Unavailable);
}

// Conformance 63
#[tokio::test(start_paused = true)]
async fn a_remote_that_is_given_is_used_as_it_is_and_stays_its_owners() {
    for url in [None, Some("unix:///other")] {
        let hop = Arc::new(Hop::default());
        let given = HopConnector(hop.clone()).connect("given", Instant::now()).await.unwrap();
        let builder = Client::builder("nsc", Arc::new(HopConnector(hop.clone()))).remote(given.clone());
        let client = match url {
            Some(url) => builder.url(url),
            None => builder,
        }
        .build();
        let second = Duration::from_secs(1);
        for _ in 0..2 {
            let message = *request_id("c", Context::new()).message;
            let connection = client.request(message, second).await.unwrap();
            client.request(*request_with(connection.clone()).message, second).await.unwrap();
            client.close(connection, second).await.unwrap();
        }
        assert_eq!((hop.dialled(), hop.requests(), hop.closes()), (1, 4, 2), "{url:?}");
        let everywhere = |list: &Mutex<Vec<(String, _)>>| list.lock().unwrap().iter().all(|(url, _)| url == "given");
        assert!(everywhere(&hop.requests));
        assert!(hop.closes.lock().unwrap().iter().all(|(url, _)| url == "given"));
        assert!(given.alive());
        // It is not this chain's to make anew.
        hop.restart();
        client.request(*request_id("d", Context::new()).message, second).await.unwrap_err();
        assert_eq!(hop.dialled(), 1);
    }
}

/// Never connects.
struct Never;

#[async_trait::async_trait]
impl Connector for Never {
    async fn connect(&self, _: &str, _: Instant) -> Result<Remote, Error> {
        std::future::pending().await
    }
}

// Conformance 63
#[tokio::test(start_paused = true)]
async fn the_dial_timeout_holds() {
    let dial = Dial::new(Arc::new(Never), Duration::from_millis(750));
    let chain = Chain::builder().element(MetadataElement::new()).element(dial).element(Connect).build();
    let before = Instant::now();
    chain.request(request("a")).await.unwrap_err();
    assert_eq!(before.elapsed(), Duration::from_millis(750));
}

// Conformance 63
#[tokio::test(start_paused = true)]
async fn the_server_side_of_connect_undoes() {
    let (client, hop) = chain();
    let spy = Arc::new(Spy::default());
    let chain = Chain::builder()
        .element(MetadataElement::new())
        .element(ConnectServer::new(client))
        .element(spy.clone())
        .build();
    spy.fail_requests(true);
    chain.request(request("a")).await.unwrap_err();
    assert_eq!((hop.requests(), hop.closes(), spy.requests()), (1, 1, 1));
    spy.fail_requests(false);
    chain.request(request("a")).await.unwrap();
    spy.fail_requests(true);
    chain.request(request("a")).await.unwrap_err();
    assert_eq!((hop.requests(), hop.closes(), spy.requests()), (3, 1, 3), "a failed refresh closes nothing");
    hop.refuse.store(true, SeqCst);
    chain.request(request("a")).await.unwrap_err();
    assert_eq!(spy.requests(), 3, "the server side is not asked if the client side fails");
    chain.close(close()).await.unwrap();
    assert_eq!((hop.closes(), spy.closes()), (2, 1));
}
