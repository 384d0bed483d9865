//! Network namespaces as handles.
//!
//! A socket stays for ever in the namespace it was created in. So only its creation needs a thread that
//! enters the namespace (`setns` acts on a thread, never do it on a worker of the runtime); afterwards the
//! socket is used from anywhere. A [`Netns`] opens its netlink socket that way, once, on first use.
//!
//! A handle and its socket keep the namespace alive, so a long-lived process (a forwarder) holds them for
//! the time of one operation only. Handles of one namespace share their state while any of them lives.

use std::collections::HashMap;
use std::fmt;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::time::Duration;

use nix::sched::{CloneFlags, setns, unshare};
use tokio::sync::{OnceCell, oneshot};

use crate::Error;
use crate::netlink::Netlink;

/// How long one waits for others that configure the same namespace.
const CONFIGURING: Duration = Duration::from_secs(20);
/// `NSFS_MAGIC`: the file system of namespaces.
const NSFS: u64 = 0x6e73_6673;

/// What makes a namespace the same namespace: device and inode number of its nsfs file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NetnsId {
    /// `st_dev` of nsfs.
    pub dev: u64,
    /// Inode number.
    pub ino: u64,
}

impl fmt::Display for NetnsId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "netns {}:{}", self.dev, self.ino)
    }
}

struct Inner {
    fd: OwnedFd,
    id: NetnsId,
    netlink: OnceCell<Netlink>,
    configuring: tokio::sync::Mutex<()>,
}

/// A handle of one network namespace. Cheap to clone; the namespace lives at least as long.
#[derive(Clone)]
pub struct Netns(Arc<Inner>);

impl fmt::Debug for Netns {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0.id)
    }
}

type Cache = Mutex<HashMap<NetnsId, Weak<Inner>>>;

fn cache() -> &'static Cache {
    static CACHE: OnceLock<Cache> = OnceLock::new();
    CACHE.get_or_init(Cache::default)
}

impl Netns {
    /// The namespace of the calling thread.
    pub fn current() -> Result<Self, Error> {
        Self::from_path("/proc/thread-self/ns/net")
    }

    /// Opens a namespace file: `/proc/<pid>/ns/net`, `/run/netns/<name>`, `/proc/self/fd/<n>`.
    pub fn from_path(path: impl AsRef<Path>) -> Result<Self, Error> {
        let path = path.as_ref();
        // What a caller sends may be any file, and opening some of them waits or does something.
        let kind = rustix::fs::statfs(path);
        let kind = kind.map_err(|e| Error::io(format!("open network namespace {}", path.display()), e.into()))?;
        if kind.f_type as u64 != NSFS {
            return Err(Error::Invalid(format!("{} is no network namespace", path.display())));
        }
        let file = File::open(path).map_err(|e| Error::io(format!("open network namespace {}", path.display()), e))?;
        Self::from_open(file.into(), &path.display().to_string())
    }

    /// A namespace named under `/run/netns`, as `ip netns add` makes them.
    pub fn named(name: &str) -> Result<Self, Error> {
        Self::from_path(Path::new("/run/netns").join(name))
    }

    /// Opens the `inodeURL` parameter of a KERNEL mechanism; only scheme `file` names something that can be opened.
    pub fn from_url(url: &str) -> Result<Self, Error> {
        match url.strip_prefix("file://") {
            Some(path) if path.starts_with('/') => Self::from_path(path),
            _ => Err(Error::Invalid(format!("network namespace {url:?}: not a file:///path URL"))),
        }
    }

    /// Takes a received descriptor. It may be `O_PATH` (NSM sends these), which `setns` refuses: so it is opened again
    /// through `/proc/thread-self/fd`.
    pub fn from_fd(fd: impl AsFd) -> Result<Self, Error> {
        use std::os::fd::AsRawFd;
        Self::from_path(format!("/proc/thread-self/fd/{}", fd.as_fd().as_raw_fd()))
    }

