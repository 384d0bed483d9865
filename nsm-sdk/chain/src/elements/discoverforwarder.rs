//! Finds a forwarder for a request.

use crate::{
    CloseCall, Connection, Element, Error, Key, Next, RequestCall, Side, State, path,
    registry::{NetworkServiceEndpoint, Registry, endpoint, service},
};
use std::{sync::Arc, time::Duration};
use tokio::time::Instant;
use tonic::Code;

/// Tries the forwarders that the service allows, and stays with the one that served a connection until it is to be
/// reselected. After a restart of this process the path says which one that was: it is tried first, and while others are still
/// coming back (see [`DiscoverForwarder::settling`]) it is the only one that is tried.
pub struct DiscoverForwarder {
    registry: Arc<dyn Registry>,
    service: String,
    url: String,
    /// The forwarder of a connection.
    sticky: Key<String>,
    settled: Instant,
}

const NAME: &str = "discoverforwarder";

impl DiscoverForwarder {
    /// Looks for endpoints of `service` ("forwarder") whose URL contains `url` (that of the manager, as registered).
    pub fn new(registry: Arc<dyn Registry>, service: impl Into<String>, url: impl Into<String>) -> Self {
        Self {
            registry,
            service: service.into(),
            url: url.into(),
            sticky: Key::new(Side::Server),
            settled: Instant::now(),
        }
    }

    /// For so long from now a connection that has a forwarder on its path gets no other one as long as that one is registered:
    /// what fails after a restart of the manager may fail only because an endpoint or the forwarder is not back yet.
    #[must_use]
    pub fn settling(mut self, settling: Duration) -> Self {
        self.settled = Instant::now() + settling;
        self
    }

    async fn candidates(
        &self,
        connection: &Connection,
        sticky: Option<&str>,
        deadline: Option<Instant>,
    ) -> Result<Vec<NetworkServiceEndpoint>, Error> {
        let missing = |text: String| Error::new(NAME, &connection.id, text).with_code(Code::NotFound);
        let name = &connection.network_service;
        let network_service = service(&*self.registry, name, "", deadline)
            .await?
            .ok_or_else(|| missing(format!("network service {name} is not found")))?;
        let query = NetworkServiceEndpoint {
            name: sticky.unwrap_or_default().to_owned(),
            network_service_names: vec![self.service.clone()],
            url: self.url.clone(),
            ..Default::default()
        };
        let found = self.registry.find_nse(query, deadline).await?;
        let mut found = self.registry.match_forwarders(&network_service, &connection.labels, &found, &self.service);
        found.retain(|forwarder| sticky.is_none_or(|name| forwarder.name == name));
        match (found.is_empty(), sticky) {
            (false, _) => Ok(found),
            (true, Some(name)) => Err(missing(format!("forwarder {name} is not available"))),
            (true, None) => Err(missing("no candidates found".to_owned())),
        }
    }

    /// Candidates for a connection that this process does not know, or does not know any more: the path may name its forwarder.
    async fn first_or_again(
        &self,
        connection: &Connection,
        reselect: bool,
        deadline: Option<Instant>,
    ) -> Result<Vec<NetworkServiceEndpoint>, Error> {
        let before = path::segment(connection, 1).map(|before| before.name.as_str());
        let Some(before) = before.filter(|name| !name.is_empty() && !reselect) else {
            return self.candidates(connection, None, deadline).await;
        };
        if Instant::now() < self.settled
            && let Ok(found) = self.candidates(connection, Some(before), deadline).await
        {
            return Ok(found);
        }
        let mut candidates = self.candidates(connection, None, deadline).await?;
        candidates.sort_by_key(|forwarder| forwarder.name != before);
        Ok(candidates)
    }
}

