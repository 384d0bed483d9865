//! One watch of one connection, and the healing it may end in.

use super::{ConnectionStatus, LivenessCheck, StatusSender, together::Together};
use crate::{
    Connection, ConnectionEventType, EventFactory, EventOptions, Fired, Remote, State, elements::monitor::selector,
    remote::EventStream,
};
use futures_util::StreamExt;
use rand::Rng;
use std::{
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
    },
    time::Duration,
};
use tokio::time::Instant;
use tonic::Code;

/// Pauses between attempts to heal grow from here ...
const FIRST_PAUSE: Duration = Duration::from_millis(50);
/// A connection that is lost within this time of being established is not healed at once: no storm of requests.
const YOUNG: Duration = Duration::from_secs(1);
/// Pause before a refresh that the other side has asked for before it was watched.
const AGAIN: Duration = Duration::from_millis(200);
/// Attempts to open the monitor stream.
const OPENINGS: u32 = 3;
/// ... to here.
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// Decides between a watch that wants to heal and a request that wants it stopped: the first one wins.
#[derive(Clone, Debug, Default)]
pub(super) struct Gate(Arc<AtomicU8>);

impl Gate {
    fn change(&self, to: u8) -> bool {
        self.0.compare_exchange(0, to, Ordering::SeqCst, Ordering::SeqCst).is_ok()
    }

    /// Stops the watch; `false` if it is healing already.
    pub(super) fn stop(&self) -> bool {
        self.change(1)
    }

    fn heal(&self) -> bool {
        self.change(2)
    }
}

pub(super) struct Watch {
    pub(super) connection: Connection,
    pub(super) remote: Remote,
    pub(super) factory: EventFactory,
    /// The generation this watch belongs to; any later success makes its news stale.
    pub(super) generation: u64,
    /// The data path has answered before.
    pub(super) proven: bool,
    pub(super) check: Option<LivenessCheck>,
    /// Whose other connections are refreshed with this one.
    pub(super) together: Option<Together>,
    pub(super) gate: Gate,
    pub(super) status: Option<Arc<StatusSender>>,
}

/// What was lost.
enum Loss {
    Control(String),
    Data,
}

impl Watch {
    pub(super) async fn run(mut self) {
        let check = self.check.clone();
        let (connection, proven, born) = (self.connection.clone(), self.proven, Instant::now());
        let closed = self.factory.closed();
        let loss = tokio::select! {
            cause = self.control() => Loss::Control(cause),
            () = data(check.as_ref(), &connection, proven) => Loss::Data,
            () = closed => return,
        };
        if !self.gate.heal() {
            return;
        }
        if let Some(status) = &self.status {
            status.set(ConnectionStatus::Down(Box::new(self.connection.clone())));
        }
        // From here on it must survive the close that is part of reselecting, which ends this task.
        tokio::spawn(self.heal(loss, born.elapsed() < YOUNG));
    }

    async fn open(&self) -> Result<EventStream, tonic::Status> {
        let mut attempt = 1;
        loop {
            match self.remote.monitor(selector::of(&self.connection)).await {
                Err(status) if attempt < OPENINGS && status.code() != Code::Unimplemented && self.remote.alive() => {
                    tokio::time::sleep(jittered(FIRST_PAUSE * attempt)).await;
                    attempt += 1;
                }
                result => return result,
            }
        }
    }

