//! The registry of the node, as the elements of routing see it.

use futures_util::{StreamExt, stream::BoxStream};
use nsm_chain::{Error, registry::Registry};
use nsm_proto::registry::{NetworkService, NetworkServiceEndpoint};
use nsm_registry::{
    Call, Chain, Context, Query,
    matching::{self, Labels},
};
use std::time::Duration;
use tokio::time::Instant;

const NAME: &str = "registry";
/// What one look-up may take, unless the call it is for ends before.
const TIMEOUT: Duration = Duration::from_secs(5);
/// Pause between look-ups for an endpoint that is expected back.
const AGAIN: Duration = Duration::from_millis(50);

/// Reads a registry: services and endpoints.
#[derive(Clone)]
pub struct Finder {
    services: Chain<NetworkService>,
    endpoints: Chain<NetworkServiceEndpoint>,
    /// Until then endpoints that are not found are waited for.
    settled: Instant,
    patience: Duration,
}

impl Finder {
    /// Reads these chains.
    pub fn new(services: Chain<NetworkService>, endpoints: Chain<NetworkServiceEndpoint>) -> Self {
        Self { services, endpoints, settled: Instant::now(), patience: Duration::ZERO }
    }

    /// For `settling` from now a named endpoint that is not found is waited for, up to `patience` per look-up: after a
    /// restart of the manager its endpoints need a moment to register again, while clients already ask for them.
    #[must_use]
    pub fn settling(mut self, settling: Duration, patience: Duration) -> Self {
        self.settled = Instant::now() + settling;
        self.patience = patience;
        self
    }
}

fn within(deadline: Option<Instant>) -> Context {
    Context { deadline, ..Context::new() }.with_timeout(TIMEOUT)
}

/// Which connection it is asked for is not known here; what is asked for is. The registry's own words say it already.
fn failed(kind: &str, name: &str, cause: nsm_registry::Error) -> Error {
    if cause.is_remote() {
        return Error::remote(NAME, "", "the registry", cause.into());
    }
    let text = format!("the registry cannot be asked for {kind} {name}: {}", cause.message());
    Error::new(NAME, "", text).with_code(cause.code())
}

/// What an endpoint is looked for by.
fn wanted(query: &NetworkServiceEndpoint) -> String {
    if query.name.is_empty() { format!("of {}", query.network_service_names.join(", ")) } else { query.name.clone() }
}

#[async_trait::async_trait]
impl Registry for Finder {
    async fn find_ns(&self, query: NetworkService, deadline: Option<Instant>) -> Result<Vec<NetworkService>, Error> {
        let name = query.name.clone();
        let found = self.services.list(query, within(deadline)).await;
        found.map_err(|cause| failed("service", &name, cause))
    }

