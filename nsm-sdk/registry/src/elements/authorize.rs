//! Who may register a name: NSM's policies as functions.

mod client;

pub use client::{AuthorizeClient, ClientPolicies};

use crate::{Call, Context, Element, Error, Next, Object, RegistryPath, chain::Table, path::Segment};
use nsm_identity::{Claims, clock, token};
use std::{sync::Arc, time::SystemTime};

const NAME: &str = "authorize";

/// Which policies apply. All of them unless switched off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policies {
    /// Every token of the path reads as a JWT.
    pub tokens_valid: bool,
    /// No token of the path has ended.
    pub tokens_expired: bool,
    /// Each token is meant for the signer of the next.
    pub tokens_chained: bool,
    /// The caller's token is signed by the caller's TLS key.
    pub prev_token_signed: bool,
    /// Only who registered a name first may register it again or remove it.
    pub client_allowed: bool,
    /// Lets another owner register a *network service* that equals the registered one: a no-op that several replicas of
    /// one endpoint do as a matter of course. Not among NSM's own policies.
    pub equal_services: bool,
}

impl Default for Policies {
    fn default() -> Self {
        Self {
            tokens_valid: true,
            tokens_expired: true,
            tokens_chained: true,
            prev_token_signed: true,
            client_allowed: true,
            equal_services: false,
        }
    }
}

impl Policies {
    /// The policies whose file in NSM's tree is covered by a mask, in which `.*` stands for anything.
    pub fn from_masks<S: AsRef<str>>(masks: &[S]) -> Self {
        let covered = covered(masks);
        Self {
            tokens_valid: covered("etc/nsm/opa/common/tokens_valid.rego"),
            tokens_expired: covered("etc/nsm/opa/common/tokens_expired.rego"),
            tokens_chained: covered("etc/nsm/opa/common/tokens_chained.rego"),
            prev_token_signed: covered("etc/nsm/opa/server/prev_token_signed.rego"),
            client_allowed: covered("etc/nsm/opa/registry/client_allowed.rego"),
            equal_services: false,
        }
    }

    /// No policy: everybody may do everything.
    pub fn none() -> Self {
        Self {
            tokens_valid: false,
            tokens_expired: false,
            tokens_chained: false,
            prev_token_signed: false,
            client_allowed: false,
            equal_services: false,
        }
    }
}

/// Whether a mask covers a policy's file.
fn covered<S: AsRef<str>>(masks: &[S]) -> impl Fn(&str) -> bool {
    |file| masks.iter().any(|mask| covers(mask.as_ref().trim_start_matches('/'), file))
}

/// Whether `mask` matches all of `path`.
fn covers(mask: &str, path: &str) -> bool {
    match mask.split_once(".*") {
        None => mask == path,
        Some((start, rest)) => path.strip_prefix(start).is_some_and(|tail| {
            tail.char_indices().map(|(at, _)| at).chain([tail.len()]).any(|at| covers(rest, &tail[at..]))
        }),
    }
}

/// Every token decodes; the claims in the order of the segments.
pub fn tokens_valid(segments: &[Segment]) -> Result<Vec<Claims>, String> {
    segments
        .iter()
        .enumerate()
        .map(|(i, segment)| token::decode(&segment.token).map_err(|cause| format!("tokens_valid: token {i}: {cause}")))
        .collect()
}

/// No token has ended.
pub fn tokens_expired(claims: &[Claims], now: SystemTime) -> Result<(), String> {
    match claims.iter().position(|claims| claims.expired(now)) {
        Some(i) => Err(format!("tokens_expired: token {i} has expired")),
        None => Ok(()),
    }
}

/// Each token names the next one's signer as its audience.
pub fn tokens_chained(claims: &[Claims]) -> Result<(), String> {
    for (i, pair) in claims.windows(2).enumerate() {
        if let [left, right] = pair
            && !left.aud.contains(&right.sub)
        {
            return Err(format!("tokens_chained: token {i} is not meant for {:?}", right.sub));
        }
    }
    Ok(())
}

/// The token before the one at the index is signed by the peer's key.
pub fn prev_token_signed(path: &RegistryPath, leaf: &[u8]) -> Result<(), String> {
    let previous = path.index.checked_sub(1).and_then(|index| path.segments.get(index));
    let Some(previous) = previous else { return Err("prev_token_signed: there is no previous token".into()) };
    token::verify_es256(&previous.token, leaf).map(|_| ()).map_err(|cause| format!("prev_token_signed: {cause}"))
}

/// The token after the one at the index is signed by the peer's key.
pub fn next_token_signed(path: &RegistryPath, leaf: &[u8]) -> Result<(), String> {
    let next = path.index.checked_add(1).and_then(|index| path.segments.get(index));
    let Some(next) = next else { return Err("next_token_signed: there is no next token".into()) };
    token::verify_es256(&next.token, leaf).map(|_| ()).map_err(|cause| format!("next_token_signed: {cause}"))
}

