//! Whether who answers a registration is who it says it is.

use super::{covered, denied, next_token_signed, tokens_chained, tokens_expired, tokens_valid};
use crate::{Call, Context, Element, Error, Next, Object, chain::Table};
use nsm_identity::{Peer, clock};
use std::time::Duration;

/// What undoing a refused registration may take.
const UNDO_TIMEOUT: Duration = Duration::from_secs(5);

/// Which policies apply to answers. All of them unless switched off. `client_allowed` is not among them: names are the server's to give.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClientPolicies {
    /// Every token of the path reads as a JWT.
    pub tokens_valid: bool,
    /// No token of the path has ended.
    pub tokens_expired: bool,
    /// Each token is meant for the signer of the next.
    pub tokens_chained: bool,
    /// The next registry's token is signed by its TLS key.
    pub next_token_signed: bool,
}

impl Default for ClientPolicies {
    fn default() -> Self {
        Self { tokens_valid: true, tokens_expired: true, tokens_chained: true, next_token_signed: true }
    }
}

impl ClientPolicies {
    /// The policies whose file in NSM's tree is covered by a mask, in which `.*` stands for anything.
    pub fn from_masks<S: AsRef<str>>(masks: &[S]) -> Self {
        let covered = covered(masks);
        Self {
            tokens_valid: covered("etc/nsm/opa/common/tokens_valid.rego"),
            tokens_expired: covered("etc/nsm/opa/common/tokens_expired.rego"),
            tokens_chained: covered("etc/nsm/opa/common/tokens_chained.rego"),
            next_token_signed: covered("etc/nsm/opa/client/next_token_signed.rego"),
        }
    }

    /// No policy: whoever answers is believed.
    pub fn none() -> Self {
        Self { tokens_valid: false, tokens_expired: false, tokens_chained: false, next_token_signed: false }
    }

    /// Checks a path as the next registry has answered it.
    fn check(self, ctx: &Context, peer: &Peer) -> Result<(), String> {
        let path = ctx.path.as_ref().map(crate::PathHandle::get).unwrap_or_default();
        if self.tokens_valid || self.tokens_expired || self.tokens_chained {
            let claims = tokens_valid(&path.segments)?;
            if self.tokens_expired {
                tokens_expired(&claims, clock::now())?;
            }
            if self.tokens_chained {
                tokens_chained(&claims)?;
            }
        }
        match self.next_token_signed {
            true => next_token_signed(&path, &peer.leaf),
            false => Ok(()),
        }
    }
}

/// The client-side element. Stands below `dial`, which knows the peer; without TLS there is none, and nothing is checked.
///
/// A name whose first answer is refused is unregistered again. One that was registered before stays: it is refreshed, or it expires.
pub struct AuthorizeClient {
    policies: ClientPolicies,
    /// Names whose answers have passed.
    passed: Table<()>,
}

impl AuthorizeClient {
    /// Applies `policies`.
    pub fn new(policies: ClientPolicies) -> Self {
        Self { policies, passed: Table::default() }
    }
}

#[async_trait::async_trait]
impl<T: Object> Element<T> for AuthorizeClient {
    fn name(&self) -> &'static str {
        super::NAME
    }

    async fn register(&self, mut call: Call<T>, next: Next<T>) -> Result<T, Error> {
        let peer = call.ctx.link.as_ref().and_then(|link| link.peer.clone());
        let Some(peer) = peer.filter(|_| self.policies != ClientPolicies::none()) else {
            return next.register(call).await;
        };
        // Where the answer's path is put.
        call.ctx.path.get_or_insert_default();
        let (ctx, before) = (call.ctx.clone(), ctx_before(&call.ctx));
        let answer = next.register(call).await?;
        let Err(cause) = self.policies.check(&ctx, &peer) else {
            self.passed.insert(answer.name(), ());
            return Ok(answer);
        };
        let error = denied(&answer, &cause);
        if self.passed.get(answer.name()).is_some() {
            return Err(error);
        }
        match next.unregister(Call::new(answer, before)).await {
            Ok(()) => Err(error),
            Err(undo) => Err(error.also("and cannot be unregistered", &undo)),
        }
    }

    async fn unregister(&self, call: Call<T>, next: Next<T>) -> Result<(), Error> {
        self.passed.remove(call.message.name());
        next.unregister(call).await
    }
}

/// The context for taking a registration back: the path as it was on the way down, and time of its own.
fn ctx_before(ctx: &Context) -> Context {
    let path = ctx.path.as_ref().map(crate::PathHandle::detached);
    Context { path, deadline: None, cancel: None, ..ctx.clone() }.with_timeout(UNDO_TIMEOUT)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{RegistryPath, path::Segment};

    // Conformance 25
    #[test]
    fn masks_select_policies() {
        let stock = ["etc/nsm/opa/common/.*.rego", "etc/nsm/opa/registry/.*.rego", "etc/nsm/opa/client/.*.rego"];
        assert_eq!(ClientPolicies::from_masks(&stock), ClientPolicies::default());
        assert_eq!(ClientPolicies::from_masks::<&str>(&[]), ClientPolicies::none());
        let signed = ClientPolicies { next_token_signed: true, ..ClientPolicies::none() };
        assert_eq!(ClientPolicies::from_masks(&stock[1..]), signed);
    }

    // Conformance 22
    #[test]
    fn each_policy_by_itself() {
        let hour = Duration::from_secs(3600);
        let authority = nsm_identity::Authority::generate("example.org").unwrap();
        let (own, registry) =
            (authority.source("/own", 2 * hour).unwrap(), authority.source("/registry", 2 * hour).unwrap());
        let peer = Peer::from_leaf(&registry.svid().chain()[0]).unwrap();
        let token = |by: &nsm_identity::X509Source, to: &str, life| Segment {
            token: by.sign(Some(&format!("spiffe://example.org/{to}")), life).unwrap().jwt,
        };
        let check = |policies: ClientPolicies, segments: &[Segment]| {
            let path = RegistryPath { index: 0, segments: segments.to_vec() };
            policies.check(&Context { path: Some(crate::PathHandle::new(path)), ..Context::new() }, &peer)
        };
        let none = ClientPolicies::none();
        let good = [token(&own, "registry", hour), token(&registry, "own", hour)];
        assert_eq!(check(ClientPolicies::default(), &good), Ok(()));
        for (policies, bad, cause) in [
            (
                ClientPolicies { tokens_valid: true, ..none },
                [Segment { token: "x".into() }, good[1].clone()],
                "tokens_valid",
            ),
            (
                ClientPolicies { tokens_expired: true, ..none },
                [token(&own, "registry", Duration::ZERO), good[1].clone()],
                "tokens_expired",
            ),
            (
                ClientPolicies { tokens_chained: true, ..none },
                [token(&own, "other", hour), good[1].clone()],
                "tokens_chained",
            ),
            (
                ClientPolicies { next_token_signed: true, ..none },
                [good[0].clone(), token(&own, "own", hour)],
                "next_token_signed",
            ),
        ] {
            let refused = check(policies, &bad).unwrap_err();
            assert!(refused.starts_with(cause), "{cause}: {refused}");
            assert_eq!(check(none, &bad), Ok(()));
        }
        // A peer that sends no path proves nothing.
        assert!(check(ClientPolicies::default(), &[]).unwrap_err().contains("there is no next token"));
    }
}
