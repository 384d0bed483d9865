//! Tokens that a process puts into its segment of the path.

use crate::{ClientToken, Peer};
use meridio_proto::nsm::connection::PathSegment;
use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};
use tonic::metadata::MetadataMap;

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

/// The caller's token in gRPC metadata: `nsm-client-token` and `nsm-client-token-expires`, each exactly once.
pub fn from_metadata(metadata: &MetadataMap) -> Option<ClientToken> {
    let single = |key| {
        let mut values = metadata.get_all(key).iter();
        values.next().filter(|_| values.next().is_none())?.to_str().ok()
    };
    let (jwt, expires) = (single("nsm-client-token")?, single("nsm-client-token-expires")?);
    let expires: prost_types::Timestamp = expires.parse().ok()?;
    Some(ClientToken { jwt: jwt.to_owned(), expires: crate::clock::from_timestamp(&expires) })
}

/// Writes a token into a segment.
pub fn set(segment: &mut PathSegment, jwt: &str, expires: SystemTime) {
    segment.token = jwt.to_owned();
    segment.expires = Some(crate::clock::to_timestamp(expires));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn metadata(pairs: &[(&'static str, &'static str)]) -> MetadataMap {
        let mut metadata = MetadataMap::new();
        for (key, value) in pairs {
            metadata.append(*key, value.parse().unwrap());
        }
        metadata
    }

    #[test]
    fn exactly_one_token_and_end() {
        const TOKEN: (&str, &str) = ("nsm-client-token", "jwt");
        const END: (&str, &str) = ("nsm-client-token-expires", "2026-01-02T03:04:05.5+01:00");
        let sent = from_metadata(&metadata(&[TOKEN, END])).unwrap();
        let since = sent.expires.duration_since(SystemTime::UNIX_EPOCH).unwrap();
        assert_eq!((sent.jwt.as_str(), since), ("jwt", Duration::from_millis(1_767_319_445_500)));
        for bad in [vec![TOKEN], vec![END], vec![TOKEN, TOKEN, END], vec![TOKEN, ("nsm-client-token-expires", "soon")]]
        {
            assert_eq!(from_metadata(&metadata(&bad)), None);
        }
    }
}
