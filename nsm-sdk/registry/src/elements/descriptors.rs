//! Sockets of endpoints as descriptors: `unix:///path` on this side, `inode://<device>/<inode>` on the wire.

use crate::{Call, Element, Error, Events, Next, Object, Query, chain::Table, elements::expire::Forget};
use futures_util::StreamExt;
use nsm_identity::clock;
use nsm_proto::registry::NetworkServiceEndpoint;
use nsm_transport::{Address, FdTransceiver};
use rustix::fs::{Mode, OFlags};
use std::{
    os::fd::{AsRawFd, OwnedFd},
    sync::Arc,
    time::{Duration, SystemTime},
};
use tokio::time::Instant;

type Endpoint = NetworkServiceEndpoint;

/// How long a call without a deadline waits for a descriptor that its URL promises.
const WAIT: Duration = Duration::from_secs(5);

/// How long the socket of a found endpoint is held after the endpoint's end: the registry that would tell of its next life may just
/// be away. Those that tell no end are held as long after they were last found.
const KEPT: Duration = Duration::from_secs(600);

/// The path of a unix URL, unless it is relative to something the other side does not know.
fn socket_path(url: &str) -> Option<std::path::PathBuf> {
    match Address::parse(url) {
        Ok(Address::Unix(path)) if url.starts_with("unix:") => Some(path),
        _ => None,
    }
}

/// The (device, inode) of `inode://<device>/<inode>`.
pub fn parse_inode(url: &str) -> Option<(u64, u64)> {
    let (device, inode) = url.strip_prefix("inode://")?.split_once('/')?;
    Some((device.parse().ok()?, inode.parse().ok()?))
}

/// Queues the socket's descriptor and returns the URL that names it. `None` if the URL is no socket's.
fn send(element: &'static str, endpoint: &Endpoint, fds: &FdTransceiver) -> Result<Option<String>, Error> {
    let Some(path) = socket_path(&endpoint.url) else { return Ok(None) };
    let fail = |cause: std::io::Error| {
        Error::new(element, &endpoint.name, format_args!("cannot pass the socket {}: {cause}", path.display()))
    };
    let fd = rustix::fs::open(&path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).map_err(|e| fail(e.into()))?;
    let (device, inode) = fds.queue(fd).map_err(fail)?;
    Ok(Some(format!("inode://{device}/{inode}")))
}

/// A socket that this process holds for an endpoint.
struct Held {
    key: (u64, u64),
    fd: OwnedFd,
    /// When nobody has told of it any more; `None` where something else ends it.
    until: Option<SystemTime>,
}

impl Held {
    /// The URL under which this process reaches it.
    fn url(&self) -> String {
        format!("unix:///proc/{}/fd/{}", std::process::id(), self.fd.as_raw_fd())
    }
}

/// The sockets of endpoints by name. A newer socket of an endpoint takes the place of the older one under the same number:
/// its URL stays, and who is connected by it does not take the endpoint for another one.
#[derive(Default)]
struct Files(Table<Held>);

impl Files {
    /// The URL of the endpoint's socket with that inode, which is awaited if it is not held yet.
    async fn url(
        &self,
        element: &'static str,
        name: &str,
        key: (u64, u64),
        fds: &FdTransceiver,
        deadline: Option<Instant>,
    ) -> Result<String, Error> {
        let fail = |cause: std::io::Error| {
            let code = match cause.kind() {
                std::io::ErrorKind::TimedOut => tonic::Code::DeadlineExceeded,
                _ => tonic::Code::Unavailable,
            };
            let text = format_args!("the socket inode://{}/{}: {cause}", key.0, key.1).to_string();
            Error::new(element, name, text).with_code(code)
        };
        let known = self.0.with(|files| files.get(name).filter(|held| held.key == key).map(Held::url));
        let url = match known {
            Some(url) => url,
            None => {
                let deadline = deadline.unwrap_or_else(|| Instant::now() + WAIT);
                let fd = fds.take(key.0, key.1, Some(deadline)).await.map_err(fail)?;
                self.put(name, key, fd).map_err(fail)?
            }
        };
        Ok(url)
    }

    fn put(&self, name: &str, key: (u64, u64), fd: OwnedFd) -> std::io::Result<String> {
        self.0.with(|files| match files.get_mut(name) {
            Some(held) => {
                rustix::io::dup3(&fd, &mut held.fd, rustix::io::DupFlags::CLOEXEC)?;
                held.key = key;
                Ok(held.url())
            }
            None => {
                let held = Held { key, fd, until: None };
                let url = held.url();
                files.insert(name.to_owned(), held);
                Ok(url)
            }
        })
    }

    /// Lets go those whose time is over.
    fn sweep(&self) {
        let now = clock::now();
        self.0.with(|files| files.retain(|_, held| held.until.is_none_or(|until| now < until)));
    }

    /// The endpoint has been found: its socket is held until some time after its end.
    fn found(&self, endpoint: &Endpoint) {
        let now = clock::now();
        let end = endpoint.expiration().map_or(now, |end| end.max(now));
        self.0.with(|files| {
            if let Some(held) = files.get_mut(&endpoint.name) {
                held.until = end.checked_add(KEPT);
            }
        });
        self.sweep();
    }

    fn contains(&self, name: &str) -> bool {
        self.0.with(|files| files.contains_key(name))
    }
}

