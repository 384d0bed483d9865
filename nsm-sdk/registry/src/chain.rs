//! Calls, elements and chains of a registry.
//!
//! The same shape as a network service chain: an element acts before or after `next`, or does not call it. There are
//! three operations instead of two, and one trait serves every kind of [`Object`].

use crate::{Error, Event, Object, PathHandle, Query};
use futures_util::stream::BoxStream;
use nsm_identity::Peer;
use nsm_transport::{FdTransceiver, Link};
use std::{
    fmt,
    sync::Arc,
    time::{Duration, SystemTime},
};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// What a find answers: current objects, and with `watch` live events until the reader drops it.
pub type Events<T> = BoxStream<'static, Result<Event<T>, Error>>;

/// The token a client sent with a call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientToken {
    /// The JWT, not verified.
    pub jwt: String,
    /// When it ends, as the client says.
    pub expires: SystemTime,
}

/// What travels beside a message. Cheap to clone; what an element changes is seen below it only, but for the path,
/// which is shared both ways.
#[derive(Clone, Default)]
pub struct Context {
    /// When the caller stops waiting.
    pub deadline: Option<Instant>,
    /// Who called, as TLS authenticated it. `None` inside one process.
    pub peer: Option<Peer>,
    /// The caller's token.
    pub token: Option<ClientToken>,
    /// Descriptors of the connection the call came in by.
    pub fds: Option<FdTransceiver>,
    /// Process id of the caller on a unix socket, if it has one here.
    pub pid: Option<i32>,
    /// The tokens of everyone the registration passed.
    pub path: Option<PathHandle>,
    /// When the token ends that this process has put into the path.
    pub own_expires: Option<SystemTime>,
    /// The connection to the next registry, set by `dial`.
    pub link: Option<Arc<Link>>,
    /// Replays operations of this object, set by `begin`.
    pub factory: Option<Factory>,
    /// Ends waits without a deadline, when an unregister follows; set by `begin`.
    pub cancel: Option<CancellationToken>,
}

impl Context {
    /// An empty context.
    pub fn new() -> Self {
        Self::default()
    }

    /// The same, ending after `timeout` if that is earlier than its own deadline.
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

    /// Ends when waiting has no sense any more: the deadline passed or the operation was cancelled.
    pub async fn ended(&self) {
        let deadline = async {
            match self.deadline {
                Some(deadline) => tokio::time::sleep_until(deadline).await,
                None => std::future::pending().await,
            }
        };
        let cancelled = async {
            match &self.cancel {
                Some(cancel) => cancel.cancelled().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! { () = deadline => {}, () = cancelled => {} }
    }
}

/// A message and its context.
#[derive(Clone)]
pub struct Call<M> {
    /// The object, or the query.
    pub message: M,
    /// Everything beside it.
    pub ctx: Context,
}

impl<M> Call<M> {
    /// Puts both together.
    pub fn new(message: M, ctx: Context) -> Self {
        Self { message, ctx }
    }
}

/// One link of a registry chain.
#[async_trait::async_trait]
pub trait Element<T: Object>: Send + Sync + 'static {
    /// What logs and errors call it.
    fn name(&self) -> &'static str;

    /// Registers or refreshes an object; answers with it as registered.
    async fn register(&self, call: Call<T>, next: Next<T>) -> Result<T, Error> {
        next.register(call).await
    }

    /// Finds objects.
    async fn find(&self, call: Call<Query<T>>, next: Next<T>) -> Result<Events<T>, Error> {
        next.find(call).await
    }

    /// Removes an object.
    async fn unregister(&self, call: Call<T>, next: Next<T>) -> Result<(), Error> {
        next.unregister(call).await
    }
}

/// The rest of a chain below an element, or a whole chain. Cheap to clone, and may be called any number of times.
pub struct Next<T> {
    elements: Arc<[Arc<dyn Element<T>>]>,
    position: usize,
}

impl<T> Clone for Next<T> {
    fn clone(&self) -> Self {
        Self { elements: self.elements.clone(), position: self.position }
    }
}

impl<T: Object> fmt::Debug for Next<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.names()).finish()
    }
}

/// A whole chain: what is above its first element.
pub type Chain<T> = Next<T>;