    async fn watch_ns(&self, name: &str) -> Result<BoxStream<'static, NetworkService>, Error> {
        let query = Query::watch(NetworkService { name: name.to_owned(), ..Default::default() });
        let events = self.services.find(Call::new(query, Context::new())).await;
        let events = events.map_err(|cause| failed("service", name, cause))?;
        let current = |event: Result<nsm_registry::Event<NetworkService>, _>| {
            std::future::ready(event.ok().map(|event| (!event.deleted).then_some(event.object)))
        };
        Ok(events.scan((), move |(), event| current(event)).filter_map(std::future::ready).boxed())
    }

    async fn find_nse(
        &self,
        query: NetworkServiceEndpoint,
        deadline: Option<Instant>,
    ) -> Result<Vec<NetworkServiceEndpoint>, Error> {
        let named = !query.name.is_empty();
        let patience = self.settled.min(Instant::now() + self.patience);
        let patience = deadline.map_or(patience, |deadline| patience.min(deadline));
        loop {
            let found = self.endpoints.list(query.clone(), within(deadline)).await;
            let found = found.map_err(|cause| failed("endpoint", &wanted(&query), cause))?;
            if !found.is_empty() || !named || Instant::now() >= patience {
                return Ok(found);
            }
            tokio::time::sleep(AGAIN).await;
        }
    }

    fn match_endpoints(
        &self,
        service: &NetworkService,
        labels: &Labels,
        endpoints: &[NetworkServiceEndpoint],
    ) -> Vec<NetworkServiceEndpoint> {
        matching::match_endpoints(service, labels, endpoints)
    }

    fn match_forwarders(
        &self,
        service: &NetworkService,
        labels: &Labels,
        forwarders: &[NetworkServiceEndpoint],
        forwarder_service: &str,
    ) -> Vec<NetworkServiceEndpoint> {
        matching::match_forwarders(service, labels, forwarders, forwarder_service)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nsm_registry::{
        Call,
        elements::memory::Memory,
        store::{MemoryStore, Store},
    };
    use std::sync::Arc;

    fn named(name: &str) -> NetworkServiceEndpoint {
        NetworkServiceEndpoint { name: name.into(), ..Default::default() }
    }

    struct Refuses;

    #[async_trait::async_trait]
    impl<T: nsm_registry::Object> nsm_registry::Element<T> for Refuses {
        fn name(&self) -> &'static str {
            "refuses"
        }

        async fn find(
            &self,
            _: Call<Query<T>>,
            _: nsm_registry::Next<T>,
        ) -> Result<nsm_registry::Events<T>, nsm_registry::Error> {
            Err(nsm_registry::Error::new("refuses", "", "told to").with_code(tonic::Code::Unavailable))
        }
    }

    #[tokio::test]
    async fn an_error_of_the_registry_says_what_was_asked_for() {
        let finder = Finder::new(Chain::new(vec![Arc::new(Refuses)]), Chain::new(vec![Arc::new(Refuses)]));
        let service = NetworkService { name: "svc".into(), ..Default::default() };
        let any = NetworkServiceEndpoint { network_service_names: vec!["svc".into()], ..Default::default() };
        for (error, what) in [
            (finder.find_ns(service, None).await.unwrap_err(), "for service svc: "),
            (finder.watch_ns("svc").await.err().unwrap(), "for service svc: "),
            (finder.find_nse(named("nse"), None).await.unwrap_err(), "for endpoint nse: "),
            (finder.find_nse(any, None).await.unwrap_err(), "for endpoint of svc: "),
        ] {
            assert_eq!(error.to_string(), format!("registry: the registry cannot be asked {what}told to"));
            assert_eq!(error.code(), tonic::Code::Unavailable);
        }
        // What comes from the registry's process stays as it is.
        let said = nsm_registry::Error::new("sqlite", "svc", "the disk is full").at("spiffe://example.org/registry");
        let text = said.to_string();
        let answered = nsm_registry::Error::remote("connect", "svc", &said.into());
        assert_eq!(failed("service", "svc", answered).at("manager").to_string(), text);
    }

    #[tokio::test(start_paused = true)]
    async fn after_a_restart_a_named_endpoint_is_waited_for() {
        let store: Arc<dyn Store> = Arc::new(MemoryStore::default());
        let memory = || Memory::new(store.clone());
        let finder = Finder::new(Chain::new(vec![Arc::new(memory())]), Chain::new(vec![Arc::new(memory())]))
            .settling(Duration::from_secs(10), Duration::from_secs(3));
        let (found, ()) = tokio::join!(finder.find_nse(named("a"), None), async {
            tokio::time::sleep(Duration::from_secs(1)).await;
            finder.endpoints.register(Call::new(named("a"), Context::new())).await.unwrap();
        });
        assert_eq!(found.unwrap().len(), 1);
        let before = Instant::now();
        assert!(finder.find_nse(named("b"), None).await.unwrap().is_empty());
        assert!(before.elapsed() >= Duration::from_secs(3));
        tokio::time::sleep(Duration::from_secs(10)).await;
        let before = Instant::now();
        assert!(finder.find_nse(named("b"), None).await.unwrap().is_empty());
        assert!(before.elapsed() < Duration::from_secs(1));
    }

    /// A registry that does not answer.
    struct Silent;

    #[async_trait::async_trait]
    impl<T: nsm_registry::Object> nsm_registry::Element<T> for Silent {
        fn name(&self) -> &'static str {
            "silent"
        }

        async fn find(
            &self,
            call: Call<Query<T>>,
            _: nsm_registry::Next<T>,
        ) -> Result<nsm_registry::Events<T>, nsm_registry::Error> {
            call.ctx.ended().await;
            Err(nsm_registry::Error::deadline("silent", "", "an answer"))
        }
    }

    #[tokio::test(start_paused = true)]
    async fn no_look_up_takes_longer_than_its_call() {
        let second = Duration::from_secs(1);
        let silent = Finder::new(Chain::new(vec![Arc::new(Silent)]), Chain::new(vec![Arc::new(Silent)]));
        let start = Instant::now();
        let (services, endpoints) = tokio::join!(
            silent.find_ns(NetworkService::default(), Some(start + second)),
            silent.find_nse(named("a"), Some(start + second))
        );
        assert_eq!(services.unwrap_err().code(), tonic::Code::DeadlineExceeded);
        assert_eq!(endpoints.unwrap_err().code(), tonic::Code::DeadlineExceeded);
        assert_eq!(start.elapsed(), second);
        // What is expected back is not waited for any longer either.
        let memory = Chain::new(vec![Arc::new(Memory::new(Arc::new(MemoryStore::default())))]);
        let finder = Finder::new(Chain::new(vec![]), memory).settling(Duration::from_secs(60), Duration::from_secs(30));
        let start = Instant::now();
        assert!(finder.find_nse(named("b"), Some(start + second)).await.unwrap().is_empty());
        assert!(start.elapsed() <= second + AGAIN, "{:?}", start.elapsed());
    }
}