/// The refusal of a policy.
fn denied<T: Object>(object: &T, cause: &str) -> Error {
    let text = format_args!(
        "registry: an error occurred during authorization policy check: no sufficient privileges: {cause}"
    )
    .to_string();
    Error::new(NAME, object.name(), text).with_code(tonic::Code::PermissionDenied)
}

/// Who registered each name. Shared by all ways into one registry, and seeded from the store after a restart.
pub struct Owners<T>(Table<T>);

impl<T: Object> Default for Owners<T> {
    fn default() -> Self {
        Self(Table::default())
    }
}

impl<T: Object> Owners<T> {
    /// Remembers a registered object, which belongs to the first of its path ids.
    pub fn remember(&self, object: T) {
        let name = object.name().to_owned();
        self.0.insert(&name, object);
    }

    /// SPIFFE id of a name's owner.
    pub fn owner(&self, name: &str) -> Option<String> {
        self.0.with(|map| map.get(name)?.path_ids().first().cloned())
    }

    /// Forgets a removed object.
    pub fn forget(&self, name: &str) {
        self.0.remove(name);
    }

    /// Whether `id` may work on the object's name.
    fn check(&self, object: &T, id: &str, equal_services: bool, registering: bool) -> Result<(), String> {
        self.0.with(|map| {
            let Some(known) = map.get(object.name()) else { return Ok(()) };
            let Some(owner) = known.path_ids().first() else { return Ok(()) };
            if owner == id || (registering && equal_services && known.equivalent(object)) {
                return Ok(());
            }
            Err(format!("client_allowed: {} {:?} belongs to {owner}, not to {id:?}", T::KIND, object.name()))
        })
    }
}

/// The server-side element. Calls without a TLS peer (from inside the process) only have to own the name.
pub struct Authorize<T> {
    policies: Policies,
    owners: Arc<Owners<T>>,
}

impl<T: Object> Authorize<T> {
    /// Applies `policies`; `owners` may be shared with another chain into the same registry.
    pub fn new(policies: Policies, owners: Arc<Owners<T>>) -> Self {
        Self { policies, owners }
    }

    fn check(&self, object: &T, ctx: &Context, registering: bool) -> Result<(), Error> {
        let denied = |cause: String| denied(object, &cause);
        let policies = self.policies;
        let mut owner = object.path_ids().first().cloned().unwrap_or_default();
        if let Some(peer) = &ctx.peer {
            let path = ctx.path.as_ref().map(crate::PathHandle::get).unwrap_or_default();
            let left = path.left();
            let wants_claims = policies.tokens_valid || policies.tokens_expired || policies.tokens_chained;
            if wants_claims {
                let claims = tokens_valid(left).map_err(denied)?;
                if policies.tokens_expired {
                    tokens_expired(&claims, clock::now()).map_err(denied)?;
                }
                if policies.tokens_chained {
                    tokens_chained(&claims).map_err(denied)?;
                }
            }
            if policies.prev_token_signed {
                prev_token_signed(&path, &peer.leaf).map_err(denied)?;
            }
            owner = left.first().and_then(|first| token::decode(&first.token).ok()).map(|c| c.sub).unwrap_or_default();
        }
        if policies.client_allowed {
            self.owners.check(object, &owner, policies.equal_services, registering).map_err(denied)?;
        }
        Ok(())
    }
}

#[async_trait::async_trait]
impl<T: Object> Element<T> for Authorize<T> {
    fn name(&self) -> &'static str {
        NAME
    }

    async fn register(&self, mut call: Call<T>, next: Next<T>) -> Result<T, Error> {
        self.check(&call.message, &call.ctx, true)?;
        // A second owner that was let in does not take the name over: not here, and not in what is below and keeps the object.
        let owner = self.owners.owner(call.message.name()).filter(|_| self.policies.client_allowed);
        let caller = match (owner, call.message.path_ids_mut().first_mut()) {
            (Some(owner), Some(first)) => Some(std::mem::replace(first, owner)),
            _ => None,
        };
        let mut answer = next.register(call).await?;
        self.owners.remember(answer.clone());
        if let (Some(caller), Some(first)) = (caller, answer.path_ids_mut().first_mut()) {
            *first = caller;
        }
        Ok(answer)
    }

    async fn unregister(&self, call: Call<T>, next: Next<T>) -> Result<(), Error> {
        self.check(&call.message, &call.ctx, false)?;
        self.owners.forget(call.message.name());
        next.unregister(call).await
    }
}

#[cfg(test)]
mod tests;
