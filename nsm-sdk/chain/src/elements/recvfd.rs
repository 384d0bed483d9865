//! Receives the descriptor of a network namespace that a message names, and keeps it with the connection.

use super::kernel_mechanism::INODE_URL;
use crate::{
    CloseCall, Connection, Context, Element, Error, FdTransceiver, Key, Mechanism, Metadata, Next, RequestCall, Side,
};
use std::{
    collections::HashMap,
    os::fd::{AsRawFd, OwnedFd},
    sync::Arc,
    time::Duration,
};
use tonic::Code;

/// Wait for a descriptor when the call has no deadline.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(15);
/// Wait for the descriptor that comes with a close.
const CLOSE_TIMEOUT: Duration = Duration::from_millis(300);
const NAME: &str = "recvfd";

/// Descriptors of one connection by the `inode://` URL they came under. Dropping the table closes them.
#[derive(Clone, Debug, Default)]
struct Files(HashMap<String, Arc<OwnedFd>>);

impl Files {
    /// Replaces an `inode://` URL by one of the open descriptor, which is awaited if it is not there yet.
    async fn open(
        &mut self,
        mechanism: &mut Mechanism,
        fds: &FdTransceiver,
        ctx: &Context,
        id: &str,
    ) -> Result<(), Error> {
        let Some(url) = mechanism.parameters.get_mut(INODE_URL) else { return Ok(()) };
        let Some(inode) = url.strip_prefix("inode://") else { return Ok(()) };
        if !self.0.contains_key(url) {
            let numbers = inode.split_once('/').and_then(|(dev, ino)| Some((dev.parse().ok()?, ino.parse().ok()?)));
            let Some((dev, ino)) = numbers else {
                let text = format!("{url} is not of the form inode://<device>/<inode>");
                return Err(Error::new(NAME, id, text).with_code(Code::InvalidArgument));
            };
            let take = fds.take(dev, ino, Some(ctx.deadline_or(DEFAULT_TIMEOUT)));
            let lost =
                |code, text: String| Error::new(NAME, id, format!("no descriptor for {url}: {text}")).with_code(code);
            let fd = match ctx.bounded(DEFAULT_TIMEOUT, take).await {
                Ok(Ok(fd)) => fd,
                Ok(Err(error)) if error.kind() == std::io::ErrorKind::TimedOut => {
                    return Err(lost(Code::DeadlineExceeded, error.to_string()));
                }
                Ok(Err(error)) => return Err(lost(Code::Unavailable, error.to_string())),
                Err(code) => return Err(lost(code, "it did not arrive in time".to_owned())),
            };
            self.0.insert(url.clone(), Arc::new(fd));
        }
        if let Some(fd) = self.0.get(url) {
            *url = file_url(fd);
        }
        Ok(())
    }

    /// The inverse of `open`. Returns the `inode://` URL.
    fn restore(&self, mechanism: Option<&mut Mechanism>) -> Option<String> {
        let url = mechanism?.parameters.get_mut(INODE_URL)?;
        let inode = self.0.iter().find(|(_, fd)| file_url(fd) == *url).map(|(inode, _)| inode.clone());
        match inode {
            Some(inode) => {
                url.clone_from(&inode);
                Some(inode)
            }
            None => Some(url.clone()),
        }
    }

    /// Closes all but one.
    fn keep(&mut self, inode: Option<&str>) {
        self.0.retain(|known, _| Some(known.as_str()) == inode);
    }
}

/// Valid in this process only, as long as the descriptor is open.
fn file_url(fd: &OwnedFd) -> String {
    format!("file:///proc/self/fd/{}", fd.as_raw_fd())
}

/// For what callers send: below it namespaces are `file://` URLs of open descriptors, above it they are what the
/// caller named.
#[derive(Debug)]
pub struct RecvFdServer {
    key: Key<Files>,
    /// Set if nothing is kept between operations: where the client side of the chain keeps its descriptors.
    release: Option<Option<Key<Files>>>,
}

impl Default for RecvFdServer {
    fn default() -> Self {
        Self::new()
    }
}

impl RecvFdServer {
    /// An element without descriptors.
    pub fn new() -> Self {
        Self { key: Key::new(Side::Server), release: None }
    }

    /// Closes all descriptors at the end of each operation, also those of the `client` side of the same process, so
    /// that a connection does not hold the namespace of a dead pod. Peers send them again with each operation. What the
    /// chain remembers of a mechanism must not contain a `file://` URL then.
    #[must_use]
    pub fn releasing(mut self, client: Option<&RecvFdClient>) -> Self {
        self.release = Some(client.map(|client| client.0.clone()));
        self
    }

