//! What was received and what is to be sent.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use std::{
    collections::{HashMap, VecDeque},
    fmt, io,
    os::fd::{AsFd, OwnedFd},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};
use tokio::{sync::Notify, time::Instant};

/// Descriptors kept per connection. A peer that sends more loses the oldest: nobody may use up the process's table of open files.
const MAX_KEPT: usize = 1024;
/// The same as long as nobody knows who the peer is. What is more is not kept.
const MAX_KEPT_OF_UNKNOWN: usize = 4;
/// All connections together keep no more than this part of the files that the process may have open.
const SHARE: u64 = 2;
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
    arrived: HashMap<Inode, Kept>,
    order: VecDeque<Inode>,
    authenticated: bool,
    closed: bool,
}

/// A descriptor that counts for the process's budget.
struct Kept(OwnedFd, &'static Budget);

impl Drop for Kept {
    fn drop(&mut self) {
        self.1.kept.fetch_sub(1, Ordering::Relaxed);
    }
}

/// How many descriptors are kept, by all connections together.
#[derive(Debug, Default)]
struct Budget {
    kept: AtomicUsize,
}

static BUDGET: Budget = Budget { kept: AtomicUsize::new(0) };

impl Budget {
    /// Keeps the descriptor, unless there are `most` already.
    fn keep(&'static self, fd: OwnedFd, most: usize) -> Option<Kept> {
        let kept = Kept(fd, self);
        (self.kept.fetch_add(1, Ordering::Relaxed) < most).then_some(kept)
    }
}

/// Sets the number of files that this process may have open to the highest that it may set: every connection and every network
/// namespace that is passed is one. Returns that number. Children inherit it.
///
/// # Errors
/// The operating system refuses.
pub fn raise_open_files() -> io::Result<u64> {
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit })?;
    Ok(limit.maximum.unwrap_or(u64::MAX))
}

fn most_kept() -> usize {
    let open = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    usize::try_from(open / SHARE).unwrap_or(usize::MAX)
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
                if let Some(Kept(fd, _)) = state.arrived.get(&(dev, ino)) {
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

    /// The peer has shown who it is: from now on as much is kept for it as for anybody.
    pub(crate) fn authenticated(&self) {
        self.state().authenticated = true;
    }

    pub(super) fn arrived(&self, fd: OwnedFd) {
        self.keep(fd, &BUDGET, most_kept());
    }

    fn keep(&self, fd: OwnedFd, budget: &'static Budget, most: usize) {
        let Ok(inode) = inode_of(&fd) else { return };
        let mut state = self.state();
        if state.arrived.contains_key(&inode) {
            return;
        }
        if !state.authenticated && state.order.len() >= MAX_KEPT_OF_UNKNOWN {
            tracing::warn!(
                kept = MAX_KEPT_OF_UNKNOWN,
                "somebody unknown sends more descriptors than are kept, dropped"
            );
            return;
        }
        if state.order.len() >= MAX_KEPT
            && let Some(oldest) = state.order.pop_front()
        {
            state.arrived.remove(&oldest);
            tracing::warn!(kept = MAX_KEPT, "a peer sends more descriptors than are kept, oldest dropped");
        }
        let Some(kept) = budget.keep(fd, most) else {
            tracing::warn!(kept = most, "peers send more descriptors than this process keeps, dropped");
            return;
        };
        state.arrived.insert(inode, kept);
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

#[cfg(test)]
mod tests {
    use super::*;

    fn descriptors(count: usize) -> Vec<OwnedFd> {
        // Each pipe has an inode of its own.
        (0..count).map(|_| rustix::pipe::pipe().unwrap().0).collect()
    }

    #[test]
    fn all_connections_together_keep_no_more_than_their_share() {
        static OWN: Budget = Budget { kept: AtomicUsize::new(0) };
        let kept = |fds: &FdTransceiver| fds.state().arrived.len();
        let streams = [FdTransceiver::default(), FdTransceiver::default()];
        streams.iter().for_each(FdTransceiver::authenticated);
        for (fds, count) in streams.iter().zip([5, 3]) {
            descriptors(5).into_iter().for_each(|fd| fds.keep(fd, &OWN, 8));
            assert_eq!(kept(fds), count);
        }
        // What one gives back, another one may have.
        let first = streams[0].state().order[0];
        assert!(streams[0].release(first.0, first.1));
        descriptors(2).into_iter().for_each(|fd| streams[1].keep(fd, &OWN, 8));
        assert_eq!((kept(&streams[1]), OWN.kept.load(Ordering::Relaxed)), (4, 8));
        streams[0].clear();
        drop(streams);
        assert_eq!(OWN.kept.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn little_is_kept_for_a_peer_that_nobody_knows_yet() {
        let fds = FdTransceiver::default();
        descriptors(20).into_iter().for_each(|fd| fds.arrived(fd));
        assert_eq!(fds.state().arrived.len(), MAX_KEPT_OF_UNKNOWN);
        fds.authenticated();
        descriptors(20).into_iter().for_each(|fd| fds.arrived(fd));
        assert_eq!(fds.state().arrived.len(), MAX_KEPT_OF_UNKNOWN + 20);
    }
}