/// Server side: takes the sockets that local endpoints register.
#[derive(Default)]
pub struct RecvFdServer {
    files: Files,
}

impl RecvFdServer {
    /// Holds the socket of an endpoint that a former run of this process had; returns the URL that it has now.
    pub(crate) fn adopt(&self, name: &str, key: (u64, u64), fd: OwnedFd) -> std::io::Result<String> {
        self.files.put(name, key, fd)
    }
}

impl Forget for RecvFdServer {
    fn forget(&self, name: &str) {
        self.files.0.remove(name);
    }
}

#[async_trait::async_trait]
impl Element<Endpoint> for RecvFdServer {
    fn name(&self) -> &'static str {
        "recvfd"
    }

    async fn register(&self, mut call: Call<Endpoint>, next: Next<Endpoint>) -> Result<Endpoint, Error> {
        let outside = call.message.url.clone();
        let (Some(fds), Some(key)) = (call.ctx.fds.clone(), parse_inode(&outside)) else {
            return next.register(call).await;
        };
        let name = call.message.name.clone();
        let known = self.files.contains(&name);
        call.message.url = self.files.url("recvfd", &name, key, &fds, call.ctx.deadline).await?;
        match next.register(call).await {
            Ok(mut answer) => {
                answer.url = outside;
                Ok(answer)
            }
            Err(error) => {
                // One that was registered before keeps its socket: the registry above may just be away.
                if !known {
                    self.files.0.remove(&name);
                }
                Err(error)
            }
        }
    }

    async fn unregister(&self, mut call: Call<Endpoint>, next: Next<Endpoint>) -> Result<(), Error> {
        let name = call.message.name.clone();
        if let Some(url) = self.files.0.with(|files| files.get(&name).map(Held::url)) {
            call.message.url = url;
        }
        next.unregister(call).await?;
        self.files.0.remove(&name);
        Ok(())
    }
}

/// Server side: hands the sockets of local endpoints to whoever finds them.
#[derive(Clone, Copy, Debug, Default)]
pub struct SendFdServer;

#[async_trait::async_trait]
impl Element<Endpoint> for SendFdServer {
    fn name(&self) -> &'static str {
        "sendfd"
    }

    async fn find(&self, call: Call<Query<Endpoint>>, next: Next<Endpoint>) -> Result<Events<Endpoint>, Error> {
        let Some(fds) = call.ctx.fds.clone() else { return next.find(call).await };
        let events = next.find(call).await?;
        Ok(Box::pin(events.map(move |event| {
            let mut event = event?;
            if !event.deleted {
                match send("sendfd", &event.object, &fds) {
                    Ok(Some(url)) => event.object.url = url,
                    Ok(None) => {}
                    // The endpoint has gone in the meantime; its entry will follow.
                    Err(cause) => tracing::debug!(%cause, "a found endpoint's socket is not there"),
                }
            }
            Ok(event)
        })))
    }
}

/// Client side: passes the own socket along with its registration.
#[derive(Clone, Copy, Debug, Default)]
pub struct SendFdClient;

impl SendFdClient {
    fn replace(call: &mut Call<Endpoint>) -> Result<String, Error> {
        let own = call.message.url.clone();
        if let Some(fds) = call.ctx.link.as_ref().and_then(|link| link.fds.as_ref())
            && let Some(url) = send("sendfd", &call.message, fds)?
        {
            call.message.url = url;
        }
        Ok(own)
    }
}

#[async_trait::async_trait]
impl Element<Endpoint> for SendFdClient {
    fn name(&self) -> &'static str {
        "sendfd"
    }

    async fn register(&self, mut call: Call<Endpoint>, next: Next<Endpoint>) -> Result<Endpoint, Error> {
        let own = Self::replace(&mut call)?;
        let mut answer = next.register(call).await?;
        answer.url = own;
        Ok(answer)
    }

    async fn unregister(&self, mut call: Call<Endpoint>, next: Next<Endpoint>) -> Result<(), Error> {
        // The socket may be gone already; the name is what counts.
        if let Err(cause) = Self::replace(&mut call) {
            tracing::debug!(%cause, "unregistering without the socket");
        }
        next.unregister(call).await
    }
}

/// Client side: takes the sockets of the endpoints it finds, and holds each until its endpoint is removed or has ended long ago.
#[derive(Default)]
pub struct RecvFdClient {
    files: Arc<Files>,
}

#[async_trait::async_trait]
impl Element<Endpoint> for RecvFdClient {
    fn name(&self) -> &'static str {
        "recvfd"
    }

    async fn find(&self, call: Call<Query<Endpoint>>, next: Next<Endpoint>) -> Result<Events<Endpoint>, Error> {
        let Some(fds) = call.ctx.link.as_ref().and_then(|link| link.fds.clone()) else { return next.find(call).await };
        let (files, deadline) = (self.files.clone(), call.ctx.deadline);
        files.sweep();
        let events = next.find(call).await?;
        Ok(Box::pin(events.then(move |event| {
            let (files, fds) = (files.clone(), fds.clone());
            async move {
                let mut event = event?;
                let name = event.object.name.clone();
                if event.deleted {
                    files.0.remove(&name);
                } else if let Some(key) = parse_inode(&event.object.url) {
                    event.object.url = files.url("recvfd", &name, key, &fds, deadline).await?;
                    files.found(&event.object);
                }
                Ok(event)
            }
        })))
    }
}

#[cfg(test)]
mod tests;
