//! The next hop: another process by gRPC, or another chain in this process.

mod grpc;
pub mod inprocess;

pub use grpc::Grpc;
pub use inprocess::{Caller, Identity, InProcess, LocalService};

use crate::{
    Connection, ConnectionEvent, Error, FdTransceiver, Key, MonitorScopeSelector, NetworkServiceRequest, Peer, Side,
};
use futures_util::stream::BoxStream;
use std::{fmt, sync::Arc, time::Duration};
use tokio::time::Instant;
use tonic::Status;

/// Connection events as they come; ends or fails when the other side goes away.
pub type EventStream = BoxStream<'static, Result<ConnectionEvent, Status>>;

/// The network service and monitor of one next hop.
#[async_trait::async_trait]
pub trait RemoteService: Send + Sync + 'static {
    /// Establishes or refreshes. Without a deadline the implementation sets a bound of its own.
    async fn request(&self, request: NetworkServiceRequest, deadline: Option<Instant>) -> Result<Connection, Status>;
    /// Ends a connection.
    async fn close(&self, connection: Connection, deadline: Option<Instant>) -> Result<(), Status>;
    /// Opens a stream of events; returns once the other side has accepted it.
    async fn monitor(&self, selector: MonitorScopeSelector) -> Result<EventStream, Status>;
    /// Who answers, as TLS authenticated it.
    fn peer(&self) -> Option<Peer>;
    /// Descriptors of this transport connection, if it can carry them.
    fn fds(&self) -> Option<FdTransceiver>;
    /// `false` once the transport is known to be broken: `dial` connects anew.
    fn alive(&self) -> bool {
        true
    }
    /// `false` once the own identity was rotated since the transport was connected: it works still, but the next request goes
    /// over a new one.
    fn current(&self) -> bool {
        true
    }
    /// One side has refused the other: the identities of the handshake may be others by now, which only a new handshake shows. It is
    /// not current any more then. Returns whether it was shared: who has asked for a connection may have been given an old one.
    fn distrust(&self) -> bool {
        false
    }
}

/// What the other side may take to accept a monitor stream.
const MONITOR_TIMEOUT: Duration = Duration::from_secs(15);

/// Shared handle of a [`RemoteService`]; the transport closes with the last one.
#[derive(Clone)]
pub struct Remote {
    url: Arc<str>,
    service: Arc<dyn RemoteService>,
}

impl fmt::Debug for Remote {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Remote({})", self.url)
    }
}

/// Where `dial` and `clientconn` leave the remote of a connection for `heal`, `monitor` and `connect`.
pub const REMOTE: Key<Remote> = Key::shared(Side::Client);

impl Remote {
    /// Names a service by the URL it was reached under.
    pub fn new(url: &str, service: impl RemoteService) -> Self {
        Self { url: url.into(), service: Arc::new(service) }
    }

    /// The URL it was reached under.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// See [`RemoteService::request`].
    pub async fn request(
        &self,
        request: NetworkServiceRequest,
        deadline: Option<Instant>,
    ) -> Result<Connection, Status> {
        self.service.request(request, deadline).await
    }

    /// See [`RemoteService::close`].
    pub async fn close(&self, connection: Connection, deadline: Option<Instant>) -> Result<(), Status> {
        self.service.close(connection, deadline).await
    }

    /// See [`RemoteService::monitor`].
    pub async fn monitor(&self, selector: MonitorScopeSelector) -> Result<EventStream, Status> {
        let opening = tokio::time::timeout(MONITOR_TIMEOUT, self.service.monitor(selector));
        opening.await.unwrap_or_else(|_| Err(Status::deadline_exceeded("the monitor does not answer")))
    }

    /// See [`RemoteService::peer`].
    pub fn peer(&self) -> Option<Peer> {
        self.service.peer()
    }

    /// See [`RemoteService::fds`].
    pub fn fds(&self) -> Option<FdTransceiver> {
        self.service.fds()
    }

    /// See [`RemoteService::alive`].
    pub fn alive(&self) -> bool {
        self.service.alive()
    }

    /// See [`RemoteService::current`].
    pub fn current(&self) -> bool {
        self.service.current()
    }

    /// See [`RemoteService::distrust`].
    pub fn distrust(&self) -> bool {
        self.service.distrust()
    }

    /// Whether both are the same transport connection.
    pub fn same(&self, other: &Remote) -> bool {
        Arc::ptr_eq(&self.service, &other.service)
    }
}

/// Reaches next hops by URL.
#[async_trait::async_trait]
pub trait Connector: Send + Sync + 'static {
    /// Connects, waiting until `deadline` at most.
    async fn connect(&self, url: &str, deadline: Instant) -> Result<Remote, Error>;
}

#[async_trait::async_trait]
impl<C: Connector + ?Sized> Connector for Arc<C> {
    async fn connect(&self, url: &str, deadline: Instant) -> Result<Remote, Error> {
        (**self).connect(url, deadline).await
    }
}

#[async_trait::async_trait]
impl<S: RemoteService + ?Sized> RemoteService for Arc<S> {
    async fn request(&self, request: NetworkServiceRequest, deadline: Option<Instant>) -> Result<Connection, Status> {
        (**self).request(request, deadline).await
    }

    async fn close(&self, connection: Connection, deadline: Option<Instant>) -> Result<(), Status> {
        (**self).close(connection, deadline).await
    }

    async fn monitor(&self, selector: MonitorScopeSelector) -> Result<EventStream, Status> {
        (**self).monitor(selector).await
    }

    fn peer(&self) -> Option<Peer> {
        (**self).peer()
    }

    fn fds(&self) -> Option<FdTransceiver> {
        (**self).fds()
    }

    fn alive(&self) -> bool {
        (**self).alive()
    }

    fn current(&self) -> bool {
        (**self).current()
    }

    fn distrust(&self) -> bool {
        (**self).distrust()
    }
}
