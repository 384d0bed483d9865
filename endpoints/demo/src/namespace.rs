//! One network namespace, optionally with mount and UTS namespaces of its own, held by a thread.
//!
//! The thread lives inside the namespaces for as long as the value lives: whatever has to happen "in the pod" (sysctls, sockets, starting a
//! process) is sent to it as a closure. A child that it forks inherits the namespaces, and is killed by the kernel (`PR_SET_PDEATHSIG`)
//! when the thread goes, so that a demo which is killed takes its components along.

use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread::JoinHandle;

use anyhow::{Context, Result, anyhow, bail};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};

/// Where `ip netns` keeps its names.
pub const NETNS_DIR: &str = "/run/netns";

/// Where a pod finds the `meridio` binary.
pub const BINARY_DIR: &str = "/run/meridio-bin";

type Job = Box<dyn FnOnce() + Send>;

/// The file system and host name of a pod.
#[derive(Clone, Debug, Default)]
pub struct Filesystem {
    /// Host name of the pod.
    pub hostname: String,
    /// File that the pod sees as `/etc/hosts`.
    pub hosts: PathBuf,
    /// The binary that the pod's processes run, seen as `/run/meridio-bin/meridio`.
    pub binary: PathBuf,
    /// (source on the host, target in the pod); targets lie below `/run`, `/tmp`, `/var/lib`, `/var/log` or `/sys`, which are the pod's own.
    pub binds: Vec<(PathBuf, PathBuf)>,
    /// Empty directories to make, below the same places.
    pub directories: Vec<PathBuf>,
}

/// A named network namespace and the thread that lives in it.
#[derive(Debug)]
pub struct Namespace {
    name: String,
    jobs: Option<mpsc::Sender<Job>>,
    thread: Option<JoinHandle<()>>,
    mount_namespace: Option<(u64, u64)>,
}

impl Namespace {
    /// Makes the network namespace `name` and, with `filesystem`, a mount and a UTS namespace around it.
    ///
    /// # Errors
    /// If `ip netns` refuses the name or a mount fails; nothing is left behind then.
    pub fn create(name: &str, filesystem: Option<Filesystem>) -> Result<Self> {
        run_ip(&["netns", "add", name])?;
        let (jobs, queue) = mpsc::channel::<Job>();
        let (ready, done) = mpsc::channel();
        let owned = name.to_owned();
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || {
            let entered = enter(&owned, filesystem.as_ref());
            let ok = entered.is_ok();
            let _ = ready.send(entered);
            while ok && let Ok(job) = queue.recv() {
                job();
            }
        });
        let mut namespace = Namespace { name: name.to_owned(), jobs: Some(jobs), thread: None, mount_namespace: None };
        namespace.thread = Some(thread.with_context(|| format!("start the thread of {name}"))?);
        let entered = done.recv().map_err(|_| anyhow!("the thread of {name} died")).and_then(|result| result);
        namespace.mount_namespace = entered.with_context(|| format!("set up namespace {name}"))?;
        Ok(namespace)
    }

    /// Name under which `ip netns` lists it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// (device, inode) of the mount namespace, if it has one of its own.
    pub fn mount_namespace(&self) -> Option<(u64, u64)> {
        self.mount_namespace
    }

    /// Runs `work` inside the namespaces and waits for its result. Threads that it starts live inside too.
    ///
    /// # Errors
    /// If the namespace's thread is gone (a closure panicked).
    pub fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> Result<T> {
        let (result, answer) = mpsc::channel();
        let job: Job = Box::new(move || {
            let _ = result.send(work());
        });
        let jobs = self.jobs.as_ref().ok_or_else(|| anyhow!("namespace {} is closed", self.name))?;
        jobs.send(job).map_err(|_| anyhow!("the thread of namespace {} is gone", self.name))?;
        answer.recv().map_err(|_| anyhow!("a task in namespace {} died", self.name))
    }

    /// Runs `ip -batch` with `lines` inside.
    ///
    /// # Errors
    /// With what `ip` says about the first line that failed.
    pub fn ip(&self, lines: &str) -> Result<()> {
        let name = self.name.clone();
        let lines = lines.to_owned();
        self.run(move || ip_batch(&lines))?.with_context(|| format!("in namespace {name}"))
    }

    /// Runs a tool inside and returns its standard output.
    ///
    /// # Errors
    /// If it cannot be started or fails; the message carries its standard error.
    pub fn output(&self, program: &str, args: &[&str]) -> Result<String> {
        let program = program.to_owned();
        let args: Vec<String> = args.iter().map(|&arg| arg.to_owned()).collect();
        self.run(move || output(&program, &args))?
    }

    /// Sets sysctls (`net/ipv4/ip_forward` form). Keys that this kernel does not have are skipped.
    ///
    /// # Errors
    /// If an existing key refuses its value.
    pub fn sysctls(&self, values: &[(String, String)]) -> Result<()> {
        let values = values.to_vec();
        self.run(move || {
            for (key, value) in &values {
                let path = format!("/proc/sys/{key}");
                if Path::new(&path).exists() {
                    std::fs::write(&path, value).with_context(|| format!("sysctl {key}={value}"))?;
                }
            }
            Ok(())
        })?
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        let _ = run_ip(&["netns", "del", &self.name]);
    }
}

