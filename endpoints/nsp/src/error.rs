//! The crate's error.

use std::path::PathBuf;

use meridio_model::Faults;

/// What keeps the NSP from starting or answering.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The configuration file cannot be read.
    #[error("configuration file {}: {source}", path.display())]
    ConfigFile {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The configuration has faults and there is no earlier one to serve.
    #[error("{}", faulty(path, faults))]
    Faulty {
        /// The file.
        path: PathBuf,
        /// All of them.
        faults: Faults,
    },
    /// A target that cannot be registered.
    #[error("target {object}: {reason}")]
    Target {
        /// Its addresses.
        object: String,
        /// Why not.
        reason: &'static str,
    },
    /// The database refused.
    #[error(transparent)]
    Storage(#[from] meridio_common::Error),
}

/// One line for each fault.
fn faulty(path: &std::path::Path, faults: &Faults) -> String {
    let lines: Vec<_> =
        faults.0.iter().map(|fault| format!("configuration file {}: {fault}", path.display())).collect();
    lines.join("\n")
}

impl From<Error> for tonic::Status {
    fn from(error: Error) -> Self {
        match error {
            Error::Target { .. } => Self::invalid_argument(error.to_string()),
            other => Self::unknown(other.to_string()),
        }
    }
}
