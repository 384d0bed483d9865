//! What the tests of elements share.

mod remote;

pub(crate) use remote::{Hop, HopConnector};

use crate::registry::{NetworkService, NetworkServiceEndpoint, Registry};
use crate::{Call, Chain, CloseCall, Connection, Context, Element, Error, NetworkServiceRequest, Next, RequestCall};
use futures_util::{StreamExt, stream::BoxStream};
use std::{
    sync::{
        Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};
use tokio::{sync::mpsc, time::Instant};

/// A request for the connection `id`.
pub(crate) fn request_id(id: &str, ctx: Context) -> RequestCall {
    let connection = Connection { id: id.into(), ..Default::default() };
    Call::new(NetworkServiceRequest { connection: Some(connection), ..Default::default() }, ctx)
}

/// A request with this connection.
pub(crate) fn request_with(connection: Connection) -> RequestCall {
    Call::new(NetworkServiceRequest { connection: Some(connection), ..Default::default() }, Context::new())
}

/// Closes the connection `id`.
pub(crate) async fn close(chain: &Chain, id: &str) -> Result<(), Error> {
    chain.close(Call::new(Connection { id: id.into(), ..Default::default() }, Context::new())).await
}

/// A generator whose tokens are the name of their owner and live for an hour.
pub(crate) fn tokens(name: &'static str) -> crate::token::Tokens {
    let hour = std::time::Duration::from_secs(3600);
    std::sync::Arc::new(move |_: Option<&crate::Peer>| {
        Ok(crate::token::Token { jwt: name.to_owned(), expires: crate::clock::now() + hour })
    })
}

/// Counts what passes, and fails or takes its time on demand.
#[derive(Default)]
pub(crate) struct Spy {
    requests: Mutex<Vec<NetworkServiceRequest>>,
    closes: Mutex<Vec<Connection>>,
    fail: AtomicBool,
    fail_close: Mutex<Option<tonic::Code>>,
    delay: Mutex<Duration>,
}

impl Spy {
    pub(crate) fn requests(&self) -> usize {
        self.requests.lock().unwrap().len()
    }

    pub(crate) fn closes(&self) -> usize {
        self.closes.lock().unwrap().len()
    }

    pub(crate) fn last_request(&self) -> NetworkServiceRequest {
        self.requests.lock().unwrap().last().cloned().unwrap()
    }

    pub(crate) fn last_close(&self) -> Connection {
        self.closes.lock().unwrap().last().cloned().unwrap()
    }

    pub(crate) fn fail_requests(&self, fail: bool) {
        self.fail.store(fail, Ordering::SeqCst);
    }

    pub(crate) fn fail_closes(&self, code: Option<tonic::Code>) {
        *self.fail_close.lock().unwrap() = code;
    }

    pub(crate) fn set_delay(&self, delay: Duration) {
        *self.delay.lock().unwrap() = delay;
    }
}

#[async_trait::async_trait]
impl Element for Spy {
    fn name(&self) -> &'static str {
        "spy"
    }

    async fn request(&self, call: RequestCall, next: Next) -> Result<Connection, Error> {
        self.requests.lock().unwrap().push((*call.message).clone());
        let delay = *self.delay.lock().unwrap();
        tokio::time::sleep(delay).await;
        if self.fail.load(Ordering::SeqCst) {
            return Err(Error::new("spy", call.id(), "told to fail"));
        }
        next.request(call).await
    }

    async fn close(&self, call: CloseCall, next: Next) -> Result<(), Error> {
        self.closes.lock().unwrap().push((*call.message).clone());
        if let Some(code) = *self.fail_close.lock().unwrap() {
            return Err(Error::new("spy", call.id(), "told to fail").with_code(code));
        }
        next.close(call).await
    }
}

/// A registry of two lists, who watches the first, and how long look-ups were to take.
#[derive(Default)]
pub(crate) struct MemoryRegistry(
    Mutex<(Vec<NetworkService>, Vec<NetworkServiceEndpoint>)>,
    Mutex<Vec<mpsc::UnboundedSender<NetworkService>>>,
    Mutex<Vec<Option<Instant>>>,
    AtomicBool,
);

