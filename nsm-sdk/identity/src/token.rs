//! The tokens of an NSM path: JWTs signed by an X.509-SVID's key.
//!
//! Header `{"alg":"ES256","typ":"JWT"}`; claims `sub` (own SPIFFE ID), `exp` (seconds) and `aud` (an array with the SPIFFE ID of the
//! TLS peer). The policies of NSM look at these three only.

use crate::Error;
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use ring::{
    rand::SystemRandom,
    signature::{ECDSA_P256_SHA256_FIXED, ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, UnparsedPublicKey},
};
use serde::{Deserialize, Serialize};
use std::time::{Duration, SystemTime};

/// A signed token and when it ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Token {
    /// Compact form: three base64url parts.
    pub jwt: String,
    /// The `exp` claim.
    pub expires: SystemTime,
}

/// The claims that NSM's policies look at.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Claims {
    /// SPIFFE ID of the signer.
    pub sub: String,
    /// SPIFFE IDs it is for; empty if the signer had no TLS peer.
    pub aud: Vec<String>,
    /// End of life in seconds since 1970; fractions are cut. `None` if the token does not say.
    pub exp: Option<u64>,
}

impl Claims {
    /// Whether the token has ended. A token without an end counts as ended, as in NSM's policy `tokens_expired`.
    pub fn expired(&self, now: SystemTime) -> bool {
        let now = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        self.exp.is_none_or(|exp| now >= Duration::from_secs(exp))
    }
}

/// A P-256 key that signs tokens.
pub(crate) struct TokenKey {
    pair: EcdsaKeyPair,
    random: SystemRandom,
}

impl TokenKey {
    pub(crate) fn from_pkcs8(der: &[u8]) -> Option<Self> {
        let random = SystemRandom::new();
        let pair = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, der, &random).ok()?;
        Some(Self { pair, random })
    }

    /// Signs a header and claims; both are serialised as they are.
    pub(crate) fn sign(&self, header: &impl Serialize, claims: &impl Serialize) -> Result<String, Error> {
        let encode = |bytes: Result<Vec<u8>, serde_json::Error>| {
            bytes.map(|bytes| URL_SAFE_NO_PAD.encode(bytes)).map_err(|cause| Error::Token(cause.to_string()))
        };
        let mut jwt = format!("{}.{}", encode(serde_json::to_vec(header))?, encode(serde_json::to_vec(claims))?);
        let signature =
            self.pair.sign(&self.random, jwt.as_bytes()).map_err(|_| Error::Token("the key refuses to sign".into()))?;
        jwt.push('.');
        URL_SAFE_NO_PAD.encode_string(signature.as_ref(), &mut jwt);
        Ok(jwt)
    }
}

/// A JWT's header.
#[derive(Serialize, Deserialize, Debug)]
pub(crate) struct Header {
    pub(crate) alg: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) kid: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) typ: Option<String>,
}

impl Header {
    pub(crate) fn es256(kid: Option<String>) -> Self {
        Self { alg: "ES256".into(), kid, typ: Some("JWT".into()) }
    }
}

/// Claims in the form NSM writes: `aud` always an array, left out when there is no peer.
#[derive(Serialize)]
pub(crate) struct WireClaims<'a> {
    #[serde(skip_serializing_if = "<[&str]>::is_empty")]
    pub(crate) aud: &'a [&'a str],
    pub(crate) exp: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) iat: Option<u64>,
    pub(crate) sub: &'a str,
}

/// Reads the claims of a JWT without checking its signature. `aud` may be an array, one string or absent.
pub fn decode(jwt: &str) -> Result<Claims, Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Audience {
        One(String),
        Many(Vec<String>),
    }
    #[derive(Deserialize)]
    struct Wire {
        #[serde(default)]
        sub: String,
        aud: Option<Audience>,
        exp: Option<f64>,
    }
    let parts = parts(jwt)?;
    let _: Header = json("header", parts.header)?;
    base64("signature", parts.signature)?;
    let wire: Wire = json("claims", parts.claims)?;
    Ok(Claims {
        sub: wire.sub,
        aud: match wire.aud {
            None => Vec::new(),
            Some(Audience::One(one)) => vec![one],
            Some(Audience::Many(many)) => many,
        },
        // A cast from float saturates, and negative or not-a-number becomes 0: long ended.
        exp: wire.exp.map(|exp| exp as u64),
    })
}

/// Checks that a JWT is signed as ES256 by the key of a certificate (DER) and returns its claims. Does not look at its end.
pub fn verify_es256(jwt: &str, leaf_der: &[u8]) -> Result<Claims, Error> {
    let parts = parts(jwt)?;
    let header: Header = json("header", parts.header)?;
    if header.alg != "ES256" {
        return Err(Error::Token(format!("algorithm {:?} instead of ES256", header.alg)));
    }
    let signature = base64("signature", parts.signature)?;
    let leaf = crate::svid::parse(leaf_der)?;
    UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, &leaf.public_key().subject_public_key.data)
        .verify(parts.signed.as_bytes(), &signature)
        .map_err(|_| Error::Token("the signature is not by the certificate's key".into()))?;
    decode(jwt)
}

struct Parts<'a> {
    signed: &'a str,
    header: &'a str,
    claims: &'a str,
    signature: &'a str,
}

fn parts(jwt: &str) -> Result<Parts<'_>, Error> {
    jwt.rsplit_once('.')
        .and_then(|(signed, signature)| {
            let (header, claims) = signed.split_once('.')?;
            (!claims.contains('.')).then_some(Parts { signed, header, claims, signature })
        })
        .ok_or_else(|| Error::Token("it does not have three parts".into()))
}

fn base64(what: &str, text: &str) -> Result<Vec<u8>, Error> {
    URL_SAFE_NO_PAD.decode(text).map_err(|cause| Error::Token(format!("{what}: {cause}")))
}

fn json<T: for<'a> Deserialize<'a>>(what: &str, text: &str) -> Result<T, Error> {
    serde_json::from_slice(&base64(what, text)?).map_err(|cause| Error::Token(format!("{what}: {cause}")))
}

#[cfg(test)]
mod tests;
