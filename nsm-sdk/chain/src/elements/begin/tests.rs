use super::*;
use crate::{
    Chain, ConnectionContext, Context, RequestCall,
    core::testing::{close, request_id, request_with},
};
use std::sync::{
    Mutex,
    atomic::{AtomicBool, AtomicU32, Ordering::SeqCst},
};

#[derive(Default)]
struct Seen {
    inside: AtomicU32,
    requests: AtomicU32,
    closes: AtomicU32,
    fail: AtomicBool,
    delay: Mutex<Duration>,
    factory: Mutex<Option<EventFactory>>,
    deadlines: Mutex<Vec<Option<Duration>>>,
    values: Mutex<Vec<Option<u32>>>,
    closed_with: Mutex<Vec<Connection>>,
    states: Mutex<Vec<State>>,
}

struct Probe(Arc<Seen>);

#[async_trait::async_trait]
impl Element for Probe {
    fn name(&self) -> &'static str {
        "probe"
    }

    async fn request(&self, mut call: RequestCall, next: Next) -> Result<Connection, Error> {
        let seen = &self.0;
        assert_eq!(seen.inside.fetch_add(1, SeqCst), 0, "two operations at once");
        *seen.factory.lock().unwrap() = call.ctx.factory.clone();
        seen.deadlines.lock().unwrap().push(call.ctx.time_left());
        seen.values.lock().unwrap().push(call.ctx.extension::<u32>().map(|value| *value));
        seen.states.lock().unwrap().push(call.connection().state());
        let n = seen.requests.fetch_add(1, SeqCst) + 1;
        let delay = *seen.delay.lock().unwrap();
        tokio::time::sleep(delay).await;
        seen.inside.fetch_sub(1, SeqCst);
        if seen.fail.load(SeqCst) {
            return Err(Error::new("probe", call.id(), "told to fail"));
        }
        call.connection_mut().labels.insert("n".into(), n.to_string());
        next.request(call).await
    }

    async fn close(&self, call: CloseCall, next: Next) -> Result<(), Error> {
        let seen = &self.0;
        assert_eq!(seen.inside.fetch_add(1, SeqCst), 0, "two operations at once");
        seen.closes.fetch_add(1, SeqCst);
        seen.deadlines.lock().unwrap().push(call.ctx.time_left());
        seen.closed_with.lock().unwrap().push((*call.message).clone());
        let delay = *seen.delay.lock().unwrap();
        tokio::time::sleep(delay).await;
        seen.inside.fetch_sub(1, SeqCst);
        next.close(call).await
    }
}

fn chain(side: Side) -> (Chain, Arc<Seen>, Arc<Begin>) {
    let (seen, begin) = (Arc::<Seen>::default(), Arc::new(Begin::new(side)));
    (Chain::builder().element(begin.clone()).element(Probe(seen.clone())).build(), seen, begin)
}

fn request(id: &str) -> RequestCall {
    request_id(id, Context::new())
}

// Conformance 9
#[tokio::test(flavor = "multi_thread")]
async fn one_operation_at_a_time() {
    for side in [Side::Server, Side::Client] {
        let (chain, seen, begin) = chain(side);
        *seen.delay.lock().unwrap() = Duration::from_micros(50);
        let tasks: Vec<_> = (0..200)
            .map(|n| {
                let chain = chain.clone();
                tokio::spawn(async move {
                    match n % 3 {
                        0 => close(&chain, "c").await.unwrap(),
                        _ => _ = chain.request(request("c")).await.unwrap(),
                    }
                })
            })
            .collect();
        for task in tasks {
            task.await.unwrap();
        }
        close(&chain, "c").await.unwrap();
        assert!(begin.is_empty());
        assert!(seen.closes.load(SeqCst) >= 1);
    }
}

// Conformance 10
#[tokio::test(start_paused = true)]
async fn operations_run_in_order_of_arrival() {
    let (chain, seen, _) = chain(Side::Server);
    *seen.delay.lock().unwrap() = Duration::from_millis(10);
    chain.request(request("c")).await.unwrap();
    let factory = seen.factory.lock().unwrap().clone().unwrap();
    let order = Arc::<Mutex<Vec<u32>>>::default();
    let mut waiting = Vec::new();
    for n in 0..20 {
        let (event, order) = (factory.request(EventOptions::default()), order.clone());
        waiting.push(tokio::spawn(async move {
            event.await.unwrap();
            order.lock().unwrap().push(n);
        }));
    }
    for task in waiting {
        task.await.unwrap();
    }
    assert_eq!(*order.lock().unwrap(), (0..20).collect::<Vec<_>>());
}

