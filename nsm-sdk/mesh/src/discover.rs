//! Finds the endpoint of a connection, for a forwarder.

use crate::find::Finder;
use meridio_proto::nsm::registry::NetworkServiceEndpoint;
use nsm_chain::{Candidates, CloseCall, Connection, Element, Error, Next, RequestCall};
use nsm_registry::matching::match_endpoints;
use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

const NAME: &str = "discover";

/// Puts the URL of the named endpoint into the context, or the candidates for the service. Fails at once if there is none.
pub struct Discover {
    finder: Finder,
}

impl Discover {
    /// Asks `finder`.
    pub fn new(finder: Finder) -> Self {
        Self { finder }
    }

    async fn candidates(&self, call: &RequestCall) -> Result<Candidates, Error> {
        let (id, deadline, connection) = (call.id(), call.ctx.deadline, call.connection());
        let name = &connection.network_service;
        let service = self.finder.service(NAME, id, name, &connection.payload, deadline).await?;
        let template = NetworkServiceEndpoint { network_service_names: vec![name.clone()], ..Default::default() };
        let all = self.finder.endpoints(NAME, id, template, deadline).await?;
        let endpoints = match_endpoints(&service, &connection.labels, &all);
        if endpoints.is_empty() {
            return Err(Error::new(
                NAME,
                id,
                format!("network service endpoint candidates not found: {} of {name} exist, none matches", all.len()),
            ));
        }
        Ok(Candidates { network_service: service, endpoints })
    }
}

#[async_trait::async_trait]
impl Element for Discover {
    fn name(&self) -> &'static str {
        NAME
    }

    async fn request(&self, mut call: RequestCall, next: Next) -> Result<Connection, Error> {
        if call.ctx.client_url.is_some() {
            return next.request(call).await;
        }
        let wanted = call.connection().network_service_endpoint_name.clone();
        if wanted.is_empty() {
            let candidates = self.candidates(&call).await?;
            call.connection_mut().payload.clone_from(&candidates.network_service.payload);
            call.ctx.candidates = Some(Arc::new(candidates));
        } else {
            let endpoint = self.finder.endpoint(NAME, call.id(), &wanted, call.ctx.deadline).await?;
            call.ctx.client_url = Some(endpoint.url);
        }
        next.request(call).await
    }

    async fn close(&self, mut call: CloseCall, next: Next) -> Result<(), Error> {
        let name = call.message.network_service_endpoint_name.clone();
        if call.ctx.client_url.is_none() && !name.is_empty() {
            let template = NetworkServiceEndpoint { name: name.clone(), ..Default::default() };
            match self.finder.endpoints(NAME, call.id(), template, call.ctx.deadline).await {
                Ok(found) => {
                    call.ctx.client_url = found.into_iter().find(|found| found.name == name).map(|found| found.url);
                }
                Err(error) => tracing::info!(%error, "closing without the endpoint's URL"),
            }
        }
        next.close(call).await
    }
}

/// Tries the candidates one after the other, each time starting with the next one.
#[derive(Default)]
pub struct RoundRobin {
    counters: Mutex<HashMap<String, usize>>,
}

impl RoundRobin {
    fn turn(&self, service: &str) -> usize {
        let mut counters = self.counters.lock().unwrap_or_else(PoisonError::into_inner);
        let counter = counters.entry(service.to_owned()).or_default();
        let turn = *counter;
        *counter = counter.wrapping_add(1);
        turn
    }
}

