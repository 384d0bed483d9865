//! One operation at a time for each connection, and replay of operations.
//!
//! ```text
//!   caller ──► begin: take a place in the line of this id ──► own task: wait for the turn ──► next
//!                                                                ▲
//!   refresh, heal, timeout ... ──► EventFactory::request/close ──┘
//! ```

mod entry;
mod factory;
mod merge;
mod queue;

pub use entry::Reselect;
pub use factory::{Event, EventFactory, EventOptions, Fired};

use crate::{CloseCall, Connection, Element, Error, NetworkServiceRequest, Next, RequestCall, Side, State};
use entry::{Asking, Entries, Entry, NAME};
use factory::broken;
use std::{
    sync::{Arc, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// A caller whose deadline has passed waits this much longer, for the real cause to come up.
const GRACE: Duration = Duration::from_millis(50);

/// Runs the operations of each connection one at a time, in order of arrival, each in a task of its own: a caller
/// that leaves never cuts an element between its effect and its undo. A new connection that is ready only after its caller
/// has left is closed again, unless the caller has asked for it once more.
///
/// In a chain inside another chain that has a `begin` it lets everything pass: events then start at the outer one.
pub struct Begin {
    side: Side,
    entries: Arc<Entries>,
    reselect: Arc<Reselect>,
}

impl Begin {
    /// An element for the server or client side.
    pub fn new(side: Side) -> Self {
        Self { side, entries: Arc::default(), reselect: Arc::new(reselect_any) }
    }

    /// Replaces what happens to a request when another endpoint is to be found; see [`reselect_any`].
    #[must_use]
    pub fn with_reselect(mut self, reselect: Arc<Reselect>) -> Self {
        self.reselect = reselect;
        self
    }

    fn entries(&self) -> MutexGuard<'_, std::collections::HashMap<String, Arc<Entry>>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many connections are established or under way.
    pub fn len(&self) -> usize {
        self.entries().len()
    }

    /// Whether there is no connection.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The event factory of an established connection.
    pub fn factory(&self, id: &str) -> Option<EventFactory> {
        self.entries().get(id).cloned().map(EventFactory)
    }

    /// The ids of all connections.
    pub fn ids(&self) -> Vec<String> {
        self.entries().keys().cloned().collect()
    }
}

/// The default way to look for another endpoint: forget mechanism and endpoint, and say so in the state.
pub fn reselect_any(request: &mut NetworkServiceRequest) {
    reselect_same_endpoint(request);
    request.connection.get_or_insert_default().network_service_endpoint_name = String::new();
}

/// Sets up a new branch to the same endpoint.
pub fn reselect_same_endpoint(request: &mut NetworkServiceRequest) {
    let connection = request.connection.get_or_insert_default();
    connection.mechanism = None;
    connection.set_state(State::ReselectRequested);
}

fn get_or_create(entries: &Arc<Entries>, id: &str, side: Side, next: &Next, reselect: &Arc<Reselect>) -> Arc<Entry> {
    let mut map = entries.lock().unwrap_or_else(PoisonError::into_inner);
    map.entry(id.to_owned())
        .or_insert_with(|| Entry::new(id, side, next.clone(), reselect.clone(), Arc::downgrade(entries)))
        .clone()
}

fn find(entries: &Arc<Entries>, id: &str) -> Option<Arc<Entry>> {
    entries.lock().unwrap_or_else(PoisonError::into_inner).get(id).cloned()
}

#[async_trait::async_trait]
impl Element for Begin {
    fn name(&self) -> &'static str {
        NAME
    }

    async fn request(&self, call: RequestCall, next: Next) -> Result<Connection, Error> {
        if call.ctx.factory.is_some() {
            return next.request(call).await;
        }
        let id = call.id().to_owned();
        if id.is_empty() {
            return Err(Error::new(NAME, "", "the connection has no id").with_code(tonic::Code::InvalidArgument));
        }
        let (entries, side, reselect) = (self.entries.clone(), self.side, self.reselect.clone());
        let (time, deadline) = (call.ctx.time_left(), call.ctx.deadline);
        let mut entry = get_or_create(&entries, &id, side, &next, &reselect);
        let gone = CancellationToken::new();
        let mut asking = Asking::new(&entry, time, gone.clone());
        let mut ticket = entry.queue.enter();
        let key = id.clone();
        let task = tokio::spawn(async move {
            loop {
                let turn = ticket.turn().await;
                if entry.is_current() {
                    return entry.request(&turn, call, &asking).await;
                }
                // The connection was closed while we waited: this request starts a new one.
                entry = get_or_create(&entries, &key, side, &next, &reselect);
                asking = Asking::new(&entry, time, asking.gone.clone());
                ticket = entry.queue.enter();
            }
        });
        // A caller that leaves drops this future.
        let _gone = gone.drop_guard();
        wait(&id, task, deadline).await
    }

    async fn close(&self, call: CloseCall, next: Next) -> Result<(), Error> {
        if call.ctx.factory.is_some() {
            return next.close(call).await;
        }
        let id = call.id().to_owned();
        let Some(mut entry) = self.entries().get(&id).cloned() else { return Ok(()) };
        if entry.connection().is_some() {
            entry.closing.cancel();
        }
        let mut ticket = entry.queue.enter();
        // However long the line is: the close gets the time its caller gave it.
        let (postponed, deadline) = (call.ctx.postpone(), call.ctx.deadline);
        let (entries, key) = (self.entries.clone(), id.clone());
        let task = tokio::spawn(async move {
            loop {
                let turn = ticket.turn().await;
                if entry.is_current() {
                    return entry.close(&turn, postponed.context()).await;
                }
                let Some(newer) = find(&entries, &key) else { return Ok(()) };
                entry = newer;
                ticket = entry.queue.enter();
            }
        });
        wait(&id, task, deadline).await
    }
}

/// Waits for an operation as long as its caller would. The operation itself goes on.
async fn wait<T>(
    id: &str,
    task: tokio::task::JoinHandle<Result<T, Error>>,
    deadline: Option<Instant>,
) -> Result<T, Error> {
    let joined = match deadline {
        None => task.await,
        Some(deadline) => match tokio::time::timeout_at(deadline + GRACE, task).await {
            Ok(joined) => joined,
            Err(_) => return Err(Error::deadline(NAME, id, "the chain")),
        },
    };
    joined.unwrap_or_else(|error| Err(broken(id, &error)))
}

/// The chain is gone: nothing is replayed any more.
impl Drop for Begin {
    fn drop(&mut self) {
        for entry in self.entries().values() {
            entry.closed.cancel();
        }
    }
}

impl std::fmt::Debug for Begin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Begin({:?}, {} connections)", self.side, self.len())
    }
}

#[cfg(test)]
mod tests;
