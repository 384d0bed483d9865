//! X.509-SVIDs, trust bundles and peers (X509-SVID.md).

use crate::{Error, SpiffeId, token::TokenKey};
use rustls::{
    pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, TrustAnchor, UnixTime},
    sign::CertifiedKey,
};
use std::{
    collections::BTreeMap,
    fmt,
    sync::Arc,
    time::{Duration, SystemTime},
};
use x509_parser::{extensions::GeneralName, prelude::FromDer, prelude::X509Certificate};

/// The authenticated other side of a connection.
#[derive(Clone, PartialEq, Eq)]
pub struct Peer {
    /// `spiffe://domain/path`.
    pub spiffe_id: String,
    /// Its certificate, DER.
    pub leaf: Arc<[u8]>,
    /// When the certificate ends.
    pub not_after: SystemTime,
}

impl fmt::Debug for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Peer").field("spiffe_id", &self.spiffe_id).finish_non_exhaustive()
    }
}

impl Peer {
    /// Reads identity and end of life from a leaf certificate. Does not check who signed it.
    pub fn from_leaf(der: &[u8]) -> Result<Self, Error> {
        let leaf = parse(der)?;
        let seconds = u64::try_from(leaf.validity().not_after.timestamp()).unwrap_or(0);
        Ok(Self {
            spiffe_id: spiffe_id(&leaf)?.to_string(),
            leaf: der.into(),
            not_after: SystemTime::UNIX_EPOCH + Duration::from_secs(seconds),
        })
    }
}

/// One X.509-SVID with its private key.
pub struct Svid {
    id: SpiffeId,
    chain: Vec<CertificateDer<'static>>,
    key_der: Vec<u8>,
    not_before: SystemTime,
    not_after: SystemTime,
    certified: Arc<CertifiedKey>,
    token_key: Option<TokenKey>,
}

impl fmt::Debug for Svid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Svid")
            .field("id", &self.id.as_str())
            .field("not_after", &self.not_after)
            .finish_non_exhaustive()
    }
}

impl Svid {
    /// From a chain (leaf first, DER) and a private key (PKCS#8 DER).
    pub fn new(chain: Vec<CertificateDer<'static>>, key_der: Vec<u8>) -> Result<Self, Error> {
        let leaf_der = chain.first().ok_or_else(|| Error::certificate("SVID", "no certificate"))?;
        let leaf = parse(leaf_der)?;
        if leaf.is_ca() {
            return Err(Error::certificate("SVID", "the leaf is a CA certificate"));
        }
        let id = spiffe_id(&leaf)?;
        let time = |at: i64| SystemTime::UNIX_EPOCH + Duration::from_secs(u64::try_from(at).unwrap_or(0));
        let (not_before, not_after) =
            (time(leaf.validity().not_before.timestamp()), time(leaf.validity().not_after.timestamp()));
        let private = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key_der.clone()));
        let signing = rustls::crypto::ring::sign::any_supported_type(&private)
            .map_err(|cause| Error::certificate("SVID private key", cause))?;
        let certified = CertifiedKey::new(chain.clone(), signing);
        certified.keys_match().map_err(|cause| Error::certificate("SVID private key", cause))?;
        let token_key = TokenKey::from_pkcs8(&key_der);
        Ok(Self { id, chain, key_der, not_before, not_after, certified: Arc::new(certified), token_key })
    }

    /// Whose it is.
    pub fn id(&self) -> &SpiffeId {
        &self.id
    }

    /// Leaf first, DER.
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.chain
    }

    /// PKCS#8, DER.
    pub fn key_der(&self) -> &[u8] {
        &self.key_der
    }

    /// Start of validity.
    pub fn not_before(&self) -> SystemTime {
        self.not_before
    }

    /// End of validity.
    pub fn not_after(&self) -> SystemTime {
        self.not_after
    }

    pub(crate) fn certified(&self) -> &Arc<CertifiedKey> {
        &self.certified
    }

    /// The key for tokens; `None` if the SVID's key is not ECDSA P-256.
    pub(crate) fn token_key(&self) -> Option<&TokenKey> {
        self.token_key.as_ref()
    }
}