    fn release(&self, metadata: &Metadata) {
        if let Some(client) = &self.release {
            metadata.remove(&self.key);
            if let Some(client) = client {
                metadata.remove(client);
            }
        }
    }
}

#[async_trait::async_trait]
impl Element for RecvFdServer {
    fn name(&self) -> &'static str {
        NAME
    }

    async fn request(&self, mut call: RequestCall, next: Next) -> Result<Connection, Error> {
        let Some(fds) = call.ctx.fds.clone() else { return next.request(call).await };
        let (id, ctx) = (call.id().to_owned(), call.ctx.clone());
        let metadata = ctx.metadata(NAME, &id)?;
        let known = metadata.get(&self.key);
        let mut files = known.clone().unwrap_or_default();
        let request = &mut call.message;
        let chosen = request.connection.as_mut().and_then(|connection| connection.mechanism.as_mut());
        for mechanism in request.mechanism_preferences.iter_mut().chain(chosen) {
            files.open(mechanism, &fds, &ctx, &id).await?;
        }
        // In place before next: a close by an element below finds them.
        metadata.insert(&self.key, files.clone());
        match next.request(call).await {
            Ok(mut connection) => {
                let used = files.restore(connection.mechanism.as_mut());
                files.keep(used.as_deref());
                metadata.insert(&self.key, files);
                self.release(metadata);
                Ok(connection)
            }
            Err(error) => {
                // What an established connection stands on stays open.
                match known {
                    Some(known) => _ = metadata.insert(&self.key, known),
                    None => _ = metadata.remove(&self.key),
                }
                self.release(metadata);
                Err(error)
            }
        }
    }

    async fn close(&self, mut call: CloseCall, next: Next) -> Result<(), Error> {
        let mut files = call.ctx.metadata(NAME, call.id())?.remove(&self.key).unwrap_or_default();
        if let (Some(_), Some(fds), Some(mechanism)) = (&self.release, &call.ctx.fds, &mut call.message.mechanism) {
            // The caller has sent it along, unless its namespace is gone or nobody has called.
            let ctx = call.ctx.clone().with_timeout(CLOSE_TIMEOUT);
            if let Err(error) = files.open(mechanism, fds, &ctx, &call.message.id).await {
                tracing::debug!(%error, "closing without the namespace");
            }
        }
        if let Some(url) = call.message.mechanism.as_mut().and_then(|m| m.parameters.get_mut(INODE_URL))
            && let Some(fd) = files.0.get(url)
        {
            *url = file_url(fd);
        }
        let result = next.close(call).await;
        drop(files); // not earlier: the elements below use them
        result
    }
}

/// For what the next hop answers.
#[derive(Debug)]
pub struct RecvFdClient(Key<Files>);

impl Default for RecvFdClient {
    fn default() -> Self {
        Self::new()
    }
}

impl RecvFdClient {
    /// An element without descriptors.
    pub fn new() -> Self {
        Self(Key::new(Side::Client))
    }
}

#[async_trait::async_trait]
impl Element for RecvFdClient {
    fn name(&self) -> &'static str {
        NAME
    }

    async fn request(&self, call: RequestCall, next: Next) -> Result<Connection, Error> {
        let Some(fds) = call.ctx.remote.as_ref().and_then(|remote| remote.fds()) else {
            return next.request(call).await;
        };
        let (id, ctx) = (call.id().to_owned(), call.ctx.clone());
        let metadata = ctx.metadata(NAME, &id)?;
        let mut connection = next.request(call).await?;
        let mut files = metadata.get(&self.0).unwrap_or_default();
        if let Some(mechanism) = &mut connection.mechanism {
            if let Err(error) = files.open(mechanism, &fds, &ctx, &id).await {
                return Err(match metadata.contains(&self.0) {
                    true => error,
                    false => crate::unwind(&next, connection, &ctx.postpone(), error).await,
                });
            }
            let url = mechanism.parameters.get(INODE_URL).cloned().unwrap_or_default();
            files.0.retain(|_, fd| file_url(fd) == url);
        }
        metadata.insert(&self.0, files);
        Ok(connection)
    }

    async fn close(&self, call: CloseCall, next: Next) -> Result<(), Error> {
        let files = call.ctx.metadata(NAME, call.id())?.remove(&self.0);
        let result = next.close(call).await;
        drop(files);
        result
    }
}

#[cfg(test)]
mod tests;
