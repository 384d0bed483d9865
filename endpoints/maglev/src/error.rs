//! What can go wrong in the engine; each message names the object.

use std::path::PathBuf;

/// Errors of the engine.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The configuration cannot be expressed; nothing has been changed.
    #[error("{object}: {reason}")]
    Config {
        /// What is at fault, e.g. `flow "web"`.
        object: String,
        /// Why.
        reason: String,
    },
    /// The directory for maps is not on a BPF file system.
    #[error("{path}: not on a BPF file system (mount -t bpf bpf {path})")]
    NotBpfFs {
        /// The directory.
        path: PathBuf,
    },
    /// Nobody has loaded a load balancer of this layout there.
    #[error("{directory}: no load balancer of map layout {version} here (is it running, and of the same version?)")]
    NotLive {
        /// The directory.
        directory: PathBuf,
        /// The layout that this build reads.
        version: u32,
    },
    /// Another process changes the maps.
    #[error("{directory}: {holder} runs the load balancer of this network namespace")]
    Held {
        /// The directory.
        directory: PathBuf,
        /// Who.
        holder: String,
    },
    /// Another process traces.
    #[error("{directory}: somebody else traces this load balancer (one at a time)")]
    Traced {
        /// The directory.
        directory: PathBuf,
    },
    /// A file operation failed.
    #[error("{path}: {source}")]
    Io {
        /// The path.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// The kernel refused the program or the maps.
    #[error("loading the eBPF program: {0}")]
    Load(String),
    /// A map of the program is missing or of another type.
    #[error("eBPF map {name}: {reason}")]
    Map {
        /// Name of the map.
        name: &'static str,
        /// The cause.
        reason: String,
    },
    /// Attaching failed.
    #[error("attaching to interface {interface}: {reason}")]
    Attach {
        /// Name of the interface.
        interface: String,
        /// The cause.
        reason: String,
    },
}

impl Error {
    pub(crate) fn config(object: impl Into<String>, reason: impl Into<String>) -> Self {
        Error::Config { object: object.into(), reason: reason.into() }
    }
}
