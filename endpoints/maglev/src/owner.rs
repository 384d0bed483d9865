//! Whose the maps are: each network namespace has a directory of its own, and one process at a time changes what is in it.
#![allow(unsafe_code)] // SAFETY: flock and getsockopt; each call states why its pointers are valid.

use std::fs::File;
use std::io;
use std::net::UdpSocket;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::error::Error;
use crate::kernel::check_bpffs;

/// How often a directory that is removed meanwhile is made again.
const ATTEMPTS: u32 = 10;

/// How the names of these directories begin.
pub(crate) const NAMESPACE: &str = "netns-";

/// The directory below `base` that belongs to the network namespace of this thread. Pods of one node can share `base` (the node's
/// BPF file system) without finding each other's maps; a process that is restarted in its pod finds those of the one before.
///
/// # Errors
/// The kernel does not tell which namespace this is.
pub fn own_directory(base: &Path) -> Result<PathBuf, Error> {
    let failed = |source| Error::Io { path: "/proc/thread-self/ns/net".into(), source };
    let name = match cookie() {
        Ok(cookie) => format!("{NAMESPACE}{cookie}"),
        // Before 5.14. The number is given to another namespace after this one.
        Err(_) => format!("{NAMESPACE}i{}", std::fs::metadata("/proc/thread-self/ns/net").map_err(failed)?.ino()),
    };
    Ok(base.join(name))
}

/// The number of this thread's network namespace, which no other one gets until the node starts anew.
fn cookie() -> io::Result<u64> {
    const SO_NETNS_COOKIE: libc::c_int = 71;
    let socket = UdpSocket::bind("0.0.0.0:0").or_else(|_| UdpSocket::bind("[::]:0"))?;
    let mut cookie = 0u64;
    let mut length = size_of::<u64>() as libc::socklen_t;
    // SAFETY: a live value of the length given.
    let result = unsafe {
        let value = (&raw mut cookie).cast();
        libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, SO_NETNS_COOKIE, value, &raw mut length)
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(cookie) }
}

/// Whether no process runs a load balancer with this directory.
///
/// # Errors
/// [`Error::Held`], with the process; or the directory cannot be read.
pub fn vacant(directory: &Path) -> Result<(), Error> {
    Lock::existing(directory).map(drop)
}

/// Held by the one process that may change the maps of a directory; the kernel lets go of it when the process is gone, however it
/// went.
#[derive(Debug)]
pub(crate) struct Lock {
    _directory: File,
}

impl Lock {
    /// Makes `directory` with `below` in it, and takes it.
    pub(crate) fn take(directory: &Path, below: &Path) -> Result<Self, Error> {
        for _ in 0..ATTEMPTS {
            std::fs::create_dir_all(below).map_err(|source| Error::Io { path: below.to_owned(), source })?;
            check_bpffs(below)?;
            // Somebody who removed it may have been about to end.
            if let Some(lock) = Self::existing(directory)?
                && below.exists()
            {
                return Ok(lock);
            }
        }
        let source = io::Error::other("is removed again and again");
        Err(Error::Io { path: directory.to_owned(), source })
    }

    /// Takes a directory if it is there.
    pub(crate) fn existing(directory: &Path) -> Result<Option<Self>, Error> {
        let failed = |source| Error::Io { path: directory.to_owned(), source };
        let file = match File::open(directory) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            file => file.map_err(failed)?,
        };
        let inode = |meta: std::fs::Metadata| (meta.dev(), meta.ino());
        let ours = inode(file.metadata().map_err(failed)?);
        // SAFETY: a live descriptor.
        if unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } != 0 {
            let source = io::Error::last_os_error();
            return Err(match source.kind() {
                io::ErrorKind::WouldBlock => Error::Held { directory: directory.to_owned(), holder: holder(ours) },
                _ => failed(source),
            });
        }
        let same = std::fs::metadata(directory).is_ok_and(|meta| inode(meta) == ours);
        Ok(same.then_some(Lock { _directory: file }))
    }
}

/// Who holds the lock on a file, in words.
fn holder((device, inode): (u64, u64)) -> String {
    let locks = std::fs::read_to_string("/proc/locks").unwrap_or_default();
    match process(&locks, libc::major(device), libc::minor(device), inode) {
        Some(pid) => {
            let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            format!("process {pid} ({})", name.trim())
        }
        None => "a process that cannot be seen from here (of another container)".to_owned(),
    }
}

/// The process that holds a `flock` on a file, from the text of `/proc/locks`.
fn process(locks: &str, major: u32, minor: u32, inode: u64) -> Option<u32> {
    let file = format!("{major:02x}:{minor:02x}:{inode}");
    let holds = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words.as_slice() {
            [_, "FLOCK", _, "WRITE", pid, at, ..] if *at == file => pid.parse().ok(),
            _ => None,
        }
    };
    locks.lines().find_map(holds)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_holder_is_read_from_the_list_of_locks() {
        let locks = "1: POSIX  ADVISORY  WRITE 9 00:1f:77 0 EOF\n\
                     2: FLOCK  ADVISORY  WRITE 4711 00:1f:77 0 EOF\n\
                     2: -> FLOCK  ADVISORY  WRITE 4712 00:1f:77 0 EOF\n\
                     3: FLOCK  ADVISORY  READ 4713 00:1f:78 0 EOF\n";
        assert_eq!(process(locks, 0, 31, 77), Some(4711));
        assert_eq!(process(locks, 0, 31, 78), None);
        assert_eq!(process(locks, 1, 31, 77), None);
        assert_eq!(process("", 0, 31, 77), None);
    }

    #[test]
    fn namespaces_have_directories_of_their_own() {
        let here = own_directory(Path::new("/b")).unwrap();
        let again = std::thread::spawn(|| own_directory(Path::new("/b")).unwrap()).join().unwrap();
        assert_eq!(here, again);
        let elsewhere = || {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            own_directory(Path::new("/b")).unwrap()
        };
        let there = std::thread::spawn(elsewhere).join().unwrap();
        assert!(here != there && there.parent() == here.parent());
        // Names with dots are refused by a BPF file system.
        assert!(!there.file_name().unwrap().to_str().unwrap().contains('.'));
    }
}
