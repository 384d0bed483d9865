use super::*;
use crate::{
    Chain,
    core::testing::{MemoryRegistry, Spy, ns, nse, request_with},
    elements::roundrobin::RoundRobin,
};
use std::time::Duration;

fn request(service: &str, endpoint: &str) -> RequestCall {
    request_with(Connection {
        id: "c".into(),
        network_service: service.into(),
        network_service_endpoint_name: endpoint.into(),
        ..Default::default()
    })
}

fn chain(registry: &Arc<MemoryRegistry>) -> (Chain, Arc<Spy>) {
    let spy = Arc::new(Spy::default());
    let discover = Discover::new(registry.clone());
    (Chain::builder().element(discover).element(RoundRobin::default()).element(spy.clone()).build(), spy)
}

async fn chosen(chain: &Chain, service: &str, endpoint: &str) -> Result<String, Error> {
    Ok(chain.request(request(service, endpoint)).await?.network_service_endpoint_name)
}

// Conformance 57
#[tokio::test]
async fn nothing_found_is_an_error_at_once() {
    let registry = Arc::new(MemoryRegistry::default());
    let (chain, _) = chain(&registry);
    let text = |error: Error| error.message().to_owned();
    assert_eq!(text(chosen(&chain, "svc", "").await.unwrap_err()), "network service svc is not found");
    registry.add_ns(ns("svc"));
    let error = chosen(&chain, "svc", "").await.unwrap_err();
    assert!(error.message().starts_with("network service endpoint candidates not found"));
    let mut old = nse("nse-old", "svc", "unix:///old");
    old.expiration_time = Some(clock::to_timestamp(clock::now() - Duration::from_secs(1)));
    registry.add_nse(old);
    assert!(chosen(&chain, "svc", "").await.is_err());
    assert_eq!(text(chosen(&chain, "svc", "nse-1").await.unwrap_err()), "network service endpoint nse-1 not found");
}

// Conformance 58
#[tokio::test]
async fn names_are_exact() {
    let registry = Arc::new(MemoryRegistry::default());
    for name in ["svc-long", "svc"] {
        registry.add_ns(ns(name));
        registry.add_nse(nse(&format!("nse-{name}"), name, "unix:///x"));
    }
    let (chain, _) = chain(&registry);
    assert_eq!(chosen(&chain, "svc", "").await.unwrap(), "nse-svc");
    assert_eq!(chosen(&chain, "svc", "nse-svc").await.unwrap(), "nse-svc");
    assert!(chosen(&chain, "svc", "nse").await.is_err());
}

// Conformance 59
#[tokio::test]
async fn close_goes_on_without_the_endpoint() {
    let registry = Arc::new(MemoryRegistry::default());
    let (chain, spy) = chain(&registry);
    let connection = request("svc", "gone").message.connection.unwrap();
    chain.close(CloseCall::new(connection, Context::new())).await.unwrap();
    assert_eq!(spy.closes(), 1);
}

// Conformance 62
#[tokio::test]
async fn round_and_round_for_each_service() {
    let registry = Arc::new(MemoryRegistry::default());
    for service in ["a", "b"] {
        registry.add_ns(ns(service));
        for n in 1..=3 {
            registry.add_nse(nse(&format!("{service}{n}"), service, "unix:///x"));
        }
    }
    let (chain, spy) = chain(&registry);
    let mut names = Vec::new();
    for service in ["a", "a", "b", "a", "a"] {
        names.push(chosen(&chain, service, "").await.unwrap());
    }
    assert_eq!(names, ["a1", "a2", "b1", "a3", "a1"]);
    registry.remove_nse("a3");
    let mut names = Vec::new();
    for _ in 0..3 {
        names.push(chosen(&chain, "a", "").await.unwrap());
    }
    names.sort();
    names.dedup();
    assert_eq!(names, ["a1", "a2"]);
    // Every candidate is tried, each with a clean request.
    spy.fail_requests(true);
    let before = spy.requests();
    let error = chosen(&chain, "b", "").await.unwrap_err();
    assert_eq!(spy.requests() - before, 3);
    assert!(error.to_string().contains("told to fail"), "one cause, as it is: {error}");
}

#[tokio::test(start_paused = true)]
async fn look_ups_end_when_the_call_does_and_their_failures_name_the_connection() {
    let registry = Arc::<MemoryRegistry>::default();
    registry.add_ns(ns("a"));
    registry.add_nse(nse("a1", "a", "unix:///a1"));
    let (chain, _) = chain(&registry);
    let ctx = crate::Context::new().with_timeout(Duration::from_secs(1));
    let deadline = ctx.deadline;
    for endpoint in ["", "a1"] {
        chain.request(RequestCall::new(request("a", endpoint).message, ctx.clone())).await.unwrap();
    }
    let closing = Connection { network_service_endpoint_name: "a1".into(), ..Default::default() };
    chain.close(CloseCall::new(closing, ctx)).await.unwrap();
    assert_eq!(registry.deadlines(), [deadline; 4]);
    registry.fail();
    for endpoint in ["", "a1"] {
        let error = chosen(&chain, "a", endpoint).await.unwrap_err();
        assert_eq!(error.to_string(), "registry (connection c): it cannot be asked");
    }
}
