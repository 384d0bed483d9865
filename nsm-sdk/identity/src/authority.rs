//! A certificate authority of one trust domain, for the development issuer and for tests.

use crate::{
    Bundles, Error, Identity, SpiffeId, Svid, Token, X509Source,
    token::{Header, TokenKey, WireClaims},
};
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, SanType, SerialNumber,
};
use rustls::pki_types::{CertificateDer, pem::PemObject};
use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

/// Life of the CA certificate.
const CA_LIFETIME: Duration = Duration::from_secs(10 * 365 * 86400);
/// Certificates are valid from a little earlier, for peers whose clock is behind.
const CLOCK_SKEW: Duration = Duration::from_secs(60);

/// A certificate authority (ECDSA P-256) of one trust domain.
pub struct Authority {
    trust_domain: String,
    certificate: CertificateDer<'static>,
    issuer: Issuer<'static, KeyPair>,
    token_key: TokenKey,
}

impl std::fmt::Debug for Authority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Authority").field(&self.trust_domain).finish()
    }
}

impl Authority {
    /// A new key and certificate.
    pub fn generate(trust_domain: &str) -> Result<Self, Error> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(ca_error)?;
        let certificate = ca_params(trust_domain)?.self_signed(&key).map_err(ca_error)?.der().clone();
        Self::new(trust_domain, key, certificate)
    }

    /// From what [`Authority::to_pem`] wrote.
    pub fn from_pem(trust_domain: &str, pem: &str) -> Result<Self, Error> {
        let key = KeyPair::from_pem(pem).map_err(ca_error)?;
        let certificate = CertificateDer::from_pem_slice(pem.as_bytes()).map_err(ca_error)?;
        let named = format!("spiffe://{trust_domain}");
        let own = crate::Peer::from_leaf(&certificate)?.spiffe_id;
        if own != named {
            return Err(ca_error(format!("it belongs to {own}, not to {named}")));
        }
        Self::new(trust_domain, key, certificate)
    }

    fn new(trust_domain: &str, key: KeyPair, certificate: CertificateDer<'static>) -> Result<Self, Error> {
        let token_key = TokenKey::from_pkcs8(key.serialized_der()).ok_or_else(|| ca_error("its key is not P-256"))?;
        // The issuer needs no more of its certificate than the name and the key: both are the same for a certificate made earlier.
        let issuer = Issuer::new(ca_params(trust_domain)?, key);
        Ok(Self { trust_domain: trust_domain.to_owned(), certificate, issuer, token_key })
    }

    /// Private key and certificate.
    pub fn to_pem(&self) -> String {
        let body = base64::engine::general_purpose::STANDARD.encode(&self.certificate);
        let mut pem = self.issuer.key().serialize_pem();
        pem.push_str("-----BEGIN CERTIFICATE-----\n");
        for line in body.as_bytes().chunks(64) {
            pem.push_str(&String::from_utf8_lossy(line));
            pem.push('\n');
        }
        pem.push_str("-----END CERTIFICATE-----\n");
        pem
    }

    /// The trust domain.
    pub fn trust_domain(&self) -> &str {
        &self.trust_domain
    }

    /// The CA certificate: the trust domain's bundle.
    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// Issues an SVID with a new key for a workload's path.
    pub fn issue(&self, path: &str, lifetime: Duration) -> Result<Svid, Error> {
        let id = SpiffeId::new(&self.trust_domain, path)?;
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(ca_error)?;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::OrganizationName, "SPIFFE");
        params.subject_alt_names = vec![SanType::URI(id.as_str().try_into().map_err(ca_error)?)];
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        params.serial_number = Some(SerialNumber::from(rand::random::<u64>() >> 1));
        set_validity(&mut params, lifetime);
        let leaf = params.signed_by(&key, &self.issuer).map_err(ca_error)?.der().clone();
        Svid::new(vec![leaf], key.serialize_der())
    }

    /// An SVID with this authority as the only bundle.
    pub fn identity(&self, path: &str, lifetime: Duration) -> Result<Identity, Error> {
        let mut bundles = Bundles::default();
        bundles.insert(&self.trust_domain, [&self.certificate])?;
        Ok(Identity { svid: Arc::new(self.issue(path, lifetime)?), bundles: Arc::new(bundles) })
    }

    /// A source with an SVID of this authority; rotate it with [`X509Source::update`].
    pub fn source(&self, path: &str, lifetime: Duration) -> Result<X509Source, Error> {
        Ok(X509Source::fixed(self.identity(path, lifetime)?))
    }

    /// A JWT-SVID (JWT-SVID.md), signed by the CA's key.
    pub fn issue_jwt(&self, path: &str, audience: &[&str], lifetime: Duration) -> Result<Token, Error> {
        let id = SpiffeId::new(&self.trust_domain, path)?;
        let now = unix(SystemTime::now());
        let exp = now + lifetime.as_secs();
        let claims = WireClaims { aud: audience, exp, iat: Some(now), sub: id.as_str() };
        let jwt = self.token_key.sign(&Header::es256(Some(self.key_id())), &claims)?;
        Ok(Token { jwt, expires: SystemTime::UNIX_EPOCH + Duration::from_secs(exp) })
    }

    /// The JWK set that verifies [`Authority::issue_jwt`], JSON.
    pub fn jwks(&self) -> String {
        // An uncompressed P-256 point: 0x04, x, y.
        let point = self.issuer.key().public_key_raw();
        let coordinate = |range| URL_SAFE_NO_PAD.encode(point.get(range).unwrap_or_default());
        serde_json::json!({ "keys": [{
            "kty": "EC", "crv": "P-256", "alg": "ES256", "use": "jwt-svid", "kid": self.key_id(),
            "x": coordinate(1..33), "y": coordinate(33..65),
        }]})
        .to_string()
    }

    fn key_id(&self) -> String {
        let digest = ring::digest::digest(&ring::digest::SHA256, self.issuer.key().public_key_raw());
        URL_SAFE_NO_PAD.encode(digest.as_ref().get(..16).unwrap_or_default())
    }
}

fn ca_params(trust_domain: &str) -> Result<CertificateParams, Error> {
    let id: SpiffeId = format!("spiffe://{trust_domain}").parse()?;
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationName, "SPIFFE");
    params.distinguished_name.push(DnType::CommonName, trust_domain);
    params.subject_alt_names = vec![SanType::URI(id.as_str().try_into().map_err(ca_error)?)];
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    set_validity(&mut params, CA_LIFETIME);
    Ok(params)
}

fn set_validity(params: &mut CertificateParams, lifetime: Duration) {
    let now = SystemTime::now();
    params.not_before = (now - CLOCK_SKEW).into();
    params.not_after = (now + lifetime).into();
}

fn unix(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs()
}

fn ca_error(cause: impl ToString) -> Error {
    Error::certificate("certificate authority", cause)
}
