//! The one error of this crate: what was attempted, on which object, and why it failed.

use std::{io, time::Duration};

use tonic::Code;

/// Why a kernel operation failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel answered a netlink request with an error number.
    #[error("{what}: {source}")]
    Netlink {
        /// Operation and object, for example `add route 10.0.0.0/24 table 1`.
        what: String,
        /// The kernel's `errno`.
        #[source]
        source: io::Error,
    },
    /// The netlink connection is gone, or an answer could not be understood.
    #[error("{what}: netlink connection failed: {cause}")]
    Connection {
        /// Operation and object.
        what: String,
        /// What the netlink library said.
        cause: String,
    },
    /// The kernel has not answered, or others have not made way.
    #[error("{what}: no answer within {limit:?}")]
    Timeout {
        /// Operation and object.
        what: String,
        /// How long was waited for it.
        limit: Duration,
    },
    /// A namespace, file or socket could not be opened or used.
    #[error("{what}: {source}")]
    Io {
        /// Operation and object.
        what: String,
        /// The operating system's error.
        #[source]
        source: io::Error,
    },
    /// A value given by a peer or a user cannot be used.
    #[error("{0}")]
    Invalid(String),
    /// An interface of that name exists and belongs to somebody else.
    #[error("interface {name} exists already and is not ours: its alias is {alias:?}, wanted {wanted:?}")]
    Foreign {
        /// Interface name.
        name: String,
        /// Alias found on it (empty: none).
        alias: String,
        /// Alias that this connection would give it.
        wanted: String,
    },
    /// An interface that has to exist does not.
    #[error("interface {0} does not exist")]
    NoLink(String),
}

impl Error {
    pub(crate) fn io(what: impl Into<String>, source: io::Error) -> Self {
        Error::Io { what: what.into(), source }
    }

    /// The kernel's error number, if it gave one.
    pub fn errno(&self) -> Option<i32> {
        match self {
            Error::Netlink { source, .. } | Error::Io { source, .. } => source.raw_os_error(),
            _ => None,
        }
    }

    /// The gRPC code it has for whoever asked: what is the caller's to mend, and what is not.
    pub fn code(&self) -> Code {
        match self {
            Error::Invalid(_) => Code::InvalidArgument,
            Error::Foreign { .. } => Code::AlreadyExists,
            Error::NoLink(_) => Code::NotFound,
            Error::Timeout { .. } => Code::DeadlineExceeded,
            Error::Netlink { .. } | Error::Connection { .. } | Error::Io { .. } => Code::Unknown,
        }
    }

    /// True if the object that was to be created is there already.
    pub fn is_exists(&self) -> bool {
        self.errno() == Some(libc::EEXIST)
    }

    /// True if the object that was to be read, changed or deleted is not there (any more).
    pub fn is_missing(&self) -> bool {
        matches!(self, Error::NoLink(_))
            || matches!(
                self.errno(),
                Some(libc::ENODEV) | Some(libc::ENOENT) | Some(libc::ESRCH) | Some(libc::EADDRNOTAVAIL)
            )
    }
}

/// Treats "is not there" as success: deleting something twice is deleting it.
pub fn ignore_missing(result: Result<(), Error>) -> Result<(), Error> {
    match result {
        Err(e) if e.is_missing() => Ok(()),
        other => other,
    }
}

/// Treats "is there already" as success.
pub fn ignore_exists(result: Result<(), Error>) -> Result<(), Error> {
    match result {
        Err(e) if e.is_exists() => Ok(()),
        other => other,
    }
}