#[async_trait::async_trait]
impl Element for RoundRobin {
    fn name(&self) -> &'static str {
        "roundrobin"
    }

    async fn request(&self, call: RequestCall, next: Next) -> Result<Connection, Error> {
        let candidates = match (&call.ctx.client_url, call.ctx.candidates.clone()) {
            (None, Some(candidates)) if !candidates.endpoints.is_empty() => candidates,
            _ => return next.request(call).await,
        };
        let mut causes = Vec::new();
        for _ in 0..candidates.endpoints.len() {
            let turn = self.turn(&candidates.network_service.name) % candidates.endpoints.len();
            let Some(candidate) = candidates.endpoints.get(turn) else { continue };
            let mut attempt = call.clone();
            attempt.connection_mut().network_service_endpoint_name.clone_from(&candidate.name);
            attempt.ctx.client_url = Some(candidate.url.clone());
            match next.request(attempt).await {
                Ok(connection) => return Ok(connection),
                Err(error) => causes.push(format!("{}: {error}", candidate.name)),
            }
        }
        Err(Error::new("roundrobin", call.id(), format!("all candidates have failed: {}", causes.join("; "))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use meridio_proto::nsm::registry::{Destination, Match, NetworkService, NetworkServiceLabels};
    use nsm_chain::{Chain, Context, NetworkServiceRequest};
    use nsm_registry::{
        Call,
        elements::memory::Memory,
        store::{MemoryStore, Store},
    };
    use std::time::Duration;

    fn finder() -> Finder {
        let store: Arc<dyn Store> = Arc::new(MemoryStore::default());
        let memory = || Memory::new(store.clone());
        Finder::new(nsm_registry::Chain::new(vec![Arc::new(memory())]), nsm_registry::Chain::new(vec![Arc::new(memory())]))
    }

    /// Answers with the URL it was sent to; some URLs are busy.
    struct Answer(&'static str);

    #[async_trait::async_trait]
    impl Element for Answer {
        fn name(&self) -> &'static str {
            "answer"
        }
        async fn request(&self, mut call: RequestCall, _: Next) -> Result<Connection, Error> {
            let url = call.ctx.client_url.clone().unwrap_or_default();
            if url == self.0 {
                return Err(Error::new("answer", "c", "busy"));
            }
            call.connection_mut().labels.insert("url".into(), url);
            Ok(call.connection().into_owned())
        }
    }

    async fn fill(finder: &Finder, endpoints: &[&str], matches: Vec<Match>) {
        let service = NetworkService { name: "s".into(), payload: "IP".into(), matches, ..Default::default() };
        finder.services.register(Call::new(service, Default::default())).await.unwrap();
        for name in endpoints {
            let labels = NetworkServiceLabels { labels: [("name".to_owned(), name.to_string())].into() };
            let endpoint = NetworkServiceEndpoint {
                name: name.to_string(),
                url: format!("tcp://{name}"),
                network_service_names: vec!["s".into()],
                network_service_labels: [("s".to_owned(), labels)].into(),
                ..Default::default()
            };
            finder.endpoints.register(Call::new(endpoint, Default::default())).await.unwrap();
        }
    }

    async fn ask(chain: &Chain, service: &str, endpoint: &str) -> Result<Connection, Error> {
        let connection = Connection {
            id: "c".into(),
            network_service: service.into(),
            network_service_endpoint_name: endpoint.into(),
            ..Default::default()
        };
        let request = NetworkServiceRequest { connection: Some(connection), ..Default::default() };
        chain.request(RequestCall::new(request, Context::new())).await
    }

    fn chain(finder: &Finder, busy: &'static str) -> Chain {
        Chain::builder()
            .element(Discover::new(finder.clone()))
            .element(RoundRobin::default())
            .element(Answer(busy))
            .build()
    }

    // Conformance 58, 62, 76
    #[tokio::test]
    async fn candidates_take_turns_and_busy_ones_are_passed_over() {
        let finder = finder();
        fill(&finder, &["a", "b", "c"], vec![]).await;
        let robin = chain(&finder, "");
        let mut urls = Vec::new();
        for _ in 0..4 {
            let connection = ask(&robin, "s", "").await.unwrap();
            assert_eq!(connection.payload, "IP");
            urls.push(connection.labels["url"].clone());
        }
        assert_eq!(urls, ["tcp://a", "tcp://b", "tcp://c", "tcp://a"]);
        assert_eq!(ask(&chain(&finder, "tcp://a"), "s", "").await.unwrap().network_service_endpoint_name, "b");
        // An explicit endpoint is honoured, and failing does not choose another.
        assert_eq!(ask(&robin, "s", "c").await.unwrap().labels["url"], "tcp://c");
        assert!(ask(&chain(&finder, "tcp://c"), "s", "c").await.is_err());
    }

    // Conformance 57
    #[tokio::test]
    async fn nothing_found_is_an_error_at_once() {
        let finder = finder();
        let nowhere = Destination { destination_selector: [("x".to_owned(), "y".to_owned())].into(), ..Default::default() };
        fill(&finder, &["a"], vec![Match { routes: vec![nowhere], ..Default::default() }]).await;
        for (service, endpoint, text) in [
            ("t", "", "network service t is not found"),
            ("s", "", "candidates not found"),
            ("s", "b", "network service endpoint b not found"),
        ] {
            let error = ask(&chain(&finder, ""), service, endpoint).await.unwrap_err();
            assert!(error.to_string().contains(text), "{error}");
        }
    }

    // Conformance 59
    #[tokio::test]
    async fn a_close_goes_on_without_its_endpoint() {
        let connection =
            Connection { id: "c".into(), network_service_endpoint_name: "gone".into(), ..Default::default() };
        chain(&finder(), "").close(CloseCall::new(connection, Context::new())).await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn after_a_restart_a_named_endpoint_is_waited_for() {
        let finder = finder().settling(Duration::from_secs(10), Duration::from_secs(3));
        let chain = chain(&finder, "");
        let (asked, ()) = tokio::join!(ask(&chain, "s", "a"), async {
            tokio::time::sleep(Duration::from_secs(1)).await;
            fill(&finder, &["a"], vec![]).await;
        });
        assert_eq!(asked.unwrap().labels["url"], "tcp://a");
        tokio::time::sleep(Duration::from_secs(10)).await;
        let before = tokio::time::Instant::now();
        ask(&chain, "s", "b").await.unwrap_err();
        assert!(before.elapsed() < Duration::from_secs(1));
    }
}
