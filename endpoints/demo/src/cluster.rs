//! A running demo: namespaces, cables and processes of every pod; what may be done to them; the end.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};

use crate::cleanup::{self, Lock};
use crate::config;
use crate::fabric::Fabric;
use crate::namespace::{Filesystem, Namespace};
use crate::process::Process;
use crate::topology::{self, Kind, Options, PodPlan, Trench};

/// What a cluster is made from.
#[derive(Clone, Debug)]
pub struct Blueprint {
    /// Tells demos on one machine apart: 1 to 8 lower-case letters and digits.
    pub id: String,
    /// The `meridio` binary.
    pub binary: PathBuf,
    /// Where logs go.
    pub logs: PathBuf,
    /// The trenches.
    pub trenches: Vec<Trench>,
    /// Values of the processes' environments.
    pub options: Options,
}

/// A pod that runs.
#[derive(Debug)]
pub struct Pod {
    /// What it was made from.
    pub plan: PodPlan,
    /// Its namespaces.
    pub namespace: Arc<Namespace>,
    /// Its containers.
    pub processes: Vec<Arc<Process>>,
}

impl Pod {
    /// The container `name`.
    ///
    /// # Errors
    /// If the pod has no such container.
    pub fn process(&self, name: &str) -> Result<Arc<Process>> {
        let found = self.processes.iter().find(|process| process.plan.name == name);
        found.cloned().ok_or_else(|| anyhow!("pod {} has no container {name}", self.plan.name))
    }

    /// Every process that lives in the pod, whoever started it.
    pub fn pids(&self) -> Vec<u32> {
        self.namespace.mount_namespace().map(cleanup::in_mount_namespace).unwrap_or_default()
    }
}

/// All pods of a demo. Dropping it ends and removes everything.
#[derive(Debug)]
pub struct Cluster {
    blueprint: Blueprint,
    plans: Vec<PodPlan>,
    fabric: Option<Fabric>,
    pods: Arc<Mutex<BTreeMap<String, Arc<Pod>>>>,
    ended: Arc<AtomicBool>,
    supervisor: Option<std::thread::JoinHandle<()>>,
    unexpected: Mutex<Vec<String>>,
    _lock: Lock,
}

impl Cluster {
    /// Cleans up after a previous run of the same id, then makes namespaces and cables; starts nothing.
    ///
    /// # Errors
    /// If a demo of this id runs, or the system refuses something; what was made is removed again.
    pub fn build(blueprint: Blueprint, say: &mut dyn FnMut(&str)) -> Result<Self> {
        let lock = Lock::take(&blueprint.id)?;
        let left = cleanup::sweep(&blueprint.id)?;
        if !left.is_empty() {
            say(&format!("removed what a previous run left: {}", left.join(", ")));
        }
        // Orphans (a BIRD whose frontend was killed) come to us, so that they can be reaped.
        nix::sys::prctl::set_child_subreaper(true).context("become the reaper of orphans")?;
        let plans = topology::pods(&blueprint.trenches, &blueprint.options);
        let mut cluster = Cluster {
            plans,
            fabric: None,
            pods: Arc::default(),
            ended: Arc::default(),
            supervisor: None,
            unexpected: Mutex::default(),
            _lock: lock,
            blueprint,
        };
        cluster.write_files()?;
        for node in topology::NODES {
            let place = cluster.directory().join(topology::node_bpffs(node));
            cleanup::mount_bpffs(&place)?;
        }
        let externals: Vec<String> = cluster.blueprint.trenches.iter().map(Trench::external_bridge).collect();
        cluster.fabric = Some(Fabric::create(&cleanup::prefix(&cluster.blueprint.id), &externals)?);
        for plan in cluster.plans.clone() {
            cluster.make_pod(plan)?;
        }
        cluster.supervise()?;
        Ok(cluster)
    }

    /// The demo's directory.
    pub fn directory(&self) -> PathBuf {
        cleanup::directory(&self.blueprint.id)
    }

    /// What it was made from.
    pub fn blueprint(&self) -> &Blueprint {
        &self.blueprint
    }

    /// The networks.
    ///
    /// # Errors
    /// If the cluster is being taken down.
    pub fn fabric(&self) -> Result<&Fabric> {
        self.fabric.as_ref().ok_or_else(|| anyhow!("the fabric is gone"))
    }

