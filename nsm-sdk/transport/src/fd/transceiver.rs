//! What was received and what is to be sent.

use std::{
    collections::{HashMap, VecDeque},
    fmt, io,
    os::fd::{AsFd, OwnedFd},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};
use tokio::{sync::Notify, time::Instant};

/// Descriptors kept per connection. A peer that sends more loses the oldest: nobody may use up the process's table of open files.
const MAX_KEPT: usize = 1024;
/// Descriptors waiting to be sent per connection.
const MAX_QUEUED: usize = 1024;

/// Device and inode, as in `struct stat`.
type Inode = (u64, u64);

/// Handle to the descriptors of one connection. Cheap to clone; usable from any task.
#[derive(Clone, Default)]
pub struct FdTransceiver(Arc<Shared>);

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    news: Notify,
}

#[derive(Default)]
struct State {
    queued: VecDeque<OwnedFd>,
    arrived: HashMap<Inode, OwnedFd>,
    order: VecDeque<Inode>,
    closed: bool,
}

impl fmt::Debug for FdTransceiver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.state();
        f.debug_struct("FdTransceiver")
            .field("queued", &state.queued.len())
            .field("arrived", &state.arrived.len())
            .field("closed", &state.closed)
            .finish()
    }
}

impl FdTransceiver {
    /// Queues a descriptor: it travels with the next bytes that are written. Returns the (device, inode) to name it by.
    ///
    /// # Errors
    /// The descriptor cannot be examined, the connection is closed, or too many descriptors wait already.
    pub fn queue(&self, fd: OwnedFd) -> io::Result<Inode> {
        let inode = inode_of(&fd)?;
        let mut state = self.state();
        if state.closed {
            return Err(closed(inode));
        }
        if state.queued.len() >= MAX_QUEUED {
            return Err(io::Error::other(format!("{MAX_QUEUED} descriptors wait to be sent already")));
        }
        state.queued.push_back(fd);
        Ok(inode)
    }

    /// A duplicate of the descriptor with that (device, inode); waits until it arrives.
    ///
    /// # Errors
    /// `TimedOut` at the deadline, `ConnectionAborted` when the connection ends first, or the duplicate cannot be made.
    pub async fn take(&self, dev: u64, ino: u64, deadline: Option<Instant>) -> io::Result<OwnedFd> {
        loop {
            let news = self.0.news.notified();
            tokio::pin!(news);
            // Listen before looking: what arrives in between must not be missed.
            news.as_mut().enable();
            {
                let state = self.state();
                if let Some(fd) = state.arrived.get(&(dev, ino)) {
                    return fd.try_clone();
                }
                if state.closed {
                    return Err(closed((dev, ino)));
                }
            }
            match deadline {
                None => news.await,
                Some(deadline) => tokio::time::timeout_at(deadline, news).await.map_err(|_| {
                    let text = format!("descriptor inode://{dev}/{ino} did not arrive in time");
                    io::Error::new(io::ErrorKind::TimedOut, text)
                })?,
            }
        }
    }

    /// Closes the kept descriptor; duplicates that were taken stay open. Returns whether there was one.
    pub fn release(&self, dev: u64, ino: u64) -> bool {
        let mut state = self.state();
        state.order.retain(|inode| *inode != (dev, ino));
        state.arrived.remove(&(dev, ino)).is_some()
    }

    /// Whether the connection has ended.
    pub fn is_closed(&self) -> bool {
        self.state().closed
    }

    pub(super) fn arrived(&self, fd: OwnedFd) {
        let Ok(inode) = inode_of(&fd) else { return };
        let mut state = self.state();
        if state.arrived.contains_key(&inode) {
            return;
        }
        if state.order.len() >= MAX_KEPT
            && let Some(oldest) = state.order.pop_front()
        {
            state.arrived.remove(&oldest);
            tracing::warn!(kept = MAX_KEPT, "a peer sends more descriptors than are kept, oldest dropped");
        }
        state.arrived.insert(inode, fd);
        state.order.push_back(inode);
        drop(state);
        self.0.news.notify_waiters();
    }

    pub(super) fn next_queued(&self) -> Option<OwnedFd> {
        self.state().queued.pop_front()
    }

    pub(super) fn requeue(&self, fd: OwnedFd) {
        self.state().queued.push_front(fd);
    }

    pub(super) fn close(&self) {
        let mut state = self.state();
        state.closed = true;
        state.queued.clear();
        drop(state);
        self.0.news.notify_waiters();
    }

    /// What arrived stays for takers until the stream itself is gone.
    pub(super) fn clear(&self) {
        let mut state = self.state();
        state.arrived.clear();
        state.order.clear();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn closed((dev, ino): Inode) -> io::Error {
    let text = format!("connection closed before descriptor inode://{dev}/{ino} was passed");
    io::Error::new(io::ErrorKind::ConnectionAborted, text)
}

/// The (device, inode) pair that names a descriptor on the wire.
pub fn inode_of(fd: impl AsFd) -> io::Result<Inode> {
    let stat = rustix::fs::fstat(fd)?;
    #[allow(clippy::useless_conversion)] // The width of both differs between architectures.
    Ok((stat.st_dev.into(), stat.st_ino.into()))
}
