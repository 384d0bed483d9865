//! BIRD's process and its configuration file.
//!
//! BIRD runs in a process group of its own and is not killed with the frontend: routes and sessions outlive a crash of
//! the frontend, and the next one finds BIRD by its control socket.

use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tokio::process::{Child, Command};
use tokio::time::Instant;

use super::control::{Control, quoted};
use crate::error::Error;

/// Time until a started BIRD has to answer.
const START_TIMEOUT: Duration = Duration::from_secs(5);
/// A BIRD that lived shorter than this is restarted with a growing delay.
const QUICK_DEATH: Duration = Duration::from_secs(2);
const RESTART_DELAY_MAX: Duration = Duration::from_secs(5);
/// A BIRD that answers nothing for this long is replaced.
const HUNG_LIMIT: Duration = Duration::from_secs(10);
/// Priority of BIRD's process.
const NICE: i32 = -15;
const FILE_NAME: &str = "bird-fe-meridio.conf";

/// Where BIRD and its files are.
#[derive(Clone, Debug)]
pub struct Paths {
    /// The program.
    pub binary: PathBuf,
    /// Directory of the configuration.
    pub config_dir: PathBuf,
    /// Control socket.
    pub socket: PathBuf,
    /// BIRD's stderr goes to ours instead of a file beside the configuration.
    pub log_bird: bool,
}

impl Paths {
    /// The configuration BIRD runs with.
    pub fn config(&self) -> PathBuf {
        self.config_dir.join(FILE_NAME)
    }

    fn candidate(&self) -> PathBuf {
        self.config_dir.join(format!("{FILE_NAME}.new"))
    }

    /// Makes the directories.
    pub fn prepare(&self) -> Result<(), Error> {
        for dir in [Some(self.config_dir.as_path()), self.socket.parent()].into_iter().flatten() {
            std::fs::create_dir_all(dir).map_err(|cause| Error::File { path: dir.to_owned(), cause })?;
        }
        Ok(())
    }

    /// Version of BIRD, e.g. `BIRD version 2.0.12`. Fails when there is no BIRD.
    pub async fn version(&self) -> Result<String, Error> {
        let output = Command::new(&self.binary).arg("--version").stdin(Stdio::null()).output().await;
        let output = output.map_err(|cause| Error::NoBird { binary: self.binary.clone(), cause })?;
        let text = if output.stdout.is_empty() { output.stderr } else { output.stdout };
        Ok(String::from_utf8_lossy(&text).trim().to_owned())
    }

    /// Writes a candidate beside the configuration; readable by its owner only, it may hold passwords.
    fn write_candidate(&self, text: &str) -> Result<PathBuf, Error> {
        let path = self.candidate();
        let fail = |cause| Error::File { path: path.clone(), cause };
        let mut options = std::fs::OpenOptions::new();
        let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(&path).map_err(fail)?;
        file.write_all(text.as_bytes()).map_err(fail)?;
        Ok(path)
    }

    fn promote(&self, candidate: &Path) -> Result<(), Error> {
        std::fs::rename(candidate, self.config()).map_err(|cause| Error::File { path: self.config(), cause })
    }

    /// Lets the program, not the running process, read a configuration.
    async fn parse_only(&self, file: &Path) -> Result<(), Error> {
        let output = Command::new(&self.binary).arg("-p").arg("-c").arg(file).stdin(Stdio::null()).output().await;
        let output = output.map_err(|cause| Error::NoBird { binary: self.binary.clone(), cause })?;
        if output.status.success() {
            return Ok(());
        }
        Err(Error::Configuration(String::from_utf8_lossy(&output.stderr).trim().to_owned()))
    }

    fn spawn(&self) -> Result<Child, Error> {
        let stderr = if self.log_bird {
            Stdio::inherit()
        } else {
            let path = self.config_dir.join("bird.stderr");
            std::fs::File::create(&path).map_err(|cause| Error::File { path, cause })?.into()
        };
        let mut command = Command::new(&self.binary);
        command.arg("-f").arg("-c").arg(self.config()).arg("-s").arg(&self.socket);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(stderr).process_group(0).kill_on_drop(false);
        command.spawn().map_err(|cause| Error::NoBird { binary: self.binary.clone(), cause })
    }
}