    /// File that the trench's NSP reads its configuration from.
    pub fn config_file(&self, trench: &Trench) -> PathBuf {
        self.directory().join("trenches").join(trench.letter.to_string()).join("config/configuration.yaml")
    }

    /// Unix socket of a target's TAPA, as the host sees it.
    pub fn ambassador_socket(&self, target: &str) -> PathBuf {
        self.directory().join("targets").join(target).join("ambassador.sock")
    }

    /// The pod `name`.
    ///
    /// # Errors
    /// If there is none (now).
    pub fn pod(&self, name: &str) -> Result<Arc<Pod>> {
        self.lock_pods().get(name).cloned().ok_or_else(|| anyhow!("there is no pod {name}"))
    }

    /// All pods of a kind, by name.
    pub fn pods(&self, kind: Kind) -> Vec<Arc<Pod>> {
        self.lock_pods().values().filter(|pod| pod.plan.kind == kind).cloned().collect()
    }

    /// Starts every process of every pod, all at once as a cluster does.
    ///
    /// # Errors
    /// If a program cannot be executed.
    pub fn start(&self) -> Result<()> {
        let pods: Vec<Arc<Pod>> = self.lock_pods().values().cloned().collect();
        for pod in pods {
            for process in &pod.processes {
                process.start(&pod.namespace)?;
            }
        }
        Ok(())
    }

    /// SIGKILL to every process of a pod at once, whoever started it; nothing is started again.
    ///
    /// # Errors
    /// If there is no such pod.
    pub fn crash_pod(&self, name: &str) -> Result<()> {
        let pod = self.pod(name)?;
        for process in &pod.processes {
            process.disown();
        }
        let all = pod.pids();
        for &pid in &all {
            crate::process::signal(pid, nix::sys::signal::Signal::SIGKILL);
        }
        for process in &pod.processes {
            process.kill();
        }
        // What is left had another parent (a BIRD, whose frontend is gone now), or came to life meanwhile.
        let left: Vec<u32> = all.into_iter().chain(pod.pids()).collect();
        cleanup::kill_and_reap(&left, Duration::from_secs(5));
        Ok(())
    }

    /// Starts the containers of a pod that was crashed.
    ///
    /// # Errors
    /// If there is no such pod, or a program cannot be executed.
    pub fn start_pod(&self, name: &str) -> Result<()> {
        let pod = self.pod(name)?;
        pod.processes.iter().try_for_each(|process| process.start(&pod.namespace))
    }

    /// Pulls a pod's cables, kills its processes and deletes its namespaces.
    ///
    /// # Errors
    /// If there is no such pod.
    pub fn delete_pod(&self, name: &str) -> Result<()> {
        // Cables first: not even the kernel of the pod has a last word.
        self.fabric()?.unplug(&self.pod(name)?.plan);
        self.crash_pod(name)?;
        let pod = self.lock_pods().remove(name).ok_or_else(|| anyhow!("there is no pod {name}"))?;
        self.collect_unexpected(&pod);
        // The supervisor may be looking at the pod; after that the thread ends here, with it the last holder of the namespaces.
        let deadline = Instant::now() + Duration::from_secs(2);
        while Arc::strong_count(&pod) > 1 && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
        drop(pod);
        Ok(())
    }

    /// Makes a deleted pod again, new and empty, and starts it.
    ///
    /// # Errors
    /// As for [`Cluster::build`].
    pub fn recreate_pod(&self, name: &str) -> Result<()> {
        let plan = self.plans.iter().find(|plan| plan.name == name).cloned();
        self.make_pod(plan.ok_or_else(|| anyhow!("there is no pod {name}"))?)?;
        self.start_pod(name)
    }

    /// Exits of components that nobody asked for.
    pub fn unexpected(&self) -> Vec<String> {
        let mut all = self.unexpected.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone();
        for pod in self.lock_pods().values() {
            all.extend(pod.processes.iter().filter_map(|process| process.unexpected()));
        }
        all
    }