#[async_trait::async_trait]
impl Element for DiscoverForwarder {
    fn name(&self) -> &'static str {
        NAME
    }

    async fn request(&self, call: RequestCall, next: Next) -> Result<Connection, Error> {
        let metadata = call.ctx.metadata(NAME, call.id())?.clone();
        let connection = call.connection().into_owned();
        let reselect = connection.state() == State::ReselectRequested;
        if reselect {
            metadata.remove(&self.sticky);
        }
        let deadline = call.ctx.deadline;
        let candidates = match metadata.get(&self.sticky) {
            Some(name) => self.candidates(&connection, Some(&name), deadline).await,
            None => self.first_or_again(&connection, reselect, deadline).await,
        };
        let candidates = candidates.map_err(|error| error.about(&connection.id))?;
        let mut errors = Vec::new();
        for forwarder in candidates {
            let mut attempt = call.clone();
            attempt.ctx.client_url = Some(forwarder.url);
            match next.request(attempt).await {
                Ok(connection) => {
                    metadata.insert(&self.sticky, forwarder.name);
                    return Ok(connection);
                }
                Err(error) => errors.push(error),
            }
        }
        Err(Error::many(NAME, call.id(), "all forwarders have failed", errors))
    }

    async fn close(&self, mut call: CloseCall, next: Next) -> Result<(), Error> {
        let sticky = call.ctx.metadata(NAME, call.id())?.remove(&self.sticky);
        let name = sticky.or_else(|| path::segment(&call.message, 1).map(|forwarder| forwarder.name.clone()));
        if let Some(name) = name.filter(|name| !name.is_empty()) {
            match endpoint(&*self.registry, &name, &self.url, call.ctx.deadline).await {
                Ok(Some(forwarder)) => call.ctx.client_url = Some(forwarder.url),
                Ok(None) => tracing::info!(id = call.id(), name, "closing: the forwarder is not registered"),
                Err(error) => tracing::info!(%error, name, "closing: cannot look up the forwarder"),
            }
        }
        next.close(call).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Chain, Context, Path, PathSegment,
        core::testing::{MemoryRegistry, Spy, ns, nse, request_with},
        elements::metadata::MetadataElement,
    };
    use std::sync::Mutex;

    /// Remembers the URLs it was called with.
    #[derive(Default)]
    struct Urls(Mutex<Vec<String>>);

    #[async_trait::async_trait]
    impl Element for Urls {
        fn name(&self) -> &'static str {
            "urls"
        }

        async fn request(&self, call: RequestCall, next: Next) -> Result<Connection, Error> {
            self.0.lock().unwrap().push(call.ctx.client_url.clone().unwrap_or_default());
            next.request(call).await
        }

        async fn close(&self, call: CloseCall, next: Next) -> Result<(), Error> {
            self.0.lock().unwrap().push(format!("x{}", call.ctx.client_url.clone().unwrap_or_default()));
            next.close(call).await
        }
    }

    fn setup() -> (Chain, Arc<Urls>, Arc<Spy>, Arc<MemoryRegistry>) {
        let (registry, urls, spy) = (Arc::<MemoryRegistry>::default(), Arc::<Urls>::default(), Arc::<Spy>::default());
        registry.add_ns(ns("svc"));
        for n in 1..=3 {
            registry.add_nse(nse(&format!("fwd-{n}"), "forwarder", &format!("unix:///fwd-{n}")));
        }
        let chain = Chain::builder()
            .element(MetadataElement::new())
            .element(DiscoverForwarder::new(registry.clone(), "forwarder", ""))
            .element(urls.clone())
            .element(spy.clone())
            .build();
        (chain, urls, spy, registry)
    }

    fn connection(state: State, forwarder: &str) -> Connection {
        let names = ["nsc", "mgr", forwarder];
        let path_segments = names.map(|name| PathSegment { name: name.into(), ..Default::default() }).to_vec();
        let path = Some(Path { index: 1, path_segments });
        Connection { id: "c".into(), network_service: "svc".into(), state: state.into(), path, ..Default::default() }
    }

    // Conformance 51, 68
    #[tokio::test]
    async fn the_forwarder_on_the_path_is_kept() {
        let (chain, urls, _, registry) = setup();
        let request = |state| chain.request(request_with(connection(state, "fwd-2")));
        request(State::Up).await.unwrap();
        request(State::Up).await.unwrap();
        assert_eq!(*urls.0.lock().unwrap(), ["unix:///fwd-2"; 2]);
        // Gone: no other one is taken behind the client's back.
        registry.remove_nse("fwd-2");
        let error = request(State::Up).await.unwrap_err();
        assert_eq!(error.message(), "forwarder fwd-2 is not available");
        request(State::ReselectRequested).await.unwrap();
        assert_eq!(urls.0.lock().unwrap()[2], "unix:///fwd-1");
    }

    // Conformance 51, 68
    #[tokio::test(start_paused = true)]
    async fn after_a_restart_no_other_forwarder_is_taken_while_things_come_back() {
        let (registry, urls, spy) = (Arc::<MemoryRegistry>::default(), Arc::<Urls>::default(), Arc::<Spy>::default());
        registry.add_ns(ns("svc"));
        for n in 1..=3 {
            registry.add_nse(nse(&format!("fwd-{n}"), "forwarder", &format!("unix:///fwd-{n}")));
        }
        let element = DiscoverForwarder::new(registry.clone(), "forwarder", "").settling(Duration::from_secs(20));
        let chain = Chain::builder()
            .element(MetadataElement::new())
            .element(element)
            .element(urls.clone())
            .element(spy.clone())
            .build();
        let request = |forwarder| chain.request(request_with(connection(State::Up, forwarder)));
        let tried = || std::mem::take(&mut *urls.0.lock().unwrap());
        spy.fail_requests(true);
        request("fwd-2").await.unwrap_err();
        assert_eq!(tried(), ["unix:///fwd-2"], "its endpoint is not there yet");
        request("fwd-9").await.unwrap_err();
        assert_eq!(tried().len(), 3, "this one is gone for good");
        tokio::time::advance(Duration::from_secs(20)).await;
        request("fwd-2").await.unwrap_err();
        assert_eq!(tried(), ["unix:///fwd-2", "unix:///fwd-1", "unix:///fwd-3"]);
    }

    #[tokio::test(start_paused = true)]
    async fn look_ups_end_when_the_call_does() {
        let (chain, _, _, registry) = setup();
        let ctx = Context::new().with_timeout(Duration::from_secs(1));
        let deadline = ctx.deadline;
        chain.request(RequestCall::new(request_with(connection(State::Up, "")).message, ctx.clone())).await.unwrap();
        chain.close(CloseCall::new(connection(State::Up, ""), ctx)).await.unwrap();
        assert_eq!(registry.deadlines(), [deadline; 3]);
        registry.fail();
        let error = chain.request(request_with(connection(State::Up, ""))).await.unwrap_err();
        assert_eq!(error.to_string(), "registry (connection c): it cannot be asked");
    }

    // Conformance 66
    #[tokio::test]
    async fn close_uses_the_same_forwarder_and_forgets_it() {
        let (chain, urls, spy, _) = setup();
        chain.request(request_with(connection(State::Up, "fwd-3"))).await.unwrap();
        chain.close(CloseCall::new(connection(State::Up, ""), Context::new())).await.unwrap();
        chain.request(request_with(connection(State::Up, "fwd-1"))).await.unwrap();
        assert_eq!(*urls.0.lock().unwrap(), ["unix:///fwd-3", "xunix:///fwd-3", "unix:///fwd-1"]);
        spy.fail_requests(true);
        let error = chain.request(request_with(connection(State::ReselectRequested, ""))).await.unwrap_err();
        assert!(error.to_string().contains("told to fail"), "one cause, as it is: {error}");
        assert_eq!(spy.requests(), 5);
    }
}
