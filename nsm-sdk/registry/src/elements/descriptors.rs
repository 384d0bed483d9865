//! Sockets of endpoints as descriptors: `unix:///path` on this side, `inode://<device>/<inode>` on the wire.

use crate::{Call, Element, Error, Events, Next, Query, chain::Table};
use futures_util::StreamExt;
use meridio_proto::nsm::registry::NetworkServiceEndpoint;
use nsm_transport::{Address, FdTransceiver};
use rustix::fs::{Mode, OFlags};
use std::{
    os::fd::{AsRawFd, OwnedFd},
    sync::Arc,
    time::Duration,
};
use tokio::time::Instant;

type Endpoint = NetworkServiceEndpoint;

/// How long a call without a deadline waits for a descriptor that its URL promises.
const WAIT: Duration = Duration::from_secs(5);

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

/// The URL under which this process reaches a descriptor it holds.
fn own_url(fd: &OwnedFd) -> String {
    format!("unix:///proc/{}/fd/{}", std::process::id(), fd.as_raw_fd())
}

/// The descriptor of each endpoint, by the inode it is for: a newer socket of the same endpoint closes the older one.
type Files = Table<((u64, u64), Arc<OwnedFd>)>;

/// The held descriptor of that endpoint and inode, or the one that arrives.
async fn receive(
    element: &'static str,
    files: &Files,
    name: &str,
    key: (u64, u64),
    fds: &FdTransceiver,
    deadline: Option<Instant>,
) -> Result<Arc<OwnedFd>, Error> {
    if let Some((_, fd)) = files.get(name).filter(|(held, _)| *held == key) {
        fds.release(key.0, key.1);
        return Ok(fd);
    }
    let deadline = deadline.unwrap_or_else(|| Instant::now() + WAIT);
    let fd = fds
        .take(key.0, key.1, Some(deadline))
        .await
        .map_err(|cause| Error::new(element, name, format_args!("the socket inode://{}/{}: {cause}", key.0, key.1)))?;
    // The connection would keep a copy open for as long as it lives.
    fds.release(key.0, key.1);
    Ok(Arc::new(fd))
}

/// Server side: takes the sockets that local endpoints register.
#[derive(Default)]
pub struct RecvFdServer {
    files: Files,
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
        let fd = receive("recvfd", &self.files, &name, key, &fds, call.ctx.deadline).await?;
        call.message.url = own_url(&fd);
        // An endpoint that was registered before keeps its socket when a refresh fails: the registry above may be away.
        let mut answer = next.register(call).await?;
        self.files.insert(&answer.name, (key, fd));
        answer.url = outside;
        Ok(answer)
    }

    async fn unregister(&self, mut call: Call<Endpoint>, next: Next<Endpoint>) -> Result<(), Error> {
        let held = self.files.get(&call.message.name);
        if let Some((_, fd)) = &held {
            call.message.url = own_url(fd);
        }
        let name = call.message.name.clone();
        next.unregister(call).await?;
        self.files.remove(&name);
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

/// Client side: takes the sockets of the endpoints it finds.
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
        let events = next.find(call).await?;
        Ok(Box::pin(events.then(move |event| {
            let (files, fds) = (files.clone(), fds.clone());
            async move {
                let mut event = event?;
                let name = event.object.name.clone();
                if event.deleted {
                    files.remove(&name);
                } else if let Some(key) = parse_inode(&event.object.url) {
                    let fd = receive("recvfd", &files, &name, key, &fds, deadline).await?;
                    event.object.url = own_url(&fd);
                    files.insert(&name, (key, fd));
                }
                Ok(event)
            }
        })))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inode_urls() {
        for (url, expected) in [
            ("inode://4/4026532548", Some((4, 4026532548))),
            ("inode://4", None),
            ("inode://x/1", None),
            ("unix:///a", None),
        ] {
            assert_eq!(parse_inode(url), expected, "{url}");
        }
        assert_eq!(socket_path("unix:///a/b"), Some("/a/b".into()));
        assert_eq!(socket_path("tcp://127.0.0.1:1"), None);
    }
}