    /// A new, nameless namespace that ends with its last handle. Its loopback interface is down.
    pub fn anonymous() -> Result<Self, Error> {
        let thread = std::thread::Builder::new().name("netns-new".into()).spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET)
                .map_err(|e| Error::io("create network namespace", std::io::Error::from(e)))?;
            Self::current()
        });
        let thread = thread.map_err(|e| Error::io("start a thread", e))?;
        thread.join().unwrap_or_else(|_| Err(Error::Invalid("create network namespace: thread panicked".into())))
    }

    fn from_open(fd: OwnedFd, name: &str) -> Result<Self, Error> {
        let stat = rustix::fs::fstat(&fd).map_err(|e| Error::io(format!("stat {name}"), e.into()))?;
        let id = NetnsId { dev: stat.st_dev as u64, ino: stat.st_ino as u64 };
        let mut cache = cache().lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(inner) = cache.get(&id).and_then(Weak::upgrade) {
            return Ok(Netns(inner));
        }
        cache.retain(|_, weak| weak.strong_count() > 0);
        let inner = Arc::new(Inner { fd, id, netlink: OnceCell::new(), configuring: tokio::sync::Mutex::default() });
        cache.insert(id, Arc::downgrade(&inner));
        Ok(Netns(inner))
    }

    /// Which namespace this is.
    pub fn id(&self) -> NetnsId {
        self.0.id
    }

    /// The open namespace file.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.0.fd.as_fd()
    }

    /// A second descriptor of the same open namespace file.
    pub fn try_clone_fd(&self) -> Result<OwnedFd, Error> {
        self.0.fd.try_clone().map_err(|e| Error::io(format!("duplicate descriptor of {}", self.0.id), e))
    }

    /// Runs `f` on a thread of its own inside the namespace and waits for it asynchronously. Sockets that `f` opens stay in the
    /// namespace; `/proc/sys/net` and child processes are the namespace's. The runtime's context is entered, so `f` may make
    /// asynchronous sockets.
    pub async fn run<T, F>(&self, f: F) -> Result<T, Error>
    where
        T: Send + 'static,
        F: FnOnce() -> T + Send + 'static,
    {
        let (tx, rx) = oneshot::channel();
        let this = self.clone();
        let runtime = tokio::runtime::Handle::current();
        let body = move || {
            let _guard = runtime.enter();
            let result = this.enter().map(|()| f());
            // Whoever gets the result may expect that nothing else holds the namespace.
            drop(this);
            // The receiver may have left; the work is done all the same.
            let _ = tx.send(result);
        };
        std::thread::Builder::new().name("netns".into()).spawn(body).map_err(|e| Error::io("start a thread", e))?;
        rx.await.unwrap_or_else(|_| Err(Error::Invalid(format!("work in {} panicked", self.0.id))))
    }

    /// As [`run`](Self::run) for callers outside of a runtime: blocks until `f` has returned.
    pub fn run_blocking<T, F>(&self, f: F) -> Result<T, Error>
    where
        T: Send,
        F: FnOnce() -> T + Send,
    {
        std::thread::scope(|scope| {
            scope
                .spawn(|| self.enter().map(|()| f()))
                .join()
                .unwrap_or_else(|_| Err(Error::Invalid(format!("work in {} panicked", self.0.id))))
        })
    }

    /// Moves the calling thread, which nobody else may use, into the namespace.
    fn enter(&self) -> Result<(), Error> {
        setns(&self.0.fd, CloneFlags::CLONE_NEWNET).map_err(|e| match e {
            nix::errno::Errno::EINVAL => Error::Invalid(format!("{} is no network namespace", self.0.id)),
            e => Error::io(format!("enter {}", self.0.id), std::io::Error::from(e)),
        })
    }

    /// Held while someone reads, decides and writes what must not be decided twice (a free routing table).
    ///
    /// # Errors
    /// Somebody else has held it for longer than any work in a namespace should take.
    pub(crate) async fn configuring(&self) -> Result<tokio::sync::MutexGuard<'_, ()>, Error> {
        self.configuring_within(CONFIGURING).await
    }

    async fn configuring_within(&self, limit: Duration) -> Result<tokio::sync::MutexGuard<'_, ()>, Error> {
        let late = crate::netlink::sleep(limit)?;
        tokio::select! {
            biased;
            turn = self.0.configuring.lock() => Ok(turn),
            () = late => Err(Error::Timeout { what: format!("turn to configure {}", self.0.id), limit }),
        }
    }

    #[cfg(test)]
    pub(crate) fn with_netlink(&self, netlink: Netlink) -> Netns {
        let fd = self.try_clone_fd().unwrap();
        let inner =
            Inner { fd, id: self.0.id, netlink: OnceCell::new_with(Some(netlink)), configuring: Default::default() };
        Netns(Arc::new(inner))
    }

    /// The netlink socket of this namespace, opened on first use and shared by all handles of it. It works on the runtime that
    /// first asked for it.
    pub async fn netlink(&self) -> Result<&Netlink, Error> {
        self.0.netlink.get_or_try_init(|| async { self.run(Netlink::open).await? }).await
    }
}

