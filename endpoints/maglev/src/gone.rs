//! What load balancers of pods that are gone have left on a BPF file system that outlives them.
//!
//! Beside its maps a load balancer pins a link to its network namespace. Such a link does not keep the namespace alive, and
//! once that is gone the kernel says so of the link: nothing can forward by these maps any more, and nobody can come back to them. No
//! other sign is sure: a lock is free as well while a load balancer that was killed is started again, and maps of an interface that is just
//! being replaced are attached nowhere.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use crate::error::Error;
use crate::kernel::{check_bpffs, remove_pins};
use crate::owner::{Lock, NAMESPACE, own_directory};
use crate::sys;

/// Name of the link in a load balancer's directory.
const LINK: &str = "namespace";

/// Pins the link to the network namespace of this thread, unless it is there. What an earlier namespace has left under the same
/// name is removed: its maps are about interfaces that do not exist.
pub(crate) fn mark(directory: &Path) -> Result<(), Error> {
    let link = directory.join(LINK);
    let failed = |source| Error::Io { path: link.clone(), source };
    match of(directory).map_err(failed)? {
        Some(true) => {
            remove_pins(directory, None)?;
            unmark(directory)?;
        }
        Some(false) => return Ok(()),
        None => {}
    }
    let namespace = File::open("/proc/thread-self/ns/net").map_err(failed)?;
    sys::pin_namespace(&namespace, &link).map_err(failed)
}

/// Whether the namespace of a directory is gone; `None`: nothing there tells.
fn of(directory: &Path) -> io::Result<Option<bool>> {
    match sys::linked_namespace(&directory.join(LINK)) {
        Ok(inode) => Ok(Some(inode == 0)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e),
    }
}

/// Takes the link away, at the end of forwarding on request.
pub(crate) fn unmark(directory: &Path) -> Result<(), Error> {
    let link = directory.join(LINK);
    match std::fs::remove_file(&link) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(Error::Io { path: link, source: e }),
        _ => Ok(()),
    }
}

/// Removes the directories below `base` (see [`own_directory`]) whose network namespaces are gone, and tells which. Those that another
/// process looks after stay, and those of which it is not known. One that cannot be removed does not keep the others.
///
/// # Errors
/// `base` is no BPF file system or cannot be read, or the first that could not be removed.
pub fn remove_gone(base: &Path) -> Result<Vec<PathBuf>, Error> {
    match check_bpffs(base) {
        // No load balancer has been here.
        Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        checked => checked?,
    }
    let own = own_directory(base)?;
    let entries = std::fs::read_dir(base).map_err(|source| Error::Io { path: base.to_owned(), source })?;
    let ours = |path: &PathBuf| path.file_name().and_then(|n| n.to_str()).is_some_and(|n| n.starts_with(NAMESPACE));
    let others = entries.flatten().map(|entry| entry.path()).filter(|path| ours(path) && *path != own);
    let (mut removed, mut failed) = (Vec::new(), None);
    for directory in others {
        match remove_if_gone(&directory) {
            Ok(false) => {}
            Ok(true) => {
                tracing::info!(directory = %directory.display(), "removed: its network namespace is gone");
                removed.push(directory);
            }
            Err(error) => _ = failed.get_or_insert(error),
        }
    }
    failed.map_or(Ok(removed), Err)
}

/// Removes a directory if its network namespace is gone and no process looks after it; `false`: it stays.
fn remove_if_gone(directory: &Path) -> Result<bool, Error> {
    // A link that cannot be read tells nothing.
    let gone = || matches!(of(directory), Ok(Some(true)));
    // Asked first without the lock, which would be in the way of one that starts.
    if !gone() {
        return Ok(false);
    }
    let _lock = match Lock::existing(directory) {
        Ok(Some(lock)) => lock,
        Ok(None) | Err(Error::Held { .. }) => return Ok(false),
        Err(error) => return Err(error),
    };
    // Before 5.14 a later namespace can have taken over the name, and been here meanwhile.
    if !gone() {
        return Ok(false);
    }
    remove_pins(directory, None)?;
    // The link goes last: what has not been removed with it is found again.
    unmark(directory)?;
    std::fs::remove_dir(directory).map_err(|source| Error::Io { path: directory.to_owned(), source })?;
    Ok(true)
}
