//! The client chain.

use super::observe::Observe;
use crate::{
    Chain, CloseCall, Connection, Connector, Context, Element, Error, EventOptions, Fired, MonitorScopeSelector,
    NetworkServiceRequest, PathSegment, RequestCall, Side,
    elements::{
        authorize::{AuthorizeClient, Policies},
        begin::{Begin, Reselect},
        clientconn::ClientConn,
        clienturl::ClientUrl,
        connect::Connect,
        dial::Dial,
        heal::{ConnectionStatus, Heal, LivenessCheck, StatusSender},
        kernel_mechanism::own_netns_again,
        metadata::MetadataElement,
        refresh::Refresh,
        retry::Retry,
        trimpath::TrimPath,
        updatepath::UpdatePath,
    },
    path,
    remote::{EventStream, Remote},
};
use futures_util::StreamExt;
use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tokio::{sync::watch, time::Instant};
use tonic::Code;

/// Asks for connections and keeps them.
///
/// ```no_run
/// use nsm_chain::{Client, Connection, NetworkServiceRequest, remote::Grpc};
/// use std::{sync::Arc, time::Duration};
/// # async fn example(transport: nsm_transport::Transport) -> Result<(), nsm_chain::Error> {
/// let client = Client::builder("nsc-1", Arc::new(Grpc::new(transport)))
///     .url("unix:///var/lib/networkservicemesh/nsm.io.sock")
///     .build();
/// let connection = Connection { id: "nsc-1-0".into(), network_service: "svc".into(), ..Default::default() };
/// let request = NetworkServiceRequest { connection: Some(connection), ..Default::default() };
/// let connection = client.request(request, Duration::from_secs(15)).await?;
/// client.close(connection, Duration::from_secs(15)).await
/// # }
/// ```
#[derive(Clone)]
pub struct Client {
    chain: Chain,
    begin: Arc<Begin>,
    connector: Arc<dyn Connector>,
    url: Option<String>,
    status: Arc<Mutex<HashMap<String, watch::Sender<ConnectionStatus>>>>,
}

/// How long to wait for the first message of a monitor stream.
const MONITOR_TIMEOUT: Duration = Duration::from_secs(5);

impl Client {
    /// Starts a client whose path segment is called `name` (an empty one is made up).
    pub fn builder(name: impl Into<String>, connector: Arc<dyn Connector>) -> ClientBuilder {
        let name = Some(name.into()).filter(|name| !name.is_empty());
        ClientBuilder {
            name: name.unwrap_or_else(|| format!("client-{}", path::new_id())),
            connector,
            url: None,
            remote: None,
            dial_timeout: Duration::ZERO,
            refresh: true,
            heal: Some(None),
            together: false,
            policies: Policies::client(),
            reselect: None,
            retry: None,
            elements: Vec::new(),
        }
    }

    /// The chain, for use inside another one.
    pub fn chain(&self) -> &Chain {
        &self.chain
    }

    /// Establishes or changes a connection. Its id should be stable over restarts of this process. From then on it
    /// is refreshed and healed until [`Client::close`]; `timeout` is what every later replay is given, too.
    pub async fn request(&self, request: NetworkServiceRequest, timeout: Duration) -> Result<Connection, Error> {
        let id = request.connection.as_ref().map_or(String::new(), |connection| connection.id.clone());
        let mut ctx = Context::new().with_timeout(timeout);
        ctx.insert_extension(StatusSender(self.sender(&id)));
        let result = self.chain.request(RequestCall::new(request, ctx)).await;
        if result.is_err() && self.begin.factory(&id).is_none() {
            self.statuses().retain(|known, sender| *known != id || sender.receiver_count() > 0);
        }
        result
    }

    /// Ends a connection. One that this client does not know is closed at the next hop as it is given.
    pub async fn close(&self, connection: Connection, timeout: Duration) -> Result<(), Error> {
        let id = connection.id.clone();
        let mut ctx = Context::new().with_timeout(timeout);
        let result = match self.begin.factory(&id) {
            Some(_) => {
                ctx.insert_extension(StatusSender(self.sender(&id)));
                self.chain.close(CloseCall::new(connection, ctx)).await
            }
            None if connection.path.is_some() && self.url.is_some() => self.close_unknown(connection, &ctx).await,
            None => Ok(()),
        };
        if let Some(sender) = self.statuses().remove(&id) {
            StatusSender(sender).set(ConnectionStatus::Closed);
        }
        result
    }

