//! Closes connections whose client has stopped refreshing them.

use crate::{
    CloseCall, Connection, Element, Error, EventFactory, EventOptions, Fired, Key, Next, RequestCall, Side, Task,
    clock, path, unwind,
};
use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};
use tokio_util::sync::CancellationToken;
use tonic::Code;

/// Asked before a connection is closed because its client's token has expired.
#[async_trait::async_trait]
pub trait KeepAlive: Send + Sync + 'static {
    /// Whether the connection still works for its client and has to stay.
    async fn keep(&self, connection: &Connection) -> bool;
}

/// Fires a close when the caller's segment expires, early enough for the close to pass policies on its way.
///
/// With [`Timeout::keep_while`] nothing that is alive is closed by expiry: the question is asked again every so often.
pub struct Timeout {
    key: Key<Option<Timer>>,
    keep: Option<(Arc<dyn KeepAlive>, Duration)>,
}

/// The close to come; cancelled by the next request.
struct Timer {
    cancel: CancellationToken,
    task: Task,
}

const NAME: &str = "timeout";
/// A close that fails is tried again this often.
const ATTEMPTS: u32 = 5;
const PAUSE: Duration = Duration::from_secs(1);

impl Default for Timeout {
    fn default() -> Self {
        Self::new()
    }
}

impl Timeout {
    /// Closes at expiry, as NSM does.
    pub fn new() -> Self {
        Self { key: Key::new(Side::Server), keep: None }
    }

    /// Asks `keep` at expiry and then every `interval`, and closes only what is dead.
    #[must_use]
    pub fn keep_while(mut self, keep: Arc<dyn KeepAlive>, interval: Duration) -> Self {
        self.keep = Some((keep, interval));
        self
    }

    fn arm(&self, factory: EventFactory, expires: SystemTime, margin: Duration) -> Timer {
        let (cancel, keep) = (CancellationToken::new(), self.keep.clone());
        let options = EventOptions::default().unless(cancel.clone());
        let task = Task::spawn(async move {
            tokio::time::sleep(clock::until(expires).saturating_sub(margin)).await;
            if let Some((keep, interval)) = keep {
                while let Some(connection) = factory.connection() {
                    if !keep.keep(&connection).await {
                        break;
                    }
                    tracing::info!(id = factory.id(), "the client's token has expired, its connection is alive: kept");
                    tokio::time::sleep(interval).await;
                }
            }
            for attempt in 1..=ATTEMPTS {
                match factory.close(options.clone()).await {
                    Ok(Fired::Skipped) => return,
                    Ok(_) => return tracing::info!(id = factory.id(), "closed: the client stopped refreshing"),
                    Err(error) => tracing::warn!(id = factory.id(), %error, attempt, "closing after expiry"),
                }
                tokio::time::sleep(PAUSE * attempt).await;
            }
        });
        Timer { cancel, task }
    }
}

#[async_trait::async_trait]
impl Element for Timeout {
    fn name(&self) -> &'static str {
        NAME
    }

    async fn request(&self, call: RequestCall, next: Next) -> Result<Connection, Error> {
        let metadata = call.ctx.metadata(NAME, call.id())?.clone();
        let (postponed, factory) = (call.ctx.postpone(), call.ctx.factory.clone());
        let connection = next.request(call).await?;
        let Some(expires) = path::segment(&connection, -1).and_then(|caller| caller.expires) else {
            let id = connection.id.clone();
            let error = Error::new(NAME, id, "expiration for the previous path segment cannot be nil")
                .with_code(Code::InvalidArgument);
            // A refresh leaves what an earlier request established.
            return Err(match metadata.contains(&self.key) {
                true => error,
                false => unwind(&next, connection, &postponed, error).await,
            });
        };
        if let Some(factory) = factory {
            let margin = postponed.time().unwrap_or_default();
            let timer = self.arm(factory, clock::from_timestamp(&expires), margin);
            if let Some(old) = metadata.insert(&self.key, Some(timer)).flatten() {
                old.cancel.cancel();
            }
        }
        Ok(connection)
    }

    async fn close(&self, call: CloseCall, next: Next) -> Result<(), Error> {
        let timer = call.ctx.metadata(NAME, call.id())?.remove(&self.key).flatten();
        let result = next.close(call).await;
        if let Some(timer) = timer {
            match &result {
                // Perhaps nobody has heard of it: the timer tries again.
                Err(error) if matches!(error.code(), Code::DeadlineExceeded | Code::Cancelled) => timer.task.detach(),
                _ => timer.cancel.cancel(),
            }
        }
        result
    }
}

#[cfg(test)]
mod tests;
