use super::*;
use crate::{
    elements::{begin::Begin, memory::Memory},
    store::MemoryStore,
};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

type Endpoint = NetworkServiceEndpoint;

fn endpoint(name: &str) -> Endpoint {
    Endpoint { name: name.into(), url: "unix:///e".into(), ..Default::default() }
}

fn call(name: &str) -> Call<Endpoint> {
    Call::new(endpoint(name), Context::new())
}

/// The rest of a server's chain; registrations fail on demand.
#[derive(Default)]
struct Rest(AtomicBool);

#[async_trait::async_trait]
impl Element<Endpoint> for Rest {
    fn name(&self) -> &'static str {
        "rest"
    }

    async fn register(&self, call: Call<Endpoint>, next: Next<Endpoint>) -> Result<Endpoint, Error> {
        match self.0.load(SeqCst) {
            true => Err(Error::new("rest", &call.message.name, "told to fail")),
            false => next.register(call).await,
        }
    }
}

fn chains() -> (Chain<Endpoint>, Chain<Endpoint>, Arc<Rest>) {
    let memory = || Arc::new(Memory::new(Arc::new(MemoryStore::default()))) as Arc<dyn Element<Endpoint>>;
    let outer = Chain::new(vec![Arc::new(Begin::new()) as Arc<dyn Element<_>>, memory()]);
    let rest = Arc::new(Rest::default());
    let elements: Vec<Arc<dyn Element<_>>> =
        vec![Arc::new(Begin::new()), Arc::new(Through::new(outer.clone())), rest.clone()];
    (Chain::new(elements), outer, rest)
}

// Conformance 119
#[tokio::test]
async fn what_is_registered_here_is_registered_there_until_it_is_unregistered() {
    let (chain, outer, _) = chains();
    for n in 0..5 {
        chain.register(call(&n.to_string())).await.unwrap();
    }

    let all = || Endpoint::default();
    assert_eq!(outer.list(all(), Context::new()).await.unwrap().len(), 5);
    assert_eq!(chain.list(all(), Context::new()).await.unwrap().len(), 5, "a plain find goes through");

    // A watch that was opened here hears of what happens there, and ends with its reader.
    let mut watch = chain.find(Call::new(Query::watch(all()), Context::new())).await.unwrap();
    for _ in 0..5 {
        assert!(!watch.next().await.unwrap().unwrap().deleted);
    }
    for n in 0..5 {
        chain.unregister(call(&n.to_string())).await.unwrap();
        let event = watch.next().await.unwrap().unwrap();
        assert!(event.deleted && event.object.name == n.to_string());
    }
    assert!(outer.list(all(), Context::new()).await.unwrap().is_empty());
}

// Conformance 119
#[tokio::test]
async fn a_failure_behind_it_undoes_the_registration() {
    let (chain, outer, rest) = chains();
    rest.0.store(true, SeqCst);
    chain.register(call("e")).await.unwrap_err();
    assert!(outer.list(Endpoint::default(), Context::new()).await.unwrap().is_empty());
}

// Conformance 119
#[tokio::test]
async fn without_a_connection_it_is_an_error_that_says_so() {
    let chain = Chain::new(vec![Arc::new(Connect) as Arc<dyn Element<Endpoint>>]);
    let error = chain.register(call("e")).await.unwrap_err();
    assert_eq!(error.to_string(), "connect (e): no grpc.ClientConnInterface provided");
    assert!(chain.unregister(call("e")).await.is_err());
    assert!(chain.find(Call::new(Query::list(endpoint("e")), Context::new())).await.is_err());
}