/// Trust anchors by trust domain.
#[derive(Clone, Debug, Default)]
pub struct Bundles(BTreeMap<String, Vec<TrustAnchor<'static>>>);

impl Bundles {
    /// Adds the CA certificates (DER) of a trust domain.
    pub fn insert<'a>(
        &mut self,
        trust_domain: &str,
        certificates: impl IntoIterator<Item = &'a CertificateDer<'a>>,
    ) -> Result<(), Error> {
        let anchors = certificates
            .into_iter()
            .map(|der| webpki::anchor_from_trusted_cert(der).map(|anchor| anchor.to_owned()))
            .collect::<Result<Vec<_>, _>>()
            .map_err(|cause| Error::certificate("trust bundle", cause))?;
        self.0.entry(trust_domain.to_owned()).or_default().extend(anchors);
        Ok(())
    }

    /// The trust domains with a bundle.
    pub fn trust_domains(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }

    /// Checks that a chain (leaf first) ends in the bundle of the trust domain that the leaf names, and returns whose it is.
    pub(crate) fn verify(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
        usage: webpki::KeyUsage,
    ) -> Result<SpiffeId, Error> {
        let id = spiffe_id(&parse(leaf)?)?;
        let untrusted = |cause: String| Error::Untrusted { id: id.to_string(), cause };
        if id.path().is_empty() {
            return Err(untrusted("it names a trust domain, not a workload".into()));
        }
        let anchors = self
            .0
            .get(id.trust_domain())
            .ok_or_else(|| untrusted(format!("there is no bundle of trust domain {}", id.trust_domain())))?;
        let algorithms = rustls::crypto::ring::default_provider().signature_verification_algorithms;
        webpki::EndEntityCert::try_from(leaf)
            .and_then(|leaf| {
                leaf.verify_for_usage(algorithms.all, anchors, intermediates, now, usage, None, None).map(|_| ())
            })
            .map_err(|cause| untrusted(cause.to_string()))?;
        Ok(id)
    }
}

/// What the Workload API gives at one moment.
#[derive(Clone, Debug)]
pub struct Identity {
    /// The own SVID.
    pub svid: Arc<Svid>,
    /// Whom to trust.
    pub bundles: Arc<Bundles>,
}

/// Splits concatenated DER certificates, the form of the Workload API.
pub fn split_certificates(mut der: &[u8]) -> Result<Vec<CertificateDer<'static>>, Error> {
    let mut found = Vec::new();
    while !der.is_empty() {
        let (rest, _) = X509Certificate::from_der(der).map_err(|cause| Error::certificate("certificate", cause))?;
        let one = der.get(..der.len() - rest.len()).unwrap_or_default();
        found.push(CertificateDer::from(one.to_vec()));
        der = rest;
    }
    Ok(found)
}

pub(crate) fn parse(der: &[u8]) -> Result<X509Certificate<'_>, Error> {
    match X509Certificate::from_der(der) {
        Ok(([], certificate)) => Ok(certificate),
        Ok(_) => Err(Error::certificate("certificate", "bytes after its end")),
        Err(cause) => Err(Error::certificate("certificate", cause)),
    }
}

/// Exactly one URI SAN, and it is a SPIFFE ID (X509-SVID.md, section 2).
fn spiffe_id(certificate: &X509Certificate<'_>) -> Result<SpiffeId, Error> {
    let names = certificate
        .subject_alternative_name()
        .map_err(|cause| Error::certificate("subject alternative name", cause))?
        .ok_or_else(|| Error::certificate("certificate", "it has no subject alternative name"))?;
    let mut uris = names.value.general_names.iter().filter_map(|name| match name {
        GeneralName::URI(uri) => Some(*uri),
        _ => None,
    });
    match (uris.next(), uris.next()) {
        (Some(uri), None) => uri.parse(),
        (None, _) => Err(Error::certificate("certificate", "it has no SPIFFE ID")),
        (Some(_), Some(_)) => Err(Error::certificate("certificate", "it has more than one URI name")),
    }
}
