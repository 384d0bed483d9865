//! What travels beside a message.

use crate::{
    core::{Error, FdTransceiver, Metadata, Peer},
    elements::begin::EventFactory,
    remote::Remote,
};
use nsm_proto::registry::{NetworkService, NetworkServiceEndpoint};
use std::{
    any::{Any, TypeId},
    collections::HashMap,
    fmt,
    sync::Arc,
    time::Duration,
};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

pub use nsm_transport::ClientToken;

/// Endpoints that may serve a request, found by `discover`, tried by `roundrobin`.
#[derive(Clone, Debug, Default)]
pub struct Candidates {
    /// The service asked for.
    pub network_service: NetworkService,
    /// Its endpoints that match the request, in the order the registry gave them.
    pub endpoints: Vec<NetworkServiceEndpoint>,
}

/// Deadline, identities and the like of one call. Cheap to clone; what an element changes is seen below it only.
#[derive(Clone, Debug, Default)]
pub struct Context {
    /// When the caller stops waiting. Waits inside a chain end here.
    pub deadline: Option<Instant>,
    /// Who called, as TLS authenticated it. `None` inside one process without identities (tests).
    pub peer: Option<Peer>,
    /// The caller's token, from gRPC metadata.
    pub token: Option<ClientToken>,
    /// Descriptors of the connection the call came in by.
    pub fds: Option<FdTransceiver>,
    /// Where `dial` connects to.
    pub client_url: Option<String>,
    /// What `discover` found.
    pub candidates: Option<Arc<Candidates>>,
    /// State of this connection; set by the `metadata` element.
    pub metadata: Option<Metadata>,
    /// Replays operations of this connection; set by the `begin` element.
    pub factory: Option<EventFactory>,
    /// The next hop; set by `dial` or `clientconn`. Its peer and descriptors are those of the outgoing side.
    pub remote: Option<Remote>,
    /// Ends a replayed operation early because a close is waiting behind it. Waits for other processes heed it.
    pub cancel: Option<CancellationToken>,
    /// The path says that this connection was established before, whatever this process remembers of it: it may have been
    /// restarted. What works is not closed then because a refresh fails; set by `updatepath`, heeded by [`unwind`](crate::unwind).
    pub refresh: bool,
    /// Typed values of elements that this crate does not know; see [`Context::insert_extension`].
    pub extensions: Extensions,
}

/// Values by type, shared between clones.
#[derive(Clone, Default)]
pub struct Extensions(Option<Arc<HashMap<TypeId, Arc<dyn Any + Send + Sync>>>>);

impl fmt::Debug for Extensions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} extensions", self.0.as_ref().map_or(0, |map| map.len()))
    }
}

impl Context {
    /// An empty context: no deadline, no peer.
    pub fn new() -> Self {
        Self::default()
    }

    /// The same, ending after `timeout` from now if that is earlier than its own deadline.
    #[must_use]
    pub fn with_timeout(mut self, timeout: Duration) -> Self {
        let deadline = Instant::now() + timeout;
        self.deadline = Some(self.deadline.map_or(deadline, |own| own.min(deadline)));
        self
    }

    /// Time left; `None` without a deadline.
    pub fn time_left(&self) -> Option<Duration> {
        self.deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()))
    }

    /// The deadline, or `bound` from now for calls without one: no wait inside a chain is endless.
    pub fn deadline_or(&self, bound: Duration) -> Instant {
        self.deadline.unwrap_or_else(|| Instant::now() + bound)
    }

    /// Waits for `future` until the deadline (or `bound`, if there is none) or until a close cuts it short.
    pub async fn bounded<T>(&self, bound: Duration, future: impl Future<Output = T>) -> Result<T, tonic::Code> {
        let cancelled = async {
            match &self.cancel {
                Some(cancel) => cancel.cancelled().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            result = tokio::time::timeout_at(self.deadline_or(bound), future) => {
                result.map_err(|_| tonic::Code::DeadlineExceeded)
            }
            () = cancelled => Err(tonic::Code::Cancelled),
        }
    }

    /// A value of type `T` that an element above has added.
    pub fn extension<T: Send + Sync + 'static>(&self) -> Option<Arc<T>> {
        let value = self.extensions.0.as_ref()?.get(&TypeId::of::<T>())?;
        value.clone().downcast::<T>().ok()
    }

    /// Adds a value for the elements below.
    pub fn insert_extension<T: Send + Sync + 'static>(&mut self, value: T) {
        let map = self.extensions.0.get_or_insert_default();
        Arc::make_mut(map).insert(TypeId::of::<T>(), Arc::new(value));
    }

    /// The connection's metadata, or an error for chains that lack the `metadata` element.
    pub fn metadata(&self, element: &'static str, connection: &str) -> Result<&Metadata, Error> {
        self.metadata.as_ref().ok_or_else(|| {
            Error::new(element, connection, "the chain has no metadata element above this one")
                .with_code(tonic::Code::Internal)
        })
    }

    /// Takes note of the time left, for a clean-up that gets as much again whenever it runs.
    pub fn postpone(&self) -> Postponed {
        Postponed { time: self.time_left(), ctx: Box::new(self.clone()) }
    }
}

/// A context put aside at an element's entry; see [`Context::postpone`].
#[derive(Clone, Debug)]
pub struct Postponed {
    time: Option<Duration>,
    ctx: Box<Context>,
}

impl Postponed {
    /// The same values with a deadline counted from now; nothing ends a clean-up early.
    pub fn context(&self) -> Context {
        Context { deadline: self.time.map(|time| Instant::now() + time), cancel: None, ..(*self.ctx).clone() }
    }

    /// Whether the connection was established before; see [`Context::refresh`].
    pub fn is_refresh(&self) -> bool {
        self.ctx.refresh
    }

    /// The time that was left.
    pub fn time(&self) -> Option<Duration> {
        self.time
    }
}
