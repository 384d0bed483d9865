//! Who may register a name: NSM's policies as functions.

use crate::{Call, Context, Element, Error, Next, Object, RegistryPath, chain::Table, path::Segment};
use nsm_identity::{Claims, token};
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
        let covered = |file: &str| masks.iter().any(|mask| covers(mask.as_ref().trim_start_matches('/'), file));
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

/// Who registered each name. Shared by all ways into one registry, and seeded from the store after a restart.
pub struct Owners<T>(Table<T>);

impl<T: Object> Default for Owners<T> {
    fn default() -> Self {
        Self(Table::default())
    }
}

impl<T: Object> Owners<T> {
    /// Remembers a registered object.
    pub fn remember(&self, object: T) {
        let name = object.name().to_owned();
        self.0.with(|map| {
            let owner = map.get(&name).and_then(|known| known.path_ids().first().cloned());
            let mut object = object;
            // A second owner that was let in does not take the name over.
            if let (Some(owner), Some(first)) = (owner, object.path_ids_mut().first_mut()) {
                *first = owner;
            }
            map.insert(name, object);
        });
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
        let denied = |cause: String| {
            let text = format_args!(
                "registry: an error occurred during authorization policy check: no sufficient privileges: {cause}"
            )
            .to_string();
            Error::new(NAME, object.name(), text).with_code(tonic::Code::PermissionDenied)
        };
        let policies = self.policies;
        let mut owner = object.path_ids().first().cloned().unwrap_or_default();
        if let Some(peer) = &ctx.peer {
            let path = ctx.path.as_ref().map(crate::PathHandle::get).unwrap_or_default();
            let left = path.left();
            let wants_claims = policies.tokens_valid || policies.tokens_expired || policies.tokens_chained;
            if wants_claims {
                let claims = tokens_valid(left).map_err(denied)?;
                if policies.tokens_expired {
                    tokens_expired(&claims, SystemTime::now()).map_err(denied)?;
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

    async fn register(&self, call: Call<T>, next: Next<T>) -> Result<T, Error> {
        self.check(&call.message, &call.ctx, true)?;
        let answer = next.register(call).await?;
        self.owners.remember(answer.clone());
        Ok(answer)
    }

    async fn unregister(&self, call: Call<T>, next: Next<T>) -> Result<(), Error> {
        self.check(&call.message, &call.ctx, false)?;
        self.owners.forget(call.message.name());
        next.unregister(call).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nsm_identity::Authority;
    use nsm_proto::registry::{NetworkService, NetworkServiceEndpoint};
    use std::time::Duration;

    const LATER: Duration = Duration::from_secs(7200);

    fn owned<T: Object>(name: &str, owner: &str) -> T {
        let mut object = T::default();
        object.set_name(name.into());
        object.path_ids_mut().push(owner.into());
        object
    }

    // Conformance 25
    #[test]
    fn masks_select_policies() {
        let stock = ["etc/nsm/opa/common/.*.rego", "etc/nsm/opa/registry/.*.rego", "etc/nsm/opa/server/.*.rego"];
        assert_eq!(Policies::from_masks(&stock), Policies::default());
        assert_eq!(Policies::from_masks::<&str>(&[]), Policies::none());
        let tokens = Policies::from_masks(&["etc/nsm/opa/common/tokens_.*.rego"]);
        assert!(tokens.tokens_chained && !tokens.client_allowed);
    }

    // Conformance 22
    #[test]
    fn token_policies() {
        let hour = Duration::from_secs(3600);
        let authority = Authority::generate("example.org").unwrap();
        let (a, b) = (authority.source("/a", hour).unwrap(), authority.source("/b", hour).unwrap());
        let to_b = Segment { token: a.sign(Some("spiffe://example.org/b"), hour).unwrap().jwt };
        let to_a = Segment { token: b.sign(Some("spiffe://example.org/a"), hour).unwrap().jwt };
        let garbage = Segment { token: "garbage".into() };
        assert!(tokens_valid(&[to_b.clone(), garbage]).is_err());
        assert!(tokens_valid(&[]).is_ok());
        let claims = tokens_valid(&[to_b.clone(), to_a.clone()]).unwrap();
        assert!(tokens_chained(&claims).is_ok());
        assert!(tokens_chained(&claims[..1]).is_ok());
        assert!(tokens_chained(&[claims[0].clone(), claims[0].clone()]).is_err());
        assert!(tokens_expired(&claims, SystemTime::now()).is_ok());
        assert!(tokens_expired(&claims, SystemTime::now() + LATER).is_err());
        let path = RegistryPath { index: 1, segments: vec![to_b, to_a] };
        let leaf = |source: &nsm_identity::X509Source| source.svid().chain()[0].to_vec();
        assert!(prev_token_signed(&path, &leaf(&a)).is_ok());
        assert!(prev_token_signed(&path, &leaf(&b)).is_err());
        assert!(prev_token_signed(&RegistryPath { index: 0, ..path }, &leaf(&a)).is_err());
    }

    // Conformance 23, 112
    #[tokio::test]
    async fn a_name_belongs_to_its_first_owner() {
        let owners = Arc::new(Owners::default());
        let chain = Next::new(vec![Arc::new(Authorize::<NetworkServiceEndpoint>::new(Policies::default(), owners))]);
        let call = |owner| Call::new(owned::<NetworkServiceEndpoint>("e", owner), Context::new());
        chain.register(call("a")).await.unwrap();
        chain.register(call("a")).await.unwrap();
        assert_eq!(chain.register(call("b")).await.unwrap_err().code(), tonic::Code::PermissionDenied);
        assert!(chain.unregister(call("b")).await.is_err());
        chain.unregister(call("a")).await.unwrap();
        chain.register(call("b")).await.unwrap();
    }

    // Conformance 72
    #[tokio::test]
    async fn a_service_belongs_to_its_first_owner_unless_it_is_the_same() {
        for (equal_services, allowed) in [(false, false), (true, true)] {
            let policies = Policies { equal_services, ..Policies::default() };
            let chain = Next::new(vec![Arc::new(Authorize::<NetworkService>::new(policies, Arc::default()))]);
            chain.register(Call::new(owned("s", "a"), Context::new())).await.unwrap();
            assert_eq!(chain.register(Call::new(owned("s", "b"), Context::new())).await.is_ok(), allowed);
            let other = NetworkService { payload: "ETHERNET".into(), ..owned("s", "b") };
            assert!(chain.register(Call::new(other, Context::new())).await.is_err());
            assert!(chain.unregister(Call::new(owned("s", "b"), Context::new())).await.is_err());
            chain.unregister(Call::new(owned("s", "a"), Context::new())).await.unwrap();
        }
    }
}
