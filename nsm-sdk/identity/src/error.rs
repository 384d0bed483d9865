//! What can go wrong with identities.

use std::time::Duration;

/// What can go wrong with identities.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A text is not a SPIFFE ID.
    #[error("{text:?} is not a SPIFFE ID: {cause}")]
    SpiffeId {
        /// The text.
        text: String,
        /// The broken rule.
        cause: &'static str,
    },
    /// A certificate, key or bundle cannot be used.
    #[error("{object}: {cause}")]
    Certificate {
        /// Which one.
        object: &'static str,
        /// What is wrong with it.
        cause: String,
    },
    /// A peer's chain does not lead to a certificate of its trust domain's bundle.
    #[error("certificate of {id} is not trusted: {cause}")]
    Untrusted {
        /// The SPIFFE ID it claims.
        id: String,
        /// The broken rule.
        cause: String,
    },
    /// A token cannot be read or its signature is wrong.
    #[error("token: {0}")]
    Token(String),
    /// The Workload API cannot be reached or refuses.
    #[error("workload API at {endpoint}: {cause}")]
    WorkloadApi {
        /// The socket.
        endpoint: String,
        /// The last failure.
        cause: String,
    },
    /// No SVID arrived in time.
    #[error("workload API at {endpoint}: no SVID within {timeout:?}; last failure: {cause}")]
    NoSvid {
        /// The socket.
        endpoint: String,
        /// How long was waited.
        timeout: Duration,
        /// The last failure, if one was seen.
        cause: String,
    },
}

impl Error {
    pub(crate) fn certificate(object: &'static str, cause: impl ToString) -> Self {
        Self::Certificate { object, cause: cause.to_string() }
    }
}
