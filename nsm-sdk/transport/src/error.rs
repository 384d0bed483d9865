//! What can go wrong below gRPC.

use std::io;

/// What can go wrong below gRPC.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A text is not an address.
    #[error("{text:?} is not an address: {cause}")]
    Address {
        /// The text.
        text: String,
        /// The broken rule.
        cause: &'static str,
    },
    /// A listener cannot be opened.
    #[error("cannot listen on {address}: {cause}")]
    Listen {
        /// Where.
        address: String,
        /// Why not.
        cause: io::Error,
    },
    /// A connection cannot be made.
    #[error("cannot connect to {address}: {cause}")]
    Connect {
        /// Where.
        address: String,
        /// Why not.
        cause: String,
    },
    /// The server ended.
    #[error("server: {0}")]
    Serve(String),
    /// TLS cannot be set up or a token cannot be signed.
    #[error(transparent)]
    Identity(#[from] nsm_identity::Error),
}
