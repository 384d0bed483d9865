//! Where a manager's local endpoints are, kept over its restarts.
//!
//! To the registry above an endpoint is at its manager's URL; where it really is only the manager knows, and many of its
//! endpoints come back no sooner than their next refresh. What is taken over has to be what it was: the same socket (device, inode
//! and time of change) that still accepts connections, not expired, and registered above for the same SPIFFE id.

use crate::{
    Call, Element, Error, NetworkServiceEndpoint, Next, Object,
    elements::{authorize::Owners, descriptors::RecvFdServer, localbypass::LocalBypass},
    store::{Expect, Store, StoreError},
};
use nsm_identity::clock;
use nsm_transport::Address;
use prost::Message;
use rustix::fs::{Mode, OFlags};
use std::{
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::{FileTypeExt, MetadataExt},
    },
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};
use tokio::{net, time::timeout};

const NAME: &str = "remember";
const TABLE: &str = "local endpoint";
/// What connecting to an endpoint may take before it counts as gone. It is on this node.
const PROBE: Duration = Duration::from_millis(500);

/// An endpoint as it is kept.
#[derive(Clone, PartialEq, Message)]
struct Known {
    #[prost(string, tag = "1")]
    name: String,
    /// As it was registered.
    #[prost(string, tag = "2")]
    url: String,
    /// What was behind a URL that only the former process understood.
    #[prost(message, optional, tag = "3")]
    socket: Option<Socket>,
    /// SPIFFE id of who registered it.
    #[prost(string, tag = "4")]
    owner: String,
    #[prost(message, optional, tag = "5")]
    expires: Option<prost_types::Timestamp>,
}

/// A unix socket in the file system of some process.
#[derive(Clone, PartialEq, Message)]
struct Socket {
    #[prost(string, tag = "1")]
    path: String,
    #[prost(uint64, tag = "2")]
    device: u64,
    #[prost(uint64, tag = "3")]
    inode: u64,
    /// The process that registered it: its view of the file system may be another one than ours.
    #[prost(int32, tag = "4")]
    pid: i32,
    /// Time of its last change, nanoseconds since 1970: numbers of inodes are given again.
    #[prost(int64, tag = "5")]
    changed: i64,
}

impl Known {
    /// `None` for what nobody but this very process reaches.
    fn of(endpoint: &NetworkServiceEndpoint, pid: Option<i32>) -> Option<Self> {
        let (name, url) = (endpoint.name.clone(), endpoint.url.clone());
        let Ok(address) = Address::parse(&url) else { return None };
        let held = match &address {
            Address::Unix(path) => path.starts_with("/proc").then_some(path),
            Address::Tcp(_) => None,
        };
        let socket = match held {
            Some(path) => Some(Socket::behind(path, pid.unwrap_or_default())?),
            None => None,
        };
        let owner = endpoint.path_ids.first().cloned().unwrap_or_default();
        Some(Self { name, url, socket, owner, expires: endpoint.expiration_time })
    }

    fn end(&self) -> Option<SystemTime> {
        NetworkServiceEndpoint { expiration_time: self.expires, ..Default::default() }.expiration()
    }
}

fn nanoseconds(seconds: i64, rest: i64) -> i64 {
    seconds.wrapping_mul(1_000_000_000).wrapping_add(rest)
}

impl Socket {
    /// What a descriptor of this process refers to.
    fn behind(descriptor: &Path, pid: i32) -> Option<Self> {
        let (path, file) = (std::fs::read_link(descriptor).ok()?, std::fs::metadata(descriptor).ok()?);
        file.file_type().is_socket().then_some(())?;
        let changed = nanoseconds(file.ctime(), file.ctime_nsec());
        Some(Self { path: path.to_str()?.to_owned(), device: file.dev(), inode: file.ino(), pid, changed })
    }

    /// Opens it: where we see its path, or where the process sees it that registered it.
    fn open(&self) -> io::Result<OwnedFd> {
        let relative = self.path.trim_start_matches('/');
        let elsewhere = Path::new("/proc").join(self.pid.to_string()).join("root").join(relative);
        let places: [PathBuf; 2] = [Path::new("/").join(relative), elsewhere];
        let same = |place: &PathBuf| {
            let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let file = std::fs::File::from(rustix::fs::open(place, flags, Mode::empty()).ok()?);
            let found = file.metadata().ok()?;
            let changed = nanoseconds(found.ctime(), found.ctime_nsec());
            let same = (found.dev(), found.ino(), changed) == (self.device, self.inode, self.changed);
            (found.file_type().is_socket() && same).then(|| file.into())
        };
        places.iter().find_map(same).ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "its socket is gone"))
    }
}

