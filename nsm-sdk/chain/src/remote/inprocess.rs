//! Another chain of the same process as the next hop.

use super::{EventStream, RemoteService};
use crate::{
    Chain, ClientToken, CloseCall, Connection, Connector, Context, Error, FdTransceiver, MonitorScopeSelector,
    NetworkServiceRequest, Peer, Remote, RequestCall, elements::monitor::Hub, token::Tokens,
};
use futures_util::StreamExt;
use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};
use tokio::time::Instant;
use tonic::Status;

/// A chain that others of this process may call, with the identity it answers under.
#[derive(Clone, Debug)]
pub struct LocalService {
    /// The chain.
    pub chain: Chain,
    /// Its monitor.
    pub hub: Hub,
    /// Who it is towards its callers.
    pub peer: Identity,
}

/// Who a part of this process is: asked anew for each call, because identities are rotated.
#[derive(Clone, Default)]
pub struct Identity(Option<Arc<dyn Fn() -> Option<Peer> + Send + Sync>>);

impl Identity {
    /// What `now` says each time it is asked.
    pub fn new(now: impl Fn() -> Option<Peer> + Send + Sync + 'static) -> Self {
        Self(Some(Arc::new(now)))
    }

    /// The peer that the other side sees now; `None` without identities (tests).
    pub fn peer(&self) -> Option<Peer> {
        self.0.as_ref().and_then(|now| now())
    }
}

impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Identity").field(&self.peer().map(|peer| peer.spiffe_id)).finish()
    }
}

/// Who calls, for [`InProcess`].
#[derive(Clone, Default)]
pub struct Caller {
    /// The peer that the called chain sees.
    pub peer: Identity,
    /// Signs the token that would be in gRPC metadata.
    pub tokens: Option<Tokens>,
}

/// Connects to chains of this process by URL, and to all other URLs through a second connector.
///
/// The called chain sees a call as if it came over a transport: a context of its own with deadline, peer, token and
/// a pair of descriptor channels. So paths have as many segments as with separate processes.
pub struct InProcess {
    services: Mutex<HashMap<String, LocalService>>,
    caller: Caller,
    other: Option<Arc<dyn Connector>>,
}

impl InProcess {
    /// A connector without services; `other` reaches all URLs that are not added.
    pub fn new(caller: Caller, other: Option<Arc<dyn Connector>>) -> Self {
        Self { services: Mutex::default(), caller, other }
    }

    /// Makes a chain reachable under `url`, or replaces it.
    pub fn add(&self, url: impl Into<String>, service: LocalService) {
        self.services.lock().unwrap_or_else(PoisonError::into_inner).insert(url.into(), service);
    }

    /// Makes a URL unknown again.
    pub fn remove(&self, url: &str) {
        self.services.lock().unwrap_or_else(PoisonError::into_inner).remove(url);
    }
}

#[async_trait::async_trait]
impl Connector for InProcess {
    async fn connect(&self, url: &str, deadline: Instant) -> Result<Remote, Error> {
        let service = self.services.lock().unwrap_or_else(PoisonError::into_inner).get(url).cloned();
        match (service, &self.other) {
            (Some(service), _) => Ok(remote(url, service, self.caller.clone())),
            (None, Some(other)) => other.connect(url, deadline).await,
            (None, None) => Err(Error::new("connector", "", format!("nothing in this process serves {url}"))
                .with_code(tonic::Code::Unavailable)),
        }
    }
}

/// A remote that calls `service` as `caller`.
pub fn remote(url: &str, service: LocalService, caller: Caller) -> Remote {
    let (near, far) = FdTransceiver::pair();
    Remote::new(url, Local { service, caller, near, far })
}

struct Local {
    service: LocalService,
    caller: Caller,
    near: FdTransceiver,
    far: FdTransceiver,
}

impl Local {
    fn context(&self, deadline: Option<Instant>) -> Result<Context, Status> {
        let token = match &self.caller.tokens {
            None => None,
            Some(tokens) => {
                let token = tokens.token(self.service.peer.peer().as_ref()).map_err(Status::unauthenticated)?;
                Some(ClientToken { jwt: token.jwt, expires: token.expires })
            }
        };
        Ok(Context {
            deadline,
            peer: self.caller.peer.peer(),
            token,
            fds: Some(self.far.clone()),
            ..Context::default()
        })
    }
}

#[async_trait::async_trait]
impl RemoteService for Local {
    async fn request(&self, request: NetworkServiceRequest, deadline: Option<Instant>) -> Result<Connection, Status> {
        let call = RequestCall::new(request, self.context(deadline)?);
        Ok(self.service.chain.request(call).await?)
    }

    async fn close(&self, connection: Connection, deadline: Option<Instant>) -> Result<(), Status> {
        let call = CloseCall::new(connection, self.context(deadline)?);
        Ok(self.service.chain.close(call).await?)
    }

    async fn monitor(&self, selector: MonitorScopeSelector) -> Result<EventStream, Status> {
        Ok(self.service.hub.subscribe(selector).map(Ok).boxed())
    }

    fn peer(&self) -> Option<Peer> {
        self.service.peer.peer()
    }

    fn fds(&self) -> Option<FdTransceiver> {
        Some(self.near.clone())
    }
}

#[cfg(test)]
mod tests;