    async fn close_unknown(&self, connection: Connection, ctx: &Context) -> Result<(), Error> {
        let deadline = ctx.deadline_or(MONITOR_TIMEOUT);
        let (id, remote) = (connection.id.clone(), self.connect(deadline).await?);
        let close = tokio::time::timeout_at(deadline, remote.close(connection, Some(deadline)));
        match close.await {
            Ok(result) => result.map_err(|status| Error::remote("client", id, remote.url(), status)),
            Err(_) => Err(Error::deadline("client", id, remote.url())),
        }
    }

    fn statuses(&self) -> std::sync::MutexGuard<'_, HashMap<String, watch::Sender<ConnectionStatus>>> {
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn sender(&self, id: &str) -> watch::Sender<ConnectionStatus> {
        self.statuses().entry(id.to_owned()).or_default().clone()
    }

    /// The connection `id` as it is, and each change: context, lost, healed, closed.
    pub fn watch(&self, id: &str) -> watch::Receiver<ConnectionStatus> {
        self.sender(id).subscribe()
    }

    /// What was last returned for `id`; `None` unless established.
    pub fn connection(&self, id: &str) -> Option<Connection> {
        self.begin.factory(id)?.connection()
    }

    /// Looks for another endpoint for `id`. `Ok(None)` if there is no such connection.
    pub async fn reselect(&self, id: &str) -> Result<Option<Connection>, Error> {
        let Some(factory) = self.begin.factory(id) else { return Ok(None) };
        match factory.request(EventOptions::reselect()).await? {
            Fired::Connection(connection) => Ok(Some(*connection)),
            Fired::Closed | Fired::Skipped => Ok(None),
        }
    }

    async fn connect(&self, deadline: Instant) -> Result<Remote, Error> {
        let url = self.url.as_deref().ok_or_else(|| Error::new("client", "", "it has no URL to connect to"))?;
        self.connector.connect(url, deadline).await
    }

    /// Events of the next hop. End the stream when done: the other side keeps it open for ever.
    pub async fn monitor(&self, selector: MonitorScopeSelector) -> Result<EventStream, Error> {
        let deadline = Instant::now() + MONITOR_TIMEOUT;
        let remote = self.connect(deadline).await?;
        let monitor = tokio::time::timeout_at(deadline, remote.monitor(selector));
        let events = monitor.await.map_err(|_| Error::deadline("client", "", remote.url()))?;
        let events = events.map_err(|status| Error::remote("client", "", remote.url(), status))?;
        // The transport lives as long as the stream.
        Ok(events.map(move |event| (&remote, event).1).boxed())
    }

    /// The connection that an earlier run of this process had under `id`, ready to be requested again: path index,
    /// id and, for this network namespace, the mechanism's namespace are as the client side needs them. If its state
    /// is DOWN and the data path is dead, apply [`crate::elements::begin::reselect_any`] to the request.
    pub async fn find(&self, id: &str) -> Result<Option<Connection>, Error> {
        let segment = PathSegment { id: id.to_owned(), ..Default::default() };
        let selector = MonitorScopeSelector { path_segments: vec![segment], ..Default::default() };
        let mut events = match self.monitor(selector).await {
            // Who shows clients nothing but their own connections has none of ours.
            Err(error) if error.code() == Code::PermissionDenied => return Ok(None),
            events => events?,
        };
        let first = tokio::time::timeout(MONITOR_TIMEOUT, events.next()).await;
        let event = match first.map_err(|_| Error::deadline("client", id, "the monitor's initial state"))? {
            Some(event) => event.map_err(|status| Error::remote("client", id, "the monitor", status))?,
            None => return Err(Error::new("client", id, "the monitor ended at once").with_code(Code::Unavailable)),
        };
        Ok(event.connections.into_values().find_map(|connection| recover(connection, id)))
    }
}

