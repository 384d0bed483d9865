use super::*;
use crate::{
    Chain, Context, Path, PathSegment,
    core::testing::{Spy, close, request_with},
    elements::{begin::Begin, metadata::MetadataElement},
};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

fn chain(timeout: Timeout) -> (Chain, Arc<Spy>) {
    let spy = Arc::new(Spy::default());
    let chain = Chain::builder()
        .element(Begin::new(Side::Server))
        .element(MetadataElement::new())
        .element(timeout)
        .element(spy.clone())
        .build();
    (chain, spy)
}

fn request(life: Duration, deadline: Option<Duration>) -> RequestCall {
    let caller = PathSegment { expires: Some(clock::to_timestamp(clock::now() + life)), ..Default::default() };
    let path = Path { index: 1, path_segments: vec![caller, PathSegment::default()] };
    let mut call = request_with(Connection { id: "c".into(), path: Some(path), ..Default::default() });
    if let Some(deadline) = deadline {
        *call.ctx = Context::new().with_timeout(deadline);
    }
    call
}

const MINUTE: Duration = Duration::from_secs(60);
const SECOND: Duration = Duration::from_secs(1);

// Conformance 27
#[tokio::test(start_paused = true)]
async fn closes_after_expiry() {
    let (chain, spy) = chain(Timeout::new());
    chain.request(request(MINUTE, None)).await.unwrap();
    tokio::time::sleep(MINUTE - SECOND).await;
    assert_eq!(spy.closes(), 0);
    tokio::time::sleep(2 * SECOND).await;
    assert_eq!(spy.closes(), 1);
}

// Conformance 31
#[tokio::test(start_paused = true)]
async fn closes_a_request_time_before_expiry() {
    let (chain, spy) = chain(Timeout::new());
    chain.request(request(MINUTE, Some(15 * SECOND))).await.unwrap();
    tokio::time::sleep(44 * SECOND).await;
    assert_eq!(spy.closes(), 0);
    tokio::time::sleep(2 * SECOND).await;
    assert_eq!(spy.closes(), 1);
}

// Conformance 28
#[tokio::test(start_paused = true)]
async fn never_closes_twice() {
    let (chain, spy) = chain(Timeout::new());
    chain.request(request(MINUTE, None)).await.unwrap();
    close(&chain, "c").await.unwrap();
    tokio::time::sleep(2 * MINUTE).await;
    assert_eq!(spy.closes(), 1);
    chain.request(request(MINUTE, None)).await.unwrap();
    tokio::time::sleep(2 * MINUTE).await;
    close(&chain, "c").await.unwrap();
    assert_eq!(spy.closes(), 2);
}

// Conformance 29
#[tokio::test(start_paused = true)]
async fn a_refresh_wins_the_race() {
    let (chain, spy) = chain(Timeout::new());
    for _ in 0..100 {
        chain.request(request(SECOND, None)).await.unwrap();
        tokio::time::sleep(SECOND - Duration::from_millis(1)).await;
    }
    assert_eq!(spy.closes(), 0);
    // The timer fires while a refresh is under way: the close waits behind it and is dropped.
    spy.set_delay(5 * SECOND);
    chain.request(request(MINUTE, None)).await.unwrap();
    assert_eq!(spy.closes(), 0);
}

// Conformance 30
#[tokio::test(start_paused = true)]
async fn a_failed_refresh_keeps_the_timer() {
    let (chain, spy) = chain(Timeout::new());
    chain.request(request(MINUTE, None)).await.unwrap();
    spy.fail_requests(true);
    chain.request(request(2 * MINUTE, None)).await.unwrap_err();
    tokio::time::sleep(MINUTE + SECOND).await;
    assert_eq!(spy.closes(), 1);
}

// Conformance 30
#[tokio::test(start_paused = true)]
async fn a_failed_close_is_tried_again_at_expiry() {
    let (chain, spy) = chain(Timeout::new());
    chain.request(request(MINUTE, None)).await.unwrap();
    spy.fail_closes(Some(Code::DeadlineExceeded));
    close(&chain, "c").await.unwrap_err();
    spy.fail_closes(None);
    tokio::time::sleep(MINUTE + SECOND).await;
    assert_eq!(spy.closes(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_caller_without_expiry_is_refused_and_cleaned_up() {
    let (chain, spy) = chain(Timeout::new());
    let error = chain.request(request_with(Connection { id: "c".into(), ..Default::default() })).await.unwrap_err();
    assert!(error.to_string().contains("expiration for the previous path segment cannot be nil"));
    assert_eq!(spy.closes(), 1);
}

struct Alive(Arc<AtomicBool>);

#[async_trait::async_trait]
impl KeepAlive for Alive {
    async fn keep(&self, _: &Connection) -> bool {
        self.0.load(SeqCst)
    }
}

#[tokio::test(start_paused = true)]
async fn keeps_what_is_alive() {
    let alive = Arc::new(AtomicBool::new(true));
    let (chain, spy) = chain(Timeout::new().keep_while(Arc::new(Alive(alive.clone())), 10 * SECOND));
    chain.request(request(MINUTE, None)).await.unwrap();
    tokio::time::sleep(10 * MINUTE).await;
    assert_eq!(spy.closes(), 0);
    alive.store(false, SeqCst);
    tokio::time::sleep(11 * SECOND).await;
    assert_eq!(spy.closes(), 1);
}
