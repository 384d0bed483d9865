use super::*;
use futures_util::StreamExt;
use nsm_proto::registry::NetworkService;
use std::sync::Mutex;

type Log = Arc<Mutex<Vec<String>>>;

/// Writes down what passes, and adds a found object of its own to each find.
struct Trace(&'static str, Log);

impl Trace {
    fn note(&self, what: &str) {
        self.1.lock().unwrap().push(format!("{what}{}", self.0));
    }
}

#[async_trait::async_trait]
impl Element<NetworkService> for Trace {
    fn name(&self) -> &'static str {
        self.0
    }

    async fn register(&self, call: Call<NetworkService>, next: Next<NetworkService>) -> Result<NetworkService, Error> {
        self.note(">");
        let answer = next.register(call).await;
        self.note("<");
        answer
    }

    async fn find(
        &self,
        call: Call<Query<NetworkService>>,
        next: Next<NetworkService>,
    ) -> Result<Events<NetworkService>, Error> {
        self.note("?");
        let own = NetworkService { name: self.0.into(), ..Default::default() };
        let own = futures_util::stream::once(std::future::ready(Ok(Event::present(own))));
        Ok(Box::pin(own.chain(next.find(call).await?)))
    }

    async fn unregister(&self, call: Call<NetworkService>, next: Next<NetworkService>) -> Result<(), Error> {
        self.note("x");
        next.unregister(call).await
    }
}

fn chain(log: &Log) -> Chain<NetworkService> {
    let trace = |name| Arc::new(Trace(name, log.clone())) as Arc<dyn Element<_>>;
    Chain::new(vec![trace("a"), trace("b"), trace("c")])
}

fn call() -> Call<NetworkService> {
    Call::new(NetworkService { name: "s".into(), ..Default::default() }, Context::new())
}

fn taken(log: &Log) -> String {
    std::mem::take(&mut *log.lock().unwrap()).join(" ")
}

// Conformance 6
#[tokio::test]
async fn each_element_once_and_in_order() {
    let log = Log::default();
    let chain = chain(&log);
    assert_eq!(chain.register(call()).await.unwrap().name, "s");
    assert_eq!(taken(&log), ">a >b >c <c <b <a");
    chain.unregister(call()).await.unwrap();
    assert_eq!(taken(&log), "xa xb xc");
    let found = chain.list(NetworkService::default(), Context::new()).await.unwrap();
    assert_eq!(taken(&log), "?a ?b ?c");
    let names: Vec<_> = found.iter().map(|service| service.name.as_str()).collect();
    assert_eq!(names, ["a", "b", "c"], "what each element finds streams through those above it");

    let empty = Chain::<NetworkService>::new(vec![]);
    assert_eq!(empty.register(call()).await.unwrap(), call().message);
    empty.unregister(call()).await.unwrap();
    assert!(empty.list(NetworkService::default(), Context::new()).await.unwrap().is_empty());
}

// Conformance 6
#[tokio::test(flavor = "multi_thread")]
async fn parallel_calls_do_not_disturb_each_other() {
    let log = Log::default();
    let chain = chain(&log);
    let calls = (0..100).map(|n| {
        let chain = chain.clone();
        tokio::spawn(async move {
            let object = NetworkService { name: n.to_string(), ..Default::default() };
            let answer = chain.register(Call::new(object.clone(), Context::new())).await.unwrap();
            assert_eq!(answer, object);
            assert_eq!(chain.list(object, Context::new()).await.unwrap().len(), 3);
        })
    });
    for call in calls.collect::<Vec<_>>() {
        call.await.unwrap();
    }
    assert_eq!(log.lock().unwrap().len(), 100 * (6 + 3));
}