/// The next hop's view of our connection as our own view.
fn recover(mut connection: Connection, id: &str) -> Option<Connection> {
    let path = connection.path.as_mut().filter(|path| path.index == 1)?;
    path.path_segments.first().filter(|own| own.id == id)?;
    path.index = 0;
    connection.id = id.to_owned();
    own_netns_again(&mut connection);
    Some(connection)
}

/// Collects what a client is made of.
pub struct ClientBuilder {
    name: String,
    connector: Arc<dyn Connector>,
    url: Option<String>,
    remote: Option<Remote>,
    dial_timeout: Duration,
    refresh: bool,
    heal: Option<Option<LivenessCheck>>,
    together: bool,
    policies: Policies,
    reselect: Option<Arc<Reselect>>,
    retry: Option<Retry>,
    elements: Vec<Arc<dyn Element>>,
}

impl ClientBuilder {
    /// The next hop. Without it the chain it stands in has to set one per call.
    #[must_use]
    pub fn url(mut self, url: impl Into<String>) -> Self {
        self.url = Some(url.into());
        self
    }

    /// A next hop that is reached already.
    #[must_use]
    pub fn remote(mut self, remote: Remote) -> Self {
        self.remote = Some(remote);
        self
    }

    /// Bounds each attempt to connect; zero leaves it to the call's deadline.
    #[must_use]
    pub fn dial_timeout(mut self, timeout: Duration) -> Self {
        self.dial_timeout = timeout;
        self
    }

    /// For processes that pass connections on: only the first client of a path refreshes and heals.
    #[must_use]
    pub fn passthrough(mut self) -> Self {
        self.refresh = false;
        self.heal = None;
        self
    }

    /// Asks the data path before a connection is given up.
    #[must_use]
    pub fn liveness(mut self, check: LivenessCheck) -> Self {
        self.heal = Some(Some(check));
        self
    }

    /// Refreshes all connections when the other side wishes that one be refreshed: where they depend on each other.
    #[must_use]
    pub fn refresh_together(mut self) -> Self {
        self.together = true;
        self
    }

    /// Replaces the stock policies for answers. Without any, whoever answers is believed.
    #[must_use]
    pub fn policies(mut self, policies: Policies) -> Self {
        self.policies = policies;
        self
    }

    /// What heal does to a request that has to find another endpoint.
    #[must_use]
    pub fn reselect(mut self, reselect: impl Fn(&mut NetworkServiceRequest) + Send + Sync + 'static) -> Self {
        self.reselect = Some(Arc::new(reselect));
        self
    }

    /// Repeats failing requests until the caller's deadline.
    #[must_use]
    pub fn retry(mut self, retry: Retry) -> Self {
        self.retry = Some(retry);
        self
    }

    /// Adds an element below the others.
    #[must_use]
    pub fn element(self, element: impl Element) -> Self {
        self.shared(Arc::new(element))
    }

    /// Adds an element that others hold too.
    #[must_use]
    pub fn shared(mut self, element: Arc<dyn Element>) -> Self {
        self.elements.push(element);
        self
    }

    /// The client.
    pub fn build(self) -> Client {
        let mut begin = Begin::new(Side::Client);
        if let Some(reselect) = self.reselect {
            begin = begin.with_reselect(reselect);
        }
        let begin = Arc::new(begin);
        let chain = Chain::builder()
            // Each try goes through everything below.
            .maybe(self.retry)
            .element(UpdatePath::new(self.name))
            .element(begin.clone())
            .element(MetadataElement::new())
            // Above refresh and heal: what they bring about is seen by the application.
            .element(Observe)
            .maybe(self.refresh.then(Refresh::new))
            .element(ClientUrl::new(self.url.clone()))
            .element(ClientConn::new(self.remote))
            // Above dial: a watch needs the remote that dial has left.
            .maybe(self.heal.map(|check| match self.together {
                true => Heal::new(check).together(&begin),
                false => Heal::new(check),
            }))
            .element(Dial::new(self.connector.clone(), self.dial_timeout))
            .extend(self.elements)
            // Below the application's elements: what they change in an answer was checked before.
            .element(AuthorizeClient::new(self.policies))
            .element(TrimPath::new(Side::Client))
            .element(Connect)
            .build();
        Client { chain, begin, connector: self.connector, url: self.url, status: Arc::default() }
    }
}
