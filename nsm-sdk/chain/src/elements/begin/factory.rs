//! Operations that elements start themselves.

use super::entry::{Entry, NAME};
use crate::{Connection, Error, Kept};
use std::{
    fmt,
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};
use tokio::task::JoinHandle;
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

/// Replays operations of one connection from the chain's start, in line with all others on it.
///
/// The events run in tasks of their own. An element must not wait for one inside `request` or `close` of the same
/// connection: its turn comes only after the current operation.
#[derive(Clone)]
pub struct EventFactory(pub(super) Arc<Entry>);

/// How an event differs from a plain replay.
#[derive(Clone, Debug, Default)]
pub struct EventOptions {
    /// Close the old branch and look for another endpoint.
    pub reselect: bool,
    /// Skip the event if this is cancelled when its turn comes.
    pub cancel: Option<CancellationToken>,
    /// Skip the event if another request has succeeded since this generation.
    pub generation: Option<u64>,
}

impl EventOptions {
    /// A replay that looks for another endpoint.
    pub fn reselect() -> Self {
        Self { reselect: true, ..Self::default() }
    }

    /// The same, skipped once `cancel` is cancelled.
    #[must_use]
    pub fn unless(mut self, cancel: CancellationToken) -> Self {
        self.cancel = Some(cancel);
        self
    }

    /// The same, skipped if another request succeeds first.
    #[must_use]
    pub fn at_generation(mut self, generation: u64) -> Self {
        self.generation = Some(generation);
        self
    }

    pub(super) fn is_stale(&self, generation: u64) -> bool {
        self.cancel.as_ref().is_some_and(CancellationToken::is_cancelled)
            || self.generation.is_some_and(|expected| expected != generation)
    }
}

/// What became of an event.
#[derive(Clone, Debug, PartialEq)]
pub enum Fired {
    /// A replay succeeded with this connection.
    Connection(Box<Connection>),
    /// A close succeeded.
    Closed,
    /// Nothing was done: the connection is closed, or the event cancelled or out of date.
    Skipped,
}

/// An event under way. Dropping it does not stop the event.
#[derive(Debug)]
pub struct Event {
    task: JoinHandle<Result<Fired, Error>>,
    id: String,
}

impl Future for Event {
    type Output = Result<Fired, Error>;

    fn poll(mut self: Pin<&mut Self>, ctx: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.task).poll(ctx).map(|joined| joined.unwrap_or_else(|error| Err(broken(&self.id, &error))))
    }
}

/// An operation's task ended without a result: a panic in an element, or the runtime going down.
pub(super) fn broken(id: &str, error: &tokio::task::JoinError) -> Error {
    Error::new(NAME, id, format!("the operation broke off: {error}")).with_code(tonic::Code::Internal)
}

impl fmt::Debug for EventFactory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "EventFactory({})", self.0.id)
    }
}

impl EventFactory {
    /// Replays the last successful request. Skipped unless the connection is established.
    pub fn request(&self, options: EventOptions) -> Event {
        let (entry, ticket) = (self.0.clone(), self.0.queue.enter());
        self.event(async move {
            let turn = ticket.turn().await;
            entry.request_event(&turn, &options).await
        })
    }

    /// Closes the connection and forgets it.
    pub fn close(&self, options: EventOptions) -> Event {
        let (entry, ticket) = (self.0.clone(), self.0.queue.enter());
        self.event(async move {
            let turn = ticket.turn().await;
            entry.close_event(&turn, &options).await
        })
    }

    fn event(&self, future: impl Future<Output = Result<Fired, Error>> + Send + 'static) -> Event {
        Event { task: tokio::spawn(future), id: self.0.id.clone() }
    }

    /// The connection's id in this process.
    pub fn id(&self) -> &str {
        &self.0.id
    }

    /// Number of successful requests so far.
    pub fn generation(&self) -> u64 {
        self.0.generation()
    }

    /// What the chain last returned; `None` unless established.
    pub fn connection(&self) -> Option<Connection> {
        self.0.connection()
    }

    /// Keeps the result of the request under way. What `begin` itself keeps shares its memory, if nothing above changes it.
    pub fn keep(&self, connection: &Connection) -> Kept {
        self.0.keep(connection)
    }

    /// Resolves when the connection is closed for good (not when it is closed in order to reselect).
    pub fn closed(&self) -> WaitForCancellationFutureOwned {
        self.0.closed.clone().cancelled_owned()
    }

    /// Whether the connection is closed for good.
    pub fn is_closed(&self) -> bool {
        self.0.closed.is_cancelled()
    }
}
