//! The crate's error.

/// What can go wrong in the shared helpers; the message names the object and the cause.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A duration that is not in Go syntax.
    #[error("duration {text:?}: {reason}")]
    Duration {
        /// What was given.
        text: String,
        /// Why it is refused.
        reason: &'static str,
    },
    /// An operating-system call on a named object failed.
    #[error("{object}: {source}")]
    Io {
        /// File, socket or setting.
        object: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// A kernel setting has another value than the component needs.
    #[error("{object}: {reason}")]
    Sysctl {
        /// The setting; the interface is part of its name.
        object: String,
        /// Found and expected value.
        reason: String,
    },
    /// An address or the transport refused.
    #[error("{object}: {reason}")]
    Transport {
        /// Address.
        object: String,
        /// Cause.
        reason: String,
    },
    /// The embedded database refused.
    #[error("database {object}: {reason}")]
    Storage {
        /// Path of the database file.
        object: String,
        /// Cause.
        reason: String,
    },
}

impl Error {
    /// An [`Error::Io`] about `object`.
    pub fn io(object: impl Into<String>, source: std::io::Error) -> Self {
        Self::Io { object: object.into(), source }
    }
}