// Conformance 11
#[tokio::test]
async fn close_carries_what_the_chain_last_returned() {
    for side in [Side::Server, Side::Client] {
        let (chain, seen, _) = chain(side);
        chain.request(request("c")).await.unwrap();
        close(&chain, "c").await.unwrap();
        close(&chain, "c").await.unwrap();
        let closed = seen.closed_with.lock().unwrap();
        assert_eq!((closed.len(), closed[0].labels["n"].as_str()), (1, "1"));
    }
}

// Conformance 12
#[tokio::test]
async fn a_client_may_change_context_but_not_labels() {
    let (chain, _, _) = chain(Side::Client);
    let mut connection = chain.request(request("c")).await.unwrap();
    connection.labels.insert("mine".into(), "1".into());
    connection.mechanism = Some(crate::Mechanism::default());
    connection.context = Some(ConnectionContext { mtu: 1400, ..Default::default() });
    let connection = chain.request(request_with(connection)).await.unwrap();
    assert!(!connection.labels.contains_key("mine") && connection.mechanism.is_none());
    assert_eq!(connection.context.unwrap().mtu, 1400);
}

// Conformance 13, 15
#[tokio::test(start_paused = true)]
async fn events_carry_latest_values_and_the_first_requests_time() {
    let (chain, seen, _) = chain(Side::Server);
    for (value, seconds) in [(1_u32, 15), (2, 99)] {
        let mut ctx = Context::new().with_timeout(Duration::from_secs(seconds));
        ctx.insert_extension(value);
        chain.request(request_id("c", ctx)).await.unwrap();
        tokio::time::advance(Duration::from_secs(60)).await;
    }
    let factory = seen.factory.lock().unwrap().clone().unwrap();
    assert!(matches!(factory.request(EventOptions::default()).await, Ok(Fired::Connection(_))));
    assert_eq!(*seen.values.lock().unwrap(), [Some(1), Some(2), Some(2)]);
    assert_eq!(seen.deadlines.lock().unwrap()[2], Some(Duration::from_secs(15)));
}

// Conformance 14
#[tokio::test(start_paused = true)]
async fn an_event_behind_a_close_is_skipped() {
    let (chain, seen, _) = chain(Side::Client);
    chain.request(request("c")).await.unwrap();
    let factory = seen.factory.lock().unwrap().clone().unwrap();
    *seen.delay.lock().unwrap() = Duration::from_secs(1);
    let closing = tokio::spawn({
        let chain = chain.clone();
        async move { close(&chain, "c").await }
    });
    tokio::time::sleep(Duration::from_millis(1)).await;
    assert_eq!(factory.request(EventOptions::default()).await.unwrap(), Fired::Skipped);
    closing.await.unwrap().unwrap();
    assert!(factory.is_closed());
    assert_eq!(seen.requests.load(SeqCst), 1);
}

// Conformance 16
#[tokio::test(start_paused = true)]
async fn reselect_closes_and_requests_each_with_their_own_time() {
    let (chain, seen, _) = chain(Side::Client);
    *seen.delay.lock().unwrap() = Duration::from_secs(3);
    let ctx = Context::new().with_timeout(Duration::from_secs(5));
    chain.request(request_id("c", ctx)).await.unwrap();
    let factory = seen.factory.lock().unwrap().clone().unwrap();
    factory.request(EventOptions::reselect()).await.unwrap();
    assert_eq!(seen.closes.load(SeqCst), 1);
    assert_eq!(*seen.deadlines.lock().unwrap(), [Some(Duration::from_secs(5)); 3]);
    assert_eq!(*seen.states.lock().unwrap(), [State::Up, State::ReselectRequested]);
    assert!(!factory.is_closed() && factory.connection().unwrap().state() == State::Up);
}

#[tokio::test]
async fn a_server_closes_the_old_branch_when_asked_to_reselect() {
    let (chain, seen, _) = chain(Side::Server);
    let mut connection = chain.request(request("c")).await.unwrap();
    connection.set_state(State::ReselectRequested);
    let connection = chain.request(request_with(connection)).await.unwrap();
    assert_eq!((seen.closes.load(SeqCst), connection.state()), (1, State::Up));
}