    /// Components that do not accept their settings.
    pub fn refused(&self) -> Vec<String> {
        let pods = self.lock_pods();
        let processes = pods.values().flat_map(|pod| &pod.processes).filter(|process| process.refused());
        processes
            .map(|process| {
                format!("{} does not accept its settings; log: {}", process.label(), process.log().display())
            })
            .collect()
    }

    fn collect_unexpected(&self, pod: &Pod) {
        let mut all = self.unexpected.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        all.extend(pod.processes.iter().filter_map(|process| process.unexpected()));
    }

    fn lock_pods(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Pod>>> {
        self.pods.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn write_files(&self) -> Result<()> {
        let directory = self.directory();
        let logs = &self.blueprint.logs;
        let _ = std::fs::remove_dir_all(logs);
        std::fs::create_dir_all(logs).with_context(|| format!("make {}", logs.display()))?;
        for plan in &self.plans {
            for (source, _) in &plan.binds {
                let source = directory.join(source);
                std::fs::create_dir_all(&source).with_context(|| format!("make {}", source.display()))?;
            }
        }
        write(&directory.join("hosts"), &topology::hosts(&self.plans, &self.blueprint.trenches))?;
        for trench in &self.blueprint.trenches {
            write(&self.config_file(trench), &config::config_map(trench))?;
            let gateway = directory.join("gateways").join(trench.letter.to_string()).join("bird.conf");
            write(&gateway, &config::gateway_bird(50, 3))?;
        }
        Ok(())
    }

    fn make_pod(&self, plan: PodPlan) -> Result<()> {
        let directory = self.directory();
        let filesystem = Filesystem {
            hostname: plan.name.clone(),
            hosts: directory.join("hosts"),
            binary: self.blueprint.binary.clone(),
            binds: plan.binds.iter().map(|(source, target)| (directory.join(source), target.clone())).collect(),
            directories: ["/var/lib/meridio", "/run/bird", "/run/bird-config", "/run/meridio"]
                .map(PathBuf::from)
                .to_vec(),
        };
        let name = format!("{}{}", cleanup::prefix(&self.blueprint.id), plan.name);
        let namespace = Arc::new(Namespace::create(&name, Some(filesystem))?);
        self.fabric()?.plug(&plan, &namespace)?;
        let process = |process: &crate::process::ProcessPlan| {
            let log = self.blueprint.logs.join(format!("{}.{}.log", plan.name, process.name));
            Process::new(&self.blueprint.id, &plan.name, process.clone(), log)
        };
        let processes = plan.processes.iter().map(process).collect();
        self.lock_pods().insert(plan.name.clone(), Arc::new(Pod { plan, namespace, processes }));
        Ok(())
    }

    fn supervise(&mut self) -> Result<()> {
        let (pods, ended) = (Arc::clone(&self.pods), Arc::clone(&self.ended));
        let watch = move || {
            while !ended.load(Ordering::Relaxed) {
                let now: Vec<Arc<Pod>> =
                    pods.lock().unwrap_or_else(std::sync::PoisonError::into_inner).values().cloned().collect();
                for pod in now {
                    pod.processes.iter().for_each(|process| process.supervise(&pod.namespace));
                }
                std::thread::sleep(Duration::from_millis(50));
            }
        };
        let thread = std::thread::Builder::new().name("supervisor".to_owned()).spawn(watch);
        self.supervisor = Some(thread.context("start the supervisor")?);
        Ok(())
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
        if let Some(supervisor) = self.supervisor.take() {
            let _ = supervisor.join();
        }
        let pods = std::mem::take(&mut *self.lock_pods());
        for process in pods.values().flat_map(|pod| &pod.processes) {
            process.disown();
            if let Some(pid) = process.pid() {
                crate::process::signal(pid, nix::sys::signal::Signal::SIGKILL);
            }
        }
        for process in pods.values().flat_map(|pod| &pod.processes) {
            process.kill();
        }
        cleanup::kill_processes(&self.blueprint.id);
        drop(pods);
        self.fabric = None;
        if let Err(error) = cleanup::sweep(&self.blueprint.id) {
            eprintln!("clean up: {error:#}");
        }
    }
}

fn write(path: &Path, text: &str) -> Result<()> {
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).with_context(|| format!("make {}", parent.display()))?;
    }
    std::fs::write(path, text).with_context(|| format!("write {}", path.display()))
}
