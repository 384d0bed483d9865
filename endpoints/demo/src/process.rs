//! Processes inside pods: start, kill, restart, and a supervisor that does what a kubelet does with a container that exits.

use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::namespace::Namespace;

/// Environment variable that marks every process of a demo; its value is the demo's id.
pub const MARKER: &str = "MERIDIO_DEMO";

/// How a component ends that does not accept its settings (`EX_USAGE`).
const REFUSED: &str = "exit status 64";

/// What to run in a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProcessPlan {
    /// Name of the container: `frontend`, `tapa` ...
    pub name: String,
    /// Program as the pod sees it.
    pub program: PathBuf,
    /// Its arguments.
    pub args: Vec<String>,
    /// Its whole environment, apart from `PATH` and the demo's marker.
    pub env: Vec<(String, String)>,
    /// Its priority: BFD with 150 ms to detection must not starve on a machine that is busy with other things.
    pub nice: i32,
}

/// One container of a pod.
#[derive(Debug)]
pub struct Process {
    /// Pod that it runs in.
    pub pod: String,
    /// What it runs.
    pub plan: ProcessPlan,
    demo: String,
    log: PathBuf,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    child: Option<Child>,
    wanted: bool,
    died: Option<Instant>,
    unexpected: Vec<String>,
}

impl Process {
    /// A process that is not started yet; it will log to `log`.
    pub fn new(demo: &str, pod: &str, plan: ProcessPlan, log: PathBuf) -> Arc<Self> {
        Arc::new(Process { pod: pod.to_owned(), plan, demo: demo.to_owned(), log, state: Mutex::default() })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// `pod/name`.
    pub fn label(&self) -> String {
        format!("{}/{}", self.pod, self.plan.name)
    }

    /// File that holds its standard output and error.
    pub fn log(&self) -> &PathBuf {
        &self.log
    }

    /// Process id, while it runs.
    pub fn pid(&self) -> Option<u32> {
        self.state().child.as_ref().map(Child::id)
    }

    /// Exits that nobody asked for, in words: one line, with the last of them.
    pub fn unexpected(&self) -> Option<String> {
        let state = self.state();
        let last = state.unexpected.last()?;
        Some(format!(
            "{} ended by itself {} times, last with {last}; log: {}",
            self.label(),
            state.unexpected.len(),
            self.log.display()
        ))
    }

    /// Whether its settings are not accepted: starting it again is of no use.
    pub fn refused(&self) -> bool {
        self.state().unexpected.iter().filter(|how| *how == REFUSED).count() > 1
    }

    /// Starts it, unless it runs.
    ///
    /// # Errors
    /// If the program cannot be executed or the log not be opened.
    pub fn start(&self, namespace: &Namespace) -> Result<()> {
        let mut state = self.state();
        state.wanted = true;
        if state.child.is_none() {
            state.child = Some(self.spawn(namespace)?);
        }
        Ok(())
    }

    /// SIGKILL; returns when it is gone. The supervisor does not start it again.
    pub fn kill(&self) {
        let mut state = self.state();
        state.wanted = false;
        kill_child(&mut state);
    }

    /// Marks it as not wanted, so that it is not started again when somebody else kills it.
    pub fn disown(&self) {
        self.state().wanted = false;
    }

    /// SIGKILL and start.
    ///
    /// # Errors
    /// Those of [`Process::start`].
    pub fn restart(&self, namespace: &Namespace) -> Result<()> {
        let mut state = self.state();
        kill_child(&mut state);
        state.wanted = true;
        state.child = Some(self.spawn(namespace)?);
        Ok(())
    }

    /// SIGTERM; returns whether it ended within `patience`, and kills it if it did not.
    pub fn terminate(&self, patience: Duration) -> bool {
        let mut state = self.state();
        state.wanted = false;
        let Some(child) = state.child.as_mut() else { return true };
        signal(child.id(), nix::sys::signal::Signal::SIGTERM);
        let deadline = Instant::now() + patience;
        while Instant::now() < deadline {
            if matches!(child.try_wait(), Ok(Some(_))) {
                state.child = None;
                return true;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        kill_child(&mut state);
        false
    }

    /// One look of the supervisor: notices an exit that nobody asked for, and starts the process again a second later.
    pub fn supervise(&self, namespace: &Namespace) {
        let mut state = self.state();
        if let Some(child) = state.child.as_mut()
            && let Ok(Some(status)) = child.try_wait()
        {
            state.child = None;
            if state.wanted {
                state.died = Some(Instant::now());
                let how = match (status.code(), status.signal()) {
                    (Some(code), _) => format!("exit status {code}"),
                    (None, signal) => format!("signal {}", signal.unwrap_or_default()),
                };
                state.unexpected.push(how);
            }
        }
        let due = state.died.is_none_or(|died| died.elapsed() >= Duration::from_secs(1));
        if state.wanted && state.child.is_none() && due {
            match self.spawn(namespace) {
                Ok(child) => state.child = Some(child),
                Err(error) => {
                    state.died = Some(Instant::now());
                    state.unexpected.push(format!("{error:#}"));
                }
            }
        }
    }

    fn spawn(&self, namespace: &Namespace) -> Result<Child> {
        let log = std::fs::OpenOptions::new().create(true).append(true).open(&self.log);
        let log = log.with_context(|| format!("open {}", self.log.display()))?;
        let plan = self.plan.clone();
        let (demo, pod) = (self.demo.clone(), self.pod.clone());
        let spawned = namespace.run(move || -> Result<Child> {
            let mut command = Command::new(&plan.program);
            command.args(&plan.args).env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
            command.env(MARKER, demo).env("MERIDIO_DEMO_POD", pod).envs(plan.env.iter().cloned());
            command.current_dir("/").stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
            // Ctrl-C on the terminal is for the demo, which ends its components in order.
            command.process_group(0);
            prepare(&mut command, plan.nice);
            command.spawn().with_context(|| format!("start {}", plan.program.display()))
        })?;
        spawned.with_context(|| format!("start {}", self.label()))
    }
}

/// The child gets SIGKILL when the thread that forks it ends, and the priority `nice` (-20 first, 19 last).
#[allow(unsafe_code)]
fn prepare(command: &mut Command, nice: i32) {
    let setup = move || {
        nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL).map_err(std::io::Error::from)?;
        // SAFETY: setpriority(2) takes plain numbers. Where it is refused the child runs without.
        unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, nice) };
        Ok(())
    };
    // SAFETY: between fork and exec only prctl(2) and setpriority(2) are called, which touch no memory of the parent.
    unsafe {
        command.pre_exec(setup);
    }
}

fn kill_child(state: &mut State) {
    if let Some(mut child) = state.child.take() {
        let _ = child.kill();
        let _ = child.wait();
    }
    state.died = None;
}

/// Sends a signal to one process; one that is gone is fine.
pub(crate) fn signal(pid: u32, signal: nix::sys::signal::Signal) {
    if let Ok(pid) = i32::try_from(pid) {
        let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), signal);
    }
}