/// The BIRD of this pod: found or started, and started again when it dies.
#[derive(Debug)]
pub struct Bird {
    paths: Paths,
    control: Option<Control>,
    child: Option<Child>,
    pid: Option<i32>,
    started: Option<Instant>,
    quick_deaths: u32,
    retry_at: Option<Instant>,
    silent_since: Option<Instant>,
}

impl Bird {
    /// Nothing is looked for or started yet.
    pub fn new(paths: Paths) -> Self {
        let (started, retry_at, silent_since) = (None, None, None);
        Self { paths, control: None, child: None, pid: None, started, quick_deaths: 0, retry_at, silent_since }
    }

    /// The connection to a BIRD that runs, `None` while it is away.
    pub fn control(&mut self) -> Option<&mut Control> {
        self.control.as_mut()
    }

    /// When BIRD should be started again, if it is away.
    pub fn retry_at(&self) -> Option<Instant> {
        self.retry_at.filter(|_| self.control.is_none())
    }

    /// Takes over a BIRD that an earlier frontend left running. `false` if there is none.
    pub async fn adopt(&mut self) -> bool {
        let Ok(control) = Control::connect(&self.paths.socket).await else { return false };
        tracing::info!(pid = control.pid(), "adopted the running BIRD");
        self.attach(control).await;
        true
    }

    /// Starts BIRD with the configuration file that is there, or with `initial` if there is none it can read.
    pub async fn start_first(&mut self, initial: &str) -> Result<(), Error> {
        if !self.paths.config().exists() || self.paths.parse_only(&self.paths.config()).await.is_err() {
            let candidate = self.paths.write_candidate(initial)?;
            self.paths.parse_only(&candidate).await?;
            self.paths.promote(&candidate)?;
        }
        self.start().await
    }

    /// Brings a BIRD that is away back, if it is time to. Replaces one that is there but silent. `true` when it is back with
    /// this call: what it runs with is then unknown, because one that was only silent has read no file meanwhile.
    pub async fn recover(&mut self) -> Result<bool, Error> {
        if self.control.is_some() || self.retry_at.is_some_and(|at| at > Instant::now()) {
            return Ok(false);
        }
        match Control::connect(&self.paths.socket).await {
            Ok(control) => {
                tracing::info!(pid = control.pid(), "BIRD answers again");
                self.attach(control).await;
                return Ok(true);
            }
            Err(Error::Control { cause, .. }) if is_silence(&cause) => {
                let since = *self.silent_since.get_or_insert_with(Instant::now);
                if since.elapsed() < HUNG_LIMIT {
                    self.retry_at = Some(Instant::now() + Duration::from_secs(1));
                    return Err(Error::Control { socket: self.paths.socket.clone(), cause });
                }
                self.kill_silent().await;
            }
            Err(_) => {}
        }
        self.start().await.map(|()| true)
    }

    /// Gives BIRD a new configuration. One that it refuses changes nothing. While BIRD is away it is only written, for the
    /// next one to start with.
    pub async fn configure(&mut self, text: &str) -> Result<(), Error> {
        let candidate = self.candidate(text).await?;
        self.paths.promote(&candidate)?;
        match &mut self.control {
            Some(control) => taken(control, "configure", &self.paths.config()).await,
            None => Ok(()),
        }
    }

    /// Whether BIRD would take a configuration; an error if not. Nothing changes.
    pub async fn check(&mut self, text: &str) -> Result<(), Error> {
        self.candidate(text).await.map(drop)
    }

    /// Writes a configuration beside the one in use; the file is there when BIRD would take it.
    async fn candidate(&mut self, text: &str) -> Result<PathBuf, Error> {
        let candidate = self.paths.write_candidate(text)?;
        match &mut self.control {
            Some(control) => taken(control, "configure check", &candidate).await?,
            None => self.paths.parse_only(&candidate).await?,
        }
        Ok(candidate)
    }

    /// BIRD does not answer any more: says how it ended and plans the restart.
    pub async fn lost(&mut self, error: &Error) {
        self.control = None;
        let status = match &mut self.child {
            Some(child) => tokio::time::timeout(Duration::from_millis(200), child.wait()).await.ok(),
            None => None,
        };
        if let Some(Ok(status)) = &status {
            tracing::warn!(%status, "BIRD ended; starting it again");
            self.child = None;
        } else {
            tracing::warn!(%error, "BIRD is lost");
        }
        let quick = self.started.is_some_and(|at| at.elapsed() < QUICK_DEATH);
        self.quick_deaths = if quick { self.quick_deaths + 1 } else { 0 };
        let delay = match self.quick_deaths {
            0 => Duration::ZERO,
            n => RESTART_DELAY_MAX.min(Duration::from_millis(50) * 2_u32.saturating_pow(n.min(10))),
        };
        self.retry_at = Some(Instant::now() + delay);
    }

