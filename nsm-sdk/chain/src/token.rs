//! Tokens that a process puts into its segment of the path.

use crate::Peer;
use meridio_proto::nsm::connection::PathSegment;
use std::{sync::Arc, time::SystemTime};

/// A signed token and its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PathToken {
    /// The JWT.
    pub jwt: String,
    /// When it ends.
    pub expires: SystemTime,
}

/// Signs tokens with this process's identity.
pub trait TokenGenerator: Send + Sync + 'static {
    /// A token for `audience`, the peer of the connection it is sent over. The error is a text for people.
    fn token(&self, audience: Option<&Peer>) -> Result<PathToken, String>;
}

impl<F> TokenGenerator for F
where
    F: Fn(Option<&Peer>) -> Result<PathToken, String> + Send + Sync + 'static,
{
    fn token(&self, audience: Option<&Peer>) -> Result<PathToken, String> {
        self(audience)
    }
}

/// A generator to be shared.
pub type Tokens = Arc<dyn TokenGenerator>;

/// Writes a token into a segment.
pub fn set(segment: &mut PathSegment, jwt: &str, expires: SystemTime) {
    segment.token = jwt.to_owned();
    segment.expires = Some(crate::clock::to_timestamp(expires));
}
