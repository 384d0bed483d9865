use super::*;
use crate::{ClientToken, PathHandle, RegistryPath};
use nsm_identity::clock;
use nsm_proto::registry::NetworkServiceEndpoint;
use prost_types::Timestamp;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::SeqCst};

/// Remembers what passes; never lets two operations in at once.
#[derive(Default)]
struct Seen {
    inside: AtomicU32,
    fail: AtomicBool,
    delay: std::sync::Mutex<Duration>,
    urls: std::sync::Mutex<Vec<String>>,
    unregistered: std::sync::Mutex<Vec<NetworkServiceEndpoint>>,
    contexts: std::sync::Mutex<Vec<Context>>,
    times: std::sync::Mutex<Vec<Option<Duration>>>,
}

impl Seen {
    async fn pass(&self, ctx: &Context) -> Result<(), Error> {
        assert_eq!(self.inside.fetch_add(1, SeqCst), 0, "two operations at once");
        lock(&self.contexts).push(ctx.clone());
        lock(&self.times).push(ctx.time_left());
        let delay = *lock(&self.delay);
        tokio::time::sleep(delay).await;
        self.inside.fetch_sub(1, SeqCst);
        match self.fail.load(SeqCst) {
            true => Err(Error::new("seen", "", "told to fail")),
            false => Ok(()),
        }
    }

    fn factory(&self) -> Factory {
        lock(&self.contexts).last().unwrap().factory.clone().unwrap()
    }
}

struct Spy(Arc<Seen>);

#[async_trait::async_trait]
impl Element<NetworkServiceEndpoint> for Spy {
    fn name(&self) -> &'static str {
        "spy"
    }

    async fn register(
        &self,
        mut call: Call<NetworkServiceEndpoint>,
        next: Next<NetworkServiceEndpoint>,
    ) -> Result<NetworkServiceEndpoint, Error> {
        lock(&self.0.urls).push(call.message.url.clone());
        assert_eq!(call.message.expiration_time, None, "each registration computes it anew");
        self.0.pass(&call.ctx).await?;
        call.message.expiration_time = Some(Timestamp { seconds: 60, nanos: 0 });
        next.register(call).await
    }

    async fn unregister(
        &self,
        call: Call<NetworkServiceEndpoint>,
        next: Next<NetworkServiceEndpoint>,
    ) -> Result<(), Error> {
        lock(&self.0.unregistered).push(call.message.clone());
        self.0.pass(&call.ctx).await?;
        next.unregister(call).await
    }
}

fn chain(begin: Begin<NetworkServiceEndpoint>) -> (crate::Chain<NetworkServiceEndpoint>, Arc<Seen>) {
    let seen = Arc::<Seen>::default();
    let elements: Vec<Arc<dyn Element<_>>> = vec![Arc::new(begin), Arc::new(Spy(seen.clone()))];
    (crate::Chain::new(elements), seen)
}

fn call(url: &str) -> Call<NetworkServiceEndpoint> {
    Call::new(NetworkServiceEndpoint { name: "e".into(), url: url.into(), ..Default::default() }, Context::new())
}

// Conformance 10
#[tokio::test(start_paused = true)]
async fn registrations_of_one_name_run_in_order_of_arrival() {
    let (chain, seen) = chain(Begin::new());
    *lock(&seen.delay) = Duration::from_millis(10);
    let mut calls = Vec::new();
    for n in 0..50 {
        let chain = chain.clone();
        calls.push(tokio::spawn(async move { chain.register(call(&n.to_string())).await.unwrap() }));
        // On one thread a task that was started runs up to its first wait: its place in the line.
        tokio::task::yield_now().await;
    }
    for call in calls {
        call.await.unwrap();
    }
    assert_eq!(*lock(&seen.urls), (0..50).map(|n| n.to_string()).collect::<Vec<_>>());
}

// Conformance 10
#[tokio::test(flavor = "multi_thread")]
async fn one_operation_of_a_name_at_a_time() {
    let (chain, seen) = chain(Begin::new());
    *lock(&seen.delay) = Duration::from_micros(50);
    let calls = (0..200).map(|n| {
        let chain = chain.clone();
        tokio::spawn(async move {
            match n % 3 {
                0 => chain.unregister(call("")).await.unwrap(),
                _ => drop(chain.register(call("u")).await.unwrap()),
            }
        })
    });
    for call in calls.collect::<Vec<_>>() {
        call.await.unwrap();
    }
    assert_eq!(seen.inside.load(SeqCst), 0);
}