#[tokio::test]
async fn a_failed_refresh_keeps_the_connection_a_failed_first_request_does_not() {
    let (chain, seen, begin) = chain(Side::Server);
    seen.fail.store(true, SeqCst);
    chain.request(request("c")).await.unwrap_err();
    assert!(begin.is_empty());
    seen.fail.store(false, SeqCst);
    chain.request(request("c")).await.unwrap();
    seen.fail.store(true, SeqCst);
    chain.request(request("c")).await.unwrap_err();
    close(&chain, "c").await.unwrap();
    assert_eq!((seen.closes.load(SeqCst), begin.len()), (1, 0));
}

#[tokio::test]
async fn no_id_is_an_error_and_stale_events_are_skipped() {
    let (chain, seen, _) = chain(Side::Server);
    assert_eq!(chain.request(request("")).await.unwrap_err().code(), tonic::Code::InvalidArgument);
    chain.request(request("c")).await.unwrap();
    let factory = seen.factory.lock().unwrap().clone().unwrap();
    let stale = EventOptions::default().at_generation(factory.generation());
    chain.request(request("c")).await.unwrap();
    assert_eq!(factory.request(stale.clone()).await.unwrap(), Fired::Skipped);
    assert_eq!(factory.close(stale).await.unwrap(), Fired::Skipped);
}

/// An element with an effect and an undo is not cut in two by a caller that leaves (design 8).
#[tokio::test(start_paused = true)]
async fn a_caller_that_leaves_cancels_nothing() {
    let (chain, seen, begin) = chain(Side::Server);
    *seen.delay.lock().unwrap() = Duration::from_millis(400);
    let ctx = Context::new().with_timeout(Duration::from_millis(50));
    let error = chain.request(request_id("c", ctx)).await.unwrap_err();
    assert_eq!(error.code(), tonic::Code::DeadlineExceeded);
    assert_eq!(seen.inside.load(SeqCst), 1);
    tokio::time::sleep(Duration::from_secs(1)).await;
    let left = tokio::time::timeout(Duration::from_millis(1), chain.request(request("d"))).await;
    assert!(left.is_err());
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(seen.inside.load(SeqCst), 0);
    // Nobody has been told of either connection.
    assert_eq!((seen.requests.load(SeqCst), seen.closes.load(SeqCst), begin.len()), (2, 2, 0));
}

#[tokio::test(start_paused = true)]
async fn what_the_caller_asks_for_again_or_had_before_is_not_closed() {
    for side in [Side::Server, Side::Client] {
        let (chain, seen, begin) = chain(side);
        *seen.delay.lock().unwrap() = Duration::from_millis(400);
        let short = || Context::new().with_timeout(Duration::from_millis(50));
        chain.request(request_id("c", short())).await.unwrap_err();
        // Asked again while the first request is still under way: the second one is a refresh.
        chain.request(request("c")).await.unwrap();
        chain.request(request_id("c", short())).await.unwrap_err();
        tokio::time::sleep(Duration::from_secs(1)).await;
        // Another process has made it before, whatever this one remembers.
        let refresh = Context { refresh: true, ..short() };
        chain.request(request_id("d", refresh)).await.unwrap_err();
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!((seen.requests.load(SeqCst), seen.closes.load(SeqCst), begin.len()), (4, 0, 2));
    }
}

/// A client chain inside a server chain does not queue behind itself.
#[tokio::test(start_paused = true)]
async fn an_inner_begin_lets_everything_pass() {
    let seen = Arc::<Seen>::default();
    let inner = Chain::builder().element(Begin::new(Side::Client)).element(Probe(seen.clone())).build();
    let chain = Chain::builder().element(Begin::new(Side::Server)).element(inner).build();
    let request = tokio::time::timeout(Duration::from_secs(1), chain.request(request("c")));
    request.await.unwrap().unwrap();
    close(&chain, "c").await.unwrap();
    assert_eq!((seen.requests.load(SeqCst), seen.closes.load(SeqCst)), (1, 1));
}

#[tokio::test]
async fn a_dropped_chain_replays_nothing() {
    let (chain, seen, begin) = chain(Side::Client);
    chain.request(request("c")).await.unwrap();
    let factory = seen.factory.lock().unwrap().clone().unwrap();
    drop((chain, begin));
    assert_eq!(factory.request(EventOptions::default()).await.unwrap(), Fired::Skipped);
    factory.closed().await;
}

