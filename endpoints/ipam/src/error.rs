//! The crate's error.

use std::time::Duration;

use ipnet::IpNet;
use meridio_common::GoDuration;

/// Why an address cannot be given.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The request lacks something.
    #[error("{0} cannot be nil")]
    Missing(&'static str),
    /// This trench has no addresses of that family.
    #[error("cannot allocate in this ip family ({0})")]
    Family(&'static str),
    /// The request is for another trench.
    #[error("no corresponding trench: {found:?} was asked for, this is the IPAM of {own:?}")]
    Trench {
        /// Asked for.
        found: String,
        /// Served.
        own: String,
    },
    /// The NSP does not list the conduit.
    #[error("conduit {conduit:?} is unknown: the NSP did not list it within {}", GoDuration(*waited))]
    UnknownConduit {
        /// Asked for.
        conduit: String,
        /// How long it was waited for.
        waited: Duration,
    },
    /// The NSP lists the conduit, but it could not be given a prefix yet.
    #[error("conduit {conduit:?} is listed by the NSP, but has no prefix yet: {reason}")]
    PendingConduit {
        /// Asked for.
        conduit: String,
        /// What the last attempt said.
        reason: String,
    },
    /// A prefix is used up.
    #[error("no more prefix available for {object} in {parent}")]
    Exhausted {
        /// What wanted one.
        object: String,
        /// Where.
        parent: IpNet,
    },
    /// The database has contents that cannot be.
    #[error("database {path}: {reason}")]
    Damaged {
        /// File.
        path: String,
        /// What is wrong, one line for each.
        reason: String,
    },
    /// The database refused.
    #[error(transparent)]
    Storage(#[from] meridio_common::Error),
}

impl From<Error> for tonic::Status {
    fn from(error: Error) -> Self {
        let text = error.to_string();
        match error {
            Error::Missing(_) => Self::invalid_argument(text),
            Error::Family(_) => Self::failed_precondition(text),
            Error::Trench { .. } | Error::UnknownConduit { .. } => Self::not_found(text),
            Error::Exhausted { .. } => Self::resource_exhausted(text),
            Error::Damaged { .. } => Self::internal(text),
            Error::PendingConduit { .. } | Error::Storage(_) => Self::unavailable(text),
        }
    }
}