// Conformance 17
#[tokio::test]
async fn an_unregister_carries_the_last_registration() {
    let (chain, seen) = chain(Begin::new());
    chain.register(call("first")).await.unwrap();
    chain.register(call("second")).await.unwrap();
    chain.unregister(call("what the caller believes")).await.unwrap();
    assert_eq!(lock(&seen.unregistered)[0].url, "second");
    // Nobody knows it any more: endpoints are passed on as given, for whoever still has them.
    chain.unregister(call("unknown")).await.unwrap();
    assert_eq!(lock(&seen.unregistered)[1].url, "unknown");
    assert!(seen.urls.lock().unwrap().len() == 2);
}

// Conformance 17
#[tokio::test]
async fn clients_of_services_pass_nothing_unknown_on() {
    let (chain, seen) = chain(Begin::known_only());
    chain.unregister(call("unknown")).await.unwrap();
    assert!(lock(&seen.unregistered).is_empty());
    chain.register(call("u")).await.unwrap();
    chain.unregister(call("")).await.unwrap();
    chain.unregister(call("")).await.unwrap();
    assert_eq!(lock(&seen.unregistered).len(), 1);
    let nameless = chain.register(Call::new(NetworkServiceEndpoint::default(), Context::new())).await;
    assert_eq!(nameless.unwrap_err().code(), tonic::Code::InvalidArgument);
}

// Conformance 17
#[tokio::test(start_paused = true)]
async fn events_have_the_values_and_the_time_of_the_last_registration() {
    let (chain, seen) = chain(Begin::new());
    let token = |jwt: &str| Some(ClientToken { jwt: jwt.into(), expires: clock::now() });
    for (jwt, seconds) in [("old", 15), ("new", 30)] {
        let path = PathHandle::new(RegistryPath { index: 0, segments: vec![Default::default(); 2] });
        let ctx = Context { token: token(jwt), path: Some(path), ..Context::new() };
        let ctx = ctx.with_timeout(Duration::from_secs(seconds));
        chain.register(Call::new(call("u").message, ctx)).await.unwrap();
        tokio::time::advance(Duration::from_secs(100)).await;
    }
    let factory = seen.factory();
    factory.register().await.unwrap();
    let contexts = lock(&seen.contexts).clone();
    assert_eq!(contexts[2].token.as_ref().unwrap().jwt, "new");
    assert_eq!(contexts[2].path.as_ref().unwrap().get().segments.len(), 2);
    assert_eq!(lock(&seen.times)[2], Some(Duration::from_secs(30)));
    factory.unregister().await.unwrap();
    assert_eq!(lock(&seen.unregistered)[0].url, "u");
    // It is gone: neither event does anything.
    factory.register().await.unwrap();
    factory.unregister().await.unwrap();
    assert_eq!((lock(&seen.urls).len(), lock(&seen.unregistered).len()), (3, 1));
}

// Conformance 17
#[tokio::test(start_paused = true)]
async fn an_event_behind_an_unregister_is_skipped() {
    let (chain, seen) = chain(Begin::new());
    chain.register(call("u")).await.unwrap();
    let factory = seen.factory();
    *lock(&seen.delay) = Duration::from_secs(1);
    let leaving = tokio::spawn({
        let chain = chain.clone();
        async move { chain.unregister(call("")).await }
    });
    tokio::time::sleep(Duration::from_millis(1)).await;
    factory.register().await.unwrap();
    leaving.await.unwrap().unwrap();
    assert_eq!(lock(&seen.urls).len(), 1);
}

#[tokio::test]
async fn a_failed_first_registration_is_forgotten_a_failed_refresh_is_not() {
    let (chain, seen) = chain(Begin::known_only());
    seen.fail.store(true, SeqCst);
    chain.register(call("u")).await.unwrap_err();
    chain.unregister(call("")).await.unwrap();
    assert!(lock(&seen.unregistered).is_empty());
    seen.fail.store(false, SeqCst);
    chain.register(call("u")).await.unwrap();
    seen.fail.store(true, SeqCst);
    chain.register(call("v")).await.unwrap_err();
    chain.unregister(call("")).await.unwrap_err();
    assert_eq!(lock(&seen.unregistered)[0].url, "u");
}

