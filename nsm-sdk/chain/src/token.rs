//! Tokens that a process puts into its segment of the path.

use crate::Peer;
use nsm_proto::connection::PathSegment;
use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

pub use nsm_identity::Token;

/// Signs tokens with this process's identity.
pub trait TokenGenerator: Send + Sync + 'static {
    /// A token for `audience`, the peer of the connection it is sent over. The error is a text for people.
    fn token(&self, audience: Option<&Peer>) -> Result<Token, String>;
}

impl<F> TokenGenerator for F
where
    F: Fn(Option<&Peer>) -> Result<Token, String> + Send + Sync + 'static,
{
    fn token(&self, audience: Option<&Peer>) -> Result<Token, String> {
        self(audience)
    }
}

/// A generator to be shared.
pub type Tokens = Arc<dyn TokenGenerator>;

/// Signs with an identity from the Workload API; tokens live for `max_lifetime` at most.
pub fn from_source(source: nsm_identity::X509Source, max_lifetime: Duration) -> Tokens {
    Arc::new(move |audience: Option<&Peer>| {
        let mut token = source
            .sign(audience.map(|peer| peer.spiffe_id.as_str()), max_lifetime)
            .map_err(|error| error.to_string())?;
        if let Some(peer) = audience {
            token.expires = token.expires.min(peer.not_after);
        }
        Ok(token)
    })
}

/// Writes a token into a segment.
pub fn set(segment: &mut PathSegment, jwt: &str, expires: SystemTime) {
    segment.token = jwt.to_owned();
    segment.expires = Some(crate::clock::to_timestamp(expires));
}
