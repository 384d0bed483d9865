//! The policies of NSM as functions.

use crate::PathSegment;
use nsm_identity::{Claims, token};
use std::time::SystemTime;

/// What policies look at.
#[derive(Clone, Copy, Debug)]
pub struct Input<'a> {
    /// Whose view of the path it is.
    pub index: usize,
    /// The segments in question.
    pub segments: &'a [PathSegment],
    /// The peer's certificate, DER.
    pub leaf: &'a [u8],
    /// The time now.
    pub now: SystemTime,
}

/// One rule on a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// Every token can be read.
    TokensValid,
    /// No token has ended.
    TokensExpired,
    /// Each token is meant for the signer of the next one.
    TokensChained,
    /// The caller's token is signed by the caller's certificate.
    PrevTokenSigned,
    /// The next hop's token is signed by the next hop's certificate.
    NextTokenSigned,
}

use Policy::{NextTokenSigned, PrevTokenSigned, TokensChained, TokensExpired, TokensValid};

impl Policy {
    /// Where the policy lies in NSM's tree of policy files: settings select policies by masks over these paths.
    pub fn file(self) -> &'static str {
        match self {
            TokensValid => "etc/nsm/opa/common/tokens_valid.rego",
            TokensExpired => "etc/nsm/opa/common/tokens_expired.rego",
            TokensChained => "etc/nsm/opa/common/tokens_chained.rego",
            PrevTokenSigned => "etc/nsm/opa/server/prev_token_signed.rego",
            NextTokenSigned => "etc/nsm/opa/client/next_token_signed.rego",
        }
    }

    /// Whether the path satisfies the policy; the error says why not.
    pub fn check(self, input: &Input<'_>) -> Result<(), String> {
        let claims = |segment: &PathSegment| decode(segment);
        match self {
            TokensValid => input.segments.iter().try_for_each(|segment| claims(segment).map(drop)),
            TokensExpired => input.segments.iter().try_for_each(|segment| match claims(segment)?.expired(input.now) {
                true => Err(format!("the token of {} has expired", segment.name)),
                false => Ok(()),
            }),
            TokensChained => input.segments.windows(2).try_for_each(|pair| {
                let (this, next) = (claims(&pair[0])?, claims(&pair[1])?);
                match this.aud.contains(&next.sub) {
                    true => Ok(()),
                    false => Err(format!("the token of {} is not meant for {}", pair[0].name, next.sub)),
                }
            }),
            PrevTokenSigned => {
                let prev = input.index.checked_sub(1).and_then(|index| input.segments.get(index));
                signed(prev.ok_or("the path has no segment before this one")?, input.leaf)
            }
            NextTokenSigned => {
                let next = input.segments.get(input.index.saturating_add(1));
                signed(next.ok_or("the path has no segment after this one")?, input.leaf)
            }
        }
    }
}

fn decode(segment: &PathSegment) -> Result<Claims, String> {
    token::decode(&segment.token).map_err(|error| format!("the token of {}: {error}", segment.name))
}

fn signed(segment: &PathSegment, leaf: &[u8]) -> Result<(), String> {
    token::verify_es256(&segment.token, leaf)
        .map(drop)
        .map_err(|error| format!("the token of {}: {error}", segment.name))
}

/// A choice of policies, all of which have to hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policies(Vec<Policy>);

const ALL: [Policy; 5] = [TokensValid, TokensExpired, TokensChained, PrevTokenSigned, NextTokenSigned];

impl Policies {
    /// Those of a server: common ones, and the caller's signature.
    pub fn server() -> Self {
        Self(vec![TokensValid, TokensExpired, TokensChained, PrevTokenSigned])
    }

    /// Those of a client: common ones, and the next hop's signature.
    pub fn client() -> Self {
        Self(vec![TokensValid, TokensExpired, TokensChained, NextTokenSigned])
    }

    /// None: everything is allowed.
    pub fn any() -> Self {
        Self(Vec::new())
    }

    /// These policies.
    pub fn new(policies: impl Into<Vec<Policy>>) -> Self {
        Self(policies.into())
    }

    /// The others.
    #[must_use]
    pub fn without(mut self, policy: Policy) -> Self {
        self.0.retain(|other| *other != policy);
        self
    }

    /// The policies whose [`Policy::file`] is covered by a mask; a mask is a path in which `.*` stands for anything.
    pub fn from_masks<S: AsRef<str>>(masks: &[S]) -> Self {
        let covered = |policy: &Policy| masks.iter().any(|mask| covers(mask.as_ref(), policy.file()));
        Self(ALL.into_iter().filter(covered).collect())
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The first policy that does not hold, as a text.
    pub fn check(&self, input: &Input<'_>) -> Result<(), String> {
        self.0.iter().try_for_each(|policy| policy.check(input))
    }
}

/// Whether `mask` matches all of `path`; `.*` matches any run of characters.
fn covers(mask: &str, path: &str) -> bool {
    let mut rest = path;
    let mut parts = mask.trim_start_matches('/').split(".*").peekable();
    let mut first = true;
    while let Some(part) = parts.next() {
        let last = parts.peek().is_none();
        rest = match (first, last) {
            (true, true) => return rest == part,
            (true, false) => match rest.strip_prefix(part) {
                Some(rest) => rest,
                None => return false,
            },
            (false, true) => return rest.ends_with(part),
            (false, false) => match rest.find(part) {
                Some(at) => &rest[at + part.len()..],
                None => return false,
            },
        };
        first = false;
    }
    true
}

/// Whether `spiffe_id` may change an object whose first owner, if it has one, is `owner`.
pub fn client_allowed(owner: Option<&str>, spiffe_id: &str) -> bool {
    owner.is_none_or(|owner| owner == spiffe_id)
}

/// Whether a caller with connections `known` may watch what `selected` names. NSM ships this rule but does not enable it.
pub fn service_connection<'a>(
    known: impl IntoIterator<Item = &'a str>,
    selected: impl IntoIterator<Item = &'a str>,
) -> bool {
    let known: std::collections::HashSet<_> = known.into_iter().collect();
    selected.into_iter().any(|id| known.contains(id))
}

#[cfg(test)]
mod tests;
