//! Restores a connection whose next hop or data path is lost.
//!
//! | control plane | liveness check | data path | what happens |
//! |---|---|---|---|
//! | lost | none | ? | another endpoint is looked for |
//! | lost | yes | alive | the same connection is requested again, the data path is left alone |
//! | lost | yes | dead | another endpoint is looked for |
//! | fine | yes | dead | another endpoint is looked for |

mod status;
mod together;
mod watch;

pub use status::{ConnectionStatus, StatusSender};

use super::begin::Begin;
use crate::{CloseCall, Connection, Element, Error, Key, Next, REMOTE, RequestCall, Side, State, Task};
use std::{sync::Arc, time::Duration};
use together::Together;
use watch::{Gate, Watch};

/// Whether the data path of a connection works.
#[async_trait::async_trait]
pub trait Liveness: Send + Sync + 'static {
    /// Answers within `timeout`; later counts as no.
    async fn alive(&self, connection: &Connection, timeout: Duration) -> bool;
}

/// How to check data paths.
#[derive(Clone)]
pub struct LivenessCheck {
    /// Does the check.
    pub probe: Arc<dyn Liveness>,
    /// Pause between checks.
    pub interval: Duration,
    /// Time given to each.
    pub timeout: Duration,
    /// So many failures in a row mean that the path is dead.
    pub misses: u32,
    /// A new data path may take so long until it answers for the first time.
    pub grace: Duration,
}

impl LivenessCheck {
    /// Checks every 200 ms, each 100 ms long; one failure is enough.
    pub fn new(probe: Arc<dyn Liveness>) -> Self {
        let (interval, timeout) = (Duration::from_millis(200), Duration::from_millis(100));
        Self { probe, interval, timeout, misses: 1, grace: Duration::from_secs(2) }
    }

    async fn alive(&self, connection: &Connection) -> bool {
        let probe = self.probe.alive(connection, self.timeout);
        // The probe keeps the time itself; this bounds one that does not.
        tokio::time::timeout(self.timeout * 2, probe).await.unwrap_or(false)
    }
}

/// Watches each connection at the next hop and, if told how, on its data path.
///
/// Attempts to heal go on, with pauses of up to two seconds, until one succeeds, any other request succeeds, or the
/// connection is closed.
pub struct Heal {
    key: Key<Option<Watching>>,
    check: Option<LivenessCheck>,
    together: Option<Together>,
}

struct Watching {
    gate: Gate,
    _task: Task,
}

const NAME: &str = "heal";

impl Heal {
    /// An element that trusts the control plane alone, or one that asks the data path too.
    pub fn new(check: Option<LivenessCheck>) -> Self {
        Self { key: Key::new(Side::Client), check, together: None }
    }

    /// A wish of the other side that one connection be refreshed counts for all connections of `begin`: for clients whose connections
    /// depend on each other.
    #[must_use]
    pub fn together(mut self, begin: &Arc<Begin>) -> Self {
        self.together = Some(Together::new(begin));
        self
    }

    fn start(&self, call: &RequestCall, connection: Connection, generation: u64, proven: bool) -> Result<(), Error> {
        let metadata = call.ctx.metadata(NAME, call.id())?;
        let (Some(remote), Some(factory)) = (metadata.get(&REMOTE), call.ctx.factory.clone()) else { return Ok(()) };
        let gate = Gate::default();
        let status = call.ctx.extension::<StatusSender>();
        let watch = Watch {
            connection,
            remote,
            factory,
            generation,
            proven,
            check: self.check.clone(),
            together: self.together.clone(),
            gate: gate.clone(),
            status,
        };
        let watching = Watching { gate, _task: Task::spawn(watch.run()) };
        drop(metadata.insert(&self.key, Some(watching)));
        Ok(())
    }
}

#[async_trait::async_trait]
impl Element for Heal {
    fn name(&self) -> &'static str {
        NAME
    }

    async fn request(&self, call: RequestCall, next: Next) -> Result<Connection, Error> {
        let metadata = call.ctx.metadata(NAME, call.id())?.clone();
        // A watch that has not begun to heal must not judge what this request is changing.
        let stopped = metadata.with(&self.key, |watching| match watching {
            Some(current) if current.gate.stop() => watching.take(),
            _ => None,
        });
        let generation = call.ctx.factory.as_ref().map_or(0, |factory| factory.generation());
        // What was there before has a data path that has answered already.
        let proven = generation > 0 && call.connection().state() != State::ReselectRequested;
        match next.request(call.clone()).await {
            Ok(connection) => {
                // `begin` counts this success after it has come up there.
                self.start(&call, connection.clone(), generation + 1, proven)?;
                Ok(connection)
            }
            Err(error) => {
                if stopped.is_some() {
                    self.start(&call, call.connection().into_owned(), generation, proven)?;
                }
                Err(error)
            }
        }
    }

    async fn close(&self, call: CloseCall, next: Next) -> Result<(), Error> {
        drop(call.ctx.metadata(NAME, call.id())?.remove(&self.key));
        next.close(call).await
    }
}

#[cfg(test)]
mod tests;