impl MemoryRegistry {
    /// Adds a service, or replaces the one of that name.
    pub(crate) fn add_ns(&self, ns: NetworkService) {
        let mut lists = self.0.lock().unwrap();
        lists.0.retain(|other| other.name != ns.name);
        self.1.lock().unwrap().retain(|watcher| watcher.send(ns.clone()).is_ok());
        lists.0.push(ns);
    }

    /// How many watch.
    pub(crate) fn watchers(&self) -> usize {
        self.1.lock().unwrap().iter().filter(|watcher| !watcher.is_closed()).count()
    }

    /// Ends every watch, as a registry that dies does.
    pub(crate) fn cut(&self) {
        self.1.lock().unwrap().clear();
    }

    /// Look-ups fail from now on.
    pub(crate) fn fail(&self) {
        self.3.store(true, Ordering::SeqCst);
    }

    fn asked(&self, until: Option<Instant>) -> Result<(), Error> {
        self.2.lock().unwrap().push(until);
        match self.3.load(Ordering::SeqCst) {
            true => Err(Error::new("registry", "", "it cannot be asked")),
            false => Ok(()),
        }
    }

    /// The deadlines of the look-ups so far.
    pub(crate) fn deadlines(&self) -> Vec<Option<Instant>> {
        self.2.lock().unwrap().clone()
    }

    pub(crate) fn add_nse(&self, nse: NetworkServiceEndpoint) {
        self.0.lock().unwrap().1.push(nse);
    }

    pub(crate) fn remove_nse(&self, name: &str) {
        self.0.lock().unwrap().1.retain(|nse| nse.name != name);
    }
}

type Labels = std::collections::BTreeMap<String, String>;

#[async_trait::async_trait]
impl Registry for MemoryRegistry {
    async fn find_ns(&self, query: NetworkService, until: Option<Instant>) -> Result<Vec<NetworkService>, Error> {
        self.asked(until)?;
        // Generous on purpose: elements have to look for the exact name themselves.
        Ok(self.0.lock().unwrap().0.iter().filter(|ns| ns.name.contains(&query.name)).cloned().collect())
    }

    async fn watch_ns(&self, name: &str) -> Result<BoxStream<'static, NetworkService>, Error> {
        let (sender, mut receiver) = mpsc::unbounded_channel();
        let lists = self.0.lock().unwrap();
        for service in lists.0.iter().filter(|ns| ns.name.contains(name)) {
            let _ = sender.send(service.clone());
        }
        self.1.lock().unwrap().push(sender);
        Ok(futures_util::stream::poll_fn(move |ctx| receiver.poll_recv(ctx)).boxed())
    }

    async fn find_nse(
        &self,
        query: NetworkServiceEndpoint,
        until: Option<Instant>,
    ) -> Result<Vec<NetworkServiceEndpoint>, Error> {
        self.asked(until)?;
        let serves = |nse: &NetworkServiceEndpoint| {
            query.network_service_names.iter().all(|name| nse.network_service_names.contains(name))
        };
        let all = &self.0.lock().unwrap().1;
        Ok(all.iter().filter(|nse| nse.name.contains(&query.name) && serves(nse)).cloned().collect())
    }

    fn match_endpoints(
        &self,
        service: &NetworkService,
        labels: &Labels,
        endpoints: &[NetworkServiceEndpoint],
    ) -> Vec<NetworkServiceEndpoint> {
        nsm_registry::matching::match_endpoints(service, labels, endpoints)
    }

    fn match_forwarders(
        &self,
        service: &NetworkService,
        labels: &Labels,
        forwarders: &[NetworkServiceEndpoint],
        forwarder_service: &str,
    ) -> Vec<NetworkServiceEndpoint> {
        nsm_registry::matching::match_forwarders(service, labels, forwarders, forwarder_service)
    }
}

/// A network service without matches.
pub(crate) fn ns(name: &str) -> NetworkService {
    NetworkService { name: name.into(), ..Default::default() }
}

/// An endpoint of one service.
pub(crate) fn nse(name: &str, service: &str, url: &str) -> NetworkServiceEndpoint {
    let network_service_names = vec![service.to_owned()];
    NetworkServiceEndpoint { name: name.into(), network_service_names, url: url.into(), ..Default::default() }
}
