//! Reaches the next hop.

use crate::{
    CloseCall, Connection, Connector, Context, Element, Error, Key, Metadata, Next, REMOTE, Remote, RequestCall, Side,
};
use std::{sync::Arc, time::Duration};
use tokio::time::Instant;
use tonic::Code;

/// Connects to `ctx.client_url` and leaves the remote in the context and in the metadata.
///
/// The connection is kept from request to request while it works. It is made anew when the URL changes (the old hop is
/// told to close first), when it is known to be broken or older than the own SVID, and once more when a request finds it broken or
/// is refused on it: the other side may have been given a new identity, which only a new handshake shows.
pub struct Dial {
    key: Key<Option<Remote>>,
    dialer: Dialer,
}

#[derive(Clone)]
struct Dialer {
    connector: Arc<dyn Connector>,
    timeout: Duration,
}

const NAME: &str = "dial";
/// Bound for connecting when neither the call nor the settings give one.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(15);
/// What telling the old hop may take: a part of the request's time, but neither nearly nothing nor long.
const LEAVE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(5));
/// See [`LEAVE`]: a third.
const SHARE: u32 = 3;

impl Dial {
    /// An element that uses `connector`; `timeout` bounds each attempt to connect, zero means only the call does.
    pub fn new(connector: Arc<dyn Connector>, timeout: Duration) -> Self {
        Self { key: Key::new(Side::Client), dialer: Dialer { connector, timeout } }
    }

    async fn request_at(
        &self,
        remote: Remote,
        call: &RequestCall,
        metadata: &Metadata,
        next: &Next,
    ) -> Result<Connection, Error> {
        metadata.insert(&self.key, Some(remote.clone()));
        metadata.insert(&REMOTE, remote.clone());
        let mut call = call.clone();
        call.ctx.remote = Some(remote);
        next.request(call).await
    }

    /// Tells the hop that a connection has left that it is not needed any more; its answer does not matter. This has time of its own:
    /// neither is it left out because the request is nearly over, nor does a hop that is gone eat all the time of the new one. It is
    /// waited for, because the elements below would take a close that comes later for one of the new connection.
    async fn leave(&self, old: Remote, call: &RequestCall, next: &Next) {
        let time = call.ctx.time_left().map_or(LEAVE.1, |left| (left / SHARE).clamp(LEAVE.0, LEAVE.1));
        let ctx = Context { deadline: Some(Instant::now() + time), ..call.ctx.postpone().context() };
        let mut close = CloseCall::new(call.connection().into_owned(), ctx);
        let id = call.id();
        let remote = match old.alive() {
            true => Ok(old),
            false => self.dialer.connect(old.url(), &close.ctx, id).await,
        };
        let Ok(remote) = remote else { return };
        tracing::debug!(id, url = remote.url(), "leaving this next hop");
        close.ctx.client_url = Some(remote.url().to_owned());
        close.ctx.remote = Some(remote);
        if let Err(error) = next.close(close).await {
            tracing::debug!(%error, "closing at the previous next hop");
        }
    }
}

impl Dialer {
    async fn connect(&self, url: &str, ctx: &Context, id: &str) -> Result<Remote, Error> {
        let mut deadline = ctx.deadline_or(DEFAULT_TIMEOUT);
        if !self.timeout.is_zero() {
            deadline = deadline.min(Instant::now() + self.timeout);
        }
        let failed = |code, text: &str| Error::new(NAME, id, format!("failed to dial {url}: {text}")).with_code(code);
        let connect = tokio::time::timeout_at(deadline, self.connector.connect(url, deadline));
        match ctx.bounded(DEFAULT_TIMEOUT, connect).await {
            Ok(Ok(result)) => result.map_err(|error| failed(error.code(), error.message())),
            Ok(Err(_)) => Err(failed(Code::DeadlineExceeded, "context deadline exceeded")),
            Err(code) => Err(failed(code, "given up")),
        }
    }
}

#[async_trait::async_trait]
impl Element for Dial {
    fn name(&self) -> &'static str {
        NAME
    }

    async fn request(&self, call: RequestCall, next: Next) -> Result<Connection, Error> {
        let Some(url) = call.ctx.client_url.clone() else { return next.request(call).await };
        let id = call.id().to_owned();
        let metadata = call.ctx.metadata(NAME, &id)?.clone();
        let mut known = metadata.get(&self.key).flatten();
        if known.is_none() && metadata.contains(&REMOTE) {
            return next.request(call).await; // clientconn has set one
        }
        let fresh = known.is_none();
        if let Some(old) = known.take_if(|remote| remote.url() != url) {
            self.leave(old, &call, &next).await;
        }
        let usable = |remote: &Remote| remote.alive() && remote.current();
        let reused = known.as_ref().is_some_and(usable);
        let remote = match known.filter(usable) {
            Some(remote) => remote,
            None => self.dialer.connect(&url, &call.ctx, &id).await?,
        };
        let mut result = self.request_at(remote.clone(), &call, &metadata, &next).await;
        let in_time = call.ctx.time_left().is_none_or(|left| !left.is_zero());
        let refused = result.as_ref().is_err_and(|error| error.code() == Code::PermissionDenied);
        // One that is shared may have been there before this connection.
        let outdated = refused && (remote.distrust() || reused);
        if result.is_err() && (outdated || reused && !remote.alive()) && in_time {
            // Repeating is safe: the ids make it the same connection.
            tracing::debug!(id, url, refused, "connecting to the next hop anew");
            if let Ok(remote) = self.dialer.connect(&url, &call.ctx, &id).await {
                result = self.request_at(remote, &call, &metadata, &next).await;
            }
        }
        if result.is_err() && fresh {
            metadata.remove(&self.key);
            metadata.remove(&REMOTE);
        }
        result
    }

    async fn close(&self, mut call: CloseCall, next: Next) -> Result<(), Error> {
        let metadata = call.ctx.metadata(NAME, call.id())?.clone();
        let known = metadata.get(&self.key).flatten();
        if known.is_none() && metadata.contains(&REMOTE) {
            return next.close(call).await;
        }
        let url = call.ctx.client_url.clone().or_else(|| known.as_ref().map(|remote| remote.url().to_owned()));
        let Some(url) = url else { return next.close(call).await };
        let remote = match known.filter(|remote| remote.alive() && remote.url() == url) {
            Some(remote) => Ok(remote),
            None => self.dialer.connect(&url, &call.ctx, call.id()).await,
        };
        match remote {
            Ok(remote) => call.ctx.remote = Some(remote),
            // The elements below still have to clean up.
            Err(error) => tracing::info!(%error, "closing without the next hop"),
        }
        let result = next.close(call).await;
        metadata.remove(&self.key);
        metadata.remove(&REMOTE);
        result
    }
}

#[cfg(test)]
mod tests;
