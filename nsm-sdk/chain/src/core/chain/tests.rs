use super::*;
use crate::{
    Context, ElementLayer, Operation,
    core::testing::{close, request_id},
};
use std::sync::Mutex;
use tower::{Layer, ServiceExt};

type Log = Arc<Mutex<Vec<String>>>;

/// Writes down when it is entered and left; adds its number to a context extension; may fail.
struct Trace {
    number: usize,
    log: Log,
    fail: bool,
}

impl Trace {
    fn new(number: usize, log: &Log) -> Self {
        Self { number, log: log.clone(), fail: false }
    }

    fn note(&self, what: &str) {
        self.log.lock().unwrap().push(format!("{what}{}", self.number));
    }
}

#[async_trait::async_trait]
impl Element for Trace {
    fn name(&self) -> &'static str {
        "trace"
    }

    async fn request(&self, mut call: RequestCall, next: Next) -> Result<Connection, Error> {
        self.note(">");
        if self.fail {
            self.note("!");
            return Err(Error::new("trace", call.id(), "told to fail"));
        }
        let trail = call.ctx.extension::<String>().map_or_else(|| "req".to_owned(), |trail| (*trail).clone());
        call.ctx.insert_extension(format!("{trail}+{}", self.number));
        let result = next.request(call).await;
        self.note("<");
        result
    }

    async fn close(&self, call: CloseCall, next: Next) -> Result<(), Error> {
        self.note("x");
        next.close(call).await
    }
}

/// Puts the context's trail into a label.
struct Trail;

#[async_trait::async_trait]
impl Element for Trail {
    fn name(&self) -> &'static str {
        "trail"
    }

    async fn request(&self, mut call: RequestCall, next: Next) -> Result<Connection, Error> {
        let trail = call.ctx.extension::<String>().map_or_else(String::new, |trail| (*trail).clone());
        call.connection_mut().labels.insert("trail".into(), trail);
        next.request(call).await
    }
}

fn log_of(log: &Log) -> String {
    std::mem::take(&mut *log.lock().unwrap()).join(" ")
}

// Conformance 1
#[tokio::test]
async fn empty_single_and_nested_chains_visit_each_element_once() {
    let log = Log::default();
    let empty = Chain::builder().build();
    assert_eq!(empty.request(request_id("c", Context::new())).await.unwrap().id, "c");
    close(&empty, "c").await.unwrap();

    let t = |n| Trace::new(n, &log);
    let inner = Chain::builder().element(t(2)).element(Chain::builder().build()).element(t(3)).build();
    let chain = Chain::builder()
        .element(t(1))
        .element(inner)
        .element(Chain::builder().element(t(4)).build())
        .element(t(5))
        .build();
    chain.request(request_id("c", Context::new())).await.unwrap();
    assert_eq!(log_of(&log), ">1 >2 >3 >4 >5 <5 <4 <3 <2 <1");
    close(&chain, "c").await.unwrap();
    assert_eq!(log_of(&log), "x1 x2 x3 x4 x5");
}

/// Chains inside chains, `depth` levels of one element each.
fn nested(level: usize, depth: usize, fail: Option<usize>, log: &Log) -> Chain {
    let mut builder = Chain::builder().element(Trace { number: level, log: log.clone(), fail: fail == Some(level) });
    if level < depth {
        builder = builder.element(nested(level + 1, depth, fail, log));
    }
    builder.build()
}

// Conformance 2, 3
#[tokio::test]
async fn context_accumulates_through_eleven_levels() {
    let log = Log::default();
    let chain = Chain::builder().element(nested(1, 11, None, &log)).element(Trail).build();
    let connection = chain.request(request_id("c", Context::new())).await.unwrap();
    assert_eq!(connection.labels["trail"], "req+1+2+3+4+5+6+7+8+9+10+11");
    assert!(log_of(&log).starts_with(">1 >2") && log.lock().unwrap().is_empty());
}

// Conformance 4
#[tokio::test]
async fn an_error_in_level_five_unwinds() {
    let log = Log::default();
    let chain = nested(1, 11, Some(5), &log);
    let error = chain.request(request_id("c", Context::new())).await.unwrap_err();
    assert_eq!(error.to_string(), "trace (connection c): told to fail");
    assert_eq!(log_of(&log), ">1 >2 >3 >4 >5 !5 <4 <3 <2 <1");
}

#[tokio::test]
async fn elements_are_layers_and_chains_are_services() {
    let log = Log::default();
    let chain = Chain::builder().element(Trace::new(2, &log)).build();
    let service = tower::timeout::Timeout::new(chain, std::time::Duration::from_secs(1));
    let service = service.map_err(|error: tower::BoxError| Error::new("timeout", "", error.to_string()));
    let service = ElementLayer::new(Trace::new(1, &log)).layer(tower::util::BoxCloneSyncService::new(service));
    let outcome = service.oneshot(Operation::Request(request_id("c", Context::new()))).await.unwrap();
    assert!(matches!(outcome, Outcome::Connection(connection) if connection.id == "c"));
    assert_eq!(log_of(&log), ">1 >2 <2 <1");
}

/// A limit stands around a chain, above `begin`: each hop has its own, so that a path over several of them never waits
/// for itself.
#[tokio::test(start_paused = true)]
async fn a_limit_of_one_around_each_of_two_hops_does_not_deadlock() {
    struct Busy(Arc<std::sync::atomic::AtomicU32>);
    #[async_trait::async_trait]
    impl Element for Busy {
        fn name(&self) -> &'static str {
            "busy"
        }
        async fn request(&self, call: RequestCall, next: Next) -> Result<Connection, Error> {
            assert_eq!(self.0.fetch_add(1, std::sync::atomic::Ordering::SeqCst), 0, "the limit is one");
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
            let result = next.request(call).await;
            self.0.fetch_sub(1, std::sync::atomic::Ordering::SeqCst);
            result
        }
    }
    let hop = || {
        let begin = crate::elements::begin::Begin::new(crate::Side::Server);
        Chain::builder().element(begin).element(Busy(Arc::default()))
    };
    let far = Next::service(tower::limit::ConcurrencyLimit::new(hop().build(), 1));
    /// Calls the next hop as a caller from outside would.
    struct Call(Next);
    #[async_trait::async_trait]
    impl Element for Call {
        fn name(&self) -> &'static str {
            "call"
        }
        async fn request(&self, call: RequestCall, _: Next) -> Result<Connection, Error> {
            self.0.request(RequestCall::new(call.message, Context::new())).await
        }
    }
    let near = tower::limit::ConcurrencyLimit::new(hop().element(Call(far)).build(), 1);
    let requests = (0..20).map(|n| {
        let near = near.clone();
        tokio::spawn(near.oneshot(Operation::Request(request_id(&n.to_string(), Context::new()))))
    });
    let all = futures_util::future::join_all(requests);
    let all = tokio::time::timeout(std::time::Duration::from_secs(60), all).await.unwrap();
    assert!(all.into_iter().all(|answer| answer.unwrap().is_ok()));
}