    /// Returns why the next hop is lost.
    async fn control(&mut self) -> String {
        let mut events = match self.open().await {
            Ok(events) => events,
            // There are hops without a monitor; the data path is still watched.
            Err(status) if status.code() == Code::Unimplemented => return std::future::pending().await,
            Err(status) => return format!("cannot monitor {}: {status}", self.remote.url()),
        };
        loop {
            match next(&mut events).await {
                Ok(event) => {
                    let initial = event.r#type() == ConnectionEventType::InitialStateTransfer;
                    let news = match selector::translate(&self.connection, &event) {
                        Some(news) => news,
                        // It records a connection before it answers: it has been restarted, or has closed it since.
                        None if initial => return selector::UNKNOWN.to_owned(),
                        None => continue,
                    };
                    let deleted = event.r#type() == ConnectionEventType::Delete;
                    match news.state() {
                        State::Down if deleted => return "the next hop has closed the connection".to_owned(),
                        State::Down => return "the next hop reports it down".to_owned(),
                        State::RefreshRequested => {
                            if initial {
                                // The wish may be there again because granting it has failed: not at full speed.
                                tokio::time::sleep(jittered(AGAIN)).await;
                            }
                            tracing::info!(id = self.connection.id, "the other side asks for a refresh");
                            self.refresh();
                        }
                        State::Up | State::ReselectRequested => self.changed(news),
                    }
                }
                // A deliberate end: the data path is still watched.
                Err(Code::Cancelled) => return std::future::pending().await,
                Err(code) => return format!("lost sight of {}: {code:?}", self.remote.url()),
            }
        }
    }

    /// Requests the connection again and, where they belong together, the other ones once that has worked.
    fn refresh(&self) {
        let (own, together) = (self.factory.clone(), self.together.clone());
        let refreshed = own.request(EventOptions::default());
        // Not in this task, which ends with the request.
        tokio::spawn(async move {
            let Ok(Fired::Connection(_)) = refreshed.await else { return };
            if let Some(together) = together {
                together.follow(own.id());
            }
        });
    }

    /// Tells the application of a context that was changed by the other side.
    fn changed(&mut self, news: Connection) {
        if news.context != self.connection.context {
            self.connection.context = news.context;
            if let Some(status) = &self.status {
                status.set(ConnectionStatus::Up(Box::new(self.connection.clone())));
            }
        }
    }

    async fn alive(&self) -> bool {
        match &self.check {
            Some(check) => check.alive(&self.connection).await,
            None => false,
        }
    }

    async fn heal(self, loss: Loss, young: bool) {
        let (cause, mut reselect) = match loss {
            Loss::Control(cause) => (cause, !self.alive().await),
            Loss::Data => ("the data path is dead".to_owned(), true),
        };
        tracing::info!(id = self.connection.id, cause, reselect, "healing");
        let mut pause = FIRST_PAUSE;
        if young {
            tokio::time::sleep(jittered(2 * FIRST_PAUSE)).await;
        }
        loop {
            let options = EventOptions { reselect, ..EventOptions::default() }.at_generation(self.generation);
            let error = match self.factory.request(options).await {
                Ok(_) => return,
                Err(error) => error,
            };
            tracing::info!(id = self.connection.id, %error, reselect, "healing failed, trying again");
            tokio::select! {
                () = tokio::time::sleep(jittered(pause)) => {}
                () = self.factory.closed() => return,
            }
            pause = (pause * 2).min(LONGEST_PAUSE);
            if !reselect {
                reselect = !self.alive().await;
            }
        }
    }
}

async fn next(events: &mut EventStream) -> Result<crate::ConnectionEvent, Code> {
    match events.next().await {
        Some(Ok(event)) => Ok(event),
        // A status with a cause was made on this side, by a transport that broke: h2 calls that CANCELLED, too.
        Some(Err(status)) if std::error::Error::source(&status).is_some() => Err(Code::Unavailable),
        Some(Err(status)) => Err(status.code()),
        None => Err(Code::Unavailable),
    }
}

fn jittered(pause: Duration) -> Duration {
    pause.mul_f64(rand::rng().random_range(0.75..1.25))
}

/// Returns when the data path is dead.
async fn data(check: Option<&LivenessCheck>, connection: &Connection, mut proven: bool) {
    let Some(check) = check else { return std::future::pending().await };
    let born = Instant::now();
    let mut misses = 0;
    while misses < check.misses.max(1) {
        tokio::time::sleep(check.interval).await;
        let alive = check.alive(connection).await;
        proven |= alive || born.elapsed() >= check.grace;
        misses = if alive || !proven { 0 } else { misses + 1 };
    }
}
