//! Whether a path is trusted.

mod callers;
pub mod policy;

pub use callers::Callers;
pub use policy::{Policies, Policy};

use crate::{CloseCall, Connection, Element, Error, Key, Next, Peer, RequestCall, Side, clock, path, unwind};
use policy::Input;
use tonic::Code;

const NAME: &str = "authorize";

/// Checks the first `segments` of the path, as the process sees it whose segment `index` is.
fn check(
    policies: &Policies,
    connection: &Connection,
    index: usize,
    segments: usize,
    peer: &Peer,
) -> Result<(), Error> {
    let all = connection.path.as_ref().map_or(&[][..], |path| &path.path_segments);
    let input = Input { index, segments: &all[..segments.min(all.len())], leaf: &peer.leaf, now: clock::now() };
    policies.check(&input).map_err(|cause| {
        let text = format!("an error occurred during authorization policy check: no sufficient privileges: {cause}");
        Error::new(NAME, &connection.id, text).with_code(Code::PermissionDenied)
    })
}

/// Checks what callers send: the path up to this process. Calls without a peer come from this process and pass.
#[derive(Clone, Debug)]
pub struct AuthorizeServer {
    policies: Policies,
    callers: Option<Callers>,
}

impl AuthorizeServer {
    /// An element with these policies.
    pub fn new(policies: Policies) -> Self {
        Self { policies, callers: None }
    }

    /// Notes in `callers` who has which connection.
    #[must_use]
    pub fn noting(mut self, callers: Option<Callers>) -> Self {
        self.callers = callers;
        self
    }

    fn check(&self, connection: &Connection, peer: Option<&Peer>) -> Result<(), Error> {
        let index = path::index(connection);
        match peer {
            Some(peer) => check(&self.policies, connection, index, index.saturating_add(1), peer),
            None => Ok(()),
        }
    }
}

#[async_trait::async_trait]
impl Element for AuthorizeServer {
    fn name(&self) -> &'static str {
        NAME
    }

    async fn request(&self, call: RequestCall, next: Next) -> Result<Connection, Error> {
        self.check(&call.connection(), call.ctx.peer.as_ref())?;
        let Some((callers, peer)) = self.callers.as_ref().zip(call.ctx.peer.as_ref()) else {
            return next.request(call).await;
        };
        let (callers, peer, id) = (callers.clone(), peer.clone(), call.id().to_owned());
        let theirs = path::segment(&call.connection(), -1).map_or_else(String::new, |segment| segment.id.clone());
        let connection = next.request(call).await?;
        callers.note(&id, &peer, theirs);
        Ok(connection)
    }

    async fn close(&self, call: CloseCall, next: Next) -> Result<(), Error> {
        self.check(&call.message, call.ctx.peer.as_ref())?;
        let id = call.id().to_owned();
        let result = next.close(call).await;
        if let Some(callers) = &self.callers {
            callers.forget(&id);
        }
        result
    }
}

/// Checks what the next hop answers, and what is closed there: the whole path. Stands below `dial`, which knows that hop.
///
/// A close is not held up by tokens that have expired: what nobody could refresh for a while has to be closed all the same, and
/// the next hop judges the close by fresh ones.
#[derive(Debug)]
pub struct AuthorizeClient {
    policies: Policies,
    /// Who gave the last answer that has passed, and the own token in it.
    passed: Key<(Peer, String)>,
}

impl AuthorizeClient {
    /// An element with these policies.
    pub fn new(policies: Policies) -> Self {
        Self { policies, passed: Key::new(Side::Client) }
    }
}

#[async_trait::async_trait]
impl Element for AuthorizeClient {
    fn name(&self) -> &'static str {
        NAME
    }

    async fn request(&self, call: RequestCall, next: Next) -> Result<Connection, Error> {
        if self.policies.is_empty() {
            return next.request(call).await;
        }
        let metadata = call.ctx.metadata(NAME, call.id())?.clone();
        let postponed = call.ctx.postpone();
        let peer = call.ctx.remote.as_ref().and_then(|remote| remote.peer());
        // Not the answer's: who answers must not choose which segment is looked at.
        let index = path::index(&call.connection());
        let connection = next.request(call).await?;
        let Some(peer) = peer else { return Ok(connection) };
        match check(&self.policies, &connection, index, usize::MAX, &peer) {
            Ok(()) => {
                let own = connection.path.as_ref().and_then(|path| path.path_segments.get(index));
                let token = own.map_or_else(String::new, |own| own.token.clone());
                metadata.insert(&self.passed, (peer, token));
                Ok(connection)
            }
            Err(error) if metadata.contains(&self.passed) => Err(error),
            Err(error) => Err(unwind(&next, connection, &postponed, error).await),
        }
    }

    async fn close(&self, call: CloseCall, next: Next) -> Result<(), Error> {
        if !self.policies.is_empty()
            && let Some((peer, token)) = call.ctx.metadata(NAME, call.id())?.get(&self.passed)
        {
            // On the way down the own token is the one for the caller; the next hop puts the one for itself in its place.
            let mut connection = (*call.message).clone();
            if let Some(own) = path::segment_mut(&mut connection, 0) {
                own.token = token;
            }
            let policies = self.policies.clone().without(Policy::TokensExpired);
            check(&policies, &connection, path::index(&connection), usize::MAX, &peer)?;
        }
        next.close(call).await
    }
}

#[cfg(test)]
mod tests;
