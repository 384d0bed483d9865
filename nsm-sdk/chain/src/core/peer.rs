//! The authenticated other side of a connection.

use std::{sync::Arc, time::SystemTime};

/// The authenticated other side of a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// `spiffe://domain/path`.
    pub spiffe_id: String,
    /// Its certificate, DER.
    pub leaf: Arc<[u8]>,
    /// When the certificate ends.
    pub not_after: SystemTime,
}