/// A caller that leaves does not cut an element between its effect and its undo.
#[tokio::test(start_paused = true)]
async fn a_caller_that_leaves_cancels_nothing() {
    let (chain, seen) = chain(Begin::new());
    *lock(&seen.delay) = Duration::from_secs(1);
    let left = tokio::time::timeout(Duration::from_millis(50), chain.register(call("u"))).await;
    assert!(left.is_err());
    assert_eq!(seen.inside.load(SeqCst), 1);
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(seen.inside.load(SeqCst), 0);
    chain.unregister(call("")).await.unwrap();
    assert_eq!(lock(&seen.unregistered)[0].url, "u");
}

/// Tries for as long as it is let, like a chain whose registry is away.
struct Stuck(Arc<AtomicBool>);

#[async_trait::async_trait]
impl Element<NetworkServiceEndpoint> for Stuck {
    fn name(&self) -> &'static str {
        "stuck"
    }

    async fn register(
        &self,
        call: Call<NetworkServiceEndpoint>,
        next: Next<NetworkServiceEndpoint>,
    ) -> Result<NetworkServiceEndpoint, Error> {
        if self.0.load(SeqCst) {
            call.ctx.ended().await;
            return Err(Error::new("stuck", call.message.name(), "nobody there"));
        }
        next.register(call).await
    }
}

// Conformance 17
#[tokio::test(start_paused = true)]
async fn an_unregister_does_not_wait_for_registrations_that_cannot_succeed() {
    let (seen, stuck) = (Arc::<Seen>::default(), Arc::new(AtomicBool::new(false)));
    let elements: Vec<Arc<dyn Element<_>>> =
        vec![Arc::new(Begin::new()), Arc::new(Stuck(stuck.clone())), Arc::new(Spy(seen.clone()))];
    let chain = crate::Chain::new(elements);
    chain.register(call("u")).await.unwrap();
    let factory = seen.factory();
    stuck.store(true, SeqCst);
    // The registry is away: heal holds the line, then come refresh and the application, none with a deadline.
    let mut before = Vec::new();
    for _ in 0..2 {
        let factory = factory.clone();
        before.push(tokio::spawn(async move { factory.register().await }));
        tokio::task::yield_now().await;
    }
    let again = tokio::spawn({
        let chain = chain.clone();
        async move { chain.register(call("v")).await.map(drop) }
    });
    tokio::task::yield_now().await;
    let start = tokio::time::Instant::now();
    chain.unregister(call("")).await.unwrap();
    assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
    assert_eq!(lock(&seen.unregistered)[0].url, "u");
    for register in before.into_iter().chain([again]) {
        register.await.unwrap().unwrap_err();
    }
    // What comes later is not meant.
    stuck.store(false, SeqCst);
    chain.register(call("w")).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn nobody_waits_in_the_line_longer_than_its_call() {
    let (chain, seen) = chain(Begin::new());
    *lock(&seen.delay) = Duration::from_secs(60);
    let first = tokio::spawn({
        let chain = chain.clone();
        async move { chain.register(call("u")).await }
    });
    tokio::task::yield_now().await;
    let start = tokio::time::Instant::now();
    let ctx = Context::new().with_timeout(Duration::from_secs(2));
    let error = chain.register(Call::new(call("v").message, ctx)).await.unwrap_err();
    assert_eq!((error.code(), start.elapsed()), (tonic::Code::DeadlineExceeded, Duration::from_secs(2)));
    let error = chain.unregister(call("")).await.unwrap_err();
    assert_eq!((error.code(), start.elapsed()), (tonic::Code::DeadlineExceeded, Duration::from_secs(17)), "{error}");
    first.await.unwrap().unwrap();
}

/// Whoever breaks an element learns which object it was.
#[tokio::test]
async fn an_operation_that_breaks_off_names_its_object() {
    struct Broken;
    #[async_trait::async_trait]
    impl Element<NetworkServiceEndpoint> for Broken {
        fn name(&self) -> &'static str {
            "broken"
        }
        async fn register(
            &self,
            _: Call<NetworkServiceEndpoint>,
            _: Next<NetworkServiceEndpoint>,
        ) -> Result<NetworkServiceEndpoint, Error> {
            panic!("told to")
        }
    }
    let chain = crate::Chain::new(vec![Arc::new(Begin::new()) as Arc<dyn Element<_>>, Arc::new(Broken)]);
    let error = chain.register(call("u")).await.unwrap_err();
    assert_eq!(error.code(), tonic::Code::Internal);
    assert!(error.to_string().starts_with("begin (e): the operation broke off: "), "{error}");
}