/// The element: keeps what is registered, in a store or not at all. Stands directly above `localbypass`.
pub struct Remember {
    store: Option<Arc<dyn Store>>,
}

impl Remember {
    /// Keeps local endpoints in a table of `store`; without a store it does nothing.
    pub fn new(store: Option<Arc<dyn Store>>) -> Self {
        Self { store }
    }

    async fn keep(&self, known: &Known) -> Result<(), StoreError> {
        match &self.store {
            Some(store) => store.put_if(TABLE, &known.name, known.encode_to_vec(), Expect::Any).await.map(drop),
            None => Ok(()),
        }
    }

    async fn forget(&self, name: &str) -> Result<(), StoreError> {
        match &self.store {
            Some(store) => store.delete_if(TABLE, name, Expect::Any).await.map(drop),
            None => Ok(()),
        }
    }

    /// Takes over what a former run of this manager knew. Returns the names.
    pub(crate) async fn recall(
        &self,
        sockets: &RecvFdServer,
        bypass: &LocalBypass,
        owners: &Owners<NetworkServiceEndpoint>,
    ) -> Result<Vec<String>, StoreError> {
        let Some(store) = &self.store else { return Ok(Vec::new()) };
        let mut names = Vec::new();
        for record in store.list(TABLE).await?.0 {
            let known = Known::decode(record.value.as_slice()).unwrap_or_default();
            let until = known.end().filter(|end| clock::now() < *end && known.name == record.key);
            let reached = match until {
                Some(_) => reach(&known, sockets).await,
                None => Err(io::Error::new(io::ErrorKind::TimedOut, "it has expired")),
            };
            match (reached, until) {
                (Ok(url), Some(until)) => {
                    tracing::info!(endpoint = known.name, url, "taken over from the former run of this manager");
                    let path_ids = vec![known.owner.clone()];
                    owners.remember(NetworkServiceEndpoint {
                        name: known.name.clone(),
                        path_ids,
                        ..Default::default()
                    });
                    bypass.adopt(&known.name, url, known.owner, until);
                    names.push(known.name);
                }
                (Err(cause), _) => {
                    tracing::info!(endpoint = record.key, %cause, "not taken over from the former run of this manager");
                    self.forget(&record.key).await?;
                }
                (Ok(_), None) => {}
            }
        }
        Ok(names)
    }
}

/// The URL of an endpoint for this process, if the endpoint accepts connections.
async fn reach(known: &Known, sockets: &RecvFdServer) -> io::Result<String> {
    let late = |_| io::Error::from(io::ErrorKind::TimedOut);
    if let Some(socket) = &known.socket {
        let fd = socket.open()?;
        let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
        timeout(PROBE, net::UnixStream::connect(path)).await.map_err(late)??;
        return sockets.adopt(&known.name, (socket.device, socket.inode), fd);
    }
    match Address::parse(&known.url).map_err(io::Error::other)? {
        Address::Unix(path) => drop(timeout(PROBE, net::UnixStream::connect(path)).await.map_err(late)??),
        Address::Tcp(host) => drop(timeout(PROBE, net::TcpStream::connect(host)).await.map_err(late)??),
    }
    Ok(known.url.clone())
}

#[async_trait::async_trait]
impl Element<NetworkServiceEndpoint> for Remember {
    fn name(&self) -> &'static str {
        NAME
    }

    async fn register(
        &self,
        call: Call<NetworkServiceEndpoint>,
        next: Next<NetworkServiceEndpoint>,
    ) -> Result<NetworkServiceEndpoint, Error> {
        let known = self.store.is_some().then(|| Known::of(&call.message, call.ctx.pid)).flatten();
        let answer = next.register(call).await?;
        if let Some(known) = known {
            let expires = answer.expiration_time.or(known.expires);
            let known = Known { name: answer.name.clone(), expires, ..known };
            if let Err(cause) = self.keep(&known).await {
                tracing::warn!(endpoint = known.name, %cause, "it will not be known after a restart");
            }
        }
        Ok(answer)
    }

    async fn unregister(
        &self,
        call: Call<NetworkServiceEndpoint>,
        next: Next<NetworkServiceEndpoint>,
    ) -> Result<(), Error> {
        let name = call.message.name.clone();
        next.unregister(call).await?;
        if let Err(cause) = self.forget(&name).await {
            tracing::warn!(endpoint = name, %cause, "cannot be forgotten; it expires");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