/// Runs `f` on a thread of its own in the namespace of the process (of its first thread), wherever the caller is.
pub(crate) fn in_own<T: Send>(f: impl FnOnce() -> T + Send) -> Result<T, Error> {
    let work = || {
        let own = Netns::from_path("/proc/self/ns/net")?;
        if own.id() != Netns::current()?.id() {
            own.enter()?;
        }
        Ok(f())
    };
    let failed = || Error::Invalid("work in the namespace of the process panicked".into());
    std::thread::scope(|scope| scope.spawn(work).join()).unwrap_or_else(|_| Err(failed()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;

    #[test]
    fn work_in_the_own_namespace_is_there_from_wherever_it_is_asked_for() {
        let (own, other) = (Netns::from_path("/proc/self/ns/net").unwrap(), Netns::anonymous().unwrap());
        let here = || Netns::current().unwrap().id();
        let (inside, back) = other.run_blocking(|| (here(), in_own(here).unwrap())).unwrap();
        assert_eq!((inside, back), (other.id(), own.id()));
    }

    /// The first socket of a process may well be opened in a pod.
    #[test]
    fn threads_of_netlink_do_not_stay_in_a_namespace() {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let other = Netns::anonymous().unwrap();
        runtime.block_on(async { assert!(other.netlink().await.unwrap().links().await.unwrap().len() == 1) });
        let ino = other.id().ino;
        drop(other);
        let inside = |task: &std::path::Path| {
            use std::os::unix::fs::MetadataExt;
            std::fs::metadata(task.join("ns/net")).is_ok_and(|found| found.ino() == ino)
        };
        let count = || {
            let tasks = std::fs::read_dir("/proc/self/task").unwrap().flatten().map(|task| task.path());
            tasks.filter(|task| inside(task)).count()
        };
        // The thread that has opened the socket may not have ended yet.
        let begin = std::time::Instant::now();
        while count() > 0 {
            assert!(begin.elapsed() < std::time::Duration::from_secs(5), "{} threads are still there", count());
            std::thread::yield_now();
        }
    }

    #[test]
    fn handles_of_one_namespace_share_state() {
        let a = Netns::current().unwrap();
        let b = Netns::from_url("file:///proc/thread-self/ns/net").unwrap();
        assert!(Arc::ptr_eq(&a.0, &b.0));
        assert!(Netns::from_url("inode://4/4026531840").is_err());
        assert!(Netns::from_url("file://relative").is_err());
    }

    #[test]
    fn o_path_descriptor_is_reopened() {
        let ns = Netns::anonymous().unwrap();
        let path = format!("/proc/self/fd/{}", ns.fd().as_raw_fd());
        let opath = rustix::fs::open(&*path, rustix::fs::OFlags::PATH, rustix::fs::Mode::empty()).unwrap();
        let again = Netns::from_fd(&opath).unwrap();
        assert_eq!(again.id(), ns.id());
        let inside = again.run_blocking(|| Netns::current().unwrap().id()).unwrap();
        assert_eq!(inside, ns.id());
        assert_ne!(Netns::current().unwrap().id(), ns.id());
    }

    /// A file that is no namespace is said to be none; a pipe without a writer is not waited for.
    #[tokio::test]
    async fn only_network_namespaces_are_opened() {
        let folder = tempfile::tempdir().unwrap();
        let (file, pipe) = (folder.path().join("file"), folder.path().join("pipe"));
        std::fs::write(&file, "").unwrap();
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
        for path in [file.as_path(), &pipe, Path::new("/dev/null")] {
            let error = Netns::from_path(path).unwrap_err();
            assert!(matches!(&error, Error::Invalid(text) if text.contains("no network namespace")), "{error}");
        }
        let mounts = Netns::from_path("/proc/self/ns/mnt").unwrap();
        let error = mounts.netlink().await.err().unwrap();
        assert!(matches!(&error, Error::Invalid(text) if text.contains("no network namespace")), "{error}");
    }

    #[tokio::test]
    async fn who_holds_a_namespace_up_does_not_do_so_for_ever() {
        let ns = Netns::anonymous().unwrap();
        let turn = ns.configuring().await.unwrap();
        let error = ns.configuring_within(Duration::from_millis(50)).await.unwrap_err();
        assert!(matches!(&error, Error::Timeout { what, .. } if what.contains(&ns.id().to_string())), "{error}");
        drop(turn);
        drop(ns.configuring_within(Duration::from_millis(50)).await.unwrap());
    }

    #[tokio::test]
    async fn namespace_ends_with_its_last_handle() {
        let ns = Netns::anonymous().unwrap();
        let links = ns.netlink().await.unwrap().links().await.unwrap();
        assert!(links.iter().any(|l| l.name == "lo"));
        let id = ns.id();
        drop(ns);
        let again = cache().lock().unwrap().get(&id).and_then(Weak::upgrade);
        assert!(again.is_none());
    }
}