/// Breaks on the way back up, after what is below has been done.
struct Breaks(Arc<AtomicBool>);

#[async_trait::async_trait]
impl Element for Breaks {
    fn name(&self) -> &'static str {
        "breaks"
    }

    async fn request(&self, call: RequestCall, next: Next) -> Result<Connection, Error> {
        let connection = next.request(call).await?;
        assert!(!self.0.load(SeqCst), "told to break");
        Ok(connection)
    }
}

#[tokio::test]
async fn of_a_first_request_that_panics_nothing_is_left_and_of_a_refresh_everything() {
    for side in [Side::Server, Side::Client] {
        let (seen, begin, broken) =
            (Arc::<Seen>::default(), Arc::new(Begin::new(side)), Arc::new(AtomicBool::new(true)));
        let metadata = Arc::new(crate::elements::metadata::MetadataElement::new());
        let chain = Chain::builder()
            .element(begin.clone())
            .element(metadata.clone())
            .element(Breaks(broken.clone()))
            .element(Probe(seen.clone()))
            .build();
        let error = chain.request(request("c")).await.unwrap_err();
        assert_eq!((error.code(), error.element()), (tonic::Code::Internal, "begin"), "{error}");
        assert_eq!((seen.closes.load(SeqCst), begin.len(), metadata.len()), (1, 0, 0), "what is below was told");
        broken.store(false, SeqCst);
        chain.request(request("c")).await.unwrap();
        broken.store(true, SeqCst);
        chain.request(request("c")).await.unwrap_err();
        assert_eq!((seen.closes.load(SeqCst), begin.len(), metadata.len()), (1, 1, 1));
        close(&chain, "c").await.unwrap();
        assert_eq!((seen.closes.load(SeqCst), begin.len(), metadata.len()), (2, 0, 0));
    }
}

/// Ends the moment somebody does not want to wait, like a call to another process.
struct Heeds(Arc<Mutex<Vec<bool>>>);

#[async_trait::async_trait]
impl Element for Heeds {
    fn name(&self) -> &'static str {
        "heeds"
    }

    async fn close(&self, call: CloseCall, next: Next) -> Result<(), Error> {
        let waited = call.ctx.bounded(Duration::from_secs(60), tokio::time::sleep(Duration::from_secs(1))).await;
        self.0.lock().unwrap().push(waited.is_ok());
        match waited {
            Ok(()) => next.close(call).await,
            Err(code) => Err(Error::new("heeds", call.id(), "given up").with_code(code)),
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_close_does_not_cut_short_what_does_its_work() {
    let (seen, begin, closed) = (Arc::<Seen>::default(), Arc::new(Begin::new(Side::Server)), Arc::default());
    let chain = Chain::builder()
        .element(begin.clone())
        .element(Heeds(Arc::clone(&closed)))
        .element(Probe(seen.clone()))
        .build();
    // The caller has left, and its connection is being closed again when the close comes.
    *seen.delay.lock().unwrap() = Duration::from_millis(400);
    let ctx = Context::new().with_timeout(Duration::from_secs(10));
    let left = tokio::time::timeout(Duration::from_millis(50), chain.request(request_id("c", ctx))).await;
    assert!(left.is_err());
    tokio::time::sleep(Duration::from_millis(400)).await;
    assert_eq!((seen.inside.load(SeqCst), seen.closes.load(SeqCst)), (0, 0), "it is under way");
    close(&chain, "c").await.unwrap();
    assert_eq!((closed.lock().unwrap().as_slice(), seen.closes.load(SeqCst), begin.len()), (&[true][..], 1, 0));
    // The same for the old branch of one that is asked for anew.
    let mut connection = chain.request(request("d")).await.unwrap();
    connection.set_state(State::ReselectRequested);
    let reselect = tokio::spawn({
        let chain = chain.clone();
        async move { chain.request(request_with(connection)).await }
    });
    tokio::time::sleep(Duration::from_millis(100)).await;
    close(&chain, "d").await.unwrap();
    reselect.await.unwrap().unwrap();
    assert_eq!((closed.lock().unwrap().as_slice(), seen.closes.load(SeqCst), begin.len()), (&[true; 3][..], 3, 0));
}
