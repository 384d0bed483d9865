//! One connection: its line, its state, and the operations on it.

use super::{
    merge::merge,
    queue::{Queue, Turn},
};
use crate::{
    CloseCall, Connection, Context, Error, EventOptions, Fired, Kept, Mechanism, NetworkServiceRequest, Next,
    RequestCall, Side, State, core::Postponed, elements::begin::EventFactory,
};
use futures_util::FutureExt;
use prost::Message;
use std::{
    collections::HashMap,
    panic::AssertUnwindSafe,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

pub(super) type Entries = Mutex<HashMap<String, Arc<Entry>>>;
/// Changes a request so that it looks for another endpoint.
pub type Reselect = dyn Fn(&mut NetworkServiceRequest) + Send + Sync;

pub(super) const NAME: &str = "begin";

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
enum Phase {
    #[default]
    New,
    Established,
    Closed,
}

#[derive(Default)]
struct Record {
    phase: Phase,
    /// Counts successful requests: who saw an older one acts on stale news.
    generation: u64,
    /// What the last successful request preferred.
    preferences: Preferences,
    /// The connection it resulted in.
    connection: Option<Kept>,
    /// What the caller of the last request by hand was given; of interest on the client's side only.
    returned: Option<Kept>,
    /// What an element below has kept of the request under way; see [`EventFactory::keep`].
    below: Option<Kept>,
    /// Values for events: the context of the last successful request, without its deadline.
    values: Context,
    /// Time the first request was given; every event gets as much.
    time: Option<Option<Duration>>,
}

impl Record {
    fn last_request(&self) -> NetworkServiceRequest {
        let connection = self.connection.as_ref().map(Kept::get);
        NetworkServiceRequest { connection, ..self.preferences.get() }
    }
}

/// Mechanism preferences, encoded: they are looked at when another endpoint is to be found only.
#[derive(Default)]
struct Preferences(Box<[u8]>);

impl Preferences {
    fn new(mechanism_preferences: Vec<Mechanism>) -> Self {
        let request = NetworkServiceRequest { connection: None, mechanism_preferences };
        Self(request.encode_to_vec().into())
    }

    /// A request with them, and without a connection.
    fn get(&self) -> NetworkServiceRequest {
        NetworkServiceRequest::decode(&*self.0).unwrap_or_default()
    }
}

pub(super) struct Entry {
    pub(super) id: String,
    pub(super) side: Side,
    pub(super) queue: Queue,
    next: Next,
    reselect: Arc<Reselect>,
    entries: Weak<Entries>,
    record: Mutex<Record>,
    pub(super) closed: CancellationToken,
    /// A close is in the line: replays under way should hurry.
    pub(super) closing: CancellationToken,
    /// Requests of callers that are in the line or under way.
    asking: AtomicUsize,
}

/// A caller's request, from its arrival to its end.
pub(super) struct Asking {
    entry: Arc<Entry>,
    /// What it was given on arrival.
    pub(super) time: Option<Duration>,
    /// Cancelled when the caller has stopped waiting.
    pub(super) gone: CancellationToken,
}

impl Asking {
    pub(super) fn new(entry: &Arc<Entry>, time: Option<Duration>, gone: CancellationToken) -> Self {
        entry.asking.fetch_add(1, Ordering::SeqCst);
        Self { entry: entry.clone(), time, gone }
    }

    /// Nobody wants the answer: the caller has stopped waiting, and has not asked again.
    fn is_given_up(&self, deadline: Option<Instant>) -> bool {
        let left = self.gone.is_cancelled() || deadline.is_some_and(|deadline| Instant::now() >= deadline);
        left && self.entry.asking.load(Ordering::SeqCst) == 1
    }
}

impl Drop for Asking {
    fn drop(&mut self) {
        self.entry.asking.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Entry {
    pub(super) fn new(id: &str, side: Side, next: Next, reselect: Arc<Reselect>, entries: Weak<Entries>) -> Arc<Self> {
        Arc::new(Self {
            id: id.to_owned(),
            side,
            queue: Queue::default(),
            next,
            reselect,
            entries,
            record: Mutex::default(),
            closed: CancellationToken::new(),
            closing: CancellationToken::new(),
            asking: AtomicUsize::new(0),
        })
    }

    fn record(&self) -> MutexGuard<'_, Record> {
        self.record.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn generation(&self) -> u64 {
        self.record().generation
    }

    pub(super) fn connection(&self) -> Option<Connection> {
        let record = self.record();
        let kept = (record.phase == Phase::Established).then(|| record.connection.clone()).flatten();
        drop(record);
        kept.map(|kept| kept.get())
    }

    /// The same memory for what is kept of this connection below and here.
    pub(super) fn keep(&self, connection: &Connection) -> Kept {
        let kept = Kept::new(connection);
        self.record().below = Some(kept.clone());
        kept
    }

    /// Whether this entry still is the one for its id.
    pub(super) fn is_current(self: &Arc<Self>) -> bool {
        let Some(entries) = self.entries.upgrade() else { return false };
        let entries = entries.lock().unwrap_or_else(PoisonError::into_inner);
        entries.get(&self.id).is_some_and(|entry| Arc::ptr_eq(entry, self))
    }

    fn is_superseded(self: &Arc<Self>) -> bool {
        let Some(entries) = self.entries.upgrade() else { return false };
        let entries = entries.lock().unwrap_or_else(PoisonError::into_inner);
        entries.get(&self.id).is_some_and(|entry| !Arc::ptr_eq(entry, self))
    }

    fn forget(self: &Arc<Self>) {
        self.record().phase = Phase::Closed;
        self.closed.cancel();
        if let Some(entries) = self.entries.upgrade() {
            let mut entries = entries.lock().unwrap_or_else(PoisonError::into_inner);
            if entries.get(&self.id).is_some_and(|entry| Arc::ptr_eq(entry, self)) {
                entries.remove(&self.id);
            }
        }
    }

    /// A context for something the chain itself starts.
    fn event_context(self: &Arc<Self>) -> Context {
        let record = self.record();
        let deadline = record.time.flatten().map(|time| Instant::now() + time);
        let (factory, cancel) = (Some(EventFactory(self.clone())), Some(self.closing.clone()));
        Context { deadline, factory, cancel, ..record.values.clone() }
    }

    /// The same for undoing something: a close that waits must not cut short what would do its work.
    fn clean_up_context(self: &Arc<Self>) -> Context {
        Context { cancel: None, ..self.event_context() }
    }

    /// A request by the caller.
    pub(super) async fn request(
        self: &Arc<Self>,
        _turn: &Turn,
        mut call: RequestCall,
        asking: &Asking,
    ) -> Result<Connection, Error> {
        let (phase, stored) = {
            let record = self.record();
            (record.phase, record.connection.clone().map(|kept| kept.get()))
        };
        if phase == Phase::Established && self.side == Side::Client {
            let returned = self.record().returned.clone().map(|kept| kept.get());
            let merged = merge(returned.as_ref(), std::mem::take(call.connection_mut()), stored.as_ref());
            *call.connection_mut() = merged;
        } else if phase == Phase::Established && call.connection().state() == State::ReselectRequested {
            // The old branch has to go before a new one is looked for.
            let connection = stored.unwrap_or_default();
            if let Err(error) = self.next.close(CloseCall::new(connection, self.clean_up_context())).await {
                tracing::info!(id = %self.id, %error, "closing the old branch before reselecting");
            }
            self.record().phase = Phase::New;
        }
        if call.ctx.time_left().is_some_and(|left| left.is_zero()) {
            self.forget_unless_established();
            return Err(Error::deadline(NAME, &self.id, "an earlier operation on this connection"));
        }
        self.record().time.get_or_insert(asking.time);
        let (deadline, fresh) = (call.ctx.deadline, self.record().phase == Phase::New && !call.ctx.refresh);
        let values = Context { deadline: None, ..(*call.ctx).clone() };
        call.ctx.factory = Some(EventFactory(self.clone()));
        let (request, postponed) = ((*call.message).clone(), call.ctx.postpone());
        let result = match AssertUnwindSafe(self.next.request(call)).catch_unwind().await {
            Ok(result) => result,
            Err(_) => Err(self.broken_off(&request, &postponed).await),
        };
        match result {
            Ok(connection) => {
                let connection = self.established(request, connection, Some(values));
                if self.side == Side::Client {
                    let mut record = self.record();
                    record.returned = record.connection.clone();
                }
                if fresh && asking.is_given_up(deadline) {
                    return Err(self.undo(connection).await);
                }
                Ok(connection)
            }
            Err(error) => {
                self.forget_unless_established();
                Err(error)
            }
        }
    }

    /// Closes what was made for a caller that does not know of it, and so will neither refresh nor close it.
    async fn undo(self: &Arc<Self>, connection: Connection) -> Error {
        tracing::info!(id = %self.id, "closing: the caller has not waited for it");
        let error = Error::deadline(NAME, &self.id, "the chain");
        let closed = self.next.close(CloseCall::new(connection, self.clean_up_context())).await;
        self.forget();
        match closed {
            Ok(()) => error,
            Err(close) => error.also("connection closed with error", &close),
        }
    }

    /// An element has panicked. What was established stays; of something new nobody knows how far it came: it is closed as it was
    /// asked for.
    async fn broken_off(&self, request: &NetworkServiceRequest, postponed: &Postponed) -> Error {
        let text = "the operation broke off: an element has panicked";
        let error = Error::new(NAME, &self.id, text).with_code(tonic::Code::Internal);
        if self.record().phase == Phase::Established {
            return error;
        }
        let connection = request.connection.clone().unwrap_or_default();
        let close = self.next.close(CloseCall::new(connection, postponed.context()));
        match AssertUnwindSafe(close).catch_unwind().await {
            Ok(Err(close)) => error.also("connection closed with error", &close),
            Ok(Ok(())) | Err(_) => error,
        }
    }

    fn established(
        &self,
        request: NetworkServiceRequest,
        mut connection: Connection,
        values: Option<Context>,
    ) -> Connection {
        connection.set_state(State::Up);
        let kept = Kept::new(&connection);
        let mut record = self.record();
        let below = record.below.take();
        record.phase = Phase::Established;
        record.generation += 1;
        record.preferences = Preferences::new(request.mechanism_preferences);
        record.connection = Some(kept.shared_with(below.as_ref()));
        if let Some(values) = values {
            record.values = values;
        }
        connection
    }

    fn forget_unless_established(self: &Arc<Self>) {
        if self.record().phase != Phase::Established {
            self.forget();
        }
    }

    /// A close by the caller: with what the chain last returned, whatever the caller believes.
    pub(super) async fn close(self: &Arc<Self>, _turn: &Turn, mut ctx: Context) -> Result<(), Error> {
        let Some(connection) = self.connection() else { return Ok(()) };
        ctx.factory = Some(EventFactory(self.clone()));
        let result = self.next.close(CloseCall::new(connection, ctx)).await;
        self.forget();
        result
    }

    /// Replays the last request.
    pub(super) async fn request_event(self: &Arc<Self>, _turn: &Turn, options: &EventOptions) -> Result<Fired, Error> {
        let (mut request, generation) = {
            let record = self.record();
            if record.phase != Phase::Established || self.closed.is_cancelled() {
                return Ok(Fired::Skipped);
            }
            (record.last_request(), record.generation)
        };
        if options.is_stale(generation) {
            return Ok(Fired::Skipped);
        }
        if options.reselect {
            let connection = request.connection.clone().unwrap_or_default();
            if let Err(error) = self.next.close(CloseCall::new(connection, self.event_context())).await {
                tracing::debug!(id = %self.id, %error, "closing the old branch before reselecting");
            }
            (self.reselect)(&mut request);
        }
        let connection = self.next.request(RequestCall::new(request.clone(), self.event_context())).await?;
        let connection = self.established(request, connection, None);
        Ok(Fired::Connection(Box::new(connection)))
    }

    /// Closes with the last connection.
    pub(super) async fn close_event(self: &Arc<Self>, _turn: &Turn, options: &EventOptions) -> Result<Fired, Error> {
        // A failed close is tried again on a forgotten entry, unless the id has come back to life since.
        if options.is_stale(self.generation()) || self.is_superseded() {
            return Ok(Fired::Skipped);
        }
        let connection = self.record().connection.clone().map(|kept| kept.get()).unwrap_or_default();
        // It is this process that closes: its client's tokens may have ended long ago (a connection kept while alive).
        let ctx = Context { cancel: None, peer: None, ..self.event_context() };
        let result = self.next.close(CloseCall::new(connection, ctx)).await;
        self.forget();
        result.map(|()| Fired::Closed)
    }
}