/// Moves the calling thread into the namespace and builds its file system. Returns the mount namespace's identity.
fn enter(name: &str, filesystem: Option<&Filesystem>) -> Result<Option<(u64, u64)>> {
    let handle = std::fs::File::open(Path::new(NETNS_DIR).join(name)).context("open the network namespace")?;
    setns(&handle, CloneFlags::CLONE_NEWNET).context("enter the network namespace")?;
    let Some(filesystem) = filesystem else { return Ok(None) };
    unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWUTS).context("make mount and UTS namespaces")?;
    nix::unistd::sethostname(&filesystem.hostname).context("set the host name")?;
    build(filesystem)?;
    let link = std::fs::metadata("/proc/thread-self/ns/mnt").context("identify the mount namespace")?;
    Ok(Some((std::os::unix::fs::MetadataExt::dev(&link), std::os::unix::fs::MetadataExt::ino(&link))))
}

/// Own `/run`, `/tmp`, `/var/lib`, `/var/log`, `/sys`, `/etc/hosts`; then the bind mounts.
fn build(filesystem: &Filesystem) -> Result<()> {
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).context("make mounts private")?;
    // Sources may lie below a directory that is about to be covered: hold them by descriptor.
    let hold = |path: &Path| std::fs::File::open(path).with_context(|| format!("open {}", path.display()));
    let binary = hold(&filesystem.binary)?;
    let hosts = hold(&filesystem.hosts)?;
    let mut binds = Vec::new();
    for (source, target) in &filesystem.binds {
        binds.push((hold(source)?, target));
    }
    for place in ["/run", "/tmp", "/var/lib", "/var/log"] {
        let mode = if place == "/tmp" { "mode=1777,size=64m" } else { "mode=0755,size=256m" };
        mount(Some("tmpfs"), place, Some("tmpfs"), MsFlags::empty(), Some(mode))
            .with_context(|| format!("tmpfs at {place}"))?;
    }
    for directory in &filesystem.directories {
        std::fs::create_dir_all(directory).with_context(|| format!("make {}", directory.display()))?;
    }
    let program = Path::new(BINARY_DIR).join("meridio");
    std::fs::create_dir_all(BINARY_DIR).context("make the binary's directory")?;
    std::fs::write(&program, b"").context("make the binary's mount point")?;
    bind(&binary, &program)?;
    bind(&hosts, Path::new("/etc/hosts"))?;
    // sysfs shows the network devices of the namespace that mounts it.
    mount(Some("sysfs"), "/sys", Some("sysfs"), MsFlags::empty(), none).context("sysfs at /sys")?;
    for (source, target) in &binds {
        std::fs::create_dir_all(target).with_context(|| format!("make {}", target.display()))?;
        bind(source, target)?;
    }
    std::env::set_current_dir("/").context("go to /")
}

fn bind(source: &std::fs::File, target: &Path) -> Result<()> {
    let none: Option<&str> = None;
    let path = format!("/proc/thread-self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(source));
    mount(Some(path.as_str()), target, none, MsFlags::MS_BIND, none)
        .with_context(|| format!("bind mount {}", target.display()))
}

/// Runs `ip` in the caller's namespaces.
pub(crate) fn run_ip(args: &[&str]) -> Result<String> {
    output("ip", &args.iter().map(|&arg| arg.to_owned()).collect::<Vec<_>>())
}

fn output(program: &str, args: &[String]) -> Result<String> {
    let done = std::process::Command::new(program)
        .args(args)
        .stdin(std::process::Stdio::null())
        .output()
        .with_context(|| format!("start {program}"))?;
    if !done.status.success() {
        bail!("{program} {}: {}", args.join(" "), String::from_utf8_lossy(&done.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&done.stdout).into_owned())
}

fn ip_batch(lines: &str) -> Result<()> {
    use std::io::Write as _;
    let mut child = std::process::Command::new("ip")
        .args(["-batch", "-"])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .context("start ip")?;
    if let Some(mut input) = child.stdin.take() {
        input.write_all(lines.as_bytes()).context("write to ip")?;
    }
    let done = child.wait_with_output().context("wait for ip")?;
    if !done.status.success() {
        bail!("ip: {} (of: {})", String::from_utf8_lossy(&done.stderr).trim(), lines.trim().replace('\n', "; "));
    }
    Ok(())
}