    /// Ends BIRD in order; its routes and announcements go with it.
    pub async fn stop(&mut self) {
        let Some(mut control) = self.control.take() else { return };
        let pid = control.pid();
        let asked = control.ask("down").await;
        let ended = tokio::time::timeout(Duration::from_secs(3), async { while control.told().await.is_ok() {} }).await;
        if asked.is_err() || ended.is_err() {
            kill(pid, rustix::process::Signal::TERM);
        }
        if let Some(mut child) = self.child.take() {
            let _ = tokio::time::timeout(Duration::from_secs(1), child.wait()).await;
        }
    }

    async fn start(&mut self) -> Result<(), Error> {
        self.started = Some(Instant::now());
        // A failed start is retried like a quick death.
        self.quick_deaths = self.quick_deaths.saturating_add(1);
        self.retry_at = Some(Instant::now() + Duration::from_millis(500));
        let mut child = self.paths.spawn()?;
        hurry(child.id());
        let deadline = Instant::now() + START_TIMEOUT;
        loop {
            match Control::connect(&self.paths.socket).await {
                Ok(control) => {
                    tracing::info!(pid = control.pid(), "BIRD started");
                    self.child = Some(child);
                    self.quick_deaths = self.quick_deaths.saturating_sub(1);
                    self.attach(control).await;
                    return Ok(());
                }
                Err(error) if Instant::now() > deadline => return Err(error),
                Err(_) => {}
            }
            if let Ok(Some(status)) = child.try_wait() {
                let cause = std::io::Error::other(format!("it ended with {status}"));
                return Err(Error::Control { socket: self.paths.socket.clone(), cause });
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    async fn attach(&mut self, mut control: Control) {
        // News on the control socket save polling; without them the poll still sees everything.
        if let Err(error) = control.ask("echo all").await {
            tracing::warn!(%error, "BIRD does not tell its news");
        }
        self.silent_since = None;
        self.retry_at = None;
        self.pid = control.pid();
        self.control = Some(control);
    }

    async fn kill_silent(&mut self) {
        // A full backlog refuses even the question who is there.
        let peer = tokio::net::UnixStream::connect(&self.paths.socket).await;
        let pid = peer.ok().and_then(|stream| stream.peer_cred().ok()?.pid()).or(self.pid);
        tracing::error!(pid, "BIRD answers nothing, it is replaced");
        kill(pid, rustix::process::Signal::KILL);
        self.silent_since = None;
    }
}

/// Gives BIRD a command about a configuration; it refuses the command with the configuration.
async fn taken(control: &mut Control, command: &str, file: &Path) -> Result<(), Error> {
    let reply = control.ask(&format!("{command} {}", quoted(&file.to_string_lossy()))).await?;
    if reply.is_error() { Err(Error::Configuration(reply.last_text().to_owned())) } else { Ok(()) }
}

/// Somebody holds the socket, but does not answer, or has stopped to take connections.
fn is_silence(cause: &std::io::Error) -> bool {
    matches!(cause.kind(), std::io::ErrorKind::TimedOut | std::io::ErrorKind::WouldBlock)
}

/// BFD's timers are shorter than what a busy node lets an ordinary process wait. Without the right to do so BIRD runs as it is.
fn hurry(id: Option<u32>) {
    let pid = id.and_then(|id| i32::try_from(id).ok()).and_then(rustix::process::Pid::from_raw);
    if let Some(Err(error)) = pid.map(|pid| rustix::process::setpriority_process(Some(pid), NICE)) {
        tracing::debug!(%error, "BIRD keeps its ordinary priority");
    }
}

/// Signals the process at the other end of the control socket.
fn kill(pid: Option<i32>, signal: rustix::process::Signal) {
    if let Some(pid) = pid.and_then(rustix::process::Pid::from_raw) {
        let _ = rustix::process::kill_process(pid, signal);
    }
}
