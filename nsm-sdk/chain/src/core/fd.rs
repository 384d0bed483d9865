//! File descriptors that travel beside the messages of one transport connection.

use std::{
    collections::HashMap,
    fmt, io,
    os::fd::{AsFd, OwnedFd},
    sync::{Arc, Mutex, PoisonError},
};
use tokio::{sync::Notify, time::Instant};

/// A transport that can carry descriptors.
#[async_trait::async_trait]
pub trait FdChannel: Send + Sync + 'static {
    /// Queues a descriptor for the other side, ahead of the next message. Returns its (device, inode).
    fn queue(&self, fd: OwnedFd) -> io::Result<(u64, u64)>;
    /// A descriptor of that (device, inode), waiting for it to arrive until `deadline`.
    async fn take(&self, dev: u64, ino: u64, deadline: Option<Instant>) -> io::Result<OwnedFd>;
}

/// Shared handle of an [`FdChannel`].
#[derive(Clone)]
pub struct FdTransceiver(Arc<dyn FdChannel>);

impl fmt::Debug for FdTransceiver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("FdTransceiver")
    }
}

impl FdTransceiver {
    /// Wraps a transport's channel.
    pub fn new(channel: impl FdChannel) -> Self {
        Self(Arc::new(channel))
    }

    /// Two ends joined in memory, for chains that meet in one process.
    pub fn pair() -> (Self, Self) {
        let (left, right) = (Arc::<Table>::default(), Arc::<Table>::default());
        (
            Self::new(Memory { mine: left.clone(), theirs: right.clone() }),
            Self::new(Memory { mine: right, theirs: left }),
        )
    }

    /// See [`FdChannel::queue`].
    pub fn queue(&self, fd: OwnedFd) -> io::Result<(u64, u64)> {
        self.0.queue(fd)
    }

    /// See [`FdChannel::take`].
    pub async fn take(&self, dev: u64, ino: u64, deadline: Option<Instant>) -> io::Result<OwnedFd> {
        self.0.take(dev, ino, deadline).await
    }
}

/// The (device, inode) pair that names a descriptor on the wire.
pub(crate) fn inode_of(fd: impl AsFd) -> io::Result<(u64, u64)> {
    let stat = rustix::fs::fstat(fd)?;
    #[allow(clippy::useless_conversion)] // The width of st_dev differs between architectures.
    Ok((stat.st_dev.into(), stat.st_ino.into()))
}

#[derive(Default)]
struct Table {
    arrived: Mutex<HashMap<(u64, u64), OwnedFd>>,
    news: Notify,
}

struct Memory {
    mine: Arc<Table>,
    theirs: Arc<Table>,
}

#[async_trait::async_trait]
impl FdChannel for Memory {
    fn queue(&self, fd: OwnedFd) -> io::Result<(u64, u64)> {
        let inode = inode_of(&fd)?;
        self.theirs.arrived.lock().unwrap_or_else(PoisonError::into_inner).insert(inode, fd);
        self.theirs.news.notify_waiters();
        Ok(inode)
    }

    async fn take(&self, dev: u64, ino: u64, deadline: Option<Instant>) -> io::Result<OwnedFd> {
        loop {
            let news = self.mine.news.notified();
            // Not kept: this channel lives as long as the NSM connection and would hold a dead pod's namespace.
            let arrived = self.mine.arrived.lock().unwrap_or_else(PoisonError::into_inner).remove(&(dev, ino));
            if let Some(fd) = arrived {
                return Ok(fd);
            }
            match deadline {
                None => news.await,
                Some(deadline) => tokio::time::timeout_at(deadline, news).await.map_err(|_| {
                    io::Error::new(io::ErrorKind::TimedOut, format!("descriptor inode://{dev}/{ino} did not arrive"))
                })?,
            }
        }
    }
}
