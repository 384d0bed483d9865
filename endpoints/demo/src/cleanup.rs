//! What a demo leaves, found by what it is marked with: an environment variable, a name prefix, a directory.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::fcntl::{Flock, FlockArg};

use crate::namespace::{NETNS_DIR, run_ip};
use crate::process::{MARKER, signal};

/// Prefix of every namespace of the demo `id`.
pub fn prefix(id: &str) -> String {
    format!("mdm-{id}-")
}

/// Directory of the demo `id`: sockets, identities, databases.
pub fn directory(id: &str) -> PathBuf {
    Path::new("/run/meridio-demo").join(id)
}

/// Held while a demo runs, so that a second one of the same id does not clean it away.
#[derive(Debug)]
pub struct Lock {
    path: PathBuf,
    _file: Flock<std::fs::File>,
}

impl Lock {
    /// Takes the lock of the demo `id`.
    ///
    /// # Errors
    /// If another process holds it.
    pub fn take(id: &str) -> Result<Self> {
        let directory = Path::new("/run/meridio-demo");
        std::fs::create_dir_all(directory).with_context(|| format!("make {}", directory.display()))?;
        let path = directory.join(format!("{id}.lock"));
        let file = std::fs::File::create(&path).with_context(|| format!("open {}", path.display()))?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(file) => Ok(Lock { path, _file: file }),
            Err(_) => bail!(
                "a demo with the id '{id}' is running already (lock {}); stop it or choose another --id",
                path.display()
            ),
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
        let _ = std::fs::remove_dir("/run/meridio-demo");
    }
}

/// Process ids below `/proc`, without our own.
fn processes() -> Vec<u32> {
    let own = std::process::id();
    let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
    entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).filter(|&pid| pid != own).collect()
}

fn marked(pid: u32, wanted: &[u8]) -> bool {
    std::fs::read(format!("/proc/{pid}/environ"))
        .is_ok_and(|environ| environ.split(|&byte| byte == 0).any(|entry| entry == wanted))
}

fn namespace_of(pid: u32, kind: &str) -> Option<(u64, u64)> {
    let link = std::fs::metadata(format!("/proc/{pid}/ns/{kind}")).ok()?;
    Some((link.dev(), link.ino()))
}

/// Processes whose mount namespace is `mount`: all of one pod, whoever started them.
pub fn in_mount_namespace(mount: (u64, u64)) -> Vec<u32> {
    processes().into_iter().filter(|&pid| namespace_of(pid, "mnt") == Some(mount)).collect()
}

/// Name of a process as the kernel knows it (`comm`).
pub fn command_name(pid: u32) -> Option<String> {
    std::fs::read_to_string(format!("/proc/{pid}/comm")).ok().map(|name| name.trim().to_owned())
}

/// Names of the network namespaces that begin with `prefix`.
pub fn namespaces(prefix: &str) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(NETNS_DIR) else { return Vec::new() };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| name.starts_with(prefix))
        .collect()
}

/// Kills every process that carries the marker of `id` or lives in one of its network namespaces. Returns how many there were.
pub fn kill_processes(id: &str) -> usize {
    let marker = format!("{MARKER}={id}").into_bytes();
    let networks: Vec<(u64, u64)> = namespaces(&prefix(id))
        .iter()
        .filter_map(|name| std::fs::metadata(Path::new(NETNS_DIR).join(name)).ok())
        .map(|link| (link.dev(), link.ino()))
        .collect();
    let ours =
        |pid: u32| marked(pid, &marker) || namespace_of(pid, "net").is_some_and(|network| networks.contains(&network));
    let found: Vec<u32> = processes().into_iter().filter(|&pid| ours(pid)).collect();
    kill_and_reap(&found, Duration::from_secs(5));
    found.len()
}

/// SIGKILL to each, then waits until they are gone; children of ours (orphans come to us) are reaped.
pub fn kill_and_reap(pids: &[u32], patience: Duration) {
    for &pid in pids {
        signal(pid, nix::sys::signal::Signal::SIGKILL);
    }
    let deadline = Instant::now() + patience;
    while Instant::now() < deadline {
        let left = pids.iter().filter(|&&pid| {
            let raw = nix::unistd::Pid::from_raw(i32::try_from(pid).unwrap_or(i32::MAX));
            let _ = nix::sys::wait::waitpid(raw, Some(nix::sys::wait::WaitPidFlag::WNOHANG));
            alive(pid)
        });
        if left.count() == 0 {
            return;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Whether the process exists and is not a zombie.
fn alive(pid: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat"))
        .ok()
        .and_then(|stat| stat.rsplit_once(") ").map(|(_, rest)| !rest.starts_with('Z')))
        .unwrap_or(false)
}

/// Mounts a BPF file system where nothing is mounted yet; [`sweep`] takes it away.
///
/// # Errors
/// If the place cannot be made or the kernel refuses.
pub fn mount_bpffs(place: &Path) -> Result<()> {
    std::fs::create_dir_all(place).with_context(|| format!("make {}", place.display()))?;
    let none: Option<&str> = None;
    nix::mount::mount(Some("bpf"), place, Some("bpf"), nix::mount::MsFlags::empty(), none)
        .with_context(|| format!("bpffs at {}", place.display()))
}

/// Takes away what is mounted below a directory.
fn unmount_below(directory: &Path) -> Result<usize> {
    let table = std::fs::read_to_string("/proc/self/mountinfo").context("read the table of mounts")?;
    let places: Vec<&Path> = table.lines().filter_map(|line| line.split(' ').nth(4).map(Path::new)).collect();
    let ours = places.into_iter().filter(|place| place.starts_with(directory));
    // What was mounted last is on top.
    ours.rev().try_fold(0, |count, place| {
        nix::mount::umount2(place, nix::mount::MntFlags::MNT_DETACH)
            .with_context(|| format!("unmount {}", place.display()))?;
        Ok(count + 1)
    })
}

/// Removes all that a demo `id` may have left: processes, namespaces, its directory. Returns what there was, in words.
///
/// # Errors
/// If something of it cannot be removed.
pub fn sweep(id: &str) -> Result<Vec<String>> {
    let mut found = Vec::new();
    let killed = kill_processes(id);
    if killed > 0 {
        found.push(format!("{killed} processes"));
    }
    let names = namespaces(&prefix(id));
    for name in &names {
        run_ip(&["netns", "del", name])?;
    }
    if !names.is_empty() {
        found.push(format!("{} network namespaces", names.len()));
    }
    let directory = directory(id);
    let mounted = unmount_below(&directory)?;
    if mounted > 0 {
        found.push(format!("{mounted} file systems"));
    }
    if directory.exists() {
        std::fs::remove_dir_all(&directory).with_context(|| format!("remove {}", directory.display()))?;
        found.push(format!("directory {}", directory.display()));
    }
    Ok(found)
}
