//! Another process as the next hop, by gRPC.

use super::{EventStream, RemoteService};
use crate::{
    Connection, Connector, Error, FdChannel, FdTransceiver, MonitorScopeSelector, NetworkServiceRequest, Peer, Remote,
    events,
};
use nsm_proto::networkservice::network_service_client::NetworkServiceClient;
use nsm_transport::{Address, Link, OptionalToken, Transport, with_deadline_code};
use std::{
    collections::HashMap,
    io,
    os::fd::OwnedFd,
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{AtomicBool, Ordering},
    },
};
use tokio::time::Instant;
use tonic::{Code, Request, Status, service::interceptor::InterceptedService, transport::Channel};

type Service = InterceptedService<Channel, OptionalToken>;

/// Connects to `unix://` and `tcp://` URLs. Each call carries a fresh token for the peer of its connection.
///
/// A transport connection is shared by the NSM connections to one URL as long as it works, over TCP always, over a unix socket if
/// [`Grpc::sharing`] says so.
pub struct Grpc {
    transport: Transport,
    sockets: bool,
    pool: Mutex<HashMap<String, Vec<Weak<GrpcRemote>>>>,
}

/// NSM connections on one transport connection. Each has up to two calls under way, a monitor stream and a request, and HTTP/2 servers
/// accept no fewer than 200 at a time unless told otherwise.
const SHARED_BY: usize = 64;

impl Grpc {
    /// A connector over this transport. A unix socket is connected to anew each time: the descriptors that were passed belong to one
    /// NSM connection and are released with it.
    pub fn new(transport: Transport) -> Self {
        Self { transport, sockets: false, pool: Mutex::default() }
    }

    /// Unix sockets are shared, too: for a process that passes no descriptors but those of its own network namespace. The receiver
    /// keeps them until the transport connection ends, so that another's would outlive their connection.
    #[must_use]
    pub fn sharing(mut self) -> Self {
        self.sockets = true;
        self
    }

    fn pooled(&self, url: &str) -> Option<Arc<GrpcRemote>> {
        let pool = self.pool.lock().unwrap_or_else(PoisonError::into_inner);
        let free = |remote: &Arc<GrpcRemote>| Arc::strong_count(remote) <= SHARED_BY;
        let usable = |remote: &Arc<GrpcRemote>| free(remote) && remote.alive() && remote.current();
        let found = pool.get(url)?.iter().filter_map(Weak::upgrade).find(usable)?;
        found.shared.store(true, Ordering::Relaxed);
        Some(found)
    }

    fn keep(&self, url: &str, remote: &Arc<GrpcRemote>) {
        let mut pool = self.pool.lock().unwrap_or_else(PoisonError::into_inner);
        pool.retain(|_, remotes| {
            remotes.retain(|remote| remote.strong_count() > 0);
            !remotes.is_empty()
        });
        pool.entry(url.to_owned()).or_default().push(Arc::downgrade(remote));
    }
}

#[async_trait::async_trait]
impl Connector for Grpc {
    async fn connect(&self, url: &str, deadline: Instant) -> Result<Remote, Error> {
        if let Some(remote) = self.pooled(url) {
            return Ok(Remote::new(url, remote));
        }
        let failed = |text: String, code| Error::new("connector", "", text).with_code(code);
        let address = Address::parse(url).map_err(|error| failed(error.to_string(), Code::InvalidArgument))?;
        let time = deadline.saturating_duration_since(Instant::now());
        let link =
            self.transport.dial(&address, time).await.map_err(|error| failed(error.to_string(), Code::Unavailable))?;
        let remote = Arc::new(GrpcRemote::new(link));
        if self.sockets || !address.is_unix() {
            self.keep(url, &remote);
        }
        Ok(Remote::new(url, remote))
    }
}

struct GrpcRemote {
    service: NetworkServiceClient<Service>,
    peer: Option<Peer>,
    fds: Option<FdTransceiver>,
    socket: Option<nsm_transport::FdTransceiver>,
    link: Link,
    broken: AtomicBool,
    shared: AtomicBool,
    distrusted: AtomicBool,
}

impl GrpcRemote {
    fn new(link: Link) -> Self {
        Self {
            service: NetworkServiceClient::new(link.with_token()),
            peer: link.peer.clone(),
            socket: link.fds.clone(),
            fds: link.fds.clone().map(FdTransceiver::new),
            link,
            broken: AtomicBool::new(false),
            shared: AtomicBool::new(false),
            distrusted: AtomicBool::new(false),
        }
    }

    /// Takes note of a broken transport: an error that did not come from the other side, or silence.
    fn judge<T>(&self, result: Result<T, Status>) -> Result<T, Status> {
        let result = with_deadline_code(result);
        if let Err(status) = &result {
            let local = std::error::Error::source(status).is_some();
            if local || matches!(status.code(), Code::DeadlineExceeded) {
                self.broken.store(true, Ordering::Relaxed);
            }
        }
        result
    }
}

fn timed<M>(message: M, deadline: Option<Instant>) -> Request<M> {
    let mut request = Request::new(message);
    if let Some(deadline) = deadline {
        request.set_timeout(deadline.saturating_duration_since(Instant::now()));
    }
    request
}

#[async_trait::async_trait]
impl RemoteService for GrpcRemote {
    async fn request(&self, request: NetworkServiceRequest, deadline: Option<Instant>) -> Result<Connection, Status> {
        self.judge(self.service.clone().request(timed(request, deadline)).await.map(tonic::Response::into_inner))
    }

    async fn close(&self, connection: Connection, deadline: Option<Instant>) -> Result<(), Status> {
        self.judge(self.service.clone().close(timed(connection, deadline)).await.map(drop))
    }

    async fn monitor(&self, selector: MonitorScopeSelector) -> Result<EventStream, Status> {
        self.judge(events::open(self.link.with_token(), &selector).await)
    }

    fn peer(&self) -> Option<Peer> {
        self.peer.clone()
    }

    fn fds(&self) -> Option<FdTransceiver> {
        self.fds.clone()
    }

    fn alive(&self) -> bool {
        // A socket knows that it is closed before any call has failed.
        let closed = self.socket.as_ref().is_some_and(nsm_transport::FdTransceiver::is_closed);
        !closed && !self.broken.load(Ordering::Relaxed)
    }

    fn current(&self) -> bool {
        self.link.is_current() && !self.distrusted.load(Ordering::Relaxed)
    }

    fn distrust(&self) -> bool {
        self.distrusted.store(true, Ordering::Relaxed);
        self.shared.load(Ordering::Relaxed)
    }
}

#[async_trait::async_trait]
impl FdChannel for nsm_transport::FdTransceiver {
    fn queue(&self, fd: OwnedFd) -> io::Result<(u64, u64)> {
        nsm_transport::FdTransceiver::queue(self, fd)
    }

    async fn take(&self, dev: u64, ino: u64, deadline: Option<Instant>) -> io::Result<OwnedFd> {
        nsm_transport::FdTransceiver::take(self, dev, ino, deadline).await
    }
}

#[cfg(test)]
mod tests;
