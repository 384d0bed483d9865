//! A next hop under the test's control.

use crate::{
    Connection, Connector, Error, FdTransceiver, MonitorScopeSelector, NetworkServiceRequest, Peer, Remote,
    RemoteService, elements::monitor::Hub, remote::EventStream,
};
use futures_util::StreamExt;
use std::sync::{
    Arc, Mutex,
    atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
};
use tokio::time::Instant;
use tonic::{Code, Status};

/// Counts what reaches the hop, announces it in a hub, and fails on demand.
#[derive(Default)]
pub(crate) struct Hop {
    pub(crate) hub: Mutex<Hub>,
    pub(crate) down: AtomicBool,
    /// Requests fail, the transport does not.
    pub(crate) refuse: AtomicBool,
    pub(crate) no_monitor: AtomicBool,
    /// The next request kills it: it is down from then on.
    pub(crate) dies: AtomicBool,
    /// What each answer takes.
    pub(crate) delay: Mutex<std::time::Duration>,
    /// What it does to each answer.
    pub(crate) answer: Mutex<Option<fn(&mut Connection)>>,
    /// What is answered next is forgotten before anybody can listen.
    pub(crate) forget: AtomicBool,
    pub(crate) dialled: Mutex<Vec<String>>,
    pub(crate) requests: Mutex<Vec<(String, NetworkServiceRequest)>>,
    pub(crate) closes: Mutex<Vec<(String, Connection)>>,
    /// Goes up when transports break.
    pub(crate) epoch: AtomicUsize,
}

impl Hop {
    pub(crate) fn requests(&self) -> usize {
        self.requests.lock().unwrap().len()
    }

    pub(crate) fn closes(&self) -> usize {
        self.closes.lock().unwrap().len()
    }

    pub(crate) fn dialled(&self) -> usize {
        self.dialled.lock().unwrap().len()
    }

    /// Breaks all transports and forgets all connections: a restart.
    pub(crate) fn restart(&self) {
        self.epoch.fetch_add(1, SeqCst);
        let hub = std::mem::take(&mut *self.hub.lock().unwrap());
        hub.end();
    }

    fn hub(&self) -> Hub {
        self.hub.lock().unwrap().clone()
    }
}

pub(crate) struct HopConnector(pub(crate) Arc<Hop>);

#[async_trait::async_trait]
impl Connector for HopConnector {
    async fn connect(&self, url: &str, _: Instant) -> Result<Remote, Error> {
        self.0.dialled.lock().unwrap().push(url.to_owned());
        if self.0.down.load(SeqCst) {
            return Err(Error::new("hop", "", "connection refused").with_code(Code::Unavailable));
        }
        let epoch = self.0.epoch.load(SeqCst);
        Ok(Remote::new(url, HopRemote { hop: self.0.clone(), url: url.to_owned(), epoch }))
    }
}

struct HopRemote {
    hop: Arc<Hop>,
    url: String,
    epoch: usize,
}

impl HopRemote {
    fn check(&self) -> Result<(), Status> {
        if self.hop.down.load(SeqCst) || self.hop.epoch.load(SeqCst) != self.epoch {
            return Err(Status::unavailable("broken pipe"));
        }
        Ok(())
    }

    async fn take_time(&self) {
        let delay = *self.hop.delay.lock().unwrap();
        if !delay.is_zero() {
            tokio::time::sleep(delay).await;
        }
    }
}

#[async_trait::async_trait]
impl RemoteService for HopRemote {
    async fn request(&self, request: NetworkServiceRequest, _: Option<Instant>) -> Result<Connection, Status> {
        self.check()?;
        self.hop.requests.lock().unwrap().push((self.url.clone(), request.clone()));
        self.take_time().await;
        if self.hop.dies.swap(false, SeqCst) {
            self.hop.down.store(true, SeqCst);
            self.hop.restart();
        }
        self.check()?;
        if self.hop.refuse.load(SeqCst) {
            return Err(Status::unknown("refused"));
        }
        let mut connection = request.connection.unwrap_or_default();
        let id = connection.path.as_ref().and_then(|path| path.path_segments.last()).map(|own| own.id.clone());
        connection.set_state(crate::State::Up);
        let mut theirs = connection.clone();
        theirs.id = id.unwrap_or_default();
        self.hop.hub().update(theirs.clone());
        if self.hop.forget.swap(false, SeqCst) {
            self.hop.hub().delete(&theirs);
        }
        if let Some(change) = *self.hop.answer.lock().unwrap() {
            change(&mut connection);
        }
        Ok(connection)
    }

    async fn close(&self, connection: Connection, _: Option<Instant>) -> Result<(), Status> {
        self.check()?;
        self.take_time().await;
        self.hop.closes.lock().unwrap().push((self.url.clone(), connection));
        Ok(())
    }

    async fn monitor(&self, selector: MonitorScopeSelector) -> Result<EventStream, Status> {
        self.check()?;
        if self.hop.no_monitor.load(SeqCst) {
            return Err(Status::unimplemented("no monitor here"));
        }
        Ok(self.hop.hub().subscribe(selector).map(Ok).boxed())
    }

    fn peer(&self) -> Option<Peer> {
        None
    }

    fn fds(&self) -> Option<FdTransceiver> {
        None
    }

    fn alive(&self) -> bool {
        self.check().is_ok()
    }
}
