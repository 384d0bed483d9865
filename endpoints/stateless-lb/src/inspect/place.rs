//! Which load balancer is meant.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use meridio_maglev::Live;
use nsm_kernel::Netns;

/// A running load balancer.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct Place {
    /// Directory of load balancers' maps; meant is the one of this network namespace, or of the process
    #[arg(long, env = "NSM_BPF_DIR", default_value = "/sys/fs/bpf/meridio")]
    bpf_dir: PathBuf,
    /// Process whose mounts and interfaces are meant, e.g. the load balancer's, seen from its node
    #[arg(long)]
    pid: Option<u32>,
}

impl Place {
    /// Every fault, one line each.
    pub(crate) fn validate(&self) -> Vec<String> {
        let mut faults = Vec::new();
        if !self.bpf_dir.is_absolute() {
            faults.push(format!("NSM_BPF_DIR {:?} is not an absolute path", self.bpf_dir.display().to_string()));
        }
        if self.pid == Some(0) {
            faults.push("--pid 0 is no process".to_owned());
        }
        faults
    }

    fn root(&self) -> PathBuf {
        match self.pid {
            Some(pid) => PathBuf::from(format!("/proc/{pid}/root")),
            None => PathBuf::from("/"),
        }
    }

    fn within(&self, path: &Path) -> PathBuf {
        self.root().join(path.strip_prefix("/").unwrap_or(path))
    }

    /// Opens its maps.
    pub(crate) fn open(&self) -> anyhow::Result<Live> {
        if let Some(pid) = self.pid
            && !Path::new(&format!("/proc/{pid}")).exists()
        {
            anyhow::bail!("there is no process {pid}");
        }
        let base = self.within(&self.bpf_dir);
        match self.own_directory(&base) {
            Some(own) if own.exists() => Ok(Live::open(&own)?),
            // One of another namespace, by its whole name.
            _ => Ok(Live::open(&base)?),
        }
    }

    /// The directory of the network namespace that is meant, if it can be entered.
    fn own_directory(&self, base: &Path) -> Option<PathBuf> {
        match self.pid {
            Some(pid) => {
                let netns = Netns::from_path(format!("/proc/{pid}/ns/net")).ok()?;
                netns.run_blocking(|| meridio_maglev::own_directory(base).ok()).ok()?
            }
            None => meridio_maglev::own_directory(base).ok(),
        }
    }

    /// Names of its interfaces by index; empty if they cannot be read.
    pub(crate) fn interfaces(&self) -> HashMap<u32, String> {
        let mut names = HashMap::new();
        let entries = std::fs::read_dir(self.within(Path::new("/sys/class/net")));
        for entry in entries.into_iter().flatten().flatten() {
            let index = std::fs::read_to_string(entry.path().join("ifindex"));
            if let Some(index) = index.ok().and_then(|text| text.trim().parse().ok()) {
                names.insert(index, entry.file_name().to_string_lossy().into_owned());
            }
        }
        names
    }
}