impl<T: Object> Next<T> {
    /// A chain of these elements, in the order a call travels.
    pub fn new(elements: Vec<Arc<dyn Element<T>>>) -> Self {
        Self { elements: elements.into(), position: 0 }
    }

    /// The names of its elements, in order.
    pub fn names(&self) -> Vec<&'static str> {
        self.elements.iter().skip(self.position).map(|element| element.name()).collect()
    }

    fn step(&self) -> Option<(&Arc<dyn Element<T>>, Self)> {
        let element = self.elements.get(self.position)?;
        Some((element, Self { elements: self.elements.clone(), position: self.position + 1 }))
    }

    /// Registers with the rest of the chain; at its end the object is answered as it is.
    pub async fn register(&self, call: Call<T>) -> Result<T, Error> {
        match self.step() {
            Some((element, next)) => element.register(call, next).await,
            None => Ok(call.message),
        }
    }

    /// Finds in the rest of the chain; at its end nothing is found.
    pub async fn find(&self, call: Call<Query<T>>) -> Result<Events<T>, Error> {
        match self.step() {
            Some((element, next)) => element.find(call, next).await,
            None => Ok(Box::pin(futures_util::stream::empty())),
        }
    }

    /// Unregisters in the rest of the chain.
    pub async fn unregister(&self, call: Call<T>) -> Result<(), Error> {
        match self.step() {
            Some((element, next)) => element.unregister(call, next).await,
            None => Ok(()),
        }
    }

    /// All objects that the rest of the chain finds now, without those flagged as removed.
    pub async fn list(&self, template: T, ctx: Context) -> Result<Vec<T>, Error> {
        use futures_util::TryStreamExt;
        let events: Vec<Event<T>> = self.find(Call::new(Query::list(template), ctx)).await?.try_collect().await?;
        Ok(events.into_iter().filter(|event| !event.deleted).map(|event| event.object).collect())
    }
}

/// Replays an object's operations from the top of the chain that made it.
#[async_trait::async_trait]
pub trait Replay: Send + Sync {
    /// Registers again what was registered last; does nothing if it is not registered (any more).
    async fn register(&self) -> Result<(), Error>;
    /// Unregisters what was registered last.
    async fn unregister(&self) -> Result<(), Error>;
}

/// Shared handle of a [`Replay`].
#[derive(Clone)]
pub struct Factory(Arc<dyn Replay>);

impl Factory {
    /// Wraps a replay.
    pub fn new(replay: impl Replay + 'static) -> Self {
        Self(Arc::new(replay))
    }
    /// See [`Replay::register`].
    pub async fn register(&self) -> Result<(), Error> {
        self.0.register().await
    }
    /// See [`Replay::unregister`].
    pub async fn unregister(&self) -> Result<(), Error> {
        self.0.unregister().await
    }
}

/// Background task of one object; ends with its handle.
#[derive(Debug)]
pub(crate) struct Task(tokio::task::JoinHandle<()>);

impl Task {
    pub(crate) fn spawn(future: impl Future<Output = ()> + Send + 'static) -> Self {
        Self(tokio::spawn(future))
    }
    pub(crate) fn is_finished(&self) -> bool {
        self.0.is_finished()
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// A table of an element's state by object name.
pub(crate) struct Table<V>(std::sync::Mutex<std::collections::HashMap<String, V>>);

impl<V> Default for Table<V> {
    fn default() -> Self {
        Self(Default::default())
    }
}

impl<V> Table<V> {
    pub(crate) fn with<R>(&self, f: impl FnOnce(&mut std::collections::HashMap<String, V>) -> R) -> R {
        f(&mut self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner))
    }
    pub(crate) fn insert(&self, name: &str, value: V) -> Option<V> {
        self.with(|map| map.insert(name.to_owned(), value))
    }
    pub(crate) fn remove(&self, name: &str) -> Option<V> {
        self.with(|map| map.remove(name))
    }
}

impl<V: Clone> Table<V> {
    pub(crate) fn get(&self, name: &str) -> Option<V> {
        self.with(|map| map.get(name).cloned())
    }
}

#[cfg(test)]
mod tests;
